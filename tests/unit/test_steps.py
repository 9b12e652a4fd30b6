# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of plans is closed, and every word of it can be read by a person."""

from __future__ import annotations

import pytest
from hypothesis import given
from tests.support.plans import ANY_STEP, TEXT, valid_plan

from depriv import steps
from depriv.jail import apply
from depriv.records import Record
from depriv.steps import describe


def test_all_lists_every_step_of_the_module_once() -> None:
    kinds = {
        value
        for value in vars(steps).values()
        if isinstance(value, type) and issubclass(value, Record) and value.__module__ == steps.__name__
    }
    assert kinds - {steps.Plan} == set(steps.ALL)
    assert len(steps.ALL) == len(set(steps.ALL))


@given(ANY_STEP)
def test_every_step_is_described_in_one_line_that_is_not_empty(step: steps.Step) -> None:
    text = describe(step)
    assert text
    assert isinstance(text, str)


def test_steps_of_a_plan_are_told_apart_by_their_descriptions() -> None:
    plan = valid_plan(accel="kvm")
    lines = [describe(step) for step in (*plan.steps, *plan.after)]
    assert len(lines) == len(set(lines))
    assert not [line for line in lines if "\n" in line]


@pytest.mark.parametrize("kind", steps.ALL, ids=lambda kind: kind.__name__)
def test_description_changes_with_every_field_that_names_something(kind: type[Record]) -> None:
    """An error names its step by this line: two that differ in an object must not read the same."""
    shown = {"path", "source", "target", "mountpoint", "role", "name", "namespaces", "numbers", "detach", "remove"}
    shown.add("devices")
    hidden = {("CopyFile", "uid"), ("CopyFile", "gid")}
    values: dict[str, object] = {"int": 5, "str": "a", "tuple[int, ...]": (5,), "tuple[str, ...]": ("a",)}
    others: dict[str, object] = {"int": 6, "str": "b", "tuple[int, ...]": (6,), "tuple[str, ...]": ("b",)}
    values["bool"], others["bool"] = False, True
    made = kind(**{name: values[text] for name, text in kind.fields.items()})
    for name, text in kind.fields.items():
        if name in shown and (kind.__name__, name) not in hidden:
            assert describe(made.replace(**{name: others[text]})) != describe(made), name  # type: ignore[arg-type] # one of ALL


def test_descriptor_that_qemu_does_not_get_is_said_to_stay_in_the_jail() -> None:
    step = steps.OpenFile(role="kernel", path="/boot/vmlinuz", access="ro", kind="file", number=-1)
    assert describe(step).endswith("kept by the jail")
    assert describe(step.replace(number=4)).endswith("as descriptor 4")


def test_descriptor_that_is_taken_is_named_by_its_number_on_both_sides() -> None:
    step = steps.TakeFd(role="net0", source=7, number=30)
    assert describe(step) == "take the toolstack's descriptor 7 for net0, as descriptor 30"
    assert describe(step.replace(number=-1)).endswith("kept by the jail")


def test_filter_is_described_by_its_length() -> None:
    assert describe(steps.Filter(program="060000000000ff7f" * 3)) == "load a seccomp filter of 3 instructions"


def test_limit_that_is_none_reads_so() -> None:
    assert describe(steps.SetLimit(name="AS", value=-1)) == "limit AS to unlimited"
    assert describe(steps.SetLimit(name="AS", value=0)) == "limit AS to 0"


def test_fields_have_only_types_that_the_wire_knows() -> None:
    known = {"int", "str", "bool", "tuple[int, ...]", "tuple[str, ...]"}
    assert {text for kind in steps.ALL for text in kind.fields.values()} <= known


def test_jail_has_one_function_for_every_step_and_no_other() -> None:
    assert apply.ACTS.keys() == set(steps.ALL)
    assert len(set(apply.ACTS.values())) == len(steps.ALL)


@given(TEXT)
def test_steps_are_frozen_whatever_they_hold(text: str) -> None:
    step = steps.SetHostname(name=text)
    with pytest.raises(AttributeError, match="frozen"):
        step.name = "other"  # type: ignore[misc] # what the type checker refuses has to fail at run time, too
