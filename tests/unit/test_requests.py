# SPDX-License-Identifier: Apache-2.0
"""From a command line's request and the facts of a host to a whole launch, without touching either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from depriv.check import SANDBOX
from depriv.config import fit_name
from depriv.errors import ConfigError, PlanError
from depriv.host import FileFacts, Host, Program
from depriv.identity import Accounts, Group, IdRange, User
from depriv.qemu.draft import Allowed
from depriv.qemu.translate import translate
from depriv.requests import Run, plan_run, plan_run_discovery
from depriv.steps import Execute, MakeFifo, OpenFile, SetLimit, TakeFd, Unshare

if TYPE_CHECKING:
    from depriv.assembly import Launch

_HOST = Path(__file__).parents[1] / "golden/hosts/debian12.json"
_FILES = {
    "/vm/a.raw": FileFacts(path="/vm/a.raw", kind="file", dev=1, ino=2, size=1 << 30),
    "/vm/a.vmdk": FileFacts(path="/vm/a.vmdk", kind="file", dev=1, ino=3, size=1 << 20, magic="vmdk"),
    "/vm/kernel": FileFacts(path="/vm/kernel", kind="file", dev=1, ino=4, size=4096, magic="bzimage"),
}
QUIET = ("-nodefaults", "-display", "none")


def host() -> Host:
    data: dict[str, Any] = json.loads(_HOST.read_text())
    accounts = data.pop("accounts")
    return Host(
        program=Program(**data.pop("program")),
        accounts=Accounts(
            users=tuple(User(**user) for user in accounts["users"]),
            groups=tuple(Group(**{**group, "members": tuple(group["members"])}) for group in accounts["groups"]),
            ranges=tuple(IdRange(**item) for item in accounts["ranges"]),
        ),
        kvm_node=tuple(data.pop("kvm_node")),
        root_dirs=tuple(data.pop("root_dirs")),
        root_links=tuple(tuple(link) for link in data.pop("root_links")),
        **{key: value for key, value in data.items() if key not in ("files", "holdings")},
    )


def run(*words: str, **keywords: Any) -> Run:
    def look(path: str) -> FileFacts:
        return _FILES.get(path, FileFacts(path=path, kind="missing"))

    request = translate((*QUIET, *words), look=look, allowed=Allowed(), cwd="/vm")
    return Run(name="vm", request=request, **keywords)


def launch(*words: str, **keywords: Any) -> Launch:
    return plan_run(run(*words, **keywords), host())


def argv(made: Launch) -> tuple[str, ...]:
    execute = made.plan.steps[-1]
    assert isinstance(execute, Execute)
    return execute.argv


def steps(made: Launch, kind: type) -> list[Any]:
    return [step for step in made.plan.steps if isinstance(step, kind)]


def test_own_words_come_first_and_each_promise_is_among_them() -> None:
    words = argv(launch("-m", "64"))
    assert words[:5] == ("/usr/bin/qemu-system-x86_64", "-no-user-config", "-S", "-sandbox", SANDBOX)
    assert words[5:7] == ("-name", "guest=vm")
    assert words[-2:] == ("-m", "64")


@pytest.mark.parametrize(
    ("words", "zone"),
    [
        ("", "UTC0"),
        ("-rtc base=utc", "UTC0"),
        ("-rtc clock=vm", "UTC0"),
        ("-rtc base=localtime", "DEPRIV-02:00:00"),
        ("-rtc clock=vm,base=localtime,driftfix=slew", "DEPRIV-02:00:00"),
        ("-rtc base=localtime -rtc clock=vm", "DEPRIV-02:00:00"),
        ("-rtc base=localtime -rtc base=utc", "UTC0"),
    ],
)
def test_local_time_is_the_hosts_where_it_is_asked_for(words: str, zone: str) -> None:
    made = plan_run(run(*words.split()), host().replace(utc_offset_s=7200))
    execute = made.plan.steps[-1]
    assert isinstance(execute, Execute)
    assert [word for word in execute.environ if word.startswith("TZ=")] == [f"TZ={zone}"]


def test_name_of_the_callers_is_not_said_twice() -> None:
    assert argv(launch("-name", "other")).count("-name") == 1


def test_cards_without_a_sound_server_are_silent_and_search_for_none() -> None:
    execute = launch("-device", "AC97").plan.steps[-1]
    assert isinstance(execute, Execute)
    assert "QEMU_AUDIO_DRV=none" in execute.environ
    assert not [word for word in execute.environ if word.startswith(("HOME", "PATH", "XDG"))]


def test_own_stop_stays_whatever_the_caller_says() -> None:
    assert argv(launch("-S", "-append", "-S")).count("-S") == 2  # the second is the kernel's


def test_streams_are_the_callers_in_the_foreground_and_a_fifo_in_the_background() -> None:
    front = {step.role: step.source for step in steps(launch("-serial", "stdio"), TakeFd)}
    assert front == {"stdin": 0, "stdout": 1, "stderr": 2}
    assert steps(launch("-serial", "stdio"), MakeFifo) == []
    behind = launch("-serial", "stdio", "-daemonize")
    assert steps(behind, TakeFd) == []
    assert [step.numbers for step in steps(behind, MakeFifo)] == [(1, 2)]


def test_input_is_not_taken_where_nothing_reads_it() -> None:
    assert [step.role for step in steps(launch("-serial", "null"), TakeFd)] == ["stdout", "stderr"]


def test_descriptors_are_looked_for_where_the_caller_has_none() -> None:
    line = ("-chardev", "socket,id=c,fd=7")
    (taken,) = [step for step in steps(launch(*line), TakeFd) if step.role == "c"]
    assert (taken.source, taken.number) == (310, 10)
    (taken,) = [step for step in steps(launch(*line, source_base=2000), TakeFd) if step.role == "c"]
    assert (taken.source, taken.number) == (2010, 10)


def test_dry_run_has_no_disk_no_descriptor_and_no_socket() -> None:
    wanted = run("-drive", "file=a.raw,format=raw,if=virtio", "-serial", "unix:x,server=on", "-serial", "file:y")
    made = plan_run_discovery(wanted, host())
    assert {step.path for step in steps(made, OpenFile)} == {"/dev/null"}
    assert steps(made, TakeFd) == []
    assert not [word for word in argv(made) if "/vm" in word or "fdset" in word]
    assert argv(made)[-2:] == ("-trace", "enable=load_file")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("-m", "64"), ("-m", "128", "-smp", "2", "-name", "x", "-uuid", "y"), True),
        (("-serial", "unix:a,server=on"), ("-serial", "unix:b,server=on"), True),
        (("-drive", "file=a.raw,format=raw,if=virtio"), ("-drive", "if=virtio,format=raw,file=a.raw,id=q"), True),
        (("-device", "e1000,id=a"), ("-device", "e1000,id=b,addr=5"), True),
        (("-device", "e1000"), ("-device", "virtio-net-pci"), False),
        (("-device", "e1000"), ("-device", "e1000,romfile="), False),
        (("-machine", "pc"), ("-machine", "q35"), False),
        (("-vga", "std"), ("-vga", "cirrus"), False),
        (("-device", '{"id":"a","driver":"e1000"}'), ("-device", '{"driver":"e1000","id":"b"}'), True),
        (("-device", '{"id":"a","driver":"e1000"}'), ("-device", '{"id":"a","driver":"rtl8139"}'), False),
        (("-device", '{"driver":"e1000"}'), ("-device", '{"driver":"e1000","romfile":""}'), False),
        # One in place of the BIOS, which is not loaded then.
        (("-drive", "file=a.raw,format=raw,if=virtio"), ("-drive", "file=a.raw,format=raw,if=pflash"), False),
        (("-name", "-device"), ("-name", "-vga"), True),
        (("-kernel", "kernel", "-append", "a"), ("-kernel", "kernel", "-append", "-device b"), True),
    ],
)
def test_copy_of_qemus_files_is_shared_by_lines_that_load_the_same(
    one: tuple[str, ...], other: tuple[str, ...], *, same: bool
) -> None:
    assert (launch(*one).runtime == launch(*other).runtime) is same


def file_limit(*words: str) -> int:
    return int(next(step.value for step in steps(launch(*words), SetLimit) if step.name == "FSIZE"))


def test_no_write_that_is_meant_to_be_fails_by_the_limit_on_files() -> None:
    assert file_limit() == 4 << 20
    assert file_limit("-drive", "file=a.raw,format=raw") >= 1 << 30
    assert file_limit("-drive", "file=a.raw,format=raw,readonly=on") == 4 << 20
    assert file_limit("-drive", "file=a.vmdk,format=vmdk") >= 1 << 40
    assert file_limit("-serial", "file:log") == 256 << 20
    assert file_limit("-m", "1G", "-object", "memory-backend-memfd,id=m,size=1G") >= 1 << 30


def test_keep_net_is_said_and_leaves_only_the_network() -> None:
    made = launch(keep_net=True)
    assert any("--keep-net" in text for text in made.warnings)
    (unshared,) = steps(made, Unshare)
    assert "net" not in unshared.namespaces
    assert {"mnt", "pid", "ipc", "uts"} <= set(unshared.namespaces)


def test_one_image_twice_is_refused_and_more_memory_than_there_is() -> None:
    with pytest.raises(ConfigError, match="is in use by disk"):
        launch("-drive", "file=a.raw,format=raw", "-drive", "file=a.raw,format=raw")
    with pytest.raises(PlanError, match="more than this host has"):
        launch("-m", "900T")


def test_script_in_place_of_a_qemu_is_refused() -> None:
    bad = host()
    bad = bad.replace(program=bad.program.replace(problem="it is a script"))
    with pytest.raises(PlanError, match="it is a script") as caught:
        plan_run(run(), bad)
    assert "device_model_override" not in caught.value.fix


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("web1", "web1"),
        ("a b/c", "a-b-c"),
        ("../etc", "etc"),
        ("-x", "x"),
        ("12", "vm12"),
        ("", ""),
        ("ü", ""),
        ("a\nb", "a-b"),
        ("x" * 200, "x" * 55),
    ],
)
def test_every_name_of_qemus_comes_to_one_that_a_domain_may_have(text: str, name: str) -> None:
    assert fit_name(text) == name
