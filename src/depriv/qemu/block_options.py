# SPDX-License-Identifier: Apache-2.0
"""The options for disks: -drive and its short forms, -blockdev. Pure.

They are gone through together at the end: whether a node is opened for writing depends on those that refer to it.
A -drive stays one, so that if=, index= and QEMU's defaults do what they always do; its nodes become ``file=json:``,
the one form that can say "no backing file". A -blockdev becomes JSON.
Sources: blockdev.c (drive_new, blockdev_init, qemu_common_drive_opts, qemu_legacy_drive_opts) and softmmu/vl.c, QEMU
7.2.
"""

from __future__ import annotations

import json

from depriv.qemu.block_formats import Place
from depriv.qemu.block_names import as_number, lists, merge, parse_name, refuse, undot
from depriv.qemu.block_nodes import CHILDREN, PROTOCOLS, Graph, demands, fit_role, named
from depriv.qemu.words import Item, error, is_on, join_list, parse_json, parse_list, values, with_items
from depriv.records import Record, cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from depriv.qemu.block_names import Node
    from depriv.qemu.draft import Draft
    from depriv.qemu.words import Word

_DRY_SIZE = 1 << 20  # of a disk in the dry run, where its own is not known
# Keys that -drive keeps for itself; all others are the node's.
_DRIVE_KEYS = (
    "if", "index", "bus", "unit", "media", "id", "readonly", "read-only", "snapshot", "cache", "aio", "werror",
    "rerror", "copy-on-read", "detect-zeroes", "discard", "auto-read-only", "stats-account-invalid",
    "stats-account-failed",
)  # fmt: skip
_DRIVE_PREFIXES = ("cache.", "throttling.", "iops", "bps", "stats-intervals.")
# What the short forms stand for.
_SHORT = {
    "hda": "index=0,media=disk",
    "hdb": "index=1,media=disk",
    "hdc": "index=2,media=disk",
    "hdd": "index=3,media=disk",
    "cdrom": "index=2,media=cdrom",
    "fda": "if=floppy,index=0",
    "fdb": "if=floppy,index=1",
    "pflash": "if=pflash",
    "mtdblock": "if=mtd",
    "sd": "if=sd",
}
# Members of BlockdevOptions that are no text. A test holds them to QEMU's own schema.
BOOLEANS = (
    "active-l1", "active-l2", "auto-read-only", "bitmap-directory", "direct", "drop-cache", "force-share",
    "immediately", "inactive-l1", "inactive-l2", "lazy-refcounts", "log-append", "main-header", "no-flush", "once",
    "pass-discard-other", "pass-discard-request", "pass-discard-snapshot", "read-only", "read-zeroes",
    "refcount-block", "refcount-table", "rewrite-corrupted", "snapshot-table", "blkverify", "x-check-cache-dropped",
)  # fmt: skip
NUMBERS = (
    "aio-max-batch", "align", "cache-clean-interval", "cache-size", "cbw-timeout", "errno", "l2-cache-entry-size",
    "l2-cache-size", "latency-ns", "log-sector-size", "log-super-update-interval", "max-discard", "max-transfer",
    "max-write-zero", "new_state", "offset", "opt-discard", "opt-write-zero", "prealloc-align", "prealloc-size",
    "refcount-cache-size", "sector", "size", "state", "vote-threshold", "reconnect-delay", "open-timeout",
)  # fmt: skip


class _Block(Record):
    """One word, understood."""

    word: Word
    tree: dict[str, Any]  # its nodes; empty for a drive without a medium
    items: tuple[Item, ...] = ()  # of a -drive: what is not the node's
    place: Place


def _collect(draft: Draft, word: Word) -> None:
    draft.blocks.append(word)


def finish(draft: Draft) -> None:
    """Emit all disks, in the order in which they are named."""
    blocks: list[_Block] = []
    for word in draft.blocks:
        if word.name == "drive" and _asks_for_help(word):
            draft.facts["no_guest"] = True
            draft.emit("-drive", word.value)
        elif word.name == "blockdev":
            blocks.append(_parse_blockdev(word))
        else:
            blocks.append(_parse_drive(word, blocks))
    graph = Graph(draft, demands([(block.tree, block.place.writable) for block in blocks]))
    for block in blocks:
        _emit(draft, graph, block)


def _emit(draft: Draft, graph: Graph, block: _Block) -> None:
    if not block.tree:
        draft.emit("-drive", block.word.value if block.word.name == "drive" else join_list(block.items))
        return
    before = len(draft.files)
    tree, bottom = graph.node(block.tree, block.place)
    writable = not tree.get("read-only", not block.place.writable)
    dry: list[str] = []
    for name in named(tree):
        dry += ["-blockdev", _json(_empty(name, _DRY_SIZE, writable=writable))]
    empty = _empty(tree.get("node-name"), graph.size(tree, bottom) or _DRY_SIZE, writable=writable)
    if block.word.name == "blockdev":
        draft.emit("-blockdev", _json(tree), dry=(*dry, "-blockdev", _json(empty)))
        return
    items = _without_direct(graph, block)
    if len(draft.files) > before:
        # -drive's own default is on, and then QEMU opens each file twice. Not for sets of the caller's own.
        items = with_items(items, {"auto-read-only": "off"})
    del empty["read-only"]
    words = [
        join_list([*given, Item(key="file", value=f"json:{_json(node)}")])
        for given, node in ((items, tree), (items, empty))
    ]
    draft.emit("-drive", words[0], dry=(*dry, "-drive", words[1]))


def _empty(name: object, size: int, *, writable: bool) -> Node:
    """Return a node for the dry run: as large as the real one, since floppy drives and flash go by that."""
    named_so = {"node-name": name} if name else {}
    return {"driver": "null-co", **named_so, "size": size, "read-zeroes": True, "read-only": not writable}


def _json(tree: Node) -> str:
    return json.dumps(tree, separators=(",", ":"))


def _without_direct(graph: Graph, block: _Block) -> tuple[Item, ...]:
    """Return a -drive's own items without O_DIRECT; see Graph for why."""
    have = values(block.items)
    changes: dict[str, str | None] = {}
    if have.get("cache") in ("none", "directsync"):
        changes["cache"] = {"none": "writeback", "directsync": "writethrough"}[have["cache"]]
    if is_on(have.get("cache.direct", "")):
        changes["cache.direct"] = "off"
    if have.get("aio") in ("native", "io_uring"):
        changes["aio"] = "threads"
    if not changes:
        return block.items
    graph.note_direct(block.word)
    return with_items(block.items, changes)


# Words


def _parse_blockdev(word: Word) -> _Block:
    """Return what a -blockdev says, in its JSON form or in the dotted one."""
    as_json = word.value.startswith("{")
    if as_json:
        tree = undot(word, parse_json(word))
    else:
        items = parse_list(word, implied="driver")
        tree = cast("Node", _typed(lists(undot(word, values(items)))))
    name = str(tree.get("node-name", ""))
    if not tree.get("driver"):
        raise error(word, "it says no driver", fix="write -blockdev driver=raw,node-name=NAME,file.driver=file,...")
    role = name if fit_role(name) else "blockdev"
    return _Block(word=word, tree=tree, place=Place(word=word, role=role, json=as_json))


def _typed(value: Any, key: str = "") -> Any:  # noqa: ANN401 (JSON)
    """Return the dotted form's text as JSON has it."""
    if isinstance(value, dict):
        return {name: _typed(inner, name) for name, inner in cast("Node", value).items()}
    if isinstance(value, list):
        members = cast("list[object]", value)
        return [_typed(item, key) for item in members]
    if key in BOOLEANS and value in ("on", "off", "yes", "no", "true", "false", "y", "n"):
        return is_on(value)
    number = as_number(value) if key in NUMBERS else None
    return value if number is None else number


def _parse_drive(word: Word, before: list[_Block]) -> _Block:
    """Return what a -drive or one of its short forms says."""
    if word.name == "drive":
        items = parse_list(word)
    else:
        items = (*parse_list(word, text=_SHORT[word.name]), Item(key="file", value=word.value))
    own = tuple(item for item in items if item.key in _DRIVE_KEYS or item.key.startswith(_DRIVE_PREFIXES))
    rest = {key: value for key, value in values(items).items() if key not in values(own)}
    have = values(own)
    if is_on(have.get("snapshot", "")):
        _refuse_snapshot(word)
    tree = _nodes(word, rest)
    own, readonly = _read_only(own, tree)
    place = Place(
        word=word,
        role=_role(word, have, before),
        writable=not readonly,
        by_name=True,
        plain="cdrom" if have.get("media") == "cdrom" else "pflash" if have.get("if") == "pflash" else "",
        fix=""
        if word.name == "drive"
        else f"write -drive file={word.value.replace(',', ',,')},format=FORMAT,{_SHORT[word.name]}",
    )
    return _Block(word=word, tree=tree, items=own, place=place)


def _nodes(word: Word, rest: dict[str, str]) -> Node:
    """Return a -drive's tree; empty if it has no medium."""
    name, form = rest.pop("file", ""), rest.pop("format", "")
    if form and "driver" in rest:
        raise error(word, "format= and driver= are the same", fix="write one of them")
    tree = cast("Node", lists(undot(word, rest)))
    if form:
        tree["driver"] = form
    if name:
        found = parse_name(word, name)
        refuse(word, str(found.get("driver", "")))
        if not name.startswith("json:") and tree.get("driver") not in PROTOCOLS:
            found = {"file": found}
        both = {str(node["driver"]) for node in (found, tree) if "driver" in node}
        if len(both) > 1 and both != {"file", "host_device"}:
            raise error(word, "the file's name says another driver", fix='write json:{"driver":FORMAT,"file":{...}}')
        return merge(found, tree)
    return tree if tree.keys() - {"driver"} or tree.get("driver", "raw") not in CHILDREN else {}


def _read_only(own: tuple[Item, ...], tree: Node) -> tuple[tuple[Item, ...], bool]:
    """Return a drive's own items, and whether it is read-only; what its tree says of that becomes the drive's."""
    have = values(own)
    said = [have.get("readonly", ""), have.get("read-only", ""), tree.pop("read-only", "")]
    tree.pop("auto-read-only", None)
    readonly = any(value is True or (isinstance(value, str) and is_on(value)) for value in said)
    if said[2] and readonly:
        own = with_items(own, {"read-only": None, "readonly": "on"})
    return own, readonly or have.get("media") == "cdrom"


def _role(word: Word, have: dict[str, str], before: list[_Block]) -> str:
    """Return what a drive's files are called: its id, or as QEMU would call it: "virtio0", "pflash1"."""
    if fit_role(have.get("id", "")):
        return have["id"]
    if word.name in _SHORT and word.name[:2] in ("hd", "fd", "cd"):
        return word.name
    kind = have.get("if", "drive")
    kind = kind if fit_role(kind) else "drive"
    if have.get("index", "").isdecimal():
        return f"{kind}{have['index']}"
    drives = [values(block.items) for block in before if block.word.name != "blockdev"]
    return f"{kind}{sum(drive.get('if', 'drive') == kind for drive in drives)}"


def _asks_for_help(word: Word) -> bool:
    """Tell whether QEMU would list its formats and end."""
    return word.value in ("help", "?") or values(parse_list(word)).get("format") in ("help", "?")


# Refused


def _refuse_snapshot(word: Word) -> None:
    raise error(
        word,
        "it is refused",
        cause="QEMU would make a temporary file for what the guest writes, and it has no folder for one",
        fix="make it beforehand: qemu-img create -f qcow2 -b FILE -F FORMAT overlay.qcow2, and write -drive "
        "file=overlay.qcow2,format=qcow2,backing.driver=FORMAT,backing.file.driver=file,backing.file.filename=FILE",
    )


def _refuse_snapshots(draft: Draft, word: Word) -> None:
    del draft
    _refuse_snapshot(word)


HANDLERS: dict[str, Callable[[Draft, Word], None]] = {
    **dict.fromkeys(("drive", "blockdev", *_SHORT), _collect),
    "snapshot": _refuse_snapshots,
}
