# SPDX-License-Identifier: Apache-2.0
"""What a guest has written to its serial port.

QEMU keeps the last MiB in memory (a ringbuf chardev), so that nothing of ours has to run beside the guest, and a
guest that writes without end neither fills a disk nor waits. Reading takes it out of QEMU; what was read is kept
beside the domain's state, the last MiB of it. See docs/adr/0005.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import time

from depriv.errors import HostError, MonitorError
from depriv.qemu.cmdline import CONSOLE_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from depriv.qmp import Monitor

_CHUNK = 256 * 1024
_TIMEOUT_S = 5.0


class Console:
    """The console of one domain; its lock must be held."""

    def __init__(self, directory: str, connect: Callable[[float], Monitor]) -> None:
        """Take the domain's folder, and what connects to its QEMU within so many seconds."""
        self._saved = f"{directory}/console"
        self._connect = connect

    def read(self) -> bytes:
        """Return all there is, oldest first.

        Raises:
            MonitorError: QEMU does not answer, and nothing had been read from it before.
            HostError: there is no room to keep what would be read. Nothing was taken out of QEMU.
        """
        kept = self._load()
        try:
            self._reserve()
            fresh = self._drain()
            if fresh:
                kept = (kept + fresh)[-CONSOLE_BYTES:]
                self._save(kept)
        except MonitorError:
            if not kept:
                raise
            # QEMU is dead or hangs: what it said before is what there is
        finally:
            with contextlib.suppress(OSError):  # kept, it is gone already
                os.unlink(f"{self._saved}.new")
        return kept

    def _drain(self) -> bytes:
        """Take out what QEMU holds: at most once around the ring, and by one deadline, however it is dripped out."""
        fresh = b""
        deadline = time.monotonic() + _TIMEOUT_S
        with self._connect(_TIMEOUT_S) as monitor:
            for _ in range(2 * CONSOLE_BYTES // _CHUNK):
                arguments: dict[str, object] = {"device": "console", "size": _CHUNK, "format": "base64"}
                left_s = max(deadline - time.monotonic(), 0.001)
                try:
                    reply = monitor.execute("ringbuf-read", arguments, timeout_s=left_s)
                except MonitorError:
                    if not fresh:
                        raise
                    break  # what came before is the guest's word all the same
                try:
                    chunk = base64.b64decode(reply if isinstance(reply, str) else "?", validate=True)
                except binascii.Error as error:
                    raise MonitorError("ringbuf-read: QEMU answers what is no base64") from error
                if not chunk:
                    break
                fresh += chunk
        return fresh

    def _load(self) -> bytes:
        try:
            fd = os.open(self._saved, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return b""
        try:
            return os.read(fd, CONSOLE_BYTES)
        finally:
            os.close(fd)

    def _reserve(self) -> None:
        """See that what is taken out of QEMU can be kept, before it is taken: it cannot be put back."""
        beside = f"{self._saved}.new"
        try:
            fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(fd, 0, CONSOLE_BYTES)
            finally:
                os.close(fd)
        except OSError as error:
            fix = "see that there is room for 1 MiB: df -h /run"
            raise HostError(f"cannot keep what the guest has said in {beside}", fix=fix) from error

    def _save(self, data: bytes) -> None:
        beside = f"{self._saved}.new"
        fd = os.open(beside, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.write(fd, data)
            os.ftruncate(fd, len(data))
        finally:
            os.close(fd)
        os.rename(beside, self._saved)
