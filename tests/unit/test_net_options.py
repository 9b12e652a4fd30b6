# SPDX-License-Identifier: Apache-2.0
"""Networks of a QEMU command line: taps, sockets and passt by descriptor; what is refused and what to do instead."""

from __future__ import annotations

import pytest

from depriv.errors import ConfigError
from depriv.host import FileFacts
from depriv.openings import ConnectTcp, ConnectUnix, Inherited, ListenTcp, OpenTap, StartPasst
from depriv.qemu.draft import Allowed, Request
from depriv.qemu.translate import translate

_KINDS = {"/run/s": "socket", "/dev/vhost-net": "char", "/dev/vhost-vdpa-0": "char", "/srv/log": "file"}
_BARE = ("-nodefaults", "-display", "none")
_WITH_PASST = Allowed(passt="/usr/bin/passt")
_SLIRP = ("--address", "10.0.2.15", "--netmask", "24", "--gateway", "10.0.2.2", "--dns-forward", "10.0.2.3")


def _look(path: str) -> FileFacts:
    return FileFacts(path=path, kind=_KINDS.get(path, "missing"), rdev=3)


def _request(*argv: str, allowed: Allowed = _WITH_PASST, bare: tuple[str, ...] = _BARE) -> Request:
    return translate((*bare, *argv), look=_look, allowed=allowed, cwd="/srv/vm")


def _refused(*argv: str, allowed: Allowed = _WITH_PASST) -> str:
    """Return why a command line is refused, and what to do instead."""
    with pytest.raises(ConfigError) as caught:
        _request(*argv, allowed=allowed)
    assert caught.value.fix
    return f"{caught.value}; {caught.value.cause}; {caught.value.fix}"


def _warnings(request: Request) -> list[str]:
    return [note.text for note in request.notes if note.warning]


def _passt(*argv: str) -> tuple[str, ...]:
    """Return passt's words for a user-mode network."""
    (opening,) = _request(*argv).openings
    assert isinstance(opening, StartPasst)
    return opening.words


# User mode


def test_user_network_is_passt_at_the_other_end_of_a_socket() -> None:
    request = _request("-netdev", "user,id=n")
    assert request.argv[-2:] == ("-netdev", "stream,id=n,server=off,addr.type=fd,addr.str=10")
    assert request.openings == (StartPasst(role="n", number=10, words=_SLIRP),)
    assert request.dry[-2:] == ("-netdev", "hubport,id=n,hubid=900")


def test_user_network_has_the_addresses_that_are_asked_for() -> None:
    words = _passt("-netdev", "user,id=n,net=192.168.76.0/24,dhcpstart=192.168.76.9,ipv6=off,dnssearch=a,dnssearch=b")
    assert words == (
        *("--address", "192.168.76.9", "--netmask", "24", "--gateway", "192.168.76.2"),
        *("--dns-forward", "192.168.76.3", "--ipv4-only", "--search", "a", "--search", "b"),
    )
    assert _passt("-netdev", "user,id=n,net=172.16.0.0/16")[:6] == (
        *("--address", "172.16.2.15", "--netmask", "16", "--gateway", "172.16.2.2"),
    )
    assert _passt("-netdev", "user,id=n,host=10.0.2.7,dns=10.0.2.8")[4:] == (
        *("--gateway", "10.0.2.7", "--dns-forward", "10.0.2.8"),
    )
    assert _passt("-netdev", "user,id=n,ipv4=off") == ("--ipv6-only",)


def test_forwards_are_passts_and_udp_is_not_forwarded_by_the_way() -> None:
    forwards = "hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=tcp::8080-10.0.2.15:80"
    request = _request("-netdev", f"user,id=n,{forwards}")
    (opening,) = request.openings
    assert isinstance(opening, StartPasst)
    assert opening.words[len(_SLIRP) :] == (
        *("--tcp-ports", "127.0.0.1/2222:22", "--tcp-ports", "0.0.0.0/8080:80", "--udp-ports", "none"),
    )
    assert len(_warnings(request)) == 1
    assert "8080" in _warnings(request)[0]
    assert _passt("-nic", "user,hostfwd=udp:127.0.0.1:53-:53,hostfwd=::1-:1")[len(_SLIRP) :] == (
        *("--udp-ports", "127.0.0.1/53:53", "--tcp-ports", "0.0.0.0/1:1"),
    )


def test_restricted_network_has_addresses_and_nothing_else() -> None:
    words = _passt("-netdev", "user,id=n,restrict=on")
    assert words == (*_SLIRP, "--no-tcp", "--no-udp", "--no-icmp", "--no-map-gw")


def test_user_network_of_json_is_understood() -> None:
    text = '{"type": "user", "id": "n", "hostfwd": [{"str": "tcp:127.0.0.1:1-:2"}], "ipv6": false}'
    assert _passt("-netdev", text)[len(_SLIRP) :] == (
        *("--ipv4-only", "--tcp-ports", "127.0.0.1/1:2", "--udp-ports", "none"),
    )


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ("guestfwd=tcp:10.0.2.100:80-cmd:nc -l", "start a program"),
        ("smb=/srv", "smbd"),
        ("tftp=/srv,bootfile=x", "by name"),
        ("restrict=on,hostfwd=tcp::1-:2", "restrict=on with hostfwd"),
        ("net=10.0.2.0", "no mask"),
        ("net=10.0.2.0/99", "no IPv4 network"),
        ("dhcpstart=10.9.9.9", "not in 10.0.2.0/24"),
        ("dns=--help", "no IPv4 network"),
        ("hostfwd=sctp::1-:2", "not understood"),
        ("hostfwd=tcp::1", "not understood"),
        ("hostfwd=tcp::0-:2", "port 0"),
        ("hostfwd=tcp::x-:2", "no port"),
        ("hostfwd=tcp:1.2.3.4/5:1-:2", "no address"),
        ("hostfwd=tcp::1-10.0.2.99:2", "own address only"),
    ],
)
def test_user_network_that_cannot_be_had_is_refused(items: str, why: str) -> None:
    assert why in _refused("-netdev", f"user,id=n,{items}")


def test_user_network_without_passt_is_refused_unless_the_hosts_network_is_kept() -> None:
    assert "apt-get install passt" in _refused("-netdev", "user,id=n", allowed=Allowed())
    request = _request("-netdev", "user,id=n,net=10.0.2.0/24", allowed=Allowed(keep_net=True))
    assert request.argv[-1] == "user,id=n,net=10.0.2.0/24"
    assert not request.openings
    assert "host's network namespace" in _warnings(request)[0]


def test_programs_and_folders_are_refused_in_the_hosts_network_too() -> None:
    for items in ("smb=/srv", "guestfwd=tcp:1.2.3.4:1-cmd:sh", "tftp=/srv"):
        assert "refused" in _refused("-netdev", f"user,id=n,{items}", allowed=Allowed(keep_net=True))


# What QEMU does by itself


def test_default_network_is_passts() -> None:
    request = _request(bare=("-display", "none"))
    assert request.argv[2:] == (
        *("-netdev", "stream,id=depriv-net0,server=off,addr.type=fd,addr.str=10"),
        *("-net", "nic,netdev=depriv-net0"),
    )
    assert request.openings == (StartPasst(role="depriv-net0", number=10, words=_SLIRP),)


def test_default_network_without_passt_is_none_and_warned_of() -> None:
    request = _request(bare=("-display", "none"), allowed=Allowed())
    assert request.argv == ("-display", "none", "-nic", "none")
    assert "passt" in _warnings(request)[0]


@pytest.mark.parametrize("words", [("-nodefaults",), ("-net", "none"), ("-nic", "none"), ("-machine", "none")])
def test_guest_that_wants_no_network_has_none(words: tuple[str, ...]) -> None:
    request = _request(*words, bare=("-display", "none"))
    assert not request.openings
    assert not _warnings(request)
    assert not [word for word in request.argv if "stream" in word]


# -nic and -net


def test_nic_is_a_netdev_and_a_card_on_it() -> None:
    request = _request("-nic", "tap,ifname=t0,script=no,downscript=no,model=e1000,mac=52:54:00:00:00:07")
    assert request.argv[3:] == (
        *("-netdev", "tap,id=depriv-net0,fd=10"),
        *("-net", "nic,netdev=depriv-net0,model=e1000,macaddr=52:54:00:00:00:07"),
    )
    assert request.dry[3:5] == ("-netdev", "hubport,id=depriv-net0,hubid=900")
    assert request.dry[5:] == request.argv[5:]


def test_old_net_joins_the_common_hub() -> None:
    request = _request("-net", "nic,model=rtl8139", "-net", "user")
    assert request.argv[3:] == (
        *("-net", "nic,model=rtl8139"),
        *("-netdev", "stream,id=depriv-net0,server=off,addr.type=fd,addr.str=10"),
        *("-netdev", "hubport,id=depriv-net0-hub,hubid=0,netdev=depriv-net0"),
    )


def test_lists_of_names_are_printed_without_a_guest() -> None:
    for words in (("-netdev", "help"), ("-net", "help"), ("-nic", "user,model=help")):
        assert _request(*words).no_guest


# Taps


def test_tap_is_opened_by_us_one_descriptor_per_queue() -> None:
    request = _request("-netdev", "tap,id=n,ifname=t0,script=no,downscript=no,vnet_hdr=off,sndbuf=0")
    assert request.argv[-1] == "tap,id=n,fd=10,sndbuf=0"
    assert request.openings == (OpenTap(role="n", numbers=(10,), name="t0", vnet_hdr=False),)
    request = _request("-netdev", "tap,id=n,br=br1,queues=2,helper=/usr/lib/qemu/qemu-bridge-helper")
    assert request.argv[-1] == "tap,id=n,fds=10:11"
    assert request.openings == (OpenTap(role="n", numbers=(10, 11), name="", bridge="br1"),)


def test_bridge_is_a_tap_on_it() -> None:
    request = _request("-netdev", "bridge,id=n")
    assert request.argv[-1] == "tap,id=n,fd=10"
    assert request.openings == (OpenTap(role="n", numbers=(10,), name="", bridge="br0"),)


def test_taps_of_the_caller_are_renumbered() -> None:
    request = _request("-netdev", "tap,id=a,fd=7", "-netdev", "tap,id=b,fds=8:9,vhost=on,vhostfds=20:21")
    assert request.argv[-3:] == ("tap,id=a,fd=10", "-netdev", "tap,id=b,fds=11:12,vhostfds=13:14,vhost=on")
    taken = [opening.source for opening in request.openings if isinstance(opening, Inherited)]
    assert taken == [7, 8, 9, 20, 21]


def test_kernels_data_path_is_handed_over_where_asked_for() -> None:
    request = _request("-netdev", "tap,id=n,br=br0,queues=2,vhost=on")
    assert request.argv[-1] == "tap,id=n,fds=10:11,vhostfds=12:13,vhost=on"
    assert [(step.path, step.access, step.number) for step in request.files] == [
        ("/dev/vhost-net", "rw", 12),
        ("/dev/vhost-net", "rw", 13),
    ]
    assert any("vhost" in note.text for note in request.notes)
    assert not _request("-netdev", "tap,id=n,br=br0,vhost=off").files


def test_script_that_is_not_run_is_warned_of() -> None:
    assert "qemu-ifup" in _warnings(_request("-netdev", "tap,id=n,ifname=t0"))[0]


@pytest.mark.parametrize(
    ("netdev", "why"),
    [
        ("tap,id=n", "br=BRIDGE"),
        ("tap,id=n,ifname=t0,script=/etc/up", "no program"),
        ("tap,id=n,ifname=t0,script=no,downscript=/etc/down", "no program"),
        ("tap,id=n,ifname=an-interface-name,script=no", "no name of an interface"),
        ("tap,id=n,br=../x", "no name of an interface"),
        ("tap,id=n,br=br0,queues=0", "no number of queues"),
        ("tap,id=n,br=br0,queues=x", "no number of queues"),
        ("tap,id=n,br=br0,queues=100", "more than"),
        ("tap,id=n,fd=name", "no descriptor"),
        ("vhost-user,id=n,chardev=c", "tap,vhost=on"),
        ("l2tpv3,id=n,src=a,dst=b,txsession=1", "ip l2tp"),
        ("vde,id=n,sock=/run/s", "vde_plug"),
        ("af-xdp,id=n,ifname=eth0", "tap,br=BRIDGE"),
        ("netmap,id=n,ifname=vale0:0", "tap,br=BRIDGE"),
        ("passt,id=n,path=/usr/bin/passt", "use user"),
        ("unheard-of,id=n", "knows no network"),
        ("user", "no id"),
    ],
)
def test_backend_that_cannot_be_had_is_refused(netdev: str, why: str) -> None:
    assert why in _refused("-netdev", netdev)


def test_vhost_without_the_hosts_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="/dev/vhost-net"):
        translate(
            ("-netdev", "tap,id=n,br=b,vhost=on"),
            look=lambda path: FileFacts(path=path, kind="missing"),
            allowed=Allowed(),
        )


# Sockets


def test_sockets_between_guests_are_opened_by_us() -> None:
    request = _request(
        *("-netdev", "socket,id=a,listen=127.0.0.1:1000", "-netdev", "socket,id=b,connect=localhost:1001"),
        *("-netdev", "stream,id=c,server=on,addr.type=unix,addr.path=x"),
        *("-netdev", "stream,id=d,server=off,addr.type=unix,addr.path=/run/s"),
        *("-netdev", '{"type":"stream","id":"e","server":true,"addr":{"type":"inet","host":"::1","port":"5","to":7}}'),
    )
    assert request.argv[4::2] == tuple(
        f"stream,id={label},server={server},addr.type=fd,addr.str={number}"
        for label, server, number in (
            ("a", "on", 10),
            ("b", "off", 11),
            ("c", "on", 12),
            ("d", "off", 13),
            ("e", "on", 14),
        )
    )
    assert request.openings == (
        ListenTcp(role="a", number=10, host="127.0.0.1", port=1000),
        ConnectTcp(role="b", number=11, host="localhost", port=1001),
        ConnectUnix(role="d", number=13, path="/run/s"),
        ListenTcp(role="e", number=14, host="::1", port=5, port_to=7),
    )
    assert [(listen.path, listen.number) for listen in request.listens] == [("/srv/vm/x", 12)]


def test_sockets_of_the_caller_are_renumbered() -> None:
    request = _request(
        *("-netdev", "socket,id=a,fd=7", "-netdev", "stream,id=b,addr.type=fd,addr.str=8"),
        *("-netdev", "dgram,id=c,local.type=fd,local.str=9"),
    )
    assert request.argv[4::2] == (
        "socket,id=a,fd=10",
        "stream,id=b,server=off,addr.type=fd,addr.str=11",
        "dgram,id=c,local.type=fd,local.str=12",
    )


def test_vdpa_device_is_handed_over() -> None:
    request = _request("-netdev", "vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0")
    assert request.argv[-1] == "vhost-vdpa,id=n,vhostdev=/dev/fdset/1010"
    assert request.files[0].access == "rw"


@pytest.mark.parametrize(
    ("netdev", "why"),
    [
        ("socket,id=a,mcast=230.0.0.1:1234", "datagram"),
        ("socket,id=a,udp=localhost:1", "datagram"),
        ("socket,id=a", "names no socket"),
        ("socket,id=a,listen=1000", "no port"),
        ("stream,id=a,addr.type=vsock,addr.cid=2,addr.port=1", "cannot be handed over"),
        ("stream,id=a,addr.type=unix,addr.path=x,addr.abstract=on,server=on", "abstract"),
        ("stream,id=a,addr.type=unix,addr.path=/nothing", "does not exist"),
        ("stream,id=a,server=on,addr.type=unix,addr.path=/srv/log", "there is a file"),
        ("dgram,id=a,local.type=inet,local.host=::1,local.port=1", "datagram"),
        ("dgram,id=a,local.type=fd,local.str=4,remote.type=inet,remote.host=230.0.0.1,remote.port=1", "datagram"),
        ("vhost-vdpa,id=a,vhostdev=/srv/log", "cannot use /srv/log"),
    ],
)
def test_socket_that_cannot_be_had_is_refused(netdev: str, why: str) -> None:
    assert why in _refused("-netdev", netdev)
