# SPDX-License-Identifier: Apache-2.0
"""A process in QEMU's place on its events socket that misbehaves in one way, chosen by name; or behaves.

    events_peer.py BEHAVIOUR PATH       on the connections to a socket it makes there, one after the other

It prints "ready" when it listens. Standard library only, and nothing of depriv: it stands for a QEMU that somebody has
taken over. ``qmp_peer.py`` beside it has the ways in which a monitor's replies can be wrong; these are those that
only matter to who listens to many at once, and for long.
"""

from __future__ import annotations

import array
import json
import os
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}
POWEROFF = {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}}
TINY = b'{"event":"A"}\n'


def line(message: object) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


def command(sock: socket.socket) -> str:
    received = b""
    while not received.endswith(b"\n"):
        data = sock.recv(1)
        if not data:
            raise BrokenPipeError
        received += data
    ident = json.loads(received)["id"]
    assert isinstance(ident, str)
    return ident


def negotiate(sock: socket.socket, status: str = "running") -> None:
    """Behave as QEMU does until only events are due."""
    sock.sendall(line(GREETING))
    sock.sendall(line({"return": {}, "id": command(sock)}))
    sock.sendall(line({"return": {"status": status}, "id": command(sock)}))


def honest(sock: socket.socket) -> None:
    negotiate(sock)


def silent(_sock: socket.socket) -> None:
    pass


def half_a_greeting(sock: socket.socket) -> None:
    sock.sendall(line(GREETING)[:40])


def half_a_line(sock: socket.socket) -> None:
    negotiate(sock)
    sock.sendall(line(POWEROFF)[:-4])


def tiny_events(sock: socket.socket) -> None:
    negotiate(sock)
    while True:
        sock.sendall(TINY * 4000)


def big_events(sock: socket.socket) -> None:
    negotiate(sock)
    data = line({"event": "A", "data": "x" * 15_000}) * 16
    while True:
        sock.sendall(data)


def costly_events(sock: socket.socket) -> None:
    negotiate(sock)
    data = line({"event": "A", "data": [{}] * 200}) * 64
    while True:
        sock.sendall(data)


def single_bytes(sock: socket.socket) -> None:
    negotiate(sock)
    while True:
        for byte in TINY:
            sock.send(bytes([byte]))


def poweroffs(sock: socket.socket) -> None:
    negotiate(sock)
    data = line(POWEROFF) * 500
    while True:
        sock.sendall(data)


def endless_line(sock: socket.socket) -> None:
    negotiate(sock)
    while True:
        sock.sendall(b"x" * 100_000)


def many_values(sock: socket.socket) -> None:
    negotiate(sock)
    while True:
        sock.sendall(b"[" + b"{}," * 5000 + b"{}]\n")


def descriptors(sock: socket.socket) -> None:
    negotiate(sock)
    fds = array.array("i", [os.open("/dev/null", os.O_RDONLY) for _ in range(250)])
    while True:
        sock.sendmsg([TINY], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


def greetings(sock: socket.socket) -> None:
    while True:
        sock.sendall(line(GREETING) * 100)


def replies(sock: socket.socket) -> None:
    negotiate(sock)
    while True:
        sock.sendall(line({"return": {"status": "shutdown"}, "id": "0"}) * 100)


def garbage(sock: socket.socket) -> None:
    while True:
        sock.sendall(os.urandom(65536))


def hangs_up(sock: socket.socket) -> None:
    sock.close()


def hangs_up_later(sock: socket.socket) -> None:
    negotiate(sock)
    sock.close()


def hangs_up_in_mid_line(sock: socket.socket) -> None:
    negotiate(sock)
    sock.sendall(b'{"event": "SHUTDO')
    sock.close()


def resets(sock: socket.socket) -> None:
    sock.sendall(line(GREETING))
    time.sleep(0.1)  # with what we sent unread
    sock.close()


def ends_then_floods(sock: socket.socket) -> None:
    negotiate(sock)
    sock.sendall(line(POWEROFF))
    while True:
        sock.sendall(TINY * 4000)


BEHAVIOURS: dict[str, Callable[[socket.socket], None]] = {
    each.__name__: each
    for each in (
        honest,
        silent,
        half_a_greeting,
        half_a_line,
        tiny_events,
        big_events,
        costly_events,
        single_bytes,
        poweroffs,
        endless_line,
        many_values,
        descriptors,
        greetings,
        replies,
        garbage,
        hangs_up,
        hangs_up_later,
        hangs_up_in_mid_line,
        resets,
        ends_then_floods,
    )
}


def main(behaviour: str, path: str) -> None:
    """Behave on one connection after the other, each until the other side has had enough."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # By a relative name, since the path may be longer than an address can be.
    os.chdir(os.path.dirname(path))
    listener.bind(os.path.basename(path))
    listener.listen(1)
    print("ready", flush=True)
    while True:
        sock, _address = listener.accept()
        try:
            BEHAVIOURS[behaviour](sock)
            if sock.fileno() >= 0:
                sock.recv(1)  # until the other side hangs up
        except (BrokenPipeError, ConnectionResetError):
            pass
        sock.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
