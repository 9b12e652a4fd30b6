# SPDX-License-Identifier: Apache-2.0
"""QEMU's user-mode network as passt's words: the same addresses, forwards and name server. Pure.

Sources: net/slirp.c (net_slirp_init, slirp_hostfwd: defaults and grammar), QEMU 7.2; passt(1) of 2023-03-09
(Debian 12). What differs is told as notes.
"""

from __future__ import annotations

from depriv.qemu.socket_words import port_number, warn_of_reach
from depriv.qemu.words import error, is_on, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.qemu.draft import Draft
    from depriv.qemu.words import Item, Word

_NET = "10.0.2.0/24"
# The host's part of the addresses in any network, as libslirp has them in 10.0.2.0/24.
_GATEWAY, _GUEST, _NAMES = 0x0202, 0x020F, 0x0203
REFUSED = {
    "guestfwd": ("QEMU would start a program or connect by itself", "let the service listen: 10.0.2.2 is this host"),
    "smb": ("QEMU would start smbd, which has the user's rights", "share the folder with virtiofsd or by scp"),
    "smbserver": ("it belongs to smb=", "leave it out"),
    "tftp": ("QEMU would open the folder's files by name", "serve it with a TFTP server: 10.0.2.2 is this host"),
    "tftp-server-name": ("it belongs to tftp=", "leave it out"),
    "bootfile": ("it belongs to tftp=", "boot with -kernel, or from a disk"),
}
_WITHOUT_EFFECT = ("hostname", "ipv6-net", "ipv6-prefix", "ipv6-prefixlen", "ipv6-host", "ipv6-dns")


def check_user(draft: Draft, word: Word, items: tuple[Item, ...]) -> None:
    """Refuse what a user-mode network cannot have confined, whoever provides it.

    Raises:
        ConfigError: an item names a program or a folder.
    """
    for item in items:
        if item.key in REFUSED:
            why, fix = REFUSED[item.key]
            draft.refuse(word, f"{item.key}=: {why}", fix=fix)


def passt_words(draft: Draft, word: Word, items: tuple[Item, ...]) -> tuple[str, ...]:
    """Return passt's words for a ``-netdev user``, but for the descriptor and how it runs.

    Raises:
        ConfigError: an address or a forward is wrong, or passt has no such thing.
    """
    given = values(items)
    for key in _WITHOUT_EFFECT:
        if key in given:
            draft.note(word, f"{key}= is left out: passt does not have it")
    result: list[str] = []
    if given.get("ipv4") and not is_on(given["ipv4"]):
        result.append("--ipv6-only")
        guest = ""
    else:
        guest, more = _addresses(word, given)
        result += more
        if given.get("ipv6") and not is_on(given["ipv6"]):
            result.append("--ipv4-only")
    # One each: passt(1) has a list in one word, but passt of 2023-03 takes that for one name.
    for item in items:
        if item.key in ("dnssearch", "domainname"):
            result += ["--search", item.value]
    forwards = [item.value for item in items if item.key == "hostfwd"]
    if not is_on(given.get("restrict", "off")):
        return (*result, *_forwards(draft, word, forwards, guest))
    if forwards:
        why = "restrict=on with hostfwd=: passt has no forward into a guest that may not answer anyone else"
        draft.refuse(word, why, fix="leave one of the two out; or use a tap, and the host's packet filter")
    # DHCP and ARP go on: tests/qemu/test_translate_chars.py.
    return (*result, "--no-tcp", "--no-udp", "--no-icmp", "--no-map-gw")


def _addresses(word: Word, given: dict[str, str]) -> tuple[str, list[str]]:
    """Return the guest's IPv4 address, and the words for it, its network, gateway and name server."""
    from ipaddress import IPv4Address, IPv4Network  # noqa: PLC0415 (8 ms, only where a network is)

    text = given.get("net", _NET)
    if "/" not in text:
        raise error(word, f"net={text} has no mask", fix=f"write net={text}/24")
    try:
        net = IPv4Network(text, strict=False)
        first, hosts = int(net.network_address), int(net.hostmask)
        chosen = {
            key: IPv4Address(given[key]) if key in given else IPv4Address(first | (part & hosts))
            for key, part in (("dhcpstart", _GUEST), ("host", _GATEWAY), ("dns", _NAMES))
        }
    except ValueError as failed:
        raise error(word, "it is no IPv4 network or address", cause=str(failed), fix="write 10.0.2.0/24") from failed
    for key, address in chosen.items():
        if address not in net:
            raise error(word, f"{key}={address} is not in {net}", fix=f"give an address in it, or leave {key}= out")
    guest = str(chosen["dhcpstart"])
    words = ["--address", guest, "--netmask", str(net.prefixlen), "--gateway", str(chosen["host"])]
    return guest, [*words, "--dns-forward", str(chosen["dns"])]


def _forwards(draft: Draft, word: Word, forwards: list[str], guest: str) -> list[str]:
    result: list[str] = []
    for forward in forwards:
        result += _forward(draft, word, forward, guest)
    if "--tcp-ports" in result and "--udp-ports" not in result:
        # Else passt forwards the same ports of UDP too.
        result += ["--udp-ports", "none"]
    return result


def _forward(draft: Draft, word: Word, text: str, guest: str) -> list[str]:
    """Return the words for one ``[tcp|udp]:[ADDRESS]:PORT-[ADDRESS]:PORT``."""
    grammar = "write hostfwd=tcp:127.0.0.1:2222-:22"
    here, dash, there = text.partition("-")
    protocol, colon, here = here.partition(":")
    address, second, port = here.rpartition(":")
    target, third, guest_port = there.rpartition(":")
    if not (dash and colon and second and third) or protocol not in ("tcp", "udp", ""):
        raise error(word, f"hostfwd={text} is not understood", fix=grammar)
    if target not in ("", guest):
        why = f"passt forwards to the guest's own address only, {guest or 'IPv6'}, and not to {target}"
        draft.refuse(word, why, fix=grammar)
    numbers = port_number(word, port), port_number(word, guest_port)
    if 0 in numbers:
        raise error(word, f"hostfwd={text}: port 0", fix=grammar)
    address = address.removeprefix("[").removesuffix("]") or "0.0.0.0"  # noqa: S104 (as QEMU has it; said aloud)
    if not address.replace(".", "").replace(":", "").isalnum():
        raise error(word, f"hostfwd={text}: {address!r} is no address", fix=grammar)
    warn_of_reach(draft, word, address, f"the forward of port {numbers[0]}")
    return [f"--{protocol or 'tcp'}-ports", f"{address}/{numbers[0]}:{numbers[1]}"]
