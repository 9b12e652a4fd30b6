# SPDX-License-Identifier: Apache-2.0
"""Files that survive a kill at any instruction, and locks that say who holds them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time

from depriv import proc
from depriv.errors import HostError, NotFoundError
from depriv.records import cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

LOCK_TIMEOUT_S = 10.0
_BYTES_MAX = 1 << 20
_OUR_OWN_WANT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # says nothing about the file
_ROOM_FIX = "see that it is writable and has room: df -h /run"


class DamagedError(HostError):
    """A file is none that we wrote: cut off, empty, of another kind or owner."""


class BusyError(HostError):
    """Somebody else held a lock until the deadline."""


def write(paths: tuple[str, ...], data: dict[str, Any]) -> None:
    """Replace files by the same content, each whole: written beside, synced, renamed, in the order given.

    Raises:
        HostError: there is no room, the file system is read-only, or it is too much to be read again. Each file is as
            it was, or new; none is after one that is as it was.
    """
    text = json.dumps(data).encode()
    if len(text) > _BYTES_MAX:
        raise HostError(f"cannot write {paths[-1]}", cause=f"it would have {len(text)} bytes, and nobody would read it")
    made: list[tuple[str, str]] = []
    try:
        for path in paths:
            beside = f"{path}.{time.monotonic_ns()}.{os.getpid()}"  # of this thread alone, and of a process to ask for
            made.append((beside, path))
            fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if os.write(fd, text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(fd)
            finally:
                os.close(fd)
        for beside, path in made:
            os.rename(beside, path)
    except OSError as error:
        for beside, _path in made:
            with contextlib.suppress(OSError):
                os.unlink(beside)
        raise HostError(f"cannot write {paths[-1]}", fix=_ROOM_FIX) from error


def load(path: str) -> dict[str, Any] | None:
    """Return the file's JSON object, or None if there is no such file.

    Raises:
        DamagedError: the file is none that we wrote.
        HostError: this is not root, or has no descriptor or memory to spare.
    """
    try:
        # Not to be led elsewhere by a link, nor to wait for the other end of a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise HostError(f"cannot read {path}", fix="run this as root") from error
    except OSError as error:
        if error.errno in _OUR_OWN_WANT:
            raise HostError(f"cannot read {path}", fix="close files, or raise the limit: ulimit -n") from error
        raise DamagedError(f"cannot read {path}") from error
    try:
        return _parsed(fd)
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged", cause=str(error)) from error
    finally:
        os.close(fd)


def _parsed(fd: int) -> dict[str, Any]:
    have = os.fstat(fd)
    if not stat.S_ISREG(have.st_mode):
        raise ValueError("it is no regular file")
    if have.st_uid != os.geteuid() or have.st_nlink > 1:
        raise ValueError(f"it belongs to uid {have.st_uid} and has {have.st_nlink} names: somebody put it there")
    if have.st_size > _BYTES_MAX:
        raise ValueError(f"it has {have.st_size} bytes")
    data: object = json.loads(os.read(fd, _BYTES_MAX))
    if not isinstance(data, dict):
        raise ValueError("it is no object")  # noqa: TRY004 (the file's content is wrong, one handler)
    return cast("dict[str, Any]", data)


@contextlib.contextmanager
def locked(path: str, what: str, *, timeout_s: float | None = None) -> Generator[None]:
    """Hold an exclusive lock on a file, or fail at the deadline naming who holds it.

    Args:
        path: The file, made if it is not there.
        what: What it stands for, in words.
        timeout_s: How long to wait; None: LOCK_TIMEOUT_S; 0: only try.

    Raises:
        NotFoundError: its folder is gone.
        BusyError: somebody else holds it until the deadline.
        HostError: it cannot be opened.
    """
    wait_s = LOCK_TIMEOUT_S if timeout_s is None else timeout_s
    deadline = time.monotonic() + wait_s
    fd = _open_lock(path, what)
    try:
        while not _try_lock(fd):
            if time.monotonic() >= deadline:
                holder, fix = _holders(fd)
                raise BusyError(
                    f"another command has been busy with {what} for {wait_s:.0f} seconds"
                    if wait_s
                    else f"another command is busy with {what}",
                    cause=f"{holder} holds {path}",
                    fix=fix,
                )
            time.sleep(0.005)
        if not _is_at(fd, path):
            raise NotFoundError(f"{what} is gone: it was removed meanwhile", fix="see depriv list")
        yield
    finally:
        os.close(fd)


def is_locked(path: str) -> bool:
    """Tell whether somebody holds the lock on a file right now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _open_lock(path: str, what: str) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            fd = os.open(path, os.O_RDONLY | flags)  # flock(2) asks for no more
    except FileNotFoundError:
        raise NotFoundError(f"{what} is gone: it was removed meanwhile", fix="see depriv list") from None
    except OSError as error:
        fix = "run this as root" if isinstance(error, PermissionError) else f"see what it is: ls -l {path}"
        raise HostError(f"cannot lock {what}", fix=fix) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise HostError(f"cannot lock {what}", cause=f"{path} is no regular file", fix=f"rm {path}")
    return fd


def _is_at(fd: int, path: str) -> bool:
    """Tell whether an open file is what its path leads to: its folder may have been moved away, to be removed."""
    try:
        have = os.lstat(path)
    except OSError:
        return False
    return os.path.samestat(have, os.fstat(fd))


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holders(fd: int) -> tuple[str, str]:
    """Return who holds the lock on an open file, and what to do about it: a lock outlives who took it in a child."""
    have = os.fstat(fd)
    found = proc.lock_holders(have.st_dev, have.st_ino)
    if not found:
        return "a process that is not to be seen", "wait for it, or end it"
    words: list[str] = []
    for pid, state, name in found:
        words.append(f"process {pid} ({name}{', stopped' if state in 'Tt' else ''})")
    pid, state, _ = found[0]
    fix = f"let it go on: kill -CONT {pid}; or end it: kill -9 {pid}" if state in "Tt" else "wait for it, or end it"
    return " and ".join(words), fix


def remove_left(left: tuple[tuple[str, int, int], ...]) -> None:
    """Remove files outside a domain's folder that end with it, where they are still the ones that were made."""
    for path, dev, ino in left:
        with contextlib.suppress(OSError):
            have = os.lstat(path)
            if (have.st_dev, have.st_ino) == (dev, ino):
                os.unlink(path)


def is_beside(name: str) -> bool:
    """Tell whether a file is one that a write cut short has left: NAME.PID of a process that is gone."""
    stem, dot, pid = name.rpartition(".")
    return bool(stem and dot) and pid.isascii() and pid.isdecimal() and not os.path.exists(f"/proc/{pid}")
