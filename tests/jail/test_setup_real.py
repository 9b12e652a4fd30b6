# SPDX-License-Identifier: Apache-2.0
"""`depriv setup` with the distribution's own tools, on a copy of /etc in namespaces of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from depriv import setup

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

FILES = ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")
SCRIPT = """\
set -e
mount -t tmpfs -o mode=755 none "$1"
cp -a /etc/. "$1"
for file in passwd group shadow gshadow; do  # the host may be set up already
    if [ -e "$1/$file" ]; then sed -i /^xen-qemuuser-/d "$1/$file"; fi
done
: >"$1/subuid"
: >"$1/subgid"
mount --bind "$1" /etc
exec "$2" -c "$3"
"""
# Every piece of code below begins with this.
PROLOGUE = """\
import os, pwd, subprocess
from depriv.accounts import accounts_for, read_accounts
from depriv.errors import HostError, PlanError
from depriv.identity import RANGE_BASE, REAPER, choose
from depriv.setup import plan_setup, processes_with, remove_setup, run_setup

NAMES = (RANGE_BASE, REAPER)

def files():
    return [open(f"/etc/{name}").read() for name in ("passwd", "group") if os.path.exists(f"/etc/{name}")]

def shell(line):
    subprocess.run(["sh", "-c", "set -e; " + line], check=True, capture_output=True)

def refusal(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except (HostError, PlanError) as error:
        return error
    raise AssertionError("it was not refused")
"""


def host_state() -> list[tuple[str, bytes, int]]:
    """Return what must be the same before and after: the host's own account files."""
    found: list[tuple[str, bytes, int]] = []
    for name in FILES:
        path = f"/etc/{name}"
        if os.path.exists(path):
            with open(path, "rb") as file:
                found.append((name, file.read(), os.stat(path).st_mtime_ns))
    return found


@pytest.fixture(autouse=True)
def untouched_host() -> Iterator[None]:
    """Fail every test after which the host's own files differ."""
    if os.geteuid() != 0 or not shutil.which("useradd") or not shutil.which("unshare"):
        pytest.skip("needs root, unshare(1) and useradd(8)")
    before = host_state()
    yield
    assert host_state() == before


def run(tmp_path: Path, code: str) -> None:
    """Run ``code`` where /etc is a copy that goes away with it; its own failure is ours."""
    src = os.path.dirname(os.path.dirname(setup.__file__))
    done = subprocess.run(
        [
            # A pid namespace too: domains that run on the host have ids of the range.
            *("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc"),
            *("sh", "-c", SCRIPT, "sh"),
            *(str(tmp_path), sys.executable, PROLOGUE + textwrap.dedent(code)),
        ],
        env={"PYTHONPATH": src, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_setup_makes_users_whom_every_start_accepts_and_does_it_once(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        assert run_setup().endswith("are in order.")
        before = files()
        assert run_setup().startswith("Nothing to do")
        assert files() == before
        base, reaper = (pwd.getpwnam(name) for name in NAMES)
        assert base.pw_uid == base.pw_gid and base.pw_uid % 65536
        assert reaper.pw_uid == reaper.pw_gid and not base.pw_uid <= reaper.pw_uid < base.pw_uid + 32752
        for user in (base, reaper):
            assert (user.pw_shell, user.pw_dir) == ("/usr/sbin/nologin", "/nonexistent"), user
        assert not os.path.exists("/nonexistent")
        for domid in (1, 32751):
            found = accounts_for(device_model_user="", domid=domid)
            who = choose(device_model_user="", domid=domid, accounts=found, taken=())
            assert (who.uid, who.gid) == (base.pw_uid + domid,) * 2
            assert who.reaper_uid == reaper.pw_uid
        """,
    )


def test_nobody_can_log_in_as_the_new_users_and_they_own_no_subordinate_ids(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        run_setup()
        for line in open("/etc/shadow"):
            if line.split(":")[0] in NAMES:
                assert line.split(":")[1][0] in "!*", line
        assert not [taken for taken in read_accounts(names=()).ranges if "xen-" in taken.owner]
        """,
    )


def test_users_made_later_stay_out_of_the_range(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        run_setup()
        for n in range(3):
            shell(f"useradd --no-create-home later{n}; useradd --system system{n}")
        assert run_setup().startswith("Nothing to do")
        """,
    )


def test_a_dry_run_shows_the_commands_and_changes_nothing(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        before = files()
        assert "useradd --system --uid" in run_setup(dry_run=True)
        assert files() == before
        """,
    )


def test_removal_leaves_passwd_and_group_as_they_were(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        before = files()
        run_setup()
        assert files() != before
        assert "userdel" in remove_setup(dry_run=True)
        remove_setup()
        assert files() == before
        assert remove_setup().startswith("Nothing to do")
        """,
    )


@pytest.mark.parametrize("where", ["uid", "gid", "reaper"])
def test_removal_is_refused_while_a_process_has_an_id_of_ours(tmp_path: Path, where: str) -> None:
    run(
        tmp_path,
        f"""
        run_setup()
        base, reaper = (pwd.getpwnam(name).pw_uid for name in NAMES)
        uid, gid = {{"uid": (base + 7, 2), "gid": (2, base + 7), "reaper": (reaper, 2)}}["{where}"]
        child = subprocess.Popen(["sleep", "100"], user=uid, group=gid, extra_groups=())
        try:
            before = files()
            assert f"1 processes, {{child.pid}}" in str(refusal(remove_setup))
            assert files() == before
        finally:
            child.kill()
            child.wait()
        remove_setup()
        """,
    )


def test_removal_leaves_what_an_administrator_made(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        shell(f"groupadd --gid 131072 {RANGE_BASE}; useradd --system --uid 131072 --gid 131072"
              f" --shell /usr/sbin/nologin {RANGE_BASE}")
        run_setup()
        remove_setup()
        assert pwd.getpwnam(RANGE_BASE).pw_uid == 131072
        assert REAPER not in [user.name for user in read_accounts(names=()).users]
        """,
    )


def test_an_interrupted_setup_is_finished(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        first, *_rest = plan_setup(read_accounts(names=NAMES))
        subprocess.run(first, check=True)
        run_setup()
        assert plan_setup(read_accounts(names=NAMES)) == ()
        """,
    )


def test_a_tool_that_fails_is_reported_in_its_own_words_and_leaves_nothing(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        before = files()
        shell("mount -o remount,bind,ro /etc")
        error = refusal(run_setup)
        assert "groupadd" in str(error) and "cannot lock" in error.cause, (error, error.cause)
        assert files() == before
        """,
    )


def test_a_range_in_somebodys_subordinate_ids_is_refused_and_the_fix_works_as_printed(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        shell(f"groupadd --gid 131072 {RANGE_BASE}; useradd --system --uid 131072 --gid 131072"
              f" --shell /usr/sbin/nologin {RANGE_BASE}")
        open("/etc/subuid", "a").write("alice:100000:65536\\n")
        before = files()
        error = refusal(run_setup)
        assert "subuid of alice" in error.cause and files() == before
        shell(error.fix.removeprefix("with no domain running: "))
        run_setup()
        assert plan_setup(read_accounts(names=NAMES)) == ()
        """,
    )


def test_the_fixes_for_device_model_user_work_as_printed(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        run_setup()
        def ask(name):
            return choose(
                device_model_user=name, domid=1, accounts=accounts_for(device_model_user=name, domid=1), taken=()
            )
        shell("useradd --system --user-group --shell /usr/sbin/nologin vm2")  # as Xen's documents make it
        shell("useradd --system --gid nogroup --shell /usr/sbin/nologin vm3; useradd --uid 70000 --user-group vm4")
        for name in ("vm1", "vm2", "vm3"):
            shell(refusal(ask, name).fix.splitlines()[-1])  # what comes before is advice
            assert ask(name).how == f"user {name}"
        shell("usermod --uid 200000 vm4; groupmod --gid 200000 vm4; usermod --shell /bin/sh vm4")
        shell(refusal(ask, "vm4").fix)
        assert ask("vm4").uid == 200000
        assert len({ask(name).gid for name in ("vm1", "vm2", "vm3", "vm4")}) == 4
        """,
    )
