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
from depriv.errors import DeprivError, HostError, JailError, MonitorError, NotFoundError, PlanError
from depriv.guestlog import Log, start_fix
from depriv.planner import plan, plan_discovery, refuse_name
from depriv.policy import restarts_after
from depriv.report import Expected, Grant, Limit
from depriv.spawn import Jail
from depriv.steps import OpenFile, SetLimit
from depriv.wanted import to_data

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from depriv.config import Domain
    from depriv.host import Holding
    from depriv.planner import Launch
    from depriv.qmp import Monitor
    from depriv.registry import Registry
    from depriv.report import AuditReport
    from depriv.spawn import Launched

START_TIMEOUT_S = 60.0  # as libxl's LIBXL_DEVICE_MODEL_START_TIMEOUT
QMP_TIMEOUT_S = 10.0


class Started:
    """A start that went well: the entry, the audit that let the guest run, and where the time went."""

    def __init__(self, entry: Entry, report: AuditReport, launch: Launch, times: list[tuple[str, float]]) -> None:
        """Take the facts; ``times`` are (what was reached, CLOCK_MONOTONIC seconds)."""
        self.entry = entry
        self.report = report
        self.launch = launch
        self.times = times


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
    times = [("begin", time.monotonic())]
    if os.geteuid() != 0:
        raise PlanError("only root can start a domain", fix="run it with sudo; `depriv plan` needs no root")
    registry.prepare()
    ready = jail or Jail()
    with contextlib.ExitStack() as kept:
        kept.enter_context(ready)
        _make_room(config.name, registry, cache_dir, warn)
        for attempts_left in (2, 1, 0):
            try:
                entry, report, launch = _start(
                    config,
                    registry,
                    ready,
                    cache_dir=cache_dir,
                    paused=paused,
                    warn=warn,
                    times=times,
                    instead=instead,
                    restarts=restarts,
                )
                return Started(entry, report, launch, times)
            except JailError as error:
                if not (attempts_left and _is_uid_held(error)):
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
    config: Domain,
    registry: Registry,
    jail: Jail,
    *,
    cache_dir: str,
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
            entry = _reserve(config, registry, jail, restarts)
            others = _holdings(registry, entry, instead)
            refuse_name(config, others)
            registry.add(entry, held)
        try:
            host = look(config, domid=entry.domid, holdings=others, state_dir=registry.folder, cache_dir=cache_dir)
            launch = plan(config, host)
            with registry.locked():
                others = _holdings(registry, entry, instead)
                if others != host.holdings:  # somebody else's start or end came first: he may have what we planned for
                    host = host.replace(holdings=others)
                    launch = plan(config, host)
                entry = _committed(entry, launch)
                registry.save(entry)
            times.append(("plan", time.monotonic()))
            for text in launch.warnings:
                warn(text)
            if config.dm_restrict:
                runtime.ensure(launch, lambda: _discover(plan_discovery(config, host), entry, registry))
            times.append(("runtime", time.monotonic()))
            entry, report = _launch(launch, entry, registry, jail, paused=paused, times=times)
            if instead is not None:
                with registry.locked():
                    registry.remove(instead.domid)
        except BaseException as error:
            try:
                jail.__exit__()
            finally:
                if _is_uid_held(error):
                    entry = entry.replace(images=())  # the first step failed: the images are the next attempt's
                _forget(entry, registry)
            raise
    return entry, report, launch


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


def _reserve(config: Domain, registry: Registry, jail: Jail, restarts: int) -> Entry:
    """Return the entry that keeps name and domid; who it runs as and what it opens is not known yet."""
    return Entry(
        name=config.name,
        domid=registry.next_domid(),
        state="starting",
        uid=0,
        gid=0,
        reaper_uid=0,
        shared=False,
        restricted=config.dm_restrict,
        memory_mib=config.memory_mib,
        vcpus=config.vcpus,
        accel=config.accel,
        cgroup="",
        boot_id=registry.boot_id,
        created_boot_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        created_at_s=int(time.time()),
        toolstack_pid=os.getpid(),
        toolstack_starttime=proc.start_time(os.getpid()),
        jail_pid=jail.pid,
        jail_starttime=proc.start_time(jail.pid),
        config=to_data(config),
        restarts=restarts,
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


def _launch(  # noqa: PLR0913 (what one start is made of)
    launch: Launch,
    entry: Entry,
    registry: Registry,
    jail: Jail,
    *,
    paused: bool,
    times: list[tuple[str, float]],
) -> tuple[Entry, AuditReport]:
    """From the plan to a guest that runs, its QEMU confined, audited and released."""
    launched = jail.launch(launch.plan, timeout_s=START_TIMEOUT_S)
    times += [(f"jail: {name}", at) for name, at in launched.times]
    with (
        status.closing(launched.pidfd),
        Log(f"{launch.directory}/log") as log,
        _await_prelaunch(launch, launched, log) as monitor,
    ):
        from depriv.audit import audit  # noqa: PLC0415 (as in _await_prelaunch)

        times.append(("prelaunch", time.monotonic()))
        _refuse_lockless(log)
        if launch.plan.after:
            jail.empty_root(timeout_s=QMP_TIMEOUT_S)
        times.append(("empty root", time.monotonic()))
        entry = entry.replace(expected=_expected(launch, entry, launched))
        report = audit(launched.pid, expected=entry.expected, others=_others(registry, entry.domid))
        _refuse_unless_it_holds(report, launch)
        times.append(("audit", time.monotonic()))
        entry = entry.replace(state="running")
        registry.save(entry)
        times.append(("registry", time.monotonic()))
        # Up to here the jail kills QEMU if this process dies. From here on the entry answers for it.
        jail.release()
        if not paused:
            monitor.execute("cont", timeout_s=QMP_TIMEOUT_S)
        times.append(("run", time.monotonic()))
    return entry, report


def _refuse_unless_it_holds(report: AuditReport, launch: Launch) -> None:
    """Let no guest run whose restrictions do not all hold.

    Two may be off, if asked for: dm_restrict by its key, and that no other has its uid by naming the shared user.
    """
    wrong = [check for check in report.checks if not check.holds]
    if not launch.plan.restricted:
        wrong = [check for check in wrong if check.id != "dm_restrict"]
    if launch.plan.shared:
        wrong = [check for check in wrong if check.id != "alone"]
    if wrong:
        raise JailError(
            "the guest was not let run: not every restriction holds",
            cause="; ".join(f"{check.id} is {check.have}, not {check.want}" for check in wrong),
            fix="run depriv doctor; if it finds nothing, this is a fault of depriv: please report it",
        )


def _await_prelaunch(launch: Launch, launched: Launched, log: Log) -> Monitor:
    """Have QEMU say over QMP that it waits before the guest's first instruction; return the connection."""
    from depriv.qmp import Monitor  # noqa: PLC0415 (imported while QEMU starts, which takes longer)

    try:
        netns_of = launched.pidfd if launch.plan.restricted else -1
        monitor = Monitor.connect(f"{launch.directory}/qmp", timeout_s=START_TIMEOUT_S, netns_of=netns_of)
        try:
            if status.status(monitor, QMP_TIMEOUT_S) != "prelaunch":
                raise MonitorError("QEMU does not wait for the word to run the guest")  # noqa: TRY301 (one handler)
        except BaseException:
            monitor.close()
            raise
        return monitor
    except MonitorError as error:
        said = log.text()
        end = _how_it_ended(launched)
        if not end and not said:
            raise
        raise MonitorError(f"QEMU did not start{end}", cause=said or error.what, fix=start_fix(said)) from error


def _refuse_lockless(log: Log) -> None:
    """Hold QEMU to its image locks: where it cannot take them it only says so in its log, and goes on."""
    said = log.text()
    if "lock" in said.lower():
        raise MonitorError("QEMU works without image locks", cause=said)


def _how_it_ended(launched: Launched) -> str:
    try:  # the jail is its parent and still has not waited: the number is nobody else's
        begun = proc.start_time(launched.pid)
        state = proc.alive(launched.pid, begun)
        if state == "dead-leader":  # as every process with threads is for a moment when it ends
            time.sleep(0.05)
            state = proc.alive(launched.pid, begun)
    except ProcessLookupError:
        state = "dead"
    return "" if state == "running" else ": it ended" if state == "dead" else ": its main thread was killed"


def _discover(launch: Launch, entry: Entry, registry: Registry) -> str:
    """Do the dry run and return what it printed. Its QEMU ends with it.

    Meanwhile its jail is the entry's: whoever undoes a start that was cut short here has to see that one dead. The
    start's own has no plan yet, and does nothing.
    """
    try:
        with Jail() as jail:
            registry.save(entry.replace(jail_pid=jail.pid, jail_starttime=proc.start_time(jail.pid)))
            launched = jail.launch(launch.plan, timeout_s=START_TIMEOUT_S)
            with status.closing(launched.pidfd), Log(f"{launch.directory}/log") as log:
                _await_prelaunch(launch, launched, log).close()
                return log.raw()
    finally:
        registry.save(entry)
        for name in ("qmp", "events", "log"):
            if os.path.lexists(f"{launch.directory}/{name}"):
                os.unlink(f"{launch.directory}/{name}")


def _expected(launch: Launch, entry: Entry, launched: Launched) -> Expected:
    """Write down what the audit is to find from now on: from the plan, and from what the jail really opened."""
    files = {step.role: step for step in launch.plan.steps if isinstance(step, OpenFile)}
    paths = {name: f"{launch.directory}/{name}" for name in ("qmp", "events", "log")}
    paths |= {role: step.path for role, step in files.items()}
    execute = launch.plan.steps[-1].as_dict()
    grants = [
        Grant(
            role=item.role,
            kind=item.kind,
            dev=item.dev,
            ino=item.ino,
            rdev=item.rdev,
            access=item.access,
            path=paths.get(item.role, f"/dev/{item.role}"),
            locked=item.role in files and item.kind in ("file", "block"),
        )
        for item in launched.opened
    ]
    return Expected(
        domain=entry.name,
        domid=entry.domid,
        uid=entry.uid,
        gid=entry.gid,
        pid=launched.pid,
        starttime=proc.start_time(launched.pid),
        restricted=entry.restricted,
        limits=tuple(
            Limit(name=step.name, soft=step.value, hard=step.value)
            for step in launch.plan.steps
            if isinstance(step, SetLimit)
        ),
        environ=execute["environ"],
        cgroup="/" + "/".join(launch.cgroup.split("/")[-2:]),
        grants=tuple(grants),
    )


def _others(registry: Registry, domid: int) -> tuple[tuple[str, int], ...]:
    """Return name and pid of every other guest that runs."""
    return tuple(
        (entry.name, entry.expected.pid)
        for entry in registry.entries()
        if entry.domid != domid and entry.expected is not None and registry.life(entry) == "running"
    )


def audit_domain(entry: Entry, registry: Registry) -> AuditReport:
    """Return whether a domain's restrictions hold now.

    Of one whose entry is damaged, only what is true of every QEMU can be asked.
    """
    from depriv.audit import audit  # noqa: PLC0415 (as in _await_prelaunch)

    if entry.state == "damaged":
        from depriv.recover import main_pid  # noqa: PLC0415 (never needed, but for this)

        return audit(main_pid(entry), expected=None, others=_others(registry, entry.domid))
    if entry.expected is None:
        raise status.without_qemu(entry, HostError)
    return audit(entry.expected.pid, expected=entry.expected, others=_others(registry, entry.domid))


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
