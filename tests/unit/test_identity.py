# SPDX-License-Identifier: Apache-2.0
"""Who a device model runs as: what is chosen, and everything that must be refused."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from depriv.errors import PlanError
from depriv.identity import (
    DOMID_LAST,
    RANGE_BASE,
    RANGE_COUNT,
    REAPER,
    SHARED,
    Accounts,
    Group,
    Identity,
    IdRange,
    User,
    choose,
    id_problem,
    ids_to_check,
    names_to_check,
    propose_base,
    propose_id,
    range_problems,
)

NOLOGIN = "/usr/sbin/nologin"
BASE = 131072
SYSTEMD = ((60001, 60513), (61184, 65519), (524288, 1879048191))


def user(name: str, uid: int, gid: int = -1, shell: str = NOLOGIN) -> User:
    return User(name=name, uid=uid, gid=uid if gid == -1 else gid, shell=shell, home="/nonexistent")


def group(name: str, gid: int, *members: str) -> Group:
    return Group(name=name, gid=gid, members=members)


ROOT = user("root", 0, shell="/bin/bash")
ALICE = user("alice", 1001, shell="/bin/bash")
RANGE = user(RANGE_BASE, BASE)
KILLER = user(REAPER, 120)


def accounts(*users: User, groups: tuple[Group, ...] = (), ranges: tuple[IdRange, ...] = ()) -> Accounts:
    return Accounts(
        users=(ROOT, ALICE, *users), groups=(group("root", 0), group("alice", 1001), *groups), ranges=ranges
    )


def from_range(host: Accounts, domid: int = 1, taken: tuple[tuple[str, int, int], ...] = ()) -> Identity:
    return choose(device_model_user="", domid=domid, accounts=host, taken=taken)


def named(host: Accounts, name: str, taken: tuple[tuple[str, int, int], ...] = ()) -> Identity:
    return choose(device_model_user=name, domid=1, accounts=host, taken=taken)


# What works


def test_the_address_of_xens_documents_gives_domain_n_base_plus_n_for_uid_and_gid() -> None:
    assert from_range(accounts(RANGE), 7) == Identity(uid=BASE + 7, gid=BASE + 7, reaper_uid=BASE, how="range")


def test_the_gid_counts_from_the_bases_own_gid() -> None:
    assert from_range(accounts(user(RANGE_BASE, BASE, 200001)), 7).gid == 200008


def test_the_last_domain_id_is_usable() -> None:
    assert from_range(accounts(RANGE), DOMID_LAST).uid == BASE + DOMID_LAST


def test_a_reaper_of_its_own_is_preferred_and_may_be_a_system_user() -> None:
    assert from_range(accounts(RANGE, KILLER)).reaper_uid == 120


def test_device_model_user_comes_before_the_range() -> None:
    found = named(accounts(RANGE, user("vm1", 70001, 70002)), "vm1")
    assert (found.uid, found.gid, found.how) == (70001, 70002, "user vm1")


def test_supplementary_groups_of_device_model_user_do_not_matter_because_they_are_dropped() -> None:
    host = accounts(RANGE, user("vm1", 70001), groups=(group("vm1", 70001), group("sudo", 27, "alice", "vm1")))
    assert named(host, "vm1").gid == 70001


def test_the_shared_user_is_shared_if_named_literally() -> None:
    host = accounts(RANGE, user(SHARED, 70001))
    assert named(host, SHARED, (("web1", 70001, 70001),)).how == f"shared {SHARED}"


def test_choose_has_all_it_asks_for_from_names_and_ids_to_check() -> None:
    host = accounts(RANGE, KILLER)
    assert names_to_check("vm1") == ("vm1", RANGE_BASE, REAPER)
    assert ids_to_check("", 7, host) == ((120, BASE, BASE + 7), (BASE + 7,))
    assert ids_to_check("alice", 7, host) == ((120, 1001, BASE), (1001,))


# The range: what must not work


def test_without_a_range_nobody_runs_as_root() -> None:
    with pytest.raises(PlanError, match=f"no user {RANGE_BASE}") as caught:
        from_range(accounts(KILLER))
    assert caught.value.fix == "depriv setup"


def test_the_shared_user_is_never_fallen_back_to() -> None:
    with pytest.raises(PlanError, match=f"no user {RANGE_BASE}") as caught:
        from_range(accounts(user(SHARED, 70001)))
    assert "only where device_model_user names it" in caught.value.cause


@pytest.mark.parametrize("domid", [-1, 0, DOMID_LAST + 1, 40000])
def test_a_domain_id_that_xen_does_not_have_is_refused(domid: int) -> None:
    with pytest.raises(PlanError, match=f"domain ID {domid} is outside 1-32751"):
        from_range(accounts(RANGE), domid)


@pytest.mark.parametrize(
    ("base", "domid", "why"),
    [
        (0, 1, "is root"),
        (110, 2000, "system users"),
        (59999, 2, "systemd-homed"),
        (59999, 515, "systemd-nspawn maps"),
        (61000, 184, "dynamic users"),
        (65530, 4, "nobody"),
        (65530, 5, "-1 in 16 bits"),
        (65530, 6, r"is 0 \(root\) where only 16 bits"),
        (100000, 31070, r"65534 \(nobody\) where only 16 bits"),
        (100000, 31071, r"65535 \(-1\) where only 16 bits"),
        (524287, 1, "container range"),
        (1879048190, 1, "container range"),
        (2147483646, 2, "negative where ids are signed"),
        (2**32 - 3, 1, "nobody in 32 bits"),
        (2**32 - 3, 2, "leave it as it is"),
        (2**32 - 3, 3, "does not fit into 32 bits"),
    ],
)
def test_a_dangerous_id_of_the_range_is_refused_with_the_reason(base: int, domid: int, why: str) -> None:
    with pytest.raises(PlanError, match=why) as caught:
        from_range(accounts(user(RANGE_BASE, base), KILLER), domid)
    assert f"usermod --uid 65538 --gid 65538 {RANGE_BASE}" in caught.value.fix


def test_a_range_base_in_nogroup_is_refused_for_its_gid() -> None:
    with pytest.raises(PlanError, match="gid 65534") as caught:
        from_range(accounts(user(RANGE_BASE, BASE, 65534)))
    assert f"groupadd --gid 65538 {RANGE_BASE}" in caught.value.fix


@pytest.mark.parametrize(
    ("host", "owner"),
    [
        (accounts(RANGE, user("bob", BASE + 1, 100)), "user bob"),
        (accounts(RANGE, user("bob", 1002, BASE + 1)), "primary group of bob"),
        (accounts(RANGE, groups=(group("staff", BASE + 1),)), "group staff"),
        (accounts(RANGE, user(REAPER, BASE + 1)), f"user {REAPER}"),
    ],
)
def test_an_id_that_is_somebodys_is_refused(host: Accounts, owner: str) -> None:
    with pytest.raises(PlanError, match=owner):
        from_range(host)


def test_the_address_of_xens_documents_is_refused_where_debian_gave_it_away_as_subuid() -> None:
    host = accounts(RANGE, ranges=(IdRange(start=100000, count=65536, owner="subuid of alice"),))
    with pytest.raises(PlanError, match=r"uid 131073 .* subuid of alice \(100000-165535\)"):
        from_range(host)


def test_a_gid_inside_a_subgid_range_is_refused() -> None:
    host = accounts(user(RANGE_BASE, 200000, 300000), ranges=(IdRange(start=300001, count=1, owner="subgid of alice"),))
    with pytest.raises(PlanError, match=r"gid 300001 .* subgid of alice"):
        from_range(host)


def test_two_entries_of_one_name_with_different_ids_are_refused() -> None:
    with pytest.raises(PlanError, match="more than once"):
        from_range(accounts(RANGE, user(RANGE_BASE, 200001)))


# device_model_user: what must not work


def test_an_unknown_user_is_refused_with_the_commands_that_make_it() -> None:
    with pytest.raises(PlanError, match="no such user") as caught:
        named(accounts(RANGE), "vm1")
    assert caught.value.fix.startswith("groupadd --gid 65537 vm1 && useradd --system --uid 65537")


def test_a_name_that_a_shell_would_read_never_gets_into_a_command() -> None:
    with pytest.raises(PlanError) as caught:
        named(accounts(RANGE), "vm1; reboot")
    assert "useradd" not in caught.value.fix


def test_root_by_name_and_by_another_name_is_refused() -> None:
    for name in ("root", "toor"):
        with pytest.raises(PlanError, match="is root"):
            named(accounts(RANGE, user("toor", 0)), name)


def test_a_system_user_is_refused_and_can_be_renumbered() -> None:
    with pytest.raises(PlanError, match="uid 105 is of the range 1-999, system users") as caught:
        named(accounts(RANGE, user("xen-vm1", 105), groups=(group("xen-vm1", 105),)), "xen-vm1")
    first, commands = caught.value.fix.splitlines()
    assert commands == "groupmod --gid 65537 xen-vm1 && usermod --uid 65537 --gid 65537 xen-vm1"
    assert first.endswith("if that user was made for this domain alone:"), "it may as well be a daemon's"


def test_a_user_in_nogroup_is_refused_and_gets_a_group() -> None:
    with pytest.raises(PlanError, match="gid 65534 is nobody") as caught:
        named(accounts(RANGE, user("vm1", 70001, 65534)), "vm1")
    assert caught.value.fix.startswith("groupadd --gid 65537 vm1 && ")


@pytest.mark.parametrize("shell", ["/bin/bash", "", "/usr/bin/false-not", "/bin/sync"])
def test_a_user_that_can_log_in_is_refused(shell: str) -> None:
    with pytest.raises(PlanError, match="can log in") as caught:
        named(accounts(RANGE, user("vm1", 70001, shell=shell)), "vm1")
    assert caught.value.fix == "usermod --shell /usr/sbin/nologin vm1"


def test_a_uid_with_two_names_is_refused() -> None:
    with pytest.raises(PlanError, match="also that of vm2"):
        named(accounts(RANGE, user("vm1", 70001), user("vm2", 70001)), "vm1")


@pytest.mark.parametrize("members", [("alice",), ("somebody-of-ldap",)])
def test_a_primary_group_with_people_in_it_is_refused(members: tuple[str, ...]) -> None:
    host = accounts(RANGE, user("vm1", 70001), groups=(group("vm1", 70001, "vm1"), group("alias", 70001, *members)))
    with pytest.raises(PlanError, match=f"also that of {members[0]}"):
        named(host, "vm1")


def test_a_primary_group_that_is_also_a_persons_primary_group_is_refused() -> None:
    with pytest.raises(PlanError, match="also that of alice"):
        named(accounts(RANGE, user("vm1", 70001, 1001)), "vm1")


def test_a_user_inside_a_subuid_range_is_refused() -> None:
    host = accounts(RANGE, user("vm1", 70001), ranges=(IdRange(start=70000, count=2, owner="subuid of alice"),))
    with pytest.raises(PlanError, match="uid 70001 belongs to subuid of alice"):
        named(host, "vm1")


@pytest.mark.parametrize("name", [RANGE_BASE, REAPER])
def test_the_users_that_kill_never_run_a_device_model(name: str) -> None:
    with pytest.raises(PlanError, match="must not run one"):
        named(accounts(RANGE, user(REAPER, 70001)), name)


# Other domains: what must not work


def test_a_uid_of_another_live_domain_is_refused_and_the_domain_named() -> None:
    with pytest.raises(PlanError, match="uid 70001 is already that of the device model of web1"):
        named(accounts(RANGE, user("vm1", 70001)), "vm1", (("web1", 70001, 70009),))


def test_a_gid_of_another_live_domain_is_refused_for_the_shared_user_too() -> None:
    with pytest.raises(PlanError, match="gid 70001 is already"):
        named(accounts(RANGE, user(SHARED, 70001)), SHARED, (("web1", 70002, 70001),))


def test_an_id_of_the_range_that_a_live_domain_has_is_refused() -> None:
    with pytest.raises(PlanError, match="already"):
        from_range(accounts(RANGE), 1, (("web1", BASE + 1, BASE + 1),))


# The reaper: what must not work


def test_without_a_reaper_nothing_starts() -> None:
    with pytest.raises(PlanError, match=f"no user {REAPER}"):
        named(accounts(user("vm1", 70001)), "vm1")


@pytest.mark.parametrize(
    ("reaper", "why"),
    [
        (user(REAPER, 0), "is root"),
        (user(REAPER, 65534), "nobody"),
        (user(REAPER, 2**32 - 1), "leave it as it is"),
        (user(REAPER, 61200), "dynamic users"),
        (user(REAPER, 120, shell="/bin/sh"), "can log in"),
        (user(REAPER, 1001), "shares uid 1001 with alice"),
        (user(REAPER, BASE + 5), "that of domain 5"),
        (user(REAPER, 300007), "subuid of alice"),
    ],
)
def test_a_reaper_that_could_kill_more_than_device_models_is_refused(reaper: User, why: str) -> None:
    host = accounts(RANGE, reaper, ranges=(IdRange(start=300000, count=9, owner="subuid of alice"),))
    with pytest.raises(PlanError, match=why):
        from_range(host)


def test_the_reaper_is_never_the_device_model() -> None:
    with pytest.raises(PlanError, match="uid 70001 is also that of"):
        named(accounts(RANGE, user(REAPER, 70001), user("vm1", 70001)), "vm1")
    with pytest.raises(ValueError, match="own reaper"):
        Identity(uid=70001, gid=70001, reaper_uid=70001, how="user vm1")


def test_the_reaper_is_never_another_live_domain() -> None:
    with pytest.raises(PlanError, match=r"reaper's uid 70005 .* web1"):
        from_range(accounts(RANGE, user(REAPER, 70005)), 1, (("web1", 70005, 70006),))


@pytest.mark.parametrize("field", ["uid", "gid", "reaper_uid"])
def test_an_identity_of_root_cannot_even_be_written_down(field: str) -> None:
    with pytest.raises(ValueError, match="never run as root"):
        Identity(uid=70001, gid=70001, reaper_uid=120, how="range").replace(**{field: 0})


# Any host


_ids = st.one_of(
    st.integers(0, 2**32 + 40000),
    st.sampled_from([0, 999, 1000, 1001, 60000, 61183, 65519, 65530, 65533, 65537, 98304, BASE, 524000, 524287]),
    st.integers(65500, 65600),
    st.integers(BASE - 5, BASE + 20),
)
_names = st.sampled_from(["a", "b", "root", RANGE_BASE, REAPER, SHARED])
_users = st.builds(user, _names, _ids, _ids, st.sampled_from([NOLOGIN, NOLOGIN, NOLOGIN, "/bin/sh", ""]))
_groups = st.builds(lambda name, gid, members: group(name, gid, *members), _names, _ids, st.lists(_names, max_size=2))
_ranges = st.builds(IdRange, start=_ids, count=st.integers(1, 70000), owner=st.just("subuid of a"))
_hosts = st.builds(
    Accounts,
    users=st.lists(_users, max_size=5).map(tuple),
    groups=st.lists(_groups, max_size=3).map(tuple),
    ranges=st.lists(_ranges, max_size=2).map(tuple),
)
_taken = st.lists(st.tuples(st.just("other"), _ids, _ids), max_size=3).map(tuple)
_domids = st.one_of(st.integers(1, 20), st.integers(-1, 40000))


@given(host=_hosts, name=st.one_of(st.just(""), _names), domid=_domids, taken=_taken)
@example(host=accounts(RANGE), name="", domid=1, taken=())
@example(host=accounts(RANGE, user("a", 70001)), name="a", domid=1, taken=())
@example(host=accounts(user(RANGE_BASE, 98304), KILLER), name="", domid=32767, taken=())
def test_no_host_makes_a_dangerous_identity(
    host: Accounts, name: str, domid: int, taken: tuple[tuple[str, int, int], ...]
) -> None:
    try:
        found = choose(device_model_user=name, domid=domid, accounts=host, taken=taken)
    except PlanError:
        return
    for number in (found.uid, found.gid):
        assert 1000 <= number < 2**31
        assert 0 < number & 0xFFFF < 65534
        assert not any(first <= number <= last for first, last in SYSTEMD)
        assert not any(owned.start <= number < owned.start + owned.count for owned in host.ranges)
    assert found.reaper_uid not in (0, found.uid, 65534, 65535, 2**32 - 2, 2**32 - 1)
    assert all(entry.name == name for entry in host.users if entry.uid == found.uid)
    if name != SHARED:
        assert not any(found.uid == uid or found.gid == gid for _other, uid, gid in taken)
    assert not any(found.reaper_uid == uid for _other, uid, _gid in taken)
    assert {entry.shell for entry in host.users if entry.uid == found.reaper_uid} == {NOLOGIN}


@given(host=_hosts)
def test_a_proposed_range_has_no_problem_and_room_for_the_reaper(host: Accounts) -> None:
    base = propose_base(host)
    assert range_problems(host, uid=base, gid=base) == ()
    assert base & 0xFFFF
    assert not id_problem(base - 1)
    taken = (
        {entry.uid for entry in host.users} | {entry.gid for entry in host.users} | {entry.gid for entry in host.groups}
    )
    assert base - 1 not in taken
    assert propose_base(host) == base


# Proposals


def test_the_range_proposed_on_an_empty_host_lies_below_the_subordinate_ids() -> None:
    assert propose_base(accounts()) == 65538
    assert propose_base(accounts()) + RANGE_COUNT <= 100000


def test_a_proposed_range_lies_beside_what_is_there() -> None:
    host = accounts(user("x", 80000), ranges=(IdRange(start=100000, count=65536, owner="subuid of alice"),))
    assert propose_base(host) == 3 * 65536 + 2  # 165536 + 32753 would cross a multiple of 2^16
    assert propose_base(accounts(user("x", 80000))) == 80002


def test_a_host_without_a_gap_is_told_so() -> None:
    everything = IdRange(start=0, count=2**32, owner="subuid of alice")
    with pytest.raises(PlanError, match="no 32752 free uids"):
        propose_base(accounts(ranges=(everything,)))
    assert propose_id(accounts(ranges=(everything,))) == 0


def test_a_proposed_id_is_outside_the_range() -> None:
    assert propose_id(accounts(user(RANGE_BASE, 65537))) == 65537 + RANGE_COUNT


def test_the_range_of_xens_documents_has_no_problem() -> None:
    assert range_problems(accounts(RANGE), uid=BASE, gid=BASE) == ()


@pytest.mark.parametrize(
    ("host", "base", "why"),
    [
        (accounts(user("bob", BASE + 9)), BASE, "uid 131081 in the range is bob's"),
        (accounts(user("bob", 1002, BASE + 9)), BASE, "primary group of bob"),
        (accounts(groups=(group("staff", BASE + 9),)), BASE, "group staff"),
        (accounts(), 100000, "131070, which is 65534"),
        (accounts(), 30000, "systemd's dynamic users"),
        (accounts(), 500000, "systemd's container range"),
        (accounts(), 0, "root"),
        (accounts(ranges=(IdRange(start=1, count=BASE + 1, owner="subuid of alice"),)), BASE, "subuid of alice"),
    ],
)
def test_what_lies_in_a_range_is_named(host: Accounts, base: int, why: str) -> None:
    assert why in "\n".join(range_problems(host, uid=base, gid=base))
