# SPDX-License-Identifier: Apache-2.0
"""`depriv run` as its caller meets it: questions, names, and odd callers."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import shutil
import socket
import string
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.host import need
from tests.support.lines import argv_in, free_port
from tests.support.runs import PATIENCE_S, QEMU, QUIET, asked, await_running, nothing_is_left, started

import depriv as depriv_package

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.guests import CommandLine

pytestmark = [pytest.mark.qemu, pytest.mark.root]

WRITE_16_TO_F4 = bytes.fromhex("b010e6f4f4ebfd").ljust(510, b"\0") + b"\x55\xaa"


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
