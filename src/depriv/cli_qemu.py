# SPDX-License-Identifier: Apache-2.0
"""The part of the command line that is about QEMU's command lines: run, plan, shim."""

from __future__ import annotations

import json
import os
import sys

from depriv import detect
from depriv.codec import as_json
from depriv.errors import ConfigError, HostError
from depriv.foreground import Options, plan_words, run_words
from depriv.openings import describe as describe_opening
from depriv.steps import Execute, describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from depriv.api import Toolstack
    from depriv.assembly import Launch
    from depriv.openings import Opening

_SHIM = """#!/bin/sh
# Made by depriv: runs QEMU with nothing to gain from taking it over. See depriv(1), run.
exec {depriv} run {options}-- {qemu} "$@"
"""


def print_launch(launch: Launch, *, as_json: bool, openings: tuple[Opening, ...] = ()) -> None:
    """Print a plan: for people, or as JSON."""
    if as_json:
        print(json.dumps(_data(launch, openings), indent=2))
        return
    plan = launch.plan
    for text in launch.warnings:
        print(f"warning: {text}")
    who = launch.identity
    print(f"{plan.domain} would run as {who.uid}:{who.gid} ({who.how}) with {launch.accel}:")
    lines = [*map(describe_opening, openings), *map(describe, plan.steps)]
    for number, line in enumerate(lines, 1):
        print(f"{number:3}. {line}")
    execute = plan.steps[-1]
    if isinstance(execute, Execute):
        print("     " + " ".join(_quoted(word) for word in execute.argv))
        print("     with the environment " + " ".join(execute.environ))
    for number, step in enumerate(plan.after, len(lines) + 1):
        print(f"{number:3}. when QEMU waits to run the guest: {describe(step)}")
    print(f"{len(lines) + len(plan.after) + 1:3}. audit it, and only if every check holds let the guest run")


def _data(launch: Launch, openings: tuple[Opening, ...]) -> dict[str, object]:
    plan = launch.plan
    return {
        "domain": plan.domain,
        "dm_restrict": plan.restricted,
        "identity": launch.identity.as_dict(),
        "accel": launch.accel,
        "runtime": launch.runtime,
        "openings": [{"open": type(item).__name__, **item.as_dict()} for item in openings],
        "steps": [as_json(step) for step in plan.steps],
        "after": [as_json(step) for step in plan.after],
        "warnings": list(launch.warnings),
    }


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        name=getattr(arguments, "name", ""),
        user=_user(arguments.user),
        keep_net=arguments.keep_net,
        probe_format=arguments.probe_format,
    )


def _user(wanted: str) -> str:
    """Return the name of the user that is wanted by name or uid: all that is checked is checked of a user."""
    if not wanted.isdecimal() or not wanted.isascii():
        return wanted
    import pwd  # noqa: PLC0415 (needed only here)

    try:
        return pwd.getpwuid(int(wanted)).pw_name
    except (KeyError, OverflowError):
        raise ConfigError(
            f"--user: uid {wanted} is nobody's",
            cause="whether a uid is a domain's alone can only be seen of a user",
            fix="name one that has an owner, or make one:\n"
            "useradd --system --user-group --no-create-home --shell /usr/sbin/nologin NAME",
        ) from None


def _words(arguments: argparse.Namespace) -> tuple[str, ...]:
    if not arguments.qemu:
        raise ConfigError(
            "run takes -- and a QEMU command line",
            fix="depriv run -- qemu-system-x86_64 -m 512 -drive file=disk.qcow2,format=qcow2",
        )
    return tuple(arguments.qemu)


def show_plan(arguments: argparse.Namespace, host: Toolstack) -> int:
    """Print what running a command line would do, and touch nothing."""
    request, launch = plan_words(_words(arguments), _options(arguments), host.registry, cache_dir=host.cache_dir)
    if not arguments.json:
        for note in request.notes:
            if not note.warning:
                print(f"note: {note.text}")
    print_launch(launch, as_json=arguments.json, openings=request.openings)
    return 0


def run(arguments: argparse.Namespace, host: Toolstack) -> int:
    """Run a command line and return QEMU's status."""
    return run_words(_words(arguments), _options(arguments), host.registry, cache_dir=host.cache_dir, say=_say)


def shim(arguments: argparse.Namespace) -> int:
    """Write the programs and print their paths."""
    found = (arguments.qemu,) if arguments.qemu else detect.all_programs()
    if not found:
        raise HostError("there is no QEMU on this host", fix="apt-get install --no-install-recommends qemu-system-x86")
    flags = [f"--user {_quoted(arguments.user)} "] if arguments.user else []
    flags += [f"--{name} " for name in ("keep-net", "probe-format") if getattr(arguments, name.replace("-", "_"))]
    folder = os.path.abspath(arguments.directory)
    depriv = _quoted(detect.find_in_path(sys.argv[0]))
    os.makedirs(folder, 0o755, exist_ok=True)
    for qemu in found:
        path = f"{folder}/{os.path.basename(qemu)}"
        if os.path.realpath(path) == os.path.realpath(qemu):
            raise ConfigError(f"{path} is the QEMU itself", fix="name another folder")
        text = _SHIM.format(depriv=depriv, options="".join(flags), qemu=_quoted(os.path.abspath(qemu)))
        beside = f"{path}.{os.getpid()}"
        with open(beside, "x", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o755)
        os.rename(beside, path)
        print(path)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _quoted(word: str) -> str:
    plain = all(char.isalnum() or char in "-_./:=,+@%" for char in word)
    return word if plain and word else "'" + word.replace("'", "'\\''") + "'"
