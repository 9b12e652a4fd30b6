# SPDX-License-Identifier: Apache-2.0
"""QEMU options in the configuration: harmless ones pass, everything else is refused with the reason."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depriv.errors import ConfigError
from depriv.xlargs import _ALLOWED, _DENIED, check_arguments
from depriv.xlcfg import Value, parse, quote


def items(*words: str) -> tuple[Value, ...]:
    text = "device_model_args = [" + ", ".join(map(quote, words)) + "]"
    return parse(text, source="f")["device_model_args"].value.items


def passes(*words: str) -> tuple[str, ...]:
    return check_arguments(items(*words), "device_model_args")


def refuse(*words: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        passes(*words)
    assert caught.value.line == 1
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("-cpu", "host,migratable=off,+invtsc,-vmx,hv-relaxed"),
        ("-device", "e1000e,mac=00:16:3e:00:00:01,addr=5"),
        ("-device", "driver=virtio-rng-pci,max-bytes=1024"),
        ("-device", "qemu-xhci", "-device", "usb-tablet"),
        ("-device", "e1000,romfile="),
        ("-global", "PIIX4_PM.disable_s3=1"),
        ("-global", "VGA.vgamem_mb=32"),
        ("-boot", "menu=on,strict=on,order=dc"),
        ("-boot", "dc"),
        ("-smbios", "type=1,manufacturer=A,,B,serial=7"),
        ("-smbios", "type=1,serial=a,,path=b"),
        ("-rtc", "base=localtime,clock=vm,driftfix=slew"),
        ("-uuid", "6f1a3c7e-9f5b-4b8e-9c36-0d2f8a1b4c5d"),
        ("-vga", "std", "-usb", "-usbdevice", "tablet", "-no-hpet"),
    ],
)
def test_options_that_stay_within_the_guest_pass(words: tuple[str, ...]) -> None:
    assert passes(*words) == words


def test_two_dashes_are_one() -> None:
    assert passes("--cpu", "qemu64") == ("-cpu", "qemu64")
    assert "confined" in refuse("--runas", "root").what


@pytest.mark.parametrize("name", [name for names in _DENIED.values() for name in names.split()])
@pytest.mark.parametrize("spelling", ["-{}", "--{}", "-{}=x", "-{} x"])
def test_options_that_could_undo_a_restriction_are_refused(name: str, spelling: str) -> None:
    assert "is refused" in refuse(spelling.format(name), "x").what


def test_no_option_is_both_allowed_and_denied_and_none_is_twice() -> None:
    denied = [name for names in _DENIED.values() for name in names.split()]
    assert len(denied) == len(set(denied))
    assert not set(denied) & set(_ALLOWED)


@pytest.mark.parametrize("name", ["kernel", "initrd", "append", "bios"])
def test_files_of_the_guest_have_keys_of_their_own(name: str) -> None:
    assert "in the configuration" in refuse(f"-{name}", "/x").fix


@pytest.mark.parametrize("name", ["frobnicate", "Cpu", "cpu2", "-cpu", "machin", "xen-new-thing", "cpu\u0430"])
def test_unknown_options_are_refused_because_nobody_can_tell(name: str) -> None:
    assert "cannot tell" in refuse("-" + name if name[0] != "-" else "--" + name, "x").what


@pytest.mark.parametrize(
    "value",
    [
        "vfio-pci,host=01:00.0",
        "usb-host,hostbus=1",
        "vhost-vsock-pci",
        "ivshmem-plain,memdev=m",
        "loader,file=/etc/shadow",
        "e1000,romfile=/etc/shadow",
        "virtio-net-pci,netdev=n",
        "usb-storage,drive=d",
        "isa-serial,chardev=c",
        "virtio-9p-pci,fsdev=f,mount_tag=t",
        "virtio-vga-gl",
        "virtio-gpu-pci,blob=true",
        "scsi-generic,drive=d",
        '{"driver":"vfio-pci","host":"01:00.0"}',
        "virtio-input-host-pci,evdev=/dev/input/event0",
        "usb-mtp,rootdir=/",
        "tpm-tis,tpmdev=t",
        "virtio-rng-pci,rng=r",
        "e1000,,romfile=/x",
        "e1000,x-unknown=1",
        "driver=vfio-pci",
        "=",
        ",",
        "guest-loader,addr=0,kernel=/x",
        "e1000,mac=1,driver.romfile=/x",
        "u2f-passthru",
        "nvdimm,memdev=m",
        "xen-pci-passthrough",
    ],
)
def test_devices_that_reach_the_host_are_refused(value: str) -> None:
    refuse("-device", value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("-global", "e1000.romfile=/etc/shadow"),
        ("-global", "vfio-pci.host=1"),
        ("-global", "driver=e1000,property=romfile,value=/x"),
        ("-global", "ide-hd.drive=d"),
        ("-global", "migration.x-ignore-shared=on"),
        ("-boot", "splash=/etc/shadow,menu=on"),
        ("-boot", "order=c,unknown=1"),
        ("-smbios", "file=/etc/shadow"),
        ("-smbios", "type=11,path=/etc/shadow"),
        ("-smbios", "manufacturer=x,type=1"),
        ("-rtc", "base=utc,foo=/x"),
        ("-uuid", "../x"),
        ("-vga", "qxl"),
        ("-usbdevice", "host:1.2"),
        ("-watchdog-action", "debug"),
        ("-cpu", ""),
        ("-cpu", "-runas"),
    ],
)
def test_values_that_name_the_host_are_refused(option: str, value: str) -> None:
    refuse(option, value)


def test_an_option_lacking_its_value_cannot_swallow_the_next() -> None:
    assert "lacks its value" in refuse("-cpu").what
    assert "lacks its value" in refuse("-cpu", "-usb").what


def test_option_and_value_in_one_item_are_refused_with_the_way_to_write_it() -> None:
    assert 'two items: "-cpu"' in refuse("-cpu host").fix


@pytest.mark.parametrize("word", ["disk.img", "", "-", "--", "/etc/shadow", " -cpu"])
def test_a_word_that_is_no_option_is_refused(word: str) -> None:
    assert "disk image" in refuse(word).what


def test_lists_and_control_characters_are_refused() -> None:
    refuse("-smbios", "type=1,serial=\n")
    nested = parse('a = [ "-cpu", ["x"] ]', source="f")["a"].value.items
    with pytest.raises(ConfigError, match="list within"):
        check_arguments(nested, "a")


WORDS = st.sampled_from(
    ["-cpu", "host", "-device", "e1000", "vfio-pci", "-runas", "--usb", "-usb", "x", "-", "-chroot", "-D"]
)


@given(st.lists(WORDS, max_size=6))
@settings(max_examples=200, deadline=None)
def test_what_passes_has_only_allowed_options(words: list[str]) -> None:
    try:
        found = passes(*words)
    except ConfigError:
        return
    assert all(word[1:] in _ALLOWED for word in found if word.startswith("-"))
    assert not {"-runas", "-chroot", "-D", "vfio-pci"} & set(found) or "-cpu" in found


@pytest.mark.parametrize("word", ["-nodefaults", "--no-user-config"])
def test_options_that_every_command_line_has_are_taken_and_not_repeated(word: str) -> None:
    assert passes(word) == ()
