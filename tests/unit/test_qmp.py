# SPDX-License-Identifier: Apache-2.0
"""The monitor with a peer that keeps to the protocol; those that do not are in tests/hostile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from depriv.errors import MonitorError, render
from depriv.qmp import MAX_FDS, CommandError, Limits, Monitor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Answer = Callable[[dict[str, Any]], bytes]

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


class Interrupted(BaseException):
    """Raised by a signal handler, as KeyboardInterrupt is."""


def reply(request: dict[str, Any], value: object = None) -> bytes:
    return json.dumps({"return": {} if value is None else value, "id": request["id"]}).encode() + b"\r\n"


def refusal(request: dict[str, Any], error_class: str, description: str) -> bytes:
    error = {"class": error_class, "desc": description}
    return json.dumps({"error": error, "id": request["id"]}).encode() + b"\r\n"


@contextlib.contextmanager
def peer(answer: Answer, requests: list[dict[str, Any]] | None = None) -> Iterator[Monitor]:
    """Yield a monitor whose peer answers each command after the negotiation as told."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, theirs.makefile("rb") as lines, contextlib.suppress(BrokenPipeError):
            theirs.sendall(GREETING)
            theirs.sendall(reply(json.loads(lines.readline())))
            for line in lines:
                request = json.loads(line)
                if requests is not None:
                    requests.append(request)
                theirs.sendall(answer(request))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with Monitor.adopt(ours, timeout_s=2.0) as monitor:
            yield monitor
    finally:
        thread.join()


@contextlib.contextmanager
def alarm_after(delay_s: float, action: Callable[[], None]) -> Iterator[None]:
    def act(_number: int, _frame: object) -> None:
        action()

    before = signal.signal(signal.SIGALRM, act)
    signal.setitimer(signal.ITIMER_REAL, delay_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_command_goes_out_as_one_line_with_an_id_of_its_own() -> None:
    requests: list[dict[str, Any]] = []
    with peer(reply, requests) as monitor:
        monitor.execute("stop", timeout_s=2.0)
        monitor.execute("eject", {"id": "d0", "force": False}, timeout_s=2.0)
    first, second = requests
    assert first.pop("id") != second.pop("id")
    assert first == {"execute": "stop"}
    assert second == {"execute": "eject", "arguments": {"id": "d0", "force": False}}


def test_the_answer_is_returned_as_it_is() -> None:
    with peer(lambda request: reply(request, [1, {"a": None}])) as monitor:
        assert monitor.execute("query-x", timeout_s=2.0) == [1, {"a": None}]


def test_a_refusal_leaves_the_monitor_usable() -> None:
    def answer(request: dict[str, Any]) -> bytes:
        refused = request["execute"] == "eject"
        return refusal(request, "DeviceNotFound", "Device 'd0' not found") if refused else reply(request)

    with peer(answer) as monitor:
        with pytest.raises(CommandError) as caught:
            monitor.execute("eject", timeout_s=2.0)
        assert monitor.execute("stop", timeout_s=2.0) == {}
    assert caught.value.error_class == "DeviceNotFound"
    assert caught.value.command == "eject"
    assert render(caught.value) == "error: eject: QEMU refuses\ncause: Device 'd0' not found"


def test_a_refusal_cannot_forge_lines_drive_the_terminal_or_fill_the_log() -> None:
    evil = "\x1b[2J\r\nerror: forged\u202e" + "x" * 100_000
    with peer(lambda request: refusal(request, "\x07" * 1000, evil)) as monitor, pytest.raises(CommandError) as caught:
        monitor.execute("eject", timeout_s=2.0)
    assert caught.value.description.startswith(r"\x1b[2J\r\nerror: forged\u202exxx")
    assert len(caught.value.description) == 500
    assert len(caught.value.error_class) == 64
    assert all(line.isprintable() for line in render(caught.value).splitlines())


def test_descriptors_arrive_with_the_first_byte_and_stay_ours() -> None:
    ours, theirs = socket.socketpair()
    arrived: list[tuple[bytes, list[int]]] = []

    def serve() -> None:
        lines = theirs.makefile("rb", buffering=0)
        theirs.sendall(GREETING)
        theirs.sendall(reply(json.loads(lines.readline())))
        first, fds, _flags, _address = socket.recv_fds(theirs, 1, 10)
        arrived.append((first, fds))
        theirs.sendall(reply(json.loads(first + lines.readline())))
        lines.close()

    thread = threading.Thread(target=serve)
    thread.start()
    out, into = os.pipe()
    with theirs, Monitor.adopt(ours, timeout_s=2.0) as monitor:
        monitor.execute("getfd", {"fdname": "tap"}, fds=[into, out], timeout_s=2.0)
        thread.join()
    [(first, fds)] = arrived
    assert first == b"{"
    os.write(fds[0], b"x")
    assert os.read(out, 1) == b"x"
    for fd in (out, into, *fds):
        os.close(fd)


def test_a_long_command_sends_its_descriptors_only_once() -> None:
    ours, theirs = socket.socketpair()
    arrived: list[int] = []

    def serve() -> None:
        theirs.sendall(GREETING)
        theirs.sendall(reply(json.loads(theirs.recv(1000))))
        data = b""
        while not data.endswith(b"\n"):
            more, fds, _flags, _address = socket.recv_fds(theirs, 65536, 10)
            data += more
            arrived.extend(fds)
        theirs.sendall(reply(json.loads(data)))

    thread = threading.Thread(target=serve)
    thread.start()
    with theirs, open(os.devnull, "rb") as file, Monitor.adopt(ours, timeout_s=2.0) as monitor:
        monitor.execute("add-fd", {"opaque": "x" * 2_000_000}, fds=[file.fileno()], timeout_s=2.0)
    thread.join()
    for fd in arrived:
        os.close(fd)
    assert len(arrived) == 1


def test_more_descriptors_than_qemu_would_take_are_refused() -> None:
    with peer(reply) as monitor:
        with pytest.raises(ValueError, match="at most 16 descriptors"):
            monitor.execute("getfd", fds=[0] * (MAX_FDS + 1), timeout_s=2.0)
        assert monitor.execute("stop", timeout_s=2.0) == {}


def test_arguments_that_json_cannot_hold_are_refused_and_nothing_is_sent() -> None:
    requests: list[dict[str, Any]] = []
    with peer(reply, requests) as monitor:
        with pytest.raises(TypeError):
            monitor.execute("eject", {"id": object()}, timeout_s=2.0)
        with pytest.raises(ValueError, match="Out of range"):
            monitor.execute("eject", {"id": float("nan")}, timeout_s=2.0)
        assert monitor.execute("stop", timeout_s=2.0) == {}
    assert [request["execute"] for request in requests] == ["stop"]


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan")])
def test_no_call_may_wait_for_ever(timeout_s: float) -> None:
    with peer(reply) as monitor, pytest.raises(ValueError, match="a positive number of seconds"):
        monitor.execute("stop", timeout_s=timeout_s)


def test_events_are_counted_and_only_the_last_names_kept() -> None:
    events = b"".join(b'{"event": "E%d\\u001b", "data": {}}\n' % number for number in range(40))
    with peer(lambda request: events + reply(request)) as monitor:
        monitor.execute("stop", timeout_s=2.0)
        assert monitor.recent_events == tuple(rf"E{number}\x1b" for number in range(24, 40))


def test_events_between_commands_are_drained_on_request() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(GREETING)
    negotiation = threading.Thread(target=lambda: theirs.sendall(reply(json.loads(theirs.recv(1000)))))
    negotiation.start()
    with theirs, Monitor.adopt(ours, timeout_s=2.0) as monitor:
        negotiation.join()
        assert monitor.drain() == 0
        theirs.sendall(b'{"event": "A"}\n{"event": "B"}\n{"event": ')
        assert monitor.drain() == 2
        theirs.sendall(b'"C"}\n')
        assert monitor.drain() == 1


def test_a_closed_monitor_refuses_every_call() -> None:
    with peer(reply) as monitor:
        monitor.close()
        monitor.close()
        with pytest.raises(MonitorError, match="stop: this monitor is unusable") as caught:
            monitor.execute("stop", timeout_s=2.0)
        assert caught.value.cause == "it was closed"
        assert monitor.fileno() == -1


def test_an_interrupted_call_leaves_the_monitor_unusable() -> None:
    def interrupt() -> None:
        raise Interrupted

    def slow(request: dict[str, Any]) -> bytes:
        time.sleep(0.4)
        return reply(request)

    with peer(slow) as monitor:
        with alarm_after(0.1, interrupt), pytest.raises(Interrupted):
            monitor.execute("stop", timeout_s=2.0)
        with pytest.raises(MonitorError, match="unusable") as caught:
            monitor.execute("cont", timeout_s=2.0)
        assert "stop failed before: Interrupted" in caught.value.cause


def test_a_call_within_a_call_is_refused_and_harms_nothing() -> None:
    inner: list[str] = []

    def again() -> None:
        with pytest.raises(MonitorError, match="unusable") as caught:
            monitor.execute("cont", timeout_s=2.0)
        inner.append(caught.value.cause)

    def slow(request: dict[str, Any]) -> bytes:
        time.sleep(0.3)
        return reply(request)

    with peer(slow) as monitor, alarm_after(0.1, again):
        assert monitor.execute("stop", timeout_s=2.0) == {}
    assert inner == ["another call is under way"]


def test_a_socket_that_is_no_monitor_is_refused() -> None:
    with socket.socket(socket.AF_INET) as sock, pytest.raises(ValueError, match="AF_UNIX stream"):
        Monitor.adopt(sock, timeout_s=1.0)


@pytest.mark.parametrize("path", ["", "\0abstract", "/run/a\0b"])
def test_a_monitor_without_a_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="no abstract name"):
        Monitor.connect(path, timeout_s=1.0)


@pytest.mark.parametrize("name", ["monitor", "m" * 120])
def test_a_socket_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(MonitorError, match="cannot connect") as caught:
        Monitor.connect(path, timeout_s=1.0)
    assert path in caught.value.what
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_socket_nobody_listens_on_is_an_error_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "monitor")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    began = time.monotonic()
    with pytest.raises(MonitorError) as caught:
        Monitor.connect(path, timeout_s=5.0)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert time.monotonic() - began < 1


def test_limits_that_refuse_everything_are_refused() -> None:
    with pytest.raises(ValueError, match="events must be positive"):
        Limits(events=0)
