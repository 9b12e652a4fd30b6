# SPDX-License-Identifier: Apache-2.0
"""Character devices: ``-chardev`` and the short forms of ``-serial``, ``-monitor`` and their like. Pure.

A short form becomes a ``-chardev`` with the label that QEMU gives it itself. Sources: chardev/char.c
(qemu_chr_parse_compat), chardev/char-socket.c, softmmu/vl.c (monitor_parse, serial_parse), gdbstub.c, QEMU 7.2;
what QEMU accepts together with ``fd=`` and ``/dev/fdset`` is held by tests/qemu/test_translate_chars.py.
"""

from __future__ import annotations

from depriv.openings import WriteFile
from depriv.qemu.properties import is_own_set
from depriv.qemu.socket_words import connect_tcp, connect_unix, listen_tcp, no_abstract, port_number, split_address
from depriv.qemu.words import Item, error, is_on, join_list, parse_list, values, with_items

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from depriv.qemu.draft import Draft
    from depriv.qemu.words import Word

    Items: TypeAlias = tuple[Item, ...]

OWN_IDS = ("depriv-qmp", "depriv-events")  # the launcher's own monitors
_SOCKETS = ("tcp", "telnet", "tn3270", "websocket")
_NAMELESS = ("null", "pty", "stdio", "msmouse", "wctablet", "braille", "testdev")
# They name nothing of the host. A spice channel without a spice server is QEMU's to refuse.
_DEVICES = ("null", "vc", "ringbuf", "memory", "stdio", "pty", "mux", "hub", "msmouse", "wctablet", "testdev")
_PASSED = (*_DEVICES, "spicevmc", "spiceport", "qemu-vdagent")
_REFUSED = {
    "udp": ("QEMU has no network, and a datagram socket has no connection to hand over", "use socket, path= or host="),
    "pipe": ("QEMU opens its two FIFOs by names that it makes itself", "use socket,path=PATH,server=on"),
    "parallel": ("a parallel port of the host takes ioctls that need a privilege", "use file,path=PATH"),
    "parport": ("a parallel port of the host takes ioctls that need a privilege", "use file,path=PATH"),
    "braille": ("QEMU would connect to the host's brlapi", "leave it out"),
    "dbus": ("QEMU would connect to the user's D-Bus", "use socket,path=PATH,server=on"),
}
# What tells QEMU where a socket is: all of it is told by fd= instead.
_WHERE = ("path", "host", "port", "to", "ipv4", "ipv6", "abstract", "tight", "reconnect", "reconnect-ms", "fd")


def chardev(draft: Draft, word: Word, items: Items) -> None:
    """Append the ``-chardev`` that ``items`` come to.

    Raises:
        ConfigError: the backend is refused, or names what is not fit.
    """
    given = values(items)
    label = given.get("id", "")
    check_id(word, label)
    if label in OWN_IDS:
        raise error(word, f"{label} is depriv's own monitor", fix="give it another id")
    backend = given.get("backend", "")
    if backend in _REFUSED:
        why, fix = _REFUSED[backend]
        draft.refuse(word, f"{backend}: {why}", fix=fix)
    items = _logged(draft, word, items, label)
    if backend in _BACKENDS:
        items = _BACKENDS[backend](draft, word, items, label)
    elif backend not in _PASSED:
        draft.refuse(word, f"depriv knows no character device {backend!r}", fix="see -chardev help for QEMU's names")
    elif "path" in given:
        draft.refuse(word, f"path= of {backend} would be made by QEMU, which has no folder", fix="leave path= out")
    if backend == "stdio":
        draft.facts["stdio"] = True
    if backend == "pty":
        draft.facts["ptys"] = True
    empty = [Item(key="backend", value="null"), Item(key="id", value=label)]
    empty += [item for item in items if item.key == "mux"]
    draft.emit("-chardev", _join(items), dry=("-chardev", _join(items if backend == "mux" else tuple(empty))))


def check_id(word: Word, label: str) -> None:
    """Refuse an id that is missing or that QEMU does not take. Source: id_wellformed, util/id.c, QEMU 7.2."""
    rest = label.replace("-", "a").replace(".", "a").replace("_", "a")
    if not (label[:1].isalpha() and rest.isalnum() and label.isascii()):
        raise error(word, f"{label!r} is no id" if label else "it has no id", fix="write id=NAME, a letter first")


def file_to_write(draft: Draft, word: Word, path: str, *, role: str, append: bool) -> str:
    """Have a file opened for writing and return its name for QEMU.

    Raises:
        ConfigError: there is something of that name, but no regular file.
    """
    if is_own_set(path):
        return path
    path = draft.path(word, path)
    kind = draft.look(path).kind
    if kind not in ("missing", "file"):
        fix = "name a regular file; for the terminal use stdio, for a serial line serial,path="
        raise error(word, f"cannot write to {path}", cause=f"it is no regular file: {kind}", fix=fix)
    number = draft.number(word)
    draft.open(WriteFile(role=draft.role(role), number=number, path=path, append=append))
    return draft.fdset(number)


def _join(items: Items) -> str:
    """Return the words of a -chardev: its backend is the value alone."""
    backend = values(items)["backend"]
    rest = join_list([item for item in items if item.key != "backend"])
    return f"{backend},{rest}"


def _logged(draft: Draft, word: Word, items: Items, label: str) -> Items:
    given = values(items)
    if "logfile" not in given:
        return items
    append = is_on(given.get("logappend", "off"))
    name = file_to_write(draft, word, given["logfile"], role=f"{label}-log", append=append)
    return with_items(items, {"logfile": name})


def _socket(draft: Draft, word: Word, items: Items, label: str) -> Items:
    given = values(items)
    server = is_on(given.get("server", "off"))
    no_abstract(draft, word, on=is_on(given.get("abstract", "off")))
    if "tls-creds" in given and not server:
        # "'tls_creds' option is incompatible with 'fd' address type as client": chardev/char-socket.c, QEMU 7.2
        why = "QEMU takes no TLS on a connection that is made for it"
        draft.refuse(
            word, why, fix="let stunnel or socat make it, and give path= of the UNIX socket that they listen on"
        )
    if any(given.get(key, "0") != "0" for key in ("reconnect", "reconnect-ms")):
        draft.note(word, "reconnect= is left out: QEMU cannot connect a second time", warning=True)
    number = _socket_number(draft, word, given, label)
    changes: dict[str, str | None] = dict.fromkeys(_WHERE)
    changes["fd"] = str(number)
    if server:
        if is_on(given.get("wait", "on")):
            draft.note(word, "QEMU does not wait for a connection (wait=off): the guest starts without")
        changes["wait"] = "off"
    return with_items(items, changes)


def _socket_number(draft: Draft, word: Word, given: dict[str, str], label: str) -> int:
    server = is_on(given.get("server", "off"))
    if "fd" in given:
        return draft.inherited(word, given["fd"], role=label)
    if "path" in given:
        return (
            draft.listen(word, given["path"], role=label)
            if server
            else connect_unix(draft, word, given["path"], role=label)
        )
    if "port" not in given:
        raise error(word, "it names no socket", fix="give path=, host= and port=, or fd=")
    host = given.get("host", "").removeprefix("[").removesuffix("]")
    port = port_number(word, given["port"])
    if server:
        last = port_number(word, given.get("to", "0"))
        return listen_tcp(draft, word, host, (port, last), role=label)
    return connect_tcp(draft, word, host, port, role=label)


def _file(draft: Draft, word: Word, items: Items, label: str) -> Items:
    given = values(items)
    path = given.get("path", "")
    if path == "/dev/null":
        return with_items(items, {"backend": "null", "path": None, "append": None})
    changes: dict[str, str | None] = {
        "path": file_to_write(draft, word, path, role=label, append=is_on(given.get("append", "off")))
    }
    if "input-path" in given:  # since QEMU 8.1
        step = draft.file(word, given["input-path"], role=f"{label}-input", access="ro")
        changes["input-path"] = draft.fdset(step.number)
    return with_items(items, changes)


def _serial(draft: Draft, word: Word, items: Items, label: str) -> Items:
    step = draft.file(word, values(items).get("path", ""), role=label, access="rw", kinds=("char",))
    return with_items(items, {"path": draft.fdset(step.number)})


_BACKENDS: dict[str, Callable[[Draft, Word, Items, str], Items]] = {
    "socket": _socket,
    "file": _file,
    "serial": _serial,
    "tty": _serial,
}


# The options.


def _chardev_option(draft: Draft, word: Word) -> None:
    items = parse_list(word, implied="backend")
    if items and (items[0].value in ("help", "?") or [item.key for item in items[1:]] == ["help"]):
        draft.facts["no_guest"] = True
        draft.emit("-chardev", word.value)
        return
    if word.value.startswith("{"):
        raise error(word, "QEMU takes no JSON here", fix="write -chardev BACKEND,id=NAME,key=value")
    chardev(draft, word, items)


def expand(word: Word, label: str) -> Items:
    """Return a short form as the items of a ``-chardev`` with the id ``label``.

    Raises:
        ConfigError: QEMU knows no such form.
    """
    text = word.value.removeprefix("mon:")
    muxed = text != word.value
    kind, _, rest = text.partition(":")
    more: Items = ()
    if text in _NAMELESS:
        # With the monitor on it too, Ctrl-C is the guest's.
        more = (Item(key="signal", value="off"),) if muxed and text == "stdio" else ()
        kind = text
    elif kind == "vc":
        more = _size(word, rest)
    elif kind in _SOCKETS:
        address, _, options = rest.partition(",")
        host, port = split_address(word, address)
        more = (Item(key="host", value=host), Item(key="port", value=str(port)))
        more += (Item(key=kind, value="on"),) if kind != "tcp" else ()
        more += parse_list(word, text=options)
        kind = "socket"
    elif kind == "unix":
        kind, more = "socket", parse_list(word, implied="path", text=rest)
    elif kind in ("file", "pipe", "udp"):
        more = (Item(key="path", value=rest),)
    elif text.startswith("/dev/"):
        kind = "parallel" if text.startswith("/dev/parport") else "serial"
        more = (Item(key="path", value=text),)
    else:
        raise error(word, f"QEMU knows no character device {text!r}", fix="write unix:PATH,server=on,wait=off")
    head = (Item(key="backend", value=kind), Item(key="id", value=label))
    return (*head, *more, Item(key="mux", value="on")) if muxed else (*head, *more)


def _size(word: Word, text: str) -> Items:
    """Return the items of ``vc:800x600`` (pixels) or ``vc:80Cx24C`` (characters)."""
    if not text:
        return ()
    names = ("cols", "rows") if text.endswith("C") else ("width", "height")
    numbers = text.replace("C", "").split("x")
    if len(numbers) != len(names) or not all(number.isdecimal() for number in numbers):
        raise error(word, f"{text!r} is no size", fix="write vc:800x600 or vc:80Cx24C")
    return tuple(Item(key=key, value=number) for key, number in zip(names, numbers, strict=True))


def redirect(draft: Draft, word: Word, label: str) -> None:
    """Append an option whose value is a short form, the form made a ``-chardev`` first.

    ``none`` and ``chardev:ID`` are passed. With ``mon:`` a monitor is on the same device.
    """
    if word.value == "none" or word.value.startswith("chardev:"):
        draft.emit(f"-{word.name}", word.value)
        return
    chardev(draft, word, expand(word, label))
    draft.emit(f"-{word.name}", f"chardev:{label}")
    if word.value.startswith("mon:") and word.name in ("serial", "parallel", "debugcon"):
        draft.emit("-mon", f"chardev={label},mode=readline")
        if word.name != "debugcon":
            draft.seen.add("mon")  # it is the default monitor's substitute: qemu_init, softmmu/vl.c


def _serial_option(draft: Draft, word: Word) -> None:
    redirect(draft, word, f"{word.name}{draft.argv.count(f'-{word.name}')}")


def _monitor(draft: Draft, word: Word) -> None:
    # Not emitted: depriv's own monitors keep QEMU from making a default one.
    if word.name == "monitor" and word.value == "none":
        return
    count = sum(draft.argv.count(name) for name in ("-monitor", "-qmp", "-qmp-pretty"))
    redirect(draft, word, f"compat_monitor{count}")


def _debugcon(draft: Draft, word: Word) -> None:
    redirect(draft, word, "debugcon")


def _gdb(draft: Draft, word: Word) -> None:
    if word.name == "s":
        word = word_like(word, name="gdb", value="tcp::1234")
    if word.value.startswith("tcp:"):
        word = word_like(word, name="gdb", value=f"{word.value},wait=off,nodelay=on,server=on")
    redirect(draft, word, "gdb")


def word_like(word: Word, *, name: str, value: str) -> Word:
    """Return another option that stands for a word: same place and text in messages."""
    return word.replace(name=name, value=value)


def _tpmdev(draft: Draft, word: Word) -> None:
    kind = values(parse_list(word, implied="type")).get("type", "")
    if kind == "help":
        draft.facts["no_guest"] = True
        draft.emit("-tpmdev", "help")
        return
    if kind != "emulator":
        why = f"{kind}: QEMU would search /sys for the way to cancel a command of the host's TPM"
        draft.refuse(word, why, fix="start swtpm, and use -tpmdev emulator,id=NAME,chardev=ID with a socket chardev")
    # Without a TPM at its other end QEMU does not start.
    draft.emit("-tpmdev", word.value, dry=())


HANDLERS: dict[str, Callable[[Draft, Word], None]] = {
    "chardev": _chardev_option,
    "serial": _serial_option,
    "parallel": _serial_option,
    "monitor": _monitor,
    "qmp": _monitor,
    "qmp-pretty": _monitor,
    "debugcon": _debugcon,
    "gdb": _gdb,
    "s": _gdb,
    "tpmdev": _tpmdev,
}
