# SPDX-License-Identifier: Apache-2.0
"""Start domains, and see how they are. While they run, nothing of depriv does: no daemon, no process per guest.

A start goes: reserve the ids; jail (a separate process) up to QEMU's exec; QMP says "prelaunch"; empty QEMU's root;
audit; only then release the jail and let the guest run. Until the release, whatever goes wrong ends in nothing:
the jail kills QEMU when its control socket closes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

from depriv import proc, runtime
from depriv.detect import look
from depriv.errors import DeprivError, HostError, JailError, MonitorError, PlanError
from depriv.planner import plan, plan_discovery
from depriv.registry import Entry
from depriv.report import Expected, Grant, Limit
from depriv.spawn import Jail
from depriv.steps import OpenFile, SetLimit
from depriv.text import console_safe
from depriv.untrusted import as_str, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Self

    from depriv.config import Domain
    from depriv.planner import Launch
    from depriv.qmp import Monitor
    from depriv.registry import Registry
    from depriv.report import AuditReport
    from depriv.spawn import Launched

START_TIMEOUT_S = 60.0  # as libxl's LIBXL_DEVICE_MODEL_START_TIMEOUT
QMP_TIMEOUT_S = 10.0
_LOG_SHOWN = 4000


class Started:
    """A start that went well: the entry, the audit that let the guest run, and where the time went."""

    def __init__(self, entry: Entry, report: AuditReport, launch: Launch, times: list[tuple[str, float]]) -> None:
        """Take the facts; ``times`` are (what was reached, CLOCK_MONOTONIC seconds)."""
        self.entry = entry
        self.report = report
        self.launch = launch
        self.times = times


def create(  # noqa: PLR0913 (two of them are for callers that want to know more or be faster)
    config: Domain,
    registry: Registry,
    *,
    cache_dir: str,
    paused: bool = False,
    warn: Callable[[str], None] = lambda _text: None,
    jail: Jail | None = None,
) -> Started:
    """Start a domain.

    Args:
        config: What is wanted.
        registry: Where domains are kept.
        cache_dir: Where copies of QEMU's files are kept.
        paused: Leave the guest stopped before its first instruction.
        warn: Told every warning: a restriction that was switched off, a key without effect.
        jail: A jail that was started ahead, to save its start-up time; it is used up.

    Raises:
        DeprivError: it did not start, why, and what to do. Nothing is left of it.
    """
    times = [("begin", time.monotonic())]
    with jail or Jail() as ready, contextlib.ExitStack() as held:
        if os.geteuid() != 0:
            raise PlanError("only root can start a domain", fix="run it with sudo; `depriv plan` needs no root")
        registry.prepare()
        with registry.locked():
            registry.sweep()
            domid = registry.next_domid()
            holdings = tuple(entry.holding for entry in registry.entries())
            host = look(config, domid=domid, holdings=holdings, state_dir=registry.folder, cache_dir=cache_dir)
            launch = plan(config, host)
            entry = _reserve(config, launch, domid)
            registry.add(entry, held)
        times.append(("plan", time.monotonic()))
        try:
            for text in launch.warnings:
                warn(text)
            if config.dm_restrict:
                runtime.ensure(launch, lambda: _discover(plan_discovery(config, host)))
            times.append(("runtime", time.monotonic()))
            entry, report = _launch(launch, entry, registry, ready, paused=paused, times=times)
        except BaseException:
            try:
                ready.__exit__()
            finally:
                _forget(entry, registry)
            raise
    return Started(entry, report, launch, times)


def _reserve(config: Domain, launch: Launch, domid: int) -> Entry:
    identity = launch.identity
    return Entry(
        name=config.name,
        domid=domid,
        state="starting",
        uid=identity.uid,
        gid=identity.gid,
        reaper_uid=identity.reaper_uid,
        shared=launch.plan.shared,
        restricted=config.dm_restrict,
        memory_mib=config.memory_mib,
        vcpus=config.vcpus,
        accel=launch.accel,
        cgroup=launch.cgroup,
        toolstack_pid=os.getpid(),
        toolstack_starttime=proc.start_time(os.getpid()),
        created_at_s=int(time.time()),
        images=launch.images,
    )


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
        closing(launched.pidfd),
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
        if not paused:
            monitor.execute("cont", timeout_s=QMP_TIMEOUT_S)
        jail.release()
        times.append(("run", time.monotonic()))
    return entry, report


def _refuse_unless_it_holds(report: AuditReport, launch: Launch) -> None:
    """Let no guest run whose restrictions do not all hold; dm_restrict=0 is the one that may be off, if asked for."""
    wrong = [check for check in report.checks if not check.holds]
    if not launch.plan.restricted:
        wrong = [check for check in wrong if check.id != "dm_restrict"]
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
            if _status(monitor, QMP_TIMEOUT_S) != "prelaunch":
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
        raise MonitorError(f"QEMU did not start{end}", cause=said or error.what, fix=_start_fix(said)) from error


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


def _start_fix(said: str) -> str:
    """Return what to do about the messages of QEMU that users meet."""
    if "invalid option" in said or "not a valid" in said or "There is no option group 'sandbox'" in said:
        return "this QEMU lacks what depriv needs (see the message above): install QEMU 7.2 or later, with seccomp"
    if "-sandbox support is not enabled" in said or "seccomp" in said:
        return "this QEMU was built without seccomp: install one that has it (Debian's has)"
    if '"write" lock' in said or '"consistent read" lock' in said:
        return "another process has the image open; find it with: fuser -v IMAGE"
    return ""


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
        return console_safe(own[:_LOG_SHOWN]).strip()

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


def _is_traced(line: bytes) -> bool:
    """Tell whether a line is one of the thousand that a dry run asks for, not something that QEMU has to say."""
    head, tab, _ = line.partition(b":\t")  # ld.so(8), LD_DEBUG: "%9d:\t"
    return line.startswith(b"load_file ") or (bool(tab) and head.strip().isdigit())


@contextlib.contextmanager
def closing(fd: int) -> Generator[int]:
    """Close a descriptor at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def _discover(launch: Launch) -> str:
    """Do the dry run and return what it printed. Its QEMU ends with it."""
    try:
        with Jail() as jail:
            launched = jail.launch(launch.plan, timeout_s=START_TIMEOUT_S)
            with closing(launched.pidfd), Log(f"{launch.directory}/log") as log:
                _await_prelaunch(launch, launched, log).close()
                return log.raw()
    finally:
        for name in ("qmp", "log"):
            if os.path.lexists(f"{launch.directory}/{name}"):
                os.unlink(f"{launch.directory}/{name}")


def _expected(launch: Launch, entry: Entry, launched: Launched) -> Expected:
    """Write down what the audit is to find from now on: from the plan, and from what the jail really opened."""
    files = {step.role: step for step in launch.plan.steps if isinstance(step, OpenFile)}
    paths = {"qmp": f"{launch.directory}/qmp", "log": f"{launch.directory}/log"}
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
        cgroup=f"/depriv/{entry.domid}",
        grants=tuple(grants),
    )


def _others(registry: Registry, domid: int) -> tuple[tuple[str, int], ...]:
    """Return name and pid of every other guest that runs."""
    return tuple(
        (entry.name, entry.expected.pid)
        for entry in registry.readable()[0]
        if entry.domid != domid
        and entry.expected is not None
        and proc.alive(entry.expected.pid, entry.expected.starttime) == "running"
    )


def state_of(entry: Entry, registry: Registry, *, timeout_s: float = 1.0) -> str:
    """Return how a domain is: from the kernel whether it lives, and only then from QEMU what it says it does.

    "starting", "running", "paused", "shutdown", "crashed", "dead" (QEMU is gone, or its main thread is), "hung" (QEMU
    does not answer).
    """
    if entry.expected is None:
        begun = proc.alive(entry.toolstack_pid, entry.toolstack_starttime)
        return "starting" if begun == "running" else "dead"
    if proc.alive(entry.expected.pid, entry.expected.starttime) != "running":
        return "dead"
    try:
        with connect(entry, registry, timeout_s=timeout_s) as monitor:
            said = _status(monitor, timeout_s)
    except MonitorError:
        return "hung"
    known = {
        "running": "running",
        "prelaunch": "paused",
        "paused": "paused",
        "shutdown": "shutdown",
        "guest-panicked": "crashed",
        "internal-error": "crashed",
        "io-error": "paused",
    }
    return known.get(said, "hung")


def connect(entry: Entry, registry: Registry, *, timeout_s: float) -> Monitor:
    """Return a connection to a domain's QEMU.

    Raises:
        MonitorError: it is dead, or does not behave by the deadline.
    """
    from depriv.qmp import Monitor  # noqa: PLC0415 (as in _await_prelaunch)

    expected = entry.expected
    try:
        pidfd = os.pidfd_open(expected.pid) if expected else -1
    except ProcessLookupError:
        pidfd = -1
    if expected is None or pidfd < 0:
        raise MonitorError(f"domain {entry.name} has no QEMU", fix=f"depriv destroy {entry.name}")
    with closing(pidfd):
        # After the pidfd was opened: its number may have become another's before.
        if proc.alive(expected.pid, expected.starttime) == "dead":
            raise MonitorError(f"the QEMU of domain {entry.name} is dead", fix=f"depriv destroy {entry.name}")
        path = f"{registry.directory(entry.domid)}/qmp"
        return Monitor.connect(path, timeout_s=timeout_s, netns_of=pidfd if entry.restricted else -1)


def _status(monitor: Monitor, timeout_s: float) -> str:
    """Return what QEMU says it does; what a QEMU says is believed by nobody, and shown at most."""
    return field(monitor.execute("query-status", timeout_s=timeout_s), "status", as_str, "query-status")


def audit_domain(entry: Entry, registry: Registry) -> AuditReport:
    """Return whether a domain's restrictions hold now."""
    if entry.expected is None:
        raise HostError(f"domain {entry.name} has not started", fix="wait for depriv create, or depriv destroy it")
    from depriv.audit import audit  # noqa: PLC0415 (as in _await_prelaunch)

    return audit(entry.expected.pid, expected=entry.expected, others=_others(registry, entry.domid))


def _forget(entry: Entry, registry: Registry) -> None:
    """Undo a reservation whose start failed. The jail has ended and took with it what it made."""
    from depriv.ending import end_processes, remove_cgroup_folder  # noqa: PLC0415 (a start that goes well does not pay for it)

    try:
        with Jail() as jail:
            end_processes(entry, registry, jail)
    except DeprivError as error:
        print(f"warning: domain {entry.name} is kept: {error}", file=sys.stderr)  # noqa: T201 (nobody else will hear)
        return
    with registry.locked():
        registry.remove(entry.domid)
        remove_cgroup_folder(entry.cgroup, registry)
