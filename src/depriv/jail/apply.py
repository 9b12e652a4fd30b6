# SPDX-License-Identifier: Apache-2.0
"""One function per step of a plan. No decisions, no fallback, no retry: the first failure ends the jail.

Each takes the step and the ``State`` and raises ``OSError`` if the kernel refused, ``ValueError`` if a file is not the
one that was planned for: then the process must end, never go on; what it has opened ends with it. It must be
single-threaded.
"""

from __future__ import annotations

import fcntl
import os
import resource
import select
import stat

from depriv import steps
from depriv.jail import sys
from depriv.jail.reap import reap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from depriv.records import Record

ASK_FOR_MAP = b"U"  # the child's word, and the parent's, about the uid map
MAPPED = b"G"
_OWN_FDS = 100  # granted descriptors wait above this number until exec puts them at theirs
KINDS = {"file": stat.S_ISREG, "block": stat.S_ISBLK, "char": stat.S_ISCHR, "fifo": stat.S_ISFIFO}


class State:
    """What the steps of one plan share: open descriptors, and where the root is being built."""

    def __init__(self, control: int, tell: int = -1, waits: int = -1) -> None:
        """Take the socket, and the child's ends of two pipes: one to speak to its parent, one to wait for it."""
        # Out of the way of the numbers that QEMU gets: exec has to be able to fail aloud.
        self.tell = _move_up(tell) if tell >= 0 else -1
        self.waits = _move_up(waits) if waits >= 0 else -1
        self.opened: dict[str, int] = {}  # role -> descriptor
        self.granted: dict[int, int] = {}  # number in QEMU -> descriptor
        self.nodes: dict[str, os.stat_result] = {}  # name -> a device node that QEMU opens by itself
        self.root = ""  # where the new root is mounted; "" once it is the root
        self.cgroup = -1  # its directory, and the one that is in; -1: not made
        self.cgroup_folder = -1
        self.cgroup_version = 0
        self.late_namespaces = 0  # left by the child itself
        self.control = control  # connected to the toolstack; -1: there is none
        # Both are needed when /proc is no longer to be seen.
        self.proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        with open("/proc/sys/kernel/cap_last_cap", "rb") as file:
            self.last_cap = int(file.read())

    def refuse_if_orphaned(self) -> None:
        """Raise ``OSError`` (ECANCELED) if the toolstack is gone, and with it the domain's lock.

        We may have been stopped for longer than it lived, and the next owner of the ids have been started since.
        """
        if self.control >= 0:
            poll = select.poll()
            poll.register(self.control, 0)  # POLLHUP comes unasked, but not from a peer that only says no more
            if poll.poll(0):
                raise OSError(125, "who asked for it is gone: the uid may have a new owner", "the jail's socket")


def _move_up(fd: int) -> int:
    """Move a descriptor out of the way of the numbers that QEMU gets."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _OWN_FDS)
    os.close(fd)
    return high


def _keep(fd: int, role: str, state: State, *numbers: int) -> None:
    """Remember whose descriptor it is, and as which numbers QEMU gets it; -1: it does not."""
    state.opened[role] = _move_up(fd)
    state.granted.update({number: state.opened[role] for number in numbers if number >= 0})


def open_file(step: steps.OpenFile, state: State) -> None:
    """Open without following a symbolic link and without waiting (a FIFO would), then look what it is."""
    access = {"ro": os.O_RDONLY, "rw": os.O_RDWR}[step.access]
    if step.kind == "block" and step.access == "rw":
        access |= os.O_EXCL  # fails where the host has it, or a part of it, mounted or claimed. See open(2)
    fd = os.open(step.path, access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    have = os.fstat(fd)
    same_file = (step.dev, step.ino) in ((0, 0), (have.st_dev, have.st_ino))
    if not KINDS[step.kind](have.st_mode) or not same_file or step.rdev not in (0, have.st_rdev):
        raise ValueError(f"{step.path} is not the {step.kind} that was planned for: it was replaced meanwhile")
    os.set_blocking(fd, True)  # O_NONBLOCK stays on the open file otherwise, and QEMU would inherit it
    _keep(fd, step.role, state, step.number)


def take_fd(step: steps.TakeFd, state: State) -> None:
    """Duplicate one of the toolstack's. A directory would be a way out of the empty root."""
    toolstack = os.pidfd_open(os.getppid())
    state.refuse_if_orphaned()  # after the pidfd: before that, our parent may have changed
    fd = sys.pidfd_getfd(toolstack, step.source)
    os.close(toolstack)
    path_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
    if path_only or stat.S_ISDIR(os.fstat(fd).st_mode):
        raise ValueError(f"descriptor {step.source} is a directory, or a mere path: no device model gets one")
    _keep(fd, step.role, state, step.number)


def listen_unix(step: steps.ListenUnix, state: State) -> None:
    """Bind and listen. The path may be longer than a socket address: bind in the directory, by a short name."""
    folder, _, name = step.path.rpartition("/")
    before = os.umask(0o177)
    os.chdir(folder or "/")
    if step.replace_old and os.path.lexists(name) and stat.S_ISSOCK(os.lstat(name).st_mode):
        os.unlink(name)
    _keep(sys.listen_unix(name), step.role, state, step.number)
    os.umask(before)
    os.chdir("/")


def make_fifo(step: steps.MakeFifo, state: State) -> None:
    """Make the FIFO and open it read-write, so that writing never fails for want of a reader."""
    os.mkfifo(step.path, 0o600)
    fd = os.open(step.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, step.size_kib * 1024)
    _keep(fd, step.role, state, *step.numbers)


def make_cgroup(step: steps.MakeCgroup, state: State) -> None:
    """Make the leaf; one that is there already is somebody's, and an error. Its folder stays open to remove it from."""
    folder, _, leaf = step.path.rpartition("/")
    os.makedirs(folder, 0o755, exist_ok=True)
    state.cgroup_folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.mkdir(leaf, 0o755, dir_fd=state.cgroup_folder)
    state.cgroup = os.open(leaf, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=state.cgroup_folder)
    state.cgroup_version = step.version


def unshare(step: steps.Unshare, state: State) -> None:
    """Leave the namespaces. The cgroup namespace's root is the cgroup at the time of the call: the child leaves it."""
    late = sys.CLONE_NEW["cgroup"] if "cgroup" in step.namespaces else 0
    sys.unshare(sum(sys.CLONE_NEW[name] for name in step.namespaces) & ~late)
    state.late_namespaces = late


def make_root(step: steps.MakeRoot, state: State) -> None:
    """Mount the root to be where the host's own view does not show it."""
    # Private first: a shared mount would carry everything below into the host.
    sys.mount("none", "/", "", sys.MS_REC | sys.MS_PRIVATE)
    # Not MS_NODEV: /dev/null lives in it. Without it QEMU takes no image locks (util/osdep.c, QEMU 7.2).
    options = f"mode=755,size={step.size_kib}k,nr_inodes={step.inodes}"
    sys.mount("root", step.mountpoint, "tmpfs", sys.MS_NOSUID | sys.MS_NOEXEC, options)
    state.root = step.mountpoint


def _make_dir(step: steps.MakeDir, state: State) -> None:
    os.mkdir(state.root + step.path, 0o755)


def _make_link(step: steps.MakeLink, state: State) -> None:
    os.symlink(step.target, state.root + step.path)


def make_private(step: steps.MakePrivate, state: State) -> None:
    """Mount a tmpfs just large enough."""
    flags = sys.MS_NOSUID | sys.MS_NODEV | sys.MS_NOEXEC
    sys.mount("private", state.root + step.path, "tmpfs", flags, f"mode=755,size={step.size_kib}k")


def make_node(step: steps.MakeNode, state: State) -> None:
    """Make the node with exactly the mode and owner of the plan, whatever the umask."""
    path = state.root + step.path
    os.mknod(path, stat.S_IFCHR | step.mode, os.makedev(step.major, step.minor))
    os.chmod(path, step.mode)
    os.chown(path, step.uid, step.gid)
    state.nodes[step.path.rpartition("/")[2]] = os.stat(path)


def bind_tree(step: steps.BindTree, state: State) -> None:
    """Bind, then restrict: the flags of a new bind mount are only taken from a second call. See mount(2)."""
    target = state.root + step.target
    sys.mount(step.source, target, "", sys.MS_BIND)
    flags = sys.MS_REMOUNT | sys.MS_BIND | sys.MS_RDONLY | sys.MS_NOSUID | (0 if step.devices else sys.MS_NODEV)
    sys.mount("none", target, "", flags)


def copy_file(step: steps.CopyFile, state: State) -> None:
    """Copy the whole file; a short copy is an error, never a truncated kernel."""
    source = state.opened[step.role]
    size = os.fstat(source).st_size
    target = os.open(state.root + step.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    done = 0
    while done < size:
        sent = os.sendfile(target, source, done, size - done)
        if sent == 0:
            raise ValueError(f"{step.role} became shorter while it was copied")
        done += sent
    os.fchown(target, step.uid, step.gid)
    os.close(target)


def pivot_root(_step: steps.PivotRoot, state: State) -> None:
    """Swap the roots in place: with "." for both, the old root lies over the new one and is detached at once.

    Entering the own mount namespace anew makes its root ours first: in a chroot only that chroot would be detached,
    the host stay mounted above it, and the kernel refuse a user namespace.
    """
    root = os.open(state.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    own = os.open("self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=state.proc)
    sys.setns(own, sys.CLONE_NEW["mnt"])
    os.fchdir(root)
    os.close(own)
    os.close(root)
    sys.pivot_root(".", ".")
    sys.umount2(".", sys.MNT_DETACH)
    os.chdir("/")
    state.root = ""
    _set_root_writable(writable=False)


def _set_root_writable(*, writable: bool) -> None:
    flags = sys.MS_REMOUNT | sys.MS_BIND | sys.MS_NOSUID | sys.MS_NOEXEC
    sys.mount("none", "/", "", flags if writable else flags | sys.MS_RDONLY)


def _write(path: str, text: str, folder: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
    os.write(fd, text.encode())
    os.close(fd)


def _set_hostname(step: steps.SetHostname, _state: State) -> None:
    sys.sethostname(step.name)


def become_init(_step: steps.BecomeInit, state: State) -> None:
    """In the child: make its cgroup the root of what it sees of cgroups, and lead a session of its own.

    Until it has an id of its own it dies with the jail: before it joins a cgroup of version 1, nobody else finds it.
    """
    # SetIds ends that: the kernel clears it with a new gid or uid (commit_creds() in kernel/cred.c).
    sys.prctl(sys.PR_SET_PDEATHSIG, sys.SIGKILL, "PR_SET_PDEATHSIG")
    if state.cgroup_version == 1:
        _write("cgroup.procs", "0", state.cgroup)
    if state.late_namespaces:
        sys.unshare(state.late_namespaces)
    os.setsid()
    os.umask(0o077)
    # What the caller happened to have: real-time class, nice, no address randomisation, immunity to the OOM killer.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    sys.personality(0)
    fd = os.open("self/oom_score_adj", os.O_RDONLY | os.O_CLOEXEC, dir_fd=state.proc)
    if int(os.read(fd, 8)) < 0:
        _write("self/oom_score_adj", "0", state.proc)
    os.close(fd)
    for number in (resource.RLIMIT_CPU, resource.RLIMIT_DATA, resource.RLIMIT_RSS, 15):  # 15: RTTIME
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (hard, hard))  # none of the plan's: they would end a guest after a while


def set_limit(step: steps.SetLimit, _state: State) -> None:
    """Set soft and hard to one value."""
    number = 10 if step.name == "LOCKS" else getattr(resource, f"RLIMIT_{step.name}")  # <asm-generic/resource.h>
    resource.setrlimit(number, (step.value, step.value))  # -1 is RLIM_INFINITY


def new_user(_step: steps.NewUser, state: State) -> None:
    """Enter the user namespace; the parent, still root on the host, maps the one uid and gid into it."""
    os.setgroups(())  # before: in the namespace there is no group to set
    sys.unshare(sys.CLONE_NEW["user"])
    os.write(state.tell, ASK_FOR_MAP)
    if os.read(state.waits, 1) != MAPPED:
        raise OSError(32, "the jail did not map the uid", "uid_map")
    # None below this one: in a namespace of its own QEMU would have every capability again. See namespaces(7).
    _write("sys/user/max_user_namespaces", "0", state.proc)


def map_user(pid: int, step: steps.NewUser, state: State) -> None:
    """In the parent: write the child's maps. gid first or last makes no difference to a privileged writer."""
    for name, value in (("gid_map", step.gid), ("uid_map", step.uid)):
        _write(f"{pid}/{name}", f"{value} {value} 1\n", state.proc)


def drop_capabilities(_step: steps.DropCapabilities, state: State) -> None:
    """Bounding set first: it needs CAP_SETPCAP, which is gone with the rest."""
    for cap in range(state.last_cap + 1):
        sys.prctl(sys.PR_CAPBSET_DROP, cap, f"PR_CAPBSET_DROP {cap}")
    sys.prctl(sys.PR_CAP_AMBIENT, sys.PR_CAP_AMBIENT_CLEAR_ALL, "PR_CAP_AMBIENT_CLEAR_ALL")
    sys.prctl(sys.PR_SET_SECUREBITS, sys.SECUREBITS, "PR_SET_SECUREBITS")


def set_ids(step: steps.SetIds, _state: State) -> None:
    """Groups, gid, uid: in this order each is still permitted. Then no capability, in case the uid change kept one."""
    if os.getgroups():
        os.setgroups(())
    os.setresgid(step.gid, step.gid, step.gid)
    os.setresuid(step.uid, step.uid, step.uid)
    sys.capset_none()
    # Root's session keyring came along: who possesses it reads its keys, whatever the uid. See session-keyring(7).
    sys.join_new_session_keyring()


def no_new_privs(_step: steps.NoNewPrivs, _state: State) -> None:
    """For good; and nobody of this uid may trace the little that is left before exec.

    After exec the kernel keeps it so: the binary may be executed but not read (would_dump() in fs/exec.c).
    """
    sys.prctl(sys.PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    sys.prctl(sys.PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")


def load_filter(step: steps.Filter, _state: State) -> None:
    """Load the filter; exec keeps it."""
    sys.seccomp_filter(bytes.fromhex(step.program))


def execute(step: steps.Execute, state: State) -> NoReturn:
    """Put the granted descriptors at their numbers, let exec close all others, and go."""
    sys.close_on_exec_from(0)
    for number, fd in state.granted.items():
        os.dup2(fd, number, inheritable=True)
    # Python ignores both and exec would hand that on. A write past RLIMIT_FSIZE has to fail with EFBIG, not to kill
    # QEMU: SIGXFSZ stays ignored, on purpose. SIGPIPE gets its default back; QEMU ignores it itself.
    sys.default_sigpipe()
    os.execve(step.path, step.argv, dict(item.split("=", 1) for item in step.environ))  # noqa: S606 (no shell is the point)


def empty_root(step: steps.EmptyRoot, _state: State) -> None:
    """Detach what QEMU has opened by now, and remove every name; what it holds open or mapped it keeps."""
    for path in step.detach:
        sys.umount2(path, sys.MNT_DETACH)
    _set_root_writable(writable=True)
    for path in step.remove:
        try:
            os.unlink(path)
        except IsADirectoryError:
            os.rmdir(path)
    _set_root_writable(writable=False)


# One act per step, and a test that none is missing.
ACTS: dict[type[Record], Callable[..., None]] = {
    steps.Reap: reap,
    steps.OpenFile: open_file,
    steps.TakeFd: take_fd,
    steps.ListenUnix: listen_unix,
    steps.MakeFifo: make_fifo,
    steps.MakeCgroup: make_cgroup,
    steps.Unshare: unshare,
    steps.MakeRoot: make_root,
    steps.MakeDir: _make_dir,
    steps.MakeLink: _make_link,
    steps.MakeNode: make_node,
    steps.BindTree: bind_tree,
    steps.MakePrivate: make_private,
    steps.CopyFile: copy_file,
    steps.PivotRoot: pivot_root,
    steps.SetHostname: _set_hostname,
    steps.BecomeInit: become_init,
    steps.SetLimit: set_limit,
    steps.NewUser: new_user,
    steps.DropCapabilities: drop_capabilities,
    steps.SetIds: set_ids,
    steps.NoNewPrivs: no_new_privs,
    steps.Filter: load_filter,
    steps.Execute: execute,
    steps.EmptyRoot: empty_root,
}
