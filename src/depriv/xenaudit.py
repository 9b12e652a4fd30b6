# SPDX-License-Identifier: Apache-2.0
"""Are a device model's Xen descriptors restricted to its domain? Asked by making a request that must be refused.

As Xen's depriv-fd-checker does (tools/tests/depriv, Xen 4.17): first the same request through a descriptor of our own,
where it must succeed, or the refusal would prove nothing; then through a duplicate of the device model's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct

from depriv.report import Check, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Final

    from depriv.proc import OpenFd

_SYS_PIDFD_GETFD: Final = 438  # include/uapi/asm-generic/unistd.h
# <xen/privcmd.h>: _IOC(_IOC_NONE, 'P', 0, sizeof(struct privcmd_hypercall)); __HYPERVISOR_xen_version, XENVER_version
_HYPERCALL: Final = 48 << 16 | ord("P") << 8
_XEN_VERSION: Final = 17
# <xen/evtchn.h>: _IOC(_IOC_NONE, 'E', nr, sizeof(unsigned int))
_BIND_UNBOUND: Final = 4 << 16 | ord("E") << 8 | 2
_UNBIND: Final = 4 << 16 | ord("E") << 8 | 3
_REFUSALS: Final = (errno.EPERM, errno.EACCES)


def checks(pid: int, fds: tuple[OpenFd, ...]) -> Iterable[Check]:
    """Yield the checks of a device model on Xen.

    privcmd, whose hypercalls reach every domain, and evtchn: each descriptor refuses what is not its domain's. No
    descriptor of xenstore, of grants, or of buffers for hypercalls: QEMU closes them when it restricts itself.

    Args:
        pid: The process.
        fds: What it has open.
    """
    names = _names()
    found = [(names[fd.rdev], fd) for fd in fds if stat.S_ISCHR(fd.mode) and fd.rdev in names]
    for name, request in (("privcmd", _ask_hypervisor), ("evtchn", _bind_to_dom0)):
        yield _restricted(name, pid, [fd.number for device, fd in found if device == name], request)
    wrong = [f"{fd.number} {device}" for device, fd in found if device not in ("privcmd", "evtchn")]
    yield Check(id="xen.others", want="none", have=printable(", ".join(wrong) or "none"), holds=not wrong)


def has_any(fds: tuple[OpenFd, ...]) -> bool:
    """Tell whether a process has a device of Xen's open."""
    names = _names()
    return any(stat.S_ISCHR(fd.mode) and fd.rdev in names for fd in fds)


def _names() -> dict[int, str]:
    """Return device number -> name of Xen's devices on this host; a name in a process's own root proves nothing."""
    try:
        return {os.lstat(f"/dev/xen/{name}").st_rdev: name for name in os.listdir("/dev/xen")}
    except FileNotFoundError:
        return {}


def _restricted(name: str, pid: int, numbers: list[int], request: Callable[[int], int]) -> Check:
    want = f"every {name} restricted"
    control = _through(request, os.open(f"/dev/xen/{name}", os.O_RDWR | os.O_CLOEXEC))
    if control != 0:
        return Check(id=f"xen.{name}", want=want, have=f"not known: ours is refused, too ({control})", holds=False)
    wrong: list[str] = []
    pidfd = os.pidfd_open(pid)
    try:
        for number in numbers:
            got = _through(request, _getfd(pidfd, number))
            if got not in _REFUSALS:
                wrong.append(f"{number} is not" if got == 0 else f"{number} fails with {errno.errorcode.get(got, got)}")
    finally:
        os.close(pidfd)
    have = ", ".join(wrong) or (f"{len(numbers)} restricted" if numbers else "none open")
    return Check(id=f"xen.{name}", want=want, have=have, holds=not wrong)


def _through(request: Callable[[int], int], fd: int) -> int:
    """Make a request through a descriptor, which is closed, and return the errno; 0: it was done."""
    try:
        return request(fd)
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        os.close(fd)


def _ask_hypervisor(fd: int) -> int:
    """Ask Xen for its version: harmless, and refused all the same by a restricted descriptor, as all calls are.

    Source: privcmd_ioctl_hypercall, drivers/xen/privcmd.c, Linux 6.1.
    """
    fcntl.ioctl(fd, _HYPERCALL, struct.pack("=6Q", _XEN_VERSION, 0, 0, 0, 0, 0))
    return 0


def _bind_to_dom0(fd: int) -> int:
    """Make an event channel for domain 0, which is never the device model's own; undone at once where it succeeds.

    Source: evtchn_ioctl, drivers/xen/evtchn.c, Linux 6.1.
    """
    # Mutable, so that the call's own result comes back.
    port = fcntl.ioctl(fd, _BIND_UNBOUND, bytearray(struct.pack("=I", 0)), True)
    fcntl.ioctl(fd, _UNBIND, struct.pack("=I", port))
    return 0


def _getfd(pidfd: int, number: int) -> int:
    """Return a duplicate of another process's descriptor. See pidfd_getfd(2), Linux 5.6."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))
    if fd < 0:
        code = ctypes.get_errno()
        if code == errno.EBADF:
            raise ProcessLookupError(code, "it was closed meanwhile")
        raise OSError(code, os.strerror(code), f"pidfd_getfd {number}")
    return fd
