# SPDX-License-Identifier: Apache-2.0
"""Whoever holds a lock of the registry holds up nobody for ever, is named, and keeps no guest alive."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import await_end, compiled, config_text, stop
from tests.support.host import living

from depriv import collect, durable
from depriv.config import Disk, Domain
from depriv.durable import BusyError
from depriv.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.guests import CommandLine

    from depriv.api import Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

TIMEOUT_S = 0.3

HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(fd, fcntl.LOCK_EX)
if sys.argv[2] == "hand down" and os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(path: str, how: str = "") -> Iterator[int]:
    """Hold a lock: live, "stopped", or "hand down": in a child of the one who took it and is dead."""
    argv = [sys.executable, "-c", HOLD, path, how]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        pid = int(process.stdout.readline())
        if how == "stopped":
            stop(pid)
        try:
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            process.stdin.close()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less long for locks: the figures alone."""
    monkeypatch.setattr(durable, "LOCK_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(collect, "_LOCK_TIMEOUT_S", TIMEOUT_S)


def check_named(error: BusyError, pid: int, path: str, how: str) -> None:
    assert f"process {pid} (" in error.cause
    assert error.cause.endswith(f" holds {path}")
    assert (", stopped)" in error.cause) == (how == "stopped")
    assert (f"kill -CONT {pid}" in error.fix) == (how == "stopped")
    assert error.fix


HOWS = ("", "stopped", "hand down")


@pytest.mark.parametrize("how", HOWS)
def test_start_that_cannot_lock_the_registry_says_who_has_it_and_leaves_nothing(
    host: Toolstack, soon: None, how: str
) -> None:
    del soon
    path = f"{host.registry.folder}/lock"
    with holder(path, how) as pid:
        began = time.monotonic()
        with pytest.raises(BusyError, match="busy with the registry") as caught:
            host.create(Domain(name="web"))
        assert time.monotonic() - began < TIMEOUT_S + 5
        check_named(caught.value, pid, path, how)
        assert host.registry.domids() == ()
    host.create(Domain(name="web")).destroy()


@pytest.mark.parametrize("how", HOWS)
def test_guest_whose_lock_another_has_is_killed_at_once_and_forgotten_when_the_lock_is_free(
    host: Toolstack, soon: None, how: str
) -> None:
    del soon
    guest = host.create(Domain(name="web"))
    pid = guest.row().pid
    path = f"{host.registry.directory(guest.domid)}/lock"
    with holder(path, how) as other:
        with pytest.raises(BusyError, match=f"busy with domain {guest.domid}") as caught:
            guest.destroy()
        check_named(caught.value, other, path, how)
        assert await_end(pid, within_s=1)
        assert [row.state for row in host.rows()] == ["dead"]
        assert [done.result for done in host.gc()] == ["busy"]
        # Nobody else is held up.
        host.create(Domain(name="other")).destroy()
    assert [done.result for done in host.gc()] == ["done"]
    assert host.guests() == ()


@pytest.mark.parametrize("how", HOWS)
def test_end_that_cannot_lock_the_registry_kills_the_guest_and_keeps_its_entry(
    host: Toolstack, soon: None, uids: range, how: str
) -> None:
    del soon
    guest = host.create(Domain(name="web"))
    path = f"{host.registry.folder}/lock"
    with holder(path, how) as other:
        with pytest.raises(BusyError) as caught:
            guest.destroy()
        check_named(caught.value, other, path, how)
        assert living(uids) == ()
        assert [row.state for row in host.rows()] == ["ending"]
    assert [done.result for done in host.gc()] == ["done"]


def test_nothing_that_only_looks_needs_a_lock(depriv: CommandLine, disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "web.cfg"
    path.write_text(config_text("web", f"vdev=xvda,format=raw,access=rw,target={disk}"))
    depriv.run("create", str(path))
    (row,) = depriv.rows()
    with (
        holder(f"{depriv.state_dir}/lock", "stopped"),
        holder(f"{depriv.state_dir}/domains/{row['domid']}/lock", "stopped"),
    ):
        began = time.monotonic()
        assert depriv.rows() == [row]
        depriv.run("audit", "web")
        depriv.run("plan", str(path), expect=2)  # refused: the name and the image are in use
        depriv.run("gc", "--dry-run")
        assert time.monotonic() - began < durable.LOCK_TIMEOUT_S


CREATE = """
import sys
from depriv.api import Toolstack
from depriv.config import Domain
Toolstack(state_dir=sys.argv[1], cache_dir=sys.argv[2]).create(Domain(name="slow", device_model_override=sys.argv[3]))
"""
SILENT = """
#include <unistd.h>
int main(void) { for (;;) pause(); }
"""


@pytest.fixture
def slow(host: Toolstack, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Return a start that waits for its QEMU's answer, which never comes."""
    programs = tmp_path / "programs"
    programs.mkdir(mode=0o755)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    program = compiled(programs, "qemu-silent", SILENT)
    argv = [sys.executable, "-c", CREATE, host.registry.folder, str(tmp_path / "cache"), str(program)]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while not any(entry.uid and living(range(entry.uid, entry.uid + 1)) for entry in host.registry.entries()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        yield process
        process.kill()


def test_start_that_somebody_stopped_is_not_cleared_under_it_and_is_told_by_its_number(
    host: Toolstack, soon: None, slow: subprocess.Popen[bytes]
) -> None:
    del soon
    stop(slow.pid)
    assert [row.state for row in host.rows()] == ["starting"]
    assert host.gc() == ()
    guest = host.guest("slow")
    with pytest.raises(BusyError) as caught:
        guest.destroy()
    check_named(caught.value, slow.pid, f"{host.registry.directory(guest.domid)}/lock", "stopped")
    # The others go on, but for its name.
    host.create(Domain(name="other")).destroy()
    # It does what the remedy says: then it is as if nothing had been.
    slow.kill()
    slow.wait()
    assert [done.result for done in host.gc()] == ["done"]
    assert host.guests() == ()
    with pytest.raises(NotFoundError):
        guest.destroy()


@pytest.mark.parametrize("end", ["gc", "create", "destroy"])
def test_start_that_was_killed_is_seen_to_by_whoever_comes_next(
    host: Toolstack, slow: subprocess.Popen[bytes], uids: range, end: str
) -> None:
    guest = host.guest("slow")
    slow.kill()
    slow.wait()
    match end:
        case "gc":
            assert [(done.kind, done.result) for done in host.gc()] == [("start", "done")]
        case "create":
            new = host.create(Domain(name="slow"))
            assert new.domid != guest.domid
            new.destroy()
        case _:
            guest.destroy()
    assert host.guests() == ()
    assert living(uids) == ()


def test_reader_of_an_image_is_refused_while_its_writer_is_only_starting(
    host: Toolstack, slow: subprocess.Popen[bytes], disk: Path
) -> None:
    """What is about to be opened is written down before."""
    del slow
    entry = host.registry.find("slow")
    have = os.stat(disk)
    host.registry.save(entry.replace(images=((have.st_dev, have.st_ino, 0, True),)))
    with pytest.raises(ConfigError, match="is in use by domain slow"):
        host.create(Domain(name="reader", disks=(Disk(vdev="xvda", target=str(disk), readonly=True),)))
