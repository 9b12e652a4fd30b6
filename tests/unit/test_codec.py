# SPDX-License-Identifier: Apache-2.0
"""The wire format: what is encoded comes back equal, and nothing but that is accepted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.plans import ANY_PLAN, ANY_STEP, valid_plan

from depriv import codec, steps
from depriv.steps import Plan, SetHostname, SetLimit, Unshare


def body(plan: Plan) -> bytes:
    head, _, text = codec.encode(plan).partition(b"\n")
    assert int(head) == len(text)
    return text


PLAN = Plan(
    domain="web1",
    domid=7,
    restricted=True,
    shared=False,
    steps=(Unshare(namespaces=("mnt", "net")), SetLimit(name="AS", value=-1)),
    after=(SetHostname(name=""),),
)
WORDS = body(PLAN).split(b"\0")
FIRST = WORDS.index(b"Unshare")  # the first step; before it stands their number, and before that the plan's own fields


def with_words(change: dict[int, bytes]) -> bytes:
    return b"\0".join(change.get(place, word) for place, word in enumerate(WORDS))


@given(ANY_PLAN)
def test_every_plan_comes_back_equal(plan: Plan) -> None:
    assert codec.decode(body(plan)) == plan


@pytest.mark.parametrize("restricted", [True, False])
@pytest.mark.parametrize("accel", ["tcg", "kvm"])
def test_plan_of_the_planner_comes_back_equal(accel: str, *, restricted: bool) -> None:
    plan = valid_plan(restricted=restricted, accel=accel)
    assert codec.decode(body(plan)) == plan


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
def test_words_come_back_equal(words: list[str]) -> None:
    assert codec.unpack(codec.pack(words).partition(b"\n")[2]) == words


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_a_value_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        codec.decode(data)


@given(ANY_PLAN, st.data())
def test_plan_with_a_word_dropped_is_refused_or_reads_as_what_it_then_says(plan: Plan, data: st.DataObject) -> None:
    """No word means anything by its place alone: what is accepted encodes to the same bytes again."""
    words = body(plan).split(b"\0")
    del words[data.draw(st.integers(0, len(words) - 1))]
    text = b"\0".join(words)
    try:
        read = codec.decode(text)
    except ValueError:
        return
    assert body(read) == text


@given(ANY_PLAN, st.data())
def test_plan_that_is_cut_off_between_two_words_is_refused(plan: Plan, data: st.DataObject) -> None:
    words = body(plan).split(b"\0")
    kept = words[: data.draw(st.integers(0, len(words) - 1))]
    with pytest.raises(ValueError, match=r"ends early|format|number|items|step|0 or 1"):
        codec.decode(b"\0".join(kept))


@given(ANY_PLAN, st.lists(st.binary(max_size=5).filter(lambda word: b"\0" not in word), min_size=1, max_size=3))
def test_plan_that_goes_on_after_its_end_is_refused(plan: Plan, more: list[bytes]) -> None:
    with pytest.raises(ValueError, match="goes on after its end"):
        codec.decode(b"\0".join([body(plan), *more]))


def test_text_with_nul_cannot_be_sent() -> None:
    """It would end the word early, and the rest would be read as the next field."""
    with pytest.raises(ValueError, match="NUL"):
        codec.encode(PLAN.replace(steps=(SetHostname(name="a\0b"),)))
    with pytest.raises(ValueError, match="NUL"):
        codec.encode(PLAN.replace(domain="\0"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({0: b"depriv-plan-0"}, "format"),
        ({0: b""}, "format"),
        ({2: b""}, "domid"),
        ({2: b"+7"}, "domid"),
        ({2: b"07"}, "domid"),
        ({2: b"-0"}, "domid"),
        ({2: b" 7"}, "domid"),
        ({2: b"7\n"}, "domid"),
        ({2: b"0x7"}, "domid"),
        ({2: b"7_0"}, "domid"),
        ({2: "\u0667".encode()}, "domid"),
        ({2: b"9" * 50}, "domid"),
        ({3: b"true"}, "restricted"),
        ({3: b"2"}, "restricted"),
        ({4: b""}, "shared"),
        ({5: b"yes"}, "keep_net"),
        ({5: b""}, "keep_net"),
        ({FIRST - 1: b"99999999"}, "steps"),
        ({FIRST - 1: b"-1"}, "steps"),
        ({FIRST: b"unshare"}, "unknown step"),
        ({FIRST: b"Plan"}, "unknown step"),
        ({FIRST: b"__class__"}, "unknown step"),
        ({FIRST + 1: b"3"}, "."),
        ({FIRST + 1: b"-1"}, "Unshare.namespaces"),
        ({FIRST + 1: b"x"}, "Unshare.namespaces"),
        ({FIRST + 6: b"unlimited"}, "SetLimit.value"),
        ({FIRST + 6: b"1.0"}, "SetLimit.value"),
    ],
)
def test_wrong_word_is_refused_and_named(change: dict[int, bytes], reason: str) -> None:
    assert all(WORDS[place] != word for place, word in change.items())
    with pytest.raises(ValueError, match=reason):
        codec.decode(with_words(change))


def test_table_above_changes_the_words_that_it_means() -> None:
    assert WORDS[FIRST : FIRST + 3] == [b"Unshare", b"2", b"mnt"]
    assert WORDS[FIRST + 4 : FIRST + 7] == [b"SetLimit", b"AS", b"-1"]
    assert codec.decode(with_words({FIRST + 6: b"5"})).steps[1] == SetLimit(name="AS", value=5)


def test_message_of_a_refusal_is_short_however_long_the_word_is() -> None:
    with pytest.raises(ValueError, match="unknown step") as caught:
        codec.decode(with_words({FIRST: b"x" * 100_000}))
    assert len(str(caught.value)) < 200


@given(ANY_STEP)
def test_step_as_json_names_itself_first_and_loses_nothing(step: steps.Step) -> None:
    data = codec.as_json(step)
    assert next(iter(data.items())) == ("step", type(step).__name__)
    back = json.loads(json.dumps(data))
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in back.items() if name != "step"}
    kind: Any = type(step)
    assert kind(**values) == step
