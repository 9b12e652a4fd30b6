# SPDX-License-Identifier: Apache-2.0
"""A real Linux in a confined QEMU: it boots, uses its disks and its CD, and switches itself off."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.support import iso, linux
from tests.support.guests import await_console, await_end, await_state

from depriv.config import Disk, Domain

if TYPE_CHECKING:
    from pathlib import Path

    from depriv.api import Guest, Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.linux]

MIB = 1 << 20
BOOT_S = 120.0  # under emulation, on a busy machine


@pytest.fixture(scope="session")
def kernel() -> linux.LinuxGuest:
    return linux.linux_guest()


def data_disk(path: Path, text: str, mib: int = 4) -> str:
    path.write_bytes(text.encode().ljust(mib * MIB, b"\0"))
    path.chmod(0o600)
    return str(path)


def domain(kernel: linux.LinuxGuest, machine: str, tests: tuple[str, ...], disks: tuple[Disk, ...]) -> Domain:
    return Domain(
        name=f"linux-{machine}",
        machine=machine,
        memory_mib=256,
        kernel=kernel.kernel,
        ramdisk=kernel.initramfs,
        cmdline=linux.command_line(*tests, machine=machine),
        disks=disks,
    )


def tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-4096, os.SEEK_END)
        return file.read()


def ends_by_itself(host: Toolstack, guest: Guest) -> str:
    """Wait until the guest has switched off; its QEMU stays, confined, until the domain is destroyed."""
    said = await_console(guest, "guest: done", within_s=BOOT_S)
    await_state(guest, "shutdown", within_s=BOOT_S)
    assert guest.audit().holds
    pid = guest.row().pid
    guest.destroy()
    assert await_end(pid, within_s=0.1)
    assert host.guests() == ()
    return said


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_linux_uses_its_disks_and_its_cd_and_switches_off(
    host: Toolstack, kernel: linux.LinuxGuest, tmp_path: Path, machine: str
) -> None:
    one, two, cd = tmp_path / "one.img", tmp_path / "two.img", tmp_path / "cd.iso"
    cd.write_bytes(iso.iso({"HELLO.TXT": b"text on the cd\n"}))
    untouched = cd.read_bytes()
    # The cloud kernel has no AHCI driver: on q35 the drive is a SCSI one.
    drive = "hdc" if machine == "pc" else "sdb"
    disks = (
        Disk(vdev="xvda", target=data_disk(one, "text on disk one")),
        Disk(vdev="sda", target=data_disk(two, "text on disk two")),
        Disk(vdev=drive, target=str(cd), readonly=True, cdrom=True, discard=False),
    )
    guest = host.create(domain(kernel, machine, ("disk", "poweroff"), disks))
    assert guest.audit().holds
    said = ends_by_itself(host, guest)
    assert "disk vda: read text on disk one, write ok" in said
    assert "disk sda: read text on disk two, write ok" in said
    assert "cd sr0: hello.txt: text on the cd" in said
    for path in (one, two):
        assert path.read_bytes().startswith(b"text on disk")
        assert tail(path).startswith(b"written by the guest\n")
        assert path.stat().st_size == 4 * MIB
    assert tail(one) != tail(two)
    assert cd.read_bytes() == untouched


def test_linux_on_a_microvm_uses_its_disk_and_switches_off(
    host: Toolstack, kernel: linux.LinuxGuest, tmp_path: Path
) -> None:
    one = tmp_path / "one.img"
    disks = (Disk(vdev="xvda", target=data_disk(one, "text on disk one")),)
    guest = host.create(domain(kernel, "microvm", ("disk", "poweroff"), disks))
    said = ends_by_itself(host, guest)
    assert "disk vda: read text on disk one, write ok" in said
    assert tail(one).startswith(b"written by the guest\n")


def test_linux_fills_a_qcow2_disk_and_reads_its_base(host: Toolstack, kernel: linux.LinuxGuest, tmp_path: Path) -> None:
    from depriv.config import Layer

    base, top = tmp_path / "base.img", tmp_path / "top.qcow2"
    data_disk(base, "text in the base")
    untouched = base.read_bytes()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(top)], check=True)
    chain = (Layer(target=str(base), format="raw"),)
    disks = (Disk(vdev="xvda", target=str(top), format="qcow2", chain=chain),)
    said = ends_by_itself(host, host.create(domain(kernel, "pc", ("disk", "poweroff"), disks)))
    assert "disk vda: read text in the base, write ok" in said
    assert base.read_bytes() == untouched
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(top), str(flat)], check=True)
    assert tail(flat).startswith(b"written by the guest\n")


def test_linux_cannot_write_a_read_only_disk(host: Toolstack, kernel: linux.LinuxGuest, tmp_path: Path) -> None:
    one = tmp_path / "one.img"
    disks = (Disk(vdev="xvda", target=data_disk(one, "text on disk one"), readonly=True, discard=False),)
    before = one.read_bytes()
    said = ends_by_itself(host, host.create(domain(kernel, "pc", ("disk", "poweroff"), disks)))
    assert "disk vda: read text on disk one, write failed" in said
    assert one.read_bytes() == before


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_linux_shows_a_prompt_on_the_serial_console(
    host: Toolstack, kernel: linux.LinuxGuest, tmp_path: Path, machine: str
) -> None:
    # Files that only root can read: they are copied in, and QEMU never opens them.
    own = tmp_path / "vmlinuz"
    shutil.copyfile(kernel.kernel, own)
    own.chmod(0o600)
    config = domain(kernel, machine, ("shell",), ()).replace(kernel=str(own))
    guest = host.create(config)
    assert linux.PROMPT.strip() in await_console(guest, linux.PROMPT.strip(), within_s=BOOT_S)
    assert guest.row().state == "running"
    report = guest.audit()
    assert report.holds, report.to_text()
    assert os.listdir(f"/proc/{guest.row().pid}/root") == ["dev"]


def test_kernel_that_is_none_boots_no_linux(host: Toolstack, kernel: linux.LinuxGuest, tmp_path: Path) -> None:
    from depriv.errors import MonitorError

    wrong = tmp_path / "vmlinuz"
    wrong.write_bytes(b"this is no kernel" * 1000)
    config = domain(kernel, "pc", ("poweroff",), ()).replace(kernel=str(wrong))
    with pytest.raises(MonitorError, match="QEMU did not start") as caught:
        host.create(config)
    assert "kernel" in caught.value.cause
    assert host.guests() == ()
