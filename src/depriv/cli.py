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

    from depriv import cli_options
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
        formatter_class=cli_options.Formatter,
    )
    top.add_argument("--version", action="version", version="depriv 0.1.0")
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (text, act, add_options) in VERBS.items():
        if verb not in VERBS or verb == name:
            description = text[0].upper() + text[1:] + "."
            made = verbs.add_parser(
                name, help=text, description=description, allow_abbrev=False, formatter_class=cli_options.Formatter
            )
            made.set_defaults(act=act)
            add_options(made)
    return top


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

    if os.path.exists("/proc/xen/capabilities"):  # most hosts have not: what follows imports a good deal
        from depriv import cli_xen, xenstore

        if xenstore.is_dom0():
            return cli_xen.create(arguments, _load(arguments), _toolstack())
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

    guest = _toolstack().guest(arguments.name)
    if guest.is_xen:
        from depriv import cli_xen

        return cli_xen.console(guest, dump=arguments.dump)
    if not arguments.dump:
        raise ConfigError(
            "console prints what there is, and ends: say --dump", fix=f"depriv console --dump {guest.name}"
        )
    data = guest.console()
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
        guest = _toolstack().guest(arguments.name)
        if guest.is_xen:
            from depriv import cli_xen

            return cli_xen.destroy(guest, jail)
        guest.destroy(jail)
    return 0


def cd_insert(arguments: argparse.Namespace) -> int:
    """Put an image into a CD-ROM drive."""
    from depriv import cli_xen

    host = _toolstack()
    return cli_xen.change_cd(host.guest(arguments.name), host.registry, arguments.vdev, arguments.file)


def cd_eject(arguments: argparse.Namespace) -> int:
    """Take the image out of a CD-ROM drive."""
    from depriv import cli_xen

    host = _toolstack()
    return cli_xen.change_cd(host.guest(arguments.name), host.registry, arguments.vdev, "")


def save(arguments: argparse.Namespace) -> int:
    """Save a domain to a file, and end it."""
    from depriv import cli_xen

    return cli_xen.save(_toolstack().guest(arguments.name), arguments.file)


def restore(arguments: argparse.Namespace) -> int:
    """Go on with a saved domain."""
    from depriv import cli_xen

    return cli_xen.restore(arguments, _toolstack())


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


VERBS: dict[str, tuple[str, Callable[[argparse.Namespace], int], Callable[[argparse.ArgumentParser], None]]] = {
    "check": ("read a configuration, say what is wrong with it", check, cli_options.file_options),
    "plan": ("show what create would do, and touch nothing", show_plan, cli_options.plan_options),
    "run": ("run a QEMU command line confined, in the foreground", run_qemu, cli_options.run_options),
    "shim": ("write programs under QEMU's own names that run it confined", shim, cli_options.shim_options),
    "create": ("start a domain, confined and audited", create, cli_options.create_options),
    "list": ("list the domains of this host", show_list, cli_options.list_options),
    "console": ("print what a guest has written to its serial port", console, cli_options.console_options),
    "audit": ("ask the kernel whether every restriction holds", audit, cli_options.audit_options),
    "destroy": ("end a domain at once, and see that nothing is left", destroy, cli_options.name_option),
    "cd-insert": ("put an image into a CD-ROM drive of a Xen domain", cd_insert, cli_options.cd_insert_options),
    "cd-eject": ("take the image out of a CD-ROM drive of a Xen domain", cd_eject, cli_options.cd_options),
    "save": ("save a Xen domain to a file, and end it", save, cli_options.save_options),
    "restore": ("go on with a Xen domain that was saved", restore, cli_options.restore_options),
    "gc": ("clear away what was cut short, and domains that have ended", gc, cli_options.gc_options),
    "watch": ("see to the ends of all guests as their configurations say", watch, cli_options.no_options),
    "doctor": ("say what this host lacks, and what fixes it", doctor, cli_options.json_option),
    "setup": ("make the users that device models run as", setup, cli_options.setup_options),
    "demo": ("run a demonstration guest, show its audit, end it", demo, cli_options.no_options),
}


if __name__ == "__main__":
    run()
