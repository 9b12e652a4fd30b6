# SPDX-License-Identifier: Apache-2.0
"""Where in a command somebody can be killed, and which of these places a storm chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.storm_broker import Hit

from depriv.records import Record

if TYPE_CHECKING:
    import random

    from depriv.steps import Plan

# Who changes something on the host: half of the places are looked for in there, where most lines are elsewhere.
_ACTING = (
    "lifecycle.py",
    "registry.py",
    "durable.py",
    "ending.py",
    "collect.py",
    "cgroup.py",
    "spawn.py",
    "runtime.py",
)
VERBS = ("create", "create", "create", "destroy", "gc", "restart")  # and "cold" now and then: it takes longest


class Places(Record):
    """What one command executes."""

    toolstack: tuple[tuple[str, int, str, int], ...]  # file, line, function, how often; in the order of the first time
    jail: tuple[tuple[str, int, str, int], ...]
    steps: tuple[str, ...]  # of a start: kind and which of its kind

    @staticmethod
    def of(lines: dict[tuple[str, int, str], int], plan: Plan) -> Places:
        """Return the places of lines that were counted, and of a plan."""
        every = tuple((*key, count) for key, count in lines.items())
        seen: dict[str, int] = {}
        names: list[str] = []
        for step in (*plan.steps, *plan.after):
            kind = type(step).__name__
            seen[kind] = seen.get(kind, 0) + 1
            names.append(f"{kind}{seen[kind]}")
        return Places(
            toolstack=tuple(place for place in every if not place[0].startswith("jail/")),
            jail=tuple(place for place in every if place[0].startswith("jail/")),
            steps=tuple(names),
        )


def required(rng: random.Random, places: dict[str, Places], *, thorough: bool) -> list[tuple[str, Hit]]:
    """Return what every storm has to hit: each step of the plan, each command, each who takes part in it."""
    found = [("create", hit) for hit in _at_steps(rng, places["create"].steps, thorough=thorough)]
    for when in ("before", "after"):
        found += [
            (verb, Hit(who="jail", at="killer", when=when, victim=victim))
            for verb in ("create", "destroy", "gc", "restart")
            for victim in (("self", "jail", "toolstack") if thorough else ("self", "jail"))
        ]
    for verb in ("create", "destroy", "gc", "restart"):  # one that is slow harms nobody
        slow = (
            _line(rng, places[verb].toolstack, "toolstack", "self"),
            Hit(who="jail", at="killer", when="before", victim="jail"),
        )
        found += [(verb, hit.replace(stop=True, resume=True, delay_ms=300)) for hit in slow]
    times = 4 if thorough else 1
    for verb, count in (("create", 10), ("destroy", 6), ("gc", 6), ("restart", 8), ("cold", 3)):
        found += [(verb, _line(rng, places[verb].toolstack, "toolstack", "self")) for _ in range(times * count)]
    for verb, count in (("create", 4), ("destroy", 3), ("gc", 3)):
        found += [(verb, _line(rng, places[verb].jail, "jail", "self")) for _ in range(times * count)]
    launch = [place for place in places["create"].toolstack if place[2] in ("_launch", "_await_prelaunch")]
    found += [("create", _place(rng, launch, "toolstack", rng.choice(("child", "jail")))) for _ in range(times * 4)]
    return found


def _at_steps(rng: random.Random, steps: tuple[str, ...], *, thorough: bool) -> list[Hit]:
    """Return a hit at each step of a start, and QEMU's death in the midst of its own."""
    found: list[Hit] = []
    fork = steps.index("BecomeInit1")
    for number, step in enumerate(steps):
        twice = thorough or step in ("EmptyRoot1", "Execute1")
        able = ("self", "toolstack") if number < fork else ("self", "toolstack", "jail", "child")
        for when in ("before", "after") if twice else (rng.choice(("before", "after")),):
            victims = able if thorough else (rng.choice(able),)
            found += [Hit(who="jail", at="step", step=step, when=when, victim=victim) for victim in victims]
    for when in ("before", "after"):
        found.append(Hit(who="jail", at="step", step="EmptyRoot1", when=when, victim="child"))
    for delay_ms in (0, 5, 20, 60, 120):
        found.append(Hit(who="jail", at="step", step="Execute1", when="after", victim="child", delay_ms=delay_ms))
    return found


def random_hit(rng: random.Random, places: dict[str, Places]) -> tuple[str, Hit]:
    """Return any command and anybody to be killed in it, anywhere."""
    verb = "cold" if rng.random() < 0.02 else rng.choice(VERBS)
    of = places[verb]
    roll = rng.random()
    if roll < 0.45:
        victim = rng.choice(("self", "self", "self", "jail", "child"))
        hit = _line(rng, of.toolstack, "toolstack", victim)
    elif roll < 0.6:
        hit = _line(rng, of.jail, "jail", rng.choice(("self", "self", "toolstack", "jail")))
    elif roll < 0.7:
        when = rng.choice(("before", "after"))
        hit = Hit(who="jail", at="killer", when=when, victim=rng.choice(("self", "jail", "toolstack")))
    else:
        step = rng.choice(of.steps) if verb in ("create", "cold", "restart") else "Reap1"
        late = of.steps.index(step) > of.steps.index("BecomeInit1")
        victims = ("self", "toolstack", "jail", "child") if late else ("self", "toolstack")
        when = rng.choice(("before", "after"))
        hit = Hit(who="jail", at="step", step=step, when=when, victim=rng.choice(victims))
    if rng.random() < 0.15:
        return verb, hit.replace(stop=True, resume=True, delay_ms=rng.randrange(50, 500))
    delay_ms = rng.choice((0, 0, 0, rng.randrange(5), rng.randrange(50), rng.randrange(200)))
    return verb, hit.replace(delay_ms=delay_ms, stop=rng.random() < 0.15)


def redrawn(rng: random.Random, places: dict[str, Places], verb: str, hit: Hit) -> Hit:
    """Return what is to be hit instead of a place that was not come to: another line, but the same step."""
    if hit.at not in ("line", "place"):
        return hit
    of = places[verb].toolstack if hit.who == "toolstack" else places[verb].jail
    drawn = _line(rng, of, hit.who, hit.victim)
    return drawn.replace(stop=hit.stop, delay_ms=hit.delay_ms, resume=hit.resume)


def _line(rng: random.Random, places: tuple[tuple[str, int, str, int], ...], who: str, victim: str) -> Hit:
    """Return a line, by how often it is executed or, as likely, each line as likely as any other that acts."""
    acting = [place for place in places if place[0] in _ACTING or place[0].startswith("jail/")]
    if acting and rng.random() < 0.6:
        return _place(rng, acting, who, victim)
    total = sum(place[3] for place in places)
    return Hit(who=who, at="line", nth=rng.randrange(total) + 1, victim=victim)


def _place(rng: random.Random, places: list[tuple[str, int, str, int]], who: str, victim: str) -> Hit:
    file, line, _function, count = rng.choice(places)
    return Hit(who=who, at="place", file=file, line=line, nth=rng.randrange(count) + 1, victim=victim)
