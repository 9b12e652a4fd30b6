# SPDX-License-Identifier: Apache-2.0
"""The part of the storm that is inside of its victims: it stops a process at an exact place until it is told to go on.

At the place the process sends one word to the storm (:mod:`tests.support.storm_broker`) and waits. Whoever is to be
killed is killed meanwhile, from outside: nobody in a pid namespace below can signal the host's processes.
Standard library only: the jail runs it without site-packages.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
PACKAGE = f"{ROOT}/src/depriv"
_HIGH = 500  # above every number that QEMU gets


class Point:
    """The connection to the storm."""

    def __init__(self, address: str, role: str) -> None:
        """Connect to an abstract address and say who this is: "toolstack" or "jail"."""
        self._fd = -1
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made:
            try:
                made.connect("\0" + address)
                self._fd = fcntl.fcntl(made.fileno(), fcntl.F_DUPFD_CLOEXEC, _HIGH)
                os.read(self._fd, 1)  # from here on the storm sees who sends
                os.write(self._fd, f"role {role}".encode())
                os.read(self._fd, 1)
            except OSError:
                return  # the storm is through with this command

    def reached(self, what: str) -> None:
        """Say that this process is at its place, and wait until what is to happen there has happened."""
        self._send(f"reached {what}")

    def tell_lines(self, lines: dict[tuple[str, int, str], int]) -> None:
        """Say which lines were executed: (file, line, function) -> how often."""
        for (file, line, function), count in lines.items():
            self._send(f"line {json.dumps([file, line, function, count])}")

    def _send(self, text: str) -> None:
        try:
            os.write(self._fd, text.encode())
            os.read(self._fd, 1)
        except OSError:
            return


class Lines:
    """Counts the lines of the package that this process executes, and calls when one of them is next."""

    def __init__(self, place: dict[str, Any], folder: str, reached: Callable[[str], None]) -> None:
        """Take the place: the ``nth`` line of all, or the ``nth`` time that ``line`` of ``file`` is next."""
        self.counts: dict[tuple[str, int, str], int] = {}
        self._counting = place["at"] == "count"
        self._folder = folder
        self._file = place.get("file", "")
        self._line = place.get("line", 0)
        self._left = place.get("nth", 0)
        self._reached = reached

    def start(self) -> None:
        """Begin; children that are forked go on with it, those that execute do not."""
        sys.settrace(self._call)

    def _call(self, frame: FrameType, _event: str, _argument: object) -> Any:
        code = frame.f_code
        # What a module executes when it is imported is not what is looked for.
        if not code.co_filename.startswith(self._folder) or code.co_name == "<module>":
            return None
        if self._file and not code.co_filename.endswith(f"/{self._file}"):
            return None
        return self._next

    def _next(self, frame: FrameType, event: str, _argument: object) -> Any:
        if event != "line":
            return self._next
        code = frame.f_code
        if self._counting:
            key = (code.co_filename[len(PACKAGE) + 1 :], frame.f_lineno, code.co_name)
            self.counts[key] = self.counts.get(key, 0) + 1
        elif not self._line or frame.f_lineno == self._line:
            self._left -= 1
            if self._left == 0:
                sys.settrace(None)
                self._reached(f"{code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno} {code.co_name}")
        return self._next
