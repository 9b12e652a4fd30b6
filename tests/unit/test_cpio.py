# SPDX-License-Identifier: Apache-2.0
"""Archives and CDs the test guests read: what other programs make of them, and what is refused."""

from __future__ import annotations

import gzip
import shutil
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.support import cpio, iso

if TYPE_CHECKING:
    from pathlib import Path

TREE = (
    cpio.directory("dev"),
    cpio.file("hello.txt", b"hello\n", 0o640),
    cpio.link("dev/fd", "/proc/self/fd"),
    cpio.file("dev/tool", bytes(range(256)) * 33 + b"x", 0o755),
)


def test_first_member_is_laid_out_as_the_kernel_documents() -> None:
    data = cpio.archive([cpio.file("ab", b"xyz", 0o600)])
    assert data[:6] == b"070701"
    fields = [int(data[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
    assert fields[0] == 1
    assert fields[1] == stat.S_IFREG | 0o600
    assert fields[6] == 3  # file size
    assert fields[11] == 3  # name size with its zero
    assert data[110:113] == b"ab\0"
    assert data[116:119] == b"xyz"
    assert b"TRAILER!!!" in data[120:]


def test_every_member_starts_at_a_multiple_of_four() -> None:
    for size in range(5):
        data = cpio.archive([cpio.file("n" * (size + 1), b"d" * size), cpio.directory("end")])
        assert data.index(b"070701", 6) % 4 == 0
        assert len(data) % 4 == 0


def test_busybox_unpacks_what_was_packed(tmp_path: Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("no busybox here")
    subprocess.run(
        [busybox, "cpio", "-i", "-d"], input=cpio.archive(TREE), cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "hello.txt").read_bytes() == b"hello\n"
    assert stat.S_IMODE((tmp_path / "hello.txt").stat().st_mode) == 0o640
    assert (tmp_path / "dev/tool").read_bytes() == TREE[3].data
    assert (tmp_path / "dev/fd").readlink().as_posix() == "/proc/self/fd"


def test_archive_of_the_same_entries_is_the_same_packed_too() -> None:
    assert cpio.compressed(cpio.archive(TREE)) == cpio.compressed(cpio.archive(TREE))
    assert gzip.decompress(cpio.compressed(b"text")) == b"text"
    assert cpio.compressed(b"text")[4:8] == bytes(4)  # RFC 1952: the time of modification


def test_device_node_carries_its_numbers() -> None:
    data = cpio.archive([cpio.character_device("console", 5, 1)])
    fields = [int(data[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
    assert stat.S_ISCHR(fields[1])
    assert fields[9:11] == [5, 1]


@pytest.mark.parametrize("name", ["", "/etc", "../up", "a//b", "a/./b", "a\nb", "TRAILER!!!"])
def test_name_that_leaves_or_ends_the_archive_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a name for an archive"):
        cpio.file(name, b"")


def test_file_before_its_directory_is_refused() -> None:
    with pytest.raises(ValueError, match="before its directory"):
        cpio.archive([cpio.file("etc/passwd", b"")])


def test_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        cpio.archive([cpio.file("a", b"1"), cpio.file("a", b"2")])


def test_directory_with_data_is_refused() -> None:
    with pytest.raises(ValueError, match="has data"):
        cpio.Entry(name="d", mode=stat.S_IFDIR | 0o755, data=b"x")


def test_cd_has_its_label_and_its_file_where_the_directory_says() -> None:
    data = iso.iso({"READ.ME": b"from the cd\n"}, label="one")
    assert data[16 * 2048 :].startswith(b"\x01CD001\x01")
    assert data[16 * 2048 + 40 : 16 * 2048 + 72].rstrip() == b"ONE"
    assert int.from_bytes(data[16 * 2048 + 80 : 16 * 2048 + 84], "little") * 2048 == len(data)
    assert data[21 * 2048 : 21 * 2048 + 12] == b"from the cd\n"


@pytest.mark.parametrize("name", ["lower.txt", "../UP", "LONGERTHAN8", "A.LONG", ""])
def test_name_a_cd_would_mangle_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a plain ISO 9660 name"):
        iso.iso({name: b""})
