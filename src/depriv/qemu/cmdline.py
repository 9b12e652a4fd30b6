# SPDX-License-Identifier: Apache-2.0
"""QEMU's command line, from a configuration and the descriptors it will find. Pure.

Everything that names a resource of the host is a descriptor ("/dev/fdset/N") or a private file below /private.
Sources: qemu-options.hx and qapi/block-core.json, QEMU 7.2.
"""

from __future__ import annotations

import json

from depriv.check import SANDBOX
from depriv.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.config import Disk, Domain

QMP_FD = 3  # the monitor that takes commands
EVENTS_FD = 4  # a second one, on which the watcher waits for the guest's end without holding up any command
CONSOLE_BYTES = 1 << 20  # the guest's output that is kept; the oldest goes first
PRIVATE = "/private"
IDE_PORTS = {"pc": 4, "q35": 6, "microvm": 0}


class Image(Record):
    """One file of a disk's chain as QEMU is to find it."""

    role: str  # node name of its format layer: "xvda", "xvda-1", ...
    number: int  # descriptor
    driver: str  # "file" or "host_device"
    format: str
    readonly: bool


def command_line(
    config: Domain, *, program: str, accel: str, images: tuple[tuple[Image, ...], ...], discover: bool = False
) -> tuple[str, ...]:
    """Return QEMU's words.

    Args:
        config: What is wanted; its disks and ``images`` correspond, one chain per disk, empty for an empty drive.
        program: What QEMU sees as its own name.
        accel: "tcg" or "kvm".
        images: The chains, nearest layer first.
        discover: Use empty disks and print which files QEMU loads: the dry run that finds out what its root has to
            hold (see :mod:`depriv.runtime`).
    """
    argv = [program, "-name", f"guest={config.name}", "-sandbox", SANDBOX, "-nodefaults", "-no-user-config", "-S"]
    argv += [*_endings(config), "-display", "none"]
    argv += ["-machine", _machine(config), "-accel", accel]
    if accel == "kvm":
        argv += ["-cpu", "host"]
    argv += ["-m", f"size={config.memory_mib}M", "-smp", f"cpus={config.vcpus}"]
    argv += ["-rtc", "base=localtime" if config.localtime or config.rtc_timeoffset_s else "base=utc"]
    if config.uuid:
        argv += ["-uuid", config.uuid]
    for name, number in (("qmp", QMP_FD), ("events", EVENTS_FD)):
        argv += ["-chardev", f"socket,id={name},fd={number},server=on,wait=off", "-mon", f"chardev={name},mode=control"]
    if config.serial:
        argv += ["-chardev", f"ringbuf,id=console,size={CONSOLE_BYTES}", "-serial", "chardev:console"]
    for name, option in (("kernel", "-kernel"), ("ramdisk", "-initrd"), ("firmware", "-bios")):
        if getattr(config, name):
            argv += [option, f"{PRIVATE}/{name}"]
    if config.kernel and config.cmdline:
        argv += ["-append", config.cmdline]
    argv += _disks(config, images, discover=discover)
    if discover:
        argv += ["-trace", "enable=load_file"]
    return (*argv, *config.device_model_args)


def _endings(config: Domain) -> list[str]:
    """Return what QEMU does when the guest ends: it stops and stays, so that whoever comes later still sees how.

    A reset with on_reboot="restart" is QEMU's own, in place; otherwise -no-reboot makes it a shutdown with reason
    "guest-reset". A write of 1 to pvpanic's port stops the guest as "guest-panicked": with -no-shutdown a panic's
    action "shutdown", the default, is a pause. microvm is without it: that machine has what a kernel cannot do without.
    Source: qemu_system_guest_panicked and qemu_system_reset_request, softmmu/runstate.c; hw/misc/pvpanic-isa.c
    (port 0x505); QEMU 7.2. tests/qemu/test_endings_qemu.py holds QEMU to it.
    """
    argv = ["-no-shutdown"]
    if config.on_reboot != "restart":
        argv.append("-no-reboot")
    own = any(word.partition(",")[0] == "pvpanic" for word in config.device_model_args)  # QEMU refuses a second one
    if config.machine != "microvm" and not own:
        argv += ["-device", "pvpanic"]
    return argv


def _machine(config: Domain) -> str:
    if config.machine == "microvm":
        return "microvm"  # its ACPI tables are what a kernel finds virtio-mmio devices by; rtc and pit stay on
    return f"{config.machine},usb=off,vmport=off" + ("" if config.acpi else ",acpi=off")


def _disks(config: Domain, images: tuple[tuple[Image, ...], ...], *, discover: bool) -> list[str]:
    argv: list[str] = []
    if any(disk.vdev.startswith("sd") for disk in config.disks):
        argv += ["-device", f"virtio-scsi-{'device' if config.machine == 'microvm' else 'pci'},id=scsi"]
    order = _boot_order(config)
    for disk, chain in zip(config.disks, images, strict=True):
        for image in reversed(chain):
            below = chain[chain.index(image) + 1].role if image is not chain[-1] else None
            argv += _empty_node(image, disk) if discover else _nodes(image, below, disk)
        argv += ["-device", _device(config.machine, disk, order)]
    return argv


def _boot_order(config: Domain) -> dict[str, int]:
    """Return vdev -> bootindex, in the order of the letters of boot= and then of the disks.

    A kernel takes place 0 for itself (the linuxboot ROM, hw/i386/x86.c, QEMU 7.2), and QEMU refuses a place twice.
    """
    order: dict[str, int] = {}
    if config.kernel:
        return order
    for letter in config.boot:
        for disk in config.disks:
            if disk.cdrom == (letter == "d") and letter in "cd":
                order.setdefault(disk.vdev, len(order))
    return order


def _nodes(image: Image, below: str | None, disk: Disk) -> list[str]:
    """Return the protocol and format nodes of one image: every property named, nothing left to probing.

    ``locking`` is on, not auto: auto turns itself off when /dev/null cannot be opened. ``auto-read-only`` is off: with
    it QEMU opens twice, with different flags. ``backing`` is always given, so that the header's is never followed.
    """
    readonly = image.readonly
    protocol: dict[str, object] = {
        "driver": image.driver,
        "node-name": f"{image.role}-file",
        "filename": f"/dev/fdset/{image.number}",
        "read-only": readonly,
        "auto-read-only": False,
        "locking": "on",
        "aio": "threads",
    }
    node: dict[str, object] = {
        "driver": image.format,
        "node-name": image.role,
        "file": f"{image.role}-file",
        "read-only": readonly,
        "auto-read-only": False,
    }
    if image.format == "qcow2":
        node["backing"] = below
    if disk.discard and not readonly:
        protocol["discard"] = node["discard"] = "unmap"
    argv = ["-add-fd", f"fd={image.number},set={image.number}"]
    for item in (protocol, node):
        argv += ["-blockdev", json.dumps(item, separators=(",", ":"))]
    return argv


def _empty_node(image: Image, disk: Disk) -> list[str]:
    if image.role != disk.vdev:
        return []
    node = {"driver": "null-co", "node-name": image.role, "size": 1 << 20, "read-only": image.readonly}
    return ["-blockdev", json.dumps(node, separators=(",", ":"))]


def _device(machine: str, disk: Disk, order: dict[str, int]) -> str:
    """Return the -device that makes the vdev: xvd is virtio-blk, hd is IDE or AHCI, sd is SCSI."""
    number = ord(disk.vdev[2]) - ord("a")
    kind = "cd" if disk.cdrom else "hd"
    if disk.vdev.startswith("xvd"):
        words = [f"virtio-blk-{'device' if machine == 'microvm' else 'pci'}"]
    elif disk.vdev.startswith("sd"):
        words = [f"scsi-{kind}", "bus=scsi.0", f"scsi-id={number}"]
    elif machine == "q35":
        words = [f"ide-{kind}", f"bus=ide.{number}", "unit=0"]
    else:
        words = [f"ide-{kind}", f"bus=ide.{number // 2}", f"unit={number % 2}"]
    words.append(f"id={disk.vdev}")
    if disk.target:
        words.append(f"drive={disk.vdev}")
    if disk.vdev in order:
        words.append(f"bootindex={order[disk.vdev]}")
    return ",".join(words)
