# SPDX-License-Identifier: Apache-2.0
"""Who listens to many QEMUs, one of which is somebody else's: bounded in time, processor and memory, and not deceived.

First the reader of one events socket against every behaviour of the monitor's peer; then a whole watcher, beside whose
hostile guest another one ends.
"""

from __future__ import annotations

import os
import runpy
import select
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.watching import PEER, Fakes, Watching

from depriv.errors import MonitorError, render
from depriv.events import ClosedError, Events

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    StartPeer = Callable[[str], socket.socket]

MIB = 1024 * 1024
QMP_PEER = runpy.run_path(os.path.join(os.path.dirname(__file__), "qmp_peer.py"))
# Behaviours of qmp_peer.py that no rule forbids a peer to have who is only listened to.
HARMLESS = {
    "never_greets",
    "greets_slowly_for_ever",
    "ignores_negotiation",
    "never_answers",
    "answers_byte_by_byte",
    "keeps_each_read_alive_with_events",
    "never_reads",
    "reads_byte_by_byte",
    "greeting_of_another_shape",
    "greeting_without_version",
}
CLOSES = {
    "closes_before_greeting",
    "closes_after_greeting",
    "resets",
    "closes_in_mid_line",
    "shuts_down_its_sending_side",
}


def listened(sock: socket.socket, *, for_s: float) -> tuple[list[tuple[str, str]], MonitorError | None, float]:
    """Return what a peer says within some time, how its connection ended, and how long the longest call took."""
    events = Events.adopt(sock)
    heard: list[tuple[str, str]] = []
    error: MonitorError | None = None
    longest_s = 0.0
    ends = time.monotonic() + for_s
    poll = select.poll()
    poll.register(events.fileno(), select.POLLIN)
    try:
        while error is None and time.monotonic() < ends:
            poll.poll(20)
            began = time.monotonic()
            said, error = events.receive()
            longest_s = max(longest_s, time.monotonic() - began)
            heard += said
            if events.spent:
                time.sleep(0.02)
                events.tick()
    except MonitorError as flood:
        error = flood
    finally:
        events.close()
    return heard, error, longest_s


def open_fds() -> set[str]:
    fds = set(os.listdir("/proc/self/fd"))
    return {fd for fd in fds if os.path.lexists(f"/proc/self/fd/{fd}")}  # not the listing's own


def peak_growth_bytes() -> Callable[[], int]:
    """Return a function that tells by how much memory has been greater since, at its peak."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # resets VmHWM. Source: proc_pid_clear_refs(5)
    before = status_bytes("VmRSS")
    return lambda: status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


@pytest.mark.parametrize("behaviour", QMP_PEER["HOSTILE"])
def test_reader_is_neither_held_up_nor_deceived_by(start_peer: StartPeer, behaviour: str) -> None:
    sock = start_peer(behaviour)
    fds, own = open_fds(), str(sock.fileno())
    growth = peak_growth_bytes()
    heard, error, longest_s = listened(sock, for_s=0.5 if behaviour in HARMLESS else 10.0)
    assert heard == []
    assert longest_s < 1
    assert growth() < 2 * MIB
    assert open_fds() == fds - {own}
    if behaviour in HARMLESS:
        assert error is None
        return
    assert error is not None
    assert isinstance(error, ClosedError) == (behaviour in CLOSES)
    assert all(line.isprintable() for line in render(error).splitlines())


# --- A whole watcher ---


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[Fakes]:
    made = Fakes(tmp_path / "state")
    yield made
    made.close()


@pytest.fixture
def watch(fakes: Fakes, tmp_path: Path) -> Iterator[Callable[[], Watching]]:
    made: list[Watching] = []

    def start() -> Watching:
        made.append(Watching(fakes.registry.folder, tmp_path / "log"))
        made[-1].await_ready()
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
    for each in made:
        each.close()


BEHAVIOURS = runpy.run_path(PEER)["BEHAVIOURS"]
QUIET = {"honest", "silent", "half_a_greeting", "half_a_line", "hangs_up", "hangs_up_later", "hangs_up_in_mid_line"}
QUIET |= {"resets"}
SPEAKS = {"poweroffs", "ends_then_floods"}  # of an end


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_end_of_another_guest_is_noticed_in_time_beside(
    fakes: Fakes, watch: Callable[[], Watching], behaviour: str
) -> None:
    fakes.add("hostile", 1, behaviour)
    victim = fakes.add("victim", 2, "honest")
    watching = watch()
    time.sleep(1)  # the hostile one is at it by then, and the first `gc` is over
    memory = watching.memory_kib()["Rss"]
    cpu_s, began = watching.cpu_s(), time.monotonic()
    time.sleep(1.5)
    share = (watching.cpu_s() - cpu_s) / (time.monotonic() - began)
    fakes.kill(victim)
    took_s = watching.await_said("victim (domain 2): its QEMU is gone")
    print(f"{behaviour}: {share:.1%} of a processor, {took_s:.3f} s to notice")
    assert share < 0.05
    assert took_s < 1.2
    assert watching.memory_kib()["Rss"] - memory < 1024
    text = watching.text()
    assert ("hostile (domain 1): poweroff, says its QEMU" in text) == (behaviour in SPEAKS)
    assert fakes.registry.end_noted(1) == ("poweroff" if behaviour in SPEAKS else "")
    assert text.count("talks nonsense") == (0 if behaviour in QUIET else text.count("talks nonsense"))
    assert text.count("talks nonsense") <= 1
    assert watching.stop() == 0


def test_flood_of_forged_ends_starts_one_gc_and_not_a_flood_of_them(
    fakes: Fakes, watch: Callable[[], Watching]
) -> None:
    fakes.add("hostile", 1, "poweroffs")
    watching = watch()
    time.sleep(5)
    assert watching.text().count("poweroff, says its QEMU") == 1


def test_many_floods_at_once_leave_the_watcher_in_time_for_another_guest(
    fakes: Fakes, watch: Callable[[], Watching]
) -> None:
    for number, behaviour in enumerate(("tiny_events", "single_bytes", "big_events", "costly_events") * 2, 1):
        fakes.add(f"hostile{number}", number, behaviour)
    victim = fakes.add("victim", 90, "honest")
    watching = watch()
    time.sleep(1)
    fakes.kill(victim)
    assert watching.await_said("victim (domain 90): its QEMU is gone") < 1.5


def test_flooding_guest_is_given_up_and_its_own_end_still_noticed(fakes: Fakes, watch: Callable[[], Watching]) -> None:
    hostile = fakes.add("hostile", 1, "tiny_events")
    watching = watch()
    watching.await_said("hostile (domain 1): QEMU talks nonsense on its events socket (it sent more than anybody")
    fakes.kill(hostile)
    watching.await_said("hostile (domain 1): its QEMU is gone")


def test_process_that_has_the_number_of_a_dead_qemu_is_not_taken_for_it(
    fakes: Fakes, watch: Callable[[], Watching]
) -> None:
    other = fakes.add("reused", 1, "honest")
    entry = fakes.registry.read(1)
    assert entry is not None
    assert entry.expected is not None
    fakes.registry.save(entry.replace(expected=entry.expected.replace(starttime=entry.expected.starttime - 1)))
    fakes.add("earlier", 2, "honest", boot_id="00000000-0000-0000-0000-000000000000")
    watching = watch()
    watching.await_said("reused (domain 1): its QEMU is gone")
    watching.await_said("earlier (domain 2): its QEMU is gone")
    time.sleep(1)
    assert other.poll() is None
