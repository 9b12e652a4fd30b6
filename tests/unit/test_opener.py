# SPDX-License-Identifier: Apache-2.0
"""What the toolstack opens for QEMU: the very thing that was asked for, root's alone, and nothing else is touched."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from typing import TYPE_CHECKING

import pytest

from depriv.durable import remove_left
from depriv.errors import ConfigError, HostError
from depriv.opener import Opened
from depriv.openings import (
    ConnectTcp,
    ConnectUnix,
    Inherited,
    ListenTcp,
    ListenUnixHere,
    ReadFile,
    StartPasst,
    WriteFile,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BASE = 700  # where these tests have QEMU's descriptor 0
_NUMBER = 10


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Return what opens, closed at the end; every test has to leave the descriptors as they were."""
    before = os.listdir("/proc/self/fd")
    with Opened(_BASE) as made:
        yield made
    assert os.listdir("/proc/self/fd") == before


def _vnc(path: Path | str, number: int = -1) -> ListenUnixHere:
    return ListenUnixHere(role="vnc", number=number, path=str(path))


def _connects(path: Path | str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


# Sockets that the toolstack itself listens on


def test_unix_socket_listens_and_is_roots_alone_whatever_the_umask(opened: Opened, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        opened.open(_vnc(tmp_path / "s"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.lstat(tmp_path / "s").st_mode) == 0o600
    assert _connects(tmp_path / "s")
    assert list(opened.kept) == ["vnc"]


def test_unix_socket_replaces_an_old_one(opened: Opened, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(tmp_path / "s"))
    assert not _connects(tmp_path / "s")
    opened.open(_vnc(tmp_path / "s"))
    assert _connects(tmp_path / "s")
    have = os.lstat(tmp_path / "s")
    assert opened.left == [(str(tmp_path / "s"), have.st_dev, have.st_ino)]


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder", "fifo"])
def test_unix_socket_replaces_nothing_but_a_socket(opened: Opened, tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "s", tmp_path / "other"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(other)
        if kind == "link":
            other.write_text("precious")
    before = os.lstat(path)
    with pytest.raises(HostError, match="cannot listen on") as caught:
        opened.open(_vnc(path))
    assert caught.value.cause == os.strerror(errno.EADDRINUSE)
    assert "name" in caught.value.fix
    assert os.lstat(path) == before
    assert os.path.lexists(other) == (kind == "link")
    assert opened.left == []


def test_unix_socket_in_a_folder_that_is_not_there_is_an_error_that_says_so(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        opened.open(_vnc(tmp_path / "none" / "s"))
    assert caught.value.cause == os.strerror(errno.ENOENT)
    assert "folder" in caught.value.fix


def test_unix_socket_may_have_a_path_longer_than_a_socket_address(opened: Opened, tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 100) / ("b" * 100)
    folder.mkdir(parents=True)
    opened.open(_vnc(folder / "s"))
    at = os.open(folder, os.O_PATH)
    try:
        assert _connects(f"/proc/self/fd/{at}/s")
    finally:
        os.close(at)


def test_unix_socket_goes_with_a_start_that_fails_and_stays_with_one_that_goes_well(tmp_path: Path) -> None:
    with Opened(_BASE) as opened:
        opened.open(_vnc(tmp_path / "s"))
    assert stat.S_ISSOCK(os.lstat(tmp_path / "s").st_mode)

    def start() -> None:
        with Opened(_BASE) as opened:
            opened.open(_vnc(tmp_path / "s"))
            raise KeyError

    with pytest.raises(KeyError):
        start()
    assert os.listdir(tmp_path) == []


def test_unix_socket_that_somebody_replaced_meanwhile_is_left_alone(tmp_path: Path) -> None:
    opened = Opened(_BASE)
    opened.open(_vnc(tmp_path / "s"))
    (tmp_path / "s").rename(tmp_path / "ours")
    (tmp_path / "s").write_text("somebody's")
    opened.close()
    remove_left(tuple(opened.left))
    assert (tmp_path / "s").read_text() == "somebody's"


def test_tcp_socket_takes_the_next_port_of_its_range(opened: Opened) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        alone = ListenTcp(role="vnc", number=-1, host="127.0.0.1", port=port)
        with pytest.raises(HostError, match=f"{port}") as caught:
            opened.open(alone)
        assert "ss -ltnp" in caught.value.fix
        assert opened.kept == {}
        opened.open(alone.replace(port_to=port + 20))
    with socket.socket(fileno=os.dup(opened.kept["vnc"])) as made:
        assert made.getsockname()[0] == "127.0.0.1"
        assert port < made.getsockname()[1] <= port + 20


# Connections


def test_connection_is_made_before_qemu_starts(opened: Opened, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        opened.open(ConnectTcp(role="a", number=_NUMBER, host="127.0.0.1", port=tcp.getsockname()[1]))
        opened.open(ConnectUnix(role="b", number=_NUMBER + 1, path=str(tmp_path / "s")))
        for place, server in ((_NUMBER, tcp), (_NUMBER + 1, unix)):
            peer = server.accept()[0]
            with peer:
                os.write(_BASE + place, b"hello")
                assert peer.recv(5) == b"hello"
            assert os.get_blocking(_BASE + place)
            assert not os.get_inheritable(_BASE + place)


def test_connection_to_nobody_is_an_error_that_says_what_to_start(opened: Opened, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    for opening in (
        ConnectTcp(role="a", number=_NUMBER, host="127.0.0.1", port=port),
        ConnectUnix(role="a", number=_NUMBER, path=str(tmp_path / "none")),
    ):
        with pytest.raises(HostError, match="cannot connect to") as caught:
            opened.open(opening)
        assert "first" in caught.value.fix


def test_passt_and_qemu_are_the_two_ends_of_one_socket_pair(opened: Opened) -> None:
    opened.open(StartPasst(role="net0", number=_NUMBER, words=()))
    os.write(_BASE + _NUMBER, b"a frame")
    assert os.read(opened.tools["net0"], 7) == b"a frame"
    # A stream, as QEMU's -netdev stream and passt both have it.
    with socket.socket(fileno=os.dup(opened.tools["net0"])) as end:
        assert (end.family, end.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
        opened.close()
        assert end.recv(1) == b""
    assert opened.tools == {}


# Files, and what the caller has open


def test_file_to_write_is_made_or_emptied_or_appended_to(opened: Opened, tmp_path: Path) -> None:
    path = tmp_path / "log"
    for append, text in ((False, "one"), (True, "onetwo"), (False, "one")):
        opened.open(WriteFile(role="log", number=_NUMBER, path=str(path), append=append))
        os.write(_BASE + _NUMBER, b"two" if append else b"one")
        assert path.read_text() == text
        opened.close()


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
@pytest.mark.parametrize("writes", [True, False])
def test_file_is_never_opened_through_a_link_nor_one_that_would_wait(
    opened: Opened, tmp_path: Path, kind: str, writes: bool
) -> None:
    path = tmp_path / "log"
    (tmp_path / "passwd").write_text("precious")
    if kind == "link":
        path.symlink_to(tmp_path / "passwd")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
        reader = threading.Thread(target=lambda: os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK)))
        reader.start()
        reader.join()
    opening = (WriteFile if writes else ReadFile)(role="log", number=_NUMBER, path=str(path))
    with pytest.raises((HostError, ConfigError)):
        opened.open(opening)
    assert (tmp_path / "passwd").read_text() == "precious"


def test_descriptor_of_the_caller_is_qemus_alone_afterwards(opened: Opened) -> None:
    reads, writes = os.pipe()
    opened.open(Inherited(role="incoming", number=_NUMBER, source=writes))
    os.write(_BASE + _NUMBER, b"x")
    assert os.read(reads, 1) == b"x"
    opened.close()
    # With a copy left here, whoever reads would wait for ever.
    assert os.read(reads, 1) == b""
    os.close(reads)


@pytest.mark.parametrize("source", [0, 1, 2, 699])
def test_descriptor_that_is_a_standard_stream_or_closed_is_refused(opened: Opened, source: int) -> None:
    with pytest.raises(ConfigError, match=f"descriptor {source} ") as caught:
        opened.open(Inherited(role="incoming", number=_NUMBER, source=source))
    assert caught.value.fix


def test_place_where_something_is_open_is_never_taken(opened: Opened, tmp_path: Path) -> None:
    place = _BASE + _NUMBER
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, place)
    os.close(null)
    before = os.listdir("/proc/self/fd")
    try:
        with pytest.raises(HostError, match=f"descriptor {place} is in use"):
            opened.open(WriteFile(role="log", number=_NUMBER, path=str(tmp_path / "log")))
        assert os.listdir("/proc/self/fd") == before
        assert os.readlink(f"/proc/self/fd/{place}") == "/dev/null"
    finally:
        os.close(place)
