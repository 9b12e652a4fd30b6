# SPDX-License-Identifier: Apache-2.0
"""The emulated Xen host is what it says: a real one, fresh each time, and gone without a trace."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.xenlab import image, machine, recording
from tests.support.xenlab.confinement import side_by_side, table
from tests.support.xenlab.dom0 import Dom0

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.xen, pytest.mark.root, pytest.mark.timeout(900)]

CREATE_S = 120.0
SPEAK_S = 120.0
ROOT = Path(__file__).resolve().parents[2]
STARTER = """
import sys, time
from tests.support.xenlab.dom0 import Dom0
dom0 = Dom0.start(sys.argv[1])
print(dom0.host.pid, dom0.host.folder, flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def guest(dom0: Dom0, name: str, config: str) -> Iterator[int]:
    """Start a guest and return its domid; it is destroyed whatever happens."""
    try:
        dom0.run(["xl", "create", config], timeout_s=CREATE_S)
        domid = dom0.domid(name)
        assert domid is not None, dom0.must("tail -n 20 /var/log/xen/*.log")
        yield domid
    finally:
        dom0.run(["xl", "destroy", name], timeout_s=CREATE_S)


def test_host_is_the_suites_xen_and_can_run_hardware_guests(dom0: Dom0, suite: str) -> None:
    said = dict(line.split(":", 1) for line in dom0.must("xl info").splitlines())
    info = {key.strip(): value.strip() for key, value in said.items()}
    assert f"{info['xen_major']}.{info['xen_minor']}" == image.SUITES[suite]
    assert {"pv", "hvm", "hap"} <= set(info["virt_caps"].split())
    assert suite in dom0.get("/etc/os-release").decode()


def test_dom0_has_what_device_models_and_their_jails_need(dom0: Dom0) -> None:
    assert {"cpu", "memory", "pids"} <= set(dom0.get("/sys/fs/cgroup/cgroup.subtree_control").decode().split())
    assert dom0.must(["id", "-u", "xen-qemuuser-range-base"]) == "131072\n"
    assert dom0.must(["id", "-u", "xen-qemuuser-reaper"]) != "0\n"
    assert "landlock" in dom0.get("/sys/kernel/security/lsm").decode()
    assert dom0.xenstore("/local/domain/0/name") == {"/local/domain/0/name": "Domain-0"}
    assert dom0.xenstore("/no/such/path") == {}
    for tool in ("python3", "strace", "unshare", "setpriv", "ip", "xenstore-ls", "/usr/libexec/xen-qemu-system-i386"):
        dom0.must(f"command -v {tool}")


def test_plain_guest_runs_reads_its_cd_writes_its_disk_and_leaves_nothing(dom0: Dom0, suite: str) -> None:
    before = dom0.must("losetup --all; ls /run/xen | grep -v domid-history")
    config = dom0.guest_config("hvm1", disk="/guests/write.img")
    with guest(dom0, "hvm1", config) as domid:
        # From sector 1600 on, 800 KiB into the image: the counterpart of the restricted guest, whose write fails.
        said = dom0.wait_for_serial("hvm1", "write=ok", SPEAK_S)
        assert "tick 0001 cd=ISO-ONE " in said
        pid = dom0.dm_pid("hvm1")
        known = table(dom0, pid)
        assert (known["uid"], known["root"], known["own namespaces"]) == ("0", "/", ""), side_by_side({"xl": known})
        kept = recording.load(ROOT / f"tests/xen/argv/{suite}-plain.txt")
        expected = [word.replace("/plain.img", "/write.img") for word in kept.argv]
        expected[expected.index("plain")] = "hvm1"
        assert dom0.proc(pid)["argv"][1:] == expected
    assert dom0.proc(pid) == {}
    assert dom0.domid("hvm1") is None
    assert dom0.xenstore(f"/local/domain/{domid}") == {}
    assert dom0.ask("named", word="xen-qemu-system") == {}
    assert dom0.must("losetup --all; ls /run/xen | grep -v domid-history") == before


def test_every_machine_is_fresh_and_alone(dom0: Dom0, suite: str) -> None:
    dom0.write("/root/mine", b"of the first")
    with Dom0.start(suite) as other:
        assert other.run(["cat", "/root/mine"]).status != 0
        assert other.must("xl list").split()[-6:-5] == ["Domain-0"]
        assert other.run("ls /run/xen/domid-history").status != 0  # no guest ever ran
        other.write("/root/theirs", b"of the second")
    assert dom0.run(["cat", "/root/theirs"]).status != 0
    assert dom0.get("/root/mine") == b"of the first"


def test_ended_machine_leaves_nothing_on_this_one(suite: str) -> None:
    ended: list[Dom0] = []
    with pytest.raises(ZeroDivisionError):
        fail_within(suite, ended)
    (dom0,) = ended
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", dom0.port), timeout=5)
    assert dom0.host is not None
    assert not os.path.exists(dom0.host.folder)


def fail_within(suite: str, started: list[Dom0]) -> None:
    """End as a failing test does."""
    with Dom0.start(suite) as dom0:
        started.append(dom0)
        assert dom0.host is not None
        assert os.path.exists(dom0.host.folder)
        raise ZeroDivisionError


def test_machine_ends_with_a_starter_that_is_killed_and_its_folder_is_swept(suite: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/src"}
    argv = [sys.executable, "-c", STARTER, suite]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment, text=True) as starter:
        assert starter.stdout is not None
        pid, folder = starter.stdout.readline().split()
        watched = os.pidfd_open(int(pid))
        starter.send_signal(signal.SIGKILL)
    wait_for_end(watched)
    os.utime(folder, (time.time() - 2 * machine.STARTING_S,) * 2)
    with Dom0.start(suite) as next_one:
        assert next_one.host is not None
        assert next_one.host.folder != folder
        assert not Path(folder).exists()


def wait_for_end(pidfd: int) -> None:
    """Return when a process is dead; it need not be ours to reap."""
    import select

    try:
        assert select.select([pidfd], [], [], 20.0)[0] == [pidfd]
    finally:
        os.close(pidfd)


def test_command_that_takes_too_long_is_ended_with_its_children(dom0: Dom0) -> None:
    with pytest.raises(TimeoutError, match="did not end in 1 s"):
        dom0.run("echo begun; sleep 4711 & sleep 4711", timeout_s=1.0)
    assert dom0.ask("named", word="4711") == {}


def test_command_is_not_held_up_by_what_it_left_in_the_background(dom0: Dom0) -> None:
    began = time.monotonic()
    done = dom0.run("sleep 40 & echo $!", timeout_s=30.0)
    assert time.monotonic() - began < 30.0
    assert done.status == 0
    dom0.must(["kill", done.out.strip()])


def test_status_and_both_outputs_of_a_command_come_back(dom0: Dom0) -> None:
    done = dom0.run("cat; echo no >&2; exit 7", given=b"given")
    assert (done.status, done.out, done.err) == (7, "given", "no\n")
    assert dom0.run("kill -9 $$").status == -signal.SIGKILL
    assert dom0.run(["/no/such/program"]).status == 127
    with pytest.raises(RuntimeError, match=r"ended with 3: told"):
        dom0.must("echo told >&2; exit 3")
    with pytest.raises(RuntimeError, match="No such file"):
        dom0.get("/no/such/file")
    with pytest.raises(LookupError, match="no domain nobody"):
        dom0.dm_pid("nobody")


def test_files_come_back_as_they_went(dom0: Dom0, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "tree/below").mkdir(parents=True)
    (tmp_path / "tree/below/data").write_bytes(data)
    (tmp_path / "tree/run").write_text("#!/bin/sh\necho it ran\n")
    (tmp_path / "tree/run").chmod(0o755)
    dom0.put_tree(tmp_path / "tree", "/root/new/tree")
    assert dom0.get("/root/new/tree/below/data") == data
    assert dom0.must(["/root/new/tree/run"]) == "it ran\n"
    dom0.put(tmp_path / "tree/run", "/root/again")
    assert dom0.must(["stat", "-c", "%a %u", "/root/again"]) == "755 0\n"


def test_python_package_arrives_compiled_for_dom0s_python(dom0: Dom0, tmp_path: Path) -> None:
    package = tmp_path / "lab_probe"
    package.mkdir()
    (package / "__init__.py").write_text("WORD = 'compiled'\n")
    dom0.put_python(package, "/usr/lib/python3/dist-packages/lab_probe")
    # If dom0's Python took the source, it would find the other word: the compiled form is used, unchecked.
    dom0.write("/usr/lib/python3/dist-packages/lab_probe/__init__.py", b"WORD = 'source'\n")
    assert dom0.must(["python3", "-c", "import lab_probe; print(lab_probe.WORD)"]) == "compiled\n"


def test_depriv_itself_runs_in_dom0(dom0: Dom0) -> None:
    dom0.put_python(ROOT / "src/depriv", "/usr/lib/python3/dist-packages/depriv")
    said = dom0.must(["python3", "-c", "import sys; from depriv import cli; sys.argv[1:] = ['--help']; cli.run()"])
    assert "usage: depriv" in said


def test_host_that_cannot_start_says_why(tmp_path: Path) -> None:
    broken = image.Image(suite="bookworm", folder=str(tmp_path))
    (tmp_path / "backing").write_bytes(b"this is no disk")
    with pytest.raises(RuntimeError, match="did not start"):
        machine.Machine(broken, str(tmp_path / "backing"))
