# SPDX-License-Identifier: Apache-2.0
"""The monitor against peers that misbehave: refused in time, in bounded memory, with no descriptor left open."""

from __future__ import annotations

import os
import re
import resource
import runpy
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest

from depriv.errors import MonitorError, render
from depriv.qmp import CommandError, Limits, Monitor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    StartPeer = Callable[[str], socket.socket]
    ListenPeer = Callable[[str, str], None]

MIB = 1024 * 1024
GREET_S = 0.6
ANSWER_S = 0.4
MARGIN_S = 0.5  # parsing what came last, on a busy machine
GROWTH_BYTES = 32 * MIB
LARGE = {"text": "y" * (4 * MIB)}  # more than both sockets' buffers hold

GONE = "QEMU closed its monitor"
SLOW = "no whole answer from QEMU in time"
NO_JSON = "not the JSON it speaks"
NO_COMMAND = "a reply to a command that was not sent"
NEITHER = "neither greeting, event nor reply"
UNASKED = "a reply that no command asked for"

HOSTILE = {
    "never_greets": SLOW,
    "greets_slowly_for_ever": SLOW,
    "closes_before_greeting": GONE,
    "closes_after_greeting": GONE,
    "ignores_negotiation": SLOW,
    "refuses_negotiation": r"QEMU refuses\ncause: no \\x1b\[2J",
    "greets_twice_at_once": "a second greeting",
    "no_greeting_but_a_reply": "QEMU did not greet",
    "no_greeting_but_an_array": NO_JSON,
    "greeting_of_another_shape": "QEMU's greeting: not an object",
    "greeting_without_version": "QEMU's greeting: version is missing",
    "greeting_of_garbage": NO_JSON,
    "greeting_without_end": "a line of more than 2097152 bytes",
    "never_answers": SLOW,
    "answers_byte_by_byte": SLOW,
    "keeps_each_read_alive_with_events": SLOW,
    "never_reads": SLOW,
    "reads_byte_by_byte": SLOW,
    "resets": f"{GONE}\ncause: .*reset by peer",
    "closes_in_mid_line": GONE,
    "shuts_down_its_sending_side": GONE,
    "endless_events": "more than 1000 events",
    "endless_big_events": "more than 8388608 bytes",
    "gibibyte_line": "a line of more than 2097152 bytes",
    "many_values": "more than 100000 values",
    "many_strings": "more than 100000 values",
    "error_flood": UNASKED,
    "blank_lines": NO_JSON,
    "early_flood": "more than 1000 events",
    "sends_a_descriptor": "descriptors, which were refused",
    "sends_a_descriptor_with_a_later_byte": "descriptors, which were refused",
    "sends_descriptors_without_end": "descriptors, which were refused",
    "early_descriptors": "descriptors, which were refused",
    "replies_twice": UNASKED,
    "replies_to_the_last_command": NO_COMMAND,
    "early_reply": UNASKED,
    "early_reply_to_a_guessed_command": UNASKED,
    "greets_again": "a second greeting",
    "event_then_half_a_character": f"{NO_JSON}.*utf-8",
    "many_digits": "an integer beyond 64 bits",
    "integer_of_65_bits": "an integer beyond 64 bits",
    "deep": "nested deeper than 64 levels",
    "deep_objects_never_closed": "nested deeper than 64 levels",
    "nested_one_too_deep": "nested deeper than 64 levels",
    "utf16": NO_JSON,
    "garbage": NO_JSON,
    "id_is_another": NO_COMMAND,
    "id_is_a_number": NO_COMMAND,
    "id_is_an_array": NO_COMMAND,
    "id_is_null": NO_COMMAND,
    "no_id": "without the id of the command",
    "error_without_id": r"without the id of the command; it says: .*\\x1b\]0;x\\x07",
    "error_is_text": "QEMU's refusal: not an object",
    "error_without_class": "QEMU's refusal: class is missing",
    "error_class_is_a_number": "QEMU's refusal: class: not text",
    "return_and_error": NEITHER,
    "event_that_is_a_reply_too": NEITHER,
    "event_without_name": "the name of an event: not text",
    "neither_event_nor_reply": NEITHER,
    "array_reply": NO_JSON,
    "text_reply": NO_JSON,
    "nan": "NaN is no JSON",
    "infinity": "-Infinity is no JSON",
    "overflowing_exponent": "a number too large or too long",
    "doubled_key": "the same key twice",
    "doubled_id": "the same key twice",
    "lone_surrogate": f"{NO_JSON}.*surrogates not allowed",
    "raw_control_character": f"{NO_JSON}.*control character",
    "nul_after_the_reply": f"{NO_JSON}: Extra data",
    "more_after_the_reply": f"{NO_JSON}: Extra data",
    "reply_over_two_lines": NO_JSON,
    "byte_order_mark": NO_JSON,
}

TAME: dict[str, object] = {
    "tame_numbers": [2**64 - 1, -(2**63), 1.5e300],
    "tame_nesting": None,  # too deep to write down
    "tame_brackets_in_text": '\\"' + "[{" * 500_000 + "\\",
    "tame_surrogate_pair": "\U0001f600",
    "tame_many_values": [{}] * 45_001,
    "tame_unknown_member": "fine",
    "tame_slow_greeting": "fine",
    "tame_late_answer": "fine",
    "tame_byte_by_byte": "fine",
    "tame_events": "fine",
    "tame_big_events": "fine",
    "tame_early_events": "fine",
    "tame_event_behind_the_reply": "fine",
    "tame_close_behind_the_reply": "fine",
    "tame_reader": "fine",
    "tame_long_line": "x" * (2 * MIB - 100),
    "tame_character_in_two_halves": "\u20ac",
}


def open_fds() -> set[str]:
    fds = set(os.listdir("/proc/self/fd"))
    return {fd for fd in fds if os.path.lexists(f"/proc/self/fd/{fd}")}  # not the listing's own


def memory_bytes(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def forget_peak_memory() -> None:
    # "5" resets VmHWM to VmRSS. Source: proc_pid_clear_refs(5)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def wait_readable(monitor: Monitor) -> None:
    poll = select.poll()
    poll.register(monitor, select.POLLIN)
    poll.poll(1000)
    time.sleep(0.05)


def arguments_for(behaviour: str) -> dict[str, object]:
    return {**LARGE} if "read" in behaviour and "each_read" not in behaviour else {}


def talk(sock: socket.socket, behaviour: str) -> tuple[MonitorError, Monitor | None, float]:
    """Return how a conversation with the peer failed, with which monitor, and how late."""
    monitor = None
    deadline = time.monotonic() + GREET_S
    try:
        monitor = Monitor.adopt(sock, timeout_s=GREET_S)
        if behaviour.startswith("early"):
            wait_readable(monitor)
        deadline = time.monotonic() + ANSWER_S
        value = monitor.execute("query-status", arguments_for(behaviour), timeout_s=ANSWER_S)
    except MonitorError as error:
        return error, monitor, time.monotonic() - deadline
    pytest.fail(f"{behaviour} was believed: {str(value)[:80]}")


@pytest.mark.parametrize(("behaviour", "expected"), HOSTILE.items(), ids=HOSTILE)
def test_hostile_peer_is_refused_in_time_and_in_bounded_memory_and_leaves_no_descriptor(
    start_peer: StartPeer, behaviour: str, expected: str
) -> None:
    sock = start_peer(behaviour)
    fds, own = open_fds(), str(sock.fileno())
    forget_peak_memory()
    memory = memory_bytes("VmRSS")
    error, monitor, late_s = talk(sock, behaviour)
    assert late_s <= MARGIN_S
    assert memory_bytes("VmHWM") - memory <= GROWTH_BYTES
    assert open_fds() == fds - {own}
    text = render(error)
    assert re.search(expected, text), text
    assert all(line.isprintable() for line in text.splitlines())
    assert error.fix or isinstance(error, CommandError)
    if monitor is not None:
        with pytest.raises(MonitorError, match="this monitor is unusable"):
            monitor.execute("query-status", timeout_s=ANSWER_S)


@pytest.mark.parametrize(("behaviour", "expected"), TAME.items(), ids=TAME)
def test_honest_peer_with_the_same_traffic_is_believed(start_peer: StartPeer, behaviour: str, expected: object) -> None:
    with Monitor.adopt(start_peer(behaviour), timeout_s=2.0) as monitor:
        if "early" in behaviour:
            wait_readable(monitor)
        value = monitor.execute("query-status", arguments_for(behaviour), timeout_s=5.0)
    assert expected is None or value == expected


def test_every_behaviour_of_the_peer_is_tried() -> None:
    program = runpy.run_path(os.path.join(os.path.dirname(__file__), "qmp_peer.py"))
    assert program["HOSTILE"].keys() == HOSTILE.keys()
    assert program["TAME"].keys() == TAME.keys()


def test_descriptors_are_refused_even_when_our_table_is_full(start_peer: StartPeer) -> None:
    with Monitor.adopt(start_peer("sends_a_descriptor"), timeout_s=GREET_S) as monitor:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, open_fds())) + 1, hard))
        try:
            with pytest.raises(MonitorError) as caught:
                monitor.execute("query-status", timeout_s=ANSWER_S)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "descriptors" in caught.value.cause


def test_a_tighter_cap_on_events_holds(start_peer: StartPeer) -> None:
    with (
        Monitor.adopt(start_peer("tame_events"), timeout_s=GREET_S, limits=Limits(events=899)) as monitor,
        pytest.raises(MonitorError) as caught,
    ):
        monitor.execute("query-status", timeout_s=5.0)
    assert "more than 899 events" in caught.value.cause


def test_listening_peer_is_reached_by_a_path_longer_than_an_address(listen_peer: ListenPeer, tmp_path: Path) -> None:
    parent = tmp_path / ("d" * 150)
    parent.mkdir()
    path = str(parent / "monitor")
    listen_peer("tame_reader", path)
    fds = open_fds()
    with Monitor.connect(path, timeout_s=GREET_S) as monitor:
        assert monitor.execute("query-status", timeout_s=ANSWER_S) == "fine"
    assert open_fds() == fds


def test_listening_peer_that_never_greets_is_given_up_in_time(listen_peer: ListenPeer, tmp_path: Path) -> None:
    path = str(tmp_path / "monitor")
    listen_peer("never_greets", path)
    fds = open_fds()
    began = time.monotonic()
    with pytest.raises(MonitorError, match=SLOW):
        Monitor.connect(path, timeout_s=ANSWER_S)
    assert time.monotonic() - began <= ANSWER_S + MARGIN_S
    assert open_fds() == fds


def test_peer_with_a_full_queue_of_connections_is_given_up_in_time(listen_peer: ListenPeer, tmp_path: Path) -> None:
    path = str(tmp_path / "monitor")
    listen_peer("ignores_negotiation", path)  # accepts one connection, and has room for two more
    queue = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(8)]
    try:
        queue[0].connect(path)
        assert queue[0].recv(1) == b"{"  # so that one is accepted, and no place in the queue falls free later
        for sock in queue[1:]:
            sock.setblocking(False)
            sock.connect_ex(path)
        fds = open_fds()
        began = time.monotonic()
        with pytest.raises(MonitorError, match="does not accept a connection") as caught:
            Monitor.connect(path, timeout_s=ANSWER_S)
        assert ANSWER_S <= time.monotonic() - began <= ANSWER_S + MARGIN_S
        assert "full" in caught.value.cause
        assert open_fds() == fds
    finally:
        for sock in queue:
            sock.close()
