# SPDX-License-Identifier: Apache-2.0
"""The options and arguments of every verb. The man page lists the same (a test compares them)."""

from __future__ import annotations

import argparse


class Formatter(argparse.HelpFormatter):
    """Help of a fixed width: to ask for the terminal's, argparse imports a good deal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)


def file_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.add_argument("file", metavar="FILE", help="configuration, see depriv.cfg(5)")
    # The default tells argparse that there need be none.
    made.add_argument("settings", metavar="KEY=VALUE", nargs="*", default=[], help="as if at the end of the file")


def json_option(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.add_argument("--json", action="store_true", help="print JSON")


def name_option(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.add_argument("name", metavar="NAME", help="name or domid")


def plan_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.usage = "depriv plan [--json] FILE [KEY=VALUE ...]\n       depriv plan [--json] [options of run] -- QEMU ..."
    made.add_argument("file", metavar="FILE", nargs="?", help="configuration, see depriv.cfg(5)")
    made.add_argument("settings", metavar="KEY=VALUE", nargs="*", default=[], help="as if at the end of the file")
    json_option(made)
    qemu_options(made)


def run_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.usage = "depriv run [options] -- QEMU ..."
    qemu_options(made)


def qemu_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.add_argument("--name", metavar="NAME", default="", help="the domain's name; default: that of -name")
    made.add_argument(
        "--user", "--uid", metavar="USER", default="", help="run QEMU as this user (name or uid), not one of the range"
    )
    made.add_argument("--keep-net", action="store_true", help="leave QEMU in the host's network (said aloud)")
    made.add_argument("--probe-format", action="store_true", help="guess formats that are not given, as QEMU would")


def shim_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.add_argument("directory", metavar="DIR", help="where to write them; it may be there already")
    made.add_argument("--qemu", metavar="PATH", default="", help="only for this QEMU; default: all of this host")
    made.add_argument("--user", "--uid", metavar="USER", default="", help="as for run")
    made.add_argument("--keep-net", action="store_true", help="as for run")
    made.add_argument("--probe-format", action="store_true", help="as for run")


def create_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    file_options(made)
    made.add_argument("-p", "--paused", action="store_true", help="stop before the first instruction")


def list_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.add_argument("names", metavar="NAME", nargs="*", help="name or domid; default: all")
    json_option(made)


def console_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    name_option(made)
    made.add_argument("--dump", action="store_true", help="print what there is and end")


def audit_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.add_argument("name", metavar="NAME", nargs="?", help="name or domid")
    made.add_argument("--pid", type=int, metavar="N", help="any process of this host instead")
    json_option(made)


def cd_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    name_option(made)
    made.add_argument("vdev", metavar="VDEV", help="the drive, such as hdc")


def cd_insert_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    cd_options(made)
    made.add_argument("file", metavar="FILE", help="the image")


def save_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    name_option(made)
    made.add_argument("file", metavar="FILE", help="where to; it must not be there yet")


def restore_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.add_argument("file", metavar="FILE", help="what save has written")
    made.add_argument("-p", "--paused", action="store_true", help="leave it paused")


def gc_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.add_argument("names", metavar="NAME", nargs="*", help="name or domid; default: all, and what is of none")
    made.add_argument("--dry-run", action="store_true", help="change nothing, say what would be done")
    made.add_argument("--restart", action="store_true", help="start those again whose configuration says so")
    json_option(made)


def setup_options(made: argparse.ArgumentParser) -> None:
    """Add them."""
    made.add_argument("--dry-run", action="store_true", help="only print the commands")
    made.add_argument("--remove", action="store_true", help="remove the users that it made")


def no_options(_made: argparse.ArgumentParser) -> None:
    """Take none."""
