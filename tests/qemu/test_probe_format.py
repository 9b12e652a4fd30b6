# SPDX-License-Identifier: Apache-2.0
"""`depriv run --probe-format`: the format that QEMU would guess, told, and held to; a header still leads nowhere."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support import build, guests
from tests.support.guests import CommandLine
from tests.support.host import living
from tests.support.launch import wait_for

from depriv import foreground, imageprobe, lifecycle
from depriv.detect import find_program, look_at
from depriv.errors import ConfigError, JailError
from depriv.identity import tool_domid
from depriv.qemu.draft import Allowed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from depriv.api import Toolstack
    from depriv.qemu.draft import Request

QEMU = ("qemu-system-x86_64", "-display", "none", "-nic", "none", "-m", "32", "-monitor", "none", "-serial", "null")
FORMATS = ("raw", "qcow", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels", "luks")
SECRET = ("--object", "secret,id=key,data=abc")


def image(path: Path, kind: str, *words: str) -> Path:
    extra = (*SECRET, "-o", "key-secret=key,iter-time=10") if kind == "luks" else ()
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, *extra, *words, str(path), "4M"], check=True)
    path.chmod(0o600)
    return path


def understood(*drives: str, cwd: Path) -> Request:
    words = [word for drive in drives for word in ("-drive", drive)]
    return foreground.understand_with(tuple(words), Allowed(probe_format=True), cwd=str(cwd))


@contextmanager
def started(depriv: CommandLine, *words: str, options: tuple[str, ...] = ("--probe-format",)) -> Iterator[str]:
    """Have a guest run in the background, and yield what its start has said."""
    done = depriv.run("run", *options, "--name", "probed", "--", *QEMU, "-daemonize", *words)
    try:
        yield done.stderr
    finally:
        depriv.run("destroy", "probed")


@pytest.mark.parametrize("kind", FORMATS)
def test_guess_is_that_of_qemu_itself(uids: range, tmp_path: Path, kind: str) -> None:
    del uids
    path = image(tmp_path / "disk", kind)
    said = subprocess.run(["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True).stdout
    assert json.loads(said)["format"] == kind == look_at(str(path)).format


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vdi", "vpc", "vmdk"])
def test_guest_runs_on_an_image_whose_format_was_guessed(depriv: CommandLine, tmp_path: Path, kind: str) -> None:
    path = image(tmp_path / "disk", kind)
    with started(depriv, "-drive", f"file={path}") as said:
        assert f"note: {path} looks like {kind}: used as that, if qemu-img says so, too" in said
        (row,) = depriv.rows()
        depriv.run("audit", "probed")
        with open(f"/proc/{row['pid']}/cmdline", encoding="utf-8") as file:
            assert kind in file.read()


def test_one_guess_for_each_image_and_none_where_the_format_is_given(tmp_path: Path) -> None:
    first, second, third = (
        image(tmp_path / name, kind) for name, kind in zip("abc", ("qcow2", "vdi", "qcow2"), strict=True)
    )
    request = understood(f"file={first}", f"file={second}", f"file={third},format=raw", cwd=tmp_path)
    assert [disk.format for disk in request.disks] == ["qcow2", "vdi", "raw"]
    notes = [note.text for note in request.notes if note.key == "probe-format"]
    assert notes == [
        f"{path} looks like {kind}: used as that, if qemu-img says so, too"
        for path, kind in ((first, "qcow2"), (second, "vdi"))
    ]
    assert [facts.path for facts in request.probed] == [str(first), str(second)]


def test_format_is_refused_where_nobody_asked_for_a_guess(depriv: CommandLine, tmp_path: Path) -> None:
    path = image(tmp_path / "disk", "qcow2")
    done = depriv.run("run", "--", *QEMU, "-drive", f"file={path}", expect=2)
    assert "the format of" in done.stderr
    assert "--probe-format" in done.stderr
    assert depriv.rows() == []


def test_image_on_another_one_is_refused_with_the_words_to_write_and_they_work(
    depriv: CommandLine, tmp_path: Path
) -> None:
    image(tmp_path / "base", "qcow2")
    path = image(tmp_path / "top", "qcow2", "-b", str(tmp_path / "base"), "-F", "qcow2")
    done = depriv.run("run", "--probe-format", "--", *QEMU, "-drive", f"file={path}", expect=2)
    assert "is based on another image" in done.stderr
    fix = done.stderr.partition("add (format as it really is) ")[2].split()[0].replace("=raw,", "=qcow2,")
    with started(depriv, "-drive", f"file={path},{fix}"):
        depriv.run("audit", "probed")


def test_raw_disk_into_which_its_guest_wrote_a_header_leads_to_no_other_file(tmp_path: Path) -> None:
    # The attack that formats are given for: next time the disk is opened as what the guest says.
    secret = tmp_path / "shadow"
    secret.write_text("root:x")
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 72, len(str(secret)), 16, 1 << 20, 0, 1, 1 << 16, 1 << 17, 1, 0, 0
    )
    path = tmp_path / "disk"
    path.write_bytes((header + str(secret).encode()).ljust(1 << 20, b"\0"))
    with pytest.raises(ConfigError, match="is based on another image") as caught:
        understood(f"file={path}", cwd=tmp_path)
    assert str(secret) in caught.value.cause


@pytest.mark.usefixtures("unchanged")
def test_command_that_is_killed_while_qemu_img_hangs_leaves_nothing(uids: range, tmp_path: Path) -> None:
    path = image(tmp_path / "disk", "qcow2")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        hangs = build.compiled("evil_img.c", Path(folder), ("hang", ""))
        hangs.chmod(0o755)
        depriv = CommandLine(bind=(str(hangs), "/usr/bin/qemu-img"))
        try:
            command = depriv.start("run", "--probe-format", "--", *QEMU, "-drive", f"file={path}")
            base = uids.start - guests.DOMIDS.start
            tools = range(base + tool_domid(guests.DOMIDS.stop - 1), base + tool_domid(guests.DOMIDS.start) + 1)
            assert wait_for(lambda: len(living(tools)) > 0)  # qemu-img, as the domain's tools run
            command.kill()
            command.communicate()
            assert wait_for(lambda: living(tools) == ())
            depriv.run("gc")
            assert depriv.rows() == []
        finally:
            depriv.close()


@pytest.mark.parametrize("version", [2, 3, 0xFFFFFFFF])
@pytest.mark.parametrize("value", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_header_of_wild_numbers_is_understood_at_once(tmp_path: Path, version: int, value: int) -> None:
    big = value << 32 | value
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, big, value, value, big, 0, value, big, big, value, value, big
    )
    path = tmp_path / "disk"
    path.write_bytes((header + struct.pack(">QQQII", 0, 0, 0, value, value)).ljust(4096, b"\xff"))
    os.truncate(path, 1 << 43)  # sparse: 8 TiB
    begun = time.monotonic()
    facts = look_at(str(path))
    assert (facts.format, len(facts.backing) < 5000) == ("qcow2", True)
    with contextlib.suppress(ConfigError):
        assert [disk.format for disk in understood(f"file={path}", cwd=tmp_path).disks] == ["qcow2"]
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("content", [b"", b"Q", b"QFI\xfb", b"\0" * 511, b"\xff" * 513])
def test_image_with_less_than_a_header_is_raw(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "disk"
    path.write_bytes(content)
    assert look_at(str(path)).format == "raw"


def test_image_that_is_replaced_after_the_guess_starts_no_guest(host: Toolstack, tmp_path: Path) -> None:
    path = image(tmp_path / "disk", "qcow2")
    words = (*QEMU[1:], "-drive", f"file={path}")
    request = foreground.understand_with(words, Allowed(probe_format=True), cwd=str(tmp_path))
    os.rename(image(tmp_path / "other", "qcow2"), path)
    wish = foreground.Wish(find_program("").path, request, foreground.Options(), host.registry, host.cache_dir)
    with wish.opened, pytest.raises(ConfigError, match="it was replaced meanwhile"):
        lifecycle.start(wish, host.registry, cache_dir=host.cache_dir, paused=True, warn=print)
    assert host.guests() == ()


def test_image_that_is_replaced_after_it_was_confirmed_starts_no_guest(
    host: Toolstack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image(tmp_path / "disk", "qcow2")
    words = (*QEMU[1:], "-drive", f"file={path}")
    request = foreground.understand_with(words, Allowed(probe_format=True), cwd=str(tmp_path))
    wish = foreground.Wish(find_program("").path, request, foreground.Options(), host.registry, host.cache_dir)
    confirm = imageprobe.confirm

    def confirm_and_replace(*words: Any) -> None:
        confirm(*words)
        os.rename(image(tmp_path / "other", "qcow2"), path)

    monkeypatch.setattr(imageprobe, "confirm", confirm_and_replace)
    with wish.opened, pytest.raises(JailError, match="cannot open") as caught:
        lifecycle.start(wish, host.registry, cache_dir=host.cache_dir, paused=True, warn=print)
    assert "it was replaced meanwhile" in caught.value.cause
    assert host.guests() == ()


def test_image_that_qemu_img_cannot_open_starts_no_guest(depriv: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes((b"KDMV" + struct.pack("<I", 99)).ljust(1 << 16, b"\0"))
    done = depriv.run("run", "--probe-format", "--", *QEMU, "-drive", f"file={path}", expect=2)
    assert f"qemu-img cannot open {path} as vmdk, which it begins like" in done.stderr
    assert "fix: see that it is whole" in done.stderr
    assert depriv.rows() == []


def test_what_becomes_another_format_after_the_guess_starts_no_guest(depriv: CommandLine, tmp_path: Path) -> None:
    # What the guess said is what QEMU is told: it makes none of its own.
    path = image(tmp_path / "disk", "qcow2")
    request = understood(f"file={path}", cwd=tmp_path)
    assert any("qcow2" in word for word in request.argv)
    path.write_bytes(bytes(1 << 20))
    driver = f"file={path},format=qcow2"
    done = depriv.run("run", "--", *QEMU, "-drive", driver, expect=2)
    assert "is no qcow2 image" in done.stderr


@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "missing"])
def test_what_is_no_file_is_not_looked_into(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(image(tmp_path / "real", "qcow2"))
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ConfigError, match="cannot use"):
        understood(f"file={path}", cwd=tmp_path)


def test_image_that_only_root_can_read_is_not_guessed_at_for_others(tmp_path: Path) -> None:
    path = image(tmp_path / "disk", "qcow2")
    facts = look_at(str(path)).replace(unread=True, format="", magic="")
    with pytest.raises(ConfigError, match="to see its format") as caught:
        foreground._format(facts)
    assert "root" in caught.value.fix
