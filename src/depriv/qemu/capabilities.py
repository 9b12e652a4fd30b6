# SPDX-License-Identifier: Apache-2.0
"""Recognise a command line that only asks a QEMU what it can do, as libvirt's do before it starts a domain. Pure.

There is no guest then, no image, no network, and nobody but the caller to talk to. Source: qemuProcessQMPLaunch,
src/qemu/qemu_process.c, libvirt 9.0 to 11.
"""

from __future__ import annotations

from depriv.qemu.options import OPTIONS
from depriv.qemu.properties import Properties
from depriv.qemu.words import parse_words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.qemu.words import Word

_WORDS = ("S", "no-user-config", "nodefaults", "nographic", "machine", "M", "qmp", "pidfile", "daemonize")


def asks_what_it_can_do(argv: tuple[str, ...]) -> bool:
    """Tell whether QEMU's words after the program make a machine without parts, and a monitor for the caller alone.

    Raises:
        ConfigError: a word is wrong.
    """
    words = parse_words(argv, {name: option.takes_value for name, option in OPTIONS.items()})
    machines = [word for word in words if word.name in ("machine", "M")]
    return bool(machines) and all(word.name in _WORDS and _is_harmless(word) for word in words)


def _is_harmless(word: Word) -> bool:
    if word.name in ("machine", "M"):
        machine = Properties(word, "type")
        return machine.text("type") == "none" and set(machine.data) <= {"type", "accel"}
    # A socket of the host's network would be open to others on this host.
    return word.name != "qmp" or word.value.startswith("unix:")
