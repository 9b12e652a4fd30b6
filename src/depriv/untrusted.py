# SPDX-License-Identifier: Apache-2.0
"""JSON from a hostile process: parsed strictly and within bounds, then taken apart without trust. Pure.

``decode`` is for one line of text, ``field`` and the ``as_`` functions for what came out of it. They say what a value
is, never what it means: a path, a number of a process or a descriptor from QEMU stays text or a number.
"""

from __future__ import annotations

import json

from depriv.errors import MonitorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final, Never, TypeGuard, TypeVar

    T = TypeVar("T")

DISTRUST: Final = "destroy the domain: its QEMU does not follow the protocol, and may be in the guest's hands"
INT_MIN: Final = -(2**63)  # QEMU's own numbers are int64 or uint64. Source: qobject/qnum.c of QEMU 7.2
INT_MAX: Final = 2**64 - 1

_NOT_STRUCTURE: Final = bytes(set(range(256)) - set(b'{}[],"'))


def decode(line: bytes, *, depth: int, values: int) -> dict[str, object]:
    """Return the one JSON object in ``line``.

    Args:
        line: What was received, already of a bounded length.
        depth: So many arrays and objects may be nested.
        values: So many brackets may be opened and commas set, together: a bound on what parsing makes.

    Raises:
        ValueError: it is no object, or one that no QEMU sends: too deep, too many values, doubled keys, numbers beyond
            64 bits, NaN or Infinity, text that is not UTF-8 or cannot become UTF-8.
    """
    _check_size(line, depth, values)
    try:
        value = _DECODER.decode(line.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if b"\\ud" in line.lower():
        # A lone surrogate would pass here and then fail wherever it is printed or written.
        json.dumps(value, ensure_ascii=False).encode()
    if not _is_object(value):
        raise ValueError("no object")
    return value


def _check_size(line: bytes, depth: int, values: int) -> None:
    """Raise ``ValueError`` if parsing would nest too deep or make too many values. Nothing is parsed for that.

    Up to its first error, where parsing would stop, a text has exactly the nesting that is counted here.
    """
    # In a run of backslashes each pair is one character; a quote after what is left over does not end the string.
    bare = line.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE)
    if bare.count(b'"') > 4 * values:  # at most a name and a text for each
        raise ValueError(f"more than {values} values")
    outside = b"".join(bare.split(b'"')[::2])
    opened = outside.count(b"{") + outside.count(b"[")
    if opened + outside.count(b",") > values:
        raise ValueError(f"more than {values} values")
    if opened <= depth:
        return
    level = 0
    for char in outside.translate(None, b","):
        level += 1 if char in b"{[" else -1
        if level > depth:
            raise ValueError(f"nested deeper than {depth} levels")
        if level < 0:
            raise ValueError("more brackets closed than opened")


def _integer(text: str) -> int:
    """Return a JSON integer of QEMU's range. Its length is looked at first: conversion takes quadratic time."""
    if len(text) > 20 or not INT_MIN <= int(text) <= INT_MAX:
        raise ValueError("an integer beyond 64 bits")
    return int(text)


def _fraction(text: str) -> float:
    """Return a JSON number with fraction or exponent."""
    if len(text) > 64 or abs(value := float(text)) == float("inf"):
        raise ValueError("a number too large or too long")
    return value


def _no_constant(name: str) -> Never:
    """Refuse what Python's decoder takes for a number and JSON does not."""
    raise ValueError(f"{name} is no JSON")


def _unique(members: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object's members. A doubled key is refused: two readers could read it in two ways."""
    result = dict(members)
    if len(result) != len(members):
        raise ValueError("the same key twice in an object")
    return result


_DECODER: Final = json.JSONDecoder(
    parse_int=_integer, parse_float=_fraction, parse_constant=_no_constant, object_pairs_hook=_unique
)


def field(value: object, name: str, kind: Callable[[object, str], T], what: str) -> T:
    """Return member ``name`` of the object ``value`` if it is of a kind: ``field(reply, "status", as_str, "status")``.

    Raises:
        MonitorError: it is not; ``what`` names the object.
    """
    members = as_object(value, what)
    if name not in members:
        raise MonitorError(f"{what}: {name} is missing", fix=DISTRUST)
    return kind(members[name], f"{what}: {name}")


def as_object(value: object, what: str) -> dict[str, object]:
    """Return ``value`` if it is a JSON object; else raise ``MonitorError`` about ``what``."""
    if not _is_object(value):
        _refuse(value, what, "an object")
    return value


def as_list(value: object, what: str) -> list[object]:
    """Return ``value`` if it is a JSON array; else raise ``MonitorError`` about ``what``."""
    if not _is_list(value):
        _refuse(value, what, "an array")
    return value


def as_str(value: object, what: str) -> str:
    """Return ``value`` if it is text (not yet safe to print); else raise ``MonitorError`` about ``what``."""
    if not isinstance(value, str):
        _refuse(value, what, "text")
    return value


def as_int(value: object, what: str) -> int:
    """Return ``value`` if it is an integer and no boolean; else raise ``MonitorError`` about ``what``."""
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(value, what, "an integer")
    return value


def as_bool(value: object, what: str) -> bool:
    """Return ``value`` if it is true or false; else raise ``MonitorError`` about ``what``."""
    if not isinstance(value, bool):
        _refuse(value, what, "true or false")
    return value


def _is_object(value: object) -> TypeGuard[dict[str, object]]:
    """Say so to the type checkers: a JSON object has no keys but strings."""
    return isinstance(value, dict)


def _is_list(value: object) -> TypeGuard[list[object]]:
    """Say so to the type checkers."""
    return isinstance(value, list)


def _refuse(value: object, what: str, wanted: str) -> Never:
    """Raise: a value has the wrong shape."""
    kind = type(value).__name__
    raise MonitorError(f"{what}: not {wanted}", cause=f"QEMU sent a value of type {kind}", fix=DISTRUST)
