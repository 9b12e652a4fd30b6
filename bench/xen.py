# SPDX-License-Identifier: Apache-2.0
"""What depriv-dm adds to `xl create`, in an emulated Xen host: plain, and through the override, in turn.

Under emulation every instruction of Python costs some forty times what it costs on a processor, and hardly less than
QEMU's: the ratio is an upper bound. Run as root; it takes about five minutes:

    PYTHONPATH=src:. .venv/bin/python bench/xen.py [SUITE]

Prints a table and keeps it as bench/results/xen.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.xenlab.dom0 import Dom0

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 4
LIMIT_S = 300.0
ENTRY = "#!/usr/bin/python3 -I\nfrom depriv.dm import main\nmain()\n"
OVERRIDE: dict[str, Any] = {
    "device_model_version": "qemu-xen",
    "device_model_override": "/usr/bin/depriv-dm",
    "dm_restrict": 1,
}


def created_s(dom0: Dom0, config: str, name: str) -> float:
    """Return how long `xl create` takes; the domain is destroyed."""
    begun = time.monotonic()
    dom0.must(["xl", "create", config], timeout_s=LIMIT_S)
    took_s = time.monotonic() - begun
    dom0.must(["xl", "destroy", name], timeout_s=LIMIT_S)
    return took_s


def memory_kib(dom0: Dom0, word: str) -> int:
    """Return the PSS of all processes whose command line has a word, but for QEMU's own."""
    script = f"""
        for p in /proc/[0-9]*; do
            tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '^/usr/bin/python3.*{word}' || continue
            sed -n 's/^Pss: *\\([0-9]*\\).*/\\1/p' $p/smaps_rollup
        done | awk '{{ sum += $1 }} END {{ print sum + 0 }}'"""
    return int(dom0.must(script))


def main() -> None:
    """Measure and print."""
    suite = sys.argv[1] if len(sys.argv) > 1 else "bookworm"
    times: dict[str, list[float]] = {"plain": [], "override": []}
    with Dom0.start(suite) as dom0:
        dom0.put_python(ROOT / "src/depriv", "/usr/lib/python3/dist-packages/depriv")
        dom0.write("/usr/bin/depriv-dm", ENTRY.encode(), mode=0o755)
        plain = dom0.guest_config("plain")
        ours = dom0.guest_config("ours", **OVERRIDE)
        created_s(dom0, ours, "ours")  # makes the copy of QEMU's files, once for a host
        for _ in range(ROUNDS):
            times["plain"].append(created_s(dom0, plain, "plain"))
            times["override"].append(created_s(dom0, ours, "ours"))
        dom0.must(["xl", "create", ours], timeout_s=LIMIT_S)
        keeper_kib = memory_kib(dom0, "depriv")
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "what": "xl create of an HVM guest in an emulated Xen host, plain and with device_model_override = depriv-dm",
        "suite": suite,
        "rounds": ROUNDS,
        "median_s": {name: round(value, 2) for name, value in medians.items()},
        "ratio": round(medians["override"] / medians["plain"], 2),
        "keeper_pss_kib": keeper_kib,
    }
    print(json.dumps(result, indent=2))
    (ROOT / "bench/results/xen.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
