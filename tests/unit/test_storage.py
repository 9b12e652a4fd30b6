# SPDX-License-Identifier: Apache-2.0
"""Which files a disk is made of: what fits is taken as configured, all else is refused with what to do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depriv.config import Disk, Domain, Layer
from depriv.errors import ConfigError
from depriv.host import FileFacts, Holding, Host, Program
from depriv.identity import Accounts
from depriv.storage import ImageFile, chains, private_file

MIB = 1 << 20


def facts(path: str, *, ino: int = 1, **keywords: object) -> FileFacts:
    values: dict[str, object] = {"kind": "file", "dev": 9, "size": MIB} | keywords
    return FileFacts(path=path, ino=ino, **values)  # type: ignore[arg-type] # the fields by their names


def qcow2(path: str, *, ino: int = 1, **keywords: object) -> FileFacts:
    return facts(path, ino=ino, magic="qcow2", virtual_size=64 * MIB, cluster_size=65536, **keywords)


def host(*files: FileFacts, holdings: tuple[Holding, ...] = ()) -> Host:
    return Host(
        root=True,
        program=Program(path="/usr/bin/qemu"),
        accounts=Accounts(users=(), groups=(), ranges=()),
        files=files,
        holdings=holdings,
    )


def domain(*disks: Disk, machine: str = "pc") -> Domain:
    return Domain(name="x", machine=machine, disks=disks, source="x.cfg")


def refusal(config: Domain, on: Host) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        chains(config, on, [])
    assert caught.value.fix, caught.value
    assert caught.value.source == "x.cfg"
    assert caught.value.exit_status == 2
    return caught.value


RAW = Disk(vdev="xvda", target="/a")
QCOW2 = Disk(vdev="xvda", target="/a", format="qcow2")


def test_raw_disk_is_one_file_that_is_written() -> None:
    ((image,),) = chains(domain(RAW), host(facts("/a")), [])
    assert (image.role, image.format, image.writable, image.driver) == ("xvda", "raw", True, "file")
    step = image.step(10)
    assert (step.path, step.access, step.kind, step.number, step.dev, step.ino, step.rdev) == (
        *("/a", "rw", "file", 10),
        *(9, 1, 0),
    )


@pytest.mark.parametrize("disk", [RAW.replace(readonly=True), Disk(vdev="hdc", target="/a", cdrom=True)])
def test_read_only_disks_and_cd_roms_are_opened_for_reading(disk: Disk) -> None:
    ((image,),) = chains(domain(disk), host(facts("/a")), [])
    assert not image.writable
    assert image.step(10).access == "ro"


def test_block_device_is_known_by_its_number_not_by_its_name() -> None:
    ((image,),) = chains(domain(RAW), host(facts("/a", kind="block", rdev=7)), [])
    step = image.step(10)
    assert (image.driver, image.size_max, image.hold) == ("host_device", 0, (0, 0, 7, True))
    assert (step.kind, step.rdev, step.dev, step.ino) == ("block", 7, 0, 0)


def test_empty_drive_has_no_file() -> None:
    assert chains(domain(Disk(vdev="hdc", format="empty", cdrom=True)), host(), []) == ((),)


def test_only_the_top_of_a_chain_is_written() -> None:
    disk = QCOW2.replace(chain=(Layer(target="/b", format="qcow2"), Layer(target="/c", format="raw")))
    on = host(qcow2("/a", ino=1, backing="b"), qcow2("/b", ino=2, backing="elsewhere"), facts("/c", ino=3))
    (found,) = chains(domain(disk), on, [])
    assert [(image.role, image.facts.path, image.writable) for image in found] == [
        ("xvda", "/a", True),
        ("xvda-1", "/b", False),
        ("xvda-2", "/c", False),
    ]


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("missing", "does not exist"),
        ("unreadable", "Not a directory"),
        ("symlink", "symbolic link to Not a directory"),
        ("directory", "directory"),
        ("fifo", "FIFO"),
        ("socket", "socket"),
        ("char", "character device"),
        ("door", "of kind door"),
    ],
)
def test_what_is_no_file_is_no_disk(kind: str, cause: str) -> None:
    error = refusal(domain(RAW), host(facts("/a", kind=kind, detail="Not a directory: /a")))
    assert error.what == "cannot use /a for xvda"
    assert cause in error.cause


def test_file_that_nobody_looked_at_is_missing() -> None:
    assert "does not exist" in refusal(domain(RAW), host()).cause


def test_empty_file_is_no_disk() -> None:
    error = refusal(domain(RAW), host(facts("/a", size=0)))
    assert "is empty" in error.what
    assert "truncate -s 10G /a" in error.fix


def test_header_that_names_more_than_the_configuration_is_refused_with_the_line_to_add() -> None:
    for backing, target in (("/b.qcow2", "/b.qcow2"), ("b.img", "/images/b.img"), ("../b", "/images/../b")):
        disk = QCOW2.replace(target="/images/a")
        error = refusal(domain(disk), host(qcow2("/images/a", backing=backing)))
        form = "qcow2" if backing.endswith("qcow2") else "raw"
        assert f"disk_backing = ['vdev=xvda,format={form},target={target}']" in error.fix
        assert repr(backing) in error.cause


def test_line_to_add_repeats_the_chain_so_far() -> None:
    disk = QCOW2.replace(chain=(Layer(target="/b", format="qcow2"),))
    error = refusal(domain(disk), host(qcow2("/a", backing="b"), qcow2("/b", ino=2, backing="/c")))
    assert "['vdev=xvda,format=qcow2,target=/b', 'vdev=xvda,format=raw,target=/c']" in error.fix


def test_header_is_never_followed() -> None:
    # The header names /evil; the configuration /good. /good is used, and /evil is in no step.
    disk = QCOW2.replace(chain=(Layer(target="/good", format="raw"),))
    on = host(qcow2("/a", backing="/evil"), facts("/good", ino=2), facts("/evil", ino=3))
    (found,) = chains(domain(disk), on, [])
    assert [image.facts.path for image in found] == ["/a", "/good"]


def test_other_contradictions_of_header_and_configuration_are_refused() -> None:
    below = QCOW2.replace(chain=(Layer(target="/b", format="raw"),))
    cases = (
        (QCOW2, (facts("/a"),), "is no qcow2 image"),
        (QCOW2, (qcow2("/a", data_file=True),), "keeps its data in another file"),
        (QCOW2, (qcow2("/a", encrypted=True),), "is encrypted"),
        (below, (qcow2("/a"), facts("/b", ino=2)), "stands alone"),
        (RAW.replace(chain=below.chain), (facts("/a"), facts("/b", ino=2)), "is raw and cannot have anything below"),
    )
    for disk, files, said in cases:
        assert said in refusal(domain(disk), host(*files)).what


def test_image_of_another_format_used_as_raw_is_a_warning_but_not_on_a_cd() -> None:
    warnings: list[str] = []
    chains(domain(RAW), host(facts("/a", magic="vmdk")), warnings)
    assert warnings == ["/a looks like vmdk and is used as raw, as the configuration says"]
    warnings.clear()
    chains(domain(Disk(vdev="hdc", target="/a", cdrom=True)), host(facts("/a", magic="vmdk")), warnings)
    assert warnings == []


@pytest.mark.parametrize(
    ("machine", "disk", "said"),
    [
        ("microvm", Disk(vdev="hda", target="/a"), "0 IDE ports"),
        ("pc", Disk(vdev="hde", target="/a"), "4 IDE ports"),
        ("q35", Disk(vdev="hdg", target="/a"), "6 IDE ports"),
        ("pc", Disk(vdev="hda", target="/a", readonly=True), "IDE disks cannot be"),
        ("pc", Disk(vdev="xvda", target="/a", cdrom=True), "virtio-blk has none"),
        ("pc", Disk(vdev="hdaa", target="/a"), "unknown vdev"),
        ("pc", Disk(vdev="xvd", target="/a"), "unknown vdev"),
        ("pc", Disk(vdev="", target="/a"), "unknown vdev"),
        ("pc", Disk(vdev="vda", target="/a"), "unknown vdev"),
    ],
)
def test_vdev_without_a_place_is_refused(machine: str, disk: Disk, said: str) -> None:
    assert said in refusal(domain(disk, machine=machine), host(facts("/a"))).what


@pytest.mark.parametrize(("mine", "theirs"), [(True, True), (True, False), (False, True)])
def test_image_of_another_domain_is_refused_if_either_writes(mine: bool, theirs: bool) -> None:
    other = Holding(name="web", domid=3, uid=1, gid=1, images=((9, 1, 0, theirs),))
    disk = RAW.replace(readonly=not mine)
    error = refusal(domain(disk), host(facts("/another-name", ino=2), facts("/a"), holdings=(other,)))
    assert error.what == "/a for xvda is in use by domain web"
    assert f"domain web {'writes' if theirs else 'reads'} it" in error.cause


def test_image_that_all_only_read_is_shared() -> None:
    other = Holding(name="web", domid=3, uid=1, gid=1, images=((9, 1, 0, False),))
    two = (RAW.replace(readonly=True), Disk(vdev="xvdb", target="/a", readonly=True))
    assert len(chains(domain(*two), host(facts("/a"), holdings=(other,)), [])) == 2


def test_hard_link_is_the_same_image() -> None:
    two = (RAW, Disk(vdev="xvdb", target="/b", readonly=True))
    assert "in use by disk xvda of this domain" in refusal(domain(*two), host(facts("/a"), facts("/b"))).what


def test_same_inode_on_another_file_system_is_another_image() -> None:
    two = (RAW, Disk(vdev="xvdb", target="/b"))
    assert len(chains(domain(*two), host(facts("/a"), facts("/b", dev=10)), [])) == 2


def test_reader_before_a_writer_does_not_hide_it() -> None:
    reader = Holding(name="r", domid=3, uid=1, gid=1, images=((9, 1, 0, False),))
    writer = Holding(name="w", domid=4, uid=2, gid=2, images=((9, 1, 0, True),))
    for order in ((reader, writer), (writer, reader)):
        refusal(domain(RAW.replace(readonly=True)), host(facts("/a"), holdings=order))


@pytest.mark.parametrize("kind", ["missing", "directory", "block", "char", "symlink"])
def test_kernel_has_to_be_a_file(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        private_file(domain(), host(facts("/k", kind=kind)), "kernel", "/k")
    assert caught.value.what == "cannot use kernel /k"
    with pytest.raises(ConfigError, match="kernel /k is empty"):
        private_file(domain(), host(facts("/k", size=0)), "kernel", "/k")
    assert private_file(domain(), host(facts("/k")), "kernel", "/k").size == MIB


@given(
    size=st.integers(0, 1 << 40),
    virtual=st.integers(0, 1 << 42),
    bits=st.integers(9, 21),
)
def test_limit_of_a_qcow2_file_has_room_for_all_clusters_and_their_tables(size: int, virtual: int, bits: int) -> None:
    cluster = 1 << bits
    image = ImageFile(
        role="x",
        facts=facts("/a", size=size, virtual_size=virtual, cluster_size=cluster),
        format="qcow2",
        writable=True,
    )
    clusters = -(-virtual // cluster)
    # 8 bytes of L2 entry and 8 of refcount for each, in whole clusters.
    tables = 2 * (-(-clusters * 8 // cluster) + 1) * cluster
    assert image.size_max >= size + clusters * cluster - cluster + tables - 2 * cluster
    assert image.size_max >= clusters * cluster


def test_limit_of_a_raw_file_is_its_size() -> None:
    image = ImageFile(role="x", facts=facts("/a", size=12345), format="raw", writable=True)
    assert image.size_max == 12345


def test_image_that_only_root_may_read_is_planned_for_with_a_warning_and_never_started() -> None:
    unread = facts("/srv/a.img", unread=True)
    config = domain(Disk(vdev="xvda", target="/srv/a.img"))
    warnings: list[str] = []
    assert chains(config, host(unread).replace(root=False), warnings)[0][0].writable
    assert ["cannot be read by this user" in text for text in warnings] == [True]
    assert "cannot be read" in refusal(config, host(unread)).cause
