# SPDX-License-Identifier: Apache-2.0
"""Which domains exist on this host and what each holds, on disk below /run/depriv.

One folder per domain, named by its domid: ``state.json`` (written beside, synced, renamed), the QMP socket, the log
FIFO, the console's saved text. Folders and files are root's alone: nothing a device model can write is ever read.
There is no daemon; commands meet at two kinds of lock, the registry's (milliseconds) and one per domain.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time

from depriv.errors import HostError, NotFoundError, PlanError
from depriv.host import STATE_DIR, Holding
from depriv.identity import DOMID_FIRST, DOMID_LAST
from depriv.records import Record, cast
from depriv.report import Expected, Grant, Limit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager
    from typing import Any

REUSE_DELAY_S = 60  # libxl's LIBXL_DOMID_REUSE_TIMEOUT
LOCK_TIMEOUT_S = 10.0
_VERSION = 1
_STATE_BYTES_MAX = 1 << 20


class Entry(Record):
    """One domain as the registry knows it."""

    name: str
    domid: int
    state: str  # "starting", "running" (the guest may be paused, shut down or dead meanwhile) or "ending"
    uid: int
    gid: int
    reaper_uid: int
    shared: bool  # its uid is another domain's too, as asked for by name: never killed by uid
    restricted: bool
    memory_mib: int
    vcpus: int
    accel: str
    cgroup: str  # absolute path; "" with none
    toolstack_pid: int  # of the command that started it, and when that started: tells an unfinished start
    toolstack_starttime: int
    created_at_s: int  # seconds since 1970
    images: tuple[tuple[int, int, int, bool], ...]
    expected: Expected | None = None  # None until QEMU executes

    @property
    def holding(self) -> Holding:
        """What planning has to know of it."""
        return Holding(name=self.name, domid=self.domid, uid=self.uid, gid=self.gid, images=self.images)


class Registry:
    """The registry in one folder."""

    def __init__(self, folder: str = STATE_DIR) -> None:
        """Take the folder; nothing is touched yet."""
        self.folder = folder

    def directory(self, domid: int) -> str:
        """Return a domain's folder."""
        return f"{self.folder}/domains/{domid}"

    def prepare(self) -> None:
        """Make the folders, and see that they are root's alone.

        Raises:
            HostError: they cannot be made, or somebody else could write in them.
        """
        try:
            for path in (self.folder, f"{self.folder}/domains"):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, 0o700)
                have = os.lstat(path)
                if have.st_uid != os.geteuid() or have.st_mode & 0o170077 != 0o040000:
                    raise HostError(
                        f"{path} is not a folder of root's alone",
                        cause=f"owner {have.st_uid}, mode {have.st_mode & 0o7777:04o}",
                        fix=f"see who made it, then: rm -r {path}",
                    )
        except OSError as error:
            raise HostError(
                f"cannot use {self.folder}", fix="run this as root, on a host where /run is writable"
            ) from error

    def locked(self) -> AbstractContextManager[None]:
        """Hold the registry still. Short: allocate, look for conflicts, write one entry."""
        return _locked(f"{self.folder}/lock", "the registry")

    def locked_domain(self, domid: int) -> AbstractContextManager[None]:
        """Be the only command that acts on one domain.

        Raises:
            HostError: another command holds it until the deadline.
        """
        return _locked(f"{self.directory(domid)}/lock", f"domain {domid}")

    def domids(self) -> tuple[int, ...]:
        """Return the domids in use, in order."""
        try:
            names = os.listdir(f"{self.folder}/domains")
        except FileNotFoundError:
            return ()
        except PermissionError as error:
            raise HostError(f"cannot read {self.folder}", fix="run this as root") from error
        return tuple(sorted(int(name) for name in names if name.isascii() and name.isdecimal()))

    def entries(self) -> tuple[Entry, ...]:
        """Return every domain, in order of domid.

        Raises:
            HostError: an entry is damaged. What it holds is not known, so nothing new may start beside it.
        """
        found, damaged = self.readable()
        if damaged:
            raise damaged[0]
        return found

    def readable(self) -> tuple[tuple[Entry, ...], tuple[HostError, ...]]:
        """Return every domain that can be read, and what is wrong with the others: one must not hide the rest."""
        found: list[Entry] = []
        damaged: list[HostError] = []
        for domid in self.domids():
            try:
                entry = self._read(domid)
            except HostError as error:
                damaged.append(error)
                continue
            if entry is not None:
                found.append(entry)
        return tuple(found), tuple(damaged)

    def find(self, name: str) -> Entry:
        """Return a domain by its name or domid.

        Raises:
            NotFoundError: there is none.
        """
        entries, damaged = self.readable()
        # A number is a domid before it is a name, whatever order they were made in: `destroy 7` ends domain 7.
        for key in ("domid", "name"):
            for entry in entries:
                if name == str(getattr(entry, key)):
                    return entry
        if damaged:
            raise damaged[0]  # it may be the one
        raise NotFoundError(f"there is no domain {name!r}", fix="see depriv list")

    def current(self, entry: Entry) -> Entry:
        """Return an entry as it is now, its domain locked.

        Raises:
            NotFoundError: another command has ended the domain meanwhile.
        """
        now = self._read(entry.domid)
        if now is None or (now.name, now.created_at_s) != (entry.name, entry.created_at_s):
            raise NotFoundError(f"domain {entry.name} is gone: another command ended it", fix="see depriv list")
        return now

    def next_domid(self) -> int:
        """Return the next free domid, counting up: one that was freed lately is not it.

        Raises:
            PlanError: all are in use or were, a moment ago.
        """
        used = set(self.domids())
        history = self._history()
        now = time.clock_gettime(time.CLOCK_BOOTTIME)  # counts on when somebody sets the clock
        recent = {domid for domid, freed in history.items() if now - freed < REUSE_DELAY_S}
        last = max(history, key=lambda domid: history[domid], default=0)
        last = max(last, max(used, default=0)) if last < DOMID_LAST else 0
        count = DOMID_LAST - DOMID_FIRST + 1
        for offset in range(count):
            domid = DOMID_FIRST + (last + offset) % count
            if domid not in used and domid not in recent:
                return domid
        raise PlanError(
            f"all {count} domids are in use, or were within the last {REUSE_DELAY_S} seconds",
            fix="destroy domains that are not needed, or wait a minute",
        )

    def add(self, entry: Entry, held: contextlib.ExitStack) -> None:
        """Make a domain's folder, lock it for as long as ``held``, write its entry. The registry must be locked.

        In this order nobody can find the domain before it is locked.

        Raises:
            HostError: there is no room; nothing is left.
        """
        try:
            os.mkdir(self.directory(entry.domid), 0o700)
        except OSError as error:
            raise HostError(f"cannot make {self.directory(entry.domid)}") from error
        try:
            held.enter_context(self.locked_domain(entry.domid))
            self.save(entry)
        except BaseException:
            self._remove_folder(entry.domid)
            raise

    def save(self, entry: Entry) -> None:
        """Replace a domain's entry: all of it or nothing."""
        _write(f"{self.directory(entry.domid)}/state.json", json.dumps(_encode(entry)).encode())

    def sweep(self) -> None:
        """Remove folders without an entry. The registry must be locked.

        An entry is written under that lock: what has none was left by a start that was killed right there.
        """
        for domid in self.domids():
            if not os.path.lexists(f"{self.directory(domid)}/state.json") and os.path.isdir(self.directory(domid)):
                self._remove_folder(domid)

    def remove(self, domid: int) -> None:
        """Forget a domain, and remember when, so that its ids rest. The registry must be locked."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        try:
            history = {key: at for key, at in self._history().items() if now - at < REUSE_DELAY_S}
        except HostError:
            history = {}  # damaged: what else was freed lately is lost, but this domain has to go
        history[domid] = now
        self._remove_folder(domid)  # first: on a full file system it makes the room for what follows
        _write(f"{self.folder}/history.json", json.dumps(history).encode())

    def _remove_folder(self, domid: int) -> None:
        folder = self.directory(domid)
        try:
            for name in os.listdir(folder):
                os.unlink(f"{folder}/{name}")
            os.rmdir(folder)
        except OSError as error:
            raise HostError(f"cannot remove {folder}", fix="see what is in it; depriv puts only files there") from error

    def _history(self) -> dict[int, float]:
        """Return domid -> when it was freed, in seconds of the boot clock."""
        data = _load(f"{self.folder}/history.json")
        try:
            return {int(key): float(at) for key, at in (data or {}).items()}
        except (TypeError, ValueError) as error:
            path = f"{self.folder}/history.json"
            raise HostError(f"{path} is damaged", fix=f"wait a minute, then remove it: rm {path}") from error

    def _read(self, domid: int) -> Entry | None:
        """Return one entry; None if it was removed meanwhile or is only just being made."""
        data = _load(f"{self.directory(domid)}/state.json")
        if data is None:
            return None
        try:
            return _decode(data)
        except HostError as error:
            error.what = f"{self.directory(domid)}/state.json {error.what}"
            raise


@contextlib.contextmanager
def _locked(path: str, what: str) -> Generator[None]:
    """Hold an exclusive lock on a file, or fail at the deadline naming who holds it."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError as error:
        raise NotFoundError(f"{what} is gone") from error
    except OSError as error:
        raise HostError(f"cannot lock {what}", fix="run this as root") from error
    try:
        while not _try_lock(fd):
            if time.monotonic() > deadline:
                holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
                raise HostError(
                    f"another command has been busy with {what} for {LOCK_TIMEOUT_S:.0f} seconds",
                    cause=f"process {holder or 'unknown'} holds {path}",
                    fix="wait for it, or end it",
                )
            time.sleep(0.005)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(path: str, data: bytes) -> None:
    """Write beside, sync, rename: a reader finds the old or the new, whole."""
    beside = f"{path}.{os.getpid()}"
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise HostError(f"cannot write {path}", fix="see that there is room: df -h /run") from error


def _load(path: str) -> dict[str, Any] | None:
    """Return the file's JSON, or None if there is no such file.

    Raises:
        HostError: the file is none that we wrote.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise HostError(f"cannot read {path}", fix="run this as root") from error
    except OSError as error:
        raise HostError(f"cannot read {path}", fix="see what it is: depriv puts only regular files there") from error
    try:
        data: object = json.loads(os.read(fd, _STATE_BYTES_MAX))
        if not isinstance(data, dict):
            raise ValueError("no object")  # noqa: TRY004, TRY301 (the file's content is wrong, one handler)
        return cast("dict[str, Any]", data)
    except (OSError, ValueError, RecursionError) as error:
        raise HostError(
            f"{path} is damaged", fix="see what still runs of it (ps, systemd-cgls) before you remove it"
        ) from error
    finally:
        os.close(fd)


def _encode(entry: Entry) -> dict[str, object]:
    data = entry.as_dict()
    if entry.expected is not None:
        expected = entry.expected.as_dict()
        expected["limits"] = [limit.as_dict() for limit in entry.expected.limits]
        expected["grants"] = [grant.as_dict() for grant in entry.expected.grants]
        data["expected"] = expected
    return {"version": _VERSION, **data}


def _decode(data: dict[str, Any]) -> Entry:
    """Return the entry, or raise ``HostError``: a file of another version is not guessed at."""
    try:
        if data.pop("version") != _VERSION:
            raise ValueError("it is of another version of depriv")  # noqa: TRY301 (one handler for all that is wrong)
        expected = data.pop("expected")
        if expected is not None:
            expected["limits"] = tuple(Limit(**limit) for limit in expected["limits"])
            expected["grants"] = tuple(Grant(**grant) for grant in expected["grants"])
            expected["environ"] = tuple(expected["environ"])
            expected = Expected(**expected)
        data["images"] = tuple((dev, ino, rdev, writable) for dev, ino, rdev, writable in data["images"])
        return Entry(**data, expected=expected)
    except (KeyError, TypeError, ValueError) as error:
        fix = "see what still runs of it, and which version of depriv wrote it"
        raise HostError("cannot be read by this version", cause=repr(error), fix=fix) from error
