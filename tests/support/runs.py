# SPDX-License-Identifier: Apache-2.0
"""What tests of `depriv run` share: one that is started, one that is waited for, and whether anything is left."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

from tests.support.lines import running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.guests import CommandLine

QEMU = "qemu-system-x86_64"
QUIET = ("-m", "32", "-nic", "none", "-nodefaults", "-display", "none")
PATIENCE_S = 20.0


def await_running(depriv: CommandLine, process: subprocess.Popen[Any] | None = None) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while not (entry := running(depriv)):
        assert process is None or process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, "it does not run"
        time.sleep(0.01)
    return entry


@contextlib.contextmanager
def started(depriv: CommandLine, *words: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start `depriv run -- QEMU WORDS`; it is ended if it has not by itself."""
    process = subprocess.Popen(depriv.argv("run", "--", QEMU, *words), **{"stdin": subprocess.DEVNULL, **streams})
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def asked(depriv: CommandLine, *words: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    argv = depriv.argv("run", "--", QEMU, *words)
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, **keywords)


def nothing_is_left(depriv: CommandLine) -> bool:
    return os.listdir(f"{depriv.state_dir}/domains") == []
