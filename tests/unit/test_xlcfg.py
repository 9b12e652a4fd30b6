# SPDX-License-Identifier: Apache-2.0
"""The grammar: what xl reads is read, and what is no xl.cfg is refused at its place."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depriv import xlcfg
from depriv.errors import ConfigError, render
from depriv.xlcfg import GrammarError, Value, parse, parse_all, place_in, quote, render_value


def plain(value: Value) -> object:
    """Return a value without its places."""
    if value.kind == "list":
        return [plain(item) for item in value.items]
    return value.text if value.kind == "string" else ("number", value.text)


def read(text: str | bytes, *arguments: str) -> dict[str, object]:
    return {key: plain(setting.value) for key, setting in parse(text, source="f", arguments=arguments).items()}


def fail(text: str | bytes, *arguments: str) -> GrammarError:
    with pytest.raises(GrammarError) as caught:
        parse(text, source="f", arguments=arguments)
    return caught.value


def test_strings_numbers_and_lists_are_read() -> None:
    text = """name = "web1"\nmemory=0x200\ncpus = '1-3' ; vcpus = 2;;\n\n disk = [ 'a,b', "c" ]\nempty = []\n"""
    assert read(text) == {
        "name": "web1",
        "memory": ("number", "0x200"),
        "cpus": "1-3",
        "vcpus": ("number", "2"),
        "disk": ["a,b", "c"],
        "empty": [],
    }


def test_lists_nest_over_lines_with_comments_and_one_trailing_comma() -> None:
    text = 'vnuma = [ # two nodes\n  [ "pnode=0", 1,\n  ],\n\n  ["pnode=1" , ] # last\n ]'
    assert read(text) == {"vnuma": [["pnode=0", ("number", "1")], ["pnode=1"]]}


@pytest.mark.parametrize("text", ["[,]", '["a",,]', '["a" "b"]', '["a"\n"b"]', "[1", '["a"]]'])
def test_broken_lists_are_refused(text: str) -> None:
    fail(f"disk = {text}")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", ";;;", "\ufeff# mark", " \t", "a=1# no newline"])
def test_files_without_a_final_newline_or_any_statement_are_fine(text: str) -> None:
    read(text)


def test_a_number_may_be_followed_by_a_comment_at_once() -> None:
    assert read("vncunused=1#look for a free display\nsdl=0") == {"vncunused": ("number", "1"), "sdl": ("number", "0")}


def test_dos_lines_are_read_and_a_stray_carriage_return_is_not() -> None:
    assert read('a = "x"\r\nb = [\r\n 1,\r\n]\r\n') == {"a": "x", "b": [("number", "1")]}
    error = fail("a = 1\rb = 2")
    assert (error.line, error.column) == (1, 6)
    assert "carriage return" in error.what


def test_escapes_mean_what_they_say() -> None:
    assert read(r"""a = "\\ \' \" \a\b\f\n\r\t\v \x41\x7e \101\0501" """) == {"a": "\\ ' \" \a\b\f\n\r\t\v A~ A(1"}


@pytest.mark.parametrize(
    "escape", [r"\q", r"\x4", r"\xg0", r"\x", "\\x4\u0661", r"\8", r"\x00", r"\0", r"\xff", r"\777"]
)
def test_escapes_without_meaning_are_refused_at_their_place(escape: str) -> None:
    error = fail(f'\na = "xy{escape}"')
    assert (error.source, error.line, error.column) == ("f", 2, 8)
    assert error.text == f'a = "xy{escape}"'
    assert error.fix


@pytest.mark.parametrize("text", ['"abc', "'abc\"", '"abc\n"', '"abc\r\n"', '"', '"abc\\"'])
def test_a_string_must_end_on_its_line(text: str) -> None:
    error = fail(f"k = {text}")
    assert (error.line, error.column) == (1, 5)


def test_the_later_assignment_wins_and_keeps_the_first_order() -> None:
    assert list(read("a = 1\nb = 2\na = 3\n").items()) == [("a", ("number", "3")), ("b", ("number", "2"))]


def test_adding_joins_strings_and_lists() -> None:
    assert read("x = 'a'\nx += 'b'\nl = [1]\nl += ['q']\nnew += [2]\nn='v'\nn += 5") == {
        "x": "ab",
        "l": [("number", "1"), "q"],
        "new": [("number", "2")],
        "n": "v5",
    }


@pytest.mark.parametrize("text", ["a = 'x'\na += []", "a = [1]\na += 'x'"])
def test_adding_a_list_to_a_string_or_the_reverse_is_refused(text: str) -> None:
    error = fail(text)
    assert "cannot add" in error.what
    assert (error.line, error.column) == (2, 6)
    assert "line 1" in error.fix


def test_places_count_from_one_and_carry_the_line() -> None:
    found = parse('\n  disk = [\n\t"one",\n   "two" ]\n', source="g.cfg")["disk"]
    assert (found.place.line, found.place.column, found.place.text) == (2, 3, "  disk = [")
    assert (found.value.place.line, found.value.place.column) == (2, 10)
    assert [(item.place.line, item.place.column) for item in found.value.items] == [(3, 2), (4, 4)]
    assert found.value.items[1].place.text == '   "two" ]'
    assert found.place.source == "g.cfg"


def test_a_place_within_a_string_is_exact_unless_escapes_moved_it() -> None:
    found = parse('a = "x,y,z"\nb = "\\x41,y"\n', source="f")
    assert place_in(found["a"].value, 4).column == 10
    assert place_in(found["b"].value, 2).column == 5


def test_arguments_follow_the_file_and_override_it() -> None:
    assert read("memory = 1", "memory=2; vcpus=3", "x += [1]") == {
        "memory": ("number", "2"),
        "vcpus": ("number", "3"),
        "x": [("number", "1")],
    }


def test_errors_in_an_argument_name_it_and_it_cannot_swallow_the_next() -> None:
    error = fail("a = 1", "b=1", "c=[1,", "d=]")
    assert (error.source, error.line, error.column) == ("argument 2", 1, 3)
    assert [other.source for other in error.others] == ["argument 3"]
    assert str(error).startswith("argument 2:1:3: ")


def test_all_errors_are_found_line_by_line() -> None:
    text = "a = \nb = 1\nC = 2\nd == 3\ne = 'x\nf = 4"
    found, errors = parse_all(text, source="f")
    assert sorted(found) == ["b", "f"]
    assert [(error.line, error.column) for error in errors] == [(1, 5), (3, 1), (4, 4), (5, 5)]
    assert "and 3 more errors" in fail(text).what


def test_a_broken_list_does_not_bring_errors_for_its_other_lines() -> None:
    _, errors = parse_all("disk = [ 'a', x,\n 'b',\n 'c' ]\nvif = [\nname = \n", source="f")
    assert [error.line for error in errors] == [1, 4, 5]
    assert "never closed" in errors[1].what
    _, errors = parse_all("a = [ b = 1\nc = [ d += 2", source="f")
    assert [error.line for error in errors] == [1, 2]


def test_no_more_errors_than_a_page_are_kept() -> None:
    _, errors = parse_all("?\n" * 5000, source="f")
    assert len(errors) == xlcfg.MAX_ERRORS


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("dm_restrict = True", "write 1"),
        ("dm_restrict = no", "write 0"),
        ("import os", "not Python"),
        ("def f():", "not Python"),
        ("a = 'x' + 'y'", "not Python"),
        ("a = ('x')", "not Python"),
        ("a = 'x' % 1", "not Python"),
        ("dm-restrict = 1", "write dm_restrict"),
        ("DM_Restrict = 1", "write dm_restrict"),
        ("name = web1", 'quote it: name = "web1"'),
        ("memory", "write memory = VALUE"),
        ("rtc_timeoffset = -3600", 'quote a negative number: rtc_timeoffset = "-3600"'),
        ("memory = 2G", "MiB"),
    ],
)
def test_likely_mistakes_get_the_remedy(text: str, fix: str) -> None:
    assert fix in fail(text).fix


@pytest.mark.parametrize(
    "text", ["= 1", "a 1", "a = 1 b = 2", "a.b- = 1", "1 = 1", "a = [1] 2", "a += ", "ä = 1", "a = 1 \\"]
)
def test_what_is_no_statement_is_refused(text: str) -> None:
    fail(text)


def test_a_nul_and_what_is_not_utf8_are_refused_at_their_place() -> None:
    error = fail(b"a = 1\nb = 'x\0y'\n")
    assert (error.line, error.column) == (2, 7)
    error = fail("a = 1\nb = 'ä".encode() + b"\xff'\n")
    assert (error.line, error.column) == (2, 7)
    assert "0xff" in error.what
    error = fail("a = 1", "b = '\udcff'")
    assert (error.source, error.column) == ("argument 1", 6)
    render(error).encode()


def test_text_of_any_language_is_read() -> None:
    assert read("name = 'größe 大'".encode()) == {"name": "größe 大"}


def test_a_disk_image_by_mistake_is_refused_at_once() -> None:
    assert "1048577" in fail("#" * (xlcfg.MAX_CHARACTERS + 1)).what
    assert "\0" not in fail(b"\0" * (xlcfg.MAX_CHARACTERS + 1)).what
    assert read("#" * xlcfg.MAX_CHARACTERS) == {}


def test_lists_nest_only_so_deep() -> None:
    deep = xlcfg.MAX_DEPTH
    assert read("a = " + "[" * deep + "]" * deep)
    error = fail("a = " + "[" * 100_000)
    assert error.column == 5 + deep


def test_a_long_file_is_read_in_linear_time() -> None:
    lines = 40_000
    text = "".join(f"key{n} = 'value'\n" for n in range(lines))
    assert parse(text, source="f")[f"key{lines - 1}"].place.line == lines


def test_an_error_shows_the_line_and_a_mark_under_the_place() -> None:
    assert render(fail("name = web1")).splitlines()[:3] == [
        "error: f:1:8: found `web1' instead of a value: a string in quotes, a number or a [list]",
        "  name = web1",
        "         ^",
    ]


NUMBERS = st.from_regex(r"[0-9][0-9a-fx]{0,10}", fullmatch=True).map(lambda text: Value(kind="number", text=text))
STRINGS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).map(
    lambda text: Value(kind="string", text=text)
)
VALUES = st.recursive(
    NUMBERS | STRINGS,
    lambda inner: st.lists(inner, max_size=4).map(lambda items: Value(kind="list", items=tuple(items))),
    max_leaves=12,
)


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_a_rendered_value_reads_as_itself(value: Value) -> None:
    assert plain(parse(f"key = {render_value(value)}", source="f")["key"].value) == plain(value)


PIECES = st.sampled_from(
    [
        "a",
        "b_c",
        "=",
        "+=",
        "[",
        "]",
        ",",
        "'",
        '"',
        "\\",
        "\\x4",
        "1",
        "0x",
        "#",
        ";",
        "\n",
        "\r\n",
        "\r",
        " ",
        "-",
        "True",
    ]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join), st.binary()))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused_at_a_place_within_it(text: str | bytes) -> None:
    try:
        parse(text, source="f")
    except ConfigError as error:
        shown = text.decode(errors="replace") if isinstance(text, bytes) else text
        lines = shown.split("\n")
        for each in (error, *getattr(error, "others", ())):
            assert 1 <= each.line <= len(lines)
            assert 1 <= each.column <= len(lines[each.line - 1]) + 1
            assert "\n" not in each.what + each.text
        render(error).encode()


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
@settings(max_examples=100, deadline=None)
def test_a_quoted_text_stays_on_one_line(text: str) -> None:
    assert "\n" not in quote(text)
    assert "\r" not in quote(text)
