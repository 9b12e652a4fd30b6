# SPDX-License-Identifier: Apache-2.0
"""`depriv run` as its caller meets it: streams, signals, terminal, status, names, questions; and odd callers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import pwd
import select
import shutil
import signal
import socket
import string
import subprocess
import tempfile
import termios
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.guests import await_end
from tests.support.host import need
from tests.support.lines import argv_in, free_port, running

import depriv as depriv_package

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.guests import CommandLine

pytestmark = [pytest.mark.qemu, pytest.mark.root]

QEMU = "qemu-system-x86_64"
QUIET = ("-m", "32", "-nic", "none", "-nodefaults", "-display", "none")
PATIENCE_S = 20.0
WRITE_16_TO_F4 = bytes.fromhex("b010e6f4f4ebfd").ljust(510, b"\0") + b"\x55\xaa"


def await_running(depriv: CommandLine, process: subprocess.Popen[Any] | None = None) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while not (entry := running(depriv)):
        assert process is None or process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, "it does not run"
        time.sleep(0.01)
    return entry


@contextlib.contextmanager
def started(depriv: CommandLine, *words: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start `depriv run -- QEMU WORDS`; it is ended if it has not by itself."""
    process = subprocess.Popen(depriv.argv("run", "--", QEMU, *words), **{"stdin": subprocess.DEVNULL, **streams})
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def asked(depriv: CommandLine, *words: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    argv = depriv.argv("run", "--", QEMU, *words)
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, **keywords)


def nothing_is_left(depriv: CommandLine) -> bool:
    return os.listdir(f"{depriv.state_dir}/domains") == []


# Questions


@pytest.mark.parametrize(
    "words",
    ["-version", "--version", "-help", "-device help", "-machine ?", "-M q35,help", "-cpu help", "-accel help",
     "-device virtio-blk-pci,help", "-netdev help", "-chardev help", "-object help", "-d help", "-boot help",
     "-nographic -drive format=help", "-tpmdev help", "-trace help"],
)  # fmt: skip
def test_question_is_answered_as_qemu_answers_it(depriv: CommandLine, words: str) -> None:
    argv = [QEMU, "-display", "none", *words.split()]
    bare = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    done = asked(depriv, *words.split())
    assert (done.returncode, done.stdout, done.stderr) == (bare.returncode, bare.stdout, bare.stderr)
    assert nothing_is_left(depriv)


def test_who_answers_a_question_is_nobody_with_nothing_to_gain(depriv: CommandLine) -> None:
    # The list is more than a pipe holds: it waits.
    with started(depriv, "-trace", "help", stdout=subprocess.PIPE, extra_groups=[1, 2]) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], (), (), PATIENCE_S)[0]
        with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        process.stdout.read()
    assert status["Name"].startswith("qemu-system")
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"65534"}
    assert status["Groups"].strip() == ""
    assert (status["NoNewPrivs"], int(status["CapEff"], 16), int(status["CapPrm"], 16)) == ("1", 0, 0)


def test_question_to_what_is_no_qemu_is_an_error(depriv: CommandLine, tmp_path: Path) -> None:
    script = tmp_path / "qemu-system-x86_64"
    script.write_text("#!/bin/sh\nid -u\n")
    script.chmod(0o755)
    argv = depriv.argv("run", "--", str(script), "-version")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 125
    assert done.stdout == ""
    assert "is not a program but a script" in done.stderr


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


# Names


def test_two_of_one_name_at_once_both_run_under_names_of_their_own(depriv: CommandLine) -> None:
    with started(depriv, *QUIET, "-name", "vm") as one, started(depriv, *QUIET, "-name", "vm") as other:
        deadline = time.monotonic() + PATIENCE_S
        while len(rows := [row for row in depriv.rows() if row["state"] == "running"]) < 2:
            assert time.monotonic() < deadline
        names = sorted(row["name"] for row in rows)
        assert names[0] == "vm"
        assert names[1].startswith("vm-")
        for process in (one, other):
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
    assert nothing_is_left(depriv)


def test_name_that_is_asked_for_and_taken_is_refused(depriv: CommandLine) -> None:
    with started(depriv, *QUIET, "-name", "vm"):
        await_running(depriv)
        done = depriv.run("run", "--name", "vm", "--", QEMU, *QUIET, expect=2)
        assert "a domain named 'vm' exists" in done.stderr
    depriv.run("gc")


@pytest.mark.parametrize("name", ["../x", "a/b", "a b", "x" * 200, "ünï", "--", "a\nb", "12"])
def test_name_of_qemus_that_is_none_for_a_domain_does_not_keep_it_from_running(depriv: CommandLine, name: str) -> None:
    with started(depriv, *QUIET, "-name", f"guest={name}") as process:
        entry = await_running(depriv, process)
        assert set(entry["name"]) <= set(string.ascii_letters + string.digits + "-._+"), entry["name"]
        assert not entry["name"].isdecimal()
        assert [row["pid"] for row in depriv.rows()] == [entry["expected"]["pid"]]
        depriv.run("audit", str(entry["domid"]))
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


def test_name_that_is_asked_for_and_no_name_is_refused(depriv: CommandLine) -> None:
    for name in ("../x", "12", "a b", "-x", "x" * 100):
        done = depriv.run("run", f"--name={name}", "--", QEMU, *QUIET, expect=2)
        assert f"--name {name!r} is no name for a domain" in done.stderr


# Odd callers and hosts


def test_port_that_is_in_use_is_named(depriv: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = asked(depriv, *QUIET, "-serial", f"tcp:127.0.0.1:{port},server=on,wait=off")
    assert done.returncode == 125
    assert f"cannot listen on TCP 127.0.0.1:{port}" in done.stderr
    assert "ss -ltnp" in done.stderr
    assert nothing_is_left(depriv)


@pytest.mark.parametrize("many", [300, 1500])
def test_caller_with_many_descriptors_has_its_line_run(depriv: CommandLine, many: int, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need(hard >= 2 * many, what="descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * many), hard))
    with contextlib.ExitStack() as kept:
        kept.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        ends = [kept.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(many)]
        ends[-1].bind(str(tmp_path / "m"))
        ends[-1].listen()
        passed = [end.fileno() for end in ends]
        words = (
            "-chardev",
            f"socket,id=m,fd={passed[-1]},server=on,wait=off",
            "-mon",
            "m",
            "-serial",
            f"file:{tmp_path}/s",
        )
        with started(depriv, *QUIET, *words, pass_fds=passed) as process:
            entry = await_running(depriv, process)
            depriv.run("audit", entry["name"])
            process.terminate()
            assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(("file", "status"), [("", 0), ("disk.raw", 2)])
def test_removed_folder_is_no_hindrance_but_to_relative_paths(
    depriv: CommandLine, tmp_path: Path, file: str, status: int
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    words = (*QUIET, *(("-drive", f"file={file},format=raw") if file else ("-version",)))
    enter = argv_in(gone, depriv, "run", "--", QEMU, *words)
    script = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    enter[enter.index(f"--wd={gone}")] = "--wd=."
    argv = ["sh", "-c", script, "sh", str(gone), *enter]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    if file:
        assert "the current folder has been removed" in done.stderr


@pytest.fixture
def as_nobody() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Return what runs depriv as nobody, by the system's own Python, from a copy that everybody can read."""
    python = "/usr/bin/python3"
    need(os.access(python, os.X_OK), what="python3")
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        source = os.path.dirname(str(depriv_package.__file__))
        shutil.copytree(source, f"{name}/depriv", ignore=shutil.ignore_patterns("__pycache__"))
        environment = {"PYTHONPATH": name, "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [python, "-m", "depriv.cli", *words],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
                env=environment,
                cwd="/",
                user=nobody.pw_uid,
                group=nobody.pw_gid,
                extra_groups=[],
            )

        yield run


def test_who_is_not_root_may_plan_and_ask_but_not_run(
    uids: range, as_nobody: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    del uids  # the users are there
    planned = as_nobody("plan", "--", QEMU, *QUIET)
    assert planned.returncode == 0, planned.stderr
    assert "would run as" in planned.stdout
    answered = as_nobody("run", "--", QEMU, "-version")
    assert (answered.returncode, answered.stdout[:13]) == (0, "QEMU emulator"), answered.stderr
    refused = as_nobody("run", "--", QEMU, *QUIET)
    assert refused.returncode == 125
    assert "only root can run a confined QEMU" in refused.stderr
    assert "sudo" in refused.stderr


def test_user_is_named_or_is_a_uid_that_is_somebodys(depriv: CommandLine) -> None:
    games = pwd.getpwnam("games")  # a system's user: refused, and by its name
    for option, value in (("--user", "games"), ("--user", str(games.pw_uid)), ("--uid", str(games.pw_uid))):
        done = depriv.run("plan", option, value, "--", QEMU, *QUIET, expect=125)
        assert "device_model_user 'games'" in done.stderr
    for number in ("4294967297", "99999999999999999999", "3999999"):
        done = depriv.run("plan", "--uid", number, "--", QEMU, *QUIET, expect=2)
        assert f"uid {number} is nobody's" in done.stderr
        assert "useradd" in done.stderr


@pytest.mark.parametrize("word", ["a/../b", "..", "", "\x01", "//"])
def test_no_odd_path_gets_past(depriv: CommandLine, word: str, tmp_path: Path) -> None:
    done = asked(depriv, *QUIET, "-drive", f"file={word},format=raw,if=virtio", cwd=tmp_path)
    assert done.returncode in (1, 2, 125), done
    assert "Traceback" not in done.stderr
    assert nothing_is_left(depriv)


def test_guest_ends_qemu_with_its_own_status(depriv: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "boot").write_bytes(WRITE_16_TO_F4)
    words = ("-drive", f"file={tmp_path}/boot,format=raw", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04")
    done = asked(depriv, *QUIET, *words)
    assert (done.returncode, done.stderr) == (33, "")
    assert nothing_is_left(depriv)


def test_line_without_a_program_or_dashes_says_how(depriv: CommandLine) -> None:
    for words in (("run",), ("run", "--"), ("run", QEMU, "-m", "64")):
        done = depriv.run(*words, expect=2)
        assert "Traceback" not in done.stderr
        assert "--" in done.stderr


def test_vnc_port_is_free_again_at_once(depriv: CommandLine) -> None:
    port = free_port()
    for _ in range(2):
        with started(depriv, *QUIET, "-device", "VGA", "-vnc", f"127.0.0.1:{port - 5900}") as process:
            entry = await_running(depriv, process)
            with socket.create_connection(("127.0.0.1", port)) as viewer:
                assert viewer.recv(12).startswith(b"RFB 003")
                assert "FAIL" not in depriv.run("audit", entry["name"]).stdout
            process.terminate()
            assert process.wait(PATIENCE_S) == 0


def test_plan_of_a_line_names_what_is_opened_and_touches_nothing(depriv: CommandLine, tmp_path: Path) -> None:
    disk = tmp_path / "d.raw"
    disk.write_bytes(bytes(1 << 20))
    words = (*QUIET, "-drive", f"file={disk},format=raw", "-qmp", f"unix:{tmp_path}/q,server=on,wait=off")
    data = json.loads(depriv.run("plan", "--json", "--", QEMU, *words).stdout)
    opened = [step for step in data["steps"] if step.get("path") == str(disk)]
    assert [step["access"] for step in opened] == ["rw"]
    assert list(tmp_path.iterdir()) == [disk]
    assert nothing_is_left(depriv)
