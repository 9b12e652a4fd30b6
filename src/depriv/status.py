# SPDX-License-Identifier: Apache-2.0
"""How domains are: from the kernel whether they live, and only then from their QEMUs what they say they do."""

from __future__ import annotations

import contextlib
import os
import time

from depriv import proc
from depriv.errors import MonitorError
from depriv.untrusted import as_str, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from depriv.entry import Entry
    from depriv.errors import DeprivError
    from depriv.qmp import Monitor
    from depriv.registry import Registry

TIMEOUT_S = 1.0
# What QEMU says, and what is made of it. RunState, qapi/run-state.json, QEMU 7.2
_KNOWN = {
    "running": "running",
    "prelaunch": "paused",
    "paused": "paused",
    "shutdown": "shutdown",
    "guest-panicked": "crashed",
    "internal-error": "crashed",
    "io-error": "paused",
    "watchdog": "paused",
    "debug": "paused",
    "suspended": "running",  # to RAM, by the guest: its clock can wake it
    **dict.fromkeys(("inmigrate", "finish-migrate", "postmigrate", "save-vm", "restore-vm", "colo"), "paused"),
}


def state_of(entry: Entry, registry: Registry, said: str) -> str:
    """Return how a domain is, for people.

    "starting", "running", "paused", "shutdown", "crashed", "dead" (QEMU is gone, or its main thread is), "hung" (QEMU
    does not answer), "ending", "quarantined", "waiting", "damaged" (see :class:`depriv.entry.Entry`).

    Args:
        entry: The domain.
        registry: Where it is.
        said: What ``ask`` returned for it.
    """
    if entry.state == "starting":
        return "starting" if registry.is_starting(entry) else "dead"
    if entry.state != "running":
        return entry.state
    if registry.life(entry) != "running":
        return "dead"
    return _KNOWN.get(said, "hung")


def ask(entries: tuple[Entry, ...], registry: Registry, *, timeout_s: float = TIMEOUT_S) -> dict[int, str]:
    """Return domid -> what its QEMU answers to query-status, for those that run and answer in time.

    All are asked at once: however many hang, it takes ``timeout_s`` and no longer.
    """
    asked = [entry for entry in entries if entry.state == "running" and registry.life(entry) == "running"]
    said: dict[int, str] = {}

    def ask_one(entry: Entry) -> None:
        with contextlib.suppress(MonitorError, OSError), connect(entry, registry, timeout_s=timeout_s) as monitor:
            said[entry.domid] = status(monitor, timeout_s)

    if len(asked) == 1:
        ask_one(asked[0])
    elif asked:
        import threading  # noqa: PLC0415 (not on the path of create)

        raise_open_files()
        deadline = time.monotonic() + timeout_s
        threads = [threading.Thread(target=ask_one, args=(entry,), daemon=True) for entry in asked]
        begun: list[threading.Thread] = []
        with contextlib.suppress(RuntimeError):  # no room for another thread on this host: the rest is not asked
            for thread in threads:
                thread.start()
                begun.append(thread)
        for thread in begun:
            thread.join(max(deadline - time.monotonic(), 0.001))
    return dict(said)


def raise_open_files() -> None:
    """Allow this process as many descriptors as it may have: hundreds of guests take three each."""
    import resource  # noqa: PLC0415 (not on the path of create)

    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connect(entry: Entry, registry: Registry, *, timeout_s: float) -> Monitor:
    """Return a connection to a domain's QEMU.

    Raises:
        MonitorError: it is dead, or does not behave by the deadline.
    """
    from depriv.qmp import Monitor  # noqa: PLC0415 (imported while QEMU starts, which takes longer)

    expected = entry.expected
    try:
        pidfd = os.pidfd_open(expected.pid) if expected and entry.boot_id == registry.boot_id else -1
    except ProcessLookupError:
        pidfd = -1
    if expected is None or pidfd < 0:
        raise without_qemu(entry, MonitorError)
    with closing(pidfd):
        # After the pidfd was opened: its number may have become another's before.
        if proc.alive(expected.pid, expected.starttime) == "dead":
            raise MonitorError(f"the QEMU of domain {entry.name} is dead", fix=f"depriv destroy {entry.domid}")
        path = f"{registry.directory(entry.domid)}/qmp"
        return Monitor.connect(path, timeout_s=timeout_s, netns_of=pidfd if entry.restricted else -1)


def without_qemu(entry: Entry, kind: type[DeprivError]) -> DeprivError:
    """Return the error that says why a domain has no QEMU to look at or to talk to, and what to do."""
    end = f"depriv destroy {entry.domid}"  # by its name one that is damaged would need quotes
    match entry.state:
        case "damaged":
            return kind(f"the entry of domain {entry.domid} cannot be read: see depriv list", fix=f"to end it: {end}")
        case "starting":
            return kind(f"domain {entry.name} has not started", fix=f"wait for depriv create, or: {end}")
        case "waiting":
            fix = f"depriv gc --restart {entry.domid}, or: {end}"
            return kind(f"domain {entry.name} has ended, and waits to be started again", fix=fix)
        case _:
            return kind(f"the QEMU of domain {entry.name} is dead", fix=end)


def status(monitor: Monitor, timeout_s: float) -> str:
    """Return what QEMU says it does; what a QEMU says is believed by nobody, and shown at most."""
    return field(monitor.execute("query-status", timeout_s=timeout_s), "status", as_str, "query-status")


@contextlib.contextmanager
def closing(fd: int) -> Generator[int]:
    """Close a descriptor at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)
