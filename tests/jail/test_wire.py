# SPDX-License-Identifier: Apache-2.0
"""Whatever comes in instead of a plan: the jail answers or ends, soon, and has done nothing."""

from __future__ import annotations

import os
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support import host

from depriv import codec
from depriv.errors import JailError
from depriv.jail.process import read_plan
from depriv.spawn import Jail
from depriv.steps import MakeCgroup, Plan, Reap

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.support.launch import Ground

pytestmark = pytest.mark.root

PLAN = Plan(
    domain="x",
    domid=1,
    restricted=True,
    shared=False,
    # Were it done, the missing folder of the lock would be named, not "check the plan".
    steps=(Reap(uid=76001, gid=76001, reaper_uid=76003, lock="/no/such/folder/lock"),),
)
GOOD = codec.encode(PLAN)
BODY = GOOD.partition(b"\n")[2]
COUNT = BODY.split(b"\0").index(b"Reap") - 1  # where the number of steps stands


def framed(body: bytes) -> bytes:
    return b"%d\n%s" % (len(body), body)


def talk(data: bytes) -> tuple[bytes, int]:
    """Send bytes to a new jail, shut our direction, and return all it says and its exit status."""
    with Jail() as jail:
        jail._control.settimeout(10)
        try:
            jail._control.sendall(data)
            jail._control.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, OSError):
            pass  # it did not wait for the end of what is wrong from its beginning
        said = b""
        try:
            while chunk := jail._control.recv(65536):
                said += chunk
        except ConnectionResetError:
            pass
        pid, jail._pid = jail._pid, 0
        return said, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(autouse=True)
def nothing_is_done() -> Generator[None]:
    """Whatever was sent: no process, descriptor or cgroup is left."""
    before = host.snapshot()
    yield
    assert host.snapshot() == before


def words(body: bytes, change: dict[int, bytes]) -> bytes:
    parts = body.split(b"\0")
    for place, word in change.items():
        parts[place] = word
    return b"\0".join(parts)


MALFORMED = {
    "no length": b"depriv-plan-2",
    "a negative length": b"-5\nabcde",
    "a signed length": b"+5\nabcde",
    "a length with a blank": b" 5\nabcde",
    "a length with an underscore": b"1_0\nabcdefghij",
    "a length of zero": b"0\n",
    "a length in other digits": "\u0665\nabcde".encode(),
    "an endless length": b"1" * 100_000,
    "a plan of two megabytes": b"2097152\n" + bytes(65536),
    "a plan of a length that no machine has": b"9" * 9 + b"\n",
    "nothing but zeros": framed(bytes(100)),
    "an unknown version": framed(words(BODY, {0: b"depriv-plan-1"})),
    "no version": framed(BODY.partition(b"\0")[2]),
    "an empty body of one word": framed(b"x"),
    "an unknown step": framed(BODY.replace(b"Reap", b"Rape")),
    "a step that is an attribute of the module": framed(BODY.replace(b"Reap", b"Record")),
    "a number that is none": framed(BODY.replace(b"76001", b"root")),
    "a number in hexadecimal": framed(BODY.replace(b"76001", b"0x10")),
    "a number with a zero in front": framed(BODY.replace(b"76001", b"076001")),
    "a number of a thousand digits": framed(BODY.replace(b"76001", b"7" * 1000)),
    "a boolean that is neither": framed(words(BODY, {3: b"2"})),
    "a boolean in words": framed(words(BODY, {3: b"True"})),
    "a network that is neither kept nor left": framed(words(BODY, {5: b"no"})),
    "more steps than it has": framed(words(BODY, {COUNT: b"2"})),
    "fewer steps than it has": framed(words(BODY, {COUNT: b"0"})),
    "a million steps": framed(words(BODY, {COUNT: b"1000000"})),
    "a negative number of steps": framed(words(BODY, {COUNT: b"-1"})),
    "words after its end": framed(BODY + b"\0more"),
    "bytes after its end": GOOD + b"more",
    "a second plan": GOOD + GOOD,
    "a uid of root": framed(BODY.replace(b"76001", b"0")),
    "a reaper that is its own target": framed(BODY.replace(b"76003", b"76001")),
    "a relative path": framed(BODY.replace(b"/no/such", b"no/such")),
    "a path with dots": framed(BODY.replace(b"/no/such", b"/no/../such")),
    "no name": framed(words(BODY, {1: b""})),
    "no steps": framed(b"\0".join([*BODY.split(b"\0")[:COUNT], b"0", b"0"])),
    "bytes that are no text": framed(BODY.replace(b"Reap", b"\xff\xfe")),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_plan_is_refused_before_its_first_step(data: bytes) -> None:
    begun = time.monotonic()
    said, status = talk(data)
    assert b"failed\0check the plan\0" in said
    assert status == 1
    assert time.monotonic() - begun < 10


def test_plan_these_are_made_from_is_done_step_by_step() -> None:
    said, status = talk(GOOD)
    assert said.partition(b"\n")[2].split(b"\0")[:3] == [b"failed", steps_text(), b"2"]
    assert status == 1


def steps_text() -> bytes:
    from depriv.steps import describe

    return describe(PLAN.steps[0]).encode()


def test_silence_is_no_error() -> None:
    assert talk(b"") == (b"", 0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 20, len(GOOD) // 2, len(GOOD) - 1])
def test_plan_cut_off_is_answered(size: int) -> None:
    said, status = talk(GOOD[:size])
    assert b"failed\0check the plan\0" in said
    assert status == 1


def test_reading_ends_at_every_byte_where_the_plan_may_be_cut_off() -> None:
    for size in range(len(GOOD) + 1):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(GOOD[:size])
            ours.shutdown(socket.SHUT_WR)
            if size in (0, len(GOOD)):
                assert read_plan(theirs.fileno()) == (BODY if size else b"")
            else:
                with pytest.raises(ValueError, match=r"ends early|length"):
                    read_plan(theirs.fileno())


@pytest.mark.parametrize("data", [b"+5\nabcde", b" 5\nabcde", b"5 \nabcde", b"1_0\nabcdefghij", b"1\nab", b"\nabc"])
def test_length_is_plain_digits_and_exact(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        with pytest.raises(ValueError, match=r"length|after its end"):
            read_plan(theirs.fileno())


def test_plan_that_trickles_in_is_read_whole() -> None:
    with Jail() as jail:
        for place in range(len(GOOD)):
            jail._control.sendall(GOOD[place : place + 1])
        with pytest.raises(JailError, match="kill every process"):
            jail._answer("done", 10)


def test_half_a_plan_is_waited_for_and_its_end_ends_the_jail() -> None:
    with Jail() as jail:
        jail._control.sendall(GOOD[:-1])
        assert select.select([jail._control], [], [], 0.3)[0] == []
    # Leaving the block waits for the jail's end.


def test_second_plan_after_the_start_is_no_release(ground: Ground) -> None:
    from tests.support.launch import running

    launch = ground.launch("--serve")
    with running(launch) as started:
        started.jail._control.sendall(GOOD)
        assert started.ended()
    ground.forget(launch)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_reading_any_bytes_ends_with_a_body_or_a_plain_refusal(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        try:
            body = read_plan(theirs.fileno())
        except ValueError:
            return
        assert framed(body) == data or (body == b"" and data == b"")


def test_no_other_program_is_executed_by_a_plan_without_confinement(ground: Ground) -> None:
    """A plan whose restrictions were left out on the wire is not one that the jail does."""
    launch = ground.launch("--serve")
    bare = launch.plan.replace(steps=tuple(s for s in launch.plan.steps if not isinstance(s, MakeCgroup)))
    with Jail() as jail, pytest.raises(JailError, match="check the plan"):
        jail.launch(bare, timeout_s=10)
    assert ground.snapshot().processes == ()
    ground.forget(launch)
