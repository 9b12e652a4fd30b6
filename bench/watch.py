# SPDX-License-Identifier: Apache-2.0
"""What `depriv watch` costs: its memory and processor time with 0, 50 and 100 guests, and how soon it sees an end.

The guests are real QEMUs of 16 MiB, paused before their first instruction, each confined and audited as always. The
watcher is the command as it is typed. Run as root, after `depriv setup`; it takes about 2 GiB and a minute:

    .venv/bin/python bench/watch.py [GUESTS]

Prints a table and keeps it as bench/results/watch.json. The domains are in a state folder of their own.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from depriv.demo_guest import image
from depriv.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
DEPRIV = [sys.executable, "-m", "depriv.cli"]
GOAL_MIB = 15.0
GOAL_GUEST_MIB = 0.3
IDLE_S = 10.0
ENDS = 20
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def run(state_dir: str, *words: str) -> None:
    environ = {**os.environ, "DEPRIV_STATE_DIR": state_dir}
    subprocess.run([*DEPRIV, *words], check=True, stdout=subprocess.DEVNULL, env=environ)


class Watcher:
    """A watcher, and its log as a pipe."""

    def __init__(self, state_dir: str) -> None:
        self.process = subprocess.Popen(
            [*DEPRIV, "watch"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "DEPRIV_STATE_DIR": state_dir},
        )
        self.await_line("watching ")

    def await_line(self, text: str) -> float:
        """Return when a line with this text came."""
        assert self.process.stdout is not None
        while text not in (line := self.process.stdout.readline()):
            assert line, "the watcher has ended"
        return time.monotonic()

    def memory_mib(self) -> tuple[float, float]:
        """Return RSS and PSS."""
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()[1:]
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return kib["Rss"] / 1024, kib["Pss"] / 1024

    def cpu_s(self) -> float:
        """Return its processor time, without that of its children."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def end(self) -> None:
        """Have it stop."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(10) == 0
        if self.process.stdout is not None:
            self.process.stdout.close()


def measured(state_dir: str, guests: int) -> dict[str, float]:
    """Return the figures of a watcher that is new to that many guests."""
    watcher = Watcher(state_dir)
    time.sleep(3)  # all are connected, and the first `gc` is over
    began, cpu_s = time.monotonic(), watcher.cpu_s()
    time.sleep(IDLE_S)
    share = (watcher.cpu_s() - cpu_s) / (time.monotonic() - began)
    rss, pss = watcher.memory_mib()
    watcher.end()
    return {
        "guests": guests,
        "rss_mib": round(rss, 2),
        "pss_mib": round(pss, 2),
        "idle_cpu_percent": round(100 * share, 2),
    }


def noticed(state_dir: str, ends: int) -> list[float]:
    """Kill some QEMUs, one after the other; return for each how many milliseconds later the watcher had said so."""
    registry = Registry(state_dir)
    watcher = Watcher(state_dir)
    try:
        time.sleep(3)
        took: list[float] = []
        all_of_them = len(registry.domids())
        for entry in [entry for entry in registry.entries() if entry.state == "running"][:ends]:
            assert entry.expected is not None
            began = time.monotonic()
            os.kill(entry.expected.pid, signal.SIGKILL)
            took.append((watcher.await_line(f"{entry.name} (domain {entry.domid}): its QEMU is gone") - began) * 1000)
        deadline = time.monotonic() + 60
        while len(registry.domids()) > all_of_them - ends and time.monotonic() < deadline:
            time.sleep(0.1)  # until the last `gc` has cleared its domain away
    finally:
        watcher.end()
    return took


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as name:
        state_dir = f"{name}/state"
        disk, config = Path(name) / "disk.img", Path(name) / "bench.cfg"
        disk.write_bytes(image())
        config.write_text(
            f'type = "hvm"\naccel = "tcg"\nmemory = 16\ndisk = [ "format=raw,vdev=xvda,access=ro,target={disk}" ]\n'
        )
        try:
            rows = [measured(state_dir, 0)]
            made = 0
            for wanted in (count // 2, count):
                for number in range(made, wanted):
                    run(state_dir, "create", "--paused", str(config), f'name="bench-{number}"')
                made = wanted
                rows.append(measured(state_dir, made))
                print(rows[-1], flush=True)
            took = noticed(state_dir, min(ENDS, count))
        finally:
            for domid in Registry(state_dir).domids():
                subprocess.run(
                    [*DEPRIV, "destroy", str(domid)],
                    check=False,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "DEPRIV_STATE_DIR": state_dir},
                )
    _none, half, last = rows
    # From half of the guests to all: what the first one brings is code and room for reading an entry, and stays one.
    guest_mib = (last["rss_mib"] - half["rss_mib"]) / (last["guests"] - half["guests"])
    result = {
        "what": "depriv watch: memory, idle processor time, and how soon the end of a killed QEMU is noticed",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "rows": rows,
        "rss_per_guest_kib": round(guest_mib * 1024, 2),
        "noticed_ms_median": round(statistics.median(took), 2),
        "noticed_ms_max": round(max(took), 2),
        "goal_mib": GOAL_MIB,
        "goal_per_guest_mib": GOAL_GUEST_MIB,
    }
    path = ROOT / "bench/results/watch.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print("guests   RSS MiB   PSS MiB   idle CPU %")
    for row in rows:
        print(f"{row['guests']:6}   {row['rss_mib']:7}   {row['pss_mib']:7}   {row['idle_cpu_percent']:10}")
    print(f"per guest {result['rss_per_guest_kib']} KiB   (goals: {GOAL_MIB} MiB in all, {GOAL_GUEST_MIB} MiB a guest)")
    print(f"an end is noticed after {result['noticed_ms_median']} ms, at most {result['noticed_ms_max']} ms")
    return 0 if last["rss_mib"] <= GOAL_MIB and guest_mib <= GOAL_GUEST_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
