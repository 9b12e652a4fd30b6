# SPDX-License-Identifier: Apache-2.0
"""The table of keys, and the page that lists them."""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depriv.xlkeys import OWN_KEYS, all_keys, edit_distance, find_key, find_misspelt

PAGE = pathlib.Path(__file__).parents[2] / "man" / "depriv.cfg.5"


def documented() -> tuple[set[str], set[str]]:
    """Return the keys the man page explains, and those it lists as ignored."""
    page = PAGE.read_text()
    explained = {line.removeprefix('.BI "').split()[0] for line in page.splitlines() if line.startswith('.BI "')}
    section = page.partition(".SH IGNORED KEYS\n")[2].partition("\n.SH ")[0]
    paragraphs = [paragraph.split("\n", 2)[-1] for paragraph in section.split("\n.TP")[1:]]
    return explained, {word for paragraph in paragraphs for word in paragraph.split()}


def test_the_man_page_names_every_key_and_no_other_as_what_it_is() -> None:
    keys = {name: find_key(name) for name in all_keys()}
    explained, ignored = documented()
    assert explained == {name for name, key in keys.items() if key and key.used}
    assert ignored == {name for name, key in keys.items() if key and not key.used}


def test_every_key_has_a_type_and_every_ignored_key_a_reason() -> None:
    for name in all_keys():
        key = find_key(name)
        assert key is not None
        assert key.type in ("string", "int", "bool", "list", "string-or-list")
        assert key.used == (not key.reason)
        assert name.islower()


def test_the_table_has_the_keys_of_xl_and_our_own() -> None:
    assert len(all_keys()) >= 175
    assert set(OWN_KEYS) < set(all_keys())
    for name in ("dm_restrict", "vcpus", "xenstore_quota", "stubdomain_memory", "pvshim_extra", "usbversion"):
        assert find_key(name) is not None


def test_a_security_key_is_one() -> None:
    for name in ("dm_restrict", "device_model_args_hvm", "disk_backing", "name", "vnclisten", "spicepasswd"):
        key = find_key(name)
        assert key is not None
        assert key.security
    key = find_key("viridian")
    assert key is not None
    assert not key.security


def test_a_key_that_xl_does_not_read_is_unknown() -> None:
    for name in ("", "frobnicate", "dm_restric", "kernel ", "DM_RESTRICT"):
        assert find_key(name) is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dm_restric", "dm_restrict"),
        ("dm_restirct", "dm_restrict"),
        ("dmrestrict", "dm_restrict"),
        ("dm_restricted", "dm_restrict"),
        ("device_model_arg", "device_model_args"),
        ("device_modeluser", "device_model_user"),
        ("disks", "disk"),
        ("dsik", "disk"),
        ("pcl", "pci"),
        ("kernal", "kernel"),
        ("bootloader_restict", "bootloader_restrict"),
    ],
)
def test_a_misspelt_security_key_is_recognised(name: str, meant: str) -> None:
    assert find_misspelt(name) == meant


@pytest.mark.parametrize("name", ["frobnicate", "xyz", "comment", "restrict", "model", "pae2", "a", "vcpu"])
def test_other_unknown_keys_are_not_taken_for_security_keys(name: str) -> None:
    assert find_misspelt(name) == ""


WORDS = st.text("abc", max_size=6)


@given(WORDS, WORDS)
def test_the_edit_distance_is_symmetric_and_bounded(one: str, other: str) -> None:
    distance = edit_distance(one, other)
    assert distance == edit_distance(other, one)
    assert abs(len(one) - len(other)) <= distance <= max(len(one), len(other))
    assert (distance == 0) == (one == other)


def test_swapped_neighbours_are_one_edit() -> None:
    assert edit_distance("kernel", "kerenl") == 1
    assert edit_distance("ca", "abc") == 3
