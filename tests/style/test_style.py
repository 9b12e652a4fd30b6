# SPDX-License-Identifier: Apache-2.0
"""Linters are tests, and so are the house's budgets: one command answers whether a change passes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Two calls by hand instead of imports (docs/adr/0001), and the undoing of what a caller may hand down, are in it.
JAIL_LINES_MAX = 800  # without the reaper, which can be read by itself
REAPER_LINES_MAX = 250
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


@pytest.mark.parametrize(
    "words",
    [
        ["ruff", "format", "--check"],
        ["ruff", "check"],
        ["mypy"],
        ["pyright"],
        ["lint-imports"],
        ["codespell"],
    ],
    ids="-".join,
)
def test_linter_is_content(words: list[str]) -> None:
    done = subprocess.run([BIN / words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_source_file_names_its_licence_first() -> None:
    wrong = []
    for path in tracked("*.py", "*.c", "demo", "test", ".ci/run"):
        first, *rest = path.read_text().splitlines()
        line = rest[0] if first.startswith("#!") else first
        if "SPDX-License-Identifier: Apache-2.0" not in line:
            wrong.append(path.name)
    assert not wrong


def test_every_python_file_says_what_it_is_for() -> None:
    assert not [path for path in tracked("*.py") if ast.get_docstring(ast.parse(path.read_text())) is None]


def test_jail_stays_small_enough_to_be_read() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "src/depriv/jail").glob("*.py")}
    assert lines.pop("reap.py") <= REAPER_LINES_MAX
    assert sum(lines.values()) <= JAIL_LINES_MAX, lines


def test_no_module_outgrows_one_head() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in tracked("src/*.py")}
    assert not {path.name: size for path, size in sizes.items() if size > MODULE_LINES_MAX}


def test_no_function_outgrows_one_screen() -> None:
    found = []
    for path in tracked("src/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                # One `match` with a case per step is a table, not a decision.
                table = node.name in ("describe", "apply")
                if node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX and not table:
                    found.append(f"{path.name}:{node.lineno} {node.name}")
    assert not found


def test_jail_imports_the_standard_library_and_what_it_may_only() -> None:
    allowed = {"depriv", "depriv.check", "depriv.codec", "depriv.jail", "depriv.jail.process"}
    allowed |= {"depriv.jail.reap", "depriv.records", "depriv.steps"}
    for path in (ROOT / "src/depriv/jail").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name in allowed or name.split(".")[0] in sys.stdlib_module_names, f"{path.name}: {name}"


@pytest.mark.parametrize("heavy", ["typing", "dataclasses", "subprocess", "inspect", "logging", "asyncio", "argparse"])
def test_jail_does_not_import(heavy: str) -> None:
    """Start-up is counted in milliseconds, and what is not there cannot be wrong."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); sys.argv = ['x']; import depriv.jail.__main__; "
    code += f"sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("heavy", ["typing", "dataclasses", "subprocess", "inspect", "logging", "asyncio", "shutil"])
def test_path_of_create_does_not_import(heavy: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); import depriv.cli, depriv.spawn, depriv.api, "
    code += f"depriv.xlconfig; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", code], check=False).returncode == 0
