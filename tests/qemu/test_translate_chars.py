# SPDX-License-Identifier: Apache-2.0
"""A real QEMU takes what character devices, displays and networks come to, and it works; it is not confined here."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never, cast

import pytest
from tests.support.host import need

from depriv.detect import look_at
from depriv.openings import (
    ConnectTcp,
    ConnectUnix,
    Inherited,
    ListenTcp,
    ListenUnixHere,
    OpenTap,
    ReadFile,
    StartPasst,
    WriteFile,
)
from depriv.qemu.draft import Allowed, Request
from depriv.qemu.translate import translate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from depriv.openings import Opening

_TIMEOUT_S = 30
_QEMU = "qemu-system-x86_64"
# Descriptors get the numbers that the words name, then the program starts.
_RENUMBER = """
import os, sys
for pair in sys.argv[1].split():
    old, new = map(int, pair.split(":"))
    os.dup2(old, new)
os.execvp(sys.argv[2], sys.argv[2:])
"""
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x2, 0x1000, 0x4000, 0x100  # <linux/if_tun.h>
_TUNSETIFF = 0x400454CA


@pytest.fixture(autouse=True)
def _qemu() -> None:
    need(shutil.which(_QEMU) is not None, what="qemu")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder with a name that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="depriv-") as name:
        yield Path(name)


def _request(*argv: str, folder: Path) -> Request:
    allowed = Allowed(passt="/usr/bin/passt")
    return translate(argv, look=look_at, allowed=allowed, cwd=str(folder))


def _listening(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(path)
    made.listen()
    return made


def _tap(opening: OpenTap) -> Iterator[int]:
    name = opening.name.encode()
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if opening.vnet_hdr else 0)
    if len(opening.numbers) > 1:
        flags |= _IFF_MULTI_QUEUE
    for _ in opening.numbers:
        queue = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        name = fcntl.ioctl(queue, _TUNSETIFF, struct.pack("16sH22x", name, flags))[:16].rstrip(b"\0")
        yield queue


def _open(opening: Opening, ends: list[socket.socket]) -> dict[int, int]:
    """Open one thing as the toolstack does; return number in QEMU -> descriptor. ``ends`` gets what QEMU talks to."""
    match opening:
        case ListenTcp():
            made = socket.create_server((opening.host, opening.port))
        case ListenUnixHere():
            made = _listening(opening.path)
        case ConnectTcp():
            made = socket.create_connection((opening.host, opening.port))
        case ConnectUnix():
            made = socket.socket(socket.AF_UNIX)
            made.connect(opening.path)
        case StartPasst():
            made, end = socket.socketpair()
            ends.append(end)
        case WriteFile():
            end_of = os.O_APPEND if opening.append else os.O_TRUNC
            return {opening.number: os.open(opening.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | end_of, 0o600)}
        case ReadFile():
            return {opening.number: os.open(opening.path, os.O_RDONLY | os.O_CLOEXEC)}
        case OpenTap():
            return dict(zip(opening.numbers, _tap(opening), strict=True))
        case Inherited():
            return {opening.number: os.dup(opening.source)}
        case _:
            assert_never(opening)
    return {opening.number: made.detach()}


class _Running:
    """A QEMU that has what its words name."""

    def __init__(self, process: subprocess.Popen[bytes], monitor: socket.socket) -> None:
        self.process = process
        self.monitor = monitor
        self.lines = monitor.makefile("rb")
        self.ends: list[socket.socket] = []
        self.greeting = self.lines.readline()

    def do(self, command: str, *, fd: int | None = None, **arguments: Any) -> Any:
        text = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self.monitor, [text], [] if fd is None else [fd])
        while line := self.lines.readline():
            reply = json.loads(line)
            assert "error" not in reply, reply
            if "return" in reply:
                return reply["return"]
        raise AssertionError(self.log())

    def human(self, line: str) -> str:
        return cast("str", self.do("human-monitor-command", **cast("Any", {"command-line": line})))

    def log(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.read().decode()


def _opened(request: Request, ends: list[socket.socket]) -> dict[int, int]:
    """Open all that a request names; return number in QEMU -> descriptor."""
    found: dict[int, int] = {}
    for listen in request.listens:
        found[listen.number] = _listening(listen.path).detach()
    for step in request.files:
        found[step.number] = os.open(step.path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    for opening in request.openings:
        found.update(_open(opening, ends))
    return found


@contextmanager
def _running(request: Request, *, dry: bool = False) -> Iterator[_Running]:
    """Start QEMU on a request's words with all that they name open; on those of the dry run with nothing open."""
    with ExitStack() as stack:
        ours, its = socket.socketpair()
        stack.callback(ours.close)
        ends: list[socket.socket] = []
        found = {3: its.detach(), **({} if dry else _opened(request, ends))}
        for end in ends:
            stack.callback(end.close)
        handed = found.pop(-1, -1)
        if handed >= 0:
            stack.callback(os.close, handed)
        # Out of the way of the numbers that they get in QEMU.
        high = {number: fcntl.fcntl(fd, fcntl.F_DUPFD, 200) for number, fd in found.items()}
        for fd in found.values():
            os.close(fd)
        pairs = " ".join(f"{fd}:{number}" for number, fd in high.items())
        own = ["-S", "-m", "16", "-accel", "tcg", "-chardev", "socket,id=depriv-qmp,fd=3"]
        words = [_QEMU, *own, "-mon", "chardev=depriv-qmp,mode=control", *(request.dry if dry else request.argv)]
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", _RENUMBER, pairs, *words],
            pass_fds=list(high.values()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        for fd in high.values():
            os.close(fd)
        ours.settimeout(_TIMEOUT_S)
        qemu = _Running(process, ours)
        stack.callback(qemu.lines.close)
        assert qemu.greeting, qemu.log()
        qemu.do("qmp_capabilities")
        qemu.ends = ends
        if handed >= 0:
            qemu.do("getfd", fd=handed, fdname="vnc")
            qemu.do("display-update", type="vnc", addresses=[{"type": "fd", "str": "vnc"}])
        yield qemu


def _connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(_TIMEOUT_S)
    made.connect(str(path))
    return made


def _everything(folder: Path) -> tuple[str, ...]:
    """Return an option for each kind of character device that can be had."""
    Path(folder, "old.log").write_text("from before\n")
    return (
        *("-nodefaults", "-chardev", "socket,id=unix,path=unix,server=on,telnet=on"),
        *("-chardev", "socket,id=tcp,host=127.0.0.1,port=0,server=on,websocket=on,mux=on,logfile=socket.log"),
        *("-object", "tls-creds-anon,id=tls,endpoint=server"),
        *("-chardev", "socket,id=secret,host=127.0.0.1,port=0,server=on,wait=off,tls-creds=tls"),
        *("-chardev", "socket,id=client,path=there,reconnect=1,telnet=on", "-chardev", "file,id=file,path=old.log"),
        *("-chardev", "ringbuf,id=ring,size=4096", "-chardev", "pty,id=pty", "-chardev", "vc,id=vc"),
        *("-serial", "mon:unix:serial,server,nowait", "-serial", "none", "-serial", "file:new.log"),
        *("-serial", "vc:80Cx24C", "-parallel", "telnet:127.0.0.1:0,server,nowait,nodelay"),
        *("-monitor", "unix:monitor,server,nowait", "-qmp", "unix:qmp,server,nowait"),
        *("-qmp-pretty", "null", "-debugcon", "unix:debug,server,nowait", "-gdb", "tcp:127.0.0.1:0"),
    )


def test_qemu_takes_every_character_device_that_is_handed_over(folder: Path) -> None:
    there = _listening(f"{folder}/there")
    with there, _running(_request(*_everything(folder), folder=folder)) as qemu:
        labels = {device["label"] for device in qemu.do("query-chardev")}
        assert labels >= {"serial0", "serial2", "serial3", "parallel0", "debugcon", "gdb", "secret", "client", "pty"}
        with _connected(folder / "monitor") as monitor:
            assert b"QEMU" in monitor.recv(100)
        with _connected(folder / "qmp") as qmp:
            assert json.loads(qmp.recv(1000))["QMP"]
        with _connected(folder / "serial") as serial:
            serial.send(b"\x01c")  # the escape that gives the monitor on the same device
            seen = b""
            while b"(qemu)" not in seen:
                seen += serial.recv(100)
    assert Path(folder, "old.log").read_text() == ""


def test_dry_run_starts_without_anything_open(folder: Path) -> None:
    there = _listening(f"{folder}/there")
    networks = ("-nic", "user,model=e1000", "-netdev", "tap,id=n,br=br0", "-device", "virtio-net,netdev=n")
    words = (*_everything(folder), *networks, "-net", "nic", "-net", "socket,fd=0", "-vnc", ":0,password=on")
    with there, _running(_request(*words, folder=folder), dry=True) as qemu:
        assert "n: virtio-net-pci.0" in qemu.human("info network")
        assert {device["filename"] for device in qemu.do("query-chardev") if device["label"] != "depriv-qmp"} >= {
            "null"
        }
        assert Path(folder, "old.log").read_text() == "from before\n"


def test_log_of_a_device_goes_to_the_file_that_we_opened(folder: Path) -> None:
    Path(folder, "log").write_text("kept\n")
    words = ("-nodefaults", "-chardev", "socket,id=m,path=m,server=on,wait=off,logfile=log,logappend=on")
    with (
        _running(_request(*words, "-mon", "chardev=m,mode=readline", folder=folder)) as qemu,
        _connected(folder / "m") as monitor,
    ):
        seen = b""
        while b"(qemu)" not in seen:
            seen += monitor.recv(100)
        qemu.do("query-status")  # by then it has written the log too
    text = Path(folder, "log").read_text()
    assert text.startswith("kept\n")
    assert "(qemu)" in text


def test_serial_line_of_the_host_is_a_descriptor(folder: Path) -> None:
    lead, line = os.openpty()
    try:
        with _running(_request("-nodefaults", "-serial", os.ttyname(line), folder=folder)) as qemu:
            assert "serial0" in {device["label"] for device in qemu.do("query-chardev")}
    finally:
        os.close(lead)
        os.close(line)


@pytest.mark.parametrize("display", ["unix:vnc,share=ignore", "127.0.0.1:{port}"])
def test_viewer_reaches_the_vnc_server_that_was_handed_its_socket(folder: Path, display: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    if port < 5900:
        port += 10000
    request = _request("-nodefaults", "-vga", "std", "-vnc", display.format(port=port - 5900), folder=folder)
    with (
        _running(request),
        _connected(folder / "vnc") if "unix" in display else socket.create_connection(("127.0.0.1", port)) as viewer,
    ):
        viewer.settimeout(_TIMEOUT_S)
        assert viewer.recv(12) == b"RFB 003.008\n"


def test_default_monitor_on_the_terminal_is_as_without_us(folder: Path) -> None:
    request = _request("-nographic", "-nic", "none", folder=folder)
    assert request.stdio
    with _running(request) as qemu:
        assert {device["label"] for device in qemu.do("query-chardev")} >= {"serial0", "serial0-base"}
        qemu.do("quit")
        assert "QEMU" not in qemu.log()  # it shows the serial port first; Ctrl-A c is the monitor


def test_qemu_takes_every_network_that_is_handed_over(folder: Path) -> None:
    need(os.geteuid() == 0 and Path("/dev/net/tun").exists(), what="root")
    there = _listening(f"{folder}/there")
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    words = (
        *("-nodefaults", "-netdev", "user,id=user", "-device", "e1000,netdev=user"),
        *("-netdev", "tap,id=tap,ifname=deprivtest0,script=no,downscript=no,sndbuf=0"),
        *("-device", "virtio-net,netdev=tap", "-netdev", "tap,id=wide,ifname=deprivtest1,script=no,queues=2"),
        *("-device", "virtio-net,netdev=wide,mq=on,vectors=6"),
        *("-netdev", "socket,id=listen,listen=127.0.0.1:0", "-device", "e1000,netdev=listen"),
        *("-netdev", "stream,id=server,server=on,addr.type=unix,addr.path=stream", "-device", "e1000,netdev=server"),
        *("-netdev", "stream,id=client,server=off,addr.type=unix,addr.path=there", "-device", "e1000,netdev=client"),
        *("-netdev", f"dgram,id=dgram,local.type=fd,local.str={its.fileno()}", "-device", "e1000,netdev=dgram"),
        *("-nic", "user,model=rtl8139,mac=52:54:00:00:00:07", "-net", "nic,model=pcnet", "-net", "user"),
    )
    with there, mine, its, _running(_request(*words, folder=folder)) as qemu:
        shown = qemu.human("info network")
        for text in ("tap: index=0,type=tap,fd=", "wide: index=1,type=tap", "listen: index=0,type=stream"):
            assert text in shown
        assert "model=rtl8139,macaddr=52:54:00:00:00:07\r\n \\ depriv-net" in shown
        assert "hub 0\r\n \\ hub0port" in shown
        with _connected(folder / "stream"):
            time.sleep(0.1)
        assert len(qemu.ends) == 3  # one passt each for -netdev user, -nic user and -net user
    assert not Path("/sys/class/net/deprivtest0").exists()


def test_frames_go_between_guest_and_stream_with_their_length_before_them(folder: Path) -> None:
    # announce-self makes the card send: what passt reads is what this sees.
    request = _request("-nodefaults", "-nic", "user,model=virtio-net-pci,mac=52:54:00:00:00:07", folder=folder)
    with _running(request) as qemu:
        (end,) = qemu.ends
        end.settimeout(_TIMEOUT_S)
        qemu.do("cont")  # a stopped guest sends nothing
        qemu.do("announce-self", initial=50, max=550, rounds=5, step=100)
        (length,) = struct.unpack("!I", end.recv(4))
        frame = end.recv(length)
    assert frame[6:12] == bytes.fromhex("525400000007")


# passt itself


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


_MAC = bytes.fromhex("525400123456")


def _packet(protocol: int, source: str, target: str, segment: bytes, checksum_at: int) -> bytes:
    """Return an Ethernet frame with an IPv4 packet, both checksums filled in, as passt wants it from a stream."""
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    pseudo = ends + struct.pack("!BBH", 0, protocol, len(segment)) + segment + b"\0" * (len(segment) % 2)
    segment = segment[:checksum_at] + struct.pack("!H", _checksum(pseudo)) + segment[checksum_at + 2 :]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, protocol, 0)
    head = head[:10] + struct.pack("!H", _checksum(head + ends)) + ends
    frame = b"\xff" * 6 + _MAC + b"\x08\x00" + head + segment
    return struct.pack("!I", len(frame)) + frame


def _discover() -> bytes:
    """Return a DHCPDISCOVER. Source: RFC 2131."""
    body = struct.pack("!BBBBI20s16s192s", 1, 1, 6, 0, 7, b"", _MAC, b"") + b"\x63\x82\x53\x63\x35\x01\x01\xff"
    body += b"\0" * (300 - len(body))
    return _packet(17, "0.0.0.0", "255.255.255.255", struct.pack("!HHHH", 68, 67, 8 + len(body), 0) + body, 6)


def _knock(target: str, port: int) -> bytes:
    """Return a TCP SYN; the gateway is this host."""
    return _packet(6, "10.0.2.15", target, struct.pack("!HHIIBBHHH", 4000, port, 1, 0, 0x50, 2, 64000, 0, 0), 16)


def _frames(end: socket.socket, seconds: float) -> list[bytes]:
    data = b""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        end.settimeout(left)
        try:
            data += end.recv(65536)
        except TimeoutError:
            break
    result = []
    while data:
        (length,) = struct.unpack("!I", data[:4])
        result.append(data[4 : 4 + length])
        data = data[4 + length :]
    return result


@contextmanager
def _passt(request: Request) -> Iterator[socket.socket]:
    """Start passt on a request's words and yield the guest's end."""
    need(os.geteuid() == 0, what="root")
    need(shutil.which("passt") is not None, what="passt")
    (opening,) = request.openings
    assert isinstance(opening, StartPasst)
    ours, its = socket.socketpair()
    words = ["passt", "--foreground", "--quiet", "--stderr", "--runas", "0", "--fd", str(its.fileno()), *opening.words]
    with ours, subprocess.Popen(words, pass_fds=[its.fileno()], stderr=subprocess.DEVNULL) as process:
        its.close()
        try:
            yield ours
        finally:
            process.kill()


def test_passt_gives_the_guest_the_addresses_of_qemus_own_network_and_the_host_as_gateway(folder: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as service,
        _passt(_request("-nodefaults", "-netdev", "user,id=n,dnssearch=a.b,dnssearch=c", folder=folder)) as guest,
    ):
        guest.send(_discover())
        (offer,) = _frames(guest, 1)
        assert socket.inet_ntoa(offer[42 + 16 : 42 + 20]) == "10.0.2.15"
        assert b"\x03\x04" + socket.inet_aton("10.0.2.2") in offer[42 + 240 :]
        assert b"\x01a\x01b\0\x01c\0" in offer[42 + 240 :]
        guest.send(_knock("10.0.2.2", service.getsockname()[1]))
        service.settimeout(5)
        service.accept()[0].close()


def test_restricted_guest_gets_an_address_and_reaches_nobody(folder: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as service,
        _passt(_request("-nodefaults", "-netdev", "user,id=n,restrict=on", folder=folder)) as guest,
    ):
        guest.send(_discover())
        assert len(_frames(guest, 1)) == 1
        for target in ("10.0.2.2", "127.0.0.1"):
            guest.send(_knock(target, service.getsockname()[1]))
        service.settimeout(1)
        with pytest.raises(TimeoutError):
            service.accept()


def test_forward_reaches_the_guest_from_the_address_that_was_asked_for_only(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = ("-nodefaults", "-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{port}-:22")
    with _passt(_request(*words, folder=folder)) as guest:
        guest.send(_discover())
        assert _frames(guest, 1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))
        with socket.create_connection(("127.0.0.1", port)):
            knock = _frames(guest, 1)[0]
        assert struct.unpack("!H", knock[36:38]) == (22,)
