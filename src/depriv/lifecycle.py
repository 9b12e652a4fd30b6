# SPDX-License-Identifier: Apache-2.0
"""Start domains, and start them again. While they run, nothing of this does: no daemon, no process per guest.

A start goes: reserve the ids; jail (a separate process) up to QEMU's exec; QMP says "prelaunch"; empty QEMU's root;
audit; only then release the jail and let the guest run. Until the release, whatever goes wrong ends in nothing:
the jail kills QEMU when its control socket closes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time

from depriv import collect, proc, runtime, status
from depriv.detect import look
from depriv.ending import end_processes, finish, forget, quarantine
from depriv.entry import Entry
from depriv.errors import DeprivError, JailError, NotFoundError, PlanError
from depriv.launching import bring_up, discover
from depriv.planner import plan, plan_discovery, refuse_name
from depriv.policy import restarts_after
from depriv.spawn import Jail
from depriv.wanted import to_data

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from depriv.assembly import Launch
    from depriv.config import Domain
    from depriv.host import Holding, Host
    from depriv.launching import Running
    from depriv.registry import Registry
    from depriv.report import AuditReport, Grant


class Started:
    """A start that went well: the entry, the audit that let the guest run, and where the time went."""

    def __init__(self, entry: Entry, report: AuditReport, launch: Launch, times: list[tuple[str, float]]) -> None:
        """Take the facts; ``times`` are (what was reached, CLOCK_MONOTONIC seconds)."""
        self.entry = entry
        self.report = report
        self.launch = launch
        self.times = times


class Wish:
    """What is to be started, however it was asked for: how to look at the host for it, and how to plan it."""

    keeps_jail = False  # which goes on as QEMU's keeper, until the caller closes it
    loads = False  # a saved state, before the guest goes on
    may_move = True  # to another domid, and so uid, if somebody who does not die has that of the first

    def __init__(self, config: Domain, registry: Registry, cache_dir: str) -> None:
        """Take a configuration; :mod:`depriv.foreground` has another kind, for command lines."""
        self._config = config
        self._registry = registry
        self._cache_dir = cache_dir
        self.name = config.name
        self.restricted = config.dm_restrict
        self.facts: dict[str, Any] = {  # of the entry
            "restricted": config.dm_restrict,
            "memory_mib": config.memory_mib,
            "vcpus": config.vcpus,
            "accel": config.accel,
            "config": to_data(config),
        }

    def domid(self) -> int:
        """Return which domid it is to have; the registry is locked."""
        return self._registry.next_domid()

    def refuse_name(self, others: tuple[Holding, ...]) -> None:
        """Refuse a name that another domain has."""
        refuse_name(self.name, others, self._config.place("name"))

    def look(self, domid: int, others: tuple[Holding, ...]) -> Host:
        """Return the host's facts."""
        folders = {"state_dir": self._registry.folder, "cache_dir": self._cache_dir}
        return look(self._config, domid=domid, holdings=others, **folders)

    def plan(self, host: Host) -> Launch:
        """Return how it is started."""
        return plan(self._config, host)

    def plan_discovery(self, host: Host) -> Launch:
        """Return its dry run."""
        return plan_discovery(self._config, host)

    def prepare(self, entry: Entry) -> None:
        """Do what has to be done before the jail: nothing, for a configuration."""

    def late(self) -> tuple[Grant, ...]:
        """Return what QEMU is handed after its start."""
        return ()

    def see_through(self, running: Running, *, paused: bool) -> None:
        """Let the guest run, or not, once all is audited."""
        # Up to here the jail kills QEMU if this process dies. From here on the entry answers for it.
        running.jail.release()
        if not paused:
            running.cont()


def create(  # noqa: PLR0913 (some of them are for callers that want to know more or be faster)
    config: Domain,
    registry: Registry,
    *,
    cache_dir: str,
    paused: bool = False,
    warn: Callable[[str], None] = lambda _text: None,
    jail: Jail | None = None,
    instead: Entry | None = None,
    restarts: int = 0,
) -> Started:
    """Start a domain.

    Args:
        config: What is wanted.
        registry: Where domains are kept.
        cache_dir: Where copies of QEMU's files are kept.
        paused: Leave the guest stopped before its first instruction.
        warn: Told every warning: a restriction that was switched off, a key without effect.
        jail: A jail that was started ahead, to save its start-up time; it is used up.
        instead: A domain "waiting" under the same name, whose place this one takes once it runs.
        restarts: How many times in a row it was started again after a short life.

    Raises:
        DeprivError: it did not start, why, and what to do. Nothing is left of it, but that ids which somebody who does
            not die still has are kept from use.
    """
    wish = Wish(config, registry, cache_dir)
    return start(
        wish, registry, cache_dir=cache_dir, paused=paused, warn=warn, jail=jail, instead=instead, restarts=restarts
    )


def start(  # noqa: PLR0913 (as above)
    wish: Wish,
    registry: Registry,
    *,
    cache_dir: str,
    paused: bool,
    warn: Callable[[str], None],
    jail: Jail | None = None,
    instead: Entry | None = None,
    restarts: int = 0,
) -> Started:
    """Do what ``create`` does, for any kind of wish."""
    times = [("begin", time.monotonic())]
    if os.geteuid() != 0:
        raise PlanError("only root can start a domain", fix="run it with sudo; `depriv plan` needs no root")
    registry.prepare()
    ready = jail or Jail()
    with collect.tidy_when_cut_short(registry, cache_dir), contextlib.ExitStack() as kept:
        kept.enter_context(ready)
        _make_room(wish.name, registry, cache_dir, warn)
        for attempts_left in (2, 1, 0):
            try:
                entry, report, launch = _start(
                    wish,
                    registry,
                    ready,
                    paused=paused,
                    warn=warn,
                    times=times,
                    instead=instead,
                    restarts=restarts,
                )
                if wish.keeps_jail:
                    kept.pop_all()
                return Started(entry, report, launch, times)
            except JailError as error:
                if not (attempts_left and wish.may_move and _is_uid_held(error)):
                    raise
                # The id is quarantined by now; with another one the guest can start all the same.
                warn(f"{error}: {error.cause}. Its id is quarantined, the domain gets another one.")
            ready = kept.enter_context(Jail())
    raise AssertionError("the last attempt returns or raises")


def _make_room(name: str, registry: Registry, cache_dir: str, warn: Callable[[str], None]) -> None:
    """Clear away what is due, and a guest of the same name that has ended: without a watcher nobody else does."""
    for done in collect.tidy(registry, cache_dir, name=name):
        if done.result in ("quarantined", "failed"):
            warn(f"{done.what}: {done.result}: {done.cause}")
    for entry in registry.entries():
        if entry.name == name and entry.state == "running":
            said = status.ask((entry,), registry).get(entry.domid, "")
            due = collect.of_entry(entry, registry, said, restart=False)
            if due is not None:
                collect.clear(due, registry, said)


def _start(  # noqa: PLR0913 (what one start is made of)
    wish: Wish,
    registry: Registry,
    jail: Jail,
    *,
    paused: bool,
    warn: Callable[[str], None],
    times: list[tuple[str, float]],
    instead: Entry | None,
    restarts: int,
) -> tuple[Entry, AuditReport, Launch]:
    """Reserve, plan, launch; whatever goes wrong is undone.

    Reserving is a moment under the registry's lock. Looking at images and asking who exists is done without it: a
    server that hangs holds up nobody else's start.
    """
    with contextlib.ExitStack() as held:
        with registry.locked():
            entry = _reserve(wish, registry, jail, restarts)
            others = _holdings(registry, entry, instead)
            wish.refuse_name(others)
            registry.add(entry, held)
        try:
            host, launch, entry = _planned(wish, registry, entry, others, instead)
            times.append(("plan", time.monotonic()))
            for text in launch.warnings:
                warn(text)
            if wish.restricted:
                runtime.ensure(launch, lambda: discover(wish.plan_discovery(host), entry, registry))
            times.append(("runtime", time.monotonic()))
            wish.prepare(entry)
            entry, report = bring_up(
                launch,
                entry,
                registry,
                jail,
                see_through=lambda running: wish.see_through(running, paused=paused),
                loads=wish.loads,
                late=wish.late(),
                times=times,
            )
            if instead is not None:
                with registry.locked():
                    registry.remove(instead.domid)
        except BaseException as error:
            collect.let_go(error)
            try:
                jail.__exit__()
            finally:
                if _is_uid_held(error):
                    entry = entry.replace(images=())  # the first step failed: the images are the next attempt's
                _forget(entry, registry)
            raise
    return entry, report, launch


def _planned(
    wish: Wish, registry: Registry, entry: Entry, others: tuple[Holding, ...], instead: Entry | None
) -> tuple[Host, Launch, Entry]:
    """Plan, and write down what the jail is about to make and open."""
    host = wish.look(entry.domid, others)
    launch = wish.plan(host)
    with registry.locked():
        others = _holdings(registry, entry, instead)
        if others != host.holdings:  # somebody else's start or end came first: he may have what we planned for
            host = host.replace(holdings=others)
            launch = wish.plan(host)
        entry = _committed(entry, launch)
        registry.save(entry)
    return host, launch, entry


def _is_uid_held(error: BaseException) -> bool:
    """Tell whether a start ended at its first step: somebody who does not die has its uid or gid."""
    return isinstance(error, JailError) and error.step.startswith("kill every process") and error.errno == errno.EBUSY


def _holdings(registry: Registry, own: Entry, instead: Entry | None) -> tuple[Holding, ...]:
    """Return what all others hold. Who has only reserved was asked for by name, and finds us when it commits."""
    return tuple(
        entry.holding
        for entry in registry.entries()
        if entry.domid != own.domid
        and (entry.uid or entry.state != "starting" or entry.created_boot_ns < own.created_boot_ns)
        and (instead is None or entry.domid != instead.domid)
    )


def _reserve(wish: Wish, registry: Registry, jail: Jail, restarts: int) -> Entry:
    """Return the entry that keeps name and domid; who it runs as and what it opens is not known yet."""
    domid = wish.domid()  # which may decide the name
    return Entry(
        name=wish.name,
        domid=domid,
        state="starting",
        uid=0,
        gid=0,
        reaper_uid=0,
        shared=False,
        cgroup="",
        boot_id=registry.boot_id,
        created_boot_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        created_at_s=int(time.time()),
        toolstack_pid=os.getpid(),
        toolstack_starttime=proc.start_time(os.getpid()),
        jail_pid=jail.pid,
        jail_starttime=proc.start_time(jail.pid),
        restarts=restarts,
        **wish.facts,
    )


def _committed(entry: Entry, launch: Launch) -> Entry:
    """Return the entry with all that the jail is about to make and open: it is written before."""
    identity = launch.identity
    return entry.replace(
        uid=identity.uid,
        gid=identity.gid,
        reaper_uid=identity.reaper_uid,
        shared=launch.plan.shared,
        accel=launch.accel,
        cgroup=launch.cgroup,
        images=launch.images,
    )


def restart(entry: Entry, registry: Registry, said: str, *, cache_dir: str, warn: Callable[[str], None]) -> Entry:
    """End a domain that has ended by itself and start it again from what it was started from, as a new domain.

    Until the new one runs, the old one stays listed as "waiting", with the reason if the new one does not start. It
    stays locked meanwhile. One of which something does not die is quarantined instead, and not started again.

    Args:
        entry: The old one.
        registry: Where it is.
        said: What its QEMU answers to query-status, or "".
        cache_dir: As for ``create``.
        warn: As for ``create``.

    Raises:
        NotFoundError: another command was faster.
        DeprivError: something of it still lives, or the new one did not start.
    """
    from depriv.wanted import from_data  # noqa: PLC0415 (not on the path of create)

    with registry.locked_domain(entry.domid):
        entry = registry.current(entry)
        due = collect.of_entry(entry, registry, said, restart=True)
        if due is None or due.action == "clear":
            raise NotFoundError(f"domain {entry.name} is not to be started again: another command has seen to it")
        config = from_data(entry.config)
        if due.action == "rename-restart":
            restarts = restarts_after(entry.restarts, collect.lived_s(entry))
            kept = {f"on_{word}": "preserve" for word in ("poweroff", "reboot", "crash")}
            name = f"{entry.name[:50]}-{entry.domid}"
            registry.save(entry.replace(name=name, config={**(entry.config or {}), **kept}))
            try:
                return create(config, registry, cache_dir=cache_dir, warn=warn, restarts=restarts).entry
            except DeprivError:
                with contextlib.suppress(DeprivError):
                    registry.save(entry)  # it is due again, under its own name
                raise
        if entry.state != "waiting":
            entry = _ended(entry, registry)
        try:
            new = create(config, registry, cache_dir=cache_dir, warn=warn, instead=entry, restarts=entry.restarts)
        except DeprivError as error:
            with contextlib.suppress(DeprivError):
                registry.save(entry.replace(trouble=collect.cause_of(error)))
            raise
        return new.entry


def _ended(entry: Entry, registry: Registry) -> Entry:
    """End all of a domain, which is locked, but keep what it was started from."""
    try:
        with Jail() as jail:
            end_processes(entry, registry, jail)
    except DeprivError as error:
        quarantine(entry, registry, error)
        raise
    restarts = restarts_after(entry.restarts, collect.lived_s(entry))
    entry = entry.replace(state="waiting", uid=0, gid=0, images=(), cgroup="", expected=None, restarts=restarts)
    registry.save(entry)
    registry.forget_end(entry.domid)
    return entry


def _forget(entry: Entry, registry: Registry) -> None:
    """Undo a reservation whose start failed; the domain is locked. The jail has ended and took with it what it made."""
    try:
        if entry.uid:
            with Jail() as jail:
                finish(entry, registry, jail)
        else:
            forget(entry, registry)  # planning failed: nothing was ever made
    except DeprivError as error:
        print(f"warning: domain {entry.name} is kept: {error}", file=sys.stderr)  # noqa: T201 (nobody else will hear)
