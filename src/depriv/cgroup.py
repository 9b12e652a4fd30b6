# SPDX-License-Identifier: Apache-2.0
"""Cgroups of domains: where they are, whose they are, and how all that runs in one ends.

Every registry has a folder of its own in the hierarchy, with one leaf per domain. The folder's name says which
registry: the path of its state folder (hashed), and the device and inode that this folder has. So leaves are found
again when the state folder is lost, and nobody takes the guests of a registry that lives elsewhere (another path, or
the same path in another mount namespace) for leftovers of his own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time

from depriv.errors import HostError
from depriv.records import Record
from depriv.text import digest

PREFIX = "depriv"
END_TIMEOUT_S = 10.0
_TOP = "/sys/fs/cgroup"
_PLACES = ((_TOP, 2), (f"{_TOP}/unified", 2), (f"{_TOP}/pids", 1), (f"{_TOP}/freezer", 1))


class Leaf(Record):
    """One domain's cgroup directory."""

    path: str
    folder: str  # name of the registry's folder it lies in
    domid: int
    version: int


def hierarchies() -> tuple[tuple[str, int], ...]:
    """Return where cgroups can be made and the version, the one to use first: v2, else v1's pids, else its freezer.

    The freezer last: what is frozen there does not die. Usual places are tried first, as listing mounts takes the
    kernel 2 us for each, and a host may have thousands of them. See cgroups(7), file-hierarchy of systemd.
    """
    usual = tuple(place for place in _PLACES if _is_cgroup(*place))
    return usual or tuple(place for place in _mounted() if _is_cgroup(*place))


def _is_cgroup(path: str, version: int) -> bool:
    """Tell what a directory is by its files, which also tells whether a mount is hidden below another one."""
    # cgroup.controllers is in every group of version 2 (Linux 4.5) and in none of version 1.
    return os.path.exists(f"{path}/cgroup.procs") and os.path.exists(f"{path}/cgroup.controllers") == (version == 2)


def _mounted() -> list[tuple[str, int]]:
    """Return what is mounted, best first. Source: proc_pid_mountinfo(5)."""
    found: list[tuple[int, str, int]] = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            kind, *_, options = right.split()
            if kind == "cgroup2":
                found.append((0, left.split()[4], 2))
            elif kind == "cgroup":
                ranks = [rank for rank, name in ((1, "pids"), (2, "freezer")) if name in options.split(",")]
                found += [(rank, left.split()[4], 1) for rank in ranks]
    return [(path, version) for _, path, version in sorted(found)]


def find_cgroup() -> tuple[str, int]:
    """Return where cgroups are made and the version; "" if there is no hierarchy."""
    return next(iter(hierarchies()), ("", 1))


def folder_name(state_dir: str) -> str:
    """Return the name of a registry's folder of cgroups. A state folder that is not there yet has no number."""
    try:
        have = os.stat(state_dir)
        number = f"{have.st_dev:x}-{have.st_ino:x}"
    except OSError:
        number = "new"
    return f"{_stem(state_dir)}{number}"


def _stem(state_dir: str) -> str:
    return f"{PREFIX}-{digest((state_dir,))[:8]}-"


def leaves() -> tuple[Leaf, ...]:
    """Return the cgroups of all domains of all registries of this host, in whichever hierarchy they were made."""
    found: list[Leaf] = []
    for top, version in hierarchies():
        for folder in _names(top):
            if folder.startswith(f"{PREFIX}-"):
                found += [
                    Leaf(path=f"{top}/{folder}/{name}", folder=folder, domid=int(name), version=version)
                    for name in _names(f"{top}/{folder}")
                    if name.isascii() and name.isdecimal()
                ]
    return tuple(found)


def lost_folders(state_dir: str) -> tuple[str, ...]:
    """Return the names of folders that a registry at this path left behind: its state folder exists nowhere any more.

    "Nowhere" is asked of every mount namespace, since another may have a folder of its own at the same path.
    From within a container's pid namespace not all can be asked; what may be somebody else's is left alone.
    """
    own, stem = folder_name(state_dir), _stem(state_dir)
    names = {name for top, _ in hierarchies() for name in _names(top)}
    others = [name for name in sorted(names) if name.startswith(stem) and name != own]
    if not others:
        return ()
    alive = {f"{stem}{dev:x}-{ino:x}" for dev, ino in _everywhere(state_dir)}
    # Where processes are not to be seen from here, neither is the registry, which may well be alive.
    alive |= {leaf.folder for leaf in leaves() if leaf.folder in others and _holds_unseen(leaf)}
    return tuple(name for name in others if name not in alive)


def _holds_unseen(leaf: Leaf) -> bool:
    """Tell whether there are processes of other pid namespaces: v2 shows them as 0; v1 leaves them out, but counts."""
    if leaf.version == 1:
        return not _numbers(leaf.path) and sum(_numbers(leaf.path, "pids.current")) > 0
    return has_unseen(leaf.path)


def remove_lost_folders(state_dir: str) -> None:
    """Remove the folders, empty by now, that a registry at this path left behind."""
    for name in lost_folders(state_dir):
        for top, _ in hierarchies():
            remove_folder(f"{top}/{name}")


def _everywhere(path: str) -> set[tuple[int, int]]:
    """Return device and inode of what is at ``path`` in each mount namespace and root directory of the host."""
    found: set[tuple[int, int]] = set()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                have = os.stat(f"/proc/{name}/root{path}")
            except OSError:
                continue
            found.add((have.st_dev, have.st_ino))
    return found


def members(path: str) -> tuple[int, ...]:
    """Return the processes in a cgroup; none if there is no such cgroup."""
    # 0 stands for processes outside of our pid namespace, and kill(0) is ourselves.
    return tuple(pid for pid in _numbers(path) if pid > 0) if path else ()


def has_unseen(path: str) -> bool:
    """Tell whether processes of other pid namespaces are in a cgroup of version 2, which shows them as 0."""
    return bool(path) and 0 in _numbers(path)


def _numbers(path: str, name: str = "cgroup.procs") -> tuple[int, ...]:
    try:
        with open(f"{path}/{name}", encoding="ascii") as file:
            return tuple(int(line) for line in file)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):  # none, or removed while it was open
            return ()
        raise  # what cannot be read is not empty


def kill_cgroup(path: str) -> None:
    """Send SIGKILL to all processes of a cgroup: at once where the kernel can (v2), else until none in it is new."""
    if not path:
        return
    try:
        # Not open(): it would create the file where there is none, which cgroupfs refuses in another way.
        fd = os.open(f"{path}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"1")
        finally:
            os.close(fd)
        return
    except (FileNotFoundError, PermissionError):
        pass
    except OSError as error:
        if error.errno == errno.ENODEV:  # it was removed, so nothing was in it
            return
        raise
    for below in _below(path):
        kill_cgroup(below)
    deadline = time.monotonic() + END_TIMEOUT_S
    sent: set[int] = set()
    while (pids := set(members(path)) - sent) and time.monotonic() < deadline:
        sent |= pids  # each once: who got it forks no more, and one that does not die is not waited for
        _kill_members(path, pids)
        time.sleep(0.002)


def _kill_members(path: str, pids: set[int]) -> None:
    """Kill processes of a cgroup by pidfd: we may be stopped between looking and killing, and numbers be others'."""
    import signal  # noqa: PLC0415 (hosts with version 1 alone)

    with contextlib.ExitStack() as held:
        pidfds: dict[int, int] = {}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                pidfds[pid] = os.pidfd_open(pid)
                held.callback(os.close, pidfds[pid])
        for pid in pidfds.keys() & set(members(path)):  # asked again, now that no number can change hands
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfds[pid], signal.SIGKILL)  # type: ignore[attr-defined, unused-ignore]


def remove_cgroup(path: str, *, timeout_s: float = END_TIMEOUT_S) -> None:
    """Kill what is in a cgroup until it can be removed, and remove it: then nothing is in it, nor ever will be.

    Raises:
        HostError: there still are processes in it; it stays.
    """
    deadline = time.monotonic() + timeout_s
    while path:
        for below in _below(path):
            with contextlib.suppress(OSError):
                os.rmdir(below)
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if time.monotonic() > deadline:
                pids = " ".join(map(str, members(path)[:10]))
                raise HostError(f"cannot remove cgroup {path}", cause=f"in it: process {pids or 'unknown'}") from error
        kill_cgroup(path)  # again: somebody may have joined after the first time
        time.sleep(0.001)


def _below(path: str) -> tuple[str, ...]:
    """Return the cgroups in a domain's: each of its tools has one."""
    try:
        with os.scandir(path) as found:
            return tuple(entry.path for entry in found if entry.is_dir(follow_symlinks=False))
    except OSError:
        return ()


def is_visible(path: str) -> bool:
    """Tell whether the hierarchy of a domain's cgroup is mounted here, whether or not that still exists."""
    return os.path.exists(f"{os.path.dirname(os.path.dirname(path))}/cgroup.procs")


def remove_folder(path: str) -> None:
    """Remove a registry's folder of cgroups if no leaf is in it."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
