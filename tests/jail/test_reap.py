# SPDX-License-Identifier: Apache-2.0
"""Kill by uid, tried where nobody else can be hit: every test is process 1 of a pid namespace of its own."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support import build, host
from tests.support.apart import run
from tests.support.linux import cache_directory

from depriv.check import check
from depriv.steps import Plan, Reap

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

pytestmark = pytest.mark.root


@pytest.fixture
def apart(tmp_path: Path) -> Any:
    """Return a function that runs code as process 1 of a new pid namespace and returns what it says."""
    host.need(os.geteuid() == 0, what="root")
    host.need(shutil.which("unshare") is not None, what="unshare")
    return functools.partial(run, tmp_path)


def test_all_processes_of_the_uid_die_and_nobody_elses(apart: Any) -> None:
    said = apart("""
        targets = [start(A, wait) for _ in range(20)]
        others = [start(B, wait) for _ in range(3)]
        before = living(A)
        reap(STEP)
        print(json.dumps([len(before), living(A), [ends(p) for p in targets], [ends(p) for p in others], living(B)]))
    """)
    before, left, targets, others, others_left = said
    assert before == 20
    assert left == []
    assert targets == [9] * 20
    assert others == [0] * 3
    assert len(others_left) == 3


def test_uid_of_nobody_is_reaped_at_once(apart: Any) -> None:
    number, elapsed, _ = apart("print(json.dumps(refusal(STEP)))")
    assert number == 0
    assert elapsed < 2


def test_processes_that_kill_back_do_not_survive(apart: Any) -> None:
    """Each kills whatever it may, as fast as it can, in a namespace where it may reach us and its own kind only."""
    said = apart("""
        def strike():
            assert os.getuid() == A and os.readlink("/proc/self/ns/pid") != sys.argv[1]
            os.close(opens)
            os.read(gate, 1)  # until all are there
            while True:
                try:
                    os.kill(-1, signal.SIGKILL)
                except OSError:
                    pass
        gate, opens = os.pipe()
        targets = [start(A, strike) for _ in range(4)]
        bystander = start(B, wait)
        os.close(opens)
        time.sleep(0.1)
        reap(STEP)
        print(json.dumps([living(A), [ends(p) for p in targets], ends(bystander)]))
    """)
    assert said == [[], [9] * 4, 0]


def test_processes_that_multiply_and_hide_their_uid_do_not_survive(apart: Any) -> None:
    said = apart("""
        import resource
        def breed():
            resource.setrlimit(resource.RLIMIT_NPROC, (40, 40))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                try:
                    os.fork()
                    os.setsid()
                except OSError:
                    pass
        start(A, breed)
        stopped = start(A, wait)
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(0.3)
        many = len(living(A))
        reap(STEP)
        time.sleep(0.2)
        print(json.dumps([many, living(A)]))
    """)
    assert said[0] > 3
    assert said[1] == []


def test_process_with_the_uid_as_any_of_its_uids_is_seen(apart: Any) -> None:
    said = apart("""
        both = start(A, wait, ruid=B)  # real uid another's; effective and saved the target's
        seen = living(A) == [both]
        reap(STEP)
        print(json.dumps([seen, living(A), ends(both)]))
    """)
    assert said == [True, [], 9]


def test_zombie_whose_threads_live_counts_as_alive_and_is_killed(apart: Any) -> None:
    program = build.attacker(cache_directory())
    said = apart(
        """
        fd = os.open(sys.argv[3], os.O_RDONLY)
        headless = start(A, lambda: os.execv(f"/proc/self/fd/{fd}", ["x", "--threads"]))
        dead = start(A, lambda: os._exit(0))
        deadline = time.monotonic() + 10
        while (state(headless), state(dead)) != ("Z", "Z") and time.monotonic() < deadline:
            time.sleep(0.01)
        states = [state(headless), state(dead)]
        before = living(A) == [headless]
        reap(STEP)
        print(json.dumps([states, before, living(A)]))
        """,
        str(program),
    )
    assert said == [["Z", "Z"], True, []]


@pytest.mark.parametrize(
    "change", ["uid=0", "reaper_uid=0", "reaper_uid=A", "uid=999", "reaper_uid=-1", "uid=2**32 - 1"]
)
def test_dangerous_uid_is_refused_by_the_reaper_itself(apart: Any, change: str) -> None:
    """Whatever check() let through: it looks at its own uids right before it kills."""
    said = apart(f"""
        near = [start(uid, wait) for uid in (A, B, 999, REAPER)]
        number, _, _ = refusal(STEP.replace({change}, timeout_ms=300))
        print(json.dumps([number, [ends(p) for p in near]]))
    """)
    assert said[0] in (1, 22)
    assert said[1] == [0] * 4


def test_reaper_may_be_a_system_user(apart: Any) -> None:
    """As Xen's documentation makes it."""
    said = apart("""
        found = [start(uid, wait) for uid in (A, B, 998)]
        reap(STEP.replace(reaper_uid=999))
        print(json.dumps([ends(p) for p in found]))
    """)
    assert said == [9, 0, 0]


@pytest.mark.parametrize("change", ["uid=0", "uid=999", "uid=REAPER", "uid=2**32 - 1"])
def test_dangerous_uid_is_refused_where_no_killer_can_be_forked(apart: Any, change: str) -> None:
    """Then root itself kills, one by one: nothing but the uid in the plan says whom."""
    said = apart(f"""
        near = [start(uid, wait) for uid in (A, B, 999, REAPER)]
        def none_left():
            raise BlockingIOError(errno.EAGAIN, "no pid")
        os.fork = none_left
        number, _, _ = refusal(STEP.replace({change}, timeout_ms=300))
        print(json.dumps([number, [ends(p) for p in near]]))
    """)
    assert said == [1, [0] * 4]


@pytest.mark.parametrize(
    ("uid", "reaper_uid"),
    [(0, 76003), (76001, 0), (999, 76003), (76001, -1), (76001, 76001), (2**32 - 1, 76003), (65534, 76003)],
)
def test_dangerous_uid_is_refused_before_the_jail_begins(uid: int, reaper_uid: int) -> None:
    step = Reap(uid=uid, gid=76001, reaper_uid=reaper_uid, lock="/run/lock/reaper")
    with pytest.raises(ValueError, match=r"no device model's|could be killed first"):
        check(Plan(domain="x", domid=1, restricted=True, shared=False, steps=(step,)))


@pytest.mark.parametrize("kind", ["LOCK_EX", "LOCK_SH"])
def test_reaper_waits_for_another_and_gives_up_in_time(apart: Any, kind: str) -> None:
    """Two at once would kill each other, so that not even a shared lock goes beside it."""
    said = apart(f"""
        target = start(A, wait)
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.{kind})
        number, elapsed, text = refusal(STEP.replace(timeout_ms=300))
        named = "process %d (python" % os.getpid() in text
        alive = ends(target)
        os.close(fd)
        reap(STEP)
        print(json.dumps([errno.errorcode[number], elapsed, named, alive, ends(target)]))
    """)
    assert said[0] == "ETIMEDOUT"
    assert 0.3 <= said[1] < 3
    assert said[2:] == [True, 0, 9]


def test_lock_that_is_a_link_is_refused(apart: Any) -> None:
    number, _, _ = apart("""
        os.symlink("/etc/passwd", LOCK)
        print(json.dumps(refusal(STEP)))
    """)
    assert number == 40  # ELOOP


def test_process_that_cannot_die_in_time_is_named(apart: Any) -> None:
    """One that comes back as fast as it is killed: somebody with more privilege keeps making it."""
    said = apart("""
        maker = os.fork()
        if maker == 0:
            while True:
                start(A, wait)
                time.sleep(0.001)
        time.sleep(0.2)
        number, elapsed, _ = refusal(STEP.replace(timeout_ms=400))
        os.kill(maker, signal.SIGKILL)
        os.waitpid(maker, 0)
        print(json.dumps([errno.errorcode.get(number, number), elapsed]))
    """)
    # It may be caught in between two of them: then it is right to say that none was there.
    assert said[0] in ("EBUSY", 0)
    assert said[1] < 5


def test_a_number_that_is_gone_when_it_is_asked_does_not_end_the_search(apart: Any) -> None:
    """The listing names a process that has ended by the time it is read: the others still have to be looked at."""
    said = apart("""
        target = start(A, wait)
        names = os.listdir
        os.listdir = lambda path: ["99999999", *names(path)]
        print(json.dumps([living(A) == [target], living(B)]))
    """)
    assert said == [True, []]


# By cgroup, where the kernel has no cgroup.kill


def test_nought_in_a_list_of_processes_is_nobody_to_kill(apart: Any) -> None:
    """So the kernel names processes outside of our pid namespace, and kill(0) is our own process group."""
    said = apart("""
        from depriv.cgroup import kill_cgroup
        folder = sys.argv[2] + "/cgroup"
        os.mkdir(folder)
        with open(folder + "/cgroup.procs", "w") as file:
            file.write("0")
        caller = os.fork()
        if caller == 0:
            os.setsid()  # nobody else is in its group, whatever comes
            assert os.getpgid(0) == os.getpid()
            kill_cgroup(folder)
            os._exit(7)
        _, status = os.waitpid(caller, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), os.listdir(folder)]))
    """)
    assert said == [7, ["cgroup.procs"]]


@pytest.fixture
def old_cgroup() -> Iterator[str]:
    """Return a new cgroup of version 1."""
    host.need(os.path.isdir("/sys/fs/cgroup/pids"), what="cgroups of version 1")
    path = f"/sys/fs/cgroup/pids/depriv-tests-{os.getpid()}"
    os.mkdir(path)
    yield path
    deadline = time.monotonic() + 5
    while True:
        try:
            os.rmdir(path)
            break
        except OSError:
            assert time.monotonic() < deadline, path
            time.sleep(0.01)


def test_cgroup_of_version_1_is_killed_process_by_process(apart: Any, old_cgroup: str) -> None:
    """There is no cgroup.kill, and it cannot be made; one process of the cgroup is outside and shows as 0."""
    with subprocess.Popen(["sleep", "60"]) as outside:
        Path(old_cgroup, "cgroup.procs").write_text(str(outside.pid))
        said = apart(
            """
            from depriv.cgroup import kill_cgroup
            inside = [start(A, wait) for _ in range(3)]
            for pid in inside:
                with open(sys.argv[3] + "/cgroup.procs", "w") as file:
                    file.write(str(pid))
            caller = os.fork()
            if caller == 0:
                os.setsid()
                kill_cgroup(sys.argv[3])
                os._exit(7)
            _, status = os.waitpid(caller, 0)
            print(json.dumps([os.waitstatus_to_exitcode(status), [ends(pid) for pid in inside]]))
            """,
            old_cgroup,
        )
        lives = outside.poll() is None
        outside.kill()
    assert said[0] == 7
    assert said[1][:1] == [9]
    assert lives
