# SPDX-License-Identifier: Apache-2.0
"""What is cleared away is what is due, after a second look; and what runs, starts or belongs to others is not."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.entries import EXPECTED, entry
from tests.support.guests import FIRST_DOMID, seed_history
from tests.support.host import need

from depriv import cgroup, collect, proc, status
from depriv.cgroup import find_cgroup, folder_name, remove_cgroup, remove_folder
from depriv.collect import clear, of_entry, strays, survey, tidy
from depriv.ending import forget
from depriv.identity import RANGE_BASE
from depriv.recover import of_the_range
from depriv.registry import Registry
from depriv.setup import remove_setup, run_setup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from depriv.entry import Entry

DOMID = FIRST_DOMID + 897  # of this run alone
UID = 1_900_010_000 + FIRST_DOMID  # of no range, so that nobody takes its processes for strays


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(str(tmp_path / "state"))
    made.prepare()
    made.mark_seen()
    yield made
    for leaf in cgroup.leaves():
        if leaf.folder == folder_name(made.folder):
            remove_cgroup(leaf.path)
            remove_folder(os.path.dirname(leaf.path))


@pytest.fixture
def users() -> Iterator[None]:
    """Have the users of the range, on a host that is afterwards as it was."""
    need(os.geteuid() == 0, what="root")
    made = RANGE_BASE not in {user.pw_name for user in pwd.getpwall()}
    if made:
        run_setup()
    yield
    if made:
        remove_setup()


def add(registry: Registry, made: Entry) -> Entry:
    with contextlib.ExitStack() as held:
        registry.add(made, held)
    return made


def ours(**changes: Any) -> Entry:
    """Return an entry whose QEMU is this very process."""
    me = os.getpid()
    expected = EXPECTED.replace(pid=me, starttime=proc.start_time(me))
    wanted = dict.fromkeys(("on_poweroff", "on_reboot", "on_crash"), "destroy")
    return entry(**{"domid": DOMID, "uid": UID, "gid": UID, "expected": expected, "config": wanted, **changes})


def dead(**changes: Any) -> Entry:
    """Return an entry whose QEMU has ended."""
    return ours(**{"expected": EXPECTED.replace(pid=os.getpid(), starttime=1), **changes})


def due_of(registry: Registry, made: Entry, said: str = "running", *, restart: bool = False) -> str:
    found = of_entry(made, registry, said, restart=restart)
    return "" if found is None else f"{found.kind}: {found.action}"


# What is due


@pytest.mark.parametrize("said", ["running", "paused", "prelaunch", "", "inmigrate", "nonsense", "io-error"])
def test_guest_that_runs_is_never_due_whatever_its_qemu_says_or_does_not(registry: Registry, said: str) -> None:
    assert due_of(registry, ours(), said) == due_of(registry, ours(), said, restart=True) == ""


def test_guest_that_has_ended_is_due_as_its_configuration_says(registry: Registry) -> None:
    for how, said in (("poweroff", "shutdown"), ("crash", "guest-panicked")):
        for action, wanted in (("destroy", "clear"), ("preserve", ""), ("restart", "restart")):
            made = ours(config={f"on_{how}": action})
            assert due_of(registry, made, said, restart=True) == (wanted and f"domain: {wanted}")
            assert due_of(registry, made, said) == ("domain: clear" if action == "destroy" else "")


def test_qemu_that_is_gone_is_a_crash_and_one_of_another_boot_is_cleared_whatever_was_wanted(
    registry: Registry,
) -> None:
    assert due_of(registry, dead()) == "domain: clear"
    assert due_of(registry, dead(config={"on_crash": "preserve"})) == ""
    for wanted in ("preserve", "restart", "destroy"):
        made = ours(boot_id="0" * 36, config={"on_crash": wanted})
        assert due_of(registry, made) == due_of(registry, made, restart=True) == "domain: clear"


@pytest.mark.parametrize("config", [None, {}, {"on_crash": 7}, {"on_crash": "explode"}, {"on_crash": None}])
def test_configuration_that_says_nothing_known_of_an_end_restarts_nothing(
    registry: Registry, config: dict[str, Any] | None
) -> None:
    assert due_of(registry, dead(config=config), restart=True) == ("" if config else "domain: clear")


def test_states_between_are_due_whatever_lives(registry: Registry) -> None:
    assert due_of(registry, ours(state="ending")) == "domain: clear"
    assert due_of(registry, ours(state="quarantined")) == "quarantine: clear"
    assert due_of(registry, ours(state="waiting")) == ""
    assert due_of(registry, ours(state="waiting"), restart=True) == "domain: restart"


def test_damaged_domain_is_due_once_nothing_of_it_lives(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dead(state="damaged", cgroup="/x")
    assert due_of(registry, made) == "domain: clear"
    monkeypatch.setattr(cgroup, "members", lambda path: (1,) if path == "/x" else ())  # as the kernel would say
    assert due_of(registry, made) == ""


def test_start_is_due_when_its_lock_is_free_and_not_before(registry: Registry) -> None:
    me = {"toolstack_pid": os.getpid(), "toolstack_starttime": proc.start_time(os.getpid())}
    made = dead(state="starting", **me)
    with contextlib.ExitStack() as held:
        registry.add(made, held)
        assert due_of(registry, made) == ""
    assert due_of(registry, made) == "start: clear"


# Clearing


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_end_of_the_last_domain_takes_the_registrys_folder_of_cgroups_even_if_it_only_waited(
    registry: Registry,
) -> None:
    need(bool(find_cgroup()[0]), what="cgroups")
    folder = os.path.dirname(registry.cgroup(DOMID))
    os.makedirs(folder)
    add(registry, dead(domid=DOMID - 1, state="waiting"))
    last = add(registry, dead(state="waiting", uid=0, gid=0, expected=None, cgroup=""))
    forget(dead(domid=DOMID - 1, state="waiting"), registry)
    assert os.path.isdir(folder)  # there still is one who may need it
    forget(last, registry)
    assert not os.path.exists(folder)


def only(registry: Registry, *, restart: bool = False) -> collect.Due:
    (due,) = survey(registry, cache_dir="/nowhere", said={}, restart=restart, only=(DOMID,))
    return due


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("state", ["running", "ending", "quarantined", "starting"])
def test_domain_of_which_nothing_lives_is_cleared_and_its_number_rests(registry: Registry, state: str) -> None:
    add(registry, dead(state=state, reaper_uid=UID + 1))
    assert clear(only(registry), registry).result == "done"
    assert registry.domids() == ()
    assert registry.next_domid() == DOMID + 1
    assert survey(registry, cache_dir="/nowhere", said={}, restart=False, only=(DOMID,)) == ()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_start_that_is_over_is_cleared_even_if_its_program_lives_on(registry: Registry) -> None:
    """A program that uses the package may go on for months after a start of its that was cut short."""
    me = {"toolstack_pid": os.getpid(), "toolstack_starttime": proc.start_time(os.getpid())}
    add(registry, dead(state="starting", uid=0, gid=0, expected=None, **me))
    assert clear(only(registry), registry).result == "done"
    assert registry.domids() == ()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_domain_that_came_back_to_life_between_look_and_act_is_left(registry: Registry) -> None:
    add(registry, dead())
    due = only(registry)
    registry.save(ours())  # as if another command had started it under the same number
    done = clear(due, registry)
    assert (done.result, done.cause) == ("gone", "another command has seen to it")
    assert registry.entries() == (ours(),)
    registry.remove(DOMID)
    assert clear(due, registry).result == "gone"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_domain_that_another_command_is_busy_with_is_left_to_it_and_holds_up_no_other(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "_LOCK_TIMEOUT_S", 0.1)  # the figure alone
    add(registry, dead())
    due = only(registry)
    with registry.locked_domain(DOMID):
        done = clear(due, registry)
    assert done.result == "busy"
    assert f"process {os.getpid()} (" in done.cause
    assert registry.domids() == (DOMID,)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_stale_numbers_of_another_boot_kill_nobody(registry: Registry) -> None:
    """/run may survive a reboot; a process of today has that number, and even that start time."""
    with subprocess.Popen(["sleep", "60"]) as innocent:
        begun = proc.start_time(innocent.pid)
        numbers = {"toolstack_pid": innocent.pid, "toolstack_starttime": begun}
        jail = {"jail_pid": innocent.pid, "jail_starttime": begun}
        expected = EXPECTED.replace(pid=innocent.pid, starttime=begun)
        for state in ("running", "starting", "ending", "quarantined"):
            made = entry(
                domid=DOMID, uid=UID, gid=UID, reaper_uid=UID + 1, boot_id="0" * 36, state=state, expected=expected
            )
            add(registry, made.replace(**numbers, **jail))
            assert [done.result for done in tidy(registry, "/nowhere")] == ["done"], state
            assert registry.domids() == ()
            assert innocent.poll() is None
        # The positive control: of this boot it is the domain's.
        add(registry, ours(state="ending", reaper_uid=UID + 1, expected=expected))
        tidy(registry, "/nowhere")
        assert innocent.wait(10) == -9


# What nobody's entry names


def of_nobody(registry: Registry) -> list[tuple[str, str]]:
    found = survey(registry, cache_dir="/nowhere", said={}, restart=False)
    return [(due.kind, due.path or str(due.domid)) for due in found]


def test_half_made_files_and_folders_are_found_and_cleared(registry: Registry) -> None:
    add(registry, ours())
    with subprocess.Popen(["true"]) as writer:
        writer.wait()
    domains = f"{registry.folder}/domains"
    os.mkdir(f"{domains}/gone-5-77")
    Path(f"{domains}/gone-5-77/state.json").touch()
    os.mkdir(f"{domains}/6")
    beside = [f"{registry.folder}/history.json.1.{writer.pid}", f"{domains}/{DOMID}/state.copy.1.{writer.pid}"]
    for path in beside:
        Path(path).touch()
    paths = [f"{domains}/gone-5-77", *beside]
    assert sorted(of_nobody(registry)) == sorted([*(("file", path) for path in paths), ("start", "6")])
    for due in survey(registry, cache_dir="/nowhere", said={}, restart=False):
        assert clear(due, registry).result == "done"
    assert of_nobody(registry) == []
    assert registry.entries() == (ours(),)
    assert registry.next_domid() == DOMID + 1  # nothing was ever made of 6: it need not rest


MAKE = """
import os, sys
from depriv.registry import Registry
registry = Registry(sys.argv[1])
with registry.locked():
    os.mkdir(registry.directory(int(sys.argv[2])), 0o700)
    print(flush=True)
    sys.stdin.readline()
    sys.path.insert(0, sys.argv[3])
    from tests.support.entries import entry
    registry.save(entry(domid=int(sys.argv[2])))
"""


def test_folder_that_a_command_is_just_making_is_not_taken_from_it(registry: Registry) -> None:
    argv = [sys.executable, "-c", MAKE, registry.folder, "6", str(Path(__file__).parents[2])]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        (due,) = survey(registry, cache_dir="/nowhere", said={}, restart=False)
        assert (due.kind, due.domid) == ("start", 6)
        other.stdin.write(b"\n")
        other.stdin.flush()
        done = clear(due, registry)  # waits for the lock, and looks again
        assert (done.result, done.cause) == ("gone", "another command is starting it")
        assert other.wait(10) == 0
    assert registry.entries() == (entry(domid=6),)


@pytest.fixture
def leaf(registry: Registry) -> str:
    """Return a cgroup of the registry that none of its domains has; no process is in it."""
    need(os.geteuid() == 0, what="root")
    need(bool(find_cgroup()[0]), what="cgroups")
    path = registry.cgroup(DOMID)
    os.makedirs(path)
    return path


@contextlib.contextmanager
def process_with(uid: int, leaf: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Run something under a uid, in a cgroup."""
    ids = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    join = 'test -z "$0" || echo $$ > "$0/cgroup.procs"; exec "$@"'
    with subprocess.Popen(["sh", "-c", join, leaf, "setpriv", *ids, "sleep", "60"], cwd="/") as process:
        try:
            deadline = time.monotonic() + 10
            while not proc.processes_of(uid=uid):
                assert time.monotonic() < deadline
            yield process
        finally:
            process.kill()


@pytest.mark.root
def test_cgroup_of_no_domain_is_cleared_with_all_that_is_in_it(registry: Registry, leaf: str) -> None:
    seed_history(Path(registry.folder), (DOMID - 1,))
    with process_with(UID, leaf) as process:
        assert of_nobody(registry) == [("cgroup", leaf)]
        assert registry.next_domid() == DOMID + 1  # what has a cgroup may live
        (due,) = survey(registry, cache_dir="/nowhere", said={}, restart=False)
        assert clear(due, registry).result == "done"
        assert process.wait(10) == -9
    assert not os.path.exists(os.path.dirname(leaf))
    assert registry.domids() == ()
    assert of_nobody(registry) == []


@pytest.mark.root
def test_cgroup_that_another_command_cleared_meanwhile_and_whose_number_is_a_new_guests_kills_nobody(
    registry: Registry, leaf: str
) -> None:
    """Two starts find the same leftover: the faster one clears it and takes its number; the slower one comes then."""
    (due,) = survey(registry, cache_dir="/nowhere", said={}, restart=False)
    assert clear(due, registry).result == "done"
    uid = of_the_range(DOMID)[0] or UID
    assert clear(due, registry).result == "gone"
    os.makedirs(leaf)
    with process_with(uid, leaf) as guest:
        made = add(registry, ours(uid=uid, cgroup=leaf))
        assert clear(due, registry).result == "gone"
        assert guest.poll() is None
        assert registry.entries() == (made,)
        guest.kill()
        guest.wait()


@pytest.mark.root
def test_what_does_not_die_becomes_a_quarantined_domain_and_is_cleared_once_it_can_be(
    registry: Registry, leaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from depriv import ending

    (due,) = survey(registry, cache_dir="/nowhere", said={}, restart=False)
    with process_with(UID, leaf) as process, monkeypatch.context() as patch:
        patch.setattr(cgroup, "kill_cgroup", lambda _path: None)  # as if it were in the kernel, in state D
        patch.setattr(ending, "END_TIMEOUT_S", 0.2)  # the figure alone
        assert clear(due, registry).result == "quarantined"
        assert process.poll() is None
        (kept,) = registry.entries()
        assert (kept.domid, kept.state, kept.name) == (DOMID, "quarantined", "(unknown)")
        assert str(process.pid) in kept.trouble
        # It is waited for no more by starts, and its number is nobody's.
        began = time.monotonic()
        assert tidy(registry, "/nowhere") == ()
        assert time.monotonic() - began < 2
        assert registry.next_domid() != DOMID
    assert [(done.kind, done.result) for done in tidy(registry, "/nowhere")] == [("quarantine", "done")]
    assert registry.domids() == ()
    assert not os.path.exists(leaf)


@pytest.mark.root
@pytest.mark.usefixtures("users")
def test_process_with_a_uid_of_the_range_and_of_no_domain_is_a_stray_of_the_hosts_own_registry_and_ended(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = of_the_range(DOMID)[0]
    assert uid
    mine: tuple[collect.Due, ...] = ()
    results: list[str] = []
    for _ in range(5):  # in a test of the command line beside us another may be the host's own, and faster
        with process_with(uid) as process, process_with(UID) as other:
            assert strays(registry) == ()  # a folder of one's own choice does not speak for the host
            with monkeypatch.context() as patch:
                patch.setattr(collect, "STATE_DIR", registry.folder)
                mine = tuple(due for due in strays(registry) if due.domid == DOMID)
            results = [clear(due, registry).result for due in mine]
            ended = process.wait(10) if results == ["done"] else 0
            assert other.poll() is None
            other.kill()
        if results == ["done"]:
            assert ended == -9
            assert [(due.kind, due.uid) for due in mine] == [("process", uid)]
            assert str(process.pid) in mine[0].what
            break
    assert results == ["done"]
    assert clear(mine[0], registry).result == "gone"


@pytest.mark.root
@pytest.mark.usefixtures("users")
def test_process_of_a_domain_of_any_registry_is_no_stray(
    registry: Registry, leaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "STATE_DIR", registry.folder)
    uid = of_the_range(DOMID)[0]
    assert uid
    with process_with(uid, leaf) as process:
        assert [due for due in strays(registry) if due.domid == DOMID] == []
        # Not even if it was one a moment ago: its cgroup may be that of a guest of another registry.
        due = collect.Due(kind="process", action="clear", what="", domid=DOMID, uid=uid)
        assert clear(due, registry).result == "gone"
        assert process.poll() is None
    remove_cgroup(leaf)
    with process_with(uid) as process:
        add(registry, ours(uid=uid))
        assert [due for due in strays(registry) if due.domid == DOMID] == []
        assert clear(due, registry).result == "gone"
        assert process.poll() is None


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_quarantined_domain_without_ids_does_not_count_roots_processes_as_its_own(registry: Registry) -> None:
    add(registry, dead(state="quarantined", uid=0, gid=0, shared=True))
    assert [done.result for done in tidy(registry, "/nowhere")] == ["done"]


def test_registry_that_somebody_holds_costs_no_wait_for_an_empty_folder_of_cgroups(registry: Registry) -> None:
    with registry.locked():
        begun = time.monotonic()
        collect.remove_empty_folders(registry)
        assert time.monotonic() - begun < 2


def test_host_without_room_for_another_thread_leaves_the_rest_unasked(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    assert status.ask((ours(), ours(domid=DOMID + 1)), registry) == {}
