# SPDX-License-Identifier: Apache-2.0
"""libxl's monitor before there is a QEMU behind it: the probe's answers, and the reason why there will be none."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_PROBE_TIMEOUT_S: Final = 60
_PROGRAMS: Final = (
    "/usr/libexec/xen-qemu-system-i386",
    "/usr/lib/xen/bin/qemu-system-i386",
    "/usr/local/lib/xen/bin/qemu-system-i386",
    "/usr/bin/qemu-system-i386",
    "/usr/bin/qemu-system-x86_64",
)
# What libxl asks of a probe is whether QEMU has -run-with chroot= and user=; we take either spelling over.
_GREETING: Final[dict[str, Any]] = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "depriv"}, "capabilities": []}
}


def program() -> str:
    """Return the path of Xen's QEMU: DEPRIV_DM_QEMU, or where distributions have it."""
    named = os.environ.get("DEPRIV_DM_QEMU", "")
    return named or next((path for path in _PROGRAMS if os.access(path, os.X_OK)), _PROGRAMS[0])


def listener(words: tuple[str, ...]) -> socket.socket | None:
    """Return the listening socket that libxl hands in for its monitor, or None."""
    for word in words:
        if word.startswith("socket,id=libxl-cmd,"):
            for item in word.split(","):
                if item.startswith("fd=") and item[3:].isdecimal():
                    with contextlib.suppress(OSError):  # not open: not started by libxl
                        return socket.socket(fileno=int(item[3:]))
    return None


def answer_probe(words: tuple[str, ...]) -> int:
    """Answer libxl's questions about QEMU's options until it ends this process.

    No QEMU is started: it would run as root, and would remove the socket's path when it ends, by which time libxl
    may have made the real one's there (libxl_dm.c, device_model_probe_spawn_outcome, Xen 4.20).
    """
    heard = listener(words)
    if heard is None:
        print("error: depriv-dm is started by libxl: no -xen-domid, and no monitor of libxl's", file=sys.stderr)
        print("  fix: to run a QEMU command line: depriv run -- qemu-system-x86_64 ...", file=sys.stderr)
        return 2
    signal.alarm(_PROBE_TIMEOUT_S)
    while True:
        client, _ = heard.accept()
        # Until libxl sends SIGHUP: it reports a probe that has ended by itself as an error.
        with client, contextlib.suppress(OSError, ValueError):
            _serve(client, {"query-command-line-options": [_RUN_WITH]}, error="")


_RUN_WITH: Final[dict[str, Any]] = {
    "option": "run-with",
    "parameters": [{"name": "chroot", "type": "string"}, {"name": "user", "type": "string"}],
}


def refuse(words: tuple[str, ...], text: str) -> None:
    """Tell libxl, which waits for its monitor, why there will be none: it writes that into xl's own output."""
    heard = listener(words)
    if heard is None:
        return
    heard.setblocking(False)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            client, _ = heard.accept()
        except BlockingIOError:
            time.sleep(0.02)
            continue
        except OSError:
            return
        client.settimeout(2.0)
        with client, contextlib.suppress(OSError, ValueError):
            _serve(client, {}, error=" ".join(text.split()))
        return


def _serve(client: socket.socket, answers: dict[str, Any], *, error: str) -> None:
    """Speak QMP to one client; with ``error``, answer every command with it."""
    with client.makefile("rwb") as stream:

        def say(message: dict[str, Any]) -> None:
            stream.write(json.dumps(message).encode() + b"\r\n")
            stream.flush()

        say(_GREETING)
        for line in iter(stream.readline, b""):
            asked: Any = json.loads(line)
            name = asked.get("execute")
            ident = {"id": asked["id"]} if "id" in asked else {}
            if error:
                say({"error": {"class": "GenericError", "desc": f"depriv: {error}"}, **ident})
            else:
                say({"return": answers.get(name, {}), **ident})
