# SPDX-License-Identifier: Apache-2.0
"""One domain as the registry keeps it, and its JSON."""

from __future__ import annotations

from depriv.errors import HostError
from depriv.host import Holding
from depriv.records import Record
from depriv.report import Expected, Grant, Limit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 2
STATES = ("starting", "running", "ending", "quarantined", "waiting")  # that are written
_TYPES: dict[str, type] = {"int": int, "str": str, "bool": bool}


class Tool(Record):
    """A process that runs beside a domain's QEMU, for it."""

    name: str  # "passt"
    role: str  # what it is for: "net0"
    pid: int
    starttime: int  # field 22 of /proc/PID/stat
    uid: int
    gid: int


class Entry(Record):
    """One domain as the registry knows it."""

    name: str
    domid: int
    # "starting", "running" (the guest may be paused, shut down or dead meanwhile), "ending", "quarantined" (something
    # of it does not die: its ids are not free), "waiting" (ended, to be started again; it holds nothing but its name),
    # "damaged" (never written: what the kernel shows of a domain whose entry cannot be read)
    state: str
    uid: int  # 0: not chosen yet
    gid: int
    reaper_uid: int
    shared: bool  # its uid is another domain's too, as asked for by name: never killed by uid
    restricted: bool
    memory_mib: int
    vcpus: int
    accel: str
    cgroup: str  # absolute path; "" with none
    boot_id: str  # of the kernel that all numbers of processes are of
    created_boot_ns: int  # CLOCK_BOOTTIME: with domid and boot_id the name of this one life; nobody can set that clock
    created_at_s: int  # seconds since 1970, for people
    toolstack_pid: int  # of the command that started it, and when that started: tells an unfinished start
    toolstack_starttime: int
    jail_pid: int = 0  # of the jail that starts it: it must be dead before an unfinished start is undone
    jail_starttime: int = 0
    images: tuple[tuple[int, int, int, bool], ...] = ()  # st_dev, st_ino, st_rdev, writable
    left: tuple[tuple[str, int, int], ...] = ()  # path, st_dev, st_ino of files outside its folder that end with it
    config: dict[str, Any] | None = None  # what was asked for, as depriv.wanted writes it
    restarts: int = 0  # how many times in a row it was started again after a short life
    trouble: str = ""  # why it is quarantined, waiting or damaged
    expected: Expected | None = None  # None until QEMU executes
    tools: tuple[Tool, ...] = ()

    @property
    def holding(self) -> Holding:
        """What planning has to know of it. The name of one that is quarantined is free: its end was asked for."""
        return Holding(
            name=self.name,
            domid=self.domid,
            uid=self.uid,
            gid=self.gid,
            images=self.images,
            name_free=self.state == "quarantined",
        )

    def same_life(self, other: Entry) -> bool:
        """Tell whether both are of one start of one domain."""
        mine = (self.domid, self.boot_id, self.created_boot_ns)
        return mine == (other.domid, other.boot_id, other.created_boot_ns)


def encode(entry: Entry) -> dict[str, object]:
    """Return the entry, ready for ``json.dumps``."""
    data = entry.as_dict()
    if entry.expected is not None:
        expected = entry.expected.as_dict()
        expected["limits"] = [limit.as_dict() for limit in entry.expected.limits]
        expected["grants"] = [grant.as_dict() for grant in entry.expected.grants]
        data["expected"] = expected
    data["tools"] = [tool.as_dict() for tool in entry.tools]
    return {"version": VERSION, **data}


def decode(data: dict[str, Any]) -> Entry:
    """Return the entry; a file of another version is not guessed at.

    Raises:
        HostError: the data is not what ``encode`` makes.
    """
    version = data.pop("version", None)
    if version != VERSION:
        raise HostError("is of another version of depriv", cause=f"version {str(version)[:20]!r}, not {VERSION}")
    try:
        expected = data.pop("expected")
        if expected is not None:
            expected["limits"] = tuple(Limit(**limit) for limit in expected["limits"])
            expected["grants"] = tuple(Grant(**grant) for grant in expected["grants"])
            expected["environ"] = tuple(expected["environ"])
            expected = Expected(**expected)
        data["images"] = tuple((dev, ino, rdev, writable) for dev, ino, rdev, writable in data["images"])
        data["left"] = tuple((path, dev, ino) for path, dev, ino in data.get("left", ()))
        data["tools"] = tuple(Tool(**tool) for tool in data.get("tools", ()))
        entry = Entry(**data, expected=expected)
    except (KeyError, TypeError, ValueError) as error:
        raise HostError("is not an entry of this version", cause=repr(error)[:200]) from error
    if not _is_of_its_types(entry):
        raise HostError("is not an entry of this version", cause="a value is none that is ever written there")
    return entry


def _is_of_its_types(entry: Entry) -> bool:
    """Tell whether every value is of its field's type: what is not is found here, not in the middle of an end."""
    plain: list[tuple[object, str]] = [(number, "int") for image in entry.images for number in image[:3]]
    plain += [(image[3], "bool") for image in entry.images]
    plain += [(item, kind) for file in entry.left for item, kind in zip(file, ("str", "int", "int"), strict=True)]
    records: list[Record] = [entry, *entry.tools]
    if entry.expected is not None:
        records += [entry.expected, *entry.expected.limits, *entry.expected.grants]
        plain += [(word, "str") for word in entry.expected.environ]
    plain += [(getattr(record, name), kind) for record in records for name, kind in record.fields.items()]
    good = all(type(value) is _TYPES[kind] for value, kind in plain if kind in _TYPES)
    return good and type(entry.config) in (dict, type(None)) and entry.state in STATES
