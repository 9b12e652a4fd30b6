# SPDX-License-Identifier: Apache-2.0
"""The documents say what is: verbs, options, files, steps and tests that they name exist, and none is left out."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import itertools
import re
import shlex
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

import depriv
from depriv import errors, steps
from depriv.cli import parser
from depriv.xlconfig import load_domain

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
ADRS = sorted((ROOT / "docs/adr").glob("*.md"))
REFERENCES = sorted((ROOT / "docs/reference").glob("*.md"))
DOCUMENTS = [*(ROOT / name for name in PAGES), *ADRS, *REFERENCES]
MAN = ROOT / "man/depriv.1"
MANUALS = sorted((ROOT / "man").iterdir())
ADR_PARTS = ["Context", "Decision", "Rejected", "Consequences", "Revisit when"]
MECHANISM_PARTS = ["Description", "Implementation", "How to test", "Tested by"]
PROMISES = 10
SHELL = ("|", "&", "&&", ";", ">", "<")  # where the words of one command end
TEST_ID = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")

# Joined here so that this file does not hold what it looks for.
MACHINE = re.compile("|".join((r"(?<![\w.])/wo" + "rk/", r"/tmp" + "/w/", r"/home/[a-z]" + r"\w*/")))
REGISTRIES = re.compile(
    "|".join(
        left + r"\." + right
        for left, right in (
            ("py" + "pi", "org"),
            ("pythonhos" + "ted", "org"),
            ("npm" + "js", "(org|com)"),
            ("crates", "io"),
            (r"golang\b.{0,8}", "org"),
            ("deb.deb" + "ian", "org"),
        )
    )
)
# How a change came about belongs in its commit, or nowhere.
HISTORY = re.compile(
    r"\b(this|your|our|previous) (prompt|brief|conversation|sub-?agent)\b"
    r"|\bas (requested|instructed)\b|\bnorth-star\b|\bhouse-rules\.md\b|\bprototype\.md\b|\bseed document",
    re.IGNORECASE,
)


# --- what there is -------------------------------------------------------------------------------------------------


@cache
def known_tests() -> dict[str, frozenset[str]]:
    """Return file -> names of the test functions in it, without importing any."""
    found = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        body = ast.parse(path.read_text()).body
        names = [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        found[str(path.relative_to(ROOT))] = frozenset(names)
    return found


def attacks() -> tuple[int, int, int]:
    """Return how many attempts tests/jail/test_attacks.py permits, permits but for -sandbox, and refuses in all."""
    body = ast.parse((ROOT / "tests/jail/test_attacks.py").read_text()).body
    tables = {
        node.targets[0].id: node.value
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
    }
    permitted, refused = tables["PERMITTED"].values, tables["REFUSED"].values
    sandboxed = [each for each in permitted if isinstance(each, ast.Name) and each.id == "SANDBOX"]
    by_filter = len(tables["FILTER_ALONE"].values)
    return len(permitted), len(sandboxed), by_filter + sum(len(ast.literal_eval(each).split()) for each in refused)


def verbs() -> dict[str, tuple[str, frozenset[str]]]:
    """Return verb -> how its arguments are written, and its options but for --help."""
    commands = next(each for each in parser()._actions if isinstance(each, argparse._SubParsersAction))
    found = {}
    for name, made in commands.choices.items():
        words = [name]
        options: set[str] = set()
        for action in made._actions:
            if action.option_strings:
                options.update(action.option_strings)
            else:
                written = {"?": "[{}]", "*": "[{} ...]"}.get(str(action.nargs), "{}")
                words.append(written.format(action.metavar))
        found[name] = (" ".join(words), frozenset(options - {"-h", "--help"}))
    return found


def blocks(text: str, *languages: str) -> list[str]:
    """Return the fenced blocks in one of the languages."""
    return [
        body
        for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        if language in languages
    ]


def commands(text: str) -> list[str]:
    """Return the command lines of a document's shell blocks; in ``console`` blocks the lines after a ``$``."""
    lines = [line for body in blocks(text, "sh") for line in body.splitlines()]
    lines += [line[2:] for body in blocks(text, "console") for line in body.splitlines() if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def sections(text: str, start: str) -> dict[str, str]:
    """Return what follows each heading that begins with ``start``, up to the next heading of its level or above."""
    level = len(start) - len(start.lstrip("#"))
    found = {}
    for part in re.split(rf"^(?=#{{1,{level}}} )", text, flags=re.MULTILINE):
        title, _, body = part.partition("\n")
        if title.startswith(start):
            found[title.removeprefix(start).strip()] = body
    return found


# --- what is wrong with a text -------------------------------------------------------------------------------------


def wrong_ids(text: str) -> list[str]:
    return [f"{file}::{name}" for file, name in TEST_ID.findall(text) if name not in known_tests().get(file, ())]


def wrong_promises(text: str, count: int = PROMISES) -> list[str]:
    """Return which promise is missing, or names neither a test nor the reason why there is none."""
    found = sections(text, "### P")
    wrong = []
    if [title.split(".")[0] for title in found] != [str(number) for number in range(1, count + 1)]:
        wrong.append(f"promises {list(found)} are not numbered 1 to {count}")
    for title, body in found.items():
        if not TEST_ID.search(body) and not re.search(r"^- Pending: \w{3,}", body, re.MULTILINE):
            wrong.append(f"P{title}: no test, and no reason why")
    return wrong


def wrong_commands(text: str) -> list[str]:
    """Return the lines that call depriv as its own parser does not understand it."""
    wrong = []
    for line in commands(text):
        words = list(itertools.takewhile(lambda word: word not in SHELL, shlex.split(line, comments=True)))
        while words[:1] == ["sudo"] or (words and re.fullmatch(r"[A-Z_]+=\S*", words[0])):
            words.pop(0)
        if words[:1] != ["depriv"]:
            continue
        if words[1:2] in (["run"], ["plan"]) and "--" in words:
            words = words[: words.index("--")]  # what follows is QEMU's
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                parser().parse_args(words[1:])
        except SystemExit as error:
            if error.code:
                wrong.append(f"{line}: {said.getvalue().splitlines()[-1]}")
    return wrong


def wrong_man_page(text: str) -> list[str]:
    """Return where the manual page and the parser differ: verbs, their arguments, their options."""
    page = text.replace(r"\-", "-")
    body = page.partition("\n.SH COMMANDS\n")[2].partition("\n.SH ")[0]
    listed = {}
    for part in re.split(r"^\.SS ", body, flags=re.MULTILINE)[1:]:
        title, _, rest = part.partition("\n")
        tags = re.findall(r"^\.T[PQ]\n(.*)$", rest, re.MULTILINE)
        options = frozenset(word for tag in tags for word in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", tag))
        listed[title.split()[0]] = (title, options)
    want = verbs()
    wrong = [f"{name}: only on one side" for name in sorted(want.keys() ^ listed.keys())]
    wrong += [
        f"{name}: the parser has {want[name]}, the page {listed[name]}"
        for name in sorted(want.keys() & listed.keys())
        if want[name] != listed[name]
    ]
    if list(want) != list(listed) and not wrong:
        wrong.append("the verbs are in another order")
    return wrong


def wrong_files(text: str, folder: Path) -> list[str]:
    """Return links and names of files of this project that lead nowhere."""
    wrong = [
        target
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text)
        if "://" not in target and not (folder / target).exists()
    ]
    named = re.findall(r"(?<![\w/.-])((?:src|tests|docs|man|bench|\.ci)/[\w./-]*[\w/])", text)
    return wrong + [name for name in named if not (ROOT / name).exists() and not wrong_adr_is_meant(name)]


def wrong_adr_is_meant(name: str) -> bool:
    """``docs/adr/0003`` stands for the file that begins so."""
    return bool(re.fullmatch(r"docs/adr/\d{4}", name) and list(ROOT.glob(name + "-*.md")))


def wrong_numbers(names: list[str]) -> list[str]:
    """Return the names that are not 0001, 0002, and so on, in order."""
    return [name for number, name in enumerate(names, 1) if not re.fullmatch(rf"{number:04}-[a-z0-9.-]+\.md", name)]


def traces(text: str) -> list[str]:
    return [found.group() for pattern in (MACHINE, REGISTRIES, HISTORY) for found in pattern.finditer(text)]


# --- the documents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_only_tests_files_and_commands_that_exist(path: Path) -> None:
    text = path.read_text()
    assert wrong_ids(text) == []
    assert wrong_files(text, path.parent) == []
    assert wrong_commands(text) == []


def test_every_promise_has_a_test_or_says_why_not() -> None:
    assert wrong_promises((ROOT / "SECURITY.md").read_text()) == []


def test_the_limits_count_the_catalogue_of_attacks_as_it_is() -> None:
    permitted, sandboxed, refused = attacks()
    text = " ".join((ROOT / "SECURITY.md").read_text().split())
    assert (
        f"Of {permitted + refused} attempts by an attacker in QEMU's place without QEMU's filter, "
        f"{refused} are refused and {permitted} permitted, {sandboxed} of which QEMU's filter refuses."
    ) in text


def test_every_mechanism_is_described_the_same_way() -> None:
    found = sections((ROOT / "SECURITY.md").read_text(), "### M")
    assert [title.split(".")[0] for title in found] == [str(number) for number in range(1, len(found) + 1)]
    for title, body in found.items():
        assert re.findall(r"^\*\*([\w ]+)\*\*:", body, re.MULTILINE) == MECHANISM_PARTS, title
        tested_by = body.partition("**Tested by**:")[2]
        assert TEST_ID.search(tested_by) or "pending" in tested_by, title


def test_the_man_page_has_the_verbs_arguments_and_options_of_the_parser() -> None:
    assert wrong_man_page(MAN.read_text()) == []


def test_the_man_page_has_the_general_options_too() -> None:
    general = {word for action in parser()._actions for word in action.option_strings}
    body = MAN.read_text().replace(r"\-", "-").partition("\n.SH OPTIONS\n")[2].partition("\n.SH ")[0]
    assert set(re.findall(r"(?<![\w-])--?[a-z]+", body)) == general


def test_the_man_pages_examples_are_understood() -> None:
    examples = re.findall(r"^\.EX\n(.*?)^\.EE$", MAN.read_text().replace(r"\-", "-"), re.DOTALL | re.MULTILINE)
    assert examples
    assert wrong_commands("".join(f"```sh\n{body}```\n" for body in examples)) == []


def test_the_man_page_explains_every_exit_status() -> None:
    body = MAN.read_text().partition("\n.SH EXIT STATUS\n")[2].partition("\n.SH ")[0]
    explained = {int(number) for number in re.findall(r"^\.B (\d+)$", body, re.MULTILINE)}
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.DeprivError)]
    assert explained == {0, 1, 130, *(kind.exit_status for kind in kinds)}


@pytest.mark.parametrize("path", MANUALS, ids=lambda path: path.name)
def test_a_manual_page_is_installed_of_this_version_and_formats_without_a_warning(path: Path) -> None:
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert installed["shared-data"][f"man/{path.name}"] == f"share/man/man{path.suffix[1:]}/{path.name}"
    assert f'"depriv {depriv.__version__}"' in path.read_text().splitlines()[1]
    try:
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-z", path], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return  # a bare host has no groff; the other tests have read the page
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_readmes_configuration_is_read_without_a_note() -> None:
    (text,) = blocks((ROOT / "README.md").read_text(), "ini")
    domain = load_domain(text.encode(), source="README.md", arguments=())
    assert domain.name == "web1"
    assert domain.dm_restrict
    assert domain.notes == ()


def test_the_readmes_program_compiles_and_uses_public_names() -> None:
    (text,) = blocks((ROOT / "README.md").read_text(), "python")
    used = {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "depriv"
    }
    assert used
    assert used <= set(depriv.__all__)


def test_the_architecture_has_every_step_in_the_order_of_the_jail() -> None:
    table = sections((ROOT / "ARCHITECTURE.md").read_text(), "## ")["What the jail does, in this order"]
    named = [
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    assert named == [kind.__name__ for kind in steps.ALL]


def test_decisions_are_numbered_without_gaps_and_have_all_their_parts() -> None:
    assert ADRS
    assert wrong_numbers([path.name for path in ADRS]) == []
    for path in ADRS:
        text = path.read_text()
        assert text.startswith(f"# {path.name[:4]}. "), path.name
        assert list(sections(text, "## ")) == ADR_PARTS, path.name
        assert len(text.splitlines()) <= 80, f"{path.name}: a decision is one page"


def test_decisions_that_the_code_points_to_exist() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        for number in re.findall(r"docs/adr/(\d{4})", path.read_text()):
            assert list(ROOT.glob(f"docs/adr/{number}-*.md")), f"{path.name}: {number}"


def test_no_file_tells_of_a_machine_a_registry_or_how_it_came_about() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "README.md" in listed
    found = {
        name: traces((ROOT / name).read_text(errors="replace"))
        for name in listed
        if (ROOT / name).is_file() and name != str(Path(__file__).relative_to(ROOT))
    }
    assert {name: what for name, what in found.items() if what} == {}


# --- what must be found --------------------------------------------------------------------------------------------


def test_a_promise_without_a_test_is_found() -> None:
    good = "### P1. Never root\n- Tests: `tests/style/test_docs.py::test_a_promise_without_a_test_is_found`\n"
    assert wrong_promises(good, 1) == []
    assert wrong_promises("### P1. Never root\n- Pending: needs a Xen host\n", 1) == []
    assert wrong_promises("### P1. Never root\nIt just is.\n", 1)
    assert wrong_promises("### P1. Never root\n- Pending:\n", 1)
    assert wrong_promises(good + "### P3. Nothing silent\n- Pending: later\n", 2)
    assert wrong_promises("", 1)


def test_a_test_that_does_not_exist_is_found() -> None:
    file = "tests/style/test_docs.py"
    assert wrong_ids(f"`{file}::test_a_test_that_does_not_exist_is_found`") == []
    assert wrong_ids(f"`{file}::test_that_nobody_wrote`") == [f"{file}::test_that_nobody_wrote"]
    assert wrong_ids("`tests/none/test_none.py::test_none`")
    assert wrong_ids(f"`{file}::wrong_ids`"), "a function that is no test is none"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".SS destroy NAME\n", ".SS finish NAME\n"),
        (".SS list [NAME ...]\n", ".SS list NAME\n"),
        (".B \\-\\-dump\n", ".B \\-\\-follow\n"),
        ('.BR \\-p ", " \\-\\-paused\n', ".B \\-\\-paused\n"),
        (".TP\n.B \\-\\-remove\n", ""),
    ],
)
def test_a_man_page_that_differs_from_the_parser_is_found(old: str, new: str) -> None:
    text = MAN.read_text()
    assert old in text
    assert wrong_man_page(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "line",
    [
        "depriv start web1.cfg",
        "sudo depriv create",
        "depriv create --pause web1.cfg",
        "DEPRIV_TIMES=1 depriv destroy",
        "depriv console",
        "depriv run qemu-system-x86_64",
        "depriv list --jso | head",
    ],
)
def test_a_command_that_the_parser_refuses_is_found(line: str) -> None:
    assert wrong_commands(f"```console\n$ {line}\noutput\n```\n")
    assert wrong_commands(f"```sh\n{line}\n```\n")


def test_output_and_other_commands_are_not_taken_for_ours() -> None:
    assert wrong_commands("```console\n$ ls -l\ndepriv nonsense\n```\n") == []
    assert wrong_commands("```sh\ndepriv list --json | jq .\n```\n") == []
    assert wrong_commands("```\ndepriv nonsense\n```\n") == []


def test_a_file_that_does_not_exist_is_found() -> None:
    assert wrong_files("[a](README.md) `src/depriv/check.py` docs/adr/0001", ROOT) == []
    assert wrong_files("[a](docs/none.md)", ROOT) == ["docs/none.md", "docs/none.md"]
    assert wrong_files("see `src/depriv/nothing.py`", ROOT) == ["src/depriv/nothing.py"]
    assert wrong_files("see docs/adr/0999", ROOT) == ["docs/adr/0999"]


def test_a_gap_in_the_numbers_is_found() -> None:
    assert wrong_numbers(["0001-a.md", "0002-b.md"]) == []
    assert wrong_numbers(["0001-a.md", "0003-b.md"]) == ["0003-b.md"]
    assert wrong_numbers(["0001-a.md", "0001-b.md"]) == ["0001-b.md"]
    assert wrong_numbers(["1-a.md"]) == ["1-a.md"]


@pytest.mark.parametrize(
    "text",
    [
        "see /wo" + "rk/main/src",
        "https://py" + "pi.org/simple",
        "registry.npm" + "js.org",
        "index: files.pythonhos" + "ted.org",
        "as requ" + "ested, it is green",
        "in the prev" + "ious conversation",
    ],
)
def test_a_trace_of_a_machine_a_registry_or_a_history_is_found(text: str) -> None:
    assert traces(text)


def test_ordinary_words_are_no_trace() -> None:
    assert traces("/proc/PID/task /usr/lib/framework/ a shell prompt, a login session, the last task") == []
