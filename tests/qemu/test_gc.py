# SPDX-License-Identifier: Apache-2.0
"""What was cut short is found and cleared, what has ended is seen to, and nothing that lives is touched.

Starts and ends are cut short for real: commands are killed or stopped, QEMUs are killed, files are lost.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.qemu.test_quarantine import cli, uid_of
from tests.support import guests
from tests.support.frozen import freezing, process_of
from tests.support.guests import await_end, config_text, stop
from tests.support.host import living, snapshot

from depriv.api import Toolstack
from depriv.config import Disk, Domain

if TYPE_CHECKING:
    from collections.abc import Callable

    from depriv.api import Guest
    from depriv.entry import Entry

pytestmark = [pytest.mark.qemu, pytest.mark.root]

PATIENCE_S = 20.0


def image(path: Path, code: str = "") -> Path:
    """Make a disk whose boot sector does one thing, and then nothing for ever."""
    sector = (bytes.fromhex(code) + b"\xf4\xeb\xfd").ljust(510, b"\0") + b"\x55\xaa"  # hlt; jmp back to it
    path.write_bytes(sector + bytes((1 << 20) - 512))
    return path


def start(host: Toolstack, path: Path, code: str = "", *, name: str = "web", **fields: Any) -> Guest:
    disk = Disk(vdev="xvda", target=str(image(path, code)), readonly=True)
    return host.create(Domain(name=name, disks=(disk,), memory_mib=16, **fields), paused=not code)


def entry_of(host: Toolstack, guest: Guest) -> Entry:
    return host.registry.find(str(guest.domid))


def pid_of(host: Toolstack, guest: Guest) -> int:
    expected = entry_of(host, guest).expected
    assert expected is not None
    return expected.pid


def kill(host: Toolstack, guest: Guest) -> None:
    """End its QEMU, to the last thread."""
    uid = entry_of(host, guest).uid
    os.kill(pid_of(host, guest), signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while living(range(uid, uid + 1)):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def gc(host: Toolstack, *words: str, expect: int | None = 0) -> list[dict[str, Any]]:
    """Return what ``depriv gc --json`` says of what these tests have left; of what others have, nothing."""
    argv = [sys.executable, "-m", "depriv.cli", "gc", "--json", *words]
    environ = {**os.environ, "DEPRIV_STATE_DIR": host.registry.folder}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, env=environ)
    assert expect is None or done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return [each for each in found if each["domid"] in guests.DOMIDS or host.registry.folder in each["what"]]


def cleared(host: Toolstack, uids: range, *words: str) -> list[dict[str, Any]]:
    """Clear what is due; hold a dry run before it to changing nothing, and to saying the same."""
    where: dict[str, Any] = {"folder": host.registry.folder, "uids": uids, "domids": guests.DOMIDS}
    before = snapshot(**where)
    would = gc(host, "--dry-run", *words)
    assert snapshot(**where) == before
    assert all((each["result"], each["new_domid"]) == ("would", 0) for each in would)
    done = gc(host, *words)
    told = ("kind", "action", "what", "domid", "name")
    assert [[each[key] for key in told] for each in done] == [[each[key] for key in told] for each in would]
    return done


def kinds(done: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return sorted((each["kind"], each["result"], each["domid"]) for each in done)


def creating(host: Toolstack, path: Path, **keywords: Any) -> subprocess.Popen[str]:
    """Start `depriv create` as a process that can be stopped and killed."""
    argv = [sys.executable, "-m", "depriv.cli", "create", str(path)]
    environ = {**os.environ, "DEPRIV_STATE_DIR": host.registry.folder}
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, env=environ, **keywords)


def config(tmp_path: Path, name: str = "web") -> Path:
    path = tmp_path / f"{name}.cfg"
    disk = image(tmp_path / f"{name}.img")
    path.write_text(config_text(name, f"vdev=xvda,format=raw,access=ro,target={disk}", memory=16))
    return path


def until_found(host: Toolstack, holds: Callable[[Entry], bool]) -> Entry:
    """Return the first entry for which ``holds`` does."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        for entry in host.registry.entries():
            if holds(entry):
                return entry
        assert time.monotonic() < deadline, host.registry.entries()


# --- Each kind of what is left ---


@pytest.mark.parametrize("late_s", [0.0, 0.01, 0.03, 0.08])
def test_start_that_was_killed_is_cleared(host: Toolstack, uids: range, tmp_path: Path, late_s: float) -> None:
    command = creating(host, config(tmp_path))
    entry = until_found(host, lambda entry: entry.state == "starting" and bool(late_s == 0 or entry.uid))
    time.sleep(late_s)
    command.kill()
    command.communicate(timeout=PATIENCE_S)
    state = host.guest(str(entry.domid)).row().state
    done = cleared(host, uids)
    if state == "dead":
        assert kinds(done) == [("start", "done", entry.domid)]
        assert host.guests() == ()
        assert living(uids) == ()
    else:
        # It was done but for saying so: that is a guest like any other.
        assert late_s
        assert state in ("running", "paused")
        assert done == []
    cli(host, "create", str(config(tmp_path, "next")))


def test_end_that_was_killed_is_taken_up(host: Toolstack, uids: range, tmp_path: Path) -> None:
    guest = start(host, tmp_path / "a.img")
    argv = [sys.executable, "-m", "depriv.cli", "destroy", "web"]
    with freezing() as freeze:
        frozen = freeze(pid_of(host, guest))
        destroy = subprocess.Popen(argv, env={**os.environ, "DEPRIV_STATE_DIR": host.registry.folder})
        until_found(host, lambda entry: entry.state == "ending")
        destroy.kill()
        destroy.wait(PATIENCE_S)
        frozen.thaw()
        assert await_end(pid_of(host, guest))
    assert guest.row().state == "ending" or host.rows()[0].state == "ending"
    assert kinds(cleared(host, uids)) == [("domain", "done", guest.domid)]
    assert host.guests() == ()


def test_qemu_that_is_gone_is_cleared_if_its_configuration_says_so(
    host: Toolstack, uids: range, tmp_path: Path
) -> None:
    gone = start(host, tmp_path / "a.img", name="gone")
    kept = start(host, tmp_path / "b.img", name="kept", on_crash="preserve")
    kill(host, gone)
    kill(host, kept)
    (done,) = cleared(host, uids)
    assert (done["kind"], done["name"], done["result"]) == ("domain", "gone", "done")
    assert "on_crash = destroy" in done["what"]
    assert [(row.name, row.state) for row in host.rows()] == [("kept", "dead")]


@pytest.mark.parametrize("lost", ["domains/{domid}", "domains", "."])
def test_guest_whose_entry_is_lost_is_ended_and_its_cgroup_removed(
    host: Toolstack, uids: range, tmp_path: Path, lost: str
) -> None:
    guest = start(host, tmp_path / "a.img")
    entry, pid = entry_of(host, guest), pid_of(host, guest)
    shutil.rmtree(os.path.normpath(f"{host.registry.folder}/{lost.format(domid=guest.domid)}"))
    if lost == ".":
        guests.seeded(Path(host.registry.folder))
    # A dry run changes nothing, and a folder that is not there would be made.
    Path(host.registry.folder, "domains").mkdir(mode=0o700, exist_ok=True)
    assert host.guests() == ()
    assert kinds(cleared(host, uids)) == [("cgroup", "done", guest.domid)]
    assert await_end(pid, within_s=0.5)
    assert not os.path.exists(entry.cgroup)
    assert host.registry.next_domid() != guest.domid


def test_guest_of_another_registry_lives_on_when_that_is_new_or_lost_to_us(host: Toolstack, tmp_path: Path) -> None:
    """A folder of cgroups belongs to one state folder: only who stands in its place takes what it left."""
    guest = start(host, tmp_path / "a.img")
    other = Toolstack(state_dir=str(guests.seeded(tmp_path / "new")))
    assert gc(other) == []
    start(other, tmp_path / "b.img").destroy()
    assert guest.row().state == "paused"


def test_files_that_killed_writers_left_are_removed_and_those_of_living_ones_not(
    host: Toolstack, uids: range, tmp_path: Path
) -> None:
    guest = start(host, tmp_path / "a.img")
    with subprocess.Popen(["true"]) as process:
        pass
    folder, own = Path(host.registry.folder), Path(host.registry.directory(guest.domid))
    dead = [folder / f"history.json.7.{process.pid}", own / f"state.json.7.{process.pid}"]
    live = [folder / f"boot.7.{os.getpid()}", own / f"state.copy.7.{os.getpid()}"]
    for path in (*dead, *live):
        path.write_text("{}")
    gone = folder / "domains" / "gone-77-7"
    gone.mkdir()
    (gone / "state.json").write_text("{")
    found = cleared(host, uids)
    assert {each["kind"] for each in found} == {"file"}
    assert {each["what"].partition(": ")[0] for each in found} == {str(path) for path in (*dead, gone)}
    assert not any(path.exists() for path in (*dead, gone))
    assert all(path.exists() for path in live)
    for path in live:
        path.unlink()
    assert guest.row().state == "paused"


def test_copy_of_qemu_that_was_half_made_is_removed(host: Toolstack, tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    for pid in (process.pid, os.getpid()):
        (tmp_path / "cache" / "runtime" / f"abc.{pid}" / "usr").mkdir(parents=True)
    there = Toolstack(state_dir=host.registry.folder, cache_dir=str(tmp_path / "cache"))
    found = [each for each in there.gc() if str(tmp_path) in each.what]
    assert [(each.kind, each.result) for each in found] == [("file", "done")]
    assert os.listdir(tmp_path / "cache" / "runtime") == [f"abc.{os.getpid()}"]


def test_folder_without_an_entry_is_removed(host: Toolstack, uids: range) -> None:
    domid = host.registry.next_domid()
    os.mkdir(host.registry.directory(domid), 0o700)
    assert kinds(cleared(host, uids)) == [("start", "done", domid)]
    assert host.registry.next_domid() == domid  # nobody ever had it


def test_what_was_due_is_not_done_to_who_has_its_id_since(host: Toolstack, uids: range, tmp_path: Path) -> None:
    """Between a listing and the act another command may have cleared it, and a new guest have been given the id."""
    from depriv import collect

    start(host, tmp_path / "first.img").destroy()
    domid = host.registry.next_domid()
    uid = uid_of(uids, domid)
    guest = start(host, tmp_path / "a.img")
    assert guest.domid == domid
    leaf = collect.Due(kind="cgroup", action="clear", what="", domid=domid, path=entry_of(host, guest).cgroup)
    process = collect.Due(kind="process", action="clear", what="", domid=domid, uid=uid)
    for each in (process, leaf, collect.Due(kind="start", action="clear", what="", domid=domid)):
        assert collect.clear(each, host.registry).result == "gone"
    ended = collect.Due(kind="domain", action="clear", what="", domid=domid, name="web")
    assert collect.clear(ended, host.registry).result == "gone"
    assert guest.row().state == "paused"
    assert guest.audit().holds


# --- How it is asked ---


def test_gc_of_a_name_sees_to_that_domain_alone(host: Toolstack, uids: range, tmp_path: Path) -> None:
    one, two = (start(host, tmp_path / f"{name}.img", name=name) for name in ("one", "two"))
    for guest in (one, two):
        kill(host, guest)
    with process_of(uid_of(uids, host.registry.next_domid())) as stray:
        assert kinds(cleared(host, uids, "one")) == [("domain", "done", one.domid)]
        assert [row.name for row in host.rows()] == ["two"]
        assert stray.poll() is None
    assert kinds(cleared(host, uids, str(two.domid))) == [("domain", "done", two.domid)]
    done = cli(host, "gc", "two", expect=2)
    assert "there is no domain 'two'" in done.stderr


def test_gc_with_nothing_due_says_nothing_and_costs_little(host: Toolstack, tmp_path: Path) -> None:
    gc(host)  # the sweep of a registry that is new
    start(host, tmp_path / "a.img")
    done = cli(host, "gc", "web")
    assert (done.stdout, done.stderr) == ("", "")
    assert gc(host) == []
    times: list[float] = []
    for _ in range(5):
        began = time.monotonic()
        host.gc()
        times.append(time.monotonic() - began)
    assert min(times) < 0.5


def test_gc_says_what_it_does_in_words(host: Toolstack, tmp_path: Path) -> None:
    guest = start(host, tmp_path / "a.img")
    kill(host, guest)
    would = cli(host, "gc", "--dry-run", "web").stdout
    assert would == f"web (domain {guest.domid}): QEMU is gone: on_crash = destroy: would clear\n"
    assert cli(host, "gc", "web").stdout == would.replace("would clear", "cleared")


@pytest.mark.parametrize("words", [(), ("--dry-run",), ("web",)])
def test_gc_by_somebody_who_is_not_root_is_refused(host: Toolstack, words: tuple[str, ...], tmp_path: Path) -> None:
    guest = start(host, tmp_path / "a.img")
    kill(host, guest)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stderr = open(tmp_path / "said", "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (till the end)
            os.environ["DEPRIV_STATE_DIR"] = host.registry.folder
            from depriv.cli import main

            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            status = main(["gc", *words])
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 125
    said = (tmp_path / "said").read_text()
    assert "root" in said
    assert "Traceback" not in said
    assert [row.name for row in host.rows()] == ["web"]


# --- At the same time as others ---


def test_two_at_once_do_everything_once(host: Toolstack, tmp_path: Path) -> None:
    ended = [start(host, tmp_path / f"{number}.img", name=f"web{number}") for number in range(4)]
    domids = [guest.domid for guest in ended]
    for guest in ended:
        kill(host, guest)
    argv = [sys.executable, "-m", "depriv.cli", "gc", "--json"]
    environ = {**os.environ, "DEPRIV_STATE_DIR": host.registry.folder}
    running = [subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [json.loads(each.communicate(timeout=60)[0]) for each in running]
    results = [(each["domid"], each["result"]) for some in said for each in some if each["domid"] in domids]
    assert sorted(domid for domid, result in results if result == "done") == domids
    assert {result for _, result in results} <= {"done", "gone", "busy"}
    assert host.guests() == ()


def test_start_is_not_harmed_by_it_at_whatever_moment_it_comes(host: Toolstack, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = config(tmp_path)
    cli(host, "create", str(path))
    cli(host, "destroy", "web")
    for _ in range(6):
        with creating(host, path) as command:
            time.sleep(chance.uniform(0.05, 0.3))
            if command.poll() is None:
                stop(command.pid)
                try:
                    for each in gc(host, expect=None):
                        # It stands in the few instructions in which it holds the registry, its folder made and empty.
                        assert (each["kind"], each["result"]) == ("start", "busy")
                        assert f"process {command.pid}" in each["cause"]
                        assert "stopped" in each["cause"]
                finally:
                    os.kill(command.pid, signal.SIGCONT)
            said, error = command.communicate(timeout=60)
        assert command.returncode == 0, said + error
        (row,) = host.rows()
        assert row.state in ("running", "paused")
        assert host.guest("web").audit().holds
        cli(host, "destroy", "web")


def test_nothing_that_lives_is_touched(host: Toolstack, tmp_path: Path) -> None:
    running = start(host, tmp_path / "a.img", name="running")
    guests.qmp(host, running, "cont")
    paused = start(host, tmp_path / "b.img", name="paused")
    hung = start(host, tmp_path / "c.img", name="hung")
    stop(pid_of(host, hung))
    command = creating(host, config(tmp_path, "starting"))
    entry = until_found(host, lambda entry: entry.name == "starting" and bool(entry.uid))
    stop(command.pid)
    states = {row.name: (row.state, row.pid) for row in host.rows()}
    assert {name: state for name, (state, _) in states.items()} == {
        "running": "running",
        "paused": "paused",
        "hung": "hung",
        "starting": "starting",
    }
    for words in ((), ("--restart",), ("hung",), ("starting",), (str(entry.domid),)):
        assert gc(host, *words) == []
    assert {row.name: (row.state, row.pid) for row in host.rows()} == states
    os.kill(command.pid, signal.SIGCONT)
    assert command.communicate(timeout=60)[1] == ""
    os.kill(pid_of(host, hung), signal.SIGCONT)
    for guest in (running, paused, hung):
        assert guest.audit().holds


def test_guest_whose_toolstack_died_right_after_the_start_is_a_guest_like_any_other(
    host: Toolstack, disk: Path
) -> None:
    child = os.fork()
    if child == 0:
        try:
            host.create(Domain(name="web", disks=(Disk(vdev="xvda", target=str(disk)),)))
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert gc(host) == []
    guests.await_console(host.guest("web"), "the text of this disk")
    assert "running" in cli(host, "list").stdout
    cli(host, "audit", "web")
    assert "the text of this disk" in cli(host, "console", "--dump", "web").stdout
    cli(host, "destroy", "web")
    assert host.guests() == ()


def test_empty_folder_of_cgroups_that_a_killed_end_left_is_removed(host: Toolstack) -> None:
    folder = os.path.dirname(host.registry.cgroup(0))
    os.makedirs(folder)
    with pytest.raises(FileExistsError):
        os.mkdir(folder)
    assert host.gc() == ()
    assert not os.path.exists(folder)
