# SPDX-License-Identifier: Apache-2.0
"""Sockets that options name: opened before QEMU starts, which may neither connect nor bind. Pure."""

from __future__ import annotations

from depriv.openings import ConnectTcp, ConnectUnix, ListenTcp
from depriv.qemu.words import error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.qemu.draft import Draft
    from depriv.qemu.words import Word

LAST_PORT = 65535


def split_address(word: Word, text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``; the host may be empty, or an IPv6 address in brackets.

    Raises:
        ConfigError: there is no port, or none that is a number.
    """
    host, colon, port = text.rpartition(":")
    if not colon:
        raise error(word, f"{text!r} names no port", fix="write HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), port_number(word, port)


def port_number(word: Word, text: str) -> int:
    """Return a port.

    Raises:
        ConfigError: it is no number, or too large; names of services are not looked up.
    """
    if not (text.isascii() and text.isdecimal()) or int(text) > LAST_PORT:
        raise error(word, f"{text!r} is no port", fix=f"give a number up to {LAST_PORT}")
    return int(text)


def on_loopback(host: str) -> bool:
    """Tell whether only this host can reach what listens on ``host``."""
    return host in ("localhost", "::1") or host.startswith("127.")


def warn_of_reach(draft: Draft, word: Word, host: str, what: str) -> None:
    """Say so if others than this host can reach a port."""
    if not on_loopback(host):
        draft.note(word, f"{what} listens on {host or 'every address'}: other hosts can reach it", warning=True)


def listen_tcp(draft: Draft, word: Word, host: str, ports: tuple[int, int], *, role: str) -> int:
    """Have a TCP port listened on and return the socket's number in QEMU; ``ports`` are the first and last to try."""
    warn_of_reach(draft, word, host, role)
    number = draft.number(word)
    first, last = ports
    draft.open(ListenTcp(role=draft.role(role), number=number, host=host, port=first, port_to=last))
    return number


def connect_tcp(draft: Draft, word: Word, host: str, port: int, *, role: str) -> int:
    """Have a TCP connection made and return its number in QEMU.

    Raises:
        ConfigError: no host is named.
    """
    if not host:
        raise error(word, "it names no host to connect to", fix="write localhost for this one")
    number = draft.number(word)
    draft.open(ConnectTcp(role=draft.role(role), number=number, host=host, port=port))
    return number


def connect_unix(draft: Draft, word: Word, path: str, *, role: str) -> int:
    """Have a connection to a UNIX socket made and return its number in QEMU.

    Raises:
        ConfigError: there is no socket of that name.
    """
    path = draft.path(word, path)
    kind = draft.look(path).kind
    if kind != "socket":
        cause = "it does not exist" if kind == "missing" else f"it is no socket: {kind}"
        fix = "start what listens there first (or write server=on if QEMU is to listen)"
        raise error(word, f"cannot connect to {path}", cause=cause, fix=fix)
    number = draft.number(word)
    draft.open(ConnectUnix(role=draft.role(role), number=number, path=path))
    return number


def no_abstract(draft: Draft, word: Word, *, on: bool) -> None:
    """Refuse a socket in the abstract name space.

    Raises:
        ConfigError: it is one.
    """
    if on:
        why = "an abstract socket belongs to a network namespace, and QEMU's is its own and empty"
        draft.refuse(word, why, fix="give a path, without abstract=on")
