# SPDX-License-Identifier: Apache-2.0
"""What is wrong is said, with its cause and what to do, by the right exit status, and nothing of the host changes."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.guests import CommandLine, compiled, config_text, next_base, seeded
from tests.support.host import living, snapshot

from depriv import lifecycle
from depriv.api import Toolstack
from depriv.config import Disk, Domain
from depriv.errors import JailError, MonitorError
from depriv.identity import DOMID_FIRST, DOMID_LAST, RANGE_BASE, REAPER
from depriv.spawn import Jail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.root]

MIB = 1 << 20


def image(path: Path, *options: str, form: str = "qcow2", size: str = "1M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", form, *options, str(path), size], check=True)
    return path


def raw(path: Path, data: bytes = b"x") -> Path:
    path.write_bytes(data.ljust(MIB, b"\0"))
    return path


def spec(path: object, *, form: str = "raw", vdev: str = "xvda", access: str = "rw") -> str:
    return f"format={form},vdev={vdev},access={access},target={path}"


def refused(
    depriv: CommandLine, uids: range, text: str, *words: str, status: int = 2, tmp_path: Path
) -> tuple[str, str, str]:
    """Run `depriv create`; hold it to the form of an error and to having changed nothing; return what, cause, fix."""
    path = tmp_path / "refused.cfg"
    path.write_text(text)
    where: dict[str, Any] = {"folder": f"{depriv.state_dir}/domains", "uids": uids}
    before = snapshot(**where)
    done = depriv.run("create", str(path), *words, expect=status)
    assert snapshot(**where) == before
    path.unlink()
    assert done.stdout == ""
    parts = {"error": "", "cause": "", "  fix": ""}
    at = ""
    for line in done.stderr.splitlines():
        head, colon, rest = line.partition(": ")
        if colon and head in parts:
            at = head
            parts[at] = rest
        elif at:
            parts[at] += "\n" + line.strip()
    assert parts["error"], done.stderr
    assert "Traceback" not in done.stderr
    return parts["error"], parts["cause"], parts["  fix"]


@pytest.mark.parametrize(("kind", "said"), [("pv", "PV"), ("pvh", "PVH")])
def test_guests_that_need_xen_are_told_what_would_run_them(
    depriv: CommandLine, uids: range, tmp_path: Path, kind: str, said: str
) -> None:
    what, cause, fix = refused(depriv, uids, config_text("x", type=kind), status=125, tmp_path=tmp_path)
    assert what == f"x is a {said} guest, and this host does not run Xen"
    assert "talks to the Xen hypervisor" in cause
    assert "xl" in fix
    assert 'type="hvm"' in fix


def missing(folder: Path) -> Path:
    return folder / "none.img"


def below_a_file(folder: Path) -> Path:
    return raw(folder / "file") / "disk.img"


def empty(folder: Path) -> Path:
    (folder / "empty.img").touch()
    return folder / "empty.img"


def symlink(folder: Path) -> Path:
    (folder / "link.img").symlink_to(raw(folder / "real.img"))
    return folder / "link.img"


def dangling(folder: Path) -> Path:
    (folder / "dangling.img").symlink_to(folder / "nowhere")
    return folder / "dangling.img"


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def directory(folder: Path) -> Path:
    (folder / "folder").mkdir()
    return folder / "folder"


def character_device(folder: Path) -> Path:
    os.mknod(folder / "zero", 0o20600, os.makedev(1, 5))
    return folder / "zero"


def unix_socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "socket"))
    return folder / "socket"


@pytest.mark.parametrize(
    ("make", "cause", "fix"),
    [
        (missing, "does not exist", "correct the path"),
        (below_a_file, "Not a directory", "correct the path"),
        (empty, "", "truncate -s "),
        (symlink, "symbolic link to ", "real.img"),
        (dangling, "symbolic link to ", "nowhere"),
        (fifo, "FIFO", "regular file or a block device"),
        (directory, "directory", "name a file in it"),
        (character_device, "character device", "regular file or a block device"),
        (unix_socket, "socket", "regular file or a block device"),
    ],
)
def test_image_that_is_none_is_refused(
    depriv: CommandLine, uids: range, *, tmp_path: Path, make: Callable[[Path], Path], cause: str, fix: str
) -> None:
    path = make(tmp_path)
    for access in ("rw", "ro"):
        what, why, remedy = refused(depriv, uids, config_text("x", spec(path, access=access)), tmp_path=tmp_path)
        assert f"cannot use {path} for xvda" in what
        assert cause in why
        assert fix in remedy


def test_second_bad_disk_is_named_though_the_first_is_good(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    good = spec(raw(tmp_path / "good.img"))
    text = config_text("x", good, spec(tmp_path / "bad.img", vdev="xvdb"))
    what, _, _ = refused(depriv, uids, text, tmp_path=tmp_path)
    assert f"{tmp_path}/bad.img for xvdb" in what


@pytest.mark.parametrize("key", ["kernel", "ramdisk", "firmware_override"])
def test_kernel_ramdisk_and_firmware_have_to_be_files(
    depriv: CommandLine, uids: range, tmp_path: Path, key: str
) -> None:
    keys: dict[str, object] = {"kernel": str(raw(tmp_path / "kernel"))} if key == "ramdisk" else {}
    for path, said in ((tmp_path / "none", "does not exist"), (directory(tmp_path), "directory")):
        _, cause, fix = refused(depriv, uids, config_text("x", **keys, **{key: str(path)}), tmp_path=tmp_path)
        assert said in cause
        assert fix


def test_backing_file_in_a_header_is_refused_and_the_line_shown_is_the_right_one(
    depriv: CommandLine, uids: range, tmp_path: Path
) -> None:
    base = raw(tmp_path / "base.img")
    image(tmp_path / "middle.qcow2", "-b", str(base), "-F", "raw")
    top = image(tmp_path / "top.qcow2", "-b", "middle.qcow2", "-F", "qcow2")
    text = config_text("x", spec(top, form="qcow2"))
    for below in ("'middle.qcow2'", f"'{base}'"):
        what, cause, fix = refused(depriv, uids, text, tmp_path=tmp_path)
        assert "is based on another image, and the configuration does not say so" in what
        assert f"its header names {below}" in cause
        (line,) = [line for line in fix.splitlines() if line.startswith("disk_backing = ")]
        text = "".join(f"{old}\n" for old in text.splitlines() if not old.startswith("disk_backing")) + line + "\n"
    path = tmp_path / "good.cfg"
    path.write_text(text)
    depriv.run("create", str(path))
    depriv.run("audit", "x")


def test_chain_that_ends_before_the_configuration_does_is_refused(
    depriv: CommandLine, uids: range, tmp_path: Path
) -> None:
    alone, other = image(tmp_path / "alone.qcow2"), raw(tmp_path / "other.img")
    below = f"vdev=xvda,format=raw,target={other}"
    text = config_text("x", spec(alone, form="qcow2"), disk_backing=[below])
    what, _, fix = refused(depriv, uids, text, tmp_path=tmp_path)
    assert "stands alone" in what
    assert "disk_backing" in fix


def test_data_file_in_a_header_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    top = image(tmp_path / "top.qcow2", "-o", f"data_file={tmp_path}/data.raw")
    what, cause, fix = refused(depriv, uids, config_text("x", spec(top, form="qcow2")), tmp_path=tmp_path)
    assert "keeps its data in another file" in what
    assert "headers are not followed" in cause
    assert "qemu-img convert" in fix


def test_encrypted_image_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    options = ("--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10")
    top = image(tmp_path / "top.qcow2", *options)
    what, _, fix = refused(depriv, uids, config_text("x", spec(top, form="qcow2")), tmp_path=tmp_path)
    assert "is encrypted" in what
    assert fix


def test_raw_image_called_qcow2_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk.img")
    what, cause, fix = refused(depriv, uids, config_text("x", spec(disk, form="qcow2")), tmp_path=tmp_path)
    assert "is no qcow2 image, as the configuration says" in what
    assert "probably raw" in cause
    assert "qemu-img info" in fix


def test_qcow2_image_used_as_raw_starts_with_a_warning(depriv: CommandLine, tmp_path: Path) -> None:
    top = image(tmp_path / "top.qcow2")
    path = tmp_path / "x.cfg"
    path.write_text(config_text("x", spec(top)))
    assert f"warning: {top} looks like qcow2 and is used as raw" in depriv.run("create", str(path)).stderr
    depriv.run("audit", "x")


@pytest.mark.parametrize(
    ("first", "second", "works"), [("rw", "rw", False), ("rw", "ro", False), ("ro", "rw", False), ("ro", "ro", True)]
)
def test_image_is_written_by_one_domain_or_read_by_many(
    depriv: CommandLine, uids: range, *, tmp_path: Path, first: str, second: str, works: bool
) -> None:
    disk = raw(tmp_path / "disk.img")
    link = tmp_path / "hard.img"
    os.link(disk, link)
    path = tmp_path / "a.cfg"
    path.write_text(config_text("a", spec(disk, access=first)))
    depriv.run("create", str(path))
    if works:
        path.write_text(config_text("b", spec(link, access=second)))
        depriv.run("create", str(path))
        return
    verb = {"rw": "write", "ro": "read"}
    for name in (disk, link):
        what, cause, fix = refused(depriv, uids, config_text("b", spec(name, access=second)), tmp_path=tmp_path)
        assert f"{name} for xvda is in use by domain a" in what
        assert cause == f"domain a {verb[first]}s it, and this one would {verb[second]} it"
        assert "access=ro" in fix


@pytest.mark.parametrize("same", ["name", "hard link"])
def test_one_file_is_not_two_disks_of_which_one_writes(
    depriv: CommandLine, uids: range, tmp_path: Path, same: str
) -> None:
    disk = raw(tmp_path / "disk.img")
    other = disk
    if same == "hard link":
        other = tmp_path / "hard.img"
        os.link(disk, other)
    for one, two in (("rw", "rw"), ("ro", "rw"), ("rw", "ro")):
        text = config_text("x", spec(disk, access=one), spec(other, vdev="xvdb", access=two))
        what, _, fix = refused(depriv, uids, text, tmp_path=tmp_path)
        assert f"{other} for xvdb is in use by disk xvda of this domain" in what
        assert fix


def test_base_of_a_chain_may_not_be_written_as_a_disk(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    base = raw(tmp_path / "base.img")
    top = image(tmp_path / "top.qcow2", "-b", str(base), "-F", "raw")
    backing = [f"vdev=xvda,format=raw,target={base}"]
    text = config_text("x", spec(top, form="qcow2"), spec(base, vdev="xvdb"), disk_backing=backing)
    what, _, _ = refused(depriv, uids, text, tmp_path=tmp_path)
    assert f"{base} for xvdb is in use" in what


def test_two_disks_on_one_vdev_are_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    for second in ("xvda", "hda"):
        one, two = spec(raw(tmp_path / "a.img"), vdev="hda"), spec(raw(tmp_path / "b.img"), vdev="hda")
        if second == "xvda":
            one, two = one.replace("hda", "xvda"), two.replace("hda", "xvda")
        what, _, fix = refused(depriv, uids, config_text("x", one, two), tmp_path=tmp_path)
        assert second in what
        assert fix


@pytest.mark.parametrize("vdev", ["vda0x", "foo", "hde9z", "xvd", "", "../a"])
def test_unknown_vdev_is_refused(depriv: CommandLine, uids: range, tmp_path: Path, vdev: str) -> None:
    text = config_text("x", spec(raw(tmp_path / "disk.img"), vdev=vdev))
    what, _, fix = refused(depriv, uids, text, tmp_path=tmp_path)
    assert "vdev" in what
    assert fix


def test_vdev_that_the_machine_has_no_place_for_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    text = config_text("x", spec(raw(tmp_path / "disk.img"), vdev="hda"), machine="microvm")
    what, _, fix = refused(depriv, uids, text, tmp_path=tmp_path)
    assert "microvm machine has 0 IDE ports" in what
    assert "xvda" in fix


def test_name_in_use_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    path = tmp_path / "a.cfg"
    path.write_text(config_text("twice"))
    depriv.run("create", str(path))
    what, _, fix = refused(depriv, uids, config_text("twice"), tmp_path=tmp_path)
    assert "a domain named 'twice' exists (domid " in what
    assert "depriv destroy twice" in fix


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b", "\x1b[2Jx", "x" * 100, "-x", "é", "a\nb"])
def test_name_that_could_mislead_is_refused(depriv: CommandLine, uids: range, tmp_path: Path, name: str) -> None:
    what, _, fix = refused(depriv, uids, config_text("\0").replace("\0", name), tmp_path=tmp_path)
    assert "\x1b" not in what
    assert fix


@pytest.mark.parametrize(("memory", "said"), [(0, "memory"), (1 << 30, "memory"), (99_999_999_999, "memory")])
def test_memory_that_cannot_be_is_refused(
    depriv: CommandLine, uids: range, tmp_path: Path, memory: int, said: str
) -> None:
    what, _, fix = refused(depriv, uids, config_text("x", memory=memory), tmp_path=tmp_path)
    assert said in what
    assert fix


@pytest.mark.parametrize(
    "words",
    [
        ["-sandbox", "off"],
        ["-runas", "root"],
        ["-chroot", "/"],
        ["-daemonize"],
        ["-S"],
        ["-qmp", "unix:/tmp/x,server"],
        ["-monitor", "stdio"],
        ["-chardev", "file,id=x,path=/etc/passwd"],
        ["-drive", "file=/etc/passwd"],
        ["-netdev", "user,id=n"],
        ["-readconfig", "/etc/passwd"],
        ["-device", "vfio-pci,host=00:00.0"],
        ["--sandbox", "off"],
        ["@/etc/passwd"],
    ],
)
def test_argument_that_would_undo_a_restriction_is_refused(
    depriv: CommandLine, uids: range, tmp_path: Path, words: list[str]
) -> None:
    what, _, fix = refused(depriv, uids, config_text("x", device_model_args=words), tmp_path=tmp_path)
    assert "device_model_args" in what
    assert fix


def test_configuration_that_is_no_configuration_is_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    for text, said in (("name = ", ""), ("\x7fELF\0\0", ""), ('name = "x"\ndm_restrct = 1\n', "dm_restrct")):
        what, _, _ = refused(depriv, uids, text, tmp_path=tmp_path)
        assert "refused.cfg:" in what
        assert said in what
    for path in (tmp_path, tmp_path / "none.cfg"):
        assert depriv.run("create", str(path), expect=2).stderr.startswith(f"error: cannot read {path}\n")


# Users and ids


@pytest.fixture
def on_host_with(uids: range, tmp_path: Path) -> Iterator[Callable[[Callable[[list[str]], list[str]]], CommandLine]]:
    """Return a function: how to change the lines of /etc/passwd -> the command line on such a host."""
    del uids
    made: list[CommandLine] = []

    def make(change: Callable[[list[str]], list[str]]) -> CommandLine:
        path = tmp_path / "passwd"
        with open("/etc/passwd", encoding="utf-8") as file:
            path.write_text("".join(change(file.readlines())))
        made.append(CommandLine(bind=(str(path), "/etc/passwd")))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_host_without_users_is_told_to_make_them(
    on_host_with: Callable[[Callable[[list[str]], list[str]]], CommandLine], uids: range, tmp_path: Path
) -> None:
    host = on_host_with(lambda lines: [line for line in lines if not line.startswith("xen-qemuuser-")])
    what, _, fix = refused(host, uids, config_text("x"), status=125, tmp_path=tmp_path)
    assert what == f"there is no user {RANGE_BASE} to take a uid from"
    assert fix == "depriv setup"


def test_reaper_that_can_log_in_is_refused(
    on_host_with: Callable[[Callable[[list[str]], list[str]]], CommandLine], uids: range, tmp_path: Path
) -> None:
    shell = "/usr/sbin/nologin"
    host = on_host_with(
        lambda lines: [line.replace(shell, "/bin/sh") if line.startswith(f"{REAPER}:") else line for line in lines]
    )
    what, cause, fix = refused(host, uids, config_text("x"), status=125, tmp_path=tmp_path)
    assert what.startswith(f"the reaper {REAPER} ")
    assert "it kills device models" in cause
    assert fix == f"usermod --shell {shell} {REAPER}"


def test_uid_of_a_domain_that_is_a_persons_is_refused(
    on_host_with: Callable[[Callable[[list[str]], list[str]]], CommandLine], uids: range, tmp_path: Path
) -> None:
    base = next_base()
    uid = pwd.getpwnam(RANGE_BASE).pw_uid + base + 1
    host = on_host_with(lambda lines: [*lines, f"alice:x:{uid}:100::/home/alice:/bin/sh\n"])
    host.seed((base,))
    what, _, fix = refused(host, uids, config_text("x"), status=125, tmp_path=tmp_path)
    assert f"uid {uid}" in what
    assert "user alice" in what
    assert fix


def test_user_that_can_log_in_or_is_root_runs_no_device_model(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    for user, said in (("root", ""), ("nosuchuser", "there is no such user"), ("daemon", "")):
        text = config_text("x", device_model_user=user)
        path = tmp_path / "u.cfg"
        path.write_text(text)
        status = depriv_status(depriv, str(path))
        what, _, fix = refused(depriv, uids, text, status=status, tmp_path=tmp_path)
        assert status in (2, 125)
        assert said in what
        assert fix


def depriv_status(depriv: CommandLine, path: str) -> int:
    return subprocess.run(depriv.argv("create", path), check=False, capture_output=True).returncode


def test_range_that_is_used_up_is_said(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    depriv.seed(range(DOMID_FIRST, DOMID_LAST + 1))
    what, _, fix = refused(depriv, uids, config_text("x"), status=125, tmp_path=tmp_path)
    assert what.startswith(f"all {DOMID_LAST - DOMID_FIRST + 1} domids are in use, or were within the last 60 seconds")
    assert "wait a minute" in fix
    depriv.seed((next_base(),))


def test_only_root_creates(uids: range, tmp_path: Path) -> None:
    del uids
    path = tmp_path / "x.cfg"
    path.write_text(config_text("x"))
    # All is imported as root, since the interpreter may lie where nobody else may go; the jail is never started.
    code = """
import os, sys
import depriv.api, depriv.detect, depriv.lifecycle, depriv.xlconfig
from depriv.config import Domain
from depriv.errors import PlanError, render
from depriv.spawn import Jail
with Jail() as jail:
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    try:
        depriv.api.Toolstack(state_dir=sys.argv[1]).create(Domain(name="x"), jail=jail)
    except PlanError as error:
        print(render(error))
"""
    argv = [sys.executable, "-c", code, str(tmp_path / "state")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("error: only root can start a domain\n  fix: run it with sudo"), done.stderr
    assert not (tmp_path / "state").exists()


# QEMU


def test_no_qemu_and_no_program_are_refused(depriv: CommandLine, uids: range, tmp_path: Path) -> None:
    script = tmp_path / "qemu-script"
    script.write_text('#!/bin/sh\nexec /usr/bin/qemu-system-x86_64 "$@"\n')
    script.chmod(0o755)
    data = raw(tmp_path / "data")
    for path, said in (
        (tmp_path / "nowhere", "there is no "),
        (script, "is not a program but a script"),
        (data, "is not an executable file"),
        (tmp_path, "is a directory"),
    ):
        text = config_text("x", device_model_override=str(path))
        what, _, fix = refused(depriv, uids, text, status=125, tmp_path=tmp_path)
        assert what.startswith("cannot run QEMU: ")
        assert said.lower() in what.lower()
        assert "device_model_override" in fix


# Dynamically linked programs take their time, and so does this one.
ANSWERS = """
#include <stdio.h>
#include <unistd.h>
int main(void) { usleep(100000); fputs("%s\\n", stderr); return 1; }
"""


@pytest.fixture
def programs() -> Iterator[Path]:
    """Return a folder that a device model may enter; a test's own is root's alone."""
    with tempfile.TemporaryDirectory(prefix="depriv-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("qemu-system-x86_64: -sandbox on: There is no option group 'sandbox'", "QEMU 7.2 or later, with seccomp"),
        ("qemu-system-x86_64: -sandbox: invalid option", "QEMU 7.2 or later, with seccomp"),
        ("qemu-system-x86_64: -sandbox on: seccomp support is disabled", "with"),
    ],
)
def test_qemu_that_lacks_its_sandbox_is_refused_with_its_own_words(
    depriv: CommandLine, uids: range, *, tmp_path: Path, programs: Path, message: str, fix: str
) -> None:
    program = compiled(programs, "qemu-old", ANSWERS % message)
    text = config_text("x", device_model_override=str(program))
    what, cause, remedy = refused(depriv, uids, text, status=125, tmp_path=tmp_path)
    assert "QEMU did not start" in what
    assert message in cause
    assert fix in remedy


def test_program_that_ends_at_once_is_said_to_have_ended(
    depriv: CommandLine, uids: range, tmp_path: Path, programs: Path
) -> None:
    program = compiled(programs, "qemu-short", "int main(void) { return 3; }")
    text = config_text("x", device_model_override=str(program))
    what, _, _ = refused(depriv, uids, text, status=125, tmp_path=tmp_path)
    # Which of the two depends on who is faster: the program's end, or our look at it.
    assert what in (f"cannot execute {program}", "QEMU did not start: it ended")


def test_program_that_a_device_model_cannot_reach_is_refused_with_the_reason(
    depriv: CommandLine, uids: range, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    program = compiled(closed, "qemu-hidden", SILENT)
    text = config_text("x", device_model_override=str(program))
    what, cause, fix = refused(depriv, uids, text, status=125, tmp_path=tmp_path)
    assert what.startswith(f"cannot execute {program}")
    assert "Permission denied" in cause
    assert "everybody may enter the folders above it" in fix


SILENT = """
#include <unistd.h>
int main(void) { for (;;) pause(); }
"""


def test_qemu_that_never_answers_is_ended_at_the_deadline(
    unchanged: None, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del unchanged
    monkeypatch.setattr(lifecycle, "START_TIMEOUT_S", 0.5)  # the figure alone: nobody waits for a minute
    program = compiled(programs, "qemu-silent", SILENT)
    state = seeded(tmp_path / "state")
    host = Toolstack(state_dir=str(state), cache_dir=str(tmp_path / "cache"))
    began = time.monotonic()
    with pytest.raises(MonitorError) as caught:
        host.create(Domain(name="x", device_model_override=str(program)))
    assert time.monotonic() - began < 5
    assert caught.value.fix
    assert host.guests() == ()
    assert os.listdir(state / "domains") == []


def test_create_that_is_interrupted_leaves_nothing(
    depriv: CommandLine, uids: range, tmp_path: Path, programs: Path
) -> None:
    program = compiled(programs, "qemu-silent", SILENT)
    path = tmp_path / "x.cfg"
    path.write_text(config_text("x", device_model_override=str(program)))
    before = snapshot(folder=f"{depriv.state_dir}/domains", uids=uids)
    command = depriv.start("create", str(path))
    deadline = time.monotonic() + 10
    while not living(uids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    command.send_signal(signal.SIGINT)
    said = command.communicate(timeout=20)[1]
    assert command.returncode == 130, said
    assert "Traceback" not in said
    assert snapshot(folder=f"{depriv.state_dir}/domains", uids=uids) == before


# Between plan and start


@pytest.mark.parametrize("change", ["replaced", "removed", "symlink", "fifo"])
def test_image_that_changes_after_it_was_planned_with_is_not_opened(
    unchanged: None, uids: range, tmp_path: Path, change: str
) -> None:
    del unchanged, uids
    disk = raw(tmp_path / "disk.img")
    secret = raw(tmp_path / "secret", b"secret")
    state = seeded(tmp_path / "state")
    host = Toolstack(state_dir=str(state))
    launch = host.plan(Domain(name="x", disks=(Disk(vdev="xvda", target=str(disk)),)))
    os.mkdir(launch.directory, 0o700)
    disk.rename(tmp_path / "kept")
    if change == "replaced":
        raw(disk, b"other")
    elif change == "symlink":
        disk.symlink_to(secret)
    elif change == "fifo":
        os.mkfifo(disk)
    with Jail() as jail, pytest.raises(JailError) as caught:
        jail.launch(launch.plan, timeout_s=10)
    assert caught.value.step == f"open {disk} rw (file) for xvda, as descriptor 10"
    assert os.listdir(launch.directory) == []
