# SPDX-License-Identifier: Apache-2.0
"""Reading passwd, group, subuid, subgid and NSS: real files, good and bad."""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING

import pytest

from depriv.accounts import accounts_for, ask_nss, merge, read_accounts
from depriv.errors import HostError, PlanError
from depriv.identity import RANGE_BASE, Accounts, Group, IdRange, User, choose

if TYPE_CHECKING:
    from pathlib import Path

PASSWD = f"""\
root:x:0:0:root:/root:/bin/bash
alice:x:1001:1001:Alice,,,:/home/alice:/bin/sh
{RANGE_BASE}:x:65538:65538:depriv:/nonexistent:/usr/sbin/nologin
"""
GROUP = "root:x:0:\nsudo:x:27:alice,bob\nalice:x:1001:\n"


def tree(path: Path, **files: str | bytes) -> str:
    for name, text in {"passwd": PASSWD, "group": GROUP, **files}.items():
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_every_field_of_passwd_that_matters_is_read(tmp_path: Path) -> None:
    users = read_accounts(names=(), etc=tree(tmp_path)).users
    alice = User(name="alice", uid=1001, gid=1001, shell="/bin/sh", home="/home/alice", comment="Alice,,,")
    assert [user.name for user in users] == ["root", "alice", RANGE_BASE]
    assert users[1] == alice


def test_groups_have_their_members(tmp_path: Path) -> None:
    groups = read_accounts(names=(), etc=tree(tmp_path)).groups
    assert groups[1] == Group(name="sudo", gid=27, members=("alice", "bob"))
    assert groups[0].members == ()


def test_subordinate_ids_of_users_and_groups_are_ranges_with_an_owner(tmp_path: Path) -> None:
    etc = tree(tmp_path, subuid="alice:100000:65536\n1005:300000:1\n", subgid="alice:100000:65536\n")
    assert read_accounts(names=(), etc=etc).ranges == (
        IdRange(start=100000, count=65536, owner="subuid of alice"),
        IdRange(start=300000, count=1, owner="subuid of 1005"),
        IdRange(start=100000, count=65536, owner="subgid of alice"),
    )


def test_a_missing_subuid_is_empty(tmp_path: Path) -> None:
    assert read_accounts(names=(), etc=tree(tmp_path)).ranges == ()


def test_the_identity_of_a_domain_comes_out_of_files(tmp_path: Path) -> None:
    found = accounts_for(device_model_user="", domid=7, etc=tree(tmp_path))
    assert choose(device_model_user="", domid=7, accounts=found, taken=()).uid == 65545


def test_nss_tells_about_names_ids_and_members() -> None:
    root = pwd.getpwuid(0)
    found = ask_nss(names=("root",), uids=(0,), gids=(0,))
    assert [(user.name, user.uid, user.shell) for user in found.users] == [(root.pw_name, 0, root.pw_shell)]
    assert found.groups[0].gid == 0


def test_what_files_and_nss_both_know_is_there_once() -> None:
    real = read_accounts(names=("root",), uids=(0,), gids=(0,))
    assert [user.uid for user in real.users].count(0) == [user.uid for user in merge(real, real).users].count(0)
    assert len(set(real.users)) == len(real.users)


def test_ten_thousand_users_are_read_without_a_visible_wait(tmp_path: Path) -> None:
    lines = "".join(f"user{n}:x:{n}:{n}::/home/user{n}:/bin/sh\n" for n in range(2000, 12000))
    before = os.times().user
    found = read_accounts(names=(), etc=tree(tmp_path, passwd=lines))
    assert len(found.users) == 10000
    assert os.times().user - before < 0.5


# What must not work


@pytest.mark.parametrize(
    "line",
    [
        "",
        "# comment",
        "+nis:x:5:5::/:/bin/sh",
        "-nis:x:5:5::/:/bin/sh",
        ":x:5:5::/:/bin/sh",
        "bad:x:five:5::/:/bin/sh",
        "bad:x:-5:5::/:/bin/sh",
        "bad:x:\u0665:5::/:/bin/sh",
        "bad:x:99999999999:5::/:/bin/sh",
        "bad:x:5",
        "bad",
    ],
)
def test_a_malformed_line_is_skipped_and_the_next_is_read(tmp_path: Path, line: str) -> None:
    etc = tree(tmp_path, passwd=f"{line}\nlast:x:7:7::/:/bin/sh\n", group=f"{line}\nlast:x:7:\n", subuid=f"{line}\n")
    found = read_accounts(names=(), etc=etc)
    assert [user.name for user in found.users] == ["last"]
    assert "last" in [group.name for group in found.groups]


def test_an_entry_without_a_shell_counts_as_a_login(tmp_path: Path) -> None:
    etc = tree(tmp_path, passwd=f"{PASSWD}vm1:x:70001:70001\n")
    with pytest.raises(PlanError, match="can log in: its shell is /bin/sh"):
        choose(device_model_user="vm1", domid=1, accounts=read_accounts(names=(), etc=etc), taken=())


def test_bytes_that_are_no_text_do_not_hide_the_users_behind_them(tmp_path: Path) -> None:
    etc = tree(tmp_path, passwd=b"odd\xff:x:5:5:\xfe:/:/bin/sh\nlast:x:7:7::/:/bin/sh\n")
    assert [user.uid for user in read_accounts(names=(), etc=etc).users] == [5, 7]


def test_an_empty_subordinate_range_and_a_broken_one_own_nothing(tmp_path: Path) -> None:
    etc = tree(tmp_path, subuid="alice:5:0\nalice:5\nalice::5\nalice:5:5:5\n")
    assert read_accounts(names=(), etc=etc).ranges == ()


@pytest.mark.parametrize("name", ["passwd", "group"])
def test_a_host_without_its_users_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    etc = tree(tmp_path)
    os.unlink(f"{etc}/{name}")
    with pytest.raises(HostError, match=f"there is no {etc}/{name}"):
        read_accounts(names=(), etc=etc)


def test_a_file_that_cannot_be_read_is_an_error_and_not_an_empty_host(tmp_path: Path) -> None:
    etc = tree(tmp_path)
    (tmp_path / "subuid").mkdir()
    with pytest.raises(HostError, match=f"cannot read {etc}/subuid"):
        read_accounts(names=(), etc=etc)


def test_nobody_whom_nss_does_not_know_is_made_up() -> None:
    nobody = ask_nss(names=("no-such-user-here", "nul\0name"), uids=(2**32 + 5, 1234567891), gids=(1234567891,))
    assert nobody == Accounts(users=(), groups=(), ranges=())


def test_nss_says_nothing_about_another_etc(tmp_path: Path) -> None:
    found = read_accounts(names=("daemon",), uids=(1,), etc=tree(tmp_path))
    assert "daemon" not in [user.name for user in found.users]


def test_a_user_that_files_and_nss_see_differently_is_refused() -> None:
    files = Accounts(users=(User(name="vm1", uid=70001, gid=70001, shell="", home=""),), groups=(), ranges=())
    ldap = Accounts(users=(files.users[0].replace(uid=70002),), groups=(), ranges=())
    with pytest.raises(PlanError, match="vm1 exists more than once"):
        choose(device_model_user="vm1", domid=1, accounts=merge(files, ldap), taken=())
