# SPDX-License-Identifier: Apache-2.0
"""Network specifications of xl.cfg(5): ``vif = [...]``. Pure.

Source: Xen's docs/man/xl-network-configuration.5.pod.in, parse_nic_config() in tools/xl/xl_parse.c and
tools/libs/util/libxlu_vif.c. Where xl prints "unrecognized argument" and goes on, this is an error.
"""

from __future__ import annotations

from depriv.config import Note, Vif
from depriv.xlcfg import Value, error_at, place_in
from depriv.xlspec import shown, split_items

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.errors import ConfigError

_UINT32_MAX = (1 << 32) - 1
_IFNAMSIZ = 16  # <linux/if.h>, with its NUL
_MTU = (68, 65535)  # RFC 791: every link carries 68 octets, and no packet is longer than 65535
_FACTORS = {"": 1, "K": 1000, "M": 1000_000, "G": 1000_000_000}
_MICROSECONDS = {"us": 1, "ms": 1000, "s": 1000_000}
_HEX = "0123456789abcdefABCDEF"
_AS_WRITTEN = {
    "bridge": "bridge",
    "gatewaydev": "gatewaydev",
    "netdev": "gatewaydev",
    "ip": "ip",
    "script": "script",
    "backend": "backend",
    "forwarddev": "forwarddev",
    "vlan": "vlan",
}
_NAMES = ("type", "mac", "model", "rate", "vifname", "devid", "mtu", "accel", *_AS_WRITTEN)


def parse_vif(value: Value, *, key: str = "vif") -> tuple[Vif, tuple[Note, ...]]:
    """Return the network card one specification describes, and notes on what of it has no effect; "" is a card too.

    Raises:
        ConfigError: the specification is wrong.
    """
    fields: dict[str, str | int] = {}
    notes: list[Note] = []
    for at, item in split_items(value.text):
        name, equals, said = item.partition("=")
        place = place_in(value, at)
        if not item:
            continue
        if item in ("trusted", "untrusted") or (equals and name == "accel"):
            text = f"{name} is ignored: it is about Xen's network front end"
            notes.append(Note(key=key, text=text, line=place.line, column=place.column))
        elif name.startswith("colo_"):
            raise _bad(value, at, f"{shown(name)}: COLO replication is not supported", "leave it out")
        elif not equals or name not in _NAMES:
            raise _bad(value, at, f"unknown parameter `{shown(name)}'", f"known are {', '.join(_NAMES)}")
        else:
            if name == "netdev":
                text = "netdev is the old name of gatewaydev"
                notes.append(Note(key=key, text=text, line=place.line, column=place.column))
            _take(value, at + len(name) + 1, name, said, fields)
    return Vif().replace(**fields), tuple(notes)


def _bad(value: Value, at: int, what: str, fix: str) -> ConfigError:
    """Return the error that points into the specification."""
    return error_at(place_in(value, at), f"vif specification: {what}", fix=fix)


def _take(  # noqa: C901 (one case per parameter)
    value: Value, at: int, name: str, said: str, fields: dict[str, str | int]
) -> None:
    """Check one parameter and store it."""
    if not said.isprintable():
        raise _bad(value, at, f"{name} has a control character", "remove it")
    match name:
        case "type":
            if said not in ("ioemu", "vif"):
                raise _bad(value, at, f"unknown type `{shown(said)}'", "it is ioemu or vif")
            fields["type"] = said
        case "mac":
            fields["mac"] = _mac(value, at, said)
        case "model":
            if not said or not said.isascii() or said.strip("abcdefghijklmnopqrstuvwxyz0123456789_-"):
                raise _bad(value, at, f"`{shown(said)}' is no model", "use e1000, rtl8139 or virtio-net")
            fields["model"] = said
        case "rate":
            _check_rate(value, at, said)
            fields["rate"] = said
        case "vifname":
            # As dev_valid_name() in Linux's net/core/dev.c has it.
            if not said or len(said.encode()) >= _IFNAMSIZ or said in (".", "..") or set(said) & set("/: \t"):
                fix = f"use at most {_IFNAMSIZ - 1} bytes, without `/', `:' and blanks"
                raise _bad(value, at, f"`{shown(said)}' is no name of a network interface", fix)
            fields["vifname"] = said
        case "devid":
            fields["devid"] = _number(value, at, name, said, (0, _UINT32_MAX >> 1))
        case "mtu":
            fields["mtu"] = _number(value, at, name, said, _MTU)
        case _:
            fields[_AS_WRITTEN[name]] = said


def _number(value: Value, at: int, name: str, said: str, bounds: tuple[int, int]) -> int:
    """Return a decimal number within bounds."""
    if not _is_decimal(said) or not bounds[0] <= int(said) <= bounds[1]:
        fix = f"use a number from {bounds[0]} to {bounds[1]}"
        raise _bad(value, at, f"{name} `{shown(said)}' is not possible", fix)
    return int(said)


def _is_decimal(text: str) -> bool:
    """Say whether this is a decimal number of reasonable length."""
    return text.isdecimal() and text.isascii() and len(text) <= 19


def _mac(value: Value, at: int, said: str) -> str:
    """Return a MAC address in lower case."""
    parts = said.split(":")
    if len(parts) != 6 or any(not part or len(part) > 2 or part.strip(_HEX) for part in parts):
        raise _bad(value, at, f"`{shown(said)}' is no MAC address", "write six hexadecimal pairs: 00:16:3e:12:34:56")
    octets = [int(part, 16) for part in parts]
    if octets[0] & 1:
        raise _bad(value, at, f"{shown(said)} is a multicast address", "use an even first pair, like 00:16:3e:12:34:56")
    if not any(octets):
        raise _bad(value, at, "a card cannot have the address of zeros", "leave mac out, or use 00:16:3e:12:34:56")
    return ":".join(f"{octet:02x}" for octet in octets)


def _check_rate(value: Value, at: int, said: str) -> None:
    """Refuse a rate that is not ``N[KMG](b|B)/s[@N(s|ms|us)]``, is zero, or does not fit 32 bits.

    Source: xlu_vif_parse_rate() in libxlu_vif.c, and its expected results in Xen's tools/xl/check-xl-vif-parse.
    """
    fix = "write it as 10MB/s, 100Mb/s or 10MB/s@20ms"
    speed, has_interval, interval = said.partition("@")
    number, factor, unit = speed[:-3], "", speed[-3:]
    if number[-1:] in ("K", "M", "G"):
        number, factor = number[:-1], number[-1]
    if unit not in ("B/s", "b/s") or not _is_decimal(number):
        raise _bad(value, at, f"`{shown(said)}' is no rate", fix)
    bytes_per_s = int(number) * _FACTORS[factor] // (1 if unit == "B/s" else 8)
    if not 0 < bytes_per_s <= _UINT32_MAX or int(number) > _UINT32_MAX:
        raise _bad(value, at, f"the rate `{shown(said)}' is not possible", "use 1B/s to 4294967295B/s")
    if not has_interval:
        return
    count = interval.rstrip("mus")
    unit = interval[len(count) :]
    if unit not in _MICROSECONDS or not _is_decimal(count):
        raise _bad(value, at, f"`{shown(interval)}' is no interval", fix)
    if not 0 < int(count) * _MICROSECONDS[unit] <= _UINT32_MAX:
        raise _bad(value, at, f"the interval `{shown(interval)}' is not possible", "use 1us to 4294967295us")
