# SPDX-License-Identifier: Apache-2.0
"""A command that is killed before any of its calls leaves the registry as it was or as it was to be, never between."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.entries import entry, killed_at

from depriv.registry import Registry, remove_tree

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


AT_MOST = 2000


def debris_cleared(registry: Registry) -> None:
    """Clear what a killed command left, as `depriv gc` does, and see that nothing else was there."""
    for path in registry.debris():
        remove_tree(path)
    names = set(os.listdir(registry.folder)) | {"boot", "history.json", "lock"}
    assert names == {"boot", "domains", "history.json", "lock"}
    assert all(name.isdecimal() for name in os.listdir(f"{registry.folder}/domains"))
    for domid in registry.domids():
        assert set(os.listdir(registry.directory(domid))) <= {"state.json", "state.copy", "lock", "ended", "qmp"}


def test_save_that_is_killed_leaves_the_old_entry_or_the_new(registry: Registry) -> None:
    old, new = entry(), entry(state="ending", trouble="x" * 300)
    add(registry, old)
    seen: list[str] = []
    for number in range(1, AT_MOST):
        registry.save(old)
        killed = killed_at(number, lambda: registry.save(new))
        found = Registry(registry.folder).entries()
        assert found in ((old,), (new,))
        seen.append(found[0].state)
        debris_cleared(registry)
        assert Registry(registry.folder).entries() == found
        if not killed:
            break
    assert list(dict.fromkeys(seen)) == ["running", "ending"]


def test_reservation_that_is_killed_leaves_an_entry_or_an_empty_folder_that_is_known(registry: Registry) -> None:
    seen: list[str] = []
    for number in range(1, AT_MOST):
        killed = killed_at(number, lambda: add(registry, entry()))
        found = Registry(registry.folder).entries()
        if found:
            assert found == (entry(),)
            assert registry.empty_folders() == ()
        else:
            assert registry.empty_folders() == registry.domids()
        seen.append("entry" if found else f"{len(registry.domids())} folders")
        debris_cleared(registry)
        with registry.locked():  # the dead keep no lock
            registry.remove(1, used=False)
        assert registry.domids() == ()
        if not killed:
            break
    assert list(dict.fromkeys(seen)) == ["0 folders", "1 folders", "entry"]


def test_removal_that_is_killed_leaves_the_entry_or_nothing_and_then_its_number_rests(registry: Registry) -> None:
    seen: list[str] = []
    for number in range(1, AT_MOST):
        Path(registry.folder, "history.json").unlink(missing_ok=True)
        add(registry, entry())
        for name in ("qmp", "ended"):
            Path(registry.directory(1), name).touch(0o600)
        killed = killed_at(number, lambda: registry.remove(1))
        found = Registry(registry.folder).entries()
        assert found in ((entry(),), ())
        seen.append("there" if found else "gone")
        assert registry.empty_folders() == ()
        assert registry.next_domid() == 2
        debris_cleared(registry)
        assert Registry(registry.folder).entries() == found
        registry.remove(1, used=False)
        if not killed:
            break
    assert list(dict.fromkeys(seen)) == ["there", "gone"]
    assert os.listdir(f"{registry.folder}/domains") == []


def test_note_that_is_killed_leaves_all_of_it_or_none(registry: Registry) -> None:
    add(registry, entry())
    seen: list[str] = []
    for number in range(1, AT_MOST):
        registry.forget_end(1)
        killed = killed_at(number, lambda: registry.note_end(1, "poweroff"))
        seen.append(registry.end_noted(1))
        debris_cleared(registry)
        if not killed:
            break
    assert list(dict.fromkeys(seen)) == ["", "poweroff"]


def test_debris_of_a_writer_that_lives_is_left_to_it(registry: Registry) -> None:
    add(registry, entry())
    with subprocess.Popen(["sleep", "60"]) as writer:
        beside = f"{registry.directory(1)}/state.json.7.{writer.pid}"
        Path(beside).touch()
        assert registry.debris() == ()
        writer.kill()
        writer.wait()
        assert registry.debris() == (beside,)
