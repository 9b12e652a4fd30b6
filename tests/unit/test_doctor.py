# SPDX-License-Identifier: Apache-2.0
"""What `depriv doctor` finds on made-up hosts, and that it finds something true on this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from depriv import doctor
from depriv.doctor import Finding
from depriv.identity import RANGE_BASE, REAPER

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("mnt", "ipc", "net", "pid", "uts", "cgroup")
V2 = "35 24 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = """\
36 24 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
37 24 0:32 / /sys/fs/cgroup/freezer rw shared:9 - cgroup cgroup rw,freezer
"""
GOOD = f"""\
root:x:0:0:root:/root:/bin/bash
{RANGE_BASE}:x:65538:65538:depriv:/nonexistent:/usr/sbin/nologin
{REAPER}:x:65537:65537:depriv:/nonexistent:/usr/sbin/nologin
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc on which nothing is missing."""
    top = tmp_path / "proc"
    for name in NAMES:
        write(top / f"self/ns/{name}", "")
        write(top / f"sys/user/max_{name}_namespaces", "15000\n")
    write(top / "sys/kernel/seccomp/actions_avail", "kill_process kill_thread trap errno allow\n")
    write(top / "self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n")
    write(top / "self/mountinfo", V2)
    write(top / "cpuinfo", "processor: 0\nflags\t\t: fpu svm sse\n")
    return top


def etc(path: Path, passwd: str, **more: str) -> str:
    for name, text in {"passwd": passwd, "group": "root:x:0:\n", **more}.items():
        write(path / "etc" / name, text)
    return str(path / "etc")


def one(findings: tuple[Finding, ...], key: str) -> Finding:
    return next(finding for finding in findings if finding.id == key)


def test_a_host_that_has_everything_is_fit(proc: Path, tmp_path: Path) -> None:
    found = doctor.diagnose(proc=str(proc), dev=str(tmp_path), etc=etc(tmp_path, GOOD))
    wrong = [finding.id for finding in found if finding.needed and not finding.ok]
    # These four speak of the machine that runs the tests, not of the tree above.
    assert set(wrong) <= {"root", "qemu", "run", "cache"}
    assert doctor.is_fit(tuple(finding for finding in found if finding.id not in wrong))


def test_this_host_is_described_without_an_exception_and_with_a_fix_for_all_that_is_missing() -> None:
    found = doctor.diagnose()
    assert len({finding.id for finding in found}) == len(found)
    assert all(finding.fix for finding in found if not finding.ok)
    assert not any(finding.fix for finding in found if finding.ok)


def test_needed_things_come_first() -> None:
    needed = [finding.needed for finding in doctor.diagnose()]
    assert needed == sorted(needed, reverse=True)


def test_the_identity_of_domain_n_is_told(tmp_path: Path) -> None:
    users = one(doctor.find_users(etc(tmp_path, GOOD)), "users")
    assert (users.ok, users.have) == (True, "domain N runs as 65538 + N, the reaper as 65537")


def test_version_1_and_hybrid_hierarchies_are_recognised(proc: Path) -> None:
    write(proc / "self/mountinfo", V1)
    assert one(doctor.find_cgroup(str(proc)), "cgroup").have == "version 1: pids, freezer"
    write(proc / "self/mountinfo", V1 + V2)
    assert one(doctor.find_cgroup(str(proc)), "cgroup").have == "version 2 at /sys/fs/cgroup; version 1: pids, freezer"


def test_cgroup_kill_is_looked_for_in_a_child(proc: Path, tmp_path: Path) -> None:
    write(proc / "self/mountinfo", V2.replace("/sys/fs/cgroup", str(tmp_path / "cg")))
    write(tmp_path / "cg/system.slice/cgroup.kill", "")
    assert one(doctor.find_cgroup(str(proc)), "cgroup-kill").ok


def test_json_has_all_fields_and_the_verdict() -> None:
    found = (Finding(id="a", ok=False, have="nothing", fix="do it"), Finding(id="b", ok=True, have="all"))
    read = json.loads(doctor.to_json(found))
    assert read["fit"] is False
    assert read["findings"][0] == {"id": "a", "ok": False, "have": "nothing", "fix": "do it", "needed": True}


def test_text_shows_the_fix_below_what_is_missing_only() -> None:
    found = (
        Finding(id="long-name", ok=True, have="all"),
        Finding(id="b", ok=False, have="nothing", fix="do it\nthen that"),
        Finding(id="c", ok=False, have="no", fix="maybe", needed=False),
    )
    lines = doctor.to_text(found).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["ok", "long-name", "all"],
        ["MISSING", "b", "nothing"],
        ["fix:", "do", "it"],
    ]
    assert lines[5].split() == ["fix:", "maybe"]
    assert "cannot confine" in lines[-1]
    assert "cannot confine" not in doctor.to_text(found[:1])


# What is missing


def test_only_what_is_needed_makes_a_host_unfit() -> None:
    assert doctor.is_fit((Finding(id="a", ok=False, have="no", fix="x", needed=False),))
    assert not doctor.is_fit((Finding(id="a", ok=False, have="no", fix="x"),))


@pytest.mark.parametrize("name", NAMES)
def test_a_namespace_that_is_not_there_is_missing(proc: Path, name: str) -> None:
    (proc / f"self/ns/{name}").unlink()
    assert not one(doctor.find_namespaces(str(proc)), f"namespace-{name}").ok


def test_a_namespace_that_is_forbidden_is_missing_and_its_sysctl_named(proc: Path) -> None:
    write(proc / "sys/user/max_net_namespaces", "0\n")
    found = one(doctor.find_namespaces(str(proc)), "namespace-net")
    assert (found.ok, found.fix) == (False, "sysctl -w user.max_net_namespaces=1024")


@pytest.mark.parametrize("actions", ["", "errno allow\n", "kill_process allow\n"])
def test_a_kernel_whose_filter_cannot_kill_and_refuse_is_unfit(proc: Path, actions: str) -> None:
    write(proc / "sys/kernel/seccomp/actions_avail", actions)
    assert not doctor.find_seccomp(str(proc)).ok


def test_a_root_without_capabilities_is_told_which(proc: Path) -> None:
    write(proc / "self/status", "CapEff:\t00000000a80425fb\n")  # Docker's default set
    found = doctor.find_capabilities(str(proc))
    assert (found.ok, found.have) == (False, "without CAP_SYS_ADMIN")
    write(proc / "self/status", "")
    assert not doctor.find_capabilities(str(proc)).ok


def test_a_call_that_the_kernel_does_not_have_is_not_said_to_be_there() -> None:
    assert not doctor._call("nothing", 100000, "Linux 99").ok


@pytest.mark.parametrize("mountinfo", ["", "garbage - \n", "36 24 0:31 / /cg rw - cgroup cgroup rw,cpu\n"])
def test_a_host_without_a_useful_cgroup_hierarchy_is_unfit(proc: Path, mountinfo: str) -> None:
    write(proc / "self/mountinfo", mountinfo)
    assert not doctor.is_fit(doctor.find_cgroup(str(proc)))


def test_cgroup_kill_that_nobody_can_see_is_unknown_but_not_needed(proc: Path, tmp_path: Path) -> None:
    write(proc / "self/mountinfo", V2.replace("/sys/fs/cgroup", str(tmp_path / "nowhere")))
    found = one(doctor.find_cgroup(str(proc)), "cgroup-kill")
    assert (found.ok, found.needed) == (False, False)
    assert found.have.startswith("unknown")


def test_a_host_without_users_is_sent_to_setup(tmp_path: Path) -> None:
    (found,) = doctor.find_users(etc(tmp_path, "root:x:0:0:root:/root:/bin/bash\n"))
    assert (found.ok, found.needed, found.fix) == (False, True, "depriv setup")


def test_a_host_without_a_passwd_is_a_finding_and_no_exception(tmp_path: Path) -> None:
    (found,) = doctor.find_users(str(tmp_path))
    assert "there is no" in found.have


def test_a_range_that_somebody_else_is_in_is_found_before_a_domain_gets_there(tmp_path: Path) -> None:
    tree = etc(tmp_path, f"{GOOD}bob:x:70000:100::/home/bob:/bin/sh\n")
    users, found = doctor.find_users(tree)
    assert users.ok
    assert (found.ok, found.needed, found.have) == (False, False, "uid 70000 in the range is bob's")
    assert "usermod --uid" in found.fix


def test_a_directory_that_is_missing_is_not_writable(tmp_path: Path) -> None:
    assert not doctor.find_writable("x", str(tmp_path / "none")).ok


@pytest.mark.parametrize(
    ("cpuinfo", "fix"),
    [("flags : fpu vmx", "modprobe kvm_intel"), ("flags : fpu svm", "modprobe kvm_amd"), ("flags : fpu", "firmware")],
)
def test_without_kvm_the_reason_is_the_processor_or_the_module(
    proc: Path, tmp_path: Path, cpuinfo: str, fix: str
) -> None:
    write(proc / "cpuinfo", cpuinfo)
    found = doctor.find_kvm(str(proc), str(tmp_path))
    assert (found.ok, found.needed) == (False, False)
    assert fix in found.fix


def test_without_qemu_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.find_qemu().fix == "apt-get install --no-install-recommends qemu-system-x86"


def test_an_unprivileged_run_says_so_and_goes_on() -> None:
    code = (
        "import os\nfrom depriv import doctor\n"
        "doctor.to_json(doctor.diagnose())\n"  # what it imports on the way may be root's alone to read
        "if os.getuid() == 0: os.setgroups([]); os.setresgid(65533, 65533, 65533); os.setresuid(65533, 65533, 65533)\n"
        "print(doctor.to_json(doctor.diagnose()))\n"
    )
    src = os.path.dirname(os.path.dirname(doctor.__file__))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": src, "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=True,
    )
    read = {finding["id"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert read["root"]["have"].startswith("not root (uid ")
    assert not read["capabilities"]["ok"]
    assert read["seccomp"]["ok"]
