# SPDX-License-Identifier: Apache-2.0
"""Is what runs beside a QEMU confined, as the kernel sees it? All is read from /proc; it is not asked anything."""

from __future__ import annotations

import os

from depriv import proc
from depriv.errors import HostError
from depriv.report import Check, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from depriv.entry import Tool

# passt has the host's network: that is what it is for. In a user namespace of its own making it has no id and no
# capability.
_NAMESPACES = {
    "passt": ("cgroup", "ipc", "mnt", "pid", "user", "uts"),
    "qemu-img": ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts"),
}
_CAPS = ("CapInh", "CapPrm", "CapEff", "CapAmb")  # not CapBnd: every new user namespace begins with a full one
# Ours; and passt's own, which comes last of all it does before it serves its guest.
_FILTERS = {"passt": 2, "qemu-img": 1}


def refuse_unconfined(tools: tuple[Tool, ...], *, mounted: tuple[str, ...] = ()) -> None:
    """Raise ``HostError`` if one of a domain's tools is not confined; what it had to say is lost."""
    wrong = [check for check in checks(tools, mounted=mounted) if not check.holds]
    if wrong:
        cause = "; ".join(f"{check.id} is {check.have}, not {check.want}" for check in wrong)
        raise HostError(f"{tools[-1].name} is not confined", cause=cause)


def checks(tools: tuple[Tool, ...], *, mounted: tuple[str, ...] = ()) -> Iterable[Check]:
    """Yield whether each of a domain's tools lives and is confined; ``mounted``: what is in its root, by name."""
    own = {tool.pid for tool in tools}
    for place, tool in enumerate(tools):
        name = f"{tool.name}{place or ''}"
        try:
            yield from tuple(_judge(tool, name, own, mounted))
        except OSError:  # not ESRCH alone: what is ending has no mounts any more, EINVAL
            if not _is_gone(tool):
                raise
            yield _check(f"{name}.alive", "running", "dead")


def _is_gone(tool: Tool) -> bool:
    """Tell whether it has ended, or is past the point where it could do anything."""
    try:
        return proc.alive(tool.pid, tool.starttime) == "dead" or proc.is_ending(tool.pid, tool.pid)
    except ProcessLookupError:
        return True


def serves(tool: Tool) -> bool:
    """Tell whether it has come so far as to serve its guest: it has loaded its own filter."""
    try:
        filters = proc.read_status(tool.pid).get("Seccomp_filters", "0")
    except ProcessLookupError:
        return False
    return filters.isdecimal() and int(filters) >= _FILTERS[tool.name]


def _judge(tool: Tool, name: str, own: set[int], mounted: tuple[str, ...]) -> Iterable[Check]:
    status = proc.read_status(tool.pid)
    spaces, hosts = proc.namespaces(tool.pid), proc.namespaces(os.getpid())
    mounts = proc.mounts(tool.pid)
    others = [found.pid for found in proc.processes_of(uid=tool.uid) if found.pid not in own]
    state = proc.alive(tool.pid, tool.starttime)
    if state == "dead":  # what was read may be a successor's
        raise ProcessLookupError
    yield _check(f"{name}.alive", "running", state)
    for field, want in (("Uid", tool.uid), ("Gid", tool.gid)):
        yield _check(f"{name}.ids.{field.lower()}", str(want), " ".join(sorted(set(status[field].split()))))
    yield _check(f"{name}.ids.groups", "none", status["Groups"].strip() or "none")
    caps = " ".join(f"{field[3:]} {int(status[field], 16):x}" for field in _CAPS if int(status[field], 16))
    yield _check(f"{name}.caps", "none", caps or "none")
    yield _check(f"{name}.no_new_privs", "1", status["NoNewPrivs"])
    mode, filters = status["Seccomp"], status.get("Seccomp_filters", "0")
    holds = mode == "2" and serves(tool)
    filters_wanted = f"mode 2 with {_FILTERS[tool.name]} filters"
    yield _check(f"{name}.seccomp", filters_wanted, f"mode {mode} with {filters} filters", holds=holds)
    shared = [space for space in _NAMESPACES[tool.name] if spaces.get(space) == hosts.get(space)]
    yield _check(f"{name}.namespaces", "its own", f"the host's: {' '.join(shared)}" if shared else "its own")
    seen = " ".join(f"{mount.point} ({mount.fstype} {','.join(mount.options)})" for mount in mounts)
    fits = [mount.point for mount in mounts] == ["/", *(f"/{folder}" for folder in mounted)]
    fits = fits and mounts[0].fstype == "tmpfs" and all("ro" in mount.options for mount in mounts)
    own_root = f"nothing but its own {' '.join(mounted)}, read-only" if mounted else "empty"
    yield _check(f"{name}.root", own_root, own_root if fits else seen[:300])
    yield _check(f"{name}.alone", "alone", f"{len(others)} others" if others else "alone")


def _check(check: str, want: str, have: str, *, holds: bool | None = None) -> Check:
    return Check(id=check, want=want, have=printable(have), holds=have == want if holds is None else holds)
