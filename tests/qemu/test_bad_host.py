# SPDX-License-Identifier: Apache-2.0
"""A host that lacks something, a QEMU that is none, a file that changes: said, by its name, and nothing is left."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import FIRST_DOMID, CommandLine, compiled, config_text, next_base, refused, seeded
from tests.support.host import living, snapshot

from depriv import launching
from depriv.api import Toolstack
from depriv.config import Disk, Domain
from depriv.errors import JailError, MonitorError
from depriv.identity import DOMID_FIRST, DOMID_LAST, RANGE_BASE, REAPER
from depriv.registry import Registry
from depriv.spawn import Jail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.root]

MIB = 1 << 20
# Nobody's: the hosts of these tests alone know a user of it. Of no range: else it would be cleared away as a stray.
SERVICE_UID = 1_900_020_000 + FIRST_DOMID


def raw(path: Path, data: bytes = b"x") -> Path:
    path.write_bytes(data.ljust(MIB, b"\0"))
    return path


@pytest.fixture
def on_host_with(uids: range, tmp_path: Path) -> Iterator[Callable[[Callable[[list[str]], list[str]]], CommandLine]]:
    """Return a function: how to change the lines of /etc/passwd -> the command line on such a host."""
    del uids
    made: list[CommandLine] = []

    def make(change: Callable[[list[str]], list[str]]) -> CommandLine:
        path = tmp_path / "passwd"
        with open("/etc/passwd", encoding="utf-8") as file:
            path.write_text("".join(change(file.readlines())))
        made.append(CommandLine(bind=(str(path), "/etc/passwd")))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_host_without_users_is_told_to_make_them(
    on_host_with: Callable[[Callable[[list[str]], list[str]]], CommandLine], uids: range, tmp_path: Path
) -> None:
    host = on_host_with(lambda lines: [line for line in lines if not line.startswith("xen-qemuuser-")])
    what, _, fix = refused(host, uids, config_text("x"), status=125, tmp_path=tmp_path)
    assert what == f"there is no user {RANGE_BASE} to take a uid from"
    assert fix == "depriv setup"


def test_reaper_that_can_log_in_is_refused(
    on_host_with: Callable[[Callable[[list[str]], list[str]]], CommandLine], uids: range, tmp_path: Path
) -> None:
    shell = "/usr/sbin/nologin"
    host = on_host_with(
        lambda lines: [line.replace(shell, "/bin/sh") if line.startswith(f"{REAPER}:") else line for line in lines]
    )
    what, cause, fix = refused(host, uids, config_text("x"), status=125, tmp_path=tmp_path)
    assert what.startswith(f"the reaper {REAPER} ")
    assert "it kills device models" in cause
    assert fix == f"usermod --shell {shell} {REAPER}"


def test_uid_of_a_domain_that_is_a_persons_is_refused(
    on_host_with: Callable[[Callable[[list[str]], list[str]]], CommandLine], uids: range, tmp_path: Path
) -> None:
    base = next_base()
    uid = pwd.getpwnam(RANGE_BASE).pw_uid + base + 1
    host = on_host_with(lambda lines: [*lines, f"alice:x:{uid}:100::/home/alice:/bin/sh\n"])
    host.seed((base,))
    what, _, fix = refused(host, uids, config_text("x"), status=125, tmp_path=tmp_path)
    assert f"uid {uid}" in what
    assert "user alice" in what
    assert fix


def test_user_that_can_log_in_or_is_root_runs_no_device_model(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    for user, said in (("root", ""), ("nosuchuser", "there is no such user"), ("daemon", "")):
        text = config_text("x", device_model_user=user)
        path = tmp_path / "u.cfg"
        path.write_text(text)
        status = depriv_status(depriv, str(path))
        what, _, fix = refused(depriv, uids, text, status=status, tmp_path=tmp_path)
        assert status in (2, 125)
        assert said in what
        assert fix


def depriv_status(depriv: CommandLine, path: str) -> int:
    return subprocess.run(depriv.argv("create", path), check=False, capture_output=True).returncode


def test_range_that_is_used_up_is_said(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    depriv.seed(range(DOMID_FIRST, DOMID_LAST + 1))
    what, _, fix = refused(depriv, uids, config_text("x"), status=125, tmp_path=tmp_path)
    assert what.startswith(f"all {DOMID_LAST - DOMID_FIRST + 1} domids are in use, or were within the last 60 seconds")
    assert "wait a minute" in fix
    depriv.seed((next_base(),))


def test_only_root_creates(uids: range, tmp_path: Path) -> None:
    del uids
    path = tmp_path / "x.cfg"
    path.write_text(config_text("x"))
    # All is imported as root, since the interpreter may lie where nobody else may go; the jail is never started.
    code = """
import os, sys
import depriv.api, depriv.detect, depriv.lifecycle, depriv.xlconfig
from depriv.config import Domain
from depriv.errors import PlanError, render
from depriv.registry import Registry
from depriv.spawn import Jail
with Jail() as jail:
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    try:
        depriv.api.Toolstack(state_dir=sys.argv[1]).create(Domain(name="x"), jail=jail)
    except PlanError as error:
        print(render(error))
"""
    argv = [sys.executable, "-c", code, str(tmp_path / "state")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("error: only root can start a domain\n  fix: run it with sudo"), done.stderr
    assert not (tmp_path / "state").exists()


# QEMU


def test_no_qemu_and_no_program_are_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    script = tmp_path / "qemu-script"
    script.write_text('#!/bin/sh\nexec /usr/bin/qemu-system-x86_64 "$@"\n')
    script.chmod(0o755)
    data = raw(tmp_path / "data")
    for path, said in (
        (tmp_path / "nowhere", "there is no "),
        (script, "is not a program but a script"),
        (data, "is not an executable file"),
        (tmp_path, "is a directory"),
    ):
        text = config_text("x", device_model_override=str(path))
        what, _, fix = refused(depriv, uids, text, status=125, tmp_path=tmp_path)
        assert what.startswith("cannot run QEMU: ")
        assert said.lower() in what.lower()
        assert "device_model_override" in fix


# Dynamically linked programs take their time, and so does this one.
ANSWERS = """
#include <stdio.h>
#include <unistd.h>
int main(void) { usleep(100000); fputs("%s\\n", stderr); return 1; }
"""


@pytest.fixture
def programs() -> Iterator[Path]:
    """Return a folder that a device model may enter; a test's own is root's alone."""
    with tempfile.TemporaryDirectory(prefix="depriv-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("qemu-system-x86_64: -sandbox on: There is no option group 'sandbox'", "QEMU 7.2 or later, with seccomp"),
        ("qemu-system-x86_64: -sandbox: invalid option", "QEMU 7.2 or later, with seccomp"),
        ("qemu-system-x86_64: -sandbox on: seccomp support is disabled", "with"),
    ],
)
def test_qemu_that_lacks_its_sandbox_is_refused_with_its_own_words(
    depriv: CommandLine, uids: range, *, tmp_path: Path, programs: Path, message: str, fix: str
) -> None:
    program = compiled(programs, "qemu-old", ANSWERS % message)
    text = config_text("x", device_model_override=str(program))
    what, cause, remedy = refused(depriv, uids, text, status=125, tmp_path=tmp_path)
    assert "QEMU did not start" in what
    assert message in cause
    assert fix in remedy


def test_program_that_ends_at_once_is_said_to_have_ended(
    depriv: CommandLine, uids: range, tmp_path: Path, programs: Path
) -> None:
    program = compiled(programs, "qemu-short", "int main(void) { return 3; }")
    text = config_text("x", device_model_override=str(program))
    what, _, _ = refused(depriv, uids, text, status=125, tmp_path=tmp_path)
    # Which of the two depends on who is faster: the program's end, or our look at it.
    assert what in (f"cannot execute {program}", "QEMU did not start: it ended")


def test_program_that_a_device_model_cannot_reach_is_refused_with_the_reason(
    depriv: CommandLine, uids: range, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    program = compiled(closed, "qemu-hidden", SILENT)
    text = config_text("x", device_model_override=str(program))
    what, cause, fix = refused(depriv, uids, text, status=125, tmp_path=tmp_path)
    assert what.startswith(f"cannot execute {program}")
    assert "Permission denied" in cause
    assert "everybody may enter the folders above it" in fix


SILENT = """
#include <unistd.h>
int main(void) { for (;;) pause(); }
"""


def test_qemu_that_never_answers_is_ended_at_the_deadline(
    unchanged: None, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del unchanged
    monkeypatch.setattr(launching, "START_TIMEOUT_S", 1.5)  # the figure alone: nobody waits for a minute
    program = compiled(programs, "qemu-silent", SILENT)
    state = seeded(tmp_path / "state")
    host = Toolstack(state_dir=str(state), cache_dir=str(tmp_path / "cache"))
    began = time.monotonic()
    with pytest.raises(MonitorError) as caught:
        host.create(Domain(name="x", device_model_override=str(program)))
    assert time.monotonic() - began < 5
    assert caught.value.fix
    assert host.guests() == ()
    assert os.listdir(state / "domains") == []


def test_create_that_is_interrupted_leaves_nothing(
    depriv: CommandLine, uids: range, tmp_path: Path, programs: Path
) -> None:
    program = compiled(programs, "qemu-silent", SILENT)
    path = tmp_path / "x.cfg"
    path.write_text(config_text("x", device_model_override=str(program)))
    before = snapshot(folder=f"{depriv.state_dir}/domains", uids=uids)
    command = depriv.start("create", str(path))
    deadline = time.monotonic() + 10
    while not living(uids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    command.send_signal(signal.SIGINT)
    said = command.communicate(timeout=20)[1]
    assert command.returncode == 130, said
    assert "Traceback" not in said
    assert snapshot(folder=f"{depriv.state_dir}/domains", uids=uids) == before


# Between plan and start


@pytest.mark.parametrize("change", ["replaced", "removed", "symlink", "fifo"])
def test_image_that_changes_after_it_was_planned_with_is_not_opened(
    unchanged: None, uids: range, tmp_path: Path, change: str
) -> None:
    del unchanged, uids
    disk = raw(tmp_path / "disk.img")
    secret = raw(tmp_path / "secret", b"secret")
    state = seeded(tmp_path / "state")
    host = Toolstack(state_dir=str(state))
    launch = host.plan(Domain(name="x", disks=(Disk(vdev="xvda", target=str(disk)),)))
    os.mkdir(launch.directory, 0o700)
    disk.rename(tmp_path / "kept")
    if change == "replaced":
        raw(disk, b"other")
    elif change == "symlink":
        disk.symlink_to(secret)
    elif change == "fifo":
        os.mkfifo(disk)
    with Jail() as jail, pytest.raises(JailError) as caught:
        jail.launch(launch.plan, timeout_s=10)
    assert caught.value.step == f"open {disk} rw (file) for xvda, as descriptor 10"
    assert os.listdir(launch.directory) == []


def test_user_that_runs_something_is_no_device_models_and_nothing_of_it_is_killed(
    on_host_with: Callable[[Callable[[list[str]], list[str]]], CommandLine], uids: range, tmp_path: Path
) -> None:
    uid = SERVICE_UID
    host = on_host_with(lambda lines: [*lines, f"svc:x:{uid}:{uid}::/:/usr/sbin/nologin\n"])
    text = config_text("x", device_model_user="svc")
    argv = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "sleep", "60"]
    with subprocess.Popen(argv, cwd="/") as service:
        deadline = time.monotonic() + 10
        while service.pid not in living(range(uid, uid + 1)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        what, cause, fix = refused(host, uids, text, status=125, tmp_path=tmp_path)
        assert service.poll() is None
        service.kill()
    assert what == f"device_model_user 'svc' has processes already: {service.pid}"
    assert "they would be killed" in cause
    assert fix
    # Once it runs nothing any more, it may.
    path = tmp_path / "svc.cfg"
    path.write_text(text)
    host.run("create", str(path))
    (row,) = host.rows()
    assert row["uid"] == uid
    host.run("destroy", "x")


def test_user_of_a_domain_is_no_other_domains_while_it_lives_or_does_not_die(
    on_host_with: Callable[[Callable[[list[str]], list[str]]], CommandLine], uids: range, tmp_path: Path
) -> None:
    line = f"svc:x:{SERVICE_UID}:{SERVICE_UID}::/:/usr/sbin/nologin\n"
    host = on_host_with(lambda lines: [*lines, line])
    path = tmp_path / "first.cfg"
    path.write_text(config_text("first", device_model_user="svc"))
    host.run("create", str(path))
    (row,) = host.rows()
    assert row["uid"] == SERVICE_UID
    second = config_text("second", device_model_user="svc")
    for _ in range(2):
        what, _, fix = refused(host, uids, second, status=125, tmp_path=tmp_path)
        assert what == f"uid {SERVICE_UID} is already that of the device model of first"
        assert fix
        assert [(row["name"], row["pid"]) for row in host.rows()] == [("first", row["pid"])]
        # Once more, after an end that it survived.
        registry = Registry(host.state_dir)
        registry.save(registry.find("first").replace(state="quarantined", trouble="it did not die"))
    assert host.rows()[0]["state"] == "quarantined"
    host.run("destroy", str(row["domid"]))
    path.write_text(second)
    host.run("create", str(path))
    host.run("destroy", "second")


@pytest.mark.parametrize("late_s", [0.0, 0.5])
def test_qemu_that_ends_at_once_is_quoted_however_late_the_toolstack_looks(
    depriv: CommandLine, uids: range, *, tmp_path: Path, late_s: float
) -> None:
    """What it printed goes with the FIFO's last descriptor, which was QEMU's own."""
    text = config_text("x", device_model_args=["-cpu", "nosuch"])
    path = tmp_path / "x.cfg"
    path.write_text(text)
    if not late_s:
        _, cause, _ = refused(depriv, uids, text, status=125, tmp_path=tmp_path)
        assert "nosuch" in cause
        return
    for _ in range(20):  # on a busy machine QEMU may have come and gone between two looks
        command = depriv.start("create", str(path))
        while not living(uids) and command.poll() is None:
            time.sleep(0.0005)
        if command.poll() is None:
            break
        command.communicate(timeout=60)
    else:
        pytest.fail("QEMU was never seen")
    command.send_signal(signal.SIGSTOP)
    time.sleep(late_s)
    command.send_signal(signal.SIGCONT)
    said = command.communicate(timeout=60)[1]
    assert command.returncode == 125
    assert "nosuch" in said
    assert living(uids) == ()
