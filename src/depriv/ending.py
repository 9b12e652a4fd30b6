# SPDX-License-Identifier: Apache-2.0
"""End domains: kill all that is a domain's, three ways, and believe none of them without proof."""

from __future__ import annotations

import contextlib
import os
import time

from depriv import cgroup, proc
from depriv.durable import remove_left
from depriv.errors import DeprivError, HostError
from depriv.spawn import Jail
from depriv.steps import Plan, Reap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.entry import Entry
    from depriv.registry import Registry

END_TIMEOUT_S = 10.0
_UID_MIN = 1000  # below, nobody is killed by uid


def destroy(entry: Entry, registry: Registry, jail: Jail | None = None) -> None:
    """End a domain, whatever it does, and forget it once nothing of it lives.

    Three ways, each enough for a QEMU that plays by the rules: process 1 of its pid namespace, its cgroup, its uid.
    Then proof. If something does not die, the domain is quarantined: it stays listed, and its ids are not free.
    ``jail`` is one that was started ahead.

    Raises:
        NotFoundError: another command was faster.
        DeprivError: something of it still lives.
    """
    with jail or Jail() as ready:
        if entry.expected is not None:
            registry.current(entry)
            with contextlib.suppress(HostError):  # or else a watcher may start it again
                registry.note_end(entry.domid, "host")
            # Before the lock: whoever holds it may be waiting for this very QEMU. A start is left to its end. Not by
            # its cgroup: without the lock its name may come to mean that of the next domain with this domid.
            if entry.boot_id == registry.boot_id:
                kill_process(entry.expected.pid, entry.expected.starttime)
        with registry.locked_domain(entry.domid):
            finish(registry.current(entry), registry, ready)


def finish(entry: Entry, registry: Registry, jail: Jail, *, timeout_s: float | None = None) -> None:
    """Do what ``destroy`` does; the domain must be locked. ``jail`` is used up. ``timeout_s`` None: END_TIMEOUT_S.

    Raises:
        DeprivError: something of it still lives; it is quarantined.
    """
    with contextlib.suppress(HostError):  # a full /run must not keep a guest alive
        registry.save(entry.replace(state="ending"))
    try:
        end_processes(entry, registry, jail, timeout_s=timeout_s)
    except DeprivError as error:
        quarantine(entry, registry, error)
        raise
    forget(entry, registry)


def forget(entry: Entry, registry: Registry) -> None:
    """Remove the entry of a domain of which nothing lives, and let its ids rest. The domain must be locked."""
    remove_left(entry.left)
    with registry.locked():
        registry.remove(entry.domid, used=bool(entry.uid) or entry.state in ("damaged", "waiting"))
        if not registry.domids():
            # A start reserves its entry under that lock, so none is about to make its cgroup in there. One that waited
            # to be started again has no cgroup any more, and may be the last of its registry all the same.
            for path in {entry.cgroup, registry.cgroup(entry.domid)} - {""}:
                cgroup.remove_folder(os.path.dirname(path))


def quarantine(entry: Entry, registry: Registry, error: DeprivError) -> None:
    """Keep the ids of a domain of which something does not die, and say why, until a later command sees it gone."""
    cause = error.cause or str(error.__cause__ or "")
    trouble = f"{error}: {cause}" if cause else str(error)
    with contextlib.suppress(HostError):  # full or read-only: it is "ending" then, which is kept and tried again, too
        registry.save(entry.replace(state="quarantined", trouble=trouble))


def end_processes(entry: Entry, registry: Registry, jail: Jail, *, timeout_s: float | None = None) -> None:
    """Kill everything of a domain, which is locked, and see that it is gone. ``jail`` is used up.

    ``timeout_s`` (None: END_TIMEOUT_S) is for all of it; a jail that does not answer gets five seconds more.

    Raises:
        DeprivError: something lives still.
    """
    deadline = time.monotonic() + (END_TIMEOUT_S if timeout_s is None else timeout_s)
    if entry.boot_id == registry.boot_id:
        # That of its start, if that was cut short: whoever starts a domain holds its lock. First, so that nothing new
        # comes from it.
        kill_process(entry.jail_pid, entry.jail_starttime)
        kill(entry, registry)  # whatever becomes of the jail
        _await_end(entry.jail_pid, entry.jail_starttime, "the jail", deadline)
    kill(entry, registry)
    if not entry.shared and entry.uid >= _UID_MIN:
        _refuse_anothers(entry, registry)
        left_s = _left_s(deadline)
        reap = Reap(
            uid=entry.uid,
            gid=entry.gid,
            reaper_uid=entry.reaper_uid,
            lock=f"{registry.folder}/reaper.lock",
            timeout_ms=int(left_s * 1000),
        )
        steps = Plan(domain=entry.name, domid=entry.domid, restricted=True, shared=False, steps=(reap,))
        jail.reap(steps, timeout_s=left_s + 5)
    if entry.expected is not None and entry.boot_id == registry.boot_id:
        # Process 1 of a pid namespace is wholly dead only when everything in it is. See pid_namespaces(7).
        _await_end(entry.expected.pid, entry.expected.starttime, "QEMU", deadline)
        for tool in entry.tools:
            _await_end(tool.pid, tool.starttime, tool.name, deadline)
    if entry.shared and entry.cgroup and not cgroup.is_visible(entry.cgroup):
        raise HostError(f"cannot see what is in cgroup {entry.cgroup}", fix="run this where that hierarchy is mounted")
    cgroup.remove_cgroup(entry.cgroup, timeout_s=_left_s(deadline))


def _refuse_anothers(entry: Entry, registry: Registry) -> None:
    """See that nobody in a domain of another registry has the uid that is about to be killed.

    Those share the range, and know of each other by their cgroups alone: of an entry that is left from an earlier boot,
    or whose cgroup was never made, another registry cannot know that its domid is taken.

    Raises:
        HostError: somebody has.
    """
    own = cgroup.folder_name(registry.folder)
    for leaf in cgroup.leaves():
        if leaf.folder == own or leaf.path == entry.cgroup:
            continue
        for pid in cgroup.members(leaf.path):
            with contextlib.suppress(ProcessLookupError):
                if str(entry.uid) in proc.read_status(pid)["Uid"].split():
                    fix = "end that domain first; use one state folder for a host"
                    raise HostError(f"uid {entry.uid} is by now that of process {pid} in {leaf.path}", fix=fix)


def kill(entry: Entry, registry: Registry) -> None:
    """Send SIGKILL to process 1 of a domain's pid namespace and to all of its cgroup; wait for nothing."""
    if entry.boot_id == registry.boot_id and entry.expected is not None:
        kill_process(entry.expected.pid, entry.expected.starttime)
        for tool in entry.tools:
            kill_process(tool.pid, tool.starttime)
    cgroup.kill_cgroup(entry.cgroup)


def kill_process(pid: int, starttime: int) -> None:
    """Send SIGKILL to the very process that had this number at that time, or to nobody: it may be another's by now."""
    if pid <= 0:
        return
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        import signal  # noqa: PLC0415 (on the path of create only if something goes wrong)

        # After the pidfd was opened: from here on the number cannot come to mean another process.
        if proc.alive(pid, starttime) != "dead":
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # type: ignore[attr-defined, unused-ignore]
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


def _await_end(pid: int, starttime: int, what: str, deadline: float) -> None:
    """See one process to its end."""
    while pid > 0 and proc.alive(pid, starttime) != "dead":
        if time.monotonic() > deadline:
            raise HostError(f"{what}, process {pid}, does not die", fix=f"see what it waits for: cat /proc/{pid}/stack")
        time.sleep(0.001)


def _left_s(deadline: float) -> float:
    """Return what is left of the time; enough for one look at least."""
    return max(deadline - time.monotonic(), 0.1)
