# SPDX-License-Identifier: Apache-2.0
"""Real launch plans with a small static program in QEMU's place: the jail cannot tell the difference.

The plan is the planner's, from a configuration and host facts written down here, so that neither QEMU nor the users
of `depriv setup` have to be there. Every id, cgroup and folder is the test's own: tests may run beside each other and
beside live domains.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING

from tests.support import build, host
from tests.support.linux import cache_directory

from depriv import lifecycle, planner, proc, steps
from depriv.cgroup import find_cgroup
from depriv.config import Disk, Domain
from depriv.detect import look_at
from depriv.entry import Entry
from depriv.guestlog import Log
from depriv.host import Host, Program
from depriv.identity import RANGE_BASE, REAPER, Accounts, Group, User
from depriv.registry import Registry
from depriv.spawn import Jail

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path
    from typing import Any

    from depriv.assembly import Launch

PROGRAM = "/usr/bin/qemu-system-x86_64"
DISK_FD = 10  # of the first disk; the planner's number
BASE_UID = 65538
FIRST_DOMID = 10000 + os.getpid() % 450 * 20  # 20 for each process that runs tests
DOMIDS = range(FIRST_DOMID, FIRST_DOMID + 20)
UIDS = range(BASE_UID + FIRST_DOMID, BASE_UID + FIRST_DOMID + 20)
# A reaper kills the processes of its own uid, too: one that nobody has, and no other run of tests.
REAPER_UID = 98290 + os.getpid() % 500
TIMEOUT_S = 20.0
ALLOW_ALL = "060000000000ff7f"  # one struct sock_filter: BPF_RET, SECCOMP_RET_ALLOW


def accounts() -> Accounts:
    """Return the users that `depriv setup` makes, with a reaper of our own."""
    shell, home = "/usr/sbin/nologin", "/nonexistent"
    base = User(name=RANGE_BASE, uid=BASE_UID, gid=BASE_UID, shell=shell, home=home, comment="depriv")
    reaper = User(name=REAPER, uid=REAPER_UID, gid=REAPER_UID, shell=shell, home=home, comment="depriv")
    groups = (Group(name=RANGE_BASE, gid=BASE_UID, members=()), Group(name=REAPER, gid=REAPER_UID, members=()))
    return Accounts(users=(base, reaper), groups=groups, ranges=())


class Ground:
    """A state folder with what a start needs, and the plans made on it."""

    def __init__(self, folder: Path) -> None:
        """Make the folders: a registry, an image of 1 MiB, a kernel to be copied, QEMU's stand-in."""
        self.folder = folder
        self.registry = Registry(str(folder / "state"))
        self.registry.prepare()
        self.disk = folder / "disk.img"
        self.disk.write_bytes(bytes(1 << 20))
        self.disk.chmod(0o600)
        self.kernel = folder / "kernel"
        self.kernel.write_bytes(b"\x7fELF, in name only")
        self.kernel.chmod(0o600)
        self.cgroups = f"{find_cgroup()[0]}/depriv-tests-{os.getpid()}"
        self._next = FIRST_DOMID
        self.program = build.attacker(cache_directory())

    def where(self) -> dict[str, Any]:
        """Return the arguments of ``host.snapshot`` for this ground."""
        cgroups = tuple(f"{self.cgroups}/depriv/{domid}" for domid in DOMIDS)
        return {"folder": self.registry.folder, "uids": UIDS, "cgroups": cgroups}

    def snapshot(self) -> host.HostState:
        """Return what a failed start has to leave as it was."""
        return host.snapshot(**self.where())

    def launch(self, *words: str, disk: Path | None = None, restricted: bool = True) -> Launch:
        """Return the plan of a new domain whose QEMU is ``self.program``, told ``words``, and register it."""
        domid = self._next
        self._next = FIRST_DOMID + (self._next + 1 - FIRST_DOMID) % len(DOMIDS)
        image = disk or self.disk
        config = Domain(
            name=f"guest{domid}",
            accel="tcg",
            disks=(Disk(vdev="xvda", target=str(image)),),
            kernel=str(self.kernel),
            dm_restrict=restricted,
        )
        facts = Host(
            root=True,
            program=Program(path=PROGRAM),
            accounts=accounts(),
            files=(look_at(str(image)), look_at(str(self.kernel))),
            domid=domid,
            cgroup_dir=self.cgroups,
            cgroup_version=find_cgroup()[1],
            root_links=(("bin", "usr/bin"),),
            state_dir=self.registry.folder,
            cache_dir=str(self.folder / "cache"),
        )
        launch = planner.plan(config, facts)
        self._stand_in(launch.runtime)
        act = launch.plan.steps[-1]
        assert isinstance(act, steps.Execute)
        act = act.replace(argv=(*act.argv, *words))
        launch = launch.replace(plan=launch.plan.replace(steps=(*launch.plan.steps[:-1], act)))
        with contextlib.ExitStack() as held:
            self.registry.add(self._entry(config, launch), held)
        return launch

    def _entry(self, config: Domain, launch: Launch) -> Entry:
        """Return what the registry is to hold of a domain that is about to be launched."""
        entry = Entry(
            name=config.name,
            domid=launch.plan.domid,
            state="starting",
            uid=0,
            gid=0,
            reaper_uid=0,
            shared=False,
            restricted=config.dm_restrict,
            memory_mib=config.memory_mib,
            vcpus=config.vcpus,
            accel="",
            cgroup="",
            boot_id=proc.boot_id(),
            created_boot_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            created_at_s=int(time.time()),
            toolstack_pid=os.getpid(),
            toolstack_starttime=proc.start_time(os.getpid()),
        )
        return lifecycle._committed(entry, launch)

    def _stand_in(self, runtime: str) -> None:
        program = runtime + PROGRAM
        if not os.path.exists(program):
            os.makedirs(os.path.dirname(program), 0o755)
            shutil.copyfile(self.program, program)
            os.chmod(program, 0o111)

    def entry(self, launch: Launch) -> Entry:
        """Return what the registry holds of a launch."""
        return self.registry.find(str(launch.plan.domid))

    def forget(self, launch: Launch) -> None:
        """Do what the toolstack does after a start that failed."""
        lifecycle._forget(self.entry(launch), self.registry)

    def close(self) -> None:
        """End and remove whatever a test left, so that its failure is its own alone."""
        try:
            for entry in self.registry.entries():
                lifecycle._forget(entry, self.registry)
        finally:
            for path in (f"{self.cgroups}/depriv", self.cgroups):
                assert wait_for(partial(_removed, path), 5), f"{path} is in use"


def with_filter(launch: Launch, program: str = ALLOW_ALL) -> Launch:
    """Return the launch with another system call filter; without one QEMU is not started."""
    changed = [step.replace(program=program) if isinstance(step, steps.Filter) else step for step in launch.plan.steps]
    return launch.replace(plan=launch.plan.replace(steps=tuple(changed)))


def taking(launch: Launch, *takes: steps.TakeFd) -> Launch:
    """Return the launch with descriptors of this process handed in."""
    plan = launch.plan
    place = next(place for place, step in enumerate(plan.steps) if isinstance(step, steps.MakeFifo))
    return launch.replace(plan=plan.replace(steps=(*plan.steps[:place], *takes, *plan.steps[place:])))


def _removed(path: str) -> bool:
    """Remove a cgroup; False while a process is still leaving it."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


class Running:
    """A stand-in that executes in its jail, which still waits to release it."""

    def __init__(self, jail: Jail, launch: Launch) -> None:
        """Have the plan done and take hold of what was started."""
        self.jail = jail
        self.launched = jail.launch(launch.plan, timeout_s=TIMEOUT_S)
        self.pid, self.pidfd = self.launched.pid, self.launched.pidfd
        self.log = Log(f"{launch.directory}/log")

    def ended(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Wait for its end; tell whether it came."""
        return ended(self.pidfd, timeout_s)

    def output(self) -> str:
        """Wait for its end and return what it printed."""
        assert self.ended()
        return self.log.raw()


@contextlib.contextmanager
def running(launch: Launch) -> Generator[Running]:
    """Start the stand-in of a plan; it ends with the block, unless it was released."""
    with Jail() as jail:
        started = Running(jail, launch)
        try:
            with started.log:
                yield started
        finally:
            os.close(started.pidfd)


@contextlib.contextmanager
def injected(strace: str, jail: Jail, *rules: str) -> Generator[None]:
    """Make system calls of a jail that waits for its plan fail, or end it, as strace's ``inject=`` rules say.

    Calls are counted for each process from here on. strace is attached, not put in front: it would hold the jail's
    socket open. It must never run without end: an abort of process 1 of a pid namespace loops under it for ever.
    """
    # The first argument of the call it sleeps in is its control socket: all modules are loaded.
    assert wait_for(lambda: _sleeps_in(jail._pid).split()[1:2] == ["0x3"])
    options = [word for rule in rules for word in ("-e", f"inject={rule}")]
    argv = ["timeout", "60", strace, "-f", "-o", "/dev/null", *options, "-p", str(jail._pid)]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "attached" in process.stderr.readline()
            yield
        finally:
            process.terminate()  # timeout(1) hands it on, and strace lets go


def _sleeps_in(pid: int) -> str:
    with open(f"/proc/{pid}/syscall", encoding="ascii") as file:
        return file.read()


def ended(pidfd: int, timeout_s: float = TIMEOUT_S) -> bool:
    """Tell whether the process of a pidfd has ended within the time."""
    return bool(select.select([pidfd], [], [], timeout_s)[0])


def kill(pidfd: int) -> None:
    """End a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> bool:
    """Return whether ``condition()`` came true within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
