# SPDX-License-Identifier: Apache-2.0
"""The grammar of QEMU's words: options, ``key=value`` lists with their commas, JSON. Pure.

Sources: util/keyval.c and util/qemu-option.c (get_opt_name, get_opt_value: a comma in a value is doubled),
softmmu/vl.c (lookup_opt: one or two dashes; a word without a dash is a disk image), QEMU 7.2.
"""

from __future__ import annotations

import json

from depriv.errors import ConfigError
from depriv.records import Record, cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Word(Record):
    """One option of the command line, with its value."""

    name: str  # without dashes, as QEMU calls it
    value: str = ""  # "" for an option that takes none
    place: int = 0  # of the option among the words, 1 is the first after the program
    text: str = ""  # both as written, for messages


class Item(Record):
    """One ``key=value`` of a list."""

    key: str
    value: str
    bare: bool = False  # written as ``key`` or ``nokey`` (a switch), or as the value alone of the implied first key


def error(word: Word, what: str, *, fix: str = "", cause: str = "") -> ConfigError:
    """Return the error about one word, which names the word and where it stands."""
    return ConfigError(f"word {word.place}, {word.text}: {what}", fix=fix, cause=cause)


def parse_words(argv: tuple[str, ...], takes_value: dict[str, bool]) -> tuple[Word, ...]:
    """Return QEMU's words as options.

    Args:
        argv: The words after the program.
        takes_value: Every option that is known, and whether a value follows it.

    Raises:
        ConfigError: an option that is not known, a value that is missing; which word.
    """
    result: list[Word] = []
    place = 0
    while place < len(argv):
        text = argv[place]
        place += 1
        if not text.startswith("-") or text == "-":
            # "-hda" by another name: a positional argument is the first disk.
            result.append(Word(name="hda", value=text, place=place, text=text))
            continue
        name = text.removeprefix("--") if text.startswith("--") else text[1:]
        if name not in takes_value:
            raise _unknown(text, name, place, takes_value)
        if not takes_value[name]:
            result.append(Word(name=name, place=place, text=text))
            continue
        if place == len(argv):
            raise ConfigError(f"word {place}, {text}: it needs a value", fix=f"write {text} VALUE")
        result.append(Word(name=name, value=argv[place], place=place, text=f"{text} {argv[place]}"))
        place += 1
    return tuple(result)


def _unknown(text: str, name: str, place: int, known: dict[str, bool]) -> ConfigError:
    from difflib import get_close_matches  # noqa: PLC0415 (only for this message)

    near = get_close_matches(name.partition("=")[0], known, n=1, cutoff=0.75)
    fix = f"did you mean -{near[0]}?" if near else "see the table of options: depriv(1), or qemu-system-x86_64 -help"
    if "=" in name and name.partition("=")[0] in known:
        fix = f"QEMU takes the value as the next word: -{name.replace('=', ' ', 1)}"
    return ConfigError(f"word {place}, {text}: there is no such option of QEMU", fix=fix)


def parse_list(word: Word, *, implied: str = "", text: str | None = None) -> tuple[Item, ...]:
    """Return the items of a ``key=value,key=value`` list in order; a doubled comma stands for one in a value.

    Args:
        word: For messages, and its value is what is parsed.
        implied: The key of a first item that is a value alone ("file" of ``-drive x.img``); "": none.
        text: What to parse instead of the word's value.

    Raises:
        ConfigError: an item is empty, or has no key.
    """
    rest = word.value if text is None else text
    items: list[Item] = []
    first = True
    while rest:
        head, rest = _take(rest)
        key, equals, value = head.partition("=")
        if equals and not key:
            raise error(word, f"nothing stands before the = in {head!r}", fix="write key=value")
        if not head:
            raise error(word, "two commas with nothing between", fix="a comma in a value is doubled: a,,b is a,b")
        # A key has no doubled comma: then it is all the value of the implied key.
        if first and implied and not equals:
            items.append(Item(key=implied, value=head, bare=True))
        elif equals:
            items.append(Item(key=key, value=value))
        elif head.startswith("no") and len(head) > len("no"):
            items.append(Item(key=head.removeprefix("no"), value="off", bare=True))
        else:
            items.append(Item(key=head, value="on", bare=True))
        first = False
    return tuple(items)


def _take(text: str) -> tuple[str, str]:
    """Return the first item, its doubled commas made one, and what follows its comma."""
    value = ""
    at = 0
    while at < len(text):
        if text[at] == ",":
            if text[at + 1 : at + 2] != ",":
                return value, text[at + 1 :]
            at += 1
        value += text[at]
        at += 1
    return value, ""


def join_list(items: tuple[Item, ...] | list[Item]) -> str:
    """Return the list as QEMU reads it back: each item as ``key=value``, commas in values doubled."""
    return ",".join(f"{item.key}={item.value.replace(',', ',,')}" for item in items)


def values(items: tuple[Item, ...]) -> dict[str, str]:
    """Return key -> value; of a key given twice the last counts, as for QEMU."""
    return {item.key: item.value for item in items}


def with_items(items: tuple[Item, ...], changes: dict[str, str | None]) -> tuple[Item, ...]:
    """Return the items with some keys set (at their place, or at the end) or, for None, left out."""
    result = [item for item in items if item.key not in changes]
    added = [Item(key=key, value=value) for key, value in changes.items() if value is not None]
    at = next((number for number, item in enumerate(items) if item.key in changes), len(result))
    return (*result[:at], *added, *result[at:])


def parse_json(word: Word) -> dict[str, Any]:
    """Return the object that a word's value is.

    Raises:
        ConfigError: it is no JSON, or no object, or says a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key is there twice")
        return made

    try:
        data: object = json.loads(word.value, object_pairs_hook=once)
    except (ValueError, RecursionError) as failed:
        raise error(
            word, "it is no JSON", cause=str(failed)[:200], fix="see the quotes that the shell took"
        ) from failed
    if not isinstance(data, dict):
        raise error(word, "it is no JSON object", fix='write {"key": "value"}')
    return cast("dict[str, Any]", data)


def is_on(value: str) -> bool:
    """Tell whether a switch is on. Source: qapi/qapi-util.c, qapi_bool_parse, QEMU 7.2."""
    return value in ("on", "yes", "true", "y")


def nest(word: Word, items: tuple[Item, ...]) -> dict[str, Any]:
    """Return dotted keys as nested objects: ``file.driver=file`` is ``{"file": {"driver": "file"}}``.

    Raises:
        ConfigError: a key is a value and an object at once.
    """
    result: dict[str, Any] = {}
    for item in items:
        inner = result
        *path, last = item.key.split(".")
        for name in path:
            found: object = inner.setdefault(name, {})
            if not isinstance(found, dict):
                raise error(word, f"{item.key}: {name} is a value already", fix="write either the value or its parts")
            inner = cast("dict[str, Any]", found)
        if isinstance(inner.get(last), dict):
            raise error(word, f"{item.key} is an object already", fix="write either the value or its parts")
        inner[last] = item.value
    return result


def flatten(data: dict[str, Any], prefix: str = "") -> tuple[Item, ...]:
    """Return nested objects as dotted keys: what ``nest`` undoes."""
    items: list[Item] = []
    for key, value in data.items():
        if isinstance(value, dict):
            items += flatten(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            text = {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
            items.append(Item(key=prefix + key, value=text))
    return tuple(items)
