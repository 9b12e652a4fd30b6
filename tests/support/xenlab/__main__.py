# SPDX-License-Identifier: Apache-2.0
"""The emulated Xen host by hand: start one, run commands and copy files, end it. See the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.support.xenlab import image, machine, recording
from tests.support.xenlab.dom0 import Dom0, await_answer, resume


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.xenlab")
    verbs = parser.add_subparsers(dest="verb", required=True)
    start = verbs.add_parser("start", help="start a warm host; it runs until it is ended")
    start.add_argument("suite", choices=sorted(image.SUITES))
    start.add_argument("--name", default="default")
    run = verbs.add_parser("run", help="run a command, or one line of shell")
    run.add_argument("name")
    run.add_argument("--timeout", type=float, default=120.0)
    run.add_argument("words", nargs="+")
    put = verbs.add_parser("put", help="copy a file or a folder in")
    get = verbs.add_parser("get", help="copy a file out")
    python = verbs.add_parser("put-python", help="copy a Python package in, byte-compiled")
    for verb in (put, get, python):
        for word in ("name", "source", "target"):
            verb.add_argument(word)
    record = verbs.add_parser("record", help="write down anew what libxl hands to a device model")
    record.add_argument("suite", choices=sorted(image.SUITES))
    record.add_argument("folder", type=Path)
    end = verbs.add_parser("end", help="end a host")
    end.add_argument("name")
    given = parser.parse_args()
    if given.verb == "record":
        recording.record(given.suite, given.folder)
        return 0
    note = image.cache_folder() / f"by-hand-{given.name}.json"
    if given.verb == "start":
        return _start(given.suite, note)
    known = json.loads(note.read_text())
    if given.verb == "end":
        machine.end_left(known["folder"])
        note.unlink()
        return 0
    return _use(Dom0(known["port"], suite=known["suite"]), given)


def _start(suite: str, note: Path) -> int:
    if note.exists():
        raise SystemExit(f"there is one of that name; if it is dead, remove {note}")
    host = resume(suite, outlive=True)
    note.write_text(json.dumps({"port": host.port, "folder": host.folder, "suite": suite}))
    await_answer(host.port, machine.RESUME_S)
    host.leave()
    print(f"dom0 answers on port {host.port}; console in {host.folder}/console.log")
    return 0


def _use(dom0: Dom0, given: argparse.Namespace) -> int:
    if given.verb == "run":
        words = given.words
        done = dom0.run(words[0] if len(words) == 1 else words, timeout_s=given.timeout)
        sys.stdout.write(done.out)
        sys.stderr.write(done.err)
        return done.status
    if given.verb == "get":
        Path(given.target).write_bytes(dom0.get(given.source))
    elif given.verb == "put-python":
        dom0.put_python(given.source, given.target)
    elif Path(given.source).is_dir():
        dom0.put_tree(given.source, given.target)
    else:
        dom0.put(given.source, given.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
