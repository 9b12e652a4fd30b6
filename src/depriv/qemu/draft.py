# SPDX-License-Identifier: Apache-2.0
"""A command line while it is being understood, and what it comes to. Pure.

Each option's handler takes the word and the ``Draft``: it asks for descriptors and private files, and appends the
words that QEMU is to get instead. :mod:`depriv.qemu.translate` has the table of handlers.
"""

from __future__ import annotations

from depriv.config import Note
from depriv.host import unfit
from depriv.openings import Inherited
from depriv.qemu.words import error
from depriv.records import Record
from depriv.steps import ListenUnix, OpenFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from depriv.host import FileFacts
    from depriv.openings import Opening
    from depriv.qemu.words import Word

PRIVATE = "/private"
FIRST_FD = 10  # below: the standard streams and our own monitors
LAST_FD = 99  # see check.py
_OWN_ROLES = ("stdin", "stdout", "stderr", "qmp", "events", "log")  # what every QEMU has of ours
SET_BASE = 1000  # /dev/fdset/1010 holds descriptor 10: the sets below are the caller's own


class Allowed(Record):
    """What the caller has allowed beyond the strict defaults, and what this host has for it."""

    probe_format: bool = False  # take for formats that are not given what QEMU would guess
    keep_net: bool = False  # QEMU stays in the host's network namespace
    passt: str = ""  # path of passt; "": not installed
    xen: bool = False  # libxl's command line: -xen-domid and what goes with it


class DiskFile(Record):
    """One file of a disk: what the registry holds for it, and how large it may become."""

    role: str
    path: str
    format: str  # "raw", "qcow2", ... as given; "": to be asked for with --probe-format
    writable: bool
    facts: FileFacts


class Private(Record):
    """A copy of a file that QEMU reads by name at its start; it vanishes with QEMU's root."""

    role: str
    source: str  # on the host
    target: str  # below /private
    facts: FileFacts


class Vnc(Record):
    """A VNC server: its socket is handed over by QMP once QEMU runs (display-update, QEMU 7.1)."""

    role: str  # of its ListenTcp or ListenUnix with number -1


class Request(Record):
    """What a command line comes to. From it, the host's facts and an identity the planner makes a plan."""

    argv: tuple[str, ...]  # QEMU's words after the program, with descriptors in place of all that named the host
    dry: tuple[str, ...]  # the same with empty disks, unconnected: asks QEMU which files it needs
    name: str = ""  # of -name; ""
    machine: str = "pc"
    accel: str = "tcg"  # "tcg" (QEMU's default), "kvm", or "auto": KVM if the host has it
    memory_mib: int = 128
    vcpus: int = 1
    files: tuple[OpenFile, ...] = ()
    disks: tuple[DiskFile, ...] = ()
    privates: tuple[Private, ...] = ()
    listens: tuple[ListenUnix, ...] = ()
    openings: tuple[Opening, ...] = ()
    vncs: tuple[Vnc, ...] = ()
    notes: tuple[Note, ...] = ()
    paused: bool = False  # the caller's own -S
    stdio: bool = False  # QEMU reads the caller's standard input
    ptys: bool = False  # QEMU makes pseudo-terminals that the host is to see
    daemonize: bool = False
    pidfile: str = ""
    incoming_role: str = ""  # which of the openings a saved state is read from; "": none
    waits: bool = False  # -incoming defer: the caller says later where its state is read from
    no_guest: bool = False  # -version, -help, -device help: QEMU prints and ends
    unknown_formats: tuple[DiskFile, ...] = ()  # to be probed, then translated anew
    probed: tuple[FileFacts, ...] = ()  # images whose format is a guess, to be confirmed by qemu-img before the start
    domid: int = 0  # -xen-domid; 0: none


class Draft:
    """The state while words are handled one after the other."""

    def __init__(self, look: Callable[[str], FileFacts], allowed: Allowed, cwd: str, formats: dict[str, str]) -> None:
        """Take how to look at a file, what is allowed, the caller's folder, and formats found by probing."""
        self.look = look
        self.allowed = allowed
        self.cwd = cwd
        self.formats = formats
        self.argv: list[str] = []
        self.dry: list[str] = []
        self.files: list[OpenFile] = []
        self.disks: list[DiskFile] = []
        self.unknown_formats: list[DiskFile] = []
        self.privates: list[Private] = []
        self.listens: list[ListenUnix] = []
        self.openings: list[Opening] = []
        self.vncs: list[Vnc] = []
        self.notes: list[Note] = []
        self.facts: dict[str, Any] = {}  # name, machine, ... : fields of the request, set by handlers
        self.seen: set[str] = set()  # names of all options
        self.roles: set[str] = set(_OWN_ROLES)
        self.blocks: list[Word] = []  # -drive, -blockdev and their like: understood together, by block_options.finish
        self._next = FIRST_FD

    # What handlers use

    def emit(self, *words: str, dry: tuple[str, ...] | None = None) -> None:
        """Append words for QEMU; ``dry`` are those of the dry run, () for none, if they differ."""
        self.argv += words
        self.dry += words if dry is None else dry

    def note(self, word: Word | None, text: str, *, warning: bool = False) -> None:
        """Tell the user something: an option taken over, one without effect."""
        at = f"word {word.place}, " if word else ""
        key = word.name if word else ""
        self.notes.append(Note(key=key, text=f"{at}{text}", warning=warning))

    def path(self, word: Word, path: str) -> str:
        """Return a path as from the root; a relative one is the caller's.

        Raises:
            ConfigError: it is empty, or has control characters in it.
        """
        if not path:
            raise error(word, "it names no file")
        if not path.isprintable():
            raise error(word, "the file's name has control characters in it", fix="rename the file")
        if not path.startswith("/") and not self.cwd:
            raise error(word, "the current folder has been removed", fix="go to one that is there, or write all of it")
        whole = path if path.startswith("/") else f"{self.cwd}/{path}"
        # Not through os.path: `..` is kept out of a plan by meaning, and the kernel sees links where we see names.
        parts: list[str] = []
        for part in whole.split("/"):
            if part == "..":
                parts = parts[:-1]
            elif part not in ("", "."):
                parts.append(part)
        return "/" + "/".join(parts)

    def role(self, wanted: str) -> str:
        """Return a role that no other has: ``wanted``, or with a number behind it. For people and for the audit."""
        role = wanted
        number = 1
        while role in self.roles:
            number += 1
            role = f"{wanted}-{number}"
        self.roles.add(role)
        return role

    def number(self, word: Word) -> int:
        """Return the next descriptor's number in QEMU."""
        if self._next > LAST_FD:
            raise error(word, f"more than {LAST_FD - FIRST_FD + 1} files and sockets", fix="give the guest fewer")
        self._next += 1
        return self._next - 1

    def file(self, word: Word, path: str, *, role: str, access: str, kinds: tuple[str, ...] = ("file",)) -> OpenFile:
        """Have the jail open an existing file and return how; ``access`` is "ro" or "rw".

        Raises:
            ConfigError: it is missing, of another kind, or a symbolic link.
        """
        path = self.path(word, path)
        facts = self.require(word, path, kinds)
        step = OpenFile(
            role=self.role(role),
            path=path,
            access=access,
            kind=facts.kind,
            number=self.number(word),
            dev=facts.dev if facts.kind == "file" else 0,
            ino=facts.ino if facts.kind == "file" else 0,
            rdev=facts.rdev if facts.kind != "file" else 0,
        )
        self.files.append(step)
        return step

    def require(self, word: Word, path: str, kinds: tuple[str, ...]) -> FileFacts:
        """Return the facts of a file that has to be one of ``kinds``."""
        facts = self.look(path)
        if facts.kind not in kinds:
            cause, fix = unfit(facts, " or ".join(kinds))
            raise error(word, f"cannot use {path}", cause=cause, fix=fix)
        return facts

    def fdset(self, number: int) -> str:
        """Return the name by which QEMU opens a descriptor, and tell it of the set."""
        self.emit("-add-fd", f"fd={number},set={SET_BASE + number}", dry=())
        return f"/dev/fdset/{SET_BASE + number}"

    def inherited(self, word: Word, text: str, *, role: str) -> int:
        """Return the number in QEMU of a descriptor that the caller has open as ``text``.

        Raises:
            ConfigError: it is no number.
        """
        if not text.isdecimal():
            raise error(word, f"{text!r} is no descriptor", fix="give the number of an open one")
        for known in self.openings:
            if isinstance(known, Inherited) and known.source == int(text):
                raise error(word, f"descriptor {text} is named twice", fix="open one for each use")
        number = self.number(word)
        self.openings.append(Inherited(role=self.role(role), number=number, source=int(text)))
        return number

    def take_late(self, word: Word, text: str, *, role: str) -> None:
        """Have a descriptor of the caller's handed over by QMP, once QEMU is audited."""
        self.inherited(word, text, role=f"{role}-source")
        self.openings[-1] = Inherited(role=role, number=-1, source=int(text))

    def private(self, word: Word, path: str, *, role: str) -> str:
        """Return where QEMU finds its own copy of a file that it reads by name at its start.

        Raises:
            ConfigError: it is missing, empty or no regular file.
        """
        path = self.path(word, path)
        facts = self.require(word, path, ("file",))
        if facts.size == 0:
            raise error(word, f"{path} is empty", fix="name the real file")
        role = self.role(role)
        target = f"{PRIVATE}/{role}"
        self.privates.append(Private(role=role, source=path, target=target, facts=facts))
        return target

    def listen(self, word: Word, path: str, *, role: str) -> int:
        """Have the jail listen on a UNIX socket and return its number in QEMU."""
        path = self.path(word, path)
        facts = self.look(path)
        if facts.kind not in ("missing", "socket"):
            raise error(
                word,
                f"cannot make the socket {path}",
                cause=f"there is a {facts.kind} of that name",
                fix="name another",
            )
        number = self.number(word)
        self.listens.append(ListenUnix(role=self.role(role), path=path, number=number, replace_old=True))
        return number

    def open(self, opening: Opening) -> None:
        """Have the toolstack open something."""
        self.openings.append(opening)

    def refuse(self, word: Word, why: str, *, fix: str) -> None:
        """Refuse an option.

        Raises:
            ConfigError: always.
        """
        raise error(word, "it is refused", cause=why, fix=fix)
