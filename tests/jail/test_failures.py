# SPDX-License-Identifier: Apache-2.0
"""Every step of a real plan fails once: the error names it, and the host is as it was.

Where a wrong argument cannot make a step fail, strace makes the kernel refuse it. Beyond that the jail is killed at
the steps' borders, and the toolstack goes away at each message.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
from tests.support import host
from tests.support.guests import compiled
from tests.support.launch import TIMEOUT_S, ended, injected, running, taking, wait_for

from depriv import steps
from depriv.cgroup import find_cgroup
from depriv.check import check
from depriv.errors import JailError
from depriv.spawn import Jail

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tests.support.launch import Ground

    from depriv.assembly import Launch
    from depriv.records import Record

pytestmark = pytest.mark.root

NONE = "/no/such/place"
# Kind of step -> what to change of the last such step of the plan (as attribute to a value, or to a function of the
# old value), and the errno that the kernel then says; 0: the standard library made another error of it.
WRONG: dict[type[Record], tuple[str, Any, int]] = {
    steps.Reap: ("lock", NONE, errno.ENOENT),
    steps.OpenFile: ("path", NONE, errno.ENOENT),
    steps.TakeFd: ("source", 1 << 20, errno.EBADF),
    steps.ListenUnix: ("path", NONE, errno.ENOENT),
    steps.MakeFifo: ("path", NONE, errno.ENOENT),
    steps.MakeCgroup: ("path", "/proc/depriv/1", errno.ENOENT),
    steps.MakeRoot: ("mountpoint", NONE, errno.ENOENT),
    steps.MakeDir: ("path", NONE, errno.ENOENT),
    steps.MakeLink: ("path", "/usr", errno.EEXIST),
    steps.BindTree: ("source", NONE, errno.ENOENT),
    steps.MakePrivate: ("path", NONE, errno.ENOENT),
    steps.CopyFile: ("path", NONE, errno.ENOENT),
    steps.SetHostname: ("name", "x" * 65, errno.EINVAL),  # __NEW_UTS_LEN, <linux/utsname.h>
    steps.SetLimit: ("value", 1 << 40, 0),
    steps.Filter: ("program", "00" * 8, errno.EINVAL),  # it loads a constant, and does not return
    steps.Execute: ("path", NONE, errno.ENOENT),
}
# Above fs.nr_open the kernel refuses RLIMIT_NOFILE to root, too: getrlimit(2).
LIMIT = "NOFILE"

with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as _file:
    LAST_CAP = int(_file.read())

# The call that makes the child: into a cgroup of version 2 it is born; for version 1 it is fork(2), after the reaper's.
FORK = "clone3:when=1" if find_cgroup()[1] == 2 else "clone:when=2"

# Kind of step -> strace's rule. Calls are counted for each process by itself.
INJECTED: dict[type[Record], tuple[tuple[str, int], ...]] = {
    steps.Reap: (("setgroups:error=EPERM:when=1", errno.EPERM), ("setresuid:error=EAGAIN:when=1", errno.EAGAIN)),
    steps.TakeFd: (("pidfd_open:error=EMFILE:when=1", errno.EMFILE), ("pidfd_getfd:error=EPERM:when=1", errno.EPERM)),
    steps.ListenUnix: (("listen:error=ENOMEM:when=1", errno.ENOMEM), ("bind:error=ENOSPC:when=1", errno.ENOSPC)),
    steps.MakeFifo: (("mknodat:error=ENOSPC:when=1", errno.ENOSPC), ("fcntl:error=EPERM:when=7", errno.EPERM)),
    steps.Unshare: (("unshare:error=EPERM:when=1", errno.EPERM), ("unshare:error=ENOSPC:when=1", errno.ENOSPC)),
    steps.MakeRoot: (("mount:error=EACCES:when=1", errno.EACCES), ("mount:error=ENOMEM:when=2", errno.ENOMEM)),
    steps.MakeNode: (("mknodat:error=EPERM:when=2", errno.EPERM), ("chmod:error=EPERM:when=1", errno.EPERM)),
    steps.BindTree: (("mount:error=EPERM:when=4", errno.EPERM),),  # that it is read-only is the second call
    steps.CopyFile: (("sendfile:error=ENOSPC:when=1", errno.ENOSPC), ("fchown:error=EPERM:when=1", errno.EPERM)),
    steps.PivotRoot: (
        ("pivot_root:error=EINVAL:when=1", errno.EINVAL),
        ("umount2:error=EPERM:when=1", errno.EPERM),
        ("mount:error=EPERM:when=6", errno.EPERM),  # the root is made read-only
    ),
    steps.BecomeInit: (
        (FORK.replace(":", ":error=EAGAIN:"), errno.EAGAIN),
        ("prctl:error=EINVAL:when=1", errno.EINVAL),  # the death signal
        ("setsid:error=EPERM:when=1", errno.EPERM),
    ),
    steps.NewUser: (("unshare:error=ENOSPC:when=2", errno.ENOSPC), ("unshare:error=EPERM:when=2", errno.EPERM)),
    steps.DropCapabilities: (
        ("prctl:error=EPERM:when=2", errno.EPERM),
        (f"prctl:error=EPERM:when={LAST_CAP + 2}", errno.EPERM),
        (f"prctl:error=EPERM:when={LAST_CAP + 3}", errno.EPERM),  # the ambient set
        (f"prctl:error=EPERM:when={LAST_CAP + 4}", errno.EPERM),  # the securebits
    ),
    steps.SetIds: (("setresgid:error=EAGAIN:when=1", errno.EAGAIN), ("capset:error=EPERM:when=1", errno.EPERM)),
    steps.NoNewPrivs: (
        (f"prctl:error=EINVAL:when={LAST_CAP + 5}", errno.EINVAL),
        (f"prctl:error=EINVAL:when={LAST_CAP + 6}", errno.EINVAL),
    ),
    steps.Filter: ((f"prctl:error=EACCES:when={LAST_CAP + 7}", errno.EACCES),),
    steps.Execute: (
        ("execve:error=ENOMEM:when=1", errno.ENOMEM),
        ("close_range:error=ENOSYS:when=1", errno.ENOSYS),
        ("dup2,dup3:error=EMFILE:when=3", errno.EMFILE),
    ),
}
CASES = [(kind, rule, number) for kind, rules in INJECTED.items() for rule, number in rules]


def changed(plan: steps.Plan, kind: type[Record], change: Callable[[Any], Any]) -> tuple[steps.Plan, Any]:
    """Return the plan with its last step of ``kind`` changed, and that step; what is detached at the end follows."""
    places = [at for at, step in enumerate(plan.steps) if isinstance(step, kind)]
    if kind is steps.SetLimit:
        places = [at for at in places if plan.steps[at].as_dict()["name"] == LIMIT]
    step = change(plan.steps[places[-1]])
    made = (*plan.steps[: places[-1]], step, *plan.steps[places[-1] + 1 :])
    detach = [one.target for one in made if isinstance(one, steps.BindTree)]
    detach += [one.path for one in made if isinstance(one, steps.MakePrivate)]
    after = tuple(one.replace(detach=tuple(detach)) for one in plan.after if isinstance(one, steps.EmptyRoot))
    return plan.replace(steps=made, after=after), step


def planned(ground: Ground, kind: type[Record]) -> Launch:
    """Return a launch that has a step of the kind."""
    launch = ground.launch("--serve")
    return taking(launch, steps.TakeFd(role="taken", source=0, number=20)) if kind is steps.TakeFd else launch


def refused(plan: steps.Plan, *, strace: str = "", rule: str = "") -> JailError:
    """Return the error of a plan that must fail, quickly."""
    begun = time.monotonic()
    with (
        Jail() as jail,
        injected(strace, jail, rule) if rule else nullcontext(),
        pytest.raises(JailError) as caught,
    ):
        jail.launch(plan, timeout_s=TIMEOUT_S)
    assert time.monotonic() - begun < 15
    return caught.value


def without_files(state: host.HostState) -> host.HostState:
    """Names in the domain's own folder are the registry's to remove, when the toolstack forgets the domain."""
    return state.replace(files=())


def test_every_kind_of_step_is_made_to_fail() -> None:
    assert WRONG.keys() | INJECTED.keys() | {steps.EmptyRoot} == set(steps.ALL)


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_step_with_a_wrong_argument_is_named_and_leaves_nothing(ground: Ground, kind: type[Record]) -> None:
    before = ground.snapshot()
    launch = planned(ground, kind)
    reserved = ground.snapshot()
    name, value, number = WRONG[kind]
    plan, step = changed(launch.plan, kind, lambda old: old.replace(**{name: value}))
    check(plan)  # or the step would not even be reached
    error = refused(plan)
    assert (error.step, error.errno) == (steps.describe(step), number)
    assert (os.strerror(number) if number else "raise maximum limit") in error.cause
    assert without_files(ground.snapshot()) == without_files(reserved)
    ground.forget(launch)
    assert ground.snapshot() == before


@pytest.mark.parametrize(("kind", "rule", "number"), CASES, ids=[f"{k.__name__}-{r}" for k, r, _ in CASES])
def test_refused_system_call_is_reported_by_its_step_and_leaves_nothing(
    ground: Ground, strace: str, kind: type[Record], rule: str, number: int
) -> None:
    before = ground.snapshot()
    launch = planned(ground, kind)
    reserved = ground.snapshot()
    error = refused(launch.plan, strace=strace, rule=rule)
    assert error.step in {steps.describe(step) for step in launch.plan.steps if isinstance(step, kind)}
    assert error.errno == number
    assert error.cause
    assert without_files(ground.snapshot()) == without_files(reserved)
    ground.forget(launch)
    assert ground.snapshot() == before


def occupied(ground: Ground, kind: type[Record], occupy: Callable[[str], None]) -> JailError:
    launch = ground.launch("--serve")
    path = next(step.as_dict()["path"] for step in launch.plan.steps if isinstance(step, kind))
    occupy(path)
    error = refused(launch.plan)
    assert os.path.lexists(path)  # what it did not make, it does not remove
    ground.forget(launch)
    return error


def test_occupied_names_are_an_error_and_stay_as_they_are(ground: Ground) -> None:
    assert occupied(ground, steps.ListenUnix, os.mkfifo).errno == errno.EADDRINUSE
    assert occupied(ground, steps.MakeFifo, lambda path: os.symlink("/dev/null", path)).errno == errno.EEXIST
    error = occupied(ground, steps.MakeCgroup, os.makedirs)
    assert error.errno == errno.EEXIST
    assert "earlier domain" in error.fix


def replaced(ground: Ground, replace: Callable[[], object]) -> JailError:
    """Start with an image that is replaced after planning."""
    ground.disk.write_bytes(bytes(1 << 20))
    launch = ground.launch("--serve")
    ground.disk.rename(ground.folder / "as-planned")
    replace()
    error = refused(launch.plan)
    (ground.folder / "as-planned").rename(ground.disk)
    ground.forget(launch)
    return error


def test_image_replaced_since_planning_is_never_opened_for_qemu(ground: Ground) -> None:
    disk = ground.disk
    assert replaced(ground, lambda: disk.write_bytes(bytes(1 << 20))).cause.endswith("it was replaced meanwhile")
    assert replaced(ground, lambda: disk.symlink_to("/etc/shadow")).errno == errno.ELOOP
    disk.unlink()
    begun = time.monotonic()
    assert "was replaced" in replaced(ground, lambda: os.mkfifo(disk)).cause
    assert time.monotonic() - begun < 5  # a FIFO is not waited for
    disk.write_bytes(b"")


@pytest.mark.parametrize(
    ("content", "mode", "number"),
    [(b"no program\n", 0o111, errno.ENOEXEC), (b"#!/no/shell\n", 0o555, errno.ENOENT), (b"", 0o644, errno.EACCES)],
)
def test_program_that_cannot_be_executed_is_reported_as_the_last_step(
    ground: Ground, content: bytes, mode: int, number: int
) -> None:
    ground.program = ground.folder / "program"
    ground.program.write_bytes(content)
    launch = ground.launch()
    os.chmod(launch.runtime + launch.plan.steps[-1].as_dict()["path"], mode)
    error = refused(launch.plan)
    assert (error.step, error.errno) == (steps.describe(launch.plan.steps[-1]), number)
    ground.forget(launch)


def test_root_that_cannot_be_emptied_ends_what_was_started(ground: Ground) -> None:
    launch = ground.launch("--serve")
    empty = launch.plan.after[0]
    assert isinstance(empty, steps.EmptyRoot)
    plan = launch.plan.replace(after=(empty.replace(remove=(*empty.remove, "/not-there")),))
    with running(launch.replace(plan=plan)) as started:
        with pytest.raises(JailError) as caught:
            started.jail.empty_root(timeout_s=TIMEOUT_S)
        assert caught.value.errno == errno.ENOENT
        assert "from the root" in caught.value.step
        assert started.ended()
    assert ground.snapshot().cgroups == ()
    ground.forget(launch)


def lives(jail: Jail, plan: steps.Plan) -> bool:
    """Have a plan done; tell whether the program runs at its end.

    A child that is killed in the moment of its exec looks to the jail as if it had executed: its pidfd tells.
    """
    try:
        pidfd = jail.launch(plan, timeout_s=TIMEOUT_S).pidfd
    except JailError:
        return False
    try:
        return not ended(pidfd, 5)
    finally:
        os.close(pidfd)


# In the jail unless it says otherwise; each is the first call of a step, or the one that makes what could be left.
BORDERS = (
    *("flock:when=1", "clone:when=1", "bind:when=1", "listen:when=1", "mknodat:when=1", "mkdir:when=1", "mkdir:when=2"),
    *("mkdir:when=3", "unshare:when=1", "mount:when=1", "mount:when=2", "mknodat:when=2", "mount:when=3"),
    *("symlink:when=1", "mount:when=5", "sendfile:when=1", "pivot_root:when=1", "umount2:when=1", "mount:when=6"),
    *("sethostname:when=1", FORK, "write:when=3", "write:when=4"),
    *(
        "setsid:when=1",
        "prlimit64:when=1",
        "prctl:when=1",
        "prctl:when=2",
        "setresgid:when=1",
        f"prctl:when={LAST_CAP + 7}",  # the filter
        "execve:when=1",
    ),  # in the child
)


@pytest.mark.parametrize("border", BORDERS)
def test_jail_killed_at_any_step_leaves_nothing_that_the_toolstack_cannot_end(
    ground: Ground, strace: str, border: str
) -> None:
    call, when = border.split(":")
    before = ground.snapshot()
    launch = ground.launch("--serve")
    begun = time.monotonic()
    with Jail() as jail, injected(strace, jail, f"{call}:signal=SIGKILL:{when}"):
        assert not lives(jail, launch.plan)
    ground.forget(launch)
    assert time.monotonic() - begun < 15
    assert host.settled(before, ground.where()) == before


def test_stand_in_of_a_killed_jail_is_ended_by_the_toolstack(ground: Ground) -> None:
    launch = ground.launch("--serve")
    with running(launch) as started:
        os.kill(started.jail._pid, signal.SIGKILL)
        with pytest.raises(JailError):
            started.jail.empty_root(timeout_s=TIMEOUT_S)
        ground.forget(launch)
        assert started.ended()


def test_toolstack_that_says_nothing_leaves_nothing(ground: Ground) -> None:
    before = ground.snapshot()
    with Jail():
        pass
    assert ground.snapshot() == before


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("word", [b"", b"X", b"\0"], ids=repr)
def test_toolstack_gone_or_confused_after_the_start_takes_the_program_with_it(
    ground: Ground, word: bytes, *, emptied: bool
) -> None:
    launch = ground.launch("--serve")
    with running(launch) as started:
        if emptied:
            started.jail.empty_root(timeout_s=TIMEOUT_S)
        assert not started.ended(0)
        if word:
            started.jail._control.sendall(word)
        else:
            started.jail.__exit__()
        assert started.ended()
        assert wait_for(lambda: not ground.snapshot().cgroups)
    assert ground.snapshot().processes == ()
    ground.forget(launch)


def test_program_that_ends_at_once_is_no_start(ground: Ground) -> None:
    """Whether the jail sees its end or the toolstack does, nobody takes it for running."""
    launch = ground.launch("--only", "memfd")
    with Jail() as jail:
        assert not lives(jail, launch.plan)
    assert ground.snapshot().cgroups == ()
    ground.forget(launch)


@pytest.mark.parametrize(
    ("rules", "how"), [((), "exit status 42"), (("execve:signal=SIGKILL:when=1",), "signal 9")], ids=["exit", "signal"]
)
def test_end_that_the_jail_itself_sees_is_told_with_its_status_and_leaves_nothing(
    ground: Ground, strace: str, rules: tuple[str, ...], how: str
) -> None:
    """Whether it is over when the jail looks is a race: here it looks late."""
    ground.program = compiled(ground.folder, "ends", "int main(void) { return 42; }")
    launch = ground.launch()
    with (
        Jail() as jail,
        injected(strace, jail, "waitid:delay_enter=300000", *rules),
        pytest.raises(JailError) as caught,
    ):
        jail.launch(launch.plan, timeout_s=TIMEOUT_S)
    assert caught.value.step == steps.describe(launch.plan.steps[-1])
    assert caught.value.cause == f"the process ended at once, with {how}"
    assert ground.snapshot().cgroups == ()
    ground.forget(launch)
