# SPDX-License-Identifier: Apache-2.0
"""What does not die is said, kept from use and held against nobody else; and cleared once it can die.

A frozen process stands for one that waits for a server that is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.support import guests
from tests.support.frozen import Frozen, freezing, process_of
from tests.support.guests import CommandLine, await_end, config_text
from tests.support.host import living, need

from depriv import cgroup, collect, ending
from depriv.config import Disk, Domain
from depriv.errors import ConfigError, DeprivError
from depriv.host import CACHE_DIR
from depriv.registry import REUSE_DELAY_S, Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from depriv.api import Guest, Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

PATIENCE_S = 10.0
SHARED = "xen-qemuuser-shared"


def cli(host: Toolstack, *words: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``depriv WORDS`` on the domains of ``host`` and hold it to its exit status."""
    argv = [sys.executable, "-m", "depriv.cli", *words]
    environ = {**os.environ, "DEPRIV_STATE_DIR": host.registry.folder}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, env=environ)
    assert done.returncode == expect, f"depriv {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def gc(host: Toolstack, *words: str, expect: int = 0) -> list[dict[str, Any]]:
    """Return what ``depriv gc --json`` says of the domains of ``host``; what others have left is not ours."""
    done: list[dict[str, Any]] = json.loads(cli(host, "gc", "--json", *words, expect=expect).stdout)
    return done


def uid_of(uids: range, domid: int) -> int:
    """Return the uid that a domain with this domid has."""
    return uids.start - guests.DOMIDS.start + domid


def uid_outside(uids: range) -> int:
    """Return the first of ten uids that are nobody's: nor of the range, so that no sweep takes them for strays."""
    return uid_of(uids, 33000 + guests.DOMIDS.start // 90 - 222)


@pytest.fixture
def freeze(host: Toolstack) -> Iterator[Callable[[int], Frozen]]:
    del host  # its domains can end only after they are thawed
    with freezing() as freeze:
        yield freeze


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process wait for the end of what does not die for a moment only."""
    monkeypatch.setattr(ending, "END_TIMEOUT_S", 0.4)


def create(host: Toolstack, name: str, image: Path, **fields: Any) -> Guest:
    if not image.exists():
        image.write_bytes(bytes(1 << 20))
    disk = Disk(vdev="xvda", target=str(image))
    return host.create(Domain(name=name, disks=(disk,), memory_mib=16, **fields), paused=True)


def quarantined(guest: Guest) -> str:
    """Destroy a guest that cannot die; return what is said of it."""
    with pytest.raises(DeprivError) as caught:
        guest.destroy()
    return collect.cause_of(caught.value)


def test_destroy_of_what_does_not_die_ends_in_time_and_names_it_and_what_to_look_at(
    host: Toolstack, freeze: Callable[[int], Frozen], tmp_path: Path
) -> None:
    guest = create(host, "web", tmp_path / "a.img")
    pid = guest.row().pid
    freeze(pid)
    began = time.monotonic()
    done = cli(host, "destroy", "web", expect=125)
    assert ending.END_TIMEOUT_S - 1 < time.monotonic() - began < ending.END_TIMEOUT_S + 5
    assert f"{pid} (D) by uid" in done.stderr
    _, _, remedy = done.stderr.partition("  fix: see what it waits for: ")
    look = subprocess.run(remedy.splitlines()[0].split(), capture_output=True, text=True, check=True, timeout=10)
    assert look.stdout.splitlines()[1].split()[0] == str(pid)
    assert "depriv gc" in remedy
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("soon")
def test_quarantined_domain_is_listed_with_the_reason(
    host: Toolstack, freeze: Callable[[int], Frozen], tmp_path: Path
) -> None:
    guest = create(host, "web", tmp_path / "a.img")
    before = guest.row()
    freeze(before.pid)
    quarantined(guest)
    (line, reason) = cli(host, "list").stdout.splitlines()[1:]
    assert line.split()[:3] == ["web", str(guest.domid), "quarantined"]
    assert reason.startswith("    ")
    assert f"{before.pid} (D) by uid" in reason
    (row,) = json.loads(cli(host, "list", "--json").stdout)
    assert (row["state"], row["uid"], row["gid"]) == ("quarantined", before.uid, before.gid)
    assert f"{before.pid} (D)" in row["trouble"]
    # Seen by name and by number, and by nobody as a guest that could be talked to.
    assert host.rows(("web",)) == host.rows((str(guest.domid),))
    assert not guest.audit().holds or living(range(before.uid, before.uid + 1))


@pytest.mark.usefixtures("soon")
def test_nothing_that_a_quarantined_domain_has_is_given_to_another(
    host: Toolstack, freeze: Callable[[int], Frozen], tmp_path: Path
) -> None:
    image = tmp_path / "a.img"
    guest = create(host, "web", image)
    old = guest.row()
    freeze(old.pid)
    quarantined(guest)
    with pytest.raises(ConfigError, match=f"{image} for xvda is in use by the quarantined domain {old.domid} "):
        create(host, "other", image)
    assert [row.state for row in host.rows()] == ["quarantined"]
    # Its name is free: its end was asked for. And a name means the domain that can be talked to.
    again = create(host, "web", tmp_path / "b.img")
    new = again.row()
    assert new.state == "paused"
    assert {old.uid, old.gid, old.domid}.isdisjoint({new.uid, new.gid, new.domid})
    assert host.guest("web").domid == again.domid
    assert again.audit().holds
    cli(host, "destroy", "web")
    assert [(row.domid, row.state) for row in host.rows()] == [(old.domid, "quarantined")]


@pytest.mark.usefixtures("soon")
def test_quarantined_domain_slows_no_other_start(
    host: Toolstack, freeze: Callable[[int], Frozen], tmp_path: Path
) -> None:
    count = 3

    def fastest() -> tuple[float, float]:
        """Return the times of a start and of what every start does first, where they are."""
        starts: list[float] = []
        tidies: list[float] = []
        for _ in range(5):
            began = time.monotonic()
            collect.tidy(host.registry, CACHE_DIR)
            tidies.append(time.monotonic() - began)
            guest = create(host, "quick", tmp_path / "q.img")
            starts.append(time.monotonic() - began)
            guest.destroy()
        return min(starts), min(tidies)

    guests = [create(host, f"web{number}", tmp_path / f"{number}.img") for number in range(count)]
    before = fastest()
    for guest in guests:
        freeze(guest.row().pid)
        quarantined(guest)
    after = fastest()
    print(f"{before} s before, {after} s beside {count} that do not die")
    assert after[0] - before[0] < count * 0.1  # to try one again takes half a second
    assert after[1] - before[1] < count * 0.01
    assert [row.state for row in host.rows()] == ["quarantined"] * count


@pytest.mark.usefixtures("soon")
def test_end_that_takes_its_time_slows_no_other_start(
    host: Toolstack, freeze: Callable[[int], Frozen], tmp_path: Path
) -> None:
    guest = create(host, "web", tmp_path / "a.img")
    create(host, "warm", tmp_path / "b.img").destroy()
    frozen = freeze(guest.row().pid)
    argv = [sys.executable, "-m", "depriv.cli", "destroy", "web"]
    with subprocess.Popen(argv, env={**os.environ, "DEPRIV_STATE_DIR": host.registry.folder}) as destroy:
        deadline = time.monotonic() + PATIENCE_S
        while host.registry.find("web").state != "ending":
            assert time.monotonic() < deadline
            time.sleep(0.005)
        began = time.monotonic()
        other = create(host, "other", tmp_path / "b.img")
        took_s = time.monotonic() - began
        assert destroy.poll() is None, "it was over: this proves nothing"
        frozen.thaw()
        assert destroy.wait(PATIENCE_S) == 0
    assert took_s < 1.5
    assert [each.domid for each in host.guests()] == [other.domid]


def test_kill_of_a_cgroup_of_version_1_waits_for_nobody_who_does_not_die(uids: range) -> None:
    """Such a cgroup has no cgroup.kill: whoever is in it is named, and killed, until none is new."""
    need(os.path.isdir("/sys/fs/cgroup/pids"), what="cgroup v1")
    path = f"/sys/fs/cgroup/pids/depriv-tests-{os.getpid()}"
    os.mkdir(path)
    try:
        with process_of(uid_outside(uids)) as process, process_of(uid_outside(uids)) as other, freezing() as freeze:
            for each in (process, other):
                with open(f"{path}/cgroup.procs", "w", encoding="ascii") as file:
                    file.write(str(each.pid))
            frozen = freeze(process.pid)
            began = time.monotonic()
            cgroup.kill_cgroup(path)
            assert time.monotonic() - began < 2
            assert other.wait(PATIENCE_S) == -signal.SIGKILL
            with pytest.raises(DeprivError, match="cannot remove cgroup"):
                cgroup.remove_cgroup(path, timeout_s=0.2)
            frozen.thaw()
            assert process.wait(PATIENCE_S) == -signal.SIGKILL
        cgroup.remove_cgroup(path)
        assert not os.path.exists(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)


def test_gc_says_that_it_does_not_die_and_the_next_one_after_it_could_clears_it(
    host: Toolstack, freeze: Callable[[int], Frozen], tmp_path: Path
) -> None:
    image = tmp_path / "a.img"
    guest = create(host, "web", image)
    row = guest.row()
    frozen = freeze(row.pid)
    quarantined(guest)
    for _ in range(2):
        began = time.monotonic()
        (done,) = gc(host, expect=1)
        assert time.monotonic() - began < 5
        assert (done["kind"], done["result"], done["domid"], done["name"]) == (
            "quarantine",
            "quarantined",
            row.domid,
            "web",
        )
        assert f"{row.pid} (D)" in done["cause"]
        assert [each.state for each in host.rows()] == ["quarantined"]
    line = cli(host, "gc", "web", expect=1).stdout
    assert "does not die yet, its ids are quarantined" in line
    assert line.count(f"{row.pid} (D)") == 1
    frozen.thaw()
    assert await_end(row.pid)  # of the kill that came while it stood
    (done,) = gc(host)
    assert (done["kind"], done["result"], done["domid"]) == ("quarantine", "done", row.domid)
    assert host.guests() == ()
    rests(host, row.domid)
    assert create(host, "other", image).row().state == "paused"


@pytest.mark.usefixtures("soon")
def test_next_create_clears_what_has_died_meanwhile(
    host: Toolstack, freeze: Callable[[int], Frozen], tmp_path: Path
) -> None:
    image = tmp_path / "a.img"
    guest = create(host, "web", image)
    row = guest.row()
    frozen = freeze(row.pid)
    quarantined(guest)
    frozen.thaw()
    assert await_end(row.pid)
    deadline = time.monotonic() + 10
    while living(range(row.uid, row.uid + 1)):  # its threads end one by one
        assert time.monotonic() < deadline
        time.sleep(0.01)
    again = create(host, "web", image)
    assert [each.domid for each in host.guests()] == [again.domid]
    assert again.domid != row.domid
    rests(host, row.domid)


def rests(host: Toolstack, domid: int) -> None:
    """Hold the registry to letting a domid rest."""
    with open(f"{host.registry.folder}/history.json", encoding="ascii") as file:
        freed = json.load(file)["freed"]
    assert 0 <= time.clock_gettime(time.CLOCK_BOOTTIME) - freed[str(domid)] < REUSE_DELAY_S
    assert host.registry.next_domid() != domid


@pytest.mark.usefixtures("soon")
def test_destroy_may_be_tried_again(host: Toolstack, freeze: Callable[[int], Frozen], tmp_path: Path) -> None:
    guest = create(host, "web", tmp_path / "a.img")
    frozen = freeze(guest.row().pid)
    quarantined(guest)
    quarantined(host.guest("web"))
    frozen.thaw()
    host.guest("web").destroy()
    assert host.guests() == ()


@pytest.mark.usefixtures("soon")
def test_start_cleans_up_after_itself_as_far_as_it_can_where_its_uid_is_held(
    host: Toolstack, uids: range, tmp_path: Path
) -> None:
    """Somebody who does not die has the uid already: the domain gets another one, and that one is out of use."""
    create(host, "first", tmp_path / "1.img").destroy()  # what a new host does once is done
    domid = host.registry.next_domid()
    uid = uid_of(uids, domid)
    warnings: list[str] = []
    with process_of(uid) as stranger, freezing() as freeze:
        frozen = freeze(stranger.pid)
        disk = Disk(vdev="xvda", target=str(tmp_path / "1.img"))
        guest = host.create(Domain(name="web", disks=(disk,)), paused=True, warn=warnings.append)
        assert guest.domid == domid + 1
        assert guest.audit().holds
        (warning,) = warnings
        assert f"{stranger.pid} (D) by uid" in warning
        assert "quarantined" in warning
        rows = {row.domid: row for row in host.rows()}
        assert (rows[domid].state, rows[domid].uid) == ("quarantined", uid)
        assert f"{stranger.pid} (D)" in rows[domid].trouble
        (done,) = gc(host, expect=1)
        assert done["domid"] == domid
        # Its image is the running one's: what is quarantined is an id, and whoever has it.
        assert guest.row().state == "paused"
        frozen.thaw()
        assert stranger.wait(PATIENCE_S) == -signal.SIGKILL
    (done,) = gc(host)
    assert (done["domid"], done["result"]) == (domid, "done")
    assert [each.domid for each in host.guests()] == [guest.domid]
    rests(host, domid)


def test_stray_that_does_not_die_keeps_its_id_from_use(depriv: CommandLine, uids: range) -> None:
    registry = Registry(depriv.state_dir)
    domid = registry.next_domid()
    with process_of(uid_of(uids, domid)) as stranger, freezing() as freeze:
        frozen = freeze(stranger.pid)
        found = json.loads(depriv.run("gc", "--json", expect=1).stdout)
        (done,) = [each for each in found if each["domid"] == domid]
        assert (done["kind"], done["result"]) == ("process", "quarantined")
        assert f"{stranger.pid} (D)" in done["cause"]
        assert registry.next_domid() == domid + 1
        (row,) = depriv.rows()
        assert (row["domid"], row["state"], row["uid"]) == (domid, "quarantined", uid_of(uids, domid))
        frozen.thaw()
        assert stranger.wait(PATIENCE_S) == -signal.SIGKILL
    assert depriv.run("gc", str(domid)).stdout.endswith(": cleared\n")
    assert depriv.rows() == []


@pytest.fixture
def users(uids: range, tmp_path: Path) -> Iterator[tuple[CommandLine, int]]:
    """Return the command line on a host with two more users, svc and the shared one, and the uid of svc."""
    svc = uid_outside(uids)
    with open("/etc/passwd", encoding="ascii") as file:
        text = "".join(line for line in file if not line.startswith((f"{SHARED}:", "svc:")))
    nothing = "depriv:/nonexistent:/usr/sbin/nologin"
    for number, name in enumerate(("svc", SHARED)):
        text += f"{name}:x:{svc + number}:{svc + number}:{nothing}\n"
    path = tmp_path / "passwd"
    path.write_text(text)
    made = CommandLine(bind=(str(path), "/etc/passwd"))
    yield made, svc
    made.close()


def test_user_whose_domain_does_not_die_runs_no_other(users: tuple[CommandLine, int], tmp_path: Path) -> None:
    depriv, svc = users
    path = tmp_path / "svc.cfg"
    path.write_text(config_text("one", device_model_user="svc"))
    with freezing() as freeze:
        depriv.run("create", str(path))
        (row,) = depriv.rows()
        assert row["uid"] == svc
        freeze(row["pid"])
        depriv.run("destroy", "one", expect=125)
        path.write_text(config_text("two", device_model_user="svc"))
        said = depriv.run("create", str(path), expect=125).stderr
        assert "one" in said
        assert str(svc) in said or "svc" in said
        assert [(each["name"], each["state"]) for each in depriv.rows()] == [("one", "quarantined")]
    assert await_end(row["pid"])
    depriv.run("create", str(path))
    assert [each["name"] for each in depriv.rows()] == ["two"]


def test_user_with_a_process_that_does_not_die_is_refused_and_nothing_is_quarantined(
    users: tuple[CommandLine, int], tmp_path: Path
) -> None:
    depriv, svc = users
    path = tmp_path / "svc.cfg"
    path.write_text(config_text("one", device_model_user="svc"))
    with process_of(svc) as service:
        with freezing() as freeze:  # inside, or the end of the process would be waited for in vain
            freeze(service.pid)
            began = time.monotonic()
            said = depriv.run("create", str(path), expect=125).stderr
            assert time.monotonic() - began < 5
            assert str(service.pid) in said
        assert depriv.rows() == []
        assert service.poll() is None  # nobody has sent it anything


def test_shared_domain_that_does_not_die_is_named_and_tried_again_in_no_time(
    users: tuple[CommandLine, int], tmp_path: Path
) -> None:
    """Nothing is killed by a shared uid: it is process 1 of its pid namespace that has to be seen dead."""
    depriv, svc = users
    path = tmp_path / "s.cfg"
    for name in ("one", "two"):
        path.write_text(config_text(name, device_model_user=SHARED))
        depriv.run("create", str(path))
    one, two = depriv.rows()
    assert {one["uid"], two["uid"]} == {svc + 1}
    with freezing() as freeze:
        freeze(one["pid"])
        began = time.monotonic()
        said = depriv.run("destroy", "one", expect=125).stderr
        assert time.monotonic() - began < ending.END_TIMEOUT_S + 5
        assert f"process {one['pid']}" in said
        assert "stack" in said
        began = time.monotonic()
        depriv.run("gc", "one", expect=1)
        assert time.monotonic() - began < 5
        states = {each["name"]: (each["state"], each["pid"]) for each in depriv.rows()}
        assert states["two"] == ("running", two["pid"])
        assert states["one"][0] == "quarantined"
    assert await_end(one["pid"])
    depriv.run("gc")
    assert [(each["name"], each["pid"]) for each in depriv.rows()] == [("two", two["pid"])]
