# SPDX-License-Identifier: Apache-2.0
"""Who has a domain's uid when it starts is dead when its guest runs, who shares one is left alone, who cannot be
killed by right keeps the id from use, and who comes at the moment of the end goes with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.qemu.test_quarantine import SHARED, cli, uid_of, uid_outside, users
from tests.support import build, guests
from tests.support.frozen import process_of
from tests.support.guests import await_end, config_text
from tests.support.host import living
from tests.support.linux import cache_directory

from depriv import collect, ending
from depriv.config import Domain
from depriv.errors import DeprivError

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.support.guests import CommandLine

    from depriv.api import Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

PATIENCE_S = 10.0
__all__ = ["users"]  # a fixture

# Process 1 of the pid namespace of those that will not go: it starts them, and collects orphans as an init does.
INIT = """
import os, sys
if os.fork() == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
while True:
    try:
        os.wait()
    except ChildProcessError:
        os.read(0, 1)
        break
"""


@contextlib.contextmanager
def bombs_of(uid: int, *words: str) -> Generator[None]:
    """Have processes with a uid that will not go, in a pid namespace of their own, as far as theirs is the choice."""
    program = build.bombs(cache_directory())
    ids = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    with open(program, "rb") as file:  # the folders above it may not be everybody's
        path = f"/proc/self/fd/{file.fileno()}"
        shell = ["sh", "-c", f'exec {path} "$@"', "bombs", *words]
        argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-I", "-S", "-c", INIT]
        pipe = subprocess.PIPE
        with subprocess.Popen([*argv, *ids, *shell], stdin=pipe, cwd="/", pass_fds=(file.fileno(),)) as first:
            try:
                deadline = time.monotonic() + PATIENCE_S
                while not living(range(uid, uid + 1)):
                    assert time.monotonic() < deadline
                    assert first.poll() is None
                    time.sleep(0.01)
                time.sleep(0.2)  # let there be many
                yield
            finally:
                first.kill()


def next_id(host: Toolstack, uids: range) -> tuple[int, int]:
    """Return domid and uid of the next start, in a registry that has swept its host already."""
    host.create(Domain(name="first"), paused=True).destroy()
    domid = host.registry.next_domid()
    return domid, uid_of(uids, domid)


@pytest.mark.parametrize(
    "words", [("fork", "20"), ("daemon", "5"), ("chain", "3"), ("deaf", "2"), ("stopped", "3"), ("threads", "2")]
)
def test_survivors_of_the_uid_are_dead_when_the_guest_runs(
    host: Toolstack, uids: range, words: tuple[str, ...]
) -> None:
    domid, uid = next_id(host, uids)
    with bombs_of(uid, *words):
        guest = host.create(Domain(name="web"), paused=True)
        row = guest.row()
        assert (row.domid, row.uid, row.state) == (domid, uid, "paused")
        assert living(range(uid, uid + 1)) == (row.pid,)
        assert guest.audit().holds


def test_without_a_start_they_live_on(host: Toolstack, uids: range) -> None:
    """Else the test above would prove nothing."""
    domid, uid = next_id(host, uids)
    with bombs_of(uid, "fork", "20"):
        time.sleep(1.0)
        assert len(living(range(uid, uid + 1))) > 1
        assert host.registry.next_domid() == domid
    deadline = time.monotonic() + PATIENCE_S
    while living(range(uid, uid + 1)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_start_of_another_uid_does_not_touch_them(host: Toolstack, uids: range) -> None:
    _, uid = next_id(host, uids)
    with process_of(uid + 1) as stranger:
        guest = host.create(Domain(name="web"), paused=True)
        assert guest.row().uid == uid
        guest.destroy()
        assert stranger.poll() is None


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process wait for the end of what does not die for a moment only."""
    monkeypatch.setattr(ending, "END_TIMEOUT_S", 0.4)


@pytest.mark.usefixtures("soon")
def test_process_with_the_gid_alone_is_named_and_left_alone_and_the_id_is_kept_from_use(
    host: Toolstack, uids: range
) -> None:
    domid, uid = next_id(host, uids)
    warnings: list[str] = []
    with process_of(uid_outside(uids), gid=uid) as stranger:
        guest = host.create(Domain(name="web"), paused=True, warn=warnings.append)
        assert guest.domid == domid + 1
        (warning,) = warnings
        assert f"{stranger.pid} (S) by gid, with another uid" in warning
        assert stranger.poll() is None
        states = {row.domid: row.state for row in host.rows()}
        assert states == {domid: "quarantined", guest.domid: "paused"}
        assert f"{stranger.pid} (S)" in host.guest(str(domid)).row().trouble
        cli(host, "gc", str(domid), expect=1)
        assert stranger.poll() is None
    cli(host, "gc", str(domid))
    assert [row.domid for row in host.rows()] == [guest.domid]


@pytest.mark.usefixtures("soon")
def test_process_that_takes_the_gid_of_a_guest_holds_up_its_end_and_is_named(host: Toolstack, uids: range) -> None:
    guest = host.create(Domain(name="web"), paused=True)
    row = guest.row()
    with process_of(uid_outside(uids), gid=row.gid) as stranger:
        with pytest.raises(DeprivError) as caught:
            guest.destroy()
        assert f"{stranger.pid} (S) by gid, with another uid" in collect.cause_of(caught.value)
        assert await_end(row.pid)
        assert stranger.poll() is None
        assert [each.state for each in host.rows()] == ["quarantined"]
    host.guest("web").destroy()
    assert host.guests() == ()


@pytest.mark.parametrize("end", ["destroy", "crash", "failed start"])
def test_end_of_one_that_shares_its_uid_is_not_the_others(
    users: tuple[CommandLine, int], tmp_path: Path, end: str
) -> None:
    depriv, svc = users
    path = tmp_path / "s.cfg"
    for name in ("one", "two"):
        path.write_text(config_text(name, device_model_user=SHARED))
        depriv.run("create", str(path))
    one, two = depriv.rows()
    assert (one["uid"], two["uid"]) == (svc + 1, svc + 1)
    assert one["pid"] != two["pid"]
    if end == "destroy":
        depriv.run("destroy", "one")
    elif end == "crash":
        os.kill(one["pid"], signal.SIGKILL)
        assert await_end(one["pid"])
        depriv.run("gc")
    else:
        path.write_text(config_text("three", device_model_user=SHARED, device_model_args=["-cpu", "nosuch"]))
        depriv.run("create", str(path), expect=125)
        depriv.run("destroy", "one")
    (left,) = depriv.rows()
    assert (left["name"], left["pid"], left["state"]) == ("two", two["pid"], "running")
    assert living(range(svc + 1, svc + 2)) == (two["pid"],)
    # What it lacks is not hidden: its uid was not its own alone, and is again.
    assert "FAIL" not in depriv.run("audit", "two").stdout


def test_one_that_shares_its_uid_says_so(users: tuple[CommandLine, int], tmp_path: Path) -> None:
    depriv, _ = users
    path = tmp_path / "s.cfg"
    path.write_text(config_text("one", device_model_user=SHARED))
    depriv.run("create", str(path))
    path.write_text(config_text("two", device_model_user=SHARED))
    said = depriv.run("create", str(path))
    assert "41 of 42 checks hold" in said.stdout
    failed = [line for line in depriv.run("audit", "two", expect=1).stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1
    assert "alone" in failed[0]
    assert "one" in failed[0]


# Becomes the uid again and again, as somebody with a setuid program could, until its standard input ends.
JOIN = """
import os, select, sys, time
uid, end = int(sys.argv[1]), time.monotonic() + 30
print("ready", flush=True)
while time.monotonic() < end and not select.select([0], [], [], 0)[0]:
    if os.fork() == 0:
        os.close(1)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        time.sleep(20)
        os._exit(0)
    time.sleep(float(sys.argv[2]))
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                break
        except ChildProcessError:
            break
"""


@pytest.mark.parametrize("every_s", [0.002, 0.02])
@pytest.mark.usefixtures("soon")
def test_process_that_joins_at_the_moment_of_the_end_is_gone_or_the_id_is_kept(host: Toolstack, every_s: float) -> None:
    """Whatever destroy says, it is true: "done" only if nobody was left, and who came later meets the next start."""
    guest = host.create(Domain(name="web"), paused=True)
    row = guest.row()
    argv = [sys.executable, "-I", "-S", "-c", JOIN, str(row.uid), str(every_s)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, cwd="/") as joins:
        try:
            assert joins.stdout is not None
            assert joins.stdout.readline() == b"ready\n"
            time.sleep(0.1)
            before = set(living(range(row.uid, row.uid + 1))) - {row.pid}
            assert before
            said = ""
            try:
                guest.destroy()
            except DeprivError as error:
                said = collect.cause_of(error)
        finally:
            joins.communicate(b"x", timeout=PATIENCE_S)
    assert await_end(row.pid, within_s=0.5)
    assert before.isdisjoint(living(range(row.uid, row.uid + 1)))
    states = [(each.domid, each.state) for each in host.rows()]
    assert states == ([(row.domid, "quarantined")] if said else [])
    if said:
        assert "still alive" in said or "not proved" in said
        host.guest("web").destroy()
        assert living(range(row.uid, row.uid + 1)) == ()
        return
    # Those that came after the proof found an id that rests, and meet the next start that gets it.
    guests.seed_history(Path(host.registry.folder), (row.domid - 1,))
    again = host.create(Domain(name="web"), paused=True).row()
    assert again.uid == row.uid
    assert living(range(row.uid, row.uid + 1)) == (again.pid,)
