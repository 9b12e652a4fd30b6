# SPDX-License-Identifier: Apache-2.0
"""A valid plan only loses privilege: whatever is dropped from it, doubled, moved or weakened, the check refuses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.plans import ANY_PLAN, valid_plan

from depriv import steps
from depriv.check import SANDBOX, check
from depriv.steps import (
    BecomeInit,
    BindTree,
    DropCapabilities,
    EmptyRoot,
    Execute,
    Filter,
    ListenUnix,
    MakeCgroup,
    MakeFifo,
    MakeNode,
    MakePrivate,
    MakeRoot,
    NewUser,
    NoNewPrivs,
    OpenFile,
    PivotRoot,
    Plan,
    Reap,
    SetHostname,
    SetIds,
    SetLimit,
    TakeFd,
    Unshare,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from typing import Any

    from depriv.records import Record

PLAN = valid_plan(accel="kvm")
BARE = valid_plan(restricted=False)
# What takes something away. The rest gives QEMU what it needs; without it QEMU has less, not more.
RESTRICTIONS = (
    *(Reap, MakeCgroup, Unshare, MakeRoot, PivotRoot, SetHostname, BecomeInit, SetLimit, NewUser, DropCapabilities),
    *(SetIds, NoNewPrivs, Filter),
)


def places(kind: type[Record] | tuple[type[Record], ...], plan: Plan = PLAN) -> list[int]:
    return [place for place, step in enumerate(plan.steps) if isinstance(step, kind)]


def refused(plan: Plan) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        check(plan)
    return str(caught.value)


def changed(kind: type[Record], plan: Plan = PLAN, /, **values: Any) -> Plan:
    """Return the plan with its first step of ``kind`` changed."""
    place = places(kind, plan)[0]
    step: Any = plan.steps[place]
    return plan.replace(steps=(*plan.steps[:place], step.replace(**values), *plan.steps[place + 1 :]))


def argv(change: Callable[[list[str]], object]) -> Plan:
    """Return the plan with QEMU's command line changed."""
    act = PLAN.steps[-1]
    assert isinstance(act, Execute)
    words = list(act.argv)
    change(words)
    return changed(Execute, argv=tuple(words))


@pytest.mark.parametrize("accel", ["tcg", "kvm"])
@pytest.mark.parametrize("restricted", [True, False])
def test_plans_of_the_planner_are_accepted(accel: str, *, restricted: bool) -> None:
    check(valid_plan(restricted=restricted, accel=accel))


@given(st.sampled_from(places((*RESTRICTIONS, Execute))))
def test_plan_without_one_of_its_restrictions_is_refused(place: int) -> None:
    refused(PLAN.replace(steps=PLAN.steps[:place] + PLAN.steps[place + 1 :]))


@given(st.sampled_from(places((*RESTRICTIONS, Execute))))
def test_plan_with_a_restriction_twice_is_refused(place: int) -> None:
    refused(PLAN.replace(steps=PLAN.steps[: place + 1] + PLAN.steps[place:]))


@given(st.sampled_from(places((OpenFile, TakeFd, ListenUnix, MakeFifo))))
def test_descriptor_given_twice_is_refused(place: int) -> None:
    step = PLAN.steps[place]
    if isinstance(step, OpenFile) and step.number < 0:
        return
    assert "descriptors" in refused(PLAN.replace(steps=PLAN.steps[: place + 1] + PLAN.steps[place:]))


@given(st.randoms(use_true_random=False))
def test_plan_in_another_order_is_refused(rng: random.Random) -> None:
    """The order of the steps that fill the root, and of the limits among themselves, is the planner's own affair."""
    shuffled = list(PLAN.steps)
    rng.shuffle(shuffled)
    ranks = [rank(step) for step in shuffled]
    if ranks != sorted(ranks):
        assert "order" in refused(PLAN.replace(steps=tuple(shuffled)))


def rank(step: object) -> int:
    low, high = steps.ALL.index(steps.MakeDir), steps.ALL.index(steps.CopyFile)
    place = steps.ALL.index(type(step))
    return low if low <= place <= high else place


@pytest.mark.parametrize("place", range(len(PLAN.steps) - 1))
def test_two_neighbours_of_different_rank_cannot_change_places(place: int) -> None:
    first, second = PLAN.steps[place : place + 2]
    swapped = PLAN.replace(steps=(*PLAN.steps[:place], second, first, *PLAN.steps[place + 2 :]))
    if rank(first) == rank(second):
        check(swapped)
    else:
        assert "order" in refused(swapped)


def test_nothing_follows_execute() -> None:
    refused(PLAN.replace(steps=(*PLAN.steps, PLAN.after[0])))
    refused(PLAN.replace(steps=PLAN.steps[:-1]))


@pytest.mark.parametrize("name", steps.NAMESPACES)
def test_no_namespace_can_be_left_out(name: str) -> None:
    rest = tuple(other for other in steps.NAMESPACES if other != name)
    assert name in refused(changed(Unshare, namespaces=rest))
    refused(changed(Unshare, namespaces=(*rest, "user")))


def test_only_the_network_is_kept_and_only_where_the_plan_says_so_to_everybody() -> None:
    rest = tuple(name for name in steps.NAMESPACES if name != "net")
    check(changed(Unshare, namespaces=rest).replace(keep_net=True))
    refused(changed(Unshare, namespaces=rest))
    refused(PLAN.replace(keep_net=True))  # it says so, and does otherwise
    for name in rest:
        fewer = tuple(other for other in rest if other != name)
        assert name in refused(changed(Unshare, namespaces=fewer).replace(keep_net=True))


@pytest.mark.parametrize(
    "value",
    ["off", "on", SANDBOX.replace("spawn=deny", "spawn=allow"), SANDBOX.replace("obsolete=deny,", ""), SANDBOX + ",x"]
    + [SANDBOX.replace("elevateprivileges=deny", f"elevateprivileges={word}") for word in ("allow", "children")],
)
def test_sandbox_of_qemu_cannot_be_weakened(value: str) -> None:
    def weaken(words: list[str]) -> None:
        words[words.index(SANDBOX)] = value

    assert "-sandbox" in refused(argv(weaken))


@pytest.mark.parametrize("option", ["-sandbox", "-no-user-config", "-S"])
def test_option_that_protects_cannot_be_dropped_or_given_twice(option: str) -> None:
    refused(argv(lambda words: words.remove(option)))
    refused(argv(lambda words: words.append(option)))


def test_network_that_qemu_makes_by_itself_is_refused() -> None:
    """Without any of these it has a card, and behind it a network of its own making (user, by libslirp)."""

    def instead(*more: str) -> Callable[[list[str]], None]:
        def change(words: list[str]) -> None:
            words.remove("-nodefaults")
            words.extend(more)

        return change

    assert "network" in refused(argv(instead()))
    refused(argv(instead("-append", "-nodefaults")))  # for the guest's kernel
    for words in (("-nic", "none"), ("-net", "none"), ("-netdev", "hubport,id=n,hubid=0")):
        check(argv(instead(*words)))


def test_qemu_for_xen_is_built_without_a_sandbox_but_one_that_is_named_denies_all() -> None:
    """Debian's has no libseccomp. Our own filter is in the plan all the same."""

    def without(words: list[str]) -> None:
        at = words.index("-sandbox")
        words[at : at + 2] = ["-xen-domid-restrict"]

    check(argv(without))
    place = places(Filter)[0]
    plan = argv(without)
    assert "Filter" in refused(plan.replace(steps=plan.steps[:place] + plan.steps[place + 1 :]))

    def weak(words: list[str]) -> None:
        words[words.index(SANDBOX)] = "on"
        words.append("-xen-domid-restrict")

    assert "-sandbox" in refused(argv(weak))


def test_sandbox_as_the_last_word_is_refused() -> None:
    def weaken(words: list[str]) -> None:
        at = words.index("-sandbox")
        del words[at : at + 2]
        words.append("-sandbox")

    refused(argv(weaken))


@pytest.mark.parametrize("plan", [PLAN, BARE], ids=["restricted", "unrestricted"])
@pytest.mark.parametrize("uid", [0, 1, 999, -1, 65534, 65535, 2**32 - 2, 2**32 - 1, 2**32, 2**64])
def test_dangerous_id_is_refused_wherever_it_stands(plan: Plan, uid: int) -> None:
    for place, step in enumerate(plan.steps):
        for name in ("uid", "gid", "reaper_uid"):
            device = isinstance(step, steps.MakeNode | steps.CopyFile) and uid == 0
            reaper = name == "reaper_uid" and uid in (1, 999)  # it runs no QEMU: a system user will do
            if name in step.as_dict() and not device and not reaper:
                made: Any = step
                weak = (*plan.steps[:place], made.replace(**{name: uid}), *plan.steps[place + 1 :])
                refused(plan.replace(steps=weak))


@pytest.mark.parametrize("plan", [PLAN, BARE], ids=["restricted", "unrestricted"])
@pytest.mark.parametrize("kind", [Reap, SetIds])
def test_two_uids_in_one_plan_are_refused(plan: Plan, kind: type[Record]) -> None:
    refused(changed(kind, plan, uid=70000))


def test_gid_of_somebody_else_is_refused() -> None:
    refused(changed(Reap, gid=70000))
    refused(changed(SetIds, gid=70000))
    refused(changed(NewUser, gid=70000))


def test_reaper_that_its_targets_could_kill_is_refused() -> None:
    (place,) = places(Reap)
    step = PLAN.steps[place]
    assert isinstance(step, Reap)
    assert "killed first" in refused(changed(Reap, reaper_uid=step.uid))


@pytest.mark.parametrize("uid", [1, 112, 999])
def test_reaper_may_be_a_system_user(uid: int) -> None:
    check(changed(Reap, reaper_uid=uid))


def test_uid_is_reaped_unless_it_is_shared() -> None:
    (place,) = places(Reap)
    rest = PLAN.steps[:place] + PLAN.steps[place + 1 :]
    check(PLAN.replace(steps=rest, shared=True))
    assert "reaped" in refused(PLAN.replace(steps=rest))
    assert "reaped" in refused(PLAN.replace(shared=True))  # it would kill the other domain


@pytest.mark.parametrize("name", [step.name for step in PLAN.steps if isinstance(step, SetLimit)])
def test_every_limit_is_set_once(name: str) -> None:
    rest = tuple(step for step in PLAN.steps if not (isinstance(step, SetLimit) and step.name == name))
    assert name in refused(PLAN.replace(steps=rest))
    renamed = tuple(
        step.replace(name="RSS") if isinstance(step, SetLimit) and step.name == name else step for step in PLAN.steps
    )
    assert name in refused(PLAN.replace(steps=renamed))


BAD_PATHS = ("", "relative", "./x", "/a/../b", "/a/./b", "/..", "/a\0b", "a/b")


@pytest.mark.parametrize("path", BAD_PATHS)
def test_path_that_is_not_absolute_and_plain_is_refused_wherever_it_stands(path: str) -> None:
    for place, step in enumerate(PLAN.steps):
        for name in ("path", "source", "mountpoint", "lock"):
            if isinstance(step.as_dict().get(name), str):
                made: Any = step
                weak = (*PLAN.steps[:place], made.replace(**{name: path}), *PLAN.steps[place + 1 :])
                refused(PLAN.replace(steps=weak))
    refused(changed(BindTree, target=path))
    empty = PLAN.after[0]
    assert isinstance(empty, EmptyRoot)
    refused(PLAN.replace(after=(empty.replace(remove=(*empty.remove, path)),)))


def test_what_is_mounted_in_the_root_is_detached_again() -> None:
    empty = PLAN.after[0]
    assert isinstance(empty, EmptyRoot)
    refused(PLAN.replace(after=()))
    refused(PLAN.replace(after=(empty.replace(detach=empty.detach[1:]),)))
    refused(PLAN.replace(after=(empty.replace(detach=(*empty.detach, "/dev")),)))
    refused(changed(BindTree, target="/elsewhere"))
    refused(changed(MakePrivate, path="/elsewhere"))


@pytest.mark.parametrize("kind", [kind for kind in steps.ALL if kind is not EmptyRoot], ids=lambda kind: kind.__name__)
def test_only_emptying_the_root_is_done_after_the_start(kind: type[Record]) -> None:
    found = places(kind)
    assert found, f"the plan above has no {kind.__name__}"
    refused(PLAN.replace(after=(PLAN.steps[found[0]],)))
    refused(PLAN.replace(after=(*PLAN.after, PLAN.steps[found[0]])))


@pytest.mark.parametrize("number", [100, 101, 1 << 20])
def test_descriptor_where_the_jail_keeps_its_own_is_refused(number: int) -> None:
    assert "descriptors" in refused(changed(ListenUnix, number=number))


@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 2, 2), (0, 1, 2), (), (1, 2, 100), (1, 2, -1)])
def test_standard_descriptors_are_each_given_once(numbers: tuple[int, ...]) -> None:
    refused(changed(MakeFifo, numbers=numbers))


@pytest.mark.parametrize("change", [{"access": "w"}, {"access": ""}, {"kind": "directory"}, {"kind": "fifo"}])
def test_file_is_opened_in_a_known_way_only(change: dict[str, str]) -> None:
    assert "none we know" in refused(changed(OpenFile, **change))


def test_descriptor_of_the_toolstack_gets_a_number_of_qemus_own_or_none() -> None:
    check(changed(TakeFd, number=-1))  # kept in the jail, a source to copy from
    for number in (0, 3, 10, 100, 1 << 20):  # others', and the jail's
        assert "descriptors" in refused(changed(TakeFd, number=number))


@pytest.mark.parametrize("source", ["/dev", "/dev/pts/", "/usr", "/dev/pts/../shm", "/proc"])
def test_devices_are_bound_from_devpts_alone(source: str) -> None:
    refused(changed(BindTree, source=source, devices=True))
    check(changed(BindTree, source="/dev/pts", devices=True))


@pytest.mark.parametrize(
    ("path", "numbers"),
    [
        ("/dev/xen/privcmd", (10, 118)),
        ("/dev/xen/xenbus", (10, 1)),
        ("/dev/ptmx", (5, 2)),
        ("/dev/kvm", (10, 232)),
    ],
)
def test_node_is_one_that_some_device_model_needs(path: str, numbers: tuple[int, int]) -> None:
    major, minor = numbers
    place = places(MakeNode)[-1]
    node: Any = PLAN.steps[place]
    empty = PLAN.after[0]
    assert isinstance(empty, EmptyRoot)
    after = (empty.replace(remove=(*empty.remove, path)),)

    def made(**values: Any) -> Plan:
        step = node.replace(path=path, major=major, minor=minor).replace(**values)
        return PLAN.replace(steps=(*PLAN.steps[:place], step, *PLAN.steps[place + 1 :]), after=after)

    check(made())
    refused(made(major=8))
    refused(made(major=1, minor=1))  # /dev/mem
    refused(made(path="/dev/xen/gntalloc"))
    refused(made().replace(after=(empty.replace(remove=()),)))  # it would stay


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a\0b"])
def test_domain_without_a_plain_name_is_refused(name: str) -> None:
    assert "names no domain" in refused(PLAN.replace(domain=name))


def test_empty_plan_is_refused() -> None:
    assert "empty" in refused(PLAN.replace(steps=()))


def test_plan_that_only_reaps_has_nothing_else() -> None:
    (place,) = places(Reap)
    reap = PLAN.steps[place]
    check(PLAN.replace(steps=(reap,), after=()))
    refused(PLAN.replace(steps=(reap, reap), after=()))
    refused(PLAN.replace(steps=(reap,)))


@pytest.mark.parametrize("kind", [MakeCgroup, BecomeInit, DropCapabilities, SetIds, NoNewPrivs, Execute, Reap])
def test_without_dm_restrict_these_are_still_not_for_sale(kind: type[Record]) -> None:
    (place,) = places(kind, BARE)
    refused(BARE.replace(steps=BARE.steps[:place] + BARE.steps[place + 1 :]))
    refused(BARE.replace(steps=BARE.steps[: place + 1] + BARE.steps[place:]))


def test_unrestricted_plan_does_not_pass_for_a_restricted_one() -> None:
    refused(BARE.replace(restricted=True))


@given(ANY_PLAN)
def test_plan_of_arbitrary_steps_is_refused_in_one_sentence(plan: Plan) -> None:
    text = refused(plan)
    assert text
    assert "\n" not in text
