# SPDX-License-Identifier: Apache-2.0
"""Ten guests side by side: each alone in its world, and none of them there afterwards."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import threading
from typing import TYPE_CHECKING

import pytest

from depriv import demo_guest, proc
from depriv.config import Disk, Domain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from depriv.api import Guest, Toolstack

pytestmark = [pytest.mark.qemu, pytest.mark.root]

COUNT = 10
# <linux/sched.h>
SPACES = {
    "mnt": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
PTRACE_SEIZE = 0x4206
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long
_libc.syscall.restype = ctypes.c_long


def all_at_once(act: Callable[[int], None]) -> None:
    failed: list[BaseException] = []

    def one(number: int) -> None:
        try:
            act(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def disk_of(folder: Path, number: int) -> str:
    return str(folder / f"disk{number}.img")


@pytest.fixture
def ten(host: Toolstack, tmp_path: Path) -> tuple[Guest, ...]:
    for number in range(COUNT):
        with open(disk_of(tmp_path, number), "xb") as file:
            file.write(demo_guest.image(text=f"the text of disk {number}"))
        os.chmod(disk_of(tmp_path, number), 0o600)

    def create(number: int) -> None:
        disk = Disk(vdev="xvda", target=disk_of(tmp_path, number))
        host.create(Domain(name=f"guest{number}", machine=("pc", "q35")[number % 2], disks=(disk,)))

    all_at_once(create)
    return tuple(host.guest(f"guest{number}") for number in range(COUNT))


def attempt(act: Callable[[], object]) -> str:
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def traced(pid: int) -> None:
    if _libc.ptrace(PTRACE_SEIZE, pid, None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def pidfd_of(pid: int) -> None:
    os.close(os.pidfd_open(pid))


def within(guest: Guest, acts: Callable[[], dict[str, str]], *, spaces: bool) -> dict[str, str]:
    """Return what ``acts`` comes to as the guest's device model: with its ids, and in its namespaces if ``spaces``.

    Without QEMU's and our system call filter, limits or no_new_privs: what holds here holds by ids and namespaces.
    """
    row = guest.row()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if spaces:
                enter(row.pid, row.uid, row.gid)
            else:
                become(row.uid, row.gid)
            os.write(writing, json.dumps(acts()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, said
    found = json.loads(said)
    assert isinstance(found, dict)
    return found


def become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def enter(pid: int, uid: int, gid: int) -> None:
    """Enter all namespaces and the root of a process, and go on as a child, with its ids: setns(2), nsenter(1)."""
    pidfd = os.pidfd_open(pid)
    os.setgroups([])  # in the user namespace there is no group to set
    for name in ("cgroup", "ipc", "uts", "net", "pid", "mnt", "user"):
        if _libc.setns(pidfd, SPACES[name]) < 0:
            raise OSError(ctypes.get_errno(), f"setns {name}")
    os.close(pidfd)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    child = os.fork()  # the pid namespace is the children's
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def attacks(pid: int, path: str) -> dict[str, str]:
    """Try to reach another guest's process and disk."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    return {
        "read disk": attempt(lambda: os.open(path, flags)),
        "write disk": attempt(lambda: os.open(path, os.O_WRONLY | os.O_CLOEXEC)),
        "disk by fd": attempt(lambda: os.open(f"/proc/{pid}/fd/10", flags)),
        "memory": attempt(lambda: os.open(f"/proc/{pid}/mem", flags)),
        "root": attempt(lambda: os.open(f"/proc/{pid}/root/dev/null", flags)),
        "signal": attempt(lambda: os.kill(pid, 0)),
        "kill": attempt(lambda: os.kill(pid, 9)),
        "trace": attempt(lambda: traced(pid)),
    }


def test_ten_guests_share_no_id_and_no_namespace_and_every_check_holds(ten: tuple[Guest, ...]) -> None:
    rows = [guest.row() for guest in ten]
    for field in ("uid", "gid", "pid", "domid"):
        assert len({getattr(row, field) for row in rows}) == COUNT, field
    assert {row.state for row in rows} == {"running"}
    ours = proc.namespaces(os.getpid())
    theirs = [proc.namespaces(row.pid) for row in rows]
    for name in proc.NAMESPACES:
        assert len({ours[name], *(spaces[name] for spaces in theirs)}) == COUNT + 1, name
    assert len({proc.cgroups(row.pid)[""] for row in rows if "" in proc.cgroups(row.pid)}) in (0, COUNT)
    for guest in ten:
        report = guest.audit()
        assert report.holds, report.to_text()


def test_no_guest_reaches_the_disk_or_the_process_of_another(ten: tuple[Guest, ...], tmp_path: Path) -> None:
    victims = [(guest.row().pid, disk_of(tmp_path, number)) for number, guest in enumerate(ten)]
    for number, guest in enumerate(ten):
        pid, path = victims[(number + 1) % COUNT]
        inside = within(guest, lambda pid=pid, path=path: attacks(pid, path), spaces=True)  # type: ignore[misc]
        assert inside == {
            **dict.fromkeys(("read disk", "write disk", "disk by fd", "memory", "root"), "ENOENT"),
            **dict.fromkeys(("signal", "kill", "trace"), "ESRCH"),
        }, guest.name
        # The second wall: the uid alone, among the host's own files and processes.
        outside = within(guest, lambda pid=pid, path=path: attacks(pid, path), spaces=False)  # type: ignore[misc]
        assert set(outside.values()) <= {"EACCES", "EPERM"}, (guest.name, outside)
    assert {guest.row().state for guest in ten} == {"running"}


def test_root_of_the_host_can_do_all_of_it(ten: tuple[Guest, ...], tmp_path: Path) -> None:
    # Else the refusals above would prove nothing.
    pid, path = ten[0].row().pid, disk_of(tmp_path, 0)
    for name in (path, f"/proc/{pid}/mem", f"/proc/{pid}/root/dev/null"):
        os.close(os.open(name, os.O_RDONLY | os.O_CLOEXEC))
    os.kill(pid, 0)


def test_guest_sees_no_process_and_no_file_of_the_host(ten: tuple[Guest, ...]) -> None:
    ours = os.getpid()

    def look() -> dict[str, str]:
        return {
            "root": " ".join(sorted(os.listdir("/"))),
            "dev": " ".join(sorted(os.listdir("/dev"))),
            "make": attempt(lambda: os.mkdir("/x")),
            "up": " ".join(sorted(os.listdir("/../.."))),
            "root id": attempt(lambda: os.setresuid(0, 0, 0)),
            "own process 1": attempt(lambda: os.kill(1, 0)),
            "ours": attempt(lambda: os.kill(ours, 0)),
        }

    for guest in ten[:2]:
        seen = within(guest, look, spaces=True)
        assert seen == {
            "root": "dev",
            "dev": "null",
            "make": "EROFS",
            "up": "dev",
            "root id": "EINVAL",  # user 0 is not mapped
            "own process 1": "ok",  # QEMU
            "ours": "ESRCH",
        }


def test_ten_guests_are_destroyed_at_once(host: Toolstack, ten: tuple[Guest, ...]) -> None:
    cgroups = [host.registry.find(guest.name).cgroup for guest in ten]
    assert all(os.path.isdir(path) for path in cgroups)
    all_at_once(lambda number: ten[number].destroy())
    assert host.guests() == ()
    assert not any(os.path.exists(path) for path in cgroups)
    assert os.listdir(f"{host.registry.folder}/domains") == []
