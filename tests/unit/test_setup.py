# SPDX-License-Identifier: Apache-2.0
"""What `depriv setup` would run, and what it refuses to touch. The tools themselves run in tests/jail."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from depriv.errors import HostError, PlanError
from depriv.identity import MADE_BY, RANGE_BASE, REAPER, Accounts, Group, IdRange, User
from depriv.setup import Commands, plan_removal, plan_setup, processes_with, setup_text

NOLOGIN = "/usr/sbin/nologin"


def user(name: str, uid: int, gid: int = -1, *, shell: str = NOLOGIN, comment: str = MADE_BY) -> User:
    gid = uid if gid == -1 else gid
    return User(name=name, uid=uid, gid=gid, shell=shell, home="/nonexistent", comment=comment)


def group(name: str, gid: int, *members: str) -> Group:
    return Group(name=name, gid=gid, members=members)


ROOT = user("root", 0, shell="/bin/bash", comment="root")
BASE = user(RANGE_BASE, 65538)
KILLER = user(REAPER, 65537)
GROUPS = (group(RANGE_BASE, 65538), group(REAPER, 65537))


def accounts(*users: User, groups: tuple[Group, ...] = (), ranges: tuple[IdRange, ...] = ()) -> Accounts:
    return Accounts(users=(ROOT, *users), groups=(group("root", 0), *groups), ranges=ranges)


def short(commands: Commands) -> list[tuple[str, str, str]]:
    """Return tool, id ("" for none) and name of each command."""
    return [(c[0], next((c[c.index(o) + 1] for o in ("--uid", "--gid") if o in c), ""), c[-1]) for c in commands]


def test_an_empty_host_gets_a_range_and_below_it_a_reaper_each_with_its_own_group() -> None:
    assert short(plan_setup(accounts())) == [
        ("groupadd", "65538", RANGE_BASE),
        ("useradd", "65538", RANGE_BASE),
        ("groupadd", "65537", REAPER),
        ("useradd", "65537", REAPER),
    ]


def test_nobody_can_be_the_new_users() -> None:
    for command in plan_setup(accounts()):
        if command[0] == "useradd":
            line = " ".join(command)
            assert "--shell /usr/sbin/nologin" in line
            assert "--no-create-home --home-dir /nonexistent" in line


def test_a_host_that_is_set_up_needs_nothing() -> None:
    assert plan_setup(accounts(BASE, KILLER, groups=GROUPS)) == ()
    assert setup_text(()).startswith("Nothing to do")


def test_what_xens_documents_made_is_kept_and_only_the_reaper_is_added() -> None:
    host = accounts(user(RANGE_BASE, 131072, comment=",,,"), groups=(group(RANGE_BASE, 131072),))
    assert short(plan_setup(host)) == [("groupadd", "65537", REAPER), ("useradd", "65537", REAPER)]


def test_an_interrupted_setup_is_finished_with_the_same_numbers() -> None:
    begun = accounts(groups=(group(RANGE_BASE, 70001),))
    assert short(plan_setup(begun))[0] == ("useradd", "70001", RANGE_BASE)
    half = accounts(BASE, groups=(GROUPS[0], group(REAPER, 90)))
    with pytest.raises(PlanError, match=f"no uid for {REAPER}"):
        plan_setup(half)
    assert short(plan_setup(accounts(BASE, groups=GROUPS))) == [("useradd", "65537", REAPER)]


def test_the_reaper_moves_where_the_id_below_the_range_is_somebodys() -> None:
    host = accounts(BASE, user("bob", 65537), groups=GROUPS[:1])
    assert short(plan_setup(host))[0] == ("groupadd", str(65538 + 32752), REAPER)


def test_the_text_does_not_preach_about_a_range_that_is_there_already() -> None:
    host = accounts(user(RANGE_BASE, 131072), groups=(group(RANGE_BASE, 131072),))
    assert setup_text(plan_setup(host)).startswith(f"groupadd --gid 65537 {REAPER}")


def test_the_text_says_why_multiples_of_2_to_the_16_are_avoided() -> None:
    text = setup_text(plan_setup(accounts()))
    assert "65536" in text
    assert "root of a container" in text
    assert f"groupadd --gid 65538 {RANGE_BASE}" in text


# What must not work


@pytest.mark.parametrize(
    ("host", "why"),
    [
        (accounts(BASE, user("bob", 65540)), "bob's"),
        (accounts(BASE, groups=(group("staff", 65540),)), "group staff"),
        (
            accounts(user(RANGE_BASE, 131072), ranges=(IdRange(start=100000, count=65536, owner="subuid of bob"),)),
            "bob",
        ),
        (accounts(user(RANGE_BASE, 100000)), "65534"),
        (accounts(user(RANGE_BASE, 110)), "system users"),
        (accounts(user(RANGE_BASE, 131072, 65534)), "65534"),
        (accounts(user(RANGE_BASE, 600000)), "container range"),
    ],
)
def test_a_range_that_is_not_free_is_explained_and_not_repaired(host: Accounts, why: str) -> None:
    with pytest.raises(PlanError, match=f"range of {RANGE_BASE}.*is not free") as caught:
        plan_setup(host)
    assert why in caught.value.cause
    assert "usermod --uid" in caught.value.fix


def test_many_problems_are_counted_and_not_all_told() -> None:
    with pytest.raises(PlanError) as caught:
        plan_setup(accounts(BASE, *(user(f"u{n}", 65600 + n, 0) for n in range(50))))
    assert caught.value.cause.endswith("and 45 more")


def test_a_range_base_that_can_log_in_is_refused() -> None:
    with pytest.raises(PlanError, match="can log in") as caught:
        plan_setup(accounts(BASE.replace(shell="/bin/bash"), KILLER))
    assert caught.value.fix == f"usermod --shell /usr/sbin/nologin {RANGE_BASE}"


@pytest.mark.parametrize(
    ("reaper", "why"),
    [(user(REAPER, 0), "root"), (user(REAPER, 65540), "in the range"), (user(REAPER, 90, shell="/bin/sh"), "log in")],
)
def test_a_reaper_that_is_there_but_wrong_is_refused(reaper: User, why: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_setup(accounts(BASE, reaper))
    assert why in f"{caught.value} {caught.value.cause}"


def test_a_group_of_the_name_in_a_bad_place_is_not_built_upon() -> None:
    with pytest.raises(PlanError) as caught:
        plan_setup(accounts(groups=(group(RANGE_BASE, 500),)))
    assert caught.value.fix == f"groupdel {RANGE_BASE}, then depriv setup"


def test_removal_takes_our_two_users_and_their_groups() -> None:
    assert plan_removal(accounts(BASE, KILLER, groups=GROUPS)) == (
        ("userdel", RANGE_BASE),
        ("groupdel", RANGE_BASE),
        ("userdel", REAPER),
        ("groupdel", REAPER),
    )


def test_removal_never_takes_a_user_that_somebody_else_made_or_that_has_another_name() -> None:
    theirs = user(RANGE_BASE, 131072, comment=",,,")
    assert plan_removal(accounts(theirs, user("vm1", 70000), groups=(group(RANGE_BASE, 131072),))) == ()


@pytest.mark.parametrize(
    "host",
    [
        accounts(KILLER, groups=(group(REAPER, 65537, "bob"),)),
        accounts(KILLER, user("bob", 1001, 65537), groups=(group(REAPER, 65537),)),
        accounts(KILLER, groups=(group(REAPER, 90),)),
    ],
)
def test_removal_leaves_a_group_that_others_use_or_that_is_another(host: Accounts) -> None:
    assert plan_removal(host) == (("userdel", REAPER),)


def test_a_process_with_an_id_is_found_and_others_are_not() -> None:
    own = os.getuid()
    assert os.getpid() in processes_with((range(own, own + 1),))
    assert processes_with((range(4000000000, 4000000005),)) == ()


def test_without_root_nothing_is_run() -> None:
    code = (
        "import os, sys\nif os.getuid() == 0: os.setgroups([]); os.setresgid(65533, 65533, 65533);"
        " os.setresuid(65533, 65533, 65533)\n"
        "from depriv import setup\nfrom depriv.errors import HostError\n"
        "try: setup._need_root('setup')\nexcept HostError as error: print(error.fix)\n"
    )
    src = os.path.dirname(os.path.dirname(sys.modules["depriv.setup"].__file__ or ""))
    # All is imported as ourselves: another user may not be able to read the source.
    code = "import depriv.setup\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": src}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "sudo depriv setup\n"


def test_a_missing_tool_is_an_error_before_anything_is_changed_and_has_busyboxs_lines() -> None:
    from depriv import setup

    commands = plan_setup(accounts())
    with pytest.raises(HostError, match="no depriv-groupadd") as caught:
        setup._need_tools(
            (("depriv-groupadd", "--gid", "65538", RANGE_BASE), *commands), by_hand=setup._busybox_lines(commands)
        )
    assert f"addgroup -g 65538 {RANGE_BASE}" in caught.value.fix
    assert f"adduser -S -D -H -h /nonexistent -s /sbin/nologin -g depriv -u 65537 -G {REAPER} {REAPER}" in (
        caught.value.fix
    )


def test_a_tool_that_fails_is_an_error_with_its_own_words() -> None:
    from depriv import setup

    with pytest.raises(HostError, match="failed with status 3") as caught:
        setup._run(("sh", "-c", "echo it is broken >&2; exit 3"))
    assert caught.value.cause == "it is broken"
