# SPDX-License-Identifier: Apache-2.0
"""Records are frozen, keyword-only, and equal by value: the parts of dataclasses that we use."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import ClassVar

import pytest

import depriv
from depriv.records import Record, cast


class Point(Record):
    """A record with a default."""

    known: ClassVar[int] = 7  # no field
    x: int
    y: int = 0


class Named(Point):
    """A record that adds to another one, and checks itself."""

    name: str

    def validate(self) -> None:
        if not self.name:
            raise ValueError("a name is empty")


def test_fields_are_those_of_the_bases_then_ones_own() -> None:
    assert list(Named.fields) == ["x", "y", "name"]
    assert list(Point.fields) == ["x", "y"]
    assert Record.fields == {}


def test_defaults_fill_what_is_not_given() -> None:
    assert Point(x=1).y == 0
    assert Point(x=1, y=2).as_dict() == {"x": 1, "y": 2}


def test_missing_field_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="Point: x is missing"):
        Point(y=1)  # type: ignore[call-arg] # what the type checker refuses has to fail at run time, too


@pytest.mark.parametrize("name", ["z", "known", "fields", "validate", "__class__"])
def test_unknown_field_is_a_type_error(name: str) -> None:
    with pytest.raises(TypeError, match=f"Point has no field {name}"):
        Point(**{"x": 1, name: 2})


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        Point(1)  # type: ignore[call-arg] # as above


def test_no_attribute_ever_changes() -> None:
    point = Point(x=1)
    with pytest.raises(AttributeError, match="frozen"):
        point.x = 2  # type: ignore[misc] # as above
    with pytest.raises(AttributeError, match="frozen"):
        point.new = 2
    with pytest.raises(AttributeError, match="frozen"):
        del point.x
    assert point == Point(x=1)


def test_records_are_equal_by_class_and_value() -> None:
    assert Point(x=1) == Point(x=1, y=0)
    assert len({Point(x=1), Point(x=1), Point(x=2)}) == 2
    assert Point(x=1) != Point(x=2)
    assert Named(x=1, name="a") != Point(x=1)
    assert Point(x=1) != {"x": 1, "y": 0}


def test_record_that_makes_no_sense_is_never_made() -> None:
    with pytest.raises(ValueError, match="a name is empty"):
        Named(x=1, name="")
    with pytest.raises(ValueError, match="a name is empty"):
        Named(x=1, name="a").replace(name="")


def test_replace_leaves_the_original_alone() -> None:
    point = Point(x=1)
    assert point.replace(y=5) == Point(x=1, y=5)
    assert point == Point(x=1)
    with pytest.raises(TypeError, match="has no field"):
        point.replace(z=5)


def test_repr_is_the_expression_that_makes_it() -> None:
    named = Named(x=1, name="it's")
    assert repr(named) == """Named(x=1, y=0, name="it's")"""
    assert eval(repr(named)) == named


def test_cast_changes_nothing() -> None:
    value: object = [1]
    assert cast("list[int]", value) is value


@pytest.mark.parametrize("module", ["depriv.records", "depriv.steps", "depriv.check", "depriv.codec"])
def test_what_every_start_imports_leaves_the_expensive_modules_alone(module: str) -> None:
    """Each of these costs more milliseconds than the jail's work in the kernel."""
    src = os.path.dirname(os.path.dirname(depriv.__file__))
    code = f"import sys; sys.path.append({src!r}); import {module}; print(*(sys.modules.keys() & set(sys.argv[1:])))"
    expensive = ["dataclasses", "typing", "re", "enum", "json", "inspect", "socket", "subprocess", "collections"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *expensive],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == []
