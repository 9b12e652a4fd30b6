# SPDX-License-Identifier: Apache-2.0
"""depriv-dm where there is no Xen: libxl's probe is answered, and everything else is refused with a reason."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.host import need

from depriv import xl
from depriv.config import Disk, Domain
from depriv.errors import ConfigError
from depriv.xendm import understand

if TYPE_CHECKING:
    from collections.abc import Iterator

DM = [sys.executable, "-m", "depriv.dm"]
PROBE = ["-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none,accel=xen"]  # Xen 4.20


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[socket.socket]:
    """A listening socket, as libxl hands in for its monitor."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(1)
        os.set_inheritable(listener.fileno(), True)
        yield listener


def started(words: list[str], heard: socket.socket | None = None) -> subprocess.Popen[str]:
    fds = [] if heard is None else [heard.fileno()]
    monitor = [] if heard is None else ["-chardev", f"socket,id=libxl-cmd,fd={fds[0]},server=on,wait=off"]
    return subprocess.Popen(
        [*DM, *words, *monitor], pass_fds=fds, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def asked(heard: socket.socket, *commands: str) -> list[dict[str, Any]]:
    """Connect as libxl does, and return the greeting and the answers."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(heard.getsockname())
        with client.makefile("rwb") as stream:
            said = [json.loads(stream.readline())]
            for number, command in enumerate(commands):
                stream.write(json.dumps({"execute": command, "id": number}).encode() + b"\n")
                stream.flush()
                said.append(json.loads(stream.readline()))
            return said


def test_probe_is_answered_without_a_qemu_until_libxl_ends_it(heard: socket.socket) -> None:
    with started(PROBE, heard) as probe:
        greeting, _, options, quits = asked(heard, "qmp_capabilities", "query-command-line-options", "quit")
        again = asked(heard, "qmp_capabilities")
        children = Path(f"/proc/{probe.pid}/task/{probe.pid}/children").read_text()
        probe.terminate()
    assert "QMP" in greeting
    assert {each["name"] for each in options["return"][0]["parameters"]} == {"chroot", "user"}
    assert quits == {"return": {}, "id": 2}
    assert again[1]["return"] == {}
    assert children == ""
    assert os.path.exists(heard.getsockname())  # the socket's path is libxl's to remove


def test_what_is_no_start_of_libxls_is_refused() -> None:
    for words in ([], PROBE, ["--help"]):
        with started(list(words)) as dm:
            said = dm.communicate(timeout=30)[1]
        assert dm.returncode == 2
        assert "depriv run" in said


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["-xen-domid"], "-xen-domid has no number"),
        (["-xen-domid", "seven"], "-xen-domid has no number"),
        (["-xen-domid", "0"], "-xen-domid has no number"),
    ],
)
def test_command_line_of_another_libxl_is_refused(words: list[str], cause: str) -> None:
    with started(words) as dm:
        said = dm.communicate(timeout=30)[1]
    assert dm.returncode == 2
    assert "not the command line of a libxl that is known" in said
    assert cause in said


def test_host_without_xen_is_refused_and_libxl_is_told_why(heard: socket.socket) -> None:
    need(not os.path.exists("/proc/xen/capabilities"), what="a host without Xen")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(heard.getsockname())  # libxl connects at once
        client.settimeout(30)
        with started(["-xen-domid", "7", "-xen-domid-restrict"], heard) as dm:
            with client.makefile("rwb") as stream:
                stream.readline()
                stream.write(b'{"execute": "qmp_capabilities", "id": 5}\n')
                stream.flush()
                answer = json.loads(stream.readline())
            said = dm.communicate(timeout=30)[1]
    assert dm.returncode == 125
    assert "does not run Xen" in said
    assert answer["id"] == 5
    assert "does not run Xen" in answer["error"]["desc"]


def test_start_that_fails_without_a_client_ends_soon(heard: socket.socket) -> None:
    begun = time.monotonic()
    with started(["-xen-domid", "7", "-xen-domid-restrict"], heard) as dm:
        dm.communicate(timeout=30)
    assert dm.returncode == 125
    assert time.monotonic() - begun < 10


def test_monitor_of_libxl_becomes_a_socket_of_ours() -> None:
    words: tuple[str, ...] = (
        "-xen-domid",
        "7",
        "-xen-domid-restrict",
        "-machine",
        "xenfv",
        "-nodefaults",
        "-net",
        "none",
    )
    words += ("-chardev", "socket,id=libxl-cmd,fd=16,server=on,wait=off", "-mon", "chardev=libxl-cmd,mode=control")
    request = understand(words, "/run/xen/qmp,7", 7)  # a comma in its path stays one
    assert [step.path for step in request.listens] == ["/run/xen/qmp,7"]
    assert request.openings == ()
    assert request.domid == 7
    assert not any("fd=16" in word for word in request.argv)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (Domain(name="x", type="pv"), "no device model"),
        (Domain(name="x", type="pvh"), "no device model"),
        (Domain(name="x", dm_restrict=False), "nothing for depriv to do"),
        (Domain(name="x", disks=(Disk(vdev="xvda", target="/a", format="qcow2"),)), "cannot be confined"),
        (Domain(name="x", type="pv", disks=(Disk(vdev="xvda", target="/a", format="qcow2"),)), "cannot be confined"),
    ],
)
def test_what_has_no_device_model_to_confine_is_explained(config: Domain, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as refused:
        xl.refuse_type(config)
    assert refused.value.cause
    assert refused.value.fix


def test_what_can_be_confined_is_not_refused() -> None:
    disks = (Disk(vdev="xvda", target="/a"), Disk(vdev="hda", target="/b", format="qcow2"))
    xl.refuse_type(Domain(name="x", disks=disks))
