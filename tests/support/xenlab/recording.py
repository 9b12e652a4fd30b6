# SPDX-License-Identifier: Apache-2.0
"""What libxl hands to a device model, as text files that other tests read: ``tests/xen/argv``.

A file has four sections, each a word at the start of a line and then one entry per line, indented: ``argv`` without
argv[0], ``environ``, ``fds`` ("number access target", a socket without its inode), ``limits`` ("name soft hard", those
that are set). ``record`` makes them anew::

    python -m tests.support.xenlab record trixie tests/xen/argv
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.support.xenlab.dom0 import Dom0

from depriv.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RECORDER = "/usr/lib/xenlab/record_dm.py"
LIFT = "/usr/lib/xenlab/lift-dm"
KEPT = "/var/log/xen/record"
SECTIONS = ("argv", "environ", "fds", "limits")


class Recording(Record):
    """One start of a device model."""

    argv: tuple[str, ...]  # without argv[0]
    environ: tuple[str, ...]  # "NAME=value", in alphabetical order
    fds: tuple[str, ...]  # "16 rw socket"
    limits: tuple[str, ...]  # "RLIMIT_FSIZE 262144 262144"

    @property
    def is_probe(self) -> bool:
        """Whether libxl only asked for QEMU's options (Xen 4.20 and later)."""
        return "-xen-domid" not in self.argv

    def to_text(self) -> str:
        """Return the content of a file."""
        return "".join(f"{name}\n" + "".join(f"    {line}\n" for line in getattr(self, name)) for name in SECTIONS)


def load(path: Path) -> Recording:
    """Return what a file has.

    Raises:
        ValueError: it is not of the form.
    """
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in path.read_text().splitlines():
        if not line.startswith("    "):
            current = found.setdefault(line, [])
        else:
            current.append(line[4:])
    if set(found) != set(SECTIONS):
        raise ValueError(f"{path}: the sections are {sorted(found)}")
    return Recording(**{name: tuple(lines) for name, lines in found.items()})


def with_override(suite: str, override: str, **keys: Any) -> dict[str, Any]:
    """Return keys of a configuration that start the device model through a program; restricted ones start on both."""
    result = {"device_model_version": "qemu-xen", "device_model_override": override, **keys}
    if suite == "trixie" and keys.get("dm_restrict"):
        # QEMU 10 ends when its vkbd backend retries to open evtchn behind the chroot ("Duplicate device ID").
        result["vkb_device"] = 0
    return result


def recorded(dom0: Dom0) -> list[Recording]:
    """Return the starts since the last call, the oldest first."""
    names = dom0.must(f"ls {KEPT}").split()
    found = [_recording(json.loads(dom0.get(f"{KEPT}/{name}"))) for name in names]
    dom0.must(["rm", "-r", KEPT])
    return found


def record(suite: str, folder: Path) -> None:
    """Write all files of a suite: minutes under emulation.

    Raises:
        RuntimeError: a guest did not start.
    """
    with Dom0.start(suite) as dom0:
        for name, starts in _record_all(dom0):
            for start in starts:
                kind = f"{name}-probe" if start.is_probe else name
                (folder / f"{suite}-{kind}.txt").write_text(start.to_text())


def _record_all(dom0: Dom0) -> Iterator[tuple[str, list[Recording]]]:
    vif = {"dm_restrict": 1, "vif": ["mac=00:16:3e:00:00:01,bridge=xenbr0,model=e1000"]}
    wanted: tuple[tuple[str, dict[str, Any]], ...] = (("plain", {}), ("vif", vif), ("restrict", {"dm_restrict": 1}))
    for name, keys in wanted:
        config = dom0.guest_config(name, **with_override(dom0.suite, RECORDER, **keys))
        dom0.must(["xl", "create", config], timeout_s=120)
        yield name, recorded(dom0)
        if name != "restrict":
            dom0.must(["xl", "destroy", name])
    dom0.must("xl save restrict /root/saved", timeout_s=120)
    dom0.run("xl restore /root/saved", timeout_s=120)  # plain xl loses this guest, whatever it says
    yield "restore", recorded(dom0)


def _recording(made: dict[str, Any]) -> Recording:
    fds = sorted(made["fds"].items(), key=lambda item: int(item[0]))
    limits = {name: values for name, values in made["limits"].items() if values != [-1, -1]}
    return Recording(
        argv=tuple(made["argv"][1:]),
        environ=tuple(sorted(f"{name}={value}" for name, value in made["environ"].items())),
        fds=tuple(f"{fd} {access} {target.partition(':[')[0]}" for fd, (access, target) in fds),
        limits=tuple(f"{name} {soft} {hard}" for name, (soft, hard) in sorted(limits.items())),
    )
