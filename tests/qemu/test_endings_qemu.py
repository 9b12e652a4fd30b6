# SPDX-License-Identifier: Apache-2.0
"""What QEMU says when a guest ends, in each of the ways there are: what whoever watches over guests relies on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.guests import await_end, qmp

from depriv import policy
from depriv import qmp as monitors
from depriv.config import Disk, Domain

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Generator
    from pathlib import Path

    from depriv.api import Guest, Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

WITHIN_S = 20.0

# What a guest does, in 16-bit code at 0000:7C00, where the BIOS leaves all segments zero.
POWEROFF = "ba 04 06 b8 00 20 ef"  # mov dx, 0x604; mov ax, 0x2000; out dx, ax: SLP_EN of PM1a_CNT, as SeaBIOS places it
RESET_CF9 = "ba f9 0c b0 06 ee"  # mov dx, 0xcf9; mov al, 6; out dx, al: the chipset's reset control register
RESET_KBD = "b0 fe e6 64"  # mov al, 0xfe; out 0x64, al: the keyboard controller's pulse
TRIPLE_FAULT = "fa 31 c0 8e d8 0f 01 1e 20 7c cc"  # cli; ds = 0; lidt [0x7c20], which has a limit of 0; int3
PANIC = "ba 05 05 b0 01 ee"  # mov dx, 0x505; mov al, 1; out dx, al: pvpanic
CRASH_LOADED = "ba 05 05 b0 02 ee"  # the same with 2: the guest's own crash kernel takes over
IDLE = ""


class Events:
    """A client of the second monitor, that takes down what it is sent."""

    def __init__(self, sock: socket.socket) -> None:
        """Go into command mode, as QEMU wants before it sends any event."""
        sock.settimeout(WITHIN_S)
        self._sock = sock
        self._deadline = time.monotonic() + WITHIN_S
        self._buffer = b""
        self.seen: list[tuple[str, Any]] = []
        assert "QMP" in self._next()
        self.ask("qmp_capabilities")

    def ask(self, command: str) -> Any:
        """Return QEMU's answer; events that come before it are taken down."""
        self._sock.sendall(json.dumps({"execute": command}).encode() + b"\n")
        while True:
            message = self._next()
            if "return" in message:
                return message["return"]

    def until(self, name: str) -> Any:
        """Return the data of the first event of this name that was not returned yet."""
        while True:
            message = self._next()
            if message.get("event") == name:
                return message.get("data")

    def rest(self) -> list[str]:
        """Return the names of all events that come before QEMU closes the monitor."""
        before = len(self.seen)
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                self._next()
        return [name for name, _ in self.seen[before:]]

    def _next(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            assert time.monotonic() < self._deadline, self.seen[-9:]  # a guest that resets for ever never falls silent
            data = self._sock.recv(65536)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.seen.append((message["event"], message.get("data")))
        return message


@contextlib.contextmanager
def events(host: Toolstack, guest: Guest) -> Generator[Events]:
    """Connect to the second monitor as a watcher would, from the guest's network namespace."""
    pidfd = os.pidfd_open(pid(host, guest))
    try:
        path = f"{host.registry.directory(guest.domid)}/events"
        with monitors.connected(path, time.monotonic() + WITHIN_S, pidfd) as sock:
            yield Events(sock)
    finally:
        os.close(pidfd)


def pid(host: Toolstack, guest: Guest) -> int:
    expected = host.registry.find(str(guest.domid)).expected
    assert expected is not None
    return expected.pid


def status(host: Toolstack, guest: Guest) -> str:
    said = qmp(host, guest, "query-status")["status"]
    assert isinstance(said, str)
    return said


@pytest.fixture
def start(host: Toolstack, tmp_path: Path) -> Callable[..., Guest]:
    """Return what starts a guest that does one thing, and leaves it stopped before its first instruction."""

    def start(code: str, **fields: Any) -> Guest:
        path = tmp_path / "ends.img"
        sector = bytes.fromhex(code).ljust(0x18, b"\xf4") + b"\xeb\xfe"  # hlt; jmp $
        path.write_bytes(sector.ljust(510, b"\0") + b"\x55\xaa" + bytes((1 << 20) - 512))
        disk = Disk(vdev="xvda", target=str(path), readonly=True)
        return host.create(Domain(name="ends", disks=(disk,), **fields), paused=True)

    return start


MACHINES = pytest.mark.parametrize("machine", ["pc", "q35"])


@MACHINES
@pytest.mark.parametrize("on_reboot", ["restart", "destroy"])
def test_guest_that_switches_itself_off_says_so_and_stays_to_be_asked(
    host: Toolstack, start: Callable[..., Guest], machine: str, on_reboot: str
) -> None:
    guest = start(POWEROFF, machine=machine, on_reboot=on_reboot)
    with events(host, guest) as watched:
        qmp(host, guest, "cont")
        data = watched.until("SHUTDOWN")
        assert data == {"guest": True, "reason": "guest-shutdown"}
        assert policy.reason_of_event("SHUTDOWN", data) == "poweroff"
        watched.until("STOP")
        assert watched.ask("query-status")["status"] == "shutdown"
    assert status(host, guest) == "shutdown"
    with events(host, guest) as late:
        assert late.ask("query-status")["status"] == "shutdown"
        assert late.seen == []  # no event comes twice: who comes late has only the status
    assert policy.happened(alive="running", status="shutdown", noted="") == "poweroff"
    assert guest.row().state == "shutdown"


RESETS = pytest.mark.parametrize("code", [RESET_CF9, RESET_KBD, TRIPLE_FAULT], ids=["cf9", "keyboard", "triple-fault"])


@MACHINES
@RESETS
def test_guest_that_may_restart_resets_in_place_and_goes_on(
    host: Toolstack, start: Callable[..., Guest], machine: str, code: str
) -> None:
    guest = start(code, machine=machine, on_reboot="restart")
    before = pid(host, guest)
    with events(host, guest) as watched:
        qmp(host, guest, "cont")
        for _ in range(2):  # it boots again, and does it again
            assert watched.until("RESET") == {"guest": True, "reason": "guest-reset"}
        assert {name for name, _ in watched.seen} == {"RESUME", "RESET"}
    assert all(policy.reason_of_event(name, data) == "" for name, data in watched.seen)
    assert status(host, guest) == "running"
    assert pid(host, guest) == before


@MACHINES
@RESETS
@pytest.mark.parametrize("on_reboot", ["destroy", "preserve"])
def test_guest_that_may_not_restart_stops_at_its_reset(
    host: Toolstack, start: Callable[..., Guest], machine: str, code: str, on_reboot: str
) -> None:
    guest = start(code, machine=machine, on_reboot=on_reboot)
    with events(host, guest) as watched:
        qmp(host, guest, "cont")
        data = watched.until("SHUTDOWN")
        assert data == {"guest": True, "reason": "guest-reset"}
        watched.until("STOP")
    assert policy.reason_of_event("SHUTDOWN", data) == "reboot"
    # The status alone is that of a guest that has switched itself off: what the event said has to be written down.
    assert status(host, guest) == "shutdown"
    assert policy.happened(alive="running", status="shutdown", noted="reboot") == "reboot"


def test_reset_from_outside_is_a_reboot_where_it_may_not_be_made_in_place(
    host: Toolstack, start: Callable[..., Guest]
) -> None:
    guest = start(IDLE, on_reboot="destroy")
    with events(host, guest) as watched:
        qmp(host, guest, "cont")
        qmp(host, guest, "system_reset")
        data = watched.until("SHUTDOWN")
    assert data == {"guest": False, "reason": "host-qmp-system-reset"}
    assert policy.reason_of_event("SHUTDOWN", data) == "reboot"
    assert status(host, guest) == "shutdown"


@MACHINES
@pytest.mark.parametrize("on_reboot", ["restart", "destroy"])
def test_guest_that_panics_is_stopped_as_crashed(
    host: Toolstack, start: Callable[..., Guest], machine: str, on_reboot: str
) -> None:
    guest = start(PANIC, machine=machine, on_reboot=on_reboot)
    with events(host, guest) as watched:
        qmp(host, guest, "cont")
        data = watched.until("GUEST_PANICKED")
        assert data == {"action": "pause"}
        assert watched.ask("query-status")["status"] == "guest-panicked"
        assert "SHUTDOWN" not in [name for name, _ in watched.seen]
    assert policy.reason_of_event("GUEST_PANICKED", data) == "crash"
    assert policy.happened(alive="running", status=status(host, guest), noted="") == "crash"
    assert guest.row().state == "crashed"


@pytest.mark.parametrize("machine", ["pc", "microvm"])
def test_panic_device_may_be_asked_for(host: Toolstack, start: Callable[..., Guest], machine: str) -> None:
    """On a pc it stands for depriv's own, of which QEMU takes no second one; a microvm has none otherwise."""
    guest = start(PANIC, machine=machine, device_model_args=("-device", "pvpanic"))
    assert "pvpanic" in str(qmp(host, guest, "human-monitor-command", **{"command-line": "info qtree"}))


def test_guest_whose_crash_kernel_takes_over_goes_on(host: Toolstack, start: Callable[..., Guest]) -> None:
    guest = start(CRASH_LOADED)
    with events(host, guest) as watched:
        qmp(host, guest, "cont")
        data = watched.until("GUEST_CRASHLOADED")
    assert policy.reason_of_event("GUEST_CRASHLOADED", data) == ""
    assert status(host, guest) == "running"


def test_qemu_that_is_told_to_end_says_so_before_it_is_gone(host: Toolstack, start: Callable[..., Guest]) -> None:
    guest = start(IDLE, on_poweroff="restart", on_reboot="preserve", on_crash="restart")
    with events(host, guest) as watched:
        qmp(host, guest, "cont")
        os.kill(pid(host, guest), signal.SIGTERM)
        data = watched.until("SHUTDOWN")
        watched.rest()
    assert data == {"guest": False, "reason": "host-signal"}
    assert policy.reason_of_event("SHUTDOWN", data) == "host"
    assert await_end(pid(host, guest))
    assert guest.row().state == "dead"


def test_qemu_that_is_killed_says_nothing(host: Toolstack, start: Callable[..., Guest]) -> None:
    guest = start(IDLE)
    with events(host, guest) as watched:
        qmp(host, guest, "cont")
        os.kill(pid(host, guest), signal.SIGKILL)
        assert watched.rest() in ([], ["RESUME"])
    # Its sockets are closed a moment before it is gone: the end of the monitor is no proof of the end of QEMU.
    assert await_end(pid(host, guest))
    assert guest.row().state == "dead"
    assert policy.happened(alive="dead", status="", noted="") == "crash"


@pytest.mark.parametrize("restricted", [True, False])
def test_every_check_holds_with_and_without_somebody_who_watches(
    host: Toolstack, start: Callable[..., Guest], *, restricted: bool
) -> None:
    def wrong() -> set[str]:
        return {check.id for check in guest.audit().checks if not check.holds}

    guest = start(IDLE, dm_restrict=restricted)
    allowed = set() if restricted else {"dm_restrict"}
    assert wrong() == allowed
    with events(host, guest) as watched:
        assert wrong() == allowed
        qmp(host, guest, "cont")  # who watches holds up no command
        assert watched.ask("query-status")["status"] == "running"
        with events_of_another(host, guest):
            assert wrong() == allowed
    assert wrong() == allowed


@contextlib.contextmanager
def events_of_another(host: Toolstack, guest: Guest) -> Generator[None]:
    """Connect once more, and wait in the queue: QEMU serves one client of a monitor at a time."""
    pidfd = os.pidfd_open(pid(host, guest))
    try:
        path = f"{host.registry.directory(guest.domid)}/events"
        with monitors.connected(path, time.monotonic() + WITHIN_S, pidfd):
            yield
    finally:
        os.close(pidfd)


def test_nothing_stays_of_the_second_monitor(host: Toolstack, start: Callable[..., Guest]) -> None:
    guest = start(IDLE)
    folder = host.registry.directory(guest.domid)
    assert os.stat(f"{folder}/events").st_mode & 0o777 == 0o600
    guest.destroy()
    assert not os.path.lexists(folder)
