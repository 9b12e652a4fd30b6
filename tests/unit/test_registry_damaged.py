# SPDX-License-Identifier: Apache-2.0
"""What nobody wrote is not believed: an entry is read from its copy, and of none left it is said that it is damaged."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.entries import EXPECTED, entry, no_descriptor_to_spare

from depriv.durable import DamagedError
from depriv.errors import HostError, NotFoundError
from depriv.registry import Registry

if TYPE_CHECKING:
    from depriv.entry import Entry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(str(tmp_path / "state"))
    made.prepare()
    return made


def add(registry: Registry, made: Entry) -> None:
    """Make a domain and let go of its lock, as a start that is complete does."""
    with contextlib.ExitStack() as held:
        registry.add(made, held)


def spoil(registry: Registry, *names: str, text: str = "{") -> None:
    for name in names:
        Path(registry.directory(1), name).write_text(text)


def states(registry: Registry) -> list[str]:
    return [one.state for one in Registry(registry.folder).entries()]


def test_entry_cut_off_at_any_length_is_read_from_its_copy(registry: Registry) -> None:
    made = entry(expected=EXPECTED)
    add(registry, made)
    path = Path(registry.directory(1), "state.json")
    text = path.read_bytes()
    for length in range(len(text)):
        path.write_bytes(text[:length])
        assert registry.read(1) == made, length
    assert Registry(registry.folder).entries() == (made,)


@pytest.mark.parametrize(
    "text",
    ["", "{", "nonsense", "[]", "{}", '{"version": 1}', '{"version": "x"}', '{"version": 2, "name": "x"}'],
)
def test_damaged_entry_is_read_from_its_copy_and_nothing_is_lost(registry: Registry, text: str) -> None:
    made = entry(expected=EXPECTED)
    add(registry, made)
    spoil(registry, "state.json", text=text)
    assert registry.entries() == (made,)
    assert registry.find("web") == registry.find("1") == registry.current(made) == made
    assert registry.empty_folders() == ()


def test_damaged_copy_alone_harms_nothing_and_is_mended_by_the_next_write(registry: Registry) -> None:
    made = entry()
    add(registry, made)
    spoil(registry, "state.copy")
    assert registry.entries() == (made,)
    registry.save(made)
    spoil(registry, "state.json")
    assert registry.entries() == (made,)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 3, "name": "web"}'])
def test_domain_with_no_readable_entry_is_listed_as_damaged_with_its_number_and_the_reason(
    registry: Registry, text: str
) -> None:
    add(registry, entry())
    spoil(registry, "state.json", "state.copy", text=text)
    (found,) = registry.entries()
    assert (found.domid, found.state, found.name) == (1, "damaged", "(damaged-1)")
    assert f"{registry.directory(1)}/state.json" in found.trouble
    assert found.expected is None
    assert registry.find("1") == found
    assert registry.life(found) == "dead"
    with pytest.raises(NotFoundError):
        registry.find("web")


def test_damaged_domain_hides_no_other_and_keeps_its_number(registry: Registry) -> None:
    add(registry, entry())
    add(registry, entry("good", 2))
    spoil(registry, "state.json", "state.copy")
    assert registry.find("good").domid == 2
    assert states(registry) == ["damaged", "running"]
    assert registry.next_domid() == 3


def test_entry_of_another_domid_is_no_entry_of_this_one(registry: Registry) -> None:
    """Else ending the one would end the other."""
    add(registry, entry("one", 1))
    add(registry, entry("two", 2))
    for name in ("state.json", "state.copy"):
        shutil.copy(f"{registry.directory(2)}/{name}", f"{registry.directory(1)}/{name}")
    assert [(one.domid, one.state) for one in registry.entries()] == [(1, "damaged"), (2, "running")]
    assert "it is of domain 2" in registry.entries()[0].trouble


@pytest.mark.parametrize("name", ["state.json", "state.copy"])
def test_link_and_fifo_in_place_of_an_entry_are_neither_followed_nor_waited_for(
    registry: Registry, tmp_path: Path, name: str
) -> None:
    made = entry()
    add(registry, made)
    path = Path(registry.directory(1), name)
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(path.read_text().replace("web", "evil"))
    path.unlink()
    path.symlink_to(elsewhere)
    assert Registry(registry.folder).entries() == (made,)
    path.unlink()
    os.mkfifo(path)
    began = time.monotonic()
    assert Registry(registry.folder).entries() == (made,)
    assert time.monotonic() - began < 2


def test_entry_that_we_have_no_descriptor_to_read_with_is_not_damaged_but_not_read(registry: Registry) -> None:
    """What is damaged is believed to be dead where the kernel shows nobody; a guest that runs would be cleared."""
    made = entry()
    add(registry, made)
    with no_descriptor_to_spare(), pytest.raises(HostError, match="cannot read") as caught:
        registry.read(1)
    assert not isinstance(caught.value, DamagedError)
    assert registry.read(1) == made


def test_entry_that_was_replaced_is_read_anew(registry: Registry) -> None:
    add(registry, entry())
    other = Registry(registry.folder)
    assert other.read(1) == entry()
    for state in ("ending", "quarantined", "running") * 5:
        registry.save(entry(state=state))
        found = other.read(1)
        assert found is not None
        assert found.state == state
