# SPDX-License-Identifier: Apache-2.0
"""Disk and network specifications: xl's expected results, and what a confined device model cannot have."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depriv.config import Disk, Layer, Vif
from depriv.errors import ConfigError
from depriv.xlcfg import Value, parse, quote
from depriv.xldisk import parse_disk, parse_disks
from depriv.xlspec import canonical_vdev, parse_number
from depriv.xlvif import parse_vif


def value(text: str) -> Value:
    """Return a specification as it stands in a file."""
    return parse(f"disk = {quote(text)}", source="f")["disk"].value


def disk(text: str) -> Disk:
    return parse_disk(value(text))[0]


def refuse(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_disk(value(text))
    error = caught.value
    assert error.line == 1
    assert error.text
    assert error.fix
    return error


def vif(text: str) -> Vif:
    return parse_vif(value(text))[0]


def refuse_vif(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_vif(value(text))
    assert caught.value.fix
    return caught.value


VOLUME = Disk(vdev="hda", target="/dev/vg/guest-volume", format="raw")
CDROM = Disk(vdev="hdc", target="/root/image.iso", readonly=True, cdrom=True, discard=False)
EMPTY = Disk(vdev="hdc", format="empty", readonly=True, cdrom=True, discard=False)


# The groups of equal specifications are those of Xen's tools/xl/check-xl-disk-parse.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/dev/vg/guest-volume,,hda", VOLUME),
        ("/dev/vg/guest-volume,raw,hda,rw", VOLUME),
        ("format=raw, vdev=hda, access=rw, target=/dev/vg/guest-volume", VOLUME),
        ("raw:/dev/vg/guest-volume,hda,w", VOLUME),
        ("phy:/dev/vg/guest-volume,hda,w", VOLUME),
        ("tap:aio:/dev/vg/guest-volume,hda,w", VOLUME),
        ("file:/dev/vg/guest-volume,ioemu:hda,w", VOLUME),
        ("/root/image.iso,,hdc,cdrom", CDROM),
        ("/root/image.iso,,hdc,,cdrom", CDROM),
        ("/root/image.iso,raw,hdc,devtype=cdrom", CDROM),
        ("format=raw, vdev=hdc, access=ro, devtype=cdrom, target=/root/image.iso", CDROM),
        ("raw:/root/image.iso,hdc:cdrom,ro", CDROM),
        ("file:/root/image.iso,hdc:cdrom,r", CDROM),
        ("devtype=cdrom,,,hdc", EMPTY),
        (",,hdc:cdrom,r", EMPTY),
        (",hdc:cdrom,r", EMPTY),
        ("vdev=hdc,access=r,devtype=cdrom,target=", EMPTY),
        (",empty,hdc:cdrom,r", EMPTY),
        ("vdev=hdc,access=r,devtype=cdrom,format=empty", EMPTY),
        ("vdev=hdc,access=r,devtype=cdrom", EMPTY),
        ("vdev=xvdb,target=/a", Disk(vdev="xvdb", target="/a")),
        ("qcow2:/a.qcow2,xvdb,w", Disk(vdev="xvdb", target="/a.qcow2", format="qcow2")),
        ("/a,qcow2,xvdb,r", Disk(vdev="xvdb", target="/a", format="qcow2", readonly=True, discard=False)),
        ("discard,vdev=hda,target=/a", Disk(vdev="hda", target="/a", discard=True)),
        ("no-discard,vdev=hda,target=/a", Disk(vdev="hda", target="/a", discard=False)),
        ("direct-io-safe,vdev=hda,target=/a", Disk(vdev="hda", target="/a", direct_io_safe=True)),
        ("vdev=hda,vdev=hda,format=,format=raw,target=/a", Disk(vdev="hda", target="/a")),
        ("vdev=d2p0,\n target=/a,b=c d:e", Disk(vdev="xvdc", target="/a,b=c d:e")),
        ("vdev=hda,backend=0,script=,no-colo,target=/a", Disk(vdev="hda", target="/a")),
    ],
)
def test_disk_specifications_mean_what_they_mean_to_xl(text: str, expected: Disk) -> None:
    assert disk(text) == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("foo", "no vdev"),
        ("", "no vdev"),
        ("/a,raw", "no vdev"),
        ("vdev=hda", "no target"),
        ("vdev=hda,target=", "no target"),
        (",hda:disk,w", "no target"),
        ("vdev=hda,vdev=hdb,target=/a", "respecified"),
        ("format=raw,format=qcow2,vdev=hda,target=/a", "respecified"),
        ("qcow2:/a,vdev=hda,format=raw", "respecified"),
        ("/a,raw,hda,w,target=/b", "respecified"),
        ("/a,raw,hda,w,extra", "too many"),
        ("/a,raw,hda,wx", "unknown access"),
        ("vdev=hda,access=x,target=/a", "unknown access"),
        ("/a,hda,w", "unknown format"),
        ("vdev=hda,devtype=floppy,target=/a", "unknown devtype"),
        ("file:/a,hda:floppy,w", "unknown type"),
        ("http://host/a.iso,raw,hdc,r", "unknown prefix"),
        ("vdev=hda,frobnicate=1,target=/a", "unknown parameter"),
        ("/srv/a=b.img,raw,hda,w", "unknown parameter"),
        ("vdev=hda,target=a.img", "not an absolute path"),
        ("a.img,raw,hda,w", "not an absolute path"),
        ("vdev=hda,target=json:{}", "not an absolute path"),
        ("vdev=hda,target=/a\tb", "control character"),
        ("vdev=hda,target=/" + "a" * 5000, "longer than"),
        ("vdev=hda,format=empty,target=/a", "format=empty"),
        ("vdev=hdc,cdrom,format=empty,target=/a", "format=empty"),
        ("vdev=hdc,cdrom,format=qcow2", "no format"),
        ("vdev=hda,backendtype=standalone,target=/a", "not supported"),
        ("vdev=hda,backendtype=blkback,target=/a", "not supported"),
        ("vdev=hda,backend=storage,target=/a", "not this host"),
        ("vdev=hda,script=block-iscsi,target=iqn.x", "would be run as root"),
        ("iscsi:iqn.2001-05.com.example:0-8,xvda,w", "as root"),
        ("nbd:unix:/s,xvda,w", "as root"),
        ("drbd:app01,hda,w", "as root"),
        ("vdev=hda,colo,target=/a", "COLO"),
        ("vdev=hda,colo-host=h,target=/a", "COLO"),
        ("vdev=hda,grant_usage=2,target=/a", "grant_usage"),
        ("vdev=hda,specification=nvme,target=/a", "specification"),
    ],
)
def test_wrong_disk_specifications_are_refused(text: str, what: str) -> None:
    assert what in refuse(text).what


def test_a_disk_error_points_at_the_item() -> None:
    error = refuse("vdev=hda,access=x,target=/a")
    assert error.column == len('disk = "vdev=hda,access=') + 1


@pytest.mark.parametrize(("form", "known_as"), [("vhd", "vpc"), ("qed", "qed"), ("qcow", "qcow")])
def test_other_formats_are_refused_with_the_line_that_converts_them(form: str, known_as: str) -> None:
    fix = refuse(f"vdev=hda,format={form},target=/srv/my disk.{form}").fix
    assert f"qemu-img convert -f {known_as} -O qcow2 '/srv/my disk.{form}' '/srv/my disk.qcow2'" in fix


def test_a_vdev_that_the_target_has_eaten_is_told_from_none() -> None:
    assert refuse("format=raw,target=/srv/a.img,vdev=xvda").fix == (
        "target= takes the rest of the string, vdev= included: write target= last"
    )
    assert "vdev=xvda" in refuse("format=raw,target=/srv/a.img").fix


def test_a_misspelt_parameter_is_answered_with_the_known_ones() -> None:
    assert "access" in refuse("vdev=xvda,mode=rw,target=/a").fix


def test_what_has_no_effect_on_a_disk_is_noted_with_the_reason() -> None:
    found, notes = parse_disk(value("backendtype=phy,vdev=xvdb,trusted,grant_usage=1,specification=xen,target=/dev/v"))
    assert found == Disk(vdev="xvdb", target="/dev/v")
    assert [note.text.partition(" ")[0] for note in notes] == [
        "backendtype=phy",
        "trusted",
        "grant_usage",
        "specification=xen",
    ]
    assert all(note.key == "disk" and note.line == 1 and note.column > 8 for note in notes)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("xvda", "xvda"),
        ("xvdz", "xvdz"),
        ("xvdaa", "xvdaa"),
        ("hdd", "hdd"),
        ("sdp", "sdp"),
        ("d0", "xvda"),
        ("d0p0", "xvda"),
        ("d536p0", "xvdtq"),
        ("51712", "xvda"),
        ("0xca10", "xvdb"),
        ("768", "hda"),
        ("832", "hdb"),
        ("5632", "hdc"),
        ("5696", "hdd"),
        ("2064", "sdb"),
        (str(1 << 28 | 16 << 8), "xvdq"),
    ],
)
def test_every_spelling_of_a_vdev_has_one_canonical_form(name: str, canonical: str) -> None:
    assert canonical_vdev(name) == canonical
    assert canonical_vdev(canonical) == canonical


@pytest.mark.parametrize("name", ["xvda1", "hda2", "sdb3", "d1p2", "51713", "d536p37", "769", str(1 << 28 | 1)])
def test_partitions_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is partition .* whole disks only"):
        canonical_vdev(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "xvd",
        "xvda0",
        "xvdA",
        "hde",
        "sdq",
        "vda",
        "/dev/xvda",
        "dp0",
        "d1p",
        "d",
        "d0x",
        "hda ",
        "ioemu:hda",
        "1",
        "xvdzzzzz",
        "d1048576",
        "999999999999999999999999",
        "-51712",
        "xvd\u0430",
        "d\u0661",
        str(2 << 28),
        "900",
    ],
)
def test_what_is_no_vdev_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        canonical_vdev(name)
    assert caught.value.fix


@given(st.integers(0, (1 << 20) - 1))
@settings(max_examples=200, deadline=None)
def test_the_letters_of_a_disk_lead_back_to_it(number: int) -> None:
    name = canonical_vdev(f"d{number}")
    assert canonical_vdev(name) == name
    assert canonical_vdev(str(1 << 28 | number << 8)) == name


def test_two_disks_with_one_vdev_are_refused_naming_both_lines() -> None:
    text = 'disk = [ "/a,raw,xvda,w",\n"/b,raw,hda,w",\n"/c,raw,d0p0,w" ]'
    with pytest.raises(ConfigError, match="two disks are xvda: one in line 1 and one in line 3"):
        parse_disks(parse(text, source="f")["disk"].value.items)


def backed(disks: list[str], backing: list[str]) -> tuple[Disk, ...]:
    return parse_disks(tuple(map(value, disks)), tuple(map(value, backing)))[0]


def test_backing_files_make_the_chain_nearest_first() -> None:
    found = backed(
        ["/a.qcow2,qcow2,xvda,w", "/b,raw,xvdb,w"],
        ["vdev=xvda,format=qcow2,target=/one.qcow2", "vdev=d0,format=raw,target=/two"],
    )
    assert found[0].chain == (Layer(target="/one.qcow2", format="qcow2"), Layer(target="/two", format="raw"))
    assert found[1].chain == ()


@pytest.mark.parametrize(
    ("backing", "what"),
    [
        (["vdev=xvdc,format=raw,target=/x"], "no disk xvdc"),
        (["vdev=xvdb,format=raw,target=/x"], "based on nothing"),
        (["vdev=hdc,format=raw,target=/x"], "based on nothing"),
        (["vdev=xvda,format=raw,target=/x", "vdev=xvda,format=raw,target=/y"], "based on nothing"),
        (["vdev=xvda,format=qcow2,target=/a.qcow2"], "already"),
        (["vdev=xvda,format=qcow2,target=/x", "vdev=xvda,format=qcow2,target=/x"], "already"),
        (["vdev=xvda,target=/x"], "no format"),
        (["format=raw,target=/x"], "no vdev"),
        (["vdev=xvda,format=raw"], "no target"),
        (["vdev=xvda,format=empty,target=/x"], "empty"),
        (["vdev=xvda,format=vhd,target=/x"], "vhd"),
        (["vdev=xvda,format=raw,target=x"], "absolute"),
        (["vdev=xvda,format=raw,access=rw,target=/x"], "access"),
        (["vdev=xvda,format=raw,devtype=cdrom,target=/x"], "devtype"),
        (["vdev=xvda,format=raw,discard,target=/x"], "discard"),
        (["vdev=xvda,format=raw,backendtype=phy,target=/x"], "backendtype"),
    ],
)
def test_impossible_backing_files_are_refused(backing: list[str], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        backed(["/a.qcow2,qcow2,xvda,w", "/b,raw,xvdb,w", ",hdc:cdrom,r"], backing)
    assert what in caught.value.what
    assert caught.value.line


@given(st.text(st.sampled_from("vdevtargetformatraw=,:/ xhd01cromqcow2empty\\'"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_disk_specification_is_read_or_refused(text: str) -> None:
    try:
        found = disk(text)
    except ConfigError as error:
        assert 1 <= error.column <= len(error.text) + 1  # noqa: PT017 (either outcome is right)
    else:
        assert found.target.startswith("/") or found.cdrom
        assert found.format in ("raw", "qcow2") or not found.target


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Vif()),
        (" , ,", Vif()),
        ("mac=00:16:3E:0:1:Af,bridge=xenbr0", Vif(mac="00:16:3e:00:01:af", bridge="xenbr0")),
        ("type=vif, model=e1000, devid=3, mtu=9000", Vif(type="vif", model="e1000", devid=3, mtu=9000)),
        ("ip=10.0.0.1 10.0.0.2,vifname=web.0", Vif(ip="10.0.0.1 10.0.0.2", vifname="web.0")),
        ("script=vif-route", Vif(script="vif-route")),
        ("netdev=eth1", Vif(gatewaydev="eth1")),
        ("backend=dom,forwarddev=eth2,vlan=5,accel=1,untrusted", Vif(backend="dom", forwarddev="eth2", vlan="5")),
        ("rate=10MB/s@20ms", Vif(rate="10MB/s@20ms")),
    ],
)  # fmt: skip
def test_network_cards_are_read(text: str, expected: Vif) -> None:
    assert vif(text) == expected


# The rates are those of Xen's tools/xl/check-xl-vif-parse.
@pytest.mark.parametrize(
    "rate",
    [
        "16000000b/s",
        "2000000B/s@50ms",
        "16Kb/s",
        "2KB/s@50ms",
        "16Mb/s",
        "8Gb/s",
        "1GB/s@50ms",
        "80Mb/s@1s",
        "1B/s@1us",
    ],
)
def test_rates_that_xl_takes_are_taken(rate: str) -> None:
    assert vif(f"rate={rate}").rate == rate


@pytest.mark.parametrize(
    "rate",
    [
        "",
        "foo",
        "10MB",
        "10MB/m",
        "10ZB",
        "10ZB/s",
        "10ZB/m",
        "4294967296b/s",
        "4294967296Kb/s",
        "4294967296Gb/s",
        "0B/s",
        "10Mb/s@foo",
        "10Mb/s@10h",
        "10MB/s@",
        "1B/s@4294967296us",
        "1B/s@4294968ms",
        "1B/s@4295s",
        "1B/s@0us",
        "@",
        "1b/s",
        "4294967295GB/s@5us",
        "4296MB/s@4294s",
        "-1MB/s",
        "\u0661MB/s",
        "1MB/s@1mus",
        " 1MB/s",
    ],
)
def test_rates_that_xl_refuses_are_refused(rate: str) -> None:
    refuse_vif(f"rate={rate}")


@pytest.mark.parametrize(
    "text",
    [
        "foo",
        "foo=1",
        "mac=1:2:3",
        "mac=00:16:3e:00:00:zz",
        "mac=01:00:5e:00:00:01",
        "mac=00:00:00:00:00:00",
        "mac=00-16-3e-00-00-01",
        "mac=00:16:3e:00:00:001",
        "type=tap",
        "model=",
        "model=a b",
        "model=e1000;id",
        "mtu=0",
        "vifname=",
        "vifname=a/b",
        "vifname=..",
        "vifname=0123456789abcdef",
        "vifname=a b",
        "devid=-1",
        "devid=x",
        "mtu=67",
        "mtu=65536",
        "mtu=x",
        "bridge=x\ty",
        "colo_sock_mirror_id=x",
        "MAC=00:16:3e:00:00:01",
    ],
)
def test_wrong_network_cards_are_refused(text: str) -> None:
    refuse_vif(text)


@given(st.text(st.sampled_from("macbridgetypevifrate=,:/ 0123@MBs"), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_network_card_is_read_or_refused(text: str) -> None:
    try:
        vif(text)
    except ConfigError as error:
        assert 1 <= error.column <= len(error.text) + 1  # noqa: PT017 (either outcome is right)


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("10", 10), ("0x1F", 31), ("017", 15), (" +5", 5), ("-3600", -3600), ("9" * 18, int("9" * 18))],
)
def test_numbers_are_read_as_strtol_does(text: str, number: int) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    "text", ["", " ", "08", "0x", "1k", "1 ", "yes", "--1", "+-1", "1_0", "\u0661", "9" * 19, "9" * 5000]
)
def test_what_strtol_does_not_take_whole_is_no_number(text: str) -> None:
    assert parse_number(text) is None
