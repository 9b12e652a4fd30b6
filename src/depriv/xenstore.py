# SPDX-License-Identifier: Apache-2.0
"""Ask xenstore, where libxl writes down which domains there are and what they were given.

Trusted: xenstored and libxl write it, and a restricted device model has no way to it. Source: xenstore(7) and
xen/include/public/io/xs_wire.h, Xen 4.17.
"""

from __future__ import annotations

import os
import socket
import struct

from depriv.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Self

_SOCKET: Final = "/run/xenstored/socket"
_TIMEOUT_S: Final = 10.0
_DIRECTORY: Final = 1
_READ: Final = 2
_REMOVE: Final = 13
_ERROR: Final = 16
_PAYLOAD_MAX: Final = 4096
_HEADER: Final = struct.Struct("=IIII")  # type, request, transaction, length


class Xenstore:
    """A connection to xenstored."""

    def __init__(self) -> None:
        """Connect.

        Raises:
            HostError: nobody answers there.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_TIMEOUT_S)
        try:
            self._socket.connect(_SOCKET)
        except OSError as error:
            self._socket.close()
            raise _unreachable(error.strerror or str(error)) from error

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close the connection."""
        self._socket.close()

    def read(self, path: str) -> str | None:
        """Return a node's value, or None if there is no such node."""
        return self._ask(_READ, path)

    def list(self, path: str) -> tuple[str, ...]:
        """Return the names below a node, none if it is not there."""
        names = self._ask(_DIRECTORY, path)
        return tuple(filter(None, (names or "").split("\0")))

    def remove(self, path: str) -> None:
        """Remove a node and all below it; one that is not there is gone already."""
        self._ask(_REMOVE, path)

    def _ask(self, kind: int, path: str) -> str | None:
        try:
            data = path.encode() + b"\0"
            self._socket.sendall(_HEADER.pack(kind, 0, 0, len(data)) + data)
            answered, _, _, size = _HEADER.unpack(self._take(_HEADER.size))
            if size > _PAYLOAD_MAX:
                raise _unreachable("it answers what makes no sense")
            payload = self._take(size)
        except OSError as error:
            raise _unreachable(error.strerror or str(error)) from error
        if answered == _ERROR:
            if payload == b"ENOENT\0":
                return None
            raise HostError(f"cannot read {path} in xenstore", cause=payload.decode("ascii", "replace").rstrip("\0"))
        return payload.decode("utf-8", "replace")

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self._socket.recv(size - len(data))
            if not chunk:
                raise _unreachable("it closed the connection")
            data += chunk
        return data


def _unreachable(cause: str) -> HostError:
    return HostError(
        "cannot ask xenstore", cause=cause, fix="see that xenstored runs: xenstore-ls; systemctl status xenstored"
    )


def media(domid: int) -> tuple[tuple[str, str], ...]:
    """Return vdev and path of what libxl has put into a domain's CD-ROM drives; an empty drive is left out.

    Below /libxl, which no guest can write. Source: libxl_cdrom_insert, tools/libs/light/libxl_disk.c, Xen 4.17.
    """
    found: list[tuple[str, str]] = []
    with Xenstore() as store:
        base = f"/libxl/{domid}/device/vbd"
        for name in store.list(base):
            _, slash, path = (store.read(f"{base}/{name}/params") or "").partition(
                "/"
            )  # "aio:/path", or the path alone
            if slash and store.read(f"{base}/{name}/device-type") == "cdrom":
                found.append((store.read(f"{base}/{name}/dev") or name, slash + path))
    return tuple(found)


def is_dom0() -> bool:
    """Tell whether this host runs Xen, and this is the domain that starts others."""
    try:
        with open("/proc/xen/capabilities", "rb") as file:
            return b"control_d" in file.read(64)
    except OSError:
        return False


def nodes() -> tuple[tuple[str, int, int], ...]:
    """Return name, major and minor of the devices in /dev/xen that a device model needs at its start."""
    found: list[tuple[str, int, int]] = []
    for name in ("privcmd", "hypercall", "evtchn", "gntdev", "xenbus"):
        try:
            have = os.lstat(f"/dev/xen/{name}")
        except OSError:
            continue
        found.append((name, os.major(have.st_rdev), os.minor(have.st_rdev)))
    return tuple(found)
