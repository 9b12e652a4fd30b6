# SPDX-License-Identifier: Apache-2.0
"""`depriv run -- LINE` beside the bare LINE, in one interleaved run: real lines of tests/qemu/command_lines.py.

Both: from exec to the line's own QMP saying "running". depriv: the whole command, cold: interpreter, imports, the line
understood, plan, jail, QEMU, emptied root, audit, registry. Run as root, after `depriv setup`:

    PYTHONPATH=. .venv/bin/python bench/run.py [ROUNDS]

Prints a table and keeps it as bench/results/run.json. Figures are ratios of one run on one machine: compare no
milliseconds between machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.qemu.command_lines import LINES
from tests.support.lines import fill

from depriv.errors import MonitorError
from depriv.qmp import Monitor
from depriv.status import status as said

ROOT = Path(__file__).resolve().parents[1]
DEPRIV = [str(Path(sys.executable).parent / "depriv"), "run", "--"]
WANTED = ("libvirt-virtiofs-memory", "avocado-vt", "microvm", "packer", "nvme-spdk")
# QMP for lines that have none, or that start stopped.
QMP = "-qmp unix:$D/bench.sock,server=on,wait=off"


def line(name: str, folder: Path) -> list[str]:
    """Return the words of a line, its guest not stopped."""
    words = next(line.words for line in LINES if line.name == name).replace("-S ", " ")
    vnc = words.replace("127.0.0.1:$V", f"unix:{folder}/vnc").replace("-vnc :$V", f"-vnc unix:{folder}/vnc")
    return ["qemu-system-x86_64", *shlex.split(f"{vnc} {QMP}".replace("$D", str(folder)))]


def started(argv: list[str], folder: Path) -> float:
    """Return milliseconds from exec to "running"; end it."""
    path = folder / "bench.sock"
    begun = time.perf_counter()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        took = 0.0
        while not took:
            if run.poll() is not None:
                raise RuntimeError(f"it ended with {run.returncode}: {shlex.join(argv)}")
            with contextlib.suppress(MonitorError), Monitor.connect(str(path), timeout_s=10) as monitor:
                while said(monitor, 10) != "running":
                    time.sleep(0.0005)
                took = time.perf_counter() - begun
            time.sleep(0.0005)
        run.terminate()
        run.wait(20)
    path.unlink(missing_ok=True)
    return took * 1000


def measured(name: str, folder: Path, rounds: int) -> dict[str, float | str]:
    """Return the medians of one line."""
    argv = line(name, folder)
    started([*DEPRIV, *argv], folder)  # fills the cache, as the first start ever does
    started(argv, folder)
    pairs = [(started(argv, folder), started([*DEPRIV, *argv], folder)) for _ in range(rounds)]
    ratios = [pair[1] / pair[0] for pair in pairs]
    return {
        "line": name,
        "bare_ms": round(statistics.median(pair[0] for pair in pairs), 2),
        "run_ms": round(statistics.median(pair[1] for pair in pairs), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
    }


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    with tempfile.TemporaryDirectory() as name:
        folder = fill(Path(name) / "d")
        lines = [measured(each, folder, rounds) for each in WANTED]
    result = {
        "what": "depriv run -- LINE over the bare LINE, exec to running, tcg",
        "rounds": rounds,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "lines": lines,
    }
    path = ROOT / "bench/results/run.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'line':26}{'bare':>10}{'depriv run':>12}{'ratio':>8}")
    for each in lines:
        print(f"{each['line']:26}{each['bare_ms']:7} ms{each['run_ms']:9} ms{each['ratio']:8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
