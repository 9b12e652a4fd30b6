# SPDX-License-Identifier: Apache-2.0
"""The command line as a user types it, on real guests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.guests import await_end, config_text

from depriv import demo_guest, proc

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.guests import CommandLine

pytestmark = [pytest.mark.qemu, pytest.mark.root]

ROW = {
    *("name", "domid", "state", "pid", "uid", "gid", "memory_mib", "vcpus", "accel", "dm_restrict"),
    *("created_at_s", "trouble"),
}


@pytest.fixture
def config(disk: Path, tmp_path: Path) -> str:
    path = tmp_path / "web1.cfg"
    path.write_text(config_text("web1", f"format=raw,vdev=xvda,access=rw,target={disk}"))
    return str(path)


def dump(depriv: CommandLine, name: str, wanted: str) -> str:
    deadline = time.monotonic() + 30
    while wanted not in (said := depriv.run("console", "--dump", name).stdout):
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
    return said


def test_a_life_from_create_to_destroy(depriv: CommandLine, config: str, uids: range) -> None:
    made = depriv.run("create", config)
    assert made.stderr == ""
    (row,) = depriv.rows()
    assert set(row) == ROW
    assert made.stdout.startswith(f"web1: domid {row['domid']}, uid {row['uid']}, running; ")
    assert (row["name"], row["state"], row["memory_mib"], row["dm_restrict"]) == ("web1", "running", 128, True)
    assert row["uid"] == row["gid"]
    assert row["uid"] in uids
    with open(f"/proc/{row['pid']}/comm", encoding="ascii") as file:
        assert file.read().startswith("qemu-system-x86")

    report = json.loads(depriv.run("audit", "web1", "--json").stdout)
    assert set(report) == {"domain", "pid", "holds", "checks"}
    assert (report["domain"], report["pid"], report["holds"]) == ("web1", row["pid"], True)
    assert all(set(check) == {"id", "want", "have", "holds"} and check["holds"] for check in report["checks"])
    assert json.loads(depriv.run("audit", "--pid", str(row["pid"]), "--json").stdout) == report
    assert "FAIL" not in depriv.run("audit", str(row["domid"])).stdout

    said = dump(depriv, "web1", demo_guest.WRITE_OK)
    assert demo_guest.HELLO in said
    assert f"{demo_guest.SAYS}the text of this disk" in said
    assert said.startswith(demo_guest.HELLO)
    assert depriv.run("console", "--dump", "web1").stdout.startswith(said.rstrip("\n"))

    assert depriv.run("destroy", "web1").stdout == ""
    assert depriv.rows() == []
    assert await_end(row["pid"], within_s=0.1)
    gone = depriv.run("destroy", "web1", expect=2)
    assert gone.stderr == "error: there is no domain 'web1'\n  fix: see depriv list\n"


def test_words_after_the_file_come_last(depriv: CommandLine, config: str) -> None:
    depriv.run("create", config, 'name="other"', "memory=64", "vcpus=2", 'machine="q35"')
    (row,) = depriv.rows()
    assert (row["name"], row["memory_mib"], row["vcpus"]) == ("other", 64, 2)


def test_switched_off_restriction_is_loud_everywhere(depriv: CommandLine, config: str) -> None:
    made = depriv.run("create", config, "dm_restrict=0")
    assert "warning: " in made.stderr
    assert "dm_restrict = 0" in made.stderr
    assert "WITHOUT" in made.stderr
    (row,) = depriv.rows()
    assert row["dm_restrict"] is False
    assert depriv.run("list").stdout.splitlines()[1].endswith(" OFF")
    report = json.loads(depriv.run("audit", "web1", "--json", expect=1).stdout)
    assert report["holds"] is False
    assert "FAIL  dm_restrict" in depriv.run("audit", "web1", expect=1).stdout


def test_paused_guest_is_listed_as_paused(depriv: CommandLine, config: str) -> None:
    assert ", paused; " in depriv.run("create", "--paused", config).stdout
    assert depriv.rows()[0]["state"] == "paused"
    assert depriv.run("list", "web1").stdout.splitlines()[1].split()[2] == "paused"
    assert depriv.run("console", "--dump", "web1").stdout == ""
    depriv.run("audit", "web1")


def test_eight_creates_at_once_all_succeed(depriv: CommandLine, config: str) -> None:
    commands = [depriv.start("create", config, f'name="g{number}"', "disk=[]") for number in range(8)]
    for command in commands:
        _, said = command.communicate(timeout=120)
        assert command.returncode == 0, said
    rows = depriv.rows()
    assert sorted(row["name"] for row in rows) == [f"g{number}" for number in range(8)]
    for field in ("domid", "pid", "uid", "gid"):
        assert len({row[field] for row in rows}) == 8, field
    for row in rows:
        depriv.run("audit", row["name"])


def test_of_two_creates_of_one_name_one_fails_with_status_2(depriv: CommandLine, config: str) -> None:
    commands = [depriv.start("create", config, "disk=[]") for _ in range(2)]
    said = [command.communicate(timeout=120)[1] for command in commands]
    assert sorted(command.returncode for command in commands) == [0, 2], said
    lost = next(text for command, text in zip(commands, said, strict=True) if command.returncode)
    assert "a domain named 'web1' exists" in lost
    assert "fix: " in lost
    assert len(depriv.rows()) == 1


def test_list_and_audit_need_a_domain_that_is_there(depriv: CommandLine) -> None:
    assert depriv.run("list", "--json").stdout == "[]\n"
    for words in (("list", "nobody"), ("audit", "nobody"), ("console", "--dump", "nobody"), ("destroy", "20999")):
        done = depriv.run(*words, expect=2)
        assert done.stderr.startswith("error: there is no domain ")
        assert "fix: " in done.stderr


def test_audit_wants_one_thing_to_audit(depriv: CommandLine) -> None:
    assert "fix: " in depriv.run("audit", expect=2).stderr
    assert "fix: " in depriv.run("audit", "web1", "--pid", "1", expect=2).stderr


def test_audit_of_an_unconfined_qemu_says_no(depriv: CommandLine) -> None:
    argv = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-S"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        try:
            time.sleep(0.3)
            report = json.loads(depriv.run("audit", "--pid", str(process.pid), "--json", expect=1).stdout)
        finally:
            process.kill()
    assert report["domain"] == ""
    failed = {check["id"] for check in report["checks"] if not check["holds"]}
    assert {"ids.uid", "caps.effective", "no_new_privs", "ns.net", "root.empty"} <= failed


def test_audit_of_no_process_says_no(depriv: CommandLine) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert depriv.run("audit", "--pid", str(process.pid), expect=1).stdout


def test_audit_of_a_thread_of_the_kernel_says_what_it_is(depriv: CommandLine) -> None:
    assert not proc.is_kernel_thread(1)
    assert not proc.is_kernel_thread(os.getpid())
    for pid in [pid for pid in proc.pids() if proc.is_kernel_thread(pid)][:1]:  # a pid namespace of one's own has none
        made = depriv.run("audit", "--pid", str(pid), expect=125)
        assert made.stdout == ""
        assert made.stderr.startswith(f"error: process {pid} is a thread of the kernel, not a QEMU\n  fix: ")


def test_domain_whose_entry_is_lost_is_told_of_in_words_that_a_shell_takes(depriv: CommandLine, config: str) -> None:
    depriv.run("create", config)
    (row,) = depriv.rows()
    for name in ("state.json", "state.copy"):
        with open(f"{depriv.state_dir}/domains/{row['domid']}/{name}", "w", encoding="ascii"):
            pass
    (lost,) = depriv.rows()
    assert (lost["state"], lost["pid"]) == ("damaged", row["pid"])
    made = depriv.run("console", "--dump", str(row["domid"]), expect=125)
    assert made.stderr.startswith(f"error: the entry of domain {row['domid']} cannot be read")
    assert made.stderr.endswith(f"depriv destroy {row['domid']}\n")  # by its name it would need quotes
    depriv.run("destroy", str(row["domid"]))


def test_reader_that_goes_away_is_no_error(depriv: CommandLine, config: str) -> None:
    command = depriv.start("plan", config)
    assert command.stdout is not None
    command.stdout.close()
    assert command.stderr is not None
    assert command.stderr.read() == ""
    command.stderr.close()
    assert command.wait(30) == 0
