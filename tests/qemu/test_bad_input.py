# SPDX-License-Identifier: Apache-2.0
"""What is wrong is said, with its cause and what to do, by the right exit status, and nothing of the host changes."""

from __future__ import annotations

import os
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import CommandLine, config_text, refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.root]

MIB = 1 << 20


def image(path: Path, *options: str, form: str = "qcow2", size: str = "1M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", form, *options, str(path), size], check=True)
    return path


def raw(path: Path, data: bytes = b"x") -> Path:
    path.write_bytes(data.ljust(MIB, b"\0"))
    return path


def spec(path: object, *, form: str = "raw", vdev: str = "xvda", access: str = "rw") -> str:
    return f"format={form},vdev={vdev},access={access},target={path}"


@pytest.mark.parametrize(("kind", "said"), [("pv", "PV"), ("pvh", "PVH")])
def test_guests_that_need_xen_are_told_what_would_run_them(
    depriv: CommandLine, uids: range, tmp_path: Path, kind: str, said: str
) -> None:
    what, cause, fix = refused(depriv, uids, config_text("x", type=kind), status=125, tmp_path=tmp_path)
    assert what == f"x is a {said} guest, and this host does not run Xen"
    assert "talks to the Xen hypervisor" in cause
    assert "xl" in fix
    assert 'type="hvm"' in fix


def missing(folder: Path) -> Path:
    return folder / "none.img"


def below_a_file(folder: Path) -> Path:
    return raw(folder / "file") / "disk.img"


def empty(folder: Path) -> Path:
    (folder / "empty.img").touch()
    return folder / "empty.img"


def symlink(folder: Path) -> Path:
    (folder / "link.img").symlink_to(raw(folder / "real.img"))
    return folder / "link.img"


def dangling(folder: Path) -> Path:
    (folder / "dangling.img").symlink_to(folder / "nowhere")
    return folder / "dangling.img"


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def directory(folder: Path) -> Path:
    (folder / "folder").mkdir()
    return folder / "folder"


def character_device(folder: Path) -> Path:
    os.mknod(folder / "zero", 0o20600, os.makedev(1, 5))
    return folder / "zero"


def unix_socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "socket"))
    return folder / "socket"


@pytest.mark.parametrize(
    ("make", "cause", "fix"),
    [
        (missing, "does not exist", "correct the path"),
        (below_a_file, "Not a directory", "correct the path"),
        (empty, "", "truncate -s "),
        (symlink, "symbolic link to ", "real.img"),
        (dangling, "symbolic link to ", "nowhere"),
        (fifo, "FIFO", "regular file or a block device"),
        (directory, "directory", "name a file in it"),
        (character_device, "character device", "regular file or a block device"),
        (unix_socket, "socket", "regular file or a block device"),
    ],
)
def test_image_that_is_none_is_refused(
    depriv: CommandLine, uids: range, *, tmp_path: Path, make: Callable[[Path], Path], cause: str, fix: str
) -> None:
    path = make(tmp_path)
    for access in ("rw", "ro"):
        what, why, remedy = refused(depriv, uids, config_text("x", spec(path, access=access)), tmp_path=tmp_path)
        assert f"cannot use {path} for xvda" in what
        assert cause in why
        assert fix in remedy


def test_second_bad_disk_is_named_though_the_first_is_good(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    good = spec(raw(tmp_path / "good.img"))
    text = config_text("x", good, spec(tmp_path / "bad.img", vdev="xvdb"))
    what, _, _ = refused(depriv, uids, text, tmp_path=tmp_path)
    assert f"{tmp_path}/bad.img for xvdb" in what


@pytest.mark.parametrize("key", ["kernel", "ramdisk", "firmware_override"])
def test_kernel_ramdisk_and_firmware_have_to_be_files(
    depriv: CommandLine, uids: range, tmp_path: Path, key: str
) -> None:
    keys: dict[str, object] = {"kernel": str(raw(tmp_path / "kernel"))} if key == "ramdisk" else {}
    for path, said in ((tmp_path / "none", "does not exist"), (directory(tmp_path), "directory")):
        _, cause, fix = refused(depriv, uids, config_text("x", **keys, **{key: str(path)}), tmp_path=tmp_path)
        assert said in cause
        assert fix


def test_backing_file_in_a_header_is_refused_and_the_line_shown_is_the_right_one(
    depriv: CommandLine, uids: range, tmp_path: Path
) -> None:
    base = raw(tmp_path / "base.img")
    image(tmp_path / "middle.qcow2", "-b", str(base), "-F", "raw")
    top = image(tmp_path / "top.qcow2", "-b", "middle.qcow2", "-F", "qcow2")
    text = config_text("x", spec(top, form="qcow2"))
    for below in ("'middle.qcow2'", f"'{base}'"):
        what, cause, fix = refused(depriv, uids, text, tmp_path=tmp_path)
        assert "is based on another image, and the configuration does not say so" in what
        assert f"its header names {below}" in cause
        (line,) = [line for line in fix.splitlines() if line.startswith("disk_backing = ")]
        text = "".join(f"{old}\n" for old in text.splitlines() if not old.startswith("disk_backing")) + line + "\n"
    path = tmp_path / "good.cfg"
    path.write_text(text)
    depriv.run("create", str(path))
    depriv.run("audit", "x")


def test_chain_that_ends_before_the_configuration_does_is_refused(
    depriv: CommandLine, uids: range, tmp_path: Path
) -> None:
    alone, other = image(tmp_path / "alone.qcow2"), raw(tmp_path / "other.img")
    below = f"vdev=xvda,format=raw,target={other}"
    text = config_text("x", spec(alone, form="qcow2"), disk_backing=[below])
    what, _, fix = refused(depriv, uids, text, tmp_path=tmp_path)
    assert "stands alone" in what
    assert "disk_backing" in fix


def test_data_file_in_a_header_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    top = image(tmp_path / "top.qcow2", "-o", f"data_file={tmp_path}/data.raw")
    what, cause, fix = refused(depriv, uids, config_text("x", spec(top, form="qcow2")), tmp_path=tmp_path)
    assert "keeps its data in another file" in what
    assert "headers are not followed" in cause
    assert "qemu-img convert" in fix


def test_encrypted_image_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    options = ("--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10")
    top = image(tmp_path / "top.qcow2", *options)
    what, _, fix = refused(depriv, uids, config_text("x", spec(top, form="qcow2")), tmp_path=tmp_path)
    assert "is encrypted" in what
    assert fix


def test_raw_image_called_qcow2_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk.img")
    what, cause, fix = refused(depriv, uids, config_text("x", spec(disk, form="qcow2")), tmp_path=tmp_path)
    assert "is no qcow2 image, as the configuration says" in what
    assert "probably raw" in cause
    assert "qemu-img info" in fix


def test_qcow2_image_used_as_raw_starts_with_a_warning(depriv: CommandLine, tmp_path: Path) -> None:
    top = image(tmp_path / "top.qcow2")
    path = tmp_path / "x.cfg"
    path.write_text(config_text("x", spec(top)))
    assert f"warning: {top} looks like qcow2 and is used as raw" in depriv.run("create", str(path)).stderr
    depriv.run("audit", "x")


@pytest.mark.parametrize(
    ("first", "second", "works"), [("rw", "rw", False), ("rw", "ro", False), ("ro", "rw", False), ("ro", "ro", True)]
)
def test_image_is_written_by_one_domain_or_read_by_many(
    depriv: CommandLine, uids: range, *, tmp_path: Path, first: str, second: str, works: bool
) -> None:
    disk = raw(tmp_path / "disk.img")
    link = tmp_path / "hard.img"
    os.link(disk, link)
    path = tmp_path / "a.cfg"
    path.write_text(config_text("a", spec(disk, access=first)))
    depriv.run("create", str(path))
    if works:
        path.write_text(config_text("b", spec(link, access=second)))
        depriv.run("create", str(path))
        return
    verb = {"rw": "write", "ro": "read"}
    for name in (disk, link):
        what, cause, fix = refused(depriv, uids, config_text("b", spec(name, access=second)), tmp_path=tmp_path)
        assert f"{name} for xvda is in use by domain a" in what
        assert cause == f"domain a {verb[first]}s it, and this one would {verb[second]} it"
        assert "access=ro" in fix


@pytest.mark.parametrize("same", ["name", "hard link"])
def test_one_file_is_not_two_disks_of_which_one_writes(
    depriv: CommandLine, uids: range, tmp_path: Path, same: str
) -> None:
    disk = raw(tmp_path / "disk.img")
    other = disk
    if same == "hard link":
        other = tmp_path / "hard.img"
        os.link(disk, other)
    for one, two in (("rw", "rw"), ("ro", "rw"), ("rw", "ro")):
        text = config_text("x", spec(disk, access=one), spec(other, vdev="xvdb", access=two))
        what, _, fix = refused(depriv, uids, text, tmp_path=tmp_path)
        assert f"{other} for xvdb is in use by disk xvda of this domain" in what
        assert fix


def test_base_of_a_chain_may_not_be_written_as_a_disk(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    base = raw(tmp_path / "base.img")
    top = image(tmp_path / "top.qcow2", "-b", str(base), "-F", "raw")
    backing = [f"vdev=xvda,format=raw,target={base}"]
    text = config_text("x", spec(top, form="qcow2"), spec(base, vdev="xvdb"), disk_backing=backing)
    what, _, _ = refused(depriv, uids, text, tmp_path=tmp_path)
    assert f"{base} for xvdb is in use" in what


def test_two_disks_on_one_vdev_are_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    for second in ("xvda", "hda"):
        one, two = spec(raw(tmp_path / "a.img"), vdev="hda"), spec(raw(tmp_path / "b.img"), vdev="hda")
        if second == "xvda":
            one, two = one.replace("hda", "xvda"), two.replace("hda", "xvda")
        what, _, fix = refused(depriv, uids, config_text("x", one, two), tmp_path=tmp_path)
        assert second in what
        assert fix


@pytest.mark.parametrize("vdev", ["vda0x", "foo", "hde9z", "xvd", "", "../a"])
def test_unknown_vdev_is_refused(depriv: CommandLine, uids: range, tmp_path: Path, vdev: str) -> None:
    text = config_text("x", spec(raw(tmp_path / "disk.img"), vdev=vdev))
    what, _, fix = refused(depriv, uids, text, tmp_path=tmp_path)
    assert "vdev" in what
    assert fix


def test_vdev_that_the_machine_has_no_place_for_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    text = config_text("x", spec(raw(tmp_path / "disk.img"), vdev="hda"), machine="microvm")
    what, _, fix = refused(depriv, uids, text, tmp_path=tmp_path)
    assert "microvm machine has 0 IDE ports" in what
    assert "xvda" in fix


def test_name_in_use_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    path = tmp_path / "a.cfg"
    path.write_text(config_text("twice"))
    depriv.run("create", str(path))
    what, _, fix = refused(depriv, uids, config_text("twice"), tmp_path=tmp_path)
    assert "a domain named 'twice' exists (domid " in what
    assert "depriv destroy twice" in fix


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b", "\x1b[2Jx", "x" * 100, "-x", "é", "a\nb"])
def test_name_that_could_mislead_is_refused(depriv: CommandLine, uids: range, tmp_path: Path, name: str) -> None:
    what, _, fix = refused(depriv, uids, config_text("\0").replace("\0", name), tmp_path=tmp_path)
    assert "\x1b" not in what
    assert fix


@pytest.mark.parametrize(("memory", "said"), [(0, "memory"), (1 << 30, "memory"), (99_999_999_999, "memory")])
def test_memory_that_cannot_be_is_refused(
    depriv: CommandLine, uids: range, tmp_path: Path, memory: int, said: str
) -> None:
    what, _, fix = refused(depriv, uids, config_text("x", memory=memory), tmp_path=tmp_path)
    assert said in what
    assert fix


@pytest.mark.parametrize(
    "words",
    [
        ["-sandbox", "off"],
        ["-runas", "root"],
        ["-chroot", "/"],
        ["-daemonize"],
        ["-S"],
        ["-qmp", "unix:/tmp/x,server"],
        ["-monitor", "stdio"],
        ["-chardev", "file,id=x,path=/etc/passwd"],
        ["-drive", "file=/etc/passwd"],
        ["-netdev", "user,id=n"],
        ["-readconfig", "/etc/passwd"],
        ["-device", "vfio-pci,host=00:00.0"],
        ["--sandbox", "off"],
        ["@/etc/passwd"],
    ],
)
def test_argument_that_would_undo_a_restriction_is_refused(
    depriv: CommandLine, uids: range, tmp_path: Path, words: list[str]
) -> None:
    what, _, fix = refused(depriv, uids, config_text("x", device_model_args=words), tmp_path=tmp_path)
    assert "device_model_args" in what
    assert fix


def test_configuration_that_is_no_configuration_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    for text, said in (("name = ", ""), ("\x7fELF\0\0", ""), ('name = "x"\ndm_restrct = 1\n', "dm_restrct")):
        what, _, _ = refused(depriv, uids, text, tmp_path=tmp_path)
        assert "refused.cfg:" in what
        assert said in what
    for path in (tmp_path, tmp_path / "none.cfg"):
        assert depriv.run("create", str(path), expect=2).stderr.startswith(f"error: cannot read {path}\n")
