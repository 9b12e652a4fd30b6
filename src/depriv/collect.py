# SPDX-License-Identifier: Apache-2.0
"""Find what is left of starts, ends and domains that were cut short, and clear it away. Never a running guest.

First what is due is listed, from the registry and the kernel; then each is done by itself, under its domain's lock and
after a second look, so that one that another command sees to, or that does not die, holds up no other.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time

from depriv import cgroup, policy, proc
from depriv.accounts import ask_nss
from depriv.durable import BusyError
from depriv.ending import END_TIMEOUT_S, finish, forget
from depriv.errors import DeprivError, NotFoundError
from depriv.host import STATE_DIR
from depriv.identity import RANGE_BASE, RANGE_COUNT, find_user, tool_domid
from depriv.records import Record
from depriv.registry import remove_tree
from depriv.runtime import half_made
from depriv.spawn import Jail

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from depriv.entry import Entry
    from depriv.registry import Registry

_LOCK_TIMEOUT_S = 2.0
_RETRY_TIMEOUT_S = 0.5  # what is quarantined has been waited for


class Due(Record):
    """One thing that is to be done."""

    # "start" (cut short), "domain" (ended), "quarantine", "cgroup" (of no domain), "process" (of no domain, with a uid
    # of the range), "file" (a write cut short)
    kind: str
    action: str  # "clear", "restart" or "rename-restart"
    what: str  # what it is and why it is due, for people
    domid: int = 0  # 0: of no domain
    name: str = ""
    path: str = ""  # of a cgroup or file
    uid: int = 0  # of processes
    entry: Entry | None = None  # of the domain, as it was when this was found: what comes later is not due


class Done(Record):
    """What became of one ``Due``."""

    kind: str
    action: str
    what: str
    domid: int
    name: str
    # "done", "would" (a dry run), "quarantined" (it does not die yet), "busy" (another command is at it), "gone"
    # (another command was faster) or "failed"
    result: str
    cause: str = ""  # of what is not done
    new_domid: int = 0  # of a restart


def outcome(due: Due, result: str, *, cause: str = "", new_domid: int = 0) -> Done:
    """Return what became of ``due``."""
    return Done(
        kind=due.kind,
        action=due.action,
        what=due.what,
        domid=due.domid,
        name=due.name,
        result=result,
        cause=cause,
        new_domid=new_domid,
    )


def survey(
    registry: Registry, *, cache_dir: str, said: dict[int, str], restart: bool, only: tuple[int, ...] = ()
) -> tuple[Due, ...]:
    """Return all that is due of domains; with ``only``, of these.

    Args:
        registry: Whose.
        cache_dir: Where copies of QEMU's files are kept.
        said: What each domain's QEMU answers to query-status; of one that was not asked, nothing.
        restart: Whether domains are started again whose configuration says so; if not, they are left as they are.
        only: Domids; () stands for all, and for what is left of none.
    """
    found: list[Due] = []
    for domid in only or registry.domids():
        entry = registry.read(domid)
        due = None if entry is None else of_entry(entry, registry, said.get(domid, ""), restart=restart)
        if due is not None:
            found.append(due)
    return tuple(found) if only else (*found, *_of_nobody(registry, cache_dir))


def of_entry(entry: Entry, registry: Registry, said: str, *, restart: bool) -> Due | None:
    """Return what is due of one domain, or None."""
    kind, action, what = "domain", "clear", ""
    match entry.state:
        case "starting":
            kind = "start"
            what = "" if registry.is_starting(entry) else "its start was cut short"
        case "ending":
            what = "its end was cut short"
        case "quarantined":
            kind, what = "quarantine", "something of it did not die before"
        case "damaged":
            what = "" if registry.life(entry) == "running" else f"its entry cannot be read: {entry.trouble}"
        case "waiting" if _has_successor(entry, registry):
            what = "it was started again, and that was cut short at its very end"
        case "waiting":
            action, what = "restart", "to be started again" if restart else ""
        case _:
            action, what = _of_running(entry, registry, said)
            if action in ("restart", "rename-restart") and not restart:
                what = ""
    if not what:
        return None
    return Due(kind=kind, action=action, what=what, domid=entry.domid, name=entry.name, uid=entry.uid, entry=entry)


def _of_running(entry: Entry, registry: Registry, said: str) -> tuple[str, str]:
    """Return what the configuration wants done about a domain that runs, or did: action and why; "" for nothing."""
    if entry.boot_id != registry.boot_id:
        return "clear", "it was of an earlier boot"
    life = registry.life(entry)
    how = policy.happened(alive=life, status=said, noted=registry.end_noted(entry.domid))
    if not how:
        return "clear", ""
    config = entry.config or {"on_poweroff": "destroy", "on_reboot": "destroy", "on_crash": "destroy"}
    action, why = policy.action(
        how,
        on_poweroff=str(config.get("on_poweroff")),
        on_reboot=str(config.get("on_reboot")),
        on_crash=str(config.get("on_crash")),
        restarts=entry.restarts,
        lived_s=lived_s(entry),
    )
    if action in ("none", "preserve"):
        return "clear", ""
    state = "QEMU is gone" if life != "running" else "the guest has ended"
    return ("clear" if action == "destroy" else action), f"{state}: {why}"


def _has_successor(entry: Entry, registry: Registry) -> bool:
    """Tell whether a domain that waits to be started again was: nobody else can have its name."""
    others = (other for other in registry.entries() if other.domid != entry.domid)
    return any(other.name == entry.name and other.state == "running" for other in others)


def lived_s(entry: Entry) -> float:
    """Return for how long a domain has been there, in seconds of a clock that nobody can set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - entry.created_boot_ns / 1e9


def _of_nobody(registry: Registry, cache_dir: str) -> list[Due]:
    """Return what is left of domains that are not in the registry."""
    found = [
        Due(kind="file", action="clear", what=f"{path}: a write or removal that was cut short", path=path)
        for path in (*registry.debris(), *half_made(cache_dir))
    ]
    found += [
        Due(kind="start", action="clear", what="a start that was cut short at once", domid=domid)
        for domid in registry.empty_folders()  # or that is at it: looked at again with the registry locked
    ]
    own, lost, domids = cgroup.folder_name(registry.folder), cgroup.lost_folders(registry.folder), registry.domids()
    for leaf in cgroup.leaves():
        if leaf.folder in lost or (leaf.folder == own and leaf.domid not in domids):
            found.append(
                Due(kind="cgroup", action="clear", what=f"{leaf.path}: of no domain", domid=leaf.domid, path=leaf.path)
            )
    return found


def strays(registry: Registry) -> tuple[Due, ...]:
    """Return the uids of the range that processes have, but no domain of any registry; one for each uid.

    On a Xen host they may be libxl's, which takes its uids from the same range: there nobody is a stray. Nor is anybody
    for a registry in a folder of its own choice: it cannot know what the host's own is about to do.
    """
    from depriv.recover import of_the_range  # noqa: PLC0415 (hardly ever needed)

    base = find_user(RANGE_BASE, ask_nss(names=(RANGE_BASE,)))
    if base is None or registry.folder != STATE_DIR or os.path.exists("/proc/xen/capabilities"):
        return ()
    domids = {leaf.domid for leaf in cgroup.leaves()}
    known = {entry.uid for entry in registry.entries()} | {base.uid + domid for domid in domids}
    known |= {base.uid + tool_domid(domid) for domid in domids.union(registry.domids())}
    uids: dict[int, list[int]] = {}
    for process in proc.processes():
        for uid in {*process.uids} - known:
            if base.uid < uid < base.uid + RANGE_COUNT and not _has_domain(process.pid):
                uids.setdefault(uid, []).append(process.pid)
    return tuple(
        Due(
            kind="process",
            action="clear",
            what=f"process {', '.join(map(str, pids[:5]))} with uid {uid}, of no domain",
            domid=uid - base.uid,
            uid=uid,
        )
        for uid, pids in sorted(uids.items())
        if of_the_range(uid - base.uid)[0] == uid
    )


def _has_domain(pid: int) -> bool:
    """Tell whether a process is in a domain's cgroup, of whichever registry.

    ``cgroup.leaves`` finds those of the hierarchy that is mounted here; where a guest was started it may be another.
    """
    try:
        paths = [path.split("/") for path in proc.cgroups(pid).values()]
    except (ProcessLookupError, PermissionError):
        return False
    # Anywhere in the path: a tool's cgroup is in its domain's.
    return any(
        folder.startswith(f"{cgroup.PREFIX}-") and name.isdecimal()
        for path in paths
        for folder, name in itertools.pairwise(path)
    )


def clear(due: Due, registry: Registry, said: str = "") -> Done:
    """Do one thing that is due, but for restarts. Raises nothing: what is not done is said, and can be tried again.

    ``said`` is what the QEMU of ``due.entry`` answered; it is held against no other.
    """
    try:
        match due.kind:
            case "file":
                remove_tree(due.path)
                return outcome(due, "done")
            case "cgroup" | "process":
                return _clear_processes(due, registry)
            case _:
                return _clear_domain(due, registry, said)
    except NotFoundError as error:
        return outcome(due, "gone", cause=str(error))
    except BusyError as error:
        return outcome(due, "busy", cause=error.cause)
    except DeprivError as error:
        return outcome(due, "failed", cause=cause_of(error))


def _clear_domain(due: Due, registry: Registry, said: str) -> Done:
    if due.entry is None:
        with registry.locked():
            if due.domid not in registry.empty_folders():
                return outcome(due, "gone", cause="another command is starting it")
            registry.remove(due.domid, used=False)
        return outcome(due, "done")
    with registry.locked_domain(due.domid, timeout_s=_LOCK_TIMEOUT_S), Jail() as jail:
        now = registry.current(due.entry)
        # A start holds that lock until it is over, so one that is found here was cut short, even if its program lives.
        if now.state != "starting" and of_entry(now, registry, said, restart=False) is None:
            return outcome(due, "gone", cause="another command has seen to it")
        if now.state == "starting" and not now.uid:
            forget(now, registry)  # nothing of it was ever made
            return outcome(due, "done")
        try:
            timeout_s = _RETRY_TIMEOUT_S if now.state == "quarantined" else END_TIMEOUT_S
            finish(now, registry, jail, timeout_s=timeout_s)
        except DeprivError as error:
            return _not_done(due, registry, error)
    return outcome(due, "done")


def _clear_processes(due: Due, registry: Registry) -> Done:
    """End the processes of a cgroup or of a uid of the range, and remove the cgroup.

    Meanwhile it is a domain that is quarantined, so that no start is given its ids; what does not die stays one: it is
    listed, and tried again.
    """
    from depriv.recover import rebuild  # noqa: PLC0415 (hardly ever needed)

    entry = rebuild(due.domid, due.path, due.what).replace(state="quarantined", name="(unknown)")
    with contextlib.ExitStack() as held:
        with registry.locked():
            # A second look: another command may have cleared it, and the ids may be a new guest's since.
            if due.domid in registry.domids() or not _is_left(due):
                return outcome(due, "gone", cause="another command has seen to it")
            registry.add(entry, held)
        try:
            with Jail() as jail:
                finish(entry, registry, jail)
        except DeprivError as error:
            return _not_done(due, registry, error)
    if due.path:
        cgroup.remove_folder(os.path.dirname(due.path))
    return outcome(due, "done")


def _not_done(due: Due, registry: Registry, error: DeprivError) -> Done:
    """Return why a domain is still there: something of it does not die, or it is dead and its entry cannot go."""
    now = registry.read(due.domid)
    result = "quarantined" if now is not None and now.state == "quarantined" else "failed"
    return outcome(due, result, cause=cause_of(error))


def _is_left(due: Due) -> bool:
    """Tell whether a cgroup, or the processes of a uid, still are there and nobody's."""
    if due.path:
        return os.path.isdir(due.path)
    mine = any(leaf.domid == due.domid for leaf in cgroup.leaves())  # by now a guest's of another registry
    left = proc.processes_of(uid=due.uid)
    return not mine and bool(left) and not any(_has_domain(process.pid) for process in left)


def cause_of(error: DeprivError) -> str:
    """Return what went wrong and why, on one line."""
    # Not the place: what is started again comes from the entry, and the file may say something else by now.
    return f"{error.what}: {error.cause or error.__cause__ or ''}".rstrip(": ")


def tidy(registry: Registry, cache_dir: str, *, name: str = "") -> tuple[Done, ...]:
    """Clear what is due, asking no QEMU: what every start does first. With nothing due it costs little.

    What cannot be cleared now stays listed, and its ids are not free. Of domains that another command is at, only one
    called ``name`` is waited for.
    """
    new = registry.is_new
    due = survey(registry, cache_dir=cache_dir, said={}, restart=False)
    due = tuple(each for each in due if each.name == name or not registry.is_busy(each.domid))
    due = tuple(each for each in due if each.kind != "quarantine" or not _lives(each, registry))
    done = tuple(clear(each, registry) for each in (*due, *(strays(registry) if new else ())))
    if new:
        remove_empty_folders(registry)
    if is_swept(registry, done):
        registry.mark_seen()
    return done


@contextlib.contextmanager
def tidy_when_cut_short(registry: Registry, cache_dir: str) -> Generator[None]:
    """Clear what is left when a signal (Ctrl-C, SIGTERM) ends a start between two steps, where neither undoes it."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        let_go(error)
        with contextlib.suppress(DeprivError):  # else it is gc's; the signal is what the caller is to hear of
            tidy(registry, cache_dir)
        raise


def let_go(error: BaseException) -> None:
    """Have the frames that an exception came through let go of what they hold.

    A signal's can come where a lock is taken and no ``with`` knows of it yet: until the frame is gone nobody gets it,
    this process neither.
    """
    if not isinstance(error, Exception):
        import traceback  # noqa: PLC0415 (not on the path of create)

        traceback.clear_frames(error.__traceback__)


def remove_empty_folders(registry: Registry) -> None:
    """Remove folders of cgroups with nothing in them: those of lost state folders, and our own without domains."""
    cgroup.remove_lost_folders(registry.folder)
    # A start reserves its entry under that lock, so none is about to make its cgroup in there. Who holds it is most
    # likely one: an empty folder is worth no wait, and no error after all else was done.
    with contextlib.suppress(BusyError), registry.locked(timeout_s=0):
        if not registry.domids():
            cgroup.remove_folder(os.path.dirname(registry.cgroup(0)))


def is_swept(registry: Registry, done: tuple[Done, ...]) -> bool:
    """Tell whether the past is seen to as of now: then no start looks for strays again."""
    return registry.is_new and not any(each.kind == "process" and each.result in ("busy", "failed") for each in done)


def _lives(due: Due, registry: Registry) -> bool:
    """Tell whether something of a quarantined domain is still there: then there is no use in trying now."""
    entry = registry.read(due.domid)
    if entry is None:
        return False
    return bool(cgroup.members(entry.cgroup) or proc.processes_of(uid=entry.uid or None, gid=entry.gid or None))
