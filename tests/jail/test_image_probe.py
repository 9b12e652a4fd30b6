# SPDX-License-Identifier: Apache-2.0
"""qemu-img says which format an image has, in a jail of its own: it is told nothing else, reaches nothing, may lie."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support import build
from tests.support.host import living, need
from tests.support.launch import accounts

from depriv import check as checking
from depriv import imageprobe, proc, steps, toolaudit
from depriv.accounts import accounts_for
from depriv.detect import look_at
from depriv.errors import ConfigError, HostError, PlanError
from depriv.host import Host, Program
from depriv.identity import RANGE_BASE, Identity, tool_domid
from depriv.nbd import Export
from depriv.setup import remove_setup, run_setup
from depriv.toolplan import Inspection, plan_qemu_img

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from tests.support.launch import Ground

    from depriv.entry import Tool
    from depriv.records import Record

IDENTITY = Identity(uid=98283, gid=98283, reaper_uid=65537, how="range")
HOST = Host(
    root=True,
    program=Program(path="/usr/bin/qemu-img"),
    accounts=accounts(),
    cgroup_dir="/sys/fs/cgroup",
    root_dirs=("usr",),
    root_links=(("lib", "usr/lib"), ("lib64", "usr/lib64")),
)
WANTED = Inspection(
    domain="web",
    domid=7,
    source=9,
    output=8,
    errors=11,
    directory="/run/depriv/domains/7",
    cgroup="/sys/fs/cgroup/depriv/7",
)
PLAN = plan_qemu_img(WANTED, HOST, IDENTITY).plan
FORMATS = ("raw", "qcow", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels", "luks")
SECRET = ("--object", "secret,id=key,data=abc", "-o", "key-secret=key,iter-time=10")


def place(kind: type[Record]) -> int:
    return next(place for place, step in enumerate(PLAN.steps) if isinstance(step, kind))


def changed(kind: type[Record], **values: Any) -> steps.Plan:
    step: Any = PLAN.steps[place(kind)]
    return PLAN.replace(steps=(*PLAN.steps[: place(kind)], step.replace(**values), *PLAN.steps[place(kind) + 1 :]))


def refused(plan: steps.Plan) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        checking.check(plan)
    return str(caught.value)


# The plan


def test_plan_is_one_that_the_jail_takes() -> None:
    checking.check(PLAN)
    assert (PLAN.tool, PLAN.keep_net, PLAN.restricted, PLAN.shared, PLAN.after) == ("qemu-img", False, True, False, ())


@pytest.mark.parametrize(
    "kind",
    [
        *(steps.Reap, steps.MakeCgroup, steps.Unshare, steps.MakeRoot, steps.PivotRoot, steps.SetHostname),
        *(steps.BecomeInit, steps.SetLimit, steps.NewUser, steps.DropCapabilities, steps.SetIds, steps.NoNewPrivs),
        *(steps.Filter, steps.Execute),
    ],
)
def test_qemu_img_without_one_of_its_restrictions_is_refused(kind: type[Record]) -> None:
    refused(PLAN.replace(steps=(*PLAN.steps[: place(kind)], *PLAN.steps[place(kind) + 1 :])))


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (PLAN.replace(keep_net=True), "alone passt is in the host's network"),
        (PLAN.replace(restricted=False), "restricted"),
        (PLAN.replace(tool=""), "-S"),
        (PLAN.replace(tool="passt", keep_net=True), "by descriptor"),
        (changed(steps.Unshare, namespaces=("mnt",)), "Unshare"),
        (changed(steps.OpenFile, access="rw"), "writes no file"),
        (changed(steps.MakeNode, path="/dev/kvm", major=10, minor=232), "/dev/kvm"),
        (changed(steps.Execute, argv=("qemu-img", "convert", "a", "b")), "only tells"),
        (changed(steps.Execute, argv=("qemu-img", "info", "--output=json", "/srv/disk")), "only tells"),
    ],
)
def test_qemu_img_that_is_more_than_asked_for_is_refused(plan: steps.Plan, why: str) -> None:
    assert why in refused(plan)


def test_qemu_img_that_is_not_there_is_refused_with_what_to_install() -> None:
    host = HOST.replace(program=Program(path="/x", problem="there is no /x on this host"))
    with pytest.raises(PlanError, match="cannot run qemu-img: there is no") as caught:
        plan_qemu_img(WANTED, host, IDENTITY)
    assert "qemu-utils" in caught.value.fix


# The real one


class Probe:
    """A domain that has not started, and images that a test asks about."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.entry = ground.entry(ground.launch())

    def confirm(self, path: Path) -> None:
        """Have an image's format confirmed as a start does."""
        imageprobe.confirm((look_at(str(path)),), self.entry, self.ground.registry, str(self.ground.folder / "cache"))


@pytest.fixture
def probe(ground: Ground) -> Iterator[Probe]:
    """Return a domain; afterwards nothing that asked about its images is left."""
    need(shutil.which("qemu-img") is not None, what="qemu-img")
    made = RANGE_BASE not in {user.name for user in accounts_for(device_model_user="", domid=1).users}
    if made:
        run_setup()
    users = accounts_for(device_model_user="", domid=1).users
    asked = Probe(ground)
    uid = next(user.uid for user in users if user.name == RANGE_BASE) + tool_domid(asked.entry.domid)
    before = asked.entry
    yield asked
    assert living(range(uid, uid + 1)) == ()
    assert ground.registry.find(str(before.domid)) == before
    assert not os.path.exists(before.cgroup)  # QEMU's start makes it
    if made:
        remove_setup()


def image(path: Path, kind: str, *words: str) -> Path:
    extra = SECRET if kind == "luks" else ()
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, *extra, *words, str(path), "4M"], check=True)
    path.chmod(0o600)
    return path


@pytest.fixture
def evil(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Have another program in qemu-img's place, which does what the test says."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        program = build.compiled("evil_img.c", Path(folder), (request.param, f"{folder}/written"))
        program.chmod(0o755)
        monkeypatch.setattr("depriv.detect.find_tool", lambda _name: str(program))
        monkeypatch.setattr("depriv.imageprobe.TIMEOUT_S", 3.0)
        yield


@pytest.mark.parametrize("kind", FORMATS)
def test_real_qemu_img_confirms_what_the_first_bytes_say(probe: Probe, tmp_path: Path, kind: str) -> None:
    probe.confirm(image(tmp_path / "image", kind))


@pytest.mark.parametrize("size", [1, 511, 513, 1 << 20])
def test_image_of_any_size_is_confirmed(probe: Probe, tmp_path: Path, size: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"\xaa" * size)
    probe.confirm(path)


def test_many_snapshots_make_a_long_answer_that_is_read_whole(probe: Probe, tmp_path: Path) -> None:
    path = image(tmp_path / "image", "qcow2")
    for number in range(40):
        subprocess.run(["qemu-img", "snapshot", "-c", f"{number:03}" + "n" * 120, str(path)], check=True)
    said = subprocess.run(["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True).stdout
    assert len(said) > 8192  # the control: more than is written at once
    probe.confirm(path)


def test_qemu_img_is_confined_before_it_sees_a_byte(
    probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []

    def look(tools: tuple[Tool, ...], **words: Any) -> None:
        (tool,) = tools
        links = {fd.target.partition(":")[0] for fd in proc.fds(tool.pid)}
        seen.append(("descriptors", links))
        seen.append(("namespaces", proc.namespaces(tool.pid).items() & proc.namespaces(os.getpid()).items()))
        seen.append(("root", sorted(os.listdir(f"/proc/{tool.pid}/root"))))
        seen.append(("wrong", [check.id for check in toolaudit.checks(tools, **words) if not check.holds]))
        seen.append(("images", [fd for fd in proc.fds(tool.pid) if stat.S_ISREG(fd.mode)]))

    monkeypatch.setattr(toolaudit, "refuse_unconfined", look)
    serve = Export.serve

    def serve_and_note(self: Export) -> None:
        seen.append(("served", None))
        serve(self)

    monkeypatch.setattr(Export, "serve", serve_and_note)
    probe.confirm(image(tmp_path / "image", "qcow2"))
    have = dict(seen)
    assert [name for name, _ in seen][-1] == "served"
    assert have["wrong"] == []
    assert have["images"] == []
    assert {kind for _, kind in have["namespaces"]} == set()
    assert "etc" not in have["root"]
    assert "/dev/null" in have["descriptors"]


def test_audit_finds_a_qemu_img_that_is_not_confined(probe: Probe, tmp_path: Path, monkeypatch: Any) -> None:
    # The check itself has to be able to fail: here it is asked about this process.
    refuse = toolaudit.refuse_unconfined

    def of_me(tools: tuple[Tool, ...], **words: Any) -> None:
        me = tools[0].replace(pid=os.getpid(), starttime=proc.start_time(os.getpid()))
        refuse((me,), **words)

    monkeypatch.setattr(toolaudit, "refuse_unconfined", of_me)
    with pytest.raises(HostError, match="qemu-img is not confined") as caught:
        probe.confirm(image(tmp_path / "image", "qcow2"))
    for check in ("ids.uid", "ids.gid", "caps", "no_new_privs", "seccomp", "namespaces", "root", "alone"):
        assert f"qemu-img.{check} is" in caught.value.cause


def test_image_that_names_another_leads_nowhere(probe: Probe, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root:x")
    path = image(tmp_path / "image", "qcow2", "-u", "-b", str(secret), "-F", "raw")
    before = os.stat(secret).st_atime_ns
    probe.confirm(path)
    assert os.stat(secret).st_atime_ns == before


def test_image_that_cannot_be_opened_is_refused_with_what_qemu_img_says(probe: Probe, tmp_path: Path) -> None:
    path = image(tmp_path / "image", "qcow2")
    head = bytearray(path.read_bytes())
    head[20:24] = (0xFFFFFFFF).to_bytes(4, "big")  # cluster_bits
    path.write_bytes(head)
    with pytest.raises(ConfigError, match="cannot open") as caught:
        probe.confirm(path)
    assert "luster" in caught.value.cause
    assert str(path) in caught.value.what


def test_image_that_was_replaced_is_refused(probe: Probe, tmp_path: Path) -> None:
    path = image(tmp_path / "image", "qcow2")
    facts = look_at(str(path))
    os.rename(image(tmp_path / "other", "qcow2"), path)
    with pytest.raises(ConfigError, match="replaced meanwhile"):
        imageprobe.confirm((facts,), probe.entry, probe.ground.registry, str(probe.ground.folder / "cache"))


# One that was taken over


def test_image_that_is_something_else_by_now_is_refused(probe: Probe, tmp_path: Path) -> None:
    path = image(tmp_path / "image", "qcow2")
    facts = look_at(str(path))
    image(tmp_path / "other", "vdi")
    path.write_bytes((tmp_path / "other").read_bytes())
    with pytest.raises(ConfigError, match="begins like qcow2, and qemu-img takes it for vdi") as caught:
        imageprobe.confirm((facts,), probe.entry, probe.ground.registry, str(probe.ground.folder / "cache"))
    assert "format=" in caught.value.fix


@pytest.mark.parametrize("evil", ["act"], indirect=True)
def test_qemu_img_that_was_taken_over_reaches_nothing(probe: Probe, tmp_path: Path, evil: None) -> None:
    del evil
    with pytest.raises(ConfigError) as caught:
        probe.confirm(image(tmp_path / "image", "qcow2"))
    said = caught.value.what.rpartition("takes it for ")[2]
    have = dict(word.split("=") for word in said.split())
    assert have == {
        "read": "ENOENT",
        "write": "EROFS",
        "again": "ENOENT",
        "socket": "EPERM",
        "bind": "EPERM",
        "connect": "EPERM",
        "fork": "EPERM",
    }


def test_the_same_acts_succeed_unconfined(tmp_path: Path) -> None:
    program = build.compiled("evil_img.c", tmp_path, ("act", f"{tmp_path}/written"))
    image(tmp_path / "image", "raw")
    words = ["sh", "-c", 'exec "$0" 3<"$1"', str(program), str(tmp_path / "image")]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=10)
    said = json.loads(done.stdout)["format"]
    have = dict(word.split("=") for word in said.split())
    assert set(have.values()) == {"ok"}
    assert len(have) == 7


@pytest.mark.parametrize(
    ("evil", "error", "what"),
    [
        ("lie", ConfigError, "begins like qcow2, and qemu-img takes it for raw"),
        ("escape", ConfigError, r"takes it for [^\x1b]*qcow2$"),
        ("shape", HostError, "makes no sense"),
        ("twice", HostError, "makes no sense"),
        ("flood", HostError, "makes no sense"),
        ("grumble", HostError, "makes no sense"),
        ("hang", HostError, "did not say"),
        ("crash", ConfigError, "cannot open"),
        ("die", HostError, "ended at once"),
        ("rubbish", HostError, "makes no sense"),
        ("overwrite", HostError, "makes no sense"),
        ("beyond", HostError, "did not say"),
        ("all", HostError, "did not say"),
    ],
    indirect=["evil"],
)
def test_qemu_img_that_was_taken_over_is_not_believed(
    probe: Probe, tmp_path: Path, evil: None, error: type[Exception], what: str
) -> None:
    del evil
    path = image(tmp_path / "image", "qcow2")
    before = path.read_bytes()
    begun = time.monotonic()
    with pytest.raises(error, match=what):
        probe.confirm(path)
    assert time.monotonic() - begun < 10
    assert path.read_bytes() == before
