# SPDX-License-Identifier: Apache-2.0
"""Text from inside: shown, and unable to drive a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depriv.text import console_safe, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Device 'ide0' not found", "Device 'ide0' not found"),
        ("Gerät läuft ✓", "Gerät läuft ✓"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\r\nerror: forged", r"a\r\nerror: forged"),
        ("\x7f\x9b2J", r"\x7f\x9b2J"),
        ("\u202ecod.exe\u2066", r"\u202ecod.exe\u2066"),
        ("\u2028\u2029\u200b", r"\u2028\u2029\u200b"),
        ("\ud800", r"\ud800"),
        ("\U000e0001", r"\U000e0001"),
    ],
)
def test_invisible_characters_become_visible(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_long_text_is_cut_and_says_so() -> None:
    assert printable("x" * 501) == "x" * 497 + "..."
    assert printable("x" * 500) == "x" * 500


def test_escapes_count_towards_the_limit() -> None:
    assert len(printable("\x1b" * 500)) == 500


@given(st.text(st.characters(exclude_categories=())), st.integers(0, 40))
def test_result_is_one_visible_line_within_the_limit_and_stable(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert shown.isprintable()
    assert printable(shown, limit) == shown
    shown.encode()


def test_console_keeps_lines_and_tabs() -> None:
    assert console_safe(b"login:\r\n\tname\n\xe2\x9c\x93") == "login:\n\tname\n✓"


def test_console_escapes_what_drives_a_terminal() -> None:
    data = b"\x1b[2J\x07\x08 \x7f \xc2\x9b2J\rover\x0e"
    assert console_safe(data) == r"\x1b[2J\x07\x08 \x7f \x9b2J\rover\x0e"


def test_console_shows_bytes_that_are_not_text() -> None:
    assert console_safe(b"\xff\x9b\xe2\x82") == r"\xff\x9b\xe2\x82"


@given(st.binary())
def test_console_output_never_holds_a_control_character_but_newline_and_tab(data: bytes) -> None:
    shown = console_safe(data)
    assert all(char.isprintable() or char in "\n\t" for char in shown)
    shown.encode()
