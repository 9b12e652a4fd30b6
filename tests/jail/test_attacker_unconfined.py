# SPDX-License-Identifier: Apache-2.0
"""The attacker succeeds where nothing confines it: without this, its failure in a jail would prove nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support import build
from tests.support.linux import cache_directory

if TYPE_CHECKING:
    from collections.abc import Generator

# Namespaces of its own keep what it does off the host. Its end ends the victim: both are in one pid namespace.
APART = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--ipc", "--net", "--uts")
WITH_VICTIM = 'program=$1; shift; "$program" --serve & exec "$program" --victim $! "$@"'

# What root may do on every kernel that depriv supports, whatever devices and modules the host has.
ROOT_MAY = """
    read_passwd read_shadow read_dotdot read_usr read_sh list_root path_read path_write path_stat write_root write_tmp
    write_usr write_cwd write_passwd mkdir_root symlink_root mkfifo_root chmod_root chown_root mknod_null handle_name
    handle_open watch_inotify watch_fanotify memfd memfd_big proc_list proc_mounts proc_self_mem proc_self_exe proc_oom
    proc_1_root proc_victim_mem proc_victim_root proc_victim_environ sys_read environment extra_fds fd_grow fd_truncate
    fd_chmod fd_chown fd_reopen socket_inet socket_udp socket_raw socket_unix socket_netlink socket_packet
    socket_pair bind_inet connect_socket bind_abstract bind_path see_any kill_victim prlimit_victim sched_victim
    nice_victim pidfd_victim pidfd_getfd_victim pidfd_signal_victim vm_readv_victim vm_writev_victim perf_self
    shm sem msg mq host_name map_exec map_big lock_memory thread dumpable fork_one vfork_one clone_one clone3_one
    clone_vm clone_newpid raise_core raise_fsize nice_up affinity persona session keep_caps securebits drop_bounding
    swap_on reboot_wrong kernel_log ptrace_victim chroot_root pivot mount_none mount_private umount_root fs_open
    open_tree_clone mount_move setns_self setns_victim unshare_net unshare_pid unshare_mount setfsuid_0 capset_admin
    setgroups_0 setgid_0 setuid_0 setresuid_0 setuid_other exec_memfd exec_sh
"""


@pytest.fixture(scope="module")
def program() -> Path:
    return build.attacker(cache_directory())


@pytest.fixture(scope="module")
def unconfined(program: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, build.Outcome]:
    place = tmp_path_factory.mktemp("unconfined")
    disk = place / "disk.img"
    disk.write_bytes(bytes(4096))
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX) as listener, socket.create_server(("127.0.0.1", 0)) as tcp:
            listener.bind(str(place / "socket"))
            listener.listen()
            argv = [*APART, "sh", "-c", WITH_VICTIM, "sh", str(program)]
            argv += ["--path", str(disk), "--socket", str(place / "socket"), "--fd", str(fd)]
            argv += ["--listener", str(tcp.fileno())]
            # A second descriptor, not granted: one that a careless launcher left open.
            done = subprocess.run(
                argv,
                cwd=place,
                pass_fds=(fd, listener.fileno(), tcp.fileno()),
                check=True,
                capture_output=True,
                text=True,
                timeout=60,
            )
    finally:
        os.close(fd)
    assert disk.stat().st_size == 4096
    assert sorted(path.name for path in place.iterdir()) == ["disk.img", "socket"]
    return build.outcomes(done.stdout)


@pytest.fixture
def started() -> Generator[list[subprocess.Popen[str]]]:
    """Processes to be ended, each by its own process ID; a bomb is the first of a pid namespace, which ends with it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.root
def test_root_unconfined_may_do_what_the_jail_must_refuse(unconfined: dict[str, build.Outcome]) -> None:
    refused = {act: unconfined[act].result for act in ROOT_MAY.split() if not unconfined[act].allowed}
    assert refused == {}


@pytest.mark.root
def test_no_act_ends_the_attacker_or_its_child(unconfined: dict[str, build.Outcome]) -> None:
    ended = [o.act for o in unconfined.values() if o.result == "killed" or o.result.startswith("SIG")]
    assert ended == []


@pytest.mark.root
def test_every_act_of_the_catalogue_is_tried(program: Path, unconfined: dict[str, build.Outcome]) -> None:
    names = build.catalogue(program)
    assert len(names) >= 150
    assert len(set(names)) == len(names)
    assert set(names) - set(unconfined) == {"connect_abstract"}  # no such socket was named


@pytest.mark.root
def test_nothing_is_left_at_the_root_of_the_host(unconfined: dict[str, build.Outcome]) -> None:
    assert "mkdir_root" in unconfined
    assert not [name for place in ("/", "/tmp", "/dev", "/usr") for name in os.listdir(place) if "depriv-a" in name]


@pytest.mark.root
def test_without_root_far_fewer_acts_are_allowed(program: Path, unconfined: dict[str, build.Outcome]) -> None:
    drop = ("setpriv", "--reuid=400777", "--regid=400777", "--clear-groups", "--no-new-privs", "--bounding-set=-all")
    # The cache may be where only root can go: executed by descriptor, the way leads through /proc.
    fd = os.open(program, os.O_RDONLY | os.O_CLOEXEC)
    try:
        argv = [*APART, "sh", "-c", f'exec "$@" /proc/self/fd/{fd}', "sh", *drop]
        done = subprocess.run(argv, pass_fds=(fd,), check=True, capture_output=True, text=True, timeout=60, cwd="/")
    finally:
        os.close(fd)
    outcomes = build.outcomes(done.stdout)
    must_fail = ("read_shadow", "write_root", "mknod_null", "setuid_0", "capset_admin", "mount_none", "chroot_root")
    assert [act for act in must_fail if outcomes[act].allowed] == []
    assert sum(o.allowed for o in outcomes.values()) < sum(o.allowed for o in unconfined.values()) - 50


def test_acts_without_their_argument_are_left_out_and_an_unknown_one_is_an_error(program: Path) -> None:
    done = subprocess.run([program, "--only", "memfd", "path_read"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "memfd\tok\n")
    done = subprocess.run([program, "--only", "no_such_act"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")


def test_arguments_of_qemu_are_ignored_and_baked_ones_come_first() -> None:
    program = build.attacker(cache_directory(), arguments=("--path", "/etc/passwd", "--only", "path_read"))
    done = subprocess.run([program, "-machine", "pc"], check=False, capture_output=True, text=True)
    assert done.stdout == "path_read\tok\n"


def test_act_that_ends_the_process_shows_as_killed() -> None:
    outcomes = build.outcomes("memfd\tok\nfork_one\t")
    assert outcomes["memfd"].allowed
    assert outcomes["fork_one"] == build.Outcome(act="fork_one", result="killed")


@pytest.mark.parametrize("output", ["garbage\n", "memfd\tok\nmemfd\tEPERM\n"])
def test_output_that_is_not_the_attackers_is_refused(output: str) -> None:
    with pytest.raises(ValueError, match="not the attacker's output"):
        build.outcomes(output)


def test_source_that_does_not_compile_is_an_error_not_a_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.c"
    broken.write_text("int main(void) { return }")
    monkeypatch.setattr(build, "SOURCE", broken)
    with pytest.raises(RuntimeError, match="does not compile"):
        build.attacker(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.c"]


def test_headless_process_is_a_zombie_that_still_runs(program: Path, started: list[subprocess.Popen[str]]) -> None:
    process = subprocess.Popen([program, "--threads"], stdout=subprocess.PIPE, text=True)
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "headless\tok\n"
    stat = Path(f"/proc/{process.pid}/stat")
    deadline = time.monotonic() + 10
    while stat.read_text().rpartition(") ")[2][0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stat.read_text().rpartition(") ")[2][0] == "Z"
    assert len(os.listdir(f"/proc/{process.pid}/task")) == 2
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)


@pytest.mark.root
def test_bomb_makes_as_many_processes_as_asked_for(program: Path, started: list[subprocess.Popen[str]]) -> None:
    process = subprocess.Popen([*APART, program, "--bomb", "20"], stdout=subprocess.PIPE, text=True)
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "bomb\t20\tok\n"


def test_server_waits_for_its_end(program: Path, started: list[subprocess.Popen[str]]) -> None:
    process = subprocess.Popen([program, "-name", "x", "--serve"], stdout=subprocess.PIPE, text=True)
    started.append(process)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
