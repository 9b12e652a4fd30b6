# SPDX-License-Identifier: Apache-2.0
"""A watcher over real guests: what their configurations say of their ends is done, and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.qemu.test_dead_leader import end_main_thread
from tests.support.guests import await_console, await_state, hmp, qmp, stop
from tests.support.host import need
from tests.support.watching import Watching, await_true

from depriv import demo_guest
from depriv.config import Disk, Domain
from depriv.errors import DeprivError, NotFoundError
from depriv.policy import RESTARTS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from depriv.api import Guest, Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

# What a guest could do to its ports, done by hand once its BIOS has placed them. See tests/qemu/test_endings_qemu.py.
POWEROFF = "o/h 0x604 0x2000"
PANIC = "o/b 0x505 1"
PANICS_AT_ONCE = "ba 05 05 b0 01 ee"  # mov dx, 0x505; mov al, 1; out dx, al


@pytest.fixture
def start(host: Toolstack, tmp_path: Path) -> Callable[..., Guest]:
    """Return what starts a guest that runs for ever, and waits for its first words."""

    def start(name: str = "web", *, code: str = "", **fields: Any) -> Guest:
        path = tmp_path / f"{name}.img"
        sector = (bytes.fromhex(code) + b"\xf4\xeb\xfd").ljust(510, b"\0") + b"\x55\xaa"  # hlt; jmp back to it
        path.write_bytes(sector + bytes((1 << 20) - 512) if code else demo_guest.image())
        disk = Disk(vdev="xvda", target=str(path), readonly=bool(code))
        guest = host.create(Domain(name=name, disks=(disk,), memory_mib=32, **fields))
        if not code:
            await_console(guest, demo_guest.HELLO)
        return guest

    return start


@pytest.fixture
def watch(host: Toolstack, tmp_path: Path) -> Iterator[Callable[[], Watching]]:
    """Return what starts a watcher, and waits until it watches."""
    made: list[Watching] = []

    def start() -> Watching:
        made.append(Watching(host.registry.folder, tmp_path / "watch.log"))
        made[-1].await_ready()
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
    for each in made:
        each.close()
        if not sys.exc_info()[0]:
            assert "Traceback" not in each.text()


def pid_of(host: Toolstack, guest: Guest) -> int:
    expected = host.registry.find(str(guest.domid)).expected
    assert expected is not None
    return expected.pid


def kill(host: Toolstack, guest: Guest) -> None:
    os.kill(pid_of(host, guest), signal.SIGKILL)


def is_gone(host: Toolstack, domid: int) -> bool:
    return domid not in host.registry.domids()


def await_gone(host: Toolstack, guest: Guest, **keywords: Any) -> float:
    """Return how many seconds it took until a domain was forgotten."""
    return await_true(lambda: is_gone(host, guest.domid), what=f"{guest.name} is forgotten", **keywords)


def await_next_life(host: Toolstack, guest: Guest, name: str = "") -> Guest:
    """Return the guest of the same name, or of another, once it runs under another domid."""

    def reborn() -> bool:
        try:
            found = host.guest(name or guest.name)
            return found.domid != guest.domid and found.row().state == "running"
        except NotFoundError:
            return False

    await_true(reborn, what=f"{guest.name} is back")
    return host.guest(name or guest.name)


# --- What the configuration wants is done ---


def test_guest_that_switches_itself_off_is_destroyed(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    guest = start(on_poweroff="destroy", on_crash="restart")
    watching = watch()
    hmp(host, guest, POWEROFF)
    await_gone(host, guest)
    time.sleep(1.5)
    assert host.guests() == ()
    assert watching.text().count("poweroff, says its QEMU") == 1
    assert "its QEMU is gone" not in watching.text()  # that was the gc's doing


def test_guest_that_switches_itself_off_is_started_again_and_audited(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    guest = start(on_poweroff="restart")
    watch()
    hmp(host, guest, POWEROFF)
    again = await_next_life(host, guest)
    await_console(again, demo_guest.HELLO)
    assert again.audit().holds
    await_gone(host, guest)
    assert len(host.guests()) == 1


def test_guest_that_switches_itself_off_is_preserved_and_asked_after_once(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    guest = start(on_poweroff="preserve", on_crash="destroy")
    watching = watch()
    hmp(host, guest, POWEROFF)
    watching.await_said("poweroff, says its QEMU")
    time.sleep(4)
    assert guest.row().state == "shutdown"
    assert host.registry.end_noted(guest.domid) == "poweroff"
    assert watching.text().count("poweroff, says its QEMU") == 1
    assert "failed" not in watching.text()
    # Preserved is not forgotten: its QEMU's end is another one. What was noted first is what happened.
    kill(host, guest)
    watching.await_said("its QEMU is gone")


def test_guest_that_is_reset_is_destroyed_if_its_configuration_says_so(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    guest = start(on_reboot="destroy", on_poweroff="preserve")
    watching = watch()
    qmp(host, guest, "system_reset")
    await_gone(host, guest)
    assert "reboot, says its QEMU" in watching.text()


def test_guest_that_is_reset_with_the_default_stays_the_same_domain(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    guest = start()
    watching = watch()
    qmp(host, guest, "system_reset")
    time.sleep(2)
    assert guest.row().state == "running"
    assert "says its QEMU" not in watching.text()


def test_panic_is_a_crash(host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]) -> None:
    guest = start(on_crash="destroy", on_poweroff="preserve")
    watching = watch()
    hmp(host, guest, PANIC)
    await_gone(host, guest)
    assert "crash, says its QEMU" in watching.text()


def test_killed_qemu_is_a_crash_and_its_guest_is_back_under_another_domid(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    guest = start(on_crash="restart", on_poweroff="destroy")
    watching = watch()
    kill(host, guest)
    again = await_next_life(host, guest)
    await_console(again, demo_guest.HELLO)
    assert again.audit().holds
    assert is_gone(host, guest.domid)
    # And it is watched as the first life was.
    kill(host, again)
    third = await_next_life(host, again)
    assert third.domid not in (guest.domid, again.domid)
    assert watching.stop() == 0


def test_qemu_that_the_kernel_kills_for_its_memory_is_a_crash_and_its_guest_is_back(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    need(os.path.isdir("/sys/fs/cgroup/memory"), what="the memory controller of cgroup version 1")
    guest = start(on_crash="restart")
    watching = watch()
    old = pid_of(host, guest)
    group = Path(f"/sys/fs/cgroup/memory/depriv-tests-{os.getpid()}")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(1 << 20))
        (group / "cgroup.procs").write_text(str(old))
        # It needs memory for its answers, and for what the guest does when it starts anew.
        with contextlib.suppress(DeprivError):
            for _ in range(50):
                qmp(host, guest, "query-qmp-schema")
        watching.await_said("QEMU is gone")
        await_true(lambda: [row.state for row in host.rows()] == ["running"], what="a new life")
    finally:
        await_true(lambda: not (group / "cgroup.procs").read_text(), what="the end of what is in the cgroup")
        killed = (group / "memory.oom_control").read_text()
        group.rmdir()
    assert "oom_kill 0" not in killed
    (row,) = host.rows()
    assert (row.name, row.domid != guest.domid, row.pid != old) == ("web", True, True)


def test_guest_that_crashes_again_and_again_is_left_at_last_for_somebody_to_see(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    start(code=PANICS_AT_ONCE, on_crash="restart")
    watch()

    def is_left() -> bool:
        entries = host.registry.entries()
        return len(entries) == 1 and entries[0].restarts == RESTARTS_MAX and entries[0].state == "running"

    await_true(is_left, within_s=60, what="the last restart")
    last = host.guest("web")
    await_state(last, "crashed")
    time.sleep(4)
    assert [guest.domid for guest in host.guests()] == [last.domid]
    assert last.row().state == "crashed"


# --- Whoever watches may come and go ---


def test_ends_that_nobody_saw_are_found_by_the_next_watcher(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    dead = start("dead", on_crash="restart")
    off = start("off", on_poweroff="restart")
    fine = start("fine", on_poweroff="restart", on_crash="restart")
    kill(host, dead)
    hmp(host, off, POWEROFF)
    watch()
    assert await_next_life(host, dead).audit().holds
    assert await_next_life(host, off).audit().holds
    assert fine.row().state == "running"


def test_killed_watcher_is_no_loss_to_the_next_one(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    guest = start(on_crash="restart", on_poweroff="destroy")
    assert watch().stop(signal.SIGKILL) == -signal.SIGKILL
    assert guest.row().state == "running"
    assert guest.audit().holds
    watch()
    kill(host, guest)
    again = await_next_life(host, guest)
    hmp(host, again, "info status")
    await_console(again, demo_guest.HELLO)
    hmp(host, again, POWEROFF)
    await_gone(host, again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watcher_that_is_told_to_end_leaves_every_guest_running(
    start: Callable[..., Guest], watch: Callable[[], Watching], number: int
) -> None:
    guest = start(on_crash="restart")
    assert watch().stop(number) == 0
    time.sleep(0.5)
    assert guest.row().state == "running"
    assert guest.audit().holds


def test_second_watcher_of_one_folder_is_refused_and_told_who_is_the_first(
    host: Toolstack, watch: Callable[[], Watching]
) -> None:
    first = watch()
    done = subprocess.run(
        [sys.executable, "-m", "depriv.cli", "watch"],
        env={**os.environ, "DEPRIV_STATE_DIR": host.registry.folder},
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 125
    assert done.stdout == ""
    assert f"process {first.process.pid} " in done.stderr
    assert "Traceback" not in done.stderr
    assert first.process.poll() is None
    # The lock ends with its holder, whatever it started meanwhile.
    first.stop(signal.SIGKILL)
    watch()


def test_audit_of_a_watched_guest_holds(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    del host
    guest = start()
    watch()
    time.sleep(1.2)
    report = guest.audit()
    assert report.holds, report.to_text()


# --- It does no more than that ---


def test_guest_that_is_destroyed_is_not_started_again(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    watching = watch()
    for number in range(4):
        guest = start(f"web{number}", on_crash="restart", on_poweroff="restart")
        time.sleep(1.1)  # it is watched
        guest.destroy()
        assert is_gone(host, guest.domid)
    time.sleep(2)
    assert host.guests() == ()
    assert "started again" not in watching.text()


def test_guest_that_is_told_to_end_from_outside_is_not_started_against_that(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    guest = start(on_crash="restart", on_poweroff="restart")
    watching = watch()
    watching.await_said("watching ")
    time.sleep(1)
    os.kill(pid_of(host, guest), signal.SIGTERM)
    await_gone(host, guest)
    time.sleep(1)
    assert host.guests() == ()
    assert "host, says its QEMU" in watching.text() or "gone after host" in watching.text()


def test_hung_guest_neither_delays_the_end_of_another_nor_is_ended(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    hung = start("hung", on_crash="restart")
    stop(pid_of(host, hung))
    other = start("other", on_crash="destroy")
    watching = watch()
    time.sleep(1.5)
    kill(host, other)
    noticed_s = watching.await_said("other (domain")
    took_s = await_gone(host, other)
    print(f"noticed after {noticed_s:.3f} s, cleared {took_s:.3f} s later")
    assert noticed_s < 1.2
    assert took_s < 3
    assert hung.row().state == "hung"
    os.kill(pid_of(host, hung), signal.SIGCONT)
    await_state(hung, "running")


def test_qemu_that_ends_its_main_thread_alone_is_found_out(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    guest = start(on_crash="destroy")
    watch()
    pid = pid_of(host, guest)
    assert guest.row().state == "running"
    end_main_thread(pid)
    assert guest.row().state == "dead"
    await_gone(host, guest)


def test_start_that_was_killed_is_cleared_away_without_anybody_asking(
    host: Toolstack, watch: Callable[[], Watching], tmp_path: Path
) -> None:
    path = tmp_path / "web.cfg"
    (tmp_path / "disk.img").write_bytes(demo_guest.image())
    path.write_text(f'name = "web"\ntype = "hvm"\nmemory = 32\ndisk = ["vdev=xvda,target={tmp_path}/disk.img"]\n')
    watching = watch()
    for pause_s in (0.0, 0.02, 0.05):
        process = subprocess.Popen(
            [sys.executable, "-m", "depriv.cli", "create", str(path)],
            env={**os.environ, "DEPRIV_STATE_DIR": host.registry.folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        await_true(lambda: bool(host.registry.entries()) or process.poll() is not None, what="an entry")  # noqa: B023
        time.sleep(pause_s)
        process.kill()
        process.wait()
        if any(entry.state == "running" for entry in host.registry.entries()):
            host.guest("web").destroy()  # it got through
        try:
            await_true(lambda: host.registry.domids() == (), what="nothing is left")
        except AssertionError as error:
            raise AssertionError(f"{error}, but {host.registry.entries()}; {watching.text()}") from None


@pytest.mark.parametrize("state", ["quarantined", "ending"])
def test_end_that_was_cut_short_is_brought_to_its_end(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching], state: str
) -> None:
    guest, other = start(on_crash="restart"), start("other")
    entry = host.registry.find(str(guest.domid))
    kill(host, guest)
    host.registry.save(entry.replace(state=state, trouble="a test"))
    watch()
    await_gone(host, guest)
    assert [guest.name for guest in host.guests()] == ["other"]
    assert other.row().state == "running"


def test_many_ends_at_once_are_all_seen_to(
    host: Toolstack, start: Callable[..., Guest], watch: Callable[[], Watching]
) -> None:
    guests = [start(f"web{number}", on_crash="destroy") for number in range(6)]
    watching = watch()
    for guest in guests:
        kill(host, guest)
    await_true(lambda: host.registry.domids() == (), within_s=30, what="all are cleared")
    assert watching.text().count("its QEMU is gone") == 6
