# SPDX-License-Identifier: Apache-2.0
"""Disk images of HVM guests that need no operating system: see ``bootsector.S`` for what they print."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("bootsector.S")
DISK_BYTES = 1 << 20
FAR_SECTOR = 1600  # at 800 KiB: beyond libxl's RLIMIT_FSIZE for restricted device models, 256 KiB


def disk(*, writes: bool) -> bytes:
    """Return the image of a disk of 1 MiB whose guest ticks and, if it ``writes``, writes ``FAR_SECTOR`` every second.

    Raises:
        RuntimeError: there is no gcc, or the source does not assemble; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="bootsector-") as work:
        define = f"-DWRITE={FAR_SECTOR if writes else 0}"
        _run(["gcc", "-m32", "-c", define, "-o", f"{work}/object", str(SOURCE)])
        _run(
            [
                "ld",
                "-m",
                "elf_i386",
                "-Ttext",
                "0x7c00",
                "--oformat",
                "binary",
                "-o",
                f"{work}/sector",
                f"{work}/object",
            ]
        )
        sector = Path(work, "sector").read_bytes()
    if len(sector) != 512:
        raise RuntimeError(f"the boot sector has {len(sector)} bytes")
    return sector.ljust(DISK_BYTES, b"\0")


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise RuntimeError(f"the HVM guests need {argv[0]}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} failed: {done.stderr}")
