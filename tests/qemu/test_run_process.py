# SPDX-License-Identifier: Apache-2.0
"""`depriv run` as a process: its status, signals at any moment, its streams, and its terminal."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import termios
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import await_end
from tests.support.host import need
from tests.support.lines import running
from tests.support.runs import PATIENCE_S, QEMU, QUIET, asked, await_running, nothing_is_left, started

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.guests import CommandLine

pytestmark = [pytest.mark.qemu, pytest.mark.root]

# `depriv`, which gets SIGTERM in the middle of the WHEN-th entry into a context manager that is a generator, counted
# from when a domain's place is sought: behind the generator's `yield`, before `__enter__` has returned.
ENDED_WHILE_ENTERING = """
import contextlib, os, signal, sys
from depriv import cli, lifecycle

left = int(sys.argv.pop(1))
sought = False

def seen(frame, event, what):
    global left, sought
    sought = sought or frame.f_code is lifecycle.start.__code__
    entering = frame.f_code is contextlib._GeneratorContextManager.__enter__.__code__
    if sought and entering and event == "c_return" and what is next:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

sys.setprofile(seen)
cli.run()
"""


# Status and signals


def test_status_of_a_qemu_that_a_signal_kills_is_a_shells(depriv: CommandLine) -> None:
    with started(depriv, *QUIET) as process:
        entry = await_running(depriv)
        while depriv.rows()[0]["state"] != "running":  # a QEMU that ends sooner is a start that failed
            assert process.poll() is None
        os.kill(entry["expected"]["pid"], signal.SIGKILL)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGKILL
    assert nothing_is_left(depriv)


def test_qemu_that_refuses_its_words_says_so_and_leaves_nothing(depriv: CommandLine) -> None:
    done = asked(depriv, *QUIET, "-device", "virtio-blk-pci,drive=none-such")
    assert done.returncode == 125
    assert "none-such" in done.stderr
    assert "error: QEMU did not start" in done.stderr
    assert nothing_is_left(depriv)


@pytest.mark.parametrize("after_s", [0, 0.03, 0.06, 0.09, 0.12, 0.15, 0.2])
def test_sigterm_in_the_middle_of_a_start_undoes_it(depriv: CommandLine, after_s: float) -> None:
    with started(depriv, *QUIET, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + PATIENCE_S
        while nothing_is_left(depriv):
            assert time.monotonic() < deadline
        time.sleep(after_s)
        process.terminate()
        _, said = process.communicate(timeout=PATIENCE_S)
    # It may have run already: then the signal was QEMU's, which ends by it with 0.
    assert process.returncode in (128 + signal.SIGTERM, 0), said
    assert b"Traceback" not in said
    assert nothing_is_left(depriv)


@pytest.mark.parametrize(
    ("calls", "path", "when"),
    [
        *(("mkdir", "", when) for when in (1, 2, 3)),
        *(("flock", "", when) for when in range(1, 5)),
        *(("rename", "", when) for when in range(1, 8)),
        *(("close", "/run/depriv/lock", when) for when in (1, 2, 3)),
    ],
)
def test_sigterm_behind_any_step_of_a_reservation_undoes_it(
    depriv: CommandLine, calls: str, path: str, when: int
) -> None:
    """Between two steps, that is, where no `try` of either is at work."""
    strace = shutil.which("strace")
    need(strace is not None, what="strace")
    argv = [str(strace), "-qq", "-o", "/dev/null", *(["-P", path] if path else []), "-e", f"trace={calls}"]
    argv += ["-e", f"inject={calls}:signal=SIGTERM:when={when}", *depriv.argv("run", "--", QEMU, *QUIET)]
    # Else the interpreter, which writes what it has compiled, makes folders and renames files, too.
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        argv, env=environ, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert nothing_is_left(depriv)


@pytest.mark.parametrize("when", range(1, 8))
def test_sigterm_that_comes_as_a_lock_was_taken_undoes_it(depriv: CommandLine, when: int) -> None:
    """Or anything else that a ``with`` is to give back, but does not know of yet: nobody may wait for it for ever."""
    argv = depriv.argv("run", "--", QEMU, *QUIET)
    module = argv.index("-m")
    argv[module : module + 2] = ["-c", ENDED_WHILE_ENTERING, str(when)]
    begun = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert nothing_is_left(depriv)
    assert time.monotonic() - begun < 5


def test_qemu_dies_with_a_depriv_that_is_killed_and_gc_clears_up(depriv: CommandLine, tmp_path: Path) -> None:
    monitor = tmp_path / "m"
    with started(
        depriv, *QUIET, "-monitor", f"unix:{monitor},server=on,wait=off", "-pidfile", f"{tmp_path}/p"
    ) as process:
        entry = await_running(depriv)
        process.kill()
        process.wait()
    assert await_end(entry["expected"]["pid"])
    depriv.run("gc")
    assert nothing_is_left(depriv)
    assert list(tmp_path.iterdir()) == []
    assert not os.path.exists(entry["cgroup"])


def test_stop_and_continue_reach_qemu(depriv: CommandLine) -> None:
    def state(pid: int) -> str:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(") ")[2][:1]

    def becomes(pid: int, wanted: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while state(pid) not in wanted:
            assert time.monotonic() < deadline, state(pid)
            time.sleep(0.01)

    with started(depriv, *QUIET) as process:
        pid = await_running(depriv)["expected"]["pid"]
        time.sleep(0.2)  # until it waits for QEMU's end, a stop is its own
        process.send_signal(signal.SIGTSTP)
        becomes(pid, "T")
        becomes(process.pid, "T")
        process.send_signal(signal.SIGCONT)
        becomes(pid, "SR")
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


# Streams


def test_input_reaches_qemu_only_once_it_may_run(depriv: CommandLine, tmp_path: Path) -> None:
    """Else a monitor there could let the guest run before the audit; and what is said too early is lost."""
    words = tmp_path / "words"
    words.write_text("info status\nquit\n")
    with words.open("rb") as given:
        done = asked(depriv, *QUIET, "-monitor", "stdio", stdin=given)
    assert done.returncode == 0, done.stderr
    assert "VM status: running" in done.stdout
    assert nothing_is_left(depriv)


def test_much_input_arrives_whole_and_its_end_too(depriv: CommandLine, tmp_path: Path) -> None:
    data = bytes(range(1, 256)) * 1000
    echo = tmp_path / "echo.raw"
    # Sends back what comes in on COM1: xor dx,dx; l: mov ah,2; int 14h; test ah,80h; jnz l; mov ah,1; int 14h; jmp l
    echo.write_bytes(bytes.fromhex("31d2b402cd14f6c48075f7b401cd14ebf1").ljust(510, b"\0") + b"\x55\xaa")
    disk = ("-drive", f"file={echo},format=raw")
    with started(
        depriv, *QUIET, *disk, "-serial", "stdio", "-vga", "none", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        sent, back = 0, b""
        deadline = time.monotonic() + PATIENCE_S
        while len(back) < 2000 and time.monotonic() < deadline:
            readable, writable, _ = select.select([process.stdout], [process.stdin] if sent < len(data) else [], (), 1)
            if writable:
                sent += os.write(process.stdin.fileno(), data[sent : sent + 512])
            if readable:
                back += os.read(process.stdout.fileno(), 4096)
        process.terminate()
    tail = back[back.find(data[:20]) :]
    assert len(tail) > 1000
    assert data.startswith(tail)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_streams_may_be_closed(depriv: CommandLine, closed: tuple[int, ...], tmp_path: Path) -> None:
    shell = " ".join(f"{fd}>&-" for fd in closed)
    words = (*QUIET, "-serial", "stdio", "-qmp", f"unix:{tmp_path}/q,server=on,wait=off")
    argv = ["sh", "-c", f'exec "$@" {shell}', "sh", *depriv.argv("run", "--", QEMU, *words)]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        entry = await_running(depriv)
        depriv.run("audit", entry["name"])
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    assert nothing_is_left(depriv)


def test_reader_of_the_output_that_goes_away_ends_nothing(depriv: CommandLine) -> None:
    with started(depriv, *QUIET, "-serial", "stdio", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        await_running(depriv)
        time.sleep(0.2)
        assert process.poll() is None
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


def test_daemon_holds_none_of_the_callers_streams(depriv: CommandLine, tmp_path: Path) -> None:
    """`$(...)` and a log by pipe wait until the last one has closed them."""
    done = asked(depriv, *QUIET, "-daemonize", "-pidfile", f"{tmp_path}/pid", stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert int((tmp_path / "pid").read_text()) == running(depriv)["expected"]["pid"]
    depriv.run("destroy", running(depriv)["name"])
    assert not (tmp_path / "pid").exists()


def on_a_terminal(argv: list[str]) -> tuple[int, int, int]:
    """Start a command on a terminal of its own; return its pid and both ends of the terminal."""
    leader, follower = pty.openpty()
    pid = os.fork()
    if pid == 0:
        os.login_tty(follower) if hasattr(os, "login_tty") else _login(follower)
        os.execvp(argv[0], argv)
    return pid, leader, follower


def _login(follower: int) -> None:
    import fcntl

    os.setsid()
    fcntl.ioctl(follower, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2):
        os.dup2(follower, fd)


def _drained(leader: int) -> bytes:
    said = b""
    while select.select([leader], (), (), 0.2)[0]:
        said += os.read(leader, 65536)
    return said


@pytest.mark.parametrize("how", ["quit", "kill"])
def test_terminal_is_as_it_was_however_qemu_ends(depriv: CommandLine, how: str) -> None:
    argv = depriv.argv("run", "--", QEMU, "-m", "32", "-nic", "none", "-nographic")
    pid, leader, follower = on_a_terminal(argv)
    try:
        before = termios.tcgetattr(follower)
        entry = await_running(depriv)
        deadline = time.monotonic() + PATIENCE_S
        while termios.tcgetattr(follower) == before:  # raw, so that Ctrl-C is the guest's
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while depriv.rows()[0]["state"] != "running":  # a QEMU that ends sooner is a start that failed
            assert time.monotonic() < deadline
        if how == "quit":
            os.write(leader, b"\x01x")
        else:
            os.kill(entry["expected"]["pid"], signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        pid = 0
        _drained(leader)
        assert os.waitstatus_to_exitcode(status) == (0 if how == "quit" else 128 + signal.SIGKILL)
        assert termios.tcgetattr(follower) == before
        assert os.get_blocking(follower)
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(leader)
        os.close(follower)
    assert nothing_is_left(depriv)


def test_interrupt_from_the_terminal_ends_qemu_as_it_does_alone(depriv: CommandLine) -> None:
    pid, leader, follower = on_a_terminal(depriv.argv("run", "--", QEMU, *QUIET))
    try:
        await_running(depriv)
        time.sleep(0.2)
        os.write(leader, b"\x03")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert b"terminating on signal 2" in _drained(leader)
    finally:
        os.close(leader)
        os.close(follower)
    assert nothing_is_left(depriv)
