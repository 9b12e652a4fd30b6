# SPDX-License-Identifier: Apache-2.0
"""Start what runs beside a domain's QEMU, for it: passt, its user-mode network.

It lives as long as the socket between the two: passt ends when QEMU's end closes (``--fd``, passt(1)), however QEMU
ended. One that was taken over and does not is the domain's: in a cgroup in QEMU's, and in the registry's entry.
"""

from __future__ import annotations

import contextlib
import os
import time
from contextlib import ExitStack

from depriv import detect, proc, runtime, toolaudit
from depriv.entry import Tool
from depriv.errors import HostError, JailError
from depriv.identity import choose, tool_domid
from depriv.spawn import Jail
from depriv.text import console_safe
from depriv.toolplan import Passt, plan_passt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Self

    from depriv.entry import Entry
    from depriv.host import Host
    from depriv.openings import StartPasst
    from depriv.registry import Registry

TIMEOUT_S: Final = 15.0
_SHOWN: Final = 2000  # characters of what it printed
_RESOLV: Final = "/etc/resolv.conf"
# What passt says, and what to do about it.
_FIXES: Final = (
    ("failed to bind", "see who has the port: ss -ltnup; below 1024: sysctl net.ipv4.ip_unprivileged_port_start"),
    (
        "external interface not usable",
        "passt takes the host's default route for its own, and there is none: add one, or use a tap, or -nic none",
    ),
)


class Tools:
    """The tools of one start. What is closed before ``release`` ends with all that it started."""

    def __init__(self, registry: Registry, cache_dir: str) -> None:
        """Take where domains and copies of programs are kept."""
        self._registry = registry
        self._cache_dir = cache_dir
        self._held = ExitStack()
        self._jails: list[Jail] = []

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End what was not released."""
        self._held.close()

    def release(self) -> None:
        """Let all go on for as long as QEMU does."""
        for jail in self._jails:
            jail.release()

    def start_passt(self, opening: StartPasst, source: int, entry: Entry) -> Entry:
        """Start one, at the other end of descriptor ``source``, and return the entry with it once it is confined.

        The entry is of a domain whose QEMU has started: its cgroup is there.

        Raises:
            DeprivError: it did not start; what it said.
        """
        host = look_for("passt", entry, self._registry.folder, self._cache_dir)
        output = self._pipe()
        wanted = Passt(
            domain=entry.name,
            domid=entry.domid,
            place=len(entry.tools),
            words=opening.words,
            source=source,
            output=output,
            directory=self._registry.directory(entry.domid),
            cgroup=entry.cgroup,
            resolv=detect.look_at(os.path.realpath(_RESOLV)),
        )
        identity = choose(device_model_user="", domid=host.domid, accounts=host.accounts, taken=_taken(entry))
        launch = plan_passt(wanted, host, identity)
        runtime.ensure(launch, lambda: libraries(host.program.path))
        jail = self._held.enter_context(Jail())
        try:
            launched = jail.launch(launch.plan, timeout_s=TIMEOUT_S)
        except JailError as error:
            if error.step.startswith("execute") and not error.errno:  # it did, and ended at once
                raise _failure("passt did not start: it ended", output) from error
            raise HostError("passt did not start", cause=f"{error}: {error.cause}", fix=error.fix) from error
        os.close(launched.pidfd)
        tool = Tool(
            name="passt",
            role=opening.role,
            pid=launched.pid,
            starttime=proc.start_time(launched.pid),
            uid=identity.uid,
            gid=identity.gid,
        )
        _await_confined(tool, entry.tools, output)
        self._jails.append(jail)
        return entry.replace(tools=(*entry.tools, tool))

    def _pipe(self) -> int:
        """Return a pipe that is open for both directions in one descriptor, until this is closed.

        Who writes to it never waits, and is not told when we are gone: what does not fit is lost.
        """
        reads, writes = os.pipe2(os.O_CLOEXEC)
        both = os.open(f"/proc/self/fd/{reads}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        os.close(reads)
        os.close(writes)
        self._held.callback(os.close, both)
        return both


def look_for(name: str, entry: Entry, state_dir: str, cache_dir: str) -> Host:
    """Return the host's facts for a tool of a domain's: the tool for the program, its own domid."""
    found = detect.find_tool(name)
    program = detect.fastest_build(os.path.realpath(found)) if found else f"/usr/bin/{name}"
    domid = tool_domid(entry.domid)
    host = detect.look_host(program=program, device_model_user="", domid=domid, holdings=())
    return host.replace(state_dir=state_dir, cache_dir=cache_dir)


def _taken(entry: Entry) -> tuple[tuple[str, int, int], ...]:
    return ((entry.name, entry.uid, entry.gid),)


def libraries(path: str) -> str:
    """Return what the dynamic linker says it loads for a program of the host's, as nobody."""
    import subprocess  # noqa: PLC0415 (only where the copy is made)

    environ = {"LD_DEBUG": "files", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [path, "--version"],
            env=environ,
            user=65534,
            group=65534,
            extra_groups=(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(f"cannot run {path} to see which libraries it loads") from error
    return done.stderr


def _await_confined(tool: Tool, others: tuple[Tool, ...], output: int) -> None:
    """See it enclose itself: then it serves its guest. It does not say so, but the kernel shows it."""
    deadline = time.monotonic() + TIMEOUT_S
    while not toolaudit.serves(tool):
        if proc.alive(tool.pid, tool.starttime) == "dead":
            raise _failure("passt did not start: it ended", output)
        if time.monotonic() > deadline:
            raise _failure(f"passt did not start within {TIMEOUT_S:.0f} seconds", output)
        time.sleep(0.002)
    toolaudit.refuse_unconfined((*others, tool))


def _failure(what: str, output: int) -> HostError:
    """Return the error, with what it has printed."""
    said = b""
    with contextlib.suppress(BlockingIOError):
        said = os.read(output, 65536)  # all that a pipe holds
    # Its root has no system logger, and each line says so.
    lines = [line for line in console_safe(said).splitlines() if "to syslog" not in line]
    cause = "\n".join(lines)[:_SHOWN].strip()
    fix = next((fix for sign, fix in _FIXES if sign in cause.lower()), "")
    return HostError(what, cause=cause or "it says nothing", fix=fix)
