# SPDX-License-Identifier: Apache-2.0
"""Plan <-> words: the jail's wire format. Versioned; whatever ``encode`` does not write is refused. Pure.

Words separated by NUL, as bubblewrap's --args takes them: nothing to quote, nothing to parse, and no ``json`` to
import, which takes the jail longer than all it does in the kernel (docs/adr/0001).
"""

from __future__ import annotations

from depriv import steps
from depriv.records import cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from depriv.records import Record
    from depriv.steps import Step

VERSION = "depriv-plan-3"
_STEPS = {kind.__name__: kind for kind in steps.ALL}
_ITEMS_MAX = 10_000


def pack(words: list[str]) -> bytes:
    """Return a message: its length in decimal, a newline, the words separated by NUL."""
    body = "\0".join(words).encode("utf-8", "surrogateescape")
    return b"%d\n%s" % (len(body), body)


def unpack(body: bytes) -> list[str]:
    """Return the words of a message without its length."""
    return body.decode("utf-8", "surrogateescape").split("\0")


def encode(plan: steps.Plan) -> bytes:
    """Return the plan as a message.

    Raises:
        ValueError: a text in it contains NUL.
    """
    words = [VERSION, plan.domain, str(plan.domid), _bool(plan.restricted), _bool(plan.shared), _bool(plan.keep_net)]
    words.append(plan.tool)
    for part in (plan.steps, plan.after):
        words.append(str(len(part)))
        for step in part:
            words.append(type(step).__name__)
            for value in step.as_dict().values():
                words += _words(value)
    if any("\0" in word for word in words):
        raise ValueError("a plan cannot hold NUL")
    return pack(words)


def decode(body: bytes) -> steps.Plan:
    """Return the plan in the body of a message.

    Raises:
        ValueError: it is not exactly what ``encode`` writes; the message names the step and the field.
    """
    words = iter(unpack(body))
    try:
        version = next(words)
        if version != VERSION:
            raise ValueError(f"a plan in format {version[:40]!r}: this jail reads {VERSION}")
        plan = steps.Plan(
            domain=_text(next(words)),
            domid=_int("domid", next(words)),
            restricted=_is_true("restricted", next(words)),
            shared=_is_true("shared", next(words)),
            keep_net=_is_true("keep_net", next(words)),
            tool=_text(next(words)),
            steps=_steps(words),
            after=_steps(words),
        )
    except StopIteration:
        raise ValueError("the plan ends early") from None
    if next(words, None) is not None:
        raise ValueError("the plan goes on after its end")
    return plan


def as_json(record: Record) -> dict[str, Any]:
    """Return one step as a JSON object whose first key, ``step``, names it: what `plan --json` prints."""
    return {"step": type(record).__name__, **record.as_dict()}


def _words(value: object) -> list[str]:
    """Return a field as words: a tuple is its length and its items."""
    if isinstance(value, tuple):
        items = [str(item) for item in cast("tuple[object, ...]", value)]
        return [str(len(items)), *items]
    return [_bool(value)] if isinstance(value, bool) else [str(value)]


def _bool(value: bool) -> str:
    return "1" if value else "0"


def _steps(words: Iterator[str]) -> tuple[Step, ...]:
    return tuple(_step(words) for _ in range(_count("steps", next(words))))


def _step(words: Iterator[str]) -> Any:  # noqa: ANN401 (one of many kinds)
    name = _word(words)
    kind = _STEPS.get(name)
    if kind is None:
        raise ValueError(f"unknown step {name[:80]!r}")
    return kind(**{field: _field(f"{name}.{field}", kind.fields[field], words) for field in kind.fields})


def _field(place: str, annotation: str, words: Iterator[str]) -> object:
    """Take the field's words and return its value: exactly what the annotation says, or an error."""
    if annotation.startswith("tuple["):
        inner = annotation.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_scalar(place, inner, _word(words)) for _ in range(_count(place, _word(words))))
    return _scalar(place, annotation, _word(words))


def _scalar(place: str, annotation: str, word: str) -> object:
    if annotation == "int":
        return _int(place, word)
    return _is_true(place, word) if annotation == "bool" else _text(word)


def _word(words: Iterator[str]) -> str:
    """Return the next word; a StopIteration inside a generator expression would become a RuntimeError."""
    word = next(words, None)
    if word is None:
        raise ValueError("the plan ends early")
    return word


def _text(word: str) -> str:
    return word


def _int(place: str, word: str) -> int:
    """Return a number written as Python writes it, in one way only."""
    if len(word) > 20 or not word.removeprefix("-").isdecimal() or str(int(word)) != word:
        raise ValueError(f"{place}: want a number, have {word[:40]!r}")
    return int(word)


def _count(place: str, word: str) -> int:
    number = _int(place, word)
    if not 0 <= number <= _ITEMS_MAX:
        raise ValueError(f"{place}: {number} items")
    return number


def _is_true(place: str, word: str) -> bool:
    if word not in ("0", "1"):
        raise ValueError(f"{place}: want 0 or 1, have {word[:40]!r}")
    return word == "1"
