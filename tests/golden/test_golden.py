# SPDX-License-Identifier: Apache-2.0
"""Configuration x recorded host -> plan. `cases/CASE.cfg` on `hosts/HOST.json` gives `cases/CASE.HOST.plan` or `.err`.

A case names its hosts in its first line: `# hosts: debian12 xen`. `--update` rewrites; review reads the difference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from depriv.check import check
from depriv.codec import decode, encode
from depriv.config import Disk, Domain
from depriv.errors import ConfigError, DeprivError, PlanError, render
from depriv.host import FileFacts, Holding, Host, Program
from depriv.identity import SHARED, Accounts, Group, IdRange, User
from depriv.planner import plan, plan_discovery
from depriv.steps import Execute, Reap, SetLimit, describe
from depriv.xlconfig import load_domain

if TYPE_CHECKING:
    from depriv.assembly import Launch

HERE = Path(__file__).parent
CASES = sorted(
    (path.stem, host)
    for path in HERE.glob("cases/*.cfg")
    for host in path.read_text().splitlines()[0].removeprefix("# hosts:").split()
)


def read_host(name: str) -> Host:
    data: dict[str, Any] = json.loads((HERE / f"hosts/{name}.json").read_text())
    accounts = data.pop("accounts")
    return Host(
        program=Program(**data.pop("program")),
        accounts=Accounts(
            users=tuple(User(**user) for user in accounts["users"]),
            groups=tuple(Group(**{**group, "members": tuple(group["members"])}) for group in accounts["groups"]),
            ranges=tuple(IdRange(**item) for item in accounts["ranges"]),
        ),
        files=tuple(FileFacts(**facts) for facts in data.pop("files")),
        holdings=tuple(
            Holding(**{**held, "images": tuple(tuple(image) for image in held["images"])})
            for held in data.pop("holdings")
        ),
        kvm_node=tuple(data.pop("kvm_node")),
        root_dirs=tuple(data.pop("root_dirs")),
        root_links=tuple(tuple(link) for link in data.pop("root_links")),
        **data,
    )


def render_launch(launch: Launch) -> str:
    lines = [f"warning: {text}" for text in launch.warnings]
    lines += [f"identity: {launch.identity.uid}:{launch.identity.gid} {launch.identity.how}", f"accel: {launch.accel}"]
    lines += [f"runtime: {line}" for line in launch.runtime_key]
    for step in launch.plan.steps:
        lines.append(f"step: {describe(step)}")
        if isinstance(step, Execute):
            lines += [f"  {word}" for word in step.argv] + [f"  environment {item}" for item in step.environ]
    lines += [f"after: {describe(step)}" for step in launch.plan.after]
    lines += [f"image: {image!r}" for image in launch.images]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("case", "host"), CASES)
def test_plan_is_as_reviewed(case: str, host: str, request: pytest.FixtureRequest) -> None:
    name = f"{case}.cfg"
    try:
        config = load_domain((HERE / "cases" / name).read_bytes(), source=name)
        launch = plan(config, read_host(host))
        have, kind = render_launch(launch), "plan"
        check(launch.plan)
        assert decode(encode(launch.plan).partition(b"\n")[2]) == launch.plan
    except DeprivError as error:
        have, kind = render(error) + "\n", "err"
    golden = HERE / "cases" / f"{case}.{host}.{kind}"
    other = HERE / "cases" / f"{case}.{host}.{'err' if kind == 'plan' else 'plan'}"
    if request.config.getoption("--update"):
        golden.write_text(have)
        other.unlink(missing_ok=True)
    assert not other.exists(), f"{other.name} says otherwise"
    assert golden.read_text() == have


def test_every_golden_file_belongs_to_a_case() -> None:
    known = {f"{case}.{host}.{kind}" for case, host in CASES for kind in ("plan", "err")}
    known |= {f"{case}.cfg" for case, _ in CASES}
    assert {path.name for path in (HERE / "cases").iterdir()} <= known


def test_the_same_facts_give_the_same_plan() -> None:
    text = (HERE / "cases/q35-disks.cfg").read_bytes()
    launches = [plan(load_domain(text, source="x"), read_host("debian12")) for _ in range(2)]
    assert encode(launches[0].plan) == encode(launches[1].plan)


# What a review found


def limits(*, disks: int, vcpus: int = 1, memory_mib: int = 128) -> dict[str, int]:
    """Return name -> value of what is planned for a guest with so many disks."""
    host = read_host("debian12")
    files = tuple(FileFacts(path=f"/srv/{n}.img", kind="file", dev=1, ino=100 + n, size=1 << 20) for n in range(disks))
    named = tuple(Disk(vdev=f"xvd{chr(ord('a') + n)}", target=file.path) for n, file in enumerate(files))
    config = Domain(name="x", accel="tcg", vcpus=vcpus, memory_mib=memory_mib, disks=named)
    made = plan(config, host.replace(files=files, memory_mib=1 << 20)).plan
    return {step.name: step.value for step in made.steps if isinstance(step, SetLimit)}


@pytest.mark.parametrize(("disks", "vcpus"), [(1, 1), (2, 8), (4, 4), (20, 16)])
def test_address_space_holds_a_stack_for_each_request_that_a_guest_can_have_in_flight(disks: int, vcpus: int) -> None:
    """Too small a limit lets a guest end its own QEMU: it aborts where it cannot map a coroutine's stack."""
    without = limits(disks=0, vcpus=vcpus)["AS"]
    assert limits(disks=disks, vcpus=vcpus)["AS"] - without >= disks * vcpus * 256 << 20


@pytest.mark.parametrize(("disks", "vcpus"), [(1, 1), (2, 8), (20, 16)])
def test_descriptors_suffice_for_each_queues_notifier(disks: int, vcpus: int) -> None:
    without = limits(disks=0, vcpus=vcpus)["NOFILE"]
    assert limits(disks=disks, vcpus=vcpus)["NOFILE"] - without >= disks * vcpus


def test_limits_do_not_grow_with_what_a_guest_does_not_have() -> None:
    assert limits(disks=0, vcpus=1)["AS"] == limits(disks=0, vcpus=2)["AS"] - (8 << 20)
    assert limits(disks=1)["STACK"] == limits(disks=20, vcpus=16)["STACK"] == 8 << 20


@pytest.mark.parametrize("restricted", [True, False])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_shared_user_is_never_killed_by_uid_whoever_else_has_it_by_then(*, restricted: bool, others: int) -> None:
    """Another start may come between this one's plan and its first step: the first reaps no more than the last."""
    host = read_host("debian12")
    uid = next(user.uid for user in host.accounts.users if user.name == SHARED)
    held = tuple(Holding(name=f"o{n}", domid=50 + n, uid=uid, gid=uid, images=()) for n in range(others))
    config = Domain(name="x", accel="tcg", device_model_user=SHARED, dm_restrict=restricted)
    for make in (plan, plan_discovery):
        made = make(config, host.replace(holdings=held)).plan
        assert made.shared
        assert not [step for step in (*made.steps, *made.after) if isinstance(step, Reap)]


@pytest.mark.parametrize("user", ["", "xen-qemuuser-web1"])
def test_uid_that_is_one_domains_alone_is_cleared_before_it_gets_it(user: str) -> None:
    config = Domain(name="x", accel="tcg", device_model_user=user)
    made = plan(config, read_host("debian12")).plan
    assert not made.shared
    assert isinstance(made.steps[0], Reap)


def test_user_that_runs_something_already_is_refused_with_the_processes() -> None:
    config = Domain(name="x", accel="tcg", device_model_user="xen-qemuuser-web1")
    host = read_host("debian12")
    with pytest.raises(PlanError, match="has processes already: 4711 4712") as caught:
        plan(config, host.replace(strangers=(4711, 4712)))
    assert "they would be killed" in caught.value.cause
    assert caught.value.fix
    with pytest.raises(PlanError, match=r"99 and 40 more$"):
        plan(config, host.replace(strangers=tuple(range(90, 140))))


def test_kernels_command_line_may_look_like_an_option_of_qemu() -> None:
    """Every word that has to be there exactly once; a second one only stands for the guest's kernel."""
    host = read_host("debian12")
    kernel = FileFacts(path="/boot/k", kind="file", dev=1, ino=2, size=1)
    for text in ("-S", "-nodefaults", "-no-user-config", "-sandbox", "-append"):
        config = Domain(name="x", accel="tcg", kernel="/boot/k", cmdline=text)
        argv = plan(config, host.replace(files=(kernel,))).plan.steps[-1].as_dict()["argv"]
        assert argv[argv.index("-append") + 1] == text


@pytest.mark.parametrize(
    ("machine", "arguments", "count"),
    [("pc", (), 1), ("q35", (), 1), ("microvm", (), 0), ("pc", ("-device", "pvpanic"), 1), ("q35", ("-usb",), 1)],
)
def test_guest_has_one_device_to_tell_its_panic_to(machine: str, arguments: tuple[str, ...], count: int) -> None:
    """QEMU does not start with two: "duplicate fw_cfg file name"."""
    config = Domain(name="x", accel="tcg", machine=machine, device_model_args=arguments)
    assert plan(config, read_host("debian12")).plan.steps[-1].as_dict()["argv"].count("pvpanic") == count


@pytest.mark.parametrize("restricted", [True, False])
@pytest.mark.parametrize(("action", "stops"), [("restart", 0), ("destroy", 1), ("preserve", 1), ("rename-restart", 1)])
def test_qemu_stops_at_a_reset_unless_it_is_to_restart_the_guest(action: str, stops: int, *, restricted: bool) -> None:
    config = Domain(name="x", accel="tcg", on_reboot=action, dm_restrict=restricted)
    argv = plan(config, read_host("debian12")).plan.steps[-1].as_dict()["argv"]
    assert (argv.count("-no-reboot"), argv.count("-no-shutdown")) == (stops, 1)


def test_more_images_than_descriptors_are_the_configurations_fault() -> None:
    host = read_host("debian12")
    files = tuple(FileFacts(path=f"/srv/{n}", kind="file", dev=1, ino=9 + n, size=1 << 20) for n in range(104))
    letters = [f"xvd{chr(97 + n)}" for n in range(26)] + [f"sd{chr(97 + n)}" for n in range(26)]
    letters += [f"xvda{chr(97 + n)}" for n in range(26)] + [f"xvdb{chr(97 + n)}" for n in range(26)]
    disks = tuple(Disk(vdev=name, target=file.path) for name, file in zip(letters, files, strict=True))
    with pytest.raises(ConfigError) as caught:
        plan(Domain(name="x", accel="tcg", disks=disks), host.replace(files=files))
    assert caught.value.fix
    assert caught.value.exit_status == 2
