# SPDX-License-Identifier: Apache-2.0
"""The demonstration guest's image. That it runs is shown by tests/qemu/test_guests_bare.py."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from depriv import demo_guest

if TYPE_CHECKING:
    from pathlib import Path


def test_image_is_a_boot_sector_then_the_text_then_nothing() -> None:
    disk = demo_guest.image(text="a text", size_mib=2)
    assert len(disk) == 2 << 20
    assert disk[510:512] == b"\x55\xaa"
    assert disk[512:518] == b"a text"
    assert not disk[518:].strip(b"\0")


def test_code_and_data_leave_the_partition_table_alone() -> None:
    assert not demo_guest.boot_sector()[446:510].strip(b"\0")


def test_image_is_the_same_every_time() -> None:
    assert demo_guest.image() == demo_guest.image()


def test_machine_code_is_what_the_assembler_makes_of_the_assembly(tmp_path: Path) -> None:
    if shutil.which("as") is None or shutil.which("objcopy") is None:
        pytest.skip("no GNU assembler here")
    lines = [".intel_syntax noprefix", ".code16"]
    lines += [f"{label}: {asm}" if label else asm for label, _code, asm in demo_guest.CODE]
    lines += [f"{label}: .byte {','.join(map(str, data))}" for label, data in demo_guest.DATA]
    # An address counts from the load address; `offset` would need a linker for that, so it is put in here.
    shown = [f".set {label}_at, {label} - start + {demo_guest.ORIGIN}" for label in demo_guest.addresses()]
    text = "\n".join(lines)
    for label in demo_guest.addresses():
        text = text.replace(f"offset {label}\n", f"offset {label}_at\n").replace(f"ds:[{label}]", f"ds:[{label}_at]")
    (tmp_path / "boot.s").write_text(text + "\n" + "\n".join(shown) + "\n")
    for argv in (
        ["as", "--32", "-o", "boot.o", "boot.s"],
        ["objcopy", "-O", "binary", "-j", ".text", "boot.o", "boot"],
    ):
        done = subprocess.run(argv, cwd=tmp_path, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assembled = (tmp_path / "boot").read_bytes()
    assert assembled.rstrip(b"\0").hex() == demo_guest.boot_sector()[:510].rstrip(b"\0").hex()


def test_jump_that_is_too_far_is_refused() -> None:
    with pytest.raises(OverflowError):
        demo_guest.encode("eb >far", {"far": demo_guest.ORIGIN + 130}, demo_guest.ORIGIN)


def test_jump_to_no_label_is_refused() -> None:
    with pytest.raises(KeyError):
        demo_guest.encode("eb >nowhere", {}, demo_guest.ORIGIN)


def test_jump_counts_from_the_end_of_its_operand() -> None:
    assert demo_guest.encode("eb >here", {"here": 0x7C00}, 0x7C00) == b"\xeb\xfe"
    assert demo_guest.encode("e8 >>next", {"next": 0x7C13}, 0x7C10) == b"\xe8\0\0"
    assert demo_guest.encode("be =it", {"it": 0x7C55}, 0x7C00) == b"\xbe\x55\x7c"


@pytest.mark.parametrize("text", ["x" * 513, "line\nbreak", "\x1b[2J", "caf\u00e9", "nul\0"])
def test_text_that_does_not_fit_or_could_drive_a_terminal_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        demo_guest.image(text=text)


def test_text_may_fill_its_sector() -> None:
    assert demo_guest.image(text="x" * 512)[512:1025] == b"x" * 512 + b"\0"


@pytest.mark.parametrize("size_mib", [0, -1])
def test_image_without_room_is_refused(size_mib: int) -> None:
    with pytest.raises(ValueError, match="no room"):
        demo_guest.image(size_mib=size_mib)


def test_boots_are_counted_only_behind_the_marker() -> None:
    seven = (7).to_bytes(4, "little")
    disk = demo_guest.image()
    assert demo_guest.boots(disk) == 0
    assert demo_guest.boots(disk[:1040] + seven) == 0
    assert demo_guest.boots(disk[:1024] + demo_guest.MARKER + seven) == 7


def test_count_is_not_read_from_a_disk_that_is_too_short() -> None:
    assert demo_guest.boots(b"") == 0
