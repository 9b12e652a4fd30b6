# SPDX-License-Identifier: Apache-2.0
"""Decide: configuration and host facts in, the whole launch out. Pure: the same arguments give the same plan."""

from __future__ import annotations

from depriv import storage
from depriv.check import check
from depriv.errors import ConfigError, PlanError
from depriv.identity import Identity, choose
from depriv.qemu.cmdline import EVENTS_FD, PRIVATE, QMP_FD, Image, command_line
from depriv.records import Record
from depriv.steps import (
    NAMESPACES,
    BecomeInit,
    BindTree,
    CopyFile,
    DropCapabilities,
    EmptyRoot,
    Execute,
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
    Unshare,
)
from depriv.text import digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.config import Domain
    from depriv.host import Holding, Host
    from depriv.steps import Step

LOG_KIB = 64
_DISK_FD = 10
_MIB = 1 << 20


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


def plan(config: Domain, host: Host) -> Launch:
    """Return how ``config`` is started on ``host``.

    Raises:
        ConfigError: the configuration asks for what cannot be, or names a file that is not fit.
        PlanError: the host lacks something. In both cases nothing has been touched.
    """
    return _plan(config, host, discover=False)


def plan_discovery(config: Domain, host: Host) -> Launch:
    """Return the dry run of ``config``: the same jail, the host's own program folders, no disks, everything traced.

    It is how :mod:`depriv.runtime` asks QEMU and the dynamic linker which files this machine needs.
    """
    return _plan(config, host, discover=True)


def _plan(config: Domain, host: Host, *, discover: bool) -> Launch:
    _check_domain(config, host)
    config = _with_firmware(config, host)
    accel = _accel(config, host)
    taken = tuple((other.name, other.uid, other.gid) for other in host.holdings)
    identity = choose(device_model_user=config.device_model_user, domid=host.domid, accounts=host.accounts, taken=taken)
    _refuse_strangers(config, host, identity)
    warnings = _warnings(config, identity)
    chains = storage.chains(config, host, warnings)
    key = _runtime_key(config, host, accel)
    runtime = f"{host.cache_dir}/runtime/{digest(key)}"
    argv = command_line(
        config, program=host.program.path, accel=accel, images=_images(config, chains), discover=discover
    )
    environ = ("LC_ALL=C", "MALLOC_ARENA_MAX=8", f"TZ={_time_zone(config, host)}")
    act = Execute(path=host.program.path, argv=argv, environ=(*environ, "LD_DEBUG=files") if discover else environ)
    resources = _resources(config, host, chains=() if discover else chains, log_kib=512 if discover else LOG_KIB)
    enclosed = _enclose(config, host, identity, accel=accel, binds="" if discover else runtime)
    made = _assemble(
        config, host, identity, resources=resources, enclosed=enclosed, limits=_limits(config, chains), act=act
    )
    try:
        check(made)
    except ValueError as error:
        raise PlanError("the configuration comes to a plan that no device model may have", cause=str(error)) from error
    return Launch(
        plan=made,
        identity=identity,
        accel=accel,
        directory=_directory(host),
        cgroup=_cgroup(host),
        runtime=runtime,
        runtime_key=key,
        images=tuple(dict.fromkeys(file.hold for chain in chains for file in chain)),
        warnings=tuple(warnings),
    )


def _directory(host: Host) -> str:
    return f"{host.state_dir}/domains/{host.domid}"


def _cgroup(host: Host) -> str:
    return f"{host.cgroup_dir}/{host.cgroup_folder}/{host.domid}"


def _warnings(config: Domain, identity: Identity) -> list[str]:
    warnings = [note.text for note in config.notes if note.warning]
    if not config.dm_restrict and not any(note.key == "dm_restrict" and note.warning for note in config.notes):
        warnings.append(
            "dm_restrict = 0: QEMU keeps a uid of its own and no capability, but runs WITHOUT namespaces, empty root, "
            "limits and sandbox"
        )
    if identity.how.startswith("shared"):
        warnings.append(
            f"device_model_user: uid {identity.uid} is SHARED with every domain that names it: a QEMU that is taken "
            "over can kill the others, and nothing of it is killed by uid"
        )
    return warnings


def _assemble(  # noqa: PLR0913 (the parts of a plan)
    config: Domain,
    host: Host,
    identity: Identity,
    *,
    resources: tuple[Step, ...],
    enclosed: tuple[Step, ...],
    limits: tuple[SetLimit, ...],
    act: Execute,
) -> Plan:
    """Put the parts into the order that check.py holds every plan to."""
    # Named as shared: whoever starts at the same moment has this uid, too. Nothing is ever killed by it.
    shared = identity.how.startswith("shared")
    lock = f"{host.state_dir}/reaper.lock"
    reap = Reap(uid=identity.uid, gid=identity.gid, reaper_uid=identity.reaper_uid, lock=lock)
    ids = SetIds(uid=identity.uid, gid=identity.gid)
    if config.dm_restrict:
        user = NewUser(uid=identity.uid, gid=identity.gid)
        rest: tuple[Step, ...] = (BecomeInit(), *limits, user, DropCapabilities(), ids, NoNewPrivs(), act)
        after: tuple[Step, ...] = (_empty(enclosed),)
    else:
        # Never root, no capability, killed whole: that much is not for sale. All else is off, as asked.
        enclosed = _listen(host)
        rest, after = (BecomeInit(), DropCapabilities(), ids, NoNewPrivs(), _unrestricted(act, config)), ()
    return Plan(
        domain=config.name,
        domid=host.domid,
        restricted=config.dm_restrict,
        shared=shared,
        steps=(*(() if shared else (reap,)), *resources, *enclosed, *rest),
        after=after,
    )


def _listen(host: Host) -> tuple[ListenUnix, ...]:
    """Two monitors: QEMU serves one client of each at a time, and the watcher's stays connected."""
    return tuple(
        ListenUnix(role=role, path=f"{_directory(host)}/{role}", number=number)
        for role, number in (("qmp", QMP_FD), ("events", EVENTS_FD))
    )


def _check_domain(config: Domain, host: Host) -> None:
    """Refuse what no plan can be made for, the most telling reason first."""
    if config.type != "hvm":
        raise PlanError(
            f"{config.name} is a {config.type.upper()} guest, and this host does not run Xen",
            cause=f"a {config.type.upper()} guest talks to the Xen hypervisor; QEMU alone cannot run it",
            fix='boot Xen and use xl, or make it a full virtual machine: type="hvm"',
        )
    if host.xen:
        raise PlanError(
            "this host runs Xen, and this version starts guests under KVM and QEMU's own emulation only",
            fix="use xl with dm_restrict=1 on this host",
        )
    if host.program.problem:
        raise PlanError(
            f"cannot run QEMU: {host.program.problem}",
            fix="apt-get install --no-install-recommends qemu-system-x86"
            if not config.device_model_override
            else "name a QEMU system emulator in device_model_override",
        )
    if host.memory_mib and config.memory_mib > host.memory_mib:
        raise ConfigError(
            f"memory={config.memory_mib} (MiB) is more than this host has",
            cause=f"the host has {host.memory_mib} MiB",
            fix="lower memory=",
            **config.place("memory"),
        )
    if config.machine not in ("pc", "q35", "microvm"):
        raise ConfigError(
            f"unknown machine {config.machine!r}", fix='machine="pc", "q35" or "microvm"', **config.place("machine")
        )
    if not host.cgroup_dir:
        raise PlanError(
            "no cgroup file system is mounted, so the guest's processes could not be killed as one",
            fix="mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        )
    refuse_name(config, host.holdings)


def refuse_name(config: Domain, holdings: tuple[Holding, ...]) -> None:
    """Refuse a name that a domain has.

    Raises:
        ConfigError: whose it is.
    """
    for other in holdings:
        if other.name == config.name and not other.name_free:
            raise ConfigError(
                f"a domain named {config.name!r} exists (domid {other.domid})",
                cause="it is only just being started, or waits to be started again: see depriv list"
                if not other.uid
                else "",
                fix=f"choose another name=, or end it: depriv destroy {config.name}",
                **config.place("name"),
            )


def _accel(config: Domain, host: Host) -> str:
    if config.accel == "kvm" and host.kvm_node == (0, 0):
        raise PlanError(
            'accel="kvm" but this host has no /dev/kvm',
            fix='load the kernel module (modprobe kvm_intel or kvm_amd), or set accel="tcg"',
        )
    if config.accel == "auto":
        return "kvm" if host.kvm and host.kvm_node != (0, 0) else "tcg"
    return config.accel


def _with_firmware(config: Domain, host: Host) -> Domain:
    """Return the configuration with bios="ovmf" as the image that this host has of it."""
    if config.bios != "ovmf" or config.firmware:
        return config
    if not host.ovmf:
        raise PlanError(
            'bios="ovmf" but this host has no OVMF image',
            fix="apt-get install --no-install-recommends ovmf, or name an image in firmware_override=",
        )
    return config.replace(firmware=host.ovmf)


def _resources(config: Domain, host: Host, *, chains: tuple[storage.Chain, ...], log_kib: int) -> tuple[Step, ...]:
    """Everything that is opened while the host is visible."""
    null = (1 << 8) | 3
    steps: list[Step] = [OpenFile(role="stdin", path="/dev/null", access="ro", kind="char", number=0, rdev=null)]
    files = [file for chain in chains for file in chain]
    steps += [file.step(_DISK_FD + place) for place, file in enumerate(files)]
    for name in ("kernel", "ramdisk", "firmware"):
        path: str = getattr(config, name)
        if path:
            facts = storage.private_file(config, host, name, path)
            steps.append(
                OpenFile(role=name, path=path, access="ro", kind="file", number=-1, dev=facts.dev, ino=facts.ino)
            )
    steps.append(MakeFifo(role="log", path=f"{_directory(host)}/log", numbers=(1, 2), size_kib=log_kib))
    steps.append(MakeCgroup(path=_cgroup(host), version=host.cgroup_version))
    return tuple(steps)


def _enclose(config: Domain, host: Host, identity: Identity, *, accel: str, binds: str) -> tuple[Step, ...]:
    """Namespaces and the private root. ``binds`` is the runtime folder; "" binds the host's own for a dry run."""
    steps: list[Step] = [
        Unshare(namespaces=NAMESPACES),
        *_listen(host),
        MakeRoot(mountpoint=_directory(host), size_kib=64, inodes=32),
        MakeDir(path="/dev"),
        MakeNode(path="/dev/null", major=1, minor=3, mode=0o666, uid=0, gid=0),
    ]
    if accel == "kvm":
        major, minor = host.kvm_node
        kvm = MakeNode(path="/dev/kvm", major=major, minor=minor, mode=0o600, uid=identity.uid, gid=identity.gid)
        steps.append(kvm)
    for name in host.root_dirs:
        steps += [MakeDir(path=f"/{name}"), BindTree(source=f"{binds}/{name}", target=f"/{name}")]
    steps += [MakeLink(path=f"/{name}", target=target) for name, target in host.root_links]
    files = [name for name in ("kernel", "ramdisk", "firmware") if getattr(config, name)]
    if files:
        kib = sum(host.file(getattr(config, name)).size // 1024 + 64 for name in files)
        steps += [MakeDir(path=PRIVATE), MakePrivate(path=PRIVATE, size_kib=kib)]
        steps += [CopyFile(role=name, path=f"{PRIVATE}/{name}", uid=identity.uid, gid=identity.gid) for name in files]
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
            case _:
                pass
    return EmptyRoot(detach=tuple(detach), remove=tuple(remove))


def _unrestricted(act: Execute, config: Domain) -> Execute:
    """With dm_restrict=0 there is no private root: kernel, ramdisk and firmware are read where they lie."""
    replaced = {f"{PRIVATE}/{name}": getattr(config, name) for name in ("kernel", "ramdisk", "firmware")}
    words = list(act.argv)
    at = words.index("-sandbox")
    del words[at : at + 2]
    return act.replace(argv=tuple(replaced.get(word, word) for word in words))


def _limits(config: Domain, chains: tuple[storage.Chain, ...]) -> tuple[SetLimit, ...]:
    """Return the limits: as tight as a guest that uses everything it was given allows.

    FSIZE follows the largest writable file, so that no write of the guest fails by it (libxl's fixed 256 KiB made raw
    writes beyond it fail, and every qcow2 write). At least 4 MiB: QEMU 10 keeps a 1.2 MB display surface in a memfd.
    NPROC counts threads: one per vCPU, up to 64 workers of the I/O pool (util/thread-pool.c), some of QEMU's own.
    NOFILE holds QEMU's own, two monitors with a client each, and for each image what locking and reopening takes.
    AS: guest RAM, 1 GiB of translated code (accel/tcg), 8 MiB of stack per thread, 8 malloc arenas, libraries.
    """
    largest = max((file.size_max for chain in chains for file in chain if file.writable), default=0)
    threads = config.vcpus + 64 + 16
    # Each request in flight is a coroutine with 1 MiB of stack (util/coroutine-ucontext.c), 256 to a queue, and
    # virtio-blk has a queue per vCPU, each with an ioeventfd.
    queues = config.vcpus * len(config.disks)
    values = {
        "AS": (config.memory_mib + 1024 + 8 * threads + 8 * 128 + 1024 + 256 * queues) * _MIB,
        "CORE": 0,
        "FSIZE": max(largest, 4 * _MIB),
        "LOCKS": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "NICE": 0,
        "NOFILE": 130 + 8 * sum(len(chain) for chain in chains) + 2 * queues,
        "NPROC": threads,
        "RTPRIO": 0,
        "SIGPENDING": 64,
        "STACK": 8 * _MIB,  # of each thread, too: glibc takes it for the default
    }
    return tuple(SetLimit(name=name, value=value) for name, value in values.items())


def _images(config: Domain, chains: tuple[storage.Chain, ...]) -> tuple[tuple[Image, ...], ...]:
    number = _DISK_FD
    result: list[tuple[Image, ...]] = []
    for disk, chain in zip(config.disks, chains, strict=True):
        images: list[Image] = []
        for depth, file in enumerate(chain):
            role = disk.vdev if depth == 0 else f"{disk.vdev}-{depth}"
            images.append(
                Image(role=role, number=number, driver=file.driver, format=file.format, readonly=not file.writable)
            )
            number += 1
        result.append(tuple(images))
    return tuple(result)


def _runtime_key(config: Domain, host: Host, accel: str) -> tuple[str, ...]:
    """Return everything on which the set of files that QEMU loads depends."""
    program = host.program
    return (
        f"program {program.path} {program.dev}:{program.ino} {program.size} {program.mtime_ns}",
        f"machine {config.machine} accel {accel}",
        "devices " + " ".join(sorted({f"{disk.vdev[:-1]}:{int(disk.cdrom)}" for disk in config.disks})),
        f"kernel {host.file(config.kernel).magic or 'other' if config.kernel else 'none'}",
        f"firmware {'own' if config.firmware else 'default'}",
        f"arguments {config.device_model_args!r}",
        f"dirs {host.root_dirs!r} {host.root_links!r}",
    )


def _numbers(pids: tuple[int, ...]) -> str:
    shown = " ".join(map(str, pids[:10]))
    return f"{shown} and {len(pids) - 10} more" if len(pids) > 10 else shown


def _refuse_strangers(config: Domain, host: Host, identity: Identity) -> None:
    if identity.how.startswith("user") and host.strangers:
        raise PlanError(
            f"device_model_user {config.device_model_user!r} has processes already: {_numbers(host.strangers)}",
            cause="a uid is cleared before a device model gets it: they would be killed",
            fix="name a user that nothing else runs as",
        )


def _time_zone(config: Domain, host: Host) -> str:
    """Return TZ: there is no /etc/localtime in QEMU's root, where base=localtime would silently mean UTC."""
    offset = (host.utc_offset_s if config.localtime else 0) + config.rtc_timeoffset_s
    hours, rest = divmod(abs(offset), 3600)
    # POSIX counts the other way: west is positive.
    return f"DEPRIV{'-' if offset > 0 else '+'}{hours:02}:{rest // 60:02}:{rest % 60:02}" if offset else "UTC0"
