# SPDX-License-Identifier: Apache-2.0
"""Processes that do not die, and processes that have somebody else's ids.

The kernel lets nothing end a process that the freezer of cgroup v1 holds, not even SIGKILL: as it is with one that
waits for a server that is gone. See freezer-subsystem.rst of the kernel's documentation.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from typing import TYPE_CHECKING

from tests.support.host import living, need

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

FREEZER = "/sys/fs/cgroup/freezer"
PATIENCE_S = 10.0


class Frozen:
    """A process that stands still and cannot end, until it is thawed."""

    def __init__(self, pid: int) -> None:
        """Freeze it with all its threads."""
        self._path = f"{FREEZER}/depriv-tests-{os.getpid()}-{pid}"
        self.pid = pid
        self._is_frozen = True
        os.mkdir(self._path)
        self._write("cgroup.procs", str(pid))
        self._write("freezer.state", "FROZEN")
        deadline = time.monotonic() + PATIENCE_S
        while self._state() != "FROZEN":
            assert time.monotonic() < deadline, self._state()
            time.sleep(0.005)

    def thaw(self) -> None:
        """Let it go on; what was sent to it meanwhile arrives."""
        if self._is_frozen:
            self._write("freezer.state", "THAWED")
            self._is_frozen = False

    def close(self) -> None:
        """Thaw it, let it go back to where it was from, if it lives, and remove what held it."""
        self.thaw()
        with contextlib.suppress(ProcessLookupError), open(f"{FREEZER}/cgroup.procs", "w", encoding="ascii") as file:
            file.write(str(self.pid))
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                os.rmdir(self._path)
                return
            except OSError:
                assert time.monotonic() < deadline, f"process {self.pid} stays in {self._path}"
                time.sleep(0.01)

    def _state(self) -> str:
        with open(f"{self._path}/freezer.state", encoding="ascii") as file:
            return file.read().strip()

    def _write(self, name: str, text: str) -> None:
        with open(f"{self._path}/{name}", "w", encoding="ascii") as file:
            file.write(text)


@contextlib.contextmanager
def freezing() -> Generator[Callable[[int], Frozen]]:
    """Yield what freezes processes; at the end all of them go on."""
    need(os.path.isdir(FREEZER), what="the freezer of cgroup v1")
    made: list[Frozen] = []

    def freeze(pid: int) -> Frozen:
        made.append(Frozen(pid))
        return made[-1]

    try:
        yield freeze
    finally:
        for each in made:
            each.close()


@contextlib.contextmanager
def process_of(uid: int, *argv: str, gid: int = 0) -> Generator[subprocess.Popen[bytes]]:
    """Yield a process that has a uid for no reason that depriv knows of; it waits unless ``argv`` is something else."""
    ids = ["setpriv", f"--reuid={uid}", f"--regid={gid or uid}", "--clear-groups"]
    words = argv or ("sh", "-c", "trap '' HUP INT QUIT TERM; exec sleep 60")
    with subprocess.Popen([*ids, *words], cwd="/", stdin=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + PATIENCE_S
            while process.pid not in living(range(uid, uid + 1)):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.005)
            yield process
        finally:
            process.kill()
