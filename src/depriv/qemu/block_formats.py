# SPDX-License-Identifier: Apache-2.0
"""Whether an image is what the command line says. Pure.

An image's header is read for one purpose: to refuse an image that names more than the command line does. It is never
followed: a QEMU that was taken over can write it.
"""

from __future__ import annotations

import json

from depriv.qemu.words import error
from depriv.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.errors import ConfigError
    from depriv.host import FileFacts
    from depriv.qemu.block_names import Node
    from depriv.qemu.draft import Draft
    from depriv.qemu.words import Word

# What a file's first bytes are called in FileFacts.magic -> QEMU's driver for it.
FORMATS = {"qcow2": "qcow2", "qcow": "qcow", "vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx", "qed": "qed", "luks": "luks"}
_SURE = ("qcow2", "qcow", "vmdk", "vhdx", "qed", "luks")  # formats whose images always begin with their magic


class Place(Record):
    """Where in the command line a node stands."""

    word: Word
    role: str  # for what is opened below it
    prefix: str = ""  # of its keys in the dotted form: "", "backing.", "backing.file."
    writable: bool = True  # unless it says so itself
    json: bool = False  # written as JSON
    by_name: bool = False  # the driver may be left out: -drive
    plain: str = ""  # "cdrom" or "pflash": what is no known format is raw
    fix: str = ""  # how to give a format where this word cannot


def check_header(draft: Draft, tree: Node, place: Place, facts: FileFacts) -> None:
    """Hold what the command line says of an image against its header.

    Raises:
        ConfigError: it is of another format, or its header names what the command line does not; what to add.
    """
    word = place.word
    driver = str(tree["driver"])
    looks = FORMATS.get(facts.magic, "")
    if driver == "raw" and looks and "size" not in tree and "offset" not in tree:
        draft.note(word, f"{facts.path} looks like {looks} and is used as raw, as the command line says")
    if driver in _SURE and looks != driver:
        raise error(
            word,
            f"{facts.path} is no {driver} image",
            cause=f"its first bytes say {facts.magic or 'nothing we know; probably raw'}",
            fix="correct the format (see qemu-img info)"
            + ("; what is spread over several files: qemu-img convert -O qcow2" if driver == "vmdk" else ""),
        )
    if driver != "qcow2":
        return
    if facts.data_file and "data-file" not in tree:
        raise error(
            word,
            f"{facts.path} keeps its data in another file that its header names",
            cause="headers are not followed: a device model that was taken over can write them",
            fix="if qemu-img info names the right file, add " + _below(place, "data-file", "", "FILE"),
        )
    if facts.encrypted and "encrypt" not in tree:
        raise error(
            word,
            f"{facts.path} is encrypted, and no key is given",
            fix=f"add -object secret,id=key0,file=FILE and {place.prefix}encrypt.format=luks,"
            f"{place.prefix}encrypt.key-secret=key0",
        )
    if facts.backing and "backing" not in tree:
        name = facts.backing if facts.backing.startswith("/") else f"{facts.path.rpartition('/')[0]}/{facts.backing}"
        raise error(
            word,
            f"{facts.path} is based on another image, and the command line does not say so",
            cause=f"its header names {facts.backing!r}; headers are not followed: a device model that was taken "
            "over can write them",
            fix="if that is the right file, add (format as it really is) "
            + _below(place, "backing", "qcow2" if name.endswith("qcow2") else "raw", name),
        )


def no_format(place: Place, what: str, guess: str) -> ConfigError:
    """Return the error about a format that is not given."""
    key = f"{place.prefix}driver" if place.prefix else "format"
    return error(
        place.word,
        f"the format of {what} is not given",
        cause="QEMU would guess it from the content, which the guest can write",
        fix=(place.fix.replace("FORMAT", guess) or f"add {key}={guess}")
        + ", if that is what qemu-img info says; or --probe-format",
    )


def _below(place: Place, key: str, driver: str, path: str) -> str:
    """Return the words that put a file below a node, as the command line writes its nodes."""
    if place.json:
        file = {"driver": "file", "filename": path}
        return f'"{key}": {json.dumps({"driver": driver, "file": file} if driver else file)}'
    path = path.replace(",", ",,")
    prefix = f"{place.prefix}{key}."
    if not driver:
        return f"{prefix}driver=file,{prefix}filename={path}"
    return f"{prefix}driver={driver},{prefix}file.driver=file,{prefix}file.filename={path}"
