# SPDX-License-Identifier: Apache-2.0
"""Runs code in a pid namespace of its own: where kill(-1) reaches nobody but what the code started.

The code comes as text, as root, after PROLOGUE; it says what it found as JSON on its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

PROLOGUE = r"""
import errno, fcntl, json, os, signal, subprocess, sys, time
# Before anything: nobody but our own children is in reach.
assert os.getpid() == 1
assert os.readlink("/proc/self/ns/pid") != sys.argv[1]
assert sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) == [1]
# Process 1 does what an init does, and no more: it collects orphans.
first = os.fork()
while first:
    ended, status = os.wait()
    if ended == first:
        os._exit(0 if status == 0 else 1)

from depriv.jail import reap as reaper
from depriv.jail.reap import reap, survivors
from depriv.steps import Reap

A, B, REAPER = IDS
LOCK = sys.argv[2] + "/lock"
STEP = Reap(uid=A, gid=A, reaper_uid=REAPER, lock=LOCK, timeout_ms=5000)

def living(uid):
    return [pid for pid, _, _ in survivors(uid, -1)]

def start(uid, body, ruid=None):
    '''Fork a process of uid that does body and then waits; return its pid once it is that uid.'''
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(())
            os.setresgid(uid, uid, uid)
            os.setresuid(uid if ruid is None else ruid, uid, uid)
            os.write(writes, b"x")
            body()
            while True:
                signal.pause()
        finally:
            os._exit(9)
    assert os.read(reads, 1) == b"x"
    os.close(reads)
    os.close(writes)
    return pid

def wait():
    pass

def ends(pid):
    '''Collect a child that was killed; return the signal, or 0 if it still lives.'''
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.WTERMSIG(status) if ended else 0

def state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(") ")[2][0]

def until(condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)

def refusal(step):
    begun = time.monotonic()
    try:
        reap(step)
    except OSError as error:
        return [error.errno, time.monotonic() - begun, str(error)]
    return [0, time.monotonic() - begun, ""]
"""


# Of this run only: a reaper of the host reaches into every pid namespace below, another run's tests have theirs.
IDS = tuple(110000 + os.getpid() % 10000 * 4 + n for n in range(3))


def run(folder: Path, code: str, *words: str, timeout_s: float = 60) -> Any:
    """Return what the code says.

    Args:
        folder: Where it may make files; sys.argv[2].
        code: Python.
        words: Further arguments, from sys.argv[3].
        timeout_s: After it all is killed, as process 1 is.
    """
    inner = [sys.executable, "-c", f"IDS = {IDS}\n{PROLOGUE}{textwrap.dedent(code)}", os.readlink("/proc/self/ns/pid")]
    argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *inner, str(folder), *words]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode != 0:
        raise AssertionError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
