# SPDX-License-Identifier: Apache-2.0
"""A Python program that gets a configuration wrong is told so as a file's author is, before anything is asked."""

from __future__ import annotations

from typing import Any

import pytest

from depriv.api import Toolstack
from depriv.config import Disk, Domain, Layer
from depriv.errors import ConfigError, render


@pytest.mark.parametrize(
    "field",
    [
        *({"name": name} for name in (5, None, "", "a b", "../x", "-x", "a" * 64, "a\nb", "a,process=b")),
        *({"memory_mib": memory} for memory in ("256", 0, -1, 1.5, True, None)),
        *({"vcpus": count} for count in ("2", 0)),
        *({"disks": disks} for disks in (["x"], "x", ("x",), Disk(vdev="hdc", cdrom=True))),
        *({name: path} for name in ("kernel", "ramdisk", "firmware", "device_model_override") for path in (5, "x")),
        *({"uuid": "x,sandbox=off"}, {"boot": "z"}, {"cmdline": "a\0b"}, {"serial": "pty"}, {"vifs": (1,)}),
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
