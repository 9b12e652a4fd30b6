# SPDX-License-Identifier: Apache-2.0
"""Put a launch together: what one QEMU needs, wherever it was asked for, in; a checked plan out. Pure.

What it needs comes from a configuration (:mod:`depriv.planner`) or from a command line (:mod:`depriv.requests`).
"""

from __future__ import annotations

from depriv import seccomp
from depriv.check import check
from depriv.errors import PlanError
from depriv.identity import Identity, choose
from depriv.qemu.cmdline import EVENTS_FD, PRIVATE, QMP_FD
from depriv.records import Record
from depriv.steps import (
    NAMESPACES,
    BecomeInit,
    BindTree,
    CopyFile,
    DropCapabilities,
    EmptyRoot,
    Execute,
    Filter,
    ListenUnix,
    MakeCgroup,
    MakeDir,
    MakeFifo,
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
    from depriv.host import Host, Program
    from depriv.steps import Step

LOG_KIB = 64
_LOG_KIB_DRY = 512
_MIB = 1 << 20
_XEN_MAPPED_MIB = 33 << 10  # the map cache's own limit, and what it leaves for the rest: hw/xen/xen-mapcache.c, QEMU 10
_NULL = (1 << 8) | 3


class Private(Record):
    """A copy of a file in QEMU's root, there during its start only."""

    source: OpenFile  # kept by the jail
    target: str  # below /private
    size: int


class Needs(Record):
    """What one QEMU needs, in the words of the jail."""

    name: str
    program: Program
    argv: tuple[str, ...]  # the program's name included
    restricted: bool = True
    accel: str  # "tcg", "kvm" or "xen"
    memory_mib: int
    vcpus: int
    environ: tuple[str, ...] = ()  # beside what every QEMU gets
    takes: tuple[TakeFd, ...] = ()  # of the toolstack's descriptors
    files: tuple[OpenFile, ...] = ()
    listens: tuple[ListenUnix, ...] = ()  # beside our own monitors
    privates: tuple[Private, ...] = ()
    images: tuple[tuple[int, int, int, bool], ...] = ()  # st_dev, st_ino, st_rdev, writable
    queues: int = 0  # of all disks
    file_bytes_max: int = 0  # of the largest file that QEMU may write
    own_log: bool = True  # standard output and error go into a FIFO of ours; False: ``takes`` has them
    keep_net: bool = False  # QEMU stays in the host's network namespace, as asked for
    ptys: bool = False  # QEMU makes pseudo-terminals that the host is to see
    xen_nodes: tuple[tuple[str, int, int], ...] = ()  # name in /dev/xen, major, minor: reachable during the start
    runtime_key: tuple[str, ...] = ()
    xen_domid: int = 0
    reaper_lock: str = ""  # "": the registry's own
    warnings: tuple[str, ...] = ()


class Launch(Record):
    """A plan, and what the toolstack has to know to see it through."""

    plan: Plan
    identity: Identity
    accel: str
    directory: str  # of the domain's state, below the host's state_dir
    cgroup: str
    runtime: str  # the folder whose content becomes QEMU's root; made by depriv.runtime if it is not there
    runtime_key: tuple[str, ...]  # what that folder depends on
    images: tuple[tuple[int, int, int, bool], ...]  # st_dev, st_ino, st_rdev, writable
    warnings: tuple[str, ...]
    xen_domid: int = 0


def identity_of(host: Host, device_model_user: str) -> Identity:
    """Return who the next domain runs as, or raise ``PlanError``."""
    taken = tuple((other.name, other.uid, other.gid) for other in host.holdings)
    found = choose(device_model_user=device_model_user, domid=host.domid, accounts=host.accounts, taken=taken)
    if found.how.startswith("user") and host.strangers:
        raise PlanError(
            f"device_model_user {device_model_user!r} has processes already: {_numbers(host.strangers)}",
            cause="a uid is cleared before a device model gets it: they would be killed",
            fix="name a user that nothing else runs as",
        )
    return found


def refuse_program(host: Host, *, fix: str) -> None:
    """Refuse a host without a QEMU that can be executed."""
    if host.program.problem:
        raise PlanError(f"cannot run QEMU: {host.program.problem}", fix=fix)


def refuse_no_cgroup(host: Host) -> None:
    """Refuse a host where a guest's processes could not be killed as one."""
    if not host.cgroup_dir:
        raise PlanError(
            "no cgroup file system is mounted, so the guest's processes could not be killed as one",
            fix="mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        )


def choose_accel(wanted: str, host: Host) -> str:
    """Return "kvm" or "tcg", or raise ``PlanError`` if KVM is asked for and is not there."""
    if wanted == "kvm" and host.kvm_node == (0, 0):
        raise PlanError(
            'accel="kvm" but this host has no /dev/kvm',
            fix='load the kernel module (modprobe kvm_intel or kvm_amd), or set accel="tcg"',
        )
    if wanted == "auto":
        return "kvm" if host.kvm and host.kvm_node != (0, 0) else "tcg"
    return wanted


def assemble(needs: Needs, host: Host, identity: Identity, *, discover: bool = False) -> Launch:
    """Return the launch; with ``discover`` the dry run of it, over the host's own program folders, everything traced.

    Raises:
        PlanError: the host lacks something, or it comes to a plan that no device model may have.
    """
    key = (*_runtime_key(needs, host), *needs.runtime_key)
    runtime = f"{host.cache_dir}/runtime/{digest(key)}"
    made = _plan(needs, host, identity, binds="" if discover else runtime, discover=discover)
    try:
        check(made)
    except ValueError as error:
        raise PlanError("what is asked for comes to a plan that no device model may have", cause=str(error)) from error
    return Launch(
        plan=made,
        identity=identity,
        accel=needs.accel,
        directory=directory(host),
        cgroup=_cgroup(host),
        runtime=runtime,
        runtime_key=key,
        images=tuple(dict.fromkeys(needs.images)),
        warnings=needs.warnings,
        xen_domid=needs.xen_domid,
    )


def directory(host: Host) -> str:
    """Return the folder of the domain that is planned."""
    return f"{host.state_dir}/domains/{host.domid}"


def _cgroup(host: Host) -> str:
    return f"{host.cgroup_dir}/{host.cgroup_folder}/{host.domid}"


def time_zone(offset_s: int) -> str:
    """Return TZ for QEMU: its root has no /etc/localtime, and ``base=localtime`` would silently mean UTC."""
    hours, rest = divmod(abs(offset_s), 3600)
    # POSIX counts the other way: west is positive.
    sign = "-" if offset_s > 0 else "+"
    return f"TZ=DEPRIV{sign}{hours:02}:{rest // 60:02}:{rest % 60:02}" if offset_s else "TZ=UTC0"


def shared_warning(identity: Identity) -> tuple[str, ...]:
    """Return the warning that goes with a shared uid."""
    if not identity.how.startswith("shared"):
        return ()
    text = (
        f"device_model_user: uid {identity.uid} is SHARED with every domain that names it: a QEMU that is taken "
        "over can kill the others, and nothing of it is killed by uid"
    )
    return (text,)


def _plan(needs: Needs, host: Host, identity: Identity, *, binds: str, discover: bool) -> Plan:
    """Put the parts into the order that check.py holds every plan to."""
    enclosed = _enclose(needs, host, identity, binds=binds)
    environ = ("LC_ALL=C", "MALLOC_ARENA_MAX=8", *needs.environ, *(("LD_DEBUG=files",) if discover else ()))
    act = Execute(path=needs.program.path, argv=needs.argv, environ=environ)
    # Named as shared: whoever starts at the same moment has this uid, too. Nothing is ever killed by it.
    shared = identity.how.startswith("shared")
    lock = needs.reaper_lock or f"{host.state_dir}/reaper.lock"
    reap = Reap(uid=identity.uid, gid=identity.gid, reaper_uid=identity.reaper_uid, lock=lock)
    ids = SetIds(uid=identity.uid, gid=identity.gid)
    resources = _resources(needs, host, log_kib=_LOG_KIB_DRY if discover else LOG_KIB)
    if needs.restricted:
        user = NewUser(uid=identity.uid, gid=identity.gid)
        own = Filter(program=seccomp.program(host.processor, network=needs.keep_net))
        rest: tuple[Step, ...] = (
            BecomeInit(),
            *_limits(needs),
            user,
            DropCapabilities(),
            ids,
            NoNewPrivs(),
            own,
            act,
        )
        after: tuple[Step, ...] = (_empty(enclosed),)
    else:
        # Never root, no capability, killed whole: that much is not for sale. All else is off, as asked.
        enclosed = _listen(needs, host)
        rest, after = (BecomeInit(), DropCapabilities(), ids, NoNewPrivs(), _unrestricted(act, needs)), ()
    return Plan(
        domain=needs.name,
        domid=host.domid,
        restricted=needs.restricted,
        shared=shared,
        keep_net=needs.keep_net,
        steps=(*(() if shared else (reap,)), *resources, *enclosed, *rest),
        after=after,
    )


def _listen(needs: Needs, host: Host) -> tuple[ListenUnix, ...]:
    """Two monitors: QEMU serves one client of each at a time, and the watcher's stays connected."""
    own = tuple(
        ListenUnix(role=role, path=f"{directory(host)}/{role}", number=number)
        for role, number in (("qmp", QMP_FD), ("events", EVENTS_FD))
    )
    return (*own, *needs.listens)


def _resources(needs: Needs, host: Host, *, log_kib: int) -> tuple[Step, ...]:
    """Everything that is opened while the host is visible."""
    steps: list[Step] = []
    if not any(step.number == 0 for step in needs.takes):
        steps.append(OpenFile(role="stdin", path="/dev/null", access="ro", kind="char", number=0, rdev=_NULL))
    steps += [*needs.files, *(private.source for private in needs.privates), *needs.takes]
    if needs.own_log:
        steps.append(MakeFifo(role="log", path=f"{directory(host)}/log", numbers=(1, 2), size_kib=log_kib))
    steps.append(MakeCgroup(path=_cgroup(host), version=host.cgroup_version))
    return tuple(steps)


def _enclose(needs: Needs, host: Host, identity: Identity, *, binds: str) -> tuple[Step, ...]:
    """Namespaces and the private root. ``binds`` is the runtime folder; "" binds the host's own for a dry run."""
    spaces = tuple(name for name in NAMESPACES if not (needs.keep_net and name == "net"))
    steps: list[Step] = [
        Unshare(namespaces=spaces),
        *_listen(needs, host),
        MakeRoot(mountpoint=directory(host), size_kib=64, inodes=48),
        MakeDir(path="/dev"),
        MakeNode(path="/dev/null", major=1, minor=3, mode=0o666, uid=0, gid=0),
    ]
    own = {"mode": 0o600, "uid": identity.uid, "gid": identity.gid}
    if needs.accel == "kvm":
        major, minor = host.kvm_node
        steps.append(MakeNode(path="/dev/kvm", major=major, minor=minor, **own))
    if needs.xen_nodes:
        steps.append(MakeDir(path="/dev/xen"))
        steps += [
            MakeNode(path=f"/dev/xen/{name}", major=major, minor=minor, **own) for name, major, minor in needs.xen_nodes
        ]
    if needs.ptys:
        steps += [
            MakeDir(path="/dev/pts"),
            BindTree(source="/dev/pts", target="/dev/pts", devices=True),
            MakeNode(path="/dev/ptmx", major=5, minor=2, **own),
        ]
    for name in host.root_dirs:
        steps += [MakeDir(path=f"/{name}"), BindTree(source=f"{binds}/{name}", target=f"/{name}")]
    steps += [MakeLink(path=f"/{name}", target=target) for name, target in host.root_links]
    if needs.privates:
        kib = sum(private.size // 1024 + 64 for private in needs.privates)
        steps += [MakeDir(path=PRIVATE), MakePrivate(path=PRIVATE, size_kib=kib)]
        folders = {private.target.rpartition("/")[0] for private in needs.privates} - {PRIVATE}
        steps += [MakeDir(path=folder) for folder in sorted(folders)]
        steps += [
            CopyFile(role=private.source.role, path=private.target, uid=identity.uid, gid=identity.gid)
            for private in needs.privates
        ]
    return (*steps, PivotRoot(), SetHostname(name="depriv"))


def _empty(enclosed: tuple[Step, ...]) -> EmptyRoot:
    """Undo the root: all that is mounted in it, and every name but /dev/null."""
    detach: list[str] = []
    remove: list[str] = []
    for step in enclosed:
        match step:
            case BindTree():
                detach.append(step.target)
                remove.append(step.target)
            case MakePrivate():
                detach.append(step.path)
                remove.append(step.path)
            case MakeLink():
                remove.append(step.path)
            case MakeNode() if step.path != "/dev/null":
                remove.append(step.path)
            case MakeDir() if step.path == "/dev/xen":
                remove.append(step.path)
            case _:
                pass
    # What is in a folder before the folder.
    remove.sort(key=lambda path: -path.count("/"))
    return EmptyRoot(detach=tuple(detach), remove=tuple(remove))


def _unrestricted(act: Execute, needs: Needs) -> Execute:
    """With dm_restrict=0 there is no private root: kernel, ramdisk and firmware are read where they lie."""
    replaced = {private.target: private.source.path for private in needs.privates}
    words = list(act.argv)
    at = words.index("-sandbox")
    del words[at : at + 2]
    return act.replace(argv=tuple(replaced.get(word, word) for word in words))


def _limits(needs: Needs) -> tuple[SetLimit, ...]:
    """Return the limits: as tight as a guest that uses everything it was given allows.

    FSIZE follows the largest writable file, so that no write of the guest fails by it (libxl's fixed 256 KiB made raw
    writes beyond it fail, and every qcow2 write). At least 4 MiB: QEMU 10 keeps a 1.2 MB display surface in a memfd.
    NPROC counts threads: one per vCPU, up to 64 workers of the I/O pool (util/thread-pool.c), some of QEMU's own.
    NOFILE holds QEMU's own, two monitors with a client each, and for each image what locking and reopening takes.
    AS: guest RAM, 1 GiB of translated code (accel/tcg), 8 MiB of stack per thread, 8 malloc arenas, libraries.
    """
    threads = needs.vcpus + 64 + 16
    handed = len(needs.files) + len(needs.takes) + len(needs.listens)
    # Each request in flight is a coroutine with 1 MiB of stack (util/coroutine-ucontext.c), 256 to a queue, and
    # virtio-blk has a queue per vCPU, each with an ioeventfd.
    mapped = _XEN_MAPPED_MIB if needs.xen_domid else 0
    values = {
        "AS": (needs.memory_mib + mapped + 1024 + 8 * threads + 8 * 128 + 1024 + 256 * needs.queues) * _MIB,
        "CORE": 0,
        "FSIZE": max(needs.file_bytes_max, 4 * _MIB),
        "LOCKS": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "NICE": 0,
        "NOFILE": 130 + 8 * handed + 2 * needs.queues,
        "NPROC": threads,
        "RTPRIO": 0,
        "SIGPENDING": 64,
        "STACK": 8 * _MIB,  # of each thread, too: glibc takes it for the default
    }
    return tuple(SetLimit(name=name, value=value) for name, value in values.items())


def _runtime_key(needs: Needs, host: Host) -> tuple[str, ...]:
    """Return what the set of files that QEMU loads always depends on."""
    program = needs.program
    return (
        f"program {program.path} {program.dev}:{program.ino} {program.size} {program.mtime_ns}",
        f"dirs {host.root_dirs!r} {host.root_links!r}",
    )


def _numbers(pids: tuple[int, ...]) -> str:
    shown = " ".join(map(str, pids[:10]))
    return f"{shown} and {len(pids) - 10} more" if len(pids) > 10 else shown
