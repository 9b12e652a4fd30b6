# SPDX-License-Identifier: Apache-2.0
"""Kill every process of one uid, from a process that they may not kill, and see that none is left.

As libxl does (kill_device_model_uid_child in libxl_dm.c), and what it leaves out: checks right before the call, a
deadline on the lock, and proof afterwards.
"""

from __future__ import annotations

import fcntl
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.steps import Reap

_SIGKILL = 9
_UID_MIN = 1000


def reap(step: Reap, _state: object = None) -> None:
    """Leave no process of ``step.uid`` alive.

    Raises:
        OSError: the lock was not to be had in time (ETIMEDOUT), the killer failed, or a process of the uid is still
            there (EBUSY). The uid must then not be used.
    """
    deadline = time.monotonic() + step.timeout_ms / 1000
    lock = _lock(step.lock, deadline)
    try:
        while True:
            _kill_all(step)
            left = living(step.uid)
            if not left:
                return
            if time.monotonic() > deadline:
                raise OSError(16, f"still alive: {' '.join(map(str, left[:10]))}", f"processes of uid {step.uid}")
            time.sleep(0.005)
    finally:
        os.close(lock)


def _lock(path: str, deadline: float) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise OSError(110, "another reaper holds the lock", path) from None
            time.sleep(0.01)


def _kill_all(step: Reap) -> None:
    """Send SIGKILL to every process of the uid from a child that becomes the reaper."""
    child = os.fork()
    if child == 0:
        status = 125
        try:
            _become_reaper_and_kill(step)
            status = 0
        except OSError as error:
            status = min(error.errno or 125, 125)
        finally:
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(waited)
    # Killed: by the reaper of another toolstack, which has the same real uid. The caller looks, and tries again.
    if code not in (0, -_SIGKILL):
        raise OSError(max(code, 1), f"the reaper ended with {code}", f"reap uid {step.uid}")


def _become_reaper_and_kill(step: Reap) -> None:
    os.setgroups(())
    # Real uid: the reaper's, so that the targets may not signal us back. Effective uid: the target's, which gives the
    # permission to kill them. Saved uid 0 and not the target's, as setreuid(2) would set it: a process may signal us
    # if its uid equals our real or saved one.
    os.setresuid(step.reaper_uid, step.uid, 0)
    mine = os.getresuid()
    with open("/proc/self/status", "rb") as file:
        status = file.read()
    # Right before the call, from the kernel and not from what was asked for: kill(-1) as root would end the host.
    if (
        mine != (step.reaper_uid, step.uid, 0)
        or min(step.reaper_uid, step.uid) < _UID_MIN
        or step.reaper_uid == step.uid
        or int(status.partition(b"\nCapEff:")[2].split()[0], 16) != 0
    ):
        raise OSError(1, f"the reaper has the uids {mine}", "kill")
    try:
        os.kill(-1, _SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # nobody is there whom we may kill


def living(uid: int) -> list[int]:
    """Return the pids that still have ``uid`` as any of their uids and are not wholly dead.

    A zombie whose other threads still run counts: its main thread ended, the rest did not.
    """
    found: list[int] = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/status", "rb") as file:
                text = file.read()
            uids = text.partition(b"\nUid:")[2].partition(b"\n")[0].split()
            if str(uid).encode() in uids and any(_thread_lives(name, tid) for tid in os.listdir(f"/proc/{name}/task")):
                found.append(int(name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return found


def _thread_lives(pid: str, tid: str) -> bool:
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] not in b"ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False  # this thread ended while we looked; the others are looked at
