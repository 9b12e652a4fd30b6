# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a guest of one boot sector, confined like any other. Nothing to download, nothing left behind."""

from __future__ import annotations

import os
import tempfile
import time

from depriv.api import Toolstack
from depriv.config import Disk, Domain
from depriv.demo_guest import image
from depriv.setup import run_setup
from depriv.text import console_safe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_NAME = "depriv-demo"
_TIMEOUT_S = 60.0
_LAST_WORDS = "disk write"


def run(say: Callable[[str], None]) -> int:
    """Do it, telling ``say`` each thing; return 0 if the guest ran and every check held."""
    say("# depriv setup: the users that device models run as")
    say(run_setup())
    host = Toolstack()
    with tempfile.TemporaryDirectory(prefix="depriv-demo-") as folder:
        path = os.path.join(folder, "disk.img")
        with open(path, "xb") as file:
            file.write(image())
        say(f"\n# depriv create: a guest whose disk is {path}, owned by root, readable by nobody else")
        os.chmod(path, 0o600)
        config = Domain(name=_NAME, machine="q35", disks=(Disk(vdev="xvda", target=path),))
        started = host.start(config, warn=say)
        guest = host.guest(_NAME)
        try:
            say(f"{_NAME}: domid {guest.domid}, uid {started.entry.uid}, {started.entry.accel}")
            output = _await_output(guest.console)
            say("\n# depriv console --dump: what the guest has said so far")
            say(output)
            say("\n# depriv audit: what the kernel says about its QEMU")
            report = guest.audit()
            say(report.to_text())
        finally:
            say("\n# depriv destroy")
            guest.destroy()
        say("destroyed; no process, cgroup or file of it is left")
    return 0 if report.holds and f"{_LAST_WORDS} ok" in output else 1


def _await_output(console: Callable[[], bytes]) -> str:
    """Wait until the guest has used its disk, and return all it said."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        output = console_safe(console())
        if f"{_LAST_WORDS} " in output or time.monotonic() > deadline:
            return output
        time.sleep(0.1)
