# SPDX-License-Identifier: Apache-2.0
"""Which files a guest's disks are made of, and whether each is fit. Pure.

A chain is what the configuration says it is. The header of an image is read for one purpose: to refuse an image that
names more than the configuration does. It is never followed: a QEMU that was taken over can write it.
"""

from __future__ import annotations

from depriv.errors import ConfigError
from depriv.host import unfit
from depriv.qemu.cmdline import IDE_PORTS
from depriv.records import Record
from depriv.steps import OpenFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from depriv.config import Disk, Domain
    from depriv.host import FileFacts, Holding, Host

_MIB = 1 << 20
FILES_MAX = 90  # descriptors 10 to 99: see check.py


class ImageFile(Record):
    """One file of a chain, found fit."""

    role: str
    facts: FileFacts
    format: str
    writable: bool

    @property
    def driver(self) -> str:
        """QEMU's protocol driver for what the file is."""
        return "host_device" if self.facts.kind == "block" else "file"

    @property
    def hold(self) -> tuple[int, int, int, bool]:
        """What the registry remembers of it: st_dev, st_ino, st_rdev, writable."""
        if self.facts.kind == "block":
            return (0, 0, self.facts.rdev, self.writable)
        return (self.facts.dev, self.facts.ino, 0, self.writable)

    @property
    def size_max(self) -> int:
        """Bytes that the file can come to have: what it has, plus every cluster written once, plus their tables.

        Source: docs/interop/qcow2.txt, QEMU 7.2: 8 bytes of L2 entry and up to 8 of refcount per cluster.
        """
        if self.facts.kind == "block":
            return 0  # RLIMIT_FSIZE does not count writes to devices
        if self.format != "qcow2":
            return self.facts.size
        clusters = self.facts.virtual_size // max(self.facts.cluster_size, 512) + 1
        return self.facts.size + self.facts.virtual_size + clusters * 16 + 16 * max(self.facts.cluster_size, _MIB)

    def step(self, number: int) -> OpenFile:
        """Return how the jail opens it."""
        return OpenFile(
            role=self.role,
            path=self.facts.path,
            access="rw" if self.writable else "ro",
            kind=self.facts.kind,
            number=number,
            dev=self.facts.dev if self.facts.kind == "file" else 0,
            ino=self.facts.ino if self.facts.kind == "file" else 0,
            rdev=self.facts.rdev if self.facts.kind == "block" else 0,
        )


if TYPE_CHECKING:
    Chain: TypeAlias = tuple[ImageFile, ...]


def chains(config: Domain, host: Host, warnings: list[str]) -> tuple[Chain, ...]:
    """Return one chain per disk, nearest layer first; an empty drive has an empty one.

    Raises:
        ConfigError: an image is missing, of the wrong kind or format, names files the configuration does not, or is
            in use.
    """
    result: list[Chain] = []
    for disk in config.disks:
        _check_vdev(config, disk)
        result.append(_chain(config, host, disk, warnings) if disk.target else ())
    placed = [(file, config.place(file.role.partition("-")[0])) for chain in result for file in chain]
    refuse_in_use(placed, host.holdings, readonly="access=ro")
    files = sum(len(chain) for chain in result)
    if files > FILES_MAX:
        raise ConfigError(
            f"the disks and what they are based on come to {files} files",
            cause=f"a guest may have {FILES_MAX}",
            fix="use fewer disks, or shorten the chains: qemu-img convert",
            source=config.source,
        )
    return tuple(result)


def private_file(config: Domain, host: Host, name: str, path: str) -> FileFacts:
    """Return the facts of a kernel, ramdisk or firmware file, or raise ``ConfigError``."""
    facts = host.file(path)
    if facts.kind != "file":
        raise _unfit(f"{name} {path}", facts, want="a regular file", place=config.place(name))
    if facts.size == 0:
        raise ConfigError(f"{name} {path} is empty", fix=f"name the real file in {name}=", **config.place(name))
    return facts


def _check_vdev(config: Domain, disk: Disk) -> None:
    """Refuse what the machine has no place for."""
    letter = ord(disk.vdev[2:3] or "?") - ord("a")
    plain = disk.vdev[:2] in ("hd", "sd") and len(disk.vdev) == len("hda")
    ports = IDE_PORTS.get(config.machine, 0)
    if disk.vdev.startswith("hd") and plain and letter >= ports:
        raise ConfigError(
            f"vdev {disk.vdev}: a {config.machine} machine has {ports} IDE ports",
            fix="use xvda, xvdb, ... (virtio-blk) or sda, sdb, ... (SCSI)",
            **config.place(disk.vdev),
        )
    if disk.vdev.startswith("hd") and plain and disk.readonly and not disk.cdrom:
        raise ConfigError(
            f"vdev {disk.vdev} is read-only, and IDE disks cannot be",
            cause="QEMU's IDE disk has no read-only mode, and pretending was a security hole once (XSA-142)",
            fix="use an xvd or sd vdev, or devtype=cdrom",
            **config.place(disk.vdev),
        )
    if disk.vdev.startswith("xvd") and disk.cdrom:
        raise ConfigError(
            f"vdev {disk.vdev} is a CD-ROM, and virtio-blk has none",
            fix="use an hd vdev (IDE), or sd (SCSI)",
            **config.place(disk.vdev),
        )
    if not (plain or (disk.vdev.startswith("xvd") and len(disk.vdev) > len("xvd"))):
        raise ConfigError(
            f"unknown vdev {disk.vdev!r}", fix="use xvda, hda or sda, and so on", **config.place(disk.vdev)
        )


def _chain(config: Domain, host: Host, disk: Disk, warnings: list[str]) -> Chain:
    writable = not (disk.readonly or disk.cdrom)
    layers = [(disk.target, disk.format, writable), *((layer.target, layer.format, False) for layer in disk.chain)]
    files: list[ImageFile] = []
    for depth, (path, form, may_write) in enumerate(layers):
        facts = host.file(path)
        role = disk.vdev if depth == 0 else f"{disk.vdev}-{depth}"
        _check_kind(config, disk, role, facts)
        if facts.unread:
            if host.root:
                raise _unfit(facts.path, facts.replace(kind="unreadable"), want="", place=config.place(disk.vdev))
            warnings.append(f"{path} cannot be read by this user: whether it fits is seen when root starts it")
        else:
            _check_format(config, disk, facts, form, last=depth == len(layers) - 1)
        if form == "raw" and facts.magic and not disk.cdrom:
            warnings.append(f"{path} looks like {facts.magic} and is used as raw, as the configuration says")
        files.append(ImageFile(role=role, facts=facts, format=form, writable=may_write))
    return tuple(files)


def _unfit(what: str, facts: FileFacts, *, want: str, place: dict[str, Any]) -> ConfigError:
    """Return the error for a file of the wrong kind, with what to do for each."""
    cause, fix = unfit(facts, want)
    return ConfigError(f"cannot use {what}", cause=cause, fix=fix, **place)


def _check_kind(config: Domain, disk: Disk, role: str, facts: FileFacts) -> None:
    if facts.kind not in ("file", "block"):
        raise _unfit(
            f"{facts.path} for {role}", facts, want="a regular file or a block device", place=config.place(disk.vdev)
        )
    if facts.size == 0 and not (facts.unread and facts.kind == "block"):
        raise ConfigError(
            f"cannot use {facts.path} for {role}: it is empty (0 bytes)",
            fix=f"give it a size: truncate -s 10G {facts.path}, or qemu-img create -f qcow2 {facts.path} 10G",
            **config.place(disk.vdev),
        )


def _check_format(config: Domain, disk: Disk, facts: FileFacts, form: str, *, last: bool) -> None:
    """Hold a qcow2 header against the configuration."""
    if form != "qcow2":
        if not last:
            raise ConfigError(
                f"{facts.path} is raw and cannot have anything below it",
                fix=f"end the chain of {disk.vdev} in disk_backing with it",
                **config.place(disk.vdev),
            )
        return
    if facts.magic != "qcow2":
        raise ConfigError(
            f"{facts.path} is no qcow2 image, as the configuration says",
            cause=f"its first bytes say {facts.magic or 'nothing we know; probably raw'}",
            fix="correct format=; see qemu-img info",
            **config.place(disk.vdev),
        )
    if facts.data_file:
        raise ConfigError(
            f"{facts.path} keeps its data in another file that its header names",
            cause="headers are not followed: a device model that was taken over can write them",
            fix=f"qemu-img convert -O qcow2 {facts.path} {facts.path}.new, and use that",
            **config.place(disk.vdev),
        )
    if facts.encrypted:
        raise ConfigError(
            f"{facts.path} is encrypted, and this version hands no keys to QEMU",
            fix=f"qemu-img convert it, or put the encryption below: cryptsetup on the device that holds {facts.path}",
            **config.place(disk.vdev),
        )
    if facts.backing and last:
        raise ConfigError(
            f"{facts.path} is based on another image, and the configuration does not say so",
            cause=f"its header names {facts.backing!r}; headers are not followed: a device model that was taken over "
            "can write them",
            fix="if that is the right file, add to the configuration (format= as it really is):\n"
            + _backing_line(disk, facts),
            **config.place(disk.vdev),
        )
    if not facts.backing and not last:
        raise ConfigError(
            f"{facts.path} stands alone, but the configuration puts it on another image",
            fix=f"remove the line of {disk.vdev} from disk_backing",
            **config.place(disk.vdev),
        )


def _backing_line(disk: Disk, facts: FileFacts) -> str:
    """Return the exact line to add, the whole chain so far included."""
    name = facts.backing
    if not name.startswith("/"):
        name = f"{facts.path.rpartition('/')[0]}/{name}"
    form = "qcow2" if name.endswith("qcow2") else "raw"
    known = [f"vdev={disk.vdev},format={layer.format},target={layer.target}" for layer in disk.chain]
    items = [*known, f"vdev={disk.vdev},format={form},target={name}"]
    return "disk_backing = [" + ", ".join(repr(item) for item in items) + "]"


def refuse_in_use(
    files: list[tuple[ImageFile, dict[str, Any]]], holdings: tuple[Holding, ...], *, readonly: str
) -> None:
    """Refuse an image that two write, or one writes while another reads: here, or in another domain.

    Args:
        files: All images of the domain, each with its place for messages.
        holdings: What the other domains hold.
        readonly: What the user writes to have an image read-only.

    Raises:
        ConfigError: which, and who has it.
    """
    seen: dict[tuple[int, int, int], tuple[str, bool]] = {}
    for other in holdings:
        for dev, ino, rdev, writable in other.images:
            key = (dev, ino, rdev)
            before = seen.get(key)
            who = (
                f"domain {other.name}"
                if not other.name_free
                else f"the quarantined domain {other.domid} ({other.name})"
            )
            seen[key] = (who, writable or bool(before and before[1]))
    for file, place in files:
        dev, ino, rdev, writable = file.hold
        key = (dev, ino, rdev)
        if key in seen and (writable or seen[key][1]):
            who, writes = seen[key]
            raise ConfigError(
                f"{file.facts.path} for {file.role} is in use by {who}",
                cause=f"{who} {'writes' if writes else 'reads'} it, and this one would "
                f"{'write' if writable else 'read'} it",
                fix=f"give each its own image, or make it read-only ({readonly}) in both",
                **place,
            )
        before = seen.get(key)
        seen[key] = (f"disk {file.role} of this domain", writable or bool(before and before[1]))
