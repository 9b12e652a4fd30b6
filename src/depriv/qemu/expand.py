# SPDX-License-Identifier: Apache-2.0
"""Options that stand for others: -readconfig and -set become the words they mean, before any is handled. Pure.

So a file's sections and changed properties get the same treatment as what is written out. Sources: util/qemu-config.c
(qemu_config_foreach), softmmu/vl.c (qemu_parse_config_group, qemu_set_option), QEMU 7.2.
"""

from __future__ import annotations

import json

from depriv.qemu.words import Item, Word, error, join_list, parse_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Sections that are called otherwise than the options they stand for.
_GROUPS = {"memory": "m", "smp-opts": "smp", "boot-opts": "boot"}
_GROUP_OF = {option: group for group, option in _GROUPS.items()}
# Options that may be sections. Source: qemu_add_opts calls of softmmu/vl.c and qemu_parse_config_group, QEMU 7.2.
_SECTIONS = (
    "accel", "action", "add-fd", "boot", "chardev", "device", "drive", "fsdev", "fw_cfg", "global", "icount",
    "iscsi", "m", "machine", "mon", "msg", "name", "net", "netdev", "nic", "numa", "object", "option-rom",
    "overcommit", "rtc", "sandbox", "smp", "spice", "tpmdev", "trace", "virtfs", "vnc",
)  # fmt: skip


def expand(words: tuple[Word, ...], read: Callable[[Word], str]) -> tuple[Word, ...]:
    """Return the words with each -readconfig replaced by its file's sections, and each -set worked in.

    Args:
        words: As parsed.
        read: Returns the text of the file that a word names.

    Raises:
        ConfigError: a file's line is none, or -set changes what is not there.
    """
    result: list[Word] = []
    for word in words:
        if word.name == "readconfig":
            result += _sections(word, read(word))
        elif word.name == "set":
            _set(word, result)
        else:
            result.append(word)
    return tuple(result)


def _sections(word: Word, text: str) -> list[Word]:
    """Return the options that a configuration file stands for."""
    result: list[Word] = []
    option, items, at = "", list[Item](), 0
    for number, line in enumerate((*text.splitlines(), "[]"), start=1):
        stripped = line.strip()
        where = Word(name=word.name, value=word.value, place=word.place, text=f"{word.text}, line {number}")
        if not stripped or stripped.startswith("#"):
            continue
        if not stripped.startswith("["):
            items.append(_item(where, stripped, option))
            continue
        if option:
            result.append(_word(word, option, items, at))
        option, items, at = "", [], number
        if stripped != "[]":
            option, items = _head(where, stripped)
    return result


def _head(where: Word, line: str) -> tuple[str, list[Item]]:
    """Return the option that a section is of, and its id: ``[drive]``, ``[device "net0"]``."""
    group, _, name = line.removeprefix("[").removesuffix("]").strip().partition(" ")
    option = _GROUPS.get(group, group)
    name = name.strip()
    quoted = len(name) > 2 and name.startswith('"') and name.endswith('"')
    if not line.endswith("]") or (name and not quoted):
        raise error(where, f"{line!r} is no head of a section", fix='write [group] or [group "id"]')
    if option not in _SECTIONS:
        raise error(where, f"there is no section {group!r}", fix="write one that is an option of QEMU, as [device]")
    return option, [Item(key="id", value=name[1:-1])] if name else []


def _item(where: Word, line: str, option: str) -> Item:
    key, equals, value = line.partition("=")
    value = value.strip()
    if not option or not equals or len(value) < 2 or not (value.startswith('"') and value.endswith('"')):
        raise error(where, f"{line!r} is no property of a section", fix='write key = "value", below a [group]')
    return Item(key=key.strip(), value=value[1:-1])


def _word(word: Word, option: str, items: list[Item], line: int) -> Word:
    return Word(
        name=option,
        value=join_list(items),
        place=word.place,
        text=f"{word.text}, line {line}: [{_GROUP_OF.get(option, option)}]",
    )


def _set(word: Word, before: list[Word]) -> None:
    """Add a property to the option of that group and id which stands before."""
    path, equals, value = word.value.partition("=")
    group, _, rest = path.partition(".")
    name, _, key = rest.partition(".")
    if not (equals and group and name and key):
        raise error(word, "it says nothing to change", fix="write -set device.ID.PROPERTY=VALUE")
    for place, other in enumerate(before):
        if other.name != group or _id_of(other) != name:
            continue
        if other.value.startswith("{"):
            changed = json.dumps({**parse_json(other), key: value})
        else:
            changed = f"{other.value},{join_list([Item(key=key, value=value)])}"
        before[place] = Word(name=group, value=changed, place=other.place, text=f"{other.text} {word.text}")
        return
    raise error(word, f"there is no -{group} with id={name} before it", fix="put -set behind the option it changes")


def _id_of(word: Word) -> str:
    if word.value.startswith("{"):
        return str(parse_json(word).get("id", ""))
    # Not parse_list: a value of another option need be no list, and what is wrong with it is its handler's to say.
    for part in word.value.split(","):
        if part.startswith("id="):
            return part.removeprefix("id=")
    return ""
