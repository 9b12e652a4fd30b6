# SPDX-License-Identifier: Apache-2.0
"""A disk's nodes with descriptors in place of all that named the host. Pure.

Sources: qapi/block-core.json (BlockdevOptions), block/file-posix.c, block/nbd.c, QEMU 7.2.
"""

from __future__ import annotations

from depriv.openings import ConnectTcp, ConnectUnix
from depriv.qemu.block_formats import FORMATS, check_header, no_format
from depriv.qemu.block_names import NBD_PORT, REFUSED, as_number, refuse
from depriv.qemu.draft import SET_BASE, DiskFile
from depriv.qemu.words import error, is_on
from depriv.records import cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from depriv.qemu.block_formats import Place
    from depriv.qemu.block_names import Node
    from depriv.qemu.draft import Draft
    from depriv.qemu.words import Word

FDSET = "/dev/fdset/"
NO_FILE = -1
PROTOCOLS = ("file", "host_device", "nbd", "null-co", "null-aio")
# Drivers whose data lies in other nodes -> the names of those; the first is the one that its own size comes from.
CHILDREN = {
    **dict.fromkeys(
        ("raw", "qcow", "qed", "vmdk", "vdi", "vpc", "vhdx", "parallels", "bochs", "cloop", "dmg", "luks"),
        ("file", "backing"),
    ),
    "qcow2": ("file", "backing", "data-file"),
    **dict.fromkeys(
        ("throttle", "copy-on-read", "preallocate", "compress", "replication", "snapshot-access"), ("file",)
    ),
    "copy-before-write": ("file", "target"),
    "blkdebug": ("image",),
    "blkreplay": ("image",),
    "blkverify": ("test", "raw"),
    "blklogwrites": ("file", "log"),
    "quorum": ("children",),
}


class Graph:
    """All nodes of a command line, while they are gone through."""

    def __init__(self, draft: Draft, demands: dict[str, bool]) -> None:
        """Take the draft, and for nodes that others refer to whether one of these writes."""
        self.draft = draft
        self.demands = demands
        self.bottoms: dict[str, int] = {}  # node name -> place in draft.disks of the file its data is in, or NO_FILE
        self.noted: set[int] = set()  # words that have their note about O_DIRECT

    def node(self, tree: Node, place: Place) -> tuple[Node, int]:
        """Return the node as QEMU is to get it, and the place in ``draft.disks`` of the file that its data is in.

        Raises:
            ConfigError: it, or a node below it, is not fit; see :meth:`Draft.file`.
        """
        word = place.word
        name = tree.get("node-name")
        if isinstance(name, str) and fit_role(name):
            place = place.replace(role=name)
        place = place.replace(writable=self._writable(tree, place))
        driver = tree.get("driver", "")
        result = self._without_direct(word, tree)
        if driver in ("file", "host_device"):
            result, bottom = self._file(result, place)
        elif driver == "nbd":
            result, bottom = self._nbd(result, place), NO_FILE
        elif driver in PROTOCOLS and "filename" not in tree:
            bottom = NO_FILE
        else:
            result, bottom = self._inner(driver, result, place)
        if isinstance(name, str):
            self.bottoms[name] = bottom
        return result, bottom

    def size(self, tree: Node, bottom: int) -> int:
        """Return how large a node is for the guest, as well as it can be told; 0: it cannot."""
        given = as_number(tree.get("size"))
        if given is not None:
            return given
        if bottom == NO_FILE:
            return 0
        facts = self.draft.disks[bottom].facts
        return facts.virtual_size or facts.size

    def _writable(self, tree: Node, place: Place) -> bool:
        if "read-only" in tree:
            return not _true(tree["read-only"])
        demand = self.demands.get(str(tree.get("node-name", "")), True)
        return place.writable and demand

    def _without_direct(self, word: Word, tree: Node) -> Node:
        """Return the node without O_DIRECT and what needs it.

        The descriptor decides about O_DIRECT: from QEMU 9.1 on it has to be opened with the flag that the node says
        (monitor/fds.c). io_uring is denied by the filter.
        """
        result = dict(tree)
        cache = result.get("cache")
        direct = isinstance(cache, dict) and _true(cast("Node", cache).get("direct"))
        slow = result.get("aio") in ("native", "io_uring")
        if direct:
            result["cache"] = {**cast("Node", cache), "direct": False}
        if slow:
            result["aio"] = "threads"
        if direct or slow:
            self.note_direct(word)
        return result

    def note_direct(self, word: Word) -> None:
        """Say, once for each word, that the host's page cache is used."""
        if word.place not in self.noted:
            self.noted.add(word.place)
            self.draft.note(
                word, "the host's cache is not bypassed, and threads do the I/O: cache.direct=off,aio=threads"
            )

    # Nodes with others below them

    def _inner(self, driver: str, tree: Node, place: Place) -> tuple[Node, int]:
        word = place.word
        refuse(word, driver)
        if driver not in (*CHILDREN, *PROTOCOLS) and (driver or not place.by_name):
            raise error(
                word,
                f"the block driver {driver!r} is not known" if driver else f"{place.prefix}driver= is missing",
                fix=f"known are {' '.join((*PROTOCOLS, *CHILDREN))}",
            )
        if "filename" in tree:
            raise error(word, f"a node of driver {driver} has no file name", fix=f"write {place.prefix}file.filename=")
        result = dict(tree)
        bottoms: list[int] = []
        for key, child in children(driver, tree):
            below = place.replace(
                prefix=f"{place.prefix}{key}.",
                writable=place.writable and key != "backing",
                by_name=place.by_name and key in ("file", "backing"),
                plain="",
                fix="",
            )
            made, bottom = self._child(child, below, key)
            bottoms.append(bottom)
            _put(result, key, made)
        bottom = bottoms[0] if bottoms else NO_FILE
        if "auto-read-only" in result:
            result["auto-read-only"] = False
        if not place.writable and not place.by_name:
            result["read-only"] = True
        if driver == "blkdebug" and result.get("config"):
            config = str(result["config"])
            result["config"] = self.draft.private(word, config, role=f"{place.role}-config")
        if "backing" in CHILDREN.get(driver, ("backing",)):
            self._format(result, place, bottom)
        return result, bottom

    def _child(self, child: object, place: Place, key: str) -> tuple[object, int]:
        """Return a child node; one by its name was gone through before."""
        if not isinstance(child, dict):
            return child, self.bottoms.get(str(child), NO_FILE)
        tree = cast("Node", child)
        if place.by_name and key == "file" and "driver" not in tree and "filename" in tree:
            tree = {"driver": "file", **tree}  # QEMU's own default: bdrv_find_protocol, block.c
        return self.node(tree, place)

    def _format(self, tree: Node, place: Place, bottom: int) -> None:
        """Hold what is said of a format node against the header of the file below, and record it."""
        if bottom == NO_FILE:
            if not tree.get("driver") and isinstance(tree.get("file"), dict):
                below = cast("Node", tree["file"])
                if below.get("driver") not in ("null-co", "null-aio"):
                    raise no_format(place, "the disk", "raw")
                tree["driver"] = "raw"
            return
        disk = self.draft.disks[bottom]
        if not tree.get("driver"):
            tree["driver"] = self._find_format(disk, place)
        self.draft.disks[bottom] = disk.replace(format=str(tree["driver"]))
        if not disk.facts.unread:
            check_header(self.draft, tree, place, disk.facts)
        if tree["driver"] == "qcow2" and "backing" not in tree:
            tree["backing"] = None

    def _find_format(self, disk: DiskFile, place: Place) -> str:
        """Return the format of an image where the command line does not say it."""
        allowed = self.draft.allowed.probe_format
        if place.plain and disk.facts.magic not in FORMATS:
            if place.plain == "pflash":
                self.draft.note(place.word, f"{disk.path} is mapped as it is: format=raw")
            return "raw"
        if allowed and disk.path in self.draft.formats:
            return self.draft.formats[disk.path]
        if not allowed:
            raise no_format(place, disk.path, FORMATS.get(disk.facts.magic, "raw"))
        self.draft.unknown_formats.append(disk.replace(format=""))
        return "raw"

    # Nodes that are at the bottom

    def _file(self, tree: Node, place: Place) -> tuple[Node, int]:
        word = place.word
        name = tree.get("filename")
        if not isinstance(name, str):
            raise error(word, f"{place.prefix}filename= is missing", fix="name the file")
        if name.startswith(FDSET):
            number = name.removeprefix(FDSET)
            if not number.isdecimal() or int(number) >= SET_BASE:
                raise error(word, f"{name} is no set of yours", fix=f"-add-fd with a set below {SET_BASE}")
            return tree, NO_FILE
        path = self.draft.path(word, name)
        facts = self.draft.require(word, path, ("file", "block"))
        step = self.draft.file(
            word, path, role=place.role, access="rw" if place.writable else "ro", kinds=("file", "block")
        )
        disk = DiskFile(role=step.role, path=path, format="raw", writable=place.writable, facts=facts)
        self.draft.disks.append(disk)
        fdset = self.draft.fdset(step.number)
        if place.writable and "incoming" in self.draft.seen:
            # Until the state is there QEMU has the image read-only, and opens it anew to write (BDRV_O_INACTIVE).
            reading = self.draft.file(word, path, role=f"{step.role}-ro", access="ro", kinds=("file", "block"))
            self.draft.emit("-add-fd", f"fd={reading.number},set={SET_BASE + step.number}", dry=())
        made = {
            **tree,
            # QEMU refuses each of the two for what the other is for (block/file-posix.c).
            "driver": "host_device" if facts.kind == "block" else "file",
            "filename": fdset,
            "read-only": not place.writable,
            # With it QEMU opens twice, with different flags: each needs a descriptor of its own.
            "auto-read-only": False,
            # "auto" turns itself off where /dev/null cannot be opened.
            "locking": "on",
        }
        return made, len(self.draft.disks) - 1

    def _nbd(self, tree: Node, place: Place) -> Node:
        """Return the node with its connection made by the toolstack, which QEMU takes as it is."""
        word = place.word
        result = {key: value for key, value in tree.items() if key not in ("host", "port", "path")}
        server = _nbd_server(tree)
        kind = server.get("type")
        role = place.role
        if kind == "fd":
            number = self.draft.inherited(word, str(server.get("str", "")), role=role)
        elif kind == "unix" and not _true(server.get("abstract")):
            path = self.draft.path(word, str(server.get("path", "")))
            self.draft.require(word, path, ("socket",))
            number = self.draft.number(word)
            self.draft.open(ConnectUnix(role=self.draft.role(role), number=number, path=path))
        elif kind == "inet":
            number = self._connect_tcp(word, server, role)
            if "tls-creds" in tree:
                result.setdefault("tls-hostname", server.get("host"))
        else:
            raise error(word, f"an NBD server of type {kind!r}", fix="have it listen on a UNIX socket, or on TCP")
        for key in ("reconnect-delay", "open-timeout"):
            result.pop(key, None)
        self.draft.note(
            word, "the NBD connection is made once: QEMU cannot make it again, and has I/O errors when it ends"
        )
        return {**result, "server": {"type": "fd", "str": str(number)}}

    def _connect_tcp(self, word: Word, server: Node, role: str) -> int:
        host, port = str(server.get("host") or "localhost"), str(server.get("port", NBD_PORT))
        if not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise error(word, f"{port!r} is no port", fix="write the number")
        number = self.draft.number(word)
        self.draft.open(ConnectTcp(role=self.draft.role(role), number=number, host=host, port=int(port)))
        return number


def _nbd_server(tree: Node) -> Node:
    """Return where an NBD server is, from ``server`` or from the older ``path``, ``host`` and ``port``."""
    if isinstance(tree.get("server"), dict):
        return cast("Node", tree["server"])
    have: Node = {key: tree[key] for key in ("host", "port", "path") if key in tree}
    return {"type": "unix" if "path" in have else "inet", **have}


def children(driver: str, tree: Node) -> Iterator[tuple[str, object]]:
    """Yield the nodes below one, each a tree or the name of another node; the key of a list's has its number."""
    for key in CHILDREN.get(driver, () if driver in (*PROTOCOLS, *REFUSED) else ("file", "backing")):
        child = tree.get(key)
        if isinstance(child, list):
            for number, item in enumerate(cast("list[object]", child)):
                yield f"{key}.{number}", item
        elif child is not None and child != "":
            yield key, child


def demands(trees: list[tuple[Node, bool]]) -> dict[str, bool]:
    """Return for each node that another refers to whether it has to be writable.

    A node that is only read through is opened read-only, whatever auto-read-only would come to.

    Args:
        trees: In the order of the command line, where a node comes before those that refer to it; whether each is
            writable if it does not say so.
    """
    found: dict[str, bool] = {}

    def walk(tree: Node, inherited: bool) -> None:
        writable = not _true(tree["read-only"]) if "read-only" in tree else inherited
        for key, child in children(str(tree.get("driver", "")), tree):
            writes = writable and key != "backing"
            if isinstance(child, dict):
                walk(cast("Node", child), writes)
            else:
                found[str(child)] = found.get(str(child), False) or writes

    for tree, writable in reversed(trees):
        walk(tree, writable and found.get(str(tree.get("node-name", "")), True))
    return found


def named(tree: Node) -> Iterator[str]:
    """Yield the names that nodes below one have."""
    for _, child in children(str(tree.get("driver", "")), tree):
        if isinstance(child, dict):
            below = cast("Node", child)
            if "node-name" in below:
                yield str(below["node-name"])
            yield from named(below)


def _put(tree: Node, key: str, made: object) -> None:
    name, _, number = key.partition(".")
    if number:
        tree[name] = [made if str(at) == number else item for at, item in enumerate(tree[name])]
    else:
        tree[name] = made


def _true(value: object) -> bool:
    return is_on(value) if isinstance(value, str) else bool(value)


def fit_role(name: str) -> bool:
    """Tell whether a name is one that QEMU takes for a node or a drive. Source: util/id.c, id_wellformed, QEMU 7.2."""
    plain = name.replace("-", "").replace(".", "").replace("_", "")
    return name[:1].isalpha() and plain.isascii() and plain.isalnum()
