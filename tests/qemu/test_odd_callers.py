# SPDX-License-Identifier: Apache-2.0
"""Whoever calls depriv may have odd streams, limits, signals and neighbours: it works, or it fails aloud and whole."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.guests import CommandLine, config_text
from tests.support.host import living, settled, snapshot

from depriv import proc
from depriv.config import Domain
from depriv.status import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from depriv.api import Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

CACHE = "/var/cache/depriv"


@pytest.fixture
def config(disk: Path, tmp_path: Path) -> str:
    """Return the path of a configuration with one disk."""
    path = tmp_path / "web.cfg"
    path.write_text(config_text("web", f"vdev=xvda,format=raw,access=rw,target={disk}"))
    return str(path)


@pytest.fixture
def fresh() -> Iterator[CommandLine]:
    """Return the command line on a host that has never started a domain: without copies of QEMU."""
    os.makedirs(CACHE, 0o755, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="depriv-test-") as folder:
        os.chmod(folder, 0o755)
        made = CommandLine(bind=(folder, CACHE))
        yield made
        made.close()


def called(depriv: CommandLine, *words: str, by: tuple[str, ...] = (), **environ: str) -> Any:
    """Run a command as somebody calls it who is put in front of it."""
    argv = [*by, *depriv.argv(*words)]
    env = {**os.environ, **environ}
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, env=env, errors="replace")


def shell(code: str) -> tuple[str, ...]:
    """Return what runs a command within shell code, as "$@"."""
    return ("sh", "-c", code, "sh")


def fields(pid: int) -> list[str]:
    """Return what follows the name in a process's stat, from field 3 on. Source: proc_pid_stat(5)."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(") ")[2].split()


def works(depriv: CommandLine, config: str, by: tuple[str, ...]) -> None:
    """See a guest through its life with every command called in an odd way."""
    made = called(depriv, "create", config, by=by)
    assert made.returncode == 0, made.stderr
    assert "checks hold" in made.stdout
    for words in (("list",), ("audit", "web"), ("console", "--dump", "web"), ("destroy", "web")):
        done = called(depriv, *words, by=by)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        assert done.stderr == ""
    assert depriv.rows() == []


# Signals


@pytest.mark.parametrize("ignored", ["CHLD", "PIPE", "XFSZ", "CHLD,INT,HUP,TERM,USR1"])
def test_caller_that_ignores_signals_gets_all_commands_done(depriv: CommandLine, config: str, ignored: str) -> None:
    """With SIGCHLD ignored nobody has zombies: a wait finds no child, which is no failure."""
    works(depriv, config, ("env", *(f"--ignore-signal={name}" for name in ignored.split(","))))


def test_ctrl_c_at_any_moment_leaves_a_whole_guest_or_none_and_no_traceback(
    depriv: CommandLine, config: str, uids: range
) -> None:
    """The terminal sends it to the whole process group, the jail included."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    depriv.run("create", config)  # the copy of QEMU is there from now on
    depriv.run("destroy", "web")
    where: dict[str, Any] = {"folder": f"{depriv.state_dir}/domains", "uids": uids}
    before = snapshot(**where)
    seen: list[int] = []
    for _ in range(16):
        command = depriv.start("create", config, start_new_session=True)
        time.sleep(chance.uniform(0.0, 0.4))
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGINT)
        said = command.communicate(timeout=30)[1]
        seen.append(command.returncode)
        # The first is before there is any Python code of ours to say otherwise.
        early = command.returncode == -signal.SIGINT or "depriv.cli" not in said
        assert "Traceback" not in said or early, said
        assert "/jail/" not in said, said
        rows = depriv.rows()
        assert [row["state"] for row in rows] in ([], ["running"]), seen
        if rows:
            depriv.run("destroy", "web")
        assert settled(before, where) == before, seen
    print(seen)
    assert len(set(seen)) > 1, f"all came at the same stage: {seen}"


# Umask


@pytest.mark.parametrize("umask", ["077", "027", "000"])
def test_first_start_under_any_umask_works_and_leaves_a_copy_for_the_next(
    fresh: CommandLine, config: str, umask: str
) -> None:
    made = called(fresh, "create", config, by=shell(f'umask {umask}; exec "$@"'))
    assert made.returncode == 0, made.stderr
    runtime = Path(f"/proc/{fresh.pid}/root{CACHE}/runtime")
    (folder,) = [path for path in runtime.iterdir() if path.is_dir()]
    for path in (runtime, folder, *folder.rglob("*")):
        have = path.lstat()
        if path.is_dir():
            assert have.st_mode & 0o7777 == 0o755, path
        elif not path.is_symlink():
            assert not have.st_mode & 0o7022, path
    made = (folder / "manifest.json").stat().st_ino  # its time says when it was used last
    fresh.run("audit", "web")
    fresh.run("destroy", "web")
    again = called(fresh, "create", config, by=shell('umask 022; exec "$@"'))
    assert again.returncode == 0, again.stderr
    assert (folder / "manifest.json").stat().st_ino == made
    fresh.run("destroy", "web")


def test_state_and_images_under_an_open_umask_are_still_roots_alone(depriv: CommandLine, config: str) -> None:
    made = called(depriv, "create", config, by=shell('umask 000; exec "$@"'))
    assert made.returncode == 0, made.stderr
    for folder, _, names in os.walk(depriv.state_dir):
        assert os.stat(folder).st_mode & 0o077 == 0, folder
        for name in names:
            assert os.lstat(f"{folder}/{name}").st_mode & 0o077 == 0, name
    depriv.run("destroy", "web")


# Streams


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-", ">&- 3<&- 4<&- 5<&-"])
def test_create_with_closed_streams_starts_a_whole_guest(depriv: CommandLine, config: str, closed: str) -> None:
    """A descriptor of ours that got the number 1 or 2 would be written to."""
    made = called(depriv, "create", config, by=shell(f'exec "$@" {closed}'))
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    depriv.run("audit", "web")
    done = called(depriv, "destroy", "web", by=shell(f'exec "$@" {closed}'))
    assert (done.returncode, done.stderr) == (0, "")
    assert depriv.rows() == []


@pytest.mark.parametrize("full", [">/dev/full", ">/dev/full 2>&1"])
def test_answer_that_cannot_be_written_leaves_no_half_of_a_guest(
    depriv: CommandLine, config: str, full: str, uids: range
) -> None:
    made = called(depriv, "create", config, by=shell(f'exec "$@" {full}'))
    assert made.returncode in (0, 125)
    assert "Traceback" not in made.stderr
    rows = depriv.rows()
    assert len(rows) == len(living(uids))
    for row in rows:
        assert row["state"] == "running"
        depriv.run("audit", "web")
        done = called(depriv, "destroy", "web", by=shell(f'exec "$@" {full}'))
        assert done.returncode == 0
    assert depriv.rows() == []


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_console_text_that_the_terminal_cannot_show_is_shown_with_escapes(
    depriv: CommandLine, config: str, encoding: str
) -> None:
    depriv.run("create", "-p", config)
    (row,) = depriv.rows()
    saved = f"{depriv.state_dir}/domains/{row['domid']}/console"
    Path(saved).write_bytes("snow \N{SNOWMAN} \N{LATIN SMALL LETTER E WITH ACUTE}\n".encode())
    done = called(depriv, "console", "--dump", "web", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("snow \N{SNOWMAN} " if encoding == "utf-8" else "snow \\u2603 ")
    depriv.run("destroy", "web")


# Limits and scheduling


def test_caller_with_few_descriptors_starts_a_guest(depriv: CommandLine, config: str) -> None:
    works(depriv, config, ("prlimit", "--nofile=64:"))


@pytest.mark.parametrize(
    "by",
    [
        ("nice", "-n", "-5"),
        ("chrt", "-f", "1"),
        ("setarch", "-R"),
        ("prlimit", "--stack=unlimited"),
        ("prlimit", "--cpu=3600:"),
    ],
    ids=" ".join,
)
def test_device_model_has_nothing_of_the_callers_scheduling_layout_and_limits(
    depriv: CommandLine, config: str, by: tuple[str, ...]
) -> None:
    made = called(depriv, "create", config, by=by)
    assert made.returncode == 0, made.stderr
    (row,) = depriv.rows()
    pid: int = row["pid"]
    have = fields(pid)
    assert have[19 - 3] == "0"  # nice
    assert have[41 - 3] == str(os.SCHED_OTHER)  # policy
    with open(f"/proc/{pid}/personality", encoding="ascii") as file:
        assert int(file.read(), 16) == 0
    limits = proc.limits(pid)
    assert limits["STACK"] == (8 << 20, 8 << 20)
    assert limits["CPU"] == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert "limits.STACK" in depriv.run("audit", "web").stdout
    depriv.run("destroy", "web")


def test_audit_finds_a_stack_limit_that_was_changed(host: Toolstack) -> None:
    guest = host.create(Domain(name="web"))
    pid = guest.row().pid
    assert guest.audit().holds
    resource.prlimit(pid, resource.RLIMIT_STACK, (4 << 20, 8 << 20))
    report = guest.audit()
    assert [check.id for check in report.checks if not check.holds] == ["limits.STACK"]
    guest.destroy()


# Neighbours

# As nobody: binds an abstract name which makes the kernel's table look as if it had one socket more.
FORGER = r"""
import os, socket, sys, time
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
made = socket.socket(socket.AF_UNIX)
made.bind("\0x\n0: 00000002 00000000 %s 0001 01 %s %s" % tuple(sys.argv[1:]))
print("bound", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("flags", ["00010000", "00000000"], ids=["as-if-it-listened", "as-if-it-was-connected"])
def test_forged_line_in_the_hosts_table_of_sockets_makes_no_audit_fail(host: Toolstack, flags: str) -> None:
    guest = host.create(Domain(name="web"))
    entry = host.registry.find("web")
    assert entry.expected is not None
    (listener,) = [grant.ino for grant in entry.expected.grants if grant.role == "qmp"]
    argv = [sys.executable, "-I", "-S", "-c", FORGER, flags, str(listener), "/x"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as forger:
        assert forger.stdout is not None
        assert forger.stdout.readline() == b"bound\n"
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
            assert any(line.split()[6:7] == [str(listener)] for line in file), "the forgery is no good"
        with connect(entry, host.registry, timeout_s=5) as monitor:
            monitor.execute("query-status", timeout_s=5)
            report = guest.audit()  # while a connection is open, which has to be told from a stranger's
        forger.kill()
    assert report.holds, report.to_text()
    guest.destroy()


def test_connection_that_did_not_come_in_through_the_monitor_is_still_found(host: Toolstack) -> None:
    """The other side of it: a connection of the host's network to QEMU's monitor is nobody's that depriv made."""
    guest = host.create(Domain(name="web"))
    with socket.socket(socket.AF_UNIX) as client:
        os.chdir(host.registry.directory(guest.domid))  # the path may be longer than an address
        try:
            client.connect("qmp")
        finally:
            os.chdir("/")
        assert client.recv(16)
        report = guest.audit()
    assert [check.id for check in report.checks if not check.holds] == ["fds.unknown"]
    guest.destroy()
