# SPDX-License-Identifier: Apache-2.0
"""What disk and network specifications have in common: items, numbers, paths, and names of virtual disks. Pure."""

from __future__ import annotations

from depriv.xlcfg import Place, error_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_PATH = 4095  # PATH_MAX of <linux/limits.h> without its NUL

_DIGITS = "0123456789abcdef"
_LONG_MAX = (1 << 63) - 1
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

# How many disks a name may count to. Sources: xen-vbd-interface(7) and libxl__device_disk_dev_number() in Xen's
# tools/libs/light/libxl_device.c.
_DISKS = {"xvd": 1 << 20, "hd": 4, "sd": 16}


def parse_number(text: str) -> int | None:
    """Return what strtol(3) with base 0 makes of the whole text: 10, 0x1f, 017, " -5"; None if it is no number."""
    digits = text.lstrip(" \t\n\v\f\r")
    negative = digits.startswith("-")
    digits = digits[1:].lower() if digits[:1] in ("+", "-") else digits.lower()
    base = 10
    if digits.startswith("0x"):
        base, digits = 16, digits[2:]
    elif digits.startswith("0"):
        base = 8
    if not digits or digits.strip(_DIGITS[:base]):
        return None
    number = int(digits, base) if len(digits) < 64 else _LONG_MAX + 1
    return None if number > _LONG_MAX else -number if negative else number


def split_items(text: str) -> Iterator[tuple[int, str]]:
    """Yield offset and text of the items between commas, without leading blanks; empty ones too."""
    at = 0
    while at <= len(text):
        end = text.find(",", at)
        end = end if end >= 0 else len(text)
        start = at + len(text[at:end]) - len(text[at:end].lstrip(" \t\n"))
        yield start, text[start:end]
        at = end + 1


def check_path(path: str, what: str, place: Place) -> str:
    """Return an absolute path.

    Raises:
        ConfigError: it is relative, too long, or has a control character.
    """
    if not path.startswith("/"):
        raise error_at(
            place,
            f"{what} `{shown(path)}' is not an absolute path",
            fix="write the whole path, from / on: what a relative one means would depend on where depriv is started",
        )
    if not path.isprintable():
        raise error_at(place, f"{what} `{shown(path)}' has a control character", fix="rename the file")
    if len(path.encode()) > MAX_PATH:
        raise error_at(place, f"{what} is longer than {MAX_PATH} bytes", fix="use a shorter path")
    return path


def shown(text: str) -> str:
    """Return text for a message: one line, no control characters, not endless."""
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= 80 else plain[:77] + "..."


def canonical_vdev(name: str, place: Place | None = None) -> str:
    """Return the one spelling of a virtual disk: "xvda", "hdc", "sdb" for "d0p0", "5632" and "0x810" as well.

    Source: xen-vbd-interface(7). Partitions are refused: an emulated controller can only show whole disks.

    Raises:
        ConfigError: there is no such virtual disk, or it is a partition.
    """
    place = place or Place()
    kind, disk, partition = _split_vdev(name)
    if kind in _DISKS and disk >= _DISKS[kind]:
        last = kind + _letters(_DISKS[kind] - 1)
        fix = f"use {kind}a to {last}, or xvd names, of which there are {_DISKS['xvd']}"
        raise error_at(place, f"vdev `{shown(name)}' is beyond the last {kind} disk", fix=fix)
    if kind not in _DISKS:
        fix = "use xvda, xvdb, ..., hda to hdd, sda to sdp, d0, d1, ... or the number of xen-vbd-interface(7)"
        if name.startswith("vd"):
            fix = f"vd names are the guest's own: write xvd{shown(name[2:])}"
        elif name.startswith("/dev/"):
            fix = f"write {shown(name[5:])}"
        raise error_at(place, f"vdev `{shown(name)}' is no virtual disk", fix=fix)
    whole = kind + _letters(disk)
    if partition:
        raise error_at(
            place,
            f"vdev `{shown(name)}' is partition {partition} of {whole}, and a device model shows whole disks only",
            fix=f"give a whole disk image as {whole} (single partitions are a feature of Xen's PV guests)",
        )
    return whole


def _split_vdev(name: str) -> tuple[str, int, int]:
    """Return prefix, disk number and partition; an empty prefix if the name is none."""
    number = parse_number(name) if name[:1].isdecimal() else None
    if number is not None:
        return _split_number(number)
    if name[:1] == "d" and name[1:2].isdecimal() and name.isascii():
        disk, has_partition, partition = name[1:].partition("p")
        if disk.isdecimal() and (partition.isdecimal() or not has_partition) and len(name) < 20:
            return "xvd", int(disk), int(partition or "0")
        return "", 0, 0
    for kind in _DISKS:
        if name.startswith(kind):
            rest = name[len(kind) :]
            letters = rest.rstrip(_DIGITS[:10])
            partition = rest[len(letters) :]
            if not letters or letters.strip(_LETTERS) or len(rest) > 12 or partition.startswith("0"):
                return "", 0, 0
            disk_number = 0
            for letter in letters:
                disk_number = disk_number * 26 + _LETTERS.index(letter) + 1
            return kind, disk_number - 1, int(partition or "0")
    return "", 0, 0


def _split_number(number: int) -> tuple[str, int, int]:
    """Return what the number of a virtual disk stands for. Source: xen-vbd-interface(7), "Concrete encoding"."""
    if 1 << 28 <= number < 2 << 28:
        return "xvd", (number >> 8) & 0xFFFFF, number & 0xFF
    match number >> 8:
        case 202:
            return "xvd", (number >> 4) & 0xF, number & 0xF
        case 8:
            return "sd", (number >> 4) & 0xF, number & 0xF
        case 3 if number & 0xFF < 2 << 6:
            return "hd", (number >> 6) & 1, number & 0x3F
        case 22 if number & 0xFF < 2 << 6:
            return "hd", 2 + ((number >> 6) & 1), number & 0x3F
        case _:
            return "", 0, 0


def _letters(disk: int) -> str:
    """Return 0 as "a", 25 as "z", 26 as "aa"."""
    letters = ""
    disk += 1
    while disk:
        disk, digit = divmod(disk - 1, 26)
        letters = _LETTERS[digit] + letters
    return letters
