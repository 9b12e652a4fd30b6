# SPDX-License-Identifier: Apache-2.0
"""A domain is started again as it was started, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depriv.config import Disk, Domain, Layer, Note, Vif
from depriv.errors import ConfigError
from depriv.wanted import from_data, to_data
from depriv.xlconfig import load_domain

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = sorted((Path(__file__).parent.parent / "golden/cases").glob("*.cfg"))
FULL = Domain(
    name="web1",
    memory_mib=512,
    disks=(
        Disk(vdev="xvda", target="/srv/a.qcow2", format="qcow2", chain=(Layer(target="/srv/b", format="raw"),)),
        Disk(vdev="hdc", cdrom=True, format="empty", readonly=True),
    ),
    vifs=(Vif(mac="00:16:3e:00:00:01", devid=3),),
    kernel="/boot/vmlinuz",
    device_model_args=("-no-hpet", "-usb"),
    dm_restrict=False,
    on_reboot="preserve",
    notes=(Note(key="vif", text="not attached", line=4, warning=True),),
    source="caf\udce9.cfg",  # a name that is not UTF-8
    places=(("name", "web1.cfg", 1, 8, 'name = "web1"'),),
)


def through_json(data: object) -> object:
    return json.loads(json.dumps(data))


def refused(data: object) -> str:
    with pytest.raises(ConfigError) as caught:
        from_data(data)
    assert caught.value.fix
    return caught.value.what


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Return the data of the domain above after a change."""
    data: Any = through_json(to_data(FULL))
    change(data)
    assert isinstance(data, dict)
    return data


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_each_configuration_comes_back_as_it_was(path: Path) -> None:
    try:
        domain = load_domain(path.read_bytes(), source=path.name)
    except ConfigError:
        return  # there is no domain to keep
    assert from_data(through_json(to_data(domain))) == domain


def test_every_kind_of_field_comes_back_as_it_was() -> None:
    domain = from_data(through_json(to_data(FULL)))
    assert domain == FULL
    assert isinstance(hash(domain), int)  # no list is left in it


TEXT = st.text(st.characters() | st.sampled_from("\udc80\udcff"), max_size=20)


@given(
    text=TEXT,
    number=st.integers(-(2**62), 2**62),
    places=st.lists(st.tuples(TEXT, TEXT, st.integers(), st.integers(), TEXT), max_size=3).map(tuple),
)
def test_what_no_check_restrains_comes_back_as_it_was(text: str, number: int, places: Any) -> None:
    note = Note(key=text, text=text, line=number)
    domain = Domain(name="x", source=text, rtc_timeoffset_s=number, notes=(note,), places=places, vifs=(Vif(ip=text),))
    assert from_data(through_json(to_data(domain))) == domain


@pytest.mark.parametrize("data", [None, [], "web1", 5, True, [to_data(FULL)], FULL])
def test_what_is_no_object_is_refused(data: object) -> None:
    assert ": Domain is " in refused(data)


@pytest.mark.parametrize("name", Domain.fields)
def test_each_missing_field_is_named(name: str) -> None:
    assert refused(changed(lambda data: data.pop(name))).endswith(f": Domain.{name} is missing")


@pytest.mark.parametrize("name", Domain.fields)
def test_each_field_of_another_type_is_named(name: str) -> None:
    for wrong in (None, 1.5, {}, {"0": 1}):
        assert f": Domain.{name} is " in refused(changed(lambda data: data.update({name: wrong})))  # noqa: B023 (called at once)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(dm_restrict=0), "Domain.dm_restrict is int, not bool"),
        (lambda data: data.update(vcpus=True), "Domain.vcpus is bool, not int"),
        (lambda data: data.update(device_model_args="-usb"), "Domain.device_model_args is str, not a list"),
        (lambda data: data["device_model_args"].append(5), "Domain.device_model_args[2] is int, not str"),
        (lambda data: data["disks"][0].pop("readonly"), "Domain.disks[0].readonly is missing"),
        (lambda data: data["disks"][1].update(x=1), "Domain.disks[1] is an object with the unknown field 'x'"),
        (lambda data: data["disks"][0]["chain"].append("/x"), "Domain.disks[0].chain[1] is str, not an object"),
        (lambda data: data["notes"][0].update(line="4"), "Domain.notes[0].line is str, not int"),
        (lambda data: data["places"][0].pop(), "Domain.places[0] is a list of 4, not of 5"),
        (lambda data: data["places"][0].append(""), "Domain.places[0] is a list of 6, not of 5"),
        (lambda data: data.update({"x" * 999: 1}), "Domain is an object with the unknown field '" + "x" * 99),
    ],
)
def test_what_to_data_never_makes_is_refused_by_name(change: Callable[[dict[str, Any]], object], said: str) -> None:
    assert refused(changed(change)) == f"the kept configuration cannot be read: {said}"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(name="../x"),
        lambda data: data.update(kernel="boot/vmlinuz"),
        lambda data: data["disks"][0].update(vdev="xvda,x=y"),
        lambda data: data["disks"][0]["chain"][0].update(format="vmdk"),
        lambda data: data.update(on_crash="coredump-restart"),
        lambda data: data.update(on_crash="rename-restart"),
    ],
)
def test_what_no_configuration_may_say_kept_data_may_not_say(change: Callable[[dict[str, Any]], object]) -> None:
    refused(changed(change))
