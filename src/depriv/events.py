# SPDX-License-Identifier: Apache-2.0
"""The events socket of one QEMU, read without ever waiting. The peer is hostile, and one of many.

On this second QMP socket nothing is sent but ``qmp_capabilities`` and, once, ``query-status``; from then on it is only
listened to. What a caller may rely on, whatever the peer does:

- no call waits, and a peer is served a bounded number of reads, bytes and lines per tick of the caller's clock, so
  that one that floods costs a bounded share, and the others are heard in time;
- what is kept of it is at most one line and one chunk, and no descriptor is accepted;
- a reply counts only if it carries the unguessable id of the command that is due;
- after the first breach of the protocol nothing more is read, and the caller is told why;
- what comes out is a word of ``depriv.policy`` or the peer's own word for its guest's status, and nothing else.

Source: docs/interop/qmp-spec.txt of QEMU 7.2.
"""

from __future__ import annotations

import os
import socket
from time import monotonic

from depriv.errors import MonitorError
from depriv.policy import reason_of_event
from depriv.qmp import connected
from depriv.text import printable
from depriv.untrusted import DISTRUST, as_str, decode, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Never, Self

# Honest lines here have less than 1 KiB: events, the greeting, two short replies (measured with QEMU 7.2.22).
LINE_BYTES_MAX: Final = 16 * 1024
CHUNK_BYTES: Final = 16 * 1024
_DEPTH: Final = 8
_VALUES: Final = 256

# What is taken from one peer per tick. QEMU itself sends most kinds of event at most once a second
# (monitor_qapi_event_conf, monitor/monitor.c of QEMU 7.2).
TICK_READS: Final = 64  # a peer that sends single bytes wakes us for each of them
TICK_BYTES: Final = 64 * 1024
TICK_LINES: Final = 200
FLOOD_TICKS: Final = 10  # so many ticks in a row with more than that are a breach

_KINDS: Final = ("QMP", "event", "return", "error")


class ClosedError(MonitorError):
    """QEMU has closed the connection: it ends, or it does not care for its events."""


class Events:
    """One connection to one QEMU's events socket. Made by ``connect`` or ``adopt``."""

    __slots__ = ("_buffer", "_bytes", "_due", "_floods", "_ident", "_lines", "_reads", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        """Take ownership of a connected socket that does not block; nothing is sent yet."""
        self._sock = sock
        self._buffer = bytearray()
        self._due = "greeting"  # then "capabilities", "status" and, for good, "events"
        self._ident = ""  # of the command whose reply is due
        self._floods = 0  # ticks in a row with more than a tick's share
        self._reads = TICK_READS  # what is left of this tick's share
        self._bytes = TICK_BYTES
        self._lines = TICK_LINES

    @classmethod
    def connect(cls, path: str, *, netns_of: int = -1) -> Self:
        """Return a new connection to the socket at ``path``, at once: QEMU need not have accepted it yet.

        ``netns_of`` is a pidfd: our end is made in that process's network namespace (see ``Monitor.connect``).

        Raises:
            MonitorError: nobody listens, or more connections wait already than may; nothing is left open.
        """
        return cls(connected(path, monotonic(), netns_of))

    @classmethod
    def adopt(cls, sock: socket.socket) -> Self:
        """Return a connection on an already connected stream socket, which from now on belongs to it."""
        sock.setblocking(False)
        return cls(sock)

    @property
    def greeted(self) -> bool:
        """Whether QEMU has answered all that was asked, and only events are due."""
        return self._due == "events"

    @property
    def spent(self) -> bool:
        """Whether this tick's share is used up: there is no use in polling before ``tick``."""
        return min(self._reads, self._bytes, self._lines) <= 0

    def tick(self) -> None:
        """Grant the next tick's share.

        Raises:
            MonitorError: QEMU has sent more than its share for too many ticks in a row.
        """
        self._floods = self._floods + 1 if self.spent else 0
        self._reads, self._bytes, self._lines = TICK_READS, TICK_BYTES, TICK_LINES
        if self._floods >= FLOOD_TICKS:
            _distrust("more than anybody has to say")

    def receive(self) -> tuple[list[tuple[str, str]], MonitorError | None]:
        """Return what QEMU has said by now, and why it is not to be listened to any longer, or None. Does not wait.

        Said are ``("status", WORD)``, once, its own word for how the guest is; and ``("event", REASON)`` with a word of
        ``policy.ENDS``. What came before a breach or the end counts: QEMU says what happened, and then it is gone.
        """
        said: list[tuple[str, str]] = []
        try:
            while not self.spent:
                line = self._line()
                if line is not None:
                    self._lines -= 1
                    said += self._understood(line)
                elif not self._more():
                    break
        except MonitorError as error:
            return said, error
        finally:
            if not self._buffer:
                self._buffer = bytearray()  # the old one keeps the room that it once needed
        return said, None

    def fileno(self) -> int:
        """Return the descriptor, for polling; -1 once closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection; QEMU goes on. Closing twice is harmless."""
        self._buffer = bytearray()
        self._sock.close()

    def _line(self) -> bytes | None:
        """Take one line out of the buffer; None if it holds no whole line."""
        end = self._buffer.find(b"\n")
        if (len(self._buffer) if end < 0 else end) > LINE_BYTES_MAX:
            _distrust(f"a line of more than {LINE_BYTES_MAX} bytes")
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _more(self) -> bool:
        """Add what has come to the buffer, up to a chunk; False if nothing has."""
        try:
            # No room for ancillary data, so that descriptors never become ours: see Monitor._receive in depriv.qmp.
            data, _none, flags, _peer = self._sock.recvmsg(min(CHUNK_BYTES, self._bytes), 0)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ClosedError("QEMU closed its events socket") from error
        if flags & socket.MSG_CTRUNC:
            _distrust("descriptors, which were refused")
        if not data:
            raise ClosedError("QEMU closed its events socket", cause="end of file")
        self._reads -= 1
        self._bytes -= len(data)
        self._buffer += data
        return True

    def _understood(self, line: bytes) -> list[tuple[str, str]]:
        """Return what one line says that matters, and send the next command if it was the reply to one."""
        try:
            message = decode(line, depth=_DEPTH, values=_VALUES)
        except ValueError as error:
            _distrust(f"a line that is not the JSON it speaks: {printable(str(error), 200)}")
        if [kind in message for kind in _KINDS].count(True) != 1:
            _distrust("an object that is neither greeting, event nor reply, or several of them")
        if "event" in message:
            if self._due == "greeting":
                _distrust("an event before it greeted")
            reason = reason_of_event(as_str(message["event"], "the name of an event"), message.get("data"))
            return [("event", reason)] if reason else []
        return self._answered(message)

    def _answered(self, message: dict[str, object]) -> list[tuple[str, str]]:
        """Go on after the greeting or a reply: the one that is due, and no other."""
        if ("QMP" in message) != (self._due == "greeting"):
            _distrust("a reply before it greeted" if self._due == "greeting" else "a second greeting")
        if self._due == "greeting":
            self._send("qmp_capabilities", "capabilities")
            return []
        if self._due == "events" or message.get("id") != self._ident:
            _distrust("a reply to a command that was not sent")
        if "error" in message:
            _distrust("a refusal of what every QEMU does")
        if self._due == "capabilities":
            self._send("query-status", "status")
            return []
        self._due = "events"
        return [("status", field(message["return"], "status", as_str, "query-status"))]

    def _send(self, command: str, due: str) -> None:
        """Send one of the two commands. They always fit into an empty socket, whether or not QEMU reads."""
        # Random, so that only who has read this command can answer it.
        self._ident, self._due = os.urandom(8).hex(), due
        data = b'{"execute": "%s", "id": "%s"}\n' % (command.encode(), self._ident.encode())
        try:
            sent = self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise ClosedError("QEMU closed its events socket") from error
        if sent != len(data):
            raise MonitorError("QEMU's events socket takes no command", cause=f"{sent} of {len(data)} bytes fitted")


def _distrust(said: str) -> Never:
    """Raise: QEMU sent what makes no sense."""
    raise MonitorError("QEMU talks nonsense on its events socket", cause=f"it sent {said}", fix=DISTRUST)
