# SPDX-License-Identifier: Apache-2.0
"""Domains created and ended while somebody who takes part is killed, at a random step; then nothing may be left.

Real QEMUs, the real command line. Those who are killed: the command (create, destroy, gc, gc --restart) before any
line that it executes; the jail and its child before or after any step of the plan, or before any line; the reaper's
killer; QEMU. Some are stopped first, some die a while later while the others go on. Beside it all live guests that
have nothing to do with it.

Cycle and seed decide who is killed where; what that meets is up to the scheduler.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.support.storm_broker import Broker, Hit
from tests.support.storm_guests import Live, config_text, kernels
from tests.support.storm_left import Ground, half_made
from tests.support.storm_places import Places, random_hit, redrawn, required

from depriv import proc
from depriv.api import Toolstack, load
from depriv.errors import DeprivError, NotFoundError
from depriv.identity import RANGE_BASE
from depriv.records import Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from depriv.entry import Entry

WORKERS = 2
CHECK_EVERY = 50
_COMMAND_TIMEOUT_S = 60.0
_STATUSES = (0, 1, 2, 125)  # of a command that was not killed


class Ran(Record):
    """One command that has ended."""

    status: int
    out: str
    said: str  # standard error
    struck: str  # who was killed or stopped where; "" if it did not come to that
    killed: bool  # somebody was


class Storm:
    """One storm. Use it as a context manager: the live guests end with it."""

    def __init__(self, folder: Path, *, seed: int, domids: range, say: Callable[[str], None]) -> None:
        """Start the live guests, and find out which lines each command executes.

        Args:
            folder: An empty one, for everything.
            seed: Decides who is killed where.
            domids: Numbers that nobody else on this host uses; the first of them was seeded as used.
            say: Told how it goes.
        """
        self.faults: list[str] = []
        self.hits: list[str] = []  # what was struck, each once it was
        self.cycles = 0
        self._folder = str(folder)
        self._state = f"{folder}/state"
        self._cache = f"{folder}/cache"
        self._seed = seed
        self._say = say
        self._lock = threading.Lock()
        self._number = 0
        self._said = 0
        self._log: list[str] = []
        self._required: list[tuple[str, Hit]] = []
        self._start(domids)

    def _start(self, domids: range) -> None:
        os.makedirs(f"{self._state}/domains", 0o700)
        os.chmod(self._state, 0o700)
        history = {str(domids.start): time.clock_gettime(time.CLOCK_BOOTTIME)}
        Path(f"{self._state}/history.json").write_text(json.dumps({"boot": proc.boot_id(), "freed": history}))
        os.chmod(f"{self._state}/history.json", 0o600)
        os.symlink(
            os.path.join(os.path.dirname(os.path.realpath(__file__)), "storm_jail.py"), f"{self._folder}/jail.py"
        )
        kernels(self._folder)
        self._host = Toolstack(state_dir=self._state, cache_dir=self._cache)
        first_uid = pwd.getpwnam(RANGE_BASE).pw_uid
        self._ground = Ground(self._folder, self._state, self._cache, first_uid=first_uid, domids=domids)
        self._live = Live(self._host, self._folder)
        self._ground.keep_descriptors()
        self._places = {verb: self._measured(verb) for verb in ("create", "destroy", "gc", "restart", "cold")}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """End the live guests, and see that nothing at all is left."""
        self._end_leftovers()
        self._live.close()
        self._host.gc()
        self.faults += [f"at the very end: {what}" for what in self._ground.left(())]

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of a start: each kind, and which of its kind it is."""
        return self._places["create"].steps

    @property
    def steps_hit(self) -> int:
        """At how many of them somebody was killed."""
        words = {word for hit in self.hits for word in hit.split()}
        return len(words & set(self.steps))

    def run(self, cycles: int, *, thorough: bool) -> None:
        """Do so many cycles, and as many more as it takes to hit everything at least once, checking every now and then.

        Args:
            cycles: At least.
            thorough: Hit each step both before and after, and more than one of those who take part in it.
        """
        rng = random.Random(self._seed)
        self._required = required(rng, self._places, thorough=thorough)
        rng.shuffle(self._required)
        with ThreadPoolExecutor(WORKERS) as pool:
            while self.cycles < cycles or (self._required and self.cycles < 2 * cycles):
                batch = range(self.cycles, self.cycles + CHECK_EVERY)
                for found in pool.map(self._safe_cycle, batch):
                    self.faults += found
                self.cycles += len(batch)
                self.check()
        self.faults += [f"never hit: {verb}: {hit}" for verb, hit in self._required]

    def check(self) -> None:
        """Have everything cleared, and see that nothing is there but the live guests, and that they are well."""
        self._end_leftovers()
        done = self._command(("gc", "--json"))
        if done.status != 0:
            self.faults.append(f"gc at a check: {done.status}: {done.out}{done.said}")
        alive = self._live.alive()
        found = [*self._ground.left(alive), *self._live.harmed()]
        domids = {guest.domid for guest in alive}
        found += [f"listed: {entry}" for entry in self._host.registry.entries() if entry.domid not in domids]
        if found:
            found += [f"log: {line}" for line in self._log[-3 * CHECK_EVERY :]]
        self._log.clear()
        for path in Path(self._folder).glob("g*.img"):  # not before: the next file would get a number that is listed
            path.unlink()
        self.faults += [f"after {self.cycles} cycles: {what}" for what in found]
        for fault in self.faults[self._said :]:
            self._say(fault)
        self._said = len(self.faults)
        self._say(f"{self.cycles} cycles, {len(self.hits)} kills, {self._said} faults")

    def _end_leftovers(self) -> None:
        """End the guests that came through, as an administrator would."""
        live = {guest.domid for guest in self._live.alive()}
        for guest in self._host.guests():
            if guest.domid not in live:
                try:
                    guest.destroy()
                except NotFoundError:
                    continue
                except DeprivError as error:
                    self.faults.append(f"destroy of {guest.name} ({guest.domid}): {error}: {error.cause}")

    def _safe_cycle(self, number: int) -> list[str]:
        rng = random.Random(f"{self._seed}:{number}")
        with self._lock:
            planned = self._required.pop() if self._required else None
        verb, hit = planned or random_hit(rng, self._places)
        faults: list[str] = []
        try:
            struck = self._cycle(number, verb, hit, rng, faults)
        except Exception as error:
            struck = ""
            faults.append(f"{error!r}")
        with self._lock:
            if struck:
                self.hits.append(f"{verb}: {struck}")
            elif planned:
                self._required.insert(0, (verb, redrawn(rng, self._places, verb, hit)))
            self._log.append(f"cycle {number} {verb} {struck or 'nothing hit'} {hit}")
        if self._live.dead():
            faults.append(f"a live guest died: {self._live.dead()}")
        return [f"cycle {number}, {verb}, {struck or 'nothing hit'} ({hit}): {what}" for what in faults]

    def _cycle(self, number: int, verb: str, hit: Hit, rng: random.Random, faults: list[str]) -> str:
        """Create and end a domain, with one kill in one of the commands; return who was killed where."""
        name = f"g{number}"
        words = self._create_words(name, rng, verb)
        cache = f"{self._folder}/cold{number}" if verb == "cold" else self._cache
        if verb in ("create", "cold"):
            ran = self._command(words, hit, cache=cache)
            self._judge_create(ran, name, faults)
        else:
            ran = self._command(words)
            self._expect(ran, faults, "create beside")
            if ran.status == 0 and verb == "gc":
                self._await_off(name)
            elif ran.status == 0 and verb == "restart":
                self._kill_qemu(name, rng)
            told = {"destroy": ("destroy", name), "gc": ("gc",), "restart": ("gc", "--restart")}[verb]
            ran = self._command(told, hit)
            if not ran.killed:
                self._expect(ran, faults, verb, gone=True)
        self._judge(ran, faults)
        after = rng.choice(("next", "next", "gc", "gc", "destroy"))
        if verb == "cold":
            self._judge(self._command(("gc",), cache=cache), faults)
            faults += half_made(cache)
            shutil.rmtree(cache, ignore_errors=True)
        elif after == "gc":
            self._judge(self._command(("gc", "--restart") if rng.random() < 0.3 else ("gc",)), faults)
        if after == "destroy" or rng.random() < 0.7:
            self._destroy(name, faults)
        return ran.struck

    def _destroy(self, name: str, faults: list[str]) -> None:
        """End a domain that may be there or not, by the command line if it is."""
        if any(entry.name == name for entry in self._host.registry.entries()):
            ran = self._command(("destroy", name))
            self._judge(ran, faults)
            self._expect(ran, faults, "destroy beside", gone=True)

    def _judge(self, ran: Ran, faults: list[str]) -> None:
        """Hold a command that was not killed itself to its word."""
        if ran.status == -signal.SIGKILL and ran.killed:
            return
        if ran.status not in _STATUSES or "Traceback" in ran.said:
            faults.append(f"status {ran.status}: {ran.out}{ran.said}")

    def _expect(self, ran: Ran, faults: list[str], what: str, *, gone: bool = False) -> None:
        """Hold a command in which nobody was killed to success; the other worker's gc may have been faster."""
        fine = ran.status == 0 or (gone and ("there is no domain" in ran.said or "is gone" in ran.said))
        # What the other worker is at right now is left alone, and what was killed right now may take a second try.
        if not fine and not ("another command is at it" in ran.out and "failed" not in ran.out):
            faults.append(f"{what}: status {ran.status}: {ran.out}{ran.said}")

    def _judge_create(self, ran: Ran, name: str, faults: list[str]) -> None:
        """A create that says it failed has left nothing; one in which nobody was killed does not fail."""
        if ran.status == 0 or (ran.status == -signal.SIGKILL and ran.killed):
            return
        if not ran.killed:
            faults.append(f"create failed by itself, {ran.status}: {ran.said}")
        left = [entry for entry in self._host.registry.entries() if entry.name == name]
        if any(entry.state != "quarantined" for entry in left):
            faults.append(f"create failed, but: {left}; it said: {ran.said}")

    def _create_words(self, name: str, rng: random.Random, verb: str) -> tuple[str, ...]:
        """Return what starts a guest for ``verb`` to end; for gc one that switches itself off: no start clears that."""
        path = f"{self._folder}/{name}.cfg"
        crash, kernel = "restart" if verb == "restart" else "destroy", "off" if verb == "gc" else "idle"
        Path(path).write_text(config_text(self._folder, name, crash=crash, kernel=kernel))
        return ("create", "--paused", path) if verb != "gc" and rng.random() < 0.5 else ("create", path)

    def _await_off(self, name: str) -> None:
        """Return once a guest has switched itself off, or somebody has cleared it by then."""
        deadline = time.monotonic() + _COMMAND_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                if self._host.guest(name).row().state in ("shutdown", "dead"):
                    return
            except NotFoundError:
                return
            time.sleep(0.02)
        raise AssertionError(f"{name} does not switch itself off")

    def _kill_qemu(self, name: str, rng: random.Random) -> None:
        """End a domain's QEMU a moment after its start, as a crash would."""
        time.sleep(rng.choice((0, 0, 0.02, 0.1)))
        entry = self._entry(name)
        if entry is not None and entry.expected is not None:
            pidfd = os.pidfd_open(entry.expected.pid)
            if proc.alive(entry.expected.pid, entry.expected.starttime) == "running":
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], (), (), 5)
            os.close(pidfd)

    def _entry(self, name: str) -> Entry | None:
        return next((entry for entry in self._host.registry.entries() if entry.name == name), None)

    def _measured(self, verb: str) -> Places:
        """Return what one run of a command executes when nobody is killed."""
        name = f"m-{verb}"
        rng = random.Random(0)
        words = self._create_words(name, rng, verb)
        count = Hit(who="toolstack", at="count", victim="self")
        lines: dict[tuple[str, int, str], int] = {}
        cache = f"{self._folder}/{name}" if verb == "cold" else self._cache
        told = {"destroy": ("destroy", name), "gc": ("gc",), "restart": ("gc", "--restart")}.get(verb, words)
        if told is not words:
            assert self._command(words).status == 0
        if verb == "gc":
            self._await_off(name)
        if verb == "restart":
            self._kill_qemu(name, rng)
        ran = self._command(told, count, cache=cache, lines=lines)
        assert ran.status == 0, ran.said
        plan = self._host.plan(load(words[-1], ("disk=[]", f'name="{name}-plan"')))
        for guest in self._host.guests():
            if guest.name == name:
                guest.destroy()
        if cache != self._cache:
            shutil.rmtree(cache)
        return Places.of(lines, plan.plan)

    def _command(
        self,
        words: tuple[str, ...],
        hit: Hit | None = None,
        *,
        cache: str = "",
        lines: dict[tuple[str, int, str], int] | None = None,
    ) -> Ran:
        """Run one command to its end."""
        with self._lock:
            self._number += 1
            number = self._number
        address = f"depriv-storm-{os.getpid()}-{number}"
        spec = {
            "broker": address,
            "state": self._state,
            "cache": cache or self._cache,
            "jail": f"{self._folder}/jail.py",
            "hit": hit.as_dict() if hit else None,
        }
        script = os.path.join(os.path.dirname(os.path.realpath(__file__)), "storm_cli.py")
        argv = [sys.executable, "-P", script, json.dumps(spec), *words]
        paths = [f"{self._folder}/{kind}-{number}" for kind in ("out", "err")]
        broker = Broker(address, hit, self._folder) if hit else None
        # Files and not pipes: whoever inherits them may live longer.
        with open(paths[0], "wb") as out, open(paths[1], "wb") as err:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        if broker is not None:
            broker.start(process.pid)
        try:
            status = process.wait(_COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = -99
        if broker is not None:
            broker.close()
            if lines is not None:
                lines.update(broker.lines)
        texts = [Path(path).read_text(errors="replace") for path in paths]
        for path in paths:
            os.unlink(path)
        struck = broker.struck if broker is not None else ""
        killed = bool(struck) and hit is not None and not hit.resume
        return Ran(status=status, out=texts[0], said=texts[1], struck=struck, killed=killed)
