# SPDX-License-Identifier: Apache-2.0
"""-device, -global, and shared folders: what of a device names the host, and what becomes of it. Pure.

Held to ``qemu-system-x86_64 -device NAME,help`` of every device of QEMU 7.2, whose text properties were all looked at.
"""

from __future__ import annotations

from depriv.openings import ConnectUnix, WriteFile
from depriv.qemu.properties import Properties, is_own_set, names_path, refuse_paths, rom
from depriv.qemu.words import Item, error, join_list

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.qemu.draft import Draft
    from depriv.qemu.words import Word

_VFIO = (
    "VFIO gives a device model the host's hardware: DMA, configuration space, the group's other devices",
    "use virtio devices; this one only unconfined",
)
_SESSION = ("it reads what is typed at the host", "use -device virtio-keyboard and virtio-tablet with -vnc 127.0.0.1:0")
# It makes sockets, of which nobody could tell where they lead. Source: hw/display/qxl.c, QEMU 7.2.
QXL = ("it brings a SPICE server's threads, and SPICE there is none", "use -device virtio-vga, or VGA")
# Devices that are of no use, or too much, without the host: why, and what else there is. By the start of their names.
REFUSED_DEVICES = {
    "vfio-": _VFIO,
    "virtio-input-host": _SESSION,
    "xen-pci-passthrough": _VFIO,
    "pvrdma": ("it drives an RDMA adapter of the host", "use -device virtio-net-pci"),
    "hv-syndbg": ("QEMU has no network", "use -gdb unix:PATH,server=on,wait=off"),
    "qxl": QXL,
    "usb-mtp": ("QEMU would open a folder of the host by name, again and again", "use an ISO image or a disk"),
    "u2f-passthru": ("QEMU looks for the token in /sys and /dev", "use -device usb-host,hostdevice=/dev/bus/usb/BUS/N"),
    "u2f-emulated": ("its keys lie in a folder that QEMU opens by name", "use -device usb-host with a real token"),
    "ccid-card-emulated": ("it reads the user's certificate database", "use ccid-card-passthru with a chardev"),
    "x-pci-proxy-dev": (
        "the device would be another process, with all of the guest's memory",
        "use a vhost-user device",
    ),
    "vfio-user": ("the device would be another process, with all of the guest's memory", "use a vhost-user device"),
    "uefi-vars": ("it keeps the variables in a file that it opens by name", "use -drive if=pflash,file=OVMF_VARS.fd"),
    "sgx-epc": ("it needs the host's /dev/sgx_vepc", "leave it out"),
}
# Files that QEMU reads once, by name: property -> whether QEMU's own data folders are searched as well.
_COPIED = {
    "romfile": True,
    "file": False,
    "kernel": False,
    "initrd": False,
    "sdrfile": False,
    "frudatafile": False,
    "cdat": False,
}
_COPIED_ONLY = {"file": ("loader",), "kernel": ("guest-loader",), "initrd": ("guest-loader",)}
# Properties that name the host on any device, and so may not come in by -global.
_HOST = (*_COPIED, "pcap", "hostdevice", "evdev", "hidraw", "db", "rootdir", "ibdev", "sysfsdev", "vhostfd", "vhostdev")
_VHOST = {"vhost-scsi": "/dev/vhost-scsi", "vhost-vsock": "/dev/vhost-vsock"}
# In the dry run nobody is at the other end of their chardevs, and none of them loads a file.
_NOT_DRY = ("vhost-", "tpm-", "ivshmem-doorbell", "usb-host", "xen-")


def _device(draft: Draft, word: Word) -> None:
    device = Properties(word, "driver")
    driver = device.text("driver")
    if device.help:
        draft.facts["no_guest"] = True
        draft.emit("-device", word.value)
        return
    for start, (why, instead) in REFUSED_DEVICES.items():
        if driver.startswith(start) and driver != "vfio-pci-igd-lpc-bridge":
            draft.refuse(word, f"{driver}: {why}", fix=instead)
    for key, search in _COPIED.items():
        only = _COPIED_ONLY.get(key)
        if device.data.get(key) and (only is None or driver in only):
            path, role = device.text(key), f"{device.text('id') or driver}-{key}"
            device.data[key] = rom(draft, word, path, role=role) if search else draft.private(word, path, role=role)
    _open_host(draft, word, device)
    refuse_paths(draft, word, device.data)
    draft.emit("-device", device.value(), dry=_dry(device))


def _dry(device: Properties) -> tuple[str, ...]:
    """Return what stands for the device in the dry run."""
    driver = device.text("driver")
    if driver == "vhost-user-vga":
        return ("-device", "virtio-vga")
    if driver.startswith(_NOT_DRY):
        return ()
    data = dict(device.data)
    device.data = {key: value for key, value in data.items() if key != "pcap"}
    shown = device.value()
    device.data = data
    return ("-device", shown)


def _open_host(draft: Draft, word: Word, device: Properties) -> None:
    """Have opened what the device would open: USB and vhost nodes, and the file that USB traffic is recorded in."""
    driver = device.text("driver")
    role = device.text("id") or driver
    if driver == "usb-host":
        _usb_host(draft, word, device, role)
    if device.data.get("pcap"):
        if device.text("pcap").startswith("/dev/fdset/"):
            refuse_paths(draft, word, {"pcap": device.data["pcap"]})
        else:
            number = draft.number(word)
            path = draft.path(word, device.text("pcap"))
            draft.open(WriteFile(role=draft.role(f"{role}-pcap"), number=number, path=path))
            device.data["pcap"] = draft.fdset(number)
    for start, path in _VHOST.items():
        if driver.startswith(start):
            _vhost(draft, word, device, path)
    if driver.startswith("vhost-vdpa-device") and device.data.get("vhostdev"):
        path = device.text("vhostdev")
        if not is_own_set(path):
            opened = draft.file(word, path, role=role, access="rw", kinds=("char",))
            device.data["vhostdev"] = draft.fdset(opened.number)


def _usb_host(draft: Draft, word: Word, device: Properties, role: str) -> None:
    """A USB device is opened by its node: QEMU has no /sys to look for others. Source: hw/usb/host-libusb.c."""
    path = device.text("hostdevice")
    if not path:
        draft.refuse(
            word,
            "QEMU cannot look for USB devices: it sees neither /sys nor /dev/bus/usb",
            fix="write usb-host,hostdevice=/dev/bus/usb/BUS/NUMBER, with the numbers that lsusb shows",
        )
    if not is_own_set(path):
        opened = draft.file(word, path, role=role, access="rw", kinds=("char",))
        device.data["hostdevice"] = draft.fdset(opened.number)


def _vhost(draft: Draft, word: Word, device: Properties, path: str) -> None:
    given = device.text("vhostfd")
    role = f"{device.text('id') or device.text('driver')}-vhost"
    if given:
        number = draft.inherited(word, given, role=role)
    else:
        number = draft.file(word, path, role=role, access="rw", kinds=("char",)).number
    device.data["vhostfd"] = str(number)
    draft.note(word, f"the guest talks to the host's kernel through {path}", warning=True)


def _global(draft: Draft, word: Word) -> None:
    """``driver.property=value``, or the three as a list. A ROM that is left out (``romfile=``) names nothing."""
    driver, dot, rest = word.value.partition(".")
    name, equals, value = rest.partition("=")
    if not (dot and equals) or "," in driver or "=" in driver:
        long = Properties(word, "driver")
        driver, name, value = long.text("driver"), long.text("property"), long.text("value")
    named = names_path(value) or (name in _HOST and (name != "romfile" or "/" in value))
    if value and named:
        draft.refuse(
            word, f"{name} names a file or a device of the host", fix=f"give it to the device: -device {driver},{name}="
        )
    if driver == "vfio-pci":
        draft.refuse(word, REFUSED_DEVICES["vfio-"][0], fix=REFUSED_DEVICES["vfio-"][1])
    draft.emit("-global", word.value)


def _usbdevice(draft: Draft, word: Word) -> None:
    if word.value == "braille":
        draft.refuse(word, "QEMU would connect to the user's braille display", fix="leave it out")
    draft.emit("-usbdevice", word.value)


def _share(draft: Draft, word: Word) -> None:
    """-fsdev and -virtfs. Source: fsdev/qemu-fsdev.c, hw/9pfs/9p-proxy.c, QEMU 7.2."""
    share = Properties(word, "fsdriver")
    driver = share.text("fsdriver")
    role = share.text("id") or share.text("mount_tag") or word.name
    if driver == "proxy":
        if share.data.get("sock_fd"):
            number = draft.inherited(word, share.text("sock_fd"), role=role)
        else:
            if not share.data.get("socket"):
                raise error(word, "nothing says where the proxy is", fix="write socket=PATH or sock_fd=N")
            path = draft.path(word, str(share.data.pop("socket")))
            number = draft.number(word)
            draft.open(ConnectUnix(role=draft.role(role), number=number, path=path))
        share.data["sock_fd"] = str(number)
    elif driver != "synth":
        draft.refuse(
            word,
            "QEMU would open a folder of the host by name, and what is in it, as long as the guest runs",
            fix="run virtiofsd --socket-path=SOCKET --shared-dir=DIR, and give QEMU -chardev socket,id=fs,path=SOCKET"
            " -device vhost-user-fs-pci,chardev=fs,tag=TAG with memory that is shared (memory-backend-memfd,share=on)",
        )
    refuse_paths(draft, word, share.data)
    kept = ("id", "mount_tag", "readonly")
    dry = [
        Item(key="fsdriver", value="synth"),
        *(Item(key=key, value=share.text(key)) for key in kept if key in share.data),
    ]
    draft.emit(f"-{word.name}", share.value(), dry=(f"-{word.name}", join_list(dry)))


HANDLERS = {"device": _device, "usbdevice": _usbdevice, "global": _global, "fsdev": _share, "virtfs": _share}
