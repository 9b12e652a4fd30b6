# SPDX-License-Identifier: Apache-2.0
"""dom0 of an emulated Xen host: commands, files, guests, and what its kernel and xenstore say of them.

::

    with Dom0.start("trixie") as dom0:
        print(dom0.run("xl info", timeout_s=60).out)

Everything has a time limit, and ends with the ``with``.
"""

from __future__ import annotations

import io
import json
import socket
import struct
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.xenlab import image, machine

from depriv.records import Record

if TYPE_CHECKING:
    from typing import Self
CALL_S = 60.0


class Done(Record):
    """What came of a command; ``status`` is negative for a signal."""

    status: int
    out: str
    err: str


class Dom0:
    """A running dom0."""

    def __init__(self, port: int, *, suite: str, host: machine.Machine | None = None) -> None:
        """Speak to the dom0 behind a port of the loopback; if ``host`` is given, it ends with this."""
        self.port = port
        self.suite = suite
        self.host = host

    @classmethod
    def start(cls, suite: str) -> Self:
        """Return a dom0 that has just booted and where no guest ever ran, in about a second.

        The first one of a suite builds the image and boots it: in about a minute.

        Raises:
            RuntimeError: it could not be built or did not start.
        """
        host = resume(suite)
        try:
            await_answer(host.port, machine.RESUME_S)
        except BaseException:
            host.end()
            raise
        return cls(host.port, suite=suite, host=host)

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the host, as by pulling the plug."""
        if self.host is not None:
            self.host.end()

    def run(self, command: str | list[str], *, timeout_s: float = CALL_S, given: bytes = b"") -> Done:
        """Run a command (a list) or a line of shell.

        Raises:
            TimeoutError: it did not end in time; it is dead then, with its process group.
        """
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        status, out, err = self._run(argv, given, timeout_s)
        return Done(status=status, out=out.decode(errors="replace"), err=err.decode(errors="replace"))

    def must(self, command: str | list[str], *, timeout_s: float = CALL_S) -> str:
        """Return what a command printed.

        Raises:
            RuntimeError: it failed, with what it said.
        """
        done = self.run(command, timeout_s=timeout_s)
        if done.status != 0:
            raise RuntimeError(f"in dom0, {command} ended with {done.status}: {done.err.strip() or done.out.strip()}")
        return done.out

    def put(self, local: str | Path, remote: str) -> None:
        """Copy one file in, with its permissions."""
        mode = Path(local).stat().st_mode & 0o777
        self.write(remote, Path(local).read_bytes(), mode=mode)

    def write(self, remote: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file whole."""
        script = 'cat >"$1.new" && chmod "$2" "$1.new" && mv "$1.new" "$1"'
        self._copy(["/bin/sh", "-c", script, "-", remote, f"{mode:o}"], data)

    def put_tree(self, local: str | Path, remote: str) -> None:
        """Copy what is in a local folder into a remote one, made if it is not there."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(local, arcname=".", filter=_root_owned)
        script = 'mkdir -p "$1" && busybox tar -xf - -C "$1"'
        self._copy(["/bin/sh", "-c", script, "-", remote], packed.getvalue())

    def put_python(self, local: str | Path, remote: str) -> None:
        """Copy a Python package in, byte-compiled here by dom0's own version: its source's times do not matter then."""
        kept = Path(image.ensure(self.suite).python)
        with tempfile.TemporaryDirectory(dir=kept / "tmp") as work:
            tree = Path(work, "tree")
            _copy_sources(Path(local), tree)
            image.compile_python(
                kept, ["-s", f"/tmp/{Path(work).name}/tree", "-p", remote, f"/tmp/{Path(work).name}/tree"]
            )
            self.put_tree(tree, remote)

    def get(self, remote: str) -> bytes:
        """Return the content of a file."""
        status, out, err = self._run(["cat", remote], b"", CALL_S)
        if status != 0:
            raise RuntimeError(f"in dom0: {err.decode(errors='replace').strip()}")
        return out

    def ask(self, function: str, *, within_s: float = CALL_S, **arguments: Any) -> Any:
        """Return what a function of ``inside/facts.py`` returns.

        Raises:
            RuntimeError: it raised something.
        """
        head, _ = _call(self.port, {"do": function, "arguments": arguments}, b"", within_s)
        if "error" in head:
            raise RuntimeError(f"in dom0, {function}: {head['error']}")
        return head["result"]

    def domid(self, name: str) -> int | None:
        """Return the id of a domain, or None if there is none of that name."""
        found: int | None = self.ask("domid", name=name)
        return found

    def dm_pid(self, name: str) -> int:
        """Return the pid of a domain's device model, as xenstore has it.

        Raises:
            LookupError: there is none.
        """
        found: int | None = self.ask("dm_pid", domid=self._domid(name))
        if found is None:
            raise LookupError(f"domain {name} has no device model")
        return found

    def proc(self, pid: int) -> dict[str, Any]:
        """Return what dom0's kernel says of a process, see ``facts.proc``; {} if there is none."""
        found: dict[str, Any] = self.ask("proc", pid=pid)
        return found

    def xenstore(self, path: str) -> dict[str, str]:
        """Return path -> text of a part of xenstore; empty if there is none."""
        found: dict[str, str] = self.ask("xenstore", path=path)
        return found

    def serial(self, name: str) -> str:
        """Return what a guest wrote on its serial port since it was asked for the first time; that starts with this."""
        domid = self._domid(name)
        self.ask("follow", domid=domid)
        text: str | None = self.ask("serial", domid=domid)
        return text or ""

    def wait_for_serial(self, name: str, pattern: str, timeout_s: float = CALL_S, *, after: int = 0) -> str:
        """Return what a guest wrote as soon as it has ``pattern``, a plain text, behind its first ``after`` characters.

        Raises:
            TimeoutError: it did not write that, with what it wrote.
        """
        text: str = (
            self.ask(
                "wait_for_serial",
                within_s=timeout_s + CALL_S,
                domid=self._domid(name),
                pattern=pattern,
                timeout_s=timeout_s,
                after=after,
            )
            or ""
        )
        if pattern not in text[after:]:
            raise TimeoutError(f"{name} did not write {pattern!r} in {timeout_s:.0f} s, but {text[-300:]!r}")
        return text

    def guest_config(self, name: str, *, disk: str = "", cd: str = "/guests/one.iso", **keys: Any) -> str:
        """Write an HVM configuration with disk, CD, VNC and a serial pty, and return its path in dom0.

        Args:
            name: Of the domain.
            disk: Path of its raw disk; "": a fresh copy of the guest that ticks.
            cd: Path of its CD; "": no drive.
            keys: More keys, or other values for these; None leaves one out.
        """
        if not disk:
            disk = f"/guests/{name}.img"
            self.must(["cp", "--sparse=always", "/guests/tick.img", disk])
        disks = [f"format=raw,vdev=hda,access=rw,target={disk}"]
        if cd:
            disks.append(f"format=raw,vdev=hdc,access=ro,devtype=cdrom,target={cd}")
        values: dict[str, Any] = {
            "name": name,
            "type": "hvm",
            "memory": 32,
            "vcpus": 1,
            "serial": "pty",
            "vnc": 1,
            "vnclisten": "127.0.0.1",
            "vga": "stdvga",
            "videoram": 16,
            "usb": 0,
            "disk": disks,
            **keys,
        }
        # Strings, numbers and lists are written in xl.cfg(5) as in JSON.
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items() if value is not None)
        path = f"/guests/{name}.cfg"
        self.write(path, text.encode())
        return path

    def _domid(self, name: str) -> int:
        found = self.domid(name)
        if found is None:
            raise LookupError(f"there is no domain {name}")
        return found

    def _copy(self, argv: list[str], data: bytes) -> None:
        status, _, err = self._run(argv, data, CALL_S)
        if status != 0:
            raise RuntimeError(f"in dom0: {err.decode(errors='replace').strip()}")

    def _run(self, argv: list[str], given: bytes, timeout_s: float) -> tuple[int, bytes, bytes]:
        head, body = _call(self.port, {"do": "run", "argv": argv, "timeout_s": timeout_s}, given, timeout_s + CALL_S)
        out, err = body[: head["out"]], body[head["out"] :]
        if head["status"] is None:
            raise TimeoutError(f"in dom0, {argv} did not end in {timeout_s:.0f} s; it wrote {(out + err)[-300:]!r}")
        return head["status"], out, err


def resume(suite: str, *, outlive: bool = False) -> machine.Machine:
    """Return a warm host; image and state are made if they are not there."""
    made, state = prepare(suite)
    return machine.Machine(made, state.disk, state=state.state, outlive=outlive)


def prepare(suite: str) -> tuple[image.Image, machine.Warm]:
    """Return image and saved state of a suite, made now if they are not there."""
    made = image.ensure(suite)
    return made, machine.warm(made, lambda host: await_answer(host.port, machine.BOOT_S, console=host.console))


def await_answer(port: int, within_s: float, *, console: Any = str) -> None:
    """Return when dom0 answers. QEMU takes connections before dom0 does: only an answer counts.

    Raises:
        RuntimeError: it does not in time, with the end of the console.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            _call(port, {"do": "pids", "arguments": {"uid": 0}}, b"", 5.0)
            return
        except (OSError, EOFError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"dom0 does not answer ({error}): {console()[-2000:]}") from error
            time.sleep(0.1)


def _call(port: int, request: dict[str, Any], body: bytes, within_s: float) -> tuple[dict[str, Any], bytes]:
    """Send one request and return the answer: see ``inside/channel.py``."""
    text = json.dumps({**request, "bytes": len(body)}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=within_s) as connection:
        connection.sendall(struct.pack("!I", len(text)) + text + body)
        with connection.makefile("rb") as answer:
            (size,) = struct.unpack("!I", _exactly(answer, 4))
            head: dict[str, Any] = json.loads(_exactly(answer, size))
            return head, _exactly(answer, head["bytes"])


def _exactly(file: Any, count: int) -> bytes:
    data: bytes = file.read(count)
    if len(data) != count:
        raise EOFError("dom0 closed the connection")
    return data


def _root_owned(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _copy_sources(local: Path, tree: Path) -> None:
    for path in local.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = tree / path.relative_to(local)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
