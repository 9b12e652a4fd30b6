# SPDX-License-Identifier: Apache-2.0
"""Decide how a tool is started beside a QEMU: host facts and what it is to do in, a checked plan out. Pure.

passt has the same jail as QEMU, but for two things: it stays in the host's network, which it gives the guest, and it
enters a user namespace of its own making, where it mounts an empty root over ours and loads a filter of its own.
qemu-img, which looks into one image and ends, has QEMU's jail whole. See docs/adr/0015; isolation.c of passt
2023-03-09.
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
    NewUser,
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

_PEER_FD = 3  # the socket to QEMU, or to who serves the image
_PRIVATE = "/private"
_MIB = 1 << 20
_STDIN = OpenFile(role="stdin", path="/dev/null", access="ro", kind="char", number=0, rdev=(1 << 8) | 3)
_NULL_NODE = MakeNode(path="/dev/null", major=1, minor=3, mode=0o666, uid=0, gid=0)


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


class Inspection(Record):
    """One qemu-img that is to say which format an image has."""

    domain: str
    domid: int
    source: int  # the toolstack's descriptor of the socket at whose other end the image is served
    output: int  # the toolstack's descriptors of the pipes for what it prints
    errors: int
    directory: str  # of the domain's state
    cgroup: str  # the domain's, before its QEMU is in it


def plan_passt(wanted: Passt, host: Host, identity: Identity) -> Launch:
    """Return how it is started. ``host.program`` is passt itself.

    Raises:
        PlanError: it cannot be executed, or comes to a plan that no tool may have.
    """
    runtime = _refuse_program("passt", "passt", host)
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
    return _launch(plan, wanted, host, identity)


def plan_qemu_img(wanted: Inspection, host: Host, identity: Identity) -> Launch:
    """Return how it is started. ``host.program`` is qemu-img itself.

    It opens the image as a network block device, on a socket that it is handed, and is told no format: so QEMU's own
    code guesses it. What else the image names, it could not open. Source: block/nbd.c and qemu-img.c, QEMU 7.2.

    Raises:
        PlanError: it cannot be executed, or comes to a plan that no tool may have.
    """
    runtime = _refuse_program("qemu-img", "qemu-utils", host)
    plan = Plan(
        domain=wanted.domain,
        domid=wanted.domid,
        restricted=True,
        shared=False,
        tool="qemu-img",
        steps=(
            _reap(host, identity),
            _STDIN,
            TakeFd(role="image", source=wanted.source, number=_PEER_FD),
            TakeFd(role="stdout", source=wanted.output, number=1),
            TakeFd(role="stderr", source=wanted.errors, number=2),
            MakeCgroup(path=wanted.cgroup, version=host.cgroup_version),
            Unshare(namespaces=NAMESPACES),
            MakeRoot(mountpoint=wanted.directory, size_kib=64, inodes=48),
            MakeDir(path="/dev"),
            _NULL_NODE,
            *_own_files(host, runtime),
            PivotRoot(),
            SetHostname(name="depriv"),
            BecomeInit(),
            *_limits(address_mib=1024, nofile=64, nproc=80),  # up to 64 workers of the I/O pool: util/thread-pool.c
            NewUser(uid=identity.uid, gid=identity.gid),
            DropCapabilities(),
            SetIds(uid=identity.uid, gid=identity.gid),
            NoNewPrivs(),
            Filter(program=seccomp.program(host.processor, network=False)),
            Execute(
                path=host.program.path,
                argv=(host.program.path, "info", "--output=json", image_words()),
                environ=("LC_ALL=C",),
            ),
        ),
    )
    return _launch(plan, wanted, host, identity)


def image_words() -> str:
    """Return how qemu-img is told of the image, without a format."""
    return f'json:{{"file":{{"driver":"nbd","server":{{"type":"fd","str":"{_PEER_FD}"}}}}}}'


def _refuse_program(name: str, package: str, host: Host) -> str:
    """Return the folder of the tool's files, or refuse a host where it cannot be executed."""
    if host.program.problem:
        fix = f"apt-get install --no-install-recommends {package}"
        raise PlanError(f"cannot run {name}: {host.program.problem}", fix=fix)
    return f"{host.cache_dir}/runtime/{digest(_runtime_key(name, host))}"


def _runtime_key(name: str, host: Host) -> tuple[str, ...]:
    program = host.program
    return (
        f"{name} {program.path} {program.dev}:{program.ino} {program.size} {program.mtime_ns}",
        f"dirs {host.root_dirs!r} {host.root_links!r}",
    )


def _launch(plan: Plan, wanted: Passt | Inspection, host: Host, identity: Identity) -> Launch:
    try:
        check(plan)
    except ValueError as error:
        what = f"what is asked of {plan.tool} comes to a plan that no tool may have"
        raise PlanError(what, cause=str(error)) from error
    key = _runtime_key(plan.tool, host)
    return Launch(
        plan=plan,
        identity=identity,
        accel="",
        directory=wanted.directory,
        cgroup=wanted.cgroup,
        runtime=f"{host.cache_dir}/runtime/{digest(key)}",
        runtime_key=key,
        images=(),
        warnings=(),
    )


def _reap(host: Host, identity: Identity) -> Reap:
    lock = f"{host.state_dir}/reaper.lock"
    return Reap(uid=identity.uid, gid=identity.gid, reaper_uid=identity.reaper_uid, lock=lock)


def _own_files(host: Host, runtime: str) -> tuple[Step, ...]:
    """Bind the folders with the tool's program and libraries."""
    steps: list[Step] = []
    for name in host.root_dirs:
        steps += [MakeDir(path=f"/{name}"), BindTree(source=f"{runtime}/{name}", target=f"/{name}")]
    return (*steps, *(MakeLink(path=f"/{name}", target=target) for name, target in host.root_links))


def _opened(wanted: Passt, host: Host, identity: Identity) -> tuple[Step, ...]:
    """Everything that is opened while the host is visible."""
    steps: list[Step] = [_reap(host, identity)] if wanted.place == 0 else []
    steps.append(_STDIN)
    if wanted.resolv.kind == "file":
        steps.append(OpenFile(role="resolv", path=wanted.resolv.path, access="ro", kind="file", number=-1))
    return (
        *steps,
        TakeFd(role="guest", source=wanted.source, number=_PEER_FD),
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
        _NULL_NODE,
        # It would execute the build for this processor that it finds beside the one it is, which by this it is already:
        # arch_avx2_exec in arch.c.
        MakeLink(path="/proc/self/exe", target=host.program.path.removesuffix(".avx2") + ".avx2"),
    ]
    steps += _own_files(host, runtime)
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
    argv = (host.program.path, "--foreground", "--quiet", "--fd", str(_PEER_FD), *wanted.words)
    return (
        BecomeInit(),
        # A socket for each of the guest's connections: passt raises its own limit to the hard one. 74 MB of address
        # space, measured. Processes are counted by uid, and a domain may have several passts.
        *_limits(address_mib=512, nofile=16384, nproc=16),
        DropCapabilities(),
        SetIds(uid=identity.uid, gid=identity.gid),
        NoNewPrivs(),
        Filter(program=seccomp.program(host.processor, network=True, isolates=True)),
        Execute(path=host.program.path, argv=argv, environ=("LC_ALL=C",)),
    )


def _limits(*, address_mib: int, nofile: int, nproc: int) -> tuple[SetLimit, ...]:
    """Return the limits of a tool. It writes no file."""
    values = {
        "AS": address_mib * _MIB,
        "CORE": 0,
        "FSIZE": 0,
        "LOCKS": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "NICE": 0,
        "NOFILE": nofile,
        "NPROC": nproc,
        "RTPRIO": 0,
        "SIGPENDING": 64,
        "STACK": 8 * _MIB,
    }
    return tuple(SetLimit(name=name, value=value) for name, value in values.items())
