# SPDX-License-Identifier: Apache-2.0
"""Programs under QEMU's names, for tools that know nothing of depriv: Ganeti's kvm_path, labgrid's qemu_bin."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.guests import CommandLine, await_end, seeded
from tests.support.lines import running

pytestmark = [pytest.mark.qemu, pytest.mark.root]

DEPRIV = str(Path(sys.executable).parent / "depriv")
QUIET = ("-m", "32", "-nic", "none", "-nodefaults", "-display", "none")


@pytest.fixture
def inside(depriv: CommandLine, tmp_path: Path) -> CommandLine:
    """Return a namespace in which a shim of the real program is, as a tool would call it."""
    seeded(Path(depriv.state_dir))
    enter = depriv.argv()[: depriv.argv().index("--") + 1]
    done = subprocess.run([*enter, DEPRIV, "shim", str(tmp_path / "shim")], capture_output=True, text=True, check=True)
    assert str(tmp_path / "shim/qemu-system-x86_64") in done.stdout.split()
    return depriv


def call(inside: CommandLine, tmp_path: Path, *words: str) -> list[str]:
    enter = inside.argv()[: inside.argv().index("--")]
    return [*enter, f"--wd={tmp_path}", "--", str(tmp_path / "shim/qemu-system-x86_64"), *words]


def asked(inside: CommandLine, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(call(inside, tmp_path, *words), capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("words", ["--version", "--help", "-machine ?", "-M help", "-device ?", "-cpu help"])
def test_shim_answers_as_qemu_does(inside: CommandLine, tmp_path: Path, words: str) -> None:
    bare = ["qemu-system-x86_64", "-display", "none", *words.split()]
    done = asked(inside, tmp_path, *words.split())
    assert done.stdout == subprocess.run(bare, capture_output=True, text=True, check=True, timeout=60).stdout
    assert (done.returncode, done.stderr) == (0, "")


def test_pid_that_the_tool_knows_stays_the_shims(inside: CommandLine, tmp_path: Path) -> None:
    argv = call(inside, tmp_path, *QUIET, "-name", "web1")
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process, contextlib.ExitStack() as kept:
        deadline = time.monotonic() + 20
        while not (entry := running(inside)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        kept.callback(os.kill, entry["toolstack_pid"], signal.SIGKILL)  # whoever that is, if it is not as it should be
        assert entry["toolstack_pid"] == process.pid
        inside.run("audit", "web1")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        kept.pop_all()
    assert await_end(entry["expected"]["pid"])
    assert running(inside) == {}


def test_status_of_a_refused_line_is_no_success(inside: CommandLine, tmp_path: Path) -> None:
    done = asked(inside, tmp_path, *QUIET, "-hda", "nothing.img")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "nothing.img" in done.stderr


def test_ganeti_starts_stopped_in_the_background_and_lets_it_run_by_qmp(inside: CommandLine, tmp_path: Path) -> None:
    sockets = [f"-qmp unix:{tmp_path}/{name},server,nowait" for name in ("qmp", "kvmd")]
    words = f"-name i1 -S -daemonize -pidfile {tmp_path}/pid -monitor unix:{tmp_path}/mon,server,nowait"
    done = asked(inside, tmp_path, *QUIET, *words.split(), *" ".join(sockets).split())
    assert done.returncode == 0, done.stderr
    pid = int((tmp_path / "pid").read_text())
    assert pid == running(inside)["expected"]["pid"]
    (row,) = inside.rows()
    assert (row["name"], row["pid"], row["state"]) == ("i1", pid, "paused")
    with socket.socket(socket.AF_UNIX) as made, made.makefile("rw") as lines:
        made.settimeout(20)
        made.connect(f"{tmp_path}/qmp")
        assert "QMP" in json.loads(lines.readline())
        for command in ("qmp_capabilities", "cont", "quit"):
            lines.write(json.dumps({"execute": command}) + "\n")
            lines.flush()
            while "return" not in json.loads(lines.readline()):
                pass
    assert await_end(pid)
    inside.run("gc")
    assert sorted(os.listdir(tmp_path)) == ["shim"]


def test_words_with_blanks_quotes_and_dashes_arrive_as_they_are(inside: CommandLine, tmp_path: Path) -> None:
    name = 'it\'s a "name" -- $HOME *'
    argv = call(inside, tmp_path, *QUIET, "-append", name, "-kernel", "no such kernel")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "cannot use" in done.stderr
    assert f"{tmp_path}/no such kernel" in done.stderr


def test_shim_never_takes_qemus_own_place(tmp_path: Path) -> None:
    (tmp_path / "qemu-system-x86_64").write_bytes(b"\x7fELF")
    words = ["shim", str(tmp_path), "--qemu", str(tmp_path / "qemu-system-x86_64")]
    done = subprocess.run([DEPRIV, *words], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert "is the QEMU itself" in done.stderr
    assert (tmp_path / "qemu-system-x86_64").read_bytes() == b"\x7fELF"


def test_shim_is_replaced_whole_and_keeps_the_options(tmp_path: Path) -> None:
    made = tmp_path / "qemu-system-x86_64"
    for words in ([], ["--keep-net", "--probe-format", "--user", "it's me"]):
        argv = [DEPRIV, "shim", *words, str(tmp_path), "--qemu", "/usr/bin/qemu-system-x86_64"]
        subprocess.run(argv, check=True, capture_output=True, timeout=30)
        assert list(tmp_path.iterdir()) == [made]
        assert made.stat().st_mode & 0o777 == 0o755
    last = made.read_text().splitlines()[-1]
    options = "--user 'it'\\''s me' --keep-net --probe-format"
    assert last == f'exec {DEPRIV} run {options} -- /usr/bin/qemu-system-x86_64 "$@"'
