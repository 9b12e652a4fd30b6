# SPDX-License-Identifier: Apache-2.0
"""Displays and sound, and what QEMU makes of its own accord where no display is asked for. Pure.

A VNC server starts without a socket; its listening socket is handed over by QMP (display-update) once QEMU runs.
Sources: ui/vnc.c (vnc_display_open, vnc_display_get_address), softmmu/vl.c (qemu_create_default_devices,
default_list), qapi/ui.json, QEMU 7.2.
"""

from __future__ import annotations

from depriv.openings import ListenTcp, ListenUnixHere
from depriv.qemu.char_options import HANDLERS as CHARACTER_DEVICES
from depriv.qemu.char_options import word_like
from depriv.qemu.draft import Vnc
from depriv.qemu.socket_words import LAST_PORT, split_address, warn_of_reach
from depriv.qemu.words import Word, error, join_list, parse_json, parse_list, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from depriv.qemu.draft import Draft

VNC_PORT = 5900  # of display 0
_INSTEAD = "use -vnc 127.0.0.1:0 and a VNC viewer, or -display none"
_VNC_REFUSED = {
    "websocket": ("a second listening socket cannot be handed over", "put websockify in front of the VNC port"),
    "reverse": ("QEMU has no network to connect to a viewer", "let the viewer connect: leave reverse out"),
    "sasl": (
        "SASL reads the host's configuration and passwords",
        "use password-secret=, or tls-creds= with tls-authz=",
    ),
}
_CONSOLE = "vc:80Cx24C"


def _vnc(draft: Draft, word: Word) -> None:
    items = parse_list(word, implied="vnc")
    given = values(items)
    address = given.get("vnc", "")
    if "-vnc" in draft.argv:
        why = "QEMU takes a socket only for the first of its VNC servers"
        draft.refuse(word, why, fix="leave one: several viewers can share it")
    for key, (why, fix) in _VNC_REFUSED.items():
        if given.get(key, "off") not in ("off", "no", "false", "n"):
            draft.refuse(word, f"{key}: {why}", fix=fix)
    for key, value in given.items():
        if "/" in value and key != "vnc":
            draft.refuse(word, f"{key}= names a path that depriv does not know", fix=f"leave {key}= out")
    if address != "none":
        role = draft.role("vnc")
        draft.vncs.append(Vnc(role=role))
        _listen(draft, word, address, given.get("to", ""), role)
    rest = [item for item in items if item.key not in ("vnc", "to", "ipv4", "ipv6")]
    draft.emit("-vnc", ",".join(["none", *([join_list(rest)] if rest else [])]))


def _listen(draft: Draft, word: Word, address: str, last: str, role: str) -> None:
    """Have the socket of a VNC server listened on, to be handed over."""
    if address.startswith("unix:"):
        path = draft.path(word, address.removeprefix("unix:"))
        kind = draft.look(path).kind
        if kind not in ("missing", "socket"):
            raise error(
                word, f"cannot make the socket {path}", cause=f"there is a {kind} of that name", fix="name another"
            )
        draft.open(ListenUnixHere(role=role, number=-1, path=path))
        return
    host, display = split_address(word, address)
    displays = (display, int(last) if last.isdecimal() else display)
    if last and not last.isdecimal():
        raise error(word, f"to={last} is no display", fix="give the last display to try")
    if max(displays) > LAST_PORT - VNC_PORT:
        raise error(word, f"display {max(displays)} is too high", fix="give a display, not a port: 0 is port 5900")
    warn_of_reach(draft, word, host, "VNC")
    port_to = VNC_PORT + displays[1] if last else 0
    draft.open(ListenTcp(role=role, number=-1, host=host, port=VNC_PORT + display, port_to=port_to))


def _display(draft: Draft, word: Word) -> None:
    if word.value.startswith("vnc="):
        _vnc(draft, word_like(word, name="vnc", value=word.value.removeprefix("vnc=")))
        return
    if word.value.startswith("{"):
        kind = str(parse_json(word).get("type", ""))
    else:
        kind = values(parse_list(word, implied="type")).get("type", "")
    if kind in ("help", "?"):
        draft.facts["no_guest"] = True
        draft.emit("-display", "help")
    elif kind == "none":
        draft.emit("-display", word.value)
    elif kind == "default":
        draft.note(word, "no window is opened: QEMU has no access to the user's session")
        draft.emit("-display", "none")
    else:
        draft.refuse(word, f"{kind}: it needs the user's session, or a terminal of QEMU's own", fix=_INSTEAD)


def _audio(draft: Draft, word: Word) -> None:
    if word.value.startswith("{"):
        driver = str(parse_json(word).get("driver", ""))
    else:
        driver = values(parse_list(word, implied="driver")).get("driver", "")
    if driver in ("help", "?"):
        draft.facts["no_guest"] = True
    elif driver != "none":
        why = f"{driver}: QEMU would reach for the user's sound server, a device or a file by name"
        draft.refuse(
            word, why, fix=f"use -{word.name} none with the rest as it is: the guest has its card, and silence"
        )
    draft.emit(f"-{word.name}", word.value)


HANDLERS: dict[str, Callable[[Draft, Word], None]] = {
    "vnc": _vnc,
    "display": _display,
    "audiodev": _audio,
    "audio": _audio,
}


def finish(draft: Draft) -> None:
    """Say what QEMU would choose by itself: the display, and the default monitor and serial port.

    QEMU makes no default monitor when it has one by ``-mon``, and it has depriv's own: so the default is named here.
    """
    if not draft.seen & {"vnc", "display", "nographic"}:
        draft.emit("-display", "none")
        if not draft.facts.get("no_guest"):
            draft.note(
                None, "no display is asked for: -display none, where QEMU alone would open a window or a VNC server"
            )
    if "nodefaults" in draft.seen:
        return
    monitor = not draft.seen & {"monitor", "qmp", "qmp-pretty", "mon"}
    serial = "serial" not in draft.seen and not _has_serial_port(draft)
    if "nographic" not in draft.seen:
        if monitor and draft.vncs:
            _add(draft, "monitor", _CONSOLE)
    elif monitor and serial:
        _add(draft, "serial", "mon:stdio")
    elif monitor or serial:
        _add(draft, "monitor" if monitor else "serial", "stdio")


def _has_serial_port(draft: Draft) -> bool:
    """Tell whether a -device is a serial port: then QEMU makes none by default."""
    devices = [value for name, value in zip(draft.argv, draft.argv[1:], strict=False) if name == "-device"]
    return any(value.removeprefix("driver=").startswith("isa-serial") or '"isa-serial"' in value for value in devices)


def _add(draft: Draft, name: str, value: str) -> None:
    """Append an option as if the caller had written it."""
    CHARACTER_DEVICES[name](draft, Word(name=name, value=value, text=f"-{name} {value}"))
