# SPDX-License-Identifier: Apache-2.0
"""Become a QEMU that has no guest: it prints what it was asked for, or tells what it can do, and ends."""

from __future__ import annotations

import os
import signal
import sys

from depriv.detect import find_program
from depriv.errors import PlanError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from depriv.qemu.draft import Request

_NOBODY = 65534
_PR_SET_NO_NEW_PRIVS = 38  # <linux/prctl.h>


def ask(program: str, request: Request) -> NoReturn:
    """Become a QEMU that prints an answer (-version, -device help) and ends: without a guest, and without privilege.

    Its words are those of the dry run, which name nothing of the host's. Should they be no question after all, it
    stands before the first instruction of nothing.

    Raises:
        PlanError: it cannot be executed.
    """
    path = _path_of(program)
    if os.geteuid() == 0:
        os.setgroups(())
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _become(path, [program, "-S", *request.dry], {"LC_ALL": "C"})


def become(program: str, words: tuple[str, ...]) -> NoReturn:
    """Execute a QEMU without a guest in place of this process and with no more privileges, as it is.

    Raises:
        PlanError: it cannot be executed.
    """
    _become(_path_of(program), [program, *words], dict(os.environ))


def _path_of(program: str) -> str:
    found = find_program(program)
    if found.problem:
        raise PlanError(found.problem, fix="name a QEMU that is installed")
    return found.path


def _become(path: str, argv: list[str], environ: dict[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    import ctypes  # noqa: PLC0415 (nothing else here needs it)

    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ignored by Python, and what is ignored stays so
    os.execve(path, argv, environ)  # noqa: S606 (no shell wanted)
