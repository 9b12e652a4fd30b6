# SPDX-License-Identifier: Apache-2.0
"""How far a device model is confined, as a table: the same questions for xl's own start and for depriv's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.xenlab.dom0 import Dom0

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
XEN_NODES = ("privcmd", "hypercall", "evtchn", "gntdev", "gntalloc", "xenbus", "xenbus_backend")


def table(dom0: Dom0, pid: int) -> dict[str, str]:
    """Return check -> value for a device model in dom0; every value is the kernel's word, or counted.

    Raises:
        LookupError: there is no such process.
    """
    found = dom0.proc(pid)
    if not found:
        raise LookupError(f"no process {pid}")
    status, limits, targets = found["status"], found["limits"], [target for _, target in found["fds"].values()]
    ids = {name: " ".join(sorted(set(status[name].split()))) for name in ("Uid", "Gid")}
    held = {node: targets.count(f"/dev/xen/{node}") for node in XEN_NODES}
    return {
        "uid": ids["Uid"],
        "gid": ids["Gid"],
        "groups": status["Groups"],
        "CapPrm": status["CapPrm"],
        "CapBnd": status["CapBnd"],
        "NoNewPrivs": status["NoNewPrivs"],
        "Seccomp": status["Seccomp"],
        "own namespaces": " ".join(name for name in NAMESPACES if not found["ns"][name]),
        "root": found["root"],
        "mounts": str(found["mounts"]),
        "cgroup": found["cgroup"],
        "oom_score_adj": str(found["oom_score_adj"]),
        "FSIZE": limits["Max file size"][1],
        "NPROC": limits["Max processes"][1],
        "NOFILE": limits["Max open files"][1],
        "CORE": limits["Max core file size"][1],
        "Xen nodes": " ".join(f"{node}={count}" for node, count in held.items() if count),
    }


def side_by_side(columns: dict[str, dict[str, str]]) -> str:
    """Return tables beside each other, a line per check; a check that one does not have is "-" there."""
    checks = list(dict.fromkeys(check for column in columns.values() for check in column))
    rows = [["", *columns], *([check, *(column.get(check, "-") for column in columns.values())] for check in checks)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"
