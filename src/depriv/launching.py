# SPDX-License-Identifier: Apache-2.0
"""From a plan to a QEMU that stands before its guest's first instruction, confined and audited.

Whatever goes wrong on the way ends in nothing: the jail kills QEMU when its control socket closes.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import time

from depriv import proc, status, toolaudit
from depriv.durable import remove_left
from depriv.errors import HostError, JailError, MonitorError
from depriv.guestlog import Log, start_fix
from depriv.report import Expected, Grant, Limit
from depriv.spawn import Jail
from depriv.steps import ListenUnix, OpenFile, SetLimit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from depriv.assembly import Launch
    from depriv.entry import Entry
    from depriv.qmp import Monitor
    from depriv.registry import Registry
    from depriv.report import AuditReport
    from depriv.spawn import Launched

START_TIMEOUT_S = 60.0  # as libxl's LIBXL_DEVICE_MODEL_START_TIMEOUT
QMP_TIMEOUT_S = 10.0
# Device nodes of Xen's and of pseudo-terminals: QEMU has them during its start, and closes them or is not let run.
_START_ONLY = ("gntdev", "hypercall", "xenbus")
_READY = ("prelaunch", "inmigrate")  # the guest has not run: it waits for the word, or for its saved state


def said(monitor: Monitor) -> str:
    """Return what QEMU says it does."""
    return status.status(monitor, QMP_TIMEOUT_S)


class Running:
    """A start on its last step: QEMU is confined and audited, and its guest stands before the first instruction."""

    def __init__(
        self,
        entry: Entry,
        launched: Launched,
        monitor: Monitor,
        jail: Jail,
        audit_again: Callable[[], None],
    ) -> None:
        """Take what there is; ``audit_again`` raises if not every restriction holds."""
        self.audit_again = audit_again
        self.entry = entry
        self.launched = launched
        self.monitor = monitor
        self.jail = jail

    def cont(self) -> None:
        """Let the guest run."""
        self.monitor.execute("cont", timeout_s=QMP_TIMEOUT_S)


def bring_up(  # noqa: PLR0913 (what one start is made of)
    launch: Launch,
    entry: Entry,
    registry: Registry,
    jail: Jail,
    *,
    see_through: Callable[[Running], None],
    loads: bool,
    late: tuple[Grant, ...],
    times: list[tuple[str, float]],
) -> tuple[Entry, AuditReport]:
    """Do the plan, empty QEMU's root, audit it, and hand what there is to ``see_through``, which lets the guest run.

    ``late`` is what QEMU is handed by QMP later on. With ``loads``, ``see_through`` lets QEMU read a saved state first,
    and audits again: only then QEMU locks its images.

    Raises:
        DeprivError: something failed, or not every restriction holds. Nothing is left when the jail is closed.
    """
    launched = jail.launch(launch.plan, timeout_s=START_TIMEOUT_S)
    times += [(f"jail: {name}", at) for name, at in launched.times]
    with (
        _own_sockets(launch) as sockets,
        status.closing(launched.pidfd),
        _own_log(launch) as log,
        _await_prelaunch(launch, launched, log) as monitor,
    ):
        from depriv.audit import audit  # noqa: PLC0415 (as in _await_prelaunch)

        times.append(("prelaunch", time.monotonic()))
        if log is not None:
            _refuse_lockless(log)
        if launch.plan.after:
            jail.empty_root(timeout_s=QMP_TIMEOUT_S)
        times.append(("empty root", time.monotonic()))
        entry = entry.replace(expected=_expected(launch, entry, launched, late))
        others = _others(registry, entry.domid)
        report = audit(launched.pid, expected=entry.expected, others=others)
        _refuse_unless_it_holds(report, launch, but=("locks.",) if loads else ())
        times.append(("audit", time.monotonic()))
        entry = entry.replace(state="running", left=(*entry.left, *sockets))
        registry.save(entry)
        times.append(("registry", time.monotonic()))

        def audit_again() -> None:
            _refuse_unless_it_holds(audit(launched.pid, expected=entry.expected, others=others), launch)

        see_through(Running(entry, launched, monitor, jail, audit_again))
        times.append(("run", time.monotonic()))
    return entry, report


def file_left(path: str) -> tuple[str, int, int]:
    """Return how a file that ends with its domain is remembered: by more than its name."""
    have = os.lstat(path)
    return (path, have.st_dev, have.st_ino)


@contextlib.contextmanager
def _own_sockets(launch: Launch) -> Generator[tuple[tuple[str, int, int], ...]]:
    """Return the sockets that were made where the user said, and remove them if the start fails: QEMU cannot."""
    made = [step.path for step in launch.plan.steps if isinstance(step, ListenUnix)]
    left = tuple(file_left(path) for path in made if not path.startswith(f"{launch.directory}/"))
    try:
        yield left
    except BaseException:
        remove_left(left)
        raise


def _own_log(launch: Launch) -> contextlib.AbstractContextManager[Log | None]:
    """Return what QEMU prints, or None: it prints to the caller's own streams."""
    return Log(f"{launch.directory}/log") if has_own_log(launch) else contextlib.nullcontext()


def has_own_log(launch: Launch) -> bool:
    """Tell whether QEMU prints into a FIFO of ours."""
    return any(type(step).__name__ == "MakeFifo" for step in launch.plan.steps)


def _refuse_unless_it_holds(report: AuditReport, launch: Launch, but: tuple[str, ...] = ()) -> None:
    """Let no guest run whose restrictions do not all hold.

    Three may be off, if asked for: dm_restrict by its key, that no other has its uid by naming the shared user, and a
    network of its own by --keep-net.
    """
    wrong = [check for check in report.checks if not check.holds and not check.id.startswith(but or "\0")]
    if not launch.plan.restricted:
        wrong = [check for check in wrong if check.id != "dm_restrict"]
    if launch.plan.shared:
        wrong = [check for check in wrong if check.id != "alone"]
    if launch.plan.keep_net:
        wrong = [check for check in wrong if check.id != "ns.net"]
    if wrong:
        raise JailError(
            "the guest was not let run: not every restriction holds",
            cause="; ".join(f"{check.id} is {check.have}, not {check.want}" for check in wrong),
            fix="run depriv doctor; if it finds nothing, this is a fault of depriv: please report it",
        )


def _await_prelaunch(launch: Launch, launched: Launched, log: Log | None) -> Monitor:
    """Have QEMU say over QMP that it waits before the guest's first instruction; return the connection."""
    from depriv.qmp import Monitor  # noqa: PLC0415 (imported while QEMU starts, which takes longer)

    try:
        netns_of = launched.pidfd if launch.plan.restricted and not launch.plan.keep_net else -1
        monitor = Monitor.connect(f"{launch.directory}/qmp", timeout_s=START_TIMEOUT_S, netns_of=netns_of)
        try:
            if status.status(monitor, START_TIMEOUT_S) not in _READY:
                raise MonitorError("QEMU does not wait for the word to run the guest")  # noqa: TRY301 (one handler)
        except BaseException:
            monitor.close()
            raise
        return monitor
    except MonitorError as error:
        said = log.text() if log is not None else ""
        end = _how_it_ended(launched)
        if not end and not said:
            raise
        if log is None:
            raise MonitorError(f"QEMU did not start{end}", cause="it says why above") from error
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


def discover(launch: Launch, entry: Entry, registry: Registry) -> str:
    """Do the dry run and return what it printed. Its QEMU ends with it."""
    try:
        with own_jail(entry, registry) as jail:
            launched = jail.launch(launch.plan, timeout_s=START_TIMEOUT_S)
            with status.closing(launched.pidfd), Log(f"{launch.directory}/log") as log:
                if launch.xen_domid:
                    return _own_folders(launched, log)
                _await_prelaunch(launch, launched, log).close()
                return log.raw()
    finally:
        for name in ("qmp", "events", "log"):
            if os.path.lexists(f"{launch.directory}/{name}"):
                os.unlink(f"{launch.directory}/{name}")


@contextlib.contextmanager
def own_jail(entry: Entry, registry: Registry) -> Generator[Jail]:
    """Have a jail that does something before the start's own does: what it starts ends with it.

    Meanwhile it is the entry's: whoever undoes a start that was cut short here has to see that one dead. The start's
    own has no plan yet, and does nothing.
    """
    try:
        with Jail() as jail:
            registry.save(entry.replace(jail_pid=jail.pid, jail_starttime=proc.start_time(jail.pid)))
            yield jail
    finally:
        registry.save(entry)


def _own_folders(launched: Launched, log: Log) -> str:
    """Return what a QEMU for Xen printed, and all files of the folders that it has named for ``-L help``.

    It can do nothing but be a device model of a domain: its firmware is not seen loaded in a dry run.
    """
    if not select.select([launched.pidfd], (), (), START_TIMEOUT_S)[0]:
        raise MonitorError("QEMU did not say where its own files are", fix="see that it is a QEMU for Xen")
    said = log.raw()
    found: list[str] = []
    for line in said.splitlines():
        if line.startswith("/") and os.path.isdir(line):
            for folder, _, names in os.walk(os.path.realpath(line)):
                found += [f"load_file name {name} location {folder}/{name}" for name in sorted(names)]
    return "\n".join([said, *found])


def _expected(launch: Launch, entry: Entry, launched: Launched, late: tuple[Grant, ...]) -> Expected:
    """Write down what the audit is to find from now on: from the plan, and from what the jail really opened."""
    files = {step.role: step for step in launch.plan.steps if isinstance(step, OpenFile)}
    paths = {"log": f"{launch.directory}/log"}
    paths |= {step.role: step.path for step in launch.plan.steps if isinstance(step, ListenUnix)}
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
        if item.role not in _START_ONLY
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
        grants=(*grants, *late),
        xen_domid=launch.xen_domid,
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
    expected = entry.expected
    if expected.xen_domid:
        expected = expected.replace(grants=_with_media(expected.grants, _media(expected.xen_domid)))
    report = audit(expected.pid, expected=expected, others=_others(registry, entry.domid))
    return report.replace(checks=(*report.checks, *toolaudit.checks(entry.tools)))


def _with_media(grants: tuple[Grant, ...], media: list[Grant]) -> tuple[Grant, ...]:
    """Return what a Xen domain has now: a CD that was taken out may still be open, but QEMU uses and locks it no more.

    libxl never sends remove-fd, and QEMU 10 closes the descriptors of a set only then.
    """
    inside = {(medium.dev, medium.ino, medium.rdev) for medium in media}
    kept = [
        grant.replace(locked=grant.locked and (grant.access != "ro" or (grant.dev, grant.ino, grant.rdev) in inside))
        for grant in grants
    ]
    return (*kept, *media)


def _media(domid: int) -> list[Grant]:
    """Return what libxl has since put into a Xen domain's CD-ROM drives, as xenstore has it: read-only."""
    from depriv import xenstore  # noqa: PLC0415 (on Xen only)

    found: list[Grant] = []
    for vdev, path in xenstore.media(domid):
        with contextlib.suppress(OSError):
            have = os.stat(path)
            kind = "block" if stat.S_ISBLK(have.st_mode) else "file"
            rdev = have.st_rdev if kind == "block" else 0
            found.append(
                Grant(
                    role=f"{vdev}-medium",
                    kind=kind,
                    dev=have.st_dev,
                    ino=have.st_ino,
                    rdev=rdev,
                    access="ro",
                    path=path,
                )
            )
    return found
