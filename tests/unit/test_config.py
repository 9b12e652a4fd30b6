# SPDX-License-Identifier: Apache-2.0
"""A Python program that gets a configuration wrong is told so as a file's author is, before anything is asked."""

from __future__ import annotations

from typing import Any

import pytest

from depriv.api import Toolstack
from depriv.config import Disk, Domain, Layer
from depriv.errors import ConfigError, render
from depriv.identity import SHARED


@pytest.mark.parametrize(
    "field",
    [
        *({"name": name} for name in (5, None, "", "a b", "../x", "-x", "a" * 64, "a\nb", "a,process=b", "7")),
        *({"memory_mib": memory} for memory in ("256", 0, -1, 1.5, True, None)),
        *({"vcpus": count} for count in ("2", 0)),
        *({"disks": disks} for disks in (["x"], "x", ("x",), Disk(vdev="hdc", cdrom=True))),
        *({name: path} for name in ("kernel", "ramdisk", "firmware", "device_model_override") for path in (5, "x")),
        *({"uuid": "x,sandbox=off"}, {"boot": "z"}, {"cmdline": "a\0b"}, {"serial": "pty"}, {"vifs": (1,)}),
        *({name: "coredump-restart"} for name in ("on_poweroff", "on_reboot", "on_crash")),
        *({name: word} for name in ("on_poweroff", "on_reboot", "on_crash") for word in ("", "soft-reset", None)),
        *({"accel": "xen"}, {"type": "lxc"}, {"bios": "rombios"}, {"device_model_args": "-cpu"}),
        *({"dm_restrict": "no"}, {"dm_restrict": 0}, {"dm_restrict": None}, {"rtc_timeoffset_s": "1"}),
    ],
)
def test_no_domain_has_a_value_that_no_file_could_have_given_it(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Domain(**{"name": "x", **field})
    assert caught.value.what.startswith(f"Domain: {next(iter(field))} is ")
    assert caught.value.fix


@pytest.mark.parametrize(
    "field",
    [
        *({"vdev": vdev} for vdev in (5, "xvda,x=y", "../a")),
        *({"target": target} for target in (5, "a.img", "", "/a\0", "/a\n")),
        *({"format": "vmdk"}, {"format": None}, {"readonly": "no"}, {"chain": ("/a",)}),
    ],
)
def test_no_disk_has_a_value_that_no_file_could_have_given_it(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^Disk: {next(iter(field))} is "):
        Disk(**{"vdev": "xvda", "target": "/a", **field})


WRITABLE = Disk(vdev="xvda", target="/a")


@pytest.mark.parametrize("name", ["on_poweroff", "on_reboot", "on_crash"])
@pytest.mark.parametrize(
    ("field", "held"),
    [
        ({"disks": (WRITABLE.replace(readonly=True), WRITABLE.replace(vdev="xvdb"))}, "xvdb"),
        ({"device_model_user": "alice"}, "the user alice"),
    ],
)
def test_no_domain_is_kept_beside_the_next_one_if_it_holds_what_that_one_needs(
    name: str, field: dict[str, Any], held: str
) -> None:
    with pytest.raises(ConfigError, match=f"^Domain: {name} is 'rename-restart', but .* would hold {held}, ") as caught:
        Domain(**{"name": "x", name: "rename-restart", **field})
    assert '"preserve"' in caught.value.fix


@pytest.mark.parametrize(
    "field",
    [
        {},
        {"disks": (WRITABLE.replace(readonly=True), Disk(vdev="hdc", target="/b", cdrom=True))},
        {"disks": (Disk(vdev="hdc", cdrom=True, format="empty"),)},
        {"device_model_user": SHARED},
    ],
)
def test_domain_that_holds_nothing_alone_may_be_kept_beside_the_next_one(field: dict[str, Any]) -> None:
    assert Domain(**{"name": "x", "on_crash": "rename-restart", **field}).on_crash == "rename-restart"


def test_a_backing_file_has_a_whole_path_and_a_known_format() -> None:
    with pytest.raises(ConfigError, match="target"):
        Layer(target="a", format="raw")
    with pytest.raises(ConfigError, match="format"):
        Layer(target="/a", format="vmdk")


def test_an_option_of_qemu_that_a_file_may_not_give_a_program_may_not_give() -> None:
    host = Toolstack(state_dir="/nonexistent")
    for act in (host.plan, host.create):
        with pytest.raises(ConfigError, match="-monitor is refused"):
            act(Domain(name="x", device_model_args=("-monitor", "stdio")))


@pytest.mark.parametrize("config", ["web1.cfg", None, {"name": "x"}])
def test_what_is_no_domain_is_called_so(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"is no depriv\.Domain"):
        Toolstack(state_dir="/nonexistent").plan(config)


def test_the_error_of_a_program_has_no_place() -> None:
    with pytest.raises(ConfigError) as caught:
        Domain(name="x", dm_restrict="no")  # type: ignore[arg-type] # as somebody without a type checker would
    assert render(caught.value) == "error: Domain: dm_restrict is 'no'\n  fix: give bool"
