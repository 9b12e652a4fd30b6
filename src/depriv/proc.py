# SPDX-License-Identifier: Apache-2.0
"""Reads /proc: one small function per file, returning values or records; nothing is judged here.

A function about one process raises ``ProcessLookupError`` once that is gone; one about many leaves out those that
vanish on the way. ``tid`` asks one thread: threads may differ in everything but memory and limits, and after the main
thread has exited the files directly in /proc/PID tell nothing. Source: proc(5) and the pages it names.
"""

from __future__ import annotations

import os

from depriv.records import Record

NAMESPACES = ("mnt", "ipc", "net", "pid", "uts", "cgroup", "user")
UNLIMITED = -1
DEAD = "ZX"  # states of a thread that runs no more; D does not belong here

# First column of /proc/PID/limits. Source: fs/proc/base.c, lnames (Linux 6.1)
_LIMITS = {
    "Max cpu time": "CPU",
    "Max file size": "FSIZE",
    "Max data size": "DATA",
    "Max stack size": "STACK",
    "Max core file size": "CORE",
    "Max resident set": "RSS",
    "Max processes": "NPROC",
    "Max open files": "NOFILE",
    "Max locked memory": "MEMLOCK",
    "Max address space": "AS",
    "Max file locks": "LOCKS",
    "Max pending signals": "SIGPENDING",
    "Max msgqueue size": "MSGQUEUE",
    "Max nice priority": "NICE",
    "Max realtime priority": "RTPRIO",
    "Max realtime timeout": "RTTIME",
}


class Mount(Record):
    """One line of mountinfo."""

    mount_id: int
    parent_id: int
    root: str
    point: str
    options: tuple[str, ...]
    fstype: str
    source: str
    super_options: tuple[str, ...]


class OpenFd(Record):
    """One open descriptor."""

    number: int
    target: str  # the link's text
    mode: int  # st_mode and so on of the open file
    dev: int
    ino: int
    rdev: int
    access: str  # "ro", "wo", "rw", or "path" (O_PATH: neither)
    flags: int  # as open(2) takes them
    locks: tuple[str, ...]  # "OFDLCK ADVISORY READ -1 00:1f:42 100 100", without the running number


class Process(Record):
    """One living process: its name and its real, effective, saved and file system ids."""

    pid: int
    name: str
    state: str
    uids: tuple[int, ...]
    gids: tuple[int, ...]


class UnixSocket(Record):
    """One line of /proc/net/unix that has a path."""

    ino: int
    path: str
    listening: bool


class TcpSocket(Record):
    """One line of /proc/net/tcp or tcp6."""

    port: int  # the local one
    state: str  # two hexadecimal digits


def _base(pid: int, tid: int | None) -> str:
    return f"/proc/{pid}" if tid is None else f"/proc/{pid}/task/{tid}"


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = chunk = os.read(fd, 1 << 16)
            while chunk:
                chunk = os.read(fd, 1 << 16)
                data += chunk
            return data
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        raise ProcessLookupError(error.errno, "no such process", path) from error


def pids() -> tuple[int, ...]:
    """Return every process of this pid namespace and those below it."""
    return tuple(int(name) for name in os.listdir("/proc") if name.isdecimal())


def threads(pid: int) -> tuple[int, ...]:
    """Return the thread ids of a process, the main thread's first, dead ones that are not reaped included."""
    try:
        tids = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
        return tuple(sorted(tids, key=lambda tid: tid != pid))  # numbers begin anew: its own need not be the lowest
    except FileNotFoundError as error:
        raise ProcessLookupError(error.errno, "no such process", str(pid)) from error


def read_status(pid: int, tid: int | None = None) -> dict[str, str]:
    """Return the fields of status, unparsed. Source: proc_pid_status(5)."""
    text = os.fsdecode(_read(_base(pid, tid) + "/status"))
    fields: dict[str, str] = {}
    for line in text.split("\n"):  # not splitlines(): a process may put other line ends into its name
        name, _, value = line.partition(":")
        fields[name] = value.strip()
    return fields


def _stat(pid: int, tid: int | None = None) -> list[bytes]:
    """Return the fields of stat from the third (state) on: the name before them may hold blanks and brackets."""
    return _read(_base(pid, tid) + "/stat").rpartition(b")")[2].split()


def scheduling(pid: int, tid: int | None = None) -> tuple[int, int]:
    """Return policy and nice value. Source: proc_pid_stat(5), fields 41 and 19."""
    fields = _stat(pid, tid)
    return int(fields[38]), int(fields[16])


def is_ending(pid: int, tid: int) -> bool:
    """Return whether a thread is at its end: it runs in the kernel only, and gives back all that it had.

    PF_EXITING in field 9. Source: proc_pid_stat(5), include/linux/sched.h.
    """
    return bool(int(_stat(pid, tid)[6]) & 0x4)


def _refused(pid: int, tid: int | None, error: PermissionError) -> OSError:
    """Return what a refusal means: EACCES is also the answer to who asks for a link of what ended a moment ago.

    Source: proc_ns_readlink in fs/proc/namespaces.c, proc_fd_access_allowed in fs/proc/base.c (Linux 6.1).
    """
    try:
        _stat(pid, tid)
    except ProcessLookupError as gone:
        return gone
    return error


def is_kernel_thread(pid: int) -> bool:
    """Return whether a process is a thread of the kernel's own: PF_KTHREAD in field 9. Source: as for ``is_ending``."""
    try:
        return bool(int(_stat(pid)[6]) & 0x200000)
    except ProcessLookupError:
        return False


def personality(pid: int, tid: int | None = None) -> int:
    """Return the execution domain and its flags. Source: proc_pid_personality(5)."""
    return int(_read(_base(pid, tid) + "/personality"), 16)


def oom_score_adj(pid: int) -> int:
    """Return how the OOM killer is biased: below 0 spares it. Source: proc_pid_oom_score_adj(5)."""
    return int(_read(f"/proc/{pid}/oom_score_adj"))


def start_time(pid: int) -> int:
    """Return when the process started, in clock ticks since boot. Source: proc_pid_stat(5), field 22."""
    return int(_stat(pid)[19])


def alive(pid: int, starttime: int) -> str:
    """Return "running", "dead-leader" or "dead"; a later process that got the number is "dead".

    "dead-leader": the main thread has exited and others live on. Neither a pidfd nor waitpid reports that.
    """
    try:
        fields = _stat(pid)
        if int(fields[19]) != starttime:
            return "dead"
        if fields[0].decode() not in DEAD:
            return "running"
        tids = threads(pid)
    except ProcessLookupError:
        return "dead"
    for tid in tids:
        try:
            if tid != pid and _stat(pid, tid)[0].decode() not in DEAD:
                return "dead-leader"
        except ProcessLookupError:
            continue
    return "dead"


def limits(pid: int) -> dict[str, tuple[int, int]]:
    """Return name -> soft and hard limit, UNLIMITED (-1) for none. Source: proc_pid_limits(5)."""
    found: dict[str, tuple[int, int]] = {}
    for line in _read(f"/proc/{pid}/limits").decode().splitlines()[1:]:
        name = _LIMITS.get(line[:25].rstrip())  # printed with "%-25s %-20s %-20s %-10s"
        if name:
            soft, hard = (UNLIMITED if word == "unlimited" else int(word) for word in line[25:].split()[:2])
            found[name] = (soft, hard)
    return found


def namespaces(pid: int, tid: int | None = None) -> dict[str, int]:
    """Return namespace -> inode number, for those this kernel has. Source: namespaces(7)."""
    base = _base(pid, tid) + "/ns/"
    found: dict[str, int] = {}
    for name in NAMESPACES:
        try:
            text = os.readlink(base + name)
        except FileNotFoundError:
            continue
        except PermissionError as error:
            raise _refused(pid, tid, error) from error
        found[name] = int(text[text.index("[") + 1 : -1])
    if not found:
        raise ProcessLookupError(2, "no such process", base)
    return found


def _unescape(text: str) -> str:
    """Undo mountinfo's escapes. Source: fs/proc_namespace.c, mangle and show_mountinfo (Linux 6.1)."""
    if "\\" not in text:
        return text
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\043", "#"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def mounts(pid: int, tid: int | None = None) -> tuple[Mount, ...]:
    """Return the mounts that the process can reach from its root. Source: proc_pid_mountinfo(5)."""
    found: list[Mount] = []
    for line in os.fsdecode(_read(_base(pid, tid) + "/mountinfo")).split("\n")[:-1]:
        left, _, right = line.partition(" - ")
        mount_id, parent_id, _device, root, point, options = left.split(" ")[:6]
        fstype, source, super_options = right.split(" ")[:3]
        found.append(
            Mount(
                mount_id=int(mount_id),
                parent_id=int(parent_id),
                root=_unescape(root),
                point=_unescape(point),
                options=tuple(options.split(",")),
                fstype=fstype,
                source=_unescape(source),
                super_options=tuple(super_options.split(",")),
            )
        )
    return tuple(found)


def environ(pid: int, tid: int | None = None) -> tuple[str, ...]:
    """Return the environment as execve(2) got it, or as the process overwrote it since."""
    data = _read(_base(pid, tid) + "/environ")
    return tuple(os.fsdecode(entry) for entry in data.split(b"\0")[:-1])


def cgroups(pid: int, tid: int | None = None) -> dict[str, str]:
    """Return controllers ("" for cgroup v2, "cpu,cpuacct", "name=systemd") -> path. Source: cgroups(7)."""
    found: dict[str, str] = {}
    for line in os.fsdecode(_read(_base(pid, tid) + "/cgroup")).split("\n")[:-1]:
        _number, controllers, path = line.split(":", 2)
        found[controllers] = path
    return found


def owner(pid: int, tid: int | None = None) -> int:
    """Return who owns the process's files in /proc: its effective uid, or root if it is not dumpable.

    The directory /proc/PID itself would not tell: it belongs to the effective uid always. Source: fs/proc/base.c,
    task_dump_owner (Linux 6.1).
    """
    try:
        return os.stat(_base(pid, tid) + "/environ").st_uid
    except FileNotFoundError as error:
        raise ProcessLookupError(error.errno, "no such process", str(pid)) from error


def places(pid: int, tid: int | None = None) -> tuple[tuple[int, int], ...]:
    """Return device and inode of the root directory, of the working directory, and of what is above the root.

    Above the root of a mount namespace is that root itself, for everyone; above that of a chroot is the rest of the
    tree, as ".." is held back only at the root of whoever follows it. Source: fs/namei.c, follow_dotdot (Linux 6.1).
    """
    base = _base(pid, tid)
    try:
        found = [os.stat(base + name) for name in ("/root", "/cwd", "/root/..")]
    except FileNotFoundError as error:
        raise ProcessLookupError(error.errno, "no such process", base) from error
    except PermissionError as error:
        raise _refused(pid, tid, error) from error
    return tuple((each.st_dev, each.st_ino) for each in found)


def _access(link: os.stat_result) -> str:
    """Return the access that a link of /proc/PID/fd shows as its own mode. Source: proc_pid_fd(5)."""
    return {0: "path", 0o200: "wo", 0o400: "ro", 0o600: "rw"}[link.st_mode & 0o600]


def sketch(pid: int, tid: int | None = None) -> frozenset[tuple[int, int, int, str]]:
    """Return number, device, inode and access of every descriptor: enough to see whether two threads share them."""
    base = _base(pid, tid) + "/fd"
    found: set[tuple[int, int, int, str]] = set()
    for number in _numbers(base):
        try:
            file, link = os.stat(f"{base}/{number}"), os.lstat(f"{base}/{number}")
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError as error:
            raise _refused(pid, tid, error) from error
        found.add((number, file.st_dev, file.st_ino, _access(link)))
    return frozenset(found)


def _numbers(base: str) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(base))
    except FileNotFoundError as error:
        raise ProcessLookupError(error.errno, "no such process", base) from error


def fds(pid: int, tid: int | None = None) -> tuple[OpenFd, ...]:
    """Return the open descriptors in order; one that is closed meanwhile is left out."""
    base = _base(pid, tid)
    found: list[OpenFd] = []
    for number in _numbers(base + "/fd"):
        path = f"{base}/fd/{number}"
        try:
            target, file, link = os.readlink(path), os.stat(path), os.lstat(path)
            info = _read(f"{base}/fdinfo/{number}").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError as error:
            raise _refused(pid, tid, error) from error
        lines = [line.partition(":\t") for line in info.split("\n")]
        found.append(
            OpenFd(
                number=number,
                target=target,
                mode=file.st_mode,
                dev=file.st_dev,
                ino=file.st_ino,
                rdev=file.st_rdev,
                access=_access(link),
                flags=next((int(value, 8) for name, _, value in lines if name == "flags"), 0),
                locks=tuple(" ".join(value.split()[1:]) for name, _, value in lines if name == "lock"),
            )
        )
    return tuple(found)


def _process(pid: int) -> Process | None:
    """Return the process, or None if it is gone or wholly dead."""
    try:
        text = _read(f"/proc/{pid}/status")
    except ProcessLookupError:
        return None
    # By position, not line by line: this is done for every process of the host. In the name, which is first and which
    # a process chooses, newlines are escaped and tabs are not. Source: fs/proc/array.c, proc_task_name (Linux 6.1).
    fields: dict[bytes, bytes] = {}
    for key in (b"State", b"Uid", b"Gid", b"Threads"):
        start = text.index(b"\n" + key + b":\t") + len(key) + 3
        fields[key] = text[start : text.index(b"\n", start)]
    state = fields[b"State"][:1].decode()
    # A dead main thread stays as a zombie for as long as other threads of the process live.
    if state in DEAD and int(fields[b"Threads"]) < 2:
        return None
    return Process(
        pid=pid,
        name=os.fsdecode(text[6 : text.index(b"\n")]),  # "Name:\t"
        state=state,
        uids=tuple(map(int, fields[b"Uid"].split())),
        gids=tuple(map(int, fields[b"Gid"].split())),
    )


def processes() -> tuple[Process, ...]:
    """Return every living process (a dead main thread with living others counts, and so does state D)."""
    return tuple(process for process in map(_process, pids()) if process is not None)


def processes_of(
    *, uid: int | None = None, gid: int | None = None, among: tuple[Process, ...] | None = None
) -> tuple[Process, ...]:
    """Return the living processes with this uid or this gid as real, effective, saved or file system id.

    Args:
        uid: The user id to look for, or None.
        gid: The group id to look for, or None.
        among: What ``processes()`` returned shortly before, to look there instead.
    """
    every = processes() if among is None else among
    return tuple(process for process in every if uid in process.uids or gid in process.gids)


def tcp_sockets() -> dict[int, TcpSocket]:
    """Return inode -> TCP socket of our own network namespace, the host's. Source: proc_net_tcp.rst, Linux 6.1."""
    found: dict[int, TcpSocket] = {}
    for name in ("tcp", "tcp6"):
        try:
            lines = os.fsdecode(_read(f"/proc/self/net/{name}")).split("\n")[1:]
        except FileNotFoundError:
            continue  # a kernel without IPv6
        for line in lines:
            words = line.split()
            if len(words) > 9 and words[9].isdecimal():
                found[int(words[9])] = TcpSocket(port=int(words[1].rpartition(":")[2], 16), state=words[3])
    return found


def unix_sockets(pid: int | None) -> dict[int, UnixSocket]:
    """Return inode -> socket with a path, of a process's network namespace. Source: proc_pid_net(5), unix.

    For None, of our own.

    Paths are printed raw, and a newline in one can forge a line: an inode that is named twice is left out.
    """
    found: dict[int, UnixSocket] = {}
    seen: set[int] = set()
    twice: set[int] = set()
    for line in os.fsdecode(_read(f"/proc/{'self' if pid is None else pid}/net/unix")).split("\n"):
        words = line.split(None, 7)
        if len(words) < 7 or not words[6].isdecimal():
            continue
        ino = int(words[6])
        (twice if ino in seen else seen).add(ino)
        if len(words) == 8:
            found[ino] = UnixSocket(ino=ino, path=words[7], listening=words[3] == "00010000")  # __SO_ACCEPTCON
    return {ino: socket for ino, socket in found.items() if ino not in twice}


def holders(target: str) -> tuple[int, ...]:
    """Return the processes with a descriptor whose link reads ``target``, such as "pipe:[42]". Slow: looks at all.

    A process that the caller may not look into is passed over.
    """
    found: list[int] = []
    for pid in pids():
        base = f"/proc/{pid}/fd"
        try:
            for number in os.listdir(base):
                try:
                    if os.readlink(f"{base}/{number}") == target:
                        found.append(pid)
                        break
                except FileNotFoundError:
                    continue
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError:
            continue  # more privileged than this root: pid 1 where root itself is confined, and never a guest
    return tuple(found)


def boot_id() -> str:
    """Return what names this boot of the kernel: a pid and a start time mean nothing in another. Source: random(4)."""
    return _read("/proc/sys/kernel/random/boot_id").decode("ascii").strip()


def lock_holders(dev: int, ino: int) -> tuple[tuple[int, str, str], ...]:
    """Return pid, state and name of each process with an open file that holds a lock on an inode. Slow: looks at all.

    /proc/locks would name who took the lock, who may be dead while a child that inherited the file holds it still.
    Source: proc_pid_fdinfo(5).
    """
    found: list[tuple[int, str, str]] = []
    for process in processes():
        base = f"/proc/{process.pid}"
        try:
            for number in os.listdir(f"{base}/fd"):
                have = os.stat(f"{base}/fd/{number}")
                if (have.st_dev, have.st_ino) == (dev, ino) and b"\nlock:" in _read(f"{base}/fdinfo/{number}"):
                    found.append((process.pid, process.state, process.name))
                    break
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return tuple(found)
