# SPDX-License-Identifier: Apache-2.0
"""The closed vocabulary of what the jail can do, and how each step reads.

A plan is a tuple of these. The jail has one function per step and decides nothing; `depriv plan` prints the same
lines that errors name. Pure.
"""

from __future__ import annotations

from depriv.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

NAMESPACES = ("mnt", "ipc", "net", "uts", "pid", "cgroup")


class Reap(Record):
    """Kill every process of ``uid``, and end only when none with it or with ``gid`` is left.

    Who has ``gid`` and another uid is not killed, but makes the step fail. A process with real uid ``reaper_uid`` and
    effective uid ``uid`` sends the signal, so that what it kills may not kill it back. ``lock`` is a file: two reapers
    at once would kill each other.
    """

    uid: int
    gid: int
    reaper_uid: int
    lock: str
    timeout_ms: int = 5000


class OpenFile(Record):
    """Open one existing file, never through a symbolic link, and see that it is the one that was planned for."""

    role: str
    path: str
    access: str  # "ro" or "rw"
    kind: str  # "file", "block" or "char"
    number: int  # descriptor in QEMU; -1: kept by the jail (a source to copy from)
    dev: int = 0  # file: st_dev and st_ino as planned; 0, 0: not checked
    ino: int = 0
    rdev: int = 0  # block and char: st_rdev as planned; 0: not checked


class TakeFd(Record):
    """Take a descriptor that the toolstack has open, by its number there."""

    role: str
    source: int
    number: int  # descriptor in QEMU; -1: kept by the jail (a source to copy from)


class ListenUnix(Record):
    """Bind and listen on a UNIX stream socket: in a directory that only root can enter, or where the user says.

    In the new network namespace: a socket shows the interfaces of the namespace it was made in, even this kind.
    """

    role: str
    path: str
    number: int
    replace_old: bool = False  # remove a socket of that name first, as QEMU does (util/qemu-sockets.c, QEMU 7.2)


class MakeFifo(Record):
    """Make a FIFO and open it for both directions, without blocking.

    What is written stays in its buffer, whether or not anyone reads; beyond ``size_kib`` it is lost, and nobody's
    disk fills.
    """

    role: str
    path: str
    numbers: tuple[int, ...]
    size_kib: int


class MakeCgroup(Record):
    """Make the leaf cgroup that the device model is born in (version 2) or joins first of all (version 1)."""

    path: str  # absolute path of the directory
    version: int


class Unshare(Record):
    """Leave these namespaces of the host; pid and cgroup take effect at BecomeInit."""

    namespaces: tuple[str, ...]


class MakeRoot(Record):
    """Make every mount private, then mount an empty tmpfs over ``mountpoint`` as the root to be."""

    mountpoint: str
    size_kib: int
    inodes: int


class MakeDir(Record):
    """Make a directory in the new root, owned by root, mode 0755."""

    path: str


class MakeLink(Record):
    """Make a symbolic link in the new root."""

    path: str
    target: str


class MakeNode(Record):
    """Make a character device node in the new root."""

    path: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int


class BindTree(Record):
    """Bind a directory of the host into the new root: read-only, no set-uid bits, no devices unless it is devpts."""

    source: str
    target: str
    devices: bool = False  # /dev/pts: QEMU makes pseudo-terminals that the host is to see


class MakePrivate(Record):
    """Mount a small tmpfs in the new root for copies of files that QEMU reads by name at its start."""

    path: str
    size_kib: int


class CopyFile(Record):
    """Copy an opened file into the new root, readable by ``uid`` alone."""

    role: str  # of the OpenFile it is copied from
    path: str
    uid: int
    gid: int


class PivotRoot(Record):
    """Make the new root the root, read-only, and detach the host's."""


class SetHostname(Record):
    """Set the host name of the new UTS namespace, so that the host's is not to be seen."""

    name: str


class BecomeInit(Record):
    """Fork: the child is process 1 of the new pid namespace and joins the cgroup. What follows happens in it."""


class SetLimit(Record):
    """Set a resource limit, soft and hard."""

    name: str  # "FSIZE", "NOFILE", ... as in setrlimit(2)
    value: int  # -1: unlimited


class NewUser(Record):
    """Drop all groups, then enter a user namespace in which only this uid and gid exist."""

    uid: int
    gid: int


class DropCapabilities(Record):
    """Empty the bounding and ambient sets, lock the securebits; SetIds empties the others."""


class SetIds(Record):
    """Become uid:gid, for good, with no group and no capability."""

    uid: int
    gid: int


class NoNewPrivs(Record):
    """Set no_new_privs, and be not dumpable until exec."""


class Filter(Record):
    """Load a seccomp filter of our own; QEMU's comes on top of it."""

    program: str  # struct sock_filter[], in hexadecimal


class Execute(Record):
    """Execute the device model with only the granted descriptors."""

    path: str
    argv: tuple[str, ...]
    environ: tuple[str, ...]


class EmptyRoot(Record):
    """After QEMU has started: detach what is mounted in its root and remove every name but those in ``keep``."""

    detach: tuple[str, ...]
    remove: tuple[str, ...]


if TYPE_CHECKING:
    Step: TypeAlias = (
        Reap
        | OpenFile
        | TakeFd
        | ListenUnix
        | MakeFifo
        | MakeCgroup
        | Unshare
        | MakeRoot
        | MakeDir
        | MakeLink
        | MakeNode
        | BindTree
        | MakePrivate
        | CopyFile
        | PivotRoot
        | SetHostname
        | BecomeInit
        | SetLimit
        | NewUser
        | DropCapabilities
        | SetIds
        | NoNewPrivs
        | Filter
        | Execute
        | EmptyRoot
    )

# In the order in which a plan may use them; check.py holds plans to it and says why.
ALL: tuple[type[Record], ...] = (
    Reap,
    OpenFile,
    TakeFd,
    MakeFifo,
    MakeCgroup,
    Unshare,
    ListenUnix,
    MakeRoot,
    MakeDir,
    MakeLink,
    MakeNode,
    BindTree,
    MakePrivate,
    CopyFile,
    PivotRoot,
    SetHostname,
    BecomeInit,
    SetLimit,
    NewUser,
    DropCapabilities,
    SetIds,
    NoNewPrivs,
    Filter,
    Execute,
    EmptyRoot,
)


class Plan(Record):
    """What the jail is to do, in order, for one domain's QEMU, or for a tool beside it."""

    domain: str
    domid: int
    restricted: bool  # False: dm_restrict=0, said aloud everywhere
    shared: bool  # the configuration names the shared user: other domains may have its uid, so nothing is reaped
    keep_net: bool = False  # QEMU stays in the host's network namespace: asked for, said aloud everywhere
    tool: str = ""  # no QEMU but what works for one: "passt", which encloses itself further, or "qemu-img"
    steps: tuple[Step, ...]
    after: tuple[Step, ...] = ()  # done on the toolstack's word, once QEMU has opened all it needs


def describe(step: Step) -> str:  # noqa: C901, PLR0911, PLR0912 (one line per step, flat)
    """Return the one line used by `plan`, by errors and by the benchmark's breakdown."""
    match step:
        case Reap():
            whom = f"every process of uid {step.uid}, as reaper {step.reaper_uid}"
            return f"kill {whom}, and see that none of it or of gid {step.gid} is left"
        case OpenFile():
            where = "kept by the jail" if step.number < 0 else f"as descriptor {step.number}"
            return f"open {step.path} {step.access} ({step.kind}) for {step.role}, {where}"
        case TakeFd():
            where = "kept by the jail" if step.number < 0 else f"as descriptor {step.number}"
            return f"take the toolstack's descriptor {step.source} for {step.role}, {where}"
        case ListenUnix():
            return f"listen on {step.path} for {step.role}, as descriptor {step.number}"
        case MakeFifo():
            return f"make FIFO {step.path} for {step.role}, as descriptors {' '.join(map(str, step.numbers))}"
        case MakeCgroup():
            return f"make cgroup {step.path}"
        case Unshare():
            return f"unshare {' '.join(step.namespaces)}"
        case MakeRoot():
            return f"make an empty root on {step.mountpoint} ({step.size_kib} KiB, {step.inodes} inodes)"
        case MakeDir():
            return f"make directory {step.path} in it"
        case MakeLink():
            return f"make link {step.path} -> {step.target} in it"
        case MakeNode():
            return f"make node {step.path} ({step.major}:{step.minor}, mode {step.mode:04o}, owner {step.uid}) in it"
        case BindTree():
            return f"bind {step.source} at {step.target} in it, read-only{', with its devices' if step.devices else ''}"
        case MakePrivate():
            return f"make private {step.path} in it ({step.size_kib} KiB)"
        case CopyFile():
            return f"copy {step.role} to {step.path} in it"
        case PivotRoot():
            return "pivot into the new root, read-only, and detach the host's"
        case SetHostname():
            return f"set host name {step.name}"
        case BecomeInit():
            return "fork: become process 1 of the new pid namespace, in the cgroup"
        case SetLimit():
            return f"limit {step.name} to {'unlimited' if step.value < 0 else step.value}"
        case NewUser():
            return f"drop all groups, enter a user namespace that maps only {step.uid}:{step.gid}"
        case DropCapabilities():
            return "empty the bounding and ambient capability sets, lock the securebits"
        case SetIds():
            return f"become {step.uid}:{step.gid} with no group and no capability"
        case NoNewPrivs():
            return "set no_new_privs, not dumpable"
        case Filter():
            return f"load a seccomp filter of {len(step.program) // 16} instructions"
        case Execute():
            return f"execute {step.path}"
        case EmptyRoot():
            return f"detach {' '.join(step.detach)} and remove {' '.join(step.remove)} from the root"
