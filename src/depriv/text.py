# SPDX-License-Identifier: Apache-2.0
"""Text from QEMU or the guest, made safe to show.

A terminal obeys what it is sent: a name or an error text with escape sequences in it could retitle the window, forge
earlier lines, or answer on the administrator's behalf. Whatever comes from inside passes through here before it is
printed or logged. Pure.
"""

from __future__ import annotations


def printable(text: str, limit: int = 500) -> str:
    """Return ``text`` on one line of at most ``limit`` characters, with every invisible character as an escape.

    Visible is what ``str.isprintable`` says: not the controls of C0 and C1, not line and paragraph separators, not
    bidirectional and other format characters, not lone surrogates. A second pass changes nothing.
    """
    if len(text) <= limit and text.isprintable():
        return text
    # Every character takes at least one place, so what is beyond the limit need not be looked at.
    shown = _escaped(text[: limit + 1], keep="")
    return shown if len(shown) <= limit else shown[: max(limit - 3, 0)] + "..."[:limit]


def console_safe(data: bytes) -> str:
    r"""Return console output as text that cannot drive a terminal.

    Newlines and tabs stay, CR LF becomes a newline; every other invisible character (see ``printable``) and every
    byte that is not UTF-8 becomes an escape such as ``\x1b``.
    """
    text = data.decode("utf-8", "backslashreplace").replace("\r\n", "\n")
    # Most lines hold nothing to escape, and a console buffer may hold megabytes: look closer only where needed.
    return "\n".join(line if line.isprintable() else _escaped(line, keep="\t") for line in text.split("\n"))


def one_line(text: str) -> str:
    """Return all of ``text`` on one line, with every invisible character but tab as an escape."""
    return text if text.isprintable() else _escaped(text, keep="\t")


def _escaped(text: str, *, keep: str) -> str:
    """Return ``text`` with its invisible characters but those in ``keep`` as Python escapes."""
    return "".join(
        char if char in keep or char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def digest(key: tuple[str, ...]) -> str:
    """Return a short name for a key: 64-bit FNV-1a, twice. It names folders; it guards nothing."""
    result = ""
    for seed in (0xCBF29CE484222325, 0x84222325CBF29CE4):
        value = seed
        for byte in "\n".join(key).encode():
            value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
        result += f"{value:016x}"
    return result
