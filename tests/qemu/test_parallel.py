# SPDX-License-Identifier: Apache-2.0
"""Many commands at once: each does what it says or says why not, no two domains share an id, and none waits for one
that stands still unless that holds what it needs; then it is told who that is.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.support import guests
from tests.support.guests import config_text, stop
from tests.support.host import living

from depriv import durable
from depriv.config import Domain
from depriv.errors import DeprivError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from depriv.api import Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

COUNT = 8
PATIENCE_S = 120.0
Said = tuple[int, str, str]  # exit status, standard output, standard error


class Commands:
    """Commands on the domains of one registry, each a process of its own."""

    def __init__(self, host: Toolstack) -> None:
        """Take the registry."""
        self._environ = {**os.environ, "DEPRIV_STATE_DIR": host.registry.folder}
        self._made: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start `depriv WORDS`."""
        pipe = subprocess.PIPE
        argv = [sys.executable, "-m", "depriv.cli", *words]
        self._made.append(subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, env=self._environ))
        return self._made[-1]

    def close(self) -> None:
        """End those that have not ended."""
        for each in self._made:
            if each.poll() is None:
                each.kill()
            each.communicate()


@contextlib.contextmanager
def commands_on(host: Toolstack) -> Generator[Commands]:
    made = Commands(host)
    try:
        yield made
    finally:
        made.close()


def ended(command: subprocess.Popen[str]) -> Said:
    out, error = command.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in error
    return command.returncode, out, error


def config(folder: Path, name: str, **keys: Any) -> str:
    path = folder / f"{name}.cfg"
    path.write_text(config_text(name, memory=16, **keys))
    return str(path)


def rows_of(said: Said) -> list[dict[str, Any]]:
    assert said[0] == 0, said
    rows: list[dict[str, Any]] = json.loads(said[1])
    return rows


def test_starts_and_ends_of_many_at_once_share_no_id_and_leave_nothing(
    host: Toolstack, uids: range, tmp_path: Path
) -> None:
    names = [f"web{number}" for number in range(COUNT)]
    with commands_on(host) as commands:
        starts = [commands.start("create", config(tmp_path, name)) for name in names]
        lists = [commands.start("list", "--json") for _ in names]
        for each in starts:
            assert ended(each)[0] == 0
        for each in lists:
            for row in rows_of(ended(each)):
                assert row["name"] in names
                assert row["state"] in ("starting", "running", "paused", "hung"), row  # "hung": too busy to answer
        rows = rows_of(ended(commands.start("list", "--json")))
        assert sorted(row["name"] for row in rows) == names
        for field in ("domid", "uid", "gid", "pid"):
            assert len({row[field] for row in rows}) == COUNT, field
        assert set(living(uids)) == {row["pid"] for row in rows}
        for name in names:
            assert host.guest(name).audit().holds
        ends = [commands.start("destroy", name) for name in names]
        lists = [commands.start("list", "--json") for _ in names]
        assert [ended(each) for each in ends] == [(0, "", "")] * COUNT
        for each in lists:
            assert {row["name"] for row in rows_of(ended(each))} <= set(names)
    assert host.guests() == ()
    assert living(uids) == ()
    assert os.listdir(f"{host.registry.folder}/domains") == []


def test_of_many_starts_of_one_name_one_wins_and_the_others_say_so(
    host: Toolstack, uids: range, tmp_path: Path
) -> None:
    path = config(tmp_path, "web")
    with commands_on(host) as commands:
        said = [ended(each) for each in [commands.start("create", path) for _ in range(COUNT)]]
    assert sorted(status for status, _, _ in said) == [0] + [2] * (COUNT - 1)
    for status, out, error in said:
        if status:
            assert "a domain named 'web' exists" in error
            assert out == ""
    (row,) = host.rows()
    assert living(uids) == (row.pid,)
    assert host.guest("web").audit().holds


def test_of_many_starts_with_one_image_one_wins_and_the_others_say_who(
    host: Toolstack, uids: range, tmp_path: Path
) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(1 << 20))
    disk = f"vdev=xvda,format=raw,access=rw,target={image}"
    with commands_on(host) as commands:
        starts: list[subprocess.Popen[str]] = []
        for number in range(COUNT):
            path = tmp_path / f"{number}.cfg"
            path.write_text(config_text(f"web{number}", disk, memory=16))
            starts.append(commands.start("create", str(path)))
        said = [ended(each) for each in starts]
    assert sorted(status for status, _, _ in said) == [0] + [2] * (COUNT - 1)
    (row,) = host.rows()
    assert living(uids) == (row.pid,)
    for status, _, error in said:
        assert not status or f"{image} for xvda is in use by domain web" in error


def test_of_many_ends_of_one_all_leave_it_ended_and_those_that_were_late_say_so(host: Toolstack, uids: range) -> None:
    host.create(Domain(name="web", memory_mib=16))
    with commands_on(host) as commands:
        said = [ended(each) for each in [commands.start("destroy", "web") for _ in range(COUNT)]]
    assert [status for status, _, _ in said].count(0) == 1
    for status, out, error in said:
        assert not status or " is gone: " in error or "there is no domain 'web'" in error, error
        assert out == ""
    assert host.guests() == ()
    assert living(uids) == ()


def test_starts_and_ends_of_one_name_in_a_crowd_end_in_a_guest_or_in_nothing(
    host: Toolstack, uids: range, tmp_path: Path
) -> None:
    path = config(tmp_path, "web")
    with commands_on(host) as commands:
        both = [commands.start(*words) for _ in range(4) for words in (("create", path), ("destroy", "web"))]
        for each in both:
            status, _, error = ended(each)
            assert not status or "'web'" in error or "domain web" in error or " is gone" in error, error
    rows = host.rows()
    assert set(living(uids)) == {row.pid for row in rows}
    assert [row.state for row in rows] in ([], ["running"])


@pytest.mark.parametrize("hung", [1, COUNT])
def test_list_is_quick_however_many_hang(host: Toolstack, uids: range, hung: int) -> None:
    made = [host.create(Domain(name=f"web{number}", memory_mib=16)) for number in range(COUNT)]
    for guest in made[:hung]:
        stop(guest.row().pid)
    try:
        began = time.monotonic()
        rows = host.rows()
        assert time.monotonic() - began < 1.5
        assert [row.state for row in rows] == ["hung"] * hung + ["running"] * (COUNT - hung)
    finally:
        for pid in living(uids):
            os.kill(pid, signal.SIGCONT)
    for guest in made:
        guests.await_state(guest, "running")


def test_start_that_stands_still_holds_up_nobody_or_is_named(host: Toolstack, uids: range, tmp_path: Path) -> None:
    """As one does whose image lies in a file system that hangs, or that waits for a name service."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    stands, other = config(tmp_path, "stands"), config(tmp_path, "other")
    outcomes: list[str] = []
    with commands_on(host) as commands:
        for _ in range(6):
            command = commands.start("create", stands)
            time.sleep(chance.uniform(0.05, 0.35))
            if command.poll() is None:
                stop(command.pid)
            began = time.monotonic()
            status, _, error = ended(commands.start("create", other))
            took_s = time.monotonic() - began
            if status:
                # It stands where it holds the registry, or the copies of QEMU's files: for the few instructions that
                # are, and whoever needs them is told.
                assert f"process {command.pid}" in error, error
                assert "stopped" in error
                assert f"kill -CONT {command.pid}" in error
                outcomes.append("named")
            else:
                assert took_s < durable.LOCK_TIMEOUT_S
                assert host.guest("other").audit().holds
                assert ended(commands.start("destroy", "other"))[0] == 0
                outcomes.append("passed by")
            if command.poll() is None:
                os.kill(command.pid, signal.SIGCONT)
            assert ended(command)[0] == 0
            assert ended(commands.start("destroy", "stands")) == (0, "", "")
    print(outcomes)
    assert host.guests() == ()
    assert living(uids) == ()
    assert "passed by" in outcomes


def test_start_that_stands_still_with_the_registry_in_hand_is_named_by_all_and_harms_nothing(
    host: Toolstack, tmp_path: Path
) -> None:
    host.create(Domain(name="first", memory_mib=16))
    code = """
import sys, time
from depriv.registry import Registry
with Registry(sys.argv[1]).locked():
    print("x", flush=True)
    time.sleep(60)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, host.registry.folder], stdout=pipe) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"x\n"
            stop(holder.pid)
            with commands_on(host) as commands:
                waiting = [commands.start("create", config(tmp_path, name)) for name in ("one", "two")]
                waiting.append(commands.start("destroy", "first"))
                # To look takes no lock.
                began = time.monotonic()
                assert [row["name"] for row in rows_of(ended(commands.start("list", "--json")))] == ["first"]
                assert time.monotonic() - began < 3
                for each in waiting:
                    status, _, error = ended(each)
                    assert status == 125
                    assert f"process {holder.pid} (" in error
                    assert f"kill -CONT {holder.pid}" in error
        finally:
            holder.kill()
    # The guest was ended, but could not be forgotten: it stays listed, and the next command finishes that.
    assert [row.state for row in host.rows()] == ["ending"]
    host.create(Domain(name="next", memory_mib=16))
    assert [row.name for row in host.rows()] == ["next"]


def test_image_that_is_a_fifo_is_refused_at_once(host: Toolstack, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    from depriv.config import Disk

    began = time.monotonic()
    with pytest.raises(DeprivError):
        host.create(Domain(name="web", disks=(Disk(vdev="xvda", target=str(path)),)))
    assert time.monotonic() - began < 5
    assert host.guests() == ()
