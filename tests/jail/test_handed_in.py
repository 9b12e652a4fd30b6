# SPDX-License-Identifier: Apache-2.0
"""What the jail takes from the toolstack and from where the user says: descriptors, sockets by name, pseudo-terminals.

Each as QEMU gets it, and all that must not be had this way.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import compiled
from tests.support.launch import TIMEOUT_S, ended, running, taking, wait_for

from depriv import proc, steps
from depriv.errors import JailError
from depriv.jail import apply
from depriv.spawn import Jail

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.launch import Ground

    from depriv.assembly import Launch

pytestmark = pytest.mark.root

NUMBER = 20

# Makes a pseudo-terminal as QEMU's -chardev pty does, says its name, and echoes one line in capitals.
TERMINAL = r"""
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>
int main(void)
{
    char name[64] = "", line[64];
    struct termios raw;
    setvbuf(stdout, 0, _IOLBF, 0);
    int fd = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || unlockpt(fd) || ptsname_r(fd, name, sizeof name) || tcgetattr(fd, &raw)) {
        printf("failed %s\n", strerror(errno));
        pause();
    }
    cfmakeraw(&raw);
    tcsetattr(fd, TCSANOW, &raw);
    int held = open(name, O_RDWR | O_NOCTTY);
    printf("at %s\n", held < 0 ? strerror(errno) : name);
    long got = read(fd, line, sizeof line);
    for (long n = 0; n < got; n++)
        line[n] = (char)toupper(line[n]);
    if (write(fd, line, got) != got)
        puts("short");
    for (;;)
        pause();
}
"""


def take(source: int, *, number: int = NUMBER) -> steps.TakeFd:
    return steps.TakeFd(role="taken", source=source, number=number)


def refused(launch: Launch) -> JailError:
    """Return the error of a plan that must fail."""
    with pytest.raises(JailError) as caught, running(launch):
        pass
    return caught.value


# Descriptors of the toolstack


def test_file_of_the_toolstack_becomes_the_device_models_and_is_told_of(ground: Ground) -> None:
    with ground.disk.open("rb") as file:
        launch = taking(ground.launch("--serve", disk=ground.kernel), take(file.fileno()))
        with running(launch) as started:
            have = os.stat(f"/proc/{started.pid}/fd/{NUMBER}")
            assert os.path.samestat(have, os.fstat(file.fileno()))
            (told,) = [one for one in started.launched.opened if one.role == "taken"]
            assert (told.kind, told.dev, told.ino, told.access) == ("file", have.st_dev, have.st_ino, "ro")
    ground.forget(launch)


def test_socket_of_the_toolstack_is_the_same_socket_in_the_device_model(ground: Ground) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # It takes the place of the log: what the program prints comes out at our end.
        ground.program = compiled(
            ground.folder, "speaker", '#include <unistd.h>\nint main(void){write(20,"hello",5);pause();}'
        )
        launch = taking(ground.launch(), take(theirs.fileno()))
        with running(launch) as started:
            ours.settimeout(TIMEOUT_S)
            assert ours.recv(10) == b"hello"
            assert stat.S_ISSOCK(os.stat(f"/proc/{started.pid}/fd/{NUMBER}").st_mode)
            (told,) = [one for one in started.launched.opened if one.role == "taken"]
            assert (told.kind, told.access) == ("socket", "rw")
    ground.forget(launch)


def test_jail_keeps_no_copy_of_what_it_took(ground: Ground) -> None:
    """The peer must see the end of a connection when QEMU closes it, or ends."""
    ours, theirs = socket.socketpair()
    with ours:
        launch = taking(ground.launch("--serve"), take(theirs.fileno()))
        with running(launch) as started:
            theirs.close()
            ours.settimeout(TIMEOUT_S)
            signal.pidfd_send_signal(started.pidfd, signal.SIGKILL)
            assert ours.recv(1) == b""
    ground.forget(launch)


def test_source_to_copy_from_is_copied_and_not_handed_on(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with ground.kernel.open("rb") as file:
        plan = launch.plan
        kept = [step for step in plan.steps if not (isinstance(step, steps.OpenFile) and step.role == "kernel")]
        launch = launch.replace(plan=plan.replace(steps=tuple(kept)))
        launch = taking(launch, steps.TakeFd(role="kernel", source=file.fileno(), number=-1))
        with running(launch) as started:
            with open(f"/proc/{started.pid}/root/private/kernel", "rb") as copy:
                assert copy.read() == ground.kernel.read_bytes()
            inodes = {os.stat(f"/proc/{started.pid}/fd/{fd}").st_ino for fd in os.listdir(f"/proc/{started.pid}/fd")}
            assert ground.kernel.stat().st_ino not in inodes
            assert "kernel" not in {one.role for one in started.launched.opened}
    ground.forget(launch)


@pytest.mark.parametrize(
    ("path", "flags"),
    [
        ("/", os.O_RDONLY | os.O_DIRECTORY),
        ("/", os.O_PATH),
        ("/etc/passwd", os.O_PATH),
        ("/dev/null", os.O_PATH),
        ("/proc/self", os.O_RDONLY | os.O_DIRECTORY),
    ],
)
def test_directory_and_mere_path_are_refused_as_ways_out_of_the_empty_root(
    ground: Ground, path: str, flags: int
) -> None:
    before = ground.snapshot()
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        launch = taking(ground.launch("--serve"), take(fd))
        error = refused(launch)
        assert error.step == steps.describe(take(fd))
        assert f"descriptor {fd} is a directory, or a mere path" in error.cause
        ground.forget(launch)
    finally:
        os.close(fd)
    assert ground.snapshot() == before


@pytest.mark.parametrize("number", [1 << 20, -1, 999])
def test_number_that_is_not_open_is_refused(ground: Ground, number: int) -> None:
    launch = taking(ground.launch("--serve"), take(number))
    assert refused(launch).errno == errno.EBADF
    ground.forget(launch)


def test_descriptor_is_never_taken_from_whoever_came_after_a_toolstack_that_is_gone() -> None:
    """The parent is then process 1, or the next subreaper: its descriptor of that number is somebody else's."""
    said, tell = os.pipe()
    ours, control = socket.socketpair()
    toolstack = os.fork()
    if toolstack == 0:
        if os.fork():  # the toolstack: it is killed before the jail comes so far
            os.kill(os.getpid(), signal.SIGKILL)
        ours.close()  # the jail; only the test has the other end by then
        control.recv(1)
        state = apply.State(control.fileno())
        try:
            apply.take_fd(take(0), state)
            os.write(tell, b"taken")
        except OSError as error:
            os.write(tell, b"%d" % (error.errno or 0))
        os._exit(0)
    control.close()
    os.close(tell)
    os.waitpid(toolstack, 0)
    ours.close()
    with open(said, "rb") as file:
        assert file.read() == b"%d" % errno.ECANCELED


# Sockets by name, where the user says


def listening_at(ground: Ground, path: Path, *, replace_old: bool) -> Launch:
    launch = ground.launch("--serve")
    at = next(n for n, step in enumerate(launch.plan.steps) if isinstance(step, steps.ListenUnix))
    own = steps.ListenUnix(role="vnc", path=str(path), number=NUMBER, replace_old=replace_old)
    made = (*launch.plan.steps[:at], own, *launch.plan.steps[at:])
    return launch.replace(plan=launch.plan.replace(steps=made))


def test_old_socket_of_the_name_is_replaced_where_the_plan_says_so(ground: Ground, tmp_path: Path) -> None:
    path = tmp_path / "vnc.socket"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
        inode = path.stat().st_ino
        launch = listening_at(ground, path, replace_old=False)
        assert refused(launch).errno == errno.EADDRINUSE
        assert path.stat().st_ino == inode
        ground.forget(launch)
        launch = listening_at(ground, path, replace_old=True)
        with running(launch):
            assert path.stat().st_ino != inode
            assert path.stat().st_mode & 0o7777 == 0o600
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
        ground.forget(launch)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"precious"),
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: path.symlink_to("/dev/null"),
        lambda path: path.symlink_to("nowhere"),
    ],
    ids=["file", "directory", "fifo", "link", "dangling"],
)
def test_nothing_but_a_socket_is_ever_removed_for_its_name(
    ground: Ground, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    path = tmp_path / "vnc.socket"
    make(path)
    before = path.lstat()
    launch = listening_at(ground, path, replace_old=True)
    assert refused(launch).errno == errno.EADDRINUSE
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)
    ground.forget(launch)


def test_link_to_a_socket_is_not_followed_and_both_stay(ground: Ground, tmp_path: Path) -> None:
    path, real = tmp_path / "vnc.socket", tmp_path / "other.socket"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(real))
        path.symlink_to(real)
        launch = listening_at(ground, path, replace_old=True)
        assert refused(launch).errno == errno.EADDRINUSE
        assert path.is_symlink()
        assert real.is_socket()
        ground.forget(launch)


# Pseudo-terminals


def with_terminals(ground: Ground) -> Launch:
    """Return a launch as the planner makes it of a QEMU with a chardev pty."""
    launch = ground.launch()
    plan, uid = launch.plan, launch.identity.uid
    at = next(n for n, step in enumerate(plan.steps) if isinstance(step, steps.BindTree))
    more = (
        steps.MakeDir(path="/dev/pts"),
        steps.BindTree(source="/dev/pts", target="/dev/pts", devices=True),
        steps.MakeNode(path="/dev/ptmx", major=5, minor=2, mode=0o600, uid=uid, gid=launch.identity.gid),
    )
    empty = plan.after[0]
    assert isinstance(empty, steps.EmptyRoot)
    empty = empty.replace(detach=(*empty.detach, "/dev/pts"), remove=("/dev/pts", "/dev/ptmx", *empty.remove))
    return launch.replace(plan=plan.replace(steps=(*plan.steps[:at], *more, *plan.steps[at:]), after=(empty,)))


def test_pseudo_terminal_made_in_the_jail_is_one_of_the_hosts(ground: Ground) -> None:
    ground.program = compiled(ground.folder, "terminal", TERMINAL)
    launch = with_terminals(ground)
    with running(launch) as started:
        assert wait_for(lambda: "\n" in started.log.raw())
        word, name = started.log.raw().split()
        assert (word, os.path.dirname(name)) == ("at", "/dev/pts")
        assert os.stat(name).st_uid == launch.identity.uid
        mounts = {mount.point: mount for mount in proc.mounts(started.pid)}
        assert {"ro", "nosuid"} <= set(mounts["/dev/pts"].options)
        started.jail.empty_root(timeout_s=TIMEOUT_S)
        assert os.listdir(f"/proc/{started.pid}/root/dev") == ["null"]
        # It goes on working when no name of it is left in there.
        fd = os.open(name, os.O_RDWR | os.O_NOCTTY)
        try:
            os.write(fd, b"hello")
            assert os.read(fd, 100) == b"HELLO"
        finally:
            os.close(fd)
    assert wait_for(lambda: not os.path.exists(name))
    ground.forget(launch)


def test_terminals_of_others_cannot_be_opened_through_it(ground: Ground) -> None:
    """They have owners, and the device model is another user."""
    ground.program = compiled(
        ground.folder,
        "opener",
        r"""
        #define _GNU_SOURCE
        #include <errno.h>
        #include <fcntl.h>
        #include <stdio.h>
        #include <string.h>
        #include <unistd.h>
        int main(int argc, char **argv)
        {
            printf("%s\n", open(argv[argc - 1], O_RDWR | O_NOCTTY) < 0 ? strerrorname_np(errno) : "ok");
            fflush(stdout);
            for (;;) pause();
        }
        """,
    )
    ours, theirs = os.openpty()
    try:
        launch = with_terminals(ground)
        act = launch.plan.steps[-1]
        assert isinstance(act, steps.Execute)
        act = act.replace(argv=(*act.argv, os.ttyname(theirs)))
        with running(launch.replace(plan=launch.plan.replace(steps=(*launch.plan.steps[:-1], act)))) as started:
            assert wait_for(lambda: "\n" in started.log.raw())
            assert started.log.raw() == "EACCES\n"
        ground.forget(launch)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("source", ["/dev", "/dev/shm", "/dev/pts/..", "/proc", "/"])
def test_devices_of_no_other_folder_are_bound(ground: Ground, source: str) -> None:
    launch = ground.launch("--serve")
    changed = [
        step.replace(source=source, devices=True) if isinstance(step, steps.BindTree) else step
        for step in launch.plan.steps
    ]
    error = refused(launch.replace(plan=launch.plan.replace(steps=tuple(changed))))
    assert error.step == "check the plan"
    ground.forget(launch)


# Being told of the end


def test_end_by_a_signal_is_told_as_minus_its_number(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with running(launch) as started:
        started.jail.watch()
        signal.pidfd_send_signal(started.pidfd, signal.SIGKILL)
        assert started.jail.end() == -signal.SIGKILL
        assert started.ended()
    ground.forget(launch)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("return 0", 0),
        ("return 1", 1),
        ("return 255", 255),
        ("*(volatile int *)0 = 1", -signal.SIGSEGV),
        ('__asm__("int $0x80" : : "a"(20))', -signal.SIGSYS),  # what our filter kills for
    ],
)
def test_exit_status_is_told_as_it_is(ground: Ground, end: str, status: int) -> None:
    source = f"#include <unistd.h>\nint main(void){{char c; read(20, &c, 1); {end}; return 9;}}"
    ground.program = compiled(ground.folder, "ends", source)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        launch = taking(ground.launch(), take(theirs.fileno()))
        with running(launch) as started:
            started.jail.watch()
            ours.sendall(b"x")
            assert started.jail.end() == status
    ground.forget(launch)


def test_program_that_ended_before_it_was_asked_for_is_told_of_all_the_same(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with running(launch) as started:
        signal.pidfd_send_signal(started.pidfd, signal.SIGKILL)
        assert started.ended()
        started.jail.watch()
        assert started.jail.end() == -signal.SIGKILL
    ground.forget(launch)


def test_nothing_is_told_while_it_runs(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with running(launch) as started:
        started.jail.watch()
        assert not ended(started.jail.fileno(), 0.3)
        assert not started.ended(0)
        begun = time.monotonic()
        started.jail.__exit__()  # who asked to be told goes away: it dies at once
        assert started.ended()
        assert time.monotonic() - begun < 2
    assert wait_for(lambda: not ground.snapshot().cgroups)
    ground.forget(launch)


def test_program_dies_at_once_with_a_toolstack_that_is_killed_while_it_waits(ground: Ground) -> None:
    launch = ground.launch("--serve")
    reads, writes = os.pipe()
    toolstack = os.fork()
    if toolstack == 0:
        jail = Jail()
        launched = jail.launch(launch.plan, timeout_s=TIMEOUT_S)
        jail.empty_root(timeout_s=TIMEOUT_S)
        jail.watch()
        os.write(writes, b"%d\n" % launched.pid)
        while True:
            signal.pause()
    with open(reads, "rb") as file:
        os.close(writes)
        pidfd = os.pidfd_open(int(file.readline()))
    try:
        assert not ended(pidfd, 0.3)
        os.kill(toolstack, signal.SIGKILL)
        os.waitpid(toolstack, 0)
        assert ended(pidfd, 2)
    finally:
        os.close(pidfd)
    assert wait_for(lambda: not ground.snapshot().cgroups)
    ground.forget(launch)


@pytest.mark.parametrize("word", [b"D", b"E", b"X"])
def test_any_word_while_it_waits_ends_the_program(ground: Ground, word: bytes) -> None:
    """Released it must not be: whoever asked to be told has nobody to tell."""
    launch = ground.launch("--serve")
    with running(launch) as started:
        started.jail.watch()
        assert not ended(started.jail.fileno(), 0.1)
        started.jail._control.sendall(word)
        assert started.ended()
    ground.forget(launch)
