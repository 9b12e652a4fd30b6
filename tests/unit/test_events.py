# SPDX-License-Identifier: Apache-2.0
"""The events socket, spoken to by a scripted QEMU on the other end of a socket pair."""

from __future__ import annotations

import array
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from depriv.errors import MonitorError
from depriv.events import (
    CHUNK_BYTES,
    FLOOD_TICKS,
    LINE_BYTES_MAX,
    TICK_BYTES,
    TICK_LINES,
    TICK_READS,
    ClosedError,
    Events,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}
TIMESTAMP = {"seconds": 1, "microseconds": 2}
POWEROFF = {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}, "timestamp": TIMESTAMP}
OTHER = {"event": "RTC_CHANGE", "data": {"offset": 1}, "timestamp": TIMESTAMP}


class Qemu:
    """The other end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def say(self, *messages: object) -> None:
        self.send(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def command(self) -> tuple[str, str]:
        """Return the one command that has come, and its id."""
        lines = self.sock.recv(65536).splitlines()
        assert len(lines) == 1
        message: dict[str, str] = json.loads(lines[0])
        assert message.keys() == {"execute", "id"}
        return message["execute"], message["id"]

    def reply(self, value: object) -> str:
        """Answer the command that has come; return which it was."""
        name, ident = self.command()
        self.say({"return": value, "id": ident})
        return name


class Pair:
    """Both ends."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.events = Events.adopt(ours)
        self.qemu = Qemu(theirs)

    def negotiate(self, status: object = "running") -> list[tuple[str, str]]:
        self.qemu.say(GREETING)
        assert self.events.receive() == ([], None)
        self.qemu.reply({})
        assert self.events.receive() == ([], None)
        self.qemu.reply({"status": status, "running": status == "running", "singlestep": False})
        said, error = self.events.receive()
        assert error is None
        return said

    def refused(self) -> str:
        """Return why no more is heard."""
        said, error = self.events.receive()
        assert said == []
        assert isinstance(error, MonitorError)
        return f"{error}: {error.cause}"


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.events.close()
    made.qemu.sock.close()


@pytest.fixture
def ready(pair: Pair) -> Pair:
    pair.negotiate()
    return pair


def test_conversation_is_greeting_capabilities_status_and_then_silence(pair: Pair) -> None:
    pair.qemu.say(GREETING)
    assert pair.events.receive() == ([], None)
    assert pair.qemu.reply({}) == "qmp_capabilities"
    assert pair.events.receive() == ([], None)
    assert not pair.events.greeted
    assert pair.qemu.reply({"status": "paused", "running": False}) == "query-status"
    assert pair.events.receive() == ([("status", "paused")], None)
    assert pair.events.greeted
    pair.qemu.say(*[OTHER] * 5)
    assert pair.events.receive() == ([], None)
    pair.qemu.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        pair.qemu.sock.recv(1)


def test_nothing_is_said_and_nothing_waited_for_while_qemu_is_silent(pair: Pair) -> None:
    assert [pair.events.receive() for _ in range(3)] == [([], None)] * 3


def test_status_of_a_guest_that_ended_before_is_heard(pair: Pair) -> None:
    assert pair.negotiate("shutdown") == [("status", "shutdown")]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (POWEROFF, "poweroff"),
        ({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}}, "reboot"),
        ({"event": "SHUTDOWN", "data": {"guest": False, "reason": "host-signal"}}, "host"),
        ({"event": "GUEST_PANICKED", "data": {"action": "pause"}}, "crash"),
    ],
)
def test_end_of_the_guest_is_heard(ready: Pair, event: dict[str, Any], reason: str) -> None:
    ready.qemu.say(OTHER, event, OTHER)
    assert ready.events.receive() == ([("event", reason)], None)


@pytest.mark.parametrize(
    "event",
    [
        {"event": "SHUTDOWN"},
        {"event": "SHUTDOWN", "data": []},
        {"event": "SHUTDOWN", "data": {"reason": ["guest-shutdown"]}},
        {"event": "SHUTDOWN", "data": {"reason": "../../etc"}},
        {"event": "shutdown", "data": {"reason": "guest-shutdown"}},
        {"event": "", "data": None},
    ],
)
def test_event_that_makes_no_sense_says_nothing_and_breaks_nothing(ready: Pair, event: object) -> None:
    ready.qemu.say(event, POWEROFF)
    assert ready.events.receive() == ([("event", "poweroff")], None)


def test_events_between_command_and_reply_are_heard(pair: Pair) -> None:
    pair.qemu.say(GREETING)
    pair.events.receive()
    pair.qemu.say(POWEROFF)
    pair.qemu.reply({})
    assert pair.events.receive() == ([("event", "poweroff")], None)
    pair.qemu.say(OTHER)
    pair.qemu.reply({"status": "shutdown"})
    assert pair.events.receive() == ([("status", "shutdown")], None)


def test_line_in_many_pieces_is_one_line(ready: Pair) -> None:
    for byte in json.dumps(POWEROFF).encode():
        ready.qemu.send(bytes([byte]))
        assert ready.events.receive() == ([], None)
        ready.events.tick()
    ready.qemu.send(b"\n")
    assert ready.events.receive() == ([("event", "poweroff")], None)


def test_last_words_count_although_the_connection_ends_with_them(ready: Pair) -> None:
    ready.qemu.say(POWEROFF)
    ready.qemu.sock.close()
    said, error = ready.events.receive()
    assert said == [("event", "poweroff")]
    assert isinstance(error, ClosedError)


def test_what_came_before_a_breach_counts(ready: Pair) -> None:
    ready.qemu.say(POWEROFF)
    ready.qemu.send(b"garbage\n")
    said, error = ready.events.receive()
    assert said == [("event", "poweroff")]
    assert isinstance(error, MonitorError)


@pytest.mark.parametrize("when", ["at once", "after the greeting", "later"])
def test_end_of_the_connection_is_told_from_a_breach(pair: Pair, when: str) -> None:
    if when == "after the greeting":
        pair.qemu.say(GREETING)
    elif when == "later":
        pair.negotiate()
    pair.qemu.sock.close()
    assert isinstance(pair.events.receive()[1], ClosedError)


@pytest.mark.parametrize(
    ("first", "why"),
    [
        ({"return": {}, "id": "x"}, "a reply before it greeted"),
        (POWEROFF, "an event before it greeted"),
        ({"error": {"class": "x", "desc": "y"}}, "a reply before it greeted"),
        ({}, "neither greeting, event nor reply"),
        ({"QMP": {}, "event": "SHUTDOWN"}, "several of them"),
        ([GREETING], "no object"),
        ("text", "no object"),
    ],
)
def test_what_does_not_greet_is_refused(pair: Pair, first: object, why: str) -> None:
    pair.qemu.say(first)
    assert why in pair.refused()


def test_second_greeting_is_refused(ready: Pair) -> None:
    ready.qemu.say(GREETING)
    assert "a second greeting" in ready.refused()


def test_reply_with_a_guessed_id_is_refused(pair: Pair) -> None:
    pair.qemu.say(GREETING)
    pair.events.receive()
    pair.qemu.say({"return": {}, "id": "0"})
    assert "a reply to a command that was not sent" in pair.refused()


def test_reply_to_the_last_command_is_refused(pair: Pair) -> None:
    pair.qemu.say(GREETING)
    pair.events.receive()
    _name, ident = pair.qemu.command()
    pair.qemu.say({"return": {}, "id": ident})
    pair.events.receive()
    pair.qemu.say({"return": {"status": "shutdown"}, "id": ident})
    assert "a reply to a command that was not sent" in pair.refused()


def test_reply_that_nobody_asked_for_is_refused(ready: Pair) -> None:
    ready.qemu.say({"return": {"status": "shutdown"}, "id": ""})
    assert "a reply to a command that was not sent" in ready.refused()


def test_second_reply_to_the_last_command_of_all_is_refused(pair: Pair) -> None:
    pair.qemu.say(GREETING)
    pair.events.receive()
    pair.qemu.reply({})
    pair.events.receive()
    _name, ident = pair.qemu.command()
    pair.qemu.say({"return": {"status": "running"}, "id": ident})
    assert pair.events.receive() == ([("status", "running")], None)
    pair.qemu.say({"return": {"status": "shutdown"}, "id": ident})
    assert "a reply to a command that was not sent" in pair.refused()


def test_refusal_of_the_negotiation_is_refused(pair: Pair) -> None:
    pair.qemu.say(GREETING)
    pair.events.receive()
    _name, ident = pair.qemu.command()
    pair.qemu.say({"error": {"class": "CommandNotFound", "desc": "\x1b[2J"}, "id": ident})
    assert "a refusal of what every QEMU does" in pair.refused()


@pytest.mark.parametrize("answer", [{}, [], "shutdown", {"status": 1}, {"status": None}, {"status": ["shutdown"]}])
def test_status_that_is_no_word_is_refused(pair: Pair, answer: object) -> None:
    pair.qemu.say(GREETING)
    pair.events.receive()
    pair.qemu.reply({})
    pair.events.receive()
    pair.qemu.reply(answer)
    assert "query-status" in pair.refused()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2",
        b'{"event": "SHUTDOWN"',
        b'{"event": "SHUTDOWN"} {}',
        b'{"event": "A", "event": "SHUTDOWN"}',
        b'{"event": "A", "data": {"x": NaN}}',
        b'{"event": "A", "data": ' + b"[" * 9 + b"]" * 9 + b"}",
        b'{"event": "A", "data": [' + b"0," * 300 + b"0]}",
        b'{"event": 1}',
        b'{"event": "A", "data": "\xff"}',
        '{"event": "SHUTDOWN"}'.encode("utf-16"),
        b"[" * 10_000,
    ],
)
def test_line_that_no_qemu_sends_is_refused(ready: Pair, line: bytes) -> None:
    ready.qemu.send(line + b"\n")
    ready.refused()


@pytest.mark.parametrize("end", [b"\n", b""])
def test_line_that_is_too_long_is_refused_whether_it_ends_or_not(ready: Pair, end: bytes) -> None:
    ready.qemu.send(b" " * (LINE_BYTES_MAX + 1) + end)
    assert f"a line of more than {LINE_BYTES_MAX} bytes" in ready.refused()


def test_line_of_the_greatest_length_is_read(ready: Pair) -> None:
    line = json.dumps(POWEROFF).encode()
    ready.qemu.send(b" " * (LINE_BYTES_MAX - len(line)) + line + b"\n")
    assert ready.events.receive() == ([("event", "poweroff")], None)


def test_descriptors_are_refused_and_none_becomes_ours(ready: Pair) -> None:
    before = os.listdir("/proc/self/fd")
    fds = array.array("i", [0, 1])
    ready.qemu.sock.sendmsg([json.dumps(OTHER).encode() + b"\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    assert "descriptors, which were refused" in ready.refused()
    assert os.listdir("/proc/self/fd") == before


def test_more_lines_than_a_ticks_share_wait_for_the_next_tick(ready: Pair) -> None:
    ready.events.tick()
    ready.qemu.send(b'{"event":"A"}\n' * TICK_LINES + json.dumps(POWEROFF).encode() + b"\n")
    assert ready.events.receive() == ([], None)
    assert ready.events.spent
    assert ready.events.receive() == ([], None)
    ready.events.tick()
    assert not ready.events.spent
    assert ready.events.receive() == ([("event", "poweroff")], None)


def test_more_bytes_than_a_ticks_share_wait_for_the_next_tick(ready: Pair) -> None:
    ready.events.tick()
    line = b'{"event":"A"' + b" " * (CHUNK_BYTES - 14) + b"}\n"
    count = TICK_BYTES // len(line)
    for _ in range(count):
        ready.qemu.send(line)
    ready.qemu.say(POWEROFF)
    assert ready.events.receive() == ([], None)
    assert ready.events.spent
    ready.events.tick()
    assert ready.events.receive() == ([("event", "poweroff")], None)


def test_single_bytes_use_up_a_ticks_share_too(ready: Pair) -> None:
    ready.events.tick()
    for _ in range(TICK_READS):
        assert not ready.events.spent
        ready.qemu.send(b" ")
        ready.events.receive()
    assert ready.events.spent


def flood(pair: Pair) -> None:
    pair.qemu.send(b'{"event":"A"}\n' * TICK_LINES)
    assert pair.events.receive() == ([], None)
    assert pair.events.spent


def test_peer_that_floods_for_too_long_is_given_up(ready: Pair) -> None:
    ready.events.tick()
    for _ in range(FLOOD_TICKS - 1):
        flood(ready)
        ready.events.tick()
    flood(ready)
    with pytest.raises(MonitorError) as caught:
        ready.events.tick()
    assert "more than anybody has to say" in caught.value.cause


def test_peer_that_pauses_between_floods_is_not_given_up(ready: Pair) -> None:
    ready.events.tick()
    for _ in range(3):
        for _ in range(FLOOD_TICKS - 1):
            flood(ready)
            ready.events.tick()
        ready.events.tick()


def test_socket_that_nobody_listens_on_is_refused_at_once_and_leaves_nothing_open(tmp_path: Any) -> None:
    before = os.listdir("/proc/self/fd")
    for path in (tmp_path / "none", tmp_path / ("d" * 150) / "none"):
        with pytest.raises(MonitorError, match="cannot connect"):
            Events.connect(str(path))
    assert os.listdir("/proc/self/fd") == before


def test_socket_whose_queue_is_full_is_refused_at_once(tmp_path: Any) -> None:
    path = str(tmp_path / "events")
    made: list[Events] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(0)
        try:
            with pytest.raises(MonitorError, match="does not accept a connection"):
                made.extend(Events.connect(path) for _ in range(8))
        finally:
            for each in made:
                each.close()


def test_closing_twice_is_harmless(ready: Pair) -> None:
    ready.events.close()
    ready.events.close()
    assert ready.events.fileno() == -1
