# SPDX-License-Identifier: Apache-2.0
"""Run every QEMU device model with nothing to gain from taking it over, and prove it.

::

    import depriv

    host = depriv.Toolstack()
    guest = host.create(depriv.Domain(name="web1", disks=(depriv.Disk(vdev="xvda", target="/srv/web1.img"),)))
    assert guest.audit().holds
    print(guest.console())
    guest.destroy()
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.api import Guest, Toolstack
    from depriv.config import Disk, Domain, Layer, Vif
    from depriv.errors import (
        ConfigError,
        DeprivError,
        HostError,
        JailError,
        MonitorError,
        NotFoundError,
        PlanError,
    )
    from depriv.report import AuditReport

__version__ = "0.1.0"
__all__ = [
    "AuditReport",
    "ConfigError",
    "DeprivError",
    "Disk",
    "Domain",
    "Guest",
    "HostError",
    "JailError",
    "Layer",
    "MonitorError",
    "NotFoundError",
    "PlanError",
    "Toolstack",
    "Vif",
]

_HOME = {
    "AuditReport": "report",
    "Disk": "config",
    "Domain": "config",
    "Guest": "api",
    "Layer": "config",
    "Toolstack": "api",
    "Vif": "config",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: the jail imports this package, too, and must not import it all."""
    if name not in __all__:
        raise AttributeError(f"module 'depriv' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 (as said above)

    return getattr(import_module(f"depriv.{_HOME.get(name, 'errors')}"), name)
