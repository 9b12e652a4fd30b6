# SPDX-License-Identifier: Apache-2.0
"""The attacker in QEMU's place, in the real jail, under the planner's plan: what it may do is listed here, act by act.

It installs no filter, as QEMU does with -sandbox: what is refused here is refused without QEMU's help. The same acts
are tried without our own filter, too: what the other layers refuse by themselves they still do. That each refused act
can succeed at all is shown by test_attacker_unconfined.py.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.jail.test_attacker_unconfined import ROOT_MAY
from tests.support import build
from tests.support.launch import ALLOW_ALL, DISK_FD, REAPER_UID, running, taking, wait_for, with_filter

from depriv import seccomp, steps
from depriv.proc import read_status

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.launch import Ground, Running

pytestmark = pytest.mark.root

SANDBOX = "QEMU's own -sandbox denies it"
NEEDED = "QEMU needs the call"
PERMITTED = {
    "list_root": "its root: dev/null and the folders that EmptyRoot removes once QEMU has started",
    "environment": "LC_ALL, MALLOC_ARENA_MAX, TZ, and nothing of the host's",
    "extra_fds": "the monitor's listening socket; test_launch.py compares the descriptors",
    "watch_inotify": "there is nothing to be watched but its empty root",
    "memfd": NEEDED + "; its size is bounded by RLIMIT_FSIZE",
    "socket_pair": "both ends are its own",
    "shm": "in its own IPC namespace",
    "sem": "in its own IPC namespace",
    "msg": "in its own IPC namespace",
    "map_exec": "an emulator writes the code it executes; QEMU's split-wx=on would do without",
    "thread": "QEMU has threads; RLIMIT_NPROC bounds them",
    "dumpable": "its own choice; other uids gain nothing by it, and of its own there is nobody",
    "session": SANDBOX,
    "affinity": SANDBOX,
}

# What our filter alone refuses, with EPERM unless said otherwise -> how far it would go without.
NO_NETWORK = "in a network namespace that has no interface that is up"
OWN_KEYS = "keys belong to its uid and user namespace"
FILTER_ALONE = {
    "listener_connect": "to any port of the host: a socket stays in the network namespace it was made in",
    "listener_sendto": "the same, by MSG_FASTOPEN",
    "listener_sendmsg": "the same, by MSG_FASTOPEN",
    "listener_sendmmsg": "the same, by MSG_FASTOPEN",
    "socket_vsock": "to the host: no namespace confines AF_VSOCK",
    "socket_inet": NO_NETWORK,
    "socket_inet6": NO_NETWORK,
    "socket_udp": NO_NETWORK,
    "bind_inet": NO_NETWORK,
    "socket_unix": "abstract names belong to its network namespace, and it sees no path",
    "bind_abstract": "abstract names belong to its network namespace",
    "socket_netlink": "to its own network namespace",
    "socket_audit": "to its own network namespace",
    "socket_uevent": "to its own network namespace",
    "handle_name": "a name for its own empty root; opening by handle is refused",
    "perf_self": "into the kernel's code for it, and no further",
    "userfault_user": "into the kernel's code for it, and no further",
    "secret_memory": "memory that is its own",
    "fork_one": SANDBOX,
    "vfork_one": SANDBOX,
    "clone_one": SANDBOX,
    "clone3_one": SANDBOX + "; of ours comes ENOSYS",
    "clone_vm": SANDBOX,
    "exec_memfd": SANDBOX,
    "key_session": OWN_KEYS,
    "key_add": OWN_KEYS,
    "key_request": OWN_KEYS,
    "persona": SANDBOX,
    "ldt": "its own segments",
    "quota": "Q_SYNC of no device needs no privilege: sync(2) by another name",
    "int80_getpid": "every call by its number on 32 bits; it ends the process",
}

REFUSED = {  # what the kernel says if there were no filter -> to which acts
    # There is nothing to be seen.
    "ENOENT": """
        read_passwd read_shadow read_dotdot read_usr read_sh read_home read_run read_boot path_read path_write path_stat
        write_tmp write_shm write_passwd dev_mem dev_kmsg dev_kvm dev_tun dev_vhost dev_loop dev_fuse dev_ptmx dev_tty
        dev_privcmd dev_evtchn proc_list proc_mounts proc_self_mem proc_self_exe proc_oom proc_1_root proc_sysrq
        proc_kcore proc_keys proc_core_pattern proc_victim_mem proc_victim_root proc_victim_environ sys_read sys_cgroup
        fd_reopen fd_link connect_socket exec_sh""",
    # What there is cannot be changed.
    "EROFS": """
        write_root write_dev write_usr write_cwd tmpfile_root mkdir_root symlink_root mkfifo_root chmod_root chown_root
        mknod_null bind_path""",
    # There is nobody.
    "ESRCH": """
        see_any see_parent kill_victim prlimit_victim sched_victim nice_victim kcmp_victim pidfd_victim
        pidfd_getfd_victim pidfd_signal_victim vm_readv_victim vm_writev_victim ptrace_victim setns_victim""",
    # There is no privilege, and none to be had.
    "EPERM": """
        handle_open watch_fanotify fd_chmod socket_raw socket_packet bpf_map bpf_prog userfault host_name lock_memory
        clone_newpid raise_files raise_fsize raise_core raise_tasks realtime io_priority keep_caps securebits
        drop_bounding swap_on accounting reboot_wrong kernel_log chroot_root pivot mount_none mount_private umount_root
        fs_open open_tree_clone mount_move setns_self setfsuid_0 capset_admin setgroups_0 unshare_net unshare_pid
        unshare_mount""",
    "EACCES": "nice_up",
    # Nobody else exists in its user namespace.
    "EINVAL": "fd_chown setgid_0 setuid_0 setresuid_0 setuid_other",
    # It gets its share and no more.
    "EFBIG": "memfd_big fd_grow fd_truncate",
    "EMFILE": "mq many_fds",
    "ENOSPC": "clone_newuser unshare_user",
    "ENOMEM": "map_big",
    # There is no way out.
    "ENETUNREACH": "connect_inet",
    "ECONNREFUSED": "connect_abstract",
    "ENOTTY": "terminal tiocsti tioclinux",
    # One kernel lacks it, the next one refuses it, and some say so differently.
    "EPERM EACCES ENOSYS EAFNOSUPPORT EPROTONOSUPPORT ESOCKTNOSUPPORT ENOMEM EINVAL": """
        socket_ping socket_alg socket_key socket_xdp socket_can socket_bluetooth socket_tipc perf_system io_uring
        load_module load_module_fd unload_module kexec io_perm io_port x32_getpid""",
}

# What is refused twice: our filter speaks first, and says EPERM.
FILTERED_TOO = """
    mkfifo_root mknod_null handle_open watch_fanotify socket_raw socket_packet socket_ping socket_alg socket_key
    socket_xdp socket_can socket_bluetooth socket_tipc connect_inet connect_socket connect_abstract bind_path
    kcmp_victim vm_readv_victim vm_writev_victim ptrace_victim bpf_map bpf_prog perf_system io_uring userfault
    load_module load_module_fd unload_module kexec host_name clone_newpid clone_newuser swap_on accounting reboot_wrong
    kernel_log io_perm io_port x32_getpid chroot_root pivot mount_none mount_private umount_root fs_open
    open_tree_clone mount_move setns_self unshare_user unshare_net unshare_pid unshare_mount
"""

# Whatever a filter adds: without it, too, none of these may be permitted.
NEVER = """
    path_read path_write path_stat connect_socket connect_abstract connect_inet kill_victim ptrace_victim
    pidfd_getfd_victim pidfd_signal_victim vm_readv_victim vm_writev_victim proc_victim_mem proc_victim_root
    proc_victim_environ prlimit_victim setns_victim setuid_0 setresuid_0 setgid_0 setgroups_0 setuid_other capset_admin
    handle_open mount_none mknod_null
    dev_mem dev_kvm dev_tun load_module kexec bpf_prog socket_packet socket_raw
    fd_grow fd_truncate fd_chown fd_reopen
"""

# Tells of itself what only the process itself can ask.
WITNESS = r"""
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>
int main(void)
{
    unsigned long bounding = 0, ambient = 0;
    sigset_t blocked;
    for (int cap = 0; cap < 64; cap++) {
        bounding += prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1;
        ambient += prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1;
    }
    sigprocmask(SIG_SETMASK, 0, &blocked);
    printf("securebits %d\ndumpable %d\nno_new_privs %d\nbounding %lu\nambient %lu\nblocked %d\nend\n",
        prctl(PR_GET_SECUREBITS, 0, 0, 0, 0), prctl(PR_GET_DUMPABLE, 0, 0, 0, 0),
        prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), bounding, ambient, sigismember(&blocked, SIGTERM));
    fflush(stdout);
    for (;;)
        pause();
}
"""


LISTENER_FD = 20


def try_all(ground: Ground, program: str = "") -> dict[str, str]:
    """Return what comes of every act, with another live guest as the victim; the filter is the planner's, or this."""
    disk = ground.folder / "victims.img"
    disk.write_bytes(bytes(4096))
    name = f"depriv-{ground.folder.name}"
    other = ground.launch("--serve", disk=disk)
    with (
        running(other) as victim,
        socket.socket(socket.AF_UNIX) as listener,
        socket.create_server(("127.0.0.1", 0)) as tcp,
    ):
        assert victim.pid > 300  # a number that no process of the attacker's own namespace has
        listener.bind(f"\0{name}")
        listener.listen()
        # The disk of the other, by the very path; its monitor; a socket of the host without a path.
        words = ["--victim", str(victim.pid), "--path", str(disk), "--socket", f"{other.directory}/qmp"]
        words += ["--abstract", name, "--fd", str(DISK_FD), "--listener", str(LISTENER_FD)]
        launch = taking(ground.launch(*words), steps.TakeFd(role="vnc", source=tcp.fileno(), number=LISTENER_FD))
        with running(with_filter(launch, program) if program else launch) as attacker:
            result = build.outcomes(attacker.output())
        assert not victim.ended(0)
        assert disk.stat().st_size == 4096
        ground.forget(other)
    assert ground.disk.stat().st_size == 1 << 20
    return {act: outcome.result for act, outcome in result.items()}


def of_network(act: str) -> bool:
    """Tell whether an act is the filter's affair only while QEMU is not to make sockets."""
    return act.startswith(("socket_", "connect_", "bind_", "listener_")) and act != "socket_pair"


def table(*, spared: Callable[[str], bool] = lambda _: False) -> dict[str, str]:
    """Return act -> what may come of it; the filter leaves alone what is ``spared``."""
    want = {act: errnos for errnos, acts in REFUSED.items() for act in acts.split()}
    want |= dict.fromkeys((*PERMITTED, *FILTER_ALONE), "ok")
    own = dict.fromkeys((*FILTER_ALONE, *FILTERED_TOO.split()), "EPERM")
    own |= {"clone3_one": "ENOSYS", "int80_getpid": "killed"}
    return want | {act: errno for act, errno in own.items() if not spared(act)}


def differing(have: dict[str, str], want: dict[str, str]) -> dict[str, str]:
    assert have.keys() == want.keys()
    return {act: f"{have[act]}, not {want[act]}" for act in have if have[act] not in want[act].split()}


def test_attacker_in_the_jail_is_refused_all_that_is_not_listed(ground: Ground) -> None:
    assert differing(try_all(ground), table()) == {}


def test_what_the_filter_has_no_part_in_is_refused_without_it(ground: Ground) -> None:
    """Namespaces, root, ids, limits: each holds by itself, and what hangs by the filter alone is known."""
    assert differing(try_all(ground, ALLOW_ALL), table(spared=lambda _: True)) == {}


def test_network_namespace_is_a_wall_of_its_own(ground: Ground) -> None:
    """With the filter of a QEMU in the host's network, but in a network namespace: nothing of the host is reached.

    But for a socket that was made in the host's: a listener that is handed in is why the filter has to be.
    """
    program = seccomp.program(os.uname().machine, network=True)
    have = try_all(ground, program)
    assert differing(have, table(spared=of_network)) == {}
    reached = {act for act in have if act.startswith(("connect_", "listener_")) and have[act] == "ok"}
    assert reached == {"listener_connect", "listener_sendto", "listener_sendmsg", "listener_sendmmsg"}


def test_every_act_of_the_catalogue_is_in_one_list_only() -> None:
    acts = [act for group in REFUSED.values() for act in group.split()] + [*PERMITTED, *FILTER_ALONE]
    assert len(acts) == len(set(acts))
    assert set(FILTERED_TOO.split()) <= {act for group in REFUSED.values() for act in group.split()}
    assert all(PERMITTED.values())
    assert all(FILTER_ALONE.values())


def test_what_reaches_the_host_or_others_is_permitted_by_no_other_layer_either() -> None:
    assert set(NEVER.split()) & (PERMITTED.keys() | FILTER_ALONE.keys()) == set()
    assert set(NEVER.split()) <= table().keys()


def test_most_refusals_are_of_what_root_may_do() -> None:
    refused = table().keys() - PERMITTED.keys()
    assert len(refused & set(ROOT_MAY.split())) >= 80
    # Every act that takes a victim, a path, a descriptor or an id is among those that succeed unconfined.
    assert {act for act in NEVER.split() if act not in ROOT_MAY.split()} <= {
        *("connect_abstract", "connect_inet", "dev_mem", "dev_kvm", "dev_tun", "load_module", "kexec", "bpf_prog")
    }


@pytest.fixture
def witness(ground: Ground) -> dict[str, int]:
    """What a program in QEMU's place finds out about itself."""
    source = ground.folder / "witness.c"
    source.write_text(WITNESS)
    ground.program = ground.folder / "witness"
    subprocess.run([*build.COMPILER, "-o", ground.program, source], check=True, timeout=60)
    launch = ground.launch()
    with running(launch) as started:
        assert wait_for(lambda: "end\n" in started.log.raw())
        said = started.log.raw()
    ground.forget(launch)
    return {name: int(value) for name, value in re.findall(r"(\w+) (\d+)", said)}


def test_process_in_the_jail_can_never_gain_a_privilege(witness: dict[str, int]) -> None:
    assert witness["no_new_privs"] == 1
    assert (witness["bounding"], witness["ambient"]) == (0, 0)
    # NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE, each with its lock, and the lock of KEEP_CAPS.
    assert witness["securebits"] == 0b11101111
    assert witness["dumpable"] in (0, 2)  # 2: root only, where fs.suid_dumpable says so
    assert witness["blocked"] == 0


def test_kernel_shows_one_uid_no_group_no_capability_and_an_empty_map(ground: Ground) -> None:
    launch = ground.launch("--serve")
    uid = launch.identity.uid
    with running(launch) as started:
        status = read_status(started.pid)
        assert status["Uid"].split() == [str(uid)] * 4
        assert status["Gid"].split() == [str(launch.identity.gid)] * 4
        assert status["Groups"].split() == []
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == "1"
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{started.pid}/{name}", encoding="ascii") as file:
                assert file.read().split() == [str(uid), str(uid), "1"]
        assert os.stat(f"/proc/{started.pid}/environ").st_uid == 0  # the kernel's way to say: not dumpable
    ground.forget(launch)


def as_uid(uid: int, program: Path, *words: str) -> dict[str, build.Outcome]:
    """Return what comes of acts on the host itself, with nothing but another uid between attacker and victim."""
    fd = os.open(program, os.O_RDONLY | os.O_CLOEXEC)
    try:
        argv = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", f"/proc/self/fd/{fd}", *words]
        done = subprocess.run(argv, pass_fds=(fd,), check=True, capture_output=True, text=True, timeout=60, cwd="/")
    finally:
        os.close(fd)
    return build.outcomes(done.stdout)


ON_ANOTHER = """
    kill_victim ptrace_victim pidfd_getfd_victim pidfd_signal_victim vm_readv_victim vm_writev_victim proc_victim_mem
    proc_victim_root proc_victim_environ prlimit_victim sched_victim nice_victim kcmp_victim setns_victim path_read
    path_write path_stat connect_socket
"""


def test_uid_alone_keeps_two_guests_apart(ground: Ground) -> None:
    """Were every namespace gone: neither can signal, trace, look into or open what is the other's."""
    first, second = ground.launch("--serve"), ground.launch("--serve", disk=ground.kernel)
    with running(first) as one, running(second) as two:

        def try_all(launch: object, uid: int, victim: Running, disk: Path) -> dict[str, str]:
            directory = getattr(launch, "directory", "")
            words = ["--victim", str(victim.pid), "--path", str(disk), "--socket", f"{directory}/qmp", "--only"]
            found = as_uid(uid, ground.program, *words, *ON_ANOTHER.split())
            return {act: outcome.result for act, outcome in found.items() if outcome.result not in ("EPERM", "EACCES")}

        assert try_all(first, second.identity.uid, one, ground.disk) == {}
        assert try_all(second, first.identity.uid, two, ground.kernel) == {}
        # Its real uid alone gives the reaper nothing: what it may, it may by the effective one.
        assert as_uid(REAPER_UID, ground.program, "--victim", str(one.pid), "--only", "kill_victim")[
            "kill_victim"
        ].result == ("EPERM")
        assert not one.ended(0)
        assert not two.ended(0)
    ground.forget(first)
    ground.forget(second)


def test_fork_bomb_does_not_begin(ground: Ground) -> None:
    launch = ground.launch("--bomb", "5000")
    with running(launch) as started:
        assert wait_for(lambda: "\n" in started.log.raw())
        assert started.log.raw().split() == ["bomb", "0", "EPERM"]
        assert len(ground.snapshot().processes) == 1
    ground.forget(launch)


def test_fork_bomb_that_no_filter_stops_ends_at_the_limit_and_with_its_first_process(ground: Ground) -> None:
    launch = with_filter(ground.launch("--bomb", "5000"))
    with running(launch) as started:
        assert wait_for(lambda: "\n" in started.log.raw())
        _, count, result = started.log.raw().split()
        assert result == "EAGAIN"
        assert int(count) < 100
        assert len(ground.snapshot().processes) == int(count) + 1
    assert ground.snapshot().processes == ()
    ground.forget(launch)
