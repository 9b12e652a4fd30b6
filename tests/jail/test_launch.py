# SPDX-License-Identifier: Apache-2.0
"""What the real jail makes of the planner's plan: looked at from the host, with a small program in QEMU's place."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from tests.support import build
from tests.support.launch import DISK_FD, TIMEOUT_S, ended, kill, running, wait_for

from depriv import proc, steps
from depriv.spawn import Jail

if TYPE_CHECKING:
    from tests.support.launch import Ground

pytestmark = pytest.mark.root

KINDS = ("mnt", "ipc", "net", "uts", "pid", "cgroup", "user")

# Fills its standard output beyond what anybody holds, then says so in its exit status.
WRITER = r"""
#include <errno.h>
#include <string.h>
#include <unistd.h>
int main(void)
{
    char line[4096];
    long sent = 0, got;
    memset(line, 'x', sizeof line);
    for (int n = 0; n < 1000; n++) {
        got = write(1, line, sizeof line);
        if (got < 0 && errno != EAGAIN)
            return 9;
        sent += got > 0 ? got : 0;
    }
    return sent == 65536 ? 42 : 8;
}
"""


def test_only_the_granted_descriptors_are_open(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with running(launch) as started:
        found = {int(name): os.stat(f"/proc/{started.pid}/fd/{name}") for name in os.listdir(f"/proc/{started.pid}/fd")}
        assert sorted(found) == [0, 1, 2, 3, 4, DISK_FD]
        null, disk, log = os.stat("/dev/null"), ground.disk.stat(), os.stat(f"{launch.directory}/log")
        assert found[0].st_rdev == null.st_rdev
        assert (found[DISK_FD].st_dev, found[DISK_FD].st_ino) == (disk.st_dev, disk.st_ino)
        assert {(found[n].st_dev, found[n].st_ino) for n in (1, 2)} == {(log.st_dev, log.st_ino)}
        assert stat.S_ISSOCK(found[3].st_mode)
        told = {one.role: (one.kind, one.dev, one.ino, one.access) for one in started.launched.opened}
        assert told["xvda"] == ("file", disk.st_dev, disk.st_ino, "rw")
        assert told["stdin"][3] == "ro"
        assert "kernel" not in told  # it was a source to copy from
    ground.forget(launch)


def test_every_namespace_is_its_own(ground: Ground) -> None:
    first, second = ground.launch("--serve"), ground.launch("--serve")
    with running(first) as one, running(second) as two:
        for kind in KINDS:
            inodes = {os.stat(f"/proc/{pid}/ns/{kind}").st_ino for pid in ("self", one.pid, two.pid)}
            assert len(inodes) == 3, kind
        assert proc.read_status(one.pid)["NSpid"].split() == [str(one.pid), "1"]
    ground.forget(first)
    ground.forget(second)


def test_root_holds_what_was_planned_and_nothing_once_it_is_emptied(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with running(launch) as started:
        root = f"/proc/{started.pid}/root"
        assert sorted(os.listdir(root)) == ["bin", "dev", "private", "usr"]
        assert os.listdir(f"{root}/dev") == ["null"]
        copy = os.stat(f"{root}/private/kernel")
        assert (copy.st_uid, copy.st_mode & 0o7777) == (launch.identity.uid, 0o400)
        with open(f"{root}/private/kernel", "rb") as file:
            assert file.read() == ground.kernel.read_bytes()
        mounts = {mount.point: mount for mount in proc.mounts(started.pid)}
        assert sorted(mounts) == ["/", "/private", "/usr"]
        assert {"ro", "nosuid", "nodev"} <= set(mounts["/usr"].options)
        assert {"ro", "nosuid", "noexec"} <= set(mounts["/"].options)
        assert {"nosuid", "nodev", "noexec"} <= set(mounts["/private"].options)
        started.jail.empty_root(timeout_s=TIMEOUT_S)
        assert os.listdir(root) == ["dev"]
        (left,) = proc.mounts(started.pid)
        assert "ro" in left.options
        assert not started.ended(0)
    ground.forget(launch)


def test_host_name_directory_umask_and_session_are_the_jails(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with running(launch) as started:
        reads = ["nsenter", f"--uts=/proc/{started.pid}/ns/uts", "hostname"]
        done = subprocess.run(reads, check=True, capture_output=True, text=True, timeout=10)
        assert done.stdout == "depriv\n"
        assert os.stat(f"/proc/{started.pid}/cwd").st_ino == os.stat(f"/proc/{started.pid}/root").st_ino
        assert proc.read_status(started.pid)["Umask"] == "0077"
        assert os.getsid(started.pid) == started.pid
    ground.forget(launch)


def test_limits_and_environment_are_the_plans(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with running(launch) as started:
        have = proc.limits(started.pid)
        want = {step.name: step.value for step in launch.plan.steps if isinstance(step, steps.SetLimit)}
        assert {name: have[name] for name in want} == {name: (value, value) for name, value in want.items()}
        act = launch.plan.steps[-1]
        assert isinstance(act, steps.Execute)
        assert proc.environ(started.pid) == act.environ
    ground.forget(launch)


def test_no_signal_is_blocked_and_none_ignored_but_the_one_of_the_size_limit(ground: Ground) -> None:
    """What Python ignores is not handed on, SIGPIPE least of all; glibc's posix_spawn leaves its own two, 32 and 33."""
    launch = ground.launch("--serve")
    with running(launch) as started:
        status = proc.read_status(started.pid)
        assert int(status["SigBlk"], 16) == 0
        assert int(status["SigIgn"], 16) & ~(0b11 << 31) == 1 << (signal.SIGXFSZ - 1)
    ground.forget(launch)


def test_process_is_in_its_cgroup_and_sees_it_as_the_root(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with running(launch) as started:
        with open(f"{launch.cgroup}/cgroup.procs", encoding="ascii") as file:
            assert file.read().split() == [str(started.pid)]
        assert len(os.listdir(launch.cgroup)) > 1
    assert not os.path.exists(launch.cgroup)
    ground.forget(launch)


def test_monitor_can_be_reached_through_the_folder_of_root_alone(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with running(launch):
        assert os.stat(launch.directory).st_mode & 0o7777 == 0o700
        assert os.stat(f"{launch.directory}/qmp").st_mode & 0o077 == 0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{launch.directory}/qmp")
    ground.forget(launch)


def test_jail_keeps_no_copy_of_what_it_granted(ground: Ground) -> None:
    """A lock on an image belongs to the open file: a copy here would keep it after the guest's end."""
    launch = ground.launch("--serve")
    disk = ground.disk.stat()
    with running(launch) as started:
        pid = started.jail._pid

        def holds() -> bool:
            found = (os.stat(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd"))
            return any((have.st_dev, have.st_ino) == (disk.st_dev, disk.st_ino) for have in found)

        assert wait_for(lambda: not holds(), 5)
    ground.forget(launch)


def test_released_program_outlives_jail_and_toolstack(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with Jail() as jail:
        started = jail.launch(launch.plan, timeout_s=TIMEOUT_S)
        jail.release()
    try:
        assert not ended(started.pidfd, 0.3)
        assert not os.path.exists(f"/proc/{jail._pid}/fd") or jail._pid == 0
    finally:
        ground.forget(launch)
        assert ended(started.pidfd)
        os.close(started.pidfd)


def test_log_that_nobody_reads_neither_blocks_nor_grows(ground: Ground) -> None:
    source = ground.folder / "writer.c"
    source.write_text(WRITER)
    ground.program = ground.folder / "writer"
    subprocess.run([*build.COMPILER, "-o", ground.program, source], check=True, timeout=60)
    launch = ground.launch()
    with Jail() as jail:
        begun = time.monotonic()
        try:
            started = jail.launch(launch.plan, timeout_s=TIMEOUT_S)
        except Exception as error:
            assert "exit status 42" in str(getattr(error, "cause", ""))  # noqa: PT017 (it may end before the jail looks)
        else:
            assert ended(started.pidfd)
            with open(f"/proc/{started.pid}/stat", encoding="ascii") as file:
                assert int(file.read().split()[-1]) >> 8 == 42  # exit_code: proc_pid_stat(5), field 52
            os.close(started.pidfd)
        assert time.monotonic() - begun < 10
    ground.forget(launch)


def test_unrestricted_program_is_still_not_root_and_dies_whole(ground: Ground) -> None:
    launch = ground.launch("--serve", restricted=False)
    with running(launch) as started:
        status = proc.read_status(started.pid)
        assert status["Uid"].split() == [str(launch.identity.uid)] * 4
        assert status["Groups"].split() == []
        assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb", "CapInh")} == {0}
        assert status["NoNewPrivs"] == "1"
        with open(f"{launch.cgroup}/cgroup.procs", encoding="ascii") as file:
            assert file.read().split() == [str(started.pid)]
    assert ground.snapshot().processes == ()
    ground.forget(launch)


def test_leftover_process_of_the_uid_dies_before_the_uid_is_used_again(ground: Ground) -> None:
    launch = ground.launch("--serve")
    uid = launch.identity.uid
    argv = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "sleep", "60"]
    with subprocess.Popen(argv, cwd="/") as left:
        assert wait_for(lambda: proc.read_status(left.pid)["Uid"].split()[0] == str(uid))
        with running(launch) as started:
            assert left.wait(10) == -signal.SIGKILL
            assert not started.ended(0)
    ground.forget(launch)


def test_process_of_another_uid_lives_through_all_this(ground: Ground) -> None:
    first, second = ground.launch("--serve"), ground.launch("--serve")
    with running(first) as one:
        with running(second):
            assert not one.ended(0)
        ground.forget(second)
        assert not one.ended(0)
        kill(one.pidfd)
        assert one.ended()
    ground.forget(first)


def test_jail_takes_nothing_from_the_environment_or_the_folder_it_is_started_in(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ground.folder / "os.py").write_text("raise SystemExit('the wrong os')")
    (ground.folder / "depriv.py").write_text("raise SystemExit('the wrong depriv')")
    monkeypatch.chdir(ground.folder)
    monkeypatch.setenv("PYTHONPATH", str(ground.folder))
    monkeypatch.setenv("PYTHONSTARTUP", str(ground.folder / "os.py"))
    launch = ground.launch("--serve")
    with running(launch) as started:
        with open(f"/proc/{started.jail._pid}/environ", "rb") as file:
            assert file.read() == b""
        argv = [sys.executable, "-I", "-S"]
        with open(f"/proc/{started.jail._pid}/cmdline", "rb") as file:
            assert file.read().decode().split("\0")[:3] == argv
    ground.forget(launch)


def test_what_the_toolstack_left_open_and_its_groups_are_not_handed_on(ground: Ground) -> None:
    launch = ground.launch("--serve")
    groups = os.getgroups()
    leaks = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(leaks, True)
    try:
        os.setgroups((4, 24, 27))
        with running(launch) as started:
            assert os.path.exists(f"/proc/{started.jail._pid}/fd/{leaks}")  # so far it comes
            assert sorted(map(int, os.listdir(f"/proc/{started.pid}/fd"))) == [0, 1, 2, 3, 4, DISK_FD]
            assert proc.read_status(started.pid)["Groups"].split() == []
    finally:
        os.setgroups(groups)
        os.close(leaks)
    ground.forget(launch)


def test_failed_start_can_be_tried_again_at_once(ground: Ground) -> None:
    for _ in range(3):
        launch = ground.launch("--serve")
        with running(launch) as started:
            assert not started.ended(0)
        ground.forget(launch)
