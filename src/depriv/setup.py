# SPDX-License-Identifier: Apache-2.0
"""`depriv setup`: make the range base and the reaper with the distribution's own tools, and check what is there.

The commands are decided first (:func:`plan_setup`, :func:`plan_removal`, pure) and can be shown instead of run. After
running them everything is read again: an exit status of 0 is not taken for proof.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess

from depriv.accounts import read_accounts
from depriv.errors import HostError, PlanError
from depriv.identity import (
    DOMID_FIRST,
    DOMID_LAST,
    MADE_BY,
    RANGE_BASE,
    RANGE_COUNT,
    REAPER,
    Accounts,
    Group,
    User,
    choose,
    find_user,
    has_login,
    id_problem,
    make_user_commands,
    move_range_fix,
    propose_base,
    propose_id,
    range_problems,
)

_NAMES = (RANGE_BASE, REAPER)
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_TOOL_TIMEOUT_S = 60  # groupadd waits up to 15 s for the lock of passwd

Commands = tuple[tuple[str, ...], ...]

WHY = f"""\
Domain N runs as uid and gid BASE + N, with N from {DOMID_FIRST} to {DOMID_LAST}.
The base is no multiple of 65536, and the range crosses none: container tools take the
upper 16 bits of a uid for the number of a container and the lower for the user in it,
so on a multiple the base would pass for the root of a container, and the whole range
for that one container.
Nothing else on this host may use ids of the range; every start checks its own again."""


def plan_setup(accounts: Accounts) -> Commands:
    """Return the commands that make what is missing; empty: all is there and in order.

    What exists and is right is kept, whoever made it. What was begun (a group without its user) is finished.

    Raises:
        PlanError: what exists is wrong; ``cause`` lists how, ``fix`` has the commands. Nothing was changed.
    """
    base, commands = _plan_range(accounts)
    kept = accounts.replace(users=tuple(user for user in accounts.users if user.name != RANGE_BASE))
    if find_user(REAPER, accounts) is None:
        number = _reaper_id(base, accounts)
        commands += _finish(REAPER, number, accounts)
        kept = kept.replace(users=(*kept.users, _user(REAPER, number)))
    # The last word is that of the code which every start asks.
    choose(
        device_model_user="",
        domid=DOMID_FIRST,
        accounts=kept.replace(users=(*kept.users, base)),
        taken=(),
    )
    return commands


def setup_text(commands: Commands) -> str:
    """Return what `depriv setup --dry-run` prints."""
    if not commands:
        return f"Nothing to do: {RANGE_BASE} and {REAPER} exist and are in order."
    why = (WHY, "") if any(command[-1] == RANGE_BASE for command in commands) else ()
    return "\n".join((*why, *(shlex.join(command) for command in commands)))


def run_setup(*, dry_run: bool = False) -> str:
    """Make the users, and return what to tell the administrator.

    Raises:
        PlanError: what exists is wrong, see :func:`plan_setup`; nothing was changed.
        HostError: not root, no tools (nothing was changed), or a tool failed (what came before it stays; run again).
    """
    commands = plan_setup(read_accounts(names=_NAMES))
    text = setup_text(commands)
    if dry_run or not commands:
        return text
    _need_root("setup")
    _need_tools(commands, by_hand=_busybox_lines(commands))
    for command in commands:
        _run(command)
    missing = plan_setup(read_accounts(names=_NAMES))
    if missing:
        raise HostError(
            "the users were made, but cannot be found",
            cause=f"still missing: {shlex.join(missing[0])}",
            fix="see where this host keeps its users: `passwd` in /etc/nsswitch.conf",
        )
    return f"{text}\n\nDone: {RANGE_BASE} and {REAPER} exist and are in order."


def plan_removal(accounts: Accounts) -> Commands:
    """Return the commands that remove what `setup` made: never another name, never a user somebody else made.

    Their groups go too, unless somebody has joined them. userdel(8) may already remove the group
    (USERGROUPS_ENAB); :func:`remove_setup` skips a groupdel with nothing left to do.
    """
    commands: list[tuple[str, ...]] = []
    for name in _NAMES:
        user = find_user(name, accounts)
        if user is None or user.comment != MADE_BY:
            continue
        commands.append(("userdel", name))
        alone = all(other.gid != user.gid or other.name == name for other in accounts.users)
        own = Group(name=name, gid=user.gid, members=())
        if alone and own in accounts.groups:
            commands.append(("groupdel", name))
    return tuple(commands)


def remove_setup(*, dry_run: bool = False, proc: str = "/proc") -> str:
    """Remove the users that `setup` made, and return what to tell the administrator.

    Raises:
        HostError: not root, no tools, or a process still has an id of the range or of the reaper (nothing was
            changed); or a tool failed (what came before it stays removed).
    """
    accounts = read_accounts(names=_NAMES)
    commands = plan_removal(accounts)
    if not commands:
        return "Nothing to do: no user here was made by `depriv setup`."
    text = "\n".join(shlex.join(command) for command in commands)
    if dry_run:
        return text
    _need_root("setup --remove")
    _need_tools(commands, by_hand="")
    pids = processes_with(_our_ids(accounts), proc=proc)
    if pids:
        raise HostError(
            f"the range is in use by {len(pids)} processes, {pids[0]} among them", fix="destroy every domain first"
        )
    for command in commands:
        if command[0] == "groupdel" and not _group_exists(command[-1]):
            continue
        _run(command)
    left = plan_removal(read_accounts(names=_NAMES))
    if left:
        raise HostError(f"the users were removed, but {left[0][-1]} still exists")
    return f"{text}\n\nDone."


def processes_with(ids: tuple[range, ...], *, proc: str = "/proc") -> tuple[int, ...]:
    """Return the processes that have one of ``ids`` as any of their uids or gids, as far as this pid namespace shows.

    Source: proc_pid_status(5), ``Uid`` and ``Gid``: real, effective, saved, file system.
    """
    found: list[int] = []
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        try:
            with open(f"{proc}/{name}/status", encoding="utf-8", errors="surrogateescape") as file:
                lines = file.read().split("\n")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        owned = {int(word) for line in lines if line.startswith(("Uid:", "Gid:")) for word in line.split()[1:]}
        if any(number in span for number in owned for span in ids):
            found.append(int(name))
    return tuple(sorted(found))


def _plan_range(accounts: Accounts) -> tuple[User, Commands]:
    """Return the range base as it will be, and the commands that make it."""
    base = find_user(RANGE_BASE, accounts)
    commands: Commands = ()
    if base is None:
        begun = _begun(RANGE_BASE, accounts)
        number = propose_base(accounts) if begun < 0 else begun
        base = _user(RANGE_BASE, number)
        commands = _finish(RANGE_BASE, number, accounts)
    problems = range_problems(accounts, uid=base.uid, gid=base.gid)
    if problems:
        more = (f"and {len(problems) - 5} more",) if len(problems) > 5 else ()
        raise PlanError(
            f"the range of {RANGE_BASE}, uids from {base.uid} and gids from {base.gid}, is not free",
            cause="\n".join((*problems[:5], *more)),
            fix=move_range_fix(accounts) if not commands else f"groupdel {RANGE_BASE}, then depriv setup",
        )
    if has_login(base):
        raise PlanError(
            f"{RANGE_BASE} can log in: its shell is {base.shell or '/bin/sh'}",
            fix=f"usermod --shell /usr/sbin/nologin {RANGE_BASE}",
        )
    return base, commands


def _user(name: str, number: int) -> User:
    """Return the user that :func:`depriv.identity.make_user_commands` will have made."""
    nologin = "/usr/sbin/nologin"
    return User(name=name, uid=number, gid=number, shell=nologin, home="/nonexistent", comment=MADE_BY)


def _begun(name: str, accounts: Accounts) -> int:
    """Return the gid of the group ``name``, which an interrupted `setup` leaves behind, or -1."""
    return next((group.gid for group in accounts.groups if group.name == name), -1)


def _finish(name: str, number: int, accounts: Accounts) -> Commands:
    """Return the commands that make the user, without groupadd if its group exists already."""
    commands = make_user_commands(name, number)
    return commands[1:] if _begun(name, accounts) == number else commands


def _reaper_id(base: User, accounts: Accounts) -> int:
    """Return the uid and gid of the reaper to be made: the one below the range if it is free."""
    begun = _begun(REAPER, accounts)
    planned = accounts.replace(users=(*accounts.users, base))
    candidates = (begun,) if begun >= 0 else (base.uid - 1, propose_id(planned))
    uids = {user.uid for user in accounts.users}
    gids = {user.gid for user in accounts.users} | {group.gid for group in accounts.groups if group.name != REAPER}
    for number in candidates:
        owned = any(taken.start <= number < taken.start + taken.count for taken in accounts.ranges)
        if number not in uids | gids and not owned and not id_problem(number):
            return number
    raise PlanError(
        f"no uid for {REAPER}",
        cause=f"group {REAPER} has gid {begun}, which is not free as a uid" if begun >= 0 else "",
        fix=f"groupdel {REAPER}, then depriv setup" if begun >= 0 else "remove unused subordinate ids from /etc/subuid",
    )


def _our_ids(accounts: Accounts) -> tuple[range, ...]:
    """Return the ids that must belong to no process before our users may go."""
    spans: list[range] = []
    for user in accounts.users:
        if user.name in _NAMES and user.comment == MADE_BY:
            count = RANGE_COUNT if user.name == RANGE_BASE else 1
            spans += [range(user.uid, user.uid + count), range(user.gid, user.gid + count)]
    return tuple(spans)


def _group_exists(name: str) -> bool:
    """Tell whether the group is still there."""
    return any(group.name == name for group in read_accounts(names=_NAMES).groups)


def _need_root(verb: str) -> None:
    """Refuse to go on without root."""
    if os.geteuid() != 0:
        raise HostError("only root can change the host's users", fix=f"sudo depriv {verb}")


def _need_tools(commands: Commands, *, by_hand: str) -> None:
    """Refuse to go on where a tool is missing, before anything is changed."""
    for tool in dict.fromkeys(command[0] for command in commands):
        if shutil.which(tool, path=_ENVIRONMENT["PATH"]) is None:
            raise HostError(
                f"there is no {tool} on this host",
                cause="it comes with the package `passwd` or `shadow`; busybox has other tools",
                fix="apk add shadow" + (f", then depriv setup; or by hand:\n{by_hand}" if by_hand else ""),
            )


def _busybox_lines(commands: Commands) -> str:
    """Return the same with busybox's addgroup and adduser. Source: loginutils/adduser.c of busybox 1.36."""
    lines: list[str] = []
    for command in commands:
        name = command[-1]
        if command[0] == "groupadd":
            lines.append(f"addgroup -g {command[2]} {name}")
        else:
            uid = command[command.index("--uid") + 1]
            lines.append(f"adduser -S -D -H -h /nonexistent -s /sbin/nologin -g {MADE_BY} -u {uid} -G {name} {name}")
    return "\n".join(lines)


def _run(command: tuple[str, ...]) -> None:
    """Run one tool, and refuse to go on if it fails."""
    line = shlex.join(command)
    try:
        done = subprocess.run(
            command,
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TOOL_TIMEOUT_S,
            check=False,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"cannot run {line}") from error
    if done.returncode:
        raise HostError(f"{line} failed with status {done.returncode}", cause=done.stderr.strip())
