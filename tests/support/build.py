# SPDX-License-Identifier: Apache-2.0
"""Compiles the attacker and the bombs, once for each source and each set of arguments compiled in."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from depriv.records import Record

SOURCE = Path(__file__).with_name("attacker.c")
BOMBS = Path(__file__).with_name("bombs.c")
COMPILER = ("gcc", "-static", "-O1", "-Wall", "-Wextra", "-Werror", "-std=gnu17", "-pthread")


class Outcome(Record):
    """What came of one act: ``result`` is "ok", the name of an errno, of a signal, or "killed"."""

    act: str
    result: str

    @property
    def allowed(self) -> bool:
        """Whether the kernel let it."""
        return self.result == "ok"


def attacker(cache: Path, *, arguments: tuple[str, ...] = ()) -> Path:
    """Return the path of the attacker, compiled into ``cache`` unless it is there already.

    Args:
        cache: A directory that exists.
        arguments: Compiled in before those of the command line: for where it is started with QEMU's.

    Raises:
        RuntimeError: there is no gcc, no static C library, or the source does not compile.
    """
    return _compiled(SOURCE, cache, arguments)


def bombs(cache: Path) -> Path:
    """Return the path of the processes that will not go, compiled into ``cache``, a directory, unless it is there.

    Raises:
        RuntimeError: there is no gcc, no static C library, or the source does not compile.
    """
    return _compiled(BOMBS, cache, ())


def compiled(name: str, cache: Path, arguments: tuple[str, ...] = ()) -> Path:
    """Return a program made of one of the sources beside this file."""
    return _compiled(Path(__file__).parent / name, cache, arguments)


def _compiled(source: Path, cache: Path, arguments: tuple[str, ...]) -> Path:
    if shutil.which("gcc") is None:
        raise RuntimeError("the attacker needs gcc and libc6-dev: without it nothing is proved")
    key = hashlib.sha256(source.read_bytes() + repr((COMPILER, arguments)).encode()).hexdigest()[:16]
    final = cache / f"{source.stem}-{key}"
    if final.exists():
        return final
    baked = "".join(json.dumps(word) + "," for word in arguments)  # JSON's strings are C's, for plain text
    with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as work:
        argv = [*COMPILER, f"-DBAKED={baked}", "-o", f"{work}/program", str(source)]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile: {done.stderr}")
        os.rename(f"{work}/program", final)
    return final


def catalogue(program: Path) -> tuple[str, ...]:
    """Return the names of all acts the attacker knows, in the order it tries them."""
    done = subprocess.run([program, "--list"], check=True, capture_output=True, text=True, timeout=10)
    return tuple(done.stdout.split())


def outcomes(output: str) -> dict[str, Outcome]:
    """Return act -> outcome of what the attacker printed.

    Raises:
        ValueError: a line is not of its form, or an act was tried twice.
    """
    result: dict[str, Outcome] = {}
    for line in output.splitlines():
        act, tab, word = line.partition("\t")
        if not tab or act in result:
            raise ValueError(f"not the attacker's output: {line!r}")
        result[act] = Outcome(act=act, result=word or "killed")
    return result
