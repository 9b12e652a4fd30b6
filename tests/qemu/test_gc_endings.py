# SPDX-License-Identifier: Apache-2.0
"""Guests that ended while nobody watched: the next gc or create sees to them as their configurations say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.qemu.test_gc import cleared, entry_of, gc, image, start
from tests.qemu.test_quarantine import cli
from tests.support.guests import await_state
from tests.support.host import living

from depriv.config import Domain
from depriv.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from depriv.api import Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

# What a guest does at once, in 16-bit code: see tests/qemu/test_endings_qemu.py.
POWEROFF = "ba 04 06 b8 00 20 ef"
PANIC = "ba 05 05 b0 01 ee"


def test_guest_that_switched_itself_off_is_cleared(host: Toolstack, uids: range, tmp_path: Path) -> None:
    guest = start(host, tmp_path / "a.img", POWEROFF)
    await_state(guest, "shutdown")
    (done,) = cleared(host, uids)
    assert (done["kind"], done["action"], done["result"], done["name"]) == ("domain", "clear", "done", "web")
    assert "on_poweroff = destroy" in done["what"]
    assert host.guests() == ()


def test_next_start_of_its_name_clears_it_too(host: Toolstack, tmp_path: Path) -> None:
    old = start(host, tmp_path / "a.img", POWEROFF)
    await_state(old, "shutdown")
    new = start(host, tmp_path / "b.img")
    assert [(guest.name, guest.domid) for guest in host.guests()] == [("web", new.domid)]
    assert new.domid != old.domid


def test_guest_that_is_to_be_preserved_is(host: Toolstack, tmp_path: Path) -> None:
    guest = start(host, tmp_path / "a.img", POWEROFF, on_poweroff="preserve")
    await_state(guest, "shutdown")
    for words in ((), ("--restart",), ("web",)):
        assert gc(host, *words) == []
    with pytest.raises(ConfigError, match="exists"):
        start(host, tmp_path / "b.img")
    assert guest.row().state == "shutdown"
    cli(host, "destroy", "web")
    assert host.guests() == ()


@pytest.mark.parametrize(
    ("code", "key", "state"), [(POWEROFF, "on_poweroff", "shutdown"), (PANIC, "on_crash", "crashed")]
)
def test_guest_that_is_to_be_restarted_waits_for_who_asks_for_that(
    host: Toolstack, tmp_path: Path, code: str, key: str, state: str
) -> None:
    guest = start(host, tmp_path / "a.img", code, vcpus=2, **{key: "restart"})
    await_state(guest, state)
    old = entry_of(host, guest)
    assert gc(host) == []
    assert guest.row().state == state
    image(tmp_path / "a.img")  # this time it does not end
    (would,) = gc(host, "--restart", "--dry-run")
    assert (would["action"], would["result"]) == ("restart", "would")
    (done,) = gc(host, "--restart")
    assert (done["action"], done["result"], done["name"]) == ("restart", "done", "web")
    (row,) = host.rows()
    assert (row.name, row.state, row.domid, row.vcpus) == ("web", "running", done["new_domid"], 2)
    assert row.domid != guest.domid
    assert host.guest("web").audit().holds
    new = host.registry.find("web")
    assert (new.config, new.restarts) == (old.config, 1)
    assert gc(host, "--restart") == []
    assert living(range(old.uid, old.uid + 1)) == ()


def test_restart_that_fails_waits_with_the_reason_and_works_later(host: Toolstack, uids: range, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    guest = start(host, path, POWEROFF, on_poweroff="restart")
    await_state(guest, "shutdown")
    path.rename(tmp_path / "away")
    (done,) = gc(host, "--restart", expect=1)
    assert done["result"] == "failed"
    assert str(path) in done["cause"]
    (row,) = host.rows()
    assert (row.name, row.state, row.pid, row.uid) == ("web", "waiting", 0, 0)
    assert str(path) in row.trouble
    assert living(uids) == ()
    assert gc(host) == []  # it waits for who asks for it
    with pytest.raises(ConfigError, match="exists"):
        host.create(Domain(name="web"))
    (done,) = gc(host, "--restart", expect=1)  # as often as it takes
    assert done["result"] == "failed"
    image(path)
    (done,) = gc(host, "--restart")
    assert done["result"] == "done"
    (row,) = host.rows()
    assert (row.name, row.state, row.domid, row.trouble) == ("web", "running", done["new_domid"], "")


def test_rename_restart_that_fails_renames_nothing_and_works_later(host: Toolstack, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    guest = start(host, path, POWEROFF, on_poweroff="rename-restart")
    await_state(guest, "shutdown")
    old = entry_of(host, guest)
    path.rename(tmp_path / "away")
    (done,) = gc(host, "--restart", expect=1)
    assert done["result"] == "failed"
    assert str(path) in done["cause"]
    assert host.registry.entries() == (old,)
    image(path)
    (done,) = gc(host, "--restart")
    assert done["result"] == "done"
    assert [row.name for row in host.rows()] == [f"web-{guest.domid}", "web"]


def test_domain_that_waits_can_be_destroyed(host: Toolstack, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    guest = start(host, path, POWEROFF, on_poweroff="restart")
    await_state(guest, "shutdown")
    path.unlink()
    gc(host, "--restart", expect=1)
    for words in (("audit", "web"), ("console", "--dump", "web")):
        made = cli(host, *words, expect=125)
        assert made.stderr == (
            "error: domain web has ended, and waits to be started again\n"
            f"  fix: depriv gc --restart {host.guest('web').domid}, or: depriv destroy {host.guest('web').domid}\n"
        )
    cli(host, "destroy", "web")
    assert host.guests() == ()


def test_rename_restart_keeps_the_old_one_under_another_name(host: Toolstack, uids: range, tmp_path: Path) -> None:
    guest = start(host, tmp_path / "a.img", POWEROFF, on_poweroff="rename-restart")
    await_state(guest, "shutdown")
    old = entry_of(host, guest)
    (done,) = cleared(host, uids, "--restart")
    assert (done["action"], done["result"]) == ("rename-restart", "done")
    rows = {row.name: row for row in host.rows()}
    assert set(rows) == {"web", f"web-{guest.domid}"}
    kept = rows[f"web-{guest.domid}"]
    assert (kept.state, kept.domid, kept.uid) == ("shutdown", old.domid, old.uid)
    assert rows["web"].domid == done["new_domid"]
    await_state(host.guest("web"), "shutdown")  # as it does every time
    (done,) = gc(host, "--restart")
    assert sorted(row.name for row in host.rows())[1:] == sorted(
        f"web-{domid}" for domid in (guest.domid, rows["web"].domid)
    )
