# SPDX-License-Identifier: Apache-2.0
"""The queue of `depriv gc` processes, with real ones, in a state folder without domains: each of them fails."""

from __future__ import annotations

import select
import sys
import time
from typing import TYPE_CHECKING

import pytest

from depriv.gcruns import ALL, BEHIND_MAX, RETRY_MAX_S, RUNS_MAX, Runs, command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Queue:
    """A queue and its log."""

    def __init__(self, state_dir: str) -> None:
        self.said: list[str] = []
        self.epoll = select.epoll()
        self.runs = Runs(state_dir, self.epoll, self.said.append)

    def start(self, *, listed: bool = True) -> None:
        self.runs.start(lambda _domid: listed)

    def under_way(self) -> list[int]:
        return sorted(run.domid for run in self.runs._running.values())

    def ended(self, *, within_s: float = 30.0) -> list[tuple[int, int]]:
        """Wait until all that run have ended; return what they were for and their statuses."""
        found: list[tuple[int, int]] = []
        deadline = time.monotonic() + within_s
        while self.under_way():
            assert time.monotonic() < deadline
            for fd, _mask in self.epoll.poll(0.1):
                done = self.runs.ended(fd)
                assert done is not None
                found.append(done)
        return sorted(found)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    (tmp_path / "state").mkdir(mode=0o700)
    made = Queue(str(tmp_path / "state"))
    yield made
    made.ended()
    made.runs.close()
    made.epoll.close()


def test_words_are_those_of_the_command_line_and_never_of_the_current_folder() -> None:
    assert command(7) == [sys.executable, "-P", "-m", "depriv.cli", "gc", "--restart", "7"]
    assert command(ALL) == command(7)[:-1]


def test_run_ends_with_its_status(queue: Queue) -> None:
    queue.runs.want(7)
    queue.start()
    assert queue.under_way() == [7]
    ((domid, status),) = queue.ended()
    assert domid == 7
    assert status > 0  # there is no such domain


def test_no_more_run_at_once_than_may_and_the_rest_comes_later(queue: Queue) -> None:
    for domid in range(1, RUNS_MAX + 3):
        queue.runs.want(domid)
    queue.start()
    queue.start()
    assert queue.under_way() == list(range(1, RUNS_MAX + 1))
    queue.ended()
    queue.start()
    assert queue.under_way() == [RUNS_MAX + 1, RUNS_MAX + 2]


def test_one_domain_has_one_run_at_a_time_and_what_is_wanted_meanwhile_comes_after(queue: Queue) -> None:
    queue.runs.want(7)
    queue.start()
    queue.runs.want(7)
    queue.runs.want(7)
    queue.start()
    assert queue.under_way() == [7]
    queue.ended()
    queue.start()
    assert queue.under_way() == [7]
    queue.ended()
    queue.start()
    assert queue.under_way() == []


def test_domain_that_is_gone_is_left_out(queue: Queue) -> None:
    queue.runs.want(7)
    queue.start(listed=False)
    assert queue.under_way() == []
    queue.start()
    assert queue.under_way() == []


def test_failures_are_repeated_later_and_later_but_at_least_once_a_minute(queue: Queue) -> None:
    for _ in range(8):
        queue.runs.retry(7)
    pauses = [int(text.split()[-2]) for text in queue.said]
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]
    assert max(pauses) == RETRY_MAX_S
    queue.start()
    assert queue.under_way() == []  # not yet


def test_success_forgets_the_failures_before_it(queue: Queue) -> None:
    queue.runs.retry(7)
    queue.runs.retry(7)
    queue.runs.forget(7)
    queue.runs.retry(7)
    assert [int(text.split()[-2]) for text in queue.said] == [2, 4, 2]


def test_new_end_does_not_wait_for_the_pause_after_a_failure(queue: Queue) -> None:
    queue.runs.retry(7)
    queue.runs.want(7)
    queue.start()
    assert queue.under_way() == [7]


def test_repetitions_leave_room_for_others(queue: Queue) -> None:
    for domid in (1, 2, 3, 4):
        queue.runs.retry(domid)
        queue.runs.want(domid)
    queue.runs.want(9)
    queue.start()
    assert queue.under_way() == [1, 2, 9]
    assert BEHIND_MAX == 2


def test_run_for_all_waits_until_nothing_else_runs(queue: Queue) -> None:
    queue.runs.want(ALL)
    queue.runs.want(7)
    queue.start()
    assert queue.under_way() == [7]
    queue.ended()
    queue.runs.want(ALL)
    queue.runs.want(8)
    queue.start()
    assert queue.under_way() == [8]


def test_run_for_all_is_not_repeated_by_itself(queue: Queue) -> None:
    queue.runs.retry(ALL)
    queue.start()
    assert queue.under_way() == []
    assert queue.said == []


def test_run_that_takes_long_is_mentioned_once_and_left_alone(queue: Queue) -> None:
    queue.runs.want(7)
    queue.start()
    queue.runs.mention_slow(time.monotonic())
    assert queue.said == []
    for _ in range(3):
        queue.runs.mention_slow(time.monotonic() + 61)
    assert len(queue.said) == 1
    assert "gc for domain 7" in queue.said[0]
    assert queue.under_way() == [7]


def test_interpreter_that_cannot_be_started_is_a_failure_like_others(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python3")
    queue.runs.want(7)
    queue.start()
    assert queue.under_way() == []
    assert "cannot start depriv gc for domain 7" in queue.said[0]
    assert "again in 2 s" in queue.said[1]
