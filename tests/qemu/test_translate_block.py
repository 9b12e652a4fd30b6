# SPDX-License-Identifier: Apache-2.0
"""The disks of a translated command line, as the real QEMU takes them: each descriptor by its number, no path."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.host import need

from depriv.detect import look_at
from depriv.openings import ConnectUnix
from depriv.qemu.block_nodes import CHILDREN, PROTOCOLS
from depriv.qemu.block_options import BOOLEANS, NUMBERS
from depriv.qemu.draft import Allowed, Request
from depriv.qemu.translate import translate
from depriv.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.qemu
QEMU = shutil.which("qemu-system-x86_64") or ""
LIMIT_S = 60
MIB = 1 << 20


class Answers(Record):
    """What one QEMU had to say."""

    status: int
    err: str
    out: str  # what is no JSON: qemu-io's report
    returns: list[Any]

    def drives(self) -> dict[str, tuple[bool, str]]:
        """Return drive or device -> is it read-only, which driver."""
        found: dict[str, tuple[bool, str]] = {}
        for block in self.returns[1]:
            if "inserted" in block:
                found[block["device"] or block["qdev"]] = (block["inserted"]["ro"], block["inserted"]["drv"])
        return found


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    need(bool(QEMU), what="qemu")
    need(shutil.which("qemu-img") is not None, what="qemu-img")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images, made once."""
    made = tmp_path_factory.mktemp("images")
    for name, size in (("a.raw", 4 * MIB), ("floppy.img", 1440 * 1024), ("code.fd", MIB), ("vars.fd", MIB)):
        (made / name).write_bytes(b"A" * size)
    _img(made, "create", "-f", "qcow2", "b.qcow2", "4M")
    _img(made, "create", "-f", "qcow2", "-b", "a.raw", "-F", "raw", "mid.qcow2")
    _img(made, "create", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2")
    (made / "flat").write_bytes(bytes(4 * MIB))
    _img(made, "create", "-f", "qcow2", "-o", "data_file=flat,data_file_raw=on", "split.qcow2", "4M")
    keys = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10"
    _img(made, "create", "-f", "qcow2", "--object", "secret,id=k,data=geheim", "-o", keys, "locked.qcow2", "4M")
    return made


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """Return a folder of images of the test's own."""
    return shutil.copytree(template, tmp_path / "images")


def _img(folder: Path, *words: str) -> None:
    subprocess.run(["qemu-img", words[0], "-q", *words[1:]], cwd=folder, check=True, timeout=LIMIT_S)


def _translate(folder: Path, *words: str, formats: dict[str, str] | None = None) -> Request:
    allowed = Allowed(probe_format=formats is not None)
    return translate(("-nodefaults", *words), look=look_at, allowed=allowed, cwd=str(folder), formats=formats)


def _run(request: Request, *commands: str, dry: bool = False) -> Answers:
    """Start QEMU on a request with descriptors that we open, ask it, end it; ``commands`` are of the human monitor."""
    with contextlib.ExitStack() as stack:
        argv = list(request.dry if dry else request.argv)
        fds: list[int] = []
        opened = {} if dry else {step.number: _open(step.path, step.access) for step in request.files}
        for opening in () if dry else request.openings:
            assert isinstance(opening, ConnectUnix)
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(opening.path)
            opened[opening.number] = os.dup(connection.fileno())
        for fd in opened.values():
            stack.callback(os.close, fd)
            fds.append(fd)
        # Number N of a plan may be in use in this process: here each has whatever number it got. All at once: one may
        # have got the number that the plan has for another.
        argv = [
            _NUMBER.sub(lambda found: found[1] + str(opened.get(int(found[2]), found[2])) + found[3], word)
            for word in argv
        ]
        asked: list[dict[str, Any]] = [{"execute": "qmp_capabilities"}, {"execute": "query-block"}]
        asked += [{"execute": "human-monitor-command", "arguments": {"command-line": text}} for text in commands]
        lines = "\n".join(map(json.dumps, [*asked, {"execute": "quit"}]))
        done = subprocess.run(
            [QEMU, "-S", "-display", "none", "-no-user-config", "-accel", "tcg", *argv, "-qmp", "stdio"],
            input=lines, capture_output=True, text=True, pass_fds=fds, timeout=LIMIT_S, check=False, cwd="/",
        )  # fmt: skip
    lines_out = done.stdout.splitlines()
    replies = [json.loads(line) for line in lines_out if line.startswith("{")]
    return Answers(
        status=done.returncode,
        err=done.stderr,
        out="\n".join(line for line in lines_out if not line.startswith("{")),
        returns=[line["return"] for line in replies if "return" in line],
    )


_NUMBER = re.compile(r'(\bfd=|"str":")(\d+)(,|")')


def _open(path: str, access: str) -> int:
    return os.open(path, os.O_CLOEXEC | (os.O_RDWR if access == "rw" else os.O_RDONLY))


_WORDS: dict[str, tuple[str, dict[str, tuple[bool, str]]]] = {
    "ide": ("-drive file=a.raw,format=raw,if=ide", {"ide0-hd0": (False, "raw")}),
    "default": ("-drive file=b.qcow2,format=qcow2", {"ide0-hd0": (False, "qcow2")}),
    "virtio": ("-drive file=b.qcow2,format=qcow2,if=virtio,readonly=on", {"virtio0": (True, "qcow2")}),
    "direct": ("-drive file=a.raw,format=raw,if=virtio,cache=none,aio=native", {"virtio0": (False, "raw")}),
    "uring": ("-drive file=a.raw,format=raw,if=virtio,cache=directsync,aio=io_uring", {"virtio0": (False, "raw")}),
    "unsafe": ("-drive file=a.raw,format=raw,if=virtio,cache=unsafe", {"virtio0": (False, "raw")}),
    "options": (
        (
            "-drive file=b.qcow2,format=qcow2,if=none,id=x,lazy-refcounts=on,l2-cache-size=1M,discard=unmap,"
            "detect-zeroes=unmap,werror=stop,rerror=stop,throttling.iops-total=100,copy-on-read=on,node-name=n"
        ),
        {"x": (False, "qcow2")},
    ),
    "floppy": ("-drive file=floppy.img,format=raw,if=floppy", {"floppy0": (False, "raw")}),
    "pflash": (
        "-drive if=pflash,format=raw,readonly=on,file=code.fd -drive if=pflash,format=raw,file=vars.fd",
        {"pflash0": (True, "raw"), "pflash1": (False, "raw")},
    ),
    "short pflash": ("-pflash code.fd", {"pflash0": (False, "raw")}),
    "cdrom": ("-cdrom a.raw", {"ide1-cd0": (True, "raw")}),
    "scsi": (
        "-device virtio-scsi-pci -drive file=a.raw,format=raw,if=none,id=s -device scsi-hd,drive=s",
        {"s": (False, "raw")},
    ),
    "chain": (
        (
            "-drive file=top.qcow2,format=qcow2,if=virtio,backing.driver=qcow2,backing.file.filename=mid.qcow2,"
            "backing.backing.driver=raw,backing.backing.file.filename=a.raw"
        ),
        {"virtio0": (False, "qcow2")},
    ),
    "json": (
        'file=json:{"driver":"qcow2",,"file":{"driver":"file",,"filename":"b.qcow2"}}',
        {"virtio0": (True, "qcow2")},
    ),
    "data file": (
        "-drive file=split.qcow2,format=qcow2,if=virtio,data-file.driver=file,data-file.filename=flat",
        {"virtio0": (False, "qcow2")},
    ),
    "luks": (
        (
            "-object secret,id=k,data=geheim "
            "-drive file=locked.qcow2,format=qcow2,if=virtio,encrypt.format=luks,encrypt.key-secret=k"
        ),
        {"virtio0": (False, "qcow2")},
    ),
    "part": ("-drive file=a.raw,format=raw,offset=512,size=1M,if=virtio", {"virtio0": (False, "raw")}),
    "null": ("-drive file=null-co://,format=raw,if=virtio", {"virtio0": (False, "raw")}),
    "blkdebug": ("-drive file=blkdebug::a.raw,format=raw,if=virtio", {"virtio0": (False, "raw")}),
    "libvirt": (
        (
            "-blockdev driver=file,node-name=s,filename=a.raw,auto-read-only=on,discard=unmap "
            "-blockdev raw,node-name=f,read-only=on,file=s,cache.direct=on,cache.no-flush=off "
            "-drive file=top.qcow2,format=qcow2,if=none,id=t,backing.driver=qcow2,backing.file.filename=mid.qcow2,"
            "backing.backing=f -device virtio-blk-pci,drive=t"
        ),
        {"t": (False, "qcow2")},
    ),
    "filters": (
        (
            "-object throttle-group,id=g,x-iops-total=100 "
            "-blockdev file,node-name=p,filename=b.qcow2 "
            "-blockdev throttle,node-name=t,throttle-group=g,file=p "
            "-blockdev qcow2,node-name=q,file=t,lazy-refcounts=on,refcount-cache-size=1M "
            "-blockdev copy-on-read,node-name=c,file=q "
            "-device virtio-blk-pci,id=v,drive=c"
        ),
        {"/machine/peripheral/v/virtio-backend": (False, "copy-on-read")},
    ),
    "quorum": (
        (
            "-blockdev quorum,node-name=q,vote-threshold=1,rewrite-corrupted=off,children.0.driver=raw,"
            "children.0.file.driver=file,children.0.file.filename=a.raw,children.1.driver=qcow2,"
            "children.1.file.driver=file,children.1.file.filename=b.qcow2 -device virtio-blk-pci,id=v,drive=q"
        ),
        {"/machine/peripheral/v/virtio-backend": (False, "quorum")},
    ),
    "empty": ("-drive if=ide,media=cdrom -drive if=none,id=cd0,media=cdrom", {}),
}


def _words(name: str) -> tuple[list[str], dict[str, tuple[bool, str]]]:
    text, expected = _WORDS[name]
    if name == "json":
        return ["-drive", f"{text},if=virtio,readonly=on"], expected
    return text.split(" "), expected


@pytest.mark.parametrize("name", _WORDS)
def test_qemu_takes_the_descriptors_and_sees_the_disks(folder: Path, name: str) -> None:
    words, expected = _words(name)
    answers = _run(_translate(folder, *words))
    assert (answers.status, answers.err) == (0, "")
    assert answers.drives() == expected
    for block in answers.returns[1]:
        assert not block.get("inserted", {}).get("cache", {}).get("direct")
        assert str(folder) not in json.dumps(block)


@pytest.mark.parametrize("name", _WORDS)
def test_the_dry_run_has_the_same_drives_and_not_one_descriptor(folder: Path, name: str) -> None:
    words, expected = _words(name)
    answers = _run(_translate(folder, *words), dry=True)
    assert (answers.status, answers.err) == (0, "")
    have = {device: readonly for device, (readonly, _) in answers.drives().items()}
    assert have == {device: readonly for device, (readonly, _) in expected.items()}


def test_a_probed_first_disk_is_the_first_ide_disk(folder: Path) -> None:
    image = folder / "b.qcow2"
    answers = _run(_translate(folder, str(image), formats={str(image): "qcow2"}))
    assert answers.drives() == {"ide0-hd0": (False, "qcow2")}


def test_the_guest_reads_the_lowest_layer_and_writes_the_highest(folder: Path) -> None:
    words, _ = _words("chain")
    before = {name: (folder / name).read_bytes() for name in ("a.raw", "mid.qcow2")}
    pattern = 'qemu-io virtio0 "read -P 0x41 0 64k"'
    answers = _run(_translate(folder, *words), pattern, 'qemu-io virtio0 "write -P 0x42 0 4k"')
    assert answers.status == 0
    assert "read 65536/65536" in answers.out
    assert "failed" not in answers.out
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert b"B" * 4096 in (folder / "top.qcow2").read_bytes()


def test_a_read_only_drive_is_not_written(folder: Path) -> None:
    request = _translate(folder, "-drive", "file=a.raw,format=raw,if=virtio,readonly=on")
    answers = _run(request, 'qemu-io virtio0 "write -P 0x42 0 4k"')
    assert answers.status == 0
    assert (folder / "a.raw").read_bytes() == b"A" * 4 * MIB


def test_an_image_that_another_qemu_writes_is_locked(folder: Path) -> None:
    request = _translate(folder, "-drive", "file=a.raw,format=raw,if=virtio")
    words = ["-S", "-machine", "none", "-display", "none", "-qmp", "stdio"]
    image = f"driver=file,node-name=f,filename={folder}/a.raw,locking=on"
    other = subprocess.Popen([QEMU, *words, "-blockdev", image, "-blockdev", "raw,file=f,node-name=r,force-share=off"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    with other:
        assert other.stdout is not None
        assert b"QMP" in other.stdout.readline()
        # Nothing writes in it yet: it holds a lock only against those who would not share.
        export = {"type": "nbd", "id": "e", "node-name": "r", "writable": True}
        server = {"addr": {"type": "unix", "data": {"path": f"{folder}/nbd.sock"}}}
        assert other.stdin is not None
        for name, arguments in (("qmp_capabilities", {}), ("nbd-server-start", server), ("block-export-add", export)):
            other.stdin.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
            other.stdin.flush()
            assert b"return" in other.stdout.readline()
        answers = _run(request)
        other.kill()
    assert answers.status == 1
    assert "lock" in answers.err


@contextlib.contextmanager
def _nbd_server(folder: Path) -> Iterator[Path]:
    path = folder / "n.sock"
    command = ["qemu-nbd", f"--socket={path}", "--format=raw", "--export-name=e", "--persistent", str(folder / "a.raw")]
    with subprocess.Popen(command) as server:
        try:
            end = time.monotonic() + LIMIT_S
            while not path.exists() and time.monotonic() < end:
                time.sleep(0.02)
            yield path
        finally:
            server.terminate()


@pytest.mark.parametrize("words", [
    "-drive file=nbd+unix:///e?socket={},format=raw,if=virtio",
    "-drive file=nbd:unix:{}:exportname=e,format=raw,if=virtio",
    "-blockdev nbd,node-name=n,export=e,server.type=unix,server.path={} -device virtio-blk-pci,drive=n,id=virtio0",
])  # fmt: skip
def test_an_nbd_disk_comes_by_its_connection(folder: Path, words: str) -> None:
    need(shutil.which("qemu-nbd") is not None, what="qemu-nbd")
    drive = "virtio0" if "-drive" in words else "/machine/peripheral/virtio0/virtio-backend"
    io = f"qemu-io {'' if '-drive' in words else '-d '}{drive}"
    with _nbd_server(folder) as path:
        request = _translate(folder, *words.format(path).split(" "))
        answers = _run(request, f'{io} "read -P 0x41 0 64k"', f'{io} "write -P 0x42 0 4k"')
    assert (answers.status, answers.err) == (0, "")
    assert answers.drives().keys() == {drive}
    assert (folder / "a.raw").read_bytes()[:4096] == b"B" * 4096


@pytest.mark.root
def test_a_block_device_comes_by_its_descriptor(folder: Path) -> None:
    need(os.geteuid() == 0, what="root")
    command = ["losetup", "--find", "--show", str(folder / "a.raw")]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    need(made.returncode == 0, what="loop")
    device = made.stdout.strip()
    try:
        request = _translate(folder, "-drive", f"file={device},format=raw,if=virtio", "-cdrom", "floppy.img")
        assert request.files[0].kind == "block"
        answers = _run(request, 'qemu-io virtio0 "read -P 0x41 0 64k"')
        dry = _run(request, dry=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=LIMIT_S)
    assert (answers.status, answers.err) == (0, "")
    assert answers.drives()["virtio0"] == (False, "raw")
    assert dry.status == 0


@pytest.mark.parametrize("kind", ["sd", "scsi", "mtd"])
def test_a_bus_that_the_machine_lacks_is_qemus_to_refuse_before_any_file_is_there(folder: Path, kind: str) -> None:
    answers = _run(_translate(folder, "-drive", f"file=a.raw,format=raw,if={kind}"), dry=True)
    assert answers.status == 1
    assert f"machine type does not support if={kind}" in answers.err


def test_qemus_own_schema_says_which_values_are_no_text() -> None:
    lines = '{"execute":"qmp_capabilities"}\n{"execute":"query-qmp-schema"}\n{"execute":"quit"}\n'
    words = [QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"]
    done = subprocess.run(words, input=lines, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    replies = [json.loads(line).get("return") for line in done.stdout.splitlines()]
    schema = {entry["name"]: entry for reply in replies if isinstance(reply, list) for entry in reply}
    found: dict[str, set[str]] = {}
    _walk(schema, schema["blockdev-add"]["arg-type"], found, set())
    booleans = {name for name, kinds in found.items() if "boolean" in kinds}
    numbers = {name for name, kinds in found.items() if "int" in kinds}
    assert booleans - set(BOOLEANS) <= {
        "tight",
        "abstract",
        "ipv4",
        "ipv6",
        "keep-alive",
        "mptcp",
        "numeric",
    }  # of a socket
    assert numbers - set(NUMBERS) <= {
        "to",
        "page-cache-size",
        "readahead-size",
        "tcp-syn-count",
        "debug",
        "user",
        "group",
    }
    assert not [name for name in (*BOOLEANS, *NUMBERS) if len(found.get(name, {""})) > 1]


def _walk(schema: dict[str, Any], name: str, found: dict[str, set[str]], seen: set[str]) -> None:
    """Collect the members of all block drivers that are not refused, and of what is nested in them: name -> kinds."""
    if name in seen:
        return
    seen.add(name)
    entry = schema[name]
    for member in (*entry.get("members", ()), *entry.get("variants", ())):
        of_driver = "case" in member and "driver" in [each["name"] for each in entry["members"]]
        if "type" not in member or (of_driver and member["case"] not in (*PROTOCOLS, *CHILDREN)):
            continue
        kind = schema[member["type"]]
        if "name" in member:
            found.setdefault(member["name"], set()).add(kind.get("json-type", kind["meta-type"]))
        _walk(schema, member["type"], found, seen)
    if "element-type" in entry:
        _walk(schema, entry["element-type"], found, seen)
