# SPDX-License-Identifier: Apache-2.0
"""Whatever becomes of the registry, no guest is lost from sight, none is killed that should live, and all can end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.guests import CommandLine, await_end, config_text
from tests.support.host import living

from depriv import cgroup, proc
from depriv.config import Disk, Domain
from depriv.errors import DeprivError, HostError, NotFoundError
from depriv.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from depriv.api import Guest, Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

ALL = ("state.json", "state.copy")


@pytest.fixture
def guest(host: Toolstack, disk: Path) -> Guest:
    return host.create(Domain(name="web", disks=(Disk(vdev="xvda", target=str(disk)),)))


def spoil(host: Toolstack, guest: Guest, *names: str, text: str = "{") -> None:
    for name in names:
        Path(host.registry.directory(guest.domid), name).write_text(text)


def check_gone(host: Toolstack, uid: int, domid: int) -> None:
    assert host.registry.domids() == ()
    assert living(range(uid, uid + 1)) == ()
    assert [leaf.path for leaf in cgroup.leaves() if leaf.domid == domid] == []


# One entry


@pytest.mark.parametrize("name", ALL)
def test_guest_with_one_spoiled_file_is_as_before(host: Toolstack, guest: Guest, name: str) -> None:
    before = guest.row()
    entry = host.registry.find("web")
    spoil(host, guest, name)
    found = Registry(host.registry.folder).find("web")
    assert found == entry
    assert host.rows() == (before,)
    assert host.guest("web").audit().holds
    assert host.gc() == ()
    host.guest("web").destroy()
    check_gone(host, before.uid, before.domid)


@pytest.mark.parametrize("how", ["cut off", "another version", "link"])
def test_guest_whose_entry_is_lost_is_listed_from_what_the_kernel_shows(
    host: Toolstack, guest: Guest, tmp_path: Path, how: str
) -> None:
    before = guest.row()
    directory = host.registry.directory(guest.domid)
    if how == "link":
        for name in ALL:
            os.unlink(f"{directory}/{name}")
            os.symlink(tmp_path / "elsewhere", f"{directory}/{name}")
    else:
        spoil(host, guest, *ALL, text='{"version": 1}' if how == "another version" else '{"version": 2, "na')
    (row,) = host.rows()
    assert (row.state, row.name, row.domid) == ("damaged", f"(damaged-{before.domid})", before.domid)
    assert (row.pid, row.uid, row.gid) == (before.pid, before.uid, before.gid)
    assert f"{directory}/state.json" in row.trouble
    with pytest.raises(NotFoundError):
        host.guest("web")
    # While it lives nobody clears it away, nor is it quarantined.
    assert host.gc() == ()
    assert host.gc(restart=True) == ()
    assert proc.alive(before.pid, proc.start_time(before.pid)) == "running"
    host.guest(str(before.domid)).destroy()
    assert await_end(before.pid, within_s=0.1)
    check_gone(host, before.uid, before.domid)


def test_guest_whose_entry_is_lost_can_be_audited_for_what_holds_of_every_qemu(host: Toolstack, guest: Guest) -> None:
    spoil(host, guest, *ALL)
    report = host.guest(str(guest.domid)).audit()
    assert report.holds, report.to_text()
    assert report.pid == guest.row().pid
    assert len(report.checks) > 10


def test_others_start_run_and_end_beside_one_whose_entry_is_lost(host: Toolstack, guest: Guest) -> None:
    lost = guest.row()
    spoil(host, guest, *ALL)
    other = host.create(Domain(name="web"))  # its name is not known any more
    assert other.row().uid != lost.uid
    assert other.audit().holds
    assert [row.state for row in host.rows()] == ["damaged", "running"]
    other.destroy()
    assert [(row.state, row.pid) for row in host.rows()] == [("damaged", lost.pid)]


@pytest.mark.parametrize("readonly", [False, True])
def test_image_of_a_guest_whose_entry_is_lost_is_nobody_elses(
    host: Toolstack, guest: Guest, disk: Path, *, readonly: bool
) -> None:
    """Before QEMU's own lock would say so: the image is seen in the descriptors."""
    spoil(host, guest, *ALL)
    config = Domain(name="thief", disks=(Disk(vdev="xvda", target=str(disk), readonly=readonly),))
    with pytest.raises(DeprivError, match=r"in use|used by|has it|write") as caught:
        host.create(config)
    assert str(disk) in f"{caught.value} {caught.value.cause}"
    assert "lock" not in caught.value.cause
    assert [row.state for row in host.rows()] == ["damaged"]
    host.guest(str(guest.domid)).destroy()
    host.create(config)  # the positive control


def test_lost_entry_is_cleared_once_its_qemu_is_dead(host: Toolstack, guest: Guest) -> None:
    row = guest.row()
    spoil(host, guest, *ALL)
    os.kill(row.pid, signal.SIGKILL)
    assert await_end(row.pid)
    assert host.rows()[0].state == "damaged"
    assert not host.guest(str(guest.domid)).audit().holds
    (would,) = host.gc(dry_run=True)
    assert (would.kind, would.domid, would.result) == ("domain", guest.domid, "would")
    assert host.registry.domids() == (guest.domid,)
    (done,) = host.gc()
    assert (done.domid, done.result) == (guest.domid, "done")
    check_gone(host, row.uid, row.domid)


def test_folder_without_any_entry_is_cleared_with_what_still_runs(host: Toolstack, guest: Guest) -> None:
    row = guest.row()
    for name in ALL:
        os.unlink(f"{host.registry.directory(guest.domid)}/{name}")
    assert host.rows() == ()
    kinds = [done.kind for _ in range(2) for done in host.gc()]
    assert kinds == ["start", "cgroup"]
    assert await_end(row.pid, within_s=0.1)
    check_gone(host, row.uid, row.domid)


def test_damaged_sockets_lock_and_notes_of_a_guest_do_not_keep_it_alive(host: Toolstack, guest: Guest) -> None:
    row = guest.row()
    directory = host.registry.directory(guest.domid)
    for name in ("qmp", "events", "log", "ended"):
        Path(f"{directory}/{name}").unlink(missing_ok=True)
        os.mkdir(f"{directory}/{name}")
    host.registry._seen.clear()
    assert host.rows()[0].state == "hung"
    host.guest("web").destroy()
    check_gone(host, row.uid, row.domid)


# Another boot


def test_guests_of_an_earlier_boot_are_swept_before_the_first_start_and_their_numbers_kill_nobody(
    host: Toolstack, guest: Guest
) -> None:
    """/run may be kept over a reboot; the numbers in it are other processes' by then."""
    row = guest.row()
    entry = host.registry.find("web")
    assert entry.expected is not None
    os.kill(row.pid, signal.SIGKILL)  # as the reboot did
    assert await_end(row.pid)
    with subprocess.Popen(["sleep", "60"]) as innocent:
        begun = proc.start_time(innocent.pid)
        host.registry.save(
            entry.replace(
                boot_id="0" * 36,
                expected=entry.expected.replace(pid=innocent.pid, starttime=begun),
                jail_pid=innocent.pid,
                jail_starttime=begun,
                config={**(entry.config or {}), "on_crash": "preserve"},
            )
        )
        Path(host.registry.folder, "boot").write_text(json.dumps({"boot": "0" * 36}))
        assert host.rows()[0].state == "dead"
        new = host.create(Domain(name="web"))
        assert [guest.domid for guest in host.guests()] == [new.domid]
        assert innocent.poll() is None
        assert not host.registry.is_new
        new.destroy()
        assert innocent.poll() is None
        innocent.kill()


def test_guests_start_are_known_and_end_while_the_clock_jumps(host: Toolstack, monkeypatch: pytest.MonkeyPatch) -> None:
    real, year = time.time(), 365 * 86400.0
    domids: list[int] = []
    for shift in (0.0, -year, year, -real):  # the last: 1970, as without a battery
        monkeypatch.setattr(time, "time", lambda shift=shift: real + shift)
        guest = host.create(Domain(name="web"))
        assert guest.audit().holds
        domids.append(guest.domid)
        monkeypatch.setattr(time, "time", lambda shift=shift: real - shift)
        assert guest.row().state == "running"
        assert host.gc() == ()
        guest.destroy()
    assert len(set(domids)) == 4  # each id rests for a minute that no clock shortens


# A lost state folder


def test_guests_whose_state_folder_was_removed_are_swept_by_the_next_start(host: Toolstack, uids: range) -> None:
    rows = [host.create(Domain(name=name)).row() for name in ("one", "two")]
    folder = host.registry.folder
    shutil.rmtree(folder)
    assert len(living(uids)) == 2
    assert host.rows() == ()
    new = host.create(Domain(name="one"))
    assert [await_end(row.pid, within_s=0.1) for row in rows] == [True, True]
    assert living(uids) == (new.row().pid,)
    assert new.audit().holds
    assert {leaf.domid for leaf in cgroup.leaves()} & {row.domid for row in rows} <= {new.domid}
    new.destroy()


@pytest.fixture
def hosts(unchanged: None) -> Iterator[tuple[CommandLine, CommandLine]]:
    """Return two hosts, as it were: one path of the state folder, two mount namespaces."""
    del unchanged
    made = (CommandLine(), CommandLine())
    yield made
    for one in made:
        one.close()


def test_registry_of_the_same_path_in_another_mount_namespace_is_left_alone(
    hosts: tuple[CommandLine, CommandLine], tmp_path: Path
) -> None:
    first, second = hosts
    path = tmp_path / "x.cfg"
    path.write_text(config_text("x"))
    first.run("create", str(path))
    (row,) = first.rows()
    second.run("gc")
    second.run("create", str(path))
    (other,) = second.rows()
    assert other["uid"] != row["uid"]
    second.run("gc")
    second.run("destroy", "x")
    second.run("gc")
    assert first.rows() == [row]
    first.run("audit", "x")


# A state folder that cannot be written


@pytest.fixture
def running(depriv: CommandLine, disk: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the row of a guest of the command line, and where its configuration is."""
    path = tmp_path / "web.cfg"
    path.write_text(config_text("web", f"vdev=xvda,format=raw,access=rw,target={disk}"))
    depriv.run("create", str(path))
    (row,) = depriv.rows()
    return {**row, "path": str(path)}


def remount(depriv: CommandLine, options: str) -> None:
    enter = ["nsenter", f"--mount=/proc/{depriv.pid}/ns/mnt", f"--root=/proc/{depriv.pid}/root"]
    subprocess.run([*enter, "mount", "-o", f"remount,{options}", "/run/depriv"], check=True, timeout=30)


def test_read_only_state_folder_stops_starts_and_nothing_else(
    depriv: CommandLine, running: dict[str, Any], uids: range, tmp_path: Path
) -> None:
    second = tmp_path / "second.cfg"
    second.write_text(config_text("second"))
    remount(depriv, "ro")
    try:
        refused = depriv.run("create", str(second), expect=125).stderr
        assert "Read-only file system" in refused
        assert "fix: see that it is writable and has room" in refused
        assert "Traceback" not in refused
        assert [row["state"] for row in depriv.rows()] == ["running"]
        depriv.run("audit", "web")
        said = depriv.run("destroy", "web", expect=125).stderr
        assert "Traceback" not in said
        assert f"domains/{running['domid']}" in said
        assert "Read-only file system" in said
        assert "fix: see that /run is writable, then: depriv gc" in said
        # All of it is dead, and only what cannot be removed is left.
        assert living(uids) == ()
        assert [leaf for leaf in cgroup.leaves() if leaf.domid == running["domid"]] == []
        assert [row["state"] for row in depriv.rows()] == ["dead"]
        done = depriv.run("gc", expect=1)
        assert done.stderr == ""
        assert (
            f"web (domain {running['domid']}): QEMU is gone: on_crash = destroy: failed: cannot remove" in done.stdout
        )
    finally:
        remount(depriv, "rw")
    depriv.run("gc")
    assert depriv.rows() == []
    depriv.run("create", running["path"])
    depriv.run("destroy", "web")


def fill(folder: str) -> None:
    """Leave no page free in a file system."""
    with open(f"{folder}/fill", "wb", buffering=0) as file:
        file.writelines(bytes(4096) for _ in range(os.statvfs(folder).f_bfree))
        with pytest.raises(OSError, match="No space left on device"):
            file.write(bytes(4096))


def test_full_state_folder_stops_starts_and_nothing_else(
    depriv: CommandLine, running: dict[str, Any], uids: range, tmp_path: Path
) -> None:
    second = tmp_path / "second.cfg"
    second.write_text(config_text("second"))
    remount(depriv, "size=64k")
    fill(depriv.state_dir)
    refused = depriv.run("create", str(second), expect=125).stderr
    assert "No space left on device" in refused
    assert "df -h /run" in refused
    assert [row["state"] for row in depriv.rows()] == ["running"]
    depriv.run("audit", "web")
    with pytest.raises(HostError, match="cannot write"):
        Registry(depriv.state_dir).note_end(running["domid"], "poweroff")
    # What ended is seen and cleared all the same: the note is a help, not the proof.
    os.kill(running["pid"], signal.SIGKILL)
    assert await_end(running["pid"])
    depriv.run("gc")
    assert depriv.rows() == []
    assert living(uids) == ()
    os.unlink(f"{depriv.state_dir}/fill")
    depriv.run("gc")
    assert not [name for name in os.listdir(depriv.state_dir) if "." in name and name.rpartition(".")[2].isdecimal()]
    depriv.run("create", str(second))
    depriv.run("destroy", "second")
