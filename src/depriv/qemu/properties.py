# SPDX-License-Identifier: Apache-2.0
"""Properties of devices, objects and machines: read in either of QEMU's two forms, searched for paths. Pure."""

from __future__ import annotations

import json

from depriv.qemu.words import Item, error, join_list, parse_json, parse_list, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from depriv.qemu.draft import Draft
    from depriv.qemu.words import Word

FREE = ("id", "bus", "serial", "vendor", "product", "model", "name", "mount_tag", "tag", "append", "dt-compatible")
_OBJECT_PATHS = ("/machine", "/objects/", "/chardevs/", "/backend/")  # of QEMU's own tree of objects
_FDSET = "/dev/fdset/"


class Properties:
    """The properties of one word, in the order given; of a key given twice the last counts."""

    def __init__(self, word: Word, implied: str) -> None:
        """Read ``key=value,...`` or, as QEMU does, JSON where the value starts with a brace.

        ``implied`` is the key of a first item that is a value alone.
        """
        self.json = word.value.startswith("{")
        items = () if self.json else parse_list(word, implied=implied)
        self.data: dict[str, Any] = parse_json(word) if self.json else dict(values(items))
        self.help = any(item.bare and (item.key in ("help", "?") or item.value in ("help", "?")) for item in items)

    def text(self, key: str) -> str:
        """Return a property as text; "" if it is not there."""
        value: object = self.data.get(key, "")
        return str(value).lower() if isinstance(value, bool) else str(value)

    def value(self) -> str:
        """Return the properties as QEMU reads them back, in the form they came in."""
        if self.json:
            return json.dumps(self.data, separators=(",", ":"))
        return join_list([Item(key=key, value=value) for key, value in self.data.items()])


def is_own_set(path: str) -> bool:
    """Tell whether a path is one of the caller's own sets of descriptors."""
    return path.startswith(_FDSET) and path.removeprefix(_FDSET).isdecimal()


def names_path(value: object) -> bool:
    """Tell whether a property's value names a file of the host."""
    return (
        isinstance(value, str)
        and value.startswith("/")
        and not value.startswith(_OBJECT_PATHS)
        and not value.startswith("/private/")
        and not is_own_set(value)
    )


def refuse_paths(draft: Draft, word: Word, data: dict[str, Any]) -> None:
    """Refuse a property, at any depth, whose value is a path that nobody has dealt with.

    Raises:
        ConfigError: which property.
    """
    for key, value in data.items():
        if isinstance(value, dict):
            refuse_paths(draft, word, value)  # pyright: ignore[reportUnknownArgumentType] (JSON)
        elif isinstance(value, list):
            refuse_paths(draft, word, {f"{key}.{place}": item for place, item in enumerate(value)})  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType] (JSON)
        elif key not in FREE and names_path(value):
            draft.refuse(word, f"{key}={value} names a path that depriv does not know", fix=f"leave {key} out")


def rom(draft: Draft, word: Word, name: str, *, role: str) -> str:
    """Return how QEMU finds a firmware or ROM file: as it is looked up, a file of that name comes before QEMU's own.

    Source: qemu_find_file, softmmu/datadir.c, QEMU 7.2. A name alone that is no file is one in QEMU's data folders:
    the dry run tells which.
    """
    if "/" not in name and name.isprintable() and draft.look(draft.path(word, name)).kind == "missing":
        return name
    return draft.private(word, name, role=role)


def size_mib(word: Word, text: str, *, unit: str = "M") -> int:
    """Return a size in MiB, rounded up. ``unit`` is that of a bare number. Source: util/cutils.c, QEMU 7.2.

    Raises:
        ConfigError: it is no size.
    """
    suffix = text[-1:].upper()
    number, unit = (text[:-1], suffix) if suffix in tuple("BKMGTPE") else (text, unit)
    try:
        count = int(number, 16) if number.lower().startswith("0x") else float(number)
        size = int(count * (1 << 10 * "BKMGTPE".index(unit)))
    except (ValueError, OverflowError) as failed:
        raise error(word, f"{text!r} is no size", fix="write a number and a unit, as 512M or 4G") from failed
    if size < 0:
        raise error(word, f"{text!r} is below nothing", fix="write a size")
    return -(-size >> 20)
