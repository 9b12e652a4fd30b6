# SPDX-License-Identifier: Apache-2.0
"""The outer QEMU that emulates the Xen host: boots it, saves its state, resumes it, ends it.

One virtual CPU: with two on a busy machine, Xen's and Linux's waits for each other stall for seconds. The state is
saved once, before any guest ran, and serves any number of machines side by side, each with a disk overlay of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.xenlab import image

from depriv.records import Record

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from tests.support.xenlab.image import Image

QEMU = "qemu-system-x86_64"
XEN_OPTIONS = (
    "console=com1 com1=115200,8n1 loglvl=info dom0_mem=1G,max:1G dom0_max_vcpus=1 spec-ctrl=no xpti=0 bootscrub=0"
)
LINUX_OPTIONS = "console=hvc0 quiet mitigations=off audit=0 random.trust_cpu=on panic=-1"
BOOT_S = 180.0
RESUME_S = 60.0
END_S = 20.0
STARTING_S = 60.0


class Warm(Record):
    """A saved state and the disk that belongs to it."""

    state: str
    disk: str


class Qmp:
    """A monitor connection; each command has a time limit."""

    def __init__(self, path: str, *, within_s: float) -> None:
        """Connect as soon as QEMU listens.

        Raises:
            OSError: it does not in time.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(within_s)
        deadline = time.monotonic() + within_s
        while True:
            try:
                self._socket.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    self._socket.close()
                    raise
                time.sleep(0.01)
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Return what a command returns.

        Raises:
            RuntimeError: QEMU says no, or it is gone.
        """
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        for line in self._file:
            said = json.loads(line)
            if "return" in said:
                return said["return"]
            if "error" in said:
                raise RuntimeError(f"{command}: {said['error']['desc']}")
        raise RuntimeError(f"{command}: QEMU closed the monitor")

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._socket.close()


class Machine:
    """A running emulated host. ``end`` it, or use it in ``with``; it ends with the process that started it, too."""

    def __init__(self, made: Image, backing: str, *, state: str = "", outlive: bool = False) -> None:
        """Start QEMU.

        Args:
            made: What to boot.
            backing: The disk, which is not written.
            state: A saved state to resume from; "": boot.
            outlive: Go on when this process ends.

        Raises:
            RuntimeError: it did not start, with what it said.
        """
        runs = image.cache_folder() / "runs"
        runs.mkdir(exist_ok=True)
        _sweep(runs)
        self.folder = tempfile.mkdtemp(dir=runs, prefix=f"{made.suite}-")
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: Qmp | None = None
        try:
            image.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, self.disk])
            self._start(_argv(made, self.folder, state), outlive=outlive)
            self._qmp = Qmp(self.monitor, within_s=RESUME_S)
            if state:
                self._await(lambda: self.qmp("query-status")["status"] != "inmigrate", RESUME_S)
                self.qmp("cont")
            self.port = _forwarded_port(self.qmp("human-monitor-command", **{"command-line": "info usernet"}))
        except (OSError, RuntimeError) as error:
            said = self.log()
            self.end()
            raise RuntimeError(f"the emulated Xen host did not start: {error}; QEMU said: {said}") from error
        except BaseException:
            self.end()
            raise

    @property
    def disk(self) -> str:
        """The overlay of this machine alone."""
        return f"{self.folder}/disk.qcow2"

    @property
    def monitor(self) -> str:
        """QEMU's monitor socket."""
        return f"{self.folder}/qmp"

    @property
    def pid(self) -> int:
        """The outer QEMU's pid."""
        assert self._process is not None
        return self._process.pid

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Return what a monitor command returns."""
        assert self._qmp is not None
        return self._qmp(command, **arguments)

    def log(self) -> str:
        """Return what QEMU complained of."""
        return _text(f"{self.folder}/qemu.log").strip()

    def console(self) -> str:
        """Return what Xen and dom0's kernel printed."""
        return _text(f"{self.folder}/console.log")

    def save(self, state: str) -> None:
        """Stop, and write the state to a file, compressed; the machine can only be ended then."""
        self.qmp("stop")
        self.qmp("migrate-set-parameters", **{"max-bandwidth": 10 << 30})
        self.qmp("migrate", uri=f"exec:zstd -q -1 -f -o {state}")
        self._await(self._saved, RESUME_S)

    def quit(self) -> None:
        """Let QEMU end by itself, so that its disk is whole."""
        assert self._process is not None
        self.qmp("quit")
        self._process.wait(END_S)

    def end(self) -> None:
        """End QEMU, at once, and remove all that was this machine's."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._process is not None:
            self._process.kill()  # a child of ours that was not waited for: its pid is its own
            self._process.wait(END_S)
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def leave(self) -> None:
        """Let it run on, for ``end_left``."""
        assert self._qmp is not None
        assert self._process is not None
        self._qmp.close()
        self._process.returncode = 0  # not ours any more: no warning about a child that nobody waited for

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.end()

    def _start(self, argv: list[str], *, outlive: bool) -> None:
        # The lock is held as long as QEMU lives, whoever started it and however that one ended: see _sweep.
        with Path(f"{self.folder}/lock").open("w") as lock, Path(f"{self.folder}/qemu.log").open("w") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            prefix = [] if outlive else ["setpriv", "--pdeathsig", "KILL"]
            self._process = subprocess.Popen(
                prefix + argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )

    def _saved(self) -> bool:
        status = self.qmp("query-migrate").get("status")
        if status in ("failed", "cancelled"):
            raise RuntimeError(f"the state was not saved: migration {status}")
        return bool(status == "completed")

    def _await(self, condition: Callable[[], bool], within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing after {within_s:.0f} s")
            time.sleep(0.02)


def warm(made: Image, ready: Callable[[Machine], None]) -> Warm:
    """Return the saved state of a host that booted, made now if it is not there: it belongs to this QEMU alone.

    Args:
        made: What to boot.
        ready: Returns when the host answers, or raises.
    """
    version = image.run([QEMU, "--version"])
    digest = hashlib.sha256(Path(__file__).read_bytes() + version.encode()).hexdigest()[:12]
    folder = Path(made.folder) / f"warm-{digest}"
    result = Warm(state=f"{folder}/state.zst", disk=f"{folder}/disk.qcow2")
    with image.locked(f"{made.suite}.lock"):
        if not folder.exists():
            with (
                tempfile.TemporaryDirectory(dir=made.folder, prefix="warming-") as work,
                Machine(made, made.disk) as host,
            ):
                ready(host)
                Path(work, "result").mkdir()
                host.save(f"{work}/result/state.zst")
                host.quit()
                shutil.copyfile(host.disk, f"{work}/result/disk.qcow2")
                os.rename(f"{work}/result", folder)
    return result


def end_left(folder: str) -> None:
    """End a machine that another process left running."""
    with contextlib.suppress(OSError, RuntimeError):
        left = Qmp(f"{folder}/qmp", within_s=END_S)
        with contextlib.suppress(RuntimeError):
            left("quit")
        left.close()
    with Path(f"{folder}/lock").open() as lock:
        _lock_within(lock.fileno(), END_S)
    shutil.rmtree(folder, ignore_errors=True)


def _lock_within(fd: int, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _sweep(runs: Path) -> None:
    """Remove what machines left whose starter was killed: nobody holds their lock, and none is about to."""
    for folder in runs.iterdir():
        try:
            if time.time() - folder.stat().st_mtime < STARTING_S:
                continue
            with (folder / "lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except (BlockingIOError, FileNotFoundError):
            continue  # it runs, or another one swept it


def _argv(made: Image, folder: str, state: str) -> list[str]:
    """Return QEMU's command line; that of a saved state and that of its resumption must describe one machine."""
    incoming = ["-incoming", f"exec:zstd -qdc {state}"] if state else []
    return [
        *(QEMU, "-name", "xenlab", "-machine", "pc", "-accel", "tcg,thread=multi,tb-size=512"),
        *("-cpu", "qemu64,+svm,+npt", "-smp", "1", "-m", "2G", "-nodefaults", "-display", "none"),
        *("-kernel", made.hypervisor, "-append", XEN_OPTIONS),
        *("-initrd", f"{made.kernel} {LINUX_OPTIONS},{made.initramfs}"),
        *("-drive", f"file={folder}/disk.qcow2,if=none,id=root,format=qcow2,cache=unsafe"),
        *("-device", "virtio-blk-pci,drive=root"),
        # A port of the kernel's choice: _forwarded_port asks for it.
        *("-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-10.0.2.15:7000"),
        *("-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"),
        *("-serial", f"file:{folder}/console.log", "-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
        *incoming,
    ]


def _forwarded_port(usernet: str) -> int:
    """Return the port that leads to dom0 (QEMU "info usernet": protocol, fd, source address and port, ...)."""
    for line in usernet.splitlines():
        words = line.split()
        if words and words[0].startswith("TCP[HOST_FORWARD]"):
            return int(words[3])
    raise RuntimeError(f"QEMU forwards no port: {usernet}")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except FileNotFoundError:
        return ""
