# SPDX-License-Identifier: Apache-2.0
"""The guests of a storm: those that come and go, and three that nothing may happen to."""

from __future__ import annotations

import os
import select
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.guests import await_console
from tests.support.storm_left import Alive

from depriv import demo_guest, proc
from depriv.config import Disk, Domain

if TYPE_CHECKING:
    from depriv.api import Guest, Toolstack

# Multiboot, section 3.1: magic, flags (bit 16: the addresses that follow count), checksum; here 1 MiB. `cli; hlt; jmp`.
_MAGIC, _FLAGS, _AT = 0x1BADB002, 0x10000, 0x100000
_IDLE = b"\xfa\xf4\xeb\xfd"
# `mov dx, 0x604; mov ax, 0x2000; out dx, ax`: SLP_EN of PM1a_CNT, where SeaBIOS puts it; see ACPI 4.8.3.2.1.
_OFF = b"\x66\xba\x04\x06\x66\xb8\x00\x20\x66\xef"


def kernels(folder: str) -> None:
    """Make two kernels that QEMU loads by itself: "idle" does nothing, "off" switches its machine off."""
    for name, code in (("idle", _IDLE), ("off", _OFF + _IDLE)):
        end = _AT + 32 + len(code)
        head = (_MAGIC, _FLAGS, -(_MAGIC + _FLAGS) & 0xFFFFFFFF, _AT, _AT, end, end, _AT + 32)
        Path(folder, name).write_bytes(struct.pack("<8I", *head) + code)


def config_text(folder: str, name: str, *, crash: str, kernel: str) -> str:
    """Return the configuration of a guest for whose start a plan needs nearly every kind of step; make its disk."""
    disk = f"{folder}/{name}.img"
    with open(disk, "wb") as file:
        file.truncate(1 << 20)
    return (
        f'name = "{name}"\ntype = "hvm"\nmemory = 32\nserial = "pty"\nkernel = "{folder}/{kernel}"\n'
        f'ramdisk = "{folder}/idle"\ndisk = ["{disk},raw,xvda,rw"]\non_crash = "{crash}"\n'
    )


class Live:
    """Three guests: two that tick on their serial port, one of them on q35, and one that is paused."""

    def __init__(self, host: Toolstack, folder: str) -> None:
        """Start them, and see the first two tick."""
        self._guests: list[Guest] = []
        self._host = host
        for number, (machine, paused) in enumerate((("pc", False), ("q35", False), ("pc", True))):
            path = f"{folder}/live{number}.img"
            Path(path).write_bytes(demo_guest.image(text=f"live {number}"))
            disk = Disk(vdev="xvda", target=path)
            domain = Domain(name=f"live{number}", memory_mib=32, machine=machine, disks=(disk,))
            self._guests.append(host.create(domain, paused=paused))
        self._rows = [guest.row() for guest in self._guests]
        self._births = [proc.start_time(row.pid) for row in self._rows]
        self._pidfds = [os.pidfd_open(row.pid) for row in self._rows]
        for guest in self._guests[:2]:
            await_console(guest, demo_guest.WRITE_OK)
        self._said = [len(guest.console()) for guest in self._guests]

    def alive(self) -> tuple[Alive, ...]:
        """Return who they are."""
        return tuple(Alive(domid=row.domid, uid=row.uid, pid=row.pid) for row in self._rows)

    def dead(self) -> list[str]:
        """Return the names of those that have died: what can be asked at any time."""
        poll = select.poll()
        names = dict(zip(self._pidfds, (row.name for row in self._rows), strict=True))
        for fd in names:
            poll.register(fd, select.POLLIN)
        return [names[fd] for fd, _event in poll.poll(0)]

    def harmed(self) -> list[str]:
        """Return what has happened to any of them, in words."""
        found = [f"{name} is dead" for name in self.dead()]
        for number, guest in enumerate(() if found else self._guests):
            row = guest.row()
            if row != self._rows[number] or proc.start_time(row.pid) != self._births[number]:
                found.append(f"{row.name} was {self._rows[number]} and is {row}")
            wrong = [str(check) for check in guest.audit().checks if not check.holds]
            found += [f"{row.name}: {check}" for check in wrong]
            said = len(guest.console())
            if number < 2 and said <= self._said[number] < 1 << 20:
                found.append(f"{row.name} ticks no more")
            if number == 2 and said:
                found.append(f"{row.name} has run")
            self._said[number] = said
        return found

    def close(self) -> None:
        """End them."""
        for fd in self._pidfds:
            os.close(fd)
        for guest in self._guests:
            guest.destroy()
