# SPDX-License-Identifier: Apache-2.0
"""Read the host into facts. Changes nothing, needs no root, follows no link of an image's path."""

from __future__ import annotations

import os
import stat
import time

from depriv.accounts import accounts_for
from depriv.cgroup import find_cgroup, folder_name
from depriv.host import CACHE_DIR, STATE_DIR, FileFacts, Host, Program
from depriv.proc import processes_of
from depriv.qemu.probing import format_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.config import Domain
    from depriv.host import Holding
    from depriv.identity import Accounts

_PROGRAMS = ("/usr/local/bin/qemu-system-x86_64", "/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm")
# Debian and Ubuntu; Fedora and RHEL; Arch. Code and variables in one file, as -bios takes it.
_OVMF = ("/usr/share/ovmf/OVMF.fd", "/usr/share/edk2/ovmf/OVMF.fd", "/usr/share/edk2/x64/OVMF.4m.fd")
_MAGIC = (
    (b"QFI\xfb\x00\x00\x00\x01", "qcow"),
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"conectix", "vhd"),
    (b"vhdxfile", "vhdx"),
    (b"QED\x00", "qed"),
    (b"LUKS\xba\xbe", "luks"),
    (b"\x7fELF", "elf"),
)
_TEXT_BYTES_MAX = 1 << 20
_OFFSET_MAX = 1 << 62  # of what can be read at all: pread(2) takes 63 bits
_QCOW2_DATA_FILE = 0x44415441  # docs/interop/qcow2.txt, QEMU 7.2: header extension type


def look(
    config: Domain,
    *,
    domid: int,
    holdings: tuple[Holding, ...],
    state_dir: str = STATE_DIR,
    cache_dir: str = CACHE_DIR,
) -> Host:
    """Return the facts that planning ``config`` as domain ``domid`` needs."""
    paths = [config.kernel, config.ramdisk, config.firmware]
    for disk in config.disks:
        paths += [disk.target, *(layer.target for layer in disk.chain)]
    ovmf = next((path for path in _OVMF if os.path.exists(path)), "") if config.bios == "ovmf" else ""
    paths.append(ovmf)
    host = look_host(
        program=config.device_model_override, device_model_user=config.device_model_user, domid=domid, holdings=holdings
    )
    return host.replace(
        files=tuple(look_at(path) for path in dict.fromkeys(filter(None, paths))),
        ovmf=ovmf,
        cgroup_folder=folder_name(state_dir),
        state_dir=state_dir,
        cache_dir=cache_dir,
    )


def look_host(*, program: str, device_model_user: str, domid: int, holdings: tuple[Holding, ...]) -> Host:
    """Return the facts that do not depend on what is started; ``program`` "" is the host's own QEMU."""
    found = find_program(program)
    dirs, links = root_layout(found.path)
    cgroup, version = find_cgroup()
    accounts = accounts_for(device_model_user=device_model_user, domid=domid)
    return Host(
        root=os.geteuid() == 0,
        program=found,
        accounts=accounts,
        strangers=_strangers(device_model_user, accounts),
        holdings=holdings,
        domid=domid,
        memory_mib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        cpus=os.cpu_count() or 1,
        processor=os.uname().machine,
        kvm=has_virtualisation(),
        kvm_node=device_number("/dev/kvm"),
        xen=os.path.exists("/proc/xen/capabilities"),
        cgroup_dir=cgroup,
        cgroup_version=version,
        root_dirs=dirs,
        root_links=links,
        utc_offset_s=time.localtime().tm_gmtoff,
    )


def _strangers(name: str, accounts: Accounts) -> tuple[int, ...]:
    """Return the processes that run as a user by name; nobody runs as a uid of the range but a domain."""
    uid = next((user.uid for user in accounts.users if user.name == name), 0) if name else 0
    return tuple(process.pid for process in processes_of(uid=uid)) if uid else ()


def find_program(override: str) -> Program:
    """Return which QEMU would be executed, links resolved, and what is known against it."""
    candidates = (override,) if override else _PROGRAMS
    found = next((path for path in candidates if os.path.exists(path)), "")
    if not found:
        where = override or "qemu-system-x86_64"
        return Program(path=override or _PROGRAMS[1], problem=f"there is no {where} on this host")
    path = _behind_wrapper(os.path.realpath(found))
    try:
        have = os.stat(path)
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        return Program(path=path, problem=str(error))
    problem = ""
    if not stat.S_ISREG(have.st_mode) or not have.st_mode & 0o111:
        problem = f"{path} is not an executable file"
    elif head != b"\x7fELF":
        problem = f"{path} is not a program but a script or data: name the emulator itself"
    return Program(
        path=path, dev=have.st_dev, ino=have.st_ino, size=have.st_size, mtime_ns=have.st_mtime_ns, problem=problem
    )


def _behind_wrapper(path: str) -> str:
    """Return the emulator that Debian 12's script of that name starts for who is not Xen; of all others the path.

    Source: /usr/bin/qemu-system-i386 of qemu-system-x86 1:7.2+dfsg-7.
    """
    real = f"/usr/libexec/{os.path.basename(path)}"
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError:
        return path
    return real if head.startswith(b"#!") and f"\nexe={real}\n".encode() in head else path


def find_in_path(name: str) -> str:
    """Return the path of a program as a shell would find it, or ``name`` itself if it has a slash in it."""
    if "/" in name:
        return name if name.startswith("/") else f"{os.getcwd()}/{name}"
    for folder in os.environ.get("PATH", os.defpath).split(":"):
        path = f"{folder or '.'}/{name}"
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    return f"/usr/bin/{name}"  # not there: the error says so


def read_text(path: str) -> str:
    """Return the text of a small file of the caller's.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or too large to be what it should be.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        data = os.read(fd, _TEXT_BYTES_MAX + 1) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)
    if data is None or len(data) > _TEXT_BYTES_MAX:
        raise ValueError(f"{path} is no regular file" if data is None else f"{path} is too large")
    return data.decode("utf-8", "surrogateescape")


def has_seccomp(path: str) -> bool:
    """Tell whether a QEMU is built with libseccomp: without it, it refuses -sandbox. Read: asking it takes long."""
    try:
        with open(path, "rb") as file:
            return b"libseccomp.so" in file.read()
    except OSError:
        return True


def all_programs() -> tuple[str, ...]:
    """Return the paths of all system emulators in /usr/bin."""
    names = (name for name in sorted(os.listdir("/usr/bin")) if name.startswith("qemu-system-"))
    return tuple(f"/usr/bin/{name}" for name in names if os.access(f"/usr/bin/{name}", os.X_OK))


def find_tool(name: str) -> str:
    """Return the path of a tool of the system, or ""."""
    candidates = (f"/usr/bin/{name}", f"/usr/sbin/{name}", f"/usr/local/bin/{name}")
    return next((path for path in candidates if os.access(path, os.X_OK)), "")


def fastest_build(path: str) -> str:
    """Return the build for this processor that lies beside a program, as passt's for AVX2 does, or the program."""
    build = f"{path}.avx2"
    if not os.access(build, os.X_OK):
        return path
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        flags = next((line for line in file if line.startswith("flags")), "")
    return build if "avx2" in flags.split() else path


def root_layout(program: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return which top-level folders the program's files lie in, and which top-level names are links to them."""
    dirs: list[str] = []
    links: list[tuple[str, str]] = []
    for name in dict.fromkeys((program.split("/")[1], "usr", "lib", "lib64")):
        try:
            links.append((name, os.readlink("/" + name)))
        except FileNotFoundError:
            continue
        except OSError:
            dirs.append(name)
    return tuple(dirs), tuple(links)


def has_virtualisation() -> bool:
    """Tell whether the processor has VMX or SVM: /dev/kvm can be there, and open, where no guest code runs."""
    try:
        with open("/proc/cpuinfo", "rb") as file:
            flags = file.read(16384).partition(b"\nflags")[2].partition(b"\n")[0].split()
    except OSError:
        return False
    return b"vmx" in flags or b"svm" in flags


def device_number(path: str) -> tuple[int, int]:
    """Return major and minor of a character device; 0, 0 if there is none."""
    try:
        have = os.lstat(path)
    except OSError:
        return (0, 0)
    return (os.major(have.st_rdev), os.minor(have.st_rdev)) if stat.S_ISCHR(have.st_mode) else (0, 0)


def look_at(path: str) -> FileFacts:
    """Return the facts of one file, its image header included. Opens without following a link and without waiting."""
    try:
        have = os.lstat(path)
    except FileNotFoundError:
        return FileFacts(path=path, kind="missing", detail="no such file")
    except OSError as error:
        return FileFacts(path=path, kind="unreadable", detail=f"{error.strerror}: {path}")
    mode = have.st_mode
    if stat.S_ISLNK(mode):
        return FileFacts(path=path, kind="symlink", detail=os.path.realpath(path))
    for test, kind in (
        (stat.S_ISDIR, "directory"),
        (stat.S_ISFIFO, "fifo"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "char"),
    ):
        if test(mode):
            return FileFacts(path=path, kind=kind)
    return _open_and_look(path, have)


def _open_and_look(path: str, have: os.stat_result) -> FileFacts:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except PermissionError:
        # Root reads it; a plan that somebody else asks for shows what can be known.
        kind = "block" if stat.S_ISBLK(have.st_mode) else "file"
        return FileFacts(
            path=path, kind=kind, dev=have.st_dev, ino=have.st_ino, rdev=have.st_rdev, size=have.st_size, unread=True
        )
    except OSError as error:
        return FileFacts(path=path, kind="unreadable", detail=f"{error.strerror}: {path}")
    try:
        return _look_inside(path, fd)
    finally:
        os.close(fd)


def _look_inside(path: str, fd: int) -> FileFacts:
    have = os.fstat(fd)
    block = stat.S_ISBLK(have.st_mode)
    head = os.pread(fd, 65536, 0)
    magic = next((name for start, name in _MAGIC if head.startswith(start)), "")
    if magic == "elf" and b"\x02\xb0\xad\x1b" in head[:8192]:
        magic = "multiboot"  # such a kernel QEMU loads by another ROM; Multiboot specification 0.6.96, 3.1
    if not magic and head[0x202:0x206] == b"HdrS":
        magic = "bzimage"  # Documentation/arch/x86/boot.rst
    facts = FileFacts(
        path=path,
        kind="block" if block else "file",
        dev=have.st_dev,
        ino=have.st_ino,
        rdev=have.st_rdev,
        size=os.lseek(fd, 0, os.SEEK_END) if block else have.st_size,
        magic=magic,
        format=format_of(head),
    )
    return _qcow2(facts, fd, head) if magic == "qcow2" else facts


def _qcow2(facts: FileFacts, fd: int, head: bytes) -> FileFacts:
    """Add what a qcow2 header says; everything in it is an attacker's word, used only to refuse."""
    import struct  # noqa: PLC0415 (only guests with qcow2 images pay for it)

    if len(head) < 104:
        return facts.replace(magic="")
    version, at, length, bits, size, crypt = struct.unpack_from(">IQIIQI", head, 4)
    header = struct.unpack_from(">I", head, 100)[0] if version >= 3 else 72
    incompatible = struct.unpack_from(">Q", head, 72)[0] if version >= 3 else 0
    named = length and 0 < at < _OFFSET_MAX
    backing = os.pread(fd, min(length, 1023), at).decode("utf-8", "backslashreplace") if named else ""
    data_file = bool(incompatible & 4)
    while header + 8 <= len(head):
        kind, extent = struct.unpack_from(">II", head, header)
        if kind == 0:
            break
        data_file = data_file or kind == _QCOW2_DATA_FILE
        header += 8 + (extent + 7) // 8 * 8
    return facts.replace(
        virtual_size=size,
        cluster_size=1 << min(bits, 30),
        backing=backing or ("(a name we cannot read)" if at else ""),
        data_file=data_file,
        encrypted=crypt != 0,
    )
