# SPDX-License-Identifier: Apache-2.0
"""A real Xen host for each Debian suite, one suite after the other, in QEMU's emulation."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from tests.support.host import need
from tests.support.xenlab import image
from tests.support.xenlab.dom0 import Dom0, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.xenlab.machine import Warm


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``only_on`` another suite: not skipped, because it promises nothing there."""
    wrong = [item for item in items if isinstance(item, pytest.Function) and _is_elsewhere(item)]
    if wrong:
        config.hook.pytest_deselected(items=wrong)
        items[:] = [item for item in items if item not in wrong]


def _is_elsewhere(item: pytest.Function) -> bool:
    mark = item.get_closest_marker("only_on")
    return mark is not None and item.callspec.params["suite"] not in mark.args


@pytest.fixture(scope="session")
def hosts(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[tuple[image.Image, Warm]]]]:
    """Return suite -> image and saved state; that of the next suite is made while the first one's tests run."""
    need(os.geteuid() == 0, what="root")
    need(not image.missing(), what="xen")
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted = {str(item.callspec.params["suite"]) for item in functions if "suite" in item.fixturenames}
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield {suite: pool.submit(prepare, suite) for suite in sorted(wanted)}


@pytest.fixture(scope="session", params=sorted(image.SUITES))
def suite(request: pytest.FixtureRequest, hosts: dict[str, Future[tuple[image.Image, Warm]]]) -> str:
    """Return the Debian suite of dom0, ready to start."""
    name: str = request.param
    hosts[name].result()
    return name


@pytest.fixture(scope="module")
def dom0(suite: str) -> Iterator[Dom0]:
    """Return a dom0 that the tests of a module share; each ends the guests that it starts."""
    with Dom0.start(suite) as made:
        yield made
