# SPDX-License-Identifier: Apache-2.0
"""End domains: kill all that is a domain's, three ways, and believe none of them without proof."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from depriv import proc
from depriv.errors import HostError
from depriv.spawn import Jail
from depriv.steps import Plan, Reap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.registry import Entry, Registry
    from depriv.report import Expected

END_TIMEOUT_S = 10.0


def destroy(entry: Entry, registry: Registry, jail: Jail | None = None) -> None:
    """End a domain, whatever it does, and forget it once nothing of it lives.

    Three ways, each enough for a QEMU that plays by the rules: process 1 of its pid namespace, its cgroup, its uid.
    Then proof. If something does not die, the domain and its ids are kept. ``jail`` is one that was started ahead.

    Raises:
        NotFoundError: another command was faster.
        DeprivError: something of it still lives.
    """
    with jail or Jail() as ready:
        if entry.expected is not None:
            # Before the lock: whoever holds it may be waiting for this very QEMU. A start is left to its end.
            kill(entry)
        with registry.locked_domain(entry.domid):
            _destroy_locked(registry.current(entry), registry, ready)


def _destroy_locked(entry: Entry, registry: Registry, ready: Jail) -> None:
    with contextlib.suppress(HostError):  # a full /run must not keep a guest alive
        registry.save(entry.replace(state="ending"))
    end_processes(entry, registry, ready)
    with registry.locked():
        registry.remove(entry.domid)
        remove_cgroup_folder(entry.cgroup, registry)


def end_processes(entry: Entry, registry: Registry, jail: Jail) -> None:
    """Kill everything of a domain and see that it is gone, its cgroup included. ``jail`` is used up."""
    kill(entry)
    if entry.shared:
        _await_end_of_one(entry)
    else:
        reap = Reap(
            uid=entry.uid,
            reaper_uid=entry.reaper_uid,
            lock=f"{registry.folder}/reaper.lock",
            timeout_ms=int(END_TIMEOUT_S * 1000),
        )
        steps = Plan(domain=entry.name, domid=entry.domid, restricted=True, shared=False, steps=(reap,))
        jail.reap(steps, timeout_s=END_TIMEOUT_S + 5)
    remove_cgroup(entry.cgroup)


def kill(entry: Entry) -> None:
    """Send SIGKILL to process 1 of a domain's pid namespace and to all of its cgroup; wait for nothing."""
    pidfd = -1
    if entry.expected is not None:
        pidfd = _open_pidfd(entry.expected)
    if pidfd >= 0:
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # type: ignore[attr-defined, unused-ignore]
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)
    kill_cgroup(entry.cgroup)


def _open_pidfd(expected: Expected) -> int:
    """Return a pidfd of the very process that was started, or -1: its number may be another's by now."""
    try:
        pidfd = os.pidfd_open(expected.pid)
    except ProcessLookupError:
        return -1
    if proc.alive(expected.pid, expected.starttime) == "dead":
        os.close(pidfd)
        return -1
    return pidfd


def _await_end_of_one(entry: Entry) -> None:
    """See one process to its end where its uid is shared and nobody may be killed by it."""
    deadline = time.monotonic() + END_TIMEOUT_S
    expected = entry.expected
    while expected is not None and proc.alive(expected.pid, expected.starttime) != "dead":
        if time.monotonic() > deadline:
            raise HostError(f"process {expected.pid} of domain {entry.name} does not die")
        time.sleep(0.002)


def kill_cgroup(path: str) -> None:
    """Kill all processes of a cgroup: at once where the kernel can (v2), else until none is left to name."""
    try:
        # Not open(): it would create the file where there is none, which cgroupfs refuses in another way.
        fd = os.open(f"{path}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"1")
        finally:
            os.close(fd)
        return
    except FileNotFoundError:
        pass
    deadline = time.monotonic() + END_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with open(f"{path}/cgroup.procs", encoding="ascii") as file:
                # 0 stands for processes outside of our pid namespace, and kill(0) is ourselves.
                pids = [int(line) for line in file if int(line) > 0]
        except FileNotFoundError:
            return
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.002)


def remove_cgroup(path: str) -> None:
    """Remove a domain's cgroup.

    Raises:
        HostError: there still are processes in it.
    """
    deadline = time.monotonic() + END_TIMEOUT_S
    while True:
        try:
            os.rmdir(path)
            break
        except FileNotFoundError:
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostError(f"cannot remove cgroup {path}: it has processes") from error
            time.sleep(0.002)


def remove_cgroup_folder(path: str, registry: Registry) -> None:
    """Remove the folder of all domains' cgroups after the last one, the registry locked.

    A start reserves its entry under that lock, so none is about to make its cgroup in there.
    """
    if not registry.domids():
        with contextlib.suppress(OSError):  # a toolstack with another registry has domains in it
            os.rmdir(os.path.dirname(path))
