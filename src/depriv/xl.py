# SPDX-License-Identifier: Apache-2.0
"""The verbs on a Xen host: xl does what is Xen's, the device model is ours, and xl's word is not taken for it.

xl's exit status proves nothing (a restore whose disk was lost returned 0): after each verb it is looked at what there
is, in the registry, in xenstore and at the process.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from depriv import launching, status, xenstore
from depriv.errors import ConfigError, DeprivError, HostError, PlanError
from depriv.qemu.draft import SET_BASE
from depriv.text import console_safe
from depriv.untrusted import as_int, as_list, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from depriv.config import Domain
    from depriv.entry import Entry
    from depriv.registry import Registry
    from depriv.report import AuditReport

_TIMEOUT_S: Final = 600.0
_QMP_TIMEOUT_S: Final = 30.0
_SAID_MAX: Final = 2000  # characters of xl's that an error shows: the last ones
OVERRIDE: Final = "depriv-dm"


def refuse_type(config: Domain) -> None:
    """Refuse what has no device model of its own to confine, or one that cannot be confined.

    Raises:
        ConfigError: which, why, and what to do instead.
    """
    place = config.place("dm_restrict")
    if not config.dm_restrict:
        raise ConfigError(
            "dm_restrict = 0: there is nothing for depriv to do",
            cause="on Xen a device model is confined as a whole or not at all",
            fix="set dm_restrict = 1; or start it unconfined: xl create",
            **place,
        )
    served = [disk.vdev for disk in config.disks if disk.format != "raw" and disk.vdev.startswith("xvd")]
    if served:
        raise ConfigError(
            f"disk {served[0]} would be served by a QEMU that cannot be confined",
            cause="a PV disk that is not raw has a QEMU as its back end (qdisk), which needs xenstore and the guest's "
            "grants for as long as the guest runs",
            fix="convert it: qemu-img convert -O raw, which blkback in domain 0's kernel serves; or, for an HVM guest, "
            "give it an hd vdev",
            **config.place(served[0]),
        )
    if config.type != "hvm":
        raise ConfigError(
            f"dm_restrict: a {config.type.upper()} guest has no device model that could be restricted",
            cause="it talks to Xen and to drivers in domain 0's kernel; no QEMU stands between it and the host",
            fix='start it with xl create, without dm_restrict; type="hvm" is what depriv confines',
            **place,
        )


def create(config: Domain, words: tuple[str, ...], registry: Registry, *, paused: bool) -> tuple[Entry, AuditReport]:
    """Start a Xen domain through ``xl create``, our device model in the place of Xen's.

    Args:
        config: What the file and the settings come to: looked at here, read by xl itself.
        words: The file and the settings, for xl.
        registry: Where the domain is found once its device model runs.
        paused: Leave it paused.

    Raises:
        DeprivError: it did not start, or not confined. It is destroyed.
    """
    refuse_type(config)
    ours = ["dm_restrict=1", 'device_model_version="qemu-xen"', f'device_model_override="{_override()}"']
    said = run("create", *(["-p"] if paused else []), *words, *ours)
    return _see(config.name, registry, said)


def restore(path: str, registry: Registry, *, paused: bool) -> tuple[Entry, AuditReport]:
    """Go on with a domain that was saved; its file names our device model.

    Raises:
        DeprivError: it does not go on, or not confined. It is destroyed.
    """
    before = _names()
    said = run("restore", *(["-p"] if paused else []), path)
    new = sorted(_names() - before)
    if len(new) != 1:
        raise HostError(f"xl restore has made {len(new)} domains of {path}", cause=said, fix="see xl list")
    return _see(new[0], registry, said)


def save(entry: Entry, path: str) -> None:
    """Save a domain to a file that is not there yet, and end it.

    Raises:
        DeprivError: the file would be overwritten, or xl failed; then the domain goes on, if xl says so.
    """
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists", fix="name a file that does not")
    said = run("save", str(entry.domid), path)
    if not os.path.exists(path) or _name(entry.domid) == entry.name:
        raise HostError(f"domain {entry.name} was not saved", cause=said, fix="see whether it runs: xl list")


def destroy(entry: Entry) -> None:
    """End a Xen domain; what depriv knows of it is ended by whoever calls this."""
    if _name(entry.domid) is not None:
        run("destroy", str(entry.domid))


def change_cd(entry: Entry, registry: Registry, vdev: str, path: str) -> None:
    """Put an image into a CD-ROM drive, or with "" take out what is in it.

    Raises:
        DeprivError: there is no such drive, the image is not fit, or xl failed.
    """
    if path:
        path = os.path.abspath(path)
        if not os.path.isfile(path) or os.path.islink(path):
            raise ConfigError(f"cannot insert {path}", cause="it is no regular file", fix="name the image itself")
        said = run("cd-insert", str(entry.domid), vdev, path)
    else:
        said = run("cd-eject", str(entry.domid), vdev)
    _close_sets(entry, registry)
    have = dict(xenstore.media(entry.domid)).get(vdev, "")
    if have != path:
        raise HostError(f"drive {vdev} of {entry.name} has {have or 'no CD'} in it", cause=said, fix="see: xl list -l")


def _close_sets(entry: Entry, registry: Registry) -> None:
    """Have QEMU close the descriptors that libxl has handed to it: libxl never does, and QEMU 10 keeps them for good.

    What a drive uses stays open for it (monitor/fds.c, QEMU 10). Our own sets are those from SET_BASE on.
    """
    with status.connect(entry, registry, timeout_s=_QMP_TIMEOUT_S) as monitor:
        for item in as_list(monitor.execute("query-fdsets", timeout_s=_QMP_TIMEOUT_S), "query-fdsets"):
            number = field(item, "fdset-id", as_int, "query-fdsets")
            if 0 <= number < SET_BASE:
                monitor.execute("remove-fd", {"fdset-id": number}, timeout_s=_QMP_TIMEOUT_S)


def console(entry: Entry) -> None:
    """Become ``xl console`` of the domain's serial port; returns only if that fails."""
    os.execvp("xl", ["xl", "console", "-t", "serial", str(entry.domid)])  # noqa: S606 (no shell is the point)


def run(*words: str) -> str:
    """Run xl and return what it says.

    Raises:
        HostError: it is not there, hangs, or says that it failed.
    """
    try:
        done = subprocess.run(
            ["xl", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise PlanError("there is no xl on this host", fix="apt-get install xen-utils") from error
    except subprocess.TimeoutExpired as error:
        raise HostError(f"xl {words[0]} does not end", fix="see what it waits for: xl list; xl dmesg") from error
    said = console_safe(done.stdout)[-_SAID_MAX:].strip()
    if done.returncode != 0:
        raise HostError(f"xl {words[0]} failed", cause=said, fix="see also the newest /var/log/xen/qemu-dm-*.log")
    return said


def _override() -> str:
    """Return the path of our device model: beside this command, or in PATH."""
    found = shutil.which(OVERRIDE) or shutil.which(OVERRIDE, path="/usr/local/bin:/usr/bin:/usr/local/sbin:/usr/sbin")
    if not found:
        raise PlanError(f"{OVERRIDE} is not in PATH", fix="install depriv so that xl, too, finds it: pip install")
    return os.path.realpath(found)


def _see(name: str, registry: Registry, said: str) -> tuple[Entry, AuditReport]:
    """Return a domain that xl says it has started, confined; one that is not is destroyed."""
    found = next((entry for entry in registry.entries() if entry.name == name and entry.expected is not None), None)
    try:
        if found is None or _name(found.domid) != name:
            raise HostError(
                f"xl has started {name}, and its device model is not confined",
                cause=said,
                fix=f"see /var/log/xen/qemu-dm-{name}.log",
            )
        report = launching.audit_domain(found, registry)
        if not report.holds:
            wrong = "; ".join(f"{check.id} is {check.have}" for check in report.checks if not check.holds)
            raise HostError(f"not every restriction of {name} holds", cause=wrong)
    except DeprivError:
        if name in _names():
            run("destroy", name)
        raise
    return found, report


def _names() -> set[str]:
    with xenstore.Xenstore() as store:
        return {store.read(f"/local/domain/{domid}/name") or "" for domid in store.list("/local/domain")}


def _name(domid: int) -> str | None:
    """Return the name of a Xen domain, or None if there is none of that number."""
    with xenstore.Xenstore() as store:
        return store.read(f"/local/domain/{domid}/name")
