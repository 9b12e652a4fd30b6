# SPDX-License-Identifier: Apache-2.0
"""`depriv watch`: one process that notices how guests end, and has `depriv gc` do what is due. It decides nothing.

It listens to two voices per guest. The kernel's, a pidfd of its QEMU, is believed. QEMU's own (``depriv.events``) is
written down for `gc` to weigh: at most it ends or restarts its own guest. No guest needs the watcher, and it keeps
nothing that it could not learn anew: killed and started again it finds every end that it missed.

One thread around one epoll; nothing in it waits for a guest, nor for a `gc`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
from time import monotonic

from depriv import durable, proc
from depriv.errors import DeprivError, HostError, MonitorError
from depriv.events import ClosedError, Events
from depriv.gcruns import ALL, Runs
from depriv.policy import happened
from depriv.registry import Registry
from depriv.status import raise_open_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Final

    from depriv.entry import Entry

TICK_S: Final = 1.0  # new domains are found, and peers that flooded are heard again
LEADER_TICKS: Final = 10  # each guest's main thread is looked at once in so many ticks: no pidfd tells of its end alone
LEFTOVERS_S: Final = 60.0
RECONNECT_S: Final = 5.0
DISTRUST_S: Final = 30.0  # after a breach of the protocol, and until silence is worth a word
AGAIN_S: Final = 60.0  # between two ends that QEMU tells of one life, doubled each time: it may be lying
AGAIN_MAX_S: Final = 3600.0
BLANK_S: Final = 10.0  # a folder without an entry is being made or removed; after that it is what a kill has left
ENDING_S: Final = 15.0  # an end or a restart that somebody else has under way gets so long to finish


class Guest:
    """One life of one domain, as long as it is watched."""

    __slots__ = (
        "again_s",
        "connected_at",
        "domid",
        "doubted",
        "due",
        "events",
        "heard",
        "name",
        "pid",
        "pidfd",
        "restricted",
        "retry_at",
        "starttime",
        "told",
    )

    def __init__(self, entry: Entry, *, pid: int, starttime: int) -> None:
        """Take what is known of it; nothing is opened yet."""
        self.domid, self.name, self.restricted = entry.domid, entry.name, entry.restricted
        self.pid, self.starttime = pid, starttime
        self.pidfd = -1  # -1: its QEMU is gone
        self.events: Events | None = None
        self.connected_at = 0.0
        self.retry_at = 0.0  # when to connect again
        self.heard = ""  # an end that QEMU told of and that is not acted on yet
        self.due = 0.0  # before that moment none is
        self.again_s = AGAIN_S
        self.doubted = False  # whether its QEMU's end may be the work of the `gc` that runs
        self.told = False  # whether it was said that its QEMU cannot be listened to

    def __str__(self) -> str:
        """Return what it is called in messages."""
        return f"{self.name} (domain {self.domid})"


def run(state_dir: str, *, say: Callable[[str], None]) -> int:
    """Watch until SIGTERM or SIGINT; then return 0, and leave all guests as they are.

    Args:
        state_dir: The registry's folder.
        say: Told each line for the log.

    Raises:
        HostError: another one watches this folder, or it cannot be used.
    """
    if os.geteuid() != 0:
        raise HostError("only root can watch guests", fix="run it with sudo")
    registry = Registry(os.path.abspath(state_dir))
    registry.prepare()
    raise_open_files()
    gc.freeze()  # what is there by now stays: no need to look through it again and again
    with (
        _alone(registry.folder),
        _wakeups() as wake,
        select.epoll() as epoll,
    ):
        watcher = Watcher(registry, epoll, wake, say)
        try:
            watcher.watch()
        finally:
            watcher.close()
    return 0


@contextlib.contextmanager
def _alone(folder: str) -> Generator[None]:
    """Be the only watcher of a registry.

    Raises:
        HostError: there is one.
    """
    try:
        held = durable.locked(f"{folder}/watch.lock", "the watcher", timeout_s=0)
        held.__enter__()
    except durable.BusyError as error:
        fix = "nothing is missing; to put this one in its place, end that one first"
        raise HostError(f"the guests of {folder} are watched already", cause=error.cause, fix=fix) from None
    try:
        yield
    finally:
        held.__exit__(None, None, None)


class Watcher:
    """All that is watched."""

    def __init__(self, registry: Registry, epoll: select.epoll, wake: int, say: Callable[[str], None]) -> None:
        """Take the registry, an epoll, a descriptor on which numbers of signals come, and the log."""
        self._registry = registry
        self._epoll = epoll
        self._wake = wake
        self._log = say
        self._runs = Runs(registry.folder, epoll, self._say)
        self._guests: dict[int, Guest] = {}
        self._owners: dict[int, Guest] = {}  # descriptor -> whose pidfd or events socket it is
        self._others: dict[int, float] = {}  # domid that does not run -> when to look at it again
        self._leftover: set[int] = set()  # those of them that are `gc`'s, not a start's
        self._tried: dict[
            int, int
        ] = {}  # domid -> the life, by its beginning, for which `gc` ran before it was watched
        self._blank: dict[int, float] = {}  # domid whose folder has no entry -> since when
        self._connected = False  # whether to anybody, since the last tick
        self._ticks = 0
        self._next_leftovers = 0.0
        epoll.register(wake, select.EPOLLIN)

    def watch(self) -> None:
        """Watch until told to stop."""
        self._tick()
        self._say(f"watching {self._registry.folder} with {len(self._guests)} guests, process {os.getpid()}")
        next_tick = monotonic() + TICK_S
        while True:
            self._runs.start(self._is_listed)
            for fd, _mask in self._epoll.poll(max(next_tick - monotonic(), 0)):
                if fd == self._wake:
                    self._say("stopped; guests go on unwatched")
                    return
                self._serve(fd)
            if monotonic() >= next_tick:
                self._tick()
                next_tick = monotonic() + TICK_S

    def close(self) -> None:
        """Close what is open; what runs goes on."""
        for guest in self._guests.values():
            self._hang_up(guest)
            self._let_go(guest)
        self._runs.close()

    def _serve(self, fd: int) -> None:
        """See to one descriptor that has something to say."""
        if (done := self._runs.ended(fd)) is not None:
            self._settle(*done)
        elif (guest := self._owners.get(fd)) is None:
            return  # closed while others of the same poll were served
        elif fd == guest.pidfd:
            self._gone(guest)
        else:
            self._listen(guest)

    def _say(self, text: str) -> None:
        """Say it; a log that nobody reads any more is no reason to stop."""
        with contextlib.suppress(OSError):
            self._log(text)

    # --- What there is ---

    def _tick(self) -> None:
        """Find what is new and what is gone, and grant everybody the next second's share."""
        now = monotonic()
        self._ticks += 1
        try:
            domids = set(self._registry.domids())
        except (DeprivError, OSError) as error:
            self._say(f"cannot list the domains: {error}")
            return
        for domid in self._guests.keys() - domids:
            self._forget(self._guests[domid])
        for domid in self._others.keys() - domids:
            self._put_off(domid, None)
        for domid in sorted(domids - self._guests.keys()):
            if self._others.get(domid, 0.0) <= now:
                self._look(domid, now)
        for guest in tuple(self._guests.values()):
            if guest.pidfd >= 0:
                self._attend(guest, now)
        if self._leftover and now >= self._next_leftovers:
            self._next_leftovers = now + LEFTOVERS_S
            self._runs.want(ALL)
        self._runs.mention_slow(now)
        if self._connected:
            # To enter a network namespace leaves 8 KiB behind, in a cycle that the collector would come to late.
            self._connected = False
            gc.collect()

    def _look(self, domid: int, now: float) -> None:
        """Look at a domain that is not watched yet: watch it if it runs."""
        try:
            entry = self._entry(domid)
            if entry is not None and entry.state == "starting" and not self._registry.is_starting(entry):
                entry = self._entry(domid)  # it may have got through since
            if entry is None:  # only just being made or removed; or a start was killed right there
                self._put_off(domid, now, leftover=now - self._blank.setdefault(domid, now) > BLANK_S)
            elif entry.state == "starting" and self._registry.is_starting(entry):
                self._put_off(domid, now)  # until the next tick
            elif entry.state == "running" and entry.expected is not None:
                self._adopt(entry, entry.expected.pid, entry.expected.starttime)
            else:
                new = self._tried.get(domid) != entry.created_boot_ns
                # What is damaged takes a while to look at. The others may be cleared and their domids used again soon.
                self._put_off(domid, now + LEFTOVERS_S if entry.state == "damaged" else now, leftover=True)
                if new and entry.state in ("starting", "waiting"):
                    self._tried[domid] = entry.created_boot_ns
                    # One that waits may be about to be started again by a command that is at it this moment.
                    self._runs.want(domid, after_s=ENDING_S if entry.state == "waiting" else 0.0)
        except (DeprivError, OSError) as error:
            self._say(f"domain {domid} cannot be watched: {error}")
            self._put_off(domid, now + LEFTOVERS_S)

    def _put_off(self, domid: int, until: float | None, *, leftover: bool = False) -> None:
        """Look at a domain that does not run again at some time; None: never, it is gone or watched."""
        self._others.pop(domid, None)
        self._leftover.discard(domid)
        if until is None:
            self._blank.pop(domid, None)
            self._tried.pop(domid, None)
        if until is not None:
            self._others[domid] = until
        if leftover:
            self._leftover.add(domid)

    def _adopt(self, entry: Entry, pid: int, starttime: int) -> None:
        """Watch a guest from now on, or find that it ended before."""
        guest = Guest(entry, pid=pid, starttime=starttime)
        try:
            guest.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            guest.pidfd = -1
        self._put_off(entry.domid, None)
        self._guests[entry.domid] = guest
        # Only now: as long as the pidfd is open the number is nobody else's.
        if guest.pidfd < 0 or self._registry.life(entry) != "running":
            self._gone(guest)
            return
        self._own(guest, guest.pidfd)
        self._connect(guest, monotonic())

    def _attend(self, guest: Guest, now: float) -> None:
        """Do for one guest what each tick brings."""
        if (guest.domid + self._ticks) % LEADER_TICKS == 0 and proc.alive(guest.pid, guest.starttime) != "running":
            self._gone(guest)
            return
        if guest.events is None:
            if now >= guest.retry_at:
                self._connect(guest, now)
        else:
            self._next_share(guest, guest.events, now)
        if guest.heard and now >= guest.due:
            self._act(guest, now)

    # --- QEMU's voice ---

    def _connect(self, guest: Guest, now: float) -> None:
        """Connect to a guest's events socket."""
        guest.retry_at = now + RECONNECT_S
        path = f"{self._registry.directory(guest.domid)}/events"
        try:
            guest.events = Events.connect(path, netns_of=guest.pidfd if guest.restricted else -1)
            self._own(guest, guest.events.fileno())
            guest.connected_at = now
            self._connected = True
        except (MonitorError, OSError) as error:
            self._hang_up(guest)
            self._distrust(guest, error)

    def _next_share(self, guest: Guest, events: Events, now: float) -> None:
        """Hear again a QEMU that had used up its share of the last tick."""
        spent = events.spent
        try:
            events.tick()
        except MonitorError as error:
            self._hang_up(guest)
            self._distrust(guest, error)
            return
        if spent:
            self._own(guest, events.fileno())
        elif not events.greeted and now - guest.connected_at > DISTRUST_S:
            self._tell(guest, MonitorError("it does not answer on its events socket"))

    def _listen(self, guest: Guest) -> None:
        """Take what QEMU says."""
        if guest.events is None:
            return
        said, end = guest.events.receive()
        self._believe(guest, said)
        if end is not None:
            self._hang_up(guest)
            guest.retry_at = monotonic() + RECONNECT_S
            if not isinstance(end, ClosedError):
                self._distrust(guest, end)
        elif guest.events.spent:
            self._disown(guest.events.fileno())
        if guest.heard and monotonic() >= guest.due:
            self._act(guest, monotonic())

    def _believe(self, guest: Guest, said: list[tuple[str, str]]) -> None:
        """Keep the last end that QEMU told of."""
        for kind, word in said:
            if kind == "event":
                guest.heard = word
            elif reason := happened(alive="running", status=word, noted=self._registry.end_noted(guest.domid)):
                guest.heard = reason

    def _act(self, guest: Guest, now: float) -> None:
        """Write down an end that QEMU told of, and have `gc` see what is true of it; the next one not too soon."""
        if self._read(guest) is None:
            guest.heard = ""  # we were stopped meanwhile: it is gone, and its folder may be the next one's
            return
        self._say(f"{guest}: {guest.heard}, says its QEMU")
        self._note(guest)
        self._runs.want(guest.domid)
        guest.due = now + guest.again_s
        guest.again_s = min(2 * guest.again_s, AGAIN_MAX_S)

    def _note(self, guest: Guest) -> None:
        heard, guest.heard = guest.heard, ""
        try:
            self._registry.note_end(guest.domid, heard)
        except DeprivError as error:
            self._say(f"{guest}: cannot write down that it ended: {error}")

    def _distrust(self, guest: Guest, error: MonitorError | OSError) -> None:
        guest.retry_at = monotonic() + DISTRUST_S
        self._tell(guest, error)

    def _tell(self, guest: Guest, error: DeprivError | OSError) -> None:
        """Say once of a guest that nothing can be learned from its QEMU; the kernel still tells of its end."""
        if not guest.told:
            guest.told = True
            cause = error.cause if isinstance(error, DeprivError) else ""
            more = f" ({cause or error.__cause__})" if cause or error.__cause__ else ""
            self._say(f"{guest}: {error}{more}; of its end the kernel tells all the same")

    # --- The kernel's voice ---

    def _gone(self, guest: Guest) -> None:
        """Have `gc` clear, or start again, a domain whose QEMU is gone."""
        if guest.events is not None:
            with contextlib.suppress(MonitorError):
                guest.events.tick()  # the last words count, whatever share they had
            self._believe(guest, guest.events.receive()[0])
        self._hang_up(guest)
        self._let_go(guest)
        entry = self._read(guest)
        if entry is None:
            self._forget(guest)  # destroyed: nothing to tell
        elif self._runs.is_running(guest.domid):
            guest.doubted = True  # most likely its doing: see _settle
        elif entry.state == "ending":
            self._runs.want(guest.domid, after_s=ENDING_S)  # unless it is gone by then
        else:
            self._report_gone(guest)

    def _report_gone(self, guest: Guest) -> None:
        guest.doubted = False
        self._say(f"{guest}: its QEMU is gone{f' after {guest.heard}' if guest.heard else ''}")
        if guest.heard:
            self._note(guest)
        self._runs.want(guest.domid)

    def _settle(self, domid: int, status: int) -> None:
        """See what a `gc` has left of the domain that it ran for."""
        guest = self._guests.get(domid)
        entry = None if guest is None else self._read(guest)
        if guest is not None and entry is None:
            self._forget(guest)
        elif guest is not None and guest.pidfd < 0 and entry is not None and entry.state != "running":
            self._forget(guest)
            self._put_off(domid, monotonic() + LEFTOVERS_S, leftover=True)
        elif status and self._is_listed(domid):
            self._runs.retry(domid)
        elif guest is not None and guest.doubted:
            self._report_gone(guest)
        else:
            self._runs.forget(domid)

    # --- Bookkeeping ---

    def _entry(self, domid: int) -> Entry | None:
        """Return an entry and keep nothing of it: a registry keeps all that it has read, which is 20 KiB a guest."""
        return Registry(self._registry.folder).read(domid)

    def _read(self, guest: Guest) -> Entry | None:
        """Return the entry of this very life; None if it is gone. One that cannot be read is `gc`'s to judge."""
        try:
            entry = self._entry(guest.domid)
        except (DeprivError, OSError):
            return None
        if entry is None or entry.expected is None or entry.expected.pid != guest.pid:
            return None
        return entry if entry.expected.starttime == guest.starttime else None

    def _is_listed(self, domid: int) -> bool:
        return domid == ALL or os.path.isdir(self._registry.directory(domid))

    def _forget(self, guest: Guest) -> None:
        self._hang_up(guest)
        self._let_go(guest)
        self._guests.pop(guest.domid, None)
        self._runs.forget(guest.domid)

    def _hang_up(self, guest: Guest) -> None:
        if guest.events is not None:
            self._disown(guest.events.fileno())
            guest.events.close()
            guest.events = None

    def _let_go(self, guest: Guest) -> None:
        if guest.pidfd >= 0:
            self._disown(guest.pidfd)
            os.close(guest.pidfd)
            guest.pidfd = -1

    def _own(self, guest: Guest, fd: int) -> None:
        self._epoll.register(fd, select.EPOLLIN)
        self._owners[fd] = guest

    def _disown(self, fd: int) -> None:
        if self._owners.pop(fd, None) is not None:
            self._epoll.unregister(fd)


@contextlib.contextmanager
def _wakeups() -> Generator[int]:
    """Yield a descriptor that becomes readable with SIGTERM or SIGINT, which do nothing else meanwhile."""
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    before = [signal.signal(number, lambda _number, _frame: None) for number in numbers[:2]]
    before.append(signal.signal(signal.SIGCHLD, signal.SIG_DFL))  # ignored, as by some callers, it takes statuses away
    old = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    try:
        yield ours
    finally:
        signal.set_wakeup_fd(old)
        for number, action in zip(numbers, before, strict=True):
            signal.signal(number, action)
        os.close(ours)
        os.close(theirs)
