# SPDX-License-Identifier: Apache-2.0
"""Serve one open file as a network block device, read-only, to one client that may have been taken over.

Just what QEMU's client asks for. Sources: the NBD protocol's doc/proto.md (fixed newstyle negotiation, simple replies),
nbd/client.c and block/nbd.c of QEMU 7.2.
"""

from __future__ import annotations

import os
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Final

_GREETING: Final = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)  # NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES
_OPTION: Final = struct.Struct(">8sII")  # "IHAVEOPT", option, length of its data
_OPTION_REPLY: Final = struct.Struct(">QIII")  # its magic, option, type, length of its data
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_REQUEST: Final = struct.Struct(">IHHQQI")  # its magic, flags, type, handle, offset, length
_REQUEST_MAGIC: Final = 0x25609513
_REPLY: Final = struct.Struct(">IIQ")  # its magic, error, handle
_REPLY_MAGIC: Final = 0x67446698
_INFO_EXPORT: Final = struct.Struct(">HQH")  # NBD_INFO_EXPORT, size, flags
_READ_ONLY: Final = 3  # NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY
_GO, _ABORT = 7, 2  # NBD_OPT_GO, NBD_OPT_ABORT
_ACK, _INFO, _UNSUPPORTED = 1, 3, 0x80000001  # NBD_REP_ACK, NBD_REP_INFO, NBD_REP_ERR_UNSUP
_READ, _WRITE, _DISCONNECT = 0, 1, 2  # NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_DISC
_EINVAL: Final = 22
_SECTOR: Final = 512

OPTIONS_MAX: Final = 16  # QEMU sends two or three
OPTION_BYTES_MAX: Final = 4096  # the longest name of an export, NBD_MAX_STRING_SIZE
READ_BYTES_MAX: Final = 32 << 20  # NBD_MAX_BUFFER_SIZE


class Export:
    """A file, and one connection on which it is served."""

    def __init__(self, connection: socket.socket, fd: int, size: int, *, deadline: float) -> None:
        """Take a stream socket, a file open for reading, its size in bytes, and when to give up (CLOCK_MONOTONIC)."""
        self._connection = connection
        self._fd = fd
        # To whole sectors, the rest zeros: QEMU's client asks for the last byte of an odd size, and awaits 512.
        self._size = -(-size // _SECTOR) * _SECTOR
        self._deadline = deadline
        self.heard = False  # the client has said something

    def serve(self) -> None:
        """Answer until the client has enough.

        Raises:
            ValueError: the client says what no client says.
            TimeoutError: the deadline.
        """
        try:
            self._send(_GREETING)
            self._receive(4)  # the client's flags
            self.heard = True
            if self._negotiate():
                while self._answer():
                    pass
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return

    def _negotiate(self) -> bool:
        """Agree on the only export there is; tell whether the client wants it."""
        for _ in range(OPTIONS_MAX):
            magic, option, length = _OPTION.unpack(self._receive(_OPTION.size))
            if magic != b"IHAVEOPT" or length > OPTION_BYTES_MAX:
                raise ValueError("no option of the NBD protocol")
            self._receive(length)
            if option == _GO:
                self._tell(option, _INFO, _INFO_EXPORT.pack(0, self._size, _READ_ONLY))
                self._tell(option, _ACK)
                return True
            if option == _ABORT:
                return False
            self._tell(option, _UNSUPPORTED)
        raise ValueError("too many options of the NBD protocol")

    def _answer(self) -> bool:
        """Answer one request; tell whether there may be another."""
        magic, _flags, kind, handle, offset, length = _REQUEST.unpack(self._receive(_REQUEST.size))
        if magic != _REQUEST_MAGIC:
            raise ValueError("no request of the NBD protocol")
        if kind == _DISCONNECT:
            return False
        if kind != _READ or length > READ_BYTES_MAX or offset + length > self._size:
            self._send(_REPLY.pack(_REPLY_MAGIC, _EINVAL, handle))
            if kind == _WRITE:  # what is to be written would follow
                raise ValueError("a request to write")
            return True
        # Zeros where the file has become shorter.
        data = os.pread(self._fd, length, offset).ljust(length, b"\0")
        self._send(_REPLY.pack(_REPLY_MAGIC, 0, handle) + data)
        return True

    def _tell(self, option: int, kind: int, data: bytes = b"") -> None:
        self._send(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def _send(self, data: bytes) -> None:
        self._connection.settimeout(self._left_s())
        self._connection.sendall(data)

    def _receive(self, count: int) -> bytes:
        """Return so many bytes.

        Raises:
            EOFError: there are no more.
        """
        data = b""
        while len(data) < count:
            self._connection.settimeout(self._left_s())
            chunk = self._connection.recv(count - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return data

    def _left_s(self) -> float:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s
