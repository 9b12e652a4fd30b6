# SPDX-License-Identifier: Apache-2.0
"""Every key of xl.cfg(5), what type it has, and what depriv does with it. Pure.

Source of the names and types: Xen's tools/xl/xl_parse.c (4.21). depriv(5) lists the same keys; a test compares the two.
The table is made of words and plain tuples: a record for each key would cost every ``create`` a millisecond.
"""

from __future__ import annotations

from depriv.records import Record


class Key(Record):
    """What is known of one key."""

    type: str  # "string", "int", "bool", "list" or "string-or-list"
    used: bool  # False: it has no effect, and ``reason`` says why
    reason: str = ""
    security: bool = False  # a misspelling of it is an error, not a warning
    loud: bool = False  # ignoring it takes something from the guest: told at every start, not only by `check`


_XEN = "it is about Xen's hypervisor, and there is none here"
_MEMORY = "it is about how Xen manages guest memory; here the memory is an ordinary mapping of QEMU's"
_SCHEDULER = "it is a parameter of Xen's scheduler; here the host's own scheduler and the domain's cgroup decide"
_PINNING = "pinning to CPUs is not supported by this version: the host's scheduler places the virtual CPUs"
_CPU = 'CPU features are QEMU\'s choice for the accelerator; device_model_args = ["-cpu", ...] changes them'
_PLATFORM = "QEMU's machine type decides this; see machine"
_TIMER = "it is about timers that Xen emulates; here QEMU emulates them"
_PVH = "it is for PV and PVH guests, which need Xen"
_ARM = "it is for ARM guests; depriv runs x86 guests"
_STUBDOM = "it is about device models in a stub domain, which need Xen; depriv's device model is a confined process"
_PCI = "it is about PCI passthrough, which depriv refuses"
_FRONT_ENDS = "it asks for a Xen PV device, whose back end needs Xen's event channels and grant tables"
_FLASK = "it is a label of Xen's FLASK policy"
_DISPLAY = "there is no display yet: this version has no VNC, SPICE or SDL, and the guest's screen is not shown"
_DISPLAY_DETAIL = "it is a detail of a display, and this version has none"
_SOUND = "this version gives the guest no sound card: its sound would need a way to the host"
_USB = "USB controllers and devices are not attached by this version"
_TABLES = "files with firmware tables are not passed to the guest by this version"
_SMBIOS = 'SMBIOS strings go to QEMU: device_model_args = ["-smbios", "type=1,serial=..."]'
_XENSTORE = "there is no xenstore here"
_BOOTLOADER = "a boot loader reads the guest's disk on the host, which depriv never does; the guest's firmware boots it"

# type: the keys which have an effect
_USED = {
    "string": """name type builder uuid kernel ramdisk cmdline root extra boot bios bios_path_override firmware
        firmware_override on_poweroff on_reboot on_crash device_model_user device_model_version device_model_override
        accel machine gfx_passthru""",
    "int": "memory maxmem vcpus maxvcpus rtc_timeoffset",
    "bool": "acpi localtime dm_restrict device_model_stubdomain_override",
    "list": """disk disk_backing vif device_model_args device_model_args_pv device_model_args_hvm
        pci usbdev p9 dtdev iomem ioports irqs vtpm""",
    "string-or-list": "serial usbdevice",
}

# (type, reason, told at every start): the keys which have none
_IGNORED = {
    ("bool", _XEN, False): """hap oos nomigrate nestedhvm pae vpt_align altp2mhvm xen_platform_pci pvshim
        xend_suspend_evtchn_compat msr_relaxed vpmu trap_unmapped_accesses xen_platform_pci_bar_uc""",
    ("string", _XEN, False): "pool altp2m altp2m_count passthrough vendor_device on_soft_reset",
    ("list", _XEN, False): "mca_caps",
    ("int", _XEN, False): """hvm_pirq max_event_channels max_grant_frames max_maptrack_frames max_grant_version
        vmtrace_buf_kb""",
    ("int", _MEMORY, False): "shadow_memory mmio_hole rdm_mem_boundary",
    ("list", _MEMORY, True): "vnuma",
    ("int", _SCHEDULER, False): "cpu_weight cap period slice latency extratime",
    ("string-or-list", _PINNING, False): "cpus cpus_soft",
    ("string-or-list", _CPU, False): "cpuid viridian",
    ("bool", _CPU, False): "nx apic",
    ("bool", _PLATFORM, False): "hpet acpi_s3 acpi_s4 acpi_laptop_slate",
    ("string", _PLATFORM, False): "hdtype",
    ("string", _TIMER, False): "tsc_mode timer_mode",
    ("bool", _PVH, False): "e820_host",
    ("string", _PVH, False): "pvshim_path pvshim_cmdline pvshim_extra",
    ("string", _ARM, False): "arm_sci device_tree gic_version sve tee vuart",
    ("string-or-list", _ARM, False): "llc_colors",
    ("int", _ARM, False): "nr_spis",
    ("string", _STUBDOM, False): """device_model_stubdomain_seclabel stubdomain_kernel stubdomain_ramdisk
        stubdomain_cmdline""",
    ("int", _STUBDOM, False): "stubdomain_memory",
    ("bool", _STUBDOM, False): "stubdomain_cpus_mirror_guest",
    ("bool", _PCI, False): "pci_msitranslate pci_permissive pci_power_mgmt pci_seize",
    ("string", _PCI, False): "rdm",
    ("list", _FRONT_ENDS, True): "channel pvcalls vdispl vfb vif2 virtio vkb vsnd",
    ("bool", "depriv has no driver domains: back ends run on the host", True): "driver_domain",
    ("string", _FLASK, False): "init_seclabel seclabel",
    ("bool", _DISPLAY, True): "vnc sdl spice",
    ("bool", _DISPLAY_DETAIL, False): """nographic opengl vncunused spicedisable_ticketing spiceagent_mouse
        spicevdagent spice_clipboard_sharing vkb_device stdvga""",
    ("int", _DISPLAY_DETAIL, False): """vncdisplay vncviewer spiceport spicetls_port spiceusbredirection
        videoram""",
    ("string", _DISPLAY_DETAIL, False): """display xauthority vnclisten vncpasswd spicehost spicepasswd
        spice_image_compression spice_streaming_video keymap vga""",
    ("string", _SOUND, True): "soundhw",
    ("bool", _USB, False): "usb",
    ("int", _USB, False): "usbversion",
    ("list", _USB, True): "usbctrl",
    ("string", _TABLES, True): "acpi_firmware smbios_firmware",
    ("list", _SMBIOS, True): "smbios",
    ("string", "a VM generation ID is not given to the guest by this version", False): "ms_vm_genid",
    ("string", "this version gives the guest no watchdog", False): "on_watchdog",
    ("string", "it is obsolete, in xl as well: use device_model_override", True): "device_model",
    ("list", _XENSTORE, False): "xenstore_quota",
    ("string", _BOOTLOADER, True): "bootloader",
    ("string-or-list", _BOOTLOADER, False): "bootloader_args",
    ("bool", _BOOTLOADER, False): "bootloader_restrict",
    ("string", _BOOTLOADER, False): "bootloader_user",
}  # fmt: skip

_SECURITY = """dm_restrict device_model_user device_model_version device_model_override device_model_args
    device_model_args_pv device_model_args_hvm device_model_stubdomain_override bootloader_restrict bootloader_user
    disk disk_backing kernel ramdisk name type accel machine firmware firmware_override bios_path_override
    pci usbdev usbdevice gfx_passthru p9 vnc vnclisten vncpasswd vncunused spice spicehost spicepasswd
    spicedisable_ticketing serial memory vif"""

OWN_KEYS = ("accel", "disk_backing", "machine")  # xl knows nothing of these, and ignores them


_TABLE = {
    **{name: (kind, "", False) for kind, names in _USED.items() for name in names.split()},
    **{name: row for row, names in _IGNORED.items() for name in names.split()},
}


def all_keys() -> tuple[str, ...]:
    """Return the names of all keys, sorted."""
    return tuple(sorted(_TABLE))


def find_key(name: str) -> Key | None:
    """Return what is known of a key, or None if xl would ignore it without a word."""
    row = _TABLE.get(name)
    if row is None:
        return None
    kind, reason, loud = row
    return Key(type=kind, used=not reason, reason=reason, security=name in _SECURITY.split(), loud=loud)


def find_misspelt(name: str) -> str:
    """Return the security key that an unknown key was probably meant to be, or "".

    At most two edits away (a letter more, less, other, or two swapped); of short names one, since two edits lead from
    ``pci`` to almost any three letters.
    """
    best, best_distance = "", 3
    for key in _SECURITY.split():
        limit = 2 if len(key) > 4 else 1
        if abs(len(key) - len(name)) <= limit:
            distance = edit_distance(name, key)
            if distance <= limit and distance < best_distance:
                best, best_distance = key, distance
    return best


def edit_distance(one: str, other: str) -> int:
    """Return how many letters to insert, delete, replace or swap with their neighbour to get from one to the other."""
    above: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        above, previous, row = row, above, [i]
        for j, wanted in enumerate(other, 1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, previous[j - 2] + 1)
            row.append(cost)
    return row[-1]
