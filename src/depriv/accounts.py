# SPDX-License-Identifier: Apache-2.0
"""Read who exists on this host: passwd(5), group(5), subuid(5), subgid(5), and NSS for the few who matter.

The files are read whole, because an id may be taken by anybody; NSS (LDAP, SSSD, systemd's dynamic users) is asked
only about given names and ids, because it cannot be listed. Subordinate ids that only NSS knows (``subid:`` in
nsswitch.conf) are not seen.
"""

from __future__ import annotations

from depriv.errors import HostError
from depriv.identity import Accounts, Group, IdRange, User, ids_to_check, names_to_check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

ETC = "/etc"


def read_accounts(
    *, names: tuple[str, ...], uids: tuple[int, ...] = (), gids: tuple[int, ...] = (), etc: str = ETC
) -> Accounts:
    """Return everybody in the files of ``etc``, and what NSS knows about the given names, uids and gids.

    NSS always speaks of the running system, so it is asked only if ``etc`` is ``/etc``. Malformed lines are skipped,
    as glibc skips them; a missing subuid or subgid is empty.

    Raises:
        HostError: passwd, group, subuid or subgid cannot be read.
    """
    users = tuple(_users(f"{etc}/passwd"))
    groups = tuple(_groups(f"{etc}/group"))
    ranges = (*_ranges(f"{etc}/subuid", "subuid"), *_ranges(f"{etc}/subgid", "subgid"))
    files = Accounts(users=users, groups=groups, ranges=tuple(dict.fromkeys(ranges)))
    return merge(files, ask_nss(names=names, uids=uids, gids=gids)) if etc == ETC else files


def accounts_for(*, device_model_user: str, domid: int, etc: str = ETC) -> Accounts:
    """Return the facts that :func:`depriv.identity.choose` needs to give domain ``domid`` its identity.

    Two looks: the users by name, then the owners of the ids that follow from them.

    Raises:
        HostError: as :func:`read_accounts`.
    """
    named = read_accounts(names=names_to_check(device_model_user), etc=etc)
    if etc != ETC:
        return named
    uids, gids = ids_to_check(device_model_user, domid, named)
    return merge(named, ask_nss(uids=uids, gids=gids))


def ask_nss(*, names: tuple[str, ...] = (), uids: tuple[int, ...] = (), gids: tuple[int, ...] = ()) -> Accounts:
    """Return what getpwnam(3), getpwuid(3) and getgrgid(3) know, with the groups' members as users where known.

    glibc's "not found" and "the server does not answer" look the same from here; a host whose users come from a
    network should have a local cache.
    """
    import grp  # noqa: PLC0415 (shared objects that nothing else on the way of a start needs)
    import pwd  # noqa: PLC0415

    found: dict[User, None] = {}
    groups: list[Group] = []
    members: list[str] = []
    for gid in gids:
        try:
            entry = grp.getgrgid(gid)
        except KeyError:
            continue
        groups.append(Group(name=entry.gr_name, gid=entry.gr_gid, members=tuple(entry.gr_mem)))
        members += entry.gr_mem
    keys: list[str | int] = [*names, *uids, *members]
    for key in keys:
        try:
            user = pwd.getpwnam(key) if isinstance(key, str) else pwd.getpwuid(key)
        except (KeyError, ValueError):  # ValueError: a name with a NUL in it
            continue
        # fmt: off
        found[User(name=user.pw_name, uid=user.pw_uid, gid=user.pw_gid, shell=user.pw_shell, home=user.pw_dir,
                   comment=user.pw_gecos)] = None
        # fmt: on
    return Accounts(users=tuple(found), groups=tuple(groups), ranges=())


def merge(first: Accounts, second: Accounts) -> Accounts:
    """Return the facts of both, each once. Contradictions stay: :mod:`depriv.identity` refuses them."""
    return Accounts(
        users=tuple(dict.fromkeys(first.users + second.users)),
        groups=tuple(dict.fromkeys(first.groups + second.groups)),
        ranges=tuple(dict.fromkeys(first.ranges + second.ranges)),
    )


def _users(path: str) -> Iterator[User]:
    """Yield the entries of a passwd(5) file."""
    for parts in _lines(path, required=True):
        if len(parts) >= 4 and _is_id(parts[2]) and _is_id(parts[3]):
            _password, comment, home, shell = ("", *parts[4:], "", "", "")[:4]
            yield User(name=parts[0], uid=int(parts[2]), gid=int(parts[3]), shell=shell, home=home, comment=comment)


def _groups(path: str) -> Iterator[Group]:
    """Yield the entries of a group(5) file."""
    for parts in _lines(path, required=True):
        if len(parts) >= 3 and _is_id(parts[2]):
            members = parts[3].split(",") if len(parts) > 3 else []
            yield Group(name=parts[0], gid=int(parts[2]), members=tuple(name.strip() for name in members if name))


def _ranges(path: str, kind: str) -> Iterator[IdRange]:
    """Yield the entries of a subuid(5) or subgid(5) file."""
    for parts in _lines(path, required=False):
        if len(parts) == 3 and _is_id(parts[1]) and _is_id(parts[2]) and int(parts[2]):
            yield IdRange(start=int(parts[1]), count=int(parts[2]), owner=f"{kind} of {parts[0]}")


def _lines(path: str, *, required: bool) -> Iterator[list[str]]:
    """Yield the fields of each line that is an entry: not empty, no comment, no NIS reference ("+", "-")."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8", "surrogateescape")
    except FileNotFoundError as error:
        if not required:
            return
        raise HostError(f"there is no {path}", fix="restore it: without it nobody can be told apart") from error
    except OSError as error:
        raise HostError(f"cannot read {path}") from error
    for line in text.split("\n"):
        if line and line[0] not in "#+-:":
            yield line.strip().split(":")


def _is_id(text: str) -> bool:
    """Tell whether ``text`` is a number that can be an id; int() would take more."""
    return text.isascii() and text.isdigit() and len(text) <= 10
