# SPDX-License-Identifier: Apache-2.0
"""Real guests on every machine and kind of disk: confined, audited, running, and gone without a trace."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import await_console, await_state, hmp
from tests.support.host import need

from depriv import demo_guest
from depriv.config import Disk, Domain, Layer
from depriv.errors import ConfigError, DeprivError, JailError
from depriv.status import connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from depriv.api import Guest, Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

READ = f"{demo_guest.SAYS}the text of this disk"
REQUESTS = 3000  # of 2 disks x 8 queues x 256


def holds(guest: Guest) -> None:
    report = guest.audit()
    assert report.holds, report.to_text()


@pytest.mark.parametrize(
    ("machine", "vdev"),
    [("pc", "xvda"), ("pc", "hda"), ("pc", "sda"), ("q35", "xvda"), ("q35", "hda"), ("q35", "sda")],
)
def test_guest_boots_from_its_disk_reads_and_writes_it_and_every_check_holds(
    host: Toolstack, disk: Path, machine: str, vdev: str
) -> None:
    warnings: list[str] = []
    config = Domain(name="boots", machine=machine, disks=(Disk(vdev=vdev, target=str(disk)),))
    guest = host.create(config, warn=warnings.append)
    said = await_console(guest, demo_guest.WRITE_OK)
    assert demo_guest.HELLO in said
    assert READ in said
    assert demo_guest.boots(disk.read_bytes()) == 1
    holds(guest)
    row = guest.row()
    assert (row.state, row.dm_restrict, row.accel) == ("running", True, "tcg")
    assert (os.stat(disk).st_uid, os.stat(disk).st_mode & 0o777) == (0, 0o600)
    assert warnings == []
    guest.destroy()
    assert host.guests() == ()


def test_microvm_has_its_disk_and_every_check_holds(host: Toolstack, disk: Path) -> None:
    guest = host.create(Domain(name="micro", machine="microvm", disks=(Disk(vdev="xvda", target=str(disk)),)))
    assert "virtio-blk-device" in hmp(host, guest, "info qtree")
    assert guest.row().state == "running"
    holds(guest)


def test_domain_without_disks_runs(host: Toolstack) -> None:
    guest = host.create(Domain(name="bare"))
    assert guest.row().state == "running"
    holds(guest)


@pytest.mark.parametrize(("machine", "vdev"), [("pc", "hdc"), ("q35", "hda"), ("q35", "sdb")])
def test_cd_rom_is_there_with_its_medium_and_read_only(host: Toolstack, cd: Path, machine: str, vdev: str) -> None:
    before = cd.read_bytes()
    drive = Disk(vdev=vdev, target=str(cd), readonly=True, cdrom=True, discard=False)
    guest = host.create(Domain(name="cd", machine=machine, disks=(drive,)))
    said = hmp(host, guest, "info block")
    assert f"{vdev}: /dev/fdset/10 (raw, read-only)" in said.replace("/file", ""), said
    assert "Removable device" in said
    holds(guest)
    guest.destroy()
    assert cd.read_bytes() == before


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_cd_rom_drive_may_be_empty(host: Toolstack, machine: str) -> None:
    drive = Disk(vdev="hdc", format="empty", readonly=True, cdrom=True, discard=False)
    guest = host.create(Domain(name="empty", machine=machine, disks=(drive,)))
    assert "[not inserted]" in hmp(host, guest, "info block")
    holds(guest)


def test_disk_and_cd_rom_go_together(host: Toolstack, disk: Path, cd: Path) -> None:
    drive = Disk(vdev="hdc", target=str(cd), readonly=True, cdrom=True, discard=False)
    guest = host.create(Domain(name="both", disks=(Disk(vdev="xvda", target=str(disk)), drive)))
    assert READ in await_console(guest, demo_guest.WRITE_OK)
    holds(guest)


def converted(disk: Path, name: str, *options: str) -> Path:
    path = disk.with_name(name)
    subprocess.run(
        ["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", *options, str(disk), str(path)], check=True
    )
    return path


def overlay(base: Path, form: str, name: str) -> Path:
    path = base.with_name(name)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", form, "-b", str(base), str(path)]
    subprocess.run(argv, check=True)
    return path


def contents(path: Path, form: str, tmp_path: Path) -> bytes:
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", str(path), str(flat)], check=True)
    return flat.read_bytes()


def test_qcow2_disk_is_read_and_written(host: Toolstack, disk: Path, tmp_path: Path) -> None:
    image = converted(disk, "disk.qcow2")
    guest = host.create(Domain(name="q", disks=(Disk(vdev="xvda", target=str(image), format="qcow2"),)))
    assert READ in await_console(guest, demo_guest.WRITE_OK)
    holds(guest)
    guest.destroy()
    assert demo_guest.boots(contents(image, "qcow2", tmp_path)) == 1


def test_chain_of_three_is_read_through_and_only_its_top_is_written(
    host: Toolstack, disk: Path, tmp_path: Path
) -> None:
    middle = overlay(disk, "raw", "middle.qcow2")
    top = overlay(middle, "qcow2", "top.qcow2")
    below = (disk.read_bytes(), middle.read_bytes())
    chain = (Layer(target=str(middle), format="qcow2"), Layer(target=str(disk), format="raw"))
    guest = host.create(Domain(name="c", disks=(Disk(vdev="xvda", target=str(top), format="qcow2", chain=chain),)))
    assert READ in await_console(guest, demo_guest.WRITE_OK)
    holds(guest)
    guest.destroy()
    assert (disk.read_bytes(), middle.read_bytes()) == below
    assert demo_guest.boots(contents(top, "qcow2", tmp_path)) == 1


@pytest.mark.parametrize(("vdev", "machine"), [("xvda", "pc"), ("sda", "q35")])
def test_read_only_disk_is_read_and_not_written(host: Toolstack, disk: Path, vdev: str, machine: str) -> None:
    before = disk.read_bytes()
    readonly = Disk(vdev=vdev, target=str(disk), readonly=True, discard=False)
    guest = host.create(Domain(name="ro", machine=machine, disks=(readonly,)))
    assert READ in await_console(guest, demo_guest.WRITE_FAILED)
    holds(guest)
    assert disk.read_bytes() == before


@pytest.fixture
def loop(disk: Path) -> Iterator[str]:
    """Return a block device with the demonstration guest on it."""
    done = subprocess.run(["losetup", "--find", "--show", str(disk)], capture_output=True, text=True, check=False)
    need(done.returncode == 0, what="loop")
    device = done.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_block_device_is_read_and_written(host: Toolstack, loop: str, disk: Path) -> None:
    guest = host.create(Domain(name="b", disks=(Disk(vdev="xvda", target=loop),)))
    assert READ in await_console(guest, demo_guest.WRITE_OK)
    holds(guest)
    guest.destroy()
    subprocess.run(["blockdev", "--flushbufs", loop], check=True)
    assert demo_guest.boots(disk.read_bytes()) == 1


def test_firmware_may_be_a_file_that_only_root_can_read(host: Toolstack, disk: Path, tmp_path: Path) -> None:
    own = tmp_path / "my-bios.bin"
    with open("/usr/share/seabios/bios-256k.bin", "rb") as file:
        own.write_bytes(file.read())
    own.chmod(0o600)
    guest = host.create(Domain(name="fw", firmware=str(own), disks=(Disk(vdev="xvda", target=str(disk)),)))
    assert READ in await_console(guest, demo_guest.WRITE_OK)
    holds(guest)


def test_firmware_that_is_none_boots_nothing(host: Toolstack, disk: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.bin"
    wrong.write_bytes(bytes.fromhex("f4ebfd").ljust(65536, b"\xf4"))  # hlt; jmp back; for ever
    guest = host.create(Domain(name="fw", firmware=str(wrong), disks=(Disk(vdev="xvda", target=str(disk)),)))
    assert guest.row().state == "running"
    assert guest.console() == b""


def test_without_restriction_it_is_said_and_the_audit_does_not_hold(host: Toolstack, disk: Path) -> None:
    warnings: list[str] = []
    config = Domain(name="open", dm_restrict=False, disks=(Disk(vdev="xvda", target=str(disk)),))
    guest = host.create(config, warn=warnings.append)
    assert [text for text in warnings if "dm_restrict = 0" in text]
    assert not guest.row().dm_restrict
    report = guest.audit()
    assert not report.holds
    assert [check.holds for check in report.checks if check.id == "dm_restrict"] == [False]
    # What is not for sale, even so.
    kept = {check.id: check.holds for check in report.checks}
    assert all(kept[name] for name in ("ids.uid", "ids.gid", "caps.effective", "caps.bounding", "no_new_privs"))
    assert READ in await_console(guest, demo_guest.WRITE_OK)


def test_paused_guest_has_run_nothing_and_goes_on_when_told(host: Toolstack, disk: Path) -> None:
    config = Domain(name="paused", disks=(Disk(vdev="xvda", target=str(disk)),))
    guest = host.create(config, paused=True)
    holds(guest)
    assert guest.row().state == "paused"
    assert guest.console() == b""
    hmp(host, guest, "cont")
    assert READ in await_console(guest, demo_guest.WRITE_OK)
    assert guest.row().state == "running"
    hmp(host, guest, "stop")
    await_state(guest, "paused")


def test_kvm_is_handed_over_as_one_device_and_every_check_holds(host: Toolstack, disk: Path) -> None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        opens = True
    except OSError:
        opens = False
    need(opens, what="kvm")
    before = os.stat("/dev/kvm")
    config = Domain(name="kvm", accel="kvm", disks=(Disk(vdev="xvda", target=str(disk)),))
    try:
        guest = host.create(config, paused=True)
    except DeprivError as error:
        # The device opens on some hosts whose processor runs no guest.
        need("failed to initialize kvm" not in f"{error.cause}".lower(), what="kvm")
        raise
    holds(guest)
    after = os.stat("/dev/kvm")
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


def in_parallel(host: Toolstack, configs: list[Domain]) -> list[Guest | DeprivError]:
    results: list[Guest | DeprivError | None] = [None] * len(configs)

    def one(number: int) -> None:
        try:
            results[number] = host.create(configs[number])
        except DeprivError as error:
            results[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(configs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [result for result in results if result is not None]


def test_of_two_creates_of_one_name_at_once_one_wins_and_the_other_says_why(host: Toolstack) -> None:
    results = in_parallel(host, [Domain(name="one")] * 2)
    lost = [result for result in results if isinstance(result, DeprivError)]
    assert len(results) == 2
    assert len(lost) == 1
    assert isinstance(lost[0], ConfigError)
    assert "a domain named 'one' exists" in str(lost[0])
    assert "depriv destroy one" in lost[0].fix
    assert [guest.name for guest in host.guests()] == ["one"]
    holds(host.guest("one"))


def test_of_two_creates_on_one_disk_at_once_one_wins_and_the_other_says_why(host: Toolstack, disk: Path) -> None:
    configs = [Domain(name=name, disks=(Disk(vdev="xvda", target=str(disk)),)) for name in ("a", "b")]
    results = in_parallel(host, configs)
    (lost,) = [result for result in results if isinstance(result, DeprivError)]
    (won,) = [result for result in results if not isinstance(result, DeprivError)]
    assert f"is in use by domain {won.name}" in str(lost)
    assert READ in await_console(won, demo_guest.WRITE_OK)


def test_name_and_disk_are_free_again_after_destroy(host: Toolstack, disk: Path) -> None:
    config = Domain(name="again", disks=(Disk(vdev="xvda", target=str(disk)),))
    uids: set[int] = set()
    for count in (1, 2, 3):
        guest = host.create(config)
        await_console(guest, demo_guest.WRITE_OK)
        uids.add(guest.row().uid)
        guest.destroy()
        assert demo_guest.boots(disk.read_bytes()) == count
    assert len(uids) == 3, "a uid came back at once"


def test_qemu_with_as_many_requests_in_flight_as_its_queues_hold_lives_on(host: Toolstack, tmp_path: Path) -> None:
    """Each is a coroutine with a stack of its own: QEMU aborts where it cannot map one (RLIMIT_AS)."""
    disks: list[Disk] = []
    for name in ("xvda", "xvdb"):
        path = tmp_path / name
        path.write_bytes(bytes(1 << 20))
        disks.append(Disk(vdev=name, target=str(path)))
    guest = host.create(Domain(name="busy", vcpus=8, disks=tuple(disks)), paused=True)
    backends = [f"/machine/peripheral/{disk.vdev}/virtio-backend" for disk in disks]
    none = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)
    with connect(host.registry.find("busy"), host.registry, timeout_s=10) as monitor:
        for backend in backends:  # one request per second: all others wait
            monitor.execute("block_set_io_throttle", {"id": backend, "iops": 1, **none}, timeout_s=10)
        for number in range(REQUESTS):
            line = f'qemu-io -d {backends[number % 2]} "aio_read -q 0 512"'
            monitor.execute("human-monitor-command", {"command-line": line}, timeout_s=10)
        with open(f"/proc/{guest.row().pid}/status", encoding="ascii") as file:
            size_kib = next(int(line.split()[1]) for line in file if line.startswith("VmSize"))
    assert size_kib > REQUESTS * 1024, "they do not wait: this proves nothing"
    assert guest.row().state == "paused"
    holds(guest)
    guest.destroy()


# Holds the file system mounted, where nobody else sees it, until its input ends.
_MOUNT = 'mount "$1" "$2" && echo && cat'


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[str]:
    """Return a block device that the host has mounted, in another mount namespace than ours."""
    image, point = tmp_path / "fs.img", tmp_path / "point"
    image.write_bytes(bytes(4 << 20))
    point.mkdir()
    subprocess.run(["mkfs.ext2", "-q", str(image)], check=True, timeout=30)
    argv = ["losetup", "--find", "--show", str(image)]
    device = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNT, "sh", device, str(point)]
    try:
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"\n", "not mounted"
            yield device
            assert holder.stdin is not None
            holder.stdin.close()
            holder.wait(10)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=30)


def test_block_device_that_the_host_has_mounted_is_not_opened_for_writing(host: Toolstack, mounted: str) -> None:
    """Two writers of one file system destroy it, and the kernel of the host would parse what a guest wrote."""
    with pytest.raises(JailError) as caught:
        host.create(Domain(name="takes", disks=(Disk(vdev="xvda", target=mounted),)))
    assert caught.value.step.startswith(f"open {mounted} rw (block) for xvda")
    assert "busy" in caught.value.cause.lower()
    assert "the host uses this device" in caught.value.fix
    assert host.guests() == ()
    # Reading it is no danger to the host.
    guest = host.create(Domain(name="reads", disks=(Disk(vdev="xvda", target=mounted, readonly=True, discard=False),)))
    holds(guest)
    guest.destroy()


def test_block_device_that_nobody_uses_is_a_disk(host: Toolstack, disk: Path) -> None:
    """Else the test above would prove nothing."""
    argv = ["losetup", "--find", "--show", str(disk)]
    device = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    try:
        guest = host.create(Domain(name="takes", disks=(Disk(vdev="xvda", target=device),)))
        assert READ in await_console(guest, demo_guest.WRITE_OK)
        holds(guest)
        guest.destroy()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=30)
