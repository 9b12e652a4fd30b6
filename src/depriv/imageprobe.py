# SPDX-License-Identifier: Apache-2.0
"""Have qemu-img say which format an image has: in a jail of its own, once for each image, before there is a QEMU.

The image is served to it on a socket (:mod:`depriv.nbd`), and not before the kernel shows that it is confined. It has
no other file, so that what the image names leads nowhere; what it says is one word, which is compared with what the
image's first bytes have said (:mod:`depriv.qemu.probing`). See docs/adr/0015.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from io import FileIO

from depriv import proc, runtime, toolaudit
from depriv.entry import Tool
from depriv.errors import ConfigError, HostError, JailError, MonitorError
from depriv.identity import choose
from depriv.launching import own_jail
from depriv.nbd import Export
from depriv.text import console_safe
from depriv.toolplan import Inspection, image_words, plan_qemu_img
from depriv.tools import TIMEOUT_S, libraries, look_for
from depriv.untrusted import as_str, decode, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from depriv.entry import Entry
    from depriv.host import FileFacts, Host
    from depriv.registry import Registry

_ANSWER_BYTES_MAX: Final = 1 << 20  # a line and a half for each snapshot in the image
_ANSWER_DEPTH: Final = 16
_ANSWER_VALUES: Final = 1 << 17
_ERRORS_BYTES_MAX: Final = 1 << 16
_SHOWN: Final = 500  # characters of what it printed
_GIVE: Final = "give the format: format=, as in file=DISK,format=raw"


def confirm(images: tuple[FileFacts, ...], entry: Entry, registry: Registry, cache_dir: str) -> None:
    """Refuse images that qemu-img takes for something else than their first bytes do.

    The entry is of a domain whose QEMU has not started, but whose ids and cgroup are written down.

    Raises:
        ConfigError: one is something else, or none that qemu-img can open.
        DeprivError: qemu-img did not start, is not confined, or did not answer.
    """
    for facts in images:
        said = _format(facts, entry, registry, cache_dir)
        if said != facts.format:
            raise ConfigError(
                f"{facts.path} begins like {facts.format}, and qemu-img takes it for {said}",
                cause="it was written meanwhile, or made to be mistaken",
                fix=_GIVE,
            )


def _format(facts: FileFacts, entry: Entry, registry: Registry, cache_dir: str) -> str:
    """Return the format that qemu-img says."""
    host = look_for("qemu-img", entry, registry.folder, cache_dir)
    identity = choose(
        device_model_user="", domid=host.domid, accounts=host.accounts, taken=((entry.name, entry.uid, entry.gid),)
    )
    with contextlib.ExitStack() as held:
        image = _opened(facts)
        held.callback(os.close, image)
        ours, its = (held.enter_context(end) for end in socket.socketpair())
        output, its_output = _pipe(held)
        errors, its_errors = _pipe(held)
        wanted = Inspection(
            domain=entry.name,
            domid=entry.domid,
            source=its.fileno(),
            output=its_output.fileno(),
            errors=its_errors.fileno(),
            directory=registry.directory(entry.domid),
            cgroup=entry.cgroup,
        )
        launch = plan_qemu_img(wanted, host, identity)
        runtime.ensure(launch, lambda: libraries(host.program.path))
        jail = held.enter_context(own_jail(entry, registry))
        deadline = time.monotonic() + TIMEOUT_S
        try:
            launched = jail.launch(launch.plan, timeout_s=TIMEOUT_S)
        except JailError as error:
            its_errors.close()
            if error.step.startswith("execute") and not error.errno:  # it did, and ended
                raise _ended(errors, deadline) from error
            raise HostError("qemu-img did not start", cause=f"{error}: {error.cause}", fix=error.fix) from error
        for end in (its, its_output, its_errors):
            end.close()
        held.callback(os.close, launched.pidfd)
        tool = Tool(
            name="qemu-img",
            role="image",
            pid=launched.pid,
            starttime=proc.start_time(launched.pid),
            uid=identity.uid,
            gid=identity.gid,
        )
        try:
            _refuse_unconfined(tool, host, errors, deadline)
            export = Export(ours, image, facts.size, deadline=deadline)
            export.serve()
            ours.close()
            if not export.heard:
                raise _ended(errors, deadline)
            answer = _read(output, _ANSWER_BYTES_MAX, deadline)
            return _format_in(answer, _said(errors, deadline).replace(image_words(), facts.path), facts)
        except ValueError as error:
            raise HostError(f"qemu-img makes no sense about {facts.path}", cause=str(error), fix=_GIVE) from error
        except TimeoutError as error:
            cause = f"it was not done within {TIMEOUT_S:.0f} seconds"
            raise HostError(f"qemu-img did not say what {facts.path} is", cause=cause, fix=_GIVE) from error


def _refuse_unconfined(tool: Tool, host: Host, errors: FileIO, deadline: float) -> None:
    try:
        toolaudit.refuse_unconfined((tool,), mounted=host.root_dirs)
    except HostError as error:
        if proc.alive(tool.pid, tool.starttime) == "dead":
            raise _ended(errors, deadline) from error
        raise


def _ended(errors: FileIO, deadline: float) -> HostError:
    return HostError("qemu-img ended at once", cause=_said(errors, deadline), fix=_GIVE)


def _said(errors: FileIO, deadline: float) -> str:
    """Return the beginning of what it complains of: an image's own words may be in there."""
    return console_safe(_read(errors, _ERRORS_BYTES_MAX, deadline))[:_SHOWN].strip() or "it does not say why"


def _pipe(held: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """Return both ends of a pipe, which are closed with ``held`` at the latest."""
    reads, writes = os.pipe2(os.O_CLOEXEC)
    return held.enter_context(FileIO(reads)), held.enter_context(FileIO(writes, "w"))


def _opened(facts: FileFacts) -> int:
    """Open the image that was looked at.

    Raises:
        ConfigError: it is another one by now.
    """
    fd = -1
    try:
        fd = os.open(facts.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        have = os.fstat(fd)
        if (have.st_dev, have.st_ino) == (facts.dev, facts.ino):
            return fd
    except OSError as error:
        raise ConfigError(f"cannot open {facts.path}", fix="see that it stays where it is") from error
    os.close(fd)
    raise ConfigError(f"{facts.path} is not the file that was looked at: it was replaced meanwhile", fix="try again")


def _read(end: FileIO, count: int, deadline: float) -> bytes:
    """Return all that is written to a pipe.

    Raises:
        ValueError: that is more than ``count`` bytes.
        TimeoutError: the deadline.
    """
    data = b""
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not select.select([end], (), (), left_s)[0]:
            raise TimeoutError
        chunk = os.read(end.fileno(), 65536)
        if not chunk:
            return data
        data += chunk
        if len(data) > count:
            raise ValueError(f"it says more than {count} bytes")


def _format_in(answer: bytes, errors: str, facts: FileFacts) -> str:
    """Return the format in an answer."""
    if not answer.strip():
        raise ConfigError(
            f"qemu-img cannot open {facts.path} as {facts.format}, which it begins like",
            cause=errors,
            fix="see that it is whole; if it is something else, " + _GIVE,
        )
    try:
        value = decode(answer, depth=_ANSWER_DEPTH, values=_ANSWER_VALUES)
        return console_safe(field(value, "format", as_str, "its answer").encode())[:_SHOWN]
    except MonitorError as error:
        raise ValueError(f"{error}: {error.cause}") from error
