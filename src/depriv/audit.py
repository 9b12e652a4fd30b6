# SPDX-License-Identifier: Apache-2.0
"""Is a QEMU process confined, as the kernel sees it?

The process is not asked anything: all is read from /proc, of every thread, in ``_gather``; the checks below it are
plain functions of what was read. What is not to be seen there (a Landlock domain, the filter's content) is not claimed.
"""

from __future__ import annotations

import os
import stat

from depriv import proc
from depriv.errors import HostError
from depriv.records import Record
from depriv.report import AuditReport, Check, printable
from depriv.sockets import accepted_sockets, closed_meanwhile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from depriv.report import Expected

CAPS = (("inheritable", "Inh"), ("permitted", "Prm"), ("effective", "Eff"), ("bounding", "Bnd"), ("ambient", "Amb"))
# What QEMU makes for itself and nobody else can reach. Not: inotify, io_uring, userfaultfd, pidfd, bpf.
HARMLESS = frozenset(f"anon_inode:[{kind}]" for kind in ("eventfd", "eventpoll", "signalfd", "timerfd"))
DEV_NULL = os.makedev(1, 3)  # Source: Linux Documentation/admin-guide/devices.txt
DEV_KVM = os.makedev(10, 232)
KIND_OF_MODE = {
    stat.S_IFREG: "file",
    stat.S_IFBLK: "block",
    stat.S_IFCHR: "char",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFDIR: "directory",
}
HOST = "the host"
ENTRIES = 64  # of a root directory that are looked at: an empty one has five


class Survey(Record):
    """What one audit needs to know about the rest of the host. Take one for many audits."""

    processes: tuple[proc.Process, ...]
    namespaces: tuple[tuple[str, int, dict[str, int]], ...]  # whose ("the host", a guest's name), its pid, its inodes


class _Facts(Record):
    """All that was read about one process."""

    state: str
    threads: tuple[dict[str, str], ...]  # the status of each living thread
    owner: int
    namespaces: dict[str, frozenset[int]]  # of all threads
    mounts: tuple[proc.Mount, ...]
    content: tuple[str, ...]  # what is in the root directory beside dev/null and empty directories
    places: frozenset[tuple[tuple[int, int], ...]]  # root, working directory, above the root: of all threads
    limits: dict[str, tuple[int, int]]
    environ: tuple[str, ...]
    cgroups: tuple[dict[str, str], ...]  # of each thread
    fds: tuple[proc.OpenFd, ...]
    accepted: frozenset[int]  # inodes of connections that came in through a granted listening socket
    scheduling: frozenset[tuple[int, int]]  # policy and nice of each thread
    personality: int
    oom_score_adj: int
    held_elsewhere: frozenset[int]  # inodes of ungranted pipes that another process has open too


def survey(others: tuple[tuple[str, int], ...] = ()) -> Survey:
    """Look at the host: every process's ids, its own namespaces and those of ``others`` (name, pid of each guest)."""
    spaces: list[tuple[str, int, dict[str, int]]] = []
    for name, pid in ((HOST, os.getpid()), (HOST, 1), *others):
        try:
            spaces.append((name, pid, proc.namespaces(pid)))
        except ProcessLookupError:
            continue  # a guest that ended meanwhile shares nothing any more
        except PermissionError:
            if pid != 1:
                raise
            # Here root is confined itself, pid 1 is its keeper, and the host is what we see of it.
    return Survey(processes=proc.processes(), namespaces=tuple(spaces))


def audit(
    pid: int,
    *,
    expected: Expected | None,
    others: tuple[tuple[str, int], ...] = (),
    seen: Survey | None = None,
) -> AuditReport:
    """Return whether process ``pid`` is confined as ``expected``, or, for None, as any QEMU should be.

    With None, limits, environment, cgroup and descriptors cannot be compared with anything: of these only descriptors
    that no QEMU needs are reported (directories, O_PATH, /proc and /sys).
    A granted descriptor that is closed again is no finding (CD eject, unplug), unless it should hold an image lock.

    Args:
        pid: The process; its main thread may be dead.
        expected: What was written down when it was started, or None.
        others: Name and pid of every other guest: no namespace and no id may be shared with them.
        seen: What ``survey(others)`` returned shortly before, to audit many guests.

    Raises:
        HostError: this process may not look into that one.
    """
    try:
        found = _look(pid, expected, survey(others) if seen is None else seen)
    except PermissionError as error:
        fix = "" if os.geteuid() == 0 else "run this as root"
        raise HostError(f"cannot audit process {pid}: this process may not look into it", fix=fix) from error
    checks = (_check("alive", "running", "dead"),) if found is None else tuple(found)
    return AuditReport(domain="" if expected is None else expected.domain, pid=pid, checks=checks)


def _look(pid: int, expected: Expected | None, around: Survey) -> Iterable[Check] | None:
    """Return the checks, or None if there is no such process."""
    try:
        starttime = proc.start_time(pid) if expected is None else expected.starttime
        state = proc.alive(pid, starttime)
        if state == "dead" or (expected is not None and expected.pid != pid):
            return None
        facts = _gather(pid, state, expected)
        # Had it ended in between, some of this might have been read from a successor with its number.
        return None if proc.alive(pid, starttime) == "dead" else _judge(pid, facts, expected, around)
    except ProcessLookupError:
        return None


def _gather(pid: int, state: str, expected: Expected | None) -> _Facts:
    """Read everything about a process through its first living thread, and the rest of each thread."""
    living: list[tuple[int, dict[str, str]]] = []
    for tid in proc.threads(pid):
        try:
            status, ending = proc.read_status(pid, tid), proc.is_ending(pid, tid)
        except ProcessLookupError:
            continue
        if status["State"][0] not in proc.DEAD and not ending:
            living.append((tid, status))
    if not living:
        raise ProcessLookupError
    first, *rest = [tid for tid, _ in living]
    fds = proc.fds(pid, first)
    spaces = {name: {ino} for name, ino in proc.namespaces(pid, first).items()}
    groups = [_cgroups(pid, first)]
    places = {proc.places(pid, first)}
    scheduling = {proc.scheduling(pid, first)}
    drawn = proc.sketch(pid, first)
    for tid in rest:
        try:
            for name, ino in proc.namespaces(pid, tid).items():
                spaces.setdefault(name, set()).add(ino)
            groups.append(_cgroups(pid, tid))
            places.add(proc.places(pid, tid))
            scheduling.add(proc.scheduling(pid, tid))
            # clone(2) without CLONE_FILES makes a thread with a table of its own.
            if proc.sketch(pid, tid) != drawn:
                fds += tuple(fd for fd in proc.fds(pid, tid) if fd not in fds)
        except ProcessLookupError:
            continue  # this thread has ended
    mounts = proc.mounts(pid, first)
    grants = () if expected is None else expected.grants
    granted = {(grant.dev, grant.ino) for grant in grants}
    strange = tuple(fd for fd in fds if expected is not None and (fd.dev, fd.ino) not in granted)
    accepted = accepted_sockets(pid, strange, grants)
    gone = closed_meanwhile(pid, {fd.ino for fd in strange if stat.S_ISSOCK(fd.mode)} - accepted)
    return _Facts(
        state=state,
        threads=tuple(status for _, status in living),
        owner=proc.owner(pid, first),
        namespaces={name: frozenset(inodes) for name, inodes in spaces.items()},
        mounts=mounts,
        content=_content(pid, first) if _one_tmpfs(mounts) else (),
        places=frozenset(places),
        limits=proc.limits(pid),
        environ=proc.environ(pid, first),
        cgroups=tuple(groups),
        fds=tuple(fd for fd in fds if fd.ino not in gone or not stat.S_ISSOCK(fd.mode)),
        accepted=accepted,
        scheduling=frozenset(scheduling),
        personality=proc.personality(pid, first),
        oom_score_adj=proc.oom_score_adj(pid),
        held_elsewhere=_held_elsewhere(pid, strange),
    )


def _cgroups(pid: int, tid: int) -> dict[str, str]:
    """Return the cgroups of a thread, or raise ``ProcessLookupError`` if it is just ending.

    Then it is shown in the root of every hierarchy of version 1. Source: proc_cgroup_show in kernel/cgroup/cgroup.c.
    """
    found = proc.cgroups(pid, tid)
    if proc.is_ending(pid, tid):
        raise ProcessLookupError
    return found


def _held_elsewhere(pid: int, strange: tuple[proc.OpenFd, ...]) -> frozenset[int]:
    """Return the inodes of those pipes that some other process has open too."""
    pipes = {fd.target: fd.ino for fd in strange if stat.S_ISFIFO(fd.mode)}
    return frozenset(ino for target, ino in pipes.items() if any(holder != pid for holder in proc.holders(target)))


def _one_tmpfs(mounts: tuple[proc.Mount, ...]) -> bool:
    return len(mounts) == 1 and mounts[0].point == "/" and mounts[0].fstype == "tmpfs"


def _content(pid: int, tid: int) -> tuple[str, ...]:
    """Return what a tmpfs root holds beside /dev/null and empty directories, at most ENTRIES looked at.

    Only a tmpfs is walked: it answers from memory, where a file system of the process's choice may never answer.
    """
    found: list[str] = []
    looked = 0
    todo = [""]
    while todo:
        inside = todo.pop()
        try:
            with os.scandir(f"/proc/{pid}/task/{tid}/root/{inside}") as entries:
                for entry in entries:
                    looked += 1
                    if looked > ENTRIES:
                        return (*found, "more")
                    path = inside + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(path + "/")
                    elif path != "dev/null" or not _is_null(entry.stat(follow_symlinks=False)):
                        found.append("/" + path)
        except FileNotFoundError as error:
            raise ProcessLookupError(error.errno, "gone", inside) from error
        except NotADirectoryError:
            found.append("/" + inside)
    return tuple(found)


def _is_null(file: os.stat_result | proc.OpenFd) -> bool:
    mode, rdev = (file.mode, file.rdev) if isinstance(file, proc.OpenFd) else (file.st_mode, file.st_rdev)
    return stat.S_ISCHR(mode) and rdev == DEV_NULL


def _judge(pid: int, facts: _Facts, expected: Expected | None, around: Survey) -> Iterable[Check]:
    """Yield every check that applies. Without dm_restrict, the switched off restriction itself is one that fails."""
    yield _check("alive", "running", facts.state)
    restricted = expected is None or expected.restricted
    if not restricted:
        yield _check("dm_restrict", "on", "off")
    yield from _ids(facts, expected)
    yield from _privileges(facts)
    yield from _inherited(facts)
    if restricted:
        yield _seccomp(facts)
        yield _dumpable(facts)
        yield from _namespaces(pid, facts, around)
        yield from _root(facts)
    if expected is None:
        yield _needless(facts)
    else:
        if restricted:
            yield from _limits(facts, expected)
        yield from _fds(facts, expected)
        if restricted:
            yield from _locks(facts, expected)
        yield _environ(facts, expected)
        if restricted:
            yield _cgroup(facts, expected)
    if expected.xen_domid if expected is not None else os.path.isdir("/dev/xen"):
        from depriv import xenaudit  # noqa: PLC0415 (on Xen only: it needs ctypes)

        if expected is not None or xenaudit.has_any(facts.fds):
            yield from xenaudit.checks(pid, facts.fds)
    yield _alone(pid, facts, expected, around)


def _check(check: str, want: str, have: str, *, holds: bool | None = None) -> Check:
    """Return a check that holds if ``have`` is ``want``, unless told otherwise."""
    return Check(id=check, want=printable(want), have=printable(have), holds=have == want if holds is None else holds)


def _of_all(check: str, want: str, values: Iterable[str]) -> Check:
    """Return a check that holds if every thread has what is wanted."""
    return _check(check, want, " or ".join(sorted(set(values))))


def _ids(facts: _Facts, expected: Expected | None) -> Iterable[Check]:
    """Four times the same id on every thread, the expected one or at least not root's; and no other group."""
    for field, want in (("Uid", expected and expected.uid), ("Gid", expected and expected.gid)):
        have = {" ".join(sorted(set(status[field].split()))) for status in facts.threads}
        text = " or ".join(sorted(have))
        name = f"ids.{field.lower()}"
        if want is None:
            yield _check(name, "one, not 0", text, holds=len(have) == 1 and text.isdecimal() and text != "0")
        else:
            yield _check(name, str(want), text, holds=text == str(want) and want != 0)
    yield _of_all("ids.groups", "none", (status["Groups"] or "none" for status in facts.threads))


def _privileges(facts: _Facts) -> Iterable[Check]:
    """No capability in any of the five sets, and no way to a new one."""
    for name, field in CAPS:
        yield _of_all(f"caps.{name}", "0", (f"{int(status[f'Cap{field}'], 16):x}" for status in facts.threads))
    yield _of_all("no_new_privs", "1", (status["NoNewPrivs"] for status in facts.threads))


def _inherited(facts: _Facts) -> Iterable[Check]:
    """What whoever started it may have handed down: precedence over others, no address randomisation."""
    classes = " or ".join(f"policy {policy} nice {nice}" for policy, nice in sorted(facts.scheduling))
    yield _check("scheduling", "policy 0 nice 0", classes)
    yield _check("personality", "0", f"{facts.personality:x}")
    yield _check("oom_score_adj", "0 or more", str(facts.oom_score_adj), holds=facts.oom_score_adj >= 0)


def _seccomp(facts: _Facts) -> Check:
    """Filter mode everywhere; a thread with fewer filters than another escaped one of them."""
    have = {(status["Seccomp"], status.get("Seccomp_filters", "?")) for status in facts.threads}
    text = " or ".join(f"mode {mode} with {count} filters" for mode, count in sorted(have))
    return _check(
        "seccomp",
        "mode 2 with the same filters on every thread",
        text,
        holds=len(have) == 1 and all(mode == "2" for mode, _ in have),
    )


def _dumpable(facts: _Facts) -> Check:
    """Not dumpable: nobody of the same uid may trace it, and its files in /proc are root's.

    A process of root owns them anyway, so there it cannot be seen.
    """
    root = any("0" in status["Uid"].split() for status in facts.threads)
    return _check("dumpable", "files owned by 0", "not to be seen" if root else f"files owned by {facts.owner}")


def _namespaces(pid: int, facts: _Facts, around: Survey) -> Iterable[Check]:
    """Each namespace is one that neither the host nor another guest is in."""
    for name in proc.NAMESPACES:
        have = facts.namespaces.get(name, frozenset[int]())
        shared = sorted(
            {
                whose
                for whose, other, spaces in around.namespaces
                if (other != pid or whose == HOST) and spaces.get(name) in have
            }
        )
        text = f"shared with {', '.join(shared)}" if shared else "own" if len(have) == 1 else f"{len(have)} of them"
        yield _check(f"ns.{name}", "own", text)


def _root(facts: _Facts) -> Iterable[Check]:
    """An empty read-only root directory, and the working directory in it."""
    if not _one_tmpfs(facts.mounts):
        kinds = ", ".join(f"{mount.point} {mount.fstype}" for mount in facts.mounts[:3])
        text = f"{len(facts.mounts)} mounts: {kinds}"
    elif len({root for root, _, _ in facts.places}) > 1:
        text = "threads with different roots"
    elif any(root != above for root, _, above in facts.places):
        text = "a chroot: there is more above it"
    else:
        text = " ".join(facts.content) or "nothing but dev/null"
    yield _check("root.empty", "nothing but dev/null", text)
    writable = [m.point for m in facts.mounts if "ro" not in m.options and "ro" not in m.super_options]
    readonly = bool(facts.mounts) and not writable
    yield _check("root.readonly", "read-only", "read-only" if readonly else " ".join(["writable:", *writable[:3]]))
    inside = all(root == cwd for root, cwd, _ in facts.places)
    yield _check("cwd", "the root directory", "the root directory" if inside else "another directory")


def _limits(facts: _Facts, expected: Expected) -> Iterable[Check]:
    """Each limit, soft and hard, as it was set."""
    for limit in expected.limits:
        soft, hard = facts.limits.get(limit.name, ("unknown", "unknown"))
        yield _check(f"limits.{limit.name}", f"{limit.soft} {limit.hard}", f"{soft} {hard}")


def _shown(fds: Iterable[proc.OpenFd]) -> str:
    return ", ".join(f"{fd.number} {fd.access} {fd.target}" for fd in fds) or "none"


def _needless(facts: _Facts) -> Check:
    """Return the check of descriptors that no QEMU needs: ways into a file system."""
    found = [
        fd
        for fd in facts.fds
        if stat.S_ISDIR(fd.mode) or fd.access == "path" or fd.target.startswith(("/proc", "/sys"))
    ]
    return _check("fds.unknown", "none", _shown(found))


def _fds(facts: _Facts, expected: Expected) -> Iterable[Check]:
    """Every descriptor is a granted file, in a granted access, or a thing QEMU made that leads nowhere."""
    granted: dict[tuple[str, int, int, int], set[str]] = {}
    for grant in expected.grants:
        granted.setdefault((grant.kind, grant.dev, grant.ino, grant.rdev), set()).add(grant.access)
    kvm = any(grant.kind == "char" and grant.rdev == DEV_KVM for grant in expected.grants)
    unknown: list[proc.OpenFd] = []
    wrong: list[proc.OpenFd] = []
    for fd in facts.fds:
        kind = KIND_OF_MODE.get(stat.S_IFMT(fd.mode), "")
        accesses = granted.get((kind, fd.dev, fd.ino, fd.rdev))
        if accesses is None:
            if not _harmless(fd, facts, kvm=kvm):
                unknown.append(fd)
        elif fd.access not in accesses and not _is_null(fd):
            wrong.append(fd)
    yield _check("fds.unknown", "none", _shown(unknown))
    yield _check("fds.access", "none", _shown(wrong))


def _harmless(fd: proc.OpenFd, facts: _Facts, *, kvm: bool) -> bool:
    """Return whether this ungranted descriptor is of QEMU's own making and leads to nobody else."""
    if fd.target in HARMLESS or (kvm and fd.target.startswith("anon_inode:kvm-")):
        return True  # a file's name starts with a slash or "(": no file can be called so
    if _is_null(fd):
        return fd.access != "path"
    if stat.S_ISREG(fd.mode) and fd.dev == _memfd_device():
        return True  # memory with a descriptor (guest memory, a display's surface): nobody finds it by a name
    if stat.S_ISSOCK(fd.mode):
        return fd.ino in facts.accepted
    if stat.S_ISFIFO(fd.mode) and fd.target.startswith("pipe:"):
        ends = {other.access for other in facts.fds if other.target == fd.target}
        return fd.ino not in facts.held_elsewhere and ends in ({"ro", "wo"}, {"ro", "wo", "rw"}, {"rw"})
    return False


def _memfd_device() -> int:
    """Return the device number of the kernel's own tmpfs, in which every memfd is, and no file. See memfd_create(2)."""
    fd = os.memfd_create("depriv", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def _locks(facts: _Facts, expected: Expected) -> Iterable[Check]:
    """An open file description lock on each image: a POSIX lock is lost when any descriptor of the file is closed."""
    for grant in expected.grants:
        if not grant.locked:
            continue
        same = [fd for fd in facts.fds if (fd.dev, fd.ino) == (grant.dev, grant.ino)]
        kinds = sorted({lock.split()[0] for fd in same for lock in fd.locks})
        text = " and ".join(kinds) or ("no lock" if same else "not open")
        # A CD that was ejected is closed; nobody can come to write to what is not open. The set's own descriptor stays
        # for as long as a monitor is connected (monitor/fds.c, QEMU 7.2); a block device has a second one, its own.
        ejected = len(same) <= 1 and grant.access == "ro"
        yield _check(f"locks.{grant.role}", "OFDLCK", text, holds=text == "OFDLCK" or ejected)


def _environ(facts: _Facts, expected: Expected) -> Check:
    """Exactly the environment given. Values are not shown: one too many may be a secret."""
    names = " ".join(entry.partition("=")[0] for entry in facts.environ) or "nothing"
    want = " ".join(entry.partition("=")[0] for entry in expected.environ) or "nothing"
    same = facts.environ == expected.environ
    if not same and names == want:
        names += ", with another value"
    return _check("environ", want, names, holds=same)


def _cgroup(facts: _Facts, expected: Expected) -> Check:
    """Every thread is in the cgroup, in the unified hierarchy or in one of version 1 where that is what is used.

    In a container its path may begin with that of the container's. Its name is that of no other.
    """
    inside = all(any(path.endswith(expected.cgroup or "/") for path in groups.values()) for groups in facts.cgroups)
    have = sorted({path for groups in facts.cgroups for path in groups.values()})
    return _check("cgroup", expected.cgroup, expected.cgroup if inside else " ".join(have), holds=inside)


def _alone(pid: int, facts: _Facts, expected: Expected | None, around: Survey) -> Check:
    """No other process has this uid or gid as any of its ids."""
    uids = {int(word) for status in facts.threads for word in status["Uid"].split()}
    gids = {int(word) for status in facts.threads for word in status["Gid"].split()}
    if expected is not None:
        uids.add(expected.uid)
        gids.add(expected.gid)
    guests = {other: name for name, other, _ in around.namespaces if name != HOST}
    found = [
        f"{guests.get(process.pid, process.name)} ({process.pid})"
        for process in around.processes
        if process.pid != pid and not (uids.isdisjoint(process.uids) and gids.isdisjoint(process.gids))
    ]
    text = f"{len(found)} others: {', '.join(found[:5])}" if found else "alone"
    return _check("alone", "alone", text)
