# SPDX-License-Identifier: Apache-2.0
"""A thousand domains created and ended while somebody who takes part is killed at a random step; nothing may be left.

The same harness as tests/qemu/test_storm.py, longer and more thorough. Run as root, after `depriv setup`:

    .venv/bin/python -m bench.storm [CYCLES [SEED]]

Prints what was left, prints the seed, and keeps the count as bench/results/storm.json. It takes the domids from
12000 to 17999: no other run of it, nor guests of the host with such numbers, can be there at the same time.
"""

from __future__ import annotations

import collections
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.support.storm_apart import run  # noqa: E402 (found only now)

DOMIDS = range(12000, 18000)


def main() -> int:
    cycles = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else int.from_bytes(os.urandom(4))
    print(f"seed {seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="storm-", dir="/var/tmp") as folder:
        came = run(Path(folder), seed=seed, cycles=cycles, domids=DOMIDS, thorough=True)
    verbs = collections.Counter(hit.partition(":")[0] for hit in came["hits"])
    result = {
        "what": "create and destroy cycles with SIGKILL of a random participant at a random step",
        "cycles": came["cycles"],
        "kills": len(came["hits"]),
        "kills_by_command": dict(sorted(verbs.items())),
        "steps_hit": came["steps_hit"],
        "steps": came["steps"],
        "seed": seed,
        "left_behind_or_harmed": len(came["faults"]),
        "seconds": round(time.monotonic() - began),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(result, indent=2))
    path = ROOT / "bench/results/storm.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if came["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
