# SPDX-License-Identifier: Apache-2.0
"""What runs beside a QEMU is in a jail of its own: passt's plan gives nothing away, and the real one is held to it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.host import living, need
from tests.support.launch import Ground, accounts, wait_for
from tests.support.network import own_network

from depriv import check as checking
from depriv import proc, seccomp, steps, toolaudit, tools
from depriv.accounts import accounts_for
from depriv.cgroup import members
from depriv.ending import finish
from depriv.entry import Tool
from depriv.errors import HostError, PlanError
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
        output=8,
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
        ({"tool": "swtpm"}, "no tool 'swtpm' is known"),
        ({"tool": "qemu-img"}, "NewUser"),
        ({"tool": "passt", "keep_net": False}, "in the host's network"),
        ({"tool": "passt", "restricted": False}, "restricted"),
        ({"after": (steps.EmptyRoot(detach=(), remove=()),)}, "has its root emptied"),
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
    first, other = ([step for step in plan.steps if isinstance(step, steps.MakeCgroup)] for plan in (PLAN, second))
    assert not set(first) & set(other)


@pytest.mark.parametrize(("processor", "calls"), [("x86_64", {155, 165, 166, 272}), ("aarch64", {39, 40, 41, 97})])
def test_filter_leaves_passt_four_calls_that_no_qemu_has(processor: str, calls: set[int]) -> None:
    # pivot_root, mount, umount2, unshare: asm/unistd_64.h, asm-generic/unistd.h
    def denied(*, isolates: bool) -> set[int]:
        code = bytes.fromhex(seccomp.program(processor, network=True, isolates=isolates))
        lines = [struct.unpack_from("<HBBI", code, at) for at in range(0, len(code), 8)]
        return {value for operation, yes, _, value in lines if operation == 0x15 and yes}

    assert denied(isolates=False) - denied(isolates=True) == calls
    assert denied(isolates=True) < denied(isolates=False)


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


@pytest.mark.parametrize(
    ("used", "last", "given"), [(16370, 16381, 16383), (16380, 16371, 16381), (16370, 16375, 16377)]
)
def test_domid_whose_uid_a_tool_may_have_is_not_given_out(tmp_path: Path, used: int, last: int, given: int) -> None:
    registry = Registry(str(tmp_path / "state"))
    registry.prepare()
    (tmp_path / "state" / "domains" / str(used)).mkdir()
    registry._write_history({last: 0.0})
    # 16382 is that of 16370's tools, 16376 that of its own.
    assert registry.next_domid() == given


# The real passt


class Beside:
    """A domain whose QEMU would have started, on a host with users, and the tools that a test starts beside it."""

    def __init__(self, ground: Ground) -> None:
        self.registry = ground.registry
        self.tools = Tools(ground.registry, str(ground.folder / "cache"))
        self.entry = ground.entry(ground.launch())
        self.sockets: list[socket.socket] = []

    def start(self, *words: str) -> Tool:
        """Start one passt; the socket to it is the last of ``sockets``."""
        ours, its = socket.socketpair()
        self.sockets.append(ours)
        opening = StartPasst(role=f"net{len(self.entry.tools)}", number=10, words=(*WORDS, *words))
        with its:
            self.entry = self.tools.start_passt(opening, its.fileno(), self.entry)
        self.registry.save(self.entry)
        return self.entry.tools[-1]

    def release(self) -> None:
        """Do what a start does at its end."""
        self.tools.release()
        self.tools.__exit__()

    def wrong(self) -> list[str]:
        """Return the checks that do not hold."""
        return [check.id for check in toolaudit.checks(self.entry.tools) if not check.holds]

    def end(self) -> None:
        """End the domain as ``destroy`` does."""
        with Jail() as jail:
            finish(self.registry.find(str(self.entry.domid)), self.registry, jail)

    def close(self) -> None:
        """Clear away what the test has left."""
        self.tools.__exit__()
        for held in self.sockets:
            held.close()
        if self.registry.read(self.entry.domid) is not None:
            self.end()


@pytest.fixture
def beside(ground: Ground) -> Iterator[Beside]:
    """Return a domain in a network of the test's own; afterwards nothing of it is left."""
    need(shutil.which("passt") is not None, what="passt")
    made = not _base()
    if made:
        run_setup()
    domain = Beside(ground)
    uid = _base() + tool_domid(domain.entry.domid)
    with own_network():
        yield domain
        domain.close()
    assert living(range(uid, uid + 1)) == ()
    if made:
        remove_setup()


def _base() -> int:
    users = accounts_for(device_model_user="", domid=1).users
    return next((user.uid for user in users if user.name == RANGE_BASE), 0)


def test_real_passt_is_confined_and_ends_with_its_socket(beside: Beside) -> None:
    tool = beside.start()
    beside.release()
    assert beside.wrong() == []
    assert tool.uid == tool.gid == _base() + tool_domid(beside.entry.domid) != beside.entry.uid
    assert members(f"{beside.entry.cgroup}/passt0") == (tool.pid,)
    # What the kernel shows beside: nothing of the host's but its network, and no file but the log's FIFO.
    assert os.listdir(f"/proc/{tool.pid}/root") == []
    assert proc.namespaces(tool.pid)["net"] == proc.namespaces(os.getpid())["net"]
    kinds = {stat.S_IFMT(fd.mode) for fd in proc.fds(tool.pid) if not fd.target.startswith("anon_inode:")}
    assert kinds <= {stat.S_IFSOCK, stat.S_IFIFO, stat.S_IFCHR}
    assert proc.limits(tool.pid)["FSIZE"] == (0, 0)
    beside.sockets[-1].close()
    assert wait_for(lambda: proc.alive(tool.pid, tool.starttime) == "dead")
    assert beside.wrong() == ["passt.alive"]


def test_two_passts_of_a_domain_live_side_by_side(beside: Beside) -> None:
    assert beside.start().uid == beside.start().uid
    beside.release()
    assert beside.wrong() == []
    ids = [check.id for check in toolaudit.checks(beside.entry.tools)]
    assert len(ids) == len(set(ids))
    beside.sockets[0].close()
    assert wait_for(lambda: beside.wrong() == ["passt.alive"])


def test_passt_that_is_not_released_ends_with_the_command_that_started_it(beside: Beside) -> None:
    beside.start()
    beside.tools.__exit__()
    assert beside.wrong() == ["passt.alive"]
    assert not os.path.exists(f"{beside.entry.cgroup}/passt0")


def test_passt_that_does_not_end_by_itself_is_ended_with_its_domain(beside: Beside) -> None:
    tool = beside.start()
    beside.release()
    os.kill(tool.pid, signal.SIGSTOP)
    beside.sockets[-1].close()
    time.sleep(0.2)
    assert proc.alive(tool.pid, tool.starttime) != "dead"
    beside.end()
    assert proc.alive(tool.pid, tool.starttime) == "dead"
    assert not os.path.exists(beside.entry.cgroup)


def test_passt_is_ended_even_if_the_entry_does_not_know_of_it(beside: Beside) -> None:
    tool = beside.start()
    beside.release()
    beside.registry.save(beside.entry.replace(tools=()))
    beside.end()  # its socket is open: nothing but its cgroup tells of it
    assert proc.alive(tool.pid, tool.starttime) == "dead"


def test_passt_on_a_host_with_no_way_out_says_why_and_what_to_do(beside: Beside) -> None:
    with own_network(route=False), pytest.raises(HostError, match="passt did not start") as caught:
        beside.start()
    assert "External interface not usable" in caught.value.cause
    assert "syslog" not in caught.value.cause
    assert "default route" in caught.value.fix


def test_passt_whose_port_is_taken_says_which(beside: Beside) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match="passt did not start") as caught:
            beside.start("--tcp-ports", f"127.0.0.1/{port}:22", "--udp-ports", "none")
    assert str(port) in caught.value.cause
    assert "ss -ltnup" in caught.value.fix


def test_audit_finds_a_process_that_is_not_confined(beside: Beside) -> None:
    tool = beside.start()
    me = tool.replace(pid=os.getpid(), starttime=proc.start_time(os.getpid()))
    wrong = {check.id.removeprefix("passt.") for check in toolaudit.checks((me,)) if not check.holds}
    assert {"ids.uid", "ids.gid", "caps", "no_new_privs", "seccomp", "namespaces", "root", "alone"} <= wrong
    stale = tuple(toolaudit.checks((tool.replace(starttime=1),)))
    assert [(check.id, check.holds) for check in stale] == [("passt.alive", False)]


def test_nothing_is_left_of_a_passt_that_could_not_be_started(beside: Beside) -> None:
    beside.start()
    before = beside.entry
    beside.entry = before.replace(tools=())  # so that it takes the first one's place: its cgroup is there
    with pytest.raises(HostError, match="passt did not start"):
        beside.start()
    beside.entry = before
    # The second one's plan has reaped the uid first, as a domain's first passt does.
    assert beside.wrong() == ["passt.alive"]


def test_passt_that_never_confines_itself_is_waited_for_no_longer_than_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depriv.tools.TIMEOUT_S", 0.2)
    reads, writes = os.pipe2(os.O_NONBLOCK)
    with subprocess.Popen(["sleep", "60"]) as lazy:
        try:
            os.write(writes, b"Failed to send 3 bytes to syslog\nstill at it\x1b[2J\n")
            starttime = proc.start_time(lazy.pid)
            tool = Tool(name="passt", role="net0", pid=lazy.pid, starttime=starttime, uid=98283, gid=98283)
            with pytest.raises(HostError, match="did not start within") as caught:
                tools._await_confined(tool, (), reads)
            assert caught.value.cause.startswith("still at it")
            assert "\x1b" not in caught.value.cause
        finally:
            lazy.kill()
            os.close(reads)
            os.close(writes)
