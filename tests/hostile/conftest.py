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
def running(*arguments: str, fds: tuple[int, ...] = ()) -> Iterator[None]:
    """Run a peer that is ready at the start of the block, and killed and reaped at its end."""
    argv = [sys.executable, "-I", "-S", PROGRAM, *arguments]
    with subprocess.Popen(argv, pass_fds=fds, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
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
                stack.enter_context(running(behaviour, "--fd", str(fd), fds=(fd,)))
            return ours

        yield start


@pytest.fixture
def listen_peer() -> Iterator[Callable[[str, str], None]]:
    """Return a function (behaviour, path): starts a peer process that listens there."""
    with contextlib.ExitStack() as stack:

        def start(behaviour: str, path: str) -> None:
            stack.enter_context(running(behaviour, "--listen", path))

        yield start
