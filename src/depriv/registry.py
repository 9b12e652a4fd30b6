# SPDX-License-Identifier: Apache-2.0
"""Which domains exist on this host and what each holds, on disk below /run/depriv.

One folder per domain, named by its domid: ``state.json`` and a copy of it, the QMP sockets, the log FIFO, the
console's saved text. Folders and files are root's alone: nothing a device model can write is ever read.
There is no daemon; commands meet at two kinds of lock, the registry's (milliseconds) and one per domain.

What is written survives a kill at any instruction. What cannot be read any more is read from the copy, and failing
that from the kernel. See docs/adr/0011.
"""

from __future__ import annotations

import contextlib
import os
import time

from depriv import cgroup, durable, proc
from depriv.entry import Entry, decode, encode
from depriv.errors import HostError, NotFoundError, PlanError
from depriv.host import STATE_DIR
from depriv.identity import DOMID_FIRST, DOMID_LAST, tool_domid
from depriv.policy import ENDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager

REUSE_DELAY_S = 60  # libxl's LIBXL_DOMID_REUSE_TIMEOUT
_COPY, _STATE = "state.copy", "state.json"  # the copy first: what is read first is never the older one
_FILES = ("boot", "ended", "history.json", _COPY, _STATE)  # all that is written here
_GONE = "gone-"  # a domain's folder on its way out


class Registry:
    """The registry in one folder."""

    def __init__(self, folder: str = STATE_DIR) -> None:
        """Take the folder; nothing is touched yet."""
        self.folder = folder
        self.boot_id = proc.boot_id()
        self._seen: dict[int, tuple[tuple[int, int, int], Entry]] = {}  # domid -> which file it was read from, entry

    def directory(self, domid: int) -> str:
        """Return a domain's folder."""
        return f"{self.folder}/domains/{domid}"

    def cgroup(self, domid: int) -> str:
        """Return a domain's cgroup, in the hierarchy where it is or would be made; "" where there are none."""
        paths = [f"{top}/{cgroup.folder_name(self.folder)}/{domid}" for top, _ in cgroup.hierarchies()]
        return next(filter(os.path.isdir, paths), paths[0] if paths else "")

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
                        fix=self._fix(path),
                    )
        except OSError as error:
            fix = f"run this as root, where {os.path.dirname(self.folder)} is a folder that can be written to"
            raise HostError(f"cannot use {self.folder}", fix=fix) from error

    def _fix(self, path: str) -> str:
        """Return what to do about a folder that is not root's alone. Never to remove it: guests may be in there."""
        if self.folder != STATE_DIR:
            return "name a folder that is depriv's own (DEPRIV_STATE_DIR), or one that is not there yet"
        own = f"chown root: {path}; chmod 700 {path}"
        return f"run this as root, and see what it is: ls -la {path}\nif it is depriv's: {own}"

    @property
    def is_new(self) -> bool:
        """Whether nobody has seen to what was left of before this boot, or before the folder was lost."""
        try:
            found = durable.load(f"{self.folder}/boot")
        except durable.DamagedError:
            found = None
        return found != {"boot": self.boot_id}

    def mark_seen(self) -> None:
        """Write down that all of the past is swept."""
        durable.write((f"{self.folder}/boot",), {"boot": self.boot_id})

    def locked(self, *, timeout_s: float | None = None) -> AbstractContextManager[None]:
        """Hold the registry still. Short: allocate, look for conflicts, write one entry."""
        return durable.locked(f"{self.folder}/lock", "the registry", timeout_s=timeout_s)

    def locked_domain(self, domid: int, *, timeout_s: float | None = None) -> AbstractContextManager[None]:
        """Be the only command that acts on one domain.

        Raises:
            NotFoundError: it is gone.
            HostError: another command holds it until the deadline.
        """
        return durable.locked(f"{self.directory(domid)}/lock", f"domain {domid}", timeout_s=timeout_s)

    def is_busy(self, domid: int) -> bool:
        """Tell whether a command acts on a domain right now."""
        return durable.is_locked(f"{self.directory(domid)}/lock")

    def domids(self) -> tuple[int, ...]:
        """Return the domids in use, in order."""
        return tuple(sorted(int(name) for name in self._names() if name.isascii() and name.isdecimal()))

    def debris(self) -> tuple[str, ...]:
        """Return the paths of what writes and removals that were cut short have left."""
        found = [f"{self.folder}/domains/{name}" for name in self._names() if name.startswith(_GONE)]
        folders = [self.folder, *(self.directory(domid) for domid in self.domids())]
        for folder in folders:
            with contextlib.suppress(OSError):
                found += [f"{folder}/{name}" for name in os.listdir(folder) if _is_half_written(name)]
        return tuple(found)

    def _names(self) -> list[str]:
        try:
            return os.listdir(f"{self.folder}/domains")
        except FileNotFoundError:
            return []
        except NotADirectoryError as error:
            raise HostError(f"cannot use {self.folder}", fix=self._fix(self.folder)) from error
        except PermissionError as error:
            raise HostError(f"cannot read {self.folder}", fix="run this as root") from error

    def entries(self) -> tuple[Entry, ...]:
        """Return every domain, in order of domid; one whose entry is damaged as far as the kernel shows it."""
        return tuple(entry for entry in map(self.read, self.domids()) if entry is not None)

    def read(self, domid: int) -> Entry | None:
        """Return one domain; None if there is none: it was removed, or is only just being made.

        Raises:
            HostError: this is not root.
        """
        which = _which(f"{self.directory(domid)}/{_STATE}")
        if domid in self._seen and self._seen[domid][0] == which != (0, 0, 0):
            return self._seen[domid][1]
        cause: list[str] = []
        for name in (_STATE, _COPY):
            path = f"{self.directory(domid)}/{name}"
            try:
                entry = _loaded(path, domid)
                if entry is not None:
                    if name == _STATE and which == _which(path):
                        self._seen[domid] = (which, entry)
                    return entry
            except durable.DamagedError as error:
                cause.append(f"{error}: {error.cause or error.__cause__}")
            except HostError as error:
                if not error.cause:
                    raise
                cause.append(f"{path} {error}: {error.cause}")
        if not cause:
            return None
        from depriv.recover import rebuild  # noqa: PLC0415 (never needed, but for this)

        return rebuild(domid, self.cgroup(domid), cause[0])

    def find(self, name: str) -> Entry:
        """Return a domain by its name or domid.

        Raises:
            NotFoundError: there is none.
        """
        # One that is quarantined has given up its name. A number is a domid before it is a name, whatever order they
        # were made in: `destroy 7` ends domain 7.
        entries = sorted(self.entries(), key=lambda entry: entry.state == "quarantined")
        for key in ("domid", "name"):
            for entry in entries:
                if name == str(getattr(entry, key)):
                    return entry
        raise NotFoundError(f"there is no domain {name!r}", fix="see depriv list")

    def current(self, entry: Entry) -> Entry:
        """Return an entry as it is now, its domain locked.

        Raises:
            NotFoundError: another command has ended the domain meanwhile.
        """
        now = self.read(entry.domid)
        if now is None or not (now.same_life(entry) or now.state == "damaged"):
            raise NotFoundError(f"domain {entry.name} is gone: another command ended it", fix="see depriv list")
        return now

    def life(self, entry: Entry) -> str:
        """Return whether a domain's QEMU lives, from the kernel: "running", "dead-leader", "dead"; "" if not started.

        One of an earlier boot is dead, whoever has its number now.
        """
        if entry.state == "damaged":
            lives = cgroup.members(entry.cgroup) or (entry.uid and proc.processes_of(uid=entry.uid))
            return "running" if lives else "dead"
        if entry.expected is None:
            return ""
        if entry.boot_id != self.boot_id:
            return "dead"
        alive = proc.alive(entry.expected.pid, entry.expected.starttime)
        # From within another pid namespace, as a container's, its number says nothing; its cgroup still does.
        return "running" if alive == "dead" and cgroup.has_unseen(entry.cgroup) else alive

    def is_starting(self, entry: Entry) -> bool:
        """Tell whether the command that starts a domain is still at it: it holds the domain's lock till the end."""
        if entry.state != "starting" or entry.boot_id != self.boot_id:
            return False
        if self.is_busy(entry.domid) and proc.alive(entry.toolstack_pid, entry.toolstack_starttime) != "dead":
            return True
        # It may have come to its end since the entry was read: it writes that before it lets go of the lock.
        now = self.read(entry.domid)
        return now is not None and now.state != "starting" and now.same_life(entry)

    def next_domid(self) -> int:
        """Return the next free domid, counting up: one that was freed lately is not it, nor another registry's.

        Raises:
            PlanError: all are in use or were, a moment ago.
        """
        used = set(self.domids())
        history = self._history()
        now = time.clock_gettime(time.CLOCK_BOOTTIME)  # counts on when somebody sets the clock
        resting = {domid for domid, freed in history.items() if now - freed < REUSE_DELAY_S}
        # A uid belongs to one domain of the host, whichever registry knows it; and what has a cgroup may live.
        living = used | {leaf.domid for leaf in cgroup.leaves()}
        resting |= living | {tool_domid(domid) for domid in living}  # whose uid its tools have
        last = max(history, key=lambda domid: history[domid], default=0)
        last = max(last, max(used, default=0)) if last < DOMID_LAST else 0
        count = DOMID_LAST - DOMID_FIRST + 1
        for offset in range(count):
            domid = DOMID_FIRST + (last + offset) % count
            if domid not in resting and domid != tool_domid(domid):
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
            raise HostError(
                f"cannot make {self.directory(entry.domid)}", fix="see that it is writable and has room: df -h /run"
            ) from error
        try:
            held.enter_context(self.locked_domain(entry.domid))
            self.save(entry)
        except BaseException:
            self._remove_folder(entry.domid)
            raise

    def save(self, entry: Entry) -> None:
        """Replace a domain's entry: all of it or nothing."""
        directory = self.directory(entry.domid)
        durable.write((f"{directory}/{_COPY}", f"{directory}/{_STATE}"), encode(entry))

    def note_end(self, domid: int, how: str) -> None:
        """Write down how a guest ended, as QEMU said it: one of ENDS. For whoever sees to its end."""
        durable.write((f"{self.directory(domid)}/ended",), {"ended": how})

    def end_noted(self, domid: int) -> str:
        """Return what ``note_end`` wrote, or ""."""
        try:
            data = durable.load(f"{self.directory(domid)}/ended") or {}
        except durable.DamagedError:
            return ""
        found = data.get("ended")
        return found if isinstance(found, str) and found in ENDS else ""

    def forget_end(self, domid: int) -> None:
        """Remove what ``note_end`` wrote: the guest is up again."""
        with contextlib.suppress(OSError):
            os.unlink(f"{self.directory(domid)}/ended")

    def empty_folders(self) -> tuple[int, ...]:
        """Return the domids of folders without an entry.

        An entry is written under the registry's lock: with that held, what has none was left by a start that was
        killed right there; without it, one may be about to be written.
        """
        return tuple(domid for domid in self.domids() if not self._has_entry(domid))

    def _has_entry(self, domid: int) -> bool:
        return any(os.path.lexists(f"{self.directory(domid)}/{name}") for name in (_STATE, _COPY))

    def remove(self, domid: int, *, used: bool = True) -> None:
        """Forget a domain; if its ids were used, remember when, so that they rest. The registry must be locked.

        Raises:
            HostError: /run is read-only, or there is no room; the entry may still be there.
        """
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        history = {key: at for key, at in self._history().items() if now - at < REUSE_DELAY_S}
        if used:
            history[domid] = now
        written = False
        if used:
            with contextlib.suppress(HostError):  # full: removing the folder makes the room
                self._write_history(history)
                written = True
        self._remove_folder(domid)
        if used and not written:
            self._write_history(history)

    def _remove_folder(self, domid: int) -> None:
        """Take a folder out of sight at once, then apart: a kill in between leaves no half of a domain."""
        away = f"{self.folder}/domains/{_GONE}{domid}-{time.monotonic_ns()}"
        try:
            os.rename(self.directory(domid), away)
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostError(
                f"cannot remove {self.directory(domid)}", fix="see that /run is writable, then: depriv gc"
            ) from error
        remove_tree(away)

    def _write_history(self, history: dict[int, float]) -> None:
        durable.write((f"{self.folder}/history.json",), {"boot": self.boot_id, "freed": history})

    def _history(self) -> dict[int, float]:
        """Return domid -> when it was freed, in seconds of this boot's clock; nothing if that cannot be read.

        What was freed lately is then not known; but an id is never used before it is seen that nobody has it.
        """
        try:
            data = durable.load(f"{self.folder}/history.json") or {}
            freed: dict[str, float] = data["freed"] if data.get("boot") == self.boot_id else {}
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            return {
                int(domid): float(at) for domid, at in freed.items() if at <= now
            }  # one of the future rests for ever
        except (durable.DamagedError, AttributeError, KeyError, TypeError, ValueError, OverflowError):
            return {}


def _loaded(path: str, domid: int) -> Entry | None:
    data = durable.load(path)
    if data is None:
        return None
    entry = decode(data)
    if entry.domid != domid:  # or ending the one would end the other
        raise durable.DamagedError(f"{path} is misplaced", cause=f"it is of domain {entry.domid}")
    return entry


def _is_half_written(name: str) -> bool:
    """Tell whether a file is what a write of ours that was cut short has left. Others may be called NAME.NUMBER too."""
    return durable.is_beside(name) and name.rsplit(".", 2)[0] in _FILES


def _which(path: str) -> tuple[int, int, int]:
    """Return what tells a file from the one that replaces it."""
    try:
        have = os.lstat(path)
    except OSError:
        return (0, 0, 0)
    return (have.st_ino, have.st_mtime_ns, have.st_size)


def remove_tree(path: str) -> None:
    """Remove a file, or a folder of files, of ours.

    Raises:
        HostError: it stays, or a part of it.
    """
    try:
        try:
            names = os.listdir(path)
        except NotADirectoryError:
            os.unlink(path)
            return
        for name in names:
            inner = f"{path}/{name}"
            if os.path.isdir(inner) and not os.path.islink(inner):
                remove_tree(inner)
            else:
                os.unlink(inner)
        os.rmdir(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot remove {path}", fix="see what is in it; depriv puts only files there") from error
