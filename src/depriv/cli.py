# SPDX-License-Identifier: Apache-2.0
"""The command line: words in, calls of :mod:`depriv.api`, answers out. The only place that prints and exits.

Exit statuses: 0 done, 1 the answer is no (`audit`, `doctor`), 2 usage or configuration, 125 not started or not done.
"""

from __future__ import annotations

import time

_BEGAN = time.monotonic()  # first of all: what is counted is the rest of the imports, too

try:
    import argparse
    import io
    import json
    import os
    import sys

    from depriv.errors import ConfigError, DeprivError, HostError, render
    from depriv.text import one_line
except KeyboardInterrupt:  # these take most of the time until `run`, and a traceback tells an administrator nothing
    raise SystemExit(130) from None

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from depriv.api import Toolstack
    from depriv.config import Domain


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        words, qemu = _split(words)
        arguments = parser(words[0] if words else "").parse_args(words)
        if qemu is not None and words[0] not in ("run", "plan"):
            raise ConfigError(f"{words[0]} takes no --", fix=f"see depriv {words[0]} --help")
        if words[0] in ("run", "plan"):
            arguments.qemu = qemu
        act: Callable[[argparse.Namespace], int] = arguments.act
        status = act(arguments)
        _flush()
        return status
    except DeprivError as error:
        print(render(error), file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        # The reader has seen enough: no more output, and no complaint from the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        # What nobody foresaw: a full or read-only file system, most likely.
        print(render(HostError("the host refused", cause=str(error))), file=sys.stderr)
        return HostError.exit_status
    except KeyboardInterrupt:
        return 130


def _split(words: list[str]) -> tuple[list[str], list[str] | None]:
    """Return our words, and those of QEMU after the first ``--``: they are never argparse's to look at."""
    if "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _flush() -> None:
    """Write what is left of the answer.

    Raises:
        HostError: it cannot be written.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        fix = "what was asked for has been done; depriv list shows how things are"
        raise HostError("cannot write the answer to standard output", fix=fix) from error


def run() -> None:
    """Be the program: run, flush, and leave without taking the interpreter apart, which takes longer than an audit."""
    _have_streams()
    try:
        status = _main_without_exit()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        status = 0
    except KeyboardInterrupt:
        status = 130
    except OSError:  # standard error cannot be written, and there is nobody else to tell
        status = HostError.exit_status
    os._exit(status)


def _main_without_exit() -> int:
    """Return the status even where argparse, which prints help and errors of usage itself, would leave."""
    try:
        return main()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else ConfigError.exit_status


def _have_streams() -> None:
    """See that descriptors 0 to 2 are open, or files of ours would get their numbers; that all text can be shown."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # A closed one is None to Python.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (closed by the program's end)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as above)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Not at once, whatever PYTHONUNBUFFERED says: an answer that cannot be written is met in one place.
            stream.reconfigure(errors="backslashreplace", write_through=False)


def parser(verb: str = "") -> argparse.ArgumentParser:
    """Return the parser; of one verb alone if that is what was typed, for every option takes argparse a while.

    The man page lists the same verbs and options (a test compares them).
    """
    top = argparse.ArgumentParser(
        prog="depriv",
        allow_abbrev=False,
        description="Run QEMU with nothing to gain from taking it over.",
        formatter_class=_Formatter,
    )
    top.add_argument("--version", action="version", version="depriv 0.1.0")
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (text, act, add_options) in VERBS.items():
        if verb not in VERBS or verb == name:
            description = text[0].upper() + text[1:] + "."
            made = verbs.add_parser(
                name, help=text, description=description, allow_abbrev=False, formatter_class=_Formatter
            )
            made.set_defaults(act=act)
            add_options(made)
    return top


class _Formatter(argparse.HelpFormatter):
    """Help of a fixed width: to ask for the terminal's, argparse imports a good deal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)


def _file_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("file", metavar="FILE", help="configuration, see depriv.cfg(5)")
    # The default tells argparse that there need be none.
    made.add_argument("settings", metavar="KEY=VALUE", nargs="*", default=[], help="as if at the end of the file")


def _json_option(made: argparse.ArgumentParser) -> None:
    made.add_argument("--json", action="store_true", help="print JSON")


def _name_option(made: argparse.ArgumentParser) -> None:
    made.add_argument("name", metavar="NAME", help="name or domid")


def _plan_options(made: argparse.ArgumentParser) -> None:
    made.usage = "depriv plan [--json] FILE [KEY=VALUE ...]\n       depriv plan [--json] [options of run] -- QEMU ..."
    made.add_argument("file", metavar="FILE", nargs="?", help="configuration, see depriv.cfg(5)")
    made.add_argument("settings", metavar="KEY=VALUE", nargs="*", default=[], help="as if at the end of the file")
    _json_option(made)
    _qemu_options(made)


def _run_options(made: argparse.ArgumentParser) -> None:
    made.usage = "depriv run [options] -- QEMU ..."
    _qemu_options(made)


def _qemu_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--name", metavar="NAME", default="", help="the domain's name; default: that of -name")
    made.add_argument("--user", metavar="USER", default="", help="run QEMU as this user instead of one of the range")
    made.add_argument("--keep-net", action="store_true", help="leave QEMU in the host's network (said aloud)")
    made.add_argument("--probe-format", action="store_true", help="have qemu-img, jailed, find formats not given")


def _shim_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("directory", metavar="DIR", help="where to write them; it may be there already")
    made.add_argument("--qemu", metavar="PATH", default="", help="only for this QEMU; default: all of this host")
    made.add_argument("--user", metavar="USER", default="", help="as for run")
    made.add_argument("--keep-net", action="store_true", help="as for run")
    made.add_argument("--probe-format", action="store_true", help="as for run")


def _create_options(made: argparse.ArgumentParser) -> None:
    _file_options(made)
    made.add_argument("-p", "--paused", action="store_true", help="stop before the first instruction")


def _list_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("names", metavar="NAME", nargs="*", help="name or domid; default: all")
    _json_option(made)


def _console_options(made: argparse.ArgumentParser) -> None:
    _name_option(made)
    made.add_argument("--dump", action="store_true", required=True, help="print what there is and end")


def _audit_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("name", metavar="NAME", nargs="?", help="name or domid")
    made.add_argument("--pid", type=int, metavar="N", help="any process of this host instead")
    _json_option(made)


def _gc_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("names", metavar="NAME", nargs="*", help="name or domid; default: all, and what is of none")
    made.add_argument("--dry-run", action="store_true", help="change nothing, say what would be done")
    made.add_argument("--restart", action="store_true", help="start those again whose configuration says so")
    _json_option(made)


def _setup_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--dry-run", action="store_true", help="only print the commands")
    made.add_argument("--remove", action="store_true", help="remove the users that it made")


def check(arguments: argparse.Namespace) -> int:
    """Print what the configuration comes to, key by key where there is something to say."""
    try:
        config = _load(arguments)
    except ConfigError as error:
        for each in (error, *error.others):
            print(render(each), file=sys.stderr)
        return error.exit_status
    for note in config.notes:
        place = f"{note.source or arguments.file}:{note.line}:{note.column}: " if note.line else ""
        print(f"{place}{'warning' if note.warning else 'note'}: {note.text}")
    disks = ", ".join(disk.vdev for disk in config.disks) or "none"
    size = f"{config.memory_mib} MiB, {config.vcpus} vCPU"
    print(f"{arguments.file}: {config.name}: {size}, {config.machine}, disks {disks}")
    return 0


def show_plan(arguments: argparse.Namespace) -> int:
    """Print everything that a start would open, unshare, drop and execute."""
    from depriv import cli_qemu

    if arguments.qemu is not None:
        return cli_qemu.show_plan(arguments, _toolstack())
    if arguments.file is None:
        raise ConfigError("plan takes a configuration, or -- and a QEMU command line", fix="see depriv plan --help")
    cli_qemu.print_launch(_toolstack().plan(_load(arguments)), as_json=arguments.json)
    return 0


def run_qemu(arguments: argparse.Namespace) -> int:
    """Run a QEMU command line confined; the status is QEMU's own."""
    from depriv import cli_qemu

    return cli_qemu.run(arguments, _toolstack())


def shim(arguments: argparse.Namespace) -> int:
    """Write programs under QEMU's own names that run it confined."""
    from depriv import cli_qemu

    return cli_qemu.shim(arguments)


def create(arguments: argparse.Namespace) -> int:
    """Start a domain. The jail's interpreter starts while this one still reads the configuration."""
    from depriv.spawn import Jail

    begun_s = _begun()
    times = [("arguments", time.monotonic())]
    with Jail() as jail:
        host = _toolstack()
        times.append(("imports", time.monotonic()))
        config = _load(arguments)
        times.append(("configuration", time.monotonic()))
        started = host.start(config, paused=arguments.paused, warn=_warn, jail=jail)
    entry = started.entry
    held = sum(item.holds for item in started.report.checks)
    print(
        f"{entry.name}: domid {entry.domid}, uid {entry.uid}, {'paused' if arguments.paused else 'running'}; "
        f"{held} of {len(started.report.checks)} checks hold"
    )
    if begun_s:
        from depriv.report import times_text

        begun = [("exec", begun_s), ("interpreter", _BEGAN), *times]
        ended = ("jail gone", time.monotonic())
        print(times_text([*begun, *started.times[1:], ended]), file=sys.stderr)
    return 0


def _begun() -> float:
    """Return when the caller executed us, on the monotonic clock, if it wants to know the times; 0 if not."""
    text = os.environ.get("DEPRIV_TIMES", "")
    try:
        return float(text) if text else 0.0
    except ValueError:
        fix = "set it to the moment of exec on CLOCK_MONOTONIC, or to 1"
        raise ConfigError(f"DEPRIV_TIMES is no number: {text!r}", fix=fix) from None


def show_list(arguments: argparse.Namespace) -> int:
    """Print one line per domain; a dm_restrict that is off stands out."""
    rows = _toolstack().rows(tuple(arguments.names))
    if arguments.json:
        print(json.dumps([row.as_dict() for row in rows], indent=2))
        return 0
    print(
        f"{'Name':<24} {'ID':>5} {'State':<11} {'PID':>8} {'UID':>10} {'GID':>10} {'Mem':>6} {'VCPUs':>5} dm_restrict"
    )
    for row in rows:
        restrict = "?" if row.state == "damaged" else "on" if row.dm_restrict else "OFF"
        print(
            f"{row.name:<24} {row.domid:>5} {row.state:<11} {row.pid:>8} {row.uid:>10} {row.gid:>10} "
            f"{row.memory_mib:>6} {row.vcpus:>5} {restrict}"
        )
        if row.trouble:
            print(f"    {one_line(row.trouble)}")
    return 0


def console(arguments: argparse.Namespace) -> int:
    """Print the console's buffer: as it came into a file or pipe, made safe on a terminal."""
    from depriv.text import console_safe

    data = _toolstack().guest(arguments.name).console()
    text = console_safe(data)
    print(text, end="" if text.endswith("\n") or not text else "\n")
    return 0


def audit(arguments: argparse.Namespace) -> int:
    """Print every check; 1 if one does not hold."""
    from depriv.api import audit_process

    if (arguments.name is None) == (arguments.pid is None):
        raise ConfigError("audit takes a domain's name, or --pid and a process number", fix="see depriv audit --help")
    if arguments.pid is not None and arguments.pid < 1:
        raise ConfigError(f"there is no process {arguments.pid}", fix="give a process number, as ps shows it")
    host = _toolstack()
    report = host.guest(arguments.name).audit() if arguments.pid is None else audit_process(arguments.pid, host)
    print(json.dumps(report.to_json(), indent=2) if arguments.json else report.to_text())
    return 0 if report.holds else 1


def destroy(arguments: argparse.Namespace) -> int:
    """End a domain."""
    from depriv.spawn import Jail

    with Jail() as jail:
        _toolstack().guest(arguments.name).destroy(jail)
    return 0


def gc(arguments: argparse.Namespace) -> int:
    """Clear away what is left; 1 if something cannot be cleared yet."""
    host = _toolstack()
    domids = tuple(host.registry.find(name).domid for name in arguments.names)
    done = host.gc(dry_run=arguments.dry_run, restart=arguments.restart, domids=domids)
    if arguments.json:
        print(json.dumps([each.as_dict() for each in done], indent=2))
    for each in () if arguments.json else done:
        who = f"{each.name} (domain {each.domid}): " if each.name else ""
        words = {"done": {"clear": "cleared"}.get(each.action, f"started again as domain {each.new_domid}")}
        words |= {"would": f"would {each.action}", "quarantined": "does not die yet, its ids are quarantined"}
        words |= {"busy": "another command is at it", "gone": "another command was faster"}
        print(
            one_line(
                f"{who}{each.what}: {words.get(each.result, each.result)}" + (f": {each.cause}" if each.cause else "")
            )
        )
    return 0 if all(each.result in ("done", "would", "gone") for each in done) else 1


def watch(_arguments: argparse.Namespace) -> int:
    """See to the ends of guests, until told to end."""
    from depriv.watch import run

    return run(_state_dir(), say=lambda text: print(text, flush=True))


def doctor(arguments: argparse.Namespace) -> int:
    """Print what the host has and lacks; 1 if something needed is missing."""
    from depriv.doctor import diagnose, is_fit, to_json, to_text

    findings = diagnose()
    print(to_json(findings) if arguments.json else to_text(findings))
    return 0 if is_fit(findings) else 1


def setup(arguments: argparse.Namespace) -> int:
    """Make or remove the users."""
    from depriv.setup import remove_setup, run_setup

    act = remove_setup if arguments.remove else run_setup
    print(act(dry_run=arguments.dry_run))
    return 0


def demo(_arguments: argparse.Namespace) -> int:
    """Run the demonstration."""
    from depriv.demo import run

    return run(say=lambda text: print(text, flush=True))


def _state_dir() -> str:
    from depriv.host import STATE_DIR

    path = os.environ.get("DEPRIV_STATE_DIR", STATE_DIR)
    if not path.startswith("/") or not path.isprintable():
        raise ConfigError(f"DEPRIV_STATE_DIR is no absolute path: {path!r}", fix="unset it, or give one")
    return os.path.normpath(path)


def _toolstack() -> Toolstack:
    from depriv.api import Toolstack

    return Toolstack(state_dir=_state_dir())


def _load(arguments: argparse.Namespace) -> Domain:
    from depriv.api import load

    return load(arguments.file, tuple(arguments.settings))


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _no_options(_made: argparse.ArgumentParser) -> None:
    """Take none."""


VERBS: dict[str, tuple[str, Callable[[argparse.Namespace], int], Callable[[argparse.ArgumentParser], None]]] = {
    "check": ("read a configuration, say what is wrong with it", check, _file_options),
    "plan": ("show what create would do, and touch nothing", show_plan, _plan_options),
    "run": ("run a QEMU command line confined, in the foreground", run_qemu, _run_options),
    "shim": ("write programs under QEMU's own names that run it confined", shim, _shim_options),
    "create": ("start a domain, confined and audited", create, _create_options),
    "list": ("list the domains of this host", show_list, _list_options),
    "console": ("print what a guest has written to its serial port", console, _console_options),
    "audit": ("ask the kernel whether every restriction holds", audit, _audit_options),
    "destroy": ("end a domain at once, and see that nothing is left", destroy, _name_option),
    "gc": ("clear away what was cut short, and domains that have ended", gc, _gc_options),
    "watch": ("see to the ends of all guests as their configurations say", watch, _no_options),
    "doctor": ("say what this host lacks, and what fixes it", doctor, _json_option),
    "setup": ("make the users that device models run as", setup, _setup_options),
    "demo": ("run a demonstration guest, show its audit, end it", demo, _no_options),
}


if __name__ == "__main__":
    run()
