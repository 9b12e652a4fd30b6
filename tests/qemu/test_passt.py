# SPDX-License-Identifier: Apache-2.0
"""QEMU's user-mode network through passt: the guest gets it, QEMU itself gets none, and neither outlives the other."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from tests.support import linux
from tests.support.guests import DOMIDS, CommandLine, await_end, compiled
from tests.support.host import living, need
from tests.support.network import own_network

from depriv import cgroup, collect, detect, proc
from depriv.identity import tool_domid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BOOT_S = 120.0
QEMU = ("qemu-system-x86_64", "-display", "none", "-m", "64", "-monitor", "none")
NET = ("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile=")


@pytest.fixture(autouse=True)
def network(uids: range) -> Iterator[None]:
    """Have the test in a network of its own, with passt; afterwards no tool of any domain of these tests is left."""
    need(shutil.which("passt") is not None, what="passt")
    base = uids.start - DOMIDS.start
    with own_network():
        yield
    assert living(range(base + tool_domid(DOMIDS[-1]), base + tool_domid(DOMIDS[0]) + 1)) == ()


@pytest.fixture(scope="module")
def kernel() -> linux.LinuxGuest:
    """Return a guest: fetched before the test is in a network of its own, which leads nowhere."""
    return linux.linux_guest()


class Run:
    """A `depriv run` that goes on, with pipes for its terminal."""

    def __init__(self, depriv: CommandLine, name: str, *words: str) -> None:
        self.depriv = depriv
        self.name = name
        self.process = subprocess.Popen(
            depriv.argv("run", "--name", name, "--", *QEMU, *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.heard = b""

    def await_running(self) -> dict[str, Any]:
        """Return its entry once it is complete."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            for folder in os.listdir(f"{self.depriv.state_dir}/domains"):
                with open(f"{self.depriv.state_dir}/domains/{folder}/state.json", encoding="utf-8") as file:
                    entry = json.load(file)
                if entry["name"] == self.name and entry["state"] == "running" and entry["tools"]:
                    assert isinstance(entry, dict)
                    return entry
            time.sleep(0.02)
        raise AssertionError(self.read_rest())

    def read_rest(self) -> str:
        assert self.process.stdout is not None
        return (self.heard + self.process.stdout.read()).decode(errors="replace")

    def wait_for(self, text: str, within_s: float = 30.0) -> str:
        """Return all it has said, once ``text`` is in what came since the last call."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + within_s
        begun = len(self.heard)
        while text.encode() not in self.heard[begun:]:
            left = deadline - time.monotonic()
            assert left > 0, self.heard.decode(errors="replace")
            if select.select([self.process.stdout], [], [], left)[0]:
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, self.heard.decode(errors="replace")
                self.heard += data
        return self.heard[begun:].decode(errors="replace")

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait(10)
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()


@contextmanager
def running(depriv: CommandLine, name: str, *words: str) -> Iterator[Run]:
    made = Run(depriv, name, *words)
    try:
        yield made
    finally:
        made.close()


def _audit(depriv: CommandLine, name: str, expect: int = 0) -> dict[str, str]:
    """Return the checks that do not hold."""
    said = json.loads(depriv.run("audit", name, "--json", expect=expect).stdout)
    reports = said if isinstance(said, list) else [said]
    assert any(check["id"].startswith("passt.") for report in reports for check in report["checks"])
    return {check["id"]: check["have"] for report in reports for check in report["checks"] if not check["holds"]}


def _line(peer: socket.socket) -> bytes:
    """Return the first line that comes."""
    with peer.makefile("rb") as file:
        return file.readline()


def _only_loopback(pid: int) -> bool:
    """Tell whether a process's network namespace has nothing but a loopback that nothing went through."""
    with open(f"/proc/{pid}/net/dev", encoding="ascii") as file:
        lines = file.read().splitlines()[2:]
    return len(lines) == 1 and lines[0].split()[0] == "lo:" and lines[0].split()[1] == "0"


def test_linux_guest_reaches_the_host_and_is_reached_and_qemu_is_in_no_network(
    depriv: CommandLine, kernel: linux.LinuxGuest
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_server(("127.0.0.1", 0)) as free:
        forward = free.getsockname()[1]
    port = listener.getsockname()[1]
    words = ["-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{forward}-:2222"]
    words += ["-device", "virtio-net-pci,netdev=n,romfile="]
    # The control: the same network, but for nobody outside.
    words += ["-netdev", "user,id=m,net=10.0.3.0/24,restrict=on", "-device", "virtio-net-pci,netdev=m,romfile="]
    words += ["-kernel", kernel.kernel, "-initrd", kernel.initramfs, "-append", linux.command_line("shell")]
    with listener, running(depriv, "net", *words, "-m", "192", "-serial", "stdio") as run:
        listener.settimeout(30)
        run.wait_for(linux.PROMPT.strip(), BOOT_S)
        run.type("ip link set eth0 up; ip link set eth1 up")
        run.type("udhcpc -n -q -i eth0 2>&1; udhcpc -n -q -i eth1 2>&1; echo D''ONE")
        said = run.wait_for("DONE")
        assert "lease of 10.0.2.15 obtained" in said
        assert "lease of 10.0.3.15 obtained" in said
        run.type("ip addr add 10.0.2.15/24 dev eth0; ip addr add 10.0.3.15/24 dev eth1; echo D''ONE")
        run.wait_for("DONE")
        # With a timeout: the end of a connection may come late, or never, through a passt of 2022.
        # Out: 10.0.2.2 is the host's loopback, as it is with QEMU's own.
        run.type(f"echo from the guest | timeout 20 nc -w 10 10.0.2.2 {port}; echo D''ONE")
        peer, _ = listener.accept()
        with peer:
            assert _line(peer) == b"from the guest\n"
            peer.sendall(b"from the host\n")
        assert "from the host" in run.wait_for("DONE")
        # In.
        run.type("(sleep 8; echo from inside; sleep 2) | nc -l -p 2222; echo D''ONE")
        time.sleep(3)  # the guest listens by then
        with socket.create_connection(("127.0.0.1", forward), timeout=20) as inside:
            inside.sendall(b"from outside\n")
            assert _line(inside) == b"from inside\n"
        assert "from outside" in run.wait_for("DONE")
        # The one that is restricted reaches nothing.
        run.type(f"echo from the cage | nc -w 3 10.0.3.2 {port}; echo D''ONE")
        run.wait_for("DONE")
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()
        entry = run.await_running()
        assert _only_loopback(entry["expected"]["pid"])
        assert not _only_loopback(entry["tools"][0]["pid"])
        assert _audit(depriv, "net") == {}
    assert depriv.rows() == []


def test_passt_and_its_cgroup_are_the_domains_and_end_with_it(depriv: CommandLine) -> None:
    with running(depriv, "net", *NET, "-serial", "null") as run:
        entry = run.await_running()
        (tool,) = entry["tools"]
        assert len({tool["uid"], entry["uid"]}) == 2
        assert cgroup.members(f"{entry['cgroup']}/passt0") == (tool["pid"],)
        assert collect._has_domain(tool["pid"])
        depriv.run("gc")
        assert _audit(depriv, "net") == {}
    assert await_end(tool["pid"])
    assert not os.path.exists(entry["cgroup"])


def test_killed_run_takes_qemu_and_passt_with_it_and_gc_the_rest(depriv: CommandLine) -> None:
    run = Run(depriv, "net", *NET, "-serial", "null")
    entry = run.await_running()
    run.process.kill()
    assert await_end(entry["expected"]["pid"])
    assert await_end(entry["tools"][0]["pid"])
    run.close()
    assert "cleared" in depriv.run("gc").stdout
    assert not os.path.exists(entry["cgroup"])


def test_killed_passt_leaves_the_guest_running_and_the_audit_says_so(depriv: CommandLine) -> None:
    with running(depriv, "net", *NET, "-serial", "null") as run:
        entry = run.await_running()
        os.kill(entry["tools"][0]["pid"], signal.SIGKILL)
        assert await_end(entry["tools"][0]["pid"])
        assert _audit(depriv, "net", expect=1) == {"passt.alive": "dead"}
        assert run.process.poll() is None
        assert [row["state"] for row in depriv.rows()] == ["running"]


@pytest.mark.parametrize("stopped", [False, True], ids=["plays along", "stopped"])
def test_daemonized_domain_is_destroyed_with_its_passt(depriv: CommandLine, stopped: bool) -> None:
    depriv.run("run", "--name", "net", "--", *QEMU, *NET, "-daemonize", "-serial", "null")
    (row,) = depriv.rows()
    with open(f"{depriv.state_dir}/domains/{row['domid']}/state.json", encoding="utf-8") as file:
        pid = json.load(file)["tools"][0]["pid"]
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    depriv.run("destroy", "net")
    assert await_end(pid, within_s=2)
    assert depriv.rows() == []


def test_host_with_no_way_out_starts_no_guest_and_says_what_to_do(depriv: CommandLine) -> None:
    with own_network(route=False):
        done = depriv.run("run", "--", *QEMU, *NET, expect=125)
    assert "error: passt did not start" in done.stderr
    assert "External interface not usable" in done.stderr
    assert "  fix: passt takes the host's default route for its own" in done.stderr
    assert depriv.rows() == []


def test_port_that_is_taken_starts_no_guest_and_says_which(depriv: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ("-nic", f"user,hostfwd=tcp:127.0.0.1:{port}-:22")
        done = depriv.run("run", "--", *QEMU, *words, expect=125)
    assert f"127.0.0.1/{port}:22" in done.stderr
    assert "ss -ltnup" in done.stderr
    assert depriv.rows() == []


_HOSTILE = r"""
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "--version"))
		return 0;
	for (long count = 0; count < 4000000; count++)
		write(2, "\033[31mI print without end\n", 25);
	return argc > 1 ? 7 : 0;
}
"""


def test_passt_that_prints_megabytes_and_ends_is_an_error_of_a_few_lines(
    uids: range, unchanged: None, tmp_path: Path
) -> None:
    del uids, unchanged
    program = compiled(tmp_path, "passt", _HOSTILE)
    real = detect.fastest_build(os.path.realpath("/usr/bin/passt"))
    depriv = CommandLine(bind=(str(program), real))
    try:
        done = depriv.run("run", "--", *QEMU, *NET, expect=125)
        assert "error: passt did not start: it ended" in done.stderr
        assert "I print without end" in done.stderr
        assert "\033" not in done.stderr
        assert len(done.stderr) < 10000
        assert depriv.rows() == []
    finally:
        depriv.close()


def test_plan_says_that_passt_is_started_and_starts_none(depriv: CommandLine) -> None:
    before = {process.pid for process in proc.processes()}
    said = depriv.run("plan", "--", *QEMU, *NET).stdout
    assert "start passt --address 10.0.2.15" in said
    assert not [process for process in proc.processes() if process.pid not in before and "passt" in process.name]
