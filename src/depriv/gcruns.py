# SPDX-License-Identifier: Apache-2.0
"""The `depriv gc` processes that a watcher has started or is to start: few at once, one per domain, failures again.

No wait is in here: a run that ends is heard of by the watcher's epoll.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

ALL: Final = -1  # in place of a domid: whatever is due on the host
RUNS_MAX: Final = 4
BEHIND_MAX: Final = 2  # of these: repetitions and runs for ALL. Guests that cannot be cleared must not hold up others.
RETRY_FIRST_S: Final = 2.0
RETRY_MAX_S: Final = 60.0
SLOW_S: Final = 60.0
_KILL_AND_STOP: Final = (9, 19)  # whose actions cannot be set


class Run:
    """One process."""

    __slots__ = ("began", "domid", "mentioned", "pid")

    def __init__(self, domid: int, pid: int, began: float) -> None:
        """Take what it runs for, and when it was started."""
        self.domid, self.pid, self.began = domid, pid, began
        self.mentioned = False


class Runs:
    """What is under way, and what waits."""

    def __init__(self, state_dir: str, epoll: select.epoll, say: Callable[[str], None]) -> None:
        """Take the registry's folder, the epoll that is to hear of ends, and the log."""
        self._state_dir = state_dir
        self._epoll = epoll
        self._say = say
        self._running: dict[int, Run] = {}  # by pidfd
        self._wanted: dict[int, float] = {}  # domid -> not before
        self._pauses: dict[int, float] = {}  # domid -> how long to wait after the next failure

    def want(self, domid: int, *, after_s: float = 0.0) -> None:
        """Have a run for a domain; one that is under way does not count, for it may have looked too early."""
        due = monotonic() + after_s
        self._wanted[domid] = min(due, self._wanted.get(domid, due))

    def retry(self, domid: int) -> None:
        """Have another run after one that failed: soon at first, then once a minute."""
        if domid == ALL:
            return  # comes by itself
        pause_s = self._pauses.get(domid, RETRY_FIRST_S)
        self._pauses[domid] = min(2 * pause_s, RETRY_MAX_S)
        self._say(f"depriv gc for domain {domid} has failed; again in {pause_s:.0f} s")
        self.want(domid, after_s=pause_s)

    def forget(self, domid: int) -> None:
        """Forget the failures for a domain that is gone or settled; what was wanted of it since is not taken back."""
        self._pauses.pop(domid, None)

    def start(self, is_listed: Callable[[int], bool]) -> None:
        """Start what is due, as far as there is room. Domains that are not listed any more are left out."""
        now = monotonic()
        busy = {run.domid for run in self._running.values()}
        behind = sum(self._is_behind(domid) for domid in busy)
        for domid in sorted(self._wanted, key=lambda domid: (self._is_behind(domid), domid == ALL)):
            if len(self._running) >= RUNS_MAX:
                return
            if self._wanted[domid] > now or domid in busy or (self._is_behind(domid) and behind >= BEHIND_MAX):
                continue
            if domid == ALL and any(now - run.began < SLOW_S for run in self._running.values()):
                continue  # it would see to the same domains at the same time
            del self._wanted[domid]
            if not is_listed(domid):
                self._pauses.pop(domid, None)
            elif self._spawn(domid, now):
                behind += self._is_behind(domid)

    def is_running(self, domid: int) -> bool:
        """Tell whether one is under way for a domain."""
        return any(run.domid == domid for run in self._running.values())

    def ended(self, fd: int) -> tuple[int, int] | None:
        """Return what the run with this pidfd was for, and its exit status (0: done); None if it is no run's."""
        run = self._running.pop(fd, None)
        if run is None:
            return None
        self._epoll.unregister(fd)
        os.close(fd)
        _pid, status = os.waitpid(run.pid, 0)
        return run.domid, os.waitstatus_to_exitcode(status)

    def mention_slow(self, now: float) -> None:
        """Say once of a run that it takes long. It is not killed: half a destroyed domain is no better."""
        for run in self._running.values():
            if not run.mentioned and now - run.began > SLOW_S:
                run.mentioned = True
                self._say(f"depriv gc{_of(run.domid)}, process {run.pid}, has taken more than {SLOW_S:.0f} s")

    def close(self) -> None:
        """Wait for nothing: what runs goes on to its end."""
        for fd in self._running:
            os.close(fd)
        self._running.clear()

    def _is_behind(self, domid: int) -> bool:
        return domid == ALL or domid in self._pauses

    def _spawn(self, domid: int, now: float) -> bool:
        """Start one; False if the host refuses, which counts as a failure of it."""
        # As this interpreter was told to find depriv, so the child is; -P: never in the current folder.
        environ = {**os.environ, "DEPRIV_STATE_DIR": self._state_dir}
        try:
            pid = os.posix_spawn(
                sys.executable,
                command(domid),
                environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, 2, 1),
                ],
                setpgroup=0,  # Ctrl-C is for the watcher alone
                setsigmask=(),
                setsigdef=[number for number in range(1, 32) if number not in _KILL_AND_STOP],
            )
        except OSError as error:
            self._say(f"cannot start depriv gc{_of(domid)}: {error}")
            self.retry(domid)
            return False
        try:
            fd = os.pidfd_open(pid)  # our child, not waited for: the number is its own
        except OSError as error:
            self._say(f"cannot follow depriv gc{_of(domid)}: {error}")
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)  # the one wait there is: without a descriptor to spare nothing else can be done
            self.retry(domid)
            return False
        self._running[fd] = Run(domid, pid, now)
        self._epoll.register(fd, select.EPOLLIN)
        return True


def command(domid: int) -> list[str]:
    """Return the words that do what is due for a domain, or for ALL."""
    words = [sys.executable, "-P", "-m", "depriv.cli", "gc", "--restart"]
    return words if domid == ALL else [*words, str(domid)]


def _of(domid: int) -> str:
    return "" if domid == ALL else f" for domain {domid}"
