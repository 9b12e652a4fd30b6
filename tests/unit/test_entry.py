# SPDX-License-Identifier: Apache-2.0
"""An entry comes back from JSON as it went, and what is none is refused as a whole, whatever is wrong in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.support.entries import EXPECTED, entry

from depriv.entry import STATES, Entry, Tool, decode, encode
from depriv.errors import HostError

FULL = entry(
    expected=EXPECTED,
    config={"name": "web", "on_poweroff": "destroy", "disks": [{"vdev": "xvda"}]},
    jail_pid=7,
    jail_starttime=8,
    restarts=3,
    trouble="why",
    left=(("/srv/vnc.sock", 1, 2),),
    tools=(Tool(name="passt", role="net0", pid=5, starttime=6, uid=98289, gid=98289),),
)


def data() -> dict[str, Any]:
    found = json.loads(json.dumps(encode(FULL)))
    assert isinstance(found, dict)
    return found


def check_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(HostError) as caught:
        decode(json.loads(json.dumps(changed)))
    assert caught.value.cause


@pytest.mark.parametrize("state", STATES)
def test_every_entry_that_is_written_is_read_as_it_was(state: str) -> None:
    for made in (FULL.replace(state=state), entry(state=state), entry(state=state, uid=0, images=())):
        assert decode(json.loads(json.dumps(encode(made)))) == made


@pytest.mark.parametrize("version", [None, 0, 1, 3, "2", "x", [2], {}, -2, 10**30])
def test_another_version_is_not_guessed_at_and_named(version: object) -> None:
    with pytest.raises(HostError, match="of another version") as caught:
        decode({**data(), "version": version})
    assert "not 2" in caught.value.cause
    assert len(caught.value.cause) < 60


@pytest.mark.parametrize("name", sorted(Entry.fields))
@pytest.mark.parametrize("value", [None, [], {}, "x", -1.5, [[1]], {"x": 1}], ids=repr)
def test_value_of_another_type_is_refused_in_every_field(name: str, value: object) -> None:
    good: dict[str, type | tuple[type, ...]] = {
        "str": str,
        "bool": bool,
        "int": int,
        "dict[str, Any] | None": (dict, type(None)),
    }
    kind = Entry.fields[name]
    possible = (
        (kind in good and isinstance(value, good[kind]) and name != "state")
        or (name in {"images", "left", "tools"} and value in ([], {}))
        or (name == "expected" and value is None)
    )
    if possible:
        assert decode({**data(), name: value}).domid == FULL.domid
    else:
        check_refused({**data(), name: value})


@pytest.mark.parametrize("value", [None, [1], {"x": 1}, 1.5])
@pytest.mark.parametrize("name", ["name", "role", "pid", "starttime", "uid", "gid"])
def test_value_of_another_type_is_refused_in_a_tool(name: str, value: object) -> None:
    changed = data()
    changed["tools"][0][name] = value
    check_refused(changed)


def test_truth_is_no_number_and_a_number_no_truth() -> None:
    for name in ("domid", "uid", "gid", "toolstack_pid", "created_boot_ns"):
        check_refused({**data(), name: True})
    for name in ("shared", "restricted"):
        check_refused({**data(), name: 1})


@pytest.mark.parametrize("state", ["damaged", "", "dead", "Running", "running "])
def test_state_that_is_never_written_is_refused(state: str) -> None:
    check_refused({**data(), "state": state})


@pytest.mark.parametrize(
    "image", [[], [1], [1, 2, 3], [1, 2, 3, True, 5], ["1", 2, 3, True], [1, 2, 3, 1], [1, 2, None, True], "abcd", 7]
)
def test_image_of_another_form_is_refused(image: object) -> None:
    check_refused({**data(), "images": [[1, 2, 0, True], image]})


@pytest.mark.parametrize("name", sorted(Entry.fields))
def test_field_that_is_missing_is_its_default_or_an_error(name: str) -> None:
    changed = data()
    del changed[name]
    if hasattr(Entry, name) and name not in {"images", "expected"}:
        assert getattr(decode(changed), name) == getattr(Entry, name)
    else:
        check_refused(changed)


def test_field_that_nobody_knows_is_refused() -> None:
    check_refused({**data(), "more": 1})
    changed = data()
    changed["expected"]["more"] = 1
    check_refused(changed)


@pytest.mark.parametrize("value", [None, "x", [1], {"x": 1}, 1.5])
@pytest.mark.parametrize("name", ["pid", "starttime", "uid", "domain", "restricted", "cgroup"])
def test_value_of_another_type_is_refused_in_what_is_expected_of_qemu(name: str, value: object) -> None:
    changed = data()
    changed["expected"][name] = value
    if name in ("domain", "cgroup") and value == "x":
        decode(changed)
    else:
        check_refused(changed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limits", None),
        ("limits", [7]),
        ("limits", [{"name": "CORE", "soft": "0", "hard": 0}]),
        ("limits", [{"name": "CORE", "soft": 0}]),
        ("grants", "x"),
        ("grants", [{"role": "x"}]),
        ("grants", [{"role": "x", "kind": "door", "dev": 1, "ino": 2, "access": "rw"}]),
        ("grants", [{"role": "x", "kind": "file", "dev": "1", "ino": 2, "access": "rw"}]),
        ("grants", [{"role": "x", "kind": ["file"], "dev": 1, "ino": 2, "access": "rw"}]),
        ("environ", None),
        ("environ", [7]),
    ],
)
def test_limits_grants_and_environment_of_another_form_are_refused(name: str, value: object) -> None:
    changed = data()
    changed["expected"][name] = value
    check_refused(changed)


def test_one_life_is_not_another_of_the_same_name_and_number() -> None:
    assert FULL.same_life(FULL.replace(state="ending", name="x", created_at_s=0))
    for changes in ({"domid": 2}, {"boot_id": "x"}, {"created_boot_ns": 5}):
        assert not FULL.same_life(FULL.replace(**changes))
