# SPDX-License-Identifier: Apache-2.0
"""What a storm has left behind, asked of the kernel and of the file system; nothing of depriv is asked.

A process, cgroup or name counts that has an id of the storm's own range, or its folder in its command line; where the
storm has a pid namespace of its own, every process. Mounts, interfaces and IPC objects count whoever made them.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from depriv.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterator

_KEPT = ("boot", "domains", "history.json", "lock", "reaper.lock")
SETTLE_S = 5.0  # for what process 1 of the host has to reap, and what the kernel ends behind a process


class Alive(Record):
    """One guest that is meant to be there."""

    domid: int
    uid: int
    pid: int


class Ground:
    """The host as it was before a storm."""

    def __init__(
        self, folder: str, state: str, cache: str, *, first_uid: int, domids: range, settle_s: float = SETTLE_S
    ) -> None:
        """Look.

        Args:
            folder: In the command line of all that belongs to the storm.
            state: The registry's folder.
            cache: The folder of copies of QEMU's files.
            first_uid: Of domain 0.
            domids: That only this storm uses.
            settle_s: How long what is there may take to go by itself.
        """
        self._folder = folder
        self._state = state
        self._cache = cache
        self._domids = domids
        self._settle_s = settle_s
        self._alone = os.getppid() == 1  # and process 1 is no host's: see tests.support.storm_apart
        self._uids = range(first_uid + domids.start, first_uid + domids.stop)
        self._before = set(_host())
        self._spaces = set(_namespaces())
        self._fds = set(_fds())
        self._tops = _tops()

    def keep_descriptors(self) -> None:
        """Take the descriptors that this process has by now as its own."""
        self._fds = set(_fds())

    def left(self, alive: tuple[Alive, ...]) -> list[str]:
        """Return what is there and should not be, in words; what goes by itself is given time to."""
        deadline = time.monotonic() + self._settle_s
        while True:
            found = [*self._processes(alive), *self._cgroups(alive), *self._files(alive), *self._locks()]
            found += [f"new on the host: {what}" for what in set(_host()) - self._before]
            found += [f"descriptor of the storm itself: {what}" for what in set(_fds()) - self._fds]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    def _processes(self, alive: tuple[Alive, ...]) -> Iterator[str]:
        """Yield processes, and the namespaces that only they explain."""
        known = {guest.pid for guest in alive} | {os.getpid(), 1}
        ours = [pid for pid in _pids() if pid not in known and self._is_ours(pid)]
        for pid in ours:
            yield f"process {pid}: {_text(f'/proc/{pid}/cmdline')[:200]!r} {_text(f'/proc/{pid}/status')[:300]!r}"
        lived_in = set(_namespaces(known))
        for (kind, inode), pids in _namespaces().items():
            if (kind, inode) not in self._spaces | lived_in and set(pids) & {*ours}:
                yield f"{kind} namespace {inode} of process {pids}"

    def _is_ours(self, pid: int) -> bool:
        """Tell whether a process that lives is of the storm: a wholly dead one waits for its parent, not for us."""
        status = _text(f"/proc/{pid}/status")
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        ids = {int(word) for key in ("Uid", "Gid") for word in fields.get(key, "").split()}
        dead = fields.get("State", "Z").split()[0] in ("Z", "X") and fields.get("Threads", "1").strip() in ("0", "1")
        if dead:
            return False
        return self._alone or bool(ids & set(self._uids)) or self._folder in _text(f"/proc/{pid}/cmdline")

    def _cgroups(self, alive: tuple[Alive, ...]) -> Iterator[str]:
        wanted = {guest.domid for guest in alive}
        found: set[int] = set()
        for path in _hierarchies():
            for folder, names, _files in os.walk(path):
                for name in names:
                    if name.isdecimal() and int(name) in self._domids:
                        found.add(int(name))
                        if int(name) not in wanted:
                            yield f"cgroup {folder}/{name}"
        yield from (f"missing: the cgroup of domain {domid}" for domid in wanted - found)
        if not alive:  # the registry's folder goes with its last domain
            have = os.stat(self._state)
            ends = f"-{have.st_dev:x}-{have.st_ino:x}"
            yield from (f"cgroup {path}" for path in _tops() - self._tops if path.endswith(ends))

    def _files(self, alive: tuple[Alive, ...]) -> Iterator[str]:
        wanted = {str(guest.domid) for guest in alive}
        yield from (f"file {self._state}/{name}" for name in os.listdir(self._state) if name not in _KEPT)
        have = set(os.listdir(f"{self._state}/domains"))
        yield from (f"file {self._state}/domains/{name}" for name in have - wanted)
        yield from (f"missing: {self._state}/domains/{name}" for name in wanted - have)
        for name in wanted & have:
            for inner in os.listdir(f"{self._state}/domains/{name}"):
                if inner.rpartition(".")[2].isdecimal():
                    yield f"half-written {self._state}/domains/{name}/{inner}"
        yield from half_made(self._cache)

    def _locks(self) -> Iterator[str]:
        """Yield locks that somebody still has on a file of the registry's."""
        inodes = {os.stat(path).st_ino: path for path in _walk(self._state)}
        for line in _text("/proc/locks").splitlines():
            words = line.split()
            inode = next((int(word.rpartition(":")[2]) for word in words if word.count(":") == 2), 0)
            if inode in inodes:
                yield f"lock on {inodes[inode]}: {line}"


def half_made(cache: str) -> Iterator[str]:
    """Yield what a copy of QEMU's files that was cut short has left."""
    parent = f"{cache}/runtime"
    for name in os.listdir(parent) if os.path.isdir(parent) else ():
        if "." in name or not os.path.exists(f"{parent}/{name}/manifest.json"):
            yield f"half-made {parent}/{name}"


def _walk(folder: str) -> Iterator[str]:
    for place, _folders, names in os.walk(folder):
        yield from (f"{place}/{name}" for name in names)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _text(path: str) -> str:
    """Return what a file of /proc says; nothing if its process is gone."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _hierarchies() -> list[str]:
    lines = _text("/proc/self/mountinfo").splitlines()
    return [line.split()[4] for line in lines if line.partition(" - ")[2].startswith("cgroup")]


def _tops() -> set[str]:
    """Return what lies at the top of each cgroup hierarchy."""
    return {f"{path}/{name}" for path in _hierarchies() for name in os.listdir(path)}


def _host() -> Iterator[str]:
    """Yield mounts, interfaces, listening sockets and System V objects of the namespaces that we are in."""
    # Without the numbers that a mount gets.
    yield from ("mount " + line.split(" ", 2)[2] for line in _text("/proc/self/mountinfo").splitlines())
    yield from (f"interface {name}" for name in os.listdir("/sys/class/net"))
    for line in _text("/proc/net/unix").splitlines():
        words = line.split()
        if len(words) > 7 and words[3] == "00010000":  # __SO_ACCEPTCON of <linux/net.h>: it listens
            yield f"socket {words[7]}"
    for kind in ("shm", "sem", "msg"):
        yield from (
            f"{kind} {line.split()[0]} {line.split()[1]}" for line in _text(f"/proc/sysvipc/{kind}").splitlines()
        )


def _namespaces(of: set[int] | None = None) -> dict[tuple[str, str], list[int]]:
    """Return kind and inode of each namespace -> the processes in it."""
    found: dict[tuple[str, str], list[int]] = {}
    for pid in _pids() if of is None else of:
        for kind in ("mnt", "net", "pid", "ipc", "uts", "cgroup", "user"):
            try:
                found.setdefault((kind, os.readlink(f"/proc/{pid}/ns/{kind}")), []).append(pid)
            except OSError:
                continue
    return found


def _fds() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        try:
            yield f"{name} {os.readlink(f'/proc/self/fd/{name}')}"
        except FileNotFoundError:
            continue
