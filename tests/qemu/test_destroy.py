# SPDX-License-Identifier: Apache-2.0
"""Destroy ends a domain whatever its QEMU does, and a start that nobody completes ends by itself."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.guests import await_end, config_text, stop
from tests.support.host import living, settled, snapshot

from depriv.config import Disk, Domain
from depriv.errors import NotFoundError

if TYPE_CHECKING:
    from tests.support.guests import CommandLine

    from depriv.api import Guest, Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]


@pytest.fixture
def guest(host: Toolstack, disk: Path) -> Guest:
    return host.create(Domain(name="ends", machine="q35", disks=(Disk(vdev="xvda", target=str(disk)),)))


def gone(host: Toolstack, guest: Guest, *, within_s: float = 3.0) -> None:
    """Destroy it in time, and see that nothing is left."""
    pid = guest.row().pid
    entry = host.registry.find(guest.name)
    began = time.monotonic()
    guest.destroy()
    assert time.monotonic() - began < within_s
    assert host.guests() == ()
    assert await_end(pid, within_s=0.1)
    assert living(range(entry.uid, entry.uid + 1)) == ()
    assert not os.path.exists(entry.cgroup)
    assert not os.path.exists(host.registry.directory(entry.domid))


def test_running_guest_is_ended(host: Toolstack, guest: Guest) -> None:
    gone(host, guest)


def test_stopped_qemu_is_hung_and_ended(host: Toolstack, guest: Guest) -> None:
    stop(guest.row().pid)
    assert guest.row().state == "hung"
    gone(host, guest)


def test_killed_qemu_is_dead_and_its_domain_can_be_cleaned_up(host: Toolstack, guest: Guest) -> None:
    pid = guest.row().pid
    os.kill(pid, signal.SIGKILL)
    assert await_end(pid)
    assert guest.row().state == "dead"
    report = guest.audit()
    assert not report.holds
    gone(host, guest)


def test_qemu_whose_monitor_somebody_keeps_is_hung_and_ended(host: Toolstack, guest: Guest) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        os.chdir(host.registry.directory(guest.domid))  # the path may be longer than an address
        try:
            other.connect("qmp")
        finally:
            os.chdir("/")
        assert other.recv(16)
        began = time.monotonic()
        assert guest.row().state == "hung"
        assert time.monotonic() - began < 5
        gone(host, guest)


def test_list_of_many_hung_guests_is_bounded(host: Toolstack) -> None:
    for number in range(3):
        stop(host.create(Domain(name=f"h{number}")).row().pid)
    began = time.monotonic()
    assert [guest.row().state for guest in host.guests()] == ["hung"] * 3
    assert time.monotonic() - began < 3 * 2.0


def test_destroyed_domain_is_not_destroyed_twice(host: Toolstack, guest: Guest) -> None:
    gone(host, guest)
    with pytest.raises(NotFoundError):
        guest.destroy()


def test_other_domains_live_on(host: Toolstack, guest: Guest) -> None:
    other = host.create(Domain(name="other"))
    guest.destroy()
    assert other.row().state == "running"
    assert other.audit().holds


def test_process_that_was_given_the_dead_ones_number_is_not_killed(host: Toolstack, guest: Guest) -> None:
    entry = host.registry.find(guest.name)
    assert entry.expected is not None
    ours = os.getpid()
    os.kill(entry.expected.pid, signal.SIGKILL)
    assert await_end(entry.expected.pid)
    # As if the number had come round: same number, another start.
    host.registry.save(entry.replace(expected=entry.expected.replace(pid=ours)))
    host.guest(guest.name).destroy()
    assert host.guests() == ()


def test_create_killed_at_any_moment_leaves_no_qemu_and_destroy_cleans_what_is_listed(
    depriv: CommandLine, disk: Path, tmp_path: Path, uids: range
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "k.cfg"
    path.write_text(config_text("k", f"vdev=xvda,format=raw,access=rw,target={disk}"))
    depriv.run("create", str(path))  # the copy of QEMU is there from now on
    depriv.run("destroy", "k")
    where: dict[str, Any] = {"folder": f"{depriv.state_dir}/domains", "uids": uids}
    before = snapshot(**where)
    seen: list[str] = []
    for _ in range(24):
        command = depriv.start("create", str(path))
        time.sleep(chance.uniform(0.0, 0.35))
        command.kill()
        command.communicate(timeout=10)
        rows = depriv.rows()
        assert len(rows) <= 1
        state = rows[0]["state"] if rows else "none"
        seen.append(state)
        if state not in ("running", "paused"):
            # It ended by itself: the jail does not outlive the toolstack.
            deadline = time.monotonic() + 5
            while living(uids):
                assert time.monotonic() < deadline, seen
                time.sleep(0.01)
        if rows:
            depriv.run("destroy", "k")
        after = settled(before, where)
        assert after == before, seen
    print(seen)
    assert len(set(seen)) > 1, f"all kills came at the same stage: {seen}"


def test_of_many_destroys_at_once_one_does_it_and_the_others_say_so(host: Toolstack, disk: Path) -> None:
    host.create(Domain(name="web", disks=(Disk(vdev="xvda", target=str(disk)),)), paused=True)
    guests_seen = [host.guest("web") for _ in range(4)]
    said: list[str] = []

    def end(guest: Guest) -> None:
        try:
            guest.destroy()
            said.append("done")
        except NotFoundError as error:
            said.append(str(error))

    threads = [threading.Thread(target=end, args=(guest,)) for guest in guests_seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert said.count("done") == 1
    assert len(said) == len(guests_seen)
    assert all("gone" in text for text in said if text != "done")
    assert host.guests() == ()


def test_domain_that_is_being_started_is_not_destroyed_under_the_start(host: Toolstack, disk: Path) -> None:
    """The one waits for the other: the guest is complete and gone, never half of either."""
    config = Domain(name="web", disks=(Disk(vdev="xvda", target=str(disk)),))
    begun: list[Guest] = []

    def start() -> None:
        begun.append(host.create(config, paused=True))

    thread = threading.Thread(target=start)
    thread.start()
    deadline = time.monotonic() + 30
    while not host.guests() and time.monotonic() < deadline:
        time.sleep(0.001)
    host.guest("web").destroy()
    thread.join(60)
    assert len(begun) == 1
    assert host.guests() == ()


def fill(folder: str) -> None:
    """Leave no page free in a file system."""
    fd = os.open(f"{folder}/fill", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        free = os.statvfs(folder).f_bfree
        for _ in range(free):
            os.write(fd, bytes(4096))
        with pytest.raises(OSError, match="No space left on device"):
            os.write(fd, bytes(4096))
    finally:
        os.close(fd)


def test_domain_is_destroyed_on_a_file_system_that_is_full(
    depriv: CommandLine, disk: Path, tmp_path: Path, uids: range
) -> None:
    path = tmp_path / "web.cfg"
    path.write_text(config_text("web", f"vdev=xvda,format=raw,access=rw,target={disk}"))
    enter = ["nsenter", f"--mount=/proc/{depriv.pid}/ns/mnt", f"--root=/proc/{depriv.pid}/root"]
    remount = [*enter, "mount", "-o", "remount,size=96k", "/run/depriv"]
    subprocess.run(remount, check=True, timeout=30)
    depriv.run("create", str(path))
    fill(depriv.state_dir)
    depriv.run("destroy", "web")
    assert living(uids) == ()
    assert os.listdir(f"{depriv.state_dir}/domains") == []
    # All that is left is whole: the next start can read it, once there is room.
    assert depriv.rows() == []
    refused = subprocess.run(depriv.argv("create", str(path)), check=False, capture_output=True, text=True, timeout=60)
    if refused.returncode == 0:
        depriv.run("destroy", "web")
    else:
        assert refused.returncode == 125
        assert "Traceback" not in refused.stderr
        assert depriv.rows() == []
        assert os.listdir(f"{depriv.state_dir}/domains") == []
    Path(f"{depriv.state_dir}/fill").unlink()
    depriv.run("create", str(path))
    depriv.run("audit", "web")
    depriv.run("destroy", "web")
    left = {name for name in os.listdir(depriv.state_dir) if name not in ("domains", "lock", "reaper.lock")}
    assert left == {"boot", "history.json"}
