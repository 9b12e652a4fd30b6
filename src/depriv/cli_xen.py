# SPDX-License-Identifier: Apache-2.0
"""The part of the command line that is about Xen domains."""

from __future__ import annotations

import contextlib

from depriv import xenstore, xl
from depriv.errors import ConfigError, NotFoundError, PlanError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from depriv.api import Guest, Toolstack
    from depriv.config import Domain
    from depriv.entry import Entry
    from depriv.registry import Registry
    from depriv.report import AuditReport
    from depriv.spawn import Jail


def create(arguments: argparse.Namespace, config: Domain, host: Toolstack) -> int:
    """Start a Xen domain."""
    words = (arguments.file, *arguments.settings)
    _told(*xl.create(config, words, host.registry, paused=arguments.paused), paused=arguments.paused)
    return 0


def restore(arguments: argparse.Namespace, host: Toolstack) -> int:
    """Go on with a Xen domain that was saved."""
    if not xenstore.is_dom0():
        raise PlanError("this host does not run Xen, and this version restores Xen domains only")
    _told(*xl.restore(arguments.file, host.registry, paused=arguments.paused), paused=arguments.paused)
    return 0


def save(guest: Guest, path: str) -> int:
    """Save a Xen domain, and see that nothing is left of its device model."""
    xl.save(_xen(guest, "saves"), path)
    with contextlib.suppress(NotFoundError):
        guest.destroy()
    return 0


def change_cd(guest: Guest, registry: Registry, vdev: str, path: str) -> int:
    """Change the CD of a Xen domain; 1 if not every restriction holds afterwards."""
    xl.change_cd(_xen(guest, "changes CDs of"), registry, vdev, path)
    wrong = [check for check in guest.audit().checks if not check.holds]
    for check in wrong:
        print(f"FAIL  {check.id}  {check.have} (want {check.want})")
    return 1 if wrong else 0


def console(guest: Guest, *, dump: bool) -> int:
    """Become xl console."""
    if dump:
        raise ConfigError(
            f"{guest.name} is a Xen domain: its serial port is a pseudo-terminal, and nothing keeps what it has said",
            fix=f"depriv console {guest.name}, which is xl console",
        )
    xl.console(guest.entry)
    return 0


def destroy(guest: Guest, jail: Jail) -> int:
    """End the Xen domain itself, and see that nothing is left of its device model, which may do so itself."""
    xl.destroy(guest.entry)
    with contextlib.suppress(NotFoundError):
        guest.destroy(jail)
    return 0


def _xen(guest: Guest, does: str) -> Entry:
    if not guest.is_xen:
        raise ConfigError(f"{guest.name} is no Xen domain, and this version {does} those only")
    return guest.entry


def _told(entry: Entry, report: AuditReport, *, paused: bool) -> None:
    held = sum(check.holds for check in report.checks)
    how = "paused" if paused else "running"
    checks = f"{held} of {len(report.checks)} checks hold"
    print(f"{entry.name}: domid {entry.domid}, uid {entry.uid}, {how}; {checks}")
