# SPDX-License-Identifier: Apache-2.0
"""What plain ``xl`` with dm_restrict=1 does today, each as a fact of the guest, of /proc or of xenstore.

These are the halves without depriv: each would fail on the day that Xen, QEMU or Debian mends it, which is worth to
know. On trixie no restricted guest starts by itself, so the rest is looked at with ``lift-dm``, which changes the limit
on file sizes and nothing else of what confines.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.xenlab import recording
from tests.support.xenlab.confinement import side_by_side, table

from depriv.records import Record

if TYPE_CHECKING:
    from typing import Any

    from tests.support.xenlab.dom0 import Dom0

pytestmark = [pytest.mark.xen, pytest.mark.root, pytest.mark.timeout(900)]

CREATE_S = 120.0
SPEAK_S = 120.0
SILENT_S = 6.0  # a guest that runs ticks every second
BASE_UID = 131072  # xen-qemuuser-range-base, and its group
FULL = "000001ffffffffff"
ARGV = Path(__file__).parent / "argv"


class Restricted(Record):
    """A guest that runs with dm_restrict=1."""

    name: str
    domid: int
    pid: int
    said: str  # on the serial port, when it had ticked


@pytest.fixture(scope="module")
def restricted(dom0: Dom0) -> Restricted:
    """Return one guest for all that only look at it, on trixie with what it needs to start; it ends with its dom0."""
    keys: dict[str, Any] = {"dm_restrict": 1}
    if dom0.suite == "trixie":
        keys = recording.with_override(dom0.suite, recording.RECORDER, **keys)
    config = dom0.guest_config("restrict", disk="/guests/write.img", **keys)
    dom0.run(["xl", "create", config], timeout_s=CREATE_S)
    said = dom0.wait_for_serial("restrict", "tick 0003", SPEAK_S)
    domid = dom0.domid("restrict")
    assert domid is not None
    return Restricted(name="restrict", domid=domid, pid=dom0.dm_pid("restrict"), said=said)


def destroy(dom0: Dom0, name: str) -> None:
    dom0.run(["xl", "destroy", name], timeout_s=CREATE_S)


def state(dom0: Dom0, name: str) -> str:
    """Return what ``xl list`` shows of a domain: "-b----", "--p---" (xl(1), STATES)."""
    lines = dom0.must("xl list").splitlines()
    return next(line.split()[4] for line in lines if line.split()[0] == name)


@pytest.mark.only_on("trixie")
def test_restricted_guest_does_not_start(dom0: Dom0) -> None:
    """The limit on file sizes ends QEMU 10 before libxl hears from it; the cause is in the next test."""
    config = dom0.guest_config("never", dm_restrict=1)
    dom0.run(["xl", "create", config], timeout_s=CREATE_S)
    try:
        assert dom0.domid("never") is None
        assert dom0.ask("named", word="-xen-domid") == {}
    finally:
        destroy(dom0, "never")


@pytest.mark.only_on("trixie")
def test_restricted_guest_does_not_start_without_the_limit_either(dom0: Dom0) -> None:
    """The second cause: its keyboard backend cannot open evtchn behind the chroot, tries again, and that is fatal."""
    keys = {**recording.with_override("trixie", recording.LIFT, dm_restrict=1), "vkb_device": 1}
    config = dom0.guest_config("twice", **keys)
    dom0.run(["xl", "create", config], timeout_s=CREATE_S)
    try:
        log = "/var/log/xen/qemu-dm-twice.log"
        dom0.must(["timeout", "30", "sh", "-c", f"until grep -q 'Duplicate device ID' {log}; do sleep 1; done"])
        assert "Duplicate device ID 'xen-vkbd-0'" in dom0.get(log).decode()
        assert dom0.ask("named", word="-xen-domid") == {}
    finally:
        destroy(dom0, "twice")


def test_device_model_of_a_restricted_guest_keeps_what_it_does_not_need(
    dom0: Dom0, restricted: Restricted, capsys: pytest.CaptureFixture[str]
) -> None:
    known = table(dom0, restricted.pid)
    with capsys.disabled():
        print("\n" + side_by_side({f"xl on {dom0.suite}": known}))
    # What it does confine.
    assert known["uid"] == str(BASE_UID + restricted.domid)
    assert known["CapPrm"] == "0" * 16
    assert known["root"] == f"/run/xen/qemu-root-{restricted.domid}"
    # What it leaves.
    left = {
        "gid": str(BASE_UID),
        "groups": str(BASE_UID),
        "CapBnd": FULL,
        "NoNewPrivs": "0",
        "Seccomp": "0",
        "own namespaces": "ipc mnt",
        "cgroup": "0::/",
        "oom_score_adj": "0",
        "NPROC": dom0.proc(1)["limits"]["Max processes"][1],
        "NOFILE": dom0.proc(1)["limits"]["Max open files"][1],
        "FSIZE": "262144" if dom0.suite == "bookworm" else "unlimited",  # lift-dm lifted it
    }
    assert {check: known[check] for check in left} == left


def test_device_model_of_a_restricted_guest_can_reach_dom0s_network_and_log(dom0: Dom0, restricted: Restricted) -> None:
    found = dom0.proc(restricted.pid)
    assert found["ns"]["net"]
    assert found["ns"]["pid"]
    log = ["w", f"/var/log/xen/qemu-dm-{restricted.name}.log"]
    assert (found["fds"]["1"], found["fds"]["2"]) == (log, log)
    # A second monitor, by path: any process of root may speak to it, beside libxl.
    assert dom0.run(["test", "-S", f"/run/xen/qmp-libxenstat-{restricted.domid}"]).status == 0


def test_start_is_the_one_that_is_recorded(dom0: Dom0, restricted: Restricted) -> None:
    kept = recording.load(ARGV / f"{dom0.suite}-restrict.txt")
    expected = placed(kept.argv, restricted.domid, disk="/guests/write.img")
    assert dom0.proc(restricted.pid)["argv"][1:] == expected
    if dom0.suite == "trixie":
        probe, start = recording.recorded(dom0)[-2:]
        assert probe.is_probe
        assert probe.argv == recording.load(ARGV / "trixie-restrict-probe.txt").argv
        assert start.limits == kept.limits
        assert start.fds == kept.fds


def placed(argv: tuple[str, ...], domid: int, *, disk: str) -> list[str]:
    """Return a recorded command line for another domain id and another disk."""
    old = int(argv[argv.index("-xen-domid") + 1])
    result: list[str] = []
    for word in argv:
        new = word.replace("/guests/restrict.img", disk).replace(str(BASE_UID + old), str(BASE_UID + domid))
        for place in ("qmp-libxenstat-", "qemu-root-"):
            new = new.replace(f"{place}{old}", f"{place}{domid}")
        result.append(str(domid) if result and result[-1] == "-xen-domid" else new)
    return result


@pytest.mark.only_on("bookworm")
def test_guest_cannot_write_beyond_256_kib_of_its_image(restricted: Restricted) -> None:
    """The same guest can without dm_restrict: see test_xenlab.py."""
    assert "write=failed" in restricted.said
    assert "write=ok" not in restricted.said


@pytest.mark.only_on("trixie")
def test_guest_can_write_where_the_limit_on_file_sizes_is_lifted(restricted: Restricted) -> None:
    assert "write=ok" in restricted.said
    assert "write=failed" not in restricted.said


@pytest.mark.only_on("bookworm")
def test_restored_guest_is_lost(dom0: Dom0, restricted: Restricted) -> None:
    """It ends the guest that the tests before it look at. On trixie it is the same, and takes as long."""
    dom0.must(f"xl save {restricted.name} /root/saved", timeout_s=CREATE_S)
    assert dom0.proc(restricted.pid) == {}
    dom0.run("xl restore /root/saved", timeout_s=CREATE_S)
    domid = dom0.domid(restricted.name)
    assert domid is not None
    assert domid != restricted.domid
    pid = dom0.dm_pid(restricted.name)
    known = table(dom0, pid)
    assert (known["uid"], known["gid"]) == (str(BASE_UID + domid), str(BASE_UID))  # one gid for all
    # Told to go on, QEMU opens the image again, by path: in its empty root, as a user who may not.
    assert "Could not open '/guests/write.img'" in dom0.get(f"/var/log/xen/qemu-dm-{restricted.name}.log").decode()
    assert ["rw", "/guests/write.img"] not in dom0.proc(pid)["fds"].values()
    with pytest.raises(TimeoutError, match="did not write 'tick'"):
        dom0.wait_for_serial(restricted.name, "tick", SILENT_S)
    assert state(dom0, restricted.name) == "--p---"


def test_root_of_a_destroyed_guest_stays_behind(dom0: Dom0, restricted: Restricted) -> None:
    """Last of this module: it ends the guest that the tests before it look at."""
    destroy(dom0, restricted.name)
    assert dom0.domid(restricted.name) is None
    assert dom0.proc(restricted.pid) == {}
    left = f"/run/xen/qemu-root-{restricted.domid}"
    assert dom0.must(["stat", "-c", "%a %U %F", left]) == "0 root directory\n"
