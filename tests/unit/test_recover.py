# SPDX-License-Identifier: Apache-2.0
"""What is known of a domain whose entry is lost: what the kernel shows, and of whom nothing is known is left alone."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import FIRST_DOMID
from tests.support.host import need

from depriv import cgroup, proc
from depriv.cgroup import find_cgroup, remove_cgroup
from depriv.identity import RANGE_BASE
from depriv.recover import main_pid, of_the_range, rebuild
from depriv.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOMID = FIRST_DOMID + 899  # of this run alone
UID = 1_900_000_000 + FIRST_DOMID  # of no range, so that nobody takes its processes for strays


@pytest.fixture
def leaf() -> Iterator[str]:
    """Return a cgroup of our own, which goes with all that is in it."""
    need(os.geteuid() == 0, what="root")
    need(bool(find_cgroup()[0]), what="cgroups")
    path = f"{find_cgroup()[0]}/depriv-unit-{os.getpid()}/{DOMID}"
    os.makedirs(path)
    yield path
    remove_cgroup(path)
    os.rmdir(os.path.dirname(path))


@contextlib.contextmanager
def process_in(leaf: str, *argv: str, fds: tuple[int, ...] = ()) -> Iterator[int]:
    """Run a program in a cgroup under a uid of nobody's."""
    ids = [f"--reuid={UID}", f"--regid={UID + 1}", "--clear-groups"]
    none = subprocess.DEVNULL
    words = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', leaf, "setpriv", *ids, *argv]
    with subprocess.Popen(words, pass_fds=fds, cwd="/", stdin=none, stdout=none, stderr=none) as process:
        try:
            while not _is(process.pid, argv[0]):
                assert process.poll() is None
            yield process.pid
        finally:
            process.kill()


def _is(pid: int, program: str) -> bool:
    with open(f"/proc/{pid}/comm", encoding="ascii") as file:
        return file.read().strip() == program


def test_domain_of_which_nothing_lives_is_known_by_its_number_alone() -> None:
    found = rebuild(DOMID, "/nowhere/depriv/7", "the reason")
    assert (found.domid, found.state, found.name, found.trouble) == (
        DOMID,
        "damaged",
        f"(damaged-{DOMID})",
        "the reason",
    )
    assert (found.images, found.expected, found.config, found.restricted) == ((), None, None, False)
    assert found.boot_id == proc.boot_id()
    assert main_pid(found) == 0


def test_ids_are_those_of_the_range_if_nobody_runs() -> None:
    found = rebuild(DOMID, "", "")
    try:
        base = pwd.getpwnam(RANGE_BASE)
    except KeyError:
        assert (found.uid, found.gid, found.reaper_uid) == (0, 0, 0)
        assert found.shared  # nobody is killed by a uid that is not known
        return
    assert (found.uid, found.gid) == (base.pw_uid + DOMID, base.pw_gid + DOMID)
    assert found.reaper_uid > 0
    assert not found.shared


@pytest.mark.parametrize("domid", [0, -1, 32752, 10**9])
def test_number_that_no_domain_has_has_no_ids(domid: int) -> None:
    assert of_the_range(domid) == (0, 0, 0)
    assert rebuild(domid, "", "").shared


@pytest.mark.root
def test_ids_and_images_are_those_of_the_processes_and_a_uid_that_is_not_of_the_range_is_never_killed_by(
    leaf: str, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("written", "read", "appended")]
    for path in paths:
        path.touch()
    flags = (os.O_RDWR, os.O_RDONLY, os.O_WRONLY | os.O_APPEND)
    fds = tuple(os.open(path, flag) for path, flag in zip(paths, flags, strict=True))
    memory = os.memfd_create("ram")
    fifo, other = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    try:
        with process_in(leaf, "sleep", "60", fds=(*fds, memory, fifo, null)):
            found = rebuild(DOMID, leaf, "")
    finally:
        for fd in (*fds, memory, fifo, other, null):
            os.close(fd)
    assert (found.uid, found.gid) == (UID, UID + 1)
    assert found.shared
    expected = {
        (os.stat(path).st_dev, os.stat(path).st_ino, 0, mode) for path, mode in zip(paths, (1, 0, 1), strict=True)
    }
    assert {(dev, ino, rdev, int(writable)) for dev, ino, rdev, writable in found.images} == expected


@pytest.mark.root
def test_main_process_is_the_first_of_its_pid_namespace_and_nobody_else(leaf: str) -> None:
    entry = rebuild(DOMID, leaf, "")
    with process_in(leaf, "sleep", "60"):
        assert main_pid(entry) == 0
    argv = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec unshare --pid --fork --kill-child sleep 60', leaf]
    with subprocess.Popen(argv) as outer:
        while not (found := main_pid(entry)):
            assert outer.poll() is None
        assert found != outer.pid
        assert proc.read_status(found)["PPid"] == str(outer.pid)
        os.kill(found, 9)
        outer.wait()


@pytest.mark.root
def test_damaged_domain_lives_while_anything_is_in_its_cgroup_or_has_its_uid(leaf: str, tmp_path: Path) -> None:
    registry = Registry(str(tmp_path))
    entry = rebuild(DOMID, leaf, "")
    assert registry.life(entry) == "dead"
    with process_in(leaf, "sleep", "60"):
        assert registry.life(entry) == "running"
        # Where there are no cgroups, the uid tells.
        assert registry.life(entry.replace(cgroup="", uid=UID)) == "running"
        assert registry.life(entry.replace(cgroup="", uid=UID + 7)) == "dead"
        assert registry.life(entry.replace(cgroup="", uid=0)) == "dead"  # root's processes are nobody's
    assert registry.life(entry) == "dead"


@pytest.mark.root
def test_process_that_ends_while_it_is_looked_at_is_passed_over(leaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    with process_in(leaf, "sleep", "60") as pid, monkeypatch.context() as patch:
        patch.setattr(cgroup, "members", lambda _path: (dead.pid, pid, dead.pid))
        assert rebuild(DOMID, leaf, "").uid == UID
