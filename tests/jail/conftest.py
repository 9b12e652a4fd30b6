# SPDX-License-Identifier: Apache-2.0
"""What the jail ring needs of the host, and a ground of its own for each test."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from tests.support import host
from tests.support.launch import REAPER_UID, UIDS, Ground

from depriv.cgroup import find_cgroup

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


@pytest.fixture
def ground(tmp_path: Path) -> Generator[Ground]:
    """A state folder and plans on it; after the test nothing of them may be left."""
    host.need(os.geteuid() == 0, what="root")
    host.need(bool(find_cgroup()[0]), what="cgroups")
    host.need(shutil.which("gcc") is not None, what="gcc")
    # What is reaped by uid has to be ours.
    assert host.living(UIDS) == ()
    assert host.living(range(REAPER_UID, REAPER_UID + 1)) == ()
    made = Ground(tmp_path)
    before = made.snapshot()
    yield made
    left = [str(entry.domid) for entry in made.registry.entries() if os.path.exists(entry.cgroup)]
    made.close()
    assert host.settled(before, made.where()) == before
    assert left == [], "the test left cgroups of these domains"


@pytest.fixture
def strace() -> str:
    """The path of strace(1), which makes chosen system calls fail."""
    path = shutil.which("strace")
    host.need(path is not None, what="strace")
    return path or ""
