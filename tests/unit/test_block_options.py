# SPDX-License-Identifier: Apache-2.0
"""Disks on QEMU's command line: what is opened for them, what QEMU gets to see, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from depriv.errors import ConfigError
from depriv.host import FileFacts
from depriv.openings import ConnectTcp, ConnectUnix, Inherited
from depriv.qemu.block_names import lists
from depriv.qemu.draft import Allowed, Request
from depriv.qemu.translate import translate
from depriv.qemu.words import Word, parse_list, values

_FILES = {
    "/vm/a.raw": FileFacts(path="/vm/a.raw", kind="file", dev=1, ino=2, size=4096),
    "/vm/a,b.raw": FileFacts(path="/vm/a,b.raw", kind="file", dev=1, ino=3, size=4096),
    "/vm/nbd:x": FileFacts(path="/vm/nbd:x", kind="file", dev=1, ino=12, size=4096),
    "/vm/a.qcow2": FileFacts(
        path="/vm/a.qcow2", kind="file", dev=1, ino=4, size=999, magic="qcow2", virtual_size=1 << 30
    ),
    "/vm/top.qcow2": FileFacts(
        path="/vm/top.qcow2", kind="file", dev=1, ino=5, size=9, magic="qcow2", virtual_size=1 << 20, backing="a.qcow2"
    ),
    "/vm/c,d.qcow2": FileFacts(path="/vm/c,d.qcow2", kind="file", ino=13, magic="qcow2", backing="/vm/a,b.raw"),
    "/vm/outside.qcow2": FileFacts(path="/vm/outside.qcow2", kind="file", ino=6, magic="qcow2", data_file=True),
    "/vm/locked.qcow2": FileFacts(path="/vm/locked.qcow2", kind="file", ino=7, magic="qcow2", encrypted=True),
    "/vm/x.vhd": FileFacts(path="/vm/x.vhd", kind="file", ino=8, magic="vhd", size=512),
    "/vm/code.fd": FileFacts(path="/vm/code.fd", kind="file", ino=9, size=3653632),
    "/vm/hidden.qcow2": FileFacts(path="/vm/hidden.qcow2", kind="file", ino=10, unread=True),
    "/vm/rules": FileFacts(path="/vm/rules", kind="file", ino=11, size=10),
    "/vm/link.raw": FileFacts(path="/vm/link.raw", kind="symlink", detail="/vm/a.raw"),
    "/vm/dir": FileFacts(path="/vm/dir", kind="directory"),
    "/vm/fifo": FileFacts(path="/vm/fifo", kind="fifo"),
    "/dev/sdb": FileFacts(path="/dev/sdb", kind="block", rdev=2064, size=1 << 30),
    "/dev/zero": FileFacts(path="/dev/zero", kind="char", rdev=261),
    "/run/n.sock": FileFacts(path="/run/n.sock", kind="socket"),
}


def _look(path: str) -> FileFacts:
    return _FILES.get(path, FileFacts(path=path, kind="missing"))


def _translate(*words: str, allowed: Allowed | None = None, formats: dict[str, str] | None = None) -> Request:
    return translate(words, look=_look, allowed=allowed or Allowed(), cwd="/vm", formats=formats)


def _options(argv: tuple[str, ...], name: str) -> list[str]:
    return [argv[at + 1] for at, word in enumerate(argv) if word == f"-{name}"]


def _drives(argv: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return each -drive's items, its nodes as "nodes"."""
    result: list[dict[str, Any]] = []
    for text in _options(argv, "drive"):
        items: dict[str, Any] = dict(values(parse_list(Word(name="drive", value=text))))
        if "file" in items:
            items["nodes"] = json.loads(items.pop("file").removeprefix("json:"))
        result.append(items)
    return result


def _nodes(argv: tuple[str, ...]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in _options(argv, "blockdev")]


def _file(number: int, *, driver: str = "file", readonly: bool = False) -> dict[str, Any]:
    return {
        "driver": driver,
        "filename": f"/dev/fdset/{1000 + number}",
        "read-only": readonly,
        "auto-read-only": False,
        "locking": "on",
    }


def _refused(*words: str, allowed: Allowed | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        _translate(*words, allowed=allowed)
    last = max(at for at, word in enumerate(words, start=1) if word.startswith("-"))
    assert f"word {last}, " in str(caught.value)
    assert caught.value.fix
    return caught.value


# What becomes of a disk


def test_a_drive_stays_one_with_a_descriptor_in_place_of_its_file() -> None:
    request = _translate("-drive", "file=a.raw,format=raw,if=virtio,index=3,werror=stop,throttling.iops-total=9")
    (drive,) = _drives(request.argv)
    assert drive == {
        "if": "virtio",
        "index": "3",
        "werror": "stop",
        "throttling.iops-total": "9",
        "auto-read-only": "off",
        "nodes": {"driver": "raw", "file": _file(10)},
    }
    assert _options(request.argv, "add-fd") == ["fd=10,set=1010"]
    (step,) = request.files
    assert (step.path, step.access, step.kind, step.number, step.dev, step.ino) == ("/vm/a.raw", "rw", "file", 10, 1, 2)
    (disk,) = request.disks
    assert (disk.role, disk.path, disk.format, disk.writable) == ("virtio3", "/vm/a.raw", "raw", True)


def test_no_word_names_a_path_of_the_host() -> None:
    request = _translate(
        "-drive", "file=/vm/top.qcow2,format=qcow2,backing.driver=qcow2,backing.file.filename=/vm/a.qcow2",
        "-drive", "file.driver=file,file.filename=a,,b.raw,driver=raw",
        "-cdrom", "/vm/code.fd",
        "-blockdev", "driver=host_device,node-name=d,filename=/dev/sdb",
        "-drive", "file=nbd:unix:/run/n.sock,format=raw",
    )  # fmt: skip
    for name in ("/vm", "top.q", "a.q", "b.raw", "code.fd", "sdb", "/run", "n.sock"):
        assert not [word for word in (*request.argv, *request.dry) if name in word]


def test_a_comma_in_a_name_is_doubled_on_the_way_in() -> None:
    assert _translate("-drive", "file=a,,b.raw,format=raw").files[0].path == "/vm/a,b.raw"


def test_a_qcow2_image_says_that_there_is_nothing_below_it() -> None:
    for words in (
        ("-drive", "file=a.qcow2,format=qcow2"),
        ("-drive", 'file=json:{"driver":"qcow2",,"file.filename":"a.qcow2",,"file.driver":"file"}'),
    ):
        nodes = _drives(_translate(*words).argv)[0]["nodes"]
        assert "backing" in nodes
        assert nodes["backing"] is None
    (node,) = _nodes(_translate("-blockdev", "qcow2,node-name=d,file.driver=file,file.filename=a.qcow2").argv)
    assert node == {"driver": "qcow2", "node-name": "d", "file": _file(10), "backing": None}


def test_layers_below_are_opened_for_reading_alone() -> None:
    request = _translate(
        "-drive", "id=sys,file=top.qcow2,format=qcow2,backing.driver=qcow2,backing.file.filename=a.qcow2"
    )
    assert [(disk.role, disk.format, disk.writable) for disk in request.disks] == [
        ("sys", "qcow2", True),
        ("sys-2", "qcow2", False),
    ]
    assert [step.access for step in request.files] == ["rw", "ro"]
    below = _drives(request.argv)[0]["nodes"]["backing"]
    assert below == {"driver": "qcow2", "file": _file(11, readonly=True), "backing": None}


@pytest.mark.parametrize("word", ["readonly=on", "read-only=on", "readonly", "media=cdrom"])
def test_a_read_only_drive_gets_a_read_only_descriptor(word: str) -> None:
    request = _translate("-drive", f"file=a.raw,format=raw,{word}")
    assert [step.access for step in request.files] == ["ro"]
    assert not request.disks[0].writable
    assert _drives(request.argv)[0]["nodes"]["file"] == _file(10, readonly=True)


def test_read_only_inside_json_is_not_lost() -> None:
    # -drive's own default would win over it: blockdev.c, blockdev_init, QEMU 7.2.
    words = 'file=json:{"driver":"raw",,"read-only":true,,"file":{"driver":"file",,"filename":"a.raw"}}'
    request = _translate("-drive", words)
    assert request.files[0].access == "ro"
    assert _drives(request.argv)[0]["readonly"] == "on"


def test_the_callers_own_locking_and_auto_read_only_are_overruled() -> None:
    request = _translate("-drive", "file.filename=a.raw,file.locking=off,file.auto-read-only=on,format=raw")
    assert _drives(request.argv)[0]["nodes"]["file"] == _file(10)
    request = _translate("-blockdev", "file,node-name=f,filename=a.raw,locking=off,auto-read-only=on")
    assert _nodes(request.argv)[0] == {"node-name": "f", **_file(10)}


@pytest.mark.parametrize(
    "given", ["file=/dev/sdb", "file.driver=file,file.filename=/dev/sdb", "file=host_device:/dev/sdb"]
)
def test_a_block_device_is_host_device(given: str) -> None:
    request = _translate("-drive", f"{given},format=raw")
    assert _drives(request.argv)[0]["nodes"]["file"] == _file(10, driver="host_device")
    assert (request.files[0].kind, request.files[0].rdev) == ("block", 2064)


@pytest.mark.parametrize(
    ("option", "items", "role", "access"),
    [
        ("-cdrom", {"index": "2", "media": "cdrom"}, "cdrom", "ro"),
        ("-pflash", {"if": "pflash"}, "pflash0", "rw"),
    ],
)
def test_short_forms_that_are_always_raw(option: str, items: dict[str, str], role: str, access: str) -> None:
    request = _translate(option, "code.fd")
    drive = _drives(request.argv)[0]
    assert drive.pop("nodes")["driver"] == "raw"
    assert drive == {**items, "auto-read-only": "off"}
    assert (request.disks[0].role, request.files[0].access) == (role, access)


def test_a_pflash_image_without_a_format_is_raw_and_this_is_said() -> None:
    request = _translate("-drive", "if=pflash,readonly=on,file=code.fd", "-drive", "if=pflash,file=a.raw,format=raw")
    assert [disk.role for disk in request.disks] == ["pflash0", "pflash1"]
    assert [disk.writable for disk in request.disks] == [False, True]
    assert [note.text for note in request.notes if "mapped as it is" in note.text]


@pytest.mark.parametrize(
    "words", [("-drive", "if=ide,media=cdrom"), ("-drive", "if=none,id=cd0,media=cdrom,readonly=on")]
)
def test_an_empty_drive_stays_empty_in_both_runs(words: tuple[str, ...]) -> None:
    request = _translate(*words)
    assert _options(request.argv, "drive") == [words[1]] == _options(request.dry, "drive")
    assert request.files == ()


def test_a_set_of_the_callers_own_is_left_as_it_is() -> None:
    request = _translate("-drive", "file=/dev/fdset/3,format=raw,if=virtio")
    assert _drives(request.argv) == [
        {"if": "virtio", "nodes": {"driver": "raw", "file": {"driver": "file", "filename": "/dev/fdset/3"}}}
    ]
    assert request.files == request.disks == ()


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("cache=none", {"cache": "writeback"}),
        ("cache=directsync", {"cache": "writethrough"}),
        ("cache.direct=on", {"cache.direct": "off"}),
        ("aio=native", {"aio": "threads"}),
        ("aio=io_uring", {"aio": "threads"}),
    ],
)
def test_o_direct_is_turned_off_and_this_is_said_once(given: str, left: dict[str, str]) -> None:
    request = _translate("-drive", f"file=a.raw,format=raw,{given},file.aio=native")
    assert left.items() <= _drives(request.argv)[0].items()
    assert len([note for note in request.notes if "cache.direct=off" in note.text]) == 1


def test_other_caches_are_left_alone_without_a_note() -> None:
    request = _translate("-drive", "file=a.raw,format=raw,cache=unsafe,aio=threads")
    assert {"cache": "unsafe", "aio": "threads"}.items() <= _drives(request.argv)[0].items()
    assert not [note for note in request.notes if note.key == "drive"]


def test_o_direct_inside_a_graph_is_turned_off_too() -> None:
    file = {"driver": "file", "filename": "a.raw", "aio": "native"}
    whole = {"driver": "raw", "node-name": "d", "cache": {"direct": True, "no-flush": False}, "file": file}
    (node,) = _nodes(_translate("-blockdev", json.dumps(whole)).argv)
    assert node["cache"] == {"direct": False, "no-flush": False}
    assert node["file"]["aio"] == "threads"


# -blockdev


def test_nodes_that_others_name_are_held_against_the_header_of_the_file_below() -> None:
    words = ["-blockdev", "file,node-name=f,filename=top.qcow2", "-blockdev"]
    assert "based on another image" in str(_refused(*words, "qcow2,node-name=d,file=f"))
    request = _translate(
        "-blockdev", "file,node-name=bf,filename=a.qcow2",
        "-blockdev", "qcow2,node-name=b,file=bf,read-only=on",
        *words, "qcow2,node-name=d,file=f,backing=b",
    )  # fmt: skip
    assert [(disk.role, disk.format, disk.writable) for disk in request.disks] == [
        ("bf", "qcow2", False),
        ("f", "qcow2", True),
    ]


@pytest.mark.parametrize("json_form", [True, False])
def test_what_is_only_read_through_is_opened_read_only(json_form: bool) -> None:
    # As libvirt writes it: the file decides by itself, the format above it is read-only.
    file = {"driver": "file", "node-name": "s", "filename": "a.raw", "auto-read-only": True, "discard": "unmap"}
    above = {"driver": "raw", "node-name": "d", "read-only": True, "file": "s"}
    words = [json.dumps(file), json.dumps(above)]
    if not json_form:
        words = ["file,node-name=s,filename=a.raw,auto-read-only=on", "raw,node-name=d,read-only=on,file=s"]
    request = _translate("-blockdev", words[0], "-blockdev", words[1])
    assert request.files[0].access == "ro"
    assert _nodes(request.argv)[0]["read-only"] is True


def test_a_node_that_one_reads_and_another_writes_through_is_writable() -> None:
    request = _translate(
        "-blockdev", "file,node-name=s,filename=a.raw",
        "-blockdev", "raw,node-name=r,read-only=on,file=s",
        "-blockdev", "raw,node-name=w,file=s",
    )  # fmt: skip
    assert request.files[0].access == "rw"


def test_a_node_that_is_only_a_backing_file_is_opened_read_only() -> None:
    request = _translate(
        "-blockdev", "file,node-name=bf,filename=a.qcow2",
        "-blockdev", "qcow2,node-name=b,file=bf,auto-read-only=on",
        "-blockdev", "qcow2,node-name=d,file.driver=file,file.filename=top.qcow2,file.node-name=df,backing=b",
    )  # fmt: skip
    assert [(step.role, step.access) for step in request.files] == [("bf", "ro"), ("df", "rw")]
    below = _nodes(request.argv)[1]
    assert (below["read-only"], below["auto-read-only"]) == (True, False)


def test_a_file_that_says_it_is_writable_is_opened_so_even_as_a_backing_file() -> None:
    request = _translate(
        "-blockdev", "qcow2,node-name=d,file.driver=file,file.filename=top.qcow2,backing.driver=qcow2,"
        "backing.read-only=off,backing.file.driver=file,backing.file.filename=a.qcow2",
    )  # fmt: skip
    assert [step.access for step in request.files] == ["rw", "rw"]


def test_the_dotted_form_becomes_json_with_numbers_and_booleans() -> None:
    (node,) = _nodes(
        _translate(
            "-blockdev",
            "driver=qcow2,node-name=7,lazy-refcounts=on,l2-cache-size=1M,discard=on,cache.no-flush=off,file.driver=file,"
            "file.filename=a.qcow2",
        ).argv
    )
    assert node["lazy-refcounts"] is True
    assert node["l2-cache-size"] == 1 << 20
    assert (node["discard"], node["node-name"]) == ("on", "7")
    assert node["cache"] == {"no-flush": False}


def test_children_are_gone_through_at_any_depth() -> None:
    (node,) = _nodes(
        _translate(
            "-blockdev",
            "quorum,node-name=q,vote-threshold=1,children.0.driver=throttle,children.0.throttle-group=g,"
            "children.0.file.driver=raw,children.0.file.file.driver=file,children.0.file.file.filename=a.raw,"
            "children.1.driver=null-co,children.1.size=4096",
        ).argv
    )
    assert node["children"] == [
        {"driver": "throttle", "throttle-group": "g", "file": {"driver": "raw", "file": _file(10)}},
        {"driver": "null-co", "size": 4096},
    ]


def test_a_lists_members_keep_their_order() -> None:
    assert lists({"children": {str(number): number for number in (2, 0, 10, 1)}}) == {"children": [0, 1, 2, 10]}


def test_blkdebugs_rules_are_a_private_copy() -> None:
    request = _translate("-drive", "file=blkdebug:rules:a.raw,format=raw,id=d")
    (private,) = request.privates
    assert private.source == "/vm/rules"
    file = _drives(request.argv)[0]["nodes"]["file"]
    assert file == {"driver": "blkdebug", "config": private.target, "image": _file(10)}


# NBD


@pytest.mark.parametrize(
    ("name", "export"),
    [
        ("nbd:unix:/run/n.sock:exportname=e", "e"),
        ("nbd+unix:///e%2Cf?socket=/run/n.sock", "e,f"),
        ("nbd:unix:/run/n.sock", None),
    ],
)
def test_an_nbd_server_on_a_unix_socket_is_connected_to_beforehand(name: str, export: str | None) -> None:
    request = _translate("-drive", f"file={name},format=raw,id=d")
    assert request.openings == (ConnectUnix(role="d", number=10, path="/run/n.sock"),)
    node = _drives(request.argv)[0]["nodes"]["file"]
    assert node.get("export") == export
    assert node["server"] == {"type": "fd", "str": "10"}


@pytest.mark.parametrize(
    ("words", "host", "port"),
    [
        ("-drive file=nbd:localhost:1234,format=raw", "localhost", 1234),
        ("-drive file=nbd:[::1]:1234:exportname=x,format=raw", "::1", 1234),
        ("-drive file=nbd://h/x,format=raw", "h", 10809),
        ("-drive file=nbd+tcp://[::1]:7/x,format=raw", "::1", 7),
        ("-drive file.driver=nbd,file.host=h,file.port=7,format=raw", "h", 7),
        ("-blockdev nbd,node-name=n,server.type=inet,server.host=h,server.port=7,reconnect-delay=5", "h", 7),
    ],
)
def test_an_nbd_server_on_tcp_is_connected_to_beforehand(words: str, host: str, port: int) -> None:
    request = _translate(*words.split(" "))
    (opening,) = request.openings
    assert isinstance(opening, ConnectTcp)
    assert (opening.host, opening.port) == (host, port)
    assert "reconnect-delay" not in str(request.argv)
    assert [note for note in request.notes if "made once" in note.text]


def test_an_nbd_connection_that_the_caller_has_is_taken_once() -> None:
    word = "nbd,node-name={},server.type=fd,server.str=7"
    request = _translate("-blockdev", word.format("n"))
    assert request.openings == (Inherited(role="n", number=10, source=7),)
    assert "named twice" in str(_refused("-blockdev", word.format("n"), "-blockdev", word.format("m")).what)


def test_tls_still_knows_the_servers_name() -> None:
    words = "nbd,node-name=n,server.type=inet,server.host=h,server.port=7,tls-creds=t"
    assert _nodes(_translate("-blockdev", words).argv)[0]["tls-hostname"] == "h"


@pytest.mark.parametrize(
    "server",
    ["server.type=vsock,server.cid=1,server.port=1", "server.type=unix,server.path=/run/n.sock,server.abstract=on",
     "server.type=inet,server.host=h,server.port=nbd", "server.type=fd,server.str=name", "path=/vm/a.raw"],
)  # fmt: skip
def test_an_nbd_server_that_cannot_be_connected_to_is_refused(server: str) -> None:
    _refused("-blockdev", f"nbd,node-name=n,{server}")


# The dry run


def test_the_dry_run_has_disks_as_large_as_the_real_ones_and_no_descriptor() -> None:
    request = _translate(
        "-drive", "if=pflash,readonly=on,file=code.fd",
        "-drive", "file=a.qcow2,format=qcow2,if=virtio,id=d,discard=unmap",
        "-blockdev", "raw,node-name=r,size=2M,file.driver=file,file.node-name=f,file.filename=a.raw",
    )  # fmt: skip
    assert "-add-fd" not in request.dry
    assert "fdset" not in str(request.dry)
    flash, virtio = _drives(request.dry)
    assert (flash["nodes"]["size"], flash["readonly"]) == (3653632, "on")
    assert virtio["nodes"] == {"driver": "null-co", "size": 1 << 30, "read-zeroes": True}
    assert (virtio["id"], virtio["discard"]) == ("d", "unmap")
    assert [(node["driver"], node["node-name"], node["size"]) for node in _nodes(request.dry)] == [
        ("null-co", "f", 1 << 20),
        ("null-co", "r", 2 << 20),
    ]


def test_a_list_of_formats_is_no_guest() -> None:
    request = _translate("-drive", "format=help")
    assert request.no_guest
    assert _options(request.argv, "drive") == ["format=help"]


# Formats


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("-drive file=a.raw", "add format=raw"),
        ("-drive file=a.qcow2", "add format=qcow2"),
        ("-drive file=x.vhd", "add format=vpc"),
        ("-drive file=nbd:unix:/run/n.sock", "add format=raw"),
        ("-drive file=/dev/fdset/3", "add format=raw"),
        ("-hdb a.raw", "-drive file=a.raw,format=raw,index=1,media=disk"),
        ("-fda a.raw", "-drive file=a.raw,format=raw,if=floppy,index=0"),
        ("-sd a.raw", "-drive file=a.raw,format=raw,if=sd"),
        ("-mtdblock a.raw", "-drive file=a.raw,format=raw,if=mtd"),
        ("-cdrom a.qcow2", "-drive file=a.qcow2,format=qcow2,index=2,media=cdrom"),
        ("-drive file=top.qcow2,format=qcow2,backing.file.filename=a.qcow2", "add backing.driver=qcow2"),
    ],
)
def test_a_format_that_is_not_given_is_refused_with_what_to_write(words: str, fix: str) -> None:
    error = _refused(*words.split(" "))
    assert "is not given" in error.what
    assert fix in error.fix


def test_a_positional_image_needs_a_format_as_hda_does() -> None:
    with pytest.raises(ConfigError, match=r"word 1, a.raw: the format .* not given") as caught:
        _translate("a.raw")
    assert "-drive file=a.raw,format=raw,index=0,media=disk" in caught.value.fix


def test_an_unknown_format_is_asked_for_where_that_is_allowed() -> None:
    allowed = Allowed(probe_format=True)
    first = _translate("a.qcow2", allowed=allowed)
    assert [(disk.path, disk.format) for disk in first.unknown_formats] == [("/vm/a.qcow2", "")]
    second = _translate("a.qcow2", allowed=allowed, formats={"/vm/a.qcow2": "qcow2"})
    assert second.unknown_formats == ()
    assert [disk.format for disk in second.disks] == ["qcow2"]
    assert _drives(second.argv)[0]["nodes"]["driver"] == "qcow2"


def test_a_probed_format_counts_for_nothing_where_probing_is_not_allowed() -> None:
    with pytest.raises(ConfigError, match="not given"):
        _translate("-hda", "a.qcow2", formats={"/vm/a.qcow2": "raw"})


def test_a_header_that_names_another_image_is_refused_with_the_words_to_add() -> None:
    error = _refused("-drive", "file=top.qcow2,format=qcow2")
    words = error.fix.rpartition(" ")[2]
    assert words == "backing.driver=qcow2,backing.file.driver=file,backing.file.filename=/vm/a.qcow2"
    _translate("-drive", f"file=top.qcow2,format=qcow2,{words}")


def test_the_words_to_add_to_a_json_node_are_json() -> None:
    node: dict[str, Any] = {"driver": "qcow2", "node-name": "d", "file": {"driver": "file", "filename": "top.qcow2"}}
    error = _refused("-blockdev", json.dumps(node))
    added = json.loads("{" + error.fix.partition("add (format as it really is) ")[2] + "}")
    _translate("-blockdev", json.dumps({**node, **added}))


def test_a_comma_in_a_name_is_doubled_in_the_words_to_add() -> None:
    words = _refused("-drive", "file=c,,d.qcow2,format=qcow2").fix.rpartition(" ")[2]
    assert _translate("-drive", f"file=c,,d.qcow2,format=qcow2,{words}").files[1].path == "/vm/a,b.raw"
    assert "file=a,,b.raw,format=raw" in _refused("-hda", "a,b.raw").fix


def test_no_backing_file_although_the_header_names_one_may_be_said_aloud() -> None:
    word = '{"driver":"qcow2","node-name":"d","backing":null,"file":{"driver":"file","filename":"top.qcow2"}}'
    assert _nodes(_translate("-blockdev", word).argv)[0]["backing"] is None


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("-drive file=outside.qcow2,format=qcow2", "data in another file"),
        ("-drive file=locked.qcow2,format=qcow2", "encrypted"),
        ("-drive file=a.raw,format=qcow2", "no qcow2 image"),
        ("-drive file=a.raw,format=luks", "no luks image"),
        ("-drive file=a.raw,format=vmdk", "no vmdk image"),
        ("-blockdev qcow2,node-name=d,file.driver=file,file.filename=a.raw", "no qcow2 image"),
    ],
)
def test_an_image_that_is_not_what_the_words_say_is_refused(words: str, what: str) -> None:
    assert what in str(_refused(*words.split(" ")))


@pytest.mark.parametrize(
    "words",
    [
        "file=outside.qcow2,format=qcow2,data-file.driver=file,data-file.filename=a.raw",
        "file=locked.qcow2,format=qcow2,encrypt.format=luks,encrypt.key-secret=k",
        "file=hidden.qcow2,format=qcow2",
    ],
)
def test_an_image_whose_outside_parts_are_named_passes(words: str) -> None:
    assert _translate("-drive", words).disks[0].format == "qcow2"


def test_a_known_format_used_as_raw_is_noted() -> None:
    assert [note for note in _translate("-drive", "file=a.qcow2,format=raw").notes if "looks like qcow2" in note.text]


# Refused


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("fat:rw:dir", "mcopy"),
        ("vvfat:dir", "mcopy"),
        ("ssh://h/x", "nbdkit"),
        ("http://h/x", "nbdkit"),
        ("https://h/x.iso", "nbdkit"),
        ("ftp://h/x", "nbdkit"),
        ("rbd:pool/x", "rbd map"),
        ("iscsi://h/iqn/0", "iscsiadm"),
        ("gluster://h/v/x", "mount the volume"),
        ("gluster+unix://h/v/x", "mount the volume"),
        ("nfs://h/x", "mount the export"),
        ("nvme://0000:01:00.0/1", "/dev/nvme0n1"),
        ("host_cdrom:/dev/sr0", "driver=host_device,read-only=on"),
        ("unheard:of", "file=./unheard:of"),
        ("nbd:nowhere", "nbd://HOST:PORT"),
        ("nbd+unix:///x", "socket="),
        ("json:[]", '{"key": "value"}'),
        ('json:{"driver":"ssh",,"path":"x"}', "nbdkit"),
    ],
)
def test_a_name_that_reaches_for_the_host_is_refused_with_an_alternative(name: str, instead: str) -> None:
    assert instead in _refused("-drive", f"file={name},format=raw").fix


@pytest.mark.parametrize(
    "driver", ["vvfat", "ssh", "https", "rbd", "gluster", "nfs", "iscsi", "nvme", "host_cdrom", "io_uring", "unheard"]
)
@pytest.mark.parametrize(
    "words",
    [
        ("-drive", "if=virtio,driver={}"),
        ("-drive", "if=virtio,format=raw,file.driver={},file.filename=/etc/shadow"),
        ("-blockdev", "driver={},node-name=n,filename=/etc/shadow"),
        ("-blockdev", '{{"driver":"raw","node-name":"n","file":{{"driver":"{}","dir":"/etc"}}}}'),
        ("-blockdev", "quorum,node-name=q,children.0.driver={}"),
    ],
)
def test_a_driver_that_reaches_for_the_host_is_refused_wherever_it_stands(driver: str, words: tuple[str, str]) -> None:
    error = _refused(words[0], words[1].format(driver))
    assert ("is not known" if driver == "unheard" else f"driver {driver} is refused") in error.what


@pytest.mark.parametrize("path", ["/vm/link.raw", "/vm/dir", "/vm/fifo", "/dev/zero", "/vm/nothing", "/run/n.sock"])
@pytest.mark.parametrize("word", ["-drive file={},format=raw", "-cdrom {}", "-blockdev file,node-name=n,filename={}"])
def test_what_is_no_disk_is_refused(path: str, word: str) -> None:
    assert "cannot use" in _refused(*word.format(path).split(" ")).what


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("-snapshot", "-snapshot: it is refused"),
        ("-drive file=a.raw,format=raw,snapshot=on", "it is refused"),
        ("-drive file=a.raw,format=raw,driver=raw", "are the same"),
        ("-drive file=/dev/fdset/1010,format=raw", "no set of yours"),
        ("-drive file=/dev/fdset/x,format=raw", "no set of yours"),
        ("-drive file.driver=null-co,file.filename=/etc/shadow,format=raw", "no file name"),
        ("-blockdev raw,node-name=n,filename=/etc/shadow", "no file name"),
        ("-blockdev node-name=n,filename=a.raw", "no driver"),
        ("-blockdev raw,node-name=n,file.filename=a.raw", "file.driver= is missing"),
        ("-blockdev file,node-name=n", "filename= is missing"),
        ("-blockdev raw,file=x,file.driver=file", "is a value already"),
        ('-blockdev {"driver":"file"', "no JSON"),
    ],
)
def test_words_that_make_no_sense_or_cannot_be_had_are_refused(words: str, what: str) -> None:
    assert what in str(_refused(*words.split(" ")))


def test_snapshot_off_is_not_refused() -> None:
    assert _translate("-drive", "file=a.raw,format=raw,snapshot=off").files


def test_a_colon_in_a_name_that_is_given_as_one_is_no_protocol() -> None:
    assert _translate("-drive", "file.filename=nbd:x,format=raw").files[0].path == "/vm/nbd:x"
    assert _translate("-drive", "file=./nbd:x,format=raw").files[0].path == "/vm/nbd:x"
    assert _translate("-drive", "file=file:nbd:x,format=raw").files[0].path == "/vm/nbd:x"


def test_two_disks_of_one_name_have_roles_of_their_own() -> None:
    request = _translate("-drive", "file=a.raw,format=raw", "-drive", "file=a.qcow2,format=qcow2", "-blockdev",
                         "file,node-name=drive0,filename=code.fd")  # fmt: skip
    assert [disk.role for disk in request.disks] == ["drive0", "drive1", "drive0-2"]
    assert [step.role for step in request.files] == [disk.role for disk in request.disks]


def test_a_name_and_a_format_that_contradict_each_other_are_refused() -> None:
    error = _refused(
        "-drive", 'file=json:{"driver":"qcow2",,"file.driver":"file",,"file.filename":"a.qcow2"},format=raw'
    )
    assert "another driver" in error.what


def test_a_protocol_named_as_the_drives_driver_takes_its_file() -> None:
    request = _translate("-drive", "file=/dev/sdb,driver=host_device,if=virtio")
    assert _drives(request.argv)[0]["nodes"] == _file(10, driver="host_device")


def test_a_drives_number_counts_drives_alone() -> None:
    request = _translate("-blockdev", "file,node-name=f,filename=code.fd", "-drive", "file=a.raw,format=raw")
    assert [disk.role for disk in request.disks] == ["f", "drive0"]
