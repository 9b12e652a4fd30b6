# SPDX-License-Identifier: Apache-2.0
"""An error says what, why and what to do; who has to act decides its class and the exit status."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from depriv import errors
from depriv.errors import (
    ConfigError,
    DeprivError,
    HostError,
    JailError,
    MonitorError,
    NotFoundError,
    PlanError,
    render,
)

if TYPE_CHECKING:
    from collections.abc import Generator

CLASSES = (ConfigError, NotFoundError, PlanError, HostError, JailError, MonitorError)


def test_every_error_is_one_that_callers_can_catch() -> None:
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == {DeprivError, *CLASSES}
    assert all(issubclass(kind, DeprivError) for kind in CLASSES)


def test_what_the_user_wrote_exits_with_2_and_all_else_with_125() -> None:
    assert {kind: kind.exit_status for kind in CLASSES} == {
        ConfigError: 2,
        NotFoundError: 2,
        PlanError: 125,
        HostError: 125,
        JailError: 125,
        MonitorError: 125,
    }


def test_rendered_error_has_cause_and_fix_each_on_its_line() -> None:
    error = HostError("cannot open disk1", cause="no such file", fix="see that it exists")
    assert render(error) == "error: cannot open disk1\ncause: no such file\n  fix: see that it exists"


def test_nothing_is_made_up_where_cause_and_fix_are_not_known() -> None:
    assert render(PlanError("no")) == "error: no"


def test_chained_exception_is_the_cause() -> None:
    error = HostError("cannot read it")
    error.__cause__ = FileNotFoundError(2, "No such file or directory", "/no/such/file")
    assert render(error) == "error: cannot read it\ncause: [Errno 2] No such file or directory: '/no/such/file'"


def test_cause_that_is_written_down_comes_before_the_chained_one() -> None:
    error = HostError("x", cause="written")
    error.__cause__ = ValueError("chained")
    assert "written" in render(error)
    assert "chained" not in render(error)


def test_chained_exception_without_text_is_named() -> None:
    error = HostError("x")
    error.__cause__ = KeyboardInterrupt()
    assert render(error) == "error: x\ncause: KeyboardInterrupt"


def test_fix_of_several_lines_is_indented_as_one() -> None:
    assert render(PlanError("x", fix="first\nsecond")) == "error: x\n  fix: first\n       second"


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ({}, "bad"),
        ({"source": "a.cfg"}, "a.cfg: bad"),
        ({"source": "a.cfg", "line": 3}, "a.cfg:3:0: bad"),
        ({"source": "a.cfg", "line": 3, "column": 7}, "a.cfg:3:7: bad"),
    ],
)
def test_place_of_a_configuration_error_is_shown_as_far_as_it_is_known(place: dict[str, str | int], shown: str) -> None:
    assert str(ConfigError("bad", **place)) == shown  # type: ignore[arg-type] # the table mixes both


def test_caret_stands_below_the_column_even_behind_tabs() -> None:
    error = ConfigError("bad", source="a.cfg", line=1, column=3, text="\t\tmemory = x")
    _, shown, caret = render(error).splitlines()
    assert caret.index("^") == shown.index("memory")


def test_caret_of_an_unknown_column_stands_at_the_beginning() -> None:
    assert render(ConfigError("bad", text="abc")).splitlines()[2] == "  ^"


def test_jail_error_carries_step_and_errno() -> None:
    error = JailError("cannot do it", step="do it", errno=13, cause="denied")
    assert (error.step, error.errno) == ("do it", 13)
    assert render(error) == "error: cannot do it\ncause: denied"


def test_foreign_exception_is_rendered_without_a_fix() -> None:
    assert render(ValueError("odd")) == "error: odd"


@contextlib.contextmanager
def block() -> Generator[None]:
    yield


def test_errors_take_a_traceback_as_contextlib_gives_it() -> None:
    """A frozen exception would raise FrozenInstanceError here instead."""
    with pytest.raises(JailError) as caught, block():
        raise JailError("x", step="s")
    assert caught.value.__traceback__ is not None


def test_text_of_an_error_is_what_it_was_made_with() -> None:
    error = PlanError("what", fix="fix", cause="cause")
    assert error.args == ("what",)
    assert (error.what, error.fix, error.cause) == ("what", "fix", "cause")


def test_line_of_a_file_that_is_none_of_text_is_cut_around_its_mark() -> None:
    error = ConfigError("bad", source="ls", line=1, column=5001, text="a" * 5000 + "!" + "b" * 5000)
    _, shown, caret = render(error).splitlines()
    assert len(shown) <= 202
    assert shown[caret.index("^")] == "!"


def test_no_part_of_an_error_drives_a_terminal_or_forges_a_line() -> None:
    shown = render(HostError("a\x1b[2J\nerror: b", cause="c\rd\nlog\u202e", fix="e\x07\nf"))
    assert shown == "error: a\\x1b[2J\\nerror: b\ncause: c\\rd\nlog\\u202e\n  fix: e\\x07\n       f"
