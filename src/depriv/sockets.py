# SPDX-License-Identifier: Apache-2.0
"""Which of a device model's sockets came in through a listening one that it was given."""

from __future__ import annotations

import stat

from depriv import proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from depriv.report import Grant

_MONITORS: Final = ("qmp", "events")  # our own: nobody but us connects to them
_LISTENING: Final = "0A"  # TCP_LISTEN, include/net/tcp_states.h


def accepted_sockets(pid: int, strange: tuple[proc.OpenFd, ...], grants: tuple[Grant, ...]) -> frozenset[int]:
    """Return the inodes of sockets that were accepted from a granted listening socket.

    accept(2) makes a UNIX socket in the connecting side's network namespace with the listener's name. Source:
    net/unix/af_unix.c, unix_stream_connect (Linux 6.1). Our side is made in the guest's (``Monitor.connect``), where
    no user of the host can bind a name that looks like one of ours; a client of a socket that the user has named is in
    the host's. A TCP connection has the listener's local port and its namespace, which is the host's.

    Args:
        pid: The device model.
        strange: What it has open that nobody granted.
        grants: What it was granted.
    """
    wanted = {fd.ino for fd in strange if stat.S_ISSOCK(fd.mode)}
    listeners = {grant.ino for grant in grants if grant.kind == "socket"}
    if not wanted or not listeners:
        return frozenset()
    own, host = proc.unix_sockets(pid), proc.unix_sockets(None)
    outside = {grant.ino for grant in grants if grant.kind == "socket" and grant.role not in _MONITORS}
    found = _from(own, own, listeners, wanted)
    found |= _from(host, own, outside, wanted) | _from(host, host, outside, wanted)
    tcp = proc.tcp_sockets() if wanted - found else {}
    ports = {tcp[ino].port for ino in listeners if ino in tcp and tcp[ino].state == _LISTENING}
    found |= {ino for ino in wanted if ino in tcp and tcp[ino].port in ports and tcp[ino].state != _LISTENING}
    return frozenset(found)


def _from(
    table: dict[int, proc.UnixSocket], heard: dict[int, proc.UnixSocket], listeners: set[int], wanted: set[int]
) -> set[int]:
    """Return those in ``table`` that have the name of one of ``listeners``, which are in ``heard``."""
    names = {heard[ino].path for ino in listeners if ino in heard and heard[ino].listening}
    return {ino for ino in wanted if ino in table and table[ino].path in names and not table[ino].listening}


def closed_meanwhile(pid: int, inodes: set[int]) -> set[int]:
    """Return those sockets that no thread has open any more.

    The kernel's table of sockets is read after the descriptors: a connection to the monitor that ended in between,
    ours of a moment ago, would pass for one that nobody granted.
    """
    if not inodes:
        return inodes
    still: set[int] = set()
    for tid in proc.threads(pid):
        try:
            still.update(fd.ino for fd in proc.fds(pid, tid) if stat.S_ISSOCK(fd.mode))
        except ProcessLookupError:
            continue
    return inodes - still
