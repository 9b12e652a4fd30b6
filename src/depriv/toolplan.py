# SPDX-License-Identifier: Apache-2.0
"""Decide how passt is started beside a QEMU: host facts and its words in, a checked plan out. Pure.

The same jail as QEMU's, but for two things: it stays in the host's network, which it gives the guest, and it enters a
user namespace of its own making, where it mounts an empty root over ours and loads a filter of its own. See
docs/adr/0015; isolation.c of passt 2023-03-09.
"""

from __future__ import annotations

from depriv import seccomp
from depriv.assembly import Launch
from depriv.check import check
from depriv.errors import PlanError
from depriv.records import Record
from depriv.steps import (
    NAMESPACES,
    BecomeInit,
    BindTree,
    CopyFile,
    DropCapabilities,
    Execute,
    Filter,
    MakeCgroup,
    MakeDir,
    MakeLink,
    MakeNode,
    MakePrivate,
    MakeRoot,
    NoNewPrivs,
    OpenFile,
    PivotRoot,
    Plan,
    Reap,
    SetHostname,
    SetIds,
    SetLimit,
    TakeFd,
    Unshare,
)
from depriv.text import digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.host import FileFacts, Host
    from depriv.identity import Identity
    from depriv.steps import Step

_GUEST_FD = 3
_PRIVATE = "/private"
_MIB = 1 << 20
_NULL = (1 << 8) | 3


class Passt(Record):
    """One passt that is to run."""

    domain: str
    domid: int
    place: int  # among those of its domain, from 0
    words: tuple[str, ...]  # passt's, but for how it runs
    source: int  # the toolstack's descriptor of the socket that leads to QEMU
    output: int  # the toolstack's descriptor of a pipe for what it prints, open for both directions
    directory: str  # of the domain's state
    cgroup: str  # the domain's
    resolv: FileFacts  # /etc/resolv.conf, links resolved


def plan_passt(wanted: Passt, host: Host, identity: Identity) -> Launch:
    """Return how it is started. ``host.program`` is passt itself.

    Raises:
        PlanError: it cannot be executed, or comes to a plan that no tool may have.
    """
    program = host.program
    if program.problem:
        raise PlanError(f"cannot run passt: {program.problem}", fix="apt-get install --no-install-recommends passt")
    key = (
        f"passt {program.path} {program.dev}:{program.ino} {program.size} {program.mtime_ns}",
        f"dirs {host.root_dirs!r} {host.root_links!r}",
    )
    runtime = f"{host.cache_dir}/runtime/{digest(key)}"
    plan = Plan(
        domain=wanted.domain,
        domid=wanted.domid,
        restricted=True,
        shared=wanted.place > 0,  # the domain's first one is reaped for; all of them have one uid
        keep_net=True,
        tool="passt",
        steps=(
            *_opened(wanted, host, identity),
            *_root(wanted, host, identity, runtime),
            *_end(wanted, host, identity),
        ),
    )
    try:
        check(plan)
    except ValueError as error:
        raise PlanError("what is asked of passt comes to a plan that no tool may have", cause=str(error)) from error
    return Launch(
        plan=plan,
        identity=identity,
        accel="",
        directory=wanted.directory,
        cgroup=wanted.cgroup,
        runtime=runtime,
        runtime_key=key,
        images=(),
        warnings=(),
    )


def _opened(wanted: Passt, host: Host, identity: Identity) -> tuple[Step, ...]:
    """Everything that is opened while the host is visible."""
    lock = f"{host.state_dir}/reaper.lock"
    steps: list[Step] = []
    if wanted.place == 0:
        steps.append(Reap(uid=identity.uid, gid=identity.gid, reaper_uid=identity.reaper_uid, lock=lock))
    steps.append(OpenFile(role="stdin", path="/dev/null", access="ro", kind="char", number=0, rdev=_NULL))
    if wanted.resolv.kind == "file":
        steps.append(OpenFile(role="resolv", path=wanted.resolv.path, access="ro", kind="file", number=-1))
    return (
        *steps,
        TakeFd(role="guest", source=wanted.source, number=_GUEST_FD),
        TakeFd(role="stdout", source=wanted.output, number=1),
        TakeFd(role="stderr", source=wanted.output, number=2),
        MakeCgroup(path=f"{wanted.cgroup}/passt{wanted.place}", version=host.cgroup_version),
    )


def _root(wanted: Passt, host: Host, identity: Identity, runtime: str) -> tuple[Step, ...]:
    """Namespaces, and a root with passt's own files, read-only, until passt mounts an empty one on its /tmp."""
    steps: list[Step] = [
        Unshare(namespaces=tuple(name for name in NAMESPACES if name != "net")),
        MakeRoot(mountpoint=wanted.directory, size_kib=64, inodes=48),
        *(MakeDir(path=path) for path in ("/dev", "/tmp", "/etc", "/proc", "/proc/self", _PRIVATE)),  # noqa: S108 (in an own root)
        MakeNode(path="/dev/null", major=1, minor=3, mode=0o666, uid=0, gid=0),
        # It would execute the build for this processor that it finds beside the one it is, which by this it is already:
        # arch_avx2_exec in arch.c.
        MakeLink(path="/proc/self/exe", target=host.program.path.removesuffix(".avx2") + ".avx2"),
    ]
    for name in host.root_dirs:
        steps += [MakeDir(path=f"/{name}"), BindTree(source=f"{runtime}/{name}", target=f"/{name}")]
    steps += [MakeLink(path=f"/{name}", target=target) for name, target in host.root_links]
    if wanted.resolv.kind == "file":
        copy = f"{_PRIVATE}/resolv.conf"
        steps += [
            MakePrivate(path=_PRIVATE, size_kib=wanted.resolv.size // 1024 + 64),
            CopyFile(role="resolv", path=copy, uid=identity.uid, gid=identity.gid),
            MakeLink(path="/etc/resolv.conf", target=copy),
        ]
    return (*steps, PivotRoot(), SetHostname(name="depriv"))


def _end(wanted: Passt, host: Host, identity: Identity) -> tuple[Step, ...]:
    """From the fork to passt's first instruction."""
    argv = (host.program.path, "--foreground", "--quiet", "--fd", str(_GUEST_FD), *wanted.words)
    return (
        BecomeInit(),
        *_LIMITS,
        DropCapabilities(),
        SetIds(uid=identity.uid, gid=identity.gid),
        NoNewPrivs(),
        Filter(program=seccomp.program(host.processor, network=True, isolates=True)),
        Execute(path=host.program.path, argv=argv, environ=("LC_ALL=C",)),
    )


# A socket for each of the guest's connections: passt raises its own limit to the hard one. No file, no thread, and
# 74 MB of address space, measured; processes are counted by uid, and a domain may have several passts.
_LIMITS = tuple(
    SetLimit(name=name, value=value)
    for name, value in (
        ("AS", 512 * _MIB),
        ("CORE", 0),
        ("FSIZE", 0),
        ("LOCKS", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
        ("NICE", 0),
        ("NOFILE", 16384),
        ("NPROC", 16),
        ("RTPRIO", 0),
        ("SIGPENDING", 64),
        ("STACK", 8 * _MIB),
    )
)
