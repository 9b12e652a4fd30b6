# SPDX-License-Identifier: Apache-2.0
"""What a test may not change of the host, as one value to compare; and what a test needs of it.

A busy machine changes by itself, so only what could be ours is looked at: the ids, cgroups and folders that the test
was given, and the test's own process. A namespace lives as long as a process, a mount or a descriptor holds it: those
three are compared, the namespaces themselves cannot be told from other people's.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from depriv import proc
from depriv.cgroup import leaves
from depriv.records import Record

if TYPE_CHECKING:
    from typing import Any


class HostState(Record):
    """All that has to be equal before and after."""

    processes: tuple[tuple[int, int], ...]  # pid and uid, of the uids in question; the wholly dead are left out
    children: tuple[int, ...]  # of this process: jails that were not waited for
    cgroups: tuple[str, ...]
    mounts: tuple[str, ...]  # mount points in or below our folder, as this process sees them
    interfaces: tuple[str, ...]
    files: tuple[str, ...]  # names below our folder, with the type of each
    fds: tuple[str, ...]  # descriptors of this process and what they lead to


def snapshot(
    *, folder: str = "", uids: range = range(0), cgroups: tuple[str, ...] = (), domids: range = range(0)
) -> HostState:
    """Return what is there now.

    Args:
        folder: A state folder, or what holds several; "": none.
        uids: Ids that only the test hands out.
        cgroups: Directories that only the test makes.
        domids: Ids of domains that only the test makes, in whichever registry: their cgroups, too.
    """
    return HostState(
        processes=_processes(uids),
        children=_children(),
        cgroups=(*(path for path in cgroups if os.path.exists(path)), *_domain_cgroups(domids)),
        mounts=_mounts(folder),
        interfaces=tuple(sorted(os.listdir("/sys/class/net"))),
        files=tuple(_files(folder)) if folder else (),
        fds=_fds(),
    )


def _domain_cgroups(domids: range) -> tuple[str, ...]:
    """Return the cgroups of domains with these ids, whichever registry they are of."""
    return tuple(sorted(leaf.path for leaf in leaves() if leaf.domid in domids)) if domids else ()


def settled(before: HostState, where: dict[str, Any], *, timeout_s: float = 5.0) -> HostState:
    """Return the state once it equals ``before``, or as it is at the deadline, for the assertion to show.

    ``where`` are the arguments of ``snapshot``.

    Only for what ends by itself and by no wait of ours: an orphan that process 1 of the host has to reap.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        now = snapshot(**where)
        if now == before or time.monotonic() > deadline:
            return now
        time.sleep(0.02)


def need(condition: bool, *, what: str) -> None:
    """Skip where ``what`` is missing, but fail where DEPRIV_MUST_WORK promises it."""
    if condition:
        return
    if what in os.environ.get("DEPRIV_MUST_WORK", "").split(","):
        pytest.fail(f"{what} is missing, and DEPRIV_MUST_WORK names it")
    pytest.skip(f"no {what} here")


def living(uids: range) -> tuple[int, ...]:
    """Return the pids of processes with a uid in ``uids`` of which a thread still lives."""
    return tuple(pid for pid, _ in _processes(uids))


def _processes(uids: range) -> tuple[tuple[int, int], ...]:
    """Return pid and real uid; a zombie whose threads all ended is dead, one with a living thread is not."""
    found: list[tuple[int, int]] = []
    for pid in proc.pids() if uids else ():
        try:
            uid = int(proc.read_status(pid)["Uid"].split()[0])
            if uid in uids and any(_lives(pid, tid) for tid in os.listdir(f"/proc/{pid}/task")):
                found.append((pid, uid))
        except OSError:
            continue  # it ended while we looked
    return tuple(found)


def _lives(pid: int, tid: str) -> bool:
    with open(f"/proc/{pid}/task/{tid}/stat", "rb") as file:
        return file.read().rpartition(b") ")[2][:1] not in b"ZX"


def _children() -> tuple[int, ...]:
    found: list[int] = []
    for tid in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{tid}/children", encoding="ascii") as file:
                found += [int(pid) for pid in file.read().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread of an earlier test that ended while we looked; its children are another's now
    return tuple(sorted(found))


def _mounts(folder: str) -> tuple[str, ...]:
    if not folder:
        return ()
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        points = [line.split()[4] for line in file]
    return tuple(point for point in points if f"{point}/".startswith(f"{folder}/"))


def _files(folder: str) -> list[str]:
    """Return every name with its type; what a command keeps for the next one (locks, history) is no trace."""
    found: list[str] = []
    for name in sorted(os.listdir(folder)):
        path = f"{folder}/{name}"
        if name in ("lock", "reaper.lock", "history.json"):
            continue
        found.append(f"{os.lstat(path).st_mode >> 12:o} {path}")
        if os.path.isdir(path) and not os.path.islink(path):
            found += _files(path)
    return found


def _fds() -> tuple[str, ...]:
    found: list[str] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue  # the listing's own
    return tuple(sorted(found))
