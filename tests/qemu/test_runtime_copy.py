# SPDX-License-Identifier: Apache-2.0
"""The copy of QEMU's files: only what it loads, nobody else's to change, and made anew when an original changes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support import guests

from depriv.api import Toolstack
from depriv.config import Disk, Domain
from depriv.errors import DeprivError, HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from depriv.api import Guest

pytestmark = [pytest.mark.qemu, pytest.mark.root]


@pytest.fixture
def cache() -> Iterator[Path]:
    """Return a folder for copies that is no other test's."""
    with tempfile.TemporaryDirectory(prefix="depriv-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder) / "cache"


@pytest.fixture
def host(unchanged: None, tmp_path: Path, cache: Path) -> Iterator[Toolstack]:
    del unchanged
    made = guests.toolstack(tmp_path / "state", cache_dir=str(cache))
    yield made
    guests.end_all(made)


def lives(guest: Guest) -> None:
    assert guest.row().state in ("running", "paused")
    assert guest.audit().holds
    guest.destroy()


def folders(cache: Path) -> list[Path]:
    return sorted((cache / "runtime").iterdir())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_copy_holds_what_this_machine_loads_and_no_more(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a", machine="pc")))
    (folder,) = folders(cache)
    have = names(folder)
    assert {"qemu-system-x86_64", "bios-256k.bin", "kvmvapic.bin", "manifest.json"} <= have
    assert any(name.startswith("ld-linux") for name in have)
    assert any(name.startswith("libc.so") for name in have)
    unwanted = {"qboot.rom", "bios-microvm.bin", "vgabios-stdvga.bin", "efi-e1000.rom", "sh", "bash", "passwd"}
    assert not unwanted & have
    roms = {name for name in have if name.endswith((".rom", ".bin", ".fd", ".img", ".dtb"))}
    assert roms <= {"bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"}, roms
    assert not [name for name in have if name.startswith(("hw-", "ui-", "audio-", "block-", "chardev-"))]
    assert len(have) < 100


def test_each_machine_has_a_copy_with_its_own_firmware_only(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a", machine="pc")))
    lives(host.create(Domain(name="b", machine="microvm")))
    found = [names(folder) for folder in folders(cache)]
    assert len(found) == 2
    (micro,) = [have for have in found if "qboot.rom" in have or "bios-microvm.bin" in have]
    assert "bios-256k.bin" not in micro


def test_second_start_uses_the_copy_as_it_is(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a")))
    (before,) = folders(cache)
    made = (before / "manifest.json").stat()
    lives(host.create(Domain(name="a")))
    lives(host.create(Domain(name="other", memory_mib=64, vcpus=2)))
    (after,) = folders(cache)
    used = (after / "manifest.json").stat()
    assert (after, used.st_ino) == (before, made.st_ino)
    assert used.st_mtime_ns > made.st_mtime_ns  # it tells which copies are of use


def test_every_file_is_roots_and_nobody_can_write_it_or_read_the_program(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a")))
    (folder,) = folders(cache)
    for path in (folder, *folder.rglob("*")):
        have = path.lstat()
        assert have.st_uid == 0, path
        assert path.is_symlink() or not have.st_mode & 0o7022, path
    (program,) = folder.rglob("qemu-system-x86_64")
    assert program.stat().st_mode & 0o7777 == 0o111


def test_changed_library_makes_a_new_copy(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a")))
    (folder,) = folders(cache)
    manifest = folder / "manifest.json"
    data = json.loads(manifest.read_text())
    # As after an upgrade: the library that was copied is no longer the one that is there.
    number = next(n for n, source in enumerate(data["sources"]) if "/libc.so" in source[0])
    stale = [*data["sources"][number][:2], data["sources"][number][2] - 1, data["sources"][number][3]]
    right = data["sources"][number]
    data["sources"][number] = stale
    manifest.write_text(json.dumps(data))
    lives(host.create(Domain(name="a")))
    (again,) = folders(cache)
    assert json.loads((again / "manifest.json").read_text())["sources"][number] == right


def test_changed_program_makes_a_new_copy_and_the_old_one_goes(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a")))
    (common,) = folders(cache)
    own = cache.parent / "own"
    for path, *_ in json.loads((common / "manifest.json").read_text())["sources"]:
        if "/qemu" in path or "/share/" in path:  # QEMU looks for its modules and firmware beside itself
            copy = own / path.removeprefix("/usr/")
            copy.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            shutil.copy(path, copy)
    program = own / "bin" / "qemu-system-x86_64"
    config = Domain(name="a", device_model_override=str(program))
    lives(host.create(config))
    (before,) = set(folders(cache)) - {common}
    os.utime(program, ns=(1, 1))
    lives(host.create(config))
    (after,) = set(folders(cache)) - {common}
    assert after != before


def test_copy_that_is_not_whole_is_made_anew(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a")))
    (folder,) = folders(cache)
    for damage in ("manifest.json", "nothing", "not json"):
        if damage == "manifest.json":
            (folder / "manifest.json").unlink()
        elif damage == "nothing":
            (folder / "manifest.json").write_text("")
        else:
            (folder / "manifest.json").write_text('{"version": 999}')
        lives(host.create(Domain(name="a")))
        assert json.loads((folder / "manifest.json").read_text())["sources"]


def test_readable_program_is_refused_with_the_reason(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a")))
    (folder,) = folders(cache)
    (program,) = folder.rglob("qemu-system-x86_64")
    program.chmod(0o755)
    with pytest.raises(HostError, match="can be read: QEMU would be dumpable") as caught:
        host.create(Domain(name="a"))
    assert "its mode is 0755, it has to be 0111" in caught.value.cause
    assert caught.value.fix.endswith(f"rm -r {folder}")
    assert host.guests() == ()
    shutil.rmtree(folder)
    lives(host.create(Domain(name="a")))


@pytest.mark.parametrize("above", [0, 1, 2])
def test_folder_that_somebody_else_can_write_is_refused(host: Toolstack, cache: Path, above: int) -> None:
    lives(host.create(Domain(name="a")))
    (folder,) = folders(cache)
    target = (folder, *folder.parents)[above]
    target.chmod(0o777)
    with pytest.raises(HostError, match="can be written by somebody other than root") as caught:
        host.create(Domain(name="a"))
    assert str(target) in str(caught.value)
    assert "mode 0777" in caught.value.cause
    assert f"chmod go-w {target}" in caught.value.fix
    assert host.guests() == ()


def test_folder_that_somebody_else_owns_is_refused(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a")))
    (folder,) = folders(cache)
    os.chown(folder, 65534, 65534)
    with pytest.raises(HostError, match="can be written by somebody other than root") as caught:
        host.create(Domain(name="a"))
    assert "owner 65534" in caught.value.cause


def test_cache_folder_of_somebody_else_is_not_used_in_the_first_place(host: Toolstack, cache: Path) -> None:
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    with pytest.raises(HostError, match="can be written by somebody other than root"):
        host.create(Domain(name="a"))
    assert host.guests() == ()


def test_cache_folder_that_is_a_link_is_called_one(host: Toolstack, cache: Path) -> None:
    cache.symlink_to("/tmp")
    with pytest.raises(HostError, match="is a symbolic link") as caught:
        host.create(Domain(name="a"))
    assert caught.value.fix == f"rm {cache}"
    assert host.guests() == ()


def test_four_first_starts_at_once_make_one_copy(host: Toolstack, cache: Path) -> None:
    failed: list[DeprivError] = []

    def create(number: int) -> None:
        try:
            host.create(Domain(name=f"g{number}"))
        except DeprivError as error:
            failed.append(error)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(host.guests()) == 4
    assert len(folders(cache)) == 1
    for guest in host.guests():
        lives(guest)


def test_disks_need_no_copy_of_their_own_for_each_letter(host: Toolstack, cache: Path, disk: Path) -> None:
    lives(host.create(Domain(name="a", disks=(Disk(vdev="xvda", target=str(disk)),))))
    lives(host.create(Domain(name="a", disks=(Disk(vdev="xvdb", target=str(disk)),))))
    assert len(folders(cache)) == 1


def test_nothing_of_the_copy_is_left_in_a_running_guests_root(host: Toolstack) -> None:
    guest = host.create(Domain(name="a"))
    pid = guest.row().pid
    assert os.listdir(f"/proc/{pid}/root") == ["dev"]
    with open(f"/proc/{pid}/mountinfo", encoding="ascii") as file:
        assert len(file.readlines()) == 1


def test_toolstack_touches_nothing_before_it_is_asked(tmp_path: Path) -> None:
    Toolstack(state_dir=str(tmp_path / "state"), cache_dir=str(tmp_path / "cache"))
    assert os.listdir(tmp_path) == []


def test_link_that_leads_elsewhere_by_now_makes_a_new_copy(host: Toolstack, cache: Path, tmp_path: Path) -> None:
    """An upgrade may leave the old library in place and move the link by which the linker finds it."""
    lives(host.create(Domain(name="a")))
    (folder,) = folders(cache)
    manifest = folder / "manifest.json"
    data = json.loads(manifest.read_text())
    # Libraries are watched under the names that they are opened by, and most of these are links.
    assert any(os.path.islink(path) for path, *_ in data["sources"])
    for name in ("libx.so.1.1", "libx.so.1.2"):
        (tmp_path / name).write_text("as long as the other")
        os.utime(tmp_path / name, ns=(1, 1))
    link = tmp_path / "libx.so.1"
    link.symlink_to("libx.so.1.1")
    have = link.stat()
    data["sources"].append([str(link), have.st_size, have.st_mtime_ns, have.st_ino])
    manifest.write_text(json.dumps(data))
    lives(host.create(Domain(name="a")))
    assert json.loads(manifest.read_text()) == data  # nothing has changed so far
    link.unlink()
    link.symlink_to("libx.so.1.2")
    lives(host.create(Domain(name="a")))
    assert str(link) not in {path for path, *_ in json.loads(manifest.read_text())["sources"]}


def test_copies_share_what_they_have_in_common(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a", machine="pc")))
    lives(host.create(Domain(name="b", machine="q35")))
    one, other = folders(cache)
    alone: list[int] = []
    for path in one.rglob("*"):
        twin = other / path.relative_to(one)
        if path.is_file() and path.name != "manifest.json" and (not twin.exists() or not path.samefile(twin)):
            alone.append(path.stat().st_size)
    assert sum(alone) < 1 << 20, alone
    (program,) = one.rglob("qemu-system-x86_64")
    assert (program.stat().st_nlink, program.stat().st_mode & 0o7777) == (2, 0o111)
    shutil.rmtree(one)  # whichever goes, the other one is whole
    lives(host.create(Domain(name="c", machine="pc")))
    lives(host.create(Domain(name="d", machine="q35")))


def test_copy_that_is_not_as_it_was_is_not_shared(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a", machine="pc")))
    (first,) = folders(cache)
    (short,) = first.rglob("bios-256k.bin")
    (open_to_all,) = first.rglob("kvmvapic.bin")
    short.chmod(0o755)
    short.write_bytes(b"short")
    short.chmod(0o555)
    open_to_all.chmod(0o777)
    lives(host.create(Domain(name="b", machine="q35")))
    (second,) = (folder for folder in folders(cache) if folder != first)
    for name in (short.name, open_to_all.name):
        (copy,) = second.rglob(name)
        assert copy.stat().st_mode & 0o7777 == 0o555
        assert copy.stat().st_nlink == 1
        assert copy.stat().st_size > 5


def test_of_many_copies_those_not_used_for_long_are_removed(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a", machine="pc")))
    (first,) = folders(cache)
    now = time.time()
    for number in range(40):
        folder = shutil.copytree(first, first.with_name(f"copy{number:02}"))
        # The last three have been chosen by a start a moment ago, which may not have come to use them.
        then = now - (1 if number >= 37 else 86400 + number)
        os.utime(folder / "manifest.json", (then, then))
    lives(host.create(Domain(name="b", machine="q35")))
    left = {folder.name for folder in folders(cache)}
    assert len(left) == 32
    assert first.name in left
    assert {f"copy{number}" for number in (37, 38, 39)} <= left
    assert {f"copy{number:02}" for number in range(27)} <= left
    lives(host.create(Domain(name="c", machine="pc")))


def test_copies_in_use_are_kept_however_many(host: Toolstack, cache: Path) -> None:
    lives(host.create(Domain(name="a", machine="pc")))
    (first,) = folders(cache)
    for number in range(40):
        shutil.copytree(first, first.with_name(f"copy{number:02}"))
        os.utime(first.with_name(f"copy{number:02}") / "manifest.json")
    lives(host.create(Domain(name="b", machine="q35")))
    assert len(folders(cache)) == 42
