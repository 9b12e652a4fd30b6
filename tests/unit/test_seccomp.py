# SPDX-License-Identifier: Apache-2.0
"""The filter, executed call by call: what it denies is what is listed here, by the numbers of the kernel's headers."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from functools import cache

import pytest
from tests.support import host

from depriv import seccomp
from depriv.errors import PlanError
from depriv.seccomp import program

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*, <linux/audit.h>
FOREIGN = {"i386": 0x40000003, "arm": 0x40000028, "riscv64": 0xC00000F3, "none": 0}
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
NUMBERS = range(1024)  # Linux 6.1 ends at 450
MSG_FASTOPEN = 0x20000000
SEND_FLAGS = {"sendto": 3, "sendmsg": 2, "sendmmsg": 3}  # which argument, see send(2), sendmmsg(2)

NETWORK = {"socket", "connect", "bind"}
DENIED = """
    acct add_key bpf chroot delete_module execveat fanotify_init finit_module fork fsconfig fsmount fsopen fspick
    init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl
    memfd_secret mknod mknodat modify_ldt mount mount_setattr move_mount move_pages name_to_handle_at open_by_handle_at
    open_tree perf_event_open personality pidfd_getfd pivot_root process_madvise process_mrelease process_vm_readv
    process_vm_writev ptrace quotactl quotactl_fd reboot request_key setdomainname sethostname setns swapoff swapon
    syslog umount2 unshare userfaultfd vfork vhangup
"""
# Not on aarch64: older spellings, and what x86 alone has.
X86_ONLY = {"fork", "ioperm", "iopl", "mknod", "modify_ldt", "vfork"}


@cache
def header(processor: str) -> dict[str, int]:
    """Return name -> number as the kernel's headers on this machine have it."""
    host.need(shutil.which("gcc") is not None, what="gcc")
    if processor == "x86_64":
        host.need(os.uname().machine == "x86_64", what="x86_64")
        words = ["-include", "asm/unistd_64.h"]
    else:  # what arch/arm64/include/uapi/asm/unistd.h defines before it includes the generic one
        words = ["-D__BITS_PER_LONG=64", "-D__ARCH_WANT_SYS_CLONE3", "-D__ARCH_WANT_MEMFD_SECRET"]
        words += ["-include", "asm-generic/unistd.h"]
    argv = ["gcc", "-E", "-dM", "-xc", *words, "/dev/null"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30)
    macros = dict(line.split()[1:3] for line in done.stdout.splitlines() if len(line.split()) >= 3)
    found: dict[str, int] = {}
    for name, value in macros.items():
        if name.startswith(("__NR_", "__NR3264_")):
            text = macros.get(value, value)  # __NR_lseek is __NR3264_lseek
            if text.isdigit():
                found[name.partition("_")[2].split("_", 2)[-1]] = int(text)
    return found


def instructions(text: str) -> list[tuple[int, int, int, int]]:
    """Return code, jt, jf and k of each struct sock_filter."""
    return list(struct.iter_unpack("<HBBI", bytes.fromhex(text)))


def verdict(text: str, number: int, arch: int, arguments: tuple[int, ...] = ()) -> int:
    """Return what the filter says of one call, as the kernel executes it (kernel/seccomp.c, net/core/filter.c)."""
    words = [*arguments, *(0,) * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, arch, 0, *words)  # struct seccomp_data
    code = instructions(text)
    place, loaded = 0, 0
    while True:
        operation, yes, no, value = code[place]
        place += 1
        if operation == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            (loaded,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:  # BPF_RET | BPF_K
            return value
        else:  # BPF_JMP | BPF_K | one of these
            true = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[operation]
            place += yes if true else no


def of(processor: str, call: str, *arguments: int, network: bool = False) -> int:
    return verdict(program(processor, network=network), header(processor)[call], ARCH[processor], arguments)


BOTH = pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
EITHER = pytest.mark.parametrize("network", [False, True])


@BOTH
def test_numbers_are_those_of_the_kernels_headers(processor: str) -> None:
    column = list(ARCH).index(processor)
    tables = (seccomp._NETWORK, seccomp._NEVER, seccomp._SPAWN, seccomp._SEND)
    named = {name: numbers[column] for table in tables for name, numbers in table.items()}
    named |= {"clone": seccomp._CLONE[column], "clone3": seccomp._CLONE3[column]}
    assert {name: header(processor).get(name, -1) for name in named} == named


@BOTH
@EITHER
def test_what_is_listed_is_refused_and_every_other_number_passes(processor: str, *, network: bool) -> None:
    names = set(DENIED.split()) | (set() if network else NETWORK)
    missing = {name for name in names if name not in header(processor)}
    assert missing == (X86_ONLY if processor == "aarch64" else set())
    want = {header(processor)[name]: EPERM for name in names - missing}
    want |= {header(processor)["clone"]: EPERM, header(processor)["clone3"]: ENOSYS}  # with no flag: a process
    text = program(processor, network=network)
    have = {number: verdict(text, number, ARCH[processor]) for number in NUMBERS}
    assert have == {number: want.get(number, ALLOW) for number in NUMBERS}


@BOTH
def test_network_is_all_that_network_adds(processor: str) -> None:
    for flags in (0, MSG_FASTOPEN, 0xFFFFFFFF):
        texts = [program(processor, network=network) for network in (False, True)]
        closed, opened = ([verdict(text, n, ARCH[processor], (flags,) * 6) for n in NUMBERS] for text in texts)
        differs = {n for n in NUMBERS if closed[n] != opened[n]}
        names = NETWORK | (set(SEND_FLAGS) if flags else set())
        assert differs == {header(processor)[name] for name in names}
        assert {opened[n] for n in differs} == {ALLOW}


@BOTH
@EITHER
@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (0x003D0F00, ALLOW),  # pthread_create of glibc
        (0x00010000, ALLOW),  # CLONE_THREAD; the kernel demands CLONE_SIGHAND and CLONE_VM with it
        (0xDEAD_0000_003D_0F00, ALLOW),  # the kernel reads the lower half only
        (0x01200011, EPERM),  # fork of glibc
        (0x00004111, EPERM),  # vfork
        (0x10000011, EPERM),  # with CLONE_NEWUSER
        (0xFFFE_FFFF, EPERM),  # everything but a thread
        (0x0001_0000_0000_0011, EPERM),  # that bit in the upper half, where it means nothing
    ],
)
def test_clone_makes_threads_and_no_process(processor: str, flags: int, want: int, *, network: bool) -> None:
    assert of(processor, "clone", flags, network=network) == want


@BOTH
@pytest.mark.parametrize("size", [0, 64, 88, 1 << 20])
def test_clone3_is_said_to_be_lacking_whatever_it_asks_for(processor: str, size: int) -> None:
    """Its flags are behind a pointer. EPERM would end glibc's pthread_create; after ENOSYS it takes clone."""
    for flags in (0, 0x003D0F00, 0xFFFFFFFF):
        assert of(processor, "clone3", flags, size) == ENOSYS


@BOTH
@pytest.mark.parametrize("call", SEND_FLAGS)
def test_sending_is_free_but_for_the_flag_that_connects(processor: str, call: str) -> None:
    def sent(flags: int, elsewhere: int = 0) -> int:
        words = [elsewhere] * 6
        words[SEND_FLAGS[call]] = flags
        return of(processor, call, *words)

    for flags in (0, 0x4000, 0x40, 0x4040, 0xDFFF_FFFF, MSG_FASTOPEN << 32):  # MSG_NOSIGNAL, MSG_DONTWAIT
        assert sent(flags) == ALLOW
        assert sent(flags, elsewhere=MSG_FASTOPEN) == ALLOW  # a length or a pointer of that value
    for flags in (MSG_FASTOPEN, MSG_FASTOPEN | 0x4000, 0xFFFF_FFFF, 0xFFFF_FFFF_2000_0000):
        assert sent(flags) == EPERM


@EITHER
def test_calls_of_x32_are_refused_all_of_them(*, network: bool) -> None:
    text = program("x86_64", network=network)
    numbers = [0x40000000 + number for number in NUMBERS] + [0x40000000 + 512 + 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    assert {verdict(text, number, ARCH["x86_64"], (0x003D0F00,)) for number in numbers} == {EPERM}
    assert verdict(text, 0x3FFFFFFF, ARCH["x86_64"]) == ALLOW  # no such call: the kernel says so


@BOTH
@EITHER
def test_call_by_another_processors_numbers_ends_the_process(processor: str, *, network: bool) -> None:
    """int $0x80 on x86_64, 32-bit programs on either: the same number is another call there."""
    text = program(processor, network=network)
    others = [arch for name, arch in (*ARCH.items(), *FOREIGN.items()) if name != processor]
    assert {verdict(text, number, arch, (0x003D0F00,)) for number in NUMBERS for arch in others} == {KILL}


@BOTH
@EITHER
def test_program_is_one_that_the_kernel_takes(processor: str, *, network: bool) -> None:
    """Every jump lands inside, every load is of a whole word of struct seccomp_data, the end is a return."""
    code = instructions(program(processor, network=network))
    assert len(code) < 256  # a jump has 8 bits; the kernel allows 4096
    for place, (operation, yes, no, value) in enumerate(code):
        assert operation in {0x20, 0x15, 0x35, 0x45, 0x06}
        assert place + 1 + max(yes, no) < len(code) or operation == 0x06
        if operation == 0x20:
            assert value % 4 == 0
            assert value < 64
    assert code[-1][0] == 0x06


@pytest.mark.parametrize("processor", ["", "i686", "armv7l", "riscv64", "X86_64", "x86_64 "])
def test_processor_whose_numbers_are_unknown_is_refused_and_never_left_without_a_filter(processor: str) -> None:
    with pytest.raises(PlanError, match="no system call filter is known") as caught:
        program(processor, network=False)
    assert "x86_64" in caught.value.fix
