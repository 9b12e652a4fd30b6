# SPDX-License-Identifier: Apache-2.0
"""What is wanted: one domain, in the user's words but typed. Pure.

Files in xl.cfg(5)'s format become a ``Domain`` in :mod:`depriv.xlconfig`; a Python program makes one directly.
"""

from __future__ import annotations

from depriv.errors import ConfigError
from depriv.records import Record, cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


_KINDS = {"str": str, "int": int, "bool": bool}
ACTIONS = ("destroy", "restart", "preserve", "rename-restart")  # what on_poweroff, on_reboot and on_crash may say
SHARED_USER = "xen-qemuuser-shared"  # as identity.SHARED: the one device_model_user that several domains may have
_NAME_MAX = 63
_NAME_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-"


class Checked(Record):
    """A record that a Python program fills in, and gets wrong as files are got wrong: with an error that says how."""

    def validate(self) -> None:
        """Refuse values of another type than declared: a ``dm_restrict="no"`` would be true."""
        for name, kind in type(self).fields.items():
            value: object = getattr(self, name)
            if type(value) is not _KINDS.get(kind, tuple):
                self.refuse(name, f"give {_KINDS[kind].__name__ if kind in _KINDS else kind}")
            inner = kind.removeprefix("tuple[").removesuffix(", ...]")
            if isinstance(value, tuple) and inner.isidentifier():
                items = cast("tuple[object, ...]", value)
                if any(type(item).__name__ != inner for item in items):
                    self.refuse(name, f"give {kind}")

    def refuse(self, name: str, fix: str) -> None:
        """Raise the error for a field."""
        raise ConfigError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}", fix=fix)

    def require_path(self, name: str) -> None:
        """Refuse what is neither "" nor a path from the root."""
        value: str = getattr(self, name)
        if value and (value[0] != "/" or not value.isprintable()):
            self.refuse(name, "give the whole path, from / on")

    def require_one_of(self, name: str, words: tuple[str, ...]) -> None:
        """Refuse any other word."""
        if getattr(self, name) not in words:
            self.refuse(name, "it is " + ", ".join(repr(word) for word in words))


class Layer(Checked):
    """One file below a disk in its backing chain, as the configuration names it."""

    target: str  # absolute path
    format: str  # "raw" or "qcow2"

    def validate(self) -> None:
        """Refuse what no file could have said."""
        super().validate()
        self.require_path("target")
        self.require_one_of("format", ("raw", "qcow2"))


class Disk(Checked):
    """One disk or CD-ROM drive."""

    vdev: str  # canonical: "xvda", "hdc", "sdb", "d4p0" becomes its letter form
    target: str = ""  # absolute path; "" is an empty CD-ROM drive
    format: str = "raw"  # "raw" or "qcow2" ("empty" for an empty drive)
    readonly: bool = False
    cdrom: bool = False
    discard: bool = True
    direct_io_safe: bool = False
    chain: tuple[Layer, ...] = ()  # what the image is based on, nearest first; empty: it stands alone

    def validate(self) -> None:
        """Refuse what no file could have said. Whether the machine has such a ``vdev`` is for planning to say."""
        super().validate()
        self.require_path("target")
        self.require_one_of("format", ("raw", "qcow2", "empty"))
        if self.vdev and not (self.vdev.isascii() and self.vdev.isalnum()):
            self.refuse("vdev", 'give "xvda", "hda" or "sda", and so on')
        if not self.target and not self.cdrom:
            self.refuse("target", "give the image's path: only a CD-ROM drive may be empty")


class Vif(Checked):
    """One network card as a vif specification asks for it."""

    mac: str = ""
    bridge: str = ""
    model: str = "rtl8139"
    type: str = "ioemu"  # "ioemu" or "vif"
    ip: str = ""
    script: str = ""
    vifname: str = ""
    backend: str = ""
    gatewaydev: str = ""
    forwarddev: str = ""
    rate: str = ""
    devid: int = -1  # -1: by position
    mtu: int = 0
    vlan: str = ""


def no_second_life(disks: tuple[Disk, ...], device_model_user: str) -> tuple[str, str]:
    """Return why a domain cannot be started again while the old one is kept, and what to do; ("", "") if it can.

    With rename-restart, the ended domain stays with all that is its own; the new one needs the same.
    """
    fix = 'write "restart", which ends the old domain first, or "preserve", which keeps it and starts none'
    for disk in disks:
        if disk.target and not (disk.readonly or disk.cdrom):
            return f"the domain that is kept would hold {disk.vdev}, which the new one writes to", fix
    if device_model_user not in ("", SHARED_USER):
        return f"the domain that is kept would hold the user {device_model_user}, which the new one runs as", fix
    return "", ""


def fit_name(text: str) -> str:
    """Return a name that a domain may have, as like ``text`` as can be: with dashes for what no name has; "" of none.

    Short enough for a domid behind it.
    """
    plain = "".join(char if char in _NAME_CHARACTERS else "-" for char in text[: _NAME_MAX - 8]).lstrip("-.")
    return f"vm{plain}" if plain.isdecimal() else plain


class Note(Record):
    """Something the user should know: a key that is ignored and why, an unknown key, a restriction switched off."""

    key: str
    text: str
    source: str = ""  # "" is the domain's own
    line: int = 0
    column: int = 0
    warning: bool = False  # False: for the record only (`check`, `plan`); True: printed at every start


class Domain(Checked):
    """One guest. The defaults are the strict ones; nothing here is read from the host."""

    name: str
    memory_mib: int = 128
    vcpus: int = 1
    machine: str = "pc"  # "pc", "q35" or "microvm"
    accel: str = "auto"  # "auto", "tcg" or "kvm"
    type: str = "hvm"  # "hvm", "pv" or "pvh": only hvm runs without Xen
    uuid: str = ""  # "": QEMU's own
    disks: tuple[Disk, ...] = ()
    vifs: tuple[Vif, ...] = ()
    kernel: str = ""  # absolute path, or ""
    ramdisk: str = ""
    cmdline: str = ""
    bios: str = ""  # "seabios" or "ovmf": which of the host's firmware images; "": the machine's own
    firmware: str = ""  # absolute path of a firmware image; "": the machine's own
    boot: str = "cd"  # letters of xl.cfg's boot=: c disk, d CD-ROM, n network
    serial: bool = True  # a serial port that writes into the console buffer
    acpi: bool = True
    localtime: bool = False
    rtc_timeoffset_s: int = 0
    dm_restrict: bool = True
    device_model_user: str = ""
    device_model_override: str = ""  # path of the QEMU binary; "": found on the host
    device_model_args: tuple[str, ...] = ()
    on_poweroff: str = "destroy"
    on_reboot: str = "restart"
    on_crash: str = "destroy"
    notes: tuple[Note, ...] = ()
    source: str = ""  # the file's name, for messages; "" for a Python program
    places: tuple[tuple[str, str, int, int, str], ...] = ()  # key or vdev, file, line, column, the line: for messages

    def _check_name(self) -> None:
        """Refuse a name that is not possible, or that a command would take for a domid."""
        if not 0 < len(self.name) <= _NAME_MAX or self.name.strip(_NAME_CHARACTERS) or self.name[0] in "-.":
            self.refuse("name", f"give 1 to {_NAME_MAX} letters, digits and ._+-, the first not - or .")
        if self.name.isdecimal():
            self.refuse("name", "put a letter in it: commands take a number for a domid")

    def validate(self) -> None:
        """Refuse what no file could have said, before it is asked of the host or put on QEMU's command line."""
        super().validate()
        self._check_name()
        for name in ("memory_mib", "vcpus"):
            if getattr(self, name) < 1:
                self.refuse(name, "give at least 1")
        for name in ("kernel", "ramdisk", "firmware", "device_model_override"):
            self.require_path(name)
        if not self.cmdline.isprintable():
            self.refuse("cmdline", "remove the control characters")
        if self.uuid.strip("0123456789abcdefABCDEF-"):
            self.refuse("uuid", "write it as 6f1a3c7e-9f5b-4b8e-9c36-0d2f8a1b4c5d")
        if self.boot.strip("cdn"):
            self.refuse("boot", "the letters are c disk, d CD-ROM, n network")
        self.require_one_of("accel", ("auto", "tcg", "kvm"))
        self.require_one_of("type", ("hvm", "pv", "pvh"))
        self.require_one_of("bios", ("", "seabios", "ovmf"))
        for name in ("on_poweroff", "on_reboot", "on_crash"):
            self.require_one_of(name, ACTIONS)
            what, fix = no_second_life(self.disks, self.device_model_user)
            if what and getattr(self, name) == "rename-restart":
                raise ConfigError(f"Domain: {name} is 'rename-restart', but {what}", fix=fix)

    def place(self, key: str) -> dict[str, Any]:
        """Return where a key (or the disk with a vdev) stands in the file, as ``ConfigError`` takes it."""
        for name, source, line, column, text in self.places:
            if name == key:
                return {"source": source, "line": line, "column": column, "text": text}
        return {"source": self.source}
