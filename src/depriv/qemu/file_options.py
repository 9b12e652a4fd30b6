# SPDX-License-Identifier: Apache-2.0
"""Options whose files QEMU reads by name at its start, and those that hand it descriptors. Pure.

Sources: hw/i386/x86.c, hw/i386/multiboot.c, hw/smbios/smbios.c, hw/acpi/core.c, softmmu/vl.c, trace/control.c,
migration/migration.c (qemu_start_incoming_migration), QEMU 7.2.
"""

from __future__ import annotations

from depriv.openings import ReadFile
from depriv.qemu.draft import SET_BASE
from depriv.qemu.properties import Properties, refuse_paths, rom
from depriv.qemu.words import Item, error, join_list, parse_list, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.qemu.draft import Draft
    from depriv.qemu.words import Word

_PROGRAMS = "/usr"  # all of it is there in the dry run, which finds the files that QEMU loads
_CAT = ("cat", "/bin/cat", "/usr/bin/cat")
_NO_STREAM = {"exec": "QEMU may start no program", "unix": "QEMU can take a connection, no socket to listen on"}
_STREAM = (
    "start a command yourself and give QEMU what it writes: exec 5< <(COMMAND), then -incoming fd:5;"
    " one that listens is socat -u UNIX-LISTEN:PATH -"
)
_SHELL = "'\"\\$`|&;<>()*?[]{}~#! \t"


def _private(draft: Draft, word: Word) -> None:
    """A file that is read once: kernel, device tree."""
    draft.emit(f"-{word.name}", draft.private(word, word.value, role=word.name))


def _initrd(draft: Draft, word: Word) -> None:
    draft.emit("-initrd", initrd(draft, word, word.value))


def initrd(draft: Draft, word: Word, text: str) -> str:
    """Return the value of -initrd with private copies in it.

    It is a file's name; of a multiboot kernel a list of modules, a file and its words each ("a b,c": file a with the
    word b, file c), commas in them doubled. Which of the two it is the kernel decides: a list of one is a file's name
    in both.
    """
    whole = draft.look(draft.path(word, text)).kind != "missing"
    if whole or ("," not in text and " " not in text):
        return draft.private(word, text, role="initrd")
    modules: list[str] = []
    for item in _split(text):
        path, space, words = item.partition(" ")
        copy = draft.private(word, path, role="initrd")
        modules.append((copy + space + words).replace(",", ",,"))
    draft.note(word, "the guest sees the names of the modules' copies: /private/initrd, /private/initrd-2, ...")
    return ",".join(modules)


def _split(text: str) -> list[str]:
    """Return the parts between single commas; a doubled one stands for a comma. Source: get_opt_value, QEMU 7.2."""
    parts = [""]
    at = 0
    while at < len(text):
        if text[at] != ",":
            parts[-1] += text[at]
        elif text[at + 1 : at + 2] == ",":
            parts[-1] += ","
            at += 1
        else:
            parts.append("")
        at += 1
    return parts


def _bios(draft: Draft, word: Word) -> None:
    draft.emit("-bios", rom(draft, word, word.value, role="firmware"))


def _option_rom(draft: Draft, word: Word) -> None:
    """The implied key is ``romfile``. Source: qemu_option_rom_opts, softmmu/vl.c."""
    option = Properties(word, "romfile")
    if option.data.get("romfile"):
        option.data["romfile"] = rom(draft, word, option.text("romfile"), role="option-rom")
    draft.emit("-option-rom", option.value())


def _data_folder(draft: Draft, word: Word) -> None:
    """A folder of programs' files is searched in the dry run, which finds what is used of it."""
    if word.value in ("help", "?"):
        draft.facts["no_guest"] = True
    elif not draft.path(word, word.value).startswith(f"{_PROGRAMS}/"):
        draft.refuse(
            word,
            f"QEMU sees no folder of the host but those below {_PROGRAMS}, and those only while it starts",
            fix="name the files themselves (-bios FILE, -device ...,romfile=FILE), or install them below /usr/local",
        )
    draft.emit("-L", word.value if word.value in ("help", "?") else draft.path(word, word.value))


def _fw_cfg(draft: Draft, word: Word) -> None:
    item = Properties(word, "name")
    if item.data.get("file"):
        item.data["file"] = draft.private(word, item.text("file"), role="fw_cfg")
    # A string is the guest's, whatever it begins with.
    draft.emit("-fw_cfg", item.value())


def _smbios(draft: Draft, word: Word) -> None:
    """Of type 11 each value= and path= is one more string: keys may be there several times."""
    items: list[Item] = []
    for item in parse_list(word):
        copied = item.key in ("file", "path")
        value = draft.private(word, item.value, role="smbios") if copied else item.value
        items.append(Item(key=item.key, value=value))
    draft.emit("-smbios", join_list(items))


def _acpitable(draft: Draft, word: Word) -> None:
    """data= and file= are lists of files with colons between. Source: acpi_table_add, hw/acpi/core.c."""
    items: list[Item] = []
    for item in parse_list(word):
        value = item.value
        if item.key in ("file", "data"):
            value = ":".join(draft.private(word, path, role="acpitable") for path in value.split(":"))
        items.append(Item(key=item.key, value=value))
    draft.emit("-acpitable", join_list(items))


def _add_fd(draft: Draft, word: Word) -> None:
    given = values(parse_list(word))
    number, owner = given.get("fd", ""), given.get("set", "")
    if not owner.isdecimal() or int(owner) >= SET_BASE:
        raise error(
            word, f"set={owner} is no set of the caller's", cause="depriv's own are from 1000 on", fix="write set=1"
        )
    given["fd"] = str(draft.inherited(word, number, role=f"add-fd-{owner}"))
    draft.emit("-add-fd", join_list([Item(key=key, value=value) for key, value in given.items()]), dry=())


def _trace(draft: Draft, word: Word) -> None:
    """file= is left out: with the log backend, Debian's, traces then go where -d goes, to the error output."""
    trace = Properties(word, "enable")
    if trace.help:
        draft.facts["no_guest"] = True
        draft.emit("-trace", word.value)
        return
    if trace.data.pop("file", None) is not None:
        draft.note(word, "file= has no effect: the trace goes to the standard error output")
    if trace.data.get("events"):
        trace.data["events"] = draft.private(word, trace.text("events"), role="trace-events")
    refuse_paths(draft, word, trace.data)
    if trace.data:
        draft.emit("-trace", trace.value(), dry=())


def _incoming(draft: Draft, word: Word) -> None:
    """QEMU reads a saved state from a descriptor: a pipe, a socket, or (until QEMU 10) a regular file."""
    kind, _, rest = word.value.partition(":")
    if word.value == "defer":
        draft.facts["waits"] = True
        text = "-incoming defer: QEMU locks its images once it has its state, after the audit: locks are not checked"
        draft.note(word, text, warning=True)
        draft.emit("-incoming", "defer", dry=())
        return
    path = _state_file(draft, word, kind, rest)
    role = draft.role("incoming")
    if kind == "fd":
        draft.take_late(word, rest, role=role)
    elif path:
        path = draft.path(word, path)
        draft.require(word, path, ("file",))
        draft.open(ReadFile(role=role, number=-1, path=path))
    else:
        raise error(word, "it is refused", cause=_NO_STREAM.get(kind, "QEMU has no network"), fix=_STREAM)
    draft.facts["incoming_role"] = role
    # Told by QMP once QEMU is audited: whoever wrote the state may take over what reads it.
    draft.emit("-incoming", "defer", dry=())


def _state_file(draft: Draft, word: Word, kind: str, rest: str) -> str:
    """Return the path of the file that a state is in: of ``file:PATH`` and ``exec:cat PATH``; "": none."""
    if kind == "file":
        path, _, offset = rest.partition(",offset=")
        if offset not in ("", "0"):
            fix = f"exec 5< <(tail -c +N {path}), then -incoming fd:5"
            draft.refuse(word, "QEMU gets the file opened at its beginning", fix=fix)
        return path
    program, _, path = rest.strip().partition(" ")
    path = path.strip().removeprefix("<").strip()
    simple = not any(char in _SHELL for char in path)
    return path if kind == "exec" and program in _CAT and simple else ""


HANDLERS = {
    "kernel": _private,
    "shim": _private,
    "dtb": _private,
    "initrd": _initrd,
    "bios": _bios,
    "option-rom": _option_rom,
    "L": _data_folder,
    "fw_cfg": _fw_cfg,
    "smbios": _smbios,
    "acpitable": _acpitable,
    "add-fd": _add_fd,
    "trace": _trace,
    "incoming": _incoming,
}
