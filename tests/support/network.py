# SPDX-License-Identifier: Apache-2.0
"""A network of the test's own: a namespace with a loopback, and a default route into a tap that nobody reads."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.support.host import need

from depriv.jail import sys

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS = "192.0.2.10"  # of the interface, RFC 5737: nobody's
_ROUTE = (
    "tuntap add uplink0 mode tap",
    f"address add {ADDRESS}/24 dev uplink0",
    "link set uplink0 up",
    "route add default via 192.0.2.1",
)


@contextmanager
def own_network(*, route: bool = True) -> Iterator[None]:
    """Have this thread, and what it starts, in a network namespace of its own; without ``route`` with no way out."""
    need(os.geteuid() == 0, what="root")
    need(shutil.which("ip") is not None, what="iproute2")
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        sys.unshare(sys.CLONE_NEW["net"])
        for words in ("link set lo up", *(_ROUTE if route else ())):
            subprocess.run(["ip", *words.split()], check=True, timeout=10)
        yield
    finally:
        sys.setns(before, sys.CLONE_NEW["net"])
        os.close(before)
