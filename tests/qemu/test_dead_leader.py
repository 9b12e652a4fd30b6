# SPDX-License-Identifier: Apache-2.0
"""A QEMU whose main thread has ended while others live on: waitpid, pidfd and half of /proc say nothing of it then.

QEMU's sandbox makes it happen: a denied system call may kill the calling thread alone (qemu-seccomp.c, QEMU 7.2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import await_end
from tests.support.host import living, need

from depriv import proc
from depriv.api import audit_process
from depriv.config import Disk, Domain
from depriv.errors import DeprivError

if TYPE_CHECKING:
    from pathlib import Path

    from depriv.api import Guest, Toolstack
    from depriv.entry import Entry

pytestmark = [pytest.mark.qemu, pytest.mark.root]

# <linux/ptrace.h>, <sys/user.h>
PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 12, 13, 17, 0x4206, 0x4207
REGISTERS = struct.Struct("27Q")  # struct user_regs_struct
RAX, RDI, ORIG_RAX, RIP = 10, 14, 15, 16
SYS_EXIT = 60
WALL = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int, data: object = None) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request}")


def syscall_address(pid: int) -> int:
    """Return where in the process a syscall instruction stands: the vDSO has one for its slow paths."""
    with open(f"/proc/{pid}/maps", encoding="ascii") as file:
        (line,) = [line for line in file if "[vdso]" in line]
    start, end = (int(word, 16) for word in line.split()[0].split("-"))
    with open(f"/proc/{pid}/mem", "rb") as memory:
        memory.seek(start)
        at = memory.read(end - start).index(b"\x0f\x05")
    return start + at


def end_main_thread(pid: int) -> None:
    """Make the main thread call exit(2), which ends it and no other."""
    ptrace(PTRACE_SEIZE, pid)
    ptrace(PTRACE_INTERRUPT, pid)
    os.waitpid(pid, WALL)
    registers = ctypes.create_string_buffer(REGISTERS.size)
    ptrace(PTRACE_GETREGS, pid, registers)
    values = list(REGISTERS.unpack(registers.raw))
    values[RAX], values[RDI], values[RIP] = SYS_EXIT, 0, syscall_address(pid)
    values[ORIG_RAX] = (1 << 64) - 1  # whatever it was in is not restarted
    ptrace(PTRACE_SETREGS, pid, ctypes.create_string_buffer(REGISTERS.pack(*values), REGISTERS.size))
    ptrace(PTRACE_DETACH, pid)
    deadline = time.monotonic() + 5
    while True:
        with open(f"/proc/{pid}/stat", "rb") as file:
            if file.read().rpartition(b") ")[2][:1] == b"Z":
                return
        assert time.monotonic() < deadline, "the main thread does not end"
        time.sleep(0.01)


@pytest.fixture
def leaderless(host: Toolstack, disk: Path) -> Guest:
    need(os.uname().machine == "x86_64", what="x86_64")
    guest = host.create(Domain(name="headless", disks=(Disk(vdev="xvda", target=str(disk)),)))
    end_main_thread(guest.row().pid)
    return guest


def others(pid: int) -> tuple[int, ...]:
    return tuple(tid for tid in proc.threads(pid) if tid != pid)


def test_qemu_without_its_main_thread_is_listed_as_dead_and_not_as_gone(host: Toolstack, leaderless: Guest) -> None:
    row = leaderless.row()
    assert others(row.pid), "nothing is left of it: this proves nothing"
    assert row.state == "dead"
    assert [guest.name for guest in host.guests()] == ["headless"]


def test_its_audit_does_not_hold_and_says_why(host: Toolstack, leaderless: Guest) -> None:
    report = leaderless.audit()
    assert not report.holds
    (alive,) = [check for check in report.checks if check.id == "alive"]
    assert not alive.holds
    # What still runs is still looked at.
    held = {check.id: check.holds for check in report.checks}
    assert held.get("caps.effective", True)
    assert not audit_process(leaderless.row().pid, host).holds


def test_its_console_ends_in_time(leaderless: Guest) -> None:
    began = time.monotonic()
    with pytest.raises(DeprivError):
        leaderless.console()
    assert time.monotonic() - began < 8


def test_destroy_ends_every_thread_of_it(host: Toolstack, leaderless: Guest) -> None:
    row = leaderless.row()
    uid = host.registry.find("headless").uid
    assert living(range(uid, uid + 1)) == (row.pid,)
    leaderless.destroy()
    assert living(range(uid, uid + 1)) == ()
    assert await_end(row.pid, within_s=0.1)
    assert host.guests() == ()


def test_its_disk_is_nobodys_while_a_thread_lives_and_its_name_not_before_all_are_killed(
    host: Toolstack, leaderless: Guest, disk: Path
) -> None:
    pid = leaderless.row().pid
    assert others(pid)
    host.registry.save(entry_preserved(host, leaderless))
    again = Domain(name="headless", disks=(Disk(vdev="xvda", target=str(disk)),))
    with pytest.raises(DeprivError, match="exists"):
        host.create(again)
    with pytest.raises(DeprivError, match="is in use by domain headless"):
        host.create(again.replace(name="other"))
    assert others(pid)
    host.registry.save(entry_preserved(host, leaderless, on_crash="destroy"))
    assert host.create(again).row().state == "running"
    assert not os.path.exists(f"/proc/{pid}") or not others(pid)


def entry_preserved(host: Toolstack, guest: Guest, on_crash: str = "preserve") -> Entry:
    """Return the guest's entry as if its configuration had said so."""
    entry = host.registry.find(guest.name)
    return entry.replace(config={**(entry.config or {}), "on_crash": on_crash})


def test_it_can_be_killed_from_outside_too(leaderless: Guest) -> None:
    pid = leaderless.row().pid
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and others(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert leaderless.row().state == "dead"
