# SPDX-License-Identifier: Apache-2.0
"""A watcher as a process of its own: its log, its cost; and guests that are no QEMUs, for it to watch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from depriv import proc
from depriv.entry import Entry
from depriv.registry import Registry
from depriv.report import Expected

PATIENCE_S = 20.0
PEER = str(Path(__file__).resolve().parents[1] / "hostile/events_peer.py")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def await_true(holds: Any, *, within_s: float = PATIENCE_S, what: str) -> float:
    """Return how many seconds it took until ``holds()``; raise ``AssertionError`` with ``what`` if it never does."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.01)
    return time.monotonic() - began


class Watching:
    """`depriv watch` for one state folder."""

    def __init__(self, state_dir: str, log: Path) -> None:
        """Start it."""
        self._log = log
        self._begin = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "depriv.cli", "watch"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "DEPRIV_STATE_DIR": state_dir},
            )

    def text(self) -> str:
        """Return what this watcher and its children have said."""
        return self._log.read_bytes()[self._begin :].decode()

    def await_said(self, text: str, *, within_s: float = PATIENCE_S) -> float:
        """Return how many seconds it took until it had said something."""
        try:
            return await_true(lambda: text in self.text(), within_s=within_s, what=text)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said: {self.text()}") from None

    def await_ready(self) -> None:
        """Return once it watches."""
        self.await_said("watching ")

    def cpu_s(self) -> float:
        """Return the processor time of the watcher itself, without its children."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def memory_kib(self) -> dict[str, int]:
        """Return Rss, Pss and so on."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        lines = [line.split() for line in text.splitlines()[1:]]
        return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 2}

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal and return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        """End it, whatever it does, and wait until the last `depriv gc` that it started has ended, too."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        await_true(lambda: not _runs_of(self._log), what="the end of every depriv gc")


def _runs_of(log: Path) -> list[int]:
    """Return the processes that still have a log open."""
    found = []
    for pid in proc.pids():
        try:
            if pid != os.getpid() and os.readlink(f"/proc/{pid}/fd/2") == str(log):
                found.append(pid)
        except OSError:
            continue
    return found


class Fakes:
    """Domains whose QEMUs are other processes, in a registry of their own: what the watcher sees is the same."""

    def __init__(self, folder: Path) -> None:
        """Make the registry."""
        folder.mkdir(mode=0o700)
        self.registry = Registry(str(folder))
        self.registry.prepare()
        self._processes: list[subprocess.Popen[bytes]] = []

    def add(self, name: str, domid: int, behaviour: str = "", **changes: Any) -> subprocess.Popen[bytes]:
        """Make a domain whose QEMU shows a behaviour of ``events_peer.py`` on its events socket ("": has none)."""
        directory = self.registry.directory(domid)
        os.mkdir(directory, 0o700)
        argv = ["sleep", "300"]
        if behaviour:
            argv = [sys.executable, "-I", "-S", PEER, behaviour, f"{directory}/events"]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._processes.append(process)
        assert process.stdout is not None
        assert not behaviour or process.stdout.readline() == b"ready\n"
        entry = _entry(name, domid, process.pid, self.registry)
        self.registry.save(entry.replace(**changes))
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End a QEMU, and reap it as process 1 of the host would."""
        process.kill()
        process.wait()

    def close(self) -> None:
        """End them all."""
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _entry(name: str, domid: int, pid: int, registry: Registry) -> Entry:
    expected = Expected(
        domain=name,
        domid=domid,
        uid=os.geteuid(),
        gid=os.getegid(),
        pid=pid,
        starttime=proc.start_time(pid),
        restricted=False,
        limits=(),
        environ=(),
        cgroup="",
        grants=(),
    )
    return Entry(
        name=name,
        domid=domid,
        state="running",
        uid=os.geteuid(),
        gid=os.getegid(),
        reaper_uid=0,
        shared=True,  # nobody may be killed by this uid
        restricted=False,
        memory_mib=1,
        vcpus=1,
        accel="tcg",
        cgroup="",
        boot_id=registry.boot_id,
        created_boot_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        created_at_s=0,
        toolstack_pid=0,
        toolstack_starttime=0,
        config={"on_poweroff": "preserve", "on_reboot": "preserve", "on_crash": "preserve"},
        expected=expected,
    )
