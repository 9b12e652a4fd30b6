# SPDX-License-Identifier: Apache-2.0
"""Makes processes that are confined in every respect but the chosen ones: what audits are tried on.

Imported, it is ``compiled()`` and ``subject()``. Run as a program with a Recipe as JSON it becomes the keeper of one
subject: a small C program that does what its arguments say (see ACTOR) and then sleeps. It is on purpose independent
of depriv's own jail, so that the auditor is not tried with the code it audits.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import select
import signal
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

UID = 400_000 + 10 * (os.getpid() % 10_000)  # and 9 above: ids that nobody has, nor another run at the same time
CLONE = {  # <linux/sched.h>
    "mnt": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
MS_RDONLY, MS_NOSUID, MS_REMOUNT, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 32, 8, 16384, 1 << 18  # <sys/mount.h>
MNT_DETACH = 2
PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 8, 22, 24, 38, 47
SYS_PIVOT_ROOT, SYS_CAPGET, SYS_CAPSET = 155, 125, 126  # x86_64
NET_RAW = 13  # <linux/capability.h>

# One word after the other: what to do, each followed by its own arguments.
ACTOR = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

static int failed(void) { _exit(3); }
static void must(int result) { if (result < 0) failed(); }
static void *sleeper(void *unused) { for (;;) pause(); return unused; }
static void *own_table(void *ready)
{
    must(unshare(CLONE_FILES));
    must(close_range(3, ~0U, 0));
    must(open("/", O_RDONLY | O_DIRECTORY));
    *(volatile int *)ready = 1;
    return sleeper(0);
}
static void *own_place(void *ready)
{
    must(unshare(CLONE_FS));
    must(chdir("dev"));
    *(volatile int *)ready = 1;
    return sleeper(0);
}
static void start(void *(*body)(void *))
{
    static volatile int ready;
    pthread_t thread;
    ready = body == sleeper;
    if (pthread_create(&thread, 0, body, (void *)&ready)) failed();
    while (!ready) usleep(1000);
}
static void filter(void)
{
    struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {1, &allow};
    must(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0));
}
static void lock(int fd, int how)
{
    struct flock all;
    memset(&all, 0, sizeof all);
    all.l_type = F_RDLCK;
    must(fcntl(fd, how, &all));
}
static void only_permitted(void)
{
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    must(syscall(SYS_capget, &head, data));
    data[0].effective = data[0].inheritable = 0;
    must(syscall(SYS_capset, &head, data));
}
int main(int argc, char **argv)
{
    int pair[2];
    sigset_t none;
    sigemptyset(&none);
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i];
        if (!strcmp(word, "thread")) start(sleeper);
        else if (!strcmp(word, "thread-own-table")) start(own_table);
        else if (!strcmp(word, "thread-own-place")) start(own_place);
        else if (!strcmp(word, "no-new-privs")) must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
        else if (!strcmp(word, "seccomp")) filter();
        else if (!strcmp(word, "dumpable")) must(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
        else if (!strcmp(word, "swap-uids")) {  /* the real one becomes the saved one */
            uid_t real, effective, saved;
            must(getresuid(&real, &effective, &saved));
            must(setresuid(effective, effective, real));
        }
        else if (!strcmp(word, "only-permitted")) only_permitted();
        else if (!strcmp(word, "harmless")) {
            must(eventfd(0, 0)); must(epoll_create1(0)); must(signalfd(-1, &none, 0));
            must(timerfd_create(CLOCK_MONOTONIC, 0)); must(pipe(pair)); must(open("/dev/null", O_RDWR));
        }
        else if (!strcmp(word, "inotify")) must(inotify_init1(0));
        else if (!strcmp(word, "memfd")) must(memfd_create("anon_inode:[eventfd]", 0));
        else if (!strcmp(word, "socket")) must(socket(AF_INET, SOCK_DGRAM, 0));
        else if (!strcmp(word, "directory")) must(open("/", O_RDONLY | O_DIRECTORY));
        else if (!strcmp(word, "path")) must(open("/dev/null", O_PATH));
        else if (!strcmp(word, "accept")) must(accept(atoi(argv[++i]), 0, 0));
        else if (!strcmp(word, "ofd-lock")) lock(atoi(argv[++i]), F_OFD_SETLK);
        else if (!strcmp(word, "posix-lock")) lock(atoi(argv[++i]), F_SETLK);
        else if (!strcmp(word, "fork")) { if (!fork()) { close_range(3, ~0U, 0); sleeper(0); } }
        else if (!strcmp(word, "ready")) { int fd = atoi(argv[++i]); must(write(fd, "r", 1) - 1); close(fd); }
        else if (!strcmp(word, "leader-exits")) syscall(SYS_exit, 0);
        else failed();
    }
    sleeper(0);
}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One subject. The defaults are a process confined in every respect."""

    uid: int = UID
    gid: int = UID
    uids: tuple[int, ...] = ()  # real, effective and saved, where they differ; exec makes the last the second
    groups: tuple[int, ...] = ()
    namespaces: tuple[str, ...] = ("mnt", "ipc", "net", "pid", "uts", "cgroup", "user")
    root: str = "empty"  # "empty", "file", "zero" (a node that is not /dev/null), "mount", "host", "chroot"
    readonly: bool = True
    cwd: str = "/"
    inheritable: bool = False  # CAP_NET_RAW in this set
    bounding: bool = False
    ambient: bool = False
    no_new_privs: bool = True
    seccomp: int = 1  # filters
    limits: tuple[tuple[str, int, int], ...] = (("CORE", 0, 0), ("FSIZE", 1 << 20, 1 << 20), ("NOFILE", 64, 64))
    environ: tuple[str, ...] = ("PATH=/usr/bin",)
    mode: int = 0o111  # of the program: may not be read, so the process is not dumpable
    fds: tuple[int, ...] = ()  # of the test, kept open under their numbers
    acts: tuple[str, ...] = ()  # before the subject is ready
    then: tuple[str, ...] = ()  # and after


def compiled(where: Path) -> Path:
    """Compile the actor."""
    source = where / "actor.c"
    source.write_text(ACTOR)
    subprocess.run(["gcc", "-O1", "-static", "-pthread", "-o", str(where / "actor"), str(source)], check=True)
    return where / "actor"


@contextlib.contextmanager
def subject(actor: Path, recipe: Recipe | None = None) -> Generator[int]:
    """Yield the pid of a subject that has done its acts; it is dead and reaped afterwards."""
    chosen = recipe or Recipe()
    words = json.dumps({**dataclasses.asdict(chosen), "actor": str(actor)})
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        pass_fds=chosen.fds,
    )
    with keeper:
        assert keeper.stdout is not None
        line = keeper.stdout.readline()
        if not line:
            raise AssertionError(f"the subject failed: {chosen}")
        pid = int(line)
        pidfd = os.pidfd_open(pid)  # not yet reaped: only the keeper does that, and it waits for the subject's end
        try:
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            keeper.wait(20)


# The rest runs in the keeper and in the subject.


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _ok(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    _ok(_libc().mount(*words, ctypes.c_ulong(flags), options and options.encode()), f"mount {target}")


def _make_root(recipe: Recipe) -> None:
    """Make an empty root at a place that exists everywhere; only this mount namespace sees it."""
    if recipe.root == "host" or "mnt" not in recipe.namespaces:
        os.chdir("/")
        return
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("root", "/tmp", "tmpfs", MS_NOSUID | MS_NOEXEC, "size=64k,nr_inodes=16,mode=755")
    os.chdir("/tmp")
    os.mkdir("dev")
    os.mkdir("lib")
    os.mknod("dev/null", 0o20666, os.makedev(1, 5 if recipe.root == "zero" else 3))
    if recipe.root == "file":
        os.close(os.open("lib/left", os.O_CREAT | os.O_WRONLY, 0o644))
    if recipe.root == "mount":
        _mount("more", "lib", "tmpfs", MS_RDONLY)
    if recipe.root == "chroot":
        os.chdir("..")
        _mount(None, "/tmp", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NOEXEC)
        os.chroot("/tmp")
        os.chdir("/")
        return
    libc = _libc()
    # Where the tests themselves run in a chroot, the namespace's own root is another: enter it anew first.
    here = os.open(".", os.O_PATH | os.O_DIRECTORY)
    namespace = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    _ok(libc.setns(namespace, 0), "setns")
    os.fchdir(here)
    os.close(namespace)
    os.close(here)
    _ok(libc.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    _ok(libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")
    if recipe.readonly:
        _mount(None, "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NOEXEC)


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter)))


def _prctl(*words: int) -> None:
    full = (*words, *(0,) * (5 - len(words)))
    _ok(_libc().prctl(full[0], *(ctypes.c_ulong(word) for word in full[1:])), f"prctl {words}")


def _drop(recipe: Recipe) -> None:
    """Become uid:gid with no capability but the chosen ones."""
    libc = _libc()
    allow = _Filter(code=6, k=0x7FFF0000)  # BPF_RET, SECCOMP_RET_ALLOW
    program = _Program(len=1, filter=ctypes.pointer(allow))
    for _ in range(recipe.seccomp):  # while CAP_SYS_ADMIN is left: no_new_privs may be unwanted
        _ok(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")
    bits = 1 << NET_RAW if recipe.inheritable or recipe.ambient else 0
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    data = (ctypes.c_uint32 * 6)()
    _ok(libc.syscall(SYS_CAPGET, head, data), "capget")
    data[2] = bits  # effective, permitted, inheritable; before the bounding set is empty, which limits the last
    _ok(libc.syscall(SYS_CAPSET, head, data), "capset inheritable")
    for cap in range(64):
        if cap != NET_RAW or not recipe.bounding:
            with contextlib.suppress(OSError):  # EINVAL: past the last capability
                _prctl(PR_CAPBSET_DROP, cap)
    _prctl(PR_SET_KEEPCAPS, 1)
    os.setresgid(recipe.gid, recipe.gid, recipe.gid)
    os.setresuid(*(recipe.uids or (recipe.uid,) * 3))
    data = (ctypes.c_uint32 * 6)(0, bits, bits, 0, 0, 0)
    _ok(libc.syscall(SYS_CAPSET, head, data), "capset")
    if recipe.ambient:
        _prctl(PR_CAP_AMBIENT, 2, NET_RAW)
    if recipe.no_new_privs:
        _prctl(PR_SET_NO_NEW_PRIVS, 1)


def _become(recipe: Recipe, program: int, mapped: int, ready: int) -> None:
    """Turn this process into the subject."""
    os.umask(0)
    null = os.open("/dev/null", os.O_RDWR)
    flags = 0
    for name in set(recipe.namespaces) - {"pid", "user"}:
        flags |= CLONE[name]
    _ok(_libc().unshare(ctypes.c_int(flags)), "unshare")
    _make_root(recipe)
    if recipe.cwd != "/":
        os.chdir(recipe.cwd)
    for name, soft, hard in recipe.limits:
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))
    os.setgroups(recipe.groups)
    if "user" in recipe.namespaces:  # last: its root owns none of the others
        _ok(_libc().unshare(CLONE["user"]), "unshare user")
    os.write(ready, b"u")
    if not os.read(mapped, 1):
        raise OSError("the keeper failed")
    _drop(recipe)
    os.set_inheritable(ready, True)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    environ = dict(entry.split("=", 1) for entry in recipe.environ)
    os.execve(program, ["actor", *recipe.acts, "ready", str(ready), *recipe.then], environ)


def keep(words: dict[str, object]) -> None:
    """Start the subject, print its pid when it is ready, reap it."""
    actor = str(words.pop("actor"))
    recipe = Recipe(**{name: tuple(map(_flat, v)) if isinstance(v, list) else v for name, v in words.items()})  # type: ignore[arg-type] # JSON of a Recipe
    os.chmod(actor, recipe.mode)
    program = os.open(actor, os.O_PATH | os.O_CLOEXEC)
    if "pid" in recipe.namespaces:  # the only one that is the child's and not one's own
        _ok(_libc().unshare(CLONE["pid"]), "unshare pid")
    ready, said = os.pipe()
    mapped, release = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(release)  # so that the end of the keeper ends the wait for it
            _become(recipe, program, mapped, said)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(said)
    if not os.read(ready, 1):
        sys.exit("the subject failed")
    if "user" in recipe.namespaces:
        for name, number in (("uid_map", recipe.uid), ("gid_map", recipe.gid)):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(f"{number} {number} 1")
    os.write(release, b"m")
    said_so = b""
    while select.select([ready], [], [], 20)[0] and (more := os.read(ready, 16)):
        said_so += more  # up to the end: that descriptor is closed then
    if said_so == b"r":
        print(pid, flush=True)
    os.waitpid(pid, 0)


def _flat(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    keep(json.loads(sys.argv[1]))
