# SPDX-License-Identifier: Apache-2.0
"""The guests run in an unconfined QEMU: without this, their silence in a jail would prove nothing."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from tests.support import iso, linux

from depriv import demo_guest

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

DISK = "file={disk},format=raw,if=none,id=disk0"
CD = "file={cd},format=raw,if=none,id=cd0,media=cdrom,readonly=on"
IDE = ("-drive", DISK, "-device", "ide-hd,drive=disk0,bus=ide.0")
VIRTIO = ("-drive", DISK, "-device", "virtio-blk-pci,drive=disk0")
SCSI = ("-device", "virtio-scsi-pci", "-drive", DISK, "-device", "scsi-hd,drive=disk0")
MMIO = ("-drive", DISK, "-device", "virtio-blk-device,drive=disk0")
IDE_CD = ("-drive", CD, "-device", "ide-cd,drive=cd0,bus=ide.1")
SCSI_CD = ("-device", "virtio-scsi-pci", "-drive", CD, "-device", "scsi-cd,drive=cd0")


class Console:
    """QEMU's serial port, with everything it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.text = ""

    def wait_for(self, wanted: str, *, within_s: float) -> None:
        """Return once ``wanted`` was said; fail when time is up or QEMU ends."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + within_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while wanted not in self.text:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    pytest.fail(f"no {wanted!r} within {within_s} s, but {self.text!r}")
                data = os.read(self.process.stdout.fileno(), 4096)
                if not data:
                    pytest.fail(f"QEMU ended with {self.process.wait()} before {wanted!r}: {self.text!r}")
                self.text += data.decode("latin-1")

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()


@contextlib.contextmanager
def qemu(machine: str, *arguments: str) -> Generator[Console]:
    argv = ["qemu-system-x86_64", "-machine", f"{machine},accel=tcg", "-m", "256", "-nodefaults", "-no-user-config"]
    argv += ["-display", "none", "-serial", "stdio", "-no-reboot", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as process:
        try:
            yield Console(process)
        finally:
            process.kill()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(demo_guest.image(text="the text of this disk"))
    return path


@pytest.fixture
def data_disk(tmp_path: Path) -> Path:
    path = tmp_path / "data.img"
    path.write_bytes(b"text on the disk".ljust(4 << 20, b"\0"))
    return path


@pytest.fixture
def cd(tmp_path: Path) -> Path:
    path = tmp_path / "cd.iso"
    path.write_bytes(iso.iso({"HELLO.TXT": b"text on the cd\n"}))
    return path


def filled(options: tuple[str, ...], *, disk: Path, cd: Path | None = None) -> list[str]:
    return [option.format(disk=disk, cd=cd) for option in options]


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("machine", "options"),
    [
        pytest.param("pc", IDE, id="pc-ide"),
        pytest.param("pc", VIRTIO, id="pc-virtio"),
        pytest.param("q35", IDE, id="q35-ahci"),
        pytest.param("q35", VIRTIO, id="q35-virtio"),
        pytest.param("q35", SCSI, id="q35-virtio-scsi"),
    ],
)
def test_demonstration_guest_says_hello_reads_and_writes_its_disk(
    machine: str, options: tuple[str, ...], disk: Path
) -> None:
    with qemu(machine, *filled(options, disk=disk)) as console:
        console.wait_for("\r\n" + "." * 10 + "\r\n.", within_s=30)
    says = f"{demo_guest.HELLO}\r\n{demo_guest.SAYS}the text of this disk\r\n{demo_guest.WRITE_OK}\r\n.."
    assert console.text.startswith(says)
    assert demo_guest.boots(disk.read_bytes()) == 1


@pytest.mark.qemu
def test_demonstration_guest_counts_its_boots(disk: Path) -> None:
    for _boot in range(3):
        with qemu("pc", *filled(VIRTIO, disk=disk)) as console:
            console.wait_for(demo_guest.WRITE_OK, within_s=30)
    assert demo_guest.boots(disk.read_bytes()) == 3


@pytest.mark.qemu
def test_demonstration_guest_says_when_its_disk_refuses_the_write(disk: Path) -> None:
    before = disk.read_bytes()
    readonly = ("-drive", f"{DISK},readonly=on", *VIRTIO[2:])
    with qemu("pc", *filled(readonly, disk=disk)) as console:
        console.wait_for(f"{demo_guest.WRITE_FAILED}\r\n..", within_s=30)
    assert demo_guest.WRITE_OK not in console.text
    assert disk.read_bytes() == before


@pytest.mark.qemu
def test_demonstration_guest_says_when_its_text_cannot_be_read(disk: Path) -> None:
    broken = "driver=raw,node-name=disk0,file.driver=blkdebug,file.image.driver=file,file.image.filename={disk}"
    rule = ",file.inject-error.0.event=none,file.inject-error.0.sector=1,file.inject-error.0.iotype=read"
    with qemu("pc", *filled(("-blockdev", broken + rule, *VIRTIO[2:]), disk=disk)) as console:
        console.wait_for(f"{demo_guest.WRITE_OK}\r\n..", within_s=30)
    assert f"{demo_guest.HELLO}\r\n{demo_guest.READ_FAILED}\r\n" in console.text
    assert demo_guest.SAYS not in console.text


@pytest.mark.qemu
@pytest.mark.linux
@pytest.mark.parametrize(
    ("machine", "options"),
    [
        pytest.param("pc", (*VIRTIO, *IDE_CD), id="pc-virtio"),
        pytest.param("pc", (*IDE, *IDE_CD), id="pc-ide"),
        pytest.param("q35", (*VIRTIO, *SCSI_CD), id="q35"),
        pytest.param("microvm", MMIO, id="microvm"),
    ],
)
def test_linux_reads_and_writes_its_disk_reads_its_cd_and_switches_off(
    machine: str, options: tuple[str, ...], data_disk: Path, cd: Path
) -> None:
    guest = linux.linux_guest()
    words = linux.command_line("disk", "poweroff", machine=machine)
    arguments = ["-kernel", guest.kernel, "-initrd", guest.initramfs, "-append", words]
    with qemu(machine, *arguments, *filled(options, disk=data_disk, cd=cd)) as console:
        console.wait_for("guest: done", within_s=60)
        assert console.process.wait(20) == 0
    name = "sda" if options[: len(IDE)] == IDE else "vda"
    assert f"disk {name}: read text on the disk, write ok\r\n" in console.text
    assert ("cd sr0: hello.txt: text on the cd\r\n" in console.text) == ("cdrom" in " ".join(options))
    assert data_disk.read_bytes()[-4096:].startswith(b"written by the guest\n")


@pytest.mark.qemu
@pytest.mark.linux
def test_linux_says_when_its_disk_refuses_the_write(data_disk: Path) -> None:
    guest = linux.linux_guest()
    arguments = ["-kernel", guest.kernel, "-initrd", guest.initramfs, "-append", linux.command_line("disk")]
    readonly = ("-drive", f"{DISK},readonly=on", *VIRTIO[2:])
    with qemu("pc", *arguments, *filled(readonly, disk=data_disk)) as console:
        console.wait_for("guest: done", within_s=60)
    assert "disk vda: read text on the disk, write failed\r\n" in console.text


@pytest.mark.qemu
@pytest.mark.linux
def test_linux_offers_a_shell_on_its_serial_port() -> None:
    guest = linux.linux_guest()
    arguments = [
        "-kernel",
        guest.kernel,
        "-initrd",
        guest.initramfs,
        "-append",
        linux.command_line("shell", "poweroff"),
    ]
    with qemu("pc", *arguments) as console:
        console.wait_for(linux.PROMPT, within_s=60)
        console.type("uname -r; echo $((6 * 7))\n")
        console.wait_for(f"\r\n{guest.release}\r\n42\r\n", within_s=20)
        console.type("exit\n")
        assert console.process.wait(20) == 0
