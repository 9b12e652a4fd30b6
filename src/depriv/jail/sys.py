# SPDX-License-Identifier: Apache-2.0
"""One function per system call that the standard library lacks, named after it. errno is never lost."""

from __future__ import annotations

import ctypes
import errno
import os
import sys as python

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# <linux/sched.h>
CLONE_NEW: Final = {
    "mnt": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}

# <linux/mount.h>
MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2

# <linux/prctl.h>, <linux/securebits.h>
PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_CAPBSET_DROP: Final = 24
PR_SET_SECUREBITS: Final = 28
PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
# NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE and KEEP_CAPS' lock, each with its lock.
SECUREBITS: Final = 0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40 | 0x80

_SYS_CLONE3: Final = 435  # include/uapi/asm-generic/unistd.h: one number on every architecture
_SYS_PIDFD_SEND_SIGNAL: Final = 424  # the same
_SYS_PIDFD_GETFD: Final = 438  # the same
_CLONE_INTO_CGROUP: Final = 0x200000000  # <linux/sched.h>
_SIGCHLD: Final = 17
_CLOSE_RANGE_CLOEXEC: Final = 4
_UINT_MAX: Final = 0xFFFFFFFF
_KEYCTL_JOIN_SESSION_KEYRING: Final = 1  # <linux/keyctl.h>
_CAPABILITY_VERSION_3: Final = 0x20080522  # <linux/capability.h>

_AF_UNIX: Final = 1  # <linux/socket.h>
_SOCK_STREAM: Final = 1
_SOCK_CLOEXEC: Final = 0o2000000
SIGKILL: Final = 9  # <asm-generic/signal.h>
_SIGPIPE: Final = 13  # <asm-generic/signal.h>

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.pivot_root.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
_libc.close_range.argtypes = (ctypes.c_uint, ctypes.c_uint, ctypes.c_int)  # glibc 2.34
_libc.sethostname.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_libc.syscall.restype = ctypes.c_long
_libc.bind.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.signal.restype = ctypes.c_void_p


def _check(result: int, what: str, *, unless: int = -1) -> int:
    """Return the result, or raise ``OSError`` with the errno of the call that just failed, ``unless`` it is that."""
    if result < 0 and ctypes.get_errno() != unless:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)
    return result


def unshare(flags: int) -> None:
    """See unshare(2)."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """See setns(2)."""
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """See mount(2)."""
    encoded = (source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None)
    _check(_libc.mount(*encoded), f"mount {target}")


def umount2(target: str, flags: int) -> None:
    """See umount2(2)."""
    _check(_libc.umount2(target.encode(), flags), f"umount2 {target}")


def pivot_root(new: str, old: str) -> None:
    """See pivot_root(2)."""
    _check(_libc.pivot_root(new.encode(), old.encode()), "pivot_root")


def sethostname(name: str) -> None:
    """See sethostname(2)."""
    _check(_libc.sethostname(name.encode(), len(name.encode())), "sethostname")


def prctl(option: int, value: int = 0, what: str = "prctl") -> None:
    """See prctl(2); the unused arguments are 0, as several options demand."""
    _check(_libc.prctl(option, value, 0, 0, 0), what)


def personality(persona: int) -> None:
    """See personality(2)."""
    _check(_libc.personality(ctypes.c_ulong(persona)), "personality")


def join_new_session_keyring() -> None:
    """Leave the caller's session keyring for a new, empty one. See keyctl(2)."""
    number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
    # A kernel without keyrings has none to leave.
    _check(_libc.syscall(number, _KEYCTL_JOIN_SESSION_KEYRING, None), "keyctl", unless=errno.ENOSYS)


def capset_none() -> None:
    """Empty the permitted, effective and inheritable sets of this process. See capset(2)."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, data), "capset")


def listen_unix(name: str) -> int:
    """Return a UNIX stream socket that listens on ``name``. See unix(7); importing ``socket`` takes 12 ms."""
    address = _AF_UNIX.to_bytes(2, python.byteorder) + name.encode() + b"\0"
    fd = _check(_libc.socket(_AF_UNIX, _SOCK_STREAM | _SOCK_CLOEXEC, 0), "socket")
    _check(_libc.bind(fd, address, len(address)), f"bind {name}")
    _check(_libc.listen(fd, 8), f"listen {name}")
    return fd


def clone_into_cgroup(directory: int) -> int:
    """Fork a single-threaded process, the child in the v2 cgroup ``directory``. See clone3(2), Linux 5.7.

    Not through os.fork: neither it nor libc's fork can name a cgroup. What they do besides is for threads.
    """
    arguments = (ctypes.c_uint64 * 11)(_CLONE_INTO_CGROUP, 0, 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, directory)
    size = ctypes.c_size_t(ctypes.sizeof(arguments))
    return _check(_libc.syscall(_SYS_CLONE3, arguments, size), "clone3 into the cgroup")


def pidfd_kill(pidfd: int) -> None:
    """Send SIGKILL, unless it has ended. See pidfd_send_signal(2), Linux 5.1; ``signal`` takes 10 ms to import."""
    sent = _libc.syscall(_SYS_PIDFD_SEND_SIGNAL, pidfd, SIGKILL, None, 0)
    _check(sent, "pidfd_send_signal", unless=errno.ESRCH)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """Return a duplicate of another process's descriptor, close-on-exec. See pidfd_getfd(2), Linux 5.6."""
    return _check(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0), f"pidfd_getfd {number}")


def seccomp_filter(program: bytes) -> None:
    """Load a filter, an array of struct sock_filter. See seccomp(2) and <linux/filter.h>."""
    pointer = ctypes.create_string_buffer(program, len(program))
    header = (ctypes.c_uint64 * 2)(len(program) // 8, ctypes.addressof(pointer))  # struct sock_fprog, 64 bits
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0), "PR_SET_SECCOMP")


def default_sigpipe() -> None:
    """Give SIGPIPE its default action, which Python took away. See signal(2); ``signal`` takes 10 ms to import."""
    _libc.signal(_SIGPIPE, None)


def close_on_exec_from(first: int) -> None:
    """Mark every descriptor from ``first`` on close-on-exec. See close_range(2), Linux 5.11."""
    _check(_libc.close_range(first, _UINT_MAX, _CLOSE_RANGE_CLOEXEC), "close_range")
