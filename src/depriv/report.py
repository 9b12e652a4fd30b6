# SPDX-License-Identifier: Apache-2.0
"""What an audit expects and what it found, as records, and their text and JSON. Pure.

``Expected`` is written down while the guest has not run yet, ``AuditReport`` is what the kernel says afterwards.
"""

from __future__ import annotations

from depriv.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KINDS = ("file", "block", "char", "fifo", "socket")
ACCESSES = ("ro", "rw", "wo")
SHOWN = 160  # characters of a foreign text that are shown: a path may have 4095


class Grant(Record):
    """One open file that QEMU was given. Two accesses of one file are two grants."""

    role: str  # "disk0", "qmp", "log": unique for people only
    kind: str  # one of KINDS
    dev: int  # st_dev, st_ino and st_rdev of fstat(2)
    ino: int
    rdev: int = 0
    access: str  # one of ACCESSES
    path: str = ""  # for people
    locked: bool = False  # QEMU must hold an image lock on it

    def validate(self) -> None:
        """Refuse a kind or an access that no descriptor has."""
        if self.kind not in KINDS or self.access not in ACCESSES:
            raise ValueError(f"grant {self.role}: no such kind or access: {self.kind} {self.access}")


class Limit(Record):
    """One resource limit by its name in setrlimit(2), without ``RLIMIT_``."""

    name: str
    soft: int  # -1: unlimited
    hard: int


class Expected(Record):
    """What is to be true of one guest's QEMU for as long as it lives."""

    domain: str
    domid: int
    uid: int
    gid: int
    pid: int
    starttime: int  # field 22 of /proc/PID/stat: tells the process from a later one with its number
    restricted: bool  # dm_restrict
    limits: tuple[Limit, ...]
    environ: tuple[str, ...]  # "NAME=value"
    cgroup: str  # path inside the hierarchy: "/depriv/7"
    grants: tuple[Grant, ...]
    xen_domid: int = 0  # of the Xen domain whose device model it is; 0: none


class Check(Record):
    """One question to the kernel, the answer wanted and the answer had."""

    id: str  # stable, lower case, dotted (but for the limits' own names)
    want: str
    have: str
    holds: bool


class AuditReport(Record):
    """Everything one audit asked. An audit that asked nothing proves nothing: it does not hold."""

    domain: str  # "" for a process that no domain is known for
    pid: int
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return what ``audit --json`` prints, ready for ``json.dumps``."""
        return {
            "domain": self.domain,
            "pid": self.pid,
            "holds": self.holds,
            "checks": [check.as_dict() for check in self.checks],
        }

    def to_text(self) -> str:
        """Return one aligned line per check, FAIL before those that do not hold, and ``N of M hold`` last."""
        width = max((len(check.id) for check in self.checks), default=0)
        lines = [
            f"{'ok  ' if check.holds else 'FAIL'}  {check.id:{width}}  {check.have}"
            + ("" if check.holds else f" (want {check.want})")
            for check in self.checks
        ]
        held = sum(check.holds for check in self.checks)
        return "\n".join([*lines, f"{held} of {len(self.checks)} hold"])


def printable(text: str) -> str:
    r"""Return ``text`` fit for a terminal and a log: escapes for what is not printable, ``...`` after SHOWN characters.

    File names, environments and comm are written by others, and a device model may choose some of them.
    """
    shown = text[:SHOWN] + ("..." if len(text) > SHOWN else "")
    if shown.isprintable():
        return shown
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)


def times_text(times: list[tuple[str, float]]) -> str:
    """Return one line per stage of a start with the milliseconds since the one before it."""
    lines: list[str] = []
    before = times[0][1]
    for name, after in times[1:]:
        lines.append(f"{(after - before) * 1000:8.2f} ms  {name}")
        before = after
    return "\n".join(lines)
