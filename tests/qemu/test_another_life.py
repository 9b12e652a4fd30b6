# SPDX-License-Identifier: Apache-2.0
"""What was meant for a domain that is gone never reaches the next one with its domid, however late it comes.

A command may be stopped at any moment and go on a minute later; a program may keep its ``Guest`` for days. Domids are
used again after a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.qemu.test_gc import config, entry_of, kill, start
from tests.qemu.test_gc_endings import POWEROFF
from tests.support import guests
from tests.support.guests import await_state

from depriv import collect, proc
from depriv.api import Toolstack
from depriv.errors import MonitorError, NotFoundError

if TYPE_CHECKING:
    from depriv.api import Guest
    from depriv.collect import Due

pytestmark = [pytest.mark.qemu, pytest.mark.root]


def successor(host: Toolstack, gone: int, path: Path, **fields: Any) -> Guest:
    """Start the domain that is given the domid ``gone``, as if a minute had passed."""
    guests.seed_history(Path(host.registry.folder), (gone - 1,))
    made = start(host, path, name="next", **fields)
    assert made.domid == gone
    return made


def assert_unharmed(host: Toolstack, guest: Guest) -> None:
    time.sleep(0.1)  # a signal takes a moment
    assert guest.row().state == "paused"
    assert guest.audit().holds
    assert entry_of(host, guest).state == "running"
    assert host.registry.end_noted(guest.domid) == ""


def due_of(host: Toolstack, guest: Guest, said: str, *, restart: bool = False) -> Due:
    known = {guest.domid: said}
    due = collect.survey(host.registry, cache_dir="/nonexistent", said=known, restart=restart, only=(guest.domid,))
    return due[0]


def test_old_guest_object_ends_nobody_else(host: Toolstack, tmp_path: Path) -> None:
    old = start(host, tmp_path / "a.img")
    host.guest("web").destroy()
    new = successor(host, old.domid, tmp_path / "b.img")
    with pytest.raises(NotFoundError, match="another command ended it"):
        old.destroy()
    assert_unharmed(host, new)


def test_old_guest_object_of_a_damaged_entry_ends_nobody_else(host: Toolstack, tmp_path: Path) -> None:
    first = start(host, tmp_path / "a.img")
    for name in ("state.json", "state.copy"):
        Path(host.registry.directory(first.domid), name).write_text("{")
    old = host.guest(str(first.domid))
    assert old.row().state == "damaged"
    host.guest(str(first.domid)).destroy()
    new = successor(host, first.domid, tmp_path / "b.img")
    with pytest.raises(NotFoundError, match="another command ended it"):
        old.destroy()
    assert_unharmed(host, new)


def test_old_guest_object_shows_nobody_elses_console(host: Toolstack, tmp_path: Path) -> None:
    old = start(host, tmp_path / "a.img")
    host.guest("web").destroy()
    new = successor(host, old.domid, tmp_path / "b.img")
    Path(host.registry.directory(new.domid), "console").write_bytes(b"a secret")
    with pytest.raises((NotFoundError, MonitorError)):
        old.console()


@pytest.mark.parametrize("action", ["destroy", "restart"])
def test_what_a_qemu_said_is_not_held_against_the_next_with_its_domid(
    host: Toolstack, tmp_path: Path, action: str
) -> None:
    old = start(host, tmp_path / "a.img", POWEROFF, on_poweroff=action)
    await_state(old, "shutdown")
    due = due_of(host, old, "shutdown", restart=action == "restart")
    host.guest("web").destroy()
    new = successor(host, old.domid, tmp_path / "b.img", on_poweroff=action)
    assert host._do(due, "shutdown").result == "gone"
    assert_unharmed(host, new)
    assert len(host.guests()) == 1


def test_domain_that_is_due_still_is_when_it_is_looked_at_again(host: Toolstack, tmp_path: Path) -> None:
    guest = start(host, tmp_path / "a.img", on_crash="destroy")
    kill(host, guest)
    due = due_of(host, guest, "")
    assert host._do(due, "").result == "done"
    assert host.guests() == ()


@pytest.mark.parametrize("changes", [{"boot_id": "0" * 36}, {"state": "quarantined"}])
def test_uid_that_is_a_guests_of_another_registry_by_now_is_not_killed(
    host: Toolstack, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """An entry of an earlier boot, or one that is quarantined, has no cgroup that another registry could see."""
    base = guests.next_base()
    theirs = Toolstack(state_dir=str(guests.seeded(tmp_path / "theirs", base)))
    guest = start(theirs, tmp_path / "a.img")
    try:
        entry = entry_of(theirs, guest)
        left = entry.replace(**{"expected": None, "images": (), "cgroup": "", **changes})
        with contextlib.ExitStack() as held:
            host.registry.add(left, held)
        (done,) = host.gc(domids=(guest.domid,))
        assert (done.result, done.domid) == ("quarantined", guest.domid)
        assert f"uid {entry.uid} is by now that of process" in done.cause
        assert_unharmed(theirs, guest)
    finally:
        guests.end_all(theirs)
    (done,) = host.gc(domids=(guest.domid,))
    assert done.result == "done"
    assert host.guests() == ()


def test_dry_run_of_a_start_that_was_cut_short_does_not_go_on(host: Toolstack, tmp_path: Path) -> None:
    """Its jail is stopped, its toolstack killed; when it goes on, nothing of it is left, and it has made nothing."""
    cold = tmp_path / "cache"
    code = f"""
import os, signal, sys
from depriv import lifecycle, spawn
from depriv.api import Toolstack, load

def stopped(self, plan, *, timeout_s):
    os.kill(self.pid, signal.SIGSTOP)
    print(self.pid, flush=True)
    return launch(self, plan, timeout_s=timeout_s)

launch, spawn.Jail.launch = spawn.Jail.launch, stopped
Toolstack(state_dir={host.registry.folder!r}, cache_dir={str(cold)!r}).create(load(sys.argv[1]))
"""
    argv = [sys.executable, "-c", code, str(config(tmp_path))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        jail = int(command.stdout.readline())
        begun = proc.start_time(jail)
        (entry,) = host.registry.entries()
        try:
            assert (entry.jail_pid, entry.jail_starttime, entry.state) == (jail, begun, "starting")
            command.kill()
            command.wait()
            (done,) = host.gc(domids=(entry.domid,))
            assert (done.kind, done.result) == ("start", "done")
            assert proc.alive(jail, begun) == "dead"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(jail, signal.SIGKILL)


def test_guest_that_a_container_cannot_see_is_not_taken_for_dead_there(host: Toolstack, tmp_path: Path) -> None:
    guest = start(host, tmp_path / "a.img", on_crash="destroy")
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-m", "depriv.cli"]
    environ = {**os.environ, "DEPRIV_STATE_DIR": host.registry.folder}
    for words in (["list", "--json"], ["gc", "web"], ["create", str(config(tmp_path, "next"))]):
        done = subprocess.run([*apart, *words], capture_output=True, text=True, check=False, env=environ, timeout=60)
        if words[0] == "list":
            assert [each["state"] for each in json.loads(done.stdout)] == ["hung"], done.stderr
    assert_unharmed(host, guest)
