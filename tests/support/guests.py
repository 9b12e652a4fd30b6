# SPDX-License-Identifier: Apache-2.0
"""What the tests of whole guests share: a toolstack of their own, the command line, and what a guest said."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.host import snapshot

from depriv import proc, status
from depriv.api import Toolstack
from depriv.errors import DeprivError
from depriv.text import console_safe

if TYPE_CHECKING:
    from collections.abc import Iterable

    from depriv.api import Guest

# Toolstacks with different state folders know little of each other, and would number their domains alike.
_STEP = 40
_SLOTS = 10


def _own_slot() -> int:
    """Take one of the ranges of domids until this process ends, so that runs of the tests side by side share none."""
    for slot in range(_SLOTS):
        held = socket.socket(socket.AF_UNIX)
        try:
            held.bind(f"\0depriv-tests-{slot}")
        except OSError:
            held.close()
            continue
        held.detach()
        return slot
    return 0


FIRST_DOMID = 20000 + _own_slot() * 900
DOMIDS = range(FIRST_DOMID, FIRST_DOMID + 900)
_bases = itertools.cycle(range(FIRST_DOMID, FIRST_DOMID + 900 - _STEP, _STEP))
PATIENCE_S = 60.0


def next_base() -> int:
    """Return a domid after which nobody else's test counts."""
    return next(_bases)


def seeded(folder: Path, base: int | None = None) -> Path:
    """Make a state folder in which domids count on from ``base``, and return it."""
    (folder / "domains").mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    seed_history(folder, (next_base() if base is None else base,))
    return folder


def seed_history(folder: Path, domids: Iterable[int]) -> None:
    """Write down that ``domids`` were freed a moment ago."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    path = folder / "history.json"
    path.write_text(json.dumps({"boot": proc.boot_id(), "freed": dict.fromkeys(map(str, domids), now)}))
    path.chmod(0o600)


def toolstack(folder: Path, *, cache_dir: str = "/var/cache/depriv") -> Toolstack:
    """Return a toolstack whose domains are its own."""
    return Toolstack(state_dir=str(seeded(folder)), cache_dir=cache_dir)


def end_all(host: Toolstack) -> None:
    """End every domain of ``host``; raise the first failure after having tried them all."""
    failed: list[DeprivError] = []
    for guest in host.guests():
        try:
            guest.destroy()
        except DeprivError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def await_console(guest: Guest, wanted: str, *, within_s: float = PATIENCE_S) -> str:
    """Return what the guest has said, once ``wanted`` is in it.

    Raises:
        AssertionError: it was not, in time.
    """
    deadline = time.monotonic() + within_s
    while True:
        said = console_safe(guest.console())
        if wanted in said:
            return said
        if time.monotonic() > deadline:
            raise AssertionError(f"the guest did not say {wanted!r} within {within_s} s, but {said!r}")
        time.sleep(0.05)


def await_state(guest: Guest, wanted: str, *, within_s: float = PATIENCE_S) -> None:
    """Return once the guest is in a state, or raise ``AssertionError``."""
    deadline = time.monotonic() + within_s
    while (state := guest.row().state) != wanted:
        if time.monotonic() > deadline:
            raise AssertionError(f"{guest.name} is {state}, not {wanted}, after {within_s} s")
        time.sleep(0.05)


def qmp(host: Toolstack, guest: Guest, command: str, **arguments: object) -> Any:
    """Return QEMU's answer to one command."""
    entry = host.registry.find(str(guest.domid))
    with status.connect(entry, host.registry, timeout_s=10) as monitor:
        return monitor.execute(command, arguments, timeout_s=60)


def hmp(host: Toolstack, guest: Guest, line: str) -> str:
    """Return QEMU's answer to one line of its human monitor."""
    said = qmp(host, guest, "human-monitor-command", **{"command-line": line})
    assert isinstance(said, str)
    return said


def qemu_log(host: Toolstack, guest: Guest) -> str:
    """Take what QEMU has printed out of its log."""
    fd = os.open(f"{host.registry.directory(guest.domid)}/log", os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(fd, 65536).decode()
    except BlockingIOError:
        return ""
    finally:
        os.close(fd)


def config_text(name: str, *disks: str, **keys: object) -> str:
    """Return a configuration file; ``disks`` are disk specifications."""
    lines = [f'name = "{name}"', f'type = "{keys.pop("type", "hvm")}"']
    for key, value in keys.items():
        lines.append(f"{key} = {json.dumps(value)}")
    lines.append(f"disk = {json.dumps(disks)}")
    return "\n".join(lines) + "\n"


def compiled(folder: Path, name: str, source: str) -> Path:
    """Return a static program made of C source."""
    path = folder / name
    argv = ["gcc", "-static", "-O1", "-Wall", "-Werror", "-x", "c", "-o", str(path), "-"]
    subprocess.run(argv, input=source, text=True, check=True, capture_output=True, timeout=60)
    return path


# Runs in the namespace: an own /run/depriv, a sign that it is there, and then nothing until standard input ends.
_HOLD = """
for kind in $1; do umount --all --types "$kind" || exit; done
mount -t tmpfs -o mode=700 depriv-tests "$2" && shift 2 && { [ $# = 0 ] || mount --bind "$@"; } && echo && cat
"""


class CommandLine:
    """The real command line, in a mount namespace in which /run/depriv is empty: as on a host of its own."""

    def __init__(
        self, *, bind: tuple[str, str] = ("", ""), state_dir: str = "/run/depriv", without: tuple[str, ...] = ()
    ) -> None:
        """Make the namespace.

        Args:
            bind: A file and the path that it is to stand at in it.
            state_dir: The registry's folder.
            without: Types of file systems that are not to be seen in it.
        """
        self._made = not os.path.isdir(state_dir)
        self._folder = state_dir
        os.makedirs(state_dir, 0o700, exist_ok=True)
        words = [word for word in bind if word]
        self._holder = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                _HOLD,
                "sh",
                " ".join(without),
                state_dir,
                *words,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"\n", "no mount namespace"
        # The shell waits for cat; both are in the namespace.
        self.pid = self._holder.pid
        self.state_dir = f"/proc/{self.pid}/root{state_dir}"
        seeded(Path(self.state_dir))

    def seed(self, domids: Iterable[int]) -> None:
        """Write down that ``domids`` were freed a moment ago, and no others."""
        seed_history(Path(self.state_dir), domids)

    def argv(self, *words: str) -> list[str]:
        """Return what runs ``depriv WORDS`` in the namespace."""
        # The root, too: where the tests run in a chroot, it is not that of the namespace.
        enter = ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", f"--root=/proc/{self.pid}/root", "--"]
        return [*enter, sys.executable, "-m", "depriv.cli", *words]

    def start(self, *words: str, **keywords: Any) -> subprocess.Popen[str]:
        """Start ``depriv WORDS``; it is a process of its own, whose pid is that of the returned one."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.argv(*words), stdout=pipe, stderr=pipe, text=True, **keywords)

    def run(self, *words: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """Run ``depriv WORDS`` and hold it to its exit status."""
        done = subprocess.run(self.argv(*words), capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == expect, f"depriv {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def rows(self) -> list[dict[str, Any]]:
        """Return what ``list --json`` prints."""
        rows = json.loads(self.run("list", "--json").stdout)
        assert isinstance(rows, list)
        return rows

    def close(self) -> None:
        """End every domain, then the namespace."""
        try:
            for row in self.rows():
                self.run("destroy", row["name"])
        finally:
            assert self._holder.stdin is not None
            self._holder.stdin.close()
            if self._holder.stdout is not None:
                self._holder.stdout.close()
            self._holder.wait(10)
            if self._made:
                os.rmdir(self._folder)


def await_end(pid: int, *, within_s: float = 10.0) -> bool:
    """Return whether a process, which need not be a child of ours, is gone or becomes so in time, all threads of it."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b") ")[2].split()
            if fields[0] == b"Z" and int(fields[17]) <= 1:  # num_threads, proc_pid_stat(5)
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


def stop(pid: int) -> None:
    """Stop a process and wait until it stands; or has ended, as it may in the same moment."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with open(f"/proc/{pid}/stat", "rb") as file:
            if file.read().rpartition(b") ")[2][:1] in (b"T", b"Z"):
                return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} does not stop")


def refused(
    depriv: CommandLine, uids: range, text: str, *words: str, status: int = 2, tmp_path: Path
) -> tuple[str, str, str]:
    """Run `depriv create`; hold it to the form of an error and to having changed nothing; return what, cause, fix."""
    path = tmp_path / "refused.cfg"
    path.write_text(text)
    where: dict[str, Any] = {"folder": f"{depriv.state_dir}/domains", "uids": uids}
    before = snapshot(**where)
    done = depriv.run("create", str(path), *words, expect=status)
    assert snapshot(**where) == before
    path.unlink()
    assert done.stdout == ""
    parts = {"error": "", "cause": "", "  fix": ""}
    at = ""
    for line in done.stderr.splitlines():
        head, colon, rest = line.partition(": ")
        if colon and head in parts:
            at = head
            parts[at] = rest
        elif at:
            parts[at] += "\n" + line.strip()
    assert parts["error"], done.stderr
    assert "Traceback" not in done.stderr
    return parts["error"], parts["cause"], parts["  fix"]
