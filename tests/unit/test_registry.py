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

import pytest

from depriv import durable, proc
from depriv.entry import Entry
from depriv.errors import HostError, NotFoundError, PlanError
from depriv.identity import DOMID_FIRST, DOMID_LAST
from depriv.registry import REUSE_DELAY_S, Registry
from depriv.report import Expected, Grant, Limit

EXPECTED = Expected(
    domain="web",
    domid=1,
    uid=5001,
    gid=5001,
    pid=42,
    starttime=99,
    restricted=True,
    limits=(Limit(name="CORE", soft=0, hard=0), Limit(name="AS", soft=-1, hard=-1)),
    environ=("LC_ALL=C",),
    cgroup="/depriv/1",
    grants=(Grant(role="xvda", kind="file", dev=1, ino=2, access="rw", path="/a", locked=True),),
)


def add(registry: Registry, made: Entry) -> None:
    """Make a domain and let go of its lock, as a start that is complete does."""
    with contextlib.ExitStack() as held:
        registry.add(made, held)


def entry(name: str = "web", domid: int = 1, expected: Expected | None = None) -> Entry:
    return Entry(
        name=name,
        domid=domid,
        state="running",
        uid=5000 + domid,
        gid=5000 + domid,
        reaper_uid=4999,
        shared=False,
        restricted=True,
        memory_mib=128,
        vcpus=1,
        accel="tcg",
        cgroup="",
        boot_id=proc.boot_id(),
        created_boot_ns=4,
        toolstack_pid=1,
        toolstack_starttime=2,
        created_at_s=3,
        images=((1, 2, 0, True), (0, 0, 7, False)),
        expected=expected,
    )


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(str(tmp_path / "state"))
    made.prepare()
    return made


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def history(registry: Registry, freed: dict[int, float]) -> None:
    with open(f"{registry.folder}/history.json", "w", encoding="ascii") as file:
        json.dump({"boot": proc.boot_id(), "freed": {str(domid): at for domid, at in freed.items()}}, file)


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
    assert caught.value.fix


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


# What nobody wrote


@pytest.mark.parametrize(
    "text",
    ["", "{", "nonsense", '{"version": 1}', '{"version": 2, "name": "x"}', '{"version": 1, "expected": null, "x": 1}'],
)
def test_damaged_entry_is_an_error_that_names_it(registry: Registry, text: str) -> None:
    add(registry, entry())
    with open(f"{registry.directory(1)}/state.json", "w", encoding="ascii") as file:
        file.write(text)
    with pytest.raises(HostError) as caught:
        registry.entries()
    assert caught.value.fix or caught.value.cause


def test_link_in_place_of_an_entry_is_not_followed(registry: Registry, tmp_path: Path) -> None:
    add(registry, entry())
    path = f"{registry.directory(1)}/state.json"
    os.rename(path, tmp_path / "elsewhere.json")
    os.symlink(tmp_path / "elsewhere.json", path)
    with pytest.raises(HostError, match="cannot read"):
        registry.entries()


def test_fifo_in_place_of_an_entry_is_not_waited_for(registry: Registry) -> None:
    add(registry, entry())
    path = f"{registry.directory(1)}/state.json"
    os.unlink(path)
    os.mkfifo(path)
    began = time.monotonic()
    with pytest.raises(HostError):
        registry.entries()
    assert time.monotonic() - began < 2


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
        assert f"process {other.pid} holds {registry.folder}/lock" in caught.value.cause
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


def test_entry_is_replaced_whole_or_not_at_all(registry: Registry) -> None:
    add(registry, entry())
    registry.save(entry().replace(state="ending"))
    assert registry.find("web").state == "ending"
    assert sorted(os.listdir(registry.directory(1))) == ["lock", "state.json"]
    os.chmod(registry.directory(1), 0o500)
    if os.geteuid() != 0:
        with pytest.raises(OSError, match="denied"):
            registry.save(entry())
    os.chmod(registry.directory(1), 0o700)
    assert registry.find("web").state == "ending"


def test_damaged_entry_hides_no_other_but_lets_nothing_new_start(registry: Registry) -> None:
    add(registry, entry("good", 1))
    add(registry, entry("bad", 2))
    Path(registry.directory(2), "state.json").write_bytes(b'{"version": 1, "name": "ba')
    found, damaged = registry.readable()
    assert [made.name for made in found] == ["good"]
    assert "damaged" in damaged[0].what
    assert registry.find("good").domid == 1
    with pytest.raises(HostError, match="damaged"):
        registry.entries()
    with pytest.raises(HostError, match="damaged"):
        registry.find("bad")


def test_domain_that_another_command_ended_is_gone_even_if_its_name_is_back(registry: Registry) -> None:
    first = entry("web", 1)
    add(registry, first)
    assert registry.current(first) == first
    registry.remove(1)
    with pytest.raises(NotFoundError, match="another command ended it"):
        registry.current(first)
    add(registry, first.replace(created_at_s=first.created_at_s + 1))
    with pytest.raises(NotFoundError, match="another command ended it"):
        registry.current(first)


@pytest.mark.parametrize("text", ["[]", '["1"]', '{"x": 1}', '{"1": "y"}', "7", "{"])
def test_damaged_history_stops_starts_but_no_end(registry: Registry, text: str) -> None:
    add(registry, entry("web", 1))
    Path(registry.folder, "history.json").write_text(text)
    with pytest.raises(HostError, match="damaged"):
        registry.next_domid()
    registry.remove(1)
    assert registry.next_domid() == 2


def test_reservation_that_cannot_be_written_leaves_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(HostError, match="cannot write"):
        add(registry, entry("web", 1))
    assert registry.domids() == ()
