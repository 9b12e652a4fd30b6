# SPDX-License-Identifier: Apache-2.0
"""The jail process: reads one plan from a descriptor, checks it, does exactly it, answers on the same one, ends.

The descriptor is a connected UNIX stream socket. Messages both ways are a length in decimal, a newline, and words
separated by NUL (:mod:`depriv.codec`, docs/adr/0001). In comes a plan; out go

    started PID, what was granted, when each step was done      QEMU executes, its guest stopped
    emptied                                                     answer to b"E": the plan's `after` is done
    ended STATUS                                                answer to b"W", when QEMU has ended
    done                                                        a plan that only reaps is done
    failed STEP ERRNO CAUSE                                     and the jail ends, having undone all

then b"D" releases it: the jail ends and QEMU stays. If the socket closes before, QEMU is killed: nothing is left.
"""

from __future__ import annotations

import fcntl
import os
import resource
import select
import time

from depriv import codec, steps
from depriv.check import check
from depriv.jail import apply, sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_PLAN_BYTES_MAX = 1 << 20
_FILES = 1024
_ACCESSES = ("ro", "wo", "rw")  # by O_RDONLY, O_WRONLY, O_RDWR


class Failed(Exception):  # noqa: N818 (it is what the answer says)
    """A step failed. Its arguments are words: the step as ``describe`` prints it, the errno or 0, the cause."""


def failed(step: str, error: Exception) -> Failed:
    """Return what is to be raised when an error ends a step."""
    errno = (error.errno or 0) if isinstance(error, OSError) else 0
    return Failed(step, str(errno), str(error).replace("\0", " "))


def main(control: int) -> int:
    """Do the plan that comes in on ``control``. Return 0 only if it was done and released."""
    os.set_inheritable(control, False)
    os.environ.clear()
    os.umask(0o022)  # modes are the plan's, not the caller's
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _FILES)), hard))
    try:
        text = read_plan(control)
        if not text:
            return 0  # the toolstack changed its mind before it sent anything
        plan = codec.decode(text)
        check(plan)
    except (ValueError, OSError) as error:
        answer(control, ["failed", "check the plan", "0", str(error)])
        return 1
    try:
        if isinstance(plan.steps[-1], steps.Execute):
            launch(plan, control)
        else:
            state = apply.State(control)
            for step in plan.steps:
                attempt(step, state)
            answer(control, ["done"])
    except (Failed, OSError) as error:
        reason = error if isinstance(error, Failed) else failed("prepare the jail", error)
        answer(control, ["failed", *reason.args])
        return 1
    return 0


def read_plan(control: int) -> bytes:
    """Return the body of the plan's message, or nothing if the socket was closed before the first byte."""
    stream = open(control, "rb", buffering=0, closefd=False)  # noqa: SIM115 (the descriptor is used on)
    head = stream.readline(10)
    if not head:
        return b""
    if not head[:-1].isdigit() or not head.endswith(b"\n") or not 0 < int(head) <= _PLAN_BYTES_MAX:
        raise ValueError("a plan begins with its length")
    data = b""
    while len(data) < int(head):
        chunk = stream.read(int(head) - len(data) + 1)  # one more than may come
        if not chunk:
            raise ValueError("the plan ends early")
        data += chunk
    if len(data) > int(head):
        raise ValueError("the plan goes on after its end")
    return data


def answer(control: int, words: list[str]) -> None:
    """Send one message; a toolstack that is gone is noticed by the next read."""
    try:
        os.write(control, codec.pack(words))
    except OSError:
        return


def attempt(step: steps.Step, state: apply.State) -> None:
    """Do one step, or raise ``Failed`` that names it."""
    try:
        apply.ACTS[type(step)](step, state)
    except Exception as error:
        raise failed(steps.describe(step), error) from error


def launch(plan: steps.Plan, control: int) -> None:
    """Do the steps up to the fork, fork, see the child to its exec, and wait to be released."""
    heard, tell = os.pipe()
    waits, go = os.pipe()
    state = apply.State(control, tell, waits)
    fork_at = next(number for number, step in enumerate(plan.steps) if isinstance(step, steps.BecomeInit))
    cgroup = next(step.path for step in plan.steps if isinstance(step, steps.MakeCgroup))
    child = -1
    times: list[str] = []
    try:
        for step in plan.steps[:fork_at]:
            attempt(step, state)
            times += [type(step).__name__, str(time.monotonic_ns())]
        try:
            # Into the cgroup where the kernel can: moving there later waits for an RCU grace period, 15 ms.
            child = sys.clone_into_cgroup(state.cgroup) if state.cgroup_version == 2 else os.fork()
        except OSError as error:  # no room for another process, on the host or in the caller's cgroup
            raise failed(steps.describe(plan.steps[fork_at]), error) from error
        if child == 0:
            os.close(go)
            become(plan.steps[fork_at:], state)
        os.close(state.tell)
        see_to_exec(child, plan, state, heard, go)
        times += ["Execute", str(time.monotonic_ns())]
        answer(control, ["started", str(child), *granted(state), "times", *times])
        wait_for_release(plan, state, control, child)
    except BaseException:
        clean_up(child, os.path.basename(cgroup), state)
        raise


def become(rest: tuple[steps.Step, ...], state: apply.State) -> NoReturn:
    """In the child: do the rest of the steps; the last one is exec. On failure tell the parent, and end."""
    try:
        for step in rest:
            attempt(step, state)
    except Failed as error:
        os.write(state.tell, "\0".join(error.args).encode("utf-8", "surrogateescape"))
    finally:
        os._exit(125)


def see_to_exec(child: int, plan: steps.Plan, state: apply.State, heard: int, go: int) -> None:
    """Serve the child's one request; its silence at the end means that exec closed the pipe."""
    data = b""
    while chunk := os.read(heard, 4096):
        data += chunk
        if data == apply.ASK_FOR_MAP:
            data = b""
            step = next(step for step in plan.steps if isinstance(step, steps.NewUser))
            try:
                apply.map_user(child, step, state)
            except OSError as error:
                raise failed(steps.describe(step), error) from error
            os.write(go, apply.MAPPED)
    if data:
        raise Failed(*codec.unpack(data))
    # A child that was killed closes the pipe, too. It stays a zombie: its number is its own until clean_up has used it.
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended:
        how = f"{'exit status' if ended.si_code == os.CLD_EXITED else 'signal'} {ended.si_status}"
        raise Failed(steps.describe(plan.steps[-1]), "0", f"the process ended at once, with {how}")


def granted(state: apply.State) -> list[str]:
    """Return role, kind, device, inode, device number, access of each: what the audit may expect to find open."""
    handed = set(state.granted.values())
    found: list[str] = []
    for role, fd in state.opened.items():
        if fd in handed:
            have = os.fstat(fd)
            kind = next((name for name, test in apply.KINDS.items() if test(have.st_mode)), "socket")
            access = _ACCESSES[fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE]
            found += [role, kind, str(have.st_dev), str(have.st_ino), str(have.st_rdev), access]
    for name, have in state.nodes.items():
        found += [name, "char", str(have.st_dev), str(have.st_ino), str(have.st_rdev), "rw"]
    return found


def wait_for_release(plan: steps.Plan, state: apply.State, control: int, child: int) -> None:
    """Close our copies of what QEMU got, then do what the toolstack asks, until it releases QEMU."""
    # Now, not at our end: an image lock belongs to the open file, and a copy here would keep it after QEMU's death.
    # But for the log: what QEMU says before it ends is lost with the FIFO's last descriptor.
    for role, fd in state.opened.items():
        if role != "log":
            os.close(fd)
    while True:
        word = os.read(control, 1)
        if word == b"E":
            for step in plan.after:
                attempt(step, state)
            answer(control, ["emptied"])
        elif word == b"W":
            pidfd = os.pidfd_open(child)
            if pidfd not in select.select((pidfd, control), (), ())[0]:
                raise Failed("wait for QEMU's end", "0", "the toolstack went away before it")
            answer(control, ["ended", str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))])
            return
        elif word == b"D":
            return
        else:
            raise Failed("wait for the toolstack", "0", "it went away before the start was complete")


def clean_up(child: int, leaf: str, state: apply.State) -> None:
    """Undo what outlives this process: the child and its cgroup. The namespaces and their mounts end with them."""
    if child > 0:
        os.kill(child, sys.SIGKILL)  # process 1 of its pid namespace: the kernel kills the rest with it
        os.waitpid(child, 0)
    if state.cgroup >= 0:  # else the cgroup is not ours
        for _ in range(200):
            try:
                os.rmdir(leaf, dir_fd=state.cgroup_folder)
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.005)  # EBUSY until the last task has left
