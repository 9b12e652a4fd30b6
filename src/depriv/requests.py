# SPDX-License-Identifier: Apache-2.0
"""Decide, for a command line: what it comes to and host facts in, the whole launch out. Pure."""

from __future__ import annotations

from depriv.assembly import (
    Launch,
    Needs,
    Private,
    assemble,
    choose_accel,
    identity_of,
    refuse_no_cgroup,
    refuse_program,
    shared_warning,
    time_zone,
)
from depriv.check import SANDBOX
from depriv.errors import PlanError
from depriv.openings import OpenTap, StartPasst, WriteFile
from depriv.qemu.cmdline import EVENTS_FD, QMP_FD
from depriv.qemu.options import OPTIONS
from depriv.qemu.words import parse_json, parse_list, parse_words, values
from depriv.records import Record
from depriv.steps import OpenFile, TakeFd
from depriv.storage import ImageFile, refuse_in_use

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.host import Host
    from depriv.openings import Opening
    from depriv.qemu.draft import Request
    from depriv.qemu.words import Word

SOURCE_BASE = 300  # the toolstack holds what QEMU gets as descriptor N as 300 + N, or from a higher number on
HELD = ".depriv"  # behind a socket's name until QEMU is audited: nobody says `cont` to it before
_MIB = 1 << 20
_OUTPUT_BYTES_MAX = 256 * _MIB  # of a file that QEMU writes its own words or the guest's into
_UNKNOWN_BYTES_MAX = 2 << 40  # formats that grow, and whose size only QEMU can tell
_GROWING = ("vmdk", "vdi", "vpc", "vhdx", "qed", "qcow", "parallels", "luks")


class Run(Record):
    """A command line, and what its caller wants of depriv beside it."""

    name: str
    request: Request
    device_model_user: str = ""
    keep_net: bool = False
    source_base: int = SOURCE_BASE
    reaper_lock: str = ""  # "": the registry's own


def plan_run(run: Run, host: Host) -> Launch:
    """Return how a command line is started.

    Raises:
        PlanError: the host lacks something.
        ConfigError: a disk is in use. In both cases nothing has been touched.
    """
    return _plan(run, host, discover=False)


def plan_run_discovery(run: Run, host: Host) -> Launch:
    """Return the dry run of it: the same jail, the host's own program folders, no disks, everything traced."""
    return _plan(run, host, discover=True)


def _plan(run: Run, host: Host, *, discover: bool) -> Launch:
    request = run.request
    refuse_program(host, fix="name a QEMU system emulator that is installed")
    refuse_no_cgroup(host)
    _refuse_memory(run, host)
    accel = "xen" if request.domid else choose_accel(request.accel, host)
    identity = identity_of(host, run.device_model_user)
    images = [
        ImageFile(role=disk.role, facts=disk.facts, format=disk.format, writable=disk.writable)
        for disk in request.disks
    ]
    refuse_in_use([(image, {}) for image in images], host.holdings, readonly="readonly=on")
    warnings = [note.text for note in request.notes if note.warning]
    if run.keep_net:
        warnings.append("--keep-net: QEMU stays in the host's network: whoever takes it over can connect to anything")
    needs = Needs(
        name=run.name,
        program=host.program,
        argv=_argv(run, host, discover=discover),
        accel=accel,
        memory_mib=request.memory_mib,
        vcpus=request.vcpus,
        environ=(
            time_zone(host.utc_offset_s if _wants_localtime(request) else 0),
            # Else QEMU until 8.1 tries each sound server of the host for a card without audiodev=. See audio/audio.c.
            "QEMU_AUDIO_DRV=none",
            *((f"XEN_DOMAIN_ID={request.domid}",) if request.domid else ()),
        ),
        takes=() if discover else _takes(request, run.source_base),
        files=() if discover else request.files,
        listens=() if discover else tuple(step.replace(path=step.path + HELD) for step in request.listens),
        privates=_privates(request),
        images=tuple(image.hold for image in images),
        queues=request.vcpus * len(images),
        file_bytes_max=max([_memory_file(request), *map(_bytes_max, images), *map(_written_max, request.openings)]),
        own_log=discover or request.daemonize or bool(request.domid),
        keep_net=run.keep_net,
        ptys=request.ptys,
        xen_nodes=host.xen_nodes if request.domid else (),
        xen_domid=request.domid,
        runtime_key=_runtime_key(request, accel),
        reaper_lock=run.reaper_lock,
        warnings=(*warnings, *shared_warning(identity)),
    )
    return assemble(needs, host, identity, discover=discover)


def _refuse_memory(run: Run, host: Host) -> None:
    if host.memory_mib and run.request.memory_mib > host.memory_mib:
        raise PlanError(
            f"-m {run.request.memory_mib} (MiB) is more than this host has",
            cause=f"the host has {host.memory_mib} MiB",
            fix="lower -m",
        )


def _argv(run: Run, host: Host, *, discover: bool) -> tuple[str, ...]:
    """Return QEMU's words: ours first, so that what the caller says comes last and counts where both may be said."""
    request = run.request
    words = [host.program.path, "-no-user-config", "-S"]
    if discover and request.domid:
        return (*words, "-nodefaults", "-xen-domid-restrict", "-L", "help")
    if host.program.seccomp or not request.domid:
        words += ["-sandbox", SANDBOX]
    if not request.name:
        words += ["-name", f"guest={run.name}"]
    for name, number in (("qmp", QMP_FD), ("events", EVENTS_FD)):
        words += ["-chardev", f"socket,id=depriv-{name},fd={number},server=on,wait=off"]
        words += ["-mon", f"chardev=depriv-{name},mode=control"]
    if discover:
        return (*words, *request.dry, "-trace", "enable=load_file")
    return (*words, *request.argv)


def _takes(request: Request, base: int) -> tuple[TakeFd, ...]:
    """Return what the jail takes from the toolstack: the standard streams, and all that it has opened."""
    takes: list[TakeFd] = []
    if not (request.daemonize or request.domid):
        takes += [TakeFd(role="stdout", source=1, number=1), TakeFd(role="stderr", source=2, number=2)]
        if request.stdio:
            takes.insert(0, TakeFd(role="stdin", source=0, number=0))
    for opening in request.openings:
        numbers = opening.numbers if isinstance(opening, OpenTap) else (opening.number,)
        takes += [
            TakeFd(role=_role(opening, place), source=base + number, number=number)
            for place, number in enumerate(numbers)
            if number >= 0
        ]
    return tuple(takes)


def _role(opening: Opening, place: int) -> str:
    return opening.role if place == 0 else f"{opening.role}-queue{place}"


def _privates(request: Request) -> tuple[Private, ...]:
    return tuple(
        Private(
            source=OpenFile(
                role=item.role,
                path=item.source,
                access="ro",
                kind="file",
                number=-1,
                dev=item.facts.dev,
                ino=item.facts.ino,
            ),
            target=item.target,
            size=item.facts.size,
        )
        for item in request.privates
    )


def _bytes_max(image: ImageFile) -> int:
    """Return what RLIMIT_FSIZE has to allow for one image."""
    if not image.writable:
        return 0
    return _UNKNOWN_BYTES_MAX if image.format in _GROWING else image.size_max


def _memory_file(request: Request) -> int:
    """Return what RLIMIT_FSIZE has to allow for memory in a memfd: it counts as a file."""
    memfd = any("memory-backend-memfd" in word for word in request.argv)
    return request.memory_mib * _MIB if memfd else 0


def _wants_localtime(request: Request) -> bool:
    """Tell whether the guest's clock is to show the host's local time: the last ``base=`` of all -rtc counts."""
    clocks = [word for before, word in zip(request.argv, request.argv[1:], strict=False) if before == "-rtc"]
    bases = [item for clock in clocks for item in clock.split(",") if item.startswith("base=")]
    return bases[-1:] == ["base=localtime"]


def _written_max(opening: Opening) -> int:
    return _OUTPUT_BYTES_MAX if isinstance(opening, WriteFile) else 0


def _runtime_key(request: Request, accel: str) -> tuple[str, ...]:
    """Return what decides which files QEMU loads: kinds of devices and backends, never names, sizes and addresses.

    Else every change of a kernel's command line would cost a dry run and a copy of QEMU's files.
    """
    if request.domid:
        return ("xen",)  # all that this QEMU has
    kinds: set[str] = set()
    takes_value = {name: option.takes_value for name, option in OPTIONS.items()}
    for word in parse_words(request.dry, takes_value):
        if word.name in _VALUED:
            kinds.add(f"-{word.name} {_kind(word)}")
        elif word.name not in _NO_FILES:
            kinds.add(f"-{word.name}")
    loaded = sorted(f"{item.target} {item.facts.magic or 'other'}" for item in request.privates)
    return (f"machine {request.machine} accel {accel}", *sorted(kinds), *loaded)


# Options whose value says what is loaded; of all others the name says enough.
_VALUED = (
    "device", "machine", "M", "vga", "display", "vnc", "k", "bios", "audiodev", "object", "netdev", "nic", "net", "cpu",
    "accel", "global", "chardev", "L", "usbdevice", "option-rom", "drive",
)  # fmt: skip
# Options that load nothing, whatever they say.
_NO_FILES = (
    "m", "smp", "name", "uuid", "rtc", "append", "numa", "overcommit", "mem-prealloc", "boot", "msg", "action",
    "watchdog-action", "no-shutdown", "no-reboot", "no-acpi", "no-hpet", "compat", "seed", "echr", "icount", "smbios",
    "only-migratable", "mon",
)  # fmt: skip
_FILES = ("romfile", "rom", "bios", "firmware", "model", "driver", "qom-type", "type", "backend", "if")


def _kind(word: Word) -> str:
    """Return the part of an option's value that decides which files are loaded."""
    if word.name in ("machine", "M", "k", "bios", "L", "global", "option-rom"):
        return word.value
    data = parse_json(word) if word.value.startswith("{") else values(parse_list(word, implied="driver"))
    return " ".join(f"{key}={data[key]}" for key in sorted(data) if key in _FILES)


def passts(request: Request) -> tuple[StartPasst, ...]:
    """Return the user-mode networks that are wanted."""
    return tuple(item for item in request.openings if isinstance(item, StartPasst))
