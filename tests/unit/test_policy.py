# SPDX-License-Identifier: Apache-2.0
"""The kernel is believed before QEMU, QEMU about its own guest only, and no guest is started for ever."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depriv.config import ACTIONS
from depriv.policy import ENDS, RESTARTS_MAX, SHORT_LIFE_S, action, happened, reason_of_event, restarts_after

# Every word of RunState, qapi/run-state.json, QEMU 7.2, of a guest that runs or can go on by itself or by a command.
GOING_ON = (
    *("running", "paused", "prelaunch", "inmigrate", "postmigrate", "finish-migrate", "restore-vm", "save-vm"),
    *("suspended", "watchdog", "io-error", "colo", "debug"),
)
FORGED = ("", "run", "Poweroff", "poweroff ", "destroy", "shutdown", "../../x", "\0", "none")

# alive, status, noted -> what happened
TABLE: dict[tuple[str, str, str], str] = {}
for noted in (*ENDS, *FORGED):
    known = noted if noted in ENDS else ""
    for status in (*GOING_ON, "", "shutdown", "guest-panicked", "internal-error", "forged", "SHUTDOWN"):
        # QEMU is gone, whatever it has said before.
        TABLE["dead", status, noted] = TABLE["dead-leader", status, noted] = known or "crash"
        TABLE["running", status, noted] = ""
    TABLE["running", "", noted] = ""  # it hangs, or was not asked: the note may be of an end that it came back from
    TABLE["running", "shutdown", noted] = known or "poweroff"
    TABLE["running", "guest-panicked", noted] = TABLE["running", "internal-error", noted] = known or "crash"


@pytest.mark.parametrize("case", TABLE)
def test_what_happened_is_as_in_the_table(case: tuple[str, str, str]) -> None:
    alive, status, noted = case
    assert happened(alive=alive, status=status, noted=noted) == TABLE[case]


@pytest.mark.parametrize("noted", ENDS)
@pytest.mark.parametrize("status", GOING_ON)
def test_guest_that_runs_has_not_ended_whatever_was_noted(status: str, noted: str) -> None:
    assert happened(alive="running", status=status, noted=noted) == ""


@pytest.mark.parametrize("alive", ["dead", "dead-leader"])
def test_no_word_of_qemus_keeps_a_dead_one_alive(alive: str) -> None:
    assert happened(alive=alive, status="running", noted="") == "crash"


@given(st.text(), st.text())
def test_forged_words_come_to_nothing(status: str, noted: str) -> None:
    assert happened(alive="running", status=status, noted=noted) in ("", *ENDS)
    assert happened(alive="dead", status=status, noted=noted) in ENDS


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, "poweroff"),
        ("SHUTDOWN", {"guest": False, "reason": "host-ui"}, "poweroff"),
        ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}, "poweroff"),
        ("SHUTDOWN", {"guest": True, "reason": "guest-reset"}, "reboot"),
        ("SHUTDOWN", {"guest": False, "reason": "host-qmp-system-reset"}, "reboot"),
        ("SHUTDOWN", {"guest": True, "reason": "guest-panic"}, "crash"),
        ("SHUTDOWN", {"guest": False, "reason": "host-error"}, "crash"),
        ("SHUTDOWN", {"guest": False, "reason": "host-signal"}, "host"),
        ("GUEST_PANICKED", {"action": "pause"}, "crash"),
        ("GUEST_PANICKED", {"action": "poweroff"}, "crash"),
        ("GUEST_PANICKED", None, "crash"),
        ("GUEST_PANICKED", {"action": "run"}, ""),
    ],
)
def test_events_that_end_a_guest_say_how(name: str, data: object, said: str) -> None:
    assert reason_of_event(name, data) == said


@pytest.mark.parametrize(
    "name", ["RESET", "STOP", "RESUME", "POWERDOWN", "GUEST_CRASHLOADED", "shutdown", "", "X" * 99]
)
def test_other_events_end_no_guest(name: str) -> None:
    assert reason_of_event(name, {"guest": True, "reason": "guest-shutdown", "action": "pause"}) == ""


@pytest.mark.parametrize(
    "data",
    [
        *(None, [], "guest-shutdown", 5, {}, {"guest": True}, {"reason": ["guest-shutdown"]}, {"reason": {}}),
        *({"reason": None}, {"reason": True}, {"reason": "poweroff"}, {"reason": "subsystem-reset"}, {5: 6}),
    ],
)
def test_shutdown_that_makes_no_sense_says_nothing(data: object) -> None:
    assert reason_of_event("SHUTDOWN", data) == ""


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    st.sampled_from(["SHUTDOWN", "GUEST_PANICKED", "RESET"]) | st.text(), JSON | st.fixed_dictionaries({"reason": JSON})
)
def test_no_event_is_answered_by_an_exception_or_another_word(name: str, data: object) -> None:
    assert reason_of_event(name, data) in ("", *ENDS)


def decide(what: str, *, restarts: int = 0, lived_s: float = 3600.0, **wanted: str) -> str:
    words = {"on_poweroff": "destroy", "on_reboot": "destroy", "on_crash": "destroy", **wanted}
    done, why = action(what, restarts=restarts, lived_s=lived_s, **words)
    assert why
    return done


@pytest.mark.parametrize(("what", "wanted"), tuple(itertools.product(("poweroff", "reboot", "crash"), ACTIONS)))
def test_each_ending_is_answered_as_its_own_key_says(what: str, wanted: str) -> None:
    other = "preserve" if wanted != "preserve" else "restart"
    words = {"on_poweroff": other, "on_reboot": other, "on_crash": other, f"on_{what}": wanted}
    assert action(what, restarts=0, lived_s=3600.0, **words)[0] == wanted


@pytest.mark.parametrize("wanted", ACTIONS)
def test_guest_stopped_by_the_host_is_not_started_against_it(wanted: str) -> None:
    assert decide("host", on_poweroff=wanted, on_reboot=wanted, on_crash=wanted) == "destroy"


@pytest.mark.parametrize("what", ["", "shutdown", "Crash", "on_crash", "\0"])
@pytest.mark.parametrize("wanted", ACTIONS)
def test_guest_to_which_nothing_known_happened_is_left_alone(what: str, wanted: str) -> None:
    assert decide(what, on_poweroff=wanted, on_reboot=wanted, on_crash=wanted) == "none"


@pytest.mark.parametrize("wanted", ["", "coredump-restart", "Restart"])
def test_action_that_nobody_knows_destroys_and_starts_nothing(wanted: str) -> None:
    assert decide("crash", on_crash=wanted) == "preserve"


@pytest.mark.parametrize("what", ["poweroff", "reboot", "crash"])
@pytest.mark.parametrize("wanted", ACTIONS)
@pytest.mark.parametrize(
    ("restarts", "lived_s", "again"),
    [
        (0, 0.0, True),
        (RESTARTS_MAX - 1, 1.0, True),
        (RESTARTS_MAX, SHORT_LIFE_S, True),
        (RESTARTS_MAX, SHORT_LIFE_S - 0.001, False),
        (RESTARTS_MAX + 1, 0.0, False),
        (RESTARTS_MAX, -1.0, False),
        (RESTARTS_MAX, float("nan"), False),
    ],
)
def test_only_restarts_after_short_lives_are_counted_out(
    what: str, wanted: str, restarts: int, lived_s: float, *, again: bool
) -> None:
    done = decide(what, restarts=restarts, lived_s=lived_s, **{f"on_{what}": wanted})
    assert done == (wanted if again or wanted in ("destroy", "preserve") else "preserve")


def lives(each_s: float, limit: int = 50) -> int:
    """Return how often a guest that lives so long is started, the first time included."""
    restarts = 0
    for started in range(1, limit):
        if decide("crash", restarts=restarts, lived_s=each_s, on_crash="restart") != "restart":
            return started
        restarts = restarts_after(restarts, each_s)
    return limit


def test_guest_that_fails_at_once_is_started_again_five_times() -> None:
    assert RESTARTS_MAX == 5
    assert lives(2.0) == 6


def test_guest_that_fails_once_an_hour_is_started_again_for_ever() -> None:
    assert lives(3600.0) == 50


def test_long_life_makes_up_for_all_short_ones() -> None:
    assert restarts_after(RESTARTS_MAX, SHORT_LIFE_S) == 0
    assert restarts_after(0, SHORT_LIFE_S - 0.001) == 1
    assert restarts_after(4, float("nan")) == 5


def test_who_is_not_started_again_is_told_why() -> None:
    words = {"on_poweroff": "destroy", "on_reboot": "destroy", "on_crash": "restart"}
    _, why = action("crash", restarts=5, lived_s=1.0, **words)
    assert why == "on_crash = restart, but not again: 5 restarts, each after less than 60 s"
