# SPDX-License-Identifier: Apache-2.0
"""The reaper against processes that will not go: each attack first shown to work, then shown to be of no use.

Every test runs in a pid namespace of its own (tests/support/apart.py), beside tests/support/bombs.c.
"""

from __future__ import annotations

import os
import shutil
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support import apart, build, host
from tests.support.linux import cache_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Run = Callable[..., Any]

pytestmark = pytest.mark.root

BOMBS = r"""
PROGRAM = os.open(sys.argv[3], os.O_RDONLY)

def bomb(what, count, *keep):
    def body():
        for fd in keep:
            os.set_inheritable(fd, True)
        os.execv(f"/proc/self/fd/{PROGRAM}", ["bombs", what, str(count)])
    return start(A, body)

def last_pid():
    with open("/proc/loadavg") as file:
        return int(file.read().split()[4])

def forking():
    '''Whether anybody in this namespace makes processes, seen or not.'''
    before = last_pid()
    time.sleep(0.1)
    return last_pid() != before

def signal_of(pid):
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status)
"""

GOAL_S = 0.08  # for a thousand


@pytest.fixture
def hostile(tmp_path: Path) -> Run:
    """Return a function that runs code beside the bombs and returns what it says."""
    host.need(os.geteuid() == 0, what="root")
    host.need(shutil.which("unshare") is not None, what="unshare")
    host.need(shutil.which("gcc") is not None, what="gcc")
    program = str(build.bombs(cache_directory()))

    def run(code: str, *words: str) -> Any:
        return apart.run(tmp_path, f"{BOMBS}{textwrap.dedent(code)}", program, *words)

    return run


@pytest.fixture
def old_cgroup(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return a new cgroup of version 1, of the controller that the test names."""
    base = f"/sys/fs/cgroup/{request.param}"
    host.need(os.path.exists(f"{base}/cgroup.procs"), what="cgroups of version 1")
    path = f"{base}/depriv-hostile-{os.getpid()}"
    os.mkdir(path)
    yield path
    if request.param == "freezer":
        Path(path, "freezer.state").write_text("THAWED")
    deadline = time.monotonic() + 5
    while True:
        try:
            os.rmdir(path)
            break
        except OSError:
            assert time.monotonic() < deadline, path
            time.sleep(0.01)


# What multiplies, hides and does not hear


@pytest.mark.parametrize(
    ("what", "count"),
    [
        ("static", 50),
        ("fork", 60),
        ("chain", 20),
        ("daemon", 20),
        ("vfork", 40),
        ("threads", 40),
        ("stopped", 20),
        ("deaf", 8),
        ("groups", 20),
    ],
)
def test_bomb_goes_on_by_itself_and_ends_with_the_reaper(hostile: Run, what: str, count: int) -> None:
    said = hostile(f"""
        bystander = start(B, wait)
        bomb("{what}", {count})
        time.sleep(0.3)
        goes_on = bool(living(A)) or forking()
        reap(STEP)
        left = living(A)
        print(json.dumps([goes_on, left, forking(), living(A), ends(bystander)]))
    """)
    assert said == [True, [], False, [], 0]


def test_thousand_that_fork_and_spin_do_not_starve_the_reaper(hostile: Run) -> None:
    """Beside them an ordinary process takes up to three seconds, and worse, for what is done here in 0.1 to 0.3."""
    said = hostile("""
        took = []
        for _ in range(2):
            bomb("fork", 1000)
            time.sleep(1.5)
            number, elapsed, _ = refusal(STEP)
            took.append(elapsed)
            assert number == 0
        print(json.dumps([max(took), living(A), os.sched_getscheduler(0)]))
    """)
    assert said[0] < 1.5
    assert said[1:] == [[], 0]  # and it is an ordinary process again


def test_chain_outruns_who_lists_and_kills_but_not_the_reaper(hostile: Run) -> None:
    """Each process of it lives for some microseconds: by the time its number is read it is another's."""
    said = hostile("""
        outran = False
        for n in range(60):
            bomb("chain", 1 + n % 4)
            time.sleep(0.05)
            for _ in range(3):
                for pid in living(A):
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
            outran = forking()
            if outran:
                break  # and goes on
        reap(STEP)
        print(json.dumps([outran, forking(), living(A)]))
    """)
    assert said == [True, False, []]


def test_thousand_processes_are_gone_in_time(hostile: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Goal: 80 ms. Three times that is allowed for, and the best of three, as machines are busy with other things."""
    said = hostile("""
        took = []
        for _ in range(3):
            bomb("static", 1000)
            until(lambda: len(living(A)) == 1000, 30)
            begun = time.monotonic()
            reap(STEP)
            took.append(time.monotonic() - begun)
            assert living(A) == []
        print(json.dumps(took))
    """)
    with capsys.disabled():
        print(f" [1000 processes in {min(said) * 1000:.0f} ms]", end="")
    assert min(said) < 3 * GOAL_S


# What strikes back


def test_killer_of_the_same_uid_is_killed_and_the_reaper_never(hostile: Run) -> None:
    said = hostile("""
        def naive():
            os.setgroups(())
            os.setresuid(A, A, A)
            with open("/proc/self/status") as file:
                file.read()
            os.kill(-1, signal.SIGKILL)
            os._exit(0)
        def strikers():
            first = last_pid()
            return [bomb("strike", first + 2) for _ in range(2)]
        died = tries = 0
        while not died and tries < 200:
            tries += 1
            those = strikers()
            time.sleep(0.02)
            killer = os.fork()
            if killer == 0:
                naive()
            died += signal_of(killer) == 9
            reap(STEP)
            [signal_of(pid) for pid in those]
        sent = []
        for _ in range(30):
            those = strikers()
            time.sleep(0.02)
            victim = os.fork()
            if victim == 0:
                os.setresuid(A, A, A)
                while True:
                    signal.pause()
            sent.append(signal_of(victim) == 9)  # by them: nobody else did anything yet
            sent.append(reaper._kill_all(STEP, reaper._now() + 5))
            reap(STEP)
            sent.append([signal_of(pid) for pid in those] == [9, 9])
        print(json.dumps([died, all(sent), living(A)]))
    """)
    assert said == [1, True, []]


def test_killer_that_its_targets_slow_down_gets_help(hostile: Run) -> None:
    """Its effective uid is theirs: they may make it the last in the queue of a processor that they keep busy."""
    said = hostile("""
        bomb("starve", 60)
        time.sleep(0.3)
        victim = start(A, wait)
        until(lambda: os.sched_getscheduler(victim) == os.SCHED_IDLE and os.sched_getaffinity(victim) == {0})
        number, elapsed, text = refusal(STEP)
        print(json.dumps([number, text, elapsed, living(A)]))
    """)
    assert said[:2] == [0, ""]
    assert said[2] < 5
    assert said[3] == []


def test_killer_that_never_runs_is_helped_while_it_is_waited_for(hostile: Run) -> None:
    """Stopped before it may kill: all that are seen die none the less, but nothing is proved, and it does not stay."""
    said = hostile("""
        me, change = os.getpid(), os.setgroups
        os.setgroups = lambda groups: change(groups) if os.getpid() == me else os.kill(os.getpid(), signal.SIGSTOP)
        target = os.fork()
        if target == 0:
            os.setresuid(A, A, A)
            while True:
                signal.pause()
        until(lambda: living(A))
        number, elapsed, text = refusal(STEP.replace(timeout_ms=600))
        killed = signal_of(target)
        killer = signal_of(-1)
        print(json.dumps([errno.errorcode[number], elapsed < 2, killed, killer]))
    """)
    assert said == ["ETIMEDOUT", True, 9, 9]


def test_killer_that_another_reaper_killed_proves_nothing(hostile: Run) -> None:
    """It has the same real uid. Three times the signal is not sent, and the chain is not to be seen: go on."""
    said = hostile("""
        me, change = os.getpid(), os.setgroups
        def cut(groups):
            if os.getpid() != me:
                with open(LOCK + ".rounds", "a") as file:
                    file.write("x")
                    if file.tell() <= 3:
                        os.kill(os.getpid(), signal.SIGKILL)
            change(groups)
        bomb("chain", 2)
        time.sleep(0.1)
        goes_on = forking()
        os.setgroups = cut
        number, _, text = refusal(STEP)
        print(json.dumps([goes_on, number, text, forking(), os.path.getsize(LOCK + ".rounds") > 3]))
    """)
    assert said == [True, 0, "", False, True]


def test_two_reapers_with_two_locks_both_reach_their_end(hostile: Run) -> None:
    said = hostile("""
        rival = os.fork()
        if rival == 0:
            for _ in range(30):
                start(B, wait)
                reap(STEP.replace(uid=B, gid=B, lock=LOCK + ".other"))
                assert living(B) == []
            os._exit(0)
        for _ in range(30):
            start(A, wait)
            reap(STEP)
            assert living(A) == []
        print(json.dumps(os.waitpid(rival, 0)[1]))
    """)
    assert said == 0


# What holds on


@pytest.mark.parametrize("kind", ["LOCK_EX", "LOCK_SH"])
def test_lock_held_by_what_is_to_be_killed_keeps_nobody_out(hostile: Run, kind: str) -> None:
    said = hostile(f"""
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT)
        target = start(A, lambda: fcntl.flock(fd, fcntl.{kind}))
        os.close(fd)
        other = os.open(LOCK, os.O_RDWR)
        def taken():
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(other, fcntl.LOCK_UN)
                return False
            except BlockingIOError:
                return True
        until(taken)
        number, elapsed, text = refusal(STEP)
        print(json.dumps([number, text, elapsed, taken(), signal_of(target)]))
    """)
    assert said[:2] == [0, ""]
    assert said[2] < 2
    assert said[3:] == [False, 9]


def test_lock_passed_on_along_a_chain_keeps_nobody_out(hostile: Run) -> None:
    """Whoever took it is dead, whoever has it is dead before it can be named."""
    said = hostile("""
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT)
        def body():
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.set_inheritable(fd, True)
            os.execv(f"/proc/self/fd/{PROGRAM}", ["bombs", "chain", "5"])
        head = start(A, body)
        os.close(fd)
        signal_of(head)
        other = os.open(LOCK, os.O_RDWR)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except BlockingIOError:
            held = True
        number, elapsed, text = refusal(STEP.replace(timeout_ms=2000))
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print(json.dumps([held, number, text, elapsed, forking(), living(A)]))
    """)
    assert said[:3] == [True, 0, ""]
    assert 1 <= said[3] < 2
    assert said[4:] == [False, []]


def test_lock_of_a_stopped_reaper_is_waited_for_and_its_holder_named(hostile: Run) -> None:
    said = hostile("""
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT)
        holder = start(B, lambda: fcntl.flock(fd, fcntl.LOCK_EX))
        os.close(fd)
        time.sleep(0.1)
        os.kill(holder, signal.SIGSTOP)
        until(lambda: state(holder) == "T")
        target = start(A, wait)
        number, elapsed, text = refusal(STEP.replace(timeout_ms=400))
        print(json.dumps([errno.errorcode[number], f"process {holder} (" in text, ") T" in text, ends(target)]))
    """)
    assert said == ["ETIMEDOUT", True, True, 0]


def test_reaper_that_was_stopped_does_not_kill_the_next_owner_of_the_uid(hostile: Run) -> None:
    said = hostile("""
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)
        late = os.fork()
        if late == 0:
            os.close(fd)
            os._exit(refusal(STEP.replace(timeout_ms=500))[0])
        time.sleep(0.1)
        os.kill(late, signal.SIGSTOP)
        os.close(fd)
        time.sleep(0.6)
        owner = start(A, wait)
        os.kill(late, signal.SIGCONT)
        _, status = os.waitpid(late, 0)
        print(json.dumps([errno.errorcode.get(os.waitstatus_to_exitcode(status)), ends(owner)]))
    """)
    assert said in (["EBUSY", 0], ["ETIMEDOUT", 0])


@pytest.mark.parametrize("gone", [True, False])
def test_jail_that_was_stopped_until_who_asked_is_gone_kills_nobody(hostile: Run, *, gone: bool) -> None:
    """With its toolstack goes the lock on the domain: its uid may have been given to the next one since."""
    said = hostile(f"""
        from depriv import codec
        from depriv.spawn import Jail
        from depriv.steps import Plan

        jail = Jail()
        os.kill(jail.pid, signal.SIGSTOP)
        until(lambda: state(jail.pid) == "T")
        jail._tell(codec.encode(Plan(domain="x", domid=1, restricted=True, shared=False, steps=(STEP,))))
        if {gone}:
            jail._control.close()
        owner = start(A, wait)
        os.kill(jail.pid, signal.SIGCONT)
        if not {gone}:
            jail._answer("done", 10)
        _, status = os.waitpid(jail.pid, 0)
        time.sleep(0.05)
        print(json.dumps([os.waitstatus_to_exitcode(status), ends(owner)]))
    """)
    assert said == ([1, 0] if gone else [0, 9])


def test_killer_that_comes_too_late_kills_nobody(hostile: Run) -> None:
    said = hostile("""
        target = start(A, wait)
        sent = []
        for offset in (-0.001, 5):
            killer = os.fork()
            if killer == 0:
                os._exit(reaper._become_reaper_and_kill(STEP, reaper._now() + offset))
            sent.append(os.waitpid(killer, 0)[1] >> 8)
            time.sleep(0.05)
            sent.append(ends(target))
        print(json.dumps(sent))
    """)
    assert said == [0, 0, 1, 9]


@pytest.mark.parametrize("old_cgroup", ["pids"], indirect=True)
def test_reaper_without_a_pid_to_fork_makes_room(hostile: Run, old_cgroup: str) -> None:
    Path(old_cgroup, "pids.max").write_text("60")
    said = hostile(
        """
        with open(sys.argv[4] + "/cgroup.procs", "w") as file:
            file.write(str(os.getpid()))
        bomb("fork", 1000)
        full = 0
        for _ in range(20):
            time.sleep(0.02)
            try:
                child = os.fork()
                if child == 0:
                    os._exit(0)
                os.waitpid(child, 0)
            except BlockingIOError:
                full += 1
        number, elapsed, text = refusal(STEP)
        print(json.dumps([full > 10, number, text, living(A), forking()]))
        """,
        old_cgroup,
    )
    assert said == [True, 0, "", [], False]


@pytest.mark.parametrize("old_cgroup", ["freezer"], indirect=True)
def test_process_that_sigkill_does_not_end_is_named_with_its_state(hostile: Run, old_cgroup: str) -> None:
    """Frozen by a cgroup of version 1 it is in uninterruptible sleep, as it would be on a dead file server."""
    said = hostile(
        """
        target, other = start(A, wait), start(A, wait)
        def freezer(name, value):
            with open(f"{sys.argv[4]}/{name}", "w") as file:
                file.write(value)
        def frozen():
            with open(sys.argv[4] + "/freezer.state") as file:
                return file.read() == "FROZEN\\n"
        freezer("cgroup.procs", str(target))
        freezer("freezer.state", "FROZEN")
        until(frozen)
        os.kill(target, signal.SIGKILL)
        time.sleep(0.1)
        immune = state(target) == "D"
        number, elapsed, text = refusal(STEP.replace(timeout_ms=400))
        named = f"1 still alive: {target} (D) by uid:" in text
        freezer("freezer.state", "THAWED")
        again = refusal(STEP)[0]
        print(json.dumps([immune, errno.errorcode[number], named, elapsed, again, signal_of(target), living(A)]))
        """,
        old_cgroup,
    )
    assert said[:3] == [True, "EBUSY", True]
    assert 0.4 <= said[3] < 2
    assert said[4:] == [0, 9, []]


# What only looks like the target, or becomes it


@pytest.mark.parametrize("gids", ["A, A, A", "A, B, B", "B, A, B", "B, B, A"])
def test_process_with_only_the_gid_is_reported_and_lives(hostile: Run, gids: str) -> None:
    said = hostile(f"""
        other = os.fork()
        if other == 0:
            os.setgroups(())
            os.setresgid({gids})
            os.setresuid(B, B, B)
            while True:
                signal.pause()
        waits = lambda: open(f"/proc/{{other}}/stat").read().rpartition(") ")[2][0] == "S"
        until(lambda: survivors(A, A) != [] and waits())
        target = start(A, wait)
        number, elapsed, text = refusal(STEP.replace(timeout_ms=300))
        named = f"1 still alive: {{other}} (S) by gid, with another uid:" in text
        alive = ends(other)
        os.kill(other, signal.SIGKILL)
        print(json.dumps([errno.errorcode[number], named, alive, signal_of(target), refusal(STEP)[0]]))
    """)
    assert said == ["EBUSY", True, 0, 9, 0]


def test_process_that_joins_the_uid_meanwhile_is_killed_or_reported(hostile: Run) -> None:
    """Somebody with more privilege keeps making them: what is not reported must not be there."""
    said = hostile("""
        maker = os.fork()
        if maker == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            for _ in range(300):
                if os.fork() == 0:
                    os.setresgid(A, A, A)
                    os.setresuid(A, A, A)
                    time.sleep(30)
                    os._exit(0)
                time.sleep(0.002)
            os._exit(0)
        until(lambda: living(A))
        said = [refusal(STEP.replace(timeout_ms=200))[0] for _ in range(4)]
        os.waitpid(maker, 0)
        time.sleep(0.05)
        last = refusal(STEP)[0]
        print(json.dumps([[number for number in said if number not in (0, errno.EBUSY)], last, living(A)]))
    """)
    assert said == [[], 0, []]


# What the host is like


@pytest.mark.parametrize(("there", "number"), [(True, 0), (False, 2)])
def test_lock_on_a_read_only_file_system_serves_if_it_is_there(hostile: Run, there: bool, number: int) -> None:
    said = hostile(f"""
        subprocess.run(["mount", "-t", "tmpfs", "none", sys.argv[2]], check=True)
        if {there}:
            open(LOCK, "w").close()
        subprocess.run(["mount", "-o", "remount,ro", sys.argv[2]], check=True)
        target = start(A, wait)
        print(json.dumps([refusal(STEP)[0], ends(target)]))
    """)
    assert said == [number, 9 if there else 0]
