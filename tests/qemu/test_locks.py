# SPDX-License-Identifier: Apache-2.0
"""Image locks that are really held, and a file size limit that stops nothing the guest may write."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import await_end, hmp, qemu_log, qmp

from depriv import proc
from depriv.config import Disk, Domain
from depriv.errors import MonitorError

if TYPE_CHECKING:
    from pathlib import Path

    from depriv.api import Guest, Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

MIB = 1 << 20


def sparse(path: Path, mib: int) -> Path:
    with path.open("xb") as file:
        file.truncate(mib * MIB)
    return path


def qcow2(path: Path, mib: int) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), f"{mib}M"], check=True)
    return path


def host_write(path: Path, form: str = "raw") -> subprocess.CompletedProcess[str]:
    """Write to an image as somebody on the host would who does not know of the guest."""
    argv = ["qemu-io", "-f", form, "-c", "write -P 0xee 0 512", str(path)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def create(host: Toolstack, path: Path, *, form: str = "raw", vdev: str = "xvda", readonly: bool = False) -> Guest:
    disk = Disk(vdev=vdev, target=str(path), format=form, readonly=readonly, discard=not readonly)
    return host.create(Domain(name="locks", disks=(disk,)), paused=True)


def check(guest: Guest, name: str) -> bool:
    (found,) = [one for one in guest.audit().checks if one.id == name]
    return found.holds


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_image_cannot_be_written_from_the_host_until_the_guest_is_destroyed(
    host: Toolstack, tmp_path: Path, form: str
) -> None:
    path = sparse(tmp_path / "disk", 1) if form == "raw" else qcow2(tmp_path / "disk", 1)
    guest = create(host, path, form=form)
    assert check(guest, "locks.xvda")
    refused = host_write(path, form)
    assert refused.returncode != 0
    assert 'Failed to get "write" lock' in refused.stderr
    assert b"\xee" not in path.read_bytes()
    guest.destroy()
    # At once: no copy of the open file is left anywhere, in no jail and no command.
    assert host_write(path, form).returncode == 0


def test_lock_ends_with_qemu_even_if_nobody_destroys_the_domain(host: Toolstack, tmp_path: Path) -> None:
    path = sparse(tmp_path / "disk", 1)
    guest = create(host, path)
    pid = guest.row().pid
    os.kill(pid, signal.SIGKILL)
    assert await_end(pid)
    assert host_write(path).returncode == 0


def test_image_of_a_read_only_disk_may_be_read_and_not_written(host: Toolstack, tmp_path: Path) -> None:
    path = sparse(tmp_path / "disk", 1)
    guest = create(host, path, readonly=True)
    assert check(guest, "locks.xvda")
    assert host_write(path).returncode != 0
    argv = ["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", str(path)]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 0


def test_unconfined_qemu_cannot_take_the_disk_of_a_guest(host: Toolstack, tmp_path: Path) -> None:
    path = sparse(tmp_path / "disk", 1)
    create(host, path)
    argv = ["qemu-system-x86_64", "-M", "pc,accel=tcg", "-nodefaults", "-display", "none", "-S"]
    done = subprocess.run(
        [*argv, "-drive", f"file={path},format=raw,if=virtio"], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert 'Failed to get "write" lock' in done.stderr


def test_image_that_another_program_has_locked_starts_no_guest_and_says_who_to_look_for(
    host: Toolstack, tmp_path: Path
) -> None:
    path = sparse(tmp_path / "disk", 1)
    argv = ["qemu-io", "-f", "raw", str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        deadline = time.monotonic() + 10
        while not locked(other.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(MonitorError, match="QEMU did not start") as caught:
            create(host, path)
        assert '"write" lock' in caught.value.cause
        assert "fuser -v" in caught.value.fix
        other.stdin.close()
    assert host.guests() == ()
    create(host, path)


def locked(pid: int) -> bool:
    """Tell whether a process holds a lock of the kind that belongs to an open file."""
    for name in os.listdir(f"/proc/{pid}/fdinfo"):
        with open(f"/proc/{pid}/fdinfo/{name}", encoding="ascii") as file:
            if "OFDLCK" in file.read():
                return True
    return False


def test_audit_fails_when_the_lock_is_gone(host: Toolstack, tmp_path: Path) -> None:
    guest = create(host, sparse(tmp_path / "disk", 1), vdev="sda")
    assert guest.audit().holds
    qmp(host, guest, "device_del", id="sda")  # a node that no device uses is locked by nobody
    deadline = time.monotonic() + 10
    while check(guest, "locks.sda"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    report = guest.audit()
    assert [one.id for one in report.checks if not one.holds] == ["locks.sda"]


def io(host: Toolstack, guest: Guest, command: str) -> str:
    """Have QEMU do what the guest's driver would ask it for; return what qemu-io says of it."""
    qemu_log(host, guest)
    said = hmp(host, guest, f'qemu-io -d /machine/peripheral/xvda/virtio-backend "{command}"')
    return said + qemu_log(host, guest)


def fsize(guest: Guest) -> int:
    return proc.limits(guest.row().pid)["FSIZE"][1]


def test_last_sector_of_a_raw_disk_can_be_written_and_none_behind_it(host: Toolstack, tmp_path: Path) -> None:
    path = sparse(tmp_path / "disk", 64)
    guest = create(host, path)
    assert fsize(guest) == 64 * MIB
    said = io(host, guest, f"write -P 0xab {64 * MIB - 512} 512")
    assert "wrote 512/512 bytes" in said, said
    said = io(host, guest, f"write -P 0xcd {64 * MIB} 512")
    assert "wrote" not in said, said
    with path.open("rb") as file:
        file.seek(-1024, os.SEEK_END)
        assert file.read() == bytes(512) + b"\xab" * 512
    assert path.stat().st_size == 64 * MIB
    guest.destroy()


def test_small_raw_disk_does_not_make_the_limit_too_small_for_qemu_itself(host: Toolstack, tmp_path: Path) -> None:
    guest = create(host, sparse(tmp_path / "disk", 1))
    assert 1 * MIB < fsize(guest) <= 4 * MIB
    assert "wrote 1048576/1048576 bytes" in io(host, guest, "write -P 1 0 1M")


def test_qcow2_disk_can_be_filled_to_the_last_byte(host: Toolstack, tmp_path: Path) -> None:
    path = qcow2(tmp_path / "disk", 64)
    guest = create(host, path, form="qcow2")
    assert path.stat().st_size < MIB
    for at in range(0, 64, 16):
        said = io(host, guest, f"write -P 0x5a {at}M 16M")
        assert f"wrote {16 * MIB}/{16 * MIB} bytes" in said, said
    assert "wrote" not in io(host, guest, "write -P 1 64M 512")
    limit = fsize(guest)
    io(host, guest, "flush")  # as after a power cut, what was not flushed may be lost
    guest.destroy()
    assert 64 * MIB < path.stat().st_size <= limit
    checked = subprocess.run(["qemu-img", "check", "-q", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    argv = ["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x5a 0 64M", str(path)]
    read = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert read.returncode == 0
    assert "verification failed" not in read.stdout


def test_full_qcow2_disk_can_be_discarded_and_written_again(host: Toolstack, tmp_path: Path) -> None:
    guest = create(host, qcow2(tmp_path / "disk", 16), form="qcow2")
    for command in ("write -P 1 0 16M", "discard 0 16M", "write -P 2 0 16M", "discard 4M 4M", "write -P 3 0 16M"):
        said = io(host, guest, command)
        assert f"{command.split()[0].replace('write', 'wrote')}" in said, said
    assert guest.audit().holds
