# SPDX-License-Identifier: Apache-2.0
"""Everything depriv raises on purpose, by who has to act.

::

    DeprivError              what went wrong, and what to do about it
    ├── ConfigError          the author of the configuration or of the command line          exit 2
    ├── NotFoundError        the user: there is no such domain                               exit 2
    ├── PlanError            the administrator: this host cannot run what is asked for       exit 125
    ├── HostError            the host: a file, a lock, the registry, a tool of the system    exit 125
    ├── JailError            the kernel refused a step of the plan; nothing is left behind   exit 125
    └── MonitorError         QEMU: it died, hangs, or says what makes no sense               exit 125

``what`` names the object, the cause is chained with ``raise ... from``, ``fix`` is an imperative or empty.
"""

from __future__ import annotations

from depriv.text import one_line

_SHOWN = 200  # characters of a line of the configuration, around the mark: somebody may have named a disk image


class DeprivError(Exception):
    """Base of all errors a caller is expected to catch."""

    exit_status = 125

    def __init__(self, what: str, *, fix: str = "", cause: str = "") -> None:
        """Take the object and what failed, the remedy, and the cause where no exception carries it."""
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.cause = cause

    def __str__(self) -> str:
        """Return the one line that says what went wrong."""
        return self.what


class ConfigError(DeprivError):
    """The configuration is wrong. Nothing was changed.

    ``source`` is the file's name, ``line`` and ``column`` count from 1 (0: not known), ``text`` is the offending
    line as written.
    """

    exit_status = 2

    def __init__(  # noqa: PLR0913 (the place in the file is four facts)
        self,
        what: str,
        *,
        fix: str = "",
        cause: str = "",
        source: str = "",
        line: int = 0,
        column: int = 0,
        text: str = "",
    ) -> None:
        """Take what is wrong and where."""
        super().__init__(what, fix=fix, cause=cause)
        self.source = source
        self.line = line
        self.column = column
        self.text = text
        self.others: tuple[ConfigError, ...] = ()  # further errors of the same file

    def __str__(self) -> str:
        """Return ``FILE:LINE:COLUMN: what``, with as much of the place as is known."""
        place = self.source
        if self.line:
            place += f":{self.line}:{self.column}"
        return f"{place}: {self.what}" if place else self.what


class NotFoundError(DeprivError):
    """There is no such domain."""

    exit_status = 2


class PlanError(DeprivError):
    """This host cannot run what is asked for. Nothing was changed."""


class HostError(DeprivError):
    """A file, lock or tool of the host failed."""


class JailError(DeprivError):
    """A step of the plan failed. The jail has ended, and what it made is removed."""

    def __init__(self, what: str, *, fix: str = "", cause: str = "", step: str = "", errno: int = 0) -> None:
        """Take the failed step as ``describe`` prints it, and its errno (0: none)."""
        super().__init__(what, fix=fix, cause=cause)
        self.step = step
        self.errno = errno


class MonitorError(DeprivError):
    """QEMU died, hangs, or answers what makes no sense. Its reply was used for nothing."""


def render(error: BaseException) -> str:
    """Return the lines the command line prints: error, place, cause, fix."""
    lines = [f"error: {one_line(str(error))}"]
    if isinstance(error, ConfigError) and error.text:
        at = max(error.column, 1) - 1
        first = max(0, at - _SHOWN // 2) if len(error.text) > _SHOWN else 0
        # One for one, so that the mark stays below its place; a file may hold what would steer a terminal.
        window = error.text[first : first + _SHOWN]
        shown = "".join(char if char.isprintable() else " " if char == "\t" else "?" for char in window)
        lines += [f"  {shown}", "  " + " " * (at - first) + "^"]
    cause = error.cause if isinstance(error, DeprivError) else ""
    if not cause and error.__cause__ is not None:
        cause = str(error.__cause__) or type(error.__cause__).__name__
    if cause:
        # The words of others: a file name, a system's message, QEMU's log.
        lines.append("cause: " + "\n".join(one_line(line) for line in cause.split("\n")))
    if isinstance(error, DeprivError) and error.fix:
        top, *rest = error.fix.split("\n")
        lines += [f"  fix: {one_line(top)}", *(f"       {one_line(line)}" for line in rest)]
    return "\n".join(lines)
