# SPDX-License-Identifier: Apache-2.0
"""`depriv create` beside bare QEMU, in one interleaved run: the same paused q35 guest with one disk.

Bare: from exec to QMP's answer to query-status. depriv: the whole command, cold, from exec to its exit: interpreter,
imports, configuration, plan, jail, QEMU, emptied root, audit, registry. Run as root, after `depriv setup`:

    .venv/bin/python bench/create.py [ROUNDS]

Prints a table and keeps it as bench/results/create.json. Figures are ratios of one run on one machine: compare no
milliseconds between machines.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from depriv.demo_guest import image
from depriv.qmp import Monitor

ROOT = Path(__file__).resolve().parents[1]
DEPRIV = [str(Path(sys.executable).parent / "depriv")]
GOAL = 3.0


def bare(disk: Path, folder: Path) -> float:
    """Return milliseconds from exec to the answer of query-status."""
    path = str(folder / "qmp")
    argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-S"]
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    argv += ["-machine", "q35", "-accel", "tcg", "-m", "128", "-mon", "chardev=q,mode=control"]
    argv += ["-chardev", f"socket,id=q,fd={listener.fileno()},server=on,wait=off"]
    argv += ["-blockdev", f"driver=file,node-name=f,filename={disk}", "-blockdev", "driver=raw,node-name=d,file=f"]
    argv += ["-device", "virtio-blk-pci,drive=d"]
    start = time.perf_counter()
    process = subprocess.Popen(argv, pass_fds=[listener.fileno()])
    with Monitor.connect(path, timeout_s=10) as monitor:
        monitor.execute("query-status", timeout_s=10)
        took = time.perf_counter() - start
    process.kill()
    process.wait()
    listener.close()
    os.unlink(path)
    return took * 1000


def confined(config: Path) -> tuple[float, float, list[tuple[str, float]]]:
    """Return milliseconds of `create --paused` and of `destroy`, and the breakdown of the former by stage."""
    environment = {**os.environ, "DEPRIV_TIMES": str(time.monotonic())}
    start = time.perf_counter()
    done = subprocess.run(
        [*DEPRIV, "create", "--paused", config], check=True, capture_output=True, text=True, env=environment
    )
    created = time.perf_counter()
    stages = []
    for line in done.stderr.splitlines():
        figure, _, name = line.strip().partition(" ms  ")
        if name:
            stages.append((name, float(figure)))
    before = time.perf_counter()
    subprocess.run([*DEPRIV, "destroy", "bench-create"], check=True)
    ended = time.perf_counter()
    return (created - start) * 1000, (ended - before) * 1000, stages


def median_stages(rounds: list[list[tuple[str, float]]]) -> dict[str, float]:
    """Return the median of each stage, the jail's own steps added up by name."""
    totals: list[dict[str, float]] = []
    for stages in rounds:
        total: dict[str, float] = {}
        for name, figure in stages:
            total[name] = total.get(name, 0.0) + figure
        totals.append(total)
    return {name: round(statistics.median(total.get(name, 0.0) for total in totals), 2) for name in totals[0]}


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disk = folder / "disk.img"
        disk.write_bytes(image())
        config = folder / "bench.cfg"
        config.write_text(
            'name = "bench-create"\ntype = "hvm"\nmachine = "q35"\naccel = "tcg"\nmemory = 128\n'
            f'disk = [ "format=raw,vdev=xvda,target={disk}" ]\n'
        )
        confined(config)  # fills the cache, as the first start ever does
        bare(disk, folder)
        pairs = [(bare(disk, folder), *confined(config)) for _ in range(rounds)]
    bares = [pair[0] for pair in pairs]
    ratios = [pair[1] / pair[0] for pair in pairs]
    stages = median_stages([pair[3] for pair in pairs])
    created = statistics.median(pair[1] for pair in pairs)
    stages["output and exit"] = round(created - sum(stages.values()), 2)
    result = {
        "what": "depriv create --paused over bare QEMU, q35, one raw disk, tcg",
        "rounds": rounds,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "bare_ms": round(statistics.median(bares), 2),
        "create_ms": round(created, 2),
        "destroy_ms": round(statistics.median(pair[2] for pair in pairs), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "goal": GOAL,
        "stages_ms": stages,
    }
    path = ROOT / "bench/results/create.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"bare QEMU, exec to QMP       {result['bare_ms']:8.2f} ms")
    print(f"depriv create --paused       {result['create_ms']:8.2f} ms")
    print(f"ratio, median of {rounds:3} pairs  {result['ratio']:8.2f}     (goal: at most {GOAL})")
    print(f"depriv destroy, whole command{result['destroy_ms']:8.2f} ms\n")
    for stage, figure in stages.items():
        print(f"{figure:8.2f} ms  {stage}")
    return 0 if statistics.median(ratios) <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
