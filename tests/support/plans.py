# SPDX-License-Identifier: Apache-2.0
"""Plans for tests of the pure modules: valid ones from the planner, and arbitrary ones of the right types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from depriv import planner, steps
from depriv.config import Disk, Domain
from depriv.host import FileFacts, Host, Program
from depriv.identity import RANGE_BASE, REAPER, Accounts, Group, User

if TYPE_CHECKING:
    from depriv.records import Record


def valid_plan(*, restricted: bool = True, accel: str = "tcg") -> steps.Plan:
    """Return the planner's plan for a guest with two disks, a kernel and a ramdisk; a descriptor is handed in."""
    place = {"shell": "/usr/sbin/nologin", "home": "/nonexistent", "comment": "depriv"}
    base = User(name=RANGE_BASE, uid=65538, gid=65538, **place)
    reaper = User(name=REAPER, uid=65537, gid=65537, **place)
    host = Host(
        root=True,
        program=Program(path="/usr/bin/qemu-system-x86_64"),
        accounts=Accounts(
            users=(base, reaper),
            groups=(Group(name=RANGE_BASE, gid=65538, members=()), Group(name=REAPER, gid=65537, members=())),
            ranges=(),
        ),
        files=(
            FileFacts(path="/srv/a.raw", kind="file", dev=1, ino=2, size=1 << 20),
            FileFacts(path="/srv/b.raw", kind="file", dev=1, ino=3, size=1 << 20),
            FileFacts(path="/boot/vmlinuz", kind="file", dev=1, ino=4, size=1 << 20),
            FileFacts(path="/boot/initrd", kind="file", dev=1, ino=5, size=1 << 20),
        ),
        domid=7,
        kvm_node=(10, 232),
        cgroup_dir="/sys/fs/cgroup",
        root_links=(("bin", "usr/bin"), ("lib64", "usr/lib64")),
    )
    config = Domain(
        name="web1",
        accel=accel,
        disks=(Disk(vdev="xvda", target="/srv/a.raw"), Disk(vdev="xvdb", target="/srv/b.raw", readonly=True)),
        kernel="/boot/vmlinuz",
        ramdisk="/boot/initrd",
        dm_restrict=restricted,
    )
    plan = planner.plan(config, host).plan
    last = max(place for place, step in enumerate(plan.steps) if isinstance(step, steps.OpenFile))
    taken = steps.TakeFd(role="net0", source=7, number=30)
    return plan.replace(steps=(*plan.steps[: last + 1], taken, *plan.steps[last + 1 :]))


# What a path may be made of on Linux, which is more than UTF-8: surrogates stand for the other bytes (PEP 383).
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0") | st.sampled_from("\udc80\udcff"), max_size=20)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(-(2**62), 2**62),
    "str": TEXT,
    "bool": st.booleans(),
    "tuple[int, ...]": st.lists(st.integers(-(2**62), 2**62), max_size=4).map(tuple),
    "tuple[str, ...]": st.lists(TEXT, max_size=4).map(tuple),
}


def any_step(kind: type[Record]) -> st.SearchStrategy[Any]:
    """Return records of one kind with any values of the right types."""
    return st.fixed_dictionaries({name: VALUES[text] for name, text in kind.fields.items()}).map(
        lambda values: kind(**values)
    )


ANY_STEP: st.SearchStrategy[Any] = st.sampled_from(steps.ALL).flatmap(any_step)
ANY_PLAN = st.builds(
    steps.Plan,
    domain=TEXT,
    domid=VALUES["int"],
    restricted=st.booleans(),
    shared=st.booleans(),
    keep_net=st.booleans(),
    tool=TEXT,
    steps=st.lists(ANY_STEP, max_size=6).map(tuple),
    after=st.lists(ANY_STEP, max_size=2).map(tuple),
)
