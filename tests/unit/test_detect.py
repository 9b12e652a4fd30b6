# SPDX-License-Identifier: Apache-2.0
"""Facts of the host, from real files and from images that qemu-img or an attacker made."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from depriv.cgroup import find_cgroup
from depriv.config import Disk, Domain, Layer
from depriv.detect import device_number, find_program, look, look_at, root_layout

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img here")


def test_file_is_told_by_device_inode_and_size(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    found = look_at(str(path))
    have = path.stat()
    assert (found.kind, found.dev, found.ino, found.size, found.magic) == ("file", have.st_dev, have.st_ino, 4096, "")


def test_what_is_no_file_is_told_apart_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it for reading would wait for ever
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
    wanted = {
        "fifo": "fifo",
        "folder": "directory",
        "link": "symlink",
        "dangling": "symlink",
        "socket": "socket",
        "none": "missing",
        "none/below": "missing",
        "file/below": "unreadable",
        "file": "file",
    }
    assert {name: look_at(str(tmp_path / name)).kind for name in wanted} == wanted
    assert look_at("/dev/null").kind == "char"
    assert look_at(str(tmp_path / "link")).detail == str(tmp_path / "folder")
    assert "Not a directory" in look_at(str(tmp_path / "file" / "below")).detail


def test_name_that_is_too_long_is_unreadable() -> None:
    assert look_at("/" + "x" * 300).kind == "unreadable"


@pytest.mark.root
def test_file_that_only_root_may_read_is_known_from_outside_to_others() -> None:
    """A plan needs no root: size and kind can be seen, the header cannot."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "secret")
        Path(path).write_bytes(b"QFI\xfb" + bytes(600))
        os.chmod(path, 0o600)
        assert look_at(path).magic == "qcow2"
        child = os.fork()
        if child == 0:
            os.setresuid(1000, 1000, 1000)
            facts = look_at(path)
            seen = (facts.kind, facts.size, facts.unread, facts.magic) == ("file", 604, True, "")
            os._exit(0 if seen else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("start", "magic"),
    [
        (b"QFI\xfb\x00\x00\x00\x01", "qcow"),
        (b"KDMV", "vmdk"),
        (b"conectix", "vhd"),
        (b"vhdxfile", "vhdx"),
        (b"QED\x00", "qed"),
        (b"LUKS\xba\xbe", "luks"),
        (b"\x7fELF", "elf"),
        (b"hello", ""),
        (b"", ""),
        (bytes(0x202) + b"HdrS", "bzimage"),
        (bytes(0x203) + b"HdrS", ""),
    ],
)
def test_formats_are_known_by_their_first_bytes(tmp_path: Path, start: bytes, magic: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(start.ljust(1024, b"\0"))
    assert look_at(str(path)).magic == magic


def qemu_img(path: Path, *options: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "3M"], check=True)


@needs_qemu_img
def test_qcow2_header_is_read_as_qemu_img_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    for options, cluster in (((), 65536), (("-o", "compat=0.10"), 65536), (("-o", "cluster_size=4096"), 4096)):
        qemu_img(path, *options)
        found = look_at(str(path))
        assert (found.magic, found.virtual_size, found.cluster_size) == ("qcow2", 3 << 20, cluster)
        assert (found.backing, found.data_file, found.encrypted) == ("", False, False)


@needs_qemu_img
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_qcow2_backing_file_is_read(tmp_path: Path, compat: str) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(bytes(512))
    qemu_img(top, "-o", f"compat={compat}", "-b", str(base), "-F", "raw")
    assert look_at(str(top)).backing == str(base)


@needs_qemu_img
def test_qcow2_data_file_and_encryption_are_noticed(tmp_path: Path) -> None:
    data, secret = tmp_path / "data", tmp_path / "secret"
    qemu_img(data, "-o", f"data_file={tmp_path}/raw")
    assert look_at(str(data)).data_file
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu_img(secret, "--object", "secret,id=s,data=x", "-o", options)
    assert look_at(str(secret)).encrypted


def header(**fields: int) -> bytes:
    """Return a qcow2 header of version 3 that says what the fields say. Source: docs/interop/qcow2.txt, QEMU 7.2."""
    values = {"version": 3, "at": 0, "length": 0, "bits": 16, "size": 1 << 20, "crypt": 0, "flags": 0} | fields
    head = b"QFI\xfb" + struct.pack(
        ">IQIIQI", *(values[n] for n in ("version", "at", "length", "bits", "size", "crypt"))
    )
    return (head.ljust(72, b"\0") + struct.pack(">Q", values["flags"])).ljust(100, b"\0") + struct.pack(">I", 104)


def test_backing_file_that_is_named_out_of_sight_is_still_one(tmp_path: Path) -> None:
    path = tmp_path / "evil"
    for at, length in ((1 << 40, 10), (104, 1 << 30), (1, 0)):
        path.write_bytes(header(at=at, length=length).ljust(4096, b"\0"))
        assert look_at(str(path)).backing, (at, length)


def test_data_file_by_flag_alone_or_by_extension_alone_is_one(tmp_path: Path) -> None:
    path = tmp_path / "evil"
    path.write_bytes(header(flags=4).ljust(4096, b"\0"))
    assert look_at(str(path)).data_file
    path.write_bytes((header() + struct.pack(">II", 0x44415441, 4) + b"/etc").ljust(4096, b"\0"))
    assert look_at(str(path)).data_file
    # Behind another extension, whose length is not a multiple of eight.
    other = struct.pack(">II", 0x6803F857, 3) + b"abc".ljust(8, b"\0")
    path.write_bytes((header() + other + struct.pack(">II", 0x44415441, 4) + b"/etc").ljust(4096, b"\0"))
    assert look_at(str(path)).data_file


def test_header_that_is_cut_off_is_no_qcow2(tmp_path: Path) -> None:
    path = tmp_path / "short"
    for length in (4, 20, 72, 103):
        path.write_bytes(header()[:length])
        assert look_at(str(path)).magic == ""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(noise=st.binary(max_size=300), start=st.sampled_from([b"QFI\xfb", b"QFI\xfb\0\0\0\3", b"QFI\xfb\0\0\0\2", b""]))
def test_no_header_makes_it_stumble(tmp_path: Path, noise: bytes, start: bytes) -> None:
    path = tmp_path / "noise"
    path.write_bytes(start + noise)
    found = look_at(str(path))
    assert found.kind == "file"
    assert found.cluster_size <= 1 << 30
    assert len(found.backing) < 8192


def test_looking_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(header().ljust(4096, b"\0"))
    before = (path.read_bytes(), path.stat().st_mtime_ns, sorted(os.listdir("/proc/self/fd")))
    look_at(str(path))
    assert (path.read_bytes(), path.stat().st_mtime_ns, sorted(os.listdir("/proc/self/fd"))) == before


def test_every_file_that_a_configuration_names_is_looked_at_once(tmp_path: Path) -> None:
    disk = Disk(vdev="xvda", target="/none/a", format="qcow2", chain=(Layer(target="/none/b", format="raw"),))
    config = Domain(name="x", kernel="/none/k", ramdisk="/none/r", disks=(disk, disk.replace(vdev="xvdb")))
    host = look(config, domid=7, holdings=(), state_dir=str(tmp_path), cache_dir="/c")
    assert [facts.path for facts in host.files] == ["/none/k", "/none/r", "/none/a", "/none/b"]
    assert {facts.kind for facts in host.files} == {"missing"}
    assert (host.domid, host.state_dir, host.cache_dir) == (7, str(tmp_path), "/c")
    assert host.memory_mib > 0
    assert os.listdir(tmp_path) == []


def test_program_is_the_file_behind_all_links(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(sys.executable)
    found = find_program(str(link))
    real = os.path.realpath(sys.executable)
    assert (found.path, found.problem, found.ino) == (real, "", os.stat(real).st_ino)


def test_what_is_no_program_is_said_to_be_none(tmp_path: Path) -> None:
    script, data = tmp_path / "script", tmp_path / "data"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    data.write_bytes(b"\x7fELF")
    empty = tmp_path / "empty"
    empty.touch(mode=0o755)
    assert "there is no " in find_program(str(tmp_path / "none")).problem
    assert "a script" in find_program(str(script)).problem
    assert "a script or data" in find_program(str(empty)).problem
    assert "not an executable file" in find_program(str(data)).problem
    assert "Is a directory" in find_program(str(tmp_path)).problem


def test_root_has_the_folders_that_a_program_needs_and_the_hosts_links() -> None:
    dirs, links = root_layout("/usr/bin/qemu-system-x86_64")
    assert "usr" in dirs
    for name in ("lib", "lib64"):
        if os.path.islink(f"/{name}"):
            assert (name, os.readlink(f"/{name}")) in links
        else:
            assert (name in dirs) == os.path.isdir(f"/{name}")
    assert root_layout("/opt/qemu/bin/qemu")[0][:1] == (("opt",) if os.path.isdir("/opt") else dirs[:1])


def test_device_number_is_that_of_a_character_device_or_none(tmp_path: Path) -> None:
    assert device_number("/dev/null") == (1, 3)
    assert device_number(str(tmp_path)) == (0, 0)
    assert device_number("/none") == (0, 0)
    (tmp_path / "link").symlink_to("/dev/null")
    assert device_number(str(tmp_path / "link")) == (0, 0)


def test_cgroups_are_made_where_a_hierarchy_is_mounted() -> None:
    folder, version = find_cgroup()
    assert (folder != "") == (version in (1, 2))
    if folder:
        assert os.path.exists(f"{folder}/cgroup.procs")
