# SPDX-License-Identifier: Apache-2.0
"""Executed as ``python3 -I -S .../depriv/jail/__main__.py FD``, as root. What it does: :mod:`depriv.jail.process`."""

from __future__ import annotations

import os
import sys

# -I leaves out the package's own folder. Last, so that nothing in it can stand in for the standard library.
sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from depriv.jail.process import main

if __name__ == "__main__":
    # Not sys.exit: nothing is left to flush, and in the emptied root there is nothing to import.
    os._exit(main(int(sys.argv[1])))
