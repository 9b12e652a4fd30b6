#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A QMP peer that misbehaves in one way, chosen by name; or behaves, with the same shape of traffic.

    qmp_peer.py BEHAVIOUR --fd N          on an inherited, connected socket
    qmp_peer.py BEHAVIOUR --listen PATH   on the first connection to a socket it makes

It prints "ready" before the first byte it sends, and when it listens.
Standard library only, and nothing of depriv: it stands for a QEMU that somebody has taken over. A behaviour that
returns leaves the connection open until the other side, or whoever started it, ends it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1024 * 1024
GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}
EVENT = {"event": "RTC_CHANGE", "data": {"offset": 1}, "timestamp": {"seconds": 1, "microseconds": 2}}


class Peer:
    """One connection, seen from QEMU's side."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def say(self, message: object) -> None:
        self.send(json.dumps(message).encode() + b"\r\n")

    def command(self) -> str:
        """Read one command; return its id."""
        while b"\n" not in self.received:
            data = self.sock.recv(MIB)
            if not data:
                raise SystemExit
            self.received += data
        line, self.received = self.received.split(b"\n", 1)
        ident = json.loads(line)["id"]
        assert isinstance(ident, str)
        return ident

    def reply(self, ident: object, value: object = "fine") -> None:
        self.say({"return": value, "id": ident})

    def negotiate(self) -> str:
        """Greet, accept the negotiation; return its id."""
        self.say(GREETING)
        ident = self.command()
        self.reply(ident, {})
        return ident

    def asked(self) -> str:
        """Negotiate and read the first command; return its id."""
        self.negotiate()
        return self.command()

    def trickle(self, data: bytes, pause_s: float) -> None:
        for byte in data:
            self.send(bytes([byte]))
            time.sleep(pause_s)

    def answer(self, text: str) -> None:
        """Answer the first command with a line of which @ID@ becomes the id, in quotes."""
        self.send(text.replace("@ID@", json.dumps(self.asked())).encode() + b"\n")

    def with_fds(self, data: bytes, count: int) -> None:
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
        socket.send_fds(self.sock, [data], fds)
        for fd in fds:
            os.close(fd)


def answering(text: str) -> Callable[[Peer], None]:
    return lambda peer: peer.answer(text)


def greeting_with(data: bytes) -> Callable[[Peer], None]:
    return lambda peer: peer.send(data)


# --- The greeting ---


def never_greets(_peer: Peer) -> None:
    pass


def greets_slowly_for_ever(peer: Peer) -> None:
    peer.trickle(json.dumps(GREETING).encode() + b" " * 10_000, 0.05)


def closes_before_greeting(peer: Peer) -> None:
    peer.sock.close()


def closes_after_greeting(peer: Peer) -> None:
    peer.say(GREETING)
    peer.sock.close()


def ignores_negotiation(peer: Peer) -> None:
    peer.say(GREETING)


def refuses_negotiation(peer: Peer) -> None:
    peer.say(GREETING)
    peer.say({"error": {"class": "CommandNotFound", "desc": "no \x1b[2J"}, "id": peer.command()})


# --- Time ---


def never_answers(peer: Peer) -> None:
    peer.asked()


def answers_byte_by_byte(peer: Peer) -> None:
    ident = peer.asked()
    peer.trickle(b'{"return": "' + b"x" * 10_000 + f'", "id": "{ident}"}}\n'.encode(), 0.05)


def keeps_each_read_alive_with_events(peer: Peer) -> None:
    peer.asked()
    while True:
        peer.say(EVENT)
        time.sleep(0.02)


def never_reads(peer: Peer) -> None:
    peer.negotiate()


def reads_byte_by_byte(peer: Peer) -> None:
    peer.negotiate()
    while peer.sock.recv(1):
        time.sleep(0.02)


def resets(peer: Peer) -> None:
    peer.negotiate()
    # Closing with unread data makes the other side's read fail with ECONNRESET.
    peer.sock.recv(1)
    peer.sock.close()


def closes_in_mid_line(peer: Peer) -> None:
    peer.asked()
    peer.send(b'{"return": {"status"')
    peer.sock.close()


def shuts_down_its_sending_side(peer: Peer) -> None:
    peer.asked()
    peer.sock.shutdown(socket.SHUT_WR)


# --- Amount ---


def endless_events(peer: Peer) -> None:
    peer.asked()
    line = json.dumps(EVENT).encode() + b"\n"
    while True:
        peer.send(line * 100)


def endless_big_events(peer: Peer) -> None:
    peer.asked()
    while True:
        peer.say({"event": "BIG", "data": "x" * MIB})


def gibibyte_line(peer: Peer) -> None:
    peer.asked()
    peer.send(b'{"return": "')
    for _ in range(1024):
        peer.send(b"x" * MIB)


def many_values(peer: Peer) -> None:
    peer.answer('{"return": [' + "{}," * 600_000 + '{}], "id": @ID@}')


def many_strings(peer: Peer) -> None:
    peer.answer('{"return": [' + '"",' * 600_000 + '""], "id": @ID@}')


def error_flood(peer: Peer) -> None:
    ident = peer.asked()
    line = json.dumps({"error": {"class": "GenericError", "desc": "x"}, "id": ident}).encode() + b"\n"
    while True:
        peer.send(line * 100)


def blank_lines(peer: Peer) -> None:
    peer.asked()
    while True:
        peer.send(b"\r\n" * 1000)


def early_flood(peer: Peer) -> None:
    peer.negotiate()
    line = json.dumps(EVENT).encode() + b"\n"
    while True:
        peer.send(line * 10)


# --- Descriptors ---


def sends_a_descriptor(peer: Peer) -> None:
    peer.with_fds(f'{{"return": "fine", "id": "{peer.asked()}"}}\n'.encode(), 1)


def sends_a_descriptor_with_a_later_byte(peer: Peer) -> None:
    data = f'{{"return": "fine", "id": "{peer.asked()}"}}\n'.encode()
    peer.send(data[:10])
    peer.with_fds(data[10:], 1)


def sends_descriptors_without_end(peer: Peer) -> None:
    peer.asked()
    while True:
        peer.with_fds(json.dumps(EVENT).encode() + b"\n", 253)


def early_descriptors(peer: Peer) -> None:
    peer.negotiate()
    peer.with_fds(json.dumps(EVENT).encode() + b"\n", 253)


# --- Which reply ---


def replies_twice(peer: Peer) -> None:
    line = f'{{"return": "fine", "id": "{peer.asked()}"}}\n'.encode()
    peer.send(line + line)


def replies_to_the_last_command(peer: Peer) -> None:
    last = peer.negotiate()
    peer.command()
    peer.reply(last)


def early_reply(peer: Peer) -> None:
    last = peer.negotiate()
    peer.reply(last)


def early_reply_to_a_guessed_command(peer: Peer) -> None:
    peer.negotiate()
    peer.reply("0")


def greets_again(peer: Peer) -> None:
    peer.asked()
    peer.say(GREETING)


def event_then_half_a_character(peer: Peer) -> None:
    ident = peer.asked()
    peer.send(json.dumps(EVENT).encode() + b'\n{"return": "\xe2\x82", "id": "' + ident.encode() + b'"}\n')


def utf16(peer: Peer) -> None:
    peer.send(f'{{"return": "fine", "id": "{peer.asked()}"}}'.encode("utf-16") + b"\n")


def garbage(peer: Peer) -> None:
    peer.asked()
    peer.send(os.urandom(100_000) + b"\n")


HOSTILE: dict[str, Callable[[Peer], None]] = {
    "no_greeting_but_a_reply": greeting_with(b'{"return": {}, "id": "x"}\n'),
    "no_greeting_but_an_array": greeting_with(b"[]\n"),
    "greeting_of_another_shape": greeting_with(b'{"QMP": 1}\n'),
    "greeting_without_version": greeting_with(b'{"QMP": {"capabilities": []}}\n'),
    "greeting_of_garbage": greeting_with(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "greeting_without_end": greeting_with(b'{"QMP": "' + b"x" * 3 * MIB),
    "greets_twice_at_once": greeting_with(
        json.dumps(GREETING).encode() + b"\n" + json.dumps(GREETING).encode() + b"\n"
    ),
    "id_is_another": answering('{"return": "fine", "id": "0"}'),
    "id_is_a_number": answering('{"return": "fine", "id": 1}'),
    "id_is_an_array": answering('{"return": "fine", "id": [@ID@]}'),
    "id_is_null": answering('{"return": "fine", "id": null}'),
    "no_id": answering('{"return": "fine"}'),
    "error_without_id": answering('{"error": {"class": "GenericError", "desc": "\\u001b]0;x\\u0007"}}'),
    "error_is_text": answering('{"error": "no", "id": @ID@}'),
    "error_without_class": answering('{"error": {"desc": "no"}, "id": @ID@}'),
    "error_class_is_a_number": answering('{"error": {"class": 1, "desc": "no"}, "id": @ID@}'),
    "return_and_error": answering('{"return": "fine", "error": {"class": "x", "desc": "y"}, "id": @ID@}'),
    "event_that_is_a_reply_too": answering('{"event": "X", "return": "fine", "id": @ID@}'),
    "event_without_name": answering('{"event": {"return": "fine"}, "id": @ID@}'),
    "neither_event_nor_reply": answering('{"id": @ID@}'),
    "array_reply": answering('[{"return": "fine", "id": @ID@}]'),
    "text_reply": answering("@ID@"),
    "nan": answering('{"return": NaN, "id": @ID@}'),
    "infinity": answering('{"return": -Infinity, "id": @ID@}'),
    "overflowing_exponent": answering('{"return": 1e999, "id": @ID@}'),
    "integer_of_65_bits": answering('{"return": 18446744073709551616, "id": @ID@}'),
    "doubled_key": answering('{"return": {"a": 1, "a": 2}, "id": @ID@}'),
    "doubled_id": answering('{"return": "fine", "id": "0", "id": @ID@}'),
    "lone_surrogate": answering('{"return": "\\ud800", "id": @ID@}'),
    "raw_control_character": answering('{"return": "\x1b[2J", "id": @ID@}'),
    "nul_after_the_reply": answering('{"return": "fine", "id": @ID@}\0'),
    "more_after_the_reply": answering('{"return": "fine", "id": @ID@} {}'),
    "reply_over_two_lines": answering('{"return": "fine",\n "id": @ID@}'),
    "byte_order_mark": answering('\ufeff{"return": "fine", "id": @ID@}'),
    "many_digits": answering('{"return": ' + "9" * 1_000_000 + ', "id": @ID@}'),
    "deep": answering('{"return": ' + "[" * 50_000 + "]" * 50_000 + ', "id": @ID@}'),
    "deep_objects_never_closed": answering('{"return": ' + '{"a":' * 50_000 + '"id": @ID@}'),
    "nested_one_too_deep": answering('{"return": ' + "[" * 64 + "]" * 64 + ', "id": @ID@}'),
    **{
        behaviour.__name__: behaviour
        for behaviour in (
            never_greets,
            greets_slowly_for_ever,
            closes_before_greeting,
            closes_after_greeting,
            ignores_negotiation,
            refuses_negotiation,
            never_answers,
            answers_byte_by_byte,
            keeps_each_read_alive_with_events,
            never_reads,
            reads_byte_by_byte,
            resets,
            closes_in_mid_line,
            shuts_down_its_sending_side,
            endless_events,
            endless_big_events,
            gibibyte_line,
            many_values,
            many_strings,
            error_flood,
            blank_lines,
            early_flood,
            sends_a_descriptor,
            sends_a_descriptor_with_a_later_byte,
            sends_descriptors_without_end,
            early_descriptors,
            replies_twice,
            replies_to_the_last_command,
            early_reply,
            early_reply_to_a_guessed_command,
            greets_again,
            event_then_half_a_character,
            utf16,
            garbage,
        )
    },
}


# --- The same shapes of traffic, as an honest QEMU could send them ---


def tame_slow_greeting(peer: Peer) -> None:
    peer.trickle(json.dumps(GREETING).encode() + b"\r\n", 0.001)
    peer.reply(peer.command(), {})
    peer.reply(peer.command())


def tame_late_answer(peer: Peer) -> None:
    ident = peer.asked()
    time.sleep(0.2)
    peer.reply(ident)


def tame_byte_by_byte(peer: Peer) -> None:
    peer.trickle(f'{{"return": "fine", "id": "{peer.asked()}"}}\r\n'.encode(), 0.001)


def tame_events(peer: Peer) -> None:
    ident = peer.asked()
    for _ in range(900):
        peer.say(EVENT)
    peer.reply(ident)


def tame_big_events(peer: Peer) -> None:
    ident = peer.asked()
    for _ in range(5):
        peer.say({"event": "BIG", "data": "x" * MIB})
    peer.reply(ident)


def tame_early_events(peer: Peer) -> None:
    peer.negotiate()
    for _ in range(100):
        peer.say(EVENT)
    peer.reply(peer.command())


def tame_event_behind_the_reply(peer: Peer) -> None:
    line = f'{{"return": "fine", "id": "{peer.asked()}"}}\n'.encode()
    peer.send(line + json.dumps(EVENT).encode() + b'\n{"event": "HALF')


def tame_close_behind_the_reply(peer: Peer) -> None:
    peer.reply(peer.asked())
    peer.sock.close()


def tame_reader(peer: Peer) -> None:
    peer.reply(peer.asked())


def tame_long_line(peer: Peer) -> None:
    peer.reply(peer.asked(), "x" * (2 * MIB - 100))


def tame_character_in_two_halves(peer: Peer) -> None:
    ident = peer.asked()
    peer.send(b'{"return": "\xe2\x82')
    time.sleep(0.05)
    peer.send(b'\xac", "id": "' + ident.encode() + b'"}\r\n')


TAME: dict[str, Callable[[Peer], None]] = {
    "tame_numbers": answering('{"return": [18446744073709551615, -9223372036854775808, 1.5e300], "id": @ID@}'),
    "tame_nesting": answering('{"return": ' + "[" * 63 + "]" * 63 + ', "id": @ID@}'),
    "tame_brackets_in_text": answering('{"return": "\\\\\\"' + "[{" * 500_000 + '\\\\", "id": @ID@}'),
    "tame_surrogate_pair": answering('{"return": "\\ud83d\\ude00", "id": @ID@}'),
    "tame_many_values": answering('{"return": [' + "{}," * 45_000 + '{}], "id": @ID@}'),
    "tame_unknown_member": answering('{"id": @ID@, "timestamp": {}, "return": "fine"}'),
    **{
        behaviour.__name__: behaviour
        for behaviour in (
            tame_slow_greeting,
            tame_late_answer,
            tame_byte_by_byte,
            tame_events,
            tame_big_events,
            tame_early_events,
            tame_event_behind_the_reply,
            tame_close_behind_the_reply,
            tame_reader,
            tame_long_line,
            tame_character_in_two_halves,
        )
    },
}


def connection(how: str, where: str) -> socket.socket:
    """Return the connection to behave on."""
    if how == "--fd":
        print("ready", flush=True)
        return socket.socket(fileno=int(where))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # By a relative name, since `where` may be longer than an address can be.
    os.chdir(os.path.dirname(where))
    listener.bind(os.path.basename(where))
    listener.listen(1)
    print("ready", flush=True)
    sock, _address = listener.accept()
    listener.detach()  # stays open, so that more may queue up in vain
    return sock


def main(behaviour: str, how: str, where: str) -> None:
    """Behave until the other side has had enough."""
    behave = {**HOSTILE, **TAME}[behaviour]
    peer = Peer(connection(how, where))
    try:
        behave(peer)
        time.sleep(60)
    except (BrokenPipeError, ConnectionResetError):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
