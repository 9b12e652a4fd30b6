# SPDX-License-Identifier: Apache-2.0
"""The registry on disk: what is written is read, what rests rests, and what nobody wrote is not believed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.entries import EXPECTED, entry

from depriv import durable, proc
from depriv.collect import lived_s
from depriv.errors import HostError, NotFoundError, PlanError
from depriv.identity import DOMID_FIRST, DOMID_LAST
from depriv.policy import ENDS
from depriv.registry import REUSE_DELAY_S, Registry

if TYPE_CHECKING:
    from depriv.entry import Entry
    from depriv.report import Expected


def add(registry: Registry, made: Entry) -> None:
    """Make a domain and let go of its lock, as a start that is complete does."""
    with contextlib.ExitStack() as held:
        registry.add(made, held)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(str(tmp_path / "state"))
    made.prepare()
    return made


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def history(registry: Registry, freed: dict[int, float], boot: str = "") -> None:
    with open(f"{registry.folder}/history.json", "w", encoding="ascii") as file:
        json.dump({"boot": boot or proc.boot_id(), "freed": {str(domid): at for domid, at in freed.items()}}, file)


@pytest.mark.parametrize("expected", [None, EXPECTED])
def test_entry_is_read_as_it_was_written(registry: Registry, expected: Expected | None) -> None:
    made = entry(expected=expected)
    add(registry, made)
    assert Registry(registry.folder).entries() == (made,)
    assert registry.find("web") == registry.find("1") == made


def test_entries_come_in_order_of_domid(registry: Registry) -> None:
    for domid in (10, 9, 100, 1):
        add(registry, entry(f"d{domid}", domid))
    assert [one.domid for one in registry.entries()] == [1, 9, 10, 100]


def test_holding_says_what_planning_has_to_know(registry: Registry) -> None:
    add(registry, entry())
    (found,) = registry.entries()
    holding = found.holding
    assert (holding.name, holding.uid, holding.images) == ("web", 5001, ((1, 2, 0, True), (0, 0, 7, False)))


def test_domain_that_is_not_there_is_not_found(registry: Registry) -> None:
    add(registry, entry())
    for name in ("we", "webb", "2", "", "01", "WEB", "../1"):
        with pytest.raises(NotFoundError, match="there is no domain"):
            registry.find(name)


def test_number_is_a_domid_before_it_is_a_name(registry: Registry) -> None:
    # `destroy 7` must not end another domain because that one calls itself 7.
    add(registry, entry("7", 1))
    add(registry, entry("victim", 7))
    assert registry.find("7").name == "victim"


def test_host_without_a_registry_has_no_domains(tmp_path: Path) -> None:
    empty = Registry(str(tmp_path / "none"))
    assert empty.entries() == ()
    assert empty.next_domid() == DOMID_FIRST
    assert os.listdir(tmp_path) == []


def test_folders_and_files_are_roots_alone(registry: Registry) -> None:
    add(registry, entry())
    for root, folders, files in os.walk(registry.folder):
        for name in folders:
            assert os.stat(f"{root}/{name}").st_mode & 0o7777 == 0o700
        for name in files:
            assert os.stat(f"{root}/{name}").st_mode & 0o7777 == 0o600


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o710, 0o1700])
def test_folder_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(mode)
    if mode == 0o1700:
        Registry(str(folder)).prepare()  # sticky, and still its owner's alone
        return
    with pytest.raises(HostError, match="is not a folder of root's alone") as caught:
        Registry(str(folder)).prepare()
    assert f"mode {mode:04o}" in caught.value.cause
    assert "a folder that is depriv's own" in caught.value.fix
    assert "rm " not in caught.value.fix


def test_files_of_others_with_a_number_at_the_end_are_no_debris(registry: Registry) -> None:
    """Bug: in a folder that somebody used for other things, too, all that was called NAME.NUMBER was removed."""
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    others = [f"backup.{dead.pid}", f"libx.so.6.{dead.pid}", f"photos.2024.{dead.pid}", f"a.state.json.1.{dead.pid}"]
    ours = [f"state.json.1.{dead.pid}", f"history.json.2.{dead.pid}", f"boot.3.{dead.pid}", f"ended.4.{dead.pid}"]
    for name in (*others, *ours):
        with open(f"{registry.folder}/{name}", "w", encoding="ascii"):
            pass
    assert sorted(registry.debris()) == sorted(f"{registry.folder}/{name}" for name in ours)


def test_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError):
        Registry(str(tmp_path / "state")).prepare()
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with pytest.raises(HostError, match="is not a folder of root's alone") as caught:
        Registry(str(folder)).prepare()
    assert "owner 65534" in caught.value.cause


def test_file_in_place_of_the_folder_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(HostError) as caught:
        Registry(str(tmp_path / "state" / "below")).prepare()
    assert caught.value.fix


# Domids


def test_domids_count_up_and_a_freed_one_rests(registry: Registry) -> None:
    assert registry.next_domid() == 1
    add(registry, entry("a", 1))
    assert registry.next_domid() == 2
    add(registry, entry("b", 2))
    registry.remove(1)
    registry.remove(2)
    assert registry.next_domid() == 3
    history(registry, {1: boottime() - REUSE_DELAY_S - 1, 2: boottime() - REUSE_DELAY_S - 1})
    assert registry.next_domid() not in (1, 2)


def test_removal_leaves_no_file_and_remembers_when(registry: Registry) -> None:
    add(registry, entry())
    folder = registry.directory(1)
    for name in ("qmp", "log", "console", "lock"):
        with open(f"{folder}/{name}", "w", encoding="ascii"):
            pass
    registry.remove(1)
    assert registry.entries() == ()
    assert not os.path.exists(folder)
    with open(f"{registry.folder}/history.json", encoding="ascii") as file:
        assert list(json.load(file)["freed"]) == ["1"]


def test_after_the_last_domid_comes_the_first_free_one(registry: Registry) -> None:
    history(registry, {DOMID_LAST: boottime()})
    add(registry, entry("a", DOMID_FIRST))
    assert registry.next_domid() == DOMID_FIRST + 1


def test_no_domid_comes_twice_within_the_rest(registry: Registry) -> None:
    now = boottime()
    history(registry, {domid: now for domid in range(DOMID_FIRST, DOMID_LAST + 1) if domid != 77})
    assert registry.next_domid() == 77
    add(registry, entry("a", 77))
    with pytest.raises(PlanError, match="domids are in use, or were within the last 60 seconds") as caught:
        registry.next_domid()
    assert "wait a minute" in caught.value.fix


def test_history_does_not_grow_without_end(registry: Registry) -> None:
    history(registry, dict.fromkeys(range(1, 1000), boottime() - REUSE_DELAY_S - 1))
    add(registry, entry("a", 1000))
    registry.remove(1000)
    with open(f"{registry.folder}/history.json", encoding="ascii") as file:
        assert list(json.load(file)["freed"]) == ["1000"]


def test_domain_that_is_only_just_being_made_is_not_listed_but_its_domid_is_taken(registry: Registry) -> None:
    os.mkdir(registry.directory(1))
    assert registry.entries() == ()
    assert registry.next_domid() == 2


def test_names_that_are_no_domids_are_left_alone(registry: Registry) -> None:
    for name in ("lost+found", "1.bak", "-1"):
        os.mkdir(f"{registry.folder}/domains/{name}")
    assert registry.domids() == ()


# Locks and writing

HOLD = """
import sys
from depriv.registry import Registry
with Registry(sys.argv[1]).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_keeps_another_command_out_and_names_who_has_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "LOCK_TIMEOUT_S", 0.2)  # the figure alone
    argv = [sys.executable, "-c", HOLD, registry.folder]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(HostError, match="has been busy with the registry") as caught, registry.locked():
            pass
        assert f"process {other.pid} (" in caught.value.cause
        assert f") holds {registry.folder}/lock" in caught.value.cause
        other.kill()  # a lock ends with its holder
        other.wait()
        with registry.locked():
            pass


def test_lock_is_free_again_after_an_error(registry: Registry) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), registry.locked():
            raise ZeroDivisionError


def test_domain_has_a_lock_of_its_own(registry: Registry) -> None:
    add(registry, entry("a", 1))
    add(registry, entry("b", 2))
    with registry.locked(), registry.locked_domain(1), registry.locked_domain(2):
        pass
    with pytest.raises(NotFoundError), registry.locked_domain(3):
        pass


def test_domain_that_another_command_ended_is_gone_even_if_its_name_is_back(registry: Registry) -> None:
    first = entry("web", 1)
    add(registry, first)
    assert registry.current(first) == first
    registry.remove(1)
    with pytest.raises(NotFoundError, match="another command ended it"):
        registry.current(first)
    # The wall clock is anybody's to set: the same second says nothing.
    add(registry, first.replace(created_boot_ns=first.created_boot_ns + 1))
    with pytest.raises(NotFoundError, match="another command ended it"):
        registry.current(first)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '["1"]',
        "7",
        "null",
        '{"x": 1}',
        '{"boot": "BOOT"}',
        '{"boot": "BOOT", "freed": []}',
        '{"boot": "BOOT", "freed": {"1": "y"}}',
        '{"boot": "BOOT", "freed": {"x": 1}}',
        '{"boot": "BOOT", "freed": {"1": null}}',
        '{"boot": "BOOT", "freed": {"1": NaN, "2": Infinity, "3": 1e300}}',
        pytest.param('{"boot": "BOOT", "freed": {"1": 1' + "0" * 400 + "}}", id="huge"),
        pytest.param('{"boot": "BOOT", "freed": {"1": -1' + "0" * 400 + "}}", id="huge-negative"),
    ],
)
def test_damaged_history_stops_no_start_and_no_end(registry: Registry, text: str) -> None:
    path = Path(registry.folder, "history.json")
    path.write_text(text.replace("BOOT", proc.boot_id()))
    path.chmod(0o600)
    assert registry.next_domid() == 1
    add(registry, entry("web", 1))
    registry.remove(1)
    assert registry.next_domid() == 2
    assert list(json.loads(path.read_text())["freed"])[-1] == "1"


def test_history_of_another_boot_says_nothing_of_this_one(registry: Registry) -> None:
    """CLOCK_BOOTTIME begins anew: the times in it would be of the future."""
    history(registry, {1: boottime(), 2: 1e9}, boot="0" * 36)
    assert registry.next_domid() == 1
    history(registry, {1: boottime()})
    assert registry.next_domid() == 2


def test_reservation_that_cannot_be_written_leaves_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(HostError, match="cannot write"):
            add(registry, entry("web", 1))
    assert registry.domids() == ()
    assert registry.debris() == ()
    add(registry, entry("web", 1))


# How a guest ended


def test_noted_end_is_read_until_it_is_forgotten(registry: Registry) -> None:
    add(registry, entry())
    assert registry.end_noted(1) == ""
    for how in ENDS:
        registry.note_end(1, how)
        assert registry.end_noted(1) == how
    registry.forget_end(1)
    registry.forget_end(1)
    assert registry.end_noted(1) == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"ended": 7}', '{"ended": ["crash"]}', '{"ended": "explode"}'])
def test_noted_end_that_is_none_is_no_end(registry: Registry, text: str) -> None:
    add(registry, entry())
    Path(registry.directory(1), "ended").write_text(text)
    assert registry.end_noted(1) == ""


def test_end_of_a_domain_that_is_gone_cannot_be_noted_and_makes_no_folder(registry: Registry) -> None:
    with pytest.raises(HostError):
        registry.note_end(1, "crash")
    assert registry.domids() == ()


# Clocks and boots


def test_a_clock_set_back_by_a_year_or_forward_changes_nothing(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLOCK_REALTIME is anybody's to set, NTP's above all; identities and rests go by CLOCK_BOOTTIME."""
    first = entry(created_boot_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    add(registry, first)
    year = 365 * 86400
    real = time.time()
    for shift in (-year, year):
        monkeypatch.setattr(time, "time", lambda shift=shift: real + shift)
        assert registry.current(first) == first
        assert 0 <= lived_s(first) < 60
    monkeypatch.setattr(time, "time", lambda: real - year)
    registry.remove(1)
    assert registry.next_domid() == 2
    monkeypatch.setattr(time, "time", lambda: real + year)
    assert registry.next_domid() == 2
    history(registry, {1: boottime() - REUSE_DELAY_S - 1, DOMID_LAST: boottime() - REUSE_DELAY_S - 1})
    assert registry.next_domid() == 1  # the positive control: by that clock the minute is over


def test_process_of_another_boot_is_dead_whoever_has_its_number(registry: Registry) -> None:
    ours, begun = os.getpid(), proc.start_time(os.getpid())
    now = entry(expected=EXPECTED.replace(pid=ours, starttime=begun), toolstack_pid=ours, toolstack_starttime=begun)
    assert registry.life(now) == "running"
    before = now.replace(boot_id="0" * 36)
    assert registry.life(before) == "dead"
    assert registry.life(now.replace(expected=EXPECTED.replace(pid=ours, starttime=begun + 1))) == "dead"


def test_start_goes_on_while_its_domain_is_locked_and_its_command_lives(registry: Registry) -> None:
    ours, begun = os.getpid(), proc.start_time(os.getpid())
    made = entry(state="starting", toolstack_pid=ours, toolstack_starttime=begun)
    with contextlib.ExitStack() as held:
        registry.add(made, held)
        assert registry.is_starting(made)
        assert not registry.is_starting(made.replace(boot_id="0" * 36))
        assert not registry.is_starting(made.replace(toolstack_starttime=begun + 1))
        assert not registry.is_starting(made.replace(state="running"))
    assert not registry.is_starting(made)  # the command lives on, its start is over


def test_new_boot_and_lost_folder_are_seen_once(registry: Registry) -> None:
    assert registry.is_new
    registry.mark_seen()
    assert not registry.is_new
    Path(registry.folder, "boot").write_text('{"boot": "00000000-0000-0000-0000-000000000000"}')
    assert registry.is_new
    for text in ("", "[]", "{"):
        Path(registry.folder, "boot").write_text(text)
        assert registry.is_new
    registry.mark_seen()
    assert not Registry(registry.folder).is_new


# Who holds what


def test_quarantined_domain_keeps_its_ids_and_images_and_gives_up_its_name(registry: Registry) -> None:
    add(registry, entry("web", 1, state="quarantined"))
    add(registry, entry("web", 2))
    first, second = (one.holding for one in registry.entries())
    assert (first.name_free, first.uid, first.images) == (True, 5001, ((1, 2, 0, True), (0, 0, 7, False)))
    assert not second.name_free
    assert registry.find("web").domid == 2
    assert registry.find("1").state == "quarantined"


@pytest.mark.parametrize("kind", ["deep", "link", "fifo", "file"])
def test_removal_takes_whatever_is_in_a_folder_and_nothing_outside(
    registry: Registry, tmp_path: Path, kind: str
) -> None:
    add(registry, entry())
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    inside = Path(registry.directory(1), "x")
    match kind:
        case "deep":
            (inside / "y" / "z").mkdir(parents=True)
        case "link":
            inside.symlink_to(tmp_path / "outside")
        case "fifo":
            os.mkfifo(inside)
        case _:
            inside.touch()
    registry.remove(1)
    assert os.listdir(f"{registry.folder}/domains") == []
    assert os.listdir(tmp_path / "outside") == ["file"]
