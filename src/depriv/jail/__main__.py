# SPDX-License-Identifier: Apache-2.0
"""The jail: reads one plan from a descriptor, checks it, does exactly it, answers on the same descriptor, ends.

Started as ``python3 -I -S .../depriv/jail/__main__.py FD``, as root. FD is a connected UNIX stream socket (its wire
format: docs/adr/0001): in comes the length in decimal, a newline, the plan as JSON; out go lines of JSON:

    {"event": "started", "pid": ..., "granted": {...}}      with a pidfd attached; QEMU executes
    {"event": "emptied"}                                    answer to b"E": the plan's `after` is done
    {"event": "failed", "step": ..., "errno": ..., "cause": ...}

then b"D" releases it: the jail ends and QEMU stays. If the socket closes before that, QEMU is killed: a start that
nobody completes leaves nothing behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import stat
import sys as python
import time

# -I leaves out the package's own folder. Last, so that nothing in it can stand in for the standard library.
python.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from depriv import codec, steps
from depriv.check import check
from depriv.jail import apply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_PLAN_BYTES_MAX = 1 << 20
_HEAD_BYTES_MAX = len(str(_PLAN_BYTES_MAX))


class Failed(Exception):  # noqa: N818 (it is what the answer says)
    """A step failed: what it is, the errno or 0, and the cause in words."""

    def __init__(self, step: str, error: Exception) -> None:
        """Take the step as ``describe`` prints it."""
        super().__init__(step)
        self.step = step
        self.errno = (error.errno or 0) if isinstance(error, OSError) else 0
        self.cause = str(error)


def main() -> int:
    """Do the plan that comes in. Return 0 only if it was done and released."""
    control = socket.socket(fileno=int(python.argv[1]))
    control.set_inheritable(False)
    os.environ.clear()
    try:
        text = read_plan(control)
        if not text:
            return 0  # the toolstack changed its mind before it sent anything
        plan = codec.decode(text)
        check(plan)
    except (ValueError, OSError, RecursionError) as error:  # RecursionError: JSON nested too deep
        answer(control, {"event": "failed", "step": "check the plan", "errno": 0, "cause": str(error)})
        return 1
    try:
        if isinstance(plan.steps[-1], steps.Execute):
            launch(plan, control)
        else:
            state = apply.State(socket.socketpair()[0])
            for step in plan.steps:
                attempt(step, state)
            answer(control, {"event": "done"})
    except Failed as failed:
        answer(control, {"event": "failed", "step": failed.step, "errno": failed.errno, "cause": failed.cause})
        return 1
    return 0


def read_plan(control: socket.socket) -> bytes:
    """Return the framed plan, or nothing if the socket was closed before the first byte."""
    data = b""
    while b"\n" not in data:
        chunk = control.recv(65536)
        if not chunk:
            return b""
        data += chunk
        if len(data) > _HEAD_BYTES_MAX and b"\n" not in data[: _HEAD_BYTES_MAX + 1]:
            raise ValueError("the plan does not begin with its length")
    head, _, data = data.partition(b"\n")
    if not head.isdigit():  # int() takes signs, blanks and underscores, too
        raise ValueError(f"{head[:20]!r} is not the length of a plan")
    size = int(head)
    if not 0 < size <= _PLAN_BYTES_MAX:
        raise ValueError(f"a plan of {size} bytes")
    while len(data) < size:
        chunk = control.recv(size - len(data))
        if not chunk:
            raise ValueError("the plan ends early")
        data += chunk
    if len(data) > size:
        raise ValueError("more than one plan")
    return data


def answer(control: socket.socket, message: dict[str, object], fds: tuple[int, ...] = ()) -> None:
    """Send one line; a toolstack that is gone is noticed by the next read."""
    line = json.dumps(message).encode() + b"\n"
    try:
        if fds:
            socket.send_fds(control, [line], list(fds))
        else:
            control.sendall(line)
    except OSError:
        pass


def attempt(step: steps.Step, state: apply.State) -> None:
    """Do one step, or raise ``Failed`` that names it."""
    try:
        apply.apply(step, state)
    except Exception as error:
        raise Failed(steps.describe(step), error) from error


def launch(plan: steps.Plan, control: socket.socket) -> None:
    """Do the steps up to the fork, fork, see the child to its exec, and wait to be released."""
    ours, theirs = socket.socketpair()
    state = apply.State(theirs)
    fork_at = next(number for number, step in enumerate(plan.steps) if isinstance(step, steps.BecomeInit))
    cgroup = next(step.path for step in plan.steps if isinstance(step, steps.MakeCgroup))
    cgroup_fd = -1
    child = 0
    times: list[tuple[str, float]] = []
    try:
        for step in plan.steps[:fork_at]:
            attempt(step, state)
            times.append((type(step).__name__, time.monotonic()))
            if isinstance(step, steps.MakeCgroup):
                cgroup_fd = os.open(cgroup.rpartition("/")[0], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        child = fork(plan.steps[fork_at])
        if child == 0:
            ours.close()
            become(plan.steps[fork_at:], state)
        state.handshake.close()
        see_to_exec(child, plan, state, ours)
        times.append(("Execute", time.monotonic()))
        pidfd = os.pidfd_open(child)
        started: dict[str, object] = {"event": "started", "pid": child, "granted": granted(state), "times": times}
        answer(control, started, (pidfd,))
        os.close(pidfd)
        wait_for_release(plan, state, control)
    except BaseException:
        clean_up(child, cgroup.rpartition("/")[2], cgroup_fd, state)
        raise


def fork(step: steps.Step) -> int:
    """Fork, or raise ``Failed``: the host or the caller's cgroup may have no room for another process."""
    try:
        return os.fork()
    except OSError as error:
        raise Failed(steps.describe(step), error) from error


def become(rest: tuple[steps.Step, ...], state: apply.State) -> NoReturn:
    """In the child: do the rest of the steps; the last one is exec. On failure tell the parent, and end."""
    try:
        for step in rest:
            attempt(step, state)
    except Failed as failed:
        report = {"step": failed.step, "errno": failed.errno, "cause": failed.cause}
        state.handshake.sendall(json.dumps(report).encode())
    finally:
        os._exit(125)


def see_to_exec(child: int, plan: steps.Plan, state: apply.State, ours: socket.socket) -> None:
    """Serve the child's one request; its silence at the end means that exec closed the socket."""
    data = b""
    while True:
        chunk = ours.recv(4096)
        if not chunk:
            break
        data += chunk
        if data == b"U":
            data = b""
            step = next(step for step in plan.steps if isinstance(step, steps.NewUser))
            try:
                apply.map_user(child, step, state)
            except OSError as error:
                raise Failed(steps.describe(step), error) from error
            ours.sendall(b"G")
    if data:
        report = json.loads(data)
        failed = Failed(report["step"], OSError(report["errno"], ""))
        failed.cause = report["cause"]
        raise failed
    # A child that was killed closes the socket, too.
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        code = os.waitstatus_to_exitcode(status)
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        raise Failed(steps.describe(plan.steps[-1]), ValueError(f"the process ended at once, with {how}"))


def granted(state: apply.State) -> dict[str, list[object]]:
    """Return role -> kind, device, inode, device number, access: what the audit may expect to find open."""
    kinds = ((stat.S_ISREG, "file"), (stat.S_ISBLK, "block"), (stat.S_ISCHR, "char"), (stat.S_ISFIFO, "fifo"))
    handed = set(state.granted.values())
    found: dict[str, list[object]] = {}
    for role, fd in state.opened.items():
        if fd not in handed:
            continue
        have = os.fstat(fd)
        kind = next((name for test, name in kinds if test(have.st_mode)), "socket")
        access = "ro" if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY else "rw"
        found[role] = [kind, have.st_dev, have.st_ino, have.st_rdev, access]
    for name, have in state.nodes.items():
        found.setdefault(name, ["char", have.st_dev, have.st_ino, have.st_rdev, "rw"])
    return found


def wait_for_release(plan: steps.Plan, state: apply.State, control: socket.socket) -> None:
    """Close our copies of what QEMU got, then do what the toolstack asks, until it releases QEMU."""
    # Now, not at our end: an image lock belongs to the open file, and a copy here would keep it after QEMU's death.
    for fd in set(state.opened.values()):
        os.close(fd)
    while True:
        word = control.recv(1)
        if word == b"E":
            for step in plan.after:
                attempt(step, state)
            answer(control, {"event": "emptied"})
        elif word == b"D":
            return
        else:
            raise Failed("wait for the toolstack", ValueError("it went away before the start was complete"))


def clean_up(child: int, leaf: str, cgroup_fd: int, state: apply.State) -> None:
    """Undo what outlives this process: the child and its cgroup. The namespaces and their mounts end with them."""
    if child > 0:
        try:
            os.kill(child, signal.SIGKILL)  # process 1 of its pid namespace: the kernel kills the rest with it
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
    if state.cgroup_procs >= 0 and cgroup_fd >= 0:
        for _ in range(200):
            try:
                os.rmdir(leaf, dir_fd=cgroup_fd)
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.005)  # EBUSY until the last task has left


if __name__ == "__main__":
    status = main()
    # Not python.exit: nothing is left to flush, and in the emptied root there is nothing to import.
    os._exit(status)
