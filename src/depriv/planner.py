# SPDX-License-Identifier: Apache-2.0
"""Decide: configuration and host facts in, the whole launch out. Pure: the same arguments give the same plan."""

from __future__ import annotations

from depriv import storage
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
from depriv.errors import ConfigError, PlanError
from depriv.qemu.cmdline import PRIVATE, Image, command_line
from depriv.steps import OpenFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from depriv.config import Domain
    from depriv.host import Holding, Host

_DISK_FD = 10
_PRIVATE_FILES = ("kernel", "ramdisk", "firmware")


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
    accel = choose_accel(config.accel, host)
    identity = identity_of(host, config.device_model_user)
    warnings = [note.text for note in config.notes if note.warning]
    if not config.dm_restrict and not any(note.key == "dm_restrict" and note.warning for note in config.notes):
        warnings.append(
            "dm_restrict = 0: QEMU keeps a uid of its own and no capability, but runs WITHOUT namespaces, empty root, "
            "limits and sandbox"
        )
    warnings += shared_warning(identity)
    chains = storage.chains(config, host, warnings)
    files = [file for chain in chains for file in chain]
    handed = () if discover else tuple(file.step(_DISK_FD + place) for place, file in enumerate(files))
    needs = Needs(
        name=config.name,
        program=host.program,
        argv=command_line(
            config, program=host.program.path, accel=accel, images=_images(config, chains), discover=discover
        ),
        restricted=config.dm_restrict,
        accel=accel,
        memory_mib=config.memory_mib,
        vcpus=config.vcpus,
        environ=(time_zone((host.utc_offset_s if config.localtime else 0) + config.rtc_timeoffset_s),),
        files=handed,
        privates=_privates(config, host),
        images=tuple(file.hold for file in files),
        queues=config.vcpus * len(config.disks),
        file_bytes_max=max((file.size_max for file in files if file.writable), default=0),
        runtime_key=_runtime_key(config, host, accel),
        warnings=tuple(warnings),
    )
    return assemble(needs, host, identity, discover=discover)


def _privates(config: Domain, host: Host) -> tuple[Private, ...]:
    """Return kernel, ramdisk and firmware as copies in QEMU's root."""
    made: list[Private] = []
    for name in _PRIVATE_FILES:
        path: str = getattr(config, name)
        if path:
            facts = storage.private_file(config, host, name, path)
            source = OpenFile(role=name, path=path, access="ro", kind="file", number=-1, dev=facts.dev, ino=facts.ino)
            made.append(Private(source=source, target=f"{PRIVATE}/{name}", size=facts.size))
    return tuple(made)


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
    refuse_program(
        host,
        fix="name a QEMU system emulator in device_model_override"
        if config.device_model_override
        else "apt-get install --no-install-recommends qemu-system-x86",
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
    refuse_no_cgroup(host)
    refuse_name(config.name, host.holdings, config.place("name"))


def refuse_name(name: str, holdings: tuple[Holding, ...], place: dict[str, Any]) -> None:
    """Refuse a name that a domain has.

    Raises:
        ConfigError: whose it is.
    """
    for other in holdings:
        if other.name == name and not other.name_free:
            raise ConfigError(
                f"a domain named {name!r} exists (domid {other.domid})",
                cause="it is only just being started, or waits to be started again: see depriv list"
                if not other.uid
                else "",
                fix=f"choose another name=, or end it: depriv destroy {name}",
                **place,
            )


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
    return (
        f"machine {config.machine} accel {accel}",
        "devices " + " ".join(sorted({f"{disk.vdev[:-1]}:{int(disk.cdrom)}" for disk in config.disks})),
        f"kernel {host.file(config.kernel).magic or 'other' if config.kernel else 'none'}",
        f"firmware {'own' if config.firmware else 'default'}",
        f"arguments {config.device_model_args!r}",
    )
