# SPDX-License-Identifier: Apache-2.0
"""The QMP client. The peer is hostile: from the guest's first instruction on, every byte from QEMU may be forged.

What a caller may rely on, whatever the peer does:

- a call ends by its deadline, which covers sending and receiving together;
- what is read, kept and parsed is bounded by ``Limits``, and no descriptor is accepted;
- a reply is returned only if it carries the unguessable id of its command, so its sender has read that command;
- after the first breach of the protocol the connection is closed, and the monitor refuses every further call;
- nothing in a reply names anything on the host: callers bring their own ids, and never open, kill or follow a reply.

One JSON object per line, as QEMU sends unless asked for ``pretty=on``; one command at a time, so that its reply is the
only one due. Source: docs/interop/qmp-spec.txt of QEMU 7.2.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from time import monotonic, sleep

from depriv.errors import MonitorError
from depriv.records import Record
from depriv.text import printable
from depriv.untrusted import DISTRUST, as_list, as_object, as_str, decode, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Final, Never, Self, TypeVar

    T = TypeVar("T")

CHUNK_BYTES: Final = 64 * 1024
MAX_FDS: Final = 16  # SOCKET_MAX_FDS in io/channel-socket.c of QEMU 7.2: more would be cut off without a word
MAX_PATH_BYTES: Final = 107  # sun_path holds 108 with the final NUL. Source: unix(7)
RECENT_EVENTS: Final = 16

_KINDS: Final = ("QMP", "event", "return", "error")
_ENDED: Final = "see the end of the domain's QEMU log; `depriv destroy` removes what is left of it"
_SLOW: Final = "if the host is overloaded, try again; else destroy the domain, which needs no answer from QEMU"


class CommandError(MonitorError):
    """QEMU refused the command, in good order. The monitor stays usable.

    ``error_class`` and ``description`` are QEMU's words, safe to print, and true only if QEMU is.
    """

    def __init__(self, command: str, *, error_class: str, description: str) -> None:
        """Take the command, and QEMU's words as it sent them."""
        self.command = command
        self.error_class = printable(error_class, 64)
        self.description = printable(description)
        super().__init__(f"{command}: QEMU refuses", cause=self.description)


class Limits(Record):
    """What a peer may use up before it counts as hostile. All but ``depth`` and ``line_bytes`` are per call.

    The longest honest reply, to query-qmp-schema, takes 207000 bytes, 16000 of them opening brackets and commas
    (measured with QEMU 7.2.22).
    """

    line_bytes: int = 2 * 1024 * 1024
    total_bytes: int = 8 * 1024 * 1024
    depth: int = 64  # nested arrays and objects
    values: int = 100_000  # brackets opened and commas in one line: two bytes of it can cost us a hundred
    events: int = 1000

    def validate(self) -> None:
        """Refuse limits that would refuse every peer."""
        for name, value in self.as_dict().items():
            if value <= 0:
                raise ValueError(f"{name} must be positive")


DEFAULT_LIMITS: Final = Limits()
_CLONE_NEWNET: Final = 0x40000000  # <linux/sched.h>


class Monitor:
    """One connection to one QEMU. Made by ``connect`` or ``adopt``; not for use by several threads."""

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        """Take ownership of a connected socket; nothing is sent yet."""
        self._sock = sock
        self._limits = limits
        self._state = "ready"  # "ready", "busy" or why it is unusable
        self._buffer = bytearray()
        self._searched = 0  # so many bytes of the buffer hold no newline
        self._doing = ""
        self._deadline = 0.0
        self._received_bytes = 0  # in this call
        self._events = 0  # in this call
        self._recent: tuple[str, ...] = ()

    @classmethod
    def connect(cls, path: str, *, timeout_s: float, limits: Limits = DEFAULT_LIMITS, netns_of: int = -1) -> Self:
        """Return a monitor ready for commands, connected to the socket at ``path`` (of any length).

        ``netns_of`` is a pidfd: our end is then made in that process's network namespace. The peer's end of a
        connection belongs to the namespace that ours was made in, and shows it that namespace's interfaces.

        Raises:
            MonitorError: nobody listens, or the peer does not greet as QEMU does by the deadline; nothing is left open.
        """
        deadline = _deadline(timeout_s)
        return cls._negotiated(connected(path, deadline, netns_of), deadline, limits)

    @classmethod
    def adopt(cls, sock: socket.socket, *, timeout_s: float, limits: Limits = DEFAULT_LIMITS) -> Self:
        """Return a monitor ready for commands on an already connected socket, which from now on belongs to it.

        Raises:
            MonitorError: as for ``connect``; ``sock`` is closed.
        """
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise ValueError("a monitor is an AF_UNIX stream socket")
        return cls._negotiated(sock, _deadline(timeout_s), limits)

    @classmethod
    def _negotiated(cls, sock: socket.socket, deadline: float, limits: Limits) -> Self:
        """Return a monitor in command mode; on any failure the socket is closed."""
        monitor = cls(sock, limits)

        def negotiate() -> None:
            _check_greeting(monitor._message())
            monitor._exchange(*_request("qmp_capabilities", None), ())

        try:
            sock.setblocking(False)
            monitor._guarded("the greeting", deadline, negotiate)
        except BaseException:
            monitor.close()
            raise
        return monitor

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float,
    ) -> object:
        """Return what QEMU answers to ``command``: checked JSON of unchecked meaning (see ``field``).

        Args:
            command: QMP command.
            arguments: Its arguments; what JSON cannot hold is a ``TypeError`` or ``ValueError``, and nothing is sent.
            fds: Descriptors sent along (add-fd, getfd); the caller still owns, and should close, its own.
            timeout_s: For all of it. Without an answer by then, whether QEMU acts on the command is unknown. QEMU takes
                seconds for each half megabyte of arguments, since it reads its monitor byte by byte.

        Raises:
            CommandError: QEMU refused; the monitor stays usable.
            MonitorError: QEMU is gone, too slow, or talks nonsense; the connection is closed.
        """
        if len(fds) > MAX_FDS:
            raise ValueError(f"QEMU takes at most {MAX_FDS} descriptors with a command")
        ident, data = _request(command, arguments)
        return self._guarded(command, _deadline(timeout_s), lambda: self._exchange(ident, data, fds))

    def drain(self) -> int:
        """Drop the events that have piled up; return how many there were. Does not wait.

        Raises:
            MonitorError: QEMU is gone, or sent anything but events; the connection is closed.
        """

        def work() -> int:
            self._drain()
            return self._events

        return self._guarded("idle", _deadline(1.0), work)

    @property
    def recent_events(self) -> tuple[str, ...]:
        """Names of the last few events, safe to print; for diagnosis only, since anyone in QEMU can send them."""
        return self._recent

    def fileno(self) -> int:
        """Return the descriptor, for poll(2) and nothing else; -1 once closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection; QEMU goes on. Closing twice is harmless."""
        if self._state in ("ready", "busy"):
            self._state = "it was closed"
        self._buffer.clear()
        self._sock.close()

    def __enter__(self) -> Self:
        """Return the monitor, which is closed at the end of the block."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close."""
        self.close()

    def _guarded(self, doing: str, deadline: float, work: Callable[[], T]) -> T:
        """Return what ``work`` returns; whatever it raises but ``CommandError`` makes the monitor unusable."""
        if self._state != "ready":
            why = "another call is under way" if self._state == "busy" else self._state
            raise MonitorError(f"{doing}: this monitor is unusable", cause=why, fix="open a new one, if QEMU is sane")
        self._state, self._doing, self._deadline = "busy", doing, deadline
        self._received_bytes = self._events = 0
        try:
            result = work()
        except CommandError:
            self._state = "ready"
            raise
        except BaseException as error:
            # An interrupt too: half a command may be on its way, so the next reply could be for anything.
            self._state = f"{doing} failed before: {printable(str(error)) or type(error).__name__}"
            self.close()
            raise
        self._state = "ready"
        return result

    def _exchange(self, ident: str, data: bytes, fds: Sequence[int]) -> object:
        """Send one command and return its answer."""
        self._drain()
        self._send(data, fds)
        reply = self._message()
        # Only what has already arrived: after its reply to `quit`, QEMU may close at once.
        self._expect_only_events()
        return self._answer(reply, ident)

    def _answer(self, reply: dict[str, object], ident: str) -> object:
        """Return what the reply carries, if it is the reply to the command with this id."""
        if "QMP" in reply:
            self._distrust("a second greeting")
        error = reply.get("error")
        # QEMU leaves the id out where it could not read the command. Source: qmp-spec.txt, 2.4.2
        said = f"; it says: {printable(str(error), 200)}" if "error" in reply else ""
        if "id" not in reply:
            self._distrust(f"a reply without the id of the command{said}")
        if reply["id"] != ident:
            self._distrust(f"a reply to a command that was not sent{said}")
        if "return" in reply:
            return reply["return"]
        what = f"{self._doing}: QEMU's refusal"
        error_class = field(error, "class", as_str, what)
        raise CommandError(self._doing, error_class=error_class, description=field(error, "desc", as_str, what))

    def _drain(self) -> None:
        """Drop the events that came unasked; anything else is a breach."""
        self._expect_only_events()
        while self._receive(wait=False):
            self._expect_only_events()

    def _expect_only_events(self) -> None:
        """Refuse any message in the buffer that is no event."""
        message = self._buffered()
        if message is not None:
            self._distrust("a second greeting" if "QMP" in message else "a reply that no command asked for")

    def _message(self) -> dict[str, object]:
        """Return the next message that is no event."""
        while (message := self._buffered()) is None:
            self._receive(wait=True)
        return message

    def _buffered(self) -> dict[str, object] | None:
        """Return the first message in the buffer that is no event, or None; the events before it are dropped."""
        while (line := self._line()) is not None:
            self._check_deadline()
            try:
                message = decode(line, depth=self._limits.depth, values=self._limits.values)
            except ValueError as error:
                self._distrust(f"a line that is not the JSON it speaks: {printable(str(error), 200)}")
            if [kind in message for kind in _KINDS].count(True) != 1:
                self._distrust("an object that is neither greeting, event nor reply, or several of them")
            if "event" not in message:
                return message
            name = as_str(message["event"], "the name of an event")
            self._recent = (*self._recent[1 - RECENT_EVENTS :], printable(name, 64))
            self._events += 1
            if self._events > self._limits.events:
                self._distrust(f"more than {self._limits.events} events")
        return None

    def _line(self) -> bytes | None:
        """Take one line out of the buffer, without its newline; None if it holds no whole line."""
        end = self._buffer.find(b"\n", self._searched)
        if (len(self._buffer) if end < 0 else end) > self._limits.line_bytes:
            self._distrust(f"a line of more than {self._limits.line_bytes} bytes")
        if end < 0:
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    def _receive(self, *, wait: bool) -> bool:
        """Add what has come to the buffer; False if nothing has, unless told to wait for it."""
        while True:
            self._check_deadline()
            try:
                # No room for ancillary data: descriptors sent to us are released by the kernel and never become
                # ours, so they cannot use up our table, and closing them cannot block. Only MSG_CTRUNC tells.
                # Source: __scm_recv_common() in include/net/scm.h of Linux; measured on 6.18.
                data, _none, flags, _peer = self._sock.recvmsg(CHUNK_BYTES, 0)
            except BlockingIOError:
                if not wait:
                    return False
                self._wait(select.POLLIN)
                continue
            except OSError as error:
                raise MonitorError(f"{self._doing}: QEMU closed its monitor", fix=_ENDED) from error
            break
        if flags & socket.MSG_CTRUNC:
            self._distrust("descriptors, which were refused")
        if not data:
            raise MonitorError(f"{self._doing}: QEMU closed its monitor", cause="end of file", fix=_ENDED)
        self._received_bytes += len(data)
        if self._received_bytes > self._limits.total_bytes:
            self._distrust(f"more than {self._limits.total_bytes} bytes")
        self._buffer += data
        return True

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        """Send all of ``data``, the descriptors with its first byte: QEMU reads byte by byte, and takes them then."""
        rest = memoryview(data)
        packed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)] if fds else []
        while rest:
            self._check_deadline()
            try:
                sent = self._sock.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT)
                continue
            except ConnectionError as error:
                raise MonitorError(f"{self._doing}: QEMU closed its monitor", fix=_ENDED) from error
            except OSError as error:
                raise MonitorError(f"{self._doing}: cannot send the command") from error
            rest = rest[sent:]
            ancillary = []

    def _wait(self, event: int) -> None:
        """Return when the socket may be ready, or the deadline has come."""
        poll = select.poll()
        poll.register(self._sock, event)
        poll.poll(max(self._deadline - monotonic(), 0) * 1000)

    def _check_deadline(self) -> None:
        """Refuse to go on after the deadline."""
        if monotonic() >= self._deadline:
            raise MonitorError(
                f"{self._doing}: no whole answer from QEMU in time",
                cause=f"{self._received_bytes} bytes and {self._events} events came by the deadline",
                fix=_SLOW,
            )

    def _distrust(self, said: str) -> Never:
        """Raise: QEMU sent what makes no sense."""
        raise MonitorError(f"{self._doing}: QEMU talks nonsense", cause=f"it sent {said}", fix=DISTRUST)


def _check_greeting(message: dict[str, object]) -> None:
    """Refuse what is no greeting. Its version is not kept: whoever sent it may claim any."""
    if "QMP" not in message:
        raise MonitorError("QEMU did not greet", cause="it sent a reply first", fix=DISTRUST)
    field(message["QMP"], "version", as_object, "QEMU's greeting")
    field(message["QMP"], "capabilities", as_list, "QEMU's greeting")


def _request(command: str, arguments: Mapping[str, object] | None) -> tuple[str, bytes]:
    """Return a new id and the command that carries it, ready to send."""
    # Random, so that only who has read this command can answer it.
    ident = os.urandom(8).hex()
    request: dict[str, object] = {"execute": command, "id": ident}
    if arguments is not None:
        request["arguments"] = dict(arguments)
    return ident, json.dumps(request, allow_nan=False).encode() + b"\n"


def _deadline(timeout_s: float) -> float:
    """Return the moment on the monotonic clock when ``timeout_s`` is over."""
    if not 0 < timeout_s < float("inf"):
        raise ValueError("a timeout is a positive number of seconds")
    return monotonic() + timeout_s


def connected(path: str, deadline: float, netns_of: int) -> socket.socket:
    """Return a socket connected to ``path`` by the deadline."""
    if not path or "\0" in path:
        raise ValueError("a monitor has a path, and no abstract name")
    where, fd = path, -1
    sock = _made_in(netns_of)
    try:
        sock.setblocking(False)
        if len(os.fsencode(path)) > MAX_PATH_BYTES:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            where = f"/proc/self/fd/{fd}"
        _connect(sock, where, deadline)
    except BlockingIOError as error:
        sock.close()
        cause = "its queue of connections is full"
        raise MonitorError(f"{path}: QEMU does not accept a connection", cause=cause, fix=_SLOW) from error
    except OSError as error:
        sock.close()
        raise MonitorError(f"{path}: cannot connect to QEMU's monitor", fix=_ENDED) from error
    except BaseException:
        sock.close()
        raise
    finally:
        if fd >= 0:
            os.close(fd)
    return sock


def _made_in(netns_of: int) -> socket.socket:
    """Return a socket of the network namespace of the process with that pidfd; -1: of our own."""
    if netns_of < 0:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    import ctypes  # noqa: PLC0415 (os.setns came with Python 3.12)

    libc = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(netns_of, _CLONE_NEWNET) < 0:
            cause = os.strerror(ctypes.get_errno())
            raise MonitorError("cannot enter QEMU's network namespace", cause=cause, fix=_ENDED)
        try:
            return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        finally:
            if libc.setns(own, _CLONE_NEWNET) < 0:  # never seen; a thread in a guest's namespace must not go on
                os.abort()
    finally:
        os.close(own)


def _connect(sock: socket.socket, path: str, deadline: float) -> None:
    """Do connect(2), again and again while the queue is full: there is no state to poll for. Source: unix(7)."""
    pause_s = 0.001
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            left_s = deadline - monotonic()
            if left_s <= 0:
                raise
            sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, 0.05)
        else:
            return
