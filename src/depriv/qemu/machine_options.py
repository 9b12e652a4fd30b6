# SPDX-License-Identifier: Apache-2.0
"""Options about the machine itself: type, processors, memory, accelerator, what it boots. Pure.

Sources: softmmu/vl.c, hw/core/machine.c, hw/core/machine-smp.c, qemu-options.hx, QEMU 7.2.
"""

from __future__ import annotations

from depriv.qemu.device_options import QXL
from depriv.qemu.file_options import initrd
from depriv.qemu.options import OPTIONS
from depriv.qemu.properties import Properties, refuse_paths, rom, size_mib
from depriv.qemu.words import Word, error, is_on, parse_list, parse_words, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.qemu.draft import Draft

_HELP = ("help", "?")
_XEN = "it is for libxl's device models only"
_XEN_FIX = "have libxl start it: device_model_override=depriv-dm in the domain's configuration"
_MIB_DEFAULT = 128  # MachineClass.default_ram_size, hw/core/machine.c


def _machine(draft: Draft, word: Word) -> None:
    machine = Properties(word, "type")
    kind = machine.text("type")
    if machine.help:
        draft.facts["no_guest"] = True
        draft.emit("-machine", word.value)
        return
    if kind:
        draft.facts["machine"] = kind
    _machine_files(draft, word, machine)
    dry = dict(machine.data)
    if kind in ("xenfv", "xenpv") or kind.startswith("xenfv-"):
        _require_xen(draft, word)
        # In the dry run there is no domain to attach to: the machine that xenfv is derived from loads as much.
        dry["type"] = "pc"
    if machine.data.get("accel"):
        _choose(draft, word, machine.text("accel"))
        dry["accel"] = machine.text("accel").replace("xen", "tcg")
    shown = machine.value()
    machine.data = dry
    draft.emit("-machine", shown, dry=("-machine", machine.value()))


def _machine_files(draft: Draft, word: Word, machine: Properties) -> None:
    """Copy what the properties behind -kernel and its like name."""
    if machine.data.get("dumpdtb"):
        draft.refuse(word, "QEMU would write a file by name, without a guest", fix="run QEMU itself for it")
    for key in ("kernel", "dtb", "shim"):
        if machine.data.get(key):
            machine.data[key] = draft.private(word, machine.text(key), role=key)
    for key, role in (("firmware", "firmware"), ("boot.splash", "splash")):
        if machine.data.get(key):
            machine.data[key] = rom(draft, word, machine.text(key), role=role)
    if machine.data.get("initrd"):
        machine.data["initrd"] = initrd(draft, word, machine.text("initrd"))
    refuse_paths(draft, word, machine.data)


def _require_xen(draft: Draft, word: Word) -> None:
    if not draft.allowed.xen:
        draft.refuse(word, _XEN, fix=_XEN_FIX)


def _choose(draft: Draft, word: Word, names: str) -> None:
    """Note which accelerator is asked for; of a list (``kvm:tcg``) the first that the host has."""
    if "xen" in names.split(":"):
        _require_xen(draft, word)
    wanted = draft.facts.get("accel")
    draft.facts["accel"] = "auto" if ":" in names or wanted not in (None, names) else names


def _accel(draft: Draft, word: Word) -> None:
    accel = Properties(word, "accel")
    if accel.help:
        draft.facts["no_guest"] = True
        draft.emit("-accel", word.value)
        return
    if accel.data.get("device", "/dev/kvm") != "/dev/kvm":
        draft.refuse(word, "depriv gives QEMU a /dev/kvm of its own", fix="leave device= out")
    accel.data.pop("device", None)
    refuse_paths(draft, word, accel.data)
    _choose(draft, word, accel.text("accel"))
    draft.emit("-accel", accel.value(), dry=("-accel", "tcg") if accel.text("accel") == "xen" else None)


def _enable_kvm(draft: Draft, word: Word) -> None:
    _choose(draft, word, "kvm")
    draft.emit("-enable-kvm")


def _asks(draft: Draft, word: Word) -> None:
    """Pass an option as it is; with ``help`` for a value it has QEMU print a list and end."""
    if word.value in _HELP:
        draft.facts["no_guest"] = True
    draft.emit(f"-{word.name}", word.value)


def _vga(draft: Draft, word: Word) -> None:
    if word.value == "qxl":
        draft.refuse(word, f"qxl: {QXL[0]}", fix="use -vga virtio, or -vga std")
    _asks(draft, word)


def _ends(draft: Draft, word: Word) -> None:
    draft.facts["no_guest"] = True
    draft.emit(f"-{word.name}")


def _overcommit(draft: Draft, word: Word) -> None:
    lock = values(parse_list(word)).get("mem-lock", "off")
    if lock != "off" and (is_on(lock) or lock == "on-fault"):
        draft.refuse(
            word,
            "a device model may lock no memory (RLIMIT_MEMLOCK is 0)",
            fix="leave mem-lock out; without swap (memory.swap.max of the cgroup) nothing is moved to disk either",
        )
    draft.emit("-overcommit", word.value)


def _boot(draft: Draft, word: Word) -> None:
    boot = Properties(word, "order")
    if boot.help:
        draft.facts["no_guest"] = True
        draft.emit("-boot", word.value)
        return
    if boot.data.get("splash"):
        boot.data["splash"] = rom(draft, word, boot.text("splash"), role="splash")
    refuse_paths(draft, word, boot.data)
    draft.emit("-boot", boot.value())


def _name(draft: Draft, word: Word) -> None:
    name = values(parse_list(word, implied="guest")).get("guest", "")
    if name:
        draft.facts["name"] = name
    draft.emit("-name", word.value)


def _icount(draft: Draft, word: Word) -> None:
    given = values(parse_list(word, implied="shift"))
    if "rr" in given or "rrfile" in given:
        draft.refuse(
            word, "the recording is a file that QEMU opens by name", fix="leave rr= and rrfile= out: shift= alone works"
        )
    draft.emit("-icount", word.value)


def _keymap(draft: Draft, word: Word) -> None:
    """A name is that of a keymap in QEMU's data folders, which the dry run finds; a file is copied."""
    keymap = draft.private(word, word.value, role="keymap") if "/" in word.value else word.value
    draft.emit("-k", keymap)


def _domid(draft: Draft, word: Word) -> None:
    _require_xen(draft, word)
    if not word.value.isdecimal() or int(word.value) == 0:
        raise error(word, f"{word.value!r} is no domain's ID", fix="write -xen-domid N")
    draft.facts["domid"] = int(word.value)
    draft.emit("-xen-domid", word.value, dry=())


def _xen(draft: Draft, word: Word) -> None:
    _require_xen(draft, word)
    draft.emit(f"-{word.name}", dry=())


def finish(draft: Draft) -> None:
    """Note how much memory and how many processors the words come to: the limits follow from it."""
    machine = _merged(draft, "machine", "type")
    smp = _merged(draft, "smp", "cpus")
    smp |= {key.removeprefix("smp."): value for key, value in machine.items() if key.startswith("smp.")}
    if smp:
        draft.facts["vcpus"] = _vcpus(smp)
    size = _merged(draft, "m", "size").get("size") or machine.get("memory.size", "")
    total = size_mib(Word(name="m", text=f"-m {size}"), size) if size else 0
    backends = _backends(draft)
    if not total:  # -m 0 is the default, too
        total = backends.get(machine.get("memory-backend", ""), _MIB_DEFAULT)
    for device in _words(draft, "device"):
        total += backends.get(Properties(device, "driver").text("memdev"), 0)
    draft.facts["memory_mib"] = total


def _vcpus(smp: dict[str, str]) -> int:
    """Return the most processors that the guest may come to have. Source: machine_parse_smp_config, QEMU 7.2."""
    numbers = {key: int(value) for key, value in smp.items() if value.isdecimal()}
    topology = 1
    for key in ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads"):
        topology *= max(numbers.get(key, 1), 1)
    return max(numbers.get("maxcpus", 0), numbers.get("cpus", 0), topology)


def _backends(draft: Draft) -> dict[str, int]:
    """Return the size in MiB of each memory backend, by its id."""
    sizes: dict[str, int] = {}
    for word in _words(draft, "object"):
        backend = Properties(word, "qom-type")
        if backend.text("qom-type").startswith("memory-backend") and backend.text("size"):
            sizes[backend.text("id")] = size_mib(word, backend.text("size"), unit="B")
    return sizes


def _merged(draft: Draft, option: str, implied: str) -> dict[str, str]:
    """Return the properties of all words of one option: a later one adds to the earlier, as for QEMU."""
    merged: dict[str, str] = {}
    for word in _words(draft, option):
        properties = Properties(word, implied)
        merged |= {key: properties.text(key) for key in properties.data}
    return merged


def _words(draft: Draft, option: str) -> list[Word]:
    """Return the words of one option that QEMU gets."""
    takes_value = {name: known.takes_value for name, known in OPTIONS.items()}
    return [word for word in parse_words(tuple(draft.argv), takes_value) if word.name == option]


HANDLERS = {
    "machine": _machine,
    "M": _machine,
    "accel": _accel,
    "enable-kvm": _enable_kvm,
    "cpu": _asks,
    "vga": _vga,
    "rtc": _asks,
    **dict.fromkeys(("action", "msg", "smp"), _asks),
    "help": _ends,
    "h": _ends,
    "version": _ends,
    "audio-help": _ends,
    "overcommit": _overcommit,
    "boot": _boot,
    "name": _name,
    "icount": _icount,
    "k": _keymap,
    "xen-domid": _domid,
    "xen-attach": _xen,
    "xen-domid-restrict": _xen,
}
