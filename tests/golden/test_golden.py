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
from depriv.errors import DeprivError, render
from depriv.host import FileFacts, Holding, Host, Program
from depriv.identity import Accounts, Group, IdRange, User
from depriv.planner import plan
from depriv.steps import Execute, describe
from depriv.xlconfig import load_domain

if TYPE_CHECKING:
    from depriv.planner import Launch

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
