# SPDX-License-Identifier: Apache-2.0
"""From xl.cfg(5) to a ``Domain``. Pure.

Where xl goes on in silence, this does not: a value of the wrong type is an error for every key, used or not (xl takes
the key for absent, so that ``dm_restrict="yes"`` restricts nothing); a key that nobody knows is a warning, and an error
if it looks like a misspelt security key; a key without effect leaves a note with the reason; and what needs access to
the host is refused. Source of the defaults and of each key's meaning: Xen's tools/xl/xl_parse.c, parse_config_data().
"""

from __future__ import annotations

from depriv.config import ACTIONS, Domain, Note, no_second_life
from depriv.errors import ConfigError
from depriv.xlargs import check_arguments
from depriv.xlcfg import Setting, Value, error_at, parse
from depriv.xldisk import parse_disks
from depriv.xlkeys import find_key, find_misspelt
from depriv.xlspec import check_path, parse_number, shown
from depriv.xlvif import parse_vif

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from depriv.config import Disk, Vif

MAX_NAME = 63
_NAME_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-"
_XL_ACTIONS = (*ACTIONS, "coredump-destroy", "coredump-restart", "soft-reset")
_MAX_OFFSET_S = 1 << 31
_TRUE_WORDS = ("true", "yes", "on", "enable", "enabled", "y", "t")
_FALSE_WORDS = ("false", "no", "off", "disable", "disabled", "n", "f", "none", "")

# What would need access to the host's hardware or files, and the way without.
_REFUSED = {
    "pci": (
        "PCI passthrough hands QEMU a device that can write to all of its memory, and /dev/vfio",
        "remove it; a virtio or emulated device does not leave the confinement",
    ),
    "usbdev": ("USB passthrough hands QEMU a device of the host", "remove it; use emulated USB devices"),
    "gfx_passthru": ("graphics passthrough hands QEMU a device of the host", "remove it, or set it to 0"),
    "p9": (
        "a 9pfs share opens files of the host as the guest asks for them",
        "put the files on a disk image: mkfs.ext4 -d DIRECTORY IMAGE 1G, or genisoimage -o IMAGE DIRECTORY",
    ),
    "dtdev": ("device tree passthrough hands the guest a device of the host", "remove it"),
    "iomem": ("iomem gives the guest memory of the host's devices", "remove it"),
    "ioports": ("ioports gives the guest I/O ports of the host", "remove it"),
    "irqs": ("irqs gives the guest interrupts of the host", "remove it"),
    "vtpm": ("a vTPM is a domain of its own under Xen, and there is no substitute in this version", "remove it"),
    "device_model_stubdomain_override": (
        "a stub domain needs Xen",
        "remove it: depriv confines the device model as a process (a microvm machine has the smallest one)",
    ),
}


def load_domain(text: str | bytes, *, source: str, arguments: tuple[str, ...] = ()) -> Domain:
    """Return the domain that a configuration describes.

    Args:
        text: The file's content.
        source: The file's name, for messages.
        arguments: Lines that come after the file, as in ``xl create FILE key=value``.

    Raises:
        ConfigError: the configuration is wrong, or asks for what depriv refuses.
    """
    reader = _Reader(parse(text, source=source, arguments=arguments), source)
    reader.check_keys()
    _check_refused(reader)
    kind = _type(reader)
    disks, notes = parse_disks(reader.items("disk"), reader.items("disk_backing"))
    reader.notes += notes
    return Domain(
        name=_name(reader),
        type=kind,
        uuid=_uuid(reader),
        disks=disks,
        vifs=_vifs(reader),
        serial=_serial(reader),
        boot=_boot(reader),
        acpi=reader.flag("acpi", default=True),
        localtime=reader.flag("localtime", default=False),
        rtc_timeoffset_s=reader.number("rtc_timeoffset", 0, (-_MAX_OFFSET_S, _MAX_OFFSET_S)),
        machine=reader.choice("machine", ("pc", "q35", "microvm"), "pc"),
        accel=reader.choice("accel", ("auto", "tcg", "kvm"), "auto"),
        source=source,
        **_size(reader),
        **_kernel(reader),
        **_firmware(reader, kind),
        **_actions(reader, disks),
        **_device_model(reader, kind),
        # Last, when everything has been noted.
        notes=tuple(reader.notes),
        places=_places(reader, disks),
    )


def _places(reader: _Reader, disks: tuple[Disk, ...]) -> tuple[tuple[str, str, int, int, str], ...]:
    """Return where each key and each disk stands, for errors that only the host can show."""
    values = {key: setting.value for key, setting in reader.settings.items()}
    values |= {disk.vdev: value for disk, value in zip(disks, reader.items("disk"), strict=True)}
    return tuple((key, *value.place.as_dict().values()) for key, value in values.items())


class _Reader:
    """The settings of one configuration, with the notes made so far."""

    def __init__(self, settings: dict[str, Setting], source: str) -> None:
        self.settings = settings
        self.source = source
        self.notes: list[Note] = []

    def note(self, key: str, text: str, *, warning: bool = False) -> None:
        """Add a note on a key that is set."""
        place = self.settings[key].place
        self.notes.append(
            Note(key=key, text=text, source=place.source, line=place.line, column=place.column, warning=warning)
        )

    def bad(self, key: str, what: str, fix: str = "") -> ConfigError:
        """Return the error that points at the value of a key that is set."""
        return error_at(self.settings[key].value.place, what, fix=fix)

    def check_keys(self) -> None:
        """Note unknown and ignored keys.

        Raises:
            ConfigError: a value is of the wrong type, or a key looks like a misspelt security key.
        """
        for name, setting in self.settings.items():
            key = find_key(name)
            if key is None:
                meant = find_misspelt(name)
                if meant:
                    fix = f"did you mean {meant}? If not, remove the line: it has no effect in xl either"
                    raise error_at(setting.place, f"unknown key {name}", fix=fix)
                self.note(name, f"{name} is unknown and has no effect", warning=True)
                continue
            _check_type(setting, key.type)
            if not key.used:
                self.note(name, f"{name} is ignored: {key.reason}", warning=key.loud and _is_on(setting.value))

    def text(self, key: str) -> str:
        """Return an atom's text; "" if the key is absent."""
        setting = self.settings.get(key)
        return setting.value.text if setting else ""

    def line(self, key: str) -> str:
        """Return an atom's text, which must be printable."""
        text = self.text(key)
        if not text.isprintable():
            raise self.bad(key, f"{key} has a control character: `{shown(text)}'", "remove it")
        return text

    def path(self, key: str) -> str:
        """Return an absolute path; "" if the key is absent or empty."""
        text = self.text(key)
        return check_path(text, key, self.settings[key].value.place) if text else ""

    def number(self, key: str, default: int, bounds: tuple[int, int]) -> int:
        """Return a number within bounds."""
        if key not in self.settings:
            return default
        number = parse_number(self.text(key))
        if number is None or not bounds[0] <= number <= bounds[1]:
            raise self.bad(key, f"{key} is {number}", f"use a number from {bounds[0]} to {bounds[1]}")
        return number

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a boolean."""
        return bool(parse_number(self.text(key))) if key in self.settings else default

    def choice(self, key: str, words: tuple[str, ...], default: str) -> str:
        """Return one of a few words."""
        if key not in self.settings:
            return default
        word = self.text(key)
        if word not in words:
            raise self.bad(key, f"unknown {key} `{shown(word)}'", f"it is {', '.join(words[:-1])} or {words[-1]}")
        return word

    def items(self, key: str) -> tuple[Value, ...]:
        """Return the items of a list, which must be strings."""
        setting = self.settings.get(key)
        items = setting.value.items if setting else ()
        for item in items:
            if item.kind == "list":
                raise error_at(item.place, f"{key}: a list within the list", fix="write each item as one string")
        return items


def _check_type(setting: Setting, kind: str) -> None:
    """Raise ``ConfigError`` if a value is not what its key takes."""
    name, value = setting.key, setting.value
    is_list = value.kind == "list"
    if kind == "list" and not is_list:
        fix = f'write {name} = [ "..." ]'
        raise error_at(value.place, f"{name} is a single value but should be a list", fix=fix)
    if kind not in ("list", "string-or-list") and is_list:
        raise error_at(value.place, f"{name} is a list but should be a single value", fix="remove the brackets")
    if kind not in ("int", "bool") or is_list:
        return
    if setting.appended:
        raise error_at(setting.place, f"{name} is a number, and += is for strings and lists", fix="write = ")
    if parse_number(value.text) is None:
        text = shown(value.text)
        if kind == "bool":
            truth = (
                " = 1" if value.text.lower() in _TRUE_WORDS else " = 0" if value.text.lower() in _FALSE_WORDS else ""
            )
            fix = f"write {name}{truth}" if truth else f"write {name} = 1 or {name} = 0"
            raise error_at(value.place, f"{name} is `{text}', but booleans are 1 and 0", fix=fix)
        fix = "write a number without a unit: 512, 0x200" + (" (memory is in MiB)" if "mem" in name else "")
        raise error_at(value.place, f"{name} is `{text}', which is no number", fix=fix)


def _is_on(value: Value) -> bool:
    """Say whether a value asks for something."""
    if value.kind == "list":
        return bool(value.items)
    return value.text not in ("", "none") and parse_number(value.text) != 0


def _check_refused(reader: _Reader) -> None:
    """Raise ``ConfigError`` for what would need access to the host."""
    for key, (what, fix) in _REFUSED.items():
        if key in reader.settings and _is_on(reader.settings[key].value):
            raise reader.bad(key, f"{key} is refused: {what}", fix)
    for value in _one_or_more(reader, "usbdevice"):
        kind = value.text.partition(":")[0]
        if kind == "host":
            what, fix = _REFUSED["usbdev"]
            raise error_at(value.place, f"usbdevice {shown(value.text)} is refused: {what}", fix=fix)
        if kind not in ("tablet", "mouse", "keyboard"):
            what = f"usbdevice `{shown(value.text)}' is not supported"
            raise error_at(value.place, what, fix="it is tablet, mouse or keyboard")
    if reader.settings.get("usbdevice"):
        reader.note("usbdevice", "usbdevice is ignored: there is no display yet to point and type at")


def _one_or_more(reader: _Reader, key: str) -> tuple[Value, ...]:
    """Return the values of a key that takes a string or a list of strings."""
    setting = reader.settings.get(key)
    if setting is None or setting.value.kind == "list":
        return reader.items(key)
    return (setting.value,)


def _type(reader: _Reader) -> str:
    """Return "hvm", "pv" or "pvh"; as in xl on x86, a configuration that says nothing is "pv"."""
    builders = {"": "", "hvm": "hvm", "generic": "pv"}
    builder = reader.text("builder")
    if builder not in builders:
        fix = 'write type = "pv"' if builder == "linux" else 'write type = "hvm" instead: builder is deprecated'
        raise reader.bad("builder", f"unknown builder `{shown(builder)}'", fix)
    kind = reader.choice("type", ("hvm", "pv", "pvh"), "")
    if kind and builder and builders[builder] != kind:
        raise reader.bad("builder", f"builder {builder} contradicts type {kind}", "remove builder")
    return kind or builders[builder] or "pv"


def _name(reader: _Reader) -> str:
    """Return the domain's name."""
    if "name" not in reader.settings:
        raise ConfigError("there is no name", fix='write name = "..."', source=reader.source)
    name = reader.text("name")
    fix = f"use 1 to {MAX_NAME} letters, digits, `.', `_', `+' and `-', the first not `-' or `.'"
    if not name or len(name) > MAX_NAME:
        raise reader.bad("name", f"the name has {len(name)} characters", fix)
    if name.strip(_NAME_CHARACTERS) or name[0] in "-.":
        raise reader.bad("name", f"the name `{shown(name)}' is not possible", fix)
    if name.isdecimal():
        fix = f'put a letter in it, as in "vm{name}"'
        raise reader.bad("name", f"the name `{name}' is a number: commands would take it for a domid", fix)
    return name


def _uuid(reader: _Reader) -> str:
    """Return the UUID in lower case, or ""."""
    text = reader.text("uuid").lower()
    digits = text.replace("-", "")
    groups = [len(group) for group in text.split("-")]
    if text and (groups not in ([8, 4, 4, 4, 12], [32]) or digits.strip("0123456789abcdef")):
        fix = "write it as 6f1a3c7e-9f5b-4b8e-9c36-0d2f8a1b4c5d (uuidgen makes one), or leave it out"
        raise reader.bad("uuid", f"`{shown(text)}' is no UUID", fix)
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])) if text else ""


def _size(reader: _Reader) -> dict[str, Any]:
    """Return memory and CPUs; how much the host can give is for the planner to say."""
    most = 1 << 40
    memory = reader.number("memory", 0, (1, most))
    maximum = reader.number("maxmem", memory, (1, most))
    if memory > maximum:
        raise reader.bad("memory", f"memory is {memory}, more than maxmem, {maximum}", "make maxmem at least as large")
    if maximum != memory and memory:
        reader.note(
            "maxmem", f"maxmem is ignored: there is no ballooning, and the guest has {memory} MiB", warning=True
        )
    vcpus = reader.number("vcpus", 1, (1, most))
    cpus = reader.number("maxvcpus", vcpus, (1, most))
    if vcpus > cpus:
        raise reader.bad("vcpus", f"vcpus is {vcpus}, more than maxvcpus, {cpus}", "make maxvcpus at least as large")
    if cpus != vcpus:
        what = f"maxvcpus is ignored: CPUs are not added to a running guest, and it has {vcpus}"
        reader.note("maxvcpus", what, warning=True)
    return {"vcpus": vcpus} | ({"memory_mib": memory or maximum} if memory or maximum else {})


def _kernel(reader: _Reader) -> dict[str, Any]:
    """Return kernel, ramdisk and command line; cmdline wins over root and extra, as in xl."""
    kernel = reader.text("kernel")
    if kernel.rpartition("/")[2] == "hvmloader":
        what = "kernel is ignored, as in xl: hvmloader is firmware of Xen's, not a kernel"
        reader.note("kernel", what, warning=True)
        kernel = ""
    elif kernel:
        kernel = reader.path("kernel")
    ramdisk = reader.path("ramdisk")
    if ramdisk and not kernel:
        raise reader.bad("ramdisk", "there is a ramdisk, but no kernel", "add kernel, or remove ramdisk")
    root, extra = reader.line("root"), reader.line("extra")
    cmdline = reader.line("cmdline")
    if "cmdline" in reader.settings:
        for key in ("root", "extra"):
            if key in reader.settings:
                reader.note(key, f"{key} is ignored: cmdline says it all", warning=True)
    else:
        cmdline = " ".join(part for part in (f"root={root}" if root else "", extra) if part)
    if cmdline and not kernel:
        key = next(key for key in ("cmdline", "root", "extra") if reader.text(key))
        reader.note(key, f"{key} is ignored: there is no kernel to give it to", warning=True)
        cmdline = ""
    return {"kernel": kernel, "ramdisk": ramdisk, "cmdline": cmdline}


def _firmware(reader: _Reader, kind: str) -> dict[str, Any]:
    """Return the firmware, by kind or by path; PV and PVH guests have none."""
    bios, path = reader.text("bios"), ""
    firmware = reader.text("firmware")
    if kind != "hvm":
        return {}
    if firmware in ("uefi", "bios", "ovmf", "seabios", "rombios"):
        bios = {"uefi": "ovmf", "bios": bios}.get(firmware, firmware)
        key = "firmware"
    else:
        path, key = reader.path("firmware"), "bios"
    if bios not in ("", "seabios", "ovmf"):
        fix = "use seabios or ovmf" if bios == "rombios" else "it is seabios or ovmf"
        why = " belongs to qemu-xen-traditional, which is gone" if bios == "rombios" else " is unknown"
        raise reader.bad(key, f"the firmware `{shown(bios)}'{why}", fix)
    for override in ("firmware_override", "bios_path_override"):
        if reader.text(override).rpartition("/")[2] == "hvmloader":
            reader.note(override, f"{override} is ignored: hvmloader is firmware of Xen's", warning=True)
            continue
        other = reader.path(override)
        if other and path not in ("", other):
            raise reader.bad(override, f"two firmware images: {path} and {other}", "name one")
        path = other or path
    return {"bios": bios, "firmware": path}


def _actions(reader: _Reader, disks: tuple[Disk, ...]) -> dict[str, Any]:
    """Return what happens when the guest ends."""
    found: dict[str, Any] = {}
    for key in ("on_watchdog", "on_soft_reset"):  # without effect, which is noted already
        reader.choice(key, _XL_ACTIONS, "")
    for key in ("on_poweroff", "on_reboot", "on_crash"):
        if key not in reader.settings:
            continue
        action = reader.text(key)
        if action.startswith("coredump-") and action in _XL_ACTIONS:
            what = f"{key} = {action} is refused: a dump is all of the guest's memory, and QEMU can open no file for it"
            fix = f'write "{action.removeprefix("coredump-")}", or "preserve": the guest stays stopped, to be looked at'
            raise reader.bad(key, what, fix)
        if action == "soft-reset":
            what = f"{key} = soft-reset is refused: it hands a guest of Xen's over to its crash kernel"
            raise reader.bad(key, what, 'write "restart"')
        found[key] = reader.choice(key, ACTIONS, "")
        reason, fix = no_second_life(disks, reader.text("device_model_user"))
        if action == "rename-restart" and reason:
            raise reader.bad(key, f"{key} = rename-restart is refused: {reason}", fix)
    return found


def _boot(reader: _Reader) -> str:
    """Return the boot order."""
    boot = reader.text("boot")
    if not boot:
        return Domain.boot
    if boot.strip("acdn"):
        raise reader.bad("boot", f"boot order `{shown(boot)}'", "the letters are c disk, d CD-ROM, n network")
    if len(set(boot)) != len(boot):
        raise reader.bad("boot", f"boot order `{boot}' names a device twice", "write each letter once")
    if "a" in boot:
        reader.note("boot", "boot: the a is ignored: there is no floppy drive")
    return boot.replace("a", "") or Domain.boot


def _serial(reader: _Reader) -> bool:
    """Say whether the guest has a serial port."""
    if "serial" not in reader.settings:
        return True
    ports = _one_or_more(reader, "serial")
    for value in ports:
        if value.text not in ("pty", "none"):
            what = f"serial `{shown(value.text)}' is refused: it is a file, device or network of the host"
            raise error_at(
                value.place, what, fix='write serial = "pty": `depriv console\' shows it, and a log keeps it'
            )
    if len(ports) > 1:
        reader.note("serial", "serial: the guest has one serial port; the others are ignored", warning=True)
    return bool(ports) and ports[0].text == "pty"


def _vifs(reader: _Reader) -> tuple[Vif, ...]:
    """Return the network cards."""
    found: list[Vif] = []
    for value in reader.items("vif"):
        vif, notes = parse_vif(value)
        found.append(vif)
        reader.notes += notes
    if found:
        what = "network cards are not attached by this version: the guest starts without a network"
        reader.note("vif", what, warning=True)
    return tuple(found)


def _device_model(reader: _Reader, kind: str) -> dict[str, Any]:
    """Return what concerns QEMU itself and how it is confined."""
    restrict = reader.flag("dm_restrict", default=True)
    if not restrict:
        what = (
            "dm_restrict = 0: QEMU keeps a uid of its own and no capability, but runs WITHOUT namespaces, empty root, "
            "limits and sandbox"
        )
        reader.note("dm_restrict", what, warning=True)
    version = reader.text("device_model_version")
    if version == "qemu-xen-traditional":
        what = "device_model_version qemu-xen-traditional cannot be confined, and Xen has dropped it in 2025"
        raise reader.bad("device_model_version", what, "remove the line: the device model is the host's QEMU")
    if version not in ("", "qemu-xen"):
        raise reader.bad(
            "device_model_version", f"unknown version `{shown(version)}'", "remove the line, or say qemu-xen"
        )
    user = reader.line("device_model_user")
    if user in ("root", "toor") or parse_number(user) is not None:
        fix = "name a user that exists for this one domain, or remove the line: depriv allots one"
        raise reader.bad("device_model_user", f"device_model_user `{shown(user)}' is refused", fix)
    if user and (user[0] == "-" or set(user) & set("/: ") or len(user) > 32):
        raise reader.bad("device_model_user", f"`{shown(user)}' is no user name", "see getent passwd")
    keys = ["device_model_args_pv", "device_model_args_hvm"]
    arguments = {key: check_arguments(reader.items(key), key) for key in ("device_model_args", *keys)}
    own = keys[1] if kind == "hvm" else keys[0]
    other = keys[0] if kind == "hvm" else keys[1]
    if arguments[other]:
        reader.note(other, f"{other} is ignored: this is a {kind} guest")
    return {
        "dm_restrict": restrict,
        "device_model_user": user,
        "device_model_override": reader.path("device_model_override"),
        "device_model_args": arguments["device_model_args"] + arguments[own],
    }
