# SPDX-License-Identifier: Apache-2.0
"""What other programs call, and the command line, too: a ``Toolstack`` of one host, and its ``Guest``s."""

from __future__ import annotations

import os
import stat

from depriv import launching, lifecycle, proc, status
from depriv.durable import BusyError
from depriv.errors import ConfigError, DeprivError, HostError, NotFoundError
from depriv.host import CACHE_DIR, STATE_DIR
from depriv.planner import plan
from depriv.records import Record
from depriv.registry import Registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from depriv.assembly import Launch
    from depriv.collect import Done, Due
    from depriv.config import Domain
    from depriv.entry import Entry
    from depriv.lifecycle import Started
    from depriv.report import AuditReport
    from depriv.spawn import Jail

_CONFIG_BYTES_MAX = 1 << 20


class Row(Record):
    """One line of ``list``: what is known of a domain without trusting it."""

    name: str
    domid: int
    # "starting", "running", "paused", "shutdown", "crashed", "hung", "dead", "ending", "waiting" (to be started again),
    # "quarantined" (something of it does not die) or "damaged" (its entry cannot be read)
    state: str
    pid: int  # QEMU's, on the host; 0: not started
    uid: int
    gid: int
    memory_mib: int
    vcpus: int
    accel: str
    dm_restrict: bool
    created_at_s: int
    trouble: str  # why it is quarantined, waiting or damaged; ""


class Guest:
    """One domain that exists. Holds no resource: a program that ends leaves its guests running."""

    def __init__(self, entry: Entry, registry: Registry) -> None:
        """Take the entry; made by :class:`Toolstack`."""
        self._entry = entry
        self._registry = registry

    @property
    def name(self) -> str:
        """The domain's name."""
        return self._entry.name

    @property
    def domid(self) -> int:
        """The domain's number on this host."""
        return self._entry.domid

    @property
    def is_xen(self) -> bool:
        """Whether it is the device model of a Xen domain."""
        return self._entry.accel == "xen"

    @property
    def entry(self) -> Entry:
        """What the registry keeps of it."""
        return self._entry

    def row(self) -> Row:
        """Return how it is now. Takes at most two seconds, however QEMU behaves."""
        return _row(self._entry, self._registry, status.ask((self._entry,), self._registry))

    def audit(self) -> AuditReport:
        """Return whether its restrictions hold now, as the kernel sees it.

        Raises:
            HostError: it has not started, or this is not root.
        """
        return launching.audit_domain(self._entry, self._registry)

    def console(self) -> bytes:
        """Return what the guest has written to its serial port: the last MiB of it, as it came.

        Raises:
            NotFoundError: another command has ended it.
            MonitorError: QEMU does not answer, and nothing had been read from it before.
        """
        from depriv.console import Console  # noqa: PLC0415 (not on the path of create)

        with self._registry.locked_domain(self._entry.domid):
            entry = self._registry.current(self._entry)
            return Console(
                self._registry.directory(entry.domid),
                lambda timeout_s: status.connect(entry, self._registry, timeout_s=timeout_s),
            ).read()

    def destroy(self, jail: Jail | None = None) -> None:
        """End it and everything of it, verified. ``jail`` is one that was started ahead, to save its start-up time.

        Raises:
            NotFoundError: another command was faster.
            DeprivError: something of it does not die; the domain stays listed.
        """
        from depriv.ending import destroy  # noqa: PLC0415 (not on the path of create)

        destroy(self._entry, self._registry, jail)


class Toolstack:
    """The domains of this host. Several programs may have one at the same time."""

    def __init__(self, *, state_dir: str = STATE_DIR, cache_dir: str = CACHE_DIR) -> None:
        """Take the folders; nothing is touched yet."""
        self.registry = Registry(state_dir)
        self.cache_dir = cache_dir

    def plan(self, config: Domain) -> Launch:
        """Return how ``config`` would be started. Touches nothing, needs no root.

        Raises:
            ConfigError, PlanError: it would not start, and why.
        """
        _check_config(config)
        from depriv.detect import look  # noqa: PLC0415 (not on the path of list, console, audit)

        try:
            holdings = tuple(entry.holding for entry in self.registry.entries())
            domid = self.registry.next_domid()
        except HostError:
            if os.geteuid() == 0:
                raise
            holdings, domid = (), 1  # only root sees who else there is
        host = look(config, domid=domid, holdings=holdings, state_dir=self.registry.folder, cache_dir=self.cache_dir)
        return plan(config, host)

    def create(
        self,
        config: Domain,
        *,
        paused: bool = False,
        warn: Callable[[str], None] = lambda _text: None,
        jail: Jail | None = None,
    ) -> Guest:
        """Start a domain and return it, confined and audited; its guest runs unless ``paused``.

        Raises:
            DeprivError: it did not start, why, and what to do. Nothing is left of it.
        """
        started = self.start(config, paused=paused, warn=warn, jail=jail)
        return Guest(started.entry, self.registry)

    def start(
        self,
        config: Domain,
        *,
        paused: bool = False,
        warn: Callable[[str], None] = lambda _text: None,
        jail: Jail | None = None,
    ) -> Started:
        """Do what ``create`` does and return all there is to know of the start: audit and times."""
        _check_config(config)
        return lifecycle.create(config, self.registry, cache_dir=self.cache_dir, paused=paused, warn=warn, jail=jail)

    def guests(self) -> tuple[Guest, ...]:
        """Return every domain, in order of domid."""
        return tuple(Guest(entry, self.registry) for entry in self.registry.entries())

    def rows(self, names: tuple[str, ...] = ()) -> tuple[Row, ...]:
        """Return how domains are now, all or those named. However many hang, it takes about a second.

        Raises:
            NotFoundError: one that was named does not exist.
        """
        entries = tuple(map(self.registry.find, names)) or self.registry.entries()
        said = status.ask(entries, self.registry)
        return tuple(_row(entry, self.registry, said) for entry in entries)

    def gc(self, *, dry_run: bool = False, restart: bool = False, domids: tuple[int, ...] = ()) -> tuple[Done, ...]:
        """Clear away what starts and ends that were cut short, ended domains and lost state folders have left.

        A running guest is never touched. Domains that their configuration wants restarted are left as they are,
        unless ``restart``.

        Args:
            dry_run: Change nothing; say what would be done.
            restart: Start those again.
            domids: Look at these alone; () is all, and what is left of none.
        """
        from depriv import collect  # noqa: PLC0415 (a program may never need it)

        if os.geteuid() != 0:
            raise HostError("only root can clear away what is left of domains", fix="run it with sudo")
        if not dry_run:
            self.registry.prepare()
        asked = map(self.registry.read, domids) if domids else self.registry.entries()
        said = status.ask(tuple(entry for entry in asked if entry is not None), self.registry)
        due = collect.survey(self.registry, cache_dir=self.cache_dir, said=said, restart=restart, only=domids)
        if not domids:
            due += collect.strays(self.registry)
        if dry_run:
            return tuple(collect.outcome(each, "would") for each in due)
        done = tuple(self._do(each, said.get(each.domid, "")) for each in due)
        if not domids:
            collect.remove_empty_folders(self.registry)
            if collect.is_swept(self.registry, done):
                self.registry.mark_seen()
        return done

    def _do(self, due: Due, said: str) -> Done:
        from depriv import collect  # noqa: PLC0415 (as above)

        if due.entry is None or due.action == "clear":
            return collect.clear(due, self.registry, said)
        warnings: list[str] = []
        try:
            new = lifecycle.restart(due.entry, self.registry, said, cache_dir=self.cache_dir, warn=warnings.append)
        except NotFoundError as error:
            return collect.outcome(due, "gone", cause=str(error))
        except BusyError as error:
            return collect.outcome(due, "busy", cause=error.cause)
        except DeprivError as error:
            return collect.outcome(due, "failed", cause=collect.cause_of(error))
        return collect.outcome(due, "done", cause="; ".join(warnings), new_domid=new.domid)

    def guest(self, name: str) -> Guest:
        """Return a domain by name or domid.

        Raises:
            NotFoundError: there is none.
        """
        return Guest(self.registry.find(name), self.registry)


def _row(entry: Entry, registry: Registry, said: dict[int, str]) -> Row:
    pid = entry.expected.pid if entry.expected else 0
    if entry.state == "damaged":
        from depriv.recover import main_pid  # noqa: PLC0415 (never needed, but for this)

        pid = main_pid(entry)
    return Row(
        name=entry.name,
        domid=entry.domid,
        state=status.state_of(entry, registry, said.get(entry.domid, "")),
        pid=pid,
        uid=entry.uid,
        gid=entry.gid,
        memory_mib=entry.memory_mib,
        vcpus=entry.vcpus,
        accel=entry.accel,
        dm_restrict=entry.restricted,
        created_at_s=entry.created_at_s,
        trouble=entry.trouble,
    )


def _check_config(config: object) -> None:
    """Hold a program to what a file is held to: the options of QEMU that are harmless.

    Raises:
        ConfigError: an option is not one of them, or this is no ``Domain``.
    """
    from depriv.config import Domain  # noqa: PLC0415 (not on the path of list, console, audit)

    if not isinstance(config, Domain):
        raise ConfigError(f"{config!r} is no depriv.Domain", fix="give depriv.Domain(name=..., ...)")
    if config.device_model_args and not config.source:
        from depriv.xlargs import check_arguments  # noqa: PLC0415 (a file's have been checked)
        from depriv.xlcfg import Value  # noqa: PLC0415 (as above)

        items = tuple(Value(kind="string", text=word) for word in config.device_model_args)
        check_arguments(items, "device_model_args")


def audit_process(pid: int, host: Toolstack) -> AuditReport:
    """Audit any process of this host: against what was written down if it is a domain's QEMU, else as any QEMU.

    Raises:
        HostError: this is not root, or the process is a thread of the kernel.
    """
    from depriv.audit import audit  # noqa: PLC0415 (not on the path of create)

    for entry in host.registry.entries():
        if entry.expected is not None and entry.expected.pid == pid and host.registry.life(entry) != "dead":
            return launching.audit_domain(entry, host.registry)
    if proc.is_kernel_thread(pid):
        raise HostError(f"process {pid} is a thread of the kernel, not a QEMU", fix="find those with: pgrep -a qemu")
    return audit(pid, expected=None)


def load(path: str, arguments: tuple[str, ...] = ()) -> Domain:
    """Return the configuration in a file, with ``key=value`` arguments after it.

    Raises:
        ConfigError: the file cannot be read or is wrong: where, and what to do.
    """
    from depriv.xlconfig import load_domain  # noqa: PLC0415 (a program may have no file)

    fix = "name the configuration's file"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            have = os.fstat(fd)
            text = os.read(fd, _CONFIG_BYTES_MAX + 1) if stat.S_ISREG(have.st_mode) else b""
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        cause = error.strerror or "" if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read {path or repr(path)}", cause=cause, fix=fix) from error
    if not stat.S_ISREG(have.st_mode):
        kind = "a directory" if stat.S_ISDIR(have.st_mode) else "a device, pipe or socket"
        raise ConfigError(f"cannot read {path}", cause=f"it is {kind}, not a regular file", fix=fix)
    if len(text) > _CONFIG_BYTES_MAX:
        cause = f"it has {have.st_size} bytes, and a configuration at most {_CONFIG_BYTES_MAX}"
        raise ConfigError(f"cannot use {path}", cause=cause, fix=fix)
    return load_domain(text, source=str(path), arguments=arguments)


__all__ = ["DeprivError", "Guest", "Row", "Toolstack", "audit_process", "load"]
