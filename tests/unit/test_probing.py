# SPDX-License-Identifier: Apache-2.0
"""The guess at an image's format is QEMU's own, made without anything that could be attacked by the image."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depriv.qemu.block_formats import FORMATS
from depriv.qemu.probing import HEAD, format_of

KNOWN = {"raw", "qcow2", "bochs", "cloop", "luks", "parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"}
BOCHS = b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + b"Growing".ljust(16, b"\0")
CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"QFI\xfb\0\0\0\1", "qcow"),
        (b"QFI\xfb\0\0\0\2", "qcow2"),
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"QFI\xfb\xff\xff\xff\xff", "qcow2"),
        (b"QED\0", "qed"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"),
        (b"<<< Oracle VM VirtualBox Disk Image >>>".ljust(64) + b"\x7f\x10\xda\xbe", "vdi"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (b"KDMV", "vmdk"),
        (b"COWD", "vmdk"),
        (b"# Disk DescriptorFile\nversion=1\nCID=0", "vmdk"),
        (b"# Disk DescriptorFile\r\n  \r\nversion=3\r\n", "vmdk"),
        (b"LUKS\xba\xbe\0\1", "luks"),
        (b"WithoutFreeSpace\2\0\0\0", "parallels"),
        (b"WithouFreSpacExt\2\0\0\0", "parallels"),
        (BOCHS + b"\0\0\2\0", "bochs"),
        (BOCHS + b"\0\0\1\0", "bochs"),
        (CLOOP, "cloop"),
    ],
)
def test_image_is_known_by_its_first_bytes(head: bytes, name: str) -> None:
    assert format_of(head.ljust(HEAD, b"\0")) == name
    assert format_of(head.ljust(4096, b"\xff")) == name
    # What is beyond the head, or comes after a first byte of another's, is the guest's.
    assert format_of(b"\0" + head.ljust(HEAD, b"\0")) == "raw"
    assert format_of(bytes(HEAD) + head) == "raw"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"Q",
        b"QFI\xfb",
        b"QFI\xfb\0\0\0\0",
        b"qfi\xfb\0\0\0\2",
        b"LUKS\xba\xbe\0\2",  # QEMU 7.2 knows no LUKS2
        b"WithoutFreeSpace\1\0\0\0",
        b"vhdx",
        b"conecti",
        BOCHS + b"\0\0\3\0",
        BOCHS.replace(b"Growing", b"Grows\0\0") + b"\0\0\2\0",
        CLOOP[:-2],
        b"# Disk DescriptorFile\nversion=4\n",
        b"# Disk DescriptorFile\nversion=1",  # no end of the line within the head
        b"version=12\n",
        b"# a shell script\necho version=1\n",
        b"   x\nversion=1\n",
        b"\r\nversion=1\n",
        b"#" * HEAD + b"\nversion=1\n",
        b"<<< Oracle VM VirtualBox Disk Image >>>",
    ],
)
def test_what_is_almost_an_image_is_raw(head: bytes) -> None:
    assert format_of(head) == "raw"
    assert format_of(head + b"\xff" * HEAD) == "raw" or head == b"QFI\xfb"


@given(st.binary(max_size=600))
def test_anything_has_a_format(head: bytes) -> None:
    assert format_of(head) in KNOWN
    assert format_of(head) == format_of(head[:HEAD])


def test_every_format_that_facts_tell_is_one_that_is_guessed() -> None:
    assert set(FORMATS.values()) <= KNOWN
