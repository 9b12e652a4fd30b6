# SPDX-License-Identifier: Apache-2.0
"""Open what a plan takes from the toolstack: sockets, taps, files to be written. Acts on data, decides nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct

from depriv.durable import remove_left
from depriv.errors import ConfigError, HostError
from depriv.openings import (
    ConnectTcp,
    ConnectUnix,
    Inherited,
    ListenTcp,
    ListenUnixHere,
    OpenTap,
    ReadFile,
    StartPasst,
    WriteFile,
    describe,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final, Self

    from depriv.openings import Opening

_CONNECT_TIMEOUT_S = 10.0
# <linux/if_tun.h>, <linux/sockios.h>, <linux/if.h>
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFF_MULTI_QUEUE: Final = 0x0100
_SIOCBRADDIF: Final = 0x89A2
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 0x1


class Opened:
    """What was opened for one start. Close it once QEMU executes: a copy here would keep a lock or a port."""

    def __init__(self, base: int) -> None:
        """Take the number that QEMU's descriptor 0 would have here."""
        self._base = base
        self._held: list[int] = []
        self.kept: dict[str, int] = {}  # role -> descriptor, of those that are handed over later
        self.tools: dict[str, int] = {}  # role -> the tool's end of a socket pair, of those that are started later
        self.left: list[tuple[str, int, int]] = []  # path, st_dev, st_ino of the sockets that were made

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: object, *_exception: object) -> None:
        """Close all; remove the sockets that were made if it ends in an exception."""
        self.close()
        if kind is not None:
            remove_left(tuple(self.left))

    def close(self) -> None:
        """Close all that is still open."""
        for fd in (*self._held, *self.kept.values(), *self.tools.values()):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._held.clear()
        self.kept.clear()
        self.tools.clear()

    def hand(self, fd: int, role: str, number: int) -> None:
        """Hold a descriptor, which is ours from now on, where the jail looks for QEMU's ``number``; -1: keep it.

        Raises:
            HostError: something is open there.
        """
        if number < 0:
            self.kept[role] = fd
            return
        place = self._base + number
        try:
            os.fstat(place)
        except OSError:
            os.dup2(fd, place, inheritable=False)
            self._held.append(place)
        else:
            raise HostError(f"descriptor {place} is in use", fix=f"close it for depriv: {place}<&-")
        finally:
            os.close(fd)

    def open(self, opening: Opening) -> None:
        """Open one thing.

        Raises:
            ConfigError: it names what is not there, or is not what it should be.
            HostError: the host refused.
        """
        try:
            if isinstance(opening, OpenTap):
                for number, fd in zip(opening.numbers, open_tap(opening), strict=True):
                    self.hand(fd, opening.role, number)
            elif isinstance(opening, ListenUnixHere):
                fd, made = listen_unix(opening)
                self.left.append(made)
                self.hand(fd, opening.role, opening.number)
            elif isinstance(opening, StartPasst):
                ours, its = socket.socketpair()
                self.tools[opening.role] = its.detach()
                self.hand(ours.detach(), opening.role, opening.number)
            else:
                self.hand(_OPENERS[type(opening)](opening), opening.role, opening.number)
        except OSError as error:
            text = describe(opening)
            raise HostError(f"cannot {text}", cause=error.strerror or str(error), fix=_fix(opening)) from error


def _fix(opening: Opening) -> str:
    match opening:
        case ListenTcp():
            return "see who has the port: ss -ltnp; or name another, or a range with to="
        case ListenUnixHere():
            return "see that its folder is there and can be written to, and that nothing else has that name"
        case ConnectTcp() | ConnectUnix():
            return "start what is to be connected to first"
        case WriteFile():
            return "correct the path, or what keeps root from writing there"
        case OpenTap():
            return "load the module tun; see that the interface, if it exists, is a tap nobody uses: ip -d link"
        case _:
            return ""


def _inherited(opening: Inherited) -> int:
    if opening.source <= 2:
        raise ConfigError(
            f"descriptor {opening.source} for {opening.role} is a standard stream", fix="use another number"
        )
    try:
        fd = os.dup(opening.source)
        os.close(opening.source)  # QEMU's alone from now on: with a copy here its peer would never see it closed
        return fd
    except OSError as error:
        raise ConfigError(
            f"descriptor {opening.source} for {opening.role} is not open",
            fix=f"open it for depriv, as for QEMU: {opening.source}<>FILE",
        ) from error


def _listen_tcp(opening: ListenTcp) -> int:
    """Listen on the first port that is free, on the first address that the host's name means."""
    ports = range(opening.port, max(opening.port, opening.port_to) + 1)
    last: OSError | None = None
    for port in ports:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            opening.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            made = socket.socket(family, kind, protocol)
            try:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind(address)
                made.listen(1)
                return made.detach()
            except OSError as error:
                last = error
                made.close()
    raise last or OSError("no such address")


def listen_unix(opening: ListenUnixHere) -> tuple[int, tuple[str, int, int]]:
    """Return a socket that listens, root's alone, and its path, st_dev and st_ino. An old one is removed first.

    Raises:
        OSError: its folder cannot be used, or something that is no socket has the name (EADDRINUSE); that is kept.
    """
    folder, _, name = opening.path.rpartition("/")
    # The path may be longer than a socket address: bind in the folder, by a short name.
    at = os.open(folder or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(name, dir_fd=at).st_mode):
                os.unlink(name, dir_fd=at)
        os.fchmod(made.fileno(), 0o600)  # the file is made with the socket's mode: unix_bind_bsd, net/unix/af_unix.c
        made.bind(f"/proc/self/fd/{at}/{name}")
        have = os.lstat(name, dir_fd=at)
        made.listen(8)
        return made.detach(), (opening.path, have.st_dev, have.st_ino)
    except BaseException:
        made.close()
        raise
    finally:
        os.close(at)


def _connect_tcp(opening: ConnectTcp) -> int:
    made = socket.create_connection((opening.host, opening.port), timeout=_CONNECT_TIMEOUT_S)
    made.settimeout(None)
    return made.detach()


def _connect_unix(opening: ConnectUnix) -> int:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(_CONNECT_TIMEOUT_S)
        made.connect(opening.path)
        made.settimeout(None)
    except OSError:
        made.close()
        raise
    return made.detach()


def _write_file(opening: WriteFile) -> int:
    """Open as QEMU would, but for links: not through one, and no FIFO or device."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(opening.path, flags | (os.O_APPEND if opening.append else 0), 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"cannot write to {opening.path} for {opening.role}: it is no regular file")
    os.set_blocking(fd, True)
    if not opening.append:
        os.ftruncate(fd, 0)
    return fd


def _read_file(opening: ReadFile) -> int:
    fd = os.open(opening.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"cannot read {opening.path} for {opening.role}: it is no regular file")
    os.set_blocking(fd, True)
    return fd


def open_tap(opening: OpenTap) -> list[int]:
    """Return one descriptor per queue of a tap in this network namespace, the interface up and in its bridge."""
    flags = _IFF_TAP | _IFF_NO_PI
    flags |= _IFF_VNET_HDR if opening.vnet_hdr else 0
    flags |= _IFF_MULTI_QUEUE if len(opening.numbers) > 1 else 0
    name = opening.name.encode()
    fds: list[int] = []
    try:
        for _ in opening.numbers:
            fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            answer = fcntl.ioctl(fds[-1], _TUNSETIFF, struct.pack("16sH22x", name, flags))
            name = answer[:16].rstrip(b"\0")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            if opening.bridge:
                index = socket.if_nametoindex(name.decode())
                fcntl.ioctl(control, _SIOCBRADDIF, struct.pack("16si20x", opening.bridge.encode(), index))
            have = struct.unpack("16sH22x", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH22x", name, 0)))[1]
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name, have | _IFF_UP))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


_OPENERS: dict[type[Opening], Callable[..., int]] = {
    Inherited: _inherited,
    ListenTcp: _listen_tcp,
    ConnectTcp: _connect_tcp,
    ConnectUnix: _connect_unix,
    WriteFile: _write_file,
    ReadFile: _read_file,
}
