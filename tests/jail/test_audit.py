# SPDX-License-Identifier: Apache-2.0
"""The audit against real processes: all holds for one that is confined, and each flaw is found, and only that one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from depriv import proc
from depriv.audit import audit, survey
from depriv.report import Expected, Grant, Limit

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from tests.jail.confine import UID, Recipe, compiled, subject

    from depriv.report import AuditReport
else:
    from confine import UID, Recipe, compiled, subject

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
]
NAMESPACES = {f"ns.{name}" for name in proc.NAMESPACES}


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("actor"))


@pytest.fixture
def image(tmp_path: Path) -> Generator[int]:
    fd = os.open(tmp_path / "disk.img", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.truncate(fd, 1 << 20)
    yield fd
    os.close(fd)


def grant(fd: int, access: str, *, kind: str = "file", role: str = "disk0", locked: bool = False) -> Grant:
    file = os.fstat(fd)
    return Grant(
        role=role, kind=kind, dev=file.st_dev, ino=file.st_ino, rdev=file.st_rdev, access=access, locked=locked
    )


def expect(pid: int, *grants: Grant) -> Expected:
    groups = proc.cgroups(pid)
    return Expected(
        domain="web1",
        domid=1,
        uid=UID,
        gid=UID,
        pid=pid,
        starttime=proc.start_time(pid),
        restricted=True,
        limits=tuple(Limit(name=name, soft=soft, hard=hard) for name, soft, hard in Recipe().limits),
        environ=Recipe().environ,
        cgroup=groups.get("", next(iter(groups.values()))),
        grants=grants,
    )


def failing(report: AuditReport) -> set[str]:
    return {check.id for check in report.checks if not check.holds}


def have(report: AuditReport, check: str) -> str:
    return next(each.have for each in report.checks if each.id == check)


def audited(actor: Path, recipe: Recipe, *grants: Grant) -> AuditReport:
    with subject(actor, recipe) as pid:
        return audit(pid, expected=expect(pid, *grants))


def brief(value: object) -> str:
    """Return the test's name for a recipe: what is not as it should be."""
    if not isinstance(value, Recipe):
        return ""
    changed = {name: each for name, each in vars(value).items() if each != getattr(Recipe, name)}
    return " ".join(f"{name}={each}" for name, each in changed.items())


# All holds


def test_everything_holds_for_a_confined_process(actor: Path) -> None:
    report = audited(actor, Recipe(acts=("thread", "harmless")))
    assert failing(report) == set(), report.to_text()
    assert {check.id for check in report.checks} == {
        *NAMESPACES,
        *(f"ids.{name}" for name in ("uid", "gid", "groups")),
        *(f"caps.{name}" for name in ("inheritable", "permitted", "effective", "bounding", "ambient")),
        *(f"limits.{name}" for name in ("CORE", "FSIZE", "NOFILE")),
        *(
            "no_new_privs",
            "scheduling",
            "personality",
            "oom_score_adj",
            "seccomp",
            "dumpable",
            "root.empty",
            "root.readonly",
            "cwd",
            "fds.unknown",
            "fds.access",
        ),
        *("environ", "cgroup", "alone", "alive"),
    }


def test_everything_holds_without_knowing_what_to_expect(actor: Path) -> None:
    with subject(actor, Recipe(acts=("thread", "harmless", "socket"))) as pid:
        report = audit(pid, expected=None)
    assert report.holds, report.to_text()


def test_granted_files_hold_in_their_granted_access(actor: Path, image: int) -> None:
    read, write = os.pipe()
    mine, theirs = socket.socketpair()
    recipe = Recipe(fds=(image, write, theirs.fileno()))
    grants = (
        grant(image, "rw"),
        grant(write, "wo", kind="fifo", role="log"),
        grant(theirs.fileno(), "rw", kind="socket", role="qmp"),
    )
    report = audited(actor, recipe, *grants)
    assert failing(report) == set(), report.to_text()
    for fd in (read, write):
        os.close(fd)
    mine.close()
    theirs.close()


def test_a_granted_disk_that_is_closed_again_is_no_finding(actor: Path, image: int) -> None:
    assert failing(audited(actor, Recipe(), grant(image, "rw"))) == set()


@pytest.mark.parametrize("own_net", [False, True])
def test_a_connection_to_a_granted_listener_holds_in_the_process_own_network(
    actor: Path, tmp_path: Path, *, own_net: bool
) -> None:
    """One that was made outside shows the process the interfaces of the host: ours are made inside (see qmp.py)."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen()
        client.connect(str(tmp_path / "qmp"))
        spaces = ("mnt", "ipc", "pid", "uts", "cgroup", "user", *(("net",) if own_net else ()))
        recipe = Recipe(namespaces=spaces, fds=(listener.fileno(),), acts=("accept", str(listener.fileno())))
        report = audited(actor, recipe, grant(listener.fileno(), "rw", kind="socket", role="qmp"))
    assert failing(report) == ({"fds.unknown"} if own_net else {"ns.net"}), report.to_text()


def test_memory_with_a_descriptor_is_no_finding(actor: Path) -> None:
    """QEMU 10 keeps the screen in one; nobody finds it by a name. A file of that name would be a finding."""
    assert failing(audited(actor, Recipe(acts=("memfd",)))) == set()


def test_a_connection_to_a_socket_that_the_user_has_named_may_come_from_the_host(actor: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "monitor"))
        listener.listen()
        client.connect(str(tmp_path / "monitor"))
        recipe = Recipe(fds=(listener.fileno(),), acts=("accept", str(listener.fileno())))
        report = audited(actor, recipe, grant(listener.fileno(), "rw", kind="socket", role="monitor"))
    assert failing(report) == set(), report.to_text()


def test_an_open_file_description_lock_holds(actor: Path, image: int) -> None:
    recipe = Recipe(fds=(image,), acts=("ofd-lock", str(image)))
    report = audited(actor, recipe, grant(image, "rw", locked=True))
    assert failing(report) == set(), report.to_text()
    assert have(report, "locks.disk0") == "OFDLCK"


# Each flaw, and nothing else


@pytest.mark.parametrize(
    ("recipe", "flaws"),
    [
        (Recipe(gid=UID + 1), {"ids.gid"}),
        (Recipe(groups=(UID + 2,)), {"ids.groups"}),
        (Recipe(inheritable=True), {"caps.inheritable"}),
        (Recipe(bounding=True), {"caps.bounding"}),
        (Recipe(ambient=True), {"caps.inheritable", "caps.permitted", "caps.effective", "caps.ambient"}),
        (Recipe(ambient=True, acts=("only-permitted",)), {"caps.permitted"}),
        (Recipe(no_new_privs=False), {"no_new_privs"}),
        (Recipe(no_new_privs=False, acts=("thread", "no-new-privs")), {"no_new_privs"}),
        (Recipe(seccomp=0), {"seccomp"}),
        (Recipe(seccomp=0, acts=("thread", "seccomp")), {"seccomp"}),
        (Recipe(seccomp=1, acts=("thread", "seccomp")), {"seccomp"}),
        (Recipe(mode=0o755), {"dumpable"}),
        (Recipe(acts=("dumpable",)), {"dumpable"}),
        (Recipe(root="file"), {"root.empty"}),
        (Recipe(root="zero"), {"root.empty"}),
        (Recipe(root="mount"), {"root.empty"}),
        (Recipe(root="chroot", namespaces=("mnt", "ipc", "net", "pid", "uts", "cgroup")), {"root.empty", "ns.user"}),
        (Recipe(root="host"), {"root.empty", "root.readonly"}),
        (Recipe(readonly=False), {"root.readonly"}),
        (Recipe(cwd="dev"), {"cwd"}),
        (Recipe(acts=("thread-own-place",)), {"cwd"}),
        (Recipe(limits=(("CORE", 0, 0), ("FSIZE", 1 << 20, 1 << 21), ("NOFILE", 64, 64))), {"limits.FSIZE"}),
        (Recipe(limits=(("CORE", 0, 0), ("FSIZE", 1 << 20, 1 << 20), ("NOFILE", 63, 64))), {"limits.NOFILE"}),
        (Recipe(environ=("PATH=/usr/bin", "TOKEN=x")), {"environ"}),
        (Recipe(environ=("PATH=/bin",)), {"environ"}),
        (Recipe(acts=("inotify",)), {"fds.unknown"}),
        (Recipe(acts=("socket",)), {"fds.unknown"}),
        (Recipe(acts=("directory",)), {"fds.unknown"}),
        (Recipe(acts=("path",)), {"fds.unknown"}),
        (Recipe(acts=("thread-own-table",)), {"fds.unknown"}),
        (Recipe(acts=("fork",)), {"alone"}),
        (Recipe(then=("thread", "leader-exits")), {"alive"}),
    ],
    ids=brief,
)
def test_each_flaw_is_found_and_only_that(actor: Path, recipe: Recipe, flaws: set[str]) -> None:
    if recipe.root == "host" and chrooted():
        recipe = replace(recipe, namespaces=tuple(each for each in recipe.namespaces if each != "user"))
        flaws = flaws | {"ns.user"}
    with subject(actor, recipe) as pid:
        if "leader-exits" in recipe.then:
            wait_for(pid, "dead-leader")
        report = audit(pid, expected=expect(pid))
    assert failing(report) == flaws, report.to_text()
    assert len(report.checks) > 25  # all was asked, of the living threads if the main one is dead


def chrooted() -> bool:
    """Tell whether the tests run in a chroot: the kernel makes no user namespace there. See user_namespaces(7)."""
    return subprocess.run(["unshare", "--user", "true"], capture_output=True, check=False).returncode != 0


def wait_for(pid: int, state: str) -> None:
    begun = proc.start_time(pid)
    for _ in range(2000):
        if proc.alive(pid, begun) == state:
            return
        os.sched_yield()
    pytest.fail(f"process {pid} never became {state}")


@pytest.mark.parametrize("name", [name for name in proc.NAMESPACES if name != "mnt"])
def test_each_namespace_of_the_host_is_found(actor: Path, name: str) -> None:
    report = audited(actor, Recipe(namespaces=tuple(each for each in proc.NAMESPACES if each != name)))
    assert failing(report) == {f"ns.{name}"}, report.to_text()
    assert have(report, f"ns.{name}") == "shared with the host"


def test_the_mount_namespace_of_the_host_is_found(actor: Path) -> None:
    left = {"mnt", "user"} if chrooted() else {"mnt"}
    report = audited(actor, Recipe(namespaces=tuple(each for each in proc.NAMESPACES if each not in left)))
    assert {"ns.mnt", "root.empty", "root.readonly"} <= failing(report)


def test_one_other_id_among_the_four_is_found(actor: Path) -> None:
    recipe = Recipe(uids=(UID + 1, UID, UID), namespaces=tuple(set(proc.NAMESPACES) - {"user"}), acts=("swap-uids",))
    report = audited(actor, recipe)
    assert failing(report) == {"ids.uid", "ns.user"}, report.to_text()
    assert have(report, "ids.uid") == f"{UID} {UID + 1}"


def test_root_is_never_right_even_where_it_is_expected(actor: Path) -> None:
    recipe = Recipe(uid=0, gid=0, namespaces=())
    with subject(actor, recipe) as pid:
        report = audit(pid, expected=expect(pid).replace(uid=0, gid=0))
        unknown = audit(pid, expected=None)
    assert {"ids.uid", "ids.gid", "dumpable", "alone"} <= failing(report)
    assert {"ids.uid", "ids.gid", "dumpable", "alone"} <= failing(unknown)
    assert failing(unknown) >= NAMESPACES


def test_a_read_only_grant_that_is_open_for_writing_is_found(actor: Path, image: int) -> None:
    report = audited(actor, Recipe(fds=(image,)), grant(image, "ro"))
    assert failing(report) == {"fds.access"}
    assert "rw" in have(report, "fds.access")


def test_a_file_nobody_granted_is_found_and_named(actor: Path, image: int) -> None:
    report = audited(actor, Recipe(fds=(image,)))
    assert failing(report) == {"fds.unknown"}
    assert "disk.img" in have(report, "fds.unknown")


def test_a_pipe_nobody_granted_is_found_when_another_process_holds_it(actor: Path) -> None:
    read, write = os.pipe()
    try:
        assert failing(audited(actor, Recipe(fds=(read, write)))) == {"fds.unknown"}
        assert failing(audited(actor, Recipe(fds=(read,)))) == {"fds.unknown"}
    finally:
        os.close(read)
        os.close(write)


def test_a_connection_to_a_listener_nobody_granted_is_found(actor: Path, tmp_path: Path, image: int) -> None:
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as other,
        socket.socket(socket.AF_UNIX) as client,
    ):
        for each, name in ((listener, "qmp"), (other, "other")):
            each.bind(str(tmp_path / name))
            each.listen()
        client.connect(str(tmp_path / "other"))
        recipe = Recipe(fds=(other.fileno(),), acts=("accept", str(other.fileno())))
        report = audited(
            actor, recipe, grant(listener.fileno(), "rw", kind="socket", role="qmp"), grant(image, "rw", role="disk1")
        )
    assert failing(report) == {"fds.unknown"}
    assert have(report, "fds.unknown").count("socket:") == 2


@pytest.mark.parametrize(("acts", "text"), [("posix-lock", "POSIX"), ("", "no lock")])
def test_an_image_without_an_open_file_description_lock_is_found(actor: Path, image: int, acts: str, text: str) -> None:
    recipe = Recipe(fds=(image,), acts=(acts, str(image)) if acts else ())
    report = audited(actor, recipe, grant(image, "rw", locked=True))
    assert failing(report) == {"locks.disk0"}
    assert have(report, "locks.disk0") == text


def test_an_image_that_should_be_locked_and_is_closed_is_found(actor: Path, image: int) -> None:
    report = audited(actor, Recipe(), grant(image, "rw", locked=True))
    assert failing(report) == {"locks.disk0"}


def test_another_cgroup_is_found(actor: Path) -> None:
    with subject(actor) as pid:
        report = audit(pid, expected=expect(pid).replace(cgroup="/depriv/4711"))
    assert failing(report) == {"cgroup"}


# Others


@pytest.mark.parametrize("recipe", [Recipe(gid=UID + 7), Recipe(uid=UID + 7), Recipe()], ids=brief)
def test_another_process_with_the_uid_or_gid_is_found(actor: Path, recipe: Recipe) -> None:
    with subject(actor, recipe) as other, subject(actor) as pid:
        report = audit(pid, expected=expect(pid), others=(("db1", other),))
    assert failing(report) == {"alone"}
    assert have(report, "alone") == f"1 others: db1 ({other})"


def test_a_process_that_keeps_the_uid_as_its_saved_id_is_found(actor: Path) -> None:
    kept = Recipe(gid=UID + 7, uids=(UID, UID + 7, UID + 7), namespaces=("pid",), root="host", acts=("swap-uids",))
    with subject(actor, kept) as other, subject(actor) as pid:
        report = audit(pid, expected=expect(pid))
    assert failing(report) == {"alone"}
    assert str(other) in have(report, "alone")


def test_another_guest_that_shares_all_namespaces_is_found(actor: Path) -> None:
    with subject(actor, Recipe(acts=("fork",))) as pid:
        (child,) = [each.pid for each in proc.processes_of(uid=UID) if each.pid != pid]
        report = audit(pid, expected=expect(pid), others=(("db1", child),))
    assert failing(report) == {*NAMESPACES, "alone"}
    assert have(report, "ns.net") == "shared with db1"


def test_another_guest_of_its_own_and_one_that_has_ended_are_no_finding(actor: Path) -> None:
    with subject(actor, Recipe(uid=UID + 7, gid=UID + 7)) as ended:
        pass
    with subject(actor, Recipe(uid=UID + 7, gid=UID + 7)) as other, subject(actor) as pid:
        report = audit(pid, expected=expect(pid), others=(("db1", other), ("db2", ended), ("web1", pid)))
    assert failing(report) == set(), report.to_text()


def test_one_survey_serves_many_audits(actor: Path) -> None:
    with subject(actor, Recipe(acts=("fork",))) as pid:
        seen = survey((("web1", pid),))
        report = audit(pid, expected=expect(pid), seen=seen)
    assert failing(report) == {"alone"}


# dm_restrict=0, and processes that are none


def test_without_dm_restrict_the_audit_says_so_and_still_asks_for_the_rest(actor: Path, image: int) -> None:
    recipe = Recipe(namespaces=(), root="host", mode=0o755, seccomp=0, fds=(image,), groups=(UID + 2,))
    with subject(actor, recipe) as pid:
        report = audit(pid, expected=expect(pid).replace(restricted=False))
    assert failing(report) == {"dm_restrict", "fds.unknown", "ids.groups"}, report.to_text()
    ids = {check.id for check in report.checks}
    assert {"ids.uid", "caps.bounding", "no_new_privs", "environ", "alone"} <= ids
    assert not ids & {*NAMESPACES, "seccomp", "dumpable", "root.empty", "cgroup"}


def test_a_process_that_has_ended_is_dead_and_nothing_else_is_claimed(actor: Path) -> None:
    with subject(actor) as pid:
        wanted = expect(pid)
    for report in (audit(pid, expected=wanted), audit(pid, expected=None)):
        assert [(check.id, check.have, check.holds) for check in report.checks] == [("alive", "dead", False)]


def test_another_process_under_the_same_number_is_not_the_guest(actor: Path) -> None:
    with subject(actor) as pid:
        wanted = expect(pid)
        assert failing(audit(pid, expected=wanted.replace(starttime=wanted.starttime - 1))) == {"alive"}
        mine = wanted.replace(starttime=proc.start_time(os.getpid()))
        assert failing(audit(os.getpid(), expected=mine)) == {"alive"}


def test_the_environment_is_shown_by_names_only(actor: Path) -> None:
    report = audited(actor, Recipe(environ=("PATH=/usr/bin", "TOKEN=hunter2")))
    assert "TOKEN" in report.to_text()
    assert "hunter2" not in report.to_text()


def test_a_file_name_cannot_write_to_the_terminal(actor: Path, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "a\x1b[2J\nok  alive\u202e", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    report = audited(actor, Recipe(fds=(fd,)))
    os.close(fd)
    assert failing(report) == {"fds.unknown"}
    assert all(line.isprintable() for line in report.to_text().split("\n"))
    assert "\\x1b[2J" in report.to_text()


def test_the_descriptors_no_qemu_needs_are_found_without_knowing_what_to_expect(actor: Path) -> None:
    for acts in (("directory",), ("path",)):
        with subject(actor, Recipe(acts=acts)) as pid:
            assert failing(audit(pid, expected=None)) == {"fds.unknown"}


def test_the_audit_imports_nothing_slow() -> None:
    # -S: the environment the tests run in may import anything through its own .pth files.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import depriv.audit;"
        "print(*sys.modules.keys() & {'json', 're', 'typing', 'dataclasses', 'enum', 'ctypes'})"
    )
    source = os.path.dirname(os.path.dirname(proc.__file__))
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# What whoever started it may have handed down


@pytest.mark.parametrize(
    ("act", "check"),
    [
        (lambda pid: os.setpriority(os.PRIO_PROCESS, pid, -5), "scheduling"),
        (lambda pid: os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1)), "scheduling"),
        (lambda pid: os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0)), "scheduling"),
    ],
    ids=["nice", "fifo", "batch"],
)
def test_precedence_over_others_is_found(actor: Path, act: Callable[[int], None], check: str) -> None:
    with subject(actor) as pid:
        assert failing(audit(pid, expected=expect(pid))) == set()
        act(pid)
        assert failing(audit(pid, expected=expect(pid))) == {check}


def test_layout_without_randomisation_is_found() -> None:
    """Of an ordinary program: personality(2) is nothing that one process can set for another."""
    argv = ["setarch", "-R", "sleep", "60"]
    with subprocess.Popen(argv) as plain:
        try:
            deadline = time.monotonic() + 10
            while have(audit(plain.pid, expected=None), "personality") == "0" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert "personality" in failing(audit(plain.pid, expected=None))
        finally:
            plain.kill()
    with subprocess.Popen(argv[2:]) as plain:
        try:
            assert "personality" not in failing(audit(plain.pid, expected=None))
        finally:
            plain.kill()
