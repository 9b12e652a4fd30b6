# SPDX-License-Identifier: Apache-2.0
"""Cgroups: whose is whose, also when the state folder is lost or another has the same path; and they end for sure."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.entries import no_descriptor_to_spare
from tests.support.host import need

from depriv import cgroup
from depriv.cgroup import (
    find_cgroup,
    folder_name,
    kill_cgroup,
    leaves,
    lost_folders,
    members,
    remove_cgroup,
    remove_folder,
)
from depriv.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def made() -> Iterator[list[str]]:
    """Return a list for the names of folders that the test makes in the hierarchy; they go at its end."""
    need(os.geteuid() == 0, what="root")
    need(bool(find_cgroup()[0]), what="cgroups")
    names: list[str] = []
    yield names
    for name in names:
        path = f"{find_cgroup()[0]}/{name}"
        for leaf in (each for each in leaves() if each.folder == name):
            remove_cgroup(leaf.path)
        remove_folder(path)
        assert not os.path.exists(path)


def make(made: list[str], name: str, *domids: str) -> str:
    made.append(name)
    path = f"{find_cgroup()[0]}/{name}"
    os.mkdir(path)
    for domid in domids:
        os.mkdir(f"{path}/{domid}")
    return path


# Names


def test_name_of_a_folder_tells_path_and_folder_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = folder_name(str(tmp_path / "a")), folder_name(str(tmp_path / "b"))
    assert a != b
    assert a == folder_name(str(tmp_path / "a"))
    assert a.split("-")[0] == b.split("-")[0] == "depriv"
    assert a.split("-")[1] != b.split("-")[1]
    have = os.stat(tmp_path / "a")
    assert a.split("-")[2:] == [f"{have.st_dev:x}", f"{have.st_ino:x}"]
    # Another folder at the same path is another registry, and one can see that they share the path.
    (tmp_path / "a").rename(tmp_path / "old")
    (tmp_path / "a").mkdir()
    again = folder_name(str(tmp_path / "a"))
    assert again != a
    assert again.split("-")[1] == a.split("-")[1]


def test_folder_that_is_not_there_has_a_name_without_a_number(tmp_path: Path) -> None:
    assert folder_name(str(tmp_path / "none")).endswith("-new")


def test_name_of_a_folder_is_one_word_of_the_file_system_whatever_the_path() -> None:
    for path in ("/run/depriv", "/a b/\n\u2028", "/" + "x" * 4000, "/..", ""):
        assert folder_name(path).replace("-", "").isalnum()
        assert len(folder_name(path)) < 64


# Whose is whose


@pytest.mark.root
def test_leaves_are_the_numbered_folders_of_registries_and_no_others(made: list[str]) -> None:
    name, other = f"depriv-unit-{os.getpid()}", f"machine-unit-{os.getpid()}"
    top = make(made, name, "7", "31000", "x7", "-1")
    make(made, other, "8")
    try:
        mine = [leaf for leaf in leaves() if leaf.folder in (name, other)]
        assert sorted((leaf.path, leaf.domid) for leaf in mine) == [(f"{top}/31000", 31000), (f"{top}/7", 7)]
    finally:
        for path in (f"{top}/x7", f"{top}/-1", f"{find_cgroup()[0]}/{other}/8"):
            os.rmdir(path)


@pytest.mark.root
def test_folder_of_a_state_folder_that_is_gone_is_lost_and_that_of_one_that_is_there_is_not(
    made: list[str], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    first = folder_name(str(state))
    make(made, first, "7")
    assert lost_folders(str(state)) == ()
    state.rename(tmp_path / "kept")  # its number is not given to the next one
    assert lost_folders(str(state)) == (first,)
    state.mkdir()
    assert lost_folders(str(state)) == (first,)
    second = folder_name(str(state))
    make(made, second, "8")
    assert lost_folders(str(state)) == (first,)
    # Nobody takes what is at another path for his own.
    assert lost_folders(str(tmp_path / "kept")) == ()
    assert lost_folders(str(tmp_path / "other")) == ()


@pytest.mark.root
def test_folder_of_the_same_path_in_another_mount_namespace_is_not_lost_until_that_ends(
    made: list[str], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    code = 'mount -t tmpfs tests "$1" && stat -c "%Hd %Ld %i" "$1" && cat'
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", code, "sh", str(state)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        major, minor, inode = map(int, other.stdout.readline().split())
        stem = folder_name(str(state)).rsplit("-", 2)[0]
        name = f"{stem}-{os.makedev(major, minor):x}-{inode:x}"
        assert name != folder_name(str(state))
        make(made, name, "7")
        assert lost_folders(str(state)) == ()
        other.stdin.close()
        other.wait()
    assert lost_folders(str(state)) == (name,)


# Ends


@pytest.mark.root
def test_removal_kills_all_that_is_in_a_cgroup_and_nobody_else(made: list[str]) -> None:
    path = make(made, f"depriv-unit-{os.getpid()}", "7", "8") + "/7"
    neighbour = path[:-1] + "8"
    inside = [subprocess.Popen(["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec sleep 60', path]) for _ in range(5)]
    with subprocess.Popen(["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec sleep 60', neighbour]) as outside:
        deadline = time.monotonic() + 10
        while len(members(path)) < 5 or not members(neighbour):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert sorted(members(path)) == sorted(process.pid for process in inside)
        remove_cgroup(path)
        assert not os.path.exists(path)
        assert [process.wait(10) for process in inside] == [-9] * 5
        assert outside.poll() is None
        outside.kill()


@pytest.mark.root
def test_stopped_process_is_no_hindrance(made: list[str]) -> None:
    path = make(made, f"depriv-unit-{os.getpid()}", "7") + "/7"
    with subprocess.Popen(["sh", "-c", 'echo $$ > "$0/cgroup.procs"; kill -STOP $$', path]) as inside:
        os.waitid(os.P_PID, inside.pid, os.WSTOPPED | os.WNOWAIT)
        remove_cgroup(path)
        assert inside.wait(10) == -9


@pytest.mark.root
def test_cgroup_that_is_not_empty_at_the_deadline_stays_and_who_is_in_it_is_named(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(made, f"depriv-unit-{os.getpid()}", "7") + "/7"
    with subprocess.Popen(["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec sleep 60', path]) as inside:
        while inside.pid not in members(path):
            time.sleep(0.005)
        with monkeypatch.context() as patch:
            patch.setattr(cgroup, "kill_cgroup", lambda _path: None)  # as if it did not die
            with pytest.raises(HostError, match="cannot remove cgroup") as caught:
                remove_cgroup(path, timeout_s=0.1)
        assert caught.value.cause == f"in it: process {inside.pid}"
        assert os.path.isdir(path)
        remove_cgroup(path)


@pytest.mark.parametrize("path", ["", "/nowhere", "/proc/1/nothing", "/nowhere/depriv/7"])
def test_cgroup_that_is_not_there_has_nobody_in_it_and_is_removed_already(path: str) -> None:
    assert members(path) == ()
    kill_cgroup(path)
    remove_cgroup(path, timeout_s=0.1)


@pytest.mark.root
@pytest.mark.root
def test_cgroup_that_we_have_no_descriptor_to_look_into_does_not_pass_for_empty(made: list[str]) -> None:
    made.append(f"{cgroup.PREFIX}-unread-{os.getpid()}")
    path = f"{find_cgroup()[0]}/{made[0]}"
    os.mkdir(path)
    assert members(path) == ()
    with no_descriptor_to_spare(), pytest.raises(OSError, match="Too many open files"):
        members(path)


def test_folder_with_a_leaf_in_it_is_not_removed(made: list[str]) -> None:
    path = make(made, f"depriv-unit-{os.getpid()}", "7")
    remove_folder(path)
    assert os.path.isdir(f"{path}/7")
    os.rmdir(f"{path}/7")
    remove_folder(path)
    assert not os.path.exists(path)
    remove_folder(path)


# Hosts of other kinds

SHOW = "from depriv import cgroup; print(*(f'{path}:{version}' for path, version in cgroup.hierarchies()))"


@pytest.mark.root
def test_hierarchies_are_found_where_they_are_mounted_the_best_first(tmp_path: Path) -> None:
    need(os.path.isdir("/sys/fs/cgroup/pids"), what="cgroup v1")
    code = """
    umount --all --types cgroup2 && "$@" && umount --all --types cgroup && "$@" && cd "$0" && mkdir v1 v2 &&
    mount -t cgroup -o pids none v1 && "$@" && mount -t cgroup2 none v2 && "$@" && mount -t tmpfs none v2 && "$@"
    """
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", code, str(tmp_path)]
    done = subprocess.run([*argv, sys.executable, "-c", SHOW], check=True, capture_output=True, text=True, timeout=20)
    v1, nothing, odd, both, hidden = done.stdout.split("\n")[:-1]
    assert v1.split() == ["/sys/fs/cgroup/pids:1", "/sys/fs/cgroup/freezer:1"]
    assert nothing == ""
    assert odd == hidden == f"{tmp_path}/v1:1"
    assert both.split() == [f"{tmp_path}/v2:2", f"{tmp_path}/v1:1"]


@pytest.mark.root
def test_mounts_of_other_kinds_however_many_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    need(bool(find_cgroup()[0]), what="cgroups")
    monkeypatch.setattr(cgroup, "_mounted", lambda: pytest.fail("the list of mounts was read"))
    assert find_cgroup()[0]


@pytest.mark.root
def test_folder_on_v1_with_processes_that_cannot_be_seen_is_not_lost(tmp_path: Path) -> None:
    """Version 1 does not show them as 0: it leaves them out."""
    top = "/sys/fs/cgroup/pids"
    need(os.path.isdir(top), what="cgroup v1")
    folder = f"{top}/{folder_name(str(tmp_path))[:-1]}x-1"
    leaf = f"{folder}/7"
    os.makedirs(leaf)
    code = f"from depriv import cgroup; print(*cgroup.lost_folders({str(tmp_path)!r}))"
    argv = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    try:
        for inside, lost in (("sleep 60", ""), ("true", os.path.basename(folder))):
            words = ["sh", "-c", f"echo $$ > {leaf}/cgroup.procs; echo; exec {inside}"]
            with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
                try:
                    assert process.stdout is not None
                    process.stdout.readline()
                    if inside == "true":
                        process.wait(10)
                    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=10)
                finally:
                    process.kill()
            assert done.stdout.strip() == lost
    finally:
        remove_cgroup(leaf)
        remove_folder(folder)
