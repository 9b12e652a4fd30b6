# SPDX-License-Identifier: Apache-2.0
"""What planning may know about the host: facts, read by :mod:`depriv.detect` or from a recorded file. Pure."""

from __future__ import annotations

from depriv.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.identity import Accounts

STATE_DIR = "/run/depriv"
CACHE_DIR = "/var/cache/depriv"


class Program(Record):
    """The QEMU binary: where it is, and which one exactly."""

    path: str  # with symbolic links resolved
    dev: int = 0
    ino: int = 0
    size: int = 0
    mtime_ns: int = 0
    seccomp: bool = True  # built with libseccomp; looked at on Xen only, where Debian's is not
    problem: str = ""  # why it cannot be used; "" if nothing is known against it


class FileFacts(Record):
    """One file that the configuration names, looked at without being changed."""

    path: str
    kind: str  # "file", "block", "char", "fifo", "socket", "directory", "symlink", "missing", "unreadable"
    dev: int = 0
    ino: int = 0
    rdev: int = 0
    size: int = 0  # bytes; of a block device its capacity
    detail: str = ""  # of "missing" and "unreadable": the reason; of "symlink": where it leads
    unread: bool = False  # we may look at it but not into it: what follows is not known
    magic: str = ""  # "qcow2", "qcow", "vmdk", "vhd", "qed", "luks", "bzimage", "elf", "multiboot" or ""
    format: str = ""  # of an image, as QEMU itself would guess it: "raw", "qcow2", "vpc", ...
    virtual_size: int = 0  # qcow2: bytes that the guest sees
    cluster_size: int = 0  # qcow2
    backing: str = ""  # qcow2: backing file named in the header; never followed
    data_file: bool = False  # qcow2: an external data file is named
    encrypted: bool = False  # qcow2: needs a key


class Holding(Record):
    """A domain that exists, and what it holds."""

    name: str
    domid: int
    uid: int
    gid: int
    images: tuple[tuple[int, int, int, bool], ...] = ()  # st_dev, st_ino, st_rdev, writable
    name_free: bool = False  # another may have its name: its own end was asked for, and does not come


class Host(Record):
    """The facts of one host at one moment."""

    root: bool
    program: Program
    accounts: Accounts
    files: tuple[FileFacts, ...] = ()
    holdings: tuple[Holding, ...] = ()
    strangers: tuple[int, ...] = ()  # processes of the user that device_model_user names, no domain's
    domid: int = 1  # the next free one
    memory_mib: int = 0  # total; 0: not known
    cpus: int = 1
    processor: str = "x86_64"  # as uname(2) has it
    kvm: bool = False  # hardware virtualisation that can run a guest
    kvm_node: tuple[int, int] = (0, 0)  # device number of /dev/kvm; 0, 0: there is none
    xen: bool = False
    xen_nodes: tuple[tuple[str, int, int], ...] = ()  # what is in /dev/xen: name, major, minor
    ovmf: str = ""  # OVMF image with code and variables in one file; "": none is installed
    cgroup_dir: str = ""  # where domains get their cgroups; "": no cgroup file system is mounted
    cgroup_folder: str = "depriv"  # the registry's folder in there
    cgroup_version: int = 2
    root_dirs: tuple[str, ...] = ("usr",)  # top-level folders that a program's files lie in
    root_links: tuple[tuple[str, str], ...] = ()  # top-level symbolic links of the host: name, target
    utc_offset_s: int = 0
    state_dir: str = STATE_DIR
    cache_dir: str = CACHE_DIR

    def file(self, path: str) -> FileFacts:
        """Return the facts of one file; one that was not looked at is missing."""
        for facts in self.files:
            if facts.path == path:
                return facts
        return FileFacts(path=path, kind="missing", detail="not looked at")


def unfit(facts: FileFacts, want: str) -> tuple[str, str]:
    """Return why a file of the wrong kind cannot be used, and what to do about it. ``want`` is the kind that can."""
    causes = {
        "missing": ("it does not exist", "make it, or correct the path"),
        "unreadable": (facts.detail or "it cannot be read", "correct the path, or what keeps root from reading it"),
        "symlink": (
            f"it is a symbolic link to {facts.detail}; a link could be pointed elsewhere between check and use",
            f"name the file itself: {facts.detail}",
        ),
        "directory": ("it is a directory", "name a file in it"),
        "fifo": ("it is a FIFO", "name a regular file or a block device"),
        "socket": ("it is a socket", "name a regular file or a block device"),
        "char": ("it is a character device", "name a regular file or a block device"),
        "block": ("it is a block device", "name a regular file"),
        "file": ("it is a regular file", f"name {want}"),
    }
    return causes.get(facts.kind, (f"it is of kind {facts.kind}", f"name {want}"))
