# SPDX-License-Identifier: Apache-2.0
"""Which uid and gid a domain's device model gets, and who may kill it. Pure: facts in, a decision or a refusal out.

The order is libxl's (xen tools/libs/light/libxl_dm.c, libxl__domain_get_device_model_uid): ``device_model_user`` if
the configuration names one, else the range base plus the domain ID. Two of its steps are gone: no fall-back to the
shared user, which must be named literally, and no root, ever. libxl's only check of the value is "not 0"; ours refuse
every id that something else on the host may own.
"""

from __future__ import annotations

from depriv.errors import PlanError
from depriv.records import Record

RANGE_BASE = "xen-qemuuser-range-base"
SHARED = "xen-qemuuser-shared"
REAPER = "xen-qemuuser-reaper"
MADE_BY = "depriv"  # comment of the users that `depriv setup` makes, and may therefore remove

# xen/include/public/xen.h: DOMID_FIRST_RESERVED is 0x7FF0; 0 is the host and has no device model.
DOMID_FIRST = 1
DOMID_LAST = 32751
RANGE_COUNT = DOMID_LAST + 1  # the base itself is the first id

_ID_MAX = 2**32 - 1

# Ids that are not ours to hand out, ascending. Sources: UIDS-GIDS.md and src/basic/uid-classification.h of systemd
# (v261), login.defs(5) for 1-999, setresuid(2) for -1.
_RESERVED = (
    (0, 0, "root"),
    (1, 999, "system users: daemons run and own files there"),
    (60001, 60513, "systemd-homed's users"),
    (60514, 60577, "host users that systemd-nspawn maps into containers"),
    (61184, 65519, "systemd's dynamic users"),
    (65534, 65534, "nobody, which unmapped files and NFS belong to"),
    (65535, 65535, "-1 in 16 bits, an invalid id"),
    (524288, 1879048191, "systemd's container range"),
    (2147352576, 2147418111, "systemd's foreign range: files of disk images"),
    (2**31, 2**32 - 3, "negative where ids are signed (devpts, setfsuid)"),
    (2**32 - 2, 2**32 - 2, "nobody in 32 bits"),
    (2**32 - 1, 2**32 - 1, "-1, which setresuid(2) takes for `leave it as it is`"),
)
_LOW_16 = {0: "root", 65534: "nobody", 65535: "-1"}
_OWNED = "processes of that user's containers could have the same id"


def tool_domid(domid: int) -> int:
    """Return the domid whose ids in the range a domain's tools have: passt beside its QEMU must not be its QEMU.

    Counted from the other end, so that no two domains have the same; that both are never a domain's at once is seen to
    where domids are chosen (docs/adr/0015).
    """
    return DOMID_FIRST + DOMID_LAST - domid


class User(Record):
    """One passwd(5) entry, as far as it matters here."""

    name: str
    uid: int
    gid: int
    shell: str  # "" means /bin/sh: passwd(5)
    home: str
    comment: str = ""


class Group(Record):
    """One group(5) entry; ``members`` lacks those who have it as primary group."""

    name: str
    gid: int
    members: tuple[str, ...]


class IdRange(Record):
    """Ids (uids and gids alike) that are someone's to use without having an entry of their own."""

    start: int
    count: int
    owner: str  # for messages: "subuid of alice"

    def span(self) -> str:
        """Return the text for messages."""
        return f"{self.owner} ({self.start}-{self.start + self.count - 1})"


class Accounts(Record):
    """Who exists on the host. Facts only."""

    users: tuple[User, ...]
    groups: tuple[Group, ...]
    ranges: tuple[IdRange, ...]


class Identity(Record):
    """Who a device model runs as, and who kills it."""

    uid: int
    gid: int
    reaper_uid: int
    how: str  # "range", "user NAME" or "shared NAME"

    def validate(self) -> None:
        """Refuse what must never happen, whoever made the record."""
        if min(self.uid, self.gid, self.reaper_uid) <= 0:
            raise ValueError("a device model and its reaper never run as root")
        if self.uid == self.reaper_uid:
            raise ValueError("a device model must not run as its own reaper, which it could kill")


def choose(
    *, device_model_user: str, domid: int, accounts: Accounts, taken: tuple[tuple[str, int, int], ...]
) -> Identity:
    """Return who domain ``domid`` runs as.

    Args:
        device_model_user: The key of the configuration; "" takes the id from the range.
        domid: The domain's ID.
        accounts: The host's users, with everybody that :func:`names_to_check` and :func:`ids_to_check` name.
        taken: (domain, uid, gid) of every other live domain.

    Raises:
        PlanError: the id would be dangerous, or is in use; nothing was changed.
    """
    if not DOMID_FIRST <= domid <= DOMID_LAST:
        raise PlanError(
            f"domain ID {domid} is outside {DOMID_FIRST}-{DOMID_LAST}", fix="let depriv choose the domain ID"
        )
    if device_model_user:
        user = _named_user(device_model_user, accounts)
        uid, gid = user.uid, user.gid
        how = f"shared {SHARED}" if device_model_user == SHARED else f"user {device_model_user}"
    else:
        uid, gid = _range_ids(domid, accounts)
        how = "range"
    reaper_uid = _reaper(uid, accounts)
    for domain, other_uid, other_gid in taken:
        if other_uid == uid and other_gid == gid and device_model_user == SHARED:
            continue  # asked for in so many words: M3
        _refuse_taken(domain, uid if other_uid == uid else -1, gid if other_gid == gid else -1)
        if other_uid == reaper_uid:
            raise PlanError(
                f"the reaper's uid {reaper_uid} is that of the device model of {domain}, which it would kill",
                fix=f"give {REAPER} a uid of its own: depriv setup",
            )
    return Identity(uid=uid, gid=gid, reaper_uid=reaper_uid, how=how)


def names_to_check(device_model_user: str) -> tuple[str, ...]:
    """Return the user names that :func:`choose` has to know."""
    return tuple(name for name in (device_model_user, RANGE_BASE, REAPER) if name)


def ids_to_check(device_model_user: str, domid: int, accounts: Accounts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the uids and the gids whose owners :func:`choose` has to know, given the users found by name."""
    name, offset = (device_model_user, 0) if device_model_user else (RANGE_BASE, domid)
    users = [user for user in accounts.users if user.name == name]
    reapers = [user.uid for user in accounts.users if user.name in (REAPER, RANGE_BASE)]
    uids = {*(user.uid + offset for user in users), *reapers}
    return tuple(sorted(uids)), tuple(sorted({user.gid + offset for user in users}))


def has_login(user: User) -> bool:
    """Tell whether somebody can log in as ``user``: anything but nologin(8) and false(1) counts."""
    return user.shell.rpartition("/")[2] not in ("nologin", "false")


def id_problem(number: int, *, reaper: bool = False) -> str:
    """Return why no device model may have this uid or gid, or "".

    A reaper may be a system user, and may be 131072, the range base of Xen's own documentation: it runs no QEMU.
    """
    if number > _ID_MAX or number < 0:
        return "does not fit into 32 bits"
    for first, last, why in _RESERVED:
        if first <= number <= last and not (reaper and first == 1):
            return f"is {why}" if first == last else f"is of the range {first}-{last}, {why}"
    low = number & 0xFFFF
    if low in _LOW_16 and not (reaper and low == 0):
        return f"is {low} ({_LOW_16[low]}) where only 16 bits are kept"
    return ""


def make_user_commands(name: str, number: int) -> tuple[tuple[str, ...], ...]:
    """Return the groupadd(8) and useradd(8) lines for a user nobody can be, with a group of its own.

    ``--system`` keeps useradd from password ageing and from giving away subordinate ids, ``--no-log-init`` from
    stretching lastlog to the uid.
    """
    ids = f"--system --uid {number} --gid {number} --comment {MADE_BY}"
    nothing = "--no-log-init --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin"
    return (
        ("groupadd", "--gid", str(number), name),
        ("useradd", *ids.split(), *nothing.split(), name),
    )


def propose_base(accounts: Accounts) -> int:
    """Return the first id of a free range of 32752, the same for uids and gids; the id below is free as well.

    The base is never a multiple of 2^16, and the range crosses none. Container tools take the upper 16 bits of a uid
    for the container and the lower for the user in it (UIDS-GIDS.md): on a multiple, the base would pass for the root
    of a container, and the whole range for that one container (Xen's feature document warns of it); across one, a
    domain would pass for root, nobody or -1. The search begins at 65538, which leaves 65537 for the reaper, and ends
    below 100000, where SUB_UID_MIN of login.defs(5) begins: nothing hands out ids there by itself.
    It sees only users in ``accounts``; every start checks its own id again.

    Raises:
        PlanError: there is no such range.
    """
    first = _first_gap(accounts, RANGE_COUNT + 1)
    if not first:
        raise PlanError(
            f"no {RANGE_COUNT} free uids and gids in one piece",
            cause="users, groups, /etc/subuid, /etc/subgid and systemd's ranges leave no gap",
            fix="remove subordinate ids that nobody needs from /etc/subuid and /etc/subgid",
        )
    return first + 1


def propose_id(accounts: Accounts) -> int:
    """Return an id that is free as uid and as gid, and outside the range if there is one; 0: there is none."""
    bases = [number for user in accounts.users if user.name == RANGE_BASE for number in (user.uid, user.gid)]
    kept = tuple(IdRange(start=base, count=RANGE_COUNT, owner=RANGE_BASE) for base in bases)
    return _first_gap(accounts.replace(ranges=accounts.ranges + kept), 1)


def range_problems(accounts: Accounts, *, uid: int, gid: int) -> tuple[str, ...]:
    """Return what else lies in the ranges that begin at ``uid`` and ``gid``; empty: no domain will ever be refused."""
    problems = [
        f"the {kind} range begins at {base}, which {why}"
        for kind, base in (("uid", uid), ("gid", gid))
        if (why := id_problem(base)) and base & 0xFFFF
    ]
    uids, gids = range(uid, uid + RANGE_COUNT), range(gid, gid + RANGE_COUNT)
    for user in accounts.users:
        if user.uid in uids and user.name != RANGE_BASE:
            problems.append(f"uid {user.uid} in the range is {user.name}'s")
        if user.gid in gids and user.name != RANGE_BASE:
            problems.append(f"gid {user.gid} in the range is the primary group of {user.name}")
    problems += [
        f"gid {group.gid} in the range is group {group.name}"
        for group in accounts.groups
        if group.gid in gids and group.name != RANGE_BASE
    ]
    reserved = tuple(IdRange(start=first, count=last - first + 1, owner=why) for first, last, why in _RESERVED)
    for taken in (*accounts.ranges, *reserved):
        if any(taken.start < base + RANGE_COUNT and base < taken.start + taken.count for base in (uid, gid)):
            problems.append(f"the range overlaps {taken.span()}")
    edges = [number for ids in (uids, gids) for number in ids[1:] if number & 0xFFFF in _LOW_16]
    if edges:
        problems.append(f"the range holds {edges[0]}, which {id_problem(edges[0])}")
    return tuple(dict.fromkeys(problems))


def move_range_fix(accounts: Accounts) -> str:
    """Return the commands that move the range base to a free range."""
    try:
        base = propose_base(accounts)
    except PlanError as error:
        return error.fix
    own = any(group.name == RANGE_BASE for group in accounts.groups)
    group = "groupmod" if own else "groupadd"
    return (
        f"with no domain running: {group} --gid {base} {RANGE_BASE} && usermod --uid {base} --gid {base} {RANGE_BASE}"
    )


def find_user(name: str, accounts: Accounts) -> User | None:
    """Return the user of that name, or None.

    Raises:
        PlanError: several entries disagree about it.
    """
    found = [user for user in accounts.users if user.name == name]
    if any((user.uid, user.gid) != (found[0].uid, found[0].gid) for user in found):
        raise PlanError(
            f"user {name} exists more than once, with different ids", fix=f"remove all but one: getent passwd {name}"
        )
    return found[0] if found else None


def _named_user(name: str, accounts: Accounts) -> User:
    """Return the user that ``device_model_user`` names, or refuse."""
    key = f"device_model_user {name!r}"
    user = find_user(name, accounts)
    if user is None:
        raise PlanError(f"{key}: there is no such user", cause=f"getpwnam({name!r})", fix=_new_user_fix(name, accounts))
    if name in (RANGE_BASE, REAPER):
        job = "kills device models" if name == REAPER else "marks where their ids begin"
        raise PlanError(
            f"{key}: that user {job}, it must not run one",
            fix="remove device_model_user to get an id of the range",
        )
    for kind, number in (("uid", user.uid), ("gid", user.gid)):
        if why := id_problem(number):
            raise PlanError(f"{key}: {kind} {number} {why}", fix=_renumber_fix(user, accounts))
    if has_login(user):
        raise PlanError(
            f"{key} can log in: its shell is {user.shell or '/bin/sh'}", fix=f"usermod --shell /usr/sbin/nologin {name}"
        )
    others = sorted({other.name for other in accounts.users if other.uid == user.uid} - {name})
    if others:
        raise PlanError(f"{key}: uid {user.uid} is also that of {', '.join(others)}", fix=_renumber_fix(user, accounts))
    _refuse_company(user, accounts)
    for kind, number in (("uid", user.uid), ("gid", user.gid)):
        if owner := _range_owner(number, accounts):
            raise PlanError(
                f"{key}: {kind} {number} belongs to {owner}", cause=_OWNED, fix=_renumber_fix(user, accounts)
            )
    return user


def _refuse_company(user: User, accounts: Accounts) -> None:
    """Refuse a primary group in which there are people: what it may read, QEMU may.

    Somebody without an entry counts as a person. Supplementary groups of ``user`` do not matter: they are dropped.
    """
    members = {name for group in accounts.groups if group.gid == user.gid for name in group.members}
    members |= {other.name for other in accounts.users if other.gid == user.gid}
    harmless = {other.name for other in accounts.users} - {other.name for other in accounts.users if has_login(other)}
    people = sorted(members - harmless - {user.name})
    if people:
        raise PlanError(
            f"device_model_user {user.name!r}: its primary group {user.gid} is also that of {', '.join(people)}",
            cause="a device model could use what that group may read and write",
            fix=_renumber_fix(user, accounts),
        )


def _range_ids(domid: int, accounts: Accounts) -> tuple[int, int]:
    """Return uid and gid of ``domid`` in the range, or refuse."""
    base = find_user(RANGE_BASE, accounts)
    if base is None:
        shared = any(user.name == SHARED for user in accounts.users)
        raise PlanError(
            f"there is no user {RANGE_BASE} to take a uid from",
            cause=f"{SHARED} exists, but is used only where device_model_user names it" if shared else "",
            fix="depriv setup",
        )
    for kind, first in (("uid", base.uid), ("gid", base.gid)):
        if first < 1000 or first == 65534:
            raise PlanError(
                f"{RANGE_BASE} has {kind} {first}, which {id_problem(first)}",
                cause=f"domain N gets {kind} {first} + N",
                fix=move_range_fix(accounts),
            )
    uid, gid = base.uid + domid, base.gid + domid
    for kind, number in (("uid", uid), ("gid", gid)):
        if why := id_problem(number):
            raise PlanError(f"{kind} {number} of domain {domid} {why}", fix=move_range_fix(accounts))
        if owner := _range_owner(number, accounts):
            raise PlanError(
                f"{kind} {number} of domain {domid} belongs to {owner}", cause=_OWNED, fix=move_range_fix(accounts)
            )
    owners = [f"user {user.name}" for user in accounts.users if user.uid == uid]
    owners += [f"the primary group of {user.name}" for user in accounts.users if user.gid == gid]
    owners += [f"group {group.name}" for group in accounts.groups if group.gid == gid]
    if owners:
        raise PlanError(
            f"domain {domid} would get uid {uid} and gid {gid}, but that is {owners[0]}", fix=move_range_fix(accounts)
        )
    return uid, gid


def _range_owner(number: int, accounts: Accounts) -> str:
    """Return whose subordinate ids ``number`` is one of, or ""."""
    for taken in accounts.ranges:
        if taken.start <= number < taken.start + taken.count:
            return taken.span()
    return ""


def _refuse_taken(domain: str, uid: int, gid: int) -> None:
    """Refuse ids that another live domain has; -1 stands for "differs"."""
    for kind, number in (("uid", uid), ("gid", gid)):
        if number != -1:
            raise PlanError(
                f"{kind} {number} is already that of the device model of {domain}",
                cause="one could kill, trace and read the other",
                fix=f"give each domain its own device_model_user, or destroy {domain} first",
            )


def _reaper(uid: int, accounts: Accounts) -> int:
    """Return the uid that kills the processes of ``uid``, or refuse.

    The range base itself serves where there is no reaper, as in libxl__get_reaper_uid: domain 0 has no device model.
    It may own no process but the killer: kill(-1) reaches everything the reaper's uid may signal.
    """
    user = find_user(REAPER, accounts) or find_user(RANGE_BASE, accounts)
    if user is None:
        raise PlanError(
            f"there is no user {REAPER} to kill the device model with",
            cause="without one, a device model that forks could outlive its domain",
            fix="depriv setup",
        )
    if why := _reaper_problem(user, uid, accounts):
        fix = "depriv setup"
        if has_login(user):
            fix = f"usermod --shell /usr/sbin/nologin {user.name}"
        elif user.name == REAPER:
            fix = f"usermod --uid {propose_id(accounts)} {REAPER}"
        raise PlanError(
            f"the reaper {user.name} {why}", cause="it kills device models, and whatever else has its uid", fix=fix
        )
    return user.uid


def _reaper_problem(reaper: User, uid: int, accounts: Accounts) -> str:
    """Return why ``reaper`` must not kill the processes of ``uid``, or ""."""
    if reaper.uid == uid:
        return f"has the uid {uid} of the device model, which could kill it"
    if has_login(reaper):
        return f"can log in: its shell is {reaper.shell or '/bin/sh'}"
    if why := id_problem(reaper.uid, reaper=True):
        return f"has uid {reaper.uid}, which {why}"
    others = sorted({other.name for other in accounts.users if other.uid == reaper.uid} - {reaper.name})
    if others:
        return f"shares uid {reaper.uid} with {', '.join(others)}"
    for base in (user.uid for user in accounts.users if user.name == RANGE_BASE):
        if base < reaper.uid < base + RANGE_COUNT:
            return f"has uid {reaper.uid}, that of domain {reaper.uid - base}"
    owner = _range_owner(reaper.uid, accounts)
    return f"has uid {reaper.uid}, which belongs to {owner}" if owner else ""


def _new_user_fix(name: str, accounts: Accounts) -> str:
    """Return the commands that make the user ``name``."""
    plain = name.isascii() and name.replace("-", "").replace("_", "").isalnum() and name[0] != "-"
    number = propose_id(accounts)
    if not plain or not number or name in (RANGE_BASE, REAPER):
        return "name an existing user, or remove device_model_user to get an id of the range"
    lines = make_user_commands(name, number)
    return " && ".join(" ".join(line) for line in lines)


def _renumber_fix(user: User, accounts: Accounts) -> str:
    """Return the commands that give an existing user an id and a group of its own."""
    number = propose_id(accounts)
    if user.uid == 0 or user.name == "nobody" or has_login(user) or not number:
        return "name a user made for this domain, or remove device_model_user to get an id of the range"
    own = any(group.name == user.name for group in accounts.groups)
    group = "groupmod" if own else "groupadd"
    commands = f"{group} --gid {number} {user.name} && usermod --uid {number} --gid {number} {user.name}"
    if user.uid >= 1000:
        return commands
    # It may be a daemon's, which owns files by its number.
    return (
        "remove device_model_user to get an id of the range; or, if that user was made for this domain alone:\n"
        f"{commands}"
    )


def _first_gap(accounts: Accounts, count: int) -> int:
    """Return the first of ``count`` free ids that cross no multiple of 2^16; 0: there are none."""
    spans = [(number, number) for user in accounts.users for number in (user.uid, user.gid)]
    spans += [(group.gid, group.gid) for group in accounts.groups]
    spans += [(taken.start, taken.start + taken.count - 1) for taken in accounts.ranges]
    spans += [(first, last) for first, last, _why in _RESERVED]
    spans.sort()
    start = 65537  # below are the system's and useradd's ids
    for first, last in [*spans, (_ID_MAX + 1, _ID_MAX + 1)]:
        while start + count <= first:
            if (start & 0xFFFF) + count <= 65534:
                return start
            start = (start | 0xFFFF) + 2
        start = _next_usable(max(start, last + 1))
    return 0


def _next_usable(number: int) -> int:
    """Return the first id from ``number`` on that is not root, nobody or -1 in 16 bits."""
    while number & 0xFFFF in _LOW_16:
        number += 1
    return number
