# SPDX-License-Identifier: Apache-2.0
"""Run a QEMU command line confined, in the foreground: its terminal, its signals, its exit status.

The domain is in the registry like any other while it runs. If this process dies, QEMU dies with it: the jail stays its
parent and kills it when its control socket closes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import stat
import time
from select import POLLIN, poll

from depriv import collect, detect, launching, lifecycle
from depriv.audit import KIND_OF_MODE
from depriv.cgroup import folder_name
from depriv.config import Note, fit_name
from depriv.durable import remove_left
from depriv.ending import finish
from depriv.errors import ConfigError, HostError, MonitorError, NotFoundError, PlanError
from depriv.guestlog import Copy
from depriv.opener import Opened
from depriv.openings import Inherited
from depriv.planner import refuse_name
from depriv.qemu.capabilities import asks_what_it_can_do
from depriv.qemu.draft import LAST_FD, Allowed, Request
from depriv.qemu.translate import translate
from depriv.questions import ask, become
from depriv.report import Grant, times_text
from depriv.requests import HELD, SOURCE_BASE, Run, passts, plan_run, plan_run_discovery
from depriv.spawn import Jail
from depriv.streams import Input, Terminal
from depriv.tools import Tools

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from depriv.assembly import Launch
    from depriv.entry import Entry
    from depriv.host import FileFacts, Holding, Host
    from depriv.launching import Running
    from depriv.registry import Registry

_INCOMING_TIMEOUT_S = 600.0
_STDERR = 2
_OWN_FDS = 50  # more than we ever have open ourselves
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)


class Options:
    """What the caller wants of depriv beside the command line."""

    def __init__(self, *, name: str = "", user: str = "", keep_net: bool = False, probe_format: bool = False) -> None:
        """Take a name for the domain ("": that of -name, or one of its own) and what is asked for."""
        self.name = name
        self.user = user
        self.keep_net = keep_net
        self.probe_format = probe_format


def understand(words: tuple[str, ...], options: Options) -> Request:
    """Return what QEMU's words after the program come to, for a caller in the current folder.

    Raises:
        ConfigError: a word is wrong or asks for what cannot be had confined.
    """
    passt = detect.find_tool("passt")
    allowed = Allowed(probe_format=options.probe_format, keep_net=options.keep_net, passt=passt)
    try:
        cwd = os.getcwd()
    except FileNotFoundError:  # it has been removed; only a relative path needs it
        cwd = ""
    return understand_with(words, allowed, cwd=cwd)


def understand_with(words: tuple[str, ...], allowed: Allowed, *, cwd: str) -> Request:
    """Do what ``understand`` does, with all that may be allowed."""
    seen: dict[str, FileFacts] = {}

    def look(path: str) -> FileFacts:
        if path not in seen:
            seen[path] = detect.look_at(path)
        return seen[path]

    request = translate(words, look=look, allowed=allowed, cwd=cwd, read=detect.read_text)
    if not request.unknown_formats:
        return request
    probed = {disk.path: disk.facts for disk in request.unknown_formats}
    formats = {path: _format(facts) for path, facts in probed.items()}
    request = translate(words, look=look, allowed=allowed, cwd=cwd, read=detect.read_text, formats=formats)
    found = [
        Note(key="probe-format", text=f"{path} looks like {kind}: used as that, if qemu-img says so, too")
        for path, kind in formats.items()
    ]
    return request.replace(notes=(*request.notes, *found), probed=tuple(probed.values()))


def _format(facts: FileFacts) -> str:
    """Return the format that QEMU itself would take an image for."""
    if facts.unread:
        raise ConfigError(f"cannot read {facts.path} to see its format", fix="run this as root, or give the format")
    return facts.format


class Wish(lifecycle.Wish):
    """A command line as something to start."""

    def __init__(self, program: str, request: Request, options: Options, registry: Registry, cache_dir: str) -> None:
        """Take what is asked for."""
        self.program = program
        self.request = request
        self._options = options
        self._registry = registry
        self._cache_dir = cache_dir
        if options.name and fit_name(options.name) != options.name:
            raise ConfigError(
                f"--name {options.name!r} is no name for a domain", fix=f"take {fit_name(options.name) or 'another'}"
            )
        self.name = options.name or fit_name(request.name)
        base = _unused_numbers()
        self.opened = Opened(base)
        self._prepared = False
        self.restricted = True
        self.loads = bool(request.incoming_role) or request.waits
        self.keeps_jail = not request.daemonize
        self.jail: Jail | None = None
        self.entry: Entry | None = None
        self.run = Run(name=self.name, request=request, device_model_user=options.user, keep_net=options.keep_net)
        self.run = self.run.replace(source_base=base)
        self.facts = {
            "restricted": True,
            "memory_mib": request.memory_mib,
            "vcpus": request.vcpus,
            "accel": request.accel,
            "config": None,
        }

    def domid(self) -> int:
        """Return the next free one; the name is chosen with it."""
        domid = self._registry.next_domid()
        self.choose_name(domid, {entry.name for entry in self._registry.entries()})
        return domid

    def choose_name(self, domid: int, taken: set[str]) -> None:
        """Find a name: the one that was asked for, or that of -name, made one of a kind if another has it."""
        if not self._options.name and (not self.name or self.name in taken):
            self.name = f"{self.name or 'qemu'}-{domid}"
        self.run = self.run.replace(name=self.name)

    def refuse_name(self, others: tuple[Holding, ...]) -> None:
        """Refuse a name that another domain has."""
        refuse_name(self.name, others, {})

    def look(self, domid: int, others: tuple[Holding, ...]) -> Host:
        """Return the host's facts."""
        host = detect.look_host(
            program=self.program, device_model_user=self._options.user, domid=domid, holdings=others
        )
        folder = self._registry.folder
        return host.replace(state_dir=folder, cgroup_folder=folder_name(folder), cache_dir=self._cache_dir)

    def plan(self, host: Host) -> Launch:
        """Return how it is started."""
        return plan_run(self.run, host)

    def plan_discovery(self, host: Host) -> Launch:
        """Return its dry run."""
        return plan_run_discovery(self.run, host)

    def prepare(self, entry: Entry) -> None:
        """Open what the toolstack opens, once it is known what the images are."""
        if not self._prepared:  # a second attempt, with another uid, finds all open
            if self.request.probed:
                from depriv.imageprobe import confirm  # noqa: PLC0415 (only if it was asked for)

                confirm(self.request.probed, entry, self._registry, self._cache_dir)
            for opening in self.request.openings:
                self.opened.open(opening)
        self._prepared = True

    def late(self) -> tuple[Grant, ...]:
        """Return what is handed over by QMP: listening sockets, and a saved state."""
        found: list[Grant] = []
        for role, fd in self.opened.kept.items():
            have = os.fstat(fd)
            kind = KIND_OF_MODE.get(stat.S_IFMT(have.st_mode), "socket")
            access = ("ro", "wo", "rw")[fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE]
            grant = Grant(role=role, kind=kind, dev=have.st_dev, ino=have.st_ino, rdev=have.st_rdev, access=access)
            found.append(grant)
        return tuple(found)

    def see_through(self, running: Running, *, paused: bool) -> None:
        """Hand over what is handed over late, and let the guest run."""
        monitor = running.monitor
        for vnc in self.request.vncs:
            monitor.execute("getfd", {"fdname": vnc.role}, fds=(self.opened.kept[vnc.role],), timeout_s=10)
            address = {"type": "fd", "str": vnc.role}
            monitor.execute("display-update", {"type": "vnc", "addresses": [address]}, timeout_s=10)
        if self.request.incoming_role:
            self._load(running)
        if self.request.waits:
            running.entry = _without_locks(running.entry, self._registry)
        with Tools(self._registry, self._cache_dir) as tools:
            for opening in passts(self.request):
                running.entry = tools.start_passt(opening, self.opened.tools[opening.role], running.entry)
            self.opened.close()
            self._keep_left(running)
            tools.release()
        self.entry = running.entry
        if self.request.daemonize:
            running.jail.release()
        else:
            running.jail.watch()
            self.jail = running.jail
        try:
            for step in self.request.listens:
                os.rename(step.path + HELD, step.path)
            self.let_run(running, paused=paused)
        except BaseException:
            remove_left(running.entry.left)
            raise

    def _keep_left(self, running: Running) -> None:
        """Write down what ends with the domain: tools, and files outside of its folder."""
        left = running.entry.left
        shown = tuple((path.removesuffix(HELD), dev, ino) for path, dev, ino in left if path.endswith(HELD))
        running.entry = running.entry.replace(left=(*left, *shown, *self.opened.left))
        if self.request.pidfile:
            running.entry = _write_pidfile(self.request.pidfile, running)
        if running.entry.left or running.entry.tools:
            self._registry.save(running.entry)

    def let_run(self, running: Running, *, paused: bool) -> None:
        """Do the last thing of a start."""
        if not paused:
            running.cont()

    def _load(self, running: Running) -> None:
        """Let QEMU read a saved state: only now, for whoever wrote it may take over what reads it."""
        fd = self.opened.kept[self.request.incoming_role]
        running.monitor.execute("getfd", {"fdname": "incoming"}, fds=(fd,), timeout_s=10)
        running.monitor.execute("migrate-incoming", {"uri": "fd:incoming"}, timeout_s=10)
        deadline = time.monotonic() + _INCOMING_TIMEOUT_S
        while launching.said(running.monitor) == "inmigrate":
            if time.monotonic() > deadline:
                raise MonitorError(f"the saved state was not read within {_INCOMING_TIMEOUT_S:.0f} seconds")
            time.sleep(0.02)
        self.loaded(running)
        running.audit_again()

    def loaded(self, running: Running) -> None:
        """Do what is needed for QEMU to open its images for writing: nothing, it has."""


def _unused_numbers() -> int:
    """Return a number from which on the caller has nothing open, and we may open what is handed to QEMU."""
    base = max(SOURCE_BASE, max(map(int, os.listdir("/proc/self/fd"))) + _OWN_FDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = base + LAST_FD + _OWN_FDS
    if soft < needed <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return base


def _without_locks(entry: Entry, registry: Registry) -> Entry:
    """Expect no locks of a QEMU that waits for its state: it takes them when it has that, which we do not see."""
    if entry.expected is None:
        raise AssertionError("a domain that has started has a process")
    grants = tuple(grant.replace(locked=False) for grant in entry.expected.grants)
    entry = entry.replace(expected=entry.expected.replace(grants=grants))
    registry.save(entry)
    return entry


def _write_pidfile(path: str, running: Running) -> Entry:
    """Write what QEMU's -pidfile would hold; return the entry that knows to remove it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError(f"-pidfile {path} is no regular file")
        os.ftruncate(fd, 0)
        os.write(fd, b"%d\n" % running.launched.pid)
    finally:
        os.close(fd)
    return running.entry.replace(left=(*running.entry.left, launching.file_left(path)))


def plan_words(
    words: tuple[str, ...], options: Options, registry: Registry, *, cache_dir: str
) -> tuple[Request, Launch]:
    """Return what a command line comes to and how it would be started. Touches nothing, needs no root.

    Raises:
        DeprivError: it would not start, and why.
    """
    request = understand(words[1:], options)
    wish = Wish(detect.find_in_path(words[0]), request, options, registry, cache_dir)
    try:
        holdings = tuple(entry.holding for entry in registry.entries())
        domid = wish.domid()
    except HostError:
        if os.geteuid() == 0:
            raise
        holdings, domid = (), 1  # only root sees who else there is
        wish.choose_name(domid, set())
    return request, wish.plan(wish.look(domid, holdings))


def run_words(
    words: tuple[str, ...],
    options: Options,
    registry: Registry,
    *,
    cache_dir: str,
    say: Callable[[str], None],
) -> int:
    """Run QEMU's words, the program first, and return its exit status (128 and the signal's number if one killed it).

    With -daemonize it returns 0 once the guest runs, which goes on as a domain like any other.

    Raises:
        DeprivError: it did not start, why, and what to do. Nothing is left of it.
    """
    program = detect.find_in_path(words[0])
    request = understand(words[1:], options)
    if request.no_guest:
        ask(program, request)
    if asks_what_it_can_do(words[1:]):
        say("note: this QEMU runs as it is: without a guest it only tells what it can do")
        become(program, words[1:])
    if request.waits:
        _refuse_unnamed(request)
    for note in request.notes:
        say(f"{'warning' if note.warning else 'note'}: {note.text}")
    if os.geteuid() != 0:
        raise PlanError("only root can run a confined QEMU", fix="run it with sudo; `depriv plan --` needs no root")
    wish = Wish(program, request, options, registry, cache_dir)
    return supervise(wish, registry, cache_dir=cache_dir, paused=request.paused, say=say)


def _refuse_unnamed(request: Request) -> None:
    """Refuse to wait for a state that QEMU is to read from a descriptor which no word names: it would not get it.

    So libvirt's `virsh restore` does it. QEMU would be told a number, find nothing there, and wait for ever.
    """
    named = [opening.source for opening in request.openings if isinstance(opening, Inherited)]
    for fd in (int(name) for name in os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the listing itself
            mode = os.fstat(fd).st_mode
            read_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            meant = os.get_inheritable(fd) and read_only and (stat.S_ISREG(mode) or stat.S_ISFIFO(mode))
            if meant and fd > _STDERR and fd not in named:
                raise ConfigError(
                    f"-incoming defer: descriptor {fd} is open to be read, but no word names it",
                    cause="QEMU gets no descriptor but those that are named",
                    fix=f"write -incoming fd:{fd}, or close it ({fd}<&-); a domain of libvirt's cannot be restored:"
                    " virsh start --force-boot",
                )


def supervise(wish: Wish, registry: Registry, *, cache_dir: str, paused: bool, say: Callable[[str], None]) -> int:
    """Start a wish and see it to its end; return QEMU's exit status, as ``run_words`` does."""
    with collect.tidy_when_cut_short(registry, cache_dir):
        return _supervised(wish, registry, cache_dir=cache_dir, paused=paused, say=say)


def _supervised(wish: Wish, registry: Registry, *, cache_dir: str, paused: bool, say: Callable[[str], None]) -> int:
    stdio = wish.request.stdio and not wish.request.daemonize
    with _leaving_on_signals(), Terminal(used=stdio), Input(used=stdio) as given, wish.opened, Jail() as jail:
        started = lifecycle.start(
            wish,
            registry,
            cache_dir=cache_dir,
            paused=paused,
            warn=lambda text: say(f"warning: {text}"),
            jail=jail,
        )
        if os.environ.get("DEPRIV_TIMES"):
            say(times_text(started.times))
        entry = wish.entry or started.entry
        if wish.request.name not in ("", entry.name) and not wish.request.domid:
            say(f"note: the domain is called {entry.name}")
        if wish.jail is None:
            return 0
        with wish.jail, _log(started.launch) as log:
            status = _until_its_end(wish.jail, started.entry, log, given)
    _forget(entry, registry)
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _leaving_on_signals() -> Generator[None]:
    """Undo a start that a signal cuts short; without a handler Python would end at once, and leave it to `gc`."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _until_its_end(jail: Jail, entry: Entry, log: Copy | None, given: Input) -> int:
    """Wait for QEMU's end, handing on to it every signal, and what there is to read."""
    expected = entry.expected
    if expected is None:
        raise AssertionError("a domain that has started has a process")
    try:
        pidfd = os.pidfd_open(expected.pid)
    except ProcessLookupError:
        return jail.end()
    wake, tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    old = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)  # before the handlers: a signal in between were lost
    before = {number: signal.signal(number, lambda _number, _frame: None) for number in (*_FORWARDED, signal.SIGTSTP)}
    try:
        while True:
            waited, event = given.waits()
            logs = [log.fileno()] if log is not None and not log.is_full() else []
            ready = _await_any({**dict.fromkeys((jail.fileno(), wake, *logs), POLLIN), waited: event})
            if log is not None:
                log.copy()
            if waited in ready:
                given.move()
            if jail.fileno() in ready:
                return jail.end()
            for number in os.read(wake, 64) if wake in ready else b"":
                _hand_on(number, pidfd)
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        for fd in (pidfd, wake, tell):
            os.close(fd)


def _await_any(events: dict[int, int]) -> list[int]:
    """Return which descriptors have one of their events; not by select(2): the caller may have more than 1024 open."""
    heard = poll()
    for fd, event in events.items():
        if fd >= 0:
            heard.register(fd, event)
    return [fd for fd, _ in heard.poll()]


def _log(launch: Launch) -> contextlib.AbstractContextManager[Copy | None]:
    return Copy(f"{launch.directory}/log") if launching.has_own_log(launch) else contextlib.nullcontext()


def _hand_on(number: int, pidfd: int) -> None:
    """Hand one signal to QEMU. Ctrl-Z stops both: QEMU is of another session, where the terminal does not reach it."""
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGTSTP:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        else:
            signal.pidfd_send_signal(pidfd, number)


def _forget(entry: Entry, registry: Registry) -> None:
    """Clear away what is left of a domain that has ended; another command may have been faster."""
    with contextlib.suppress(NotFoundError), registry.locked_domain(entry.domid), Jail() as jail:
        finish(registry.current(entry), registry, jail)
