# SPDX-License-Identifier: Apache-2.0
"""The caller's standard streams while QEMU has them: a terminal is put back as it was, other input waits its turn."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_CHUNK = select.PIPE_BUF


class Terminal:
    """The caller's terminal, put back as it was: a QEMU that was killed does not do it.

    QEMU changes its settings, and makes reading and writing it non-blocking. Source: chardev/char-stdio.c, QEMU 7.2.
    """

    def __init__(self, *, used: bool) -> None:
        """Take whether QEMU has it."""
        self._used = used
        self._settings: list[object] | None = None
        self._flags: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        """Remember how it is."""
        if self._used and os.isatty(0):
            import termios  # noqa: PLC0415 (only where there is a terminal)

            self._settings = list(termios.tcgetattr(0))
            self._flags = [(fd, fcntl.fcntl(fd, fcntl.F_GETFL)) for fd in (0, 1)]
        return self

    def __exit__(self, *_exception: object) -> None:
        """Put it back."""
        if self._settings is None:
            return
        import termios  # noqa: PLC0415 (as above)

        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSADRAIN, self._settings)  # type: ignore[arg-type]
        for fd, flags in self._flags:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)


class Input:
    """The caller's standard input, kept from QEMU until its guest may run: a monitor on it could let it run unaudited.

    QEMU has a pipe of ours in its place. A terminal, or another device, it has itself: it sets it up.
    """

    def __init__(self, *, used: bool) -> None:
        """Take whether QEMU has it."""
        self._used = used
        self._source = -1
        self._pipe = -1
        self._pending = b""

    def __enter__(self) -> Self:
        """Put the pipe in its place."""
        if self._used and not stat.S_ISCHR(os.fstat(0).st_mode):
            self._source = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
            ours, self._pipe = os.pipe2(os.O_CLOEXEC)
            os.dup2(ours, 0)
            os.close(ours)
            os.set_blocking(self._pipe, False)
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close our end; descriptor 0 is the caller's input again."""
        self._end()
        if self._source >= 0:
            os.dup2(self._source, 0)
            os.close(self._source)
            self._source = -1

    def waits(self) -> tuple[int, int]:
        """Return what it waits for: a descriptor, -1 for none, and the event of poll(2)."""
        if self._pipe < 0:
            return -1, 0
        return (self._pipe, select.POLLOUT) if self._pending else (self._source, select.POLLIN)

    def move(self) -> None:
        """Hand on what there is, as far as QEMU takes it."""
        try:
            if not self._pending:
                self._pending = os.read(self._source, _CHUNK)
            if not self._pending:
                self._end()
                return
            self._pending = self._pending[os.write(self._pipe, self._pending) :]
        except BlockingIOError:
            pass
        except OSError:  # QEMU has closed it, or the caller's cannot be read
            self._end()

    def _end(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
        self._pipe = -1
