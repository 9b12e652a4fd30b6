# SPDX-License-Identifier: Apache-2.0
"""What `depriv doctor` looks at on a Xen host besides: Xen, xenstore, the devices, Xen's QEMU, the override."""

from __future__ import annotations

import os
import shutil

from depriv import xenstore
from depriv.errors import DeprivError
from depriv.records import Record
from depriv.xenprobe import program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_XEN: Final = (4, 17)  # older ones are not tested
_NODES: Final = ("privcmd", "evtchn", "gntdev", "xenbus")
_RESTRICT: Final = b"xen-domid-restrict"  # since QEMU 3.0; the word is in the program if the option is


class XenFinding(Record):
    """One thing a Xen host has or lacks, as ``doctor.Finding``."""

    id: str
    ok: bool
    have: str
    fix: str = ""


def findings(*, hypervisor: str = "/sys/hypervisor") -> tuple[XenFinding, ...]:
    """Return what this Xen host has and lacks for confined device models."""
    return (_version(hypervisor), _xenstore(), _devices(), _qemu(), _override())


def _version(hypervisor: str) -> XenFinding:
    try:
        parts: list[str] = []
        for name in ("major", "minor", "extra"):
            with open(f"{hypervisor}/version/{name}", encoding="ascii") as file:
                parts.append(file.read().strip())
    except OSError as error:
        return XenFinding(id="xen", ok=False, have=str(error), fix="mount -t sysfs sysfs /sys")
    ok = (int(parts[0]), int(parts[1])) >= _XEN
    fix = "" if ok else "upgrade: libxl hands its monitor in by descriptor, and kills by uid, since Xen 4.13"
    return XenFinding(id="xen", ok=ok, have=f"Xen {parts[0]}.{parts[1]}{parts[2]}", fix=fix)


def _xenstore() -> XenFinding:
    try:
        with xenstore.Xenstore() as store:
            name = store.read("/local/domain/0/name") or "nothing"
    except DeprivError as error:
        return XenFinding(id="xenstore", ok=False, have=f"{error}: {error.cause}", fix=error.fix)
    return XenFinding(id="xenstore", ok=True, have=f"answers: domain 0 is {name}")


def _devices() -> XenFinding:
    missing = sorted(set(_NODES) - {name for name, _, _ in xenstore.nodes()})
    fix = "modprobe " + " ".join(f"xen-{name}" for name in missing) if missing else ""
    have = f"/dev/xen lacks {', '.join(missing)}" if missing else "/dev/xen has all that a start takes"
    return XenFinding(id="xen-devices", ok=not missing, have=have, fix=fix)


def _qemu() -> XenFinding:
    path = program()
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError:
        fix = "apt-get install --no-install-recommends qemu-system-xen"
        return XenFinding(id="xen-qemu", ok=False, have=f"no {path}", fix=fix)
    if _RESTRICT not in content:
        have = f"{path} cannot restrict itself to a domain (-xen-domid-restrict)"
        return XenFinding(id="xen-qemu", ok=False, have=have, fix="install QEMU 3.0 or later, built for Xen")
    seccomp = "with" if b"libseccomp.so" in content else "without"
    return XenFinding(id="xen-qemu", ok=True, have=f"{path}, {seccomp} -sandbox (our own filter holds in any case)")


def _override() -> XenFinding:
    path = shutil.which("depriv-dm")
    have = f'device_model_override = "{path}"' if path else "depriv-dm is not in PATH"
    fix = "" if path else "install depriv where xl finds it, such as /usr/local/bin"
    return XenFinding(id="depriv-dm", ok=bool(path and os.access(path, os.X_OK)), have=have, fix=fix)
