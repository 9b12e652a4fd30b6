# SPDX-License-Identifier: Apache-2.0
"""Archives in cpio's "newc" format, which the kernel unpacks as its initramfs. Deterministic, and no cpio(1) needed.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst; cpio(5) on "New ASCII Format".
"""

from __future__ import annotations

import gzip
import stat
from typing import TYPE_CHECKING

from depriv.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterable

TRAILER = "TRAILER!!!"


class Entry(Record):
    """One file of an archive, owned by root and made at the epoch."""

    name: str  # relative, without "." or ".."
    mode: int  # type and permissions as in st_mode
    data: bytes = b""  # content, or the target of a symbolic link
    device: tuple[int, int] = (0, 0)  # major, minor

    def validate(self) -> None:
        """Refuse names that leave the archive or that end it, and data where there can be none."""
        parts = self.name.split("/")
        if self.name == TRAILER or not self.name.isprintable() or {"", ".", ".."} & set(parts):
            raise ValueError(f"not a name for an archive: {self.name!r}")
        if self.data and not (stat.S_ISREG(self.mode) or stat.S_ISLNK(self.mode)):
            raise ValueError(f"{self.name} is neither a file nor a link and has data")


def directory(name: str, mode: int = 0o755) -> Entry:
    """Return an empty directory."""
    return Entry(name=name, mode=stat.S_IFDIR | mode)


def file(name: str, data: bytes, mode: int = 0o644) -> Entry:
    """Return a regular file."""
    return Entry(name=name, mode=stat.S_IFREG | mode, data=data)


def link(name: str, target: str) -> Entry:
    """Return a symbolic link."""
    return Entry(name=name, mode=stat.S_IFLNK | 0o777, data=target.encode())


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """Return a character device; the kernel makes it, so whoever writes the archive need not be root."""
    return Entry(name=name, mode=stat.S_IFCHR | mode, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive of ``entries``, in their order: the kernel wants a directory before what is in it.

    Raises:
        ValueError: a name appears twice, or its directory comes later or not at all.
    """
    made: set[str] = set()
    result = bytearray()
    for number, entry in enumerate(entries, 1):
        parent = entry.name.rpartition("/")[0]
        if entry.name in made or (parent and parent not in made):
            raise ValueError(f"{entry.name}: twice in the archive, or before its directory")
        made.add(entry.name)
        result += _member(entry.name, inode=number, mode=entry.mode, data=entry.data, device=entry.device)
    return bytes(result + _member(TRAILER, inode=0, mode=0, data=b"", device=(0, 0)))


def compressed(data: bytes) -> bytes:
    """Return ``data`` as gzip packs it, the same for the same input: no time, no name. Level 1: speed counts here."""
    return gzip.compress(data, compresslevel=1, mtime=0)


def _member(name: str, *, inode: int, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    """Return header, name and data, the latter two padded so that what follows starts at a multiple of four."""
    links = 2 if stat.S_ISDIR(mode) else 1
    path = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + path
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    """Return ``data`` with zeros up to a multiple of four bytes."""
    return data + bytes(-len(data) % 4)
