# SPDX-License-Identifier: Apache-2.0
"""The reaper beside `cgroup.kill`, in one interleaved run: the time until hundreds of processes are *proved* gone.

Both in a pid namespace and a cgroup of version 2 of their own, both as a real-time process while they kill, both with
the same proof: no process with the uid or gid in /proc. What they end: processes that wait, and a fork bomb that has
reached its limit (tests/support/bombs.c). Run as root:

    .venv/bin/python bench/reap.py [ROUNDS]

Prints a table and keeps it as bench/results/reap.json. Compare no milliseconds between machines.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support import apart, build  # noqa: E402 (not installed: found from here)
from tests.support.linux import cache_directory  # noqa: E402

CASES = (("static", 200), ("static", 1000), ("fork", 200), ("fork", 1000))
GOAL_MS = 80.0  # a thousand that wait

CODE = r"""
program = os.open(sys.argv[3], os.O_RDONLY)
leaf, cases, rounds = sys.argv[4], json.loads(sys.argv[5]), int(sys.argv[6])

def bomb(what, count):
    pid = os.fork()
    if pid == 0:
        with open(leaf + "/cgroup.procs", "w") as file:
            file.write("0")
        os.setgroups(())
        os.setresgid(A, A, A)
        os.setresuid(A, A, A)
        os.execv(f"/proc/self/fd/{program}", ["bombs", what, str(count)])
    if what == "static":
        until(lambda: len(living(A)) == count, 60)
    else:
        time.sleep(0.2 + count / 1000)
    return pid

def by_cgroup():
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    with open(leaf + "/cgroup.kill", "w") as file:
        file.write("1")
    os.sched_setscheduler(0, *before)
    while survivors(A, A, until=reaper._now() + 0.05):
        pass

found = []
for what, count in cases:
    for _ in range(rounds):
        pair = []
        for way in (lambda: reap(STEP), by_cgroup):
            pid = bomb(what, count)
            begun = time.perf_counter()
            way()
            pair.append((time.perf_counter() - begun) * 1000)
            assert not survivors(A, A)
            os.waitpid(pid, 0)
        found.append([what, count, *pair])
print(json.dumps(found))
"""


def cgroup2() -> str:
    """Return where cgroups of version 2 are mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            return line.split()[4]
    raise SystemExit("no cgroups of version 2 here")


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    leaf = f"{cgroup2()}/depriv-bench-{os.getpid()}"
    os.mkdir(leaf)
    try:
        with tempfile.TemporaryDirectory() as folder:
            words = (str(build.bombs(cache_directory())), leaf, json.dumps(CASES), str(rounds))
            found = apart.run(Path(folder), CODE, *words, timeout_s=60 + 60 * rounds)
    finally:
        os.rmdir(leaf)
    cases: dict[str, dict[str, float]] = {}
    result = {
        "what": "the reaper over cgroup.kill, both until no process is left in /proc",
        "rounds": rounds,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "goal_ms": GOAL_MS,
        "cases": cases,
    }
    for what, count in CASES:
        pairs = [(reaped, killed) for kind, number, reaped, killed in found if (kind, number) == (what, count)]
        ratios = [reaped / killed for reaped, killed in pairs]
        case = cases[f"{what} {count}"] = {
            "reaper_ms": round(statistics.median(reaped for reaped, _ in pairs), 2),
            "cgroup_kill_ms": round(statistics.median(killed for _, killed in pairs), 2),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
        }
        print(f"{what:6} {count:5}  reaper {case['reaper_ms']:8.2f} ms  cgroup.kill {case['cgroup_kill_ms']:8.2f} ms")
    (ROOT / "bench/results/reap.json").write_text(json.dumps(result, indent=2) + "\n")
    reached = cases["static 1000"]["reaper_ms"]
    print(f"1000 that wait: {reached:.1f} ms (goal: at most {GOAL_MS:.0f})")
    return 0 if reached <= GOAL_MS else 1


if __name__ == "__main__":
    sys.exit(main())
