# SPDX-License-Identifier: Apache-2.0
"""Starts hostile peers as processes of their own, and ends them with the test."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAM = os.path.join(os.path.dirname(__file__), "qmp_peer.py")


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill and reap the process at the end of the block."""
    with process:
        try:
            yield
        finally:
            process.kill()


@pytest.fixture
def start_peer() -> Iterator[Callable[[str], socket.socket]]:
    """Return a function: behaviour -> our end of a connection to a new peer process."""
    with contextlib.ExitStack() as stack:

        def start(behaviour: str) -> socket.socket:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            stack.enter_context(ours)
            with theirs:
                fd = theirs.fileno()
                argv = [sys.executable, "-I", "-S", PROGRAM, behaviour, "--fd", str(fd)]
                process = subprocess.Popen(argv, pass_fds=[fd], stderr=subprocess.DEVNULL, text=True)
            stack.enter_context(ended(process))
            return ours

        yield start


@pytest.fixture
def listen_peer() -> Iterator[Callable[[str, str], None]]:
    """Return a function (behaviour, path): starts a peer process that listens there."""
    with contextlib.ExitStack() as stack:

        def start(behaviour: str, path: str) -> None:
            argv = [sys.executable, "-I", "-S", PROGRAM, behaviour, "--listen", path]
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
            stack.enter_context(ended(process))
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

        yield start
