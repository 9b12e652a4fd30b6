# SPDX-License-Identifier: Apache-2.0
"""Our system call filter by itself, loaded by the jail's own function: of root with every capability it refuses all
that it lists, and nothing else. What it adds to the whole jail is in test_attacks.py.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.jail.test_attacker_unconfined import APART, ROOT_MAY
from tests.jail.test_attacks import FILTER_ALONE, FILTERED_TOO, of_network
from tests.support import build
from tests.support.launch import ALLOW_ALL, running, with_filter
from tests.support.linux import cache_directory

import depriv
from depriv import seccomp, steps
from depriv.errors import JailError
from depriv.proc import read_status

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.support.launch import Ground

pytestmark = pytest.mark.root

SOURCE = str(Path(depriv.__file__).parents[1])
OWN = seccomp.program(os.uname().machine, network=False)
NETWORK = seccomp.program(os.uname().machine, network=True)
FILTERED = {*FILTER_ALONE, *FILTERED_TOO.split()}

# Starts a victim, loads the filter, executes the attacker. 1: the source folder, 2: the filter, 3...: the command.
LOADER = """
import os, sys
sys.path.append(sys.argv[1])
from depriv import steps
from depriv.jail import apply
program, *words = sys.argv[3:]
victim = os.posix_spawn(program, [program, "--serve"], {})
apply.load_filter(steps.Filter(program=sys.argv[2]), None)
os.execve(program, [program, "--victim", str(victim), *words], {})
"""

# A tap is made, then the filter loaded; what the tap's descriptor can still be asked to do. <linux/if_tun.h>
TAP = """
import errno, fcntl, os, struct, sys
sys.path.append(sys.argv[1])
from depriv import steps
from depriv.jail import apply
fd = os.open("/dev/net/tun", os.O_RDWR)
named = struct.pack("16sH22x", b"tap0", 0x5002)
fcntl.ioctl(fd, 0x400454CA, named)
apply.load_filter(steps.Filter(program=sys.argv[2]), None)
address = struct.pack("16sH6s16x", b"tap0", 1, b"\\x00\\x16\\x3e\\x00\\x00\\x01")
for name, request, argument in (
    ("TUNGETIFF", 0x800454D2, bytes(40)),
    ("TUNGETFEATURES", 0x800454CF, bytes(4)),
    ("TUNSETOFFLOAD", 0x400454D0, 0),
    ("TUNSETSNDBUF", 0x400454D4, struct.pack("i", 1 << 20)),
    ("SIOCSIFHWADDR", 0x8924, address),
    ("TUNSETOWNER", 0x400454CC, 0),
    ("TUNSETGROUP", 0x400454CE, 0),
    ("TUNSETLINK", 0x400454CD, 1),
    ("TUNSETIFF", 0x400454CA, named),
    ("TUNSETPERSIST", 0x400454CB, 1),
):
    try:
        fcntl.ioctl(fd, request, argument)
        print(name, "ok")
    except OSError as error:
        print(name, errno.errorcode[error.errno])
"""

# A server with a listener that it was given, the third word; prints what it still can do with it, and what not.
SERVER = """
import os, socket, sys, threading
sys.path.append(sys.argv[1])
from depriv import steps
from depriv.jail import apply
apply.load_filter(steps.Filter(program=sys.argv[2]), None)
listener = socket.socket(fileno=int(sys.argv[3]))
there = listener.getsockname()
def tried(name, act):
    try:
        act()
        print(name, "ok", flush=True)
    except OSError as error:
        print(name, error.errno, flush=True)
def served():
    client, _ = listener.accept()
    thread = threading.Thread(target=lambda: client.sendall(client.recv(100).upper()))
    thread.start()
    thread.join()
    client.sendmsg([b"!"])
    client.close()
tried("serve", served)
tried("again", served)
tried("socket", lambda: socket.socket())
tried("bind", lambda: listener.bind(("127.0.0.1", 0)))
tried("spawn", lambda: os.posix_spawn("/bin/true", ["true"], {}))
tried("fork", lambda: os.fork() or os._exit(0))
tried("connect", lambda: listener.connect(there))
listener.shutdown(socket.SHUT_RD)
tried("fastopen", lambda: listener.sendto(b"x", 0x20000000, there))
"""


@pytest.fixture(scope="module")
def program() -> Path:
    return build.attacker(cache_directory())


@pytest.fixture
def words(tmp_path: Path) -> Generator[tuple[list[str], list[int]]]:
    """What the attacker is told, and the descriptors that it needs."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4096))
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        disk.open("r+b") as file,
    ):
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        told = ["--path", str(disk), "--socket", str(tmp_path / "socket"), "--abstract", "depriv-none"]
        told += ["--fd", str(file.fileno()), "--listener", str(tcp.fileno())]
        yield told, [file.fileno(), tcp.fileno(), listener.fileno()]


def tried(text: str, program: Path, words: tuple[list[str], list[int]], acts: set[str]) -> tuple[dict[str, str], int]:
    """Return what comes of the acts, all in one process that is root, under this filter; and that process's end."""
    told, fds = words
    wanted = [act for act in build.catalogue(program) if act in acts]
    assert set(wanted) == acts
    argv = [*APART, sys.executable, "-I", "-S", "-c", LOADER, SOURCE, text, str(program), *told, "--only", *wanted]
    done = subprocess.run(argv, pass_fds=fds, check=False, capture_output=True, text=True, timeout=60)
    return {act: outcome.result for act, outcome in build.outcomes(done.stdout).items()}, done.returncode


def test_root_with_every_capability_is_refused_all_that_the_filter_lists(
    program: Path, words: tuple[list[str], list[int]]
) -> None:
    have, status = tried(OWN, program, words, FILTERED - {"int80_getpid"})
    want = dict.fromkeys(FILTERED - {"int80_getpid"}, "EPERM") | {"clone3_one": "ENOSYS"}
    assert have == want
    assert status == 0


def test_the_same_root_may_all_this_under_a_filter_that_allows(
    program: Path, words: tuple[list[str], list[int]]
) -> None:
    """Else the test above would prove nothing."""
    acts = FILTERED & set(ROOT_MAY.split())
    assert len(acts) >= 40
    have, status = tried(ALLOW_ALL, program, words, acts)
    assert have == dict.fromkeys(acts, "ok")
    assert status == 0


def test_what_the_filter_does_not_list_it_does_not_touch(program: Path, words: tuple[list[str], list[int]]) -> None:
    apart = {"setns_victim", "pidfd_getfd_victim", "capset_admin", "environment"}  # it has none here
    acts = set(ROOT_MAY.split()) - FILTERED - apart
    assert tried(OWN, program, words, acts)[0] == dict.fromkeys(acts, "ok")
    # This one gives up what the others need.
    assert tried(OWN, program, words, {"capset_admin"})[0] == {"capset_admin": "ok"}
    # A pidfd can be had, but nothing be done with it.
    have, _ = tried(OWN, program, words, {"setns_victim", "pidfd_getfd_victim"})
    assert set(have.values()) == {"EPERM"}


def test_filter_for_the_hosts_network_leaves_sockets_alone_and_nothing_else(
    program: Path, words: tuple[list[str], list[int]]
) -> None:
    spared = {act for act in FILTERED & set(ROOT_MAY.split()) if of_network(act)}
    assert tried(NETWORK, program, words, spared)[0] == dict.fromkeys(spared, "ok")
    rest = {act for act in FILTERED if not of_network(act)} - {"int80_getpid", "clone3_one"}
    assert tried(NETWORK, program, words, rest)[0] == dict.fromkeys(rest, "EPERM")


@pytest.mark.parametrize("text", [OWN, NETWORK], ids=["closed", "network"])
def test_call_by_the_32_bit_entry_ends_the_process(
    text: str, program: Path, words: tuple[list[str], list[int]]
) -> None:
    have, status = tried(text, program, words, {"int80_getpid"})
    assert have == {"int80_getpid": "killed"}
    assert status == -signal.SIGSYS  # as unshare(1) hands it on
    have, status = tried(ALLOW_ALL, program, words, {"int80_getpid"})
    assert have["int80_getpid"] in ("ok", "killed")  # a kernel without that entry: SIGSEGV
    assert status in (0, -signal.SIGSEGV)


def server(text: str) -> dict[str, str]:
    """Return what a server under this filter could do, having served two clients."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        argv = [sys.executable, "-I", "-S", "-c", SERVER, SOURCE, text, str(fd)]
        with subprocess.Popen(argv, pass_fds=[fd], stdout=subprocess.PIPE, text=True) as process:
            for _ in range(2):
                with socket.create_connection(listener.getsockname(), timeout=20) as client:
                    client.sendall(b"hello")
                    assert client.makefile("rb").read() == b"HELLO!"
            said, _ = process.communicate(timeout=20)
    return dict(line.split() for line in said.splitlines())


def test_listener_that_is_handed_in_serves_and_can_be_turned_nowhere_else() -> None:
    """With shutdown(2) and MSG_FASTOPEN a listener connects without connect(2): found when the filter was reviewed."""
    refused = ("socket", "bind", "spawn", "fork", "connect", "fastopen")
    assert server(OWN) == {"serve": "ok", "again": "ok", **dict.fromkeys(refused, str(errno.EPERM))}
    # To itself: refused by who is there, not by the filter.
    assert server(ALLOW_ALL)["fastopen"] == str(errno.ECONNREFUSED)


@pytest.mark.parametrize("text", [OWN, NETWORK, ALLOW_ALL], ids=["own", "network", "control"])
def test_descriptor_of_a_tap_changes_nothing_of_the_hosts_interface(text: str) -> None:
    words = ["unshare", "--net", sys.executable, "-I", "-S", "-c", TAP, SOURCE, text]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
    said = dict(line.split(" ") for line in done.stdout.splitlines())
    # What QEMU does with a tap that it is handed: net/tap-linux.c, QEMU 7.2.
    assert {said.pop(name) for name in ("TUNGETIFF", "TUNGETFEATURES", "TUNSETOFFLOAD", "TUNSETSNDBUF")} == {"ok"}
    control = text == ALLOW_ALL
    # The kernel itself refuses to attach once more (EINVAL) and another kind of link while it is up.
    for name in ("SIOCSIFHWADDR", "TUNSETPERSIST", "TUNSETOWNER", "TUNSETGROUP"):
        assert said.pop(name) == ("ok" if control else "EPERM")
    assert set(said) == {"TUNSETIFF", "TUNSETLINK"}
    assert ("EPERM" in said.values()) != control


def test_jail_loads_one_filter_that_every_thread_has_for_good(ground: Ground) -> None:
    launch = ground.launch("--threads")
    with running(launch) as started:
        for name in os.listdir(f"/proc/{started.pid}/task"):
            status = read_status(int(name))
            assert (status["Seccomp"], status["Seccomp_filters"], status["NoNewPrivs"]) == ("2", "1", "1")
    ground.forget(launch)


@pytest.mark.parametrize(
    "text", ["", "06", "00" * 8, "0600000000000" + "0ff7f0", "zz", "06000000" + "0000ff7f" * 5000], ids=len
)
def test_filter_that_the_kernel_does_not_take_is_no_start(ground: Ground, text: str) -> None:
    launch = with_filter(ground.launch("--serve"), text)
    with pytest.raises(JailError) as caught, running(launch):
        pass
    assert "seccomp filter" in caught.value.step
    assert ground.snapshot().processes == ()
    ground.forget(launch)


def test_plan_without_a_filter_is_refused_by_the_jail_itself(ground: Ground) -> None:
    launch = ground.launch("--serve")
    rest = tuple(step for step in launch.plan.steps if not isinstance(step, steps.Filter))
    with (
        pytest.raises(JailError, match="check the plan") as caught,
        running(launch.replace(plan=launch.plan.replace(steps=rest))),
    ):
        pass
    assert "Filter exactly once" in caught.value.cause
    ground.forget(launch)
