# SPDX-License-Identifier: Apache-2.0
"""What tools and documents write runs confined as it is: started, audited, ended their way; or is refused in words.

The lines are in :mod:`tests.qemu.command_lines`, the words of the refusals in tests/golden/command_lines.txt
(``--update`` rewrites it; review reads the difference).
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.qemu.command_lines import LINES, Line
from tests.qemu.refused_lines import REFUSED
from tests.support import guests
from tests.support.guests import CommandLine
from tests.support.host import need, settled, snapshot
from tests.support.lines import Started, argv_in, fill

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.root]

GOLDEN = Path(__file__).parents[1] / "golden/command_lines.txt"


@pytest.fixture(scope="module")
def depriv(uids: range) -> Iterator[CommandLine]:
    """Return the command line, on a host that is after all the lines as it was before."""
    where: dict[str, Any] = {"uids": uids, "domids": guests.DOMIDS}
    before = snapshot(**where)
    made = CommandLine()
    yield made
    made.close()
    # But for descriptors: pytest has others by now.
    assert settled(before, where).replace(fds=()) == before.replace(fds=())


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("lines") / "all")


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    """Return a folder of the line's own, with all that it names. Short: a socket's path has 107 bytes."""
    return Path(shutil.copytree(filled, tmp_path / "d", symlinks=True))


def check_line(line: Line, depriv: CommandLine, folder: Path) -> None:
    with Started(depriv, folder, line.words) as started:
        if line.end.startswith("exit"):
            status = started.process.wait(guests.PATIENCE_S)
            assert status == int(line.end.split()[1]), started.said()
        else:
            entry = started.await_running()
            report = depriv.run("audit", entry["name"]).stdout
            assert "FAIL" not in report
            assert started.end(line.end) == 0, started.said()
        if started.daemonize:
            depriv.run("gc")  # which the next start does as well, or the watcher
        assert os.listdir(f"{depriv.state_dir}/domains") == []
        assert started.left() == []


@pytest.mark.parametrize("line", [line for line in LINES if not line.needs], ids=lambda line: line.name)
def test_line_runs_confined_and_ends_as_its_tool_ends_it(line: Line, depriv: CommandLine, folder: Path) -> None:
    check_line(line, depriv, folder)


def test_lines_are_of_many_tools_and_all_different() -> None:
    assert len({line.words for line in LINES}) == len(LINES) >= 60
    assert len({line.tool.partition(",")[0] for line in LINES}) >= 30
    assert len({line.name for line in (*LINES, *REFUSED)}) == len(LINES) + len(REFUSED)


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return what is in the folder, and when it was last changed."""
    found = {path.name: path.lstat() for path in (folder, *folder.iterdir())}
    return {name: (have.st_ino, have.st_size, have.st_mtime_ns) for name, have in found.items()}


def test_refused_lines_are_refused_in_these_words_and_nothing_is_touched(
    depriv: CommandLine, folder: Path, request: pytest.FixtureRequest
) -> None:
    peer = socket.socket(socket.AF_UNIX)
    request.addfinalizer(peer.close)
    peer.bind(str(folder / "peer.sock"))
    peer.listen()
    before = state(folder)
    told: list[str] = []
    for line in REFUSED:
        words = shlex.split(line.words.replace("$D", str(folder)))
        argv = argv_in(folder, depriv, "run", "--", "qemu-system-x86_64", *words)
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode in (2, 125), (line, done)
        assert done.stdout == "", line
        assert "Traceback" not in done.stderr, done.stderr
        said = done.stderr.replace(str(folder), "$D")
        told.append(f"# {line.name}: {line.tool}\n$ {line.words}\n{said}({done.returncode})\n")
    assert os.listdir(f"{depriv.state_dir}/domains") == []
    assert state(folder) == before
    text = "\n".join(told)
    if request.config.getoption("--update"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("line", [line for line in LINES if line.needs == "passt"], ids=lambda line: line.name)
def test_line_with_a_user_mode_network_runs_confined(line: Line, depriv: CommandLine, folder: Path) -> None:
    need(shutil.which("passt") is not None, what="passt")
    check_line(line, depriv, folder)
