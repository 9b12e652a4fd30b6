# SPDX-License-Identifier: Apache-2.0
"""Networks: ``-netdev``, ``-nic`` and ``-net``. Pure.

Every backend becomes a ``-netdev`` with a descriptor, and ``-nic`` and ``-net`` become one with what connects it to the
guest's card. Sources: net/net.c (net_client_init1, net_param_nic), net/tap.c, net/stream.c, net/dgram.c,
net/vhost-user.c, QEMU 7.2; Documentation/networking/tuntap.rst, Linux 6.1.
"""

from __future__ import annotations

from depriv.openings import OpenTap, StartPasst
from depriv.qemu.char_options import check_id
from depriv.qemu.passt import check_user, passt_words
from depriv.qemu.socket_words import connect_tcp, connect_unix, listen_tcp, no_abstract, port_number, split_address
from depriv.qemu.words import (
    Item,
    Word,
    error,
    flatten,
    is_on,
    join_list,
    parse_json,
    parse_list,
    values,
    with_items,
)
from depriv.records import cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from depriv.qemu.draft import Draft

    Items: TypeAlias = tuple[Item, ...]

_STREAM = "use stream,id=NAME,server=off,addr.type=unix,addr.path=PATH, or a tap"
_REFUSED = {
    "l2tpv3": ("QEMU has no network to send from", "make the tunnel with ip l2tp, bridge it, and use tap,br=BRIDGE"),
    "vde": ("QEMU would connect to the switch by name", "use vde_plug with a tap, and tap,ifname=NAME"),
    "af-xdp": ("QEMU would load a program into the kernel", "use tap,br=BRIDGE"),
    "netmap": ("QEMU would open /dev/netmap by name", "use tap,br=BRIDGE"),
    "passt": ("QEMU would start passt itself", "use user: depriv starts passt for it"),
    # net_vhost_claim_chardev wants a chardev that knows by its address that it passes descriptors.
    "vhost-user": ("QEMU takes it on a socket it connects or binds itself, which it may not", "use tap,vhost=on"),
}
_SCRIPTS = ("script", "downscript")
_NO_CARD = ("none", "microvm")  # machines without a card of their own
_DRY_HUB = 900


def _items(word: Word, text: str) -> Items:
    """Return the items of a backend, from a list or from JSON."""
    if not text.startswith("{"):
        return parse_list(word, implied="type", text=text)
    data = parse_json(word)
    items: list[Item] = []
    for key, value in data.items():
        if isinstance(value, list):
            # A list of strings: {"str": "tcp::2222-:22"} each.
            entries = cast("list[object]", value)
            items += (item.replace(key=key) for entry in entries for item in flatten({key: entry}))
        else:
            items += flatten({key: value})
    return tuple(items)


def backend(draft: Draft, word: Word, items: Items) -> None:
    """Append the ``-netdev`` that ``items`` come to.

    Raises:
        ConfigError: the backend is refused, or names what is not fit.
    """
    given = values(items)
    kind = given.get("type", "")
    label = given.get("id", "")
    check_id(word, label)
    if kind in _REFUSED:
        why, fix = _REFUSED[kind]
        draft.refuse(word, f"{kind}: {why}", fix=fix)
    if kind not in _BACKENDS:
        draft.refuse(word, f"depriv knows no network {kind!r}", fix="see -netdev help for QEMU's names")
    items = _BACKENDS[kind](draft, word, items, label)
    hub = f"hubport,id={label},hubid={_DRY_HUB + draft.argv.count('-netdev')}"
    draft.emit("-netdev", _join(items), dry=("-netdev", _join(items) if kind == "hubport" else hub))


def _join(items: Items) -> str:
    given = values(items)
    rest = [item for item in items if item.key not in ("type", "id")]
    return ",".join([given["type"], join_list([Item(key="id", value=given["id"]), *rest])])


def _user(draft: Draft, word: Word, items: Items, label: str) -> Items:
    check_user(draft, word, items)
    if draft.allowed.keep_net:
        draft.note(
            word, "QEMU stays in the host's network namespace: a guest that takes it over is on it", warning=True
        )
        return items
    if not draft.allowed.passt:
        why = "QEMU has no network, and passt, which would be its user-mode network, is not installed"
        draft.refuse(word, why, fix="apt-get install passt; or --keep-net, which leaves QEMU in the host's network")
    number = draft.number(word)
    draft.open(StartPasst(role=draft.role(label), number=number, words=passt_words(draft, word, items)))
    return _stream_items(label, number, server=False)


def _stream_items(label: str, number: int, *, server: bool) -> Items:
    return (
        Item(key="type", value="stream"),
        Item(key="id", value=label),
        Item(key="server", value="on" if server else "off"),
        Item(key="addr.type", value="fd"),
        Item(key="addr.str", value=str(number)),
    )


# Taps.


def _tap(draft: Draft, word: Word, items: Items, label: str) -> Items:
    given = values(items)
    changes: dict[str, str | None]
    if "fd" in given or "fds" in given:
        key = "fd" if "fd" in given else "fds"
        taken = [str(draft.inherited(word, text, role=label)) for text in given[key].split(":")]
        changes = {key: ":".join(taken)}
        queues = len(taken)
    else:
        changes, queues = _open_tap(draft, word, given, label)
    return with_items(items, {**changes, **_vhost(draft, word, given, label, queues)})


def _open_tap(draft: Draft, word: Word, given: dict[str, str], label: str) -> tuple[dict[str, str | None], int]:
    name, bridge = given.get("ifname", ""), given.get("br", "")
    if given.get("helper"):
        draft.note(word, "helper= is left out: depriv opens the tap and joins it to the bridge itself")
        bridge = bridge or "br0"
    for key in _SCRIPTS:
        if given.get(key, "no") not in ("no", ""):
            why = f"{key}=: QEMU may start no program"
            draft.refuse(word, why, fix="write br=BRIDGE; or join ifname=NAME beforehand, and script=no,downscript=no")
    if "script" not in given and not bridge:
        if not name:
            why = "QEMU would run /etc/qemu-ifup for a new tap; it may start no program"
            draft.refuse(
                word, why, fix="write br=BRIDGE, or ifname=NAME,script=no,downscript=no for one that is set up"
            )
        draft.note(word, f"/etc/qemu-ifup is not run: {name} has to be up and joined already", warning=True)
    for text in (name, bridge):
        check_interface(word, text)
    queues = int(given["queues"]) if given.get("queues", "").isdecimal() else 1
    if given.get("queues", "1") != str(queues) or not queues:
        raise error(word, f"queues={given['queues']} is no number of queues", fix="write queues=2, say")
    numbers = tuple(draft.number(word) for _ in range(queues))
    vnet_hdr = is_on(given.get("vnet_hdr", "on"))
    draft.open(OpenTap(role=draft.role(label), numbers=numbers, name=name, bridge=bridge, vnet_hdr=vnet_hdr))
    changes: dict[str, str | None] = dict.fromkeys(("ifname", "br", "helper", "queues", "vnet_hdr", *_SCRIPTS))
    changes["fd" if queues == 1 else "fds"] = ":".join(str(number) for number in numbers)
    return changes, queues


def check_interface(word: Word, name: str) -> None:
    """Refuse what is no name of an interface. Source: dev_valid_name, net/core/dev.c, Linux 6.1; "" is none."""
    bad = "/" in name or ":" in name or name in (".", "..") or not name.isprintable() or " " in name
    if bad or len(name.encode()) > 15:
        raise error(word, f"{name!r} is no name of an interface", fix="see ip link; 15 characters at most")


def _vhost(draft: Draft, word: Word, given: dict[str, str], label: str, queues: int) -> dict[str, str | None]:
    """Return the items for the kernel's own data path, where it is asked for: /dev/vhost-net once per queue."""
    for key in ("vhostfd", "vhostfds"):
        if key in given:
            taken = [draft.inherited(word, text, role=f"{label}-vhost") for text in given[key].split(":")]
            return {key: ":".join(str(number) for number in taken)}
    if not (is_on(given.get("vhost", "off")) or is_on(given.get("vhostforce", "off"))):
        return {}
    draft.note(
        word, "vhost: the host's kernel reads the guest's queues itself, and the guest can attack that part of it"
    )
    steps = [
        draft.file(word, "/dev/vhost-net", role=f"{label}-vhost", access="rw", kinds=("char",)) for _ in range(queues)
    ]
    return {"vhostfd" if queues == 1 else "vhostfds": ":".join(str(step.number) for step in steps)}


def _bridge(draft: Draft, word: Word, items: Items, label: str) -> Items:
    given = {"br": "br0", **values(items)}
    changes, _ = _open_tap(draft, word, {key: given[key] for key in ("br", "helper") if key in given}, label)
    return with_items(items, {"type": "tap", **changes})


# Sockets.


def _socket(draft: Draft, word: Word, items: Items, label: str) -> Items:
    given = values(items)
    for key in ("mcast", "udp", "localaddr"):
        if key in given:
            draft.refuse(word, f"{key}=: QEMU has no network, and a datagram socket no connection", fix=_STREAM)
    if "fd" in given:
        return with_items(items, {"fd": str(draft.inherited(word, given["fd"], role=label))})
    if "listen" in given:
        host, port = split_address(word, given["listen"])
        return _stream_items(label, listen_tcp(draft, word, host, (port, 0), role=label), server=True)
    if "connect" in given:
        host, port = split_address(word, given["connect"])
        return _stream_items(label, connect_tcp(draft, word, host, port, role=label), server=False)
    raise error(word, "it names no socket", fix="write listen=HOST:PORT, connect=HOST:PORT or fd=N")


def _stream(draft: Draft, word: Word, items: Items, label: str) -> Items:
    given = values(items)
    server = is_on(given.get("server", "off"))
    no_abstract(draft, word, on=is_on(given.get("addr.abstract", "off")))
    if any(given.get(key, "0") != "0" for key in ("reconnect", "reconnect-ms")):
        draft.note(word, "reconnect= is left out: QEMU cannot connect a second time", warning=True)
    kind = given.get("addr.type", "")
    if kind == "fd":
        number = draft.inherited(word, given.get("addr.str", ""), role=label)
    elif kind == "unix" and server:
        number = draft.listen(word, given.get("addr.path", ""), role=label)
    elif kind == "unix":
        number = connect_unix(draft, word, given.get("addr.path", ""), role=label)
    elif kind == "inet":
        host = given.get("addr.host", "").removeprefix("[").removesuffix("]")
        port = port_number(word, given.get("addr.port", ""))
        last = port_number(word, given.get("addr.to", "0"))
        opened = listen_tcp(draft, word, host, (port, last), role=label) if server else None
        number = connect_tcp(draft, word, host, port, role=label) if opened is None else opened
    else:
        raise error(word, "it is refused", cause=f"addr.type={kind} cannot be handed over", fix=_STREAM)
    return _stream_items(label, number, server=server)


def _dgram(draft: Draft, word: Word, items: Items, label: str) -> Items:
    given = values(items)
    if given.get("local.type") != "fd" or any(key.startswith("remote.") for key in given):
        why = "QEMU has no network, and a datagram socket has no connection that could be handed over"
        draft.refuse(word, why, fix=f"{_STREAM}; or local.type=fd,local.str=N alone, a connected socket of the caller")
    number = draft.inherited(word, given.get("local.str", ""), role=label)
    return with_items(items, {"local.str": str(number)})


def _vdpa(draft: Draft, word: Word, items: Items, label: str) -> Items:
    given = values(items)
    if "vhostfd" in given:
        return with_items(items, {"vhostfd": str(draft.inherited(word, given["vhostfd"], role=label))})
    step = draft.file(word, given.get("vhostdev", ""), role=label, access="rw", kinds=("char",))
    return with_items(items, {"vhostdev": draft.fdset(step.number)})


def _hubport(draft: Draft, word: Word, items: Items, label: str) -> Items:
    del draft, word, label
    return items


_BACKENDS: dict[str, Callable[[Draft, Word, Items, str], Items]] = {
    "user": _user,
    "tap": _tap,
    "bridge": _bridge,
    "socket": _socket,
    "stream": _stream,
    "dgram": _dgram,
    "vhost-vdpa": _vdpa,
    "hubport": _hubport,
}


# The options.


def _own_id(draft: Draft) -> str:
    return f"depriv-net{draft.argv.count('-netdev')}"


def _prints(draft: Draft, word: Word, items: Items) -> bool:
    """Pass on a call for help, and tell whether it is one."""
    given = values(items)
    if given.get("type") in ("help", "?"):
        draft.emit(f"-{word.name}", "help")
    elif given.get("model") in ("help", "?"):
        draft.emit("-net", "nic,model=help")
    else:
        return False
    draft.facts["no_guest"] = True
    return True


def _netdev(draft: Draft, word: Word) -> None:
    items = _items(word, word.value)
    if not _prints(draft, word, items):
        backend(draft, word, items)


def _nic(draft: Draft, word: Word) -> None:
    items = _items(word, word.value)
    given = values(items)
    if _prints(draft, word, items):
        return
    if given.get("type") == "none":
        draft.emit("-nic", "none")
        return
    label = given.get("id") or _own_id(draft)
    backend(draft, word, with_items(items, {"id": label, "model": None, "mac": None, "macaddr": None}))
    names = {"model": "model", "mac": "macaddr", "macaddr": "macaddr"}
    card = [Item(key=names[item.key], value=item.value) for item in items if item.key in names]
    card.insert(0, Item(key="netdev", value=label))
    draft.emit("-net", f"nic,{join_list(card)}")


def _net(draft: Draft, word: Word) -> None:
    items = _items(word, word.value)
    given = values(items)
    if _prints(draft, word, items):
        return
    if given.get("type") in ("nic", "none"):
        draft.emit("-net", word.value)
        return
    label = given.get("id") or given.get("name") or _own_id(draft)
    backend(draft, word, with_items(items, {"id": label, "name": None}))
    # What -net connects is on hub 0, with the cards of -net nic.
    draft.emit("-netdev", f"hubport,id={label}-hub,hubid=0,netdev={label}")


HANDLERS: dict[str, Callable[[Draft, Word], None]] = {"netdev": _netdev, "nic": _nic, "net": _net}


def finish(draft: Draft) -> None:
    """Give the guest the network that QEMU gives one that asks for none: a card in a user-mode network."""
    if draft.seen & {"nic", "net", "netdev", "nodefaults"}:
        return
    if draft.facts.get("no_guest") or draft.facts.get("machine") in _NO_CARD:
        draft.emit("-nic", "none")
    elif draft.allowed.keep_net or draft.allowed.passt:
        _nic(draft, Word(name="nic", value="user", text="-nic user"))
    else:
        draft.note(None, "the guest has no network card: install passt for QEMU's default network", warning=True)
        draft.emit("-nic", "none")
