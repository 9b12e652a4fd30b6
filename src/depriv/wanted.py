# SPDX-License-Identifier: Apache-2.0
"""A ``Domain`` as plain data and back, to be kept with the domain it became and started again from. Pure.

Plain data are dict, list, str, int and bool: what JSON has. Each record is an object with all of its fields, none
more and none less, so that data of another version are refused, not guessed at.
"""

from __future__ import annotations

from depriv.config import Disk, Domain, Layer, Note, Vif
from depriv.errors import ConfigError
from depriv.records import Record, cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_ATOMS: Final = {"str": str, "int": int, "bool": bool}
_RECORDS: Final[dict[str, type[Record]]] = {"Disk": Disk, "Layer": Layer, "Vif": Vif, "Note": Note}


def to_data(domain: Domain) -> dict[str, Any]:
    """Return a domain as plain data, of which ``from_data`` makes an equal one."""
    return {name: _plain(value) for name, value in domain.as_dict().items()}


def from_data(data: object) -> Domain:
    """Return the domain that ``to_data`` has made ``data`` of, checked anew as any other configuration is.

    Raises:
        ConfigError: they are anything else; which field, and how.
    """
    return cast("Domain", _record(Domain, data, "Domain"))


def _plain(value: object) -> object:
    if isinstance(value, Record):
        return {name: _plain(item) for name, item in value.as_dict().items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in cast("tuple[object, ...]", value)]
    return value


def _record(kind: type[Record], data: object, place: str) -> Record:
    if type(data) is not dict:
        raise _refused(place, f"{type(data).__name__}, not an object")
    fields = cast("dict[object, object]", data)
    for name in fields:
        if name not in kind.fields:
            raise _refused(place, f"an object with the unknown field {name!r:.100}")
    for name in kind.fields:
        if name not in fields:
            raise _refused(f"{place}.{name}", "missing")
    values = {name: _value(text, fields[name], f"{place}.{name}") for name, text in kind.fields.items()}
    return kind(**values)


def _value(kind: str, data: object, place: str) -> object:
    """Return a field's value; ``kind`` is its annotation."""
    if kind in _ATOMS:
        if type(data) is not _ATOMS[kind]:  # not isinstance: True is an int to Python, and no number of CPUs
            raise _refused(place, f"{type(data).__name__}, not {kind}")
        return data
    if kind in _RECORDS:
        return _record(_RECORDS[kind], data, place)
    if type(data) is not list:
        raise _refused(place, f"{type(data).__name__}, not a list")
    items = cast("list[object]", data)
    inner = kind.removeprefix("tuple[").removesuffix("]")
    if inner.endswith(", ..."):
        kinds = [inner.removesuffix(", ...")] * len(items)
    else:
        kinds = inner.split(", ")
        if len(items) != len(kinds):
            raise _refused(place, f"a list of {len(items)}, not of {len(kinds)}")
    return tuple(
        _value(item_kind, item, f"{place}[{n}]") for n, (item_kind, item) in enumerate(zip(kinds, items, strict=True))
    )


def _refused(place: str, have: str) -> ConfigError:
    return ConfigError(
        f"the kept configuration cannot be read: {place} is {have}",
        fix="start the domain from its configuration file: depriv create FILE",
    )
