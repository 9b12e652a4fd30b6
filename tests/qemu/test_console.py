# SPDX-License-Identifier: Apache-2.0
"""The console: what the guest said, whole and in order, whatever else goes on."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import await_console, await_end, stop

from depriv import demo_guest
from depriv.config import Disk, Domain
from depriv.errors import DeprivError, HostError, MonitorError
from depriv.qemu.cmdline import CONSOLE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from depriv.api import Guest, Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

# A boot sector that writes "0123456789\n" to the first serial port for ever, waiting for nothing.
FLOOD = (
    bytes.fromhex("ba f8 03")  # mov dx, 0x3f8
    + bytes.fromhex("b0 30")  # again: mov al, '0'
    + bytes.fromhex("ee fe c0 3c 3a 75 f9")  # next: out dx, al; inc al; cmp al, ':'; jne next
    + bytes.fromhex("b0 0a ee eb f2")  # mov al, 10; out dx, al; jmp again
)
# One that writes what would take over a terminal: ESC ] 0 ; title BEL, ESC [ 2 J, and a CSI byte; then halts.
RUDE_TEXT = b"before\x1b]0;owned\x07\x1b[2J\x9b31mafter\r\n\0"
RUDE = (
    bytes.fromhex("31 c0 8e d8 be 18 7c ba f8 03 fc ac 84 c0 74 03 ee eb f8 f4 eb fd").ljust(0x18, b"\x90") + RUDE_TEXT
)


def boot(host: Toolstack, folder: Path, code: bytes) -> Guest:
    path = folder / "boot.img"
    path.write_bytes((code.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    return host.create(Domain(name="talks", disks=(Disk(vdev="xvda", target=str(path)),)))


def test_console_keeps_the_last_mib_of_a_guest_that_writes_for_ever(host: Toolstack, tmp_path: Path) -> None:
    guest = boot(host, tmp_path, FLOOD)
    deadline = time.monotonic() + 60
    while len(said := guest.console()) < CONSOLE_BYTES:
        assert time.monotonic() < deadline, len(said)
        time.sleep(0.2)
    assert len(said) == CONSOLE_BYTES
    lines = said.split(b"\n")
    whole = sum(line == b"0123456789" for line in lines)
    assert whole > 0.99 * len(lines), lines[:3]
    began = time.monotonic()
    for _ in range(3):
        assert len(guest.console()) == CONSOLE_BYTES
    assert time.monotonic() - began < 10
    saved = f"{host.registry.directory(guest.domid)}/console"
    assert os.stat(saved).st_size <= CONSOLE_BYTES
    assert guest.row().state == "running"


def test_each_dump_has_all_that_was_said_before(host: Toolstack, disk: Path) -> None:
    guest = host.create(Domain(name="talks", disks=(Disk(vdev="xvda", target=str(disk)),)))
    await_console(guest, demo_guest.WRITE_OK)
    dumps = [guest.console()]
    for _ in range(3):
        time.sleep(0.2)
        dumps.append(guest.console())
    for before, after in itertools.pairwise(dumps):
        assert after.startswith(before)
    assert len(dumps[-1]) > len(dumps[0])


def test_two_dumps_at_once_lose_nothing(host: Toolstack, disk: Path) -> None:
    guest = host.create(Domain(name="talks", disks=(Disk(vdev="xvda", target=str(disk)),)))
    await_console(guest, demo_guest.WRITE_OK)
    dumps: list[bytes] = []

    def dump() -> None:
        dumps.extend(guest.console() for _ in range(5))

    threads = [threading.Thread(target=dump) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    longest = max(dumps, key=len)
    assert len(dumps) == 15
    assert all(longest.startswith(one) for one in dumps)


def test_escape_sequences_of_a_guest_reach_no_terminal(host: Toolstack, tmp_path: Path) -> None:
    guest = boot(host, tmp_path, RUDE)
    said = await_console(guest, "after")  # as the command line prints it
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "\x9b" not in said
    raw = guest.console()
    start = raw.index(b"before")
    assert raw[start:].startswith(RUDE_TEXT[:-1])


def test_what_was_read_is_still_there_when_qemu_is_dead(host: Toolstack, disk: Path) -> None:
    guest = host.create(Domain(name="talks", disks=(Disk(vdev="xvda", target=str(disk)),)))
    await_console(guest, demo_guest.WRITE_OK)
    before = guest.console()
    pid = guest.row().pid
    os.kill(pid, signal.SIGKILL)
    assert await_end(pid)
    assert guest.console() == before


def test_console_of_a_hung_qemu_ends_in_time_and_says_so(host: Toolstack, disk: Path) -> None:
    guest = host.create(Domain(name="talks", disks=(Disk(vdev="xvda", target=str(disk)),)), paused=True)
    stop(guest.row().pid)
    began = time.monotonic()
    with pytest.raises(MonitorError):
        guest.console()
    assert time.monotonic() - began < 10
    assert guest.row().state == "hung"


def test_domain_without_a_serial_port_says_so(host: Toolstack) -> None:
    guest = host.create(Domain(name="mute", serial=False))
    with pytest.raises(DeprivError) as caught:
        guest.console()
    assert not isinstance(caught.value, AssertionError)


def test_nothing_is_taken_out_of_qemu_that_cannot_be_kept(host: Toolstack, disk: Path) -> None:
    guest = host.create(Domain(name="talks", disks=(Disk(vdev="xvda", target=str(disk)),)))
    time.sleep(1)
    kept = f"{host.registry.directory(guest.domid)}/console.new"
    os.mkdir(kept)  # as good as a full disk
    with pytest.raises(HostError, match="cannot keep what the guest has said"):
        guest.console()
    os.rmdir(kept)
    assert guest.console().decode().startswith(demo_guest.HELLO)
    assert not os.path.exists(kept)


@contextlib.contextmanager
def dripping(folder: str) -> Iterator[None]:
    """Put a peer in QEMU's place that hands out its console one byte in 0.9 s: a MiB of it would take days."""
    os.rename(f"{folder}/qmp", f"{folder}/qmp.real")
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(folder)  # the path may be longer than an address
    try:
        listener.bind("qmp")
    finally:
        os.chdir("/")
    listener.listen(8)

    def answer(sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as lines, contextlib.suppress(OSError):
            sock.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n')
            for line in lines:
                asked = json.loads(line)
                if asked["execute"] == "ringbuf-read":
                    time.sleep(0.9)
                said = "QQ==" if asked["execute"] == "ringbuf-read" else {}
                sock.sendall(json.dumps({"return": said, "id": asked["id"]}).encode() + b"\n")

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{folder}/qmp.real", f"{folder}/qmp")


def test_qemu_that_drips_its_console_is_heard_for_five_seconds_in_all(host: Toolstack, disk: Path) -> None:
    guest = host.create(Domain(name="drips", disks=(Disk(vdev="xvda", target=str(disk)),)), paused=True)
    with dripping(host.registry.directory(guest.domid)):
        began = time.monotonic()
        said = b""
        with contextlib.suppress(MonitorError):
            said = guest.console()
        assert time.monotonic() - began < 8
        assert said.strip(b"A") == b""
    guest.destroy()


def test_domain_whose_console_is_being_dripped_out_can_be_destroyed_meanwhile(host: Toolstack, disk: Path) -> None:
    guest = host.create(Domain(name="drips", disks=(Disk(vdev="xvda", target=str(disk)),)), paused=True)
    pid = guest.row().pid

    def read() -> None:
        with contextlib.suppress(DeprivError):
            guest.console()

    with dripping(host.registry.directory(guest.domid)):
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        time.sleep(1)
        began = time.monotonic()
        host.guest("drips").destroy()
        assert time.monotonic() - began < 10  # the lock of a domain is waited for as long
        assert await_end(pid, within_s=0.1)
        assert host.guests() == ()
        reader.join(20)
        assert not reader.is_alive()
