# SPDX-License-Identifier: Apache-2.0
"""Start the jail, hand it a plan, hear what it says. The toolstack's side of the wire (docs/adr/0001)."""

from __future__ import annotations

import array
import json
import os
import socket
import sys
import time

from depriv import codec
from depriv.errors import JailError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from depriv.steps import Plan

_JAIL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "jail", "__main__.py")
_CONTROL_FD = 3
_LINE_MAX = 65536


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
            setsigdef=(),
        )
        theirs.close()
        self._buffer = b""
        self._fds: list[int] = []

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close the control socket: a jail that was not released kills what it started, and ends. Wait for that."""
        self._control.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        if self._pid:
            os.waitpid(self._pid, 0)
            self._pid = 0

    def run(self, plan: Plan, *, timeout_s: float) -> dict[str, Any]:
        """Send the plan and return the answer: ``started`` or ``done``.

        Raises:
            JailError: a step failed; nothing of the plan is left.
        """
        text = codec.encode(plan)
        try:
            self._control.sendall(b"%d\n%s" % (len(text), text))
        except OSError as error:
            raise JailError("the jail ended before it was told what to do") from error
        return self._answer(timeout_s)

    def take_pidfd(self) -> int:
        """Return the pidfd that came with ``started``; it is the caller's now."""
        return self._fds.pop(0)

    def empty_root(self, *, timeout_s: float) -> None:
        """Have the plan's ``after`` done."""
        self._control.sendall(b"E")
        self._answer(timeout_s)

    def release(self) -> None:
        """Let QEMU live on after the jail's end."""
        self._control.sendall(b"D")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            self._control.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                chunk, fds = self._receive()
            except TimeoutError as error:
                raise JailError(f"the jail did not answer within {timeout_s:.0f} seconds") from error
            except OSError as error:
                raise JailError("the jail ended without an answer") from error
            self._fds += fds
            if not chunk or len(self._buffer) > _LINE_MAX:
                raise JailError(
                    "the jail ended without an answer", fix="run it again with depriv plan to see the steps"
                )
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if message["event"] == "failed":
            raise _failure(message)
        return message

    def _receive(self) -> tuple[bytes, list[int]]:
        chunk, ancillary, _flags, _address = self._control.recvmsg(_LINE_MAX, socket.CMSG_SPACE(16), 0x40000000)
        fds: list[int] = []
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) // 4 * 4])
                fds += numbers.tolist()
        return chunk, fds


def _failure(message: dict[str, Any]) -> JailError:
    step, cause, errno = str(message["step"]), str(message["cause"]), int(message["errno"])
    return JailError(f"cannot {step}", cause=cause, fix=_fix(step, errno), step=step, errno=errno)


# First word or words of the step, errno -> what to do. The kernel's text alone has sent many a reader looking in the
# wrong place: ENOSPC from unshare(2) is a limit on namespaces, not a full disk.
_FIXES = {
    ("unshare", 1): "run this as root, outside of a container that forbids namespaces; see depriv doctor",
    ("unshare", 28): "raise the limits on namespaces: sysctl user.max_mnt_namespaces user.max_net_namespaces and so on",
    ("drop all groups", 28): "raise the limit on user namespaces: sysctl -w user.max_user_namespaces=15000",
    ("drop all groups", 1): "user namespaces are forbidden here; see depriv doctor",
    ("make cgroup", 17): "a cgroup of an earlier domain is left; end what runs in it, then: rmdir it",
    ("make cgroup", 30): "the cgroup file system is read-only; run this outside of the container",
    ("execute", 13): "see that the folder named above is not mounted noexec",
    ("execute", 8): "it is not a program for this processor",
    ("kill every process", 16): "a process of this uid does not die (uninterruptible sleep?); look for it with ps -U",
    ("kill every process", 110): "wait for the other command to end",
}


def _fix(step: str, errno: int) -> str:
    for (start, number), fix in _FIXES.items():
        if step.startswith(start) and errno == number:
            return fix
    return ""
