# SPDX-License-Identifier: Apache-2.0
"""Xen guests whose device model is ``depriv-dm``: what plain dm_restrict breaks works, and what it leaves is closed.

The other half, without depriv, is test_plain_dm_restrict.py. Facts are the guest's words on its serial port, what
dom0's kernel shows, and xenstore; never xl's exit status alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support import build
from tests.support.xenlab.confinement import side_by_side, table

from depriv.records import Record

if TYPE_CHECKING:
    from tests.support.xenlab.dom0 import Dom0

pytestmark = [pytest.mark.xen, pytest.mark.root, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
LIBRARY = "/usr/lib/python3/dist-packages/depriv"
OVERRIDE: dict[str, Any] = {
    "device_model_version": "qemu-xen",
    "device_model_override": "/usr/bin/depriv-dm",
    "dm_restrict": 1,
}
XLS = {"bookworm": "depriv", "trixie": "xl"}  # who ends domains there: our verbs are xl's, and a look at what is left
CREATE_S = 180.0
SPEAK_S = 120.0
BASE_UID = 131072  # xen-qemuuser-range-base, and its group
CHECKER = r"""
import ctypes, glob, os, subprocess, sys
pid, libc = int(sys.argv[1]), ctypes.CDLL(None)
checker = glob.glob("/usr/lib/xen-*/bin/depriv-fd-checker")[0]
pidfd, found = os.pidfd_open(pid), 0
for name in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
    target = os.readlink(f"/proc/{pid}/fd/{name}").removesuffix(" (deleted)")
    kind = target.rpartition("/")[2]
    if target.startswith("/dev/xen/"):
        mine = libc.syscall(438, pidfd, int(name), 0)
        os.set_inheritable(mine, True)
        words = [checker, kind, str(mine), f"{kind}#{name}"]
        done = subprocess.run(words, pass_fds=[mine], capture_output=True, text=True)
        print(*[line for line in done.stdout.splitlines() if "checking" not in line], sep="\n")
"""
FRAME = r"""
import socket, struct
def exactly(count):
    data = b""
    while len(data) < count:
        data += s.recv(count - len(data)) or exit("closed")
    return data
s = socket.create_connection(("127.0.0.1", 5900), 20); s.settimeout(60)
s.sendall(exactly(12)); exactly(exactly(1)[0]); s.sendall(b"\1"); assert exactly(4) == bytes(4); s.sendall(b"\1")
width, height = struct.unpack("!HH", exactly(4)); exactly(16); exactly(struct.unpack("!I", exactly(4))[0])
s.sendall(struct.pack("!BxH i", 2, 1, 0)); s.sendall(struct.pack("!BBHHHH", 3, 0, 0, 0, width, height))
kind, count = struct.unpack("!BxH", exactly(4)); pixels = b""
for _ in range(count):
    x, y, w, h, encoding = struct.unpack("!HHHHi", exactly(12)); assert encoding == 0; pixels += exactly(w * h * 4)
print(width, height, kind, len(set(pixels[n:n + 4] for n in range(0, len(pixels), 4))))
"""


class Guest(Record):
    """A guest that runs through depriv-dm."""

    name: str
    domid: int
    pid: int  # QEMU's


def depriv(dom0: Dom0, *words: str, timeout_s: float = CREATE_S) -> str:
    """Return what a verb of depriv prints; it has to succeed."""
    return dom0.must(["depriv", *words], timeout_s=timeout_s)


def refused(dom0: Dom0, *words: str) -> str:
    """Return what a verb of depriv says that fails, as it has to."""
    done = dom0.run(["depriv", *words], timeout_s=CREATE_S)
    assert done.status in (2, 125), done
    return done.err


def failing(dom0: Dom0, name: str) -> list[str]:
    """Return the checks of a domain that do not hold."""
    done = dom0.run(["depriv", "audit", "--json", name], timeout_s=CREATE_S)
    report = json.loads(done.out)
    assert len(report["checks"]) > 40
    assert {"xen.privcmd", "xen.evtchn", "xen.others"} <= {check["id"] for check in report["checks"]}
    return [f"{check['id']}: {check['have']}" for check in report["checks"] if not check["holds"]]


def found(dom0: Dom0, name: str) -> Guest:
    """Return a guest as depriv lists it."""
    rows: list[dict[str, Any]] = json.loads(depriv(dom0, "list", "--json", name))
    return Guest(name=name, domid=rows[0]["domid"], pid=rows[0]["pid"])


def left(host: Dom0, domid: int) -> str:
    """Return what is there of a domain that has ended, but for what libxl keeps of all.

    Our own verbs see to it before they end; xl does not wait for a device model to have cleared away.
    """
    if XLS[host.suite] == "xl":
        clearing = f"while [ -e /run/depriv/domains/{domid} ]; do sleep 0.5; done"
        host.must(["timeout", "60", "sh", "-c", clearing], timeout_s=CREATE_S)
    script = f"""
        ls -d /run/xen/*-{domid} /run/xen/*-{domid}.* /run/depriv/domains/{domid} 2>/dev/null
        find /sys/fs/cgroup -maxdepth 2 -name {domid}
        grep -ls "^[UG]id:.*[[:space:]]{BASE_UID + domid}[[:space:]]" /proc/[0-9]*/status
        xenstore-ls /local/domain/{domid} 2>/dev/null
        true"""
    return host.must(script)


@pytest.fixture(scope="module")
def host(dom0: Dom0) -> Dom0:
    """Return a dom0 with depriv installed."""
    dom0.put_python(ROOT / "src/depriv", LIBRARY)
    for name, module in (("depriv", "cli"), ("depriv-dm", "dm")):
        entry = "run" if module == "cli" else "main"
        text = f"#!/usr/bin/python3 -I\nfrom depriv.{module} import {entry}\n{entry}()\n"
        dom0.write(f"/usr/bin/{name}", text.encode(), mode=0o755)
    return dom0


@pytest.fixture(scope="module")
def guest(host: Dom0) -> Guest:
    """Return one guest for all that only look at it, started by ``xl create``."""
    config = host.guest_config("dm1", disk="/guests/write.img", **OVERRIDE)
    host.run(["xl", "create", config], timeout_s=CREATE_S)
    said = host.wait_for_serial("dm1", "tick 0003", SPEAK_S)
    # Its disk is written beyond the 256 KiB that libxl allows a restricted device model.
    assert "write=ok" in said
    assert "write=failed" not in said
    return found(host, "dm1")


def test_every_restriction_holds(host: Dom0, guest: Guest) -> None:
    assert failing(host, guest.name) == []


def test_all_that_plain_xl_leaves_is_closed(host: Dom0, guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    """The same table of xl's own dm_restrict is printed, and asserted, by test_plain_dm_restrict.py."""
    known = table(host, guest.pid)
    with capsys.disabled():
        print("\n" + side_by_side({f"depriv-dm on {host.suite}": known}))
    own = str(BASE_UID + guest.domid)
    want = {
        "uid": own,
        "gid": own,
        "groups": "",
        "CapPrm": "0" * 16,
        "CapBnd": "0" * 16,
        "NoNewPrivs": "1",
        "Seccomp": "2",
        "own namespaces": "cgroup ipc mnt net pid user uts",
        "mounts": "1",
        "CORE": "0",
    }
    assert {check: known[check] for check in want} == want
    assert known["cgroup"].endswith(f"/{guest.domid}")
    assert known["Xen nodes"] == ""  # their names are gone from its root


@pytest.mark.only_on("bookworm")  # on trixie a device model that lies is the control of the same checks, see below
def test_audit_finds_a_device_model_that_is_not_restricted(host: Dom0) -> None:
    config = host.guest_config("plain1", vnc=0)
    host.run(["xl", "create", config], timeout_s=CREATE_S)
    try:
        done = host.run(["depriv", "audit", "--json", "--pid", str(host.dm_pid("plain1"))], timeout_s=CREATE_S)
    finally:
        host.run(["xl", "destroy", "plain1"], timeout_s=CREATE_S)
    assert done.status == 1
    wrong = {check["id"]: check["have"] for check in json.loads(done.out)["checks"] if not check["holds"]}
    assert "is not" in wrong["xen.privcmd"]
    assert "is not" in wrong["xen.evtchn"]
    assert "gntdev" in wrong["xen.others"]


def test_xens_own_checker_passes_every_descriptor(host: Dom0, guest: Guest) -> None:
    said = host.must(["python3", "-c", CHECKER, str(guest.pid)], timeout_s=CREATE_S).split("\n")
    lines = [line for line in said if line.strip()]
    assert len(lines) >= 2
    assert [line for line in lines if not line.startswith(("privcmd pass", "evtchn pass"))] == []


def test_guest_sees_its_cd_change_and_the_audit_holds(host: Dom0, guest: Guest) -> None:
    host.wait_for_serial(guest.name, "cd=ISO-ONE", SPEAK_S)
    host.must(["xl", "cd-eject", guest.name, "hdc"], timeout_s=CREATE_S)
    seen = len(host.serial(guest.name))
    host.wait_for_serial(guest.name, "cd=none", SPEAK_S, after=seen)
    host.must(["xl", "cd-insert", guest.name, "hdc", "/guests/two.iso"], timeout_s=CREATE_S)
    host.wait_for_serial(guest.name, "cd=ISO-TWO", SPEAK_S)
    assert failing(host, guest.name) == []


@pytest.mark.only_on("trixie")  # they are xl's: once is enough
def test_cd_is_changed_by_deprivs_verbs(host: Dom0, guest: Guest) -> None:
    depriv(host, "cd-eject", guest.name, "hdc")
    depriv(host, "cd-insert", guest.name, "hdc", "/guests/one.iso")  # it ends with an audit of its own
    seen = len(host.serial(guest.name))
    host.wait_for_serial(guest.name, "cd=ISO-ONE", SPEAK_S, after=seen)
    assert "no regular file" in refused(host, "cd-insert", guest.name, "hdc", "/guests/none.iso")
    refused(host, "cd-insert", guest.name, "hdd", "/guests/two.iso")


@pytest.mark.usefixtures("guest")
def test_screen_is_read_by_vnc(host: Dom0) -> None:
    width, height, kind, colours = map(int, host.must(["python3", "-c", FRAME], timeout_s=CREATE_S).split())
    assert (width, height, kind) == (720, 400, 0)
    assert colours > 1  # something is on it


def test_second_guest_has_another_uid_and_gid(host: Dom0, guest: Guest) -> None:
    config = host.guest_config("dm2", vnc=0, dm_restrict=1)
    said = depriv(host, "create", config)
    host.wait_for_serial("dm2", "tick 0002", SPEAK_S)
    other = found(host, "dm2")
    try:
        assert f"uid {BASE_UID + other.domid}, running" in said
        first, second = table(host, guest.pid), table(host, other.pid)
        assert {first["uid"], first["gid"]} & {second["uid"], second["gid"]} == set()
        assert failing(host, "dm2") == []  # while the other runs
    finally:
        # The verb is xl's and a look at what is left: each on one.
        host.must([XLS[host.suite], "destroy", "dm2"], timeout_s=CREATE_S)
    assert host.domid("dm2") is None
    assert left(host, other.domid) == ""


def ticks(said: str) -> list[int]:
    """Return the numbers that a guest counted, of whole lines."""
    return [int(number, 16) for number in re.findall(r"tick ([0-9A-Fa-f]{4}) ", said)]


def test_domain_that_is_saved_goes_on_where_it_was(host: Dom0, guest: Guest) -> None:
    """It ends the guest that the tests before look at: another domid, another device model, the same guest."""
    verbs = XLS[host.suite]
    number = max(ticks(host.serial(guest.name)))
    host.must([verbs, "save", guest.name, "/root/saved"], timeout_s=CREATE_S)
    assert host.domid(guest.name) is None
    assert left(host, guest.domid) == ""
    host.run([verbs, "restore", "/root/saved"], timeout_s=CREATE_S)
    host.wait_for_serial(guest.name, "tick ", SPEAK_S)  # it may go on in the middle of a line
    said = host.wait_for_serial(guest.name, "write=ok", SPEAK_S, after=host.serial(guest.name).index("tick "))
    assert "write=failed" not in said
    assert min(ticks(said)) > number  # not from its beginning
    assert failing(host, guest.name) == []
    host.must(["xl", "destroy", guest.name], timeout_s=CREATE_S)


def test_device_model_that_keeps_what_it_must_give_up_is_killed(host: Dom0, tmp_path: Path) -> None:
    # One on each: it is the audit that is tried, and the way its answer takes to xl's output.
    keeps, reason = {"bookworm": ("PRIVCMD", "xen.privcmd is"), "trixie": ("XENBUS", "xen.others is")}[host.suite]
    program = build.compiled("evil_dm.c", tmp_path, ("-static",))
    host.put(program, f"/usr/libexec/EVIL_{keeps}")
    text = f'#!/bin/sh\nDEPRIV_DM_QEMU=/usr/libexec/EVIL_{keeps} exec /usr/bin/depriv-dm "$@"\n'
    host.write("/usr/bin/evil-dm", text.encode(), mode=0o755)
    keys = {**OVERRIDE, "device_model_override": "/usr/bin/evil-dm"}
    done = host.run(["xl", "create", host.guest_config("evil", **keys)], timeout_s=CREATE_S)
    assert host.domid("evil") is None
    assert reason in done.err + done.out  # in xl's own output
    assert reason in host.get("/var/log/xen/qemu-dm-evil.log").decode()
    assert host.ask("named", word="EVIL") == {}
    assert json.loads(depriv(host, "list", "--json")) == []


def test_domain_that_is_not_restricted_is_refused(host: Dom0) -> None:
    keys = {**OVERRIDE, "dm_restrict": 0}
    done = host.run(["xl", "create", host.guest_config("loose", **keys)], timeout_s=CREATE_S)
    assert host.domid("loose") is None
    log = host.get("/var/log/xen/qemu-dm-loose.log").decode()
    assert "dm_restrict = 1" in log, done


@pytest.mark.only_on("trixie")
def test_pv_disk_that_qemu_would_serve_is_refused(host: Dom0) -> None:
    host.must("qemu-img create -q -f qcow2 /root/pv.qcow2 1M")
    config = host.guest_config("served", **OVERRIDE)
    disk = 'disk += [ "format=qcow2,vdev=xvdb,access=rw,target=/root/pv.qcow2" ]\n'
    host.write(config, host.get(config) + disk.encode())
    done = host.run(["xl", "create", config], timeout_s=CREATE_S)
    assert host.domid("served") is None
    assert "disk xvdb would be served by a QEMU that cannot be confined" in done.err


def test_domain_of_somebody_else_is_refused(host: Dom0) -> None:
    words = ["-xen-domid", "0077", "-xen-domid-restrict", "-chardev", "socket,id=libxl-cmd,fd=9,server=on"]
    done = host.run(["depriv-dm", *words])
    assert done.status == 2
    assert "domain 77 is not ours" in done.err
    assert "xl create" in done.err
    assert host.run(["depriv-dm", "-xen-domid"]).status == 2
    assert host.run(["depriv-dm", "-machine", "none"]).status == 2


def test_guests_without_a_device_model_are_explained(host: Dom0) -> None:
    text = 'name="pv1"\ntype="pv"\nmemory=64\nkernel="/guests/vmlinuz"\ndm_restrict=1\n'
    host.write("/root/pv.cfg", text.encode())
    said = refused(host, "create", "/root/pv.cfg")
    assert "no device model" in said
    assert "/root/pv.cfg:5" in said
    assert host.domid("pv1") is None


def test_host_is_found_fit(host: Dom0) -> None:
    said = {line["id"]: line for line in json.loads(depriv(host, "doctor", "--json"))["findings"]}
    for name in ("xen", "xenstore", "xen-devices", "xen-qemu", "depriv-dm", "users"):
        assert said[name]["ok"], said[name]
    assert "without -sandbox" in said["xen-qemu"]["have"]
