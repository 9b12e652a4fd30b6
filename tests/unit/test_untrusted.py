# SPDX-License-Identifier: Apache-2.0
"""JSON from a hostile process: honest JSON passes, everything else is refused before it can cost much."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depriv.errors import MonitorError
from depriv.untrusted import as_bool, as_int, as_list, as_object, as_str, decode, field

if TYPE_CHECKING:
    from collections.abc import Callable

BELOW = 2**63
SCALARS = st.none() | st.booleans() | st.integers(-BELOW, BELOW) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


def read(text: str | bytes, *, depth: int = 64, values: int = 1000) -> dict[str, object]:
    return decode(text.encode() if isinstance(text, str) else text, depth=depth, values=values)


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


@given(VALUES, st.booleans())
def test_what_json_writes_is_read_back(value: object, ascii_only: bool) -> None:
    members = {"return": value}
    assert read(json.dumps(members, ensure_ascii=ascii_only)) == members


@given(VALUES, st.integers(1, 6))
def test_depth_is_counted_as_nesting_and_never_fooled_by_text(value: object, depth: int) -> None:
    members = {'"\\[': 1, "\\": value}
    text = json.dumps(members)
    if depth_of(members) <= depth:
        assert read(text, depth=depth) == members
    else:
        with pytest.raises(ValueError, match="nested deeper than"):
            read(text, depth=depth)


@given(st.text('{}[]",:\\1a \n', max_size=60))
def test_no_text_of_structure_gets_past_the_count_of_levels(text: str) -> None:
    try:
        value = read('{"a": ' + text + "}", depth=3)
    except ValueError:
        return
    assert depth_of(value) <= 3


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_a_value_error(data: bytes) -> None:
    try:
        value = read(data)
    except ValueError:
        return
    assert isinstance(value, dict)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "no object"),
        ('"{}"', "no object"),
        ("{} {}", "Extra data"),
        ("{'a': 1}", "double quotes"),
        ('{"a": 1,}', "double quotes"),
        ('{"a": 01}', "delimiter"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": -1e400}', "too large"),
        ('{"a": 0.' + "1" * 100 + "}", "too long"),
        ('{"a": -9223372036854775809}', "beyond 64 bits"),
        ('{"a": {"b": 1, "\\u0062": 2}}', "the same key twice"),
        ('{"a": "\\udc00"}', "surrogates"),
        ('{"a": "\\uDC00"}', "surrogates"),
        ('{"a": "\x00"}', "control character"),
        (b'{"a": "\xc0\xaf"}', "utf-8"),
        (b'{"a": "\xed\xa0\x80"}', "utf-8"),
        ("]" * 100 + "[" * 100, "more brackets closed"),
    ],
)
def test_what_no_qemu_sends_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 90_000, "nested deeper"),
        ('{"a":' * 300_000, "more than 100000 values"),
        ("[]," * 500_000, "more than 100000 values"),
        ('"' * 2_000_000, "more than 100000 values"),
        ("\\" * 2_000_000, "Expecting value"),
    ],
)
def test_bombs_are_refused_within_a_quarter_of_a_second_of_work(text: str, reason: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=reason):
        read('{"a": ' + text, values=100_000)
    assert time.process_time() - began < 0.25


def test_digits_beyond_counting_are_refused_before_they_are_converted() -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match="beyond 64 bits"):
        read('{"a": ' + "7" * 2_000_000 + "}")
    assert time.process_time() - began < 0.25


def test_a_member_is_found_and_its_kind_checked() -> None:
    reply: object = {"status": "paused", "running": False, "n": 3, "list": [1], "inner": {"a": None}}
    assert field(reply, "status", as_str, "query-status") == "paused"
    assert field(reply, "running", as_bool, "query-status") is False
    assert field(reply, "n", as_int, "query-status") == 3
    assert field(reply, "list", as_list, "query-status") == [1]
    assert field(reply, "inner", as_object, "query-status") == {"a": None}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, as_int),
        (1.0, as_int),
        ("1", as_int),
        (0, as_bool),
        (None, as_str),
        (["a"], as_str),
        ({}, as_list),
        ("ab", as_list),
        ([], as_object),
    ],
)
def test_a_value_of_another_kind_is_refused(value: object, kind: Callable[[object, str], object]) -> None:
    with pytest.raises(MonitorError, match="query-status: status: not "):
        field({"status": value}, "status", kind, "query-status")


def test_a_missing_member_is_named() -> None:
    with pytest.raises(MonitorError, match="query-status: status is missing") as caught:
        field({}, "status", as_str, "query-status")
    assert "destroy" in caught.value.fix
