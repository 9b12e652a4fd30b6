# SPDX-License-Identifier: Apache-2.0
"""Which format QEMU would take an image for, from its first bytes, as QEMU itself guesses it. Pure.

QEMU's guess is a comparison of at most 512 bytes with each format's signature (``bdrv_probe_all``, block.c). Made here
it needs no program that opens the image, and so parses what a guest may have written: docs/adr/0015.
Sources: the ``bdrv_probe`` functions in block/{bochs,cloop,crypto,parallels,qcow,qcow2,qed,vdi,vhdx,vmdk,vpc}.c and
qcrypto_block_luks_has_format in crypto/block-luks.c, QEMU 7.2. dmg, which goes by the file's name, is left out: QEMU
does not get the name.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

HEAD: Final = 512  # BLOCK_PROBE_BUF_SIZE, include/block/block_int-common.h
_BOCHS: Final = ((0, b"Bochs Virtual HD Image\0"), (32, b"Redolog\0"), (48, b"Growing\0"))
_CLOOP: Final = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
# format -> alternatives, each of which is places and what stands there
_SIGNATURES: Final[dict[str, tuple[tuple[tuple[int, bytes], ...], ...]]] = {
    "bochs": tuple((*_BOCHS, (64, version)) for version in (b"\0\0\1\0", b"\0\0\2\0")),
    "cloop": (((0, _CLOOP),),),
    "luks": (((0, b"LUKS\xba\xbe\0\1"),),),
    "parallels": tuple(((0, magic), (16, b"\2\0\0\0")) for magic in (b"WithoutFreeSpace", b"WithouFreSpacExt")),
    "qcow": (((0, b"QFI\xfb\0\0\0\1"),),),
    "qed": (((0, b"QED\0"),),),
    "vdi": (((64, b"\x7f\x10\xda\xbe"),),),
    "vhdx": (((0, b"vhdxfile"),),),
    "vmdk": (((0, b"COWD"),), ((0, b"KDMV"),)),
    "vpc": (((0, b"conectix"),),),
}


def format_of(head: bytes) -> str:
    """Return QEMU's name of the format whose image begins like this; "raw" if it is none that is known.

    Args:
        head: The first HEAD bytes, or all there are.
    """
    head = head[:HEAD]
    for name, alternatives in _SIGNATURES.items():
        if any(all(head[at : at + len(text)] == text for at, text in places) for places in alternatives):
            return name
    if head[:4] == b"QFI\xfb" and int.from_bytes(head[4:8], "big") >= 2:
        return "qcow2"
    return "vmdk" if _is_descriptor(head) else "raw"


def _is_descriptor(head: bytes) -> bool:
    """Tell whether it is a VMDK's description as text: comments and blank lines, then its version."""
    lines = head.split(b"\n")
    while len(lines) > 1 and (lines[0][:1] == b"#" or (lines[0][:1] == b" " and lines[0].lstrip(b" ") in (b"", b"\r"))):
        lines.pop(0)
    # The line has to end within the head; split leaves something behind each end.
    return len(lines) > 1 and lines[0].removesuffix(b"\r") in (b"version=1", b"version=2", b"version=3")
