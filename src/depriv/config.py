# SPDX-License-Identifier: Apache-2.0
"""What is wanted: one domain, in the user's words but typed. Pure.

Files in xl.cfg(5)'s format become a ``Domain`` in :mod:`depriv.xlconfig`; a Python program makes one directly.
"""

from __future__ import annotations

from depriv.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Layer(Record):
    """One file below a disk in its backing chain, as the configuration names it."""

    target: str  # absolute path
    format: str  # "raw" or "qcow2"


class Disk(Record):
    """One disk or CD-ROM drive."""

    vdev: str  # canonical: "xvda", "hdc", "sdb", "d4p0" becomes its letter form
    target: str = ""  # absolute path; "" is an empty CD-ROM drive
    format: str = "raw"  # "raw" or "qcow2" ("empty" for an empty drive)
    readonly: bool = False
    cdrom: bool = False
    discard: bool = True
    direct_io_safe: bool = False
    chain: tuple[Layer, ...] = ()  # what the image is based on, nearest first; empty: it stands alone


class Vif(Record):
    """One network card as a vif specification asks for it."""

    mac: str = ""
    bridge: str = ""
    model: str = "rtl8139"
    type: str = "ioemu"  # "ioemu" or "vif"
    ip: str = ""
    script: str = ""
    vifname: str = ""
    backend: str = ""
    gatewaydev: str = ""
    forwarddev: str = ""
    rate: str = ""
    devid: int = -1  # -1: by position
    mtu: int = 0
    vlan: str = ""


class Note(Record):
    """Something the user should know: a key that is ignored and why, an unknown key, a restriction switched off."""

    key: str
    text: str
    source: str = ""  # "" is the domain's own
    line: int = 0
    column: int = 0
    warning: bool = False  # False: for the record only (`check`, `plan`); True: printed at every start


class Domain(Record):
    """One guest. The defaults are the strict ones; nothing here is read from the host."""

    name: str
    memory_mib: int = 128
    vcpus: int = 1
    machine: str = "pc"  # "pc", "q35" or "microvm"
    accel: str = "auto"  # "auto", "tcg" or "kvm"
    type: str = "hvm"  # "hvm", "pv" or "pvh": only hvm runs without Xen
    uuid: str = ""  # "": QEMU's own
    disks: tuple[Disk, ...] = ()
    vifs: tuple[Vif, ...] = ()
    kernel: str = ""  # absolute path, or ""
    ramdisk: str = ""
    cmdline: str = ""
    bios: str = ""  # "seabios" or "ovmf": which of the host's firmware images; "": the machine's own
    firmware: str = ""  # absolute path of a firmware image; "": the machine's own
    boot: str = "cd"  # letters of xl.cfg's boot=: c disk, d CD-ROM, n network
    serial: bool = True  # a serial port that writes into the console buffer
    acpi: bool = True
    localtime: bool = False
    rtc_timeoffset_s: int = 0
    dm_restrict: bool = True
    device_model_user: str = ""
    device_model_override: str = ""  # path of the QEMU binary; "": found on the host
    device_model_args: tuple[str, ...] = ()
    on_poweroff: str = "destroy"
    on_reboot: str = "restart"
    on_crash: str = "destroy"
    notes: tuple[Note, ...] = ()
    source: str = ""  # the file's name, for messages; "" for a Python program
    places: tuple[tuple[str, str, int, int, str], ...] = ()  # key or vdev, file, line, column, the line: for messages

    def place(self, key: str) -> dict[str, Any]:
        """Return where a key (or the disk with a vdev) stands in the file, as ``ConfigError`` takes it."""
        for name, source, line, column, text in self.places:
            if name == key:
                return {"source": source, "line": line, "column": column, "text": text}
        return {"source": self.source}
