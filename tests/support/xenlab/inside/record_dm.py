#!/usr/bin/python3 -I
# SPDX-License-Identifier: Apache-2.0
"""Runs in dom0: a ``device_model_override`` that writes down what libxl gives a device model, and becomes ``lift-dm``.

One file for each start in /var/log/xen/record, named by the time: libxl starts it for its probe of QEMU's options, too.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time

FOLDER = "/var/log/xen/record"
NEXT = "/usr/lib/xenlab/lift-dm"


def descriptors() -> dict[str, list[str]]:
    """Return fd -> [access, target] of what was inherited."""
    found: dict[str, list[str]] = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
            with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
                flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
        except FileNotFoundError:
            continue  # that of listdir itself
        found[fd] = [("r", "w", "rw", "none")[flags & 3], target]
    return found


def main() -> None:
    """Record, then become the next program."""
    fds = descriptors()
    record = {
        "argv": sys.argv,
        "environ": dict(os.environ),
        "fds": fds,
        "uid": os.getresuid(),
        "gid": os.getresgid(),
        "groups": os.getgroups(),
        "cwd": os.getcwd(),
        "umask": os.umask(0o22),
        "own_session": os.getsid(0) == os.getpid(),
        "ns": {
            n: os.readlink(f"/proc/self/ns/{n}") == os.readlink(f"/proc/1/ns/{n}") for n in os.listdir("/proc/self/ns")
        },
        "limits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT_")},
    }
    os.umask(record["umask"])  # type: ignore[arg-type]  # the one value of that type
    os.makedirs(FOLDER, exist_ok=True)
    with open(f"{FOLDER}/{time.monotonic_ns():020}.json", "w", encoding="utf-8") as file:
        json.dump(record, file)
    os.execv(NEXT, [NEXT, *sys.argv[1:]])


if __name__ == "__main__":
    main()
