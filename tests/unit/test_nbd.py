# SPDX-License-Identifier: Apache-2.0
"""An image served on a socket: to a client by the book, and to those that are not. The peer is a real thread."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

from depriv import nbd
from depriv.nbd import Export

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONTENT = bytes(range(256)) * 4
GO = b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">IIIH", 7, 6, 0, 0)
EINVAL = 22


def request(kind: int, offset: int, length: int, *, magic: int = 0x25609513, handle: int = 9) -> bytes:
    return struct.pack(">IHHQQI", magic, 0, kind, handle, offset, length)


class Client:
    """One end of a connection; the other is served by a thread, whose end is told."""

    def __init__(self, fd: int, size: int, *, timeout_s: float = 5.0) -> None:
        self.socket, served = socket.socketpair()
        self.socket.settimeout(10)
        self.error: Exception | None = None
        export = Export(served, fd, size, deadline=time.monotonic() + timeout_s)

        def serve() -> None:
            try:
                export.serve()
            except Exception as error:
                self.error = error
            served.close()

        self._thread = threading.Thread(target=serve)
        self._thread.start()

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self.socket.recv(count - len(data))
            assert chunk, data
            data += chunk
        return data

    def go(self) -> tuple[int, int]:
        """Negotiate by the book; return size and flags."""
        assert self.exactly(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.socket.sendall(GO)
        _, option, kind, length = struct.unpack(">QIII", self.exactly(20))
        assert (option, kind, length) == (7, 3, 12)
        info, size, flags = struct.unpack(">HQH", self.exactly(12))
        assert info == 0
        assert struct.unpack(">QIII", self.exactly(20))[1:] == (7, 1, 0)
        return size, flags

    def read(self, offset: int, length: int) -> tuple[int, bytes]:
        self.socket.sendall(request(0, offset, length))
        magic, error, handle = struct.unpack(">IIQ", self.exactly(16))
        assert (magic, handle) == (0x67446698, 9)
        return error, b"" if error else self.exactly(length)

    def left(self) -> None:
        """Read until the other side has gone."""
        with contextlib.suppress(ConnectionResetError):
            while self.socket.recv(4096):
                pass

    def end(self) -> Exception | None:
        """Hang up, and return what the other side's serving ended with."""
        self.socket.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.error


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    made: list[Client] = []

    def make(size: int = len(CONTENT), **words: float) -> Client:
        made.append(Client(fd, size, **words))
        return made[-1]

    yield make
    for each in made:
        each.end()
    os.close(fd)
    assert path.read_bytes() == CONTENT


def test_client_by_the_book_reads_all(client: Callable[..., Client]) -> None:
    peer = client()
    assert peer.go() == (len(CONTENT), 3)
    assert peer.read(0, len(CONTENT)) == (0, CONTENT)
    assert peer.read(256, 5) == (0, CONTENT[256:261])
    peer.socket.sendall(request(2, 0, 0))
    assert peer.end() is None


@pytest.mark.parametrize(("size", "served"), [(1, 512), (511, 512), (512, 512), (513, 1024)])
def test_odd_size_is_served_in_whole_sectors(client: Callable[..., Client], size: int, served: int) -> None:
    assert client(size).go() == (served, 3)


def test_file_that_has_become_shorter_reads_as_zeros(client: Callable[..., Client]) -> None:
    peer = client(4096)
    peer.go()
    assert peer.read(0, 4096) == (0, CONTENT.ljust(4096, b"\0"))


@pytest.mark.parametrize(
    ("offset", "length"),
    [(1024, 1), (1023, 2), (1 << 63, 1), (0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF), (0, nbd.READ_BYTES_MAX + 1)],
)
def test_read_beyond_the_image_is_refused_and_the_next_is_not(
    client: Callable[..., Client], offset: int, length: int
) -> None:
    peer = client()
    peer.go()
    assert peer.read(offset, length) == (EINVAL, b"")
    assert peer.read(0, 4) == (0, CONTENT[:4])


@pytest.mark.parametrize("kind", [3, 4, 5, 6, 7, 0xFFFF])  # FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS
def test_request_that_is_no_read_is_refused(client: Callable[..., Client], kind: int) -> None:
    peer = client()
    peer.go()
    peer.socket.sendall(request(kind, 0, 4))
    assert struct.unpack(">IIQ", peer.exactly(16)) == (0x67446698, EINVAL, 9)
    assert peer.read(0, 4) == (0, CONTENT[:4])


def test_request_to_write_ends_it(client: Callable[..., Client]) -> None:
    peer = client()
    peer.go()
    peer.socket.sendall(request(1, 0, 4) + b"evil")
    peer.left()
    assert isinstance(peer.end(), ValueError)


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\0\0\3" + b"GARBAGE!" * 4,
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 3, nbd.OPTION_BYTES_MAX + 1),
        b"\0\0\0\3" + (b"IHAVEOPT" + struct.pack(">II", 3, 0)) * (nbd.OPTIONS_MAX + 1),
        GO + request(0, 0, 4, magic=0),
    ],
)
def test_client_that_says_what_none_says_is_left(client: Callable[..., Client], sent: bytes) -> None:
    peer = client()
    peer.socket.sendall(sent)
    peer.left()
    assert isinstance(peer.end(), ValueError)


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0\0\0\3IHAVE", GO, GO + request(0, 0, 4)[:20]])
def test_client_that_is_silent_is_awaited_no_longer_than_told(client: Callable[..., Client], sent: bytes) -> None:
    peer = client(timeout_s=0.3)
    begun = time.monotonic()
    peer.socket.sendall(sent)
    peer.left()
    assert time.monotonic() - begun < 3
    assert isinstance(peer.end(), TimeoutError)


def test_client_that_asks_and_never_reads_is_left_at_the_deadline(client: Callable[..., Client]) -> None:
    peer = client(1 << 24, timeout_s=0.5)
    peer.go()
    begun = time.monotonic()
    peer.socket.sendall(request(0, 0, 1 << 24))
    peer._thread.join(5)
    assert time.monotonic() - begun < 3
    assert isinstance(peer.error, TimeoutError)


@pytest.mark.parametrize("sent", [b"", b"\0\0\0\3", b"\0\0\0\3IHA", GO, GO + request(0, 0, 4)[:9]])
def test_client_that_hangs_up_is_no_error(client: Callable[..., Client], sent: bytes) -> None:
    peer = client()
    peer.socket.sendall(sent)
    assert peer.end() is None


def test_client_that_wants_nothing_is_left(client: Callable[..., Client]) -> None:
    peer = client()
    peer.exactly(18)
    peer.socket.sendall(b"\0\0\0\3IHAVEOPT" + struct.pack(">II", 2, 0))
    assert peer.socket.recv(1) == b""
    assert peer.end() is None
