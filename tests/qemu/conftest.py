# SPDX-License-Identifier: Apache-2.0
"""Real QEMUs, confined: each test has a state folder of its own, and leaves the host as it found it."""

from __future__ import annotations

import os
import pwd
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from tests.support import guests, iso
from tests.support.guests import CommandLine
from tests.support.host import need, settled, snapshot

from depriv import demo_guest
from depriv.identity import RANGE_BASE
from depriv.setup import remove_setup, run_setup

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from depriv.api import Toolstack


@pytest.fixture(scope="session")
def uids() -> Iterator[range]:
    """Return the uids of the domains of these tests, on a host that is set up for them and afterwards as it was."""
    need(os.geteuid() == 0, what="root")
    need(shutil.which("qemu-system-x86_64") is not None, what="qemu")
    made = RANGE_BASE not in {user.pw_name for user in pwd.getpwall()}
    if made:
        run_setup()
    first = pwd.getpwnam(RANGE_BASE).pw_uid
    yield range(first + guests.DOMIDS.start, first + guests.DOMIDS.stop)
    if made:
        remove_setup()


@pytest.fixture
def unchanged(uids: range) -> Iterator[None]:
    """Fail a test after which the host differs from before: processes, cgroups, interfaces, descriptors."""
    where: dict[str, Any] = {"uids": uids, "domids": guests.DOMIDS}
    before = snapshot(**where)
    yield
    assert settled(before, where) == before


@pytest.fixture
def host(unchanged: None, tmp_path: Path) -> Iterator[Toolstack]:
    """Return a toolstack with no domains; those that a test makes end with it."""
    del unchanged
    made = guests.toolstack(tmp_path / "state")
    yield made
    guests.end_all(made)


@pytest.fixture
def depriv(unchanged: None) -> Iterator[CommandLine]:
    """Return the command line, on a host without domains."""
    del unchanged
    made = CommandLine()
    yield made
    made.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return the demonstration guest's disk, root's alone."""
    path = tmp_path / "disk.img"
    path.write_bytes(demo_guest.image(text="the text of this disk"))
    path.chmod(0o600)
    return path


@pytest.fixture
def cd(tmp_path: Path) -> Path:
    """Return a CD with one file."""
    path = tmp_path / "cd.iso"
    path.write_bytes(iso.iso({"HELLO.TXT": b"text on the cd\n"}))
    return path
