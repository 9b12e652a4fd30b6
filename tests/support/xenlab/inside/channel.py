# SPDX-License-Identifier: Apache-2.0
"""Runs in dom0 as process 1: answers the tests over TCP, and reaps what nobody else does.

One connection, one request. Request and answer have the same form: four bytes with the length of a JSON object, the
object, and as many raw bytes as its "bytes" says. There is no password: QEMU forwards a port of the loopback only.

    {"do": "run", "argv": [...], "timeout_s": 60, "bytes": N}   and N bytes of standard input
        -> {"status": 0, "out": M, "bytes": K}                  and M bytes of standard output, K - M of standard error
        "status" is negative for a signal, and null if the time was over: the command's process group is then dead.
    {"do": NAME OF A FUNCTION IN facts.py, "arguments": {...}}
        -> {"result": ...} or {"error": "..."}
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
from typing import Any

from . import facts

PORT = 7000
PATH = os.environ["PATH"]


def read(connection: socket.socket, count: int) -> bytes:
    """Return exactly ``count`` bytes."""
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def answer(connection: socket.socket, head: dict[str, Any], body: bytes = b"") -> None:
    """Send an object and what belongs to it."""
    text = json.dumps({**head, "bytes": len(body)}).encode()
    connection.sendall(struct.pack("!I", len(text)) + text + body)


def run(argv: list[str], given: bytes, timeout_s: float) -> tuple[int | None, bytes, bytes]:
    """Run a command; a background child of it may keep the files of its output, and delays nobody."""
    out, err, stdin = (os.memfd_create(name) for name in ("out", "err", "in"))
    with open(stdin, "wb", closefd=False) as file:
        file.write(given)
    os.lseek(stdin, 0, os.SEEK_SET)
    environment = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8"}
    try:
        process = subprocess.Popen(
            argv, stdin=stdin, stdout=out, stderr=err, env=environment, cwd="/root", start_new_session=True
        )
    except OSError as error:
        return 127, b"", str(error).encode()
    try:
        status: int | None = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status = None
    return status, contents(out), contents(err)


def contents(fd: int) -> bytes:
    """Return what is in a file, from its start, and close it."""
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb") as file:
        return file.read()


def serve(connection: socket.socket) -> None:
    """Do what one connection asks for."""
    (size,) = struct.unpack("!I", read(connection, 4))
    request = json.loads(read(connection, size))
    given = read(connection, request["bytes"])
    if request["do"] == "run":
        status, out, err = run(request["argv"], given, request["timeout_s"])
        answer(connection, {"status": status, "out": len(out)}, out + err)
        return
    try:
        answer(connection, {"result": getattr(facts, request["do"])(**request["arguments"])})
    except Exception as error:
        answer(connection, {"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Serve for ever, a process for each connection."""
    # Orphans are process 1's to reap; to ignore SIGCHLD reaps them in the kernel (wait(2)).
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.create_server(("0.0.0.0", PORT), backlog=16)
    print("xenlab: ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                serve(connection)
            finally:
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    main()
