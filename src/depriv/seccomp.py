# SPDX-License-Identifier: Apache-2.0
"""A seccomp filter of our own, below QEMU's: no new socket, no new process, nothing that no QEMU ever needs. Pure.

QEMU's ``-sandbox`` leaves 321 of 362 calls open, ``connect`` and ``ptrace`` among them, and Debian's QEMU for Xen is
built without it. A descriptor of a listening TCP socket, which a VNC server needs, could be disconnected and connected to
anywhere by whoever has taken over QEMU: every socket that QEMU needs is handed in, so none is made, bound or connected.
"""

from __future__ import annotations

from depriv.errors import PlanError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# name -> number on x86_64 (arch/x86/entry/syscalls/syscall_64.tbl) and on aarch64 (include/uapi/asm-generic/unistd.h),
# -1: not there. Linux 6.1.
_NETWORK: Final = {"socket": (41, 198), "connect": (42, 203), "bind": (49, 200)}
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
_SPAWN: Final = {"execveat": (322, 281), "fork": (57, -1), "vfork": (58, -1)}  # execve stays: it starts QEMU
_CLONE: Final = (56, 220)
_CLONE3: Final = (435, 435)
_CLONE_THREAD: Final = 0x00010000  # <linux/sched.h>
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


def program(processor: str, *, network: bool) -> str:
    """Return the filter as an array of struct sock_filter in hexadecimal, for ``steps.Filter``.

    Args:
        processor: As uname(2) has it.
        network: Leave QEMU the making of sockets: it stays in the host's network, as the caller has asked.

    Raises:
        PlanError: the numbers of that processor's calls are not known here.
    """
    if processor not in _ARCHES:
        raise PlanError(
            f"no system call filter is known for the processor {processor}", fix=f"use one of {', '.join(_ARCHES)}"
        )
    column, arch = _ARCHES[processor]
    names = {**_SPAWN, **_NEVER} if network else {**_NETWORK, **_SPAWN, **_NEVER}
    numbers = sorted(numbers[column] for numbers in names.values() if numbers[column] >= 0)
    tests = [(_JUMP_IF_EQUAL, number) for number in numbers]
    if processor == "x86_64":
        tests.insert(0, (_JUMP_IF_AT_LEAST, _X32))
    # struct seccomp_data: nr at 0, arch at 4, the first argument at 16. A jump counts the instructions it skips.
    code = [(_LOAD, 0, 0, 4), (_JUMP_IF_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL_PROCESS), (_LOAD, 0, 0, 0)]
    for place, (test, number) in enumerate(tests):
        code.append((test, len(tests) - place + 4, 0, number))
    code += [
        (_JUMP_IF_EQUAL, 5, 0, _CLONE3[column]),
        (_JUMP_IF_EQUAL, 0, 2, _CLONE[column]),
        (_LOAD, 0, 0, 16),
        (_JUMP_IF_BITS, 0, 1, _CLONE_THREAD),  # a thread; else it would be a process
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ENOSYS),
    ]
    return b"".join(
        op.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little") for op, yes, no, value in code
    ).hex()
