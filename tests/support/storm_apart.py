# SPDX-License-Identifier: Apache-2.0
"""A storm on a host of its own: in its own pid, mount, IPC and network namespace, where nobody else's processes are.

So everything that is left there is the storm's, whatever ids it has; and `depriv gc`, which ends every process of the
range that is no domain's, ends nobody else's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.support.storm import Storm  # noqa: E402 (found only now)

if TYPE_CHECKING:
    from typing import Any

_RESULT = "result.json"


def run(folder: Path, *, seed: int, cycles: int, domids: range, thorough: bool) -> dict[str, Any]:
    """Have a storm, its progress on standard output; return what came of it.

    Args:
        folder: An empty one.
        seed: As for ``Storm``.
        cycles: As for ``Storm.run``.
        domids: Numbers that nobody else on this host uses: uids reach into every pid namespace below.
        thorough: As for ``Storm.run``.

    Returns:
        faults, hits (texts), cycles, steps, steps_hit.

    Raises:
        AssertionError: it did not come to its end.
    """
    space = ["unshare", "--pid", "--ipc", "--net", "--fork", "--kill-child", "--mount-proc"]
    words = [str(folder), str(seed), str(cycles), str(domids.start), str(domids.stop), str(int(thorough))]
    done = subprocess.run([*space, sys.executable, "-P", __file__, *words], check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"the storm ended with {done.returncode}"
    result: dict[str, Any] = json.loads((folder / _RESULT).read_text())
    return result


def main() -> None:
    """Be process 1, which does what an init does and no more: it collects orphans. Its child is the storm."""
    assert os.getpid() == 1, "not in a namespace of its own"
    first = os.fork()
    while first:
        ended, status = os.wait()
        if ended == first:
            os._exit(os.waitstatus_to_exitcode(status) and 1)
    folder, *numbers = sys.argv[1:]
    seed, cycles, start, stop, thorough = map(int, numbers)
    os.mkdir(f"{folder}/storm")
    storm = Storm(Path(folder, "storm"), seed=seed, domids=range(start, stop), say=lambda text: print(text, flush=True))
    with storm:
        storm.run(cycles, thorough=bool(thorough))
    result = {
        "faults": storm.faults,
        "hits": storm.hits,
        "cycles": storm.cycles,
        "steps": len(storm.steps),
        "steps_hit": storm.steps_hit,
    }
    Path(folder, _RESULT).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
