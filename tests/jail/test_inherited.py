# SPDX-License-Identifier: Apache-2.0
"""What a device model could inherit unseen: keys, the host's interfaces, and the oddities of whoever called depriv."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import compiled
from tests.support.launch import TIMEOUT_S, Running, running, wait_for, with_filter

from depriv import proc
from depriv.errors import MonitorError
from depriv.guestlog import Log
from depriv.qmp import Monitor
from depriv.spawn import Jail

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.launch import Ground

pytestmark = pytest.mark.root

KEY = b"secret-of-the-caller"
JOIN_SESSION_KEYRING, SESSION_KEYRING = 1, -3  # <linux/keyctl.h>
ADDR_NO_RANDOMIZE = 0x0040000  # <linux/personality.h>
LIMITS = {"CPU": resource.RLIMIT_CPU, "DATA": resource.RLIMIT_DATA, "RTTIME": 15}  # <asm-generic/resource.h>
ANSWERED = "accepted:"

# Says which keys it can search and read, which interfaces its sockets show, and then the same of each connection.
PROBE = r"""
#include <errno.h>
#include <linux/keyctl.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static void interfaces(const char *whose, int fd)
{
    struct ifreq found[16];
    struct ifconf all = {.ifc_len = sizeof found, .ifc_req = found};
    if (ioctl(fd, SIOCGIFCONF, &all) < 0) {
        printf("%s: %s\n", whose, strerror(errno));
        return;
    }
    int count = all.ifc_len / sizeof found[0];
    printf("%s:", whose);
    for (int n = 0; n < count; n++)
        printf(" %s", found[n].ifr_name);
    printf("%s\n", count ? "" : " none");
}

int main(void)
{
    char data[4096] = "";
    setvbuf(stdout, 0, _IOLBF, 0);
    long key = syscall(SYS_keyctl, KEYCTL_SEARCH, KEY_SPEC_SESSION_KEYRING, "user", "secret-of-the-caller", 0);
    printf("search: %s\n", key < 0 ? strerror(errno) : "found");
    long size = syscall(SYS_keyctl, KEYCTL_READ, KEY_SPEC_SESSION_KEYRING, data, sizeof data);
    printf("keys: %ld\n", size < 0 ? -(long)errno : size / 4);
    if (key >= 0 && syscall(SYS_keyctl, KEYCTL_READ, key, data, sizeof data) > 0)
        printf("payload: %s\n", data);
    interfaces("own", socket(AF_UNIX, SOCK_STREAM, 0));
    interfaces("listening", 3);
    puts("ready");
    for (;;) {
        int fd = accept(3, 0, 0);
        if (fd < 0)
            pause();
        interfaces("accepted", fd);
        write(fd, "{\"QMP\": {}}\n", 12);
    }
}
"""

# Prints at once, ends a moment later: after its exec was seen, before a toolstack that is busy elsewhere looks.
LAST_WORDS = r"""
#include <stdio.h>
#include <unistd.h>
int main(void) { fputs("last words\n", stderr); usleep(100000); return 1; }
"""


def said(started: Running, wanted: str) -> list[str]:
    """Return the lines that the probe has printed, once ``wanted`` is among what they start with."""
    assert wait_for(lambda: f"\n{wanted}" in started.log.raw()), started.log.raw()
    return started.log.raw().splitlines()


def in_child(work: Callable[[], str]) -> str:
    """Return what ``work`` returns in a forked child, where it may change what cannot be changed back."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reads)
        try:
            text = work()
        except BaseException as error:
            text = f"failed: {error!r}"
        os.write(writes, text.encode())
        os._exit(0)
    os.close(writes)
    with open(reads, encoding="utf-8") as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


def hold_a_key() -> None:
    """Make a session keyring of our own with a secret in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    calls = {"x86_64": (250, 248), "aarch64": (219, 217)}[os.uname().machine]  # keyctl, add_key
    assert libc.syscall(calls[0], JOIN_SESSION_KEYRING, b"depriv-tests") > 0, os.strerror(ctypes.get_errno())
    assert libc.syscall(calls[1], b"user", KEY, b"payload", 7, SESSION_KEYRING) > 0, os.strerror(ctypes.get_errno())


# Keys


def test_device_model_does_not_possess_the_callers_session_keyring(ground: Ground) -> None:
    """A possessor may read its keys, whatever its uid. Without our filter, which denies the calls besides."""
    ground.program = compiled(ground.folder, "probe", PROBE)
    launch = with_filter(ground.launch())

    def start() -> str:
        hold_a_key()
        with running(launch) as started:
            return "\n".join(said(started, "ready"))

    lines = in_child(start).splitlines()
    assert lines[:2] == ["search: Required key not available", "keys: 0"], lines
    ground.forget(launch)


def test_the_same_program_unconfined_reads_the_callers_keys(ground: Ground) -> None:
    """Else the test above would prove nothing."""
    program = compiled(ground.folder, "probe", PROBE)

    def start() -> str:
        hold_a_key()
        with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            process.kill()
        return "".join(lines)

    assert in_child(start).splitlines() == ["search: found", "keys: 1", "payload: payload"]


# Sockets


def test_socket_shows_no_interface_of_the_host_not_even_an_accepted_one(ground: Ground) -> None:
    """A socket belongs to the namespace it was made in; an accepted one to that of who connects.

    Without our filter: with it there is no socket of its own.
    """
    ground.program = compiled(ground.folder, "probe", PROBE)
    launch = with_filter(ground.launch())
    with running(launch) as started:
        lines = said(started, "ready")
        assert "own: none" in lines
        assert "listening: none" in lines
        for _ in range(2):
            with contextlib.suppress(MonitorError):  # it greets and then says nothing
                Monitor.connect(f"{launch.directory}/qmp", timeout_s=0.3, netns_of=started.pidfd)
        accepted = [line for line in said(started, ANSWERED) if line.startswith(ANSWERED)]
        assert accepted == [f"{ANSWERED} none"] * 2
    ground.forget(launch)


def test_a_socket_of_the_host_would_show_them(ground: Ground) -> None:
    """Else the test above would prove nothing: a connection that is made in the host's namespace gives it away."""
    ground.program = compiled(ground.folder, "probe", PROBE)
    launch = ground.launch()
    with running(launch) as started:
        said(started, "ready")
        with socket.socket(socket.AF_UNIX) as client:
            os.chdir(launch.directory)  # the path may be longer than an address
            try:
                client.connect("qmp")
            finally:
                os.chdir("/")
            (line,) = [line for line in said(started, ANSWERED) if line.startswith(ANSWERED)]
        assert "lo" in line.split()
    ground.forget(launch)


def test_connecting_leaves_the_caller_in_its_own_network(ground: Ground) -> None:
    ground.program = compiled(ground.folder, "probe", PROBE)
    launch = ground.launch()
    before = os.readlink("/proc/thread-self/ns/net")
    with running(launch) as started:
        said(started, "ready")
        for timeout_s in (0.001, 0.2):
            with contextlib.suppress(MonitorError):
                Monitor.connect(f"{launch.directory}/qmp", timeout_s=timeout_s, netns_of=started.pidfd)
            assert os.readlink("/proc/thread-self/ns/net") == before
        with pytest.raises(MonitorError):
            Monitor.connect(f"{launch.directory}/nothing", timeout_s=0.2, netns_of=started.pidfd)
        assert os.readlink("/proc/thread-self/ns/net") == before
    ground.forget(launch)


# Attributes of a process


def test_real_time_class_nice_personality_and_oom_score_of_the_caller_are_not_handed_on(ground: Ground) -> None:
    launch = ground.launch("--serve")

    def start() -> str:
        os.setpriority(os.PRIO_PROCESS, 0, -7)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        assert ctypes.CDLL(None).personality(ctypes.c_ulong(ADDR_NO_RANDOMIZE)) >= 0
        with (  # where root lacks CAP_SYS_RESOURCE no caller can be immune
            contextlib.suppress(PermissionError),
            open("/proc/self/oom_score_adj", "w", encoding="ascii") as file,
        ):
            file.write("-500")
        with running(launch) as started:
            words = [str(os.sched_getscheduler(started.pid)), str(os.getpriority(os.PRIO_PROCESS, started.pid))]
            for name in ("personality", "oom_score_adj"):
                with open(f"/proc/{started.pid}/{name}", encoding="ascii") as file:
                    words.append(file.read().strip())
            # The jail is the control: so far they come.
            jail = started.jail._pid
            words += [str(os.sched_getscheduler(jail)), str(os.getpriority(os.PRIO_PROCESS, jail))]
        return " ".join(words)

    assert in_child(start) == f"{os.SCHED_OTHER} 0 00000000 0 {os.SCHED_FIFO} -7"
    ground.forget(launch)


def test_oom_score_that_makes_the_caller_an_early_victim_is_kept(ground: Ground) -> None:
    """Only immunity is taken away: whoever wants guests to go first may say so."""
    launch = ground.launch("--serve")

    def start() -> str:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("300")
        with running(launch) as started, open(f"/proc/{started.pid}/oom_score_adj", encoding="ascii") as file:
            return file.read().strip()

    assert in_child(start) == "300"
    ground.forget(launch)


def test_stack_without_limit_is_not_handed_on(ground: Ground) -> None:
    """With it the kernel lays out memory the old way, from the bottom (mmap_base() in the kernel's mm/util.c)."""
    launch = ground.launch("--serve")

    def start() -> str:
        resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with running(launch) as started:
            return repr(proc.limits(started.pid)["STACK"])

    assert in_child(start) == repr((8 << 20, 8 << 20))
    ground.forget(launch)


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_limit_of_the_caller_that_is_none_of_the_plans_does_not_end_the_guest(ground: Ground, name: str) -> None:
    """A shell's `ulimit -t` is meant for what is typed in it, not for a guest that runs for a year."""
    launch = ground.launch("--serve")

    def start() -> str:
        resource.setrlimit(LIMITS[name], (1 << 30, resource.RLIM_INFINITY))
        with running(launch) as started:
            return repr(proc.limits(started.pid)[name])

    assert in_child(start) == repr((-1, -1))
    ground.forget(launch)


def test_umask_of_the_caller_changes_no_mode(ground: Ground) -> None:
    launch = ground.launch("--serve")

    def start() -> str:
        os.umask(0o777)
        with running(launch) as started:
            null = os.stat(f"/proc/{started.pid}/root/dev/null").st_mode & 0o777
            top = os.stat(f"/proc/{started.pid}/root").st_mode & 0o777
            dev = os.stat(f"/proc/{started.pid}/root/dev").st_mode & 0o777
            return f"{null:o} {top:o} {dev:o}"

    assert in_child(start) == "666 755 755"
    ground.forget(launch)


def test_signals_that_the_caller_ignores_or_blocks_are_not_ignored_by_the_jail() -> None:
    """With SIGCHLD ignored the jail would not learn how its children ended."""
    code = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
for number in range(1, 32):
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_IGN)
from depriv.spawn import Jail
with Jail() as jail:
    print(open(f"/proc/{jail._pid}/status").read(), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    status = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    assert int(status["SigBlk"], 16) == 0
    # Python itself ignores two.
    assert int(status["SigIgn"], 16) & ~(1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) & 0x7FFFFFFF == 0


# The end of either


def test_what_a_program_said_last_is_there_when_the_toolstack_comes_to_read_it(ground: Ground) -> None:
    """The FIFO's content goes with its last descriptor: the jail keeps one until it is released."""
    ground.program = compiled(ground.folder, "last", LAST_WORDS)
    launch = ground.launch()
    with Jail() as jail:
        started = jail.launch(launch.plan, timeout_s=TIMEOUT_S)
        assert wait_for(lambda: not proc.threads(started.pid) or proc.read_status(started.pid)["State"][0] in "ZX")
        time.sleep(0.2)
        with Log(f"{launch.directory}/log") as log:
            assert log.text() == "last words"
        os.close(started.pidfd)
    ground.forget(launch)


def test_jail_that_is_stopped_does_not_hold_the_toolstack_for_ever(ground: Ground) -> None:
    before = ground.snapshot()
    jail = Jail()
    pid = jail._pid
    os.kill(pid, signal.SIGSTOP)
    rescue = threading.Timer(40, os.kill, (pid, signal.SIGCONT))  # where this fails, it ends all the same
    rescue.start()
    begun = time.monotonic()
    with jail:
        pass
    assert time.monotonic() - begun < 25
    rescue.cancel()
    rescue.join()
    assert ground.snapshot() == before
