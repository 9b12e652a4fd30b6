# SPDX-License-Identifier: Apache-2.0
"""What a QEMU has printed, read from the FIFO in its domain's folder without waiting."""

from __future__ import annotations

import contextlib
import os

from depriv.text import console_safe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_SHOWN = 4000
_COPIED_MAX = 1 << 20  # bytes: a guest can make QEMU log without end (XSA-180)


class Log:
    """What QEMU has printed, read from the FIFO in its state folder without waiting."""

    def __init__(self, path: str) -> None:
        """Open the reading end."""
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._data = b""

    def text(self) -> str:
        """Return all that was printed so far, made safe to print; the first part of it if it is long."""
        while len(self._data) < 1 << 20:
            try:
                chunk = os.read(self._fd, 65536)
            except BlockingIOError:
                break
            if not chunk:
                break
            self._data += chunk
        own = b"\n".join(line for line in self._data.split(b"\n") if not _is_traced(line))
        return console_safe(own[:_SHOWN]).strip()

    def raw(self) -> str:
        """Return all of it, for a reader that trusts it: no guest has run."""
        self.text()
        return self._data.decode("utf-8", "replace")

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close the reading end."""
        os.close(self._fd)


class Copy:
    """Copies what QEMU prints from its FIFO to standard error, safe to look at, and no more than a log may grow."""

    def __init__(self, path: str) -> None:
        """Open the reading end."""
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._left = _COPIED_MAX

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Copy the last words, close the reading end."""
        self.copy()
        os.close(self._fd)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is something to copy."""
        return self._fd

    def is_full(self) -> bool:
        """Tell whether no more is copied: the rest fills the FIFO and is lost."""
        return self._left <= 0

    def copy(self) -> None:
        """Copy what is there."""
        while self._left > 0:
            try:
                data = os.read(self._fd, min(self._left, 65536))
            except BlockingIOError:
                return
            if not data:
                return
            self._left -= len(data)
            text = console_safe(data) + ("\ndepriv: no more of this log is kept\n" if self._left <= 0 else "")
            with contextlib.suppress(OSError):
                os.write(2, text.encode("utf-8", "backslashreplace"))


def _is_traced(line: bytes) -> bool:
    """Tell whether a line is one of the thousand that a dry run asks for, not something that QEMU has to say."""
    head, tab, _ = line.partition(b":\t")  # ld.so(8), LD_DEBUG: "%9d:\t"
    return line.startswith(b"load_file ") or (bool(tab) and head.strip().isdigit())


def start_fix(said: str) -> str:
    """Return what to do about the messages of QEMU that users meet."""
    if "not a valid device model name" in said:
        return "this QEMU has no such device: see -device help, or install the package that has it"
    if "invalid option" in said or "not a valid" in said or "There is no option group 'sandbox'" in said:
        return "this QEMU lacks what depriv needs (see the message above): install QEMU 7.2 or later, with seccomp"
    if "-sandbox support is not enabled" in said or "seccomp" in said:
        return "this QEMU was built without seccomp: install one that has it (Debian's has)"
    if '"write" lock' in said or '"consistent read" lock' in said:
        return "another process has the image open; find it with: fuser -v IMAGE"
    return ""
