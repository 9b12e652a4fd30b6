# SPDX-License-Identifier: Apache-2.0
"""The command line where it needs neither root nor QEMU: what is mistyped, and outputs that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

from depriv import cli
from depriv.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

GOOD = 'name = "web1"\ntype = "hvm"\n'


def depriv(*words: str | bytes, shell: str = '"$@"', **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command line; ``shell`` redirects it."""
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "depriv.cli", *words]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, **environ}
    )


@pytest.fixture
def good(tmp_path: Path) -> str:
    path = tmp_path / "good.cfg"
    path.write_text(GOOD)
    return str(path)


def test_settings_are_not_called_required() -> None:
    assert depriv("check").stderr.endswith("the following arguments are required: FILE\n")


def test_check_tells_every_error_of_grammar_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "python.cfg"
    path.write_text("import os\nname = 'a'\nmemory = True\nvcpus = 2y\n")
    made = depriv("check", str(path))
    assert made.returncode == 2
    assert [line.split(":")[2] for line in made.stderr.splitlines() if line.startswith("error: ")] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("text", "place", "fix"),
    [
        ("on_crash = 'coredump-restart'", "3:12", 'write "restart", or "preserve"'),
        ("disk = ['/a,raw,xvda,w']; on_poweroff = 'rename-restart'", "3:41", 'write "restart", which ends the old'),
    ],
)
def test_ending_that_cannot_be_is_told_with_its_place_and_what_to_write(
    text: str, place: str, fix: str, tmp_path: Path
) -> None:
    path = tmp_path / "ends.cfg"
    path.write_text(GOOD + text + "\n")
    made = depriv("check", str(path))
    assert (made.returncode, made.stdout) == (2, "")
    error, _, mark, remedy = made.stderr.splitlines()
    assert error.startswith(f"error: {path}:{place}: on_")
    assert mark.strip() == "^"
    assert remedy.startswith(f"  fix: {fix}")


def test_what_an_argument_says_is_not_blamed_on_the_file(good: str) -> None:
    assert "argument 1:1:1: warning: vpcus is unknown" in depriv("check", good, "vpcus=2").stdout
    made = depriv("plan", good, "memory=999999999")
    assert made.stderr.startswith("error: argument 1:1:8: memory=999999999 (MiB) is more than this host has\n")


@pytest.mark.parametrize("shell", ['exec "$@" >/dev/full', 'exec "$@" 2>/dev/full >/dev/full'])
def test_answer_that_cannot_be_written_is_no_success_and_no_traceback(shell: str, good: str) -> None:
    made = depriv("check", good, shell=shell)
    assert made.returncode == 125
    assert "Traceback" not in made.stderr
    if made.stderr:
        error, cause, fix = made.stderr.splitlines()
        assert error == "error: cannot write the answer to standard output"
        assert cause == "cause: [Errno 28] No space left on device"
        assert fix.startswith("  fix: what was asked for has been done")


def test_answer_that_cannot_be_written_is_told_in_one_way_however_python_buffers(good: str) -> None:
    said = {depriv("check", good, shell='exec "$@" >/dev/full', PYTHONUNBUFFERED=value).stderr for value in ("", "1")}
    assert len(said) == 1
    assert "cannot write the answer" in said.pop()


def test_interrupt_while_the_program_is_still_being_loaded_ends_it_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("raise KeyboardInterrupt\n")
    made = depriv("check", "x", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert (made.returncode, made.stdout, made.stderr) == (130, "", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize(
    ("folder", "cause"),
    [
        ("/", "owner 0, mode 0755"),
        ("/dev/null", ""),
        ("/nonexistent/depriv", "[Errno 2] No such file or directory: '/nonexistent/depriv'"),
    ],
)
def test_folder_that_is_not_depriv_s_own_is_refused_and_nobody_is_told_to_remove_it(folder: str, cause: str) -> None:
    """Bug: with DEPRIV_STATE_DIR=/etc the remedy was "rm -r /etc"."""
    for words in (("gc",), ("watch",)):
        made = depriv(*words, DEPRIV_STATE_DIR=folder)
        assert made.returncode == 125
        assert f"cause: {cause}" in made.stderr
        assert "  fix: " in made.stderr
        assert "rm " not in made.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("words", [("watch",), ("gc",), ("gc", "--dry-run"), ("list",), ("destroy", "web1")])
def test_who_is_not_root_is_told_to_be_and_not_to_change_the_folder(words: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # where everybody sees that it is there; pytest's is root's alone
        os.mkdir(f"{folder}/domains", 0o700)
        made = depriv(*words, shell='exec setpriv --reuid=65534 --clear-groups "$@"', DEPRIV_STATE_DIR=folder)
    assert (made.returncode, made.stdout) == (125, "")
    assert "fix: run this as root" in made.stderr or "fix: run it with sudo" in made.stderr
    assert "chmod" not in made.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str, good: str) -> None:
    made = depriv("check", good, shell=f'exec "$@" {closed}')
    assert (made.returncode, made.stderr) == (0, "")
    wrong = depriv("nosuch", shell=f'exec "$@" {closed}')
    assert (wrong.returncode, wrong.stdout) == (2, "")


@pytest.mark.parametrize("name", ["é☃.cfg", os.fsdecode(b"\xff.cfg")])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8:strict"])
def test_name_that_the_terminal_cannot_show_is_shown_with_escapes(name: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(GOOD)
    made = depriv("check", os.fsencode(path), PYTHONIOENCODING=encoding)
    assert (made.returncode, made.stderr) == (0, "")


def test_name_of_a_file_drives_no_terminal() -> None:
    made = depriv("check", "\x1b[31ma\nerror: b")
    assert made.stderr.splitlines()[0] == r"error: cannot read \x1b[31ma\nerror: b"


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("/nonexistent", "No such file or directory"),
        ("", "No such file or directory"),
        ("/", "it is a directory, not a regular file"),
        ("/dev/zero", "it is a device, pipe or socket, not a regular file"),
    ],
)
def test_what_is_no_file_is_refused_as_such(path: str, cause: str) -> None:
    made = depriv("check", path)
    assert made.returncode == 2
    assert (
        made.stderr
        == f"error: cannot read {path or repr(path)}\ncause: {cause}\n  fix: name the configuration's file\n"
    )


def test_size_of_a_file_that_is_too_large_is_the_true_one(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(3 << 20))
    made = depriv("check", str(path))
    assert made.returncode == 2
    assert f"cause: it has {3 << 20} bytes" in made.stderr


@pytest.mark.parametrize("pid", ["0", "-5"])
def test_number_that_no_process_has_is_no_audit_that_failed(pid: str) -> None:
    made = depriv("audit", "--pid", pid)
    assert (made.returncode, made.stdout) == (2, "")
    assert made.stderr.startswith(f"error: there is no process {pid}\n")


def test_times_are_wanted_by_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPRIV_TIMES", "yes")
    with pytest.raises(ConfigError, match="DEPRIV_TIMES"):
        cli._begun()
    monkeypatch.setenv("DEPRIV_TIMES", "1.5")
    assert cli._begun() == 1.5
