# SPDX-License-Identifier: Apache-2.0
"""Character devices, monitors and displays of a QEMU command line: what is handed over, what is refused."""

from __future__ import annotations

import pytest

from depriv.errors import ConfigError
from depriv.host import FileFacts
from depriv.openings import ConnectTcp, ConnectUnix, Inherited, ListenTcp, ListenUnixHere, WriteFile
from depriv.qemu.draft import Allowed, Request
from depriv.qemu.translate import translate

_KINDS = {"/run/s": "socket", "/srv/log": "file", "/dev/ttyS0": "char", "/srv": "directory", "/srv/fifo": "fifo"}
_BARE = ("-nodefaults", "-display", "none")


def _look(path: str) -> FileFacts:
    return FileFacts(path=path, kind=_KINDS.get(path, "missing"), dev=1, ino=2, rdev=3)


def _request(*argv: str, bare: tuple[str, ...] = _BARE) -> Request:
    return translate((*bare, *argv), look=_look, allowed=Allowed(), cwd="/srv/vm")


def _words(*argv: str) -> tuple[str, ...]:
    """Return what the options come to, without what every command line here begins with."""
    result = _request(*argv).argv
    assert result[: len(_BARE)] == _BARE
    return result[len(_BARE) :]


def _refused(*argv: str, bare: tuple[str, ...] = _BARE) -> str:
    """Return why a command line is refused, and what to do instead."""
    with pytest.raises(ConfigError) as caught:
        _request(*argv, bare=bare)
    assert caught.value.fix
    return f"{caught.value}; {caught.value.cause}; {caught.value.fix}"


def _warnings(request: Request) -> list[str]:
    return [note.text for note in request.notes if note.warning]


# Sockets


def test_unix_socket_to_listen_on_is_the_jails_and_qemu_does_not_wait() -> None:
    request = _request("-chardev", "socket,id=c,path=x.sock,server=on")
    assert request.argv[-1] == "socket,id=c,fd=10,wait=off,server=on"
    (listen,) = request.listens
    assert (listen.path, listen.number, listen.role, listen.replace_old) == ("/srv/vm/x.sock", 10, "c", True)
    assert "does not wait" in request.notes[-1].text


def test_old_switches_of_a_socket_are_understood() -> None:
    assert _words("-chardev", "socket,id=c,path=/x,server,nowait") == (
        "-chardev",
        "socket,id=c,fd=10,wait=off,server=on",
    )
    assert not _request("-chardev", "socket,id=c,path=/x,server,nowait").notes


def test_telnet_websocket_and_tls_stay_on_a_socket_that_is_handed_over() -> None:
    words = "socket,id=c,host=127.0.0.1,port=4444,to=4450,server=on,wait=off,telnet=on,websocket=on,tls-creds=t"
    request = _request("-chardev", words)
    assert request.argv[-1] == "socket,id=c,fd=10,wait=off,server=on,telnet=on,websocket=on,tls-creds=t"
    assert request.openings == (ListenTcp(role="c", number=10, host="127.0.0.1", port=4444, port_to=4450),)
    assert not _warnings(request)


def test_port_that_other_hosts_reach_is_opened_as_asked_and_warned_of() -> None:
    request = _request("-chardev", "socket,id=c,host=,port=4444,server=on,wait=off")
    assert request.openings == (ListenTcp(role="c", number=10, host="", port=4444),)
    assert "every address" in _warnings(request)[0]


def test_connections_are_made_beforehand() -> None:
    request = _request("-chardev", "socket,id=a,path=/run/s", "-chardev", "socket,id=b,host=::1,port=9")
    assert request.openings == (
        ConnectUnix(role="a", number=10, path="/run/s"),
        ConnectTcp(role="b", number=11, host="::1", port=9),
    )
    assert request.argv[-3:] == ("socket,id=a,fd=10", "-chardev", "socket,id=b,fd=11")


def test_descriptor_of_the_caller_gets_a_number_of_ours() -> None:
    request = _request("-chardev", "socket,id=a,fd=7,server=on,wait=off,mux=on")
    assert request.argv[-1] == "socket,id=a,fd=10,wait=off,server=on,mux=on"
    assert request.openings == (Inherited(role="a", number=10, source=7),)


def test_reconnecting_is_left_out_with_a_warning() -> None:
    request = _request("-chardev", "socket,id=a,path=/run/s,reconnect=2")
    assert request.argv[-1] == "socket,id=a,fd=10"
    assert "reconnect" in _warnings(request)[0]


@pytest.mark.parametrize(
    ("chardev", "why"),
    [
        ("socket,id=a,path=/nothing", "does not exist"),
        ("socket,id=a,path=/srv", "directory"),
        ("socket,id=a,path=/srv/log,server=on,wait=off", "there is a file of that name"),
        ("socket,id=a,path=x,server=on,abstract=on", "abstract"),
        ("socket,id=a,host=h,port=1,tls-creds=t", "stunnel"),
        ("socket,id=a,host=h", "names no socket"),
        ("socket,id=a,host=,port=1", "names no host"),
        ("socket,id=a,host=h,port=http", "no port"),
        ("socket,id=a,host=h,port=65536", "no port"),
        ("socket,id=a,fd=x", "no descriptor"),
        ("udp,id=a,port=1", "socket"),
        ("pipe,id=a,path=/srv/fifo", "FIFOs"),
        ("parport,id=a,path=/dev/parport0", "parallel port"),
        ("braille,id=a", "brlapi"),
        ("pty,id=a,path=/tmp/link", "path="),
        ("unheard-of,id=a", "knows no character device"),
        ("null", "no id"),
        ("null,id=9a", "no id"),
        ("null,id=depriv-qmp", "own monitor"),
        ("null,id=depriv-events", "own monitor"),
        ('{"id": "a"}', "no JSON"),
    ],
)
def test_character_device_that_cannot_be_had_is_refused(chardev: str, why: str) -> None:
    assert why in _refused("-chardev", chardev)


def test_descriptor_that_is_named_twice_is_refused() -> None:
    assert "named twice" in _refused("-chardev", "socket,id=a,fd=7", "-chardev", "socket,id=b,fd=7")


# Files and terminals


def test_file_to_write_is_opened_by_us() -> None:
    request = _request("-chardev", "file,id=a,path=/srv/log", "-chardev", "file,id=b,path=new,append=on")
    assert request.argv[3:] == (
        "-add-fd",
        "fd=10,set=1010",
        "-chardev",
        "file,id=a,path=/dev/fdset/1010",
        "-add-fd",
        "fd=11,set=1011",
        "-chardev",
        "file,id=b,path=/dev/fdset/1011,append=on",
    )
    assert request.openings == (
        WriteFile(role="a", number=10, path="/srv/log"),
        WriteFile(role="b", number=11, path="/srv/vm/new", append=True),
    )


def test_log_of_any_device_is_a_file_that_we_open() -> None:
    request = _request("-chardev", "null,id=a,logfile=/srv/log,logappend=on")
    assert request.openings == (WriteFile(role="a-log", number=10, path="/srv/log", append=True),)
    assert request.argv[-1] == "null,id=a,logfile=/dev/fdset/1010,logappend=on"


@pytest.mark.parametrize("path", ["/srv", "/srv/fifo", "/dev/ttyS0", "/run/s"])
def test_nothing_but_a_regular_file_is_written_to(path: str) -> None:
    assert "no regular file" in _refused("-chardev", f"file,id=a,path={path}")
    assert "no regular file" in _refused("-chardev", f"null,id=a,logfile={path}")


def test_file_dev_null_is_a_null_device() -> None:
    assert _words("-serial", "file:/dev/null") == ("-chardev", "null,id=serial0", "-serial", "chardev:serial0")


def test_serial_line_of_the_host_is_opened_for_both_directions() -> None:
    request = _request("-serial", "/dev/ttyS0")
    (line,) = request.files
    assert (line.path, line.access, line.kind, line.rdev) == ("/dev/ttyS0", "rw", "char", 3)
    assert request.argv[-3:] == ("serial,id=serial0,path=/dev/fdset/1010", "-serial", "chardev:serial0")


def test_serial_line_that_is_a_file_is_refused() -> None:
    assert "cannot use /srv/log" in _refused("-chardev", "tty,id=a,path=/srv/log")


def test_terminal_and_pseudo_terminals_are_told_of() -> None:
    assert _request("-serial", "stdio").stdio
    assert _request("-chardev", "pty,id=a").ptys
    request = _request("-chardev", "null,id=a", "-serial", "none")
    assert not request.stdio
    assert not request.ptys


# Short forms


@pytest.mark.parametrize(
    ("short", "device"),
    [
        ("null", "null,id=serial0"),
        ("stdio", "stdio,id=serial0"),
        ("pty", "pty,id=serial0"),
        ("vc", "vc,id=serial0"),
        ("vc:800x600", "vc,id=serial0,width=800,height=600"),
        ("vc:80Cx24C", "vc,id=serial0,cols=80,rows=24"),
        ("unix:/x,server,nowait", "socket,id=serial0,fd=10,wait=off,server=on"),
        ("unix:/run/s", "socket,id=serial0,fd=10"),
        ("tcp:localhost:4444", "socket,id=serial0,fd=10"),
        ("tcp:127.0.0.1:4444,server=on,wait=off", "socket,id=serial0,fd=10,wait=off,server=on"),
        ("telnet:[::1]:4444,server,nowait,nodelay", "socket,id=serial0,fd=10,wait=off,telnet=on,server=on,delay=off"),
    ],
)
def test_short_form_is_a_device_with_the_label_that_qemu_gives_it(short: str, device: str) -> None:
    assert _words("-serial", short) == ("-chardev", device, "-serial", "chardev:serial0")


def test_ports_are_counted_as_qemu_counts_them() -> None:
    words = _words("-serial", "none", "-serial", "chardev:x", "-serial", "null", "-parallel", "null")
    assert words[:4] == ("-serial", "none", "-serial", "chardev:x")
    assert words[5] == "null,id=serial2"
    assert words[-3:] == ("null,id=parallel0", "-parallel", "chardev:parallel0")


def test_monitor_on_a_serial_port_shares_its_device() -> None:
    assert _words("-serial", "mon:stdio") == (
        "-chardev",
        "stdio,id=serial0,signal=off,mux=on",
        "-serial",
        "chardev:serial0",
        "-mon",
        "chardev=serial0,mode=readline",
    )


def test_monitors_keep_their_mode_and_their_labels() -> None:
    words = _words("-qmp", "unix:/a,server,nowait", "-monitor", "none", "-qmp-pretty", "stdio", "-monitor", "null")
    assert [word for word in words if "compat" in word and "=" not in word] == [
        "chardev:compat_monitor0",
        "chardev:compat_monitor1",
        "chardev:compat_monitor2",
    ]
    assert words[2:4] == ("-qmp", "chardev:compat_monitor0")
    assert words[6:8] == ("-qmp-pretty", "chardev:compat_monitor1")


def test_debugger_port_is_one_that_does_not_wait() -> None:
    request = _request("-s")
    assert request.argv[3:] == (
        "-chardev",
        "socket,id=gdb,fd=10,wait=off,nodelay=on,server=on",
        "-gdb",
        "chardev:gdb",
    )
    assert request.openings == (ListenTcp(role="gdb", number=10, host="", port=1234),)
    assert _warnings(request)


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("-serial", "udp:localhost:1", "datagram"),
        ("-serial", "pipe:/srv/fifo", "FIFOs"),
        ("-serial", "COM1", "knows no character device"),
        ("-serial", "con:", "knows no character device"),
        ("-serial", "tcp:localhost", "no port"),
        ("-serial", "vc:huge", "no size"),
        ("-parallel", "/dev/parport0", "parallel port"),
        ("-monitor", "unix:/nothing", "does not exist"),
        ("-gdb", "unix:/srv/log,server,nowait", "there is a file"),
        ("-debugcon", "braille", "brlapi"),
        ("-tpmdev", "passthrough,id=t,path=/dev/tpm0", "swtpm"),
    ],
)
def test_short_form_that_cannot_be_had_is_refused(option: str, value: str, why: str) -> None:
    message = _refused(option, value)
    assert why in message
    assert f"{option} {value}" in message


def test_dry_run_has_no_descriptor_no_terminal_and_no_tpm() -> None:
    request = _request(
        *("-serial", "mon:stdio", "-monitor", "unix:/x,server,nowait", "-gdb", "tcp::1", "-chardev", "pty,id=p"),
        *("-chardev", "file,id=f,path=/srv/log,logfile=/srv/other", "-chardev", "socket,id=t,path=/run/s"),
        *("-tpmdev", "emulator,id=tpm,chardev=t", "-vnc", ":0"),
    )
    dry = " ".join(request.dry)
    assert "-tpmdev" in request.argv
    for word in ("fd=", "-add-fd", "fdset", "stdio", "pty", "-tpmdev", "/srv", "logfile"):
        assert word not in dry
    for label in ("serial0", "compat_monitor0", "gdb", "p", "f", "t"):
        assert f"-chardev null,id={label}" in dry


# Displays


def test_vnc_socket_is_handed_over_once_qemu_runs() -> None:
    request = _request("-vnc", "127.0.0.1:3,to=9,password=on,share=ignore", bare=("-nodefaults",))
    assert request.argv == ("-nodefaults", "-vnc", "none,password=on,share=ignore")
    assert request.openings == (ListenTcp(role="vnc", number=-1, host="127.0.0.1", port=5903, port_to=5909),)
    assert [vnc.role for vnc in request.vncs] == ["vnc"]
    assert not _warnings(request)


def test_vnc_on_every_address_is_warned_of() -> None:
    request = _request("-display", "vnc=:0", bare=("-nodefaults",))
    assert request.openings == (ListenTcp(role="vnc", number=-1, host="", port=5900),)
    assert "other hosts" in _warnings(request)[0]


def test_vnc_on_a_unix_socket_is_handed_over_too() -> None:
    request = _request("-vnc", "unix:/run/s", bare=("-nodefaults",))
    assert request.openings == (ListenUnixHere(role="vnc", number=-1, path="/run/s"),)


def test_vnc_none_has_no_socket() -> None:
    request = _request("-vnc", "none,tls-creds=t", bare=("-nodefaults",))
    assert not request.vncs
    assert not request.openings
    assert request.argv[-1] == "none,tls-creds=t"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("-vnc", ":0,websocket=on"), "websockify"),
        (("-vnc", ":0,websocket=5700"), "websockify"),
        (("-vnc", "host:1,reverse=on"), "no network"),
        (("-vnc", ":0,sasl=on"), "SASL"),
        (("-vnc", ":0,x509=/etc/pki"), "names a path"),
        (("-vnc", ":0", "-vnc", ":1"), "first of its VNC servers"),
        (("-vnc", "unix:/srv/log"), "there is a file"),
        (("-vnc", "localhost"), "no port"),
        (("-vnc", ":70000"), "no port"),
        (("-vnc", ":60000"), "a display, not a port"),
        (("-vnc", ":0,to=x"), "no display"),
        (("-spice", "port=5930"), "-vnc"),
        (("-display", "gtk"), "user's session"),
        (("-display", "egl-headless,rendernode=/dev/dri/renderD128"), "user's session"),
        (("-display", '{"type": "sdl"}'), "user's session"),
        (("-audiodev", "pa,id=a"), "-audiodev none"),
        (("-audiodev", '{"driver": "wav", "id": "a", "path": "/srv/log"}'), "-audiodev none"),
        (("-audio", "alsa,model=hda"), "-audio none"),
    ],
)
def test_display_or_sound_that_cannot_be_had_is_refused(words: tuple[str, ...], why: str) -> None:
    assert why in _refused(*words, bare=("-nodefaults",))


def test_silent_sound_and_no_display_pass() -> None:
    words = ("-display", "none", "-audiodev", "none,id=a", "-audio", "none,model=hda")
    assert _request(*words, bare=("-nodefaults",)).argv == ("-nodefaults", *words)


def test_window_that_qemu_would_open_by_default_is_none_and_said() -> None:
    request = _request(bare=("-nodefaults",))
    assert request.argv == ("-nodefaults", "-display", "none")
    assert "no display is asked for" in request.notes[0].text


def test_default_monitor_is_named_since_ours_would_take_its_place() -> None:
    def words(*argv: str) -> str:
        return " ".join(_request(*argv, bare=("-net", "none")).argv)

    assert "stdio,id=serial0,signal=off,mux=on -serial chardev:serial0 -mon" in words("-nographic")
    assert words("-nographic", "-serial", "null").endswith("stdio,id=compat_monitor0 -monitor chardev:compat_monitor0")
    assert words("-nographic", "-monitor", "none").endswith("stdio,id=serial0 -serial chardev:serial0")
    assert words("-nographic", "-device", "isa-serial,chardev=x").endswith("-monitor chardev:compat_monitor0")
    assert words("-vnc", ":0").endswith("vc,id=compat_monitor0,cols=80,rows=24 -monitor chardev:compat_monitor0")
    assert words("-nographic", "-nodefaults").endswith("-nographic -nodefaults")
    assert not _request("-nographic", "-nodefaults", bare=()).stdio


def test_own_streams_and_monitors_keep_their_roles_whatever_a_device_is_called() -> None:
    request = _request(
        *(
            word
            for name in ("qmp", "events", "log")
            for word in ("-chardev", f"socket,id={name},path=/x{name},server=on")
        )
    )
    assert [item.role for item in request.listens] == ["qmp-2", "events-2", "log-2"]
    assert ["id=qmp" in word for word in request.argv].count(True) == 1


def test_log_may_be_a_set_of_the_callers() -> None:
    request = _request("-add-fd", "fd=7,set=3", "-chardev", "pty,id=c,logfile=/dev/fdset/3,logappend=on")
    assert request.argv[-1] == "pty,id=c,logfile=/dev/fdset/3,logappend=on"
    assert [type(item) for item in request.openings] == [Inherited]


@pytest.mark.parametrize("option", ["-serial", "-parallel"])
def test_monitor_beside_a_serial_port_is_the_only_one(option: str) -> None:
    """As -nographic has it: a second one would want the same standard input."""
    argv = _request("-nographic", "-nic", "none", option, "mon:stdio", bare=()).argv
    assert "-monitor" not in argv
    assert argv.count("-mon") == 1


def test_configuration_that_cannot_be_read_is_named() -> None:
    def read(path: str) -> str:
        raise ValueError(f"{path} is no regular file")

    with pytest.raises(ConfigError, match=r"word 1, -readconfig x\.cfg: cannot read /srv/vm/x\.cfg") as caught:
        translate(("-readconfig", "x.cfg"), look=_look, allowed=Allowed(), cwd="/srv/vm", read=read)
    assert "no regular file" in str(caught.value.cause)
