# SPDX-License-Identifier: Apache-2.0
"""Start the jail, hand it a plan, hear what it says. The toolstack's side of the wire (docs/adr/0001)."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time

from depriv import codec
from depriv.errors import JailError
from depriv.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from depriv.steps import Plan

_JAIL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "jail", "__main__.py")
_CONTROL_FD = 3
_END_TIMEOUT_S = 10.0
_KILL_TIMEOUT_S = 5.0
_MESSAGE_MAX = 65536


class Opened(Record):
    """One descriptor that QEMU got, as fstat(2) describes it."""

    role: str
    kind: str  # "file", "block", "char", "fifo" or "socket"
    dev: int
    ino: int
    rdev: int
    access: str  # "ro" or "rw"


class Launched(Record):
    """A QEMU that executes."""

    pid: int
    pidfd: int  # the caller's to close
    opened: tuple[Opened, ...]
    times: tuple[tuple[str, float], ...]  # step, CLOCK_MONOTONIC seconds at its end


class Jail:
    """One jail process. Close it before ``release`` and what it started ends with it."""

    def __init__(self) -> None:
        """Start the interpreter; it waits for a plan, and needs about as long to be ready as planning takes."""
        self._control, theirs = socket.socketpair()
        # Not subprocess: its import costs more than the whole of the jail's work in the kernel.
        self._pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", _JAIL, str(_CONTROL_FD)],
            {},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), _CONTROL_FD),
            ],
            # Its own process group: Ctrl-C is the toolstack's; the jail hears of it by the socket's end.
            setpgroup=0,
            setsigmask=(),
            # What the caller ignores must not be ignored by the jail (it waits for its children) nor by QEMU.
            setsigdef=[number for number in range(1, 32) if number not in (9, 19)],  # KILL and STOP cannot be
        )
        theirs.close()
        self._buffer = b""

    @property
    def pid(self) -> int:
        """The jail's process; 0 once it has ended."""
        return self._pid

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close the control socket: a jail that was not released kills what it started, and ends. Wait for that."""
        self._control.close()
        pid, self._pid = self._pid, 0
        if pid:
            _await_end(pid)

    def launch(self, plan: Plan, *, timeout_s: float) -> Launched:
        """Have a plan done up to QEMU's exec.

        Raises:
            JailError: a step failed; nothing of the plan is left.
        """
        self._tell(codec.encode(plan))
        words = iter(self._answer("started", timeout_s))
        pid = int(next(words))
        made: list[Opened] = []
        for role in words:
            if role == "times":
                break
            kind, dev, ino, rdev, access = (next(words) for _ in range(5))
            made.append(Opened(role=role, kind=kind, dev=int(dev), ino=int(ino), rdev=int(rdev), access=access))
        times = [(name, int(next(words)) / 1e9) for name in words]
        # The jail is its parent and has not waited for it: the number cannot be another's yet.
        return Launched(pid=pid, pidfd=os.pidfd_open(pid), opened=tuple(made), times=tuple(times))

    def reap(self, plan: Plan, *, timeout_s: float) -> None:
        """Have a plan done that only reaps.

        Raises:
            JailError: a process of the uid is left, or the reaper failed.
        """
        self._tell(codec.encode(plan))
        self._answer("done", timeout_s)

    def empty_root(self, *, timeout_s: float) -> None:
        """Have the plan's ``after`` done."""
        self._tell(b"E")
        self._answer("emptied", timeout_s)

    def release(self) -> None:
        """Let QEMU live on after the jail's end."""
        self._tell(b"D")

    def watch(self) -> None:
        """Ask to be told of QEMU's end: then ``end`` returns, and until then QEMU ends with this process."""
        self._tell(b"W")

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is an answer."""
        return self._control.fileno()

    def end(self) -> int:
        """Return QEMU's exit status, or minus the signal that killed it, once ``fileno`` is readable.

        Raises:
            JailError: the jail itself has ended.
        """
        (status,) = self._answer("ended", _END_TIMEOUT_S)
        return int(status)

    def _tell(self, message: bytes) -> None:
        try:
            self._control.sendall(message)
        except OSError as error:
            raise JailError("the jail ended before it was told what to do") from error

    def _answer(self, want: str, timeout_s: float) -> list[str]:
        """Return the words after ``want``."""
        deadline = time.monotonic() + timeout_s
        size = -1
        while size < 0 or len(self._buffer) < size:
            if size < 0 and b"\n" in self._buffer:
                head, _, self._buffer = self._buffer.partition(b"\n")
                size = int(head)
                continue
            self._control.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                chunk = self._control.recv(_MESSAGE_MAX)
            except TimeoutError as error:
                raise JailError(f"the jail did not answer within {timeout_s:.0f} seconds") from error
            except OSError as error:
                raise JailError("the jail ended without an answer") from error
            if not chunk or len(self._buffer) > _MESSAGE_MAX:
                raise JailError("the jail ended without an answer", fix="try again; see the steps with depriv plan")
            self._buffer += chunk
        body, self._buffer = self._buffer[:size], self._buffer[size:]
        word, *words = codec.unpack(body)
        if word == "failed":
            raise _failure(*words)
        if word != want:
            raise JailError(f"the jail answered {word[:40]!r}, not {want!r}")
        return words


def _await_end(pid: int) -> None:
    """Wait for the jail's end; one that does not come (stopped, or in a file system that hangs) is killed.

    Raises:
        JailError: it does not even die then.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return  # a caller that ignores SIGCHLD has no zombies
    try:
        for timeout_s in (_END_TIMEOUT_S, _KILL_TIMEOUT_S):
            if select.select([pidfd], (), (), timeout_s)[0]:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)  # our child, not waited for: the number is still its own
    finally:
        os.close(pidfd)
    raise JailError(f"the jail, process {pid}, does not end", fix="see what it waits for: cat /proc/PID/stack")


def _failure(step: str, errno: str, cause: str) -> JailError:
    return JailError(f"cannot {step}", cause=cause, fix=_fix(step, int(errno)), step=step, errno=int(errno))


# First word or words of the step, errno -> what to do. The kernel's text alone has sent many a reader looking in the
# wrong place: ENOSPC from unshare(2) is a limit on namespaces, not a full disk.
_FIXES = {
    ("unshare", 1): "run this as root, outside of a container that forbids namespaces; see depriv doctor",
    ("unshare", 28): "raise the limits on namespaces: sysctl user.max_mnt_namespaces user.max_net_namespaces and so on",
    ("drop all groups", 28): "raise the limit on user namespaces: sysctl -w user.max_user_namespaces=15000",
    ("drop all groups", 1): "user namespaces are forbidden here; see depriv doctor",
    ("make cgroup", 17): "a cgroup of an earlier domain is left; end what runs in it, then: rmdir it",
    ("make cgroup", 30): "the cgroup file system is read-only; run this outside of the container",
    ("execute", 13): "see that everybody may enter the folders above it, and that they are not mounted noexec",
    ("open", 16): "the host uses this device, or a part of it (mount, swap, LVM); give the guest one of its own",
    ("execute", 8): "it is not a program for this processor",
    ("kill every process", 16): "see what it waits for: ps -o pid,stat,wchan:30,args -U {uid} -G {uid}\n"
    "its ids are kept from use until it is gone; then: depriv gc",
    ("kill every process", 110): "wait for the other command to end",
}


def _fix(step: str, errno: int) -> str:
    for (start, number), fix in _FIXES.items():
        if step.startswith(start) and errno == number:
            return fix.replace("{uid}", step.partition(" of uid ")[2].partition(",")[0])
    return ""
