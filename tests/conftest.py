# SPDX-License-Identifier: Apache-2.0
"""Options and rules of all rings."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="rewrite the golden files; review the difference")


def pytest_configure() -> None:
    """Take Ctrl-C as from a terminal: what was started with & ignores it, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what would be skipped where everything is promised to be there: a skip is not a pass."""
    report = yield
    if report.skipped and "DEPRIV_MUST_WORK" in os.environ and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but DEPRIV_MUST_WORK is set: {report.longrepr}"
    return report
