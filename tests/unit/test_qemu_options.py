# SPDX-License-Identifier: Apache-2.0
"""The table of QEMU's options: whole, shown in the reference, and each option with what does its treatment."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest
from tests.support.host import need

from depriv.qemu import expand
from depriv.qemu.options import BY_FD, OPTIONS, PASSED, PRIVATE_COPY, REFUSED, TAKEN_OVER, table
from depriv.qemu.translate import HANDLERS

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "reference" / "qemu-options.md"
# Words behind an option that its help sets off as if there were a value, or as if there were none.
HELP_MISLEADS = {"dtb", "async-teardown"}
EXPANDED = {"readconfig", "set"}  # replaced by other words before any is handled


def listed() -> dict[str, bool]:
    """Return the options that the installed QEMU lists, and whether a value follows."""
    program = shutil.which("qemu-system-x86_64")
    need(program is not None, what="qemu")
    assert program is not None
    text = subprocess.run([program, "-help"], capture_output=True, text=True, timeout=60, check=True).stdout
    found: dict[str, bool] = {}
    for line in text.splitlines():
        if not line.startswith("-"):
            continue
        names, _, rest = line.partition(" ")
        found[names.lstrip("-")] = rest[:1] not in ("", " ")
        if rest.startswith("or -"):
            # "-h or -help     display ..."
            found[rest.removeprefix("or -").split()[0]] = False
            found[names.lstrip("-")] = False
        if "/-" in names:
            # "-fda/-fdb file  use ..."
            del found[names.lstrip("-")]
            found |= dict.fromkeys(names.lstrip("-").split("/-"), rest[:1] not in ("", " "))
    return found


def test_every_option_that_the_installed_qemu_lists_is_in_the_table() -> None:
    options = listed()
    assert len(options) > 90
    assert sorted(name for name in options if name not in OPTIONS) == []


def test_an_option_takes_a_value_where_qemu_says_so() -> None:
    wrong = [name for name, takes in listed().items() if takes != OPTIONS[name].takes_value]
    assert set(wrong) <= HELP_MISLEADS


def test_a_hidden_or_deprecated_option_is_in_the_table() -> None:
    for name in ("M", "portrait", "audio-help", "qtest", "async-teardown", "enable-sync-profile", "fda", "fdb", "hdd"):
        assert name in OPTIONS


def test_the_reference_has_the_table_as_it_is() -> None:
    assert PAGE.read_text().endswith("\n\n" + table())


def test_the_table_has_a_row_for_every_option_in_order() -> None:
    rows = re.findall(r"^\| `-([\w-]+)( VALUE)?` \| ([a-z ]+) \|", table(), re.MULTILINE)
    assert {(name, bool(value), how) for name, value, how in rows} == {
        (name, option.takes_value, option.how) for name, option in OPTIONS.items()
    }
    assert [name.lower() for name, _, _ in rows] == sorted(name.lower() for name in OPTIONS)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_refused_option_says_why_and_what_to_do_instead(name: str) -> None:
    option = OPTIONS[name]
    assert option.how in (PASSED, BY_FD, PRIVATE_COPY, TAKEN_OVER, REFUSED)
    if option.how == REFUSED:
        assert option.why
        assert option.instead
    if option.how == TAKEN_OVER:
        assert option.why


def test_no_option_that_names_the_host_is_without_a_handler() -> None:
    for name, option in OPTIONS.items():
        if option.how in (BY_FD, PRIVATE_COPY, TAKEN_OVER):
            assert name in HANDLERS or name in EXPANDED, name


def test_there_is_no_handler_of_an_option_that_is_not_known() -> None:
    assert set(HANDLERS) <= set(OPTIONS)


def test_every_section_of_a_configuration_file_is_an_option_with_a_value() -> None:
    for name in expand._SECTIONS:
        assert OPTIONS[name].takes_value
