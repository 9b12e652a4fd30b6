# SPDX-License-Identifier: Apache-2.0
"""/proc is read as the kernel writes it, and processes that vanish, linger or change their number are told apart."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from tests.support.host import need

from depriv import proc

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

# Another user may be kept from the folder that this interpreter lies in.
PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")
UID = 500_000 + os.getpid() % 10_000  # an id that nobody has, and no other run of these tests at the same time

# F_OFD_SETLK of <fcntl.h>: Python has no name for it before 3.14.
F_OFD_SETLK = 37

# Says "r" when what its argument orders is done, then waits for the end of its input.
CHILD = """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None)
def say():
    os.write(1, b"r")
exec(sys.argv[1])
say()
sys.stdin.read()
"""
# The main thread exits alone (exit(2), not exit_group): it stays as a zombie while the other lives.
LEADER_EXITS = """
def stay():
    say()
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=stay).start()
libc.syscall(60, 0)
"""


@contextmanager
def child(order: str = "", *, user: int | None = None) -> Generator[subprocess.Popen[bytes]]:
    """Yield a child that has done ``order``; it is dead and reaped afterwards."""
    process = subprocess.Popen(
        [PYTHON, "-I", "-S", "-c", CHILD, order], stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=user
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"r"
            yield process
        finally:
            process.kill()


def reaped() -> int:
    """Return the number of a process that is no more."""
    with child() as process:
        pass
    return process.pid


def until(question: Callable[[], bool]) -> bool:
    """Ask until the answer is yes, for some seconds at most."""
    for _ in range(500):
        if question():
            return True
        select.select([], [], [], 0.01)
    return False


ASKS = (
    proc.threads,
    proc.read_status,
    proc.start_time,
    proc.limits,
    proc.namespaces,
    proc.mounts,
    proc.environ,
    proc.cgroups,
    proc.owner,
    proc.places,
    proc.fds,
    proc.sketch,
)


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: str(ask.__name__))
def test_every_reader_says_that_a_process_is_gone(ask: Callable[[int], object]) -> None:
    with pytest.raises(ProcessLookupError):
        ask(reaped())


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: str(ask.__name__))
def test_every_reader_has_an_answer_about_oneself(ask: Callable[[int], object]) -> None:
    assert ask(os.getpid()) is not None


def test_the_status_is_of_the_thread_asked_for() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert thread.native_id in proc.threads(os.getpid())
        assert proc.read_status(os.getpid(), thread.native_id)["Pid"] == str(thread.native_id)
        assert proc.read_status(os.getpid())["Pid"] == str(os.getpid())
    finally:
        done.set()
        thread.join()


def test_limits_have_the_names_and_numbers_of_setrlimit() -> None:
    found = proc.limits(os.getpid())
    for name in ("CPU", "FSIZE", "CORE", "NPROC", "NOFILE", "MEMLOCK", "AS", "SIGPENDING", "MSGQUEUE", "NICE"):
        assert found[name] == resource.getrlimit(getattr(resource, f"RLIMIT_{name}")), name
    assert len(found) == 16


def test_namespaces_are_inode_numbers() -> None:
    assert proc.namespaces(os.getpid())["net"] == os.stat("/proc/self/ns/net").st_ino
    assert set(proc.namespaces(os.getpid())) == set(proc.NAMESPACES)


def test_the_mounts_hold_proc() -> None:
    (mount, *_) = [each for each in proc.mounts(os.getpid()) if each.point == "/proc"]
    assert (mount.fstype, mount.root) == ("proc", "/")
    assert {"rw", "ro"} & set(mount.options)


@pytest.mark.parametrize(
    ("written", "meant"), [("/a\\040b", "/a b"), ("/a\\134040", "/a\\040"), ("\\043\\011\\012", "#\t\n"), ("/a", "/a")]
)
def test_mount_points_are_unescaped(written: str, meant: str) -> None:
    assert proc._unescape(written) == meant


def test_the_environment_is_what_execve_got() -> None:
    process = subprocess.Popen(["sleep", "60"], env={"A": "1", "B": "x=\ny", "C": ""})
    try:
        assert until(lambda: proc.environ(process.pid) == ("A=1", "B=x=\ny", "C="))
    finally:
        process.kill()
        process.wait()


def test_cgroups_are_paths_by_controller() -> None:
    found = proc.cgroups(os.getpid())
    assert all(path.startswith("/") for path in found.values())


@root
def test_the_owner_is_root_for_a_process_that_is_not_dumpable() -> None:
    with child(user=UID) as process:
        assert proc.owner(process.pid) == UID
    with child("libc.prctl(4, 0, 0, 0, 0)", user=UID) as process:
        assert proc.owner(process.pid) == 0


def test_places_tell_root_working_directory_and_what_is_above() -> None:
    with child("os.chdir('/proc')") as process:
        place, cwd, above = proc.places(process.pid)
    assert place == above != cwd
    assert cwd == (os.stat("/proc").st_dev, os.stat("/proc").st_ino)


@root
def test_above_a_chroot_is_more() -> None:
    with child("os.chroot('/proc'); os.chdir('/')") as process:
        place, cwd, above = proc.places(process.pid)
    assert place == cwd != above


def mine(fd: int) -> proc.OpenFd:
    return next(each for each in proc.fds(os.getpid()) if each.number == fd)


@pytest.mark.parametrize(
    ("flags", "access"),
    [(os.O_RDONLY, "ro"), (os.O_WRONLY, "wo"), (os.O_RDWR | os.O_APPEND, "rw"), (os.O_PATH, "path")],
)
def test_the_access_of_a_descriptor_is_how_it_was_opened(tmp_path: Path, flags: int, access: str) -> None:
    (tmp_path / "x").touch()
    fd = os.open(tmp_path / "x", flags | os.O_CLOEXEC)
    try:
        file = os.fstat(fd)
        found = mine(fd)
        assert (found.access, found.dev, found.ino, found.mode) == (access, file.st_dev, file.st_ino, file.st_mode)
        assert found.flags & flags == flags
        assert found.target == str(tmp_path / "x")
        assert (fd, file.st_dev, file.st_ino, access) in proc.sketch(os.getpid())
    finally:
        os.close(fd)


def test_locks_are_told_by_their_kind(tmp_path: Path) -> None:
    with (
        (tmp_path / "ofd").open("w+") as ofd,
        (tmp_path / "posix").open("w+") as posix,
        (tmp_path / "no").open("w+") as no,
    ):
        fcntl.fcntl(ofd, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 100, 1, 0))
        fcntl.lockf(posix, fcntl.LOCK_EX)
        assert [lock.split()[0] for lock in mine(ofd.fileno()).locks] == ["OFDLCK"]
        assert [lock.split()[0] for lock in mine(posix.fileno()).locks] == ["POSIX"]
        assert mine(no.fileno()).locks == ()


def test_a_living_process_is_running() -> None:
    with child() as process:
        assert proc.alive(process.pid, proc.start_time(process.pid)) == "running"


def test_a_process_that_has_ended_is_dead_reaped_or_not() -> None:
    with child() as process:
        begun = proc.start_time(process.pid)
        process.kill()
        assert until(lambda: proc.alive(process.pid, begun) == "dead")
        assert proc.read_status(process.pid)["State"][0] == "Z"
    assert proc.alive(process.pid, begun) == "dead"


def test_a_later_process_with_the_number_is_not_the_one_meant() -> None:
    with child() as process:
        assert proc.alive(process.pid, proc.start_time(process.pid) - 1) == "dead"


def test_a_dead_main_thread_with_a_living_other_is_told_apart() -> None:
    with child(LEADER_EXITS) as process:
        begun = proc.start_time(process.pid)
        assert until(lambda: proc.alive(process.pid, begun) == "dead-leader")
        assert proc.alive(process.pid, begun - 1) == "dead"
        pidfd = os.pidfd_open(process.pid)
        assert select.select([pidfd], [], [], 0.05)[0] == []  # why the question exists: a pidfd does not tell
        os.close(pidfd)


def test_a_stopped_process_is_running() -> None:
    with child() as process:
        process.send_signal(signal.SIGSTOP)
        assert until(lambda: proc.read_status(process.pid)["State"][0] == "T")
        assert proc.alive(process.pid, proc.start_time(process.pid)) == "running"
        assert process.pid in {each.pid for each in proc.processes()}


def test_a_name_with_brackets_and_blanks_does_not_confuse_the_reader() -> None:
    with child("libc.prctl(15, b') Z 1 (', 0, 0, 0)") as process:
        assert proc.read_status(process.pid)["Name"] == ") Z 1 ("
        assert proc.alive(process.pid, proc.start_time(process.pid)) == "running"
        assert process.pid in {each.pid for each in proc.processes()}


def test_a_name_with_lines_of_its_own_does_not_change_the_ids() -> None:
    with child("libc.prctl(15, b'\\nUid:\\t7\\t7', 0, 0, 0)") as process:
        (found,) = [each for each in proc.processes() if each.pid == process.pid]
        assert found.uids == (os.getuid(),) * 4
        assert proc.read_status(process.pid)["Uid"].split() == [str(os.getuid())] * 4


def test_a_name_with_another_line_end_adds_no_field() -> None:
    with child("libc.prctl(15, b'x\\rForged:\\t7', 0, 0, 0)") as process:
        assert "Forged" not in proc.read_status(process.pid)


@root
@pytest.mark.parametrize(
    "order",
    [
        f"os.setresuid({UID}, 0, 0)",
        f"os.setresuid(0, {UID}, 0)",
        f"os.setresuid(0, 0, {UID})",
        f"libc.setfsuid({UID})",
    ],
)
def test_a_process_is_found_by_each_of_its_four_uids(order: str) -> None:
    with child(order) as process:
        assert [each.pid for each in proc.processes_of(uid=UID)] == [process.pid]
    assert proc.processes_of(uid=UID) == ()


@root
@pytest.mark.parametrize(
    "order",
    [
        f"os.setresgid({UID}, 0, 0)",
        f"os.setresgid(0, {UID}, 0)",
        f"os.setresgid(0, 0, {UID})",
        f"libc.setfsgid({UID})",
    ],
)
def test_a_process_is_found_by_each_of_its_four_gids(order: str) -> None:
    with child(order) as process:
        assert [each.pid for each in proc.processes_of(gid=UID)] == [process.pid]
        assert proc.processes_of(uid=UID) == ()
    assert proc.processes_of(gid=UID) == ()


@root
def test_a_process_with_a_dead_main_thread_still_counts() -> None:
    with child(f"os.setresuid({UID}, {UID}, {UID})\n" + LEADER_EXITS) as process:
        assert until(lambda: proc.read_status(process.pid)["State"][0] == "Z")
        assert [each.pid for each in proc.processes_of(uid=UID)] == [process.pid]


@root
def test_a_process_that_is_wholly_dead_does_not_count() -> None:
    with child(user=UID) as process:
        process.kill()
        assert until(lambda: proc.read_status(process.pid)["State"][0] == "Z")
        assert proc.processes_of(uid=UID) == ()


def test_nobody_is_found_when_nobody_is_asked_for() -> None:
    assert proc.processes_of() == ()


def test_processes_are_looked_for_among_those_given() -> None:
    assert proc.processes_of(uid=os.getuid(), among=()) == ()
    assert proc.processes_of(uid=os.getuid(), among=proc.processes())


def test_a_listener_and_its_connections_are_told_apart(tmp_path: Path) -> None:
    path = str(tmp_path / "with a blank")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        client.connect(path)
        accepted, _ = listener.accept()
        with accepted:
            found = proc.unix_sockets(os.getpid())
            inodes = [os.fstat(each.fileno()).st_ino for each in (listener, accepted, client)]
    assert [(found[ino].path, found[ino].listening) for ino in inodes[:2]] == [(path, True), (path, False)]
    assert inodes[2] not in found


@pytest.mark.parametrize("named", [True, False])
def test_a_line_forged_by_a_path_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as victim, socket.socket(socket.AF_UNIX) as forger:
        if named:
            victim.bind("v")
        ino = os.fstat(victim.fileno()).st_ino
        forger.bind(f"f\n0: 2 0 00010000 1 1 {ino} x")
        found = proc.unix_sockets(os.getpid())
        assert ino not in found
        assert found[os.fstat(forger.fileno()).st_ino].path == "f"


def test_the_holders_of_a_pipe_are_found() -> None:
    read, write = os.pipe()
    target = os.readlink(f"/proc/self/fd/{read}")
    assert proc.holders(target) == (os.getpid(),)
    os.close(read)
    os.close(write)
    assert proc.holders(target) == ()


def test_a_descriptor_that_closes_meanwhile_is_left_out() -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            os.close(os.dup(0))

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(200):
            assert {0, 1, 2} <= {each.number for each in proc.fds(os.getpid())}
    finally:
        stop.set()
        thread.join()


THREADS = """
import os, threading
os.write(1, b"r")
while True:
    threading.Thread(target=int).start()
"""


@root
def test_threads_that_end_while_they_are_read_are_gone() -> None:
    """Bug: a link of what has just ended is refused with EACCES, and an audit said that it may not look."""
    with subprocess.Popen([PYTHON, "-c", THREADS], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"r"
            wrong: list[str] = []
            deadline = time.monotonic() + 1.5
            while time.monotonic() < deadline:
                for tid in proc.threads(process.pid)[1:]:
                    for read in (proc.namespaces, proc.places):
                        try:
                            read(process.pid, tid)
                        except ProcessLookupError:
                            continue
                        except PermissionError as error:
                            wrong.append(str(error))
        finally:
            process.kill()
    assert wrong == []


# In a pid namespace of its own: a thread gets a lower number than its process has.
LOWER = """
import os, sys, threading, time
def last_pid(number):
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(number))
last_pid(500)
if os.fork() == 0:
    last_pid(100)
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    from depriv import proc
    print(os.getpid(), *proc.threads(os.getpid()), flush=True)
    os._exit(0)
os.wait()
"""


@root
def test_main_thread_is_the_first_whatever_its_number() -> None:
    """Bug: numbers begin anew, and an audit that took a thread with a lower one for the main thread saw it end."""
    need(os.path.exists("/proc/sys/kernel/ns_last_pid"), what="ns_last_pid")
    argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", LOWER]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10)
    pid, first, second = map(int, done.stdout.split())
    assert second < pid
    assert first == pid
