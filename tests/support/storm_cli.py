# SPDX-License-Identifier: Apache-2.0
"""The command line as the storm runs it: ``python3 storm_cli.py SPEC WORD...``, SPEC being JSON.

The very ``depriv.cli``, with three differences: its jails are started through ``storm_jail.py``, copies of QEMU's
files are kept where SPEC says, and it can be stopped before any line that it executes.
"""

from __future__ import annotations

import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
sys.path[:0] = [f"{ROOT}/src", ROOT]

from tests.support.storm_point import PACKAGE, Lines, Point  # noqa: E402

from depriv import api, cli, spawn  # noqa: E402


def main() -> int:
    spec = json.loads(sys.argv[1])
    spawn._JAIL = spec["jail"]
    cli._toolstack = lambda: api.Toolstack(state_dir=spec["state"], cache_dir=spec["cache"])
    hit = spec["hit"]
    if not hit:
        return cli.main(sys.argv[2:])
    point = Point(spec["broker"], "toolstack")
    if hit["who"] != "toolstack" and hit["at"] != "count":
        return cli.main(sys.argv[2:])
    lines = Lines(hit, PACKAGE, point.reached)
    lines.start()
    status = cli.main(sys.argv[2:])
    sys.settrace(None)
    point.tell_lines(lines.counts)
    return status


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as cli.run ends
