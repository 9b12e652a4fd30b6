# SPDX-License-Identifier: Apache-2.0
"""Entries of a registry as the tests make them, and what kills a process between any two calls of its own."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any

from depriv import proc
from depriv.entry import Entry
from depriv.report import Expected, Grant, Limit

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import FrameType

EXPECTED = Expected(
    domain="web",
    domid=1,
    uid=5001,
    gid=5001,
    pid=42,
    starttime=99,
    restricted=True,
    limits=(Limit(name="CORE", soft=0, hard=0), Limit(name="AS", soft=-1, hard=-1)),
    environ=("LC_ALL=C",),
    cgroup="/depriv/1",
    grants=(Grant(role="xvda", kind="file", dev=1, ino=2, access="rw", path="/a", locked=True),),
)


def entry(name: str = "web", domid: int = 1, **changes: Any) -> Entry:
    """Return an entry of this boot that has no process, no cgroup and a uid of nobody's."""
    values: dict[str, Any] = {
        "name": name,
        "domid": domid,
        "state": "running",
        "uid": 5000 + domid,
        "gid": 5000 + domid,
        "reaper_uid": 4999,
        "shared": False,
        "restricted": True,
        "memory_mib": 128,
        "vcpus": 1,
        "accel": "tcg",
        "cgroup": "",
        "boot_id": proc.boot_id(),
        "created_boot_ns": 4,
        "created_at_s": 3,
        "toolstack_pid": 1,
        "toolstack_starttime": 2,
        "images": ((1, 2, 0, True), (0, 0, 7, False)),
    }
    return Entry(**{**values, **changes})


@contextlib.contextmanager
def no_descriptor_to_spare() -> Generator[None]:
    """Have this process open nothing more until the end of the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def killed_at(number: int, act: Callable[[], object]) -> bool:
    """Do ``act`` in a process of its own that is killed before its ``number``-th call into C; tell whether it was.

    Every system call of Python code is made by a function in C, so that all numbers together are a kill between any
    two of them.
    """
    pid = os.fork()
    if pid == 0:
        left = number

        def count(_frame: FrameType, event: str, _what: object) -> None:
            nonlocal left
            if event == "c_call":
                left -= 1
                if left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.setprofile(count)
            act()
        except BaseException:
            os._exit(9)
        os._exit(0)  # is a call, too: the last number
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)
