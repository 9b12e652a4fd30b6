# SPDX-License-Identifier: Apache-2.0
"""What tests of whole command lines share: a folder with all that they name, and a QEMU of one, from start to end."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.support import iso

from depriv import demo_guest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.guests import CommandLine

OVMF = Path("/usr/share/OVMF")
PATIENCE_S = 30.0
_HALT = bytes.fromhex("f4ebfd")  # hlt; jmp back


def _boot_sector(code: str) -> bytes:
    return bytes.fromhex(code).ljust(510, b"\0") + b"\x55\xaa"


def _bzimage() -> bytes:
    """Return what QEMU loads as a Linux kernel: its header alone. Documentation/arch/x86/boot.rst, Linux 6.1."""
    image = bytearray(0x8000)
    image[0x1F1] = 1  # setup_sects
    image[0x1FE:0x206] = b"\x55\xaa\xeb\x66HdrS"
    image[0x206:0x208] = (0x20C).to_bytes(2, "little")
    image[0x211] = 1  # LOADED_HIGH
    for offset, value in ((0x214, 0x100000), (0x22C, 0x37FFFFFF), (0x238, 2047), (0x260, 0x10000)):
        image[offset : offset + 4] = value.to_bytes(4, "little")
    image[0x400:0x403] = _HALT
    return bytes(image)


def _multiboot() -> bytes:
    """Return a kernel of the Multiboot specification 0.6.96, loaded at 1 MiB, which halts."""
    magic, flags = 0x1BADB002, 0x10000
    words = (magic, flags, -(magic + flags) % (1 << 32), 0x100000, 0x100000, 0, 0, 0x100020)
    return b"".join(word.to_bytes(4, "little") for word in words) + _HALT.ljust(1000, b"\0")


_PVE = """[device "ehci"]
  driver = "ich9-usb-ehci1"
  multifunction = "on"
  bus = "pcie.0"
  addr = "1d.7"

[device "uhci-1"]
  driver = "ich9-usb-uhci1"
  multifunction = "on"
  bus = "pcie.0"
  addr = "1d.0"
  masterbus = "ehci.0"
  firstport = "0"
"""


def fill(folder: Path) -> Path:
    """Make a folder with a file of every kind that the lines name, and return it."""
    folder.mkdir()
    mib = bytes(1 << 20)
    files = {
        "disk.raw": demo_guest.image(text="the text of this disk").ljust(1 << 20, b"\0"),
        **dict.fromkeys(("base.raw", "data.raw", "fs.raw"), mib),
        "floppy.img": bytes(1440 << 10),
        # mov al,16; out 0xf4,al: isa-debug-exit ends QEMU with twice that and one.
        "exit.raw": _boot_sector("b010e6f4f4ebfd").ljust(1 << 20, b"\0"),
        # cli; lidt of nothing; int3: a triple fault.
        "fault.raw": _boot_sector("fa0f011e0a7ccd03").ljust(1 << 20, b"\0"),
        "flag.txt": b"flag".ljust(512, b"\0"),
        "bzImage": _bzimage(),
        "multiboot.bin": _multiboot(),
        "initrd.img": b"x" * 4096,
        "mod1": b"1" * 100,
        "mod2": b"2" * 100,
        "key.aes": bytes(range(32)),
        "vncpass": b"secret",
        "bootsplash.jpg": b"\xff\xd8" + bytes(100),
        "smbios.txt": b"io.systemd.x=1",
        "acpi.dat": b"data",
        "fwcfg.bin": b"abc",
        "rom.bin": b"\x55\xaa\x01\xcb".ljust(512, b"\0"),
        "pve-q35.cfg": _PVE.encode(),
        "cd.iso": iso.iso({"A.TXT": b"x\n"}),
        "seed.iso": iso.iso({"USER.TXT": b"y\n"}),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name in ("OVMF_CODE.fd", "OVMF_VARS.fd", "OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"):
        shutil.copy(OVMF / name, folder)
    shutil.copy("/usr/share/ovmf/OVMF.fd", folder)
    shutil.copy("/usr/share/seabios/bios-256k.bin", folder / "firmware.bin")
    for words in ("disk.qcow2 4M", "base.qcow2 4M", "-b base.qcow2 -F qcow2 overlay.qcow2", "snap.qcow2 4M",
                  "-b base.raw -F raw onraw.qcow2"):  # fmt: skip
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words.split()], cwd=folder, check=True, timeout=30)
    bare = ["-m", "64", "-nodefaults", "-display", "none", "-drive", "file=snap.qcow2,format=qcow2,if=virtio"]
    argv = ["qemu-system-x86_64", *bare, "-monitor", "stdio"]
    subprocess.run(argv, cwd=folder, input=b"savevm clean\nquit\n", stdout=subprocess.DEVNULL, check=True, timeout=60)
    (folder / "link.raw").symlink_to("disk.raw")
    return folder


def free_port() -> int:
    """Return a TCP port that nobody has, from those that a VNC display can be."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        return int(made.getsockname()[1])


def running(depriv: CommandLine) -> dict[str, Any]:
    """Return the entry of the one domain there is, once its guest may run; {}: there is none yet."""
    for path in Path(depriv.state_dir, "domains").glob("*/state.json"):
        try:
            entry = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):  # between two versions, or gone
            continue
        if entry.get("state") == "running" and entry.get("expected"):
            return dict(entry)
    return {}


def argv_in(folder: Path, depriv: CommandLine, *words: str) -> list[str]:
    """Return what runs ``depriv WORDS`` with ``folder`` as its current one."""
    argv = depriv.argv(*words)
    argv.insert(argv.index("--"), f"--wd={folder}")  # nsenter would leave it in the root
    return argv


class Started:
    """One `depriv run`, as the tool whose line it is would have it: with its folder, peers and descriptors."""

    def __init__(self, depriv: CommandLine, folder: Path, line: str, *options: str) -> None:
        """Start it; ``line`` is as in :mod:`tests.qemu.command_lines`."""
        self.depriv = depriv
        self.folder = folder
        self._kept = contextlib.ExitStack()
        peer = self._listener(folder / "peer.sock")
        own = self._listener(folder / "own.sock")
        del peer
        log = os.open(folder / "extra.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._kept.callback(os.close, log)
        self.port = free_port()
        vnc = free_port() - 5900
        size = (folder / "OVMF_VARS.fd").stat().st_size
        values = {"D": folder, "P": self.port, "V": vnc, "F": own.fileno(), "L": log, "S": size}
        if "nbd.sock" in line:
            self._serve_disk()
        for name, value in values.items():
            line = line.replace(f"${name}", str(value))
        words = shlex.split(line)
        self.program = words.pop(0) if words[0].startswith("qemu-system-") else "qemu-system-x86_64"
        self.daemonize = "-daemonize" in words
        self._stands = "-S" in words
        with (folder / "stderr").open("wb") as stderr, (folder / "stdout").open("wb") as stdout:
            self.process = subprocess.Popen(
                argv_in(folder, depriv, "run", *options, "--", self.program, *words),
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[own.fileno(), log],
            )
        self._kept.callback(self._stop)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close all that was open for it, and see it ended."""
        self._kept.close()

    def _listener(self, path: Path) -> socket.socket:
        made = self._kept.enter_context(socket.socket(socket.AF_UNIX))
        made.bind(str(path))
        made.listen()
        return made

    def _serve_disk(self) -> None:
        path = self.folder / "nbd.sock"
        argv = ["qemu-nbd", "-t", "-k", str(path), "-f", "raw", str(self.folder / "disk.raw")]
        server = self._kept.enter_context(subprocess.Popen(argv))
        self._kept.callback(server.kill)
        _await(path.exists, "qemu-nbd listens")

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if running(self.depriv):  # a test has failed: the next one shall not
            self.depriv.run("gc")
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def said(self) -> str:
        """Return what it has printed to its error output."""
        return (self.folder / "stderr").read_text(errors="replace")

    def await_running(self) -> dict[str, Any]:
        """Return its entry once the guest runs, or stands because its line says so."""

        def there() -> bool:
            ended = self.process.poll()
            assert ended is None or (self.daemonize and ended == 0), f"it ended with {ended}:\n{self.said()}"
            return bool(running(self.depriv)) and not (self.daemonize and ended is None)

        _await(there, "it runs", self.said)
        # Written down is that it may run, a moment before it is let: who ends QEMU there has a start fail.
        if not self._stands:
            _await(lambda: self.depriv.rows()[0]["state"] not in ("paused", "hung"), "it has been let run", self.said)
        return running(self.depriv)

    def end(self, how: str) -> int:
        """End it as its tool does and return the exit status; of one that daemonizes, that of the start."""
        kind, _, rest = how.partition(" ")
        entry = running(self.depriv)
        if kind in ("qmp", "hmp"):
            self._tell(rest, b'{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n' if kind == "qmp" else b"quit\n")
        elif kind in ("TERM", "INT", "HUP"):
            self.process.send_signal(signal.Signals[f"SIG{kind}"])
        elif kind == "pidfile":
            _await((self.folder / rest).exists, "there is a pidfile", self.said)
            os.kill(int((self.folder / rest).read_text()), signal.SIGTERM)
        elif kind == "stdin":
            assert self.process.stdin is not None
            text = '{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n' if rest == "qmp" else rest
            self.process.stdin.write(text.encode())
            self.process.stdin.flush()
        status = self.process.wait(PATIENCE_S)
        if self.daemonize:
            pid = entry["expected"]["pid"]
            _await(lambda: not os.path.exists(f"/proc/{pid}"), "QEMU ends")
        return status

    def _tell(self, where: str, text: bytes) -> None:
        """Connect as the tool does, say it, and read until QEMU has ended."""
        where = where.replace("$P", str(self.port))
        if where.isdecimal():
            made = socket.create_connection(("localhost", int(where)))
        else:
            path = self.folder / ("own.sock" if where == "fd" else where)
            _await(path.exists, f"there is {path}", self.said)  # sockets get their names when all is audited
            made = socket.socket(socket.AF_UNIX)
            made.connect(str(path))
        with made:
            made.settimeout(PATIENCE_S)
            made.sendall(text)
            with contextlib.suppress(ConnectionResetError):
                while made.recv(4096):
                    pass

    def left(self) -> list[str]:
        """Return what it has left in its folder that QEMU itself would have removed, or that only it needed."""
        known = ("peer.sock", "own.sock", "nbd.sock")
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if path.name not in known and (stat.S_ISSOCK(path.lstat().st_mode) or path.suffix == ".pid")
        )


def _await(reached: Callable[[], bool], what: str, said: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}\n{said()}"
        time.sleep(0.01)
