# SPDX-License-Identifier: Apache-2.0
"""Runs in dom0, inside the command channel: what a process and xenstore look like, without starting anything.

A Python takes half a second to start under emulation; these are called in one that runs already.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from typing import Any

XENSTORED = "/run/xenstored/socket"
XS_DIRECTORY, XS_READ, XS_GET_PERMS, XS_ERROR = 1, 2, 3, 16  # Xen's xen/include/public/io/xs_wire.h


class Xenstore:
    """A connection to xenstored: struct xsd_sockmsg {type, req_id, tx_id, len}, then len bytes (xs_wire.h)."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(XENSTORED)

    def ask(self, kind: int, path: str) -> bytes:
        """Return the payload of the answer; an error is an ``OSError`` with xenstore's word for it."""
        body = path.encode() + b"\0"
        self.socket.sendall(struct.pack("=IIII", kind, 0, 0, len(body)) + body)
        answered, _, _, size = struct.unpack("=IIII", self._read(16))
        data = self._read(size)
        if answered == XS_ERROR:
            raise OSError(f"{path}: {data.rstrip(bytes(1)).decode()}")
        return data

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise OSError("xenstored closed the connection")
            data += part
        return data

    def read(self, path: str) -> str:
        """Return the text at ``path``."""
        return self.ask(XS_READ, path).decode()

    def names(self, path: str) -> list[str]:
        """Return the names below ``path``; none if it does not exist."""
        try:
            return [name for name in self.ask(XS_DIRECTORY, path).decode().split("\0") if name]
        except OSError:
            return []

    def tree(self, path: str) -> dict[str, str]:
        """Return path -> text of ``path`` and all below."""
        try:
            found = {path: self.read(path)}
        except OSError:
            return {}
        for name in self.names(path):
            found.update(self.tree(f"{path}/{name}"))
        return found


def xenstore(path: str) -> dict[str, str]:
    """Return path -> text of a part of xenstore; empty if there is none."""
    return Xenstore().tree(path)


def domid(name: str) -> int | None:
    """Return the id of the running domain with this name, or None."""
    store = Xenstore()
    for found in store.names("/local/domain"):
        try:
            if store.read(f"/local/domain/{found}/name") == name:
                return int(found)
        except OSError:
            continue  # it is being made or it ends
    return None


def dm_pid(domid: int) -> int | None:
    """Return the pid of a domain's device model as libxl recorded it, or None."""
    try:
        return int(Xenstore().read(f"/local/domain/{domid}/image/device-model-pid"))
    except OSError:
        return None


def follow(domid: int) -> bool:
    """Keep what a domain writes on its serial port from now on, once; return whether it has one yet."""
    try:
        tty = Xenstore().read(f"/local/domain/{domid}/serial/0/tty")
    except OSError:
        return False
    try:
        out = os.open(f"/run/serial/{domid}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return True
    # It ends by itself, with EIO, when QEMU closes the other side.
    subprocess.Popen(
        ["busybox", "cat", tty], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL, start_new_session=True
    )
    return True


def serial(domid: int) -> str | None:
    """Return what was kept so far, or None if it is not followed."""
    try:
        with open(f"/run/serial/{domid}", encoding="ascii", errors="replace") as file:
            return file.read().replace("\r", "")
    except FileNotFoundError:
        return None


def wait_for_serial(domid: int, pattern: str, timeout_s: float, after: int = 0) -> str | None:
    """Return what was kept once ``pattern`` stands in it behind ``after``, or what there is in the end."""
    deadline = time.monotonic() + timeout_s
    while True:
        text = serial(domid) if follow(domid) else None
        if (text is not None and pattern in text[after:]) or time.monotonic() > deadline:
            return text
        time.sleep(0.1)


def proc(pid: int) -> dict[str, Any]:
    """Return what /proc says of a process: {} if there is none.

    Keys: argv, environ, status (name -> text), limits (name -> [soft, hard]), ns (name -> whether it is process 1's),
    fds (number -> [access, target]), root, cwd, cgroup, oom_score_adj, mounts.
    """
    base = f"/proc/{pid}/"
    try:
        return {
            "argv": _words(base + "cmdline"),
            "environ": _words(base + "environ"),
            "status": dict(_halves(line) for line in _text(base + "status").splitlines()),
            "limits": _limits(_text(base + "limits")),
            "ns": {n: os.readlink(f"{base}ns/{n}") == os.readlink(f"/proc/1/ns/{n}") for n in os.listdir(base + "ns")},
            "fds": _fds(base),
            "root": os.readlink(base + "root"),
            "cwd": os.readlink(base + "cwd"),
            "cgroup": _text(base + "cgroup").strip(),
            "oom_score_adj": int(_text(base + "oom_score_adj")),
            "mounts": len(_text(base + "mountinfo").splitlines()),
        }
    except (FileNotFoundError, ProcessLookupError):
        return {}


def pids(uid: int) -> list[int]:
    """Return the processes of a uid."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                found.append(int(name))
        except FileNotFoundError:
            continue
    return sorted(found)


def named(word: str) -> dict[str, list[str]]:
    """Return pid -> argv of the processes one of whose arguments contains ``word``, kernel threads left out."""
    found = {}
    for name in os.listdir("/proc"):
        try:
            argv = _words(f"/proc/{name}/cmdline") if name.isdigit() else []
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(word in part for part in argv):
            found[name] = argv
    return found


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _words(path: str) -> list[str]:
    return _text(path).split("\0")[:-1]


def _halves(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name, " ".join(value.split())


def _limits(text: str) -> dict[str, list[str]]:
    """Return name -> [soft, hard]; the columns have a fixed width (Linux fs/proc/base.c, proc_pid_limits)."""
    lines = text.splitlines()[1:]
    return {line[:26].strip(): [line[26:47].strip(), line[47:68].strip()] for line in lines}


def _fds(base: str) -> dict[str, list[str]]:
    found = {}
    for fd in os.listdir(base + "fd"):
        try:
            target = os.readlink(f"{base}fd/{fd}")
            info = dict(_halves(line) for line in _text(f"{base}fdinfo/{fd}").splitlines())
        except FileNotFoundError:
            continue  # closed meanwhile
        found[fd] = [("r", "w", "rw", "none")[int(info["flags"], 8) & 3], target]
    return found
