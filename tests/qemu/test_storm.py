# SPDX-License-Identifier: Apache-2.0
"""Nothing survives: whoever is killed at whatever step, after `gc` nothing is left, and no other guest is harmed.

The long version is bench/storm.py. DEPRIV_STORM_SEED repeats who was killed where; what that met is the scheduler's.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support import guests, storm_apart
from tests.support.storm_broker import Broker, Hit
from tests.support.storm_left import Alive, Ground

from depriv.identity import RANGE_BASE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.root]

CYCLES = 150
# The last of this run's numbers, where no other test's domains are.
DOMIDS = range(guests.FIRST_DOMID + 400, guests.FIRST_DOMID + 900)
GONE = 999999


@pytest.mark.timeout(600)
def test_nothing_is_left_and_no_guest_is_harmed_whoever_is_killed_at_whatever_step(
    unchanged: None, tmp_path: Path
) -> None:
    del unchanged
    seed = int(os.environ.get("DEPRIV_STORM_SEED", "0")) or int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    came = storm_apart.run(tmp_path, seed=seed, cycles=CYCLES, domids=DOMIDS, thorough=False)
    assert came["faults"] == [], f"seed {seed}:\n" + "\n".join(came["faults"])
    assert came["steps_hit"] == came["steps"]
    assert len(came["hits"]) > CYCLES / 2


@pytest.fixture
def ground(uids: range, tmp_path: Path) -> Ground:
    """Return the host as it is before a storm that never comes."""
    del uids
    (tmp_path / "state/domains").mkdir(parents=True)
    (tmp_path / "cache/runtime").mkdir(parents=True)
    return Ground(
        str(tmp_path),
        f"{tmp_path}/state",
        f"{tmp_path}/cache",
        first_uid=pwd.getpwnam(RANGE_BASE).pw_uid,
        domids=DOMIDS,
        settle_s=0.2,
    )


@pytest.fixture
def cgroups() -> str:
    """Return where cgroups can be made."""
    from depriv.cgroup import find_cgroup

    return find_cgroup()[0]


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def found(ground: Ground, *alive: Alive) -> list[str]:
    """Return what is seen, but for the descriptors that the test itself needs."""
    ground.keep_descriptors()
    return ground.left(alive)


def sleeper(undo: ExitStack, *argv: str, **keywords: int) -> subprocess.Popen[bytes]:
    """Start a process that waits; it ends with the test."""
    made = subprocess.Popen(argv or ("sleep", "60"), stdout=subprocess.PIPE, **keywords)  # type: ignore[call-overload]
    assert isinstance(made, subprocess.Popen)
    undo.callback(made.communicate)
    undo.callback(made.kill)
    return made


def test_ground_is_clean_before_the_storm(ground: Ground) -> None:
    assert ground.left(()) == []


def test_process_of_a_domains_uid_is_seen(ground: Ground, undo: ExitStack) -> None:
    uid = pwd.getpwnam(RANGE_BASE).pw_uid + DOMIDS.start + 7
    process = sleeper(undo, user=uid)
    seen = found(ground)
    assert len(seen) == 1
    assert f"process {process.pid}" in seen[0]
    guest = Alive(domid=1, uid=uid, pid=process.pid)
    assert not [what for what in found(ground, guest) if what.startswith("process")]  # a guest that is known is none


def test_process_of_a_domains_gid_alone_is_seen(ground: Ground, undo: ExitStack) -> None:
    process = sleeper(undo, group=pwd.getpwnam(RANGE_BASE).pw_uid + DOMIDS.start + 7)
    assert f"process {process.pid}" in found(ground)[0]


def test_jail_that_hangs_in_namespaces_of_its_own_is_seen(ground: Ground, undo: ExitStack, tmp_path: Path) -> None:
    # The command line is all that gives it away, as it does a jail.
    process = sleeper(undo, "unshare", "--net", "sh", "-c", "echo; kill -STOP $$", str(tmp_path))
    assert process.stdout is not None
    process.stdout.readline()
    seen = found(ground)
    assert any(f"process {process.pid}" in what for what in seen)
    assert any("net namespace" in what for what in seen)


def test_cgroup_of_a_domain_is_seen(ground: Ground, cgroups: str, undo: ExitStack) -> None:
    folder = f"{cgroups}/depriv-storm-test-{os.getpid()}"
    for path in (folder, f"{folder}/{DOMIDS.start + 7}"):
        os.mkdir(path)
        undo.callback(os.rmdir, path)
    assert found(ground) == [f"cgroup {folder}/{DOMIDS.start + 7}"]


def test_mount_is_seen(ground: Ground, tmp_path: Path, undo: ExitStack) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "storm", target], check=True)
    undo.callback(lambda: subprocess.run(["umount", target], check=True))
    assert [what for what in found(ground) if "mount" in what and str(target) in what]


@pytest.mark.parametrize("name", ["state/domains/7", "state/domains/gone-7-1", "state/x.1.2", "cache/runtime/abc.12"])
def test_file_or_folder_is_seen(ground: Ground, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    seen = found(ground)
    assert len(seen) == 1
    assert name in seen[0]


def test_lock_that_somebody_holds_is_seen(ground: Ground, tmp_path: Path, undo: ExitStack) -> None:
    path = tmp_path / "state/lock"
    # Not ours: that would be a descriptor of ours, too.
    script = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True)"
    other = tmp_path.parent / f"lock-{os.getpid()}"  # so that the folder is in no command line
    os.symlink(path, other)
    undo.callback(os.unlink, other)
    process = sleeper(undo, sys.executable, "-c", f"{script}; time.sleep(60)", str(other))
    assert process.stdout is not None
    process.stdout.readline()
    # Where the tests are alone in their pid namespace, its holder is a finding of its own.
    locks = [what for what in found(ground) if not what.startswith("process ")]
    assert len(locks) == 1
    assert f"lock on {path}" in locks[0]


def test_descriptor_that_is_not_closed_is_seen(ground: Ground, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert any(str(tmp_path / "file") in what for what in ground.left(()))


def test_guest_that_is_gone_is_seen(ground: Ground) -> None:
    seen = found(ground, Alive(domid=DOMIDS.start + 7, uid=GONE, pid=GONE))
    assert [what for what in seen if "missing: the cgroup" in what]
    assert [what for what in seen if "missing: " in what and "domains" in what]


def test_broker_kills_nobody_who_is_not_of_the_storm(undo: ExitStack, tmp_path: Path) -> None:
    """A number that has become another's in the meantime is left alone."""
    process = sleeper(undo)
    address = f"depriv-storm-test-{os.getpid()}"
    broker = Broker(address, Hit(who="toolstack", at="line", nth=1, victim="toolstack"), str(tmp_path))
    broker.start(process.pid)
    code = "from tests.support.storm_point import Point; import sys; Point(sys.argv[1], 'toolstack').reached('here')"
    subprocess.run([sys.executable, "-c", code, address], check=True, cwd=Path(__file__).parents[2], timeout=30)
    broker.close()
    assert broker.struck == ""
    assert process.poll() is None
