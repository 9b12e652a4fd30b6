# SPDX-License-Identifier: Apache-2.0
"""Hosts where cgroups of version 1 are all there is, and hosts without any: the real command line where no other
hierarchy is mounted.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.qemu.test_quarantine import uid_outside
from tests.support import build, guests
from tests.support.frozen import freezing
from tests.support.guests import CommandLine, await_end, compiled, config_text
from tests.support.host import living, need
from tests.support.linux import cache_directory
from tests.support.watching import await_true

from depriv import proc
from depriv.audit import audit
from depriv.cgroup import folder_name
from depriv.registry import Registry
from depriv.report import Expected

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from typing import Any

pytestmark = [pytest.mark.qemu, pytest.mark.root]

PIDS = "/sys/fs/cgroup/pids"


@pytest.fixture
def depriv(unchanged: None) -> Iterator[CommandLine]:
    """Return the command line on a host without cgroup v2."""
    del unchanged
    need(os.path.exists(f"{PIDS}/cgroup.procs"), what="cgroup v1")
    made = CommandLine(without=("cgroup2",))
    yield made
    made.close()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "web.cfg"
    path.write_text(config_text("web", memory=16))
    return path


def within(depriv: CommandLine, *argv: str) -> None:
    """Run a program where the command line runs."""
    enter = ["nsenter", f"--mount=/proc/{depriv.pid}/ns/mnt", f"--root=/proc/{depriv.pid}/root", "--"]
    subprocess.run([*enter, *argv], check=True, timeout=30)


def leaf_of(domid: int) -> str:
    """Return the one cgroup of a domain, "" if it has none; it may lie in one hierarchy only."""
    top = "/sys/fs/cgroup"
    stem = folder_name("/run/depriv").rsplit("-", 2)[0]
    places = (top, *(f"{top}/{name}" for name in os.listdir(top)))
    found = [str(path) for place in places for path in Path(place).glob(f"{stem}-*/{domid}")]
    assert len(found) < 2
    return found[0] if found else ""


def created(depriv: CommandLine, config: Path) -> dict[str, Any]:
    depriv.run("create", str(config))
    (row,) = depriv.rows()
    assert row["state"] == "running"
    return row


def gc(depriv: CommandLine, *, expect: str = "") -> None:
    """Clear what is due; hold to ``expect`` what is said of these tests' ids, and nothing of others' strays."""
    done = json.loads(depriv.start("gc", "--json").communicate(timeout=60)[0])
    said = [f"{each['what']}: {each['result']} {each['cause']}" for each in done if each["domid"] in guests.DOMIDS]
    assert len(said) == (expect != ""), said
    assert expect in "".join(said)


def is_cleared(row: dict[str, Any]) -> bool:
    return not living(range(row["uid"], row["uid"] + 1)) and leaf_of(row["domid"]) == ""


def test_life_of_a_guest(depriv: CommandLine, config: Path) -> None:
    done = depriv.run("create", str(config))
    assert "42 of 42 checks hold" in done.stdout
    (row,) = depriv.rows()
    leaf = leaf_of(row["domid"])
    assert leaf.startswith(f"{PIDS}/")
    assert Path(leaf, "cgroup.procs").read_text().split() == [str(row["pid"])]
    for _ in range(5):  # its thread pool comes and goes
        assert "FAIL" not in depriv.run("audit", "web").stdout
    gc(depriv)
    depriv.run("destroy", "web")
    assert is_cleared(row)
    assert depriv.rows() == []


def jail_and_child(toolstack: int) -> list[int]:
    """Return the processes below one, parents first."""
    found: list[int] = []
    todo = [toolstack]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        found.append(pid)
    return found


def test_nothing_is_left_of_starts_that_were_killed_at_any_moment_with_their_jail(
    depriv: CommandLine, config: Path, uids: range
) -> None:
    """Where the child of a killed jail has not joined its cgroup yet, it is root's and nobody's."""
    rng = random.Random(1)
    left: list[str] = []
    below: set[int] = set()
    for number in range(20):
        process = depriv.start("create", str(config))
        time.sleep(rng.uniform(0.05, 0.3))
        pids = jail_and_child(process.pid)
        below |= {*pids[1:]}
        for pid in (*pids[1:2], process.pid) if number % 4 else (process.pid,):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=30)
        # The toolstack alone: its jail cleans up, or released what runs by then.
        if any(row["state"] in ("running", "prelaunch", "paused") for row in depriv.rows()):
            depriv.run("destroy", "web")
        if number % 5 == 4:
            depriv.start("gc").communicate(timeout=60)
            left += [f"{number}: {row}" for row in depriv.rows()]
            await_true(lambda: not living(uids), within_s=5, what="nobody lives")
    assert left == []
    assert all(await_end(pid, within_s=1) for pid in below)


# The jail's child, and then the jail is gone. It says when; what it says after its parent's end, nobody may hear.
CHILD = """
import os, sys, time
from depriv import steps
from depriv.jail import apply
uid = int(sys.argv[1])
child = os.fork()
if child == 0:
    state = apply.State(-1, -1)
    apply.ACTS[steps.BecomeInit](steps.BecomeInit(), state)
    if uid:
        apply.ACTS[steps.SetIds](steps.SetIds(uid=uid, gid=uid), state)
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(30)
    os._exit(0)
time.sleep(30)
"""


@contextlib.contextmanager
def orphan(uid: int) -> Generator[int]:
    """Yield a pidfd of a child whose jail was killed."""
    with subprocess.Popen([sys.executable, "-c", CHILD, str(uid)], stdout=subprocess.PIPE) as jail:
        assert jail.stdout is not None
        pidfd = os.pidfd_open(int(jail.stdout.readline()))
        try:
            jail.kill()
            yield pidfd
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def test_child_of_a_jail_that_is_killed_dies_with_it_until_it_has_a_uid_of_its_own(uids: range) -> None:
    with orphan(0) as child:
        assert select.select([child], (), (), 5)[0]
    # Nor may QEMU end with the jail, which does not stay.
    with orphan(uid_outside(uids)) as child:
        assert not select.select([child], (), (), 0.3)[0]


def test_bombs_in_the_cgroup_end_with_the_guest(depriv: CommandLine, config: Path) -> None:
    row = created(depriv, config)
    leaf, uid = leaf_of(row["domid"]), row["uid"]
    with open(build.bombs(cache_directory()), "rb") as file:
        ids = f"setpriv --reuid={uid} --regid={uid} --clear-groups"
        code = f'echo $$ > {leaf}/cgroup.procs && exec {ids} sh -c "exec /proc/self/fd/{file.fileno()} fork 30"'
        with subprocess.Popen(["sh", "-c", code], cwd="/", pass_fds=(file.fileno(),)):
            mine = range(uid, uid + 1)
            await_true(lambda: len(living(mine)) > 5, what="a few of them")
            depriv.run("destroy", "web")
            assert is_cleared(row)


def test_what_does_not_die_is_quarantined_and_cleared_once_it_can(depriv: CommandLine, config: Path) -> None:
    row = created(depriv, config)
    registry = Registry(depriv.state_dir)
    with freezing() as freeze:
        frozen = freeze(row["pid"])
        # As after `destroy`, which waits for 10 seconds.
        registry.save(registry.find("web").replace(state="quarantined", trouble="it does not die"))
        gc(depriv, expect=f"{row['pid']} (D)")
        assert [each["state"] for each in depriv.rows()] == ["quarantined"]
        assert leaf_of(row["domid"])
        frozen.thaw()
        assert await_end(row["pid"])
    gc(depriv, expect=": done")
    assert is_cleared(row)
    assert depriv.rows() == []


@pytest.mark.parametrize("how", ["entries", "folder"])
def test_guest_of_a_lost_state_folder_is_ended(depriv: CommandLine, config: Path, how: str) -> None:
    row = created(depriv, config)
    if how == "entries":
        shutil.rmtree(f"{depriv.state_dir}/domains")
    else:
        within(depriv, "mount", "-t", "tmpfs", "-o", "mode=700", "another", "/run/depriv")
    gc(depriv, expect=f"/{row['domid']}: of no domain: done")
    assert is_cleared(row)
    assert not os.path.exists(os.path.dirname(leaf_of(row["domid"])) or "/nowhere")


def test_guest_that_ends_is_noticed_by_the_watcher_and_cleared(depriv: CommandLine, config: Path) -> None:
    row = created(depriv, config)
    watcher = depriv.start("watch")
    try:
        time.sleep(0.5)
        os.kill(row["pid"], signal.SIGKILL)
        await_true(lambda: not os.path.exists(f"{depriv.state_dir}/domains/{row['domid']}"), what="it is cleared")
        assert is_cleared(row)
    finally:
        watcher.terminate()
        watcher.communicate(timeout=10)


THREADS = """
#include <pthread.h>
#include <unistd.h>
static void *end(void *nothing) { return nothing; }
int main(void)
{
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    alarm(30);
    for (;;)
        if (pthread_create(&thread, &detached, end, 0))
            usleep(100);
}
"""


def test_thread_that_is_just_ending_is_no_finding_of_the_audit(depriv: CommandLine, tmp_path: Path) -> None:
    """Bug: such a thread is shown in the root of a hierarchy of version 1, and a start failed for it."""
    del depriv
    leaf = f"{PIDS}/depriv-tests-{os.getpid()}"
    os.mkdir(leaf)
    try:
        argv = ["sh", "-c", f"echo $$ > {leaf}/cgroup.procs; exec {compiled(tmp_path, 'threads', THREADS)}"]
        with subprocess.Popen(argv) as process:
            try:
                await_true(lambda: proc.cgroups(process.pid)["pids"] != "/", what="it is in the cgroup")
                expected = expect(process.pid, os.path.basename(leaf))
                wrong: list[str] = []
                seen = 0
                deadline = time.monotonic() + 2
                while time.monotonic() < deadline:
                    checks = {check.id: check for check in audit(process.pid, expected=expected).checks}
                    seen += 1
                    if not checks["cgroup"].holds:
                        wrong.append(checks["cgroup"].have)
            finally:
                process.kill()
        assert seen > 20
        assert wrong == []
    finally:
        os.rmdir(leaf)


def expect(pid: int, group: str) -> Expected:
    return Expected(
        domain="web",
        domid=1,
        uid=0,
        gid=0,
        pid=pid,
        starttime=proc.start_time(pid),
        restricted=True,
        limits=(),
        environ=(),
        cgroup=f"/{group}",
        grants=(),
    )


def test_guest_starts_in_a_container_whose_hierarchy_is_a_part_of_the_hosts(depriv: CommandLine, config: Path) -> None:
    """Bug: the kernel shows the whole path of its cgroup, the audit wanted the container's, and nothing started."""
    part = f"{PIDS}/depriv-tests-part-{os.getpid()}"
    os.mkdir(part)
    try:
        within(depriv, "mount", "--bind", part, PIDS)
        row = created(depriv, config)
        assert Path(f"/proc/{row['pid']}/cgroup").read_text().count(f":{part.removeprefix(PIDS)}/depriv-") == 1
        assert "FAIL" not in depriv.run("audit", "web").stdout
        depriv.run("destroy", "web")
        assert os.listdir(part) == [name for name in os.listdir(part) if not name.startswith("depriv")]
    finally:
        os.rmdir(part)


def test_without_any_hierarchy_nothing_starts_and_it_is_said_what_to_do(unchanged: None, config: Path) -> None:
    del unchanged
    bare = CommandLine(without=("cgroup2", "cgroup"))
    try:
        said = bare.run("create", str(config), expect=125).stderr
        assert "no cgroup file system is mounted" in said
        assert "fix: mount -t cgroup2" in said
        assert bare.rows() == []
        gc(bare)
        assert "there is no domain" in bare.run("destroy", "web", expect=2).stderr
        assert "no hierarchy is mounted" in bare.run("doctor", expect=1).stdout
    finally:
        bare.close()


def test_guest_is_ended_where_its_hierarchy_is_mounted_no_more_and_its_cgroup_goes_when_it_is_again(
    depriv: CommandLine, config: Path
) -> None:
    row = created(depriv, config)
    within(depriv, "umount", "--all", "--types", "cgroup")
    assert [each["state"] for each in depriv.rows()] == ["running"]
    assert "FAIL" not in depriv.run("audit", "web").stdout
    depriv.run("destroy", "web")
    assert not living(range(row["uid"], row["uid"] + 1))
    assert leaf_of(row["domid"])
    within(depriv, "mount", "-t", "cgroup", "-o", "pids", "again", PIDS)
    gc(depriv, expect=f"/{row['domid']}: of no domain: done")
    assert is_cleared(row)


def test_guest_with_a_shared_uid_is_not_said_to_be_gone_where_its_cgroup_cannot_be_seen(
    depriv: CommandLine, config: Path, tmp_path: Path, uids: range
) -> None:
    """Nobody is killed by a shared uid: without a view of its cgroup there is no proof that nothing is left."""
    del tmp_path, uids
    row = created(depriv, config)
    registry = Registry(depriv.state_dir)
    registry.save(registry.find("web").replace(shared=True))
    within(depriv, "umount", "--all", "--types", "cgroup")
    said = depriv.run("destroy", "web", expect=125).stderr
    assert "cannot see what is in cgroup" in said
    assert "mounted" in said
    assert [each["state"] for each in depriv.rows()] == ["quarantined"]
    within(depriv, "mount", "-t", "cgroup", "-o", "pids", "again", PIDS)
    gc(depriv, expect=": done")
    assert depriv.rows() == []
    assert is_cleared(row)
