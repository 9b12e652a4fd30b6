# SPDX-License-Identifier: Apache-2.0
"""A seccomp filter of our own, below QEMU's: no new socket, no new process, nothing that no QEMU ever needs. Pure.

QEMU's ``-sandbox`` leaves 321 of 362 calls open, ``connect`` and ``ptrace`` among them, and Debian's QEMU for Xen is
built without it. A descriptor of a listening TCP socket, which a VNC server needs, could be disconnected and connected
to anywhere by whoever has taken over QEMU: every socket that QEMU needs is handed in, none is made, bound or connected.
Why a list of what is denied, and what it cannot see: docs/adr/0013.
"""

from __future__ import annotations

from depriv.errors import PlanError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, TypeAlias

    # Operation; where to go if it is true, and if not: an end's name, or how many instructions to skip; its operand.
    _Instruction: TypeAlias = tuple[int, str | int, str | int, int]

# name -> number on x86_64 (arch/x86/entry/syscalls/syscall_64.tbl) and on aarch64 (include/uapi/asm-generic/unistd.h),
# -1: not there. Linux 6.1.
_NETWORK: Final = {"bind": (49, 200), "connect": (42, 203), "socket": (41, 198)}
_NEVER: Final = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, -1),
    "iopl": (172, -1),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_secret": (447, 447),
    "mknod": (133, -1),
    "mknodat": (259, 33),
    "modify_ldt": (154, -1),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
# What passt makes its own namespaces with, before it loads a filter of its own: isolation.c of passt 2023-03-09.
_ISOLATING: Final = ("mount", "pivot_root", "umount2", "unshare")
_SPAWN: Final = {"execveat": (322, 281), "fork": (57, -1), "vfork": (58, -1)}  # execve stays: it starts QEMU
_CLONE: Final = (56, 220)
_CLONE3: Final = (435, 435)  # its flags are in memory, which no filter can read
_CLONE_THREAD: Final = 0x00010000  # <linux/sched.h>
# Their numbers, and which argument, from 0, is their flags. With MSG_FASTOPEN they connect, see tcp(7): shutdown(2)
# disconnects a listener, then one sendto(2) takes it anywhere.
_SEND: Final = {"sendmmsg": (307, 269, 3), "sendmsg": (46, 211, 2), "sendto": (44, 206, 3)}
# Of a tap's descriptor: each changes the interface on the host, and no capability is asked for. SIOCSIFHWADDR gives it
# another's address, which its bridge then takes for its own; TUNSETPERSIST has it outlive its guest. drivers/net/tun.c;
# TUNSETIFF, TUNSETPERSIST, TUNSETOWNER, TUNSETLINK, TUNSETGROUP.
_IOCTL: Final = (16, 29)
_IOCTLS: Final = (0x8924, 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CD, 0x400454CE)
_MSG_FASTOPEN: Final = 0x20000000  # <linux/socket.h>
_ARCHES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, <linux/audit.h>
_X32: Final = 0x40000000  # __X32_SYSCALL_BIT: the same calls by other numbers, x86_64 only

# <linux/bpf_common.h>, <linux/seccomp.h>
_LOAD: Final = 0x20
_JUMP_IF_EQUAL: Final = 0x15
_JUMP_IF_AT_LEAST: Final = 0x35
_JUMP_IF_BITS: Final = 0x45
_RETURN: Final = 0x06
_KILL_PROCESS: Final = 0x80000000
_EPERM: Final = 0x00050001  # SECCOMP_RET_ERRNO | EPERM
_ENOSYS: Final = 0x00050026  # glibc then takes clone
_ALLOW: Final = 0x7FFF0000
# struct seccomp_data: where what is, in bytes
_NUMBER: Final = 0
_ARCH: Final = 4
_ARGUMENTS: Final = 16  # of 8 bytes each, the lower half first
# What every way through the filter ends in, and the order in which these stand behind the rest.
_ENDS: Final = {"allow": _ALLOW, "deny": _EPERM, "lack": _ENOSYS, "kill": _KILL_PROCESS}


def program(processor: str, *, network: bool, isolates: bool = False) -> str:
    """Return the filter as an array of struct sock_filter in hexadecimal, for ``steps.Filter``.

    Args:
        processor: As uname(2) has it.
        network: Leave QEMU the making of sockets: it stays in the host's network, as the caller has asked.
        isolates: Leave what a tool needs to enclose itself further, which QEMU does not.

    Raises:
        PlanError: the numbers of that processor's calls are not known here.
    """
    if processor not in _ARCHES:
        raise PlanError(
            f"no system call filter is known for the processor {processor}", fix=f"use one of {', '.join(_ARCHES)}"
        )
    column, arch = _ARCHES[processor]
    names = {**_SPAWN, **_NEVER} if network else {**_NETWORK, **_SPAWN, **_NEVER}
    if isolates:
        names = {name: numbers for name, numbers in names.items() if name not in _ISOLATING}
    code: list[_Instruction] = [(_LOAD, 0, 0, _ARCH), (_JUMP_IF_EQUAL, 0, "kill", arch), (_LOAD, 0, 0, _NUMBER)]
    if processor == "x86_64":
        code.append((_JUMP_IF_AT_LEAST, "deny", 0, _X32))
    code += [
        (_JUMP_IF_EQUAL, "deny", 0, number)
        for number in sorted(numbers[column] for numbers in names.values() if numbers[column] >= 0)
    ]
    code.append((_JUMP_IF_EQUAL, "lack", 0, _CLONE3[column]))
    code += _by_flag(_CLONE[column], 0, _CLONE_THREAD, there="allow", missing="deny")  # missing: it makes a process
    code += [(_JUMP_IF_EQUAL, 0, len(_IOCTLS) + 1, _IOCTL[column]), (_LOAD, 0, 0, _ARGUMENTS + 8)]
    code += [(_JUMP_IF_EQUAL, "deny", 0, request) for request in _IOCTLS]
    code.append((_LOAD, 0, 0, _NUMBER))
    if not network:
        for send in _SEND.values():
            code += _by_flag(send[column], send[2], _MSG_FASTOPEN, there="deny", missing="allow")
    return _assembled(code)


def _by_flag(number: int, place: int, flag: int, *, there: str, missing: str) -> list[_Instruction]:
    """Return instructions that decide one call by one flag in one of its arguments."""
    return [
        (_JUMP_IF_EQUAL, 0, 2, number),
        (_LOAD, 0, 0, _ARGUMENTS + 8 * place),
        (_JUMP_IF_BITS, there, missing, flag),
    ]


def _assembled(code: list[_Instruction]) -> str:
    """Return the instructions as bytes in hexadecimal, and behind them the ends that they name."""
    ends = {name: len(code) + place for place, name in enumerate(_ENDS)}
    words = b""
    for place, (operation, yes, no, value) in enumerate(code):
        jumps = bytes(ends[to] - place - 1 if isinstance(to, str) else to for to in (yes, no))
        words += operation.to_bytes(2, "little") + jumps + value.to_bytes(4, "little")
    for value in _ENDS.values():
        words += _RETURN.to_bytes(2, "little") + bytes(2) + value.to_bytes(4, "little")
    return words.hex()
