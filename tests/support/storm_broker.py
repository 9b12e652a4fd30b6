# SPDX-License-Identifier: Apache-2.0
"""Kills, or stops for a while, one participant of one command at one exact place, from outside.

The process that gets to the place (:mod:`tests.support.storm_point`) waits there until the victim is dead, or stopped
to be killed a little later. Everybody is named by a pidfd: whoever has a victim's number next is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import threading
import time

from depriv.records import Record

_DEATH_TIMEOUT_S = 5.0


class Hit(Record):
    """What is to happen: where who is stopped, and who is killed then."""

    who: str  # whose place it is: "toolstack" or "jail" (and its children)
    at: str  # "line" (the nth of all), "place" (the nth time at one), "step", "killer"; "count": all lines, kill nobody
    victim: str  # "self" (who gets there), "toolstack", "jail" or "child" (of the jail: QEMU, before exec and after)
    file: str = ""
    line: int = 0
    nth: int = 0
    step: str = ""  # kind and number: "SetLimit3"
    when: str = ""  # "before" or "after"
    stop: bool = False  # SIGSTOP first
    delay_ms: int = 0  # until SIGKILL, while the others go on
    resume: bool = False  # SIGCONT instead of SIGKILL: it was only slow, and nobody may be harmed by that


class Broker:
    """Serves the processes of one command."""

    def __init__(self, address: str, hit: Hit, folder: str) -> None:
        """Listen on an abstract address; ``folder`` is in the command line of every process of this storm."""
        self.struck = ""  # where and who, once it has happened
        self.lines: dict[tuple[str, int, str], int] = {}
        self._hit = hit
        self._folder = folder.encode()
        self._toolstack = 0
        self._jails: list[int] = []
        self._later: list[threading.Thread] = []
        self._end = os.eventfd(0)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + address)
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._serve)

    def start(self, toolstack: int) -> None:
        """Begin, with the command's process, which is a child of ours."""
        self._toolstack = toolstack
        self._thread.start()

    def close(self) -> None:
        """End, once what was to come later has come. Who is still waiting at a place goes on."""
        os.eventfd_write(self._end, 1)
        self._thread.join()
        for thread in self._later:
            thread.join()
        os.close(self._end)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._end, select.POLLIN)
        peers: dict[int, socket.socket] = {}
        while True:
            for fd, _event in poll.poll():
                if fd == self._end:
                    for peer in (*peers.values(), self._listener):
                        peer.close()
                    return
                if fd == self._listener.fileno():
                    peer = self._listener.accept()[0]
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                    peers[peer.fileno()] = peer
                    poll.register(peer, select.POLLIN)
                    peer.send(b"h")
                elif not self._hear(peers[fd]):
                    poll.unregister(fd)
                    peers.pop(fd).close()

    def _hear(self, peer: socket.socket) -> bool:
        """Serve one message; False: the peer is gone."""
        try:
            data, ancillary, _flags, _address = peer.recvmsg(65536, socket.CMSG_SPACE(12))
        except OSError:
            return False
        if not data or not ancillary:
            return False
        sender = struct.unpack("3i", ancillary[0][2])[0]
        word, _, rest = data.decode().partition(" ")
        if word == "role" and rest == "jail":
            self._jails.append(sender)
        elif word == "line":
            file, line, function, count = json.loads(rest)
            key = (file, line, function)
            self.lines[key] = self.lines.get(key, 0) + count
        elif word == "reached" and not self.struck:
            self._strike(sender, rest)
        with contextlib.suppress(OSError):
            peer.send(b"g")
        return True

    def _strike(self, sender: int, place: str) -> None:
        hit = self._hit
        pid = self._victim(sender)
        try:
            pidfd = os.pidfd_open(pid) if pid > 0 else -1
        except ProcessLookupError:
            pidfd = -1
        if pidfd < 0:
            return
        # Once more, now that the number cannot become another's.
        if self._victim(sender) != pid:
            os.close(pidfd)
            return
        later = f"{hit.delay_ms} ms later " if hit.delay_ms else ""
        self.struck = (
            f"{'stop, ' if hit.stop else ''}{later}{'resume' if hit.resume else 'kill'} {hit.victim} {pid} at {place}"
        )
        if hit.stop:
            _send(pidfd, signal.SIGSTOP)
        if hit.delay_ms:
            self._later.append(threading.Thread(target=_end, args=(pidfd, hit)))
            self._later[-1].start()
        else:
            _end(pidfd, hit)

    def _victim(self, sender: int) -> int:
        """Return the victim's process number now; 0: there is none."""
        match self._hit.victim:
            case "self":
                return sender
            case "toolstack":
                return self._toolstack if self._is_ours(self._toolstack) else 0
            case "jail":
                return next((pid for pid in reversed(self._jails) if self._is_ours(pid)), 0)
            case _:
                return next((pid for jail in reversed(self._jails) for pid in self._children(jail)), 0)

    def _is_ours(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                return self._folder in file.read()
        except OSError:
            return False

    def _children(self, pid: int) -> list[int]:
        try:
            with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
                return [int(word) for word in file.read().split()] if self._is_ours(pid) else []
        except OSError:
            return []


def _end(pidfd: int, hit: Hit) -> None:
    """Kill and see it dead, or let it go on; close the descriptor."""
    time.sleep(hit.delay_ms / 1000)
    _send(pidfd, signal.SIGCONT if hit.resume else signal.SIGKILL)
    if not hit.resume:
        select.select([pidfd], (), (), _DEATH_TIMEOUT_S)
    os.close(pidfd)


def _send(pidfd: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)
