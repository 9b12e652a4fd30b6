# SPDX-License-Identifier: Apache-2.0
"""The smallest CD that Linux mounts: ISO 9660 with files in one directory. No genisoimage(1) needed.

Source: ECMA-119 (ISO 9660), sections 8.4 primary volume descriptor, 9.1 directory record, 9.4 path table.
"""

from __future__ import annotations

SECTOR_BYTES = 2048
ROOT_SECTOR = 20
FIRST_FILE_SECTOR = 21


def iso(files: dict[str, bytes], *, label: str = "DEPRIV") -> bytes:
    """Return the image of a CD with ``files`` (upper-case 8.3 names) in its root directory.

    Raises:
        ValueError: a name is not of the form that Linux shows unchanged in lower case, or the directory is too long.
    """
    records = _record(b"\0", ROOT_SECTOR, SECTOR_BYTES, directory=True)
    records += _record(b"\1", ROOT_SECTOR, SECTOR_BYTES, directory=True)
    content = b""
    for name, data in sorted(files.items()):
        stem, _dot, suffix = name.partition(".")
        if not (stem + suffix).isalnum() or name != name.upper() or len(stem) > 8 or len(suffix) > 3:
            raise ValueError(f"not a plain ISO 9660 name: {name!r}")
        records += _record(f"{name};1".encode(), FIRST_FILE_SECTOR + len(content) // SECTOR_BYTES, len(data))
        content += _sectors(data)
    if len(records) > SECTOR_BYTES:
        raise ValueError("too many files for one sector of directory")
    total = FIRST_FILE_SECTOR + len(content) // SECTOR_BYTES
    tables = _sectors(_path_table("little")) + _sectors(_path_table("big"))
    terminator = _sectors(b"\xffCD001\x01")
    return bytes(16 * SECTOR_BYTES) + _volume(label, total) + terminator + tables + _sectors(records) + content


def _sectors(data: bytes) -> bytes:
    """Return ``data`` with zeros up to a multiple of a sector."""
    return data + bytes(-len(data) % SECTOR_BYTES)


def _both(value: int, size: int) -> bytes:
    """Return a number in both byte orders, as ISO 9660 wants it."""
    return value.to_bytes(size, "little") + value.to_bytes(size, "big")


def _record(name: bytes, sector: int, size: int, *, directory: bool = False) -> bytes:
    """Return a directory record; its length is even. The date is 1970-01-01."""
    body = _both(sector, 4) + _both(size, 4) + bytes((70, 1, 1, 0, 0, 0, 0)) + bytes((2 if directory else 0, 0, 0))
    body += _both(1, 2) + bytes((len(name),)) + name
    body += bytes(len(body) % 2)
    return bytes((len(body) + 2, 0)) + body


def _path_table(order: str) -> bytes:
    """Return the path table with the root alone, in one byte order."""
    sector, parent = (n.to_bytes(w, "little" if order == "little" else "big") for n, w in ((ROOT_SECTOR, 4), (1, 2)))
    return bytes((1, 0)) + sector + parent + bytes(2)


def _volume(label: str, total: int) -> bytes:
    """Return the primary volume descriptor: path tables in sectors 18 and 19, the root directory in 20."""
    result = b"\x01CD001\x01\0" + b" " * 32 + label.upper().encode().ljust(32) + bytes(8) + _both(total, 4) + bytes(32)
    result += _both(1, 2) + _both(1, 2) + _both(SECTOR_BYTES, 2) + _both(10, 4)
    result += (18).to_bytes(4, "little") + bytes(4) + (19).to_bytes(4, "big") + bytes(4)
    result += _record(b"\0", ROOT_SECTOR, SECTOR_BYTES, directory=True)
    result += b" " * (128 * 4 + 37 * 3) + (b"0" * 16 + b"\0") * 4 + b"\x01\0"
    return _sectors(result)
