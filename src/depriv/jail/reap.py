# SPDX-License-Identifier: Apache-2.0
"""Kill every process of one uid, from a process that they may not kill, and prove that none is left.

As libxl does (kill_device_model_uid_child in libxl_dm.c), and what it leaves out: checks right before the call, a
deadline, a way on where the targets hold the lock, take every pid or starve the killer, and proof. kill(-1) holds
tasklist_lock for all (kill_something_info in kernel/signal.c), and fork fails with a signal pending (copy_process in
kernel/fork.c, Linux 6.1): whoever it hits has no child any more, and keeps its number until it is dead. So a listing
of /proc after a *completed* call misses none. Alone it proves nothing: a chain of short lives slips through it.
"""

from __future__ import annotations

import fcntl
import os
import time

from depriv.jail import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.steps import Reap

    Found = tuple[int, str, bool]  # pid, state as in proc_pid_status(5), and whether a uid matched or only a gid

_SIGKILL, _EPERM, _EBUSY, _EROFS, _ETIMEDOUT = 9, 1, 16, 30, 110  # <asm-generic/signal.h>, <asm-generic/errno.h>
_LATE = 126  # exit status of a killer that was too late to kill; no errno of ours
_UID_MIN, _UID_MAX = 1000, 0xFFFFFFFD  # -1, and in 16 bits -2, are for "leave it" and for nobody
_POLL_S, _SETTLE_S = 0.001, 0.05  # between two looks at the dying; until all is done again
_PATIENCE_S = 0.25  # ten thousand processes take kill(-1) about that long


def reap(step: Reap, state: object = None) -> None:
    """Leave no process alive with ``step.uid`` among its four uids or ``step.gid`` among its four gids.

    Those with the gid and not the uid are never killed: they are somebody's, and make it fail.

    Raises:
        OSError: the lock, or the proof, was not to be had in time (ETIMEDOUT); those named are left (EBUSY); the
            toolstack is gone (ECANCELED); or the killer failed. The ids must then not be used.
    """
    if not _UID_MIN <= step.uid <= _UID_MAX or step.reaper_uid < 1 or step.uid == step.reaper_uid:
        raise OSError(_EPERM, "no uid that is ever reaped", f"reap uid {step.uid} as {step.reaper_uid}")
    deadline = _now() + step.timeout_ms / 1000
    lock = _open_lock(step.lock)
    try:
        while True:
            _await_lock(lock, step, deadline)
            getattr(state, "refuse_if_orphaned", bool)()  # our lock keeps starts out from here on; bool: in no jail
            sent = _kill_all(step, deadline)
            fcntl.flock(lock, fcntl.LOCK_UN)  # what does not die must not hold up the reapers of all other domains
            if sent and not survivors(step.uid, step.gid, until=min(_now() + _SETTLE_S, deadline)):
                return
            if _now() > deadline:
                raise _failure(survivors(step.uid, step.gid), step)
    finally:
        os.close(lock)


def _now() -> float:
    """Return seconds that go on while the host sleeps and while we are stopped: ids may have a new owner by then."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _failure(left: list[Found], step: Reap) -> OSError:
    if not left:
        return OSError(_ETIMEDOUT, "it was not proved in time that none is left", f"uid {step.uid}")
    named = [f"{pid} ({state}) by {'uid' if by_uid else 'gid, with another uid'}" for pid, state, by_uid in left]
    return OSError(_EBUSY, f"{len(left)} still alive: {', '.join(named[:10])}", f"uid {step.uid}, gid {step.gid}")


def _open_lock(path: str) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
    except OSError as error:
        if error.errno != _EROFS:
            raise
        return os.open(path, os.O_RDONLY | flags)  # flock(2) asks for no more; if it is not there, that is an error


def _await_lock(lock: int, step: Reap, deadline: float) -> None:
    """Return once it is ours; or where to go on without it, since what we are to kill holds it.

    The same half-way to the deadline, if nobody is seen to hold it: who passes it on and ends is no toolstack. Two
    killers at once hit each other, as both have the reaper's uid: that costs a round, and no proof.
    """
    half = (_now() + deadline) / 2
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            targets, others = _holders(lock, step)
        if not others and (targets or _now() > half):
            return None
        if _now() > deadline:
            raise OSError(_ETIMEDOUT, f"another reaper holds the lock: process {', '.join(others)}", step.lock)
        time.sleep(10 * _POLL_S)


def _holders(lock: int, step: Reap) -> tuple[bool, list[str]]:
    """Return whether what we are to kill took the lock and has it still, and who else, as "pid (name) state".

    Who inherited it is not looked for: hostile processes can have millions of descriptors. The pid in /proc/locks is
    of who called flock(2), as a toolstack's reaper does itself; or another's by now, so it is asked for the lock.
    Source: proc_locks(5), proc_pid_fdinfo(5).
    """
    # The device is not compared: that of btrfs and overlayfs in stat(2) is another one.
    inode = b":%d " % os.fstat(lock).st_ino
    with open("/proc/locks", "rb") as file:
        pids = {line.split()[4].decode() for line in file if inode in line and b"FLOCK" in line and b"->" not in line}
    targets, others = False, list[str]()
    for pid in filter(str.isdigit, pids):
        try:
            texts = [_read(f"/proc/{pid}/fdinfo/{fd}") for fd in os.listdir(f"/proc/{pid}/fdinfo")]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended
        held = any(inode in text and b"FLOCK" in text for text in texts)
        if held and _look(pid, step.uid, -1):
            targets = True
        elif held:
            name, _, rest = _read(f"/proc/{pid}/stat").rpartition(b") ")
            others.append(f"{ascii(name.decode('utf-8', 'replace'))[1:-1]}) {rest[:1].decode()}")
    return targets, others


def _kill_all(step: Reap, deadline: float) -> bool:
    """Have SIGKILL sent to every process of the uid; return whether it was.

    As a real-time process where that is allowed, since a thousand that spin would leave us a thousandth of the time;
    and not for longer, as those that die need theirs. See sched(7).
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:  # noqa: SIM105 (importing contextlib takes longer than all of this)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        pass
    try:
        return _have_killed(step, deadline)
    finally:
        os.sched_setscheduler(0, *before)


def _have_killed(step: Reap, deadline: float) -> bool:
    """Send the signal from a child that becomes the reaper."""
    try:
        child = os.fork()
    except OSError:
        _kill_singly(step, deadline)  # they have all pids (EAGAIN) or all memory (ENOMEM): make room
        return False
    if child == 0:
        status = 125
        try:
            status = 0 if _become_reaper_and_kill(step, deadline) else _LATE
        except ProcessLookupError:
            status = 0  # nobody is there but us
        except OSError as error:
            status = min(error.errno or 125, 125)
        finally:
            os._exit(status)
    # Whoever has its effective uid may make it slow: by SCHED_IDLE on a busy processor. See sched_setscheduler(2).
    patience = _now() + _PATIENCE_S
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if _now() > deadline:
            os.kill(child, _SIGKILL)  # not waited for: it may be starved still, but will not kill any more
            return False
        if _now() > patience:
            _kill_singly(step, deadline)
        time.sleep(_POLL_S / 2)
    code = os.waitstatus_to_exitcode(done[1])
    # Killed: by the reaper of another toolstack, which has the same real uid. The caller looks, and tries again.
    if code not in (0, -_SIGKILL, _LATE):
        raise OSError(max(code, 1), f"the reaper ended with {code}", f"reap uid {step.uid}")
    return code == 0


def _become_reaper_and_kill(step: Reap, deadline: float) -> bool:
    """Return whether it was still time to kill."""
    os.setgroups(())
    # Real uid: the reaper's, so that the targets may not signal us back. Effective uid: the target's, which gives the
    # permission to kill them. Saved uid 0 and not the target's, as setreuid(2) would set it: a process may signal us
    # if its uid equals our real or saved one.
    os.setresuid(step.reaper_uid, step.uid, 0)
    mine = os.getresuid()
    status = _read("/proc/self/status")
    # Right before the call, from the kernel and not from what was asked for: kill(-1) as root would end the host.
    if (
        mine != (step.reaper_uid, step.uid, 0)
        or step.uid < _UID_MIN
        or step.reaper_uid in (0, step.uid)
        or int(status.partition(b"\nCapEff:")[2].split()[0], 16) != 0
    ):
        raise OSError(_EPERM, f"the reaper has the uids {mine}", "kill")
    if _now() > deadline:
        return False  # we were stopped: the uid may be a new domain's
    os.kill(-1, _SIGKILL)
    return True


def _kill_singly(step: Reap, deadline: float) -> None:
    """Kill those of the uid that a listing shows, one by one, as root: no proof, but room to go on in."""
    for pid, _, _ in survivors(step.uid, -1):
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        # Asked again, now that the number cannot become another's unnoticed.
        if _look(str(pid), step.uid, -1) and _now() <= deadline:
            sys.pidfd_kill(pidfd)
        os.close(pidfd)


def survivors(uid: int, gid: int, *, until: float = 0.0) -> list[Found]:
    """Return the processes that have ``uid`` as any of their uids or ``gid`` as any of their gids, and live.

    A zombie that still has a thread counts: its main thread ended, the rest did not. Until ``until`` wait for each to
    die before the next is asked: they die side by side.
    """
    found: list[Found] = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        if one := _look(name, uid, gid):
            found.append(one)
            while _now() < until and _look(name, uid, gid):
                time.sleep(_POLL_S)
    return found


def _look(pid: str, uid: int, gid: int) -> Found | None:
    """Return the process if it has one of the ids and lives."""
    text = _read(f"/proc/{pid}/status")
    # A name cannot pass for a field: the kernel writes a newline in it as \\n (proc_task_name() in fs/proc/array.c).
    ids = text.partition(b"\nUid:\t")[2].split(None, 9)
    by_uid = b"%d" % uid in ids[:4]
    if not by_uid and b"%d" % gid not in ids[5:9]:
        return None
    state = text.partition(b"\nState:\t")[2][:1]
    threads = text.partition(b"\nThreads:\t")[2].partition(b"\n")[0]
    is_dead = state == b"X" or (state == b"Z" and threads in (b"0", b"1"))
    return None if is_dead else (int(pid), state.decode(), by_uid)


def _read(path: str) -> bytes:
    """Return what a file of /proc says, or nothing if its process has ended. No file object: a thousand are read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 8192)  # a status has 1.5 KiB
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return b""
