# SPDX-License-Identifier: Apache-2.0
"""What runs beside a QEMU is in a jail of its own: passt's plan gives away nothing, and the real passt is held to it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.host import living, need
from tests.support.launch import TIMEOUT_S, Ground, accounts, wait_for
from tests.support.network import own_network

from depriv import check as checking
from depriv import collect, detect, proc, steps, toolaudit
from depriv.cgroup import members
from depriv.errors import HostError, PlanError
from depriv.ending import finish
from depriv.host import FileFacts, Host, Program
from depriv.identity import DOMID_FIRST, DOMID_LAST, RANGE_BASE, Identity, tool_domid
from depriv.openings import StartPasst
from depriv.registry import Registry
from depriv.setup import remove_setup, run_setup
from depriv.spawn import Jail
from depriv.toolplan import Passt, plan_passt
from depriv.tools import Tools

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    from depriv.entry import Entry, Tool
    from depriv.records import Record

IDENTITY = Identity(uid=98283, gid=98283, reaper_uid=65537, how="range")
RESOLV = FileFacts(path="/etc/resolv.conf", kind="file", dev=1, ino=2, size=100)
WORDS = ("--address", "10.0.2.15", "--netmask", "24", "--gateway", "10.0.2.2")


def facts(**changes: Any) -> Host:
    host = Host(
        root=True,
        program=Program(path="/usr/bin/passt.avx2"),
        accounts=accounts(),
        cgroup_dir="/sys/fs/cgroup",
        root_links=(("lib", "usr/lib"), ("lib64", "usr/lib64")),
    )
    return host.replace(**changes)


def passt(**changes: Any) -> Passt:
    made = Passt(
        domain="web",
        domid=7,
        place=0,
        words=WORDS,
        source=9,
        directory="/run/depriv/domains/7",
        cgroup="/sys/fs/cgroup/depriv/7",
        resolv=RESOLV,
    )
    return made.replace(**changes)


PLAN = plan_passt(passt(), facts(), IDENTITY).plan


def places(kind: type[Record]) -> list[int]:
    return [place for place, step in enumerate(PLAN.steps) if isinstance(step, kind)]


def changed(kind: type[Record], **values: Any) -> steps.Plan:
    place = places(kind)[0]
    step: Any = PLAN.steps[place]
    return PLAN.replace(steps=(*PLAN.steps[:place], step.replace(**values), *PLAN.steps[place + 1 :]))


def refused(plan: steps.Plan) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        checking.check(plan)
    return str(caught.value)


# The plan


def test_plan_of_passt_is_one_that_the_jail_takes() -> None:
    checking.check(PLAN)
    assert (PLAN.tool, PLAN.keep_net, PLAN.restricted, PLAN.after) == ("passt", True, True, ())


@pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
def test_plan_of_passt_is_made_for_each_known_processor(processor: str) -> None:
    assert plan_passt(passt(), facts(processor=processor), IDENTITY).plan.tool == "passt"


@pytest.mark.parametrize(
    "kind",
    [
        *(steps.Reap, steps.MakeCgroup, steps.Unshare, steps.MakeRoot, steps.PivotRoot, steps.SetHostname),
        *(steps.BecomeInit, steps.SetLimit, steps.DropCapabilities, steps.SetIds, steps.NoNewPrivs, steps.Filter),
        steps.Execute,
    ],
)
def test_passt_without_one_of_its_restrictions_is_refused(kind: type[Record]) -> None:
    place = places(kind)[0]
    refused(PLAN.replace(steps=(*PLAN.steps[:place], *PLAN.steps[place + 1 :])))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tool": "qemu-img"}, "no tool 'qemu-img' is known"),
        ({"tool": "passt", "keep_net": False}, "in the host's network"),
        ({"tool": "passt", "restricted": False}, "restricted"),
        ({"after": (steps.EmptyRoot(detach=(), remove=()),)}, "replaced by itself"),
        # As a QEMU it would be one that runs at once, unfiltered and in the host's network.
        ({"tool": ""}, "NewUser"),
        ({"shared": True}, "reaped"),
    ],
)
def test_passt_that_is_more_than_passt_is_refused(changes: dict[str, Any], why: str) -> None:
    assert why in refused(PLAN.replace(**changes))


@pytest.mark.parametrize("words", [["--log-file", "/x"], ["-p", "/x"], ["--runas", "0"], ["--fd", "4"], ["-s", "/x"]])
def test_passt_that_would_write_files_or_change_its_user_is_refused(words: list[str]) -> None:
    assert "by descriptor" in refused(changed(steps.Execute, argv=("passt", "--foreground", "--fd", "3", *words)))


def test_passt_that_leaves_our_sight_or_has_no_guest_is_refused() -> None:
    for words in (("--fd", "3"), ("--foreground",)):
        refused(changed(steps.Execute, argv=("passt", *words)))


def test_passt_gets_no_device_and_no_file_to_write() -> None:
    assert "/dev/kvm" in refused(changed(steps.MakeNode, path="/dev/kvm", major=10, minor=232))
    assert "writes no file" in refused(changed(steps.OpenFile, access="rw"))


@pytest.mark.parametrize("spaces", [steps.NAMESPACES, ("mnt",), ()])
def test_passt_leaves_every_namespace_but_the_network(spaces: tuple[str, ...]) -> None:
    assert "Unshare" in refused(changed(steps.Unshare, namespaces=spaces))


def test_second_passt_of_a_domain_does_not_kill_the_first() -> None:
    second = plan_passt(passt(place=1), facts(), IDENTITY).plan
    assert not [step for step in second.steps if isinstance(step, steps.Reap)]
    first, other = (
        [step for step in plan.steps if isinstance(step, (steps.MakeCgroup, steps.MakeFifo))] for plan in (PLAN, second)
    )
    assert not set(first) & set(other)


def test_passt_needs_no_name_server_of_the_hosts() -> None:
    plan = plan_passt(passt(resolv=FileFacts(path="/etc/resolv.conf", kind="missing")), facts(), IDENTITY).plan
    assert not [step for step in plan.steps if isinstance(step, (steps.CopyFile, steps.MakePrivate))]


def test_passt_that_cannot_be_executed_is_refused_with_what_to_install() -> None:
    with pytest.raises(PlanError, match="there is no") as caught:
        plan_passt(passt(), facts(program=Program(path="/x", problem="there is no /x on this host")), IDENTITY)
    assert "install" in caught.value.fix


# Its ids


def test_tools_of_a_domain_have_the_ids_of_no_domain_that_can_be_there() -> None:
    others = [tool_domid(domid) for domid in range(DOMID_FIRST, DOMID_LAST + 1)]
    assert sorted(others) == list(range(DOMID_FIRST, DOMID_LAST + 1))
    assert all(tool_domid(tool_domid(domid)) == domid for domid in (1, 16375, 16376, DOMID_LAST))


def test_domid_whose_uid_a_tool_may_have_is_not_given_out(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "state"))
    registry.prepare()
    middle = tool_domid(16376)
    assert middle == 16376
    for used, asked, given in ((16370, 16370, 16371), (16380, 16371, 16373), (16375, 16375, 16378)):
        (tmp_path / "state" / "domains" / str(used)).mkdir()
        registry._write_history({asked: 0.0})
        assert registry.next_domid() not in {tool_domid(domid) for domid in registry.domids()} | {middle}
    del given


# The real passt


@pytest.fixture
def beside(ground: Ground) -> Iterator[tuple[Ground, Entry]]:
    """Return an entry of a domain whose QEMU would have started, on a host with users, in a network of the test's."""
    need(shutil.which("passt") is not None, what="passt")
    made = RANGE_BASE not in {user.name for user in detect.accounts_for(device_model_user="", domid=1).users}
    if made:
        run_setup()
    entry = ground.entry(ground.launch())
    with own_network():
        yield ground, entry
    assert living(range(_uid(entry), _uid(entry) + 1)) == ()
    if made:
        remove_setup()


def _uid(entry: Entry) -> int:
    users = detect.accounts_for(device_model_user="", domid=1).users
    return next(user.uid for user in users if user.name == RANGE_BASE) + tool_domid(entry.domid)


def _start(tools: Tools, entry: Entry, *words: str, place: str = "net0") -> tuple[socket.socket, Entry]:
    """Start one; return QEMU's end of its socket, and the entry."""
    ours, its = socket.socketpair()
    with its:
        return ours, tools.start_passt(StartPasst(role=place, number=10, words=(*WORDS, *words)), its.fileno(), entry)


def _wrong(tools: tuple[Tool, ...]) -> list[str]:
    return [check.id for check in toolaudit.checks(tools) if not check.holds]


def test_real_passt_is_confined_and_ends_with_its_socket(beside: tuple[Ground, Entry]) -> None:
    ground, entry = beside
    with Tools(ground.registry, str(ground.folder / "cache")) as tools:
        ours, entry = _start(tools, entry)
        tools.release()
    (tool,) = entry.tools
    assert _wrong(entry.tools) == []
    assert {tool.uid, tool.gid} == {_uid(entry)} != {entry.uid}
    assert members(f"{entry.cgroup}/passt0") == (tool.pid,)
    # What the kernel shows beside: nothing of the host's but its network, and no file but the log's FIFO.
    assert os.listdir(f"/proc/{tool.pid}/root") == []
    assert proc.namespaces(tool.pid)["net"] == proc.namespaces(os.getpid())["net"]
    kinds = {stat.S_IFMT(fd.mode) for fd in proc.fds(tool.pid) if not fd.target.startswith("anon_inode:")}
    assert kinds <= {stat.S_IFSOCK, stat.S_IFIFO, stat.S_IFCHR}
    assert proc.limits(tool.pid)["FSIZE"] == (0, 0)
    ours.close()
    assert wait_for(lambda: proc.alive(tool.pid, tool.starttime) == "dead")
    assert _wrong(entry.tools) == ["passt.alive"]


def test_two_passts_of_a_domain_live_side_by_side(beside: tuple[Ground, Entry]) -> None:
    ground, entry = beside
    with Tools(ground.registry, str(ground.folder / "cache")) as tools:
        first, entry = _start(tools, entry)
        second, entry = _start(tools, entry, place="net1")
        assert _wrong(entry.tools) == []
        ids = [check.id for check in toolaudit.checks(entry.tools)]
        assert len(ids) == len(set(ids))
    first.close()
    second.close()


def test_passt_that_is_not_released_ends_with_the_command_that_started_it(beside: tuple[Ground, Entry]) -> None:
    ground, entry = beside
    with Tools(ground.registry, str(ground.folder / "cache")) as tools:
        ours, entry = _start(tools, entry)
    with ours:
        assert _wrong(entry.tools) == ["passt.alive"]
        assert not os.path.exists(f"{entry.cgroup}/passt0")


def test_passt_that_does_not_end_by_itself_is_ended_with_its_domain(beside: tuple[Ground, Entry]) -> None:
    ground, entry = beside
    with Tools(ground.registry, str(ground.folder / "cache")) as tools:
        ours, entry = _start(tools, entry)
        tools.release()
    (tool,) = entry.tools
    os.kill(tool.pid, signal.SIGSTOP)
    ours.close()
    time.sleep(0.2)
    assert proc.alive(tool.pid, tool.starttime) != "dead"
    ground.registry.save(entry)
    with Jail() as jail:
        finish(ground.registry.find(str(entry.domid)), ground.registry, jail)
    assert proc.alive(tool.pid, tool.starttime) == "dead"
    assert not os.path.exists(entry.cgroup)


def test_passt_is_ended_even_if_the_entry_does_not_know_of_it(beside: tuple[Ground, Entry]) -> None:
    ground, entry = beside
    with Tools(ground.registry, str(ground.folder / "cache")) as tools:
        ours, with_tool = _start(tools, entry)
        tools.release()
    with ours, Jail() as jail:  # its socket stays open: nothing but its cgroup tells of it
        finish(ground.registry.find(str(entry.domid)), ground.registry, jail)
        assert _wrong(with_tool.tools) == ["passt.alive"]


def test_passt_of_a_domain_is_no_stray(beside: tuple[Ground, Entry]) -> None:
    ground, entry = beside
    with Tools(ground.registry, str(ground.folder / "cache")) as tools:
        ours, entry = _start(tools, entry)
        # Its cgroup alone says so, as where the domain's registry is not to be seen.
        assert collect._has_domain(entry.tools[0].pid) == ("depriv-" in entry.cgroup.rpartition("/")[0].rpartition("/")[2])
    ours.close()


def test_passt_on_a_host_with_no_way_out_says_why_and_what_to_do(beside: tuple[Ground, Entry]) -> None:
    ground, entry = beside
    with own_network(route=False), Tools(ground.registry, str(ground.folder / "cache")) as tools:
        with pytest.raises(HostError, match="passt did not start") as caught:
            _start(tools, entry)
        assert "External interface not usable" in caught.value.cause
        assert "syslog" not in caught.value.cause
        assert "default route" in caught.value.fix


def test_passt_whose_port_is_taken_says_which(beside: tuple[Ground, Entry]) -> None:
    ground, entry = beside
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Tools(ground.registry, str(ground.folder / "cache")) as tools:
            with pytest.raises(HostError, match="passt did not start") as caught:
                _start(tools, entry, "--tcp-ports", f"127.0.0.1/{port}:22", "--udp-ports", "none")
            assert str(port) in caught.value.cause
            assert "ss -ltnup" in caught.value.fix


def test_audit_finds_a_process_that_is_not_confined(beside: tuple[Ground, Entry]) -> None:
    ground, entry = beside
    with Tools(ground.registry, str(ground.folder / "cache")) as tools:
        ours, entry = _start(tools, entry)
        me = entry.tools[0].replace(pid=os.getpid(), starttime=proc.start_time(os.getpid()))
        wrong = {name.removeprefix("passt.") for name in _wrong((me,))}
        assert {"ids.uid", "ids.gid", "caps", "no_new_privs", "seccomp", "namespaces", "root", "alone"} <= wrong
        stale = entry.tools[0].replace(starttime=1)
        assert _wrong((stale,)) == ["passt.alive"]
    ours.close()


def test_nothing_of_passt_is_started_twice_by_one_log(beside: tuple[Ground, Entry]) -> None:
    ground, entry = beside
    with Tools(ground.registry, str(ground.folder / "cache")) as tools:
        ours, _ = _start(tools, entry)
        with pytest.raises(HostError, match="passt did not start"):
            _start(tools, entry)  # as the first again: its FIFO and its cgroup are there
    ours.close()


assert TIMEOUT_S
