# SPDX-License-Identifier: Apache-2.0
"""What a disk's file name says as nodes: ``json:{...}``, ``nbd://...``, ``file:...``, or a file. Pure.

Sources: block.c (path_has_protocol, parse_json_filename, bdrv_fill_options), block/nbd.c (nbd_parse_filename),
block/blkdebug.c, docs/system/device-url-syntax.rst.inc, QEMU 7.2.
"""

from __future__ import annotations

from depriv.qemu.words import error, parse_json
from depriv.records import cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from depriv.qemu.words import Word

    Node: TypeAlias = dict[str, Any]

NBD_PORT = "10809"
_BY_NBD = (
    "put qemu-nbd in front of it: qemu-nbd --fork --persistent --socket=/run/disk.sock --format=raw 'WHAT IT IS NOW', "
    "and write file=nbd+unix:///?socket=/run/disk.sock,format=raw"
)
_CURL = (
    "QEMU has no network to fetch it by",
    "nbdkit --unix=/run/disk.sock curl URL, and " + _BY_NBD.rpartition("and ")[2],
)
_BLKIO = (
    "it opens a device of the host by itself",
    "name the block device that the host has for it: driver=host_device",
)
# Drivers that reach for the host by themselves -> why not, and what instead.
REFUSED = {
    "vvfat": (
        "QEMU would read a folder of the host whenever the guest does",
        (
            "make an image of it: truncate -s 64M x.img && mformat -i x.img -F :: && mcopy -s -i x.img DIR/* ::, "
            "and write file=x.img,format=raw"
        ),
    ),
    "ssh": ("QEMU has no network to fetch it by", "nbdkit --unix=/run/disk.sock ssh HOST:PATH, or " + _BY_NBD),
    "http": _CURL,
    "https": _CURL,
    "ftp": _CURL,
    "ftps": _CURL,
    "rbd": (
        "QEMU has no network to reach Ceph by",
        "rbd map POOL/IMAGE and write file=/dev/rbd0,format=raw, or " + _BY_NBD,
    ),
    "gluster": ("QEMU has no network to reach Gluster by", "mount the volume and name the file, or " + _BY_NBD),
    "nfs": ("QEMU has no network to reach NFS by", "mount the export and name the file, or " + _BY_NBD),
    "iscsi": (
        "QEMU has no network to reach the target by",
        "iscsiadm --mode node --targetname IQN --login, and name the block device that appears, or " + _BY_NBD,
    ),
    "nvme": (
        "QEMU would drive the PCI device itself, by VFIO",
        "leave the device to the host's nvme driver and write file=/dev/nvme0n1,format=raw",
    ),
    "nvme-io_uring": _BLKIO,
    "io_uring": _BLKIO,
    "virtio-blk-vfio-pci": _BLKIO,
    "virtio-blk-vhost-user": _BLKIO,
    "virtio-blk-vhost-vdpa": _BLKIO,
    "host_cdrom": (
        "QEMU would work the host's drive: its tray, its lock",
        "read the medium alone: driver=host_device,read-only=on",
    ),
}
_SAME = {"fat": "vvfat", "iser": "iscsi", "nfs+tcp": "nfs", "gluster+tcp": "gluster", "gluster+unix": "gluster"}


def protocol(name: str) -> str:
    """Return what stands before the colon that makes a name one of a protocol; "": it is a file."""
    head, colon, _ = name.partition(":")
    return head if colon and "/" not in head else ""


def parse_name(word: Word, name: str) -> Node:
    """Return the node that ``file=NAME`` stands for; of ``json:`` the whole tree that it says.

    Raises:
        ConfigError: it is of a protocol that opens something by itself, or makes no sense.
    """
    kind = protocol(name)
    rest = name[len(kind) + 1 :]
    if not kind:
        return {"driver": "file", "filename": name}
    if kind == "json":
        return undot(word, parse_json(word.replace(value=rest)))
    if kind in ("file", "host_device"):
        return {"driver": "file", "filename": rest}
    if kind in ("null-co", "null-aio"):
        return {"driver": kind}
    if kind in ("nbd", "nbd+tcp", "nbd+unix"):
        return _nbd(word, name)
    if kind == "blkdebug":
        config, _, image = rest.partition(":")
        return {"driver": kind, **({"config": config} if config else {}), "image": parse_name(word, image)}
    refuse(word, _SAME.get(kind, kind))
    raise error(word, f"{kind}: is no protocol that depriv knows", fix=f"if it is a file's name, write file=./{name}")


def refuse(word: Word, driver: str) -> None:
    """Refuse a driver that reaches for the host by itself.

    Raises:
        ConfigError: it is such a one.
    """
    if driver in REFUSED:
        why, instead = REFUSED[driver]
        raise error(word, f"the block driver {driver} is refused", cause=why, fix=instead)


def _nbd(word: Word, name: str) -> Node:
    """Return the node of ``nbd:unix:PATH:exportname=X``, ``nbd:HOST:PORT``, ``nbd://`` and ``nbd+unix://``."""
    if "://" in name:
        return _nbd_uri(word, name)
    rest, _, export = name.removeprefix("nbd:").partition(":exportname=")
    if rest.startswith("unix:"):
        server = {"type": "unix", "path": rest.removeprefix("unix:")}
    else:
        host, colon, port = rest.rpartition(":")
        if not colon:
            raise error(word, f"{name!r} names no port", fix="write nbd://HOST:PORT/EXPORT")
        server = {"type": "inet", "host": host.removeprefix("[").removesuffix("]"), "port": port}
    return {"driver": "nbd", "server": server, **({"export": export} if export else {})}


def _nbd_uri(word: Word, name: str) -> Node:
    """Source: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md, as block/nbd.c reads it."""
    from urllib.parse import parse_qsl, unquote, urlsplit  # noqa: PLC0415 (only such disks pay for it)

    try:
        parts = urlsplit(name)
        host, port = parts.hostname or "", str(parts.port or NBD_PORT)
    except ValueError as failed:
        raise error(word, f"{name!r} is no URI", cause=str(failed), fix="write nbd://HOST:PORT/EXPORT") from failed
    export = unquote(parts.path.removeprefix("/"))
    server = {"type": "inet", "host": host or "localhost", "port": port}
    if parts.scheme == "nbd+unix":
        path = dict(parse_qsl(parts.query)).get("socket", "")
        server = {"type": "unix", "path": path}
        if not path:
            raise error(word, f"{name!r} names no socket", fix="write nbd+unix:///EXPORT?socket=/PATH")
    return {"driver": "nbd", "server": server, **({"export": export} if export else {})}


def undot(word: Word, data: Node) -> Node:
    """Return a tree without dots in its keys: ``{"file.driver": x}`` is ``{"file": {"driver": x}}``.

    Raises:
        ConfigError: a key is a value and an object at once.
    """
    result: Node = {}
    for key, value in data.items():
        inner = result
        *path, last = key.split(".")
        for name in path:
            found: object = inner.setdefault(name, {})
            if not isinstance(found, dict):
                raise error(word, f"{key}: {name} is a value already", fix="write either the value or its parts")
            inner = cast("Node", found)
        whole = undot(word, cast("Node", value)) if isinstance(value, dict) else value
        inner[last] = merge(inner[last], whole) if _both_objects(inner.get(last), whole) else whole
    return result


def merge(below: Node, above: Node) -> Node:
    """Return both trees in one; where both say something, ``above`` counts."""
    result = dict(below)
    for key, value in above.items():
        result[key] = merge(result[key], value) if _both_objects(result.get(key), value) else value
    return result


def _both_objects(one: object, other: object) -> bool:
    return isinstance(one, dict) and isinstance(other, dict)


def lists(tree: Any) -> Any:  # noqa: ANN401 (JSON)
    """Return the tree with ``{"0": x, "1": y}`` as the list that its dotted form means."""
    if isinstance(tree, list):
        members = cast("list[object]", tree)
        return [lists(item) for item in members]
    if not isinstance(tree, dict):
        return tree
    made = {key: lists(value) for key, value in cast("Node", tree).items()}
    if made and all(key.isdecimal() for key in made):
        return [made[key] for key in sorted(made, key=int)]
    return made


def as_number(value: object) -> int | None:
    """Return a size as a number, from a number or from text such as "64M"; None: it is none.

    Source: util/cutils.c, qemu_strtosz, QEMU 7.2, but for fractions.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value if isinstance(value, str) else ""
    power = "BKMGTPE".find(text[-1:].upper()) if text else -1
    digits = text[:-1] if power >= 0 else text
    return int(digits) << 10 * max(power, 0) if digits.isascii() and digits.isdecimal() else None
