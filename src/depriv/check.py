# SPDX-License-Identifier: Apache-2.0
"""What must be true of any plan. Run by the planner when it makes one and by the jail before it does one. Pure."""

from __future__ import annotations

from depriv import steps
from depriv.steps import NAMESPACES, Plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.steps import Step

# QEMU's own filter, every group denied. Possible only because QEMU never is root: with -runas or -chroot in QEMU
# "elevateprivileges" would have to be allowed. Source: qemu-seccomp.c, QEMU 7.2.
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

# Every plan that restricts a device model has each of these exactly once...
_ONCE = (
    steps.MakeCgroup,
    steps.Unshare,
    steps.MakeRoot,
    steps.PivotRoot,
    steps.SetHostname,
    steps.BecomeInit,
    steps.NewUser,
    steps.DropCapabilities,
    steps.SetIds,
    steps.NoNewPrivs,
    steps.Filter,
    steps.Execute,
)
# ... and with dm_restrict=0 these remain: never root, no capability, killed whole.
_ONCE_UNRESTRICTED = (
    steps.MakeCgroup,
    steps.BecomeInit,
    steps.DropCapabilities,
    steps.SetIds,
    steps.NoNewPrivs,
    steps.Execute,
)
# passt makes a user namespace of its own, in which no id exists: it would not start in one that allows none below it.
_ONCE_PASST = tuple(kind for kind in _ONCE if kind is not steps.NewUser)
_LIMITS = (
    "AS",
    "CORE",
    "FSIZE",
    "LOCKS",
    "MEMLOCK",
    "MSGQUEUE",
    "NICE",
    "NOFILE",
    "NPROC",
    "RTPRIO",
    "SIGPENDING",
    "STACK",
)
UID_MIN = 1000  # below are root and the system's users (login.defs SYS_UID_MAX)
_NEVER_UIDS = (65534, 65535, 0xFFFFFFFE, 0xFFFFFFFF)  # nobody; (uid_t)-1 in 16 and 32 bits


def check(plan: Plan) -> None:
    """Raise ``ValueError`` with one sentence if a plan would do, or leave out, what no plan may."""
    if not plan.domain or "/" in plan.domain or "\0" in plan.domain:
        raise ValueError("the plan names no domain")
    if plan.tool not in ("", "passt", "qemu-img"):
        raise ValueError(f"no tool {plan.tool[:40]!r} is known")
    if not plan.steps:
        raise ValueError("the plan is empty")
    for step in (*plan.steps, *plan.after):
        _check_ids(step)
        _check_paths(step)
    _check_order(plan)
    if isinstance(plan.steps[-1], steps.Reap):
        if len(plan.steps) != 1 or plan.after:
            raise ValueError("a plan that only reaps has no other step")
        return
    _check_once(plan)
    _check_execute(plan)
    if plan.tool:
        _check_tool(plan)
    if plan.restricted:
        _check_restricted(plan)


def _check_ids(step: Step) -> None:
    """Refuse every uid and gid that a device model may never have."""
    values = step.as_dict()
    for name in ("uid", "gid", "reaper_uid"):
        value = values.get(name, UID_MIN)
        node = isinstance(step, (steps.MakeNode, steps.CopyFile)) and value == 0
        # The reaper runs no QEMU, and Xen's own documentation makes it a system user.
        first = 1 if name == "reaper_uid" else UID_MIN
        if not node and (not first <= value < 0xFFFFFFFE or value in _NEVER_UIDS):
            raise ValueError(f"{type(step).__name__}: {name} {value} is no device model's")
    if isinstance(step, steps.Reap) and step.uid == step.reaper_uid:
        raise ValueError("the reaper has the uid of what it kills: it could be killed first")


def _check_paths(step: Step) -> None:
    """Refuse relative paths, dots and NUL in every path of a step."""
    values = step.as_dict()
    paths: list[str] = [values[name] for name in ("path", "mountpoint", "lock") if name in values]
    if isinstance(step, steps.BindTree):
        paths += [step.source, step.target]
    if isinstance(step, steps.EmptyRoot):
        paths += [*step.detach, *step.remove]
    for path in paths:
        parts = path.split("/")
        if not path.startswith("/") or "\0" in path or ".." in parts or "." in parts:
            raise ValueError(f"{type(step).__name__}: {path!r} is not an absolute, plain path")


def _check_order(plan: Plan) -> None:
    """Hold the steps to the one order in which each still has the privilege it needs.

    Reap first, while the uid is nobody's. Files are opened while the host is visible. The cgroup directory is made
    while cgroupfs is. Namespaces before mounts, so that the host sees none of them. The user namespace last of the
    namespaces, so that whoever is root in it owns none of the others. Bounding set and securebits before the ids,
    while CAP_SETPCAP is held. no_new_privs and exec at the end.
    """
    ranks = [steps.ALL.index(type(step)) for step in plan.steps]
    # MakeDir, MakeLink, MakeNode, BindTree and MakePrivate build the root in any order among themselves.
    low, high = steps.ALL.index(steps.MakeDir), steps.ALL.index(steps.CopyFile)
    flat = [low if low <= rank <= high else rank for rank in ranks]
    if flat != sorted(flat):
        raise ValueError("the steps are not in the order in which each has the privilege it needs")
    if any(not isinstance(step, steps.EmptyRoot) for step in plan.after):
        raise ValueError("after the start, a plan only empties the root")


def _check_once(plan: Plan) -> None:
    kinds = [type(step) for step in plan.steps]
    for kind in _ONCE_PASST if plan.tool == "passt" else _ONCE if plan.restricted else _ONCE_UNRESTRICTED:
        if kinds.count(kind) != 1:
            raise ValueError(f"a plan has the step {kind.__name__} exactly once, this one {kinds.count(kind)} times")
    if kinds.count(steps.Reap) != (0 if plan.shared else 1):
        raise ValueError("a uid is reaped before its use, once, unless another domain shares it")
    if not isinstance(plan.steps[-1], steps.Execute):
        raise ValueError("a plan ends with Execute")  # noqa: TRY004 (the plan's value, not an argument's type)


def _check_execute(plan: Plan) -> None:
    """One uid and gid throughout; every descriptor once; QEMU starts stopped."""
    ids = {(step.uid, step.gid) for step in plan.steps if isinstance(step, (steps.NewUser, steps.SetIds))}
    reaped = {(step.uid, step.gid) for step in plan.steps if isinstance(step, steps.Reap)}
    if len(ids) != 1 or not reaped <= ids:
        raise ValueError("the steps name more than one uid or gid")
    numbers: list[int] = []
    for step in plan.steps:
        if isinstance(step, steps.MakeFifo):
            numbers += step.numbers
        if isinstance(step, (steps.OpenFile, steps.TakeFd, steps.ListenUnix)) and step.number >= 0:
            numbers.append(step.number)
        if isinstance(step, steps.MakeNode) and not _is_needed(step):
            raise ValueError(f"no device model needs the device {step.major}:{step.minor} as {step.path}")
        if isinstance(step, steps.BindTree) and step.devices and step.source != "/dev/pts":
            raise ValueError(f"no device model needs the devices in {step.source}")
        if isinstance(step, steps.OpenFile) and (step.access not in ("ro", "rw") or step.kind not in _KINDS):
            raise ValueError(f"{step.role}: access {step.access!r} or kind {step.kind!r} is none we know")
    in_range = all(0 <= number <= _FD_MAX for number in numbers)
    if len(numbers) != len(set(numbers)) or not {0, 1, 2} <= set(numbers) or not in_range:
        raise ValueError("the descriptors are not distinct, or 0, 1 and 2 are not all given")
    execute = plan.steps[-1]
    if not plan.tool and isinstance(execute, steps.Execute) and _options(execute.argv).count("-S") != 1:
        raise ValueError("QEMU has to start stopped: -S")


# passt(1): files it would write, a socket it would make, a user it would become
_PASST_NEVER = {"--log-file", "-l", "--pcap", "-p", "--pid", "-P", "--socket", "-s", "--runas"}
# Documentation/admin-guide/devices.txt
_NODES = {"/dev/null": (1, 3), "/dev/kvm": (10, 232), "/dev/ptmx": (5, 2)}
# Misc devices with numbers of the kernel's choice. Source: drivers/xen/{privcmd,evtchn,gntdev,xenbus}, Linux 6.1
_XEN_NODES = tuple(f"/dev/xen/{name}" for name in ("privcmd", "hypercall", "evtchn", "gntdev", "xenbus"))
_MISC_MAJOR = 10
_KINDS = ("file", "block", "char")
_FD_MAX = 99  # the jail keeps its own descriptors above


def _is_needed(step: steps.MakeNode) -> bool:
    if step.path in _XEN_NODES:
        return step.major == _MISC_MAJOR
    return _NODES.get(step.path) == (step.major, step.minor)


def _check_restricted(plan: Plan) -> None:
    """What dm_restrict=1 promises is in the plan."""
    spaces = tuple(name for name in NAMESPACES if not (plan.keep_net and name == "net"))
    for step in plan.steps:
        if isinstance(step, steps.Unshare) and set(step.namespaces) != set(spaces):
            raise ValueError(f"Unshare has to name {' '.join(spaces)}")
        if isinstance(step, steps.Execute) and not plan.tool:
            _check_argv(step.argv)
    limits = sorted(step.name for step in plan.steps if isinstance(step, steps.SetLimit))
    if limits != sorted(_LIMITS):
        raise ValueError(f"the limits have to be {' '.join(_LIMITS)}, each once")
    if not plan.tool:
        _check_emptied(plan)


def _check_tool(plan: Plan) -> None:
    """A tool is restricted, with nothing of QEMU's; passt is in the host's network for its guest."""
    if not plan.restricted or plan.keep_net != (plan.tool == "passt") or plan.after:
        raise ValueError("a tool is restricted, alone passt is in the host's network, and none has its root emptied")
    for step in plan.steps:
        if isinstance(step, steps.MakeNode) and step.path != "/dev/null":
            raise ValueError(f"{plan.tool} has no use for {step.path}")
        if isinstance(step, steps.OpenFile) and step.access != "ro":
            raise ValueError(f"{plan.tool} writes no file: {step.path}")
        if isinstance(step, steps.SetLimit) and step.name == "FSIZE" and step.value != 0:
            raise ValueError(f"{plan.tool} writes no file: FSIZE is 0")
        if isinstance(step, steps.Execute):
            _check_tools_words(plan.tool, step.argv)


def _check_tools_words(tool: str, words: tuple[str, ...]) -> None:
    if tool == "passt":
        if words.count("--fd") != 1 or words.count("--foreground") != 1 or set(words) & _PASST_NEVER:
            raise ValueError("passt gets its guest by descriptor, stays our child, and writes no files")
    elif words[1:-1] != ("info", "--output=json") or not words[-1].startswith('json:{"file":{"driver":"nbd",'):
        raise ValueError("qemu-img only tells about the image that it is served")


def _check_emptied(plan: Plan) -> None:
    """Whatever is mounted in the root, and every device node in it, is gone after the start."""
    mounted = {step.target for step in plan.steps if isinstance(step, steps.BindTree)}
    mounted |= {step.path for step in plan.steps if isinstance(step, steps.MakePrivate)}
    nodes = {step.path for step in plan.steps if isinstance(step, steps.MakeNode)} - {"/dev/null"}
    emptied = [step for step in plan.after if isinstance(step, steps.EmptyRoot)]
    if mounted != {path for step in emptied for path in step.detach}:
        raise ValueError("what is mounted in the root and what is detached after the start differ")
    if not nodes <= {path for step in emptied for path in step.remove}:
        raise ValueError("a device node would stay in the root after the start")


def _options(argv: tuple[str, ...]) -> list[str]:
    """Return QEMU's words but for the kernel's command line, which may look like any of them."""
    return [word for before, word in zip(("", *argv), argv, strict=False) if before != "-append"]


def _check_argv(argv: tuple[str, ...]) -> None:
    options = _options(argv)
    # Debian's QEMU for Xen is built without libseccomp: there our own filter is all there is.
    sandbox = ("-sandbox",) if "-sandbox" in options or "-xen-domid-restrict" not in options else ()
    for option in ("-no-user-config", *sandbox):
        if options.count(option) != 1:
            raise ValueError(f"QEMU's command line has {option} exactly once")
    if not {"-nodefaults", "-nic", "-netdev", "-net"} & set(options):
        raise ValueError("without -nodefaults QEMU makes a network card, and its network by itself: say which")
    if sandbox and argv[argv.index("-sandbox") + 1 : argv.index("-sandbox") + 2] != (SANDBOX,):
        raise ValueError("-sandbox has to deny every group")
