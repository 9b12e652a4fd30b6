# SPDX-License-Identifier: Apache-2.0
"""The monitor against the real QEMU, and beside the client that QEMU's own developers maintain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from depriv.errors import MonitorError
from depriv.qmp import DEFAULT_LIMITS, CommandError, Limits, Monitor
from depriv.untrusted import as_bool, as_int, as_list, as_object, as_str, field

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = [pytest.mark.qemu, pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")]
START_S = 20.0
ANSWER_S = 5.0


@contextlib.contextmanager
def qemu(*arguments: str, fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a QEMU without a machine, as a child that does not outlive the block."""
    assert QEMU is not None
    argv = [QEMU, "-machine", "none", "-S", "-nodefaults", "-display", "none", "-accel", "tcg", *arguments]
    with subprocess.Popen(argv, pass_fds=fds, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def monitored(*arguments: str, limits: Limits = DEFAULT_LIMITS) -> Iterator[tuple[Monitor, subprocess.Popen[bytes]]]:
    """Yield a monitor of a QEMU that got its end of a socket pair, and the process."""
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        chardev = ("-chardev", f"socket,id=mon,fd={fd}", "-mon", "chardev=mon,mode=control")
        with qemu(*chardev, *arguments, fds=(fd,)) as process:
            theirs.close()
            with Monitor.adopt(ours, timeout_s=START_S, limits=limits) as monitor:
                yield monitor, process


def test_qemu_answers_with_what_it_is() -> None:
    with monitored() as (monitor, _process):
        version = field(monitor.execute("query-version", timeout_s=ANSWER_S), "qemu", as_object, "query-version")
        assert field(version, "major", as_int, "query-version") >= 7
        status = monitor.execute("query-status", timeout_s=ANSWER_S)
        assert field(status, "status", as_str, "query-status") == "prelaunch"
        assert field(status, "running", as_bool, "query-status") is False


def test_the_longest_reply_fits_the_limits_with_room_to_spare() -> None:
    quarter = Limits(line_bytes=1024 * 1024, total_bytes=1024 * 1024, depth=16, values=50_000, events=1)
    with monitored(limits=quarter) as (monitor, _process):
        schema = as_list(monitor.execute("query-qmp-schema", timeout_s=ANSWER_S), "query-qmp-schema")
    assert len(schema) > 500


def test_every_query_without_arguments_is_understood() -> None:
    with monitored() as (monitor, _process):
        commands = as_list(monitor.execute("query-commands", timeout_s=ANSWER_S), "query-commands")
        names = [field(command, "name", as_str, "query-commands") for command in commands]
        for name in sorted(name for name in names if name.startswith("query-")):
            with contextlib.suppress(CommandError):
                monitor.execute(name, timeout_s=ANSWER_S)


def test_refusals_carry_qemus_words_and_leave_the_monitor_usable() -> None:
    with monitored() as (monitor, _process):
        with pytest.raises(CommandError) as unknown:
            monitor.execute("no-such-command", timeout_s=ANSWER_S)
        with pytest.raises(CommandError) as refused:
            monitor.execute("device_del", {"id": "\x1b[2J"}, timeout_s=ANSWER_S)
        monitor.execute("query-status", timeout_s=ANSWER_S)
    assert unknown.value.error_class == "CommandNotFound"
    assert refused.value.error_class == "DeviceNotFound"
    assert "Device '" in refused.value.description
    assert refused.value.description.isprintable()


def test_descriptors_reach_qemu_with_the_ids_we_chose(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"\0" * 65536)
    with monitored() as (monitor, process):
        fd = os.open(image, os.O_RDONLY)
        try:
            monitor.execute("add-fd", {"fdset-id": 7, "opaque": "cd"}, fds=[fd], timeout_s=ANSWER_S)
        finally:
            os.close(fd)
        node = {"driver": "file", "node-name": "cd", "filename": "/dev/fdset/7", "read-only": True}
        monitor.execute("blockdev-add", node, timeout_s=ANSWER_S)
        sets = as_list(monitor.execute("query-fdsets", timeout_s=ANSWER_S), "query-fdsets")
        assert [field(one, "fdset-id", as_int, "query-fdsets") for one in sets] == [7]
        links = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")]
        assert str(image) in links


def test_a_command_without_its_descriptor_is_refused_by_qemu() -> None:
    with monitored() as (monitor, _process), pytest.raises(CommandError, match="add-fd: QEMU refuses") as caught:
        monitor.execute("add-fd", {"fdset-id": 7}, timeout_s=ANSWER_S)
    assert "SCM_RIGHTS" in caught.value.description


def test_large_arguments_reach_qemu_whole() -> None:
    with monitored() as (monitor, _process):
        # More than the socket holds; not much more, since QEMU reads its monitor byte by byte.
        data = {"qom-type": "secret", "id": "s0", "data": "x" * (512 * 1024)}
        monitor.execute("object-add", data, timeout_s=ANSWER_S)
        assert monitor.execute("qom-get", {"path": "/objects/s0", "property": "type"}, timeout_s=ANSWER_S) == "secret"


def test_quit_is_answered_before_the_end_and_what_follows_says_so() -> None:
    with monitored() as (monitor, process):
        assert monitor.execute("quit", timeout_s=ANSWER_S) == {}
        assert process.wait(ANSWER_S) == 0
        with pytest.raises(MonitorError, match="query-status: QEMU closed its monitor"):
            monitor.execute("query-status", timeout_s=ANSWER_S)


def test_a_killed_qemu_is_noticed_at_once() -> None:
    with monitored() as (monitor, process):
        process.kill()
        process.wait()
        began = time.monotonic()
        with pytest.raises(MonitorError, match="QEMU closed its monitor"):
            monitor.execute("query-status", timeout_s=ANSWER_S)
        assert time.monotonic() - began < 1


def test_a_stopped_qemu_is_given_up_by_the_deadline() -> None:
    with monitored() as (monitor, process):
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(MonitorError, match="no whole answer from QEMU in time"):
            monitor.execute("query-status", timeout_s=0.3)
        assert 0.3 <= time.monotonic() - began < 1.3


def test_a_second_client_waits_its_turn_and_is_given_up_in_time(tmp_path: Path) -> None:
    path = str(tmp_path / "monitor")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        fd = listener.fileno()
        chardev = ("-chardev", f"socket,id=mon,fd={fd},server=on,wait=off", "-mon", "chardev=mon,mode=control")
        with qemu(*chardev, fds=(fd,)):
            with Monitor.connect(path, timeout_s=START_S) as first:
                with pytest.raises(MonitorError, match="no whole answer from QEMU in time"):
                    Monitor.connect(path, timeout_s=0.3)
                first.execute("query-status", timeout_s=ANSWER_S)
            with Monitor.connect(path, timeout_s=START_S) as second:
                second.execute("query-status", timeout_s=ANSWER_S)


def test_qemus_own_client_reads_the_same_answers(tmp_path: Path) -> None:
    qmp = pytest.importorskip("qemu.qmp")
    commands = ("query-version", "query-qmp-schema", "query-commands", "qom-list-types")

    async def theirs(path: str) -> list[object]:
        client = qmp.QMPClient()
        await client.connect(path)
        try:
            return [await client.execute(command) for command in commands]
        finally:
            await client.disconnect()

    path = str(tmp_path / "monitor")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        fd = listener.fileno()
        chardev = ("-chardev", f"socket,id=mon,fd={fd},server=on,wait=off", "-mon", "chardev=mon,mode=control")
        with qemu(*chardev, fds=(fd,)):
            with Monitor.connect(path, timeout_s=START_S) as monitor:
                ours = [monitor.execute(command, timeout_s=ANSWER_S) for command in commands]
            assert ours == asyncio.run(theirs(path))
