# SPDX-License-Identifier: Apache-2.0
"""Disk specifications of xl.cfg(5): ``disk = [...]`` and depriv's own ``disk_backing = [...]``. Pure.

Source: Xen's docs/man/xl-disk-configuration.5.pod.in and tools/libs/util/libxlu_disk_l.l, whose rules this follows item
by item, the deprecated ones too. What a confined device model cannot do is refused, with the way to get it.
"""

from __future__ import annotations

from depriv.config import Disk, Layer, Note
from depriv.xlcfg import Value, error_at, place_in
from depriv.xlspec import canonical_vdev, check_path, parse_number, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.errors import ConfigError

_FORMATS = {"": "raw", "raw": "raw", "qcow": "qcow", "qcow2": "qcow2", "vhd": "vhd", "qed": "qed", "empty": "empty"}
_CONVERTERS = {"qcow": "qcow", "vhd": "vpc", "qed": "qed"}  # our format -> the name qemu-img(1) knows it by
_ACCESS = {"r": True, "ro": True, "rw": False, "w": False, "": False}  # -> read-only
_FORMAT_PREFIXES = ("raw", "qcow", "qcow2", "vhd")
_SCRIPT_PREFIXES = ("iscsi", "nbd", "enbd", "drbd")
_IGNORED_PREFIXES = ("tapdisk", "tap", "tap2", "aio", "ioemu", "file", "phy")
_DOM0 = ("0", "Domain-0", "dom0")

_NO_BACKEND = "there is no Xen back end here: the device model gets the opened image"
_NO_GRANTS = "it is about Xen grant tables, and the device model reads the image itself"
_NO_COLO = "COLO replication is not supported"
_ATTACH_FIRST = (
    "attach the storage on the host first (iscsiadm, nbd-client, drbdadm) and give its block device as target="
)


class _Spec:
    """A disk specification being read: what has been said so far."""

    def __init__(self, value: Value, key: str) -> None:
        self.value = value
        self.key = key
        self.at = 0
        self.target: str | None = None
        self.target_at = 0
        self.format = ""  # "" until said
        self.format_at = 0
        self.vdev = ""
        self.vdev_at = 0
        self.cdrom = False
        self.readonly = False
        self.access_said = False
        self.discard: bool | None = None
        self.direct_io_safe = False
        self.had_prefix = False
        self.said: dict[str, str] = {}
        self.notes: list[Note] = []

    def bad(self, at: int, what: str, fix: str = "") -> ConfigError:
        """Return the error that points into the specification."""
        return error_at(place_in(self.value, at), f"disk specification: {what}", fix=fix)

    def note(self, at: int, text: str, *, warning: bool = False) -> None:
        """Remember what has no effect, and why."""
        place = place_in(self.value, at)
        self.notes.append(Note(key=self.key, text=text, line=place.line, column=place.column, warning=warning))

    def say(self, at: int, name: str, value: str) -> None:
        """Remember a value; an empty one may be replaced, another may not."""
        if self.said.get(name, value) not in ("", value):
            raise self.bad(at, f"{name} respecified: it was `{shown(self.said[name])}'", f"give {name} once")
        self.said[name] = value


def parse_disk(value: Value, *, key: str = "disk") -> tuple[Disk, tuple[Note, ...]]:
    """Return the disk one specification describes, and notes on what of it has no effect.

    Raises:
        ConfigError: the specification is wrong, or asks for what depriv refuses.
    """
    spec = _read(value, key)
    if not spec.vdev:
        fix = "say which disk of the guest it is: vdev=xvda"
        if ",vdev=" in (spec.target or ""):
            fix = "target= takes the rest of the string, vdev= included: write target= last"
        raise spec.bad(len(value.text), "no vdev", fix)
    vdev = canonical_vdev(spec.vdev, place_in(value, spec.vdev_at))
    if spec.cdrom and not spec.target:
        if spec.format not in ("", "raw", "empty"):
            raise spec.bad(spec.format_at, f"an empty drive has no format {spec.format}", "give target=, or no format")
        return Disk(vdev=vdev, format="empty", readonly=True, cdrom=True, discard=False), tuple(spec.notes)
    form = spec.format or "raw"
    if not spec.target:
        raise spec.bad(len(value.text), "no target", "give the image: target=/path (only a CD-ROM drive may be empty)")
    if form == "empty":
        fix = "leave format out" if spec.cdrom else "an empty drive is a CD-ROM: add devtype=cdrom, and drop target"
        raise spec.bad(spec.format_at, "format=empty, yet there is a target", fix)
    target = check_path(spec.target, "disk target", place_in(value, spec.target_at))
    _check_format(spec, form)
    readonly = spec.readonly or spec.cdrom
    disk = Disk(
        vdev=vdev,
        target=target,
        format=form,
        readonly=readonly,
        cdrom=spec.cdrom,
        # As libxl__device_disk_setdefault() has it: discard if the guest may write.
        discard=not readonly if spec.discard is None else spec.discard,
        direct_io_safe=spec.direct_io_safe,
    )
    return disk, tuple(spec.notes)


def parse_layer(value: Value) -> tuple[str, Layer]:
    """Return the vdev and the file that one item of ``disk_backing`` names.

    Raises:
        ConfigError: it is wrong, or says more than vdev, format and target.
    """
    spec = _read(value, "disk_backing")
    extra = (
        "devtype" if spec.cdrom
        else "access" if spec.access_said
        else "discard" if spec.discard is not None
        else "direct-io-safe" if spec.direct_io_safe
        else next((name for name in spec.said if name not in ("vdev", "format", "target")), "")
    )  # fmt: skip
    if extra:
        raise spec.bad(0, f"{extra} is not for a backing file", "give vdev=, format= and target= only")
    if not spec.vdev:
        raise spec.bad(len(value.text), "no vdev", "say whose backing file it is: vdev=xvda")
    vdev = canonical_vdev(spec.vdev, place_in(value, spec.vdev_at))
    if not spec.target:
        raise spec.bad(len(value.text), "no target", "give the file: target=/path")
    if not spec.format:
        raise spec.bad(0, "no format", "say format=raw or format=qcow2: it is never guessed from what is in the file")
    target = check_path(spec.target, "backing file", place_in(value, spec.target_at))
    _check_format(spec, spec.format)
    return vdev, Layer(target=target, format=spec.format)


def parse_disks(disks: tuple[Value, ...], backing: tuple[Value, ...] = ()) -> tuple[tuple[Disk, ...], tuple[Note, ...]]:
    """Return all disks with their backing chains, and all notes.

    Raises:
        ConfigError: as ``parse_disk`` and ``parse_layer``; two disks with one vdev; a chain that cannot be.
    """
    notes: list[Note] = []
    found: dict[str, Disk] = {}
    origin: dict[str, Value] = {}
    for value in disks:
        disk, more = parse_disk(value)
        notes += more
        if disk.vdev in found:
            here, there = value.place, origin[disk.vdev].place
            what = f"two disks are {disk.vdev}: one in line {there.line} and one in line {here.line}"
            raise error_at(here, what, fix="give each disk a vdev of its own")
        found[disk.vdev], origin[disk.vdev] = disk, value
    for value in backing:
        vdev, layer = parse_layer(value)
        if vdev not in found:
            raise error_at(value.place, f"disk_backing: there is no disk {vdev}", fix="use the vdev of one of disk=")
        found[vdev] = _with_layer(found[vdev], layer, value)
    return tuple(found.values()), tuple(notes)


def _with_layer(disk: Disk, layer: Layer, value: Value) -> Disk:
    """Return the disk with one more layer at the far end of its chain."""
    above = disk.chain[-1] if disk.chain else disk
    if above.format != "qcow2":
        what = f"disk_backing: {above.target or disk.vdev} is {above.format}, which is based on nothing"
        raise error_at(value.place, what, fix="only qcow2 images have a backing file")
    if layer.target in (disk.target, *(other.target for other in disk.chain)):
        raise error_at(
            value.place,
            f"disk_backing: {layer.target} is in the chain of {disk.vdev} already",
            fix="name each file once, nearest first (qemu-img info --backing-chain shows them)",
        )
    return disk.replace(chain=(*disk.chain, layer))


def _check_format(spec: _Spec, form: str) -> None:
    """Refuse formats other than raw and qcow2."""
    if form in ("raw", "qcow2"):
        return
    if form == "empty":
        raise spec.bad(spec.format_at, "format=empty, yet there is a target", "say format=raw or format=qcow2")
    target = spec.target or ""
    stem = target.rpartition(".")[0] if "." in target.rpartition("/")[2] else target
    line = f"qemu-img convert -f {_CONVERTERS[form]} -O qcow2 {_quoted(target)} {_quoted(stem + '.qcow2')}"
    raise spec.bad(
        spec.format_at,
        f"format {form} is refused: its parsers see no more attention, and guests write what they parse",
        f"convert the image once:\n{line}",
    )


def _quoted(path: str) -> str:
    """Return a path as a word of a shell."""
    plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._+-"
    return path if not path.strip(plain) and path else "'" + path.replace("'", "'\\''") + "'"


def _read(value: Value, key: str) -> _Spec:
    """Read a specification item by item, as libxlu_disk_l.l does."""
    spec = _Spec(value, key)
    text = value.text
    while True:
        while text[spec.at : spec.at + 1] in (" ", "\t", "\n"):
            spec.at += 1
        if spec.at >= len(text):
            return spec
        start = spec.at
        if text.startswith("target=", start):  # eats the rest of the string
            spec.at = len(text)
            spec.target, spec.target_at = text[start + 7 :].removesuffix(","), start + 7
            spec.say(start, "target", spec.target)
            return spec
        if _prefix(spec):
            continue
        end = text.find(",", start)
        end = end if end >= 0 else len(text)
        spec.at = end + 1
        item = text[start:end]
        name, equals, said = item.partition("=")
        if item in _FLAGS:
            _flag(spec, start, item)
        elif equals:
            _named(spec, start, name, said)
        else:
            _positional(spec, start, item)


def _prefix(spec: _Spec) -> bool:
    """Read a deprecated prefix, if there is one here: ``file:``, ``qcow2:``, ``tap:`` ..."""
    rest = spec.value.text[spec.at :]
    name, colon, after = rest.partition(":")
    if not colon or not name.isalnum() or not name[0].islower() or not name.isascii() or name != name.lower():
        return False
    if name in _FORMAT_PREFIXES:
        _set_format(spec, spec.at, name)
    elif name in _SCRIPT_PREFIXES:
        raise spec.bad(spec.at, f"{name}: would run the script block-{name} as root", _ATTACH_FIRST)
    elif name not in _IGNORED_PREFIXES:
        if after[:1].islower() or after[:1].isdecimal():
            return False  # vdev:cdrom
        raise spec.bad(spec.at, f"unknown prefix `{shown(name)}:'", "give the path alone, or target=PATH at the end")
    spec.had_prefix = True
    spec.at += len(name) + 1
    return True


_FLAGS = frozenset(("cdrom", "direct-io-safe", "discard", "no-discard", "trusted", "untrusted", "colo", "no-colo"))


def _flag(spec: _Spec, at: int, item: str) -> None:
    """Take a word that stands alone."""
    match item:
        case "cdrom":
            spec.cdrom = True
        case "direct-io-safe":
            spec.direct_io_safe = True
        case "discard" | "no-discard":
            spec.discard = item == "discard"
        case "colo":
            raise spec.bad(at, _NO_COLO, "leave it out")
        case "trusted" | "untrusted":
            spec.note(at, f"{item} is ignored: {_NO_GRANTS}")
        case _:
            pass  # no-colo: so it is


def _named(  # noqa: C901, PLR0912 (one case per parameter)
    spec: _Spec, at: int, name: str, said: str
) -> None:
    """Take ``name=said``."""
    match name:
        case "format":
            _set_format(spec, at + 7, said)
        case "vdev":
            _set_vdev(spec, at + 5, said)
        case "devtype":
            if said not in ("cdrom", "disk"):
                raise spec.bad(at, f"unknown devtype `{shown(said)}'", "it is disk or cdrom")
            spec.cdrom = said == "cdrom"
        case "access":
            _set_access(spec, at + 7, said)
        case "backendtype":
            if said not in ("phy", "tap", "qdisk"):
                fix = "leave backendtype out: the device model gets the opened image"
                raise spec.bad(at, f"backendtype `{shown(said)}' is not supported", fix)
            spec.say(at, name, said)
            spec.note(at, f"backendtype={said} is ignored: {_NO_BACKEND}")
        case "backend":
            if said and said not in _DOM0:
                fix = "leave backend out: a disk served by another domain needs Xen"
                raise spec.bad(at, f"backend `{shown(said)}' is not this host", fix)
            spec.say(at, name, said)
        case "script":
            if said:
                raise spec.bad(at, f"script `{shown(said)}' would be run as root", _ATTACH_FIRST)
        case "specification":
            if said not in ("xen", "virtio"):
                raise spec.bad(at, f"unknown specification `{shown(said)}'", "it is xen or virtio")
            spec.say(at, name, said)
            spec.note(at, f"specification={said} is ignored: the vdev decides which controller the guest sees")
        case "grant_usage":
            if parse_number(said) not in (0, 1):
                raise spec.bad(at, f"unknown grant_usage `{shown(said)}'", "it is 0 or 1")
            spec.note(at, f"grant_usage is ignored: {_NO_GRANTS}")
        case "colo-host" | "colo-port" | "colo-export" | "active-disk" | "hidden-disk":
            raise spec.bad(at, f"{name}: {_NO_COLO}", "leave it out")
        case _:
            fix = "known are vdev, format, access, devtype and, for the path, which goes last, target"
            raise spec.bad(at, f"unknown parameter `{shown(name)}'", fix)


def _positional(spec: _Spec, at: int, item: str) -> None:
    """Take an item without a name: target, format, vdev, access, in this order."""
    if spec.target is None:
        spec.target, spec.target_at = item, at
        spec.say(at, "target", item)
    elif not spec.had_prefix and not spec.format:
        vdev, colon, kind = item.rpartition(":")
        if not spec.target and colon:
            _set_vdev(spec, at, vdev)
            _set_devtype(spec, at, kind)
            _set_format(spec, at, "empty")
        else:
            _set_format(spec, at, item)
    elif not spec.vdev:
        vdev, colon, kind = item.rpartition(":")
        if colon:
            _set_devtype(spec, at, kind)
        _set_vdev(spec, at, vdev if colon else item)
    elif not spec.access_said:
        _set_access(spec, at, item)
    else:
        fix = "the order is target, format, vdev, access; a path with a comma goes last, as target=PATH"
        raise spec.bad(at, f"too many positional parameters, from `{shown(item)}' on", fix)


def _set_devtype(spec: _Spec, at: int, kind: str) -> None:
    """Take what follows the colon of ``hdc:cdrom``."""
    if kind not in ("cdrom", "disk"):
        raise spec.bad(
            at, f"unknown type `{shown(kind)}' after the colon", "write devtype=cdrom, or nothing for a disk"
        )
    spec.cdrom = kind == "cdrom"


def _set_vdev(spec: _Spec, at: int, said: str) -> None:
    """Take the vdev."""
    spec.say(at, "vdev", said)
    spec.vdev, spec.vdev_at = said, at


def _set_format(spec: _Spec, at: int, said: str) -> None:
    """Take the format; nothing means raw."""
    if said not in _FORMATS:
        fix = "it is raw or qcow2 (qemu-img convert -O qcow2 OLD NEW makes one of others)"
        if spec.target and not spec.had_prefix:
            fix += "; without names the order is target, format, vdev, access"
        raise spec.bad(at, f"unknown format `{shown(said)}'", fix)
    spec.say(at, "format", _FORMATS[said])
    spec.format, spec.format_at = _FORMATS[said], at


def _set_access(spec: _Spec, at: int, said: str) -> None:
    """Take the access; nothing means read and write."""
    if said not in _ACCESS:
        raise spec.bad(at, f"unknown access `{shown(said)}'", "it is ro or rw")
    spec.access_said = True
    spec.readonly = _ACCESS[said]
