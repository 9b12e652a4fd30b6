# SPDX-License-Identifier: Apache-2.0
"""`depriv doctor`: whether this host can confine a device model, and what to do where it cannot.

Features are tried or looked up, never concluded from a version. Everything can be read without root; nothing on the
host is changed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil

from depriv import xenstore
from depriv.accounts import ETC, accounts_for
from depriv.errors import DeprivError
from depriv.identity import DOMID_FIRST, RANGE_BASE, choose, find_user, move_range_fix, range_problems
from depriv.records import Record

# <asm/unistd.h>: these have one number on every architecture but alpha.
_SYS_OPEN_TREE = 428
_SYS_MOUNT_SETATTR = 442

# <linux/capability.h>: what making a jail takes.
_CAPABILITIES = {"CAP_CHOWN": 0, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_SYS_ADMIN": 21}

# Name in /proc/self/ns -> name in /proc/sys/user; namespaces(7).
_NAMESPACES = {"mnt": "mnt", "ipc": "ipc", "net": "net", "pid": "pid", "uts": "uts", "cgroup": "cgroup"}
_SECCOMP_ACTIONS = ("kill_process", "errno")
_KERNEL_FIX = "boot a kernel with {}"


class Finding(Record):
    """One thing the host has or lacks."""

    id: str
    ok: bool
    have: str  # what was found
    fix: str = ""  # the command or the change that helps; "" if ok
    needed: bool = True  # False: depriv works without it


def diagnose(*, proc: str = "/proc", dev: str = "/dev", etc: str = ETC) -> tuple[Finding, ...]:
    """Return what this host has and lacks, the needed things first.

    Raises nothing for what is missing: that is a finding.
    """
    findings = (
        find_root(),
        find_capabilities(proc),
        *find_namespaces(proc),
        find_seccomp(proc),
        find_pidfd(),
        *find_mount_calls(),
        *find_cgroup(proc),
        find_qemu(),
        *find_users(etc),
        find_writable("run", "/run"),
        find_writable("cache", "/var/cache"),
        find_kvm(proc, dev),
        find_tun(dev),
    )
    if xenstore.is_dom0():
        from depriv import xendoctor  # noqa: PLC0415 (on Xen only)

        # There guests are started by xl with Xen's own QEMU; another one is of no use.
        findings = tuple(finding for finding in findings if finding.id not in ("qemu", "kvm"))
        findings += tuple(Finding(**found.as_dict()) for found in xendoctor.findings())
    return tuple(sorted(findings, key=lambda finding: not finding.needed))


def is_fit(findings: tuple[Finding, ...]) -> bool:
    """Tell whether nothing needed is missing."""
    return all(finding.ok or not finding.needed for finding in findings)


def to_json(findings: tuple[Finding, ...]) -> str:
    """Return the findings as one JSON document."""
    return json.dumps({"fit": is_fit(findings), "findings": [finding.as_dict() for finding in findings]}, indent=2)


def to_text(findings: tuple[Finding, ...]) -> str:
    """Return the findings for people: one line each, and the fix below what is missing."""
    width = max((len(finding.id) for finding in findings), default=0)
    lines: list[str] = []
    for finding in findings:
        word = "ok" if finding.ok else "MISSING" if finding.needed else "without"
        lines.append(f"{word:<8} {finding.id:<{width}}  {finding.have}")
        if not finding.ok and finding.fix:
            lines += [f"{'':<8} {'':<{width}}  fix: {line}" for line in finding.fix.splitlines()]
    lines.append("" if is_fit(findings) else "This host cannot confine a device model yet.")
    return "\n".join(lines).rstrip("\n")


def find_root() -> Finding:
    """Tell whether we are root."""
    uid = os.geteuid()
    have = "root" if uid == 0 else f"not root (uid {uid})"
    return Finding(id="root", ok=uid == 0, have=have, fix="" if uid == 0 else "sudo depriv doctor")


def find_capabilities(proc: str) -> Finding:
    """Tell whether root here has what a jail takes: in a container it may lack it."""
    effective = int(_status(proc, "CapEff") or "0", 16)
    missing = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    return Finding(
        id="capabilities",
        ok=not missing,
        have=f"without {', '.join(missing)}" if missing else "all that a jail takes",
        fix="run it as root, outside of an unprivileged container" if missing else "",
    )


def find_namespaces(proc: str) -> tuple[Finding, ...]:
    """Tell for each namespace of a jail whether the kernel has it and lets one be made."""
    return tuple(_namespace(proc, name, limit) for name, limit in _NAMESPACES.items())


def _namespace(proc: str, name: str, limit: str) -> Finding:
    """Look at one kind of namespace. Source: namespaces(7), max_*_namespaces."""
    key = f"namespace-{name}"
    if not os.path.lexists(f"{proc}/self/ns/{name}"):
        option = "CONFIG_NAMESPACES=y and all its options"
        return Finding(id=key, ok=False, have="not in this kernel", fix=_KERNEL_FIX.format(option))
    allowed = _read(f"{proc}/sys/user/max_{limit}_namespaces").strip()
    if allowed.isdigit() and int(allowed) == 0:
        return Finding(
            id=key, ok=False, have="forbidden on this host", fix=f"sysctl -w user.max_{limit}_namespaces=1024"
        )
    return Finding(id=key, ok=True, have=f"up to {allowed}" if allowed else "in this kernel")


def find_seccomp(proc: str) -> Finding:
    """Tell whether a filter can kill the process and refuse a call. Source: seccomp(2), actions_avail."""
    path = f"{proc}/sys/kernel/seccomp/actions_avail"
    actions = _read(path).split()
    missing = [action for action in _SECCOMP_ACTIONS if action not in actions]
    return Finding(
        id="seccomp",
        ok=not missing,
        have=" ".join(actions) or f"no {path}",
        fix=_KERNEL_FIX.format("CONFIG_SECCOMP_FILTER=y") if missing else "",
    )


def find_pidfd() -> Finding:
    """Try pidfd_open(2) on ourselves."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        have = f"pidfd_open: {os.strerror(error.errno or 0)}"
        return Finding(id="pidfd", ok=False, have=have, fix=_KERNEL_FIX.format("pidfd_open (Linux 5.3)"))
    return Finding(id="pidfd", ok=True, have="pidfd_open works")


def find_mount_calls() -> tuple[Finding, ...]:
    """Try the mount calls with arguments that can do nothing. The jail can do without: it has mount(2)."""
    return (
        _call("open_tree", _SYS_OPEN_TREE, "Linux 5.2"),
        _call("mount_setattr", _SYS_MOUNT_SETATTR, "Linux 5.12"),
    )


def _call(name: str, number: int, since: str) -> Finding:
    """Call ``number`` with the descriptor -1, null pointers and zeros.

    The kernel then answers EFAULT or EBADF to open_tree and EINVAL to mount_setattr, whose size of 0 it looks at
    before the privilege (fs/namespace.c, Linux 5.12 and later); ENOSYS and EPERM come from a kernel without the
    call, or from a container's filter.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    zero, null = ctypes.c_long(0), ctypes.c_void_p(0)
    libc.syscall(ctypes.c_long(number), ctypes.c_long(-1), null, zero, null, zero)
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EPERM):
        fix = _KERNEL_FIX.format(f"{name} ({since})") + ", or leave the container"
        return Finding(id=name, ok=False, have=f"{name}: {os.strerror(code)}", fix=fix, needed=False)
    return Finding(id=name, ok=True, have="in this kernel", needed=False)


def find_cgroup(proc: str) -> tuple[Finding, ...]:
    """Tell which cgroup hierarchy can hold and limit a device model. Source: cgroups(7), proc_pid_mountinfo(5)."""
    version_2, version_1 = _cgroup_mounts(_read(f"{proc}/self/mountinfo"))
    legacy = [name for name in ("pids", "freezer", "memory") if name in version_1]
    if not version_2 and not {"pids", "freezer"} & version_1:
        fix = "mount -t cgroup2 none /sys/fs/cgroup"
        return (Finding(id="cgroup", ok=False, have="no hierarchy is mounted", fix=fix),)
    have = [f"version 2 at {version_2}"] if version_2 else []
    have += [f"version 1: {', '.join(legacy)}"] if legacy else []
    return (Finding(id="cgroup", ok=True, have="; ".join(have)), _cgroup_kill(version_2))


def _cgroup_kill(top: str) -> Finding:
    """Tell whether groups can be killed in one step: cgroup.kill exists in every group but the topmost (Linux 5.14)."""
    try:
        children = [entry.path for entry in os.scandir(top) if entry.is_dir()] if top else []
    except OSError:
        children = []
    if any(os.path.exists(f"{child}/cgroup.kill") for child in children):
        return Finding(id="cgroup-kill", ok=True, have="cgroup.kill exists", needed=False)
    have = "no cgroup.kill" if children or not top else "unknown: no cgroup to look at"
    fix = _KERNEL_FIX.format("Linux 5.14 and cgroup version 2; until then the reaper kills alone")
    return Finding(id="cgroup-kill", ok=False, have=have, fix=fix, needed=False)


def _cgroup_mounts(mountinfo: str) -> tuple[str, frozenset[str]]:
    """Return where cgroup2 is mounted ("": nowhere), and the controllers of the version 1 hierarchies."""
    version_2, version_1 = "", set[str]()
    for line in mountinfo.splitlines():
        before, _dash, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(rest) < 3:
            continue
        if rest[0] == "cgroup2" and not version_2:
            version_2 = fields[4]
        elif rest[0] == "cgroup":
            version_1.update(rest[2].split(","))
    return version_2, frozenset(version_1)


def find_qemu() -> Finding:
    """Tell whether there is a QEMU to confine."""
    path = shutil.which("qemu-system-x86_64")
    fix = "" if path else "apt-get install --no-install-recommends qemu-system-x86"
    return Finding(id="qemu", ok=bool(path), have=path or "no qemu-system-x86_64 in PATH", fix=fix)


def find_users(etc: str) -> tuple[Finding, ...]:
    """Tell whether domain 1 would get an identity, and whether every other would."""
    try:
        accounts = accounts_for(device_model_user="", domid=DOMID_FIRST, etc=etc)
        who = choose(device_model_user="", domid=DOMID_FIRST, accounts=accounts, taken=())
        base = find_user(RANGE_BASE, accounts)
    except DeprivError as error:
        have = f"{error}: {error.cause}" if error.cause else str(error)
        return (Finding(id="users", ok=False, have=have, fix=error.fix or "depriv setup"),)
    have = f"domain N runs as {who.uid - DOMID_FIRST} + N, the reaper as {who.reaper_uid}"
    users = Finding(id="users", ok=True, have=have)
    problems = range_problems(accounts, uid=base.uid, gid=base.gid) if base else ()
    if not problems:
        return (users, Finding(id="range", ok=True, have="nothing else in the range", needed=False))
    return (
        users,
        Finding(id="range", ok=False, have="; ".join(problems[:5]), fix=move_range_fix(accounts), needed=False),
    )


def find_writable(key: str, path: str) -> Finding:
    """Tell whether we may write to a directory; a read-only file system counts as no even for root."""
    ok = os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)
    have = f"{path} is {'' if ok else 'not '}writable"
    return Finding(id=key, ok=ok, have=have, fix="" if ok else f"run it as root, with {path} mounted read-write")


def find_kvm(proc: str, dev: str) -> Finding:
    """Tell whether guests can run at the processor's speed."""
    path = f"{dev}/kvm"
    if os.access(path, os.R_OK | os.W_OK):
        return Finding(id="kvm", ok=True, have=f"{path} can be opened", needed=False)
    flags = next((line for line in _read(f"{proc}/cpuinfo").splitlines() if line.startswith("flags")), "").split()
    if "vmx" not in flags and "svm" not in flags:
        have, fix = "the processor offers no virtualization", "turn on VT-x or AMD-V in the firmware; TCG works without"
    elif os.path.exists(path):
        have, fix = f"{path} cannot be opened", "run it as root"
    else:
        have, fix = f"no {path}", f"modprobe {'kvm_intel' if 'vmx' in flags else 'kvm_amd'}"
    return Finding(id="kvm", ok=False, have=have, fix=fix, needed=False)


def find_tun(dev: str) -> Finding:
    """Tell whether guests can be put on a bridge."""
    path = f"{dev}/net/tun"
    ok = os.access(path, os.R_OK | os.W_OK)
    have = f"{path} can be opened" if ok else f"no {path}, or not for us"
    return Finding(id="tun", ok=ok, have=have, fix="" if ok else "modprobe tun", needed=False)


def _status(proc: str, key: str) -> str:
    """Return one field of our own /proc/self/status, or ""."""
    lines = _read(f"{proc}/self/status").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{key}:")), "")


def _read(path: str) -> str:
    """Return the text of a file; one that is missing or closed to us is empty."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""
