# SPDX-License-Identifier: Apache-2.0
"""The jail as the storm runs it: the very ``depriv.jail``, which can be stopped before and after each of its steps.

Executed in place of ``depriv/jail/__main__.py``, in the same way. What is to happen where is read from the command
line of the toolstack that started it: the jail's own environment is empty.
"""

from __future__ import annotations

import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
sys.path += [f"{ROOT}/src", ROOT]

from tests.support.storm_point import PACKAGE, Lines, Point  # noqa: E402

from depriv import check  # noqa: E402
from depriv.jail import process  # noqa: E402
from depriv.jail import reap as reaper  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from depriv.jail.apply import State
    from depriv.steps import Plan, Reap, Step


def what_is_wanted() -> dict[str, Any]:
    """Return the toolstack's SPEC; {} if it is gone already, or was started by nobody's storm."""
    try:
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
        found = json.loads(words[[word.endswith(b"storm_cli.py") for word in words].index(True) + 1])
    except (OSError, ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


def names_of(plan: Plan) -> list[tuple[Step, str]]:
    """Return each step with its name: its kind, and which of its kind it is."""
    seen: dict[str, int] = {}
    found: list[tuple[Step, str]] = []
    for step in (*plan.steps, *plan.after):
        kind = type(step).__name__
        seen[kind] = seen.get(kind, 0) + 1
        found.append((step, f"{kind}{seen[kind]}"))
    return found


def stop_at_step(wanted: str, when: str, reached: Callable[[str], None]) -> None:
    """Have ``reached`` called before or after the step of this name. Nothing comes after Execute but the answer."""
    names: list[tuple[Step, str]] = []
    attempt, answer = process.attempt, process.answer

    def stopping_check(plan: Plan) -> None:
        names[:] = names_of(plan)
        check.check(plan)

    def stopping_attempt(step: Step, state: State) -> None:
        name = next(name for each, name in names if each is step)
        if name == wanted and when == "before":
            reached(f"before {name}")
        attempt(step, state)
        if name == wanted and when == "after":
            reached(f"after {name}")

    def stopping_answer(control: int, words: list[str]) -> None:
        if words[0] == "started" and (wanted, when) == ("Execute1", "after"):
            reached("after Execute1")
        answer(control, words)

    vars(process).update(check=stopping_check, attempt=stopping_attempt, answer=stopping_answer)


def stop_killer(when: str, reached: Callable[[str], None]) -> None:
    """Have ``reached`` called in the reaper's child, before it becomes the reaper or after it has killed."""
    kill = reaper._become_reaper_and_kill

    def stopping_kill(step: Reap, deadline: float) -> bool:
        if when == "before":
            reached("before kill(-1)")
        done = kill(step, deadline)
        if when == "after":
            reached("after kill(-1)")
        return done

    reaper._become_reaper_and_kill = stopping_kill


def main(control: int) -> int:
    spec = what_is_wanted()
    hit = spec.get("hit")
    if not hit:
        return process.main(control)
    point = Point(spec["broker"], "jail")
    match hit["at"]:
        case "step":
            stop_at_step(hit["step"], hit["when"], point.reached)
        case "killer":
            stop_killer(hit["when"], point.reached)
        case "count":
            counting = Lines(hit, f"{PACKAGE}/jail", point.reached)
            # Before exec, since the child's lines are lost with it; and before a plan that only reaps is answered.
            stop_at_step("Execute1", "before", lambda _: tell(point, counting))
            counting.start()
            status = process.main(control)
            tell(point, counting)
            return status
        case _ if hit["who"] == "jail":
            Lines(hit, f"{PACKAGE}/jail", point.reached).start()
    return process.main(control)


def tell(point: Point, counting: Lines) -> None:
    sys.settrace(None)
    point.tell_lines(counting.counts)


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1])))
