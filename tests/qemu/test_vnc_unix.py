# SPDX-License-Identifier: Apache-2.0
"""`-vnc unix:PATH`: the toolstack listens, hands the socket over, and removes it when the guest is gone."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import CommandLine, await_end

if TYPE_CHECKING:
    from collections.abc import Iterator

QEMU = ("qemu-system-x86_64", "-nic", "none", "-m", "32", "-monitor", "none", "-serial", "null")


@pytest.fixture
def path() -> Iterator[Path]:
    """Return a name for a socket, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="depriv-") as folder:
        yield Path(folder) / "vnc"


def _greeting(path: Path) -> bytes:
    with socket.socket(socket.AF_UNIX) as viewer:
        viewer.settimeout(20)
        viewer.connect(str(path))
        return viewer.recv(12)


def test_vnc_server_on_a_path_is_roots_alone_and_goes_with_its_guest(depriv: CommandLine, path: Path) -> None:
    depriv.run("run", "--name", "vnc", "--", *QEMU, "-vnc", f"unix:{path}", "-daemonize")
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    assert _greeting(path).startswith(b"RFB 003.")
    depriv.run("audit", "vnc")
    with socket.socket(socket.AF_UNIX) as viewer:
        viewer.connect(str(path))
        depriv.run("audit", "vnc")
    depriv.run("destroy", "vnc")
    assert os.listdir(path.parent) == []


def test_vnc_server_takes_the_place_of_an_old_socket_and_of_nothing_else(depriv: CommandLine, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    depriv.run("run", "--name", "vnc", "--", *QEMU, "-vnc", f"unix:{path}", "-daemonize")
    assert _greeting(path).startswith(b"RFB 003.")
    depriv.run("destroy", "vnc")
    path.write_text("precious")
    done = depriv.run("run", "--", *QEMU, "-vnc", f"unix:{path}", "-daemonize", expect=2)
    assert "there is a file of that name" in done.stderr
    assert path.read_text() == "precious"
    assert depriv.rows() == []


def test_socket_goes_with_a_start_that_fails_after_it_was_made(depriv: CommandLine, path: Path) -> None:
    words = (*QEMU, "-vnc", f"unix:{path}", "-device", "virtio-blk-pci,drive=none")
    done = depriv.run("run", "--", *words, expect=125)
    assert "QEMU did not start" in done.stderr
    assert os.listdir(path.parent) == []


def test_socket_of_a_run_that_was_killed_goes_with_gc(depriv: CommandLine, path: Path) -> None:
    run = depriv.start("run", "--name", "vnc", "--", *QEMU, "-vnc", f"unix:{path}")
    deadline = time.monotonic() + 30
    while not (rows := [row for row in depriv.rows() if row["state"] == "running"]):
        assert time.monotonic() < deadline
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=10)
    assert await_end(rows[0]["pid"])
    assert path.exists()
    depriv.run("gc")
    assert os.listdir(path.parent) == []


def test_somebody_elses_file_in_the_sockets_place_stays(depriv: CommandLine, path: Path) -> None:
    depriv.run("run", "--name", "vnc", "--", *QEMU, "-vnc", f"unix:{path}", "-daemonize")
    subprocess.run(["mv", str(path), f"{path}.old"], check=True)
    path.write_text("precious")
    depriv.run("destroy", "vnc")
    assert path.read_text() == "precious"
