# SPDX-License-Identifier: Apache-2.0
"""The real QEMU takes the words that it gets in place of what named the host, and has nothing that was overlooked."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.host import need

from depriv.host import FileFacts
from depriv.openings import Inherited, ReadFile, WriteFile
from depriv.qemu.draft import Allowed, Draft
from depriv.qemu.expand import expand
from depriv.qemu.object_options import _KINDS, REFUSED_OBJECTS
from depriv.qemu.options import OPTIONS
from depriv.qemu.other_options import HANDLERS, finish
from depriv.qemu.words import parse_words

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

LATE = 59  # what is handed over by the monitor, once QEMU runs
TINY = ("-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-m", "32")
# Text properties of devices: names, numbers and words that the guest sees, ids of other parts of the command line...
PLAIN = (
    "audiodev bootargs busnr chardev chardev0 chardev1 chardev2 chardev3 chardev4 chardev5 chardev6 chardev7 desc"
    " device_id display drive duplex failover_pair_id filter fp_start_macaddr fsdev guid hba_serial hostport"
    " hv-vendor-id id loadparm mac mad-chardev masterbus model model-id mount_tag name netdev nqn osk port product"
    " serial tag tpmdev tx unavailable-features uuid vendor ver world wwpn"
    " backend cert1 cert2 cert3 tls-authz tls-creds tls-hostname"
)
# ... and those that name the host: copied, opened, or of devices that are refused.
HOST = (
    "cdat db evdev fd file frudatafile hidraw host host_ip hostdevice ibdev initrd kernel pcap romfile rootdir sdrfile"
    " sysfsdev vhostfd"
)
OBJECTS = (
    "authz-list authz-simple can-bus colo-compare cryptodev-backend cryptodev-backend-builtin filter-buffer"
    " filter-mirror filter-redirector filter-replay filter-rewriter iothread main-loop memory-backend-memfd"
    " memory-backend-ram rng-builtin rng-egd throttle-group tls-cipher-suites"
)


@pytest.fixture(scope="module")
def program() -> str:
    found = shutil.which("qemu-system-x86_64")
    need(found is not None, what="qemu")
    return str(found)


def look(path: str) -> FileFacts:
    try:
        have = os.lstat(path)
    except OSError:
        return FileFacts(path=path, kind="missing")
    kind = "file" if stat.S_ISREG(have.st_mode) else "char" if stat.S_ISCHR(have.st_mode) else "directory"
    return FileFacts(path=path, kind=kind, dev=have.st_dev, ino=have.st_ino, rdev=have.st_rdev, size=have.st_size)


class Started:
    """A QEMU that was given translated words, copies and descriptors, asked something and ended."""

    def __init__(self, program: str, folder: Path, *argv: str, ask: str = "info status", dry: bool = False) -> None:
        draft = translated(folder, *argv)
        copies = folder / "private"
        for item in draft.privates:
            target = folder / item.target.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(item.source, target)
        # Where QEMU finds its copies is the one thing that is not as confined: there is no root of its own here.
        words = [word.replace("/private/", f"{copies}/") for word in (draft.dry if dry else draft.argv)]
        fds = {} if dry else opened(draft)
        try:
            done = subprocess.run(
                [program, *TINY, "-monitor", "stdio", *words],
                input=f"{ask}\nquit\n",
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                pass_fds=list(fds),
            )
        finally:
            for number in fds:
                os.close(number)
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.draft = draft


def translated(folder: Path, *argv: str) -> Draft:
    words = parse_words(argv, {name: option.takes_value for name, option in OPTIONS.items()})
    draft = Draft(look, Allowed(), str(folder), {})
    for word in expand(words, lambda word: (folder / word.value).read_text()):
        if word.name in HANDLERS:
            HANDLERS[word.name](draft, word)
        else:
            draft.emit(f"-{word.name}", *((word.value,) if OPTIONS[word.name].takes_value else ()))
    finish(draft)
    return draft


def opened(draft: Draft) -> dict[int, str]:
    """Open what the draft asks for, each under its number in QEMU."""
    fds: dict[int, str] = {}
    for file in draft.files:
        take(os.open(file.path, os.O_RDWR if file.access == "rw" else os.O_RDONLY), file.number)
        fds[file.number] = file.path
    for opening in draft.openings:
        number = LATE if getattr(opening, "number", 0) < 0 else getattr(opening, "number", 0)
        match opening:
            case WriteFile():
                take(os.open(opening.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            case ReadFile():
                take(os.open(opening.path, os.O_RDONLY), number)
            case Inherited():
                os.dup2(opening.source, number)
            case _:
                pytest.fail(f"nothing here opens {opening}")
        fds[number] = opening.role
    return fds


def take(fd: int, number: int) -> None:
    # The numbers are QEMU's, from 10 on: a process of the tests has something else there.
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    os.dup2(fd, number)
    os.close(fd)


@pytest.fixture(autouse=True)
def free_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let descriptors begin where this process has none: which numbers QEMU gets is all the same to it."""
    monkeypatch.setattr("depriv.qemu.draft.FIRST_FD", 60)


def multiboot() -> bytes:
    """Return a kernel that halts. Source: the Multiboot Specification 0.6.96, 3.1 (header with addresses)."""
    flags, base = 0x00010000, 0x100000
    header = struct.pack("<III", 0x1BADB002, flags, (-0x1BADB002 - flags) & 0xFFFFFFFF)
    code = header + struct.pack("<IIIII", base, base, 0, 0, base + 32) + b"\xf4\xeb\xfd"
    return code.ljust(8192, b"\0")


def test_kernel_modules_firmware_tables_and_names_are_taken_as_copies(program: str, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(multiboot())
    for name in ("mod1", "mod,2", "blob"):
        (tmp_path / name).write_bytes(b"text " * 100)
    (tmp_path / "rom").write_bytes(b"\x55\xaa\x01".ljust(512, b"\0"))
    done = Started(
        program,
        tmp_path,
        *("-kernel", "kernel", "-initrd", "mod1 with words,mod,,2 x", "-append", "quiet"),
        *("-fw_cfg", "opt/org.test/a,file=blob", "-fw_cfg", "name=opt/org.test/b,string=/etc"),
        *("-smbios", "type=11,value=a,path=blob", "-acpitable", "sig=TEST,data=blob"),
        *("-option-rom", "rom,bootindex=3", "-boot", "order=d,menu=on"),
    )
    assert (done.status, done.err) == (0, "")
    assert "paused" in done.out
    assert len(done.draft.privates) == 7


def test_a_module_that_has_no_copy_ends_qemu(program: str, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(multiboot())
    (tmp_path / "mod1").write_bytes(b"text")
    done = Started(program, tmp_path, "-kernel", "kernel", "-initrd", "mod1 with,mod1 words")
    assert done.status == 0
    shutil.rmtree(tmp_path / "private")
    (tmp_path / "mod1").rename(tmp_path / "gone")
    broken = subprocess.run(
        [program, *TINY, "-kernel", str(tmp_path / "kernel"), "-initrd", f"{tmp_path}/mod1 with"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert broken.returncode != 0


def test_objects_are_taken_with_copies_and_descriptors(program: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("open")
    (tmp_path / "keys.psk").write_text("user:30313233343536373839\n")
    argv = (
        *("-object", "secret,id=s,file=secret", "-object", '{"qom-type":"secret","id":"j","file":"secret"}'),
        *(
            "-object",
            "tls-creds-psk,id=p,dir=.,endpoint=server",
            "-object",
            "tls-creds-anon,id=a,dir=.,endpoint=server",
        ),
        *("-object", "rng-random,id=r", "-device", "virtio-rng-pci,rng=r"),
        *("-object", "memory-backend-memfd,id=m,size=32M,share=on", "-machine", "memory-backend=m"),
    )
    done = Started(program, tmp_path, *argv, ask="info qom-tree /objects")
    assert (done.status, done.err) == (0, "")
    for name in ("/s (secret)", "/j (secret)", "/p (tls-creds-psk)", "/r (rng-random)"):
        assert name in done.out
    dry = Started(program, tmp_path, *argv, dry=True)
    assert (dry.status, dry.err) == (0, "")


def test_devices_are_taken_with_copies_and_descriptors(program: str, tmp_path: Path) -> None:
    (tmp_path / "rom").write_bytes(b"\x55\xaa\x01".ljust(512, b"\0"))
    (tmp_path / "blob").write_bytes(b"\0" * 64)
    argv = (
        *("-device", "pci-testdev,id=n,romfile=rom", "-device", '{"driver":"edu","id":"j","romfile":"rom"}'),
        *("-device", "loader,file=blob,addr=0x10000,force-raw=on", "-device", "ipmi-bmc-sim,id=b,frudatafile=blob"),
        *("-usb", "-device", "usb-mouse,id=m,pcap=traffic"),
        *("-global", "edu.romfile=", "-device", "virtio-tablet-pci,id=r", "-set", "device.r.romfile=rom"),
    )
    done = Started(program, tmp_path, *argv, ask="info qtree")
    assert (done.status, done.err) == (0, "")
    assert done.out.count("/private/") == 3
    assert (tmp_path / "traffic").stat().st_size > 0
    dry = Started(program, tmp_path, *argv, dry=True)
    assert (dry.status, dry.err) == (0, "")


def test_a_configuration_file_comes_to_the_same_as_qemus_own_reading(program: str, tmp_path: Path) -> None:
    (tmp_path / "c").write_text(
        '[machine]\n  type = "q35"\n[memory]\n  size = "48M"\n[smp-opts]\n cpus = "2"\n[boot-opts]\n menu = "on"\n'
        '[device "first"]\n driver = "virtio-tablet-pci"\n[rtc]\n base = "utc"\n[accel]\n accel = "tcg"\n'
    )
    ask = "info qtree\ninfo cpus\ninfo memory_size_summary"
    done = Started(program, tmp_path, "-readconfig", "c", ask=ask)
    theirs = subprocess.run(
        [program, *TINY, "-monitor", "stdio", "-readconfig", str(tmp_path / "c")],
        input=f"{ask}\nquit\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.status == 0
    assert 'dev: virtio-tablet-pci, id "first"' in done.out
    assert without_threads(done.out) == without_threads(theirs.stdout)


def without_threads(text: str) -> list[str]:
    return [line.partition(" thread_id=")[0] for line in text.splitlines()]


def test_a_saved_state_is_read_from_its_descriptor(program: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    subprocess.run(
        [program, *TINY, "-monitor", "stdio"],
        input=f'migrate "exec:cat > {state}"\nquit\n',
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert state.stat().st_size > 1000
    ask = f"info status\nmigrate_incoming fd:{LATE}\ninfo status"
    done = Started(program, tmp_path, "-incoming", "file:state", ask=ask)
    assert (done.status, done.err) == (0, "")
    assert done.out.index("(inmigrate)") < done.out.rindex("VM status: paused")
    assert not done.out.rstrip().endswith("(inmigrate)")
    with state.open("rb") as file:
        done = Started(program, tmp_path, "-incoming", f"fd:{file.fileno()}", ask=ask)
        assert (done.status, done.err) == (0, "")
        assert file.tell() > 1000  # one open file: what QEMU has read, it has read here
    assert Started(program, tmp_path, "-incoming", "file:state", dry=True).status == 0


def test_what_is_no_saved_state_ends_qemu(program: str, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"no state" * 100)
    done = Started(program, tmp_path, "-incoming", "file:state", ask=f"migrate_incoming fd:{LATE}\ninfo status")
    assert done.status != 0


def test_the_callers_sets_are_there(program: str, tmp_path: Path) -> None:
    with (tmp_path / "blob").open("wb") as file:
        done = Started(
            program,
            tmp_path,
            *("-add-fd", f"fd={file.fileno()},set=7,opaque=mine"),
            *("-usb", "-device", "usb-mouse,pcap=/dev/fdset/7"),
        )
    assert (done.status, done.err) == (0, "")
    assert (tmp_path / "blob").stat().st_size > 0


def test_words_that_only_print_end_qemu(program: str) -> None:
    for argv in (("-version",), ("-M", "help"), ("-device", "VGA,help"), ("-accel", "help"), ("-L", "help")):
        draft = Draft(look, Allowed(), "/", {})
        (word,) = parse_words(argv, {name: option.takes_value for name, option in OPTIONS.items()})
        HANDLERS[word.name](draft, word)
        assert draft.facts["no_guest"]
        done = subprocess.run([program, *draft.argv], capture_output=True, timeout=60, check=False)
        assert done.returncode == 0
        assert done.stdout


# --- what the installed QEMU has


def query(program: str, *commands: dict[str, Any]) -> list[Any]:
    """Return what QEMU answers to commands of its monitor."""
    lines = [{"execute": "qmp_capabilities"}, *commands, {"execute": "quit"}]
    done = subprocess.run(
        [program, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    return [reply.get("return") for reply in replies if "return" in reply or "error" in reply][1 : len(commands) + 1]


def test_every_text_property_of_every_device_is_one_that_was_looked_at(program: str) -> None:
    (types,) = query(program, {"execute": "qom-list-types", "arguments": {"implements": "device", "abstract": False}})
    # QEMU ends when it is asked about these, whose module is a package of its own.
    names = sorted(item["name"] for item in types if "-gl-" not in item["name"] and not item["name"].endswith("-gl"))
    answers = query(
        program,
        *({"execute": "device-list-properties", "arguments": {"typename": name}} for name in names),
    )
    assert len(answers) == len(names) > 300
    found = {
        item["name"]
        for properties in answers
        for item in properties or ()
        if item["type"] in ("str", "string") and not item["name"].startswith("legacy-")
    }
    assert {"romfile", "pcap", "hostdevice"} < found
    assert sorted(found - set(PLAIN.split()) - set(HOST.split())) == []


def test_every_kind_of_object_is_one_that_was_looked_at(program: str) -> None:
    text = subprocess.run([program, "-object", "help"], capture_output=True, text=True, timeout=60, check=True).stdout
    found = {line.strip() for line in text.splitlines() if line.startswith("  ")}
    assert {"secret", "iothread"} < found
    assert sorted(found - set(OBJECTS.split()) - set(REFUSED_OBJECTS) - set(_KINDS)) == []
