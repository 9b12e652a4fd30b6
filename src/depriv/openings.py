# SPDX-License-Identifier: Apache-2.0
"""What the toolstack opens for QEMU besides the files that the jail opens: sockets, taps, files to be written. Pure.

Decided as data when a command line is understood (:mod:`depriv.qemu.translate`), opened by :mod:`depriv.opener`, and
handed to the jail, which takes each by its number (``steps.TakeFd``). QEMU has no network and no path to open one by.
"""

from __future__ import annotations

from depriv.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias


class Inherited(Record):
    """A descriptor that the caller has open and names by its number."""

    role: str
    number: int  # in QEMU
    source: int  # in the caller


class ListenTcp(Record):
    """A TCP socket that listens in the host's network namespace."""

    role: str
    number: int  # in QEMU; -1: handed over by QMP once it runs (VNC)
    host: str  # "" is every address
    port: int  # 0: any
    port_to: int = 0  # the last port to try; 0: only ``port``


class ListenUnixHere(Record):
    """A UNIX stream socket that the toolstack itself listens on: one that is handed over by QMP once QEMU runs (VNC).

    One that QEMU has from the start is the jail's: ``steps.ListenUnix``.
    """

    role: str
    number: int  # -1: by QMP
    path: str  # a socket of that name is removed first, as QEMU does


class ConnectTcp(Record):
    """A TCP connection, made before QEMU starts."""

    role: str
    number: int
    host: str
    port: int


class ConnectUnix(Record):
    """A connection to a UNIX stream socket, made before QEMU starts."""

    role: str
    number: int
    path: str


class WriteFile(Record):
    """A regular file for QEMU to write to, made if it is not there; never through a symbolic link."""

    role: str
    number: int
    path: str
    append: bool = False  # else it is emptied


class ReadFile(Record):
    """A regular file for QEMU to read, never through a symbolic link."""

    role: str
    number: int
    path: str


class OpenTap(Record):
    """A tap interface of the host's network namespace. See Documentation/networking/tuntap.rst, Linux 6.1."""

    role: str
    numbers: tuple[int, ...]  # one per queue
    name: str  # "": the kernel chooses one
    bridge: str = ""  # joined to it; "": none
    vnet_hdr: bool = True


class StartPasst(Record):
    """A user-mode network: passt, confined as a process of its own, at the other end of a socket pair."""

    role: str
    number: int
    words: tuple[str, ...]  # of passt, but for the descriptor: see passt(1)


if TYPE_CHECKING:
    Opening: TypeAlias = (
        Inherited | ListenTcp | ListenUnixHere | ConnectTcp | ConnectUnix | WriteFile | ReadFile | OpenTap | StartPasst
    )


def describe(opening: Opening) -> str:  # noqa: PLR0911 (one line per kind, flat)
    """Return the one line that ``plan`` and errors show."""
    match opening:
        case Inherited():
            return f"take the caller's descriptor {opening.source} for {opening.role}"
        case ListenTcp():
            ports = f"{opening.port}" + (f"-{opening.port_to}" if opening.port_to else "")
            return f"listen on TCP {opening.host or '*'}:{ports} for {opening.role}"
        case ListenUnixHere():
            return f"listen on {opening.path} for {opening.role}"
        case ConnectTcp():
            return f"connect to TCP {opening.host}:{opening.port} for {opening.role}"
        case ConnectUnix():
            return f"connect to {opening.path} for {opening.role}"
        case WriteFile():
            return f"open {opening.path} to {'append to' if opening.append else 'write'} for {opening.role}"
        case ReadFile():
            return f"open {opening.path} to read for {opening.role}"
        case OpenTap():
            joined = f", joined to the bridge {opening.bridge}" if opening.bridge else ""
            return f"open tap {opening.name or '(a new one)'}{joined} for {opening.role}"
        case StartPasst():
            return f"start passt {' '.join(opening.words)} for {opening.role}".replace("  ", " ")
