# SPDX-License-Identifier: Apache-2.0
"""A libvirt domain whose <emulator> is the shim: confined, audited, and libvirt's to the end; or refused in words.

What docs/reference/libvirt.md says about libvirt 9.0 is from here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support import guests, iso, libvirtd
from tests.support.guests import CommandLine
from tests.support.host import living, need, settled, snapshot
from tests.support.lines import free_port
from tests.support.network import own_network

from depriv import demo_guest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.libvirtd import Libvirt

pytestmark = [pytest.mark.qemu, pytest.mark.root]

DEPRIV = str(Path(sys.executable).parent / "depriv")
QEMU = "/usr/bin/qemu-system-x86_64"
REFERENCE = Path(__file__).parents[2] / "docs/reference/libvirt.md"
PROBE = ("-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none,accel=kvm:tcg")
XML = """
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web1</name>
  <uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid>
  <memory unit='MiB'>96</memory>
  <vcpu>2</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>@QEMU@</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='@D@/overlay.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='@D@/cd.iso'/>
      <target dev='sda' bus='sata'/>
      <readonly/>
    </disk>
    <interface type='ethernet'>
      <mac address='52:54:00:1d:bf:0a'/>
      <target dev='tap-web1'/>
      <model type='virtio'/>
    </interface>
    <serial type='file'><source path='@D@/serial.log'/></serial>
    <console type='pty'><target type='virtio'/></console>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <input type='tablet' bus='usb'/>
    <graphics type='vnc' port='@PORT@' autoport='no' listen='127.0.0.1'/>
    <video><model type='virtio'/></video>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
"""
# cli; power button enabled (PM1 enable, 602h); then 18.2 times a second a letter on COM1, until the button's bit is
# in PM1 status (600h): S5 by PM1 control (604h). Ports as SeaBIOS sets them; hw/acpi/core.c, QEMU 7.2.
POWER_BUTTON = "ba0206 b80001 ef fb f4 baf803 b050 ee ba0006 ed f6c401 74f0 ba0406 b80020 ef f4 ebfd"


@pytest.fixture(scope="module")
def depriv(uids: range) -> Iterator[CommandLine]:
    """Return the command line, in a network of its own, for libvirt makes taps; the host is then as it was before."""
    where: dict[str, Any] = {"uids": uids, "domids": guests.DOMIDS}
    before = snapshot(**where)
    with own_network(route=False):
        made = CommandLine()
        yield made
        made.close()
    # But for descriptors: pytest has others by now.
    assert settled(before, where).replace(fds=()) == before.replace(fds=())


@pytest.fixture(scope="module")
def libvirt(depriv: CommandLine) -> Iterator[Libvirt]:
    need(shutil.which("libvirtd") is not None and shutil.which("virsh") is not None, what="libvirt")
    with libvirtd.Libvirt(depriv) as made:
        yield made


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shim")
    subprocess.run([DEPRIV, "shim", "--qemu", QEMU, str(folder)], check=True, capture_output=True)
    return str(folder / "qemu-system-x86_64")


@pytest.fixture
def folder(libvirt: Libvirt, depriv: CommandLine, tmp_path: Path) -> Iterator[Path]:
    """Return a folder with all that the domain names; a domain that a test has left running ends with it."""
    (tmp_path / "base.raw").write_bytes(demo_guest.image(text="the text of this disk"))
    (tmp_path / "button.raw").write_bytes(
        bytes.fromhex(POWER_BUTTON).ljust(510, b"\0") + b"\x55\xaa".ljust((1 << 20) - 510, b"\0")
    )
    for line in ("-b base.raw -F raw overlay.qcow2", "-b button.raw -F raw button.qcow2"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *line.split()], cwd=tmp_path, check=True)
    (tmp_path / "cd.iso").write_bytes(iso.iso({"A.TXT": b"x\n"}))
    yield tmp_path
    if "web1" in libvirt.virsh("list", "--name").split():
        libvirt.virsh("destroy", "web1")
    await_none(depriv)


def written(folder: Path, emulator: str, *changes: tuple[str, str], port: int = 0) -> str:
    """Return the path of the domain's XML, with some text of it changed."""
    text = XML
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "domain.xml"
    for mark, value in (("@QEMU@", emulator), ("@D@", folder), ("@PORT@", port or free_port())):
        text = text.replace(mark, str(value))
    path.write_text(text)
    return str(path)


def said(folder: Path) -> str:
    path = folder / "serial.log"
    return path.read_text() if path.exists() else ""


def await_said(folder: Path, text: str, count: int = 1) -> None:
    deadline = time.monotonic() + guests.PATIENCE_S
    while said(folder).count(text) < count:
        assert time.monotonic() < deadline, said(folder)[-300:]
        time.sleep(0.05)


def await_none(depriv: CommandLine) -> None:
    """See that nothing is left: libvirt kills the process that it knows, and goes on before all is gone."""
    deadline = time.monotonic() + guests.PATIENCE_S
    while depriv.rows():
        assert time.monotonic() < deadline, depriv.rows()
        time.sleep(0.05)


def await_off(libvirt: Libvirt) -> None:
    deadline = time.monotonic() + guests.PATIENCE_S
    while libvirt.virsh("list", "--name").strip():
        assert time.monotonic() < deadline, libvirt.log("web1")[-300:]
        time.sleep(0.1)


def known_pid(libvirt: Libvirt) -> int:
    """Return the pid that libvirt has for the domain."""
    return int((libvirt.root / "run/libvirt/qemu/web1.pid").read_text())


def assert_audited(depriv: CommandLine) -> None:
    assert "FAIL" not in depriv.run("audit", "web1").stdout


def test_domain_is_confined_runs_and_does_what_libvirt_says(
    libvirt: Libvirt, depriv: CommandLine, folder: Path, shim: str, uids: range
) -> None:
    port, base = free_port(), (folder / "base.raw").read_bytes()
    libvirt.virsh("create", written(folder, shim, port=port))
    (row,) = depriv.rows()
    assert (row["name"], row["state"], row["vcpus"], row["memory_mib"]) == ("web1", "running", 2, 96)
    assert_audited(depriv)
    assert row["pid"] in living(uids)
    await_said(folder, demo_guest.WRITE_OK)
    assert f"{demo_guest.SAYS}the text of this disk" in said(folder)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as viewer:
        assert viewer.recv(12) == b"RFB 003.008\n"
    assert Path(f"/proc/{known_pid(libvirt)}/comm").read_text() == "depriv\n"
    assert stat.S_ISCHR(os.stat(libvirt.virsh("ttyconsole", "web1").strip()).st_mode)
    stats = libvirt.virsh("domstats", "web1")
    assert "state.state=1" in stats
    assert "block.1.name=sda" in stats
    assert "net.0.name=tap-web1" in stats
    assert "running" in libvirt.virsh("qemu-monitor-command", "web1", "--hmp", "info status")
    libvirt.virsh("suspend", "web1")
    assert libvirt.virsh("domstate", "web1").strip() == "paused"
    libvirt.virsh("resume", "web1")
    libvirt.virsh("reset", "web1")
    await_said(folder, demo_guest.HELLO, 2)
    libvirt.virsh("change-media", "web1", "sda", "--eject")
    assert_audited(depriv)
    libvirt.virsh("destroy", "web1")
    await_none(depriv)
    assert depriv.run("gc").stdout == ""
    assert living(uids) == ()
    assert (folder / "base.raw").read_bytes() == base
    whole = ["qemu-img", "convert", "-O", "raw", str(folder / "overlay.qcow2"), str(folder / "whole.raw")]
    subprocess.run(whole, check=True, timeout=30)
    assert demo_guest.boots((folder / "whole.raw").read_bytes()) == 2


def test_same_domain_with_qemu_itself_is_roots_and_not_deprivs(
    libvirt: Libvirt, depriv: CommandLine, folder: Path, uids: range
) -> None:
    libvirt.virsh("create", written(folder, QEMU))
    await_said(folder, demo_guest.WRITE_OK)
    status = Path(f"/proc/{known_pid(libvirt)}/status").read_text()
    assert re.search(r"^Uid:\t0\t0\t0\t0$", status, re.MULTILINE)
    assert living(uids) == ()
    assert depriv.rows() == []


def test_guest_that_is_told_to_shut_down_does_and_all_of_it_ends(
    libvirt: Libvirt, depriv: CommandLine, folder: Path, shim: str
) -> None:
    libvirt.virsh("create", written(folder, shim, ("overlay.qcow2", "button.qcow2")))
    await_said(folder, "P")
    libvirt.virsh("shutdown", "web1")
    await_off(libvirt)
    assert "reason=shutdown" in libvirt.log("web1")
    await_none(depriv)


def test_death_of_the_process_that_libvirt_knows_is_qemus(
    libvirt: Libvirt, depriv: CommandLine, folder: Path, shim: str, uids: range
) -> None:
    libvirt.virsh("create", written(folder, shim))
    (row,) = depriv.rows()
    os.kill(known_pid(libvirt), signal.SIGKILL)
    assert guests.await_end(row["pid"])
    await_off(libvirt)
    depriv.run("gc")
    assert depriv.rows() == []
    assert living(uids) == ()


def test_what_is_plugged_in_by_name_is_not_found_and_the_guest_goes_on(
    libvirt: Libvirt, depriv: CommandLine, folder: Path, shim: str
) -> None:
    (folder / "more.raw").write_bytes(bytes(1 << 20))
    libvirt.virsh("create", written(folder, shim))
    for words in (
        ("attach-disk", "web1", f"{folder}/more.raw", "vdb"),
        ("change-media", "web1", "sda", f"{folder}/more.raw", "--update"),
        ("snapshot-create-as", "web1", "one", "--disk-only", "--diskspec", "sda,snapshot=no"),
        ("blockcopy", "web1", "vda", f"{folder}/copy.qcow2", "--transient-job"),
    ):
        assert "No such file or directory" in libvirt.virsh(*words, expect=1), words
    assert libvirt.virsh("domstate", "web1").strip() == "running"
    assert_audited(depriv)


def test_saved_domain_is_whole_but_is_refused_when_it_is_to_be_restored(
    libvirt: Libvirt, depriv: CommandLine, folder: Path, shim: str
) -> None:
    libvirt.virsh("create", written(folder, shim))
    await_said(folder, demo_guest.WRITE_OK)
    libvirt.virsh("save", "web1", f"{folder}/saved")
    await_none(depriv)
    assert "no word names it" in libvirt.virsh("restore", f"{folder}/saved", expect=1)
    assert depriv.rows() == []
    # The state itself is a good one: QEMU alone goes on with it.
    changed = folder / "changed.xml"
    changed.write_text(libvirt.virsh("save-image-dumpxml", f"{folder}/saved").replace(shim, QEMU))
    libvirt.virsh("restore", f"{folder}/saved", "--xml", str(changed))
    before = len(said(folder))
    deadline = time.monotonic() + guests.PATIENCE_S
    while len(said(folder)) == before:
        assert time.monotonic() < deadline, "the restored guest does not go on"
        time.sleep(0.05)
    assert demo_guest.HELLO not in said(folder)  # virtlogd has begun the file anew; the guest has not


ARGUMENTS = "<qemu:commandline><qemu:arg value='-device'/><qemu:arg value='{}'/></qemu:commandline></domain>"
REFUSED = {
    # Where QEMU has no spice at all, libvirt says so.
    "spice": (("<graphics type='vnc'", "<graphics type='spice'"), "spice: QEMU would reach for|spice.* not supported"),
    "a folder": (
        ("</devices>", "<filesystem><source dir='/etc'/><target dir='etc'/></filesystem></devices>"),
        "QEMU would open a folder of the host by name",
    ),
    "a device": (("</domain>", ARGUMENTS.format("vfio-pci,host=0000:00:00.0")), "VFIO gives .* the host's hardware"),
    "memory in a file": (
        ("<vcpu>", "<memoryBacking><source type='file'/></memoryBacking><vcpu>"),
        "guest memory would be a file of the host",
    ),
}


@pytest.mark.parametrize("asked", REFUSED)
def test_domain_that_asks_for_what_cannot_be_had_is_refused_in_deprivs_words(
    libvirt: Libvirt, depriv: CommandLine, folder: Path, shim: str, asked: str
) -> None:
    change, words = REFUSED[asked]
    told = libvirt.virsh("create", written(folder, shim, change), expect=1)
    assert re.search(words, told), told
    assert libvirt.virsh("list", "--all", "--name").strip() == ""
    assert depriv.rows() == []
    assert said(folder) == ""


def without_privilege(depriv: CommandLine, *words: str) -> subprocess.CompletedProcess[str]:
    """Run what libvirt asks what it can do, as libvirt does: with no capability, as a user of no rights."""
    enter = depriv.argv()[: depriv.argv().index("--") + 1]
    drop = ["setpriv", "--reuid=64055", "--regid=64055", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
    return subprocess.run([*enter, *drop, *words], capture_output=True, text=True, check=False, timeout=60)


def types_of(depriv: CommandLine, folder: Path, emulator: str) -> list[str]:
    """Return the names of all that an emulator says it has, when it is asked as libvirt does."""
    path, pidfile = folder / "qmp.sock", folder / "pid"
    more = ("-qmp", f"unix:{path},server=on,wait=off", "-pidfile", str(pidfile), "-daemonize")
    done = without_privilege(depriv, emulator, *PROBE, *more)
    assert done.returncode == 0, done.stderr
    assert ("note: this QEMU runs as it is" in done.stderr) is (emulator != QEMU)
    pid = int(pidfile.read_text())
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert ("NoNewPrivs:\t1" in status) is (emulator != QEMU)
        return sorted(item["name"] for item in answer(path, "qom-list-types"))
    finally:
        os.kill(pid, signal.SIGKILL)
        guests.await_end(pid)
        path.unlink()


def test_who_has_no_privilege_may_ask_qemu_what_it_can_do_and_nothing_else(depriv: CommandLine, shim: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are root's alone
        os.chown(name, 64055, 64055)
        shim = str(shutil.copy(shim, f"{name}/qemu-system-x86_64"))
        # Devices are in modules of QEMU's, which it finds in its own folders only.
        assert types_of(depriv, Path(name), shim) == types_of(depriv, Path(name), QEMU)
        for words in (("-m", "32"), (*PROBE, "-kernel", "/bin/true"), (*PROBE, "-qmp", "tcp:127.0.0.1:1,server=on")):
            refused = without_privilege(depriv, shim, *words)
            assert refused.returncode == 125, words
            assert "only root can run a confined QEMU" in refused.stderr
    assert depriv.rows() == []


def answer(path: Path, command: str) -> Any:
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(str(path))
        stream = made.makefile("rw")
        json.loads(stream.readline())
        stream.write(json.dumps({"execute": "qmp_capabilities"}) + json.dumps({"execute": command}))
        stream.flush()
        stream.readline()
        return json.loads(stream.readline())["return"]


def test_reference_has_the_configuration_that_is_tested() -> None:
    blocks = re.findall(r"```ini\n(.*?)```", REFERENCE.read_text(), re.DOTALL)
    assert [block for block in blocks if "clear_emulator_capabilities" in block] == [libvirtd.QEMU_CONF]
