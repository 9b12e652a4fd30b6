# SPDX-License-Identifier: Apache-2.0
"""Strays: processes with an id of the range and of no domain are ended; those of anybody else are left alone."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.qemu.test_gc import PATIENCE_S, config, gc, kinds, start
from tests.qemu.test_quarantine import uid_of
from tests.support import guests
from tests.support.frozen import process_of
from tests.support.guests import CommandLine
from tests.support.host import living, need

from depriv import cgroup
from depriv.registry import Registry

if TYPE_CHECKING:
    from depriv.api import Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]


def swept(depriv: CommandLine, *words: str, expect: int = 0) -> list[dict[str, Any]]:
    """Return what gc says on a host of its own, of these tests' ids: only there it looks for strays."""
    found: list[dict[str, Any]] = json.loads(depriv.run("gc", "--json", *words, expect=expect).stdout)
    return [each for each in found if each["domid"] in guests.DOMIDS]


def test_process_with_an_id_of_the_range_and_of_no_domain_is_ended(depriv: CommandLine, uids: range) -> None:
    domid = Registry(depriv.state_dir).next_domid() + 3
    with process_of(uid_of(uids, domid)) as stray:
        assert kinds(swept(depriv, "--dry-run")) == [("process", "would", domid)]
        assert stray.poll() is None
        (done,) = swept(depriv)
        assert (done["kind"], done["result"], done["domid"]) == ("process", "done", domid)
        assert str(stray.pid) in done["what"]
        assert stray.wait(PATIENCE_S) == -signal.SIGKILL
    assert living(uids) == ()
    assert depriv.rows() == []


def test_first_start_of_a_registry_ends_what_an_earlier_one_left(
    depriv: CommandLine, uids: range, tmp_path: Path
) -> None:
    domid = Registry(depriv.state_dir).next_domid() + 3
    with process_of(uid_of(uids, domid)) as stray:
        depriv.run("create", str(config(tmp_path)))
        assert stray.wait(PATIENCE_S) == -signal.SIGKILL
    with process_of(uid_of(uids, domid)) as stray:
        depriv.run("create", str(config(tmp_path, "next")))  # no start after it looks through the host again
        assert stray.poll() is None


def test_process_of_a_user_whose_uid_lies_in_the_range_is_no_stray(uids: range, tmp_path: Path) -> None:
    uid = uids.stop - 2
    path = tmp_path / "passwd"
    path.write_text(Path("/etc/passwd").read_text() + f"alice:x:{uid}:{uid}::/home/alice:/bin/sh\n")
    depriv = CommandLine(bind=(str(path), "/etc/passwd"))
    try:
        with process_of(uid) as alices:
            assert swept(depriv) == []
            assert alices.poll() is None
    finally:
        depriv.close()


def test_processes_outside_of_the_range_and_of_other_registries_domains_are_no_strays(
    depriv: CommandLine, uids: range, tmp_path: Path
) -> None:
    other = guests.toolstack(tmp_path / "other")
    guest = start(other, tmp_path / "a.img")
    try:
        base = uid_of(uids, 0)
        with process_of(base - 3) as below, process_of(base + 32752) as above:
            assert swept(depriv) == []
            assert (below.poll(), above.poll()) == (None, None)
        assert guest.row().state == "paused"
        assert guest.audit().holds
    finally:
        guests.end_all(other)


def test_guest_whose_cgroup_lies_in_a_hierarchy_that_is_not_mounted_here_is_no_stray(
    depriv: CommandLine, tmp_path: Path
) -> None:
    """Bug: where only cgroup v1 was mounted, guests that were started in v2 by another registry were killed."""
    top, version = cgroup.find_cgroup()
    need(version == 2, what="cgroup v2")
    other = guests.toolstack(tmp_path / "other")
    guest = start(other, tmp_path / "a.img")
    try:
        enter = ["nsenter", f"--mount=/proc/{depriv.pid}/ns/mnt", f"--root=/proc/{depriv.pid}/root"]
        subprocess.run([*enter, "umount", top], check=True, timeout=10)
        assert swept(depriv, "--dry-run") == []
        assert swept(depriv) == []
        assert guest.row().state == "paused"
    finally:
        guests.end_all(other)


def test_registry_in_a_folder_of_its_own_choice_looks_for_no_strays(host: Toolstack, uids: range) -> None:
    with process_of(uid_of(uids, host.registry.next_domid() + 3)) as stranger:
        assert gc(host) == []
        assert stranger.poll() is None
