# SPDX-License-Identifier: Apache-2.0
"""A libvirtd of the tests' own: its folders are empty ones in a mount namespace, its sockets nobody else's."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tests.support.guests import CommandLine

_FOLDERS = ("/etc/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt", "/run/libvirt")
_START_TIMEOUT_S = 60.0
# As docs/reference/libvirt.md has it: test_libvirt.py holds the one to the other.
QEMU_CONF = """\
user = "root"
group = "root"
clear_emulator_capabilities = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
dynamic_ownership = 0
"""
_LIBVIRTD_CONF = """\
unix_sock_rw_perms = "0700"
auth_unix_rw = "none"
auth_unix_ro = "none"
host_uuid = "{uuid}"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
# In the namespace: the folders, and a libvirt-qemu user, without which the driver does not start, whatever user it is
# told to use.
_PREPARE = """
set -e
for folder in "$@"; do mount -t tmpfs -o mode=755 depriv-tests "$folder"; done
cd /run/libvirt
cp /etc/passwd /etc/group .
grep -q ^libvirt-qemu: passwd || echo libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin >> passwd
grep -q ^libvirt-qemu: group || echo libvirt-qemu:x:64055: >> group
for file in passwd group; do mount --bind $file /etc/$file; done
"""


class Libvirt:
    """A libvirtd beside a ``CommandLine``, in its mount namespace, and virsh."""

    def __init__(self, depriv: CommandLine, *, qemu_conf: str = QEMU_CONF) -> None:
        """Start it."""
        self._depriv = depriv
        self._made = [path for path in _FOLDERS if not os.path.isdir(path)]
        for path in self._made:
            os.makedirs(path)
        self.root = Path(f"/proc/{depriv.pid}/root")
        subprocess.run(self._in("sh", "-c", _PREPARE, "sh", *_FOLDERS), check=True, timeout=30)
        (self.root / "etc/libvirt/qemu.conf").write_text(qemu_conf)
        text = _LIBVIRTD_CONF.format(uuid=uuid.uuid4())
        (self.root / "etc/libvirt/libvirtd.conf").write_text(text)
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._start("virtlogd", "virtlogd-sock")
        self._start("libvirtd", "libvirt-sock", "--config", "/etc/libvirt/libvirtd.conf")

    def _start(self, name: str, socket: str, *words: str) -> None:
        # Else it asks each QEMU in PATH what it can do before it answers, which takes longer than any test.
        argv = self._in("env", "PATH=/usr/sbin:/sbin", name, *words, "--pid-file", f"/run/libvirt/{name}.pid")
        null = subprocess.DEVNULL
        self._daemons.insert(0, subprocess.Popen(argv, stdin=null, stdout=null, stderr=null))
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (self.root / "run/libvirt" / socket).exists():
            if self._daemons[0].poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{name} did not start: {self.log()}")
            time.sleep(0.02)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """End all its domains and it."""
        try:
            names = self.virsh("list", "--name").split()
            for name in names:
                self.virsh("destroy", name)
        finally:
            for daemon in self._daemons:
                daemon.terminate()
                daemon.wait(30)
            for path in self._made:
                with contextlib.suppress(OSError):
                    os.rmdir(path)

    def _in(self, *words: str) -> list[str]:
        pid = self._depriv.pid
        return ["nsenter", f"--mount=/proc/{pid}/ns/mnt", f"--root=/proc/{pid}/root", "--", *words]

    def virsh(self, *words: str, expect: int = 0) -> str:
        """Return what virsh prints; its standard error if it is to fail."""
        argv = self._in("virsh", "--quiet", "--connect", "qemu:///system", *words)
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=90)
        assert done.returncode == expect, f"virsh {words}: {done.returncode}\n{done.stdout}{done.stderr}{self.log()}"
        return done.stderr if expect else done.stdout

    def log(self, domain: str = "") -> str:
        """Return the log of libvirtd, or of a domain's QEMU."""
        name = f"qemu/{domain}" if domain else "libvirtd"
        path = self.root / f"var/log/libvirt/{name}.log"
        return path.read_text() if path.exists() else ""
