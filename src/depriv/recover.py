# SPDX-License-Identifier: Apache-2.0
"""What the kernel shows of a domain whose entry cannot be read: enough to list it, to keep its ids, and to end it."""

from __future__ import annotations

import os
import stat

from depriv import cgroup, proc
from depriv.accounts import accounts_for
from depriv.entry import Entry
from depriv.errors import DeprivError
from depriv.identity import choose


def rebuild(domid: int, path: str, cause: str) -> Entry:
    """Return an entry in state "damaged", made of the processes in the cgroup ``path`` and of the users of the host.

    What QEMU was to be like is lost, so nothing is expected of it; which images it holds is seen in its descriptors.
    """
    pids = cgroup.members(path)
    uid, gid, reaper_uid = of_the_range(domid)
    planned = uid
    images: set[tuple[int, int, int, bool]] = set()
    for pid in pids:
        try:
            status = proc.read_status(pid)
            uid, gid = int(status["Uid"].split()[0]), int(status["Gid"].split()[0])
            images |= _images(pid)
        except (ProcessLookupError, PermissionError):
            continue
    return Entry(
        name=f"(damaged-{domid})",
        domid=domid,
        state="damaged",
        uid=uid,
        gid=gid,
        reaper_uid=reaper_uid,
        shared=uid != planned or not uid,  # a named user's: whose else it is cannot be known
        restricted=False,  # not known to be
        memory_mib=0,
        vcpus=0,
        accel="",
        cgroup=path,
        boot_id=proc.boot_id(),
        created_boot_ns=0,
        created_at_s=0,
        toolstack_pid=0,
        toolstack_starttime=0,
        images=tuple(sorted(images)),
        trouble=cause,
    )


def of_the_range(domid: int) -> tuple[int, int, int]:
    """Return uid and gid that a domain gets from the range, and its reaper's uid; zeros if they are somebody else's.

    Who has an entry of his own there, however he came by it, is no device model: his processes are left alone.
    """
    try:
        who = choose(
            device_model_user="", domid=domid, accounts=accounts_for(device_model_user="", domid=domid), taken=()
        )
    except DeprivError:
        return (0, 0, 0)
    return (who.uid, who.gid, who.reaper_uid)


def _images(pid: int) -> set[tuple[int, int, int, bool]]:
    """Return the files and block devices that a process has open."""
    found: set[tuple[int, int, int, bool]] = set()
    for fd in proc.fds(pid):
        if stat.S_ISREG(fd.mode) and not fd.target.startswith("/memfd:"):
            found.add((fd.dev, fd.ino, 0, fd.access != "ro"))
        elif stat.S_ISBLK(fd.mode):
            found.add((0, 0, fd.rdev, fd.access != "ro"))
    return found


def main_pid(entry: Entry) -> int:
    """Return the process that is process 1 of its pid namespace in a domain's cgroup; 0: there is none."""
    for pid in cgroup.members(entry.cgroup):
        try:
            if proc.read_status(pid)["NSpid"].split()[-1] == "1" and os.getpid() != pid:
                return pid
        except (ProcessLookupError, KeyError):
            continue
    return 0
