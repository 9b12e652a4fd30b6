# SPDX-License-Identifier: Apache-2.0
"""Which QEMU options ``device_model_args`` may carry. Pure.

xl appends these words to QEMU's command line unseen, so they can undo every restriction. Here an option passes only if
it is known to name nothing of the host and to change nothing of the confinement: what cannot be told is refused.
Source: qemu-options.hx and softmmu/vl.c of QEMU 7.2, and the option lists up to QEMU 10.
"""

from __future__ import annotations

from depriv.xlcfg import Value, error_at
from depriv.xlspec import shown, split_items

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_IDENTITY = "it changes how QEMU is confined, which depriv has done before QEMU starts"
_LAUNCH = "depriv starts, watches and connects to QEMU itself"
_MONITOR = "whoever reaches a monitor commands QEMU; depriv keeps the only one"
_HOST_FILE = "it opens files of the host, and the device model sees none"
_HOST_NET = "it needs a network of the host, and the device model has none"
_DISPLAY = "this version has no display"
_PARAMETER = "depriv plans limits by it"
_DEBUG = "it lets QEMU, or who is connected to it, write or do more than a guest needs"
_DISK = "disks are opened by depriv and passed as descriptors"

# Every option of QEMU 7.2 to 10 that is refused for a reason: reason -> options, reason -> what to write instead.
_DENIED = {
    _IDENTITY: "runas chroot run-with sandbox daemonize enable-fips",
    _LAUNCH: "D pidfile S add-fd incoming loadvm preconfig only-migratable dump-vmstate no-shutdown no-reboot action"
    " name async-teardown compat nographic version help h help-all machine-help audio-help cpu-help",
    _MONITOR: "monitor qmp qmp-pretty mon chardev serial parallel debugcon virtioserial virtiocon echr",
    _HOST_FILE: "readconfig writeconfig fsdev virtfs virtfs_synth acpitable fw_cfg option-rom L dtb object tpmdev"
    " mem-path shim prom-env semihosting semihosting-config bt",
    _DISK: "drive hda hdb hdc hdd cdrom fda fdb sd mtdblock pflash blockdev snapshot iscsi",
    _HOST_NET: "netdev nic net redir tftp smb",
    _DISPLAY: "vnc spice display sdl curses gtk full-screen portrait rotate no-frame alt-grab ctrl-grab no-quit k"
    " audio audiodev soundhw g",
    _PARAMETER: "m smp machine M accel enable-kvm no-kvm mem-prealloc overcommit numa tb-size realtime no-acpi",
    _DEBUG: "trace d dfilter gdb s qtest qtest-log plugin singlestep one-insn-per-tb perfmap jitdump set seed"
    " enable-sync-profile icount msg",
    "Xen's own options are depriv's to give": "xen-domid xen-attach xen-create xen-domid-restrict",
}  # fmt: skip

_INSTEAD = {
    "m": "memory = MiB", "smp": "vcpus = N",
    "machine": 'machine = "pc" or "q35"', "M": 'machine = "pc" or "q35"',
    "accel": 'accel = "kvm" or "tcg"', "enable-kvm": 'accel = "kvm"', "no-kvm": 'accel = "tcg"',
    "name": 'name = "..."', "no-acpi": "acpi = 0", "serial": 'serial = "pty"', "nographic": 'serial = "pty"',
    "net": "vif = [...]", "netdev": "vif = [...]", "nic": "vif = [...]",
    "kernel": 'kernel = "/..."', "initrd": 'ramdisk = "/..."', "append": 'cmdline = "..."',
    "bios": 'bios_path_override = "/..."', "pflash": 'bios_path_override = "/..."',
    "drive": "disk = [...]", "hda": "disk = [...]", "hdb": "disk = [...]", "hdc": "disk = [...]",
    "hdd": "disk = [...]", "cdrom": "disk = [...]", "blockdev": "disk = [...]", "sd": "disk = [...]",
    "runas": 'device_model_user = "..."', "no-reboot": 'on_reboot = "destroy"', "action": "on_reboot and on_crash",
    "no-shutdown": 'on_poweroff = "preserve"',
}  # fmt: skip

# Devices which exist in QEMU's memory alone. A name ending in * stands for all that start so.
_DEVICES = (
    "e1000*", "rtl8139", "ne2k_pci", "ne2k_isa", "pcnet", "i82551", "i82557*", "i82558*", "i82559*", "vmxnet3", "tulip",
    "virtio-net-pci*", "virtio-balloon*", "virtio-rng*", "virtio-keyboard*", "virtio-mouse*", "virtio-tablet*",
    "virtio-scsi-pci*", "virtio-serial-pci*", "virtio-vga", "virtio-gpu-pci", "VGA", "secondary-vga", "cirrus-vga",
    "bochs-display", "ramfb", "isa-vga", "vmware-svga", "usb-tablet", "usb-mouse", "usb-kbd", "usb-hub", "usb-ehci",
    "qemu-xhci", "nec-usb-xhci", "piix3-usb-uhci", "piix4-usb-uhci", "pci-ohci", "ich9-usb-*", "ahci", "ich9-ahci",
    "lsi53c895a", "lsi53c810", "am53c974", "dc390", "mptsas1068", "megasas*", "pvscsi", "piix3-ide", "piix4-ide",
    "pcie-root-port", "ioh3420", "x3130-upstream", "xio3130-downstream", "pci-bridge", "pcie-pci-bridge",
    "i82801b11-bridge", "pxb", "pxb-pcie", "i6300esb", "ib700", "pvpanic*", "vmgenid", "vmcoreinfo", "isa-debug-exit",
    "intel-iommu", "pci-testdev", "edu", "sga",
)  # fmt: skip

# Parts of the machine itself, and disks that depriv attaches: -global may set their properties.
_PARTS = (
    "PIIX4_PM", "ICH9-LPC", "PIIX3", "i440FX-pcihost", "q35-pcihost", "mch", "kvm-pit", "kvm-apic", "apic", "ioapic",
    "isa-pit", "hpet", "mc146818rtc", "i8042", "vmmouse", "vmport", "isa-serial", "ide-hd", "ide-cd", "scsi-hd",
    "scsi-cd", "virtio-blk-pci", "usb-storage",
)  # fmt: skip

# Properties by which a device reaches out of QEMU's memory, and why they are refused wherever they stand.
_PROPERTIES = {
    "romfile": _HOST_FILE,
    "file": _HOST_FILE,
    "filename": _HOST_FILE,
    "path": _HOST_FILE,
    "mem-path": _HOST_FILE,
    "splash": _HOST_FILE,
    "memdev": _HOST_FILE,
    "mountpoint": _HOST_FILE,
    "drive": _DISK,
    "chardev": _MONITOR,
    "bmc": _MONITOR,
    "netdev": _HOST_NET,
    "rng": "the guest's random numbers come from QEMU's own source",
    "audiodev": _DISPLAY,
    "host": "it passes a device of the host through",
    "hostbus": "it passes a device of the host through",
    "hostaddr": "it passes a device of the host through",
    "hostdevice": "it passes a device of the host through",
    "sysfsdev": "it passes a device of the host through",
    "vhost": "vhost devices are reached through the kernel of the host",
    "vhostfd": "descriptors are depriv's to pass",
    "fd": "descriptors are depriv's to pass",
    "blob": "it needs /dev/udmabuf of the host",
}


def check_arguments(items: tuple[Value, ...], key: str) -> tuple[str, ...]:
    """Return the words of a list for QEMU's command line, each option spelt with one dash.

    Raises:
        ConfigError: an item is no string, or an option is not known to be harmless.
    """
    words: list[str] = []
    for item in items:
        if item.kind == "list":
            raise error_at(item.place, f"{key}: a list within the list", fix="write the options as strings")
        if not item.text.isprintable():
            raise error_at(item.place, f"{key}: an item has a control character", fix="remove it")
    at = 0
    while at < len(items):
        at += _take_option(items, at, key, words)
    return tuple(words)


def _take_option(items: tuple[Value, ...], at: int, key: str, words: list[str]) -> int:
    """Check the option at ``at`` and store it; return how many items it took."""
    item = items[at]
    name = item.text.removeprefix("-").removeprefix("-")
    if not item.text.startswith("-") or not name:
        fix = "write each option with its dash, followed by its value as an item of its own"
        what = f"{key}: `{shown(item.text)}' is no option, and QEMU would take it for the name of a disk image"
        raise error_at(item.place, what, fix=fix)
    if " " in name or "=" in name:
        name = name.partition(" ")[0].partition("=")[0]
        if name in _ALLOWED:
            fix = f'write it as two items: "-{name}", "..."'
            raise error_at(item.place, f"{key}: option and value are one item: `{shown(item.text)}'", fix=fix)
    if name not in _ALLOWED:
        raise error_at(item.place, f"{key}: -{shown(name)} is refused: {_reason(name)}", fix=_fix(name))
    check = _ALLOWED[name]
    words.append("-" + name)
    if check is None:
        if name in _ALWAYS:
            words.pop()
        return 1
    if at + 1 == len(items) or items[at + 1].text.startswith("-"):
        raise error_at(item.place, f"{key}: -{name} lacks its value", fix="add the value as the next item")
    value = items[at + 1]
    if not value.text:
        raise error_at(
            value.place, f"{key}: the value of -{name} is empty", fix="give a value, or leave the option out"
        )
    complaint = check(value.text)
    if complaint:
        raise error_at(value.place, f"{key}: -{name} {shown(value.text)} is refused: {complaint}", fix="leave it out")
    words.append(value.text)
    return 2


def _reason(name: str) -> str:
    """Return why an option is refused."""
    for reason, names in _DENIED.items():
        if name in names.split():
            return reason
    if name in ("kernel", "initrd", "append", "bios"):
        return "files of the guest are opened by depriv and passed as descriptors"
    return "cannot tell whether it undoes a restriction"


def _fix(name: str) -> str:
    """Return what to write instead of an option."""
    return f"write {_INSTEAD[name]} in the configuration" if name in _INSTEAD else "leave it out"


def _properties(text: str) -> list[tuple[str, str]]:
    """Return name and value of the properties of a QEMU option; a name alone has an empty value."""
    found: list[tuple[str, str]] = []
    for _, item in split_items(text.replace(",,", "\0")):
        name, _, value = item.partition("=")
        found.append((name, value.replace("\0", ",")))
    return found


def _complain(properties: list[tuple[str, str]]) -> str:
    """Return what is wrong with one of the properties, or ""."""
    for name, value in properties:
        if "\0" in name or "." in name or name.startswith("x-"):
            return f"property `{shown(name)}': cannot tell what it does"
        if name in _PROPERTIES and not (name in ("romfile", "vhost") and value in ("", "off", "false", "no")):
            return f"{name}: {_PROPERTIES[name]}"
    return ""


def _known_device(driver: str) -> bool:
    """Say whether a device exists in QEMU's memory alone."""
    if driver.endswith(("-gl", "-rutabaga")):
        return False
    return any(driver == name or (name[-1] == "*" and driver.startswith(name[:-1])) for name in _DEVICES)


def _device(text: str) -> str:
    (driver, value), *rest = _properties(text)
    if driver == "driver" and value:
        driver, value = value, ""
    if value or not _known_device(driver):
        return f"device `{shown(driver)}' is not known to exist in QEMU's memory alone"
    return _complain(rest)


def _global(text: str) -> str:
    driver, dot, rest = text.partition(".")
    if not dot or "=" in driver or "," in driver or not rest.partition("=")[1]:
        return "write it as DRIVER.PROPERTY=VALUE"
    if driver not in _PARTS and not _known_device(driver):
        return f"cannot tell what properties of {shown(driver)} do"
    name, _, value = rest.partition("=")
    return _complain([(name, value)])


def _boot(text: str) -> str:
    known = ("order", "once", "menu", "splash-time", "reboot-timeout", "strict")
    for name, value in _properties(text):
        if name == "splash":
            return f"splash: {_HOST_FILE}"
        if name not in known and not (not value and not name.strip("abcdefghijklmnop")):
            return f"cannot tell what {shown(name)} does"
    return ""


def _smbios(text: str) -> str:
    properties = _properties(text)
    if properties[0][0] != "type":
        return "it starts with type= here (file= would open a file of the host)"
    return _complain(properties)


def _one_of(*words: str) -> Callable[[str], str]:
    """Return a check for a value out of a few."""
    return lambda text: "" if text in words else f"it is one of {', '.join(words)}"


def _cpu(text: str) -> str:
    return _complain(_properties(text)[1:])


def _rtc(text: str) -> str:
    known = all(name in ("base", "clock", "driftfix") for name, _ in _properties(text))
    return "" if known else "it takes base=, clock= and driftfix= here"


def _uuid(text: str) -> str:
    plain = len(text) == 36 and not text.strip("0123456789abcdefABCDEF-")
    return "" if plain else "it is no UUID"


# Option -> check of its value; None: it has none.
_ALWAYS = ("nodefaults", "no-user-config")  # every command line has them; twice would be once too often
_ALLOWED: dict[str, Callable[[str], str] | None] = {
    "cpu": _cpu,
    "device": _device,
    "global": _global,
    "boot": _boot,
    "smbios": _smbios,
    "rtc": _rtc,
    "uuid": _uuid,
    "vga": _one_of("none", "std", "cirrus", "vmware", "virtio"),
    "usbdevice": _one_of("tablet", "mouse", "keyboard", "wacom-tablet"),
    "watchdog-action": _one_of("reset", "shutdown", "poweroff", "pause", "none", "inject-nmi"),
    "usb": None,
    "no-hpet": None,
    "no-fd-bootchk": None,
    "win2k-hack": None,
    "no-user-config": None,
    "nodefaults": None,
}
