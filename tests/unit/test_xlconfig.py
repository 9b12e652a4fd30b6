# SPDX-License-Identifier: Apache-2.0
"""From configuration to domain: real files mean what they mean to xl, and nothing is lost or loosened in silence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depriv.config import Disk, Domain, Layer, Note, Vif
from depriv.errors import ConfigError, render
from depriv.xlconfig import load_domain
from depriv.xlkeys import all_keys, find_key

MINIMAL = 'name = "web1"\ntype = "hvm"\n'


def load(text: str, *arguments: str) -> Domain:
    """Return the domain of the minimal configuration with some lines more."""
    return load_domain(MINIMAL + text, source="web1.cfg", arguments=arguments)


def refuse(text: str, *arguments: str) -> ConfigError:
    """Return the error for the lines, which must say where, show the line, and offer a remedy."""
    with pytest.raises(ConfigError) as caught:
        load(text, *arguments)
    error = caught.value
    assert error.line >= 1
    assert error.column >= 1
    assert error.text
    assert error.fix
    assert error.source in ("web1.cfg", "argument 1", "argument 2")
    render(error).encode()
    return error


def warnings(domain: Domain) -> list[str]:
    return [note.key for note in domain.notes if note.warning]


def test_the_smallest_configuration_is_strict() -> None:
    assert load("").replace(places=()) == Domain(name="web1", source="web1.cfg")
    assert load("").dm_restrict


LINUX = """\
# A Linux guest, as the wiki shows it
builder = 'hvm'
name = "debian.hvm"
uuid = "6F1A3C7E-9f5b-4b8e-9c36-0d2f8a1b4c5d"
memory = 1024
maxmem = 1024
vcpus = 2
vif = [ 'mac=00:16:3e:12:34:56, bridge=xenbr0, model=e1000' ]
disk = [ '/dev/vg/debian,raw,xvda,rw',
         'file:/srv/iso/debian-12.iso,hdc:cdrom,r', # installer
       ]
boot = "dc"
vnc = 1
vnclisten = '127.0.0.1'
vncunused=1#next free
sdl = 0
serial = 'pty'
usbdevice = 'tablet'
on_poweroff = 'destroy'; on_reboot = 'restart'; on_crash = 'preserve'
device_model_version = "qemu-xen"
localtime = 0
rtc_timeoffset = "-3600"
"""


def test_a_file_as_found_in_the_wild_is_read() -> None:
    found = load_domain(LINUX.replace("\n", "\r\n").encode(), source="d")
    notes = found.notes
    assert found.replace(notes=(), places=()) == Domain(
        name="debian.hvm",
        uuid="6f1a3c7e-9f5b-4b8e-9c36-0d2f8a1b4c5d",
        memory_mib=1024,
        vcpus=2,
        vifs=(Vif(mac="00:16:3e:12:34:56", bridge="xenbr0", model="e1000"),),
        disks=(
            Disk(vdev="xvda", target="/dev/vg/debian"),
            Disk(vdev="hdc", target="/srv/iso/debian-12.iso", readonly=True, cdrom=True, discard=False),
        ),
        boot="dc",
        on_crash="preserve",
        rtc_timeoffset_s=-3600,
        source="d",
    )
    assert warnings(found) == ["vnc", "vif"]
    assert [note.key for note in notes] == ["vnc", "vnclisten", "vncunused", "sdl", "usbdevice", "vif"]
    assert notes[0] == Note(key="vnc", text=notes[0].text, source="d", line=13, column=1, warning=True)


PV = 'name = "pv"\nkernel = "/boot/vmlinuz"\nextra = "ro quiet"\nroot = "/dev/xvda1"\nbootloader = "pygrub"\n'


def test_pv_and_pvh_files_are_read_for_the_planner_to_refuse() -> None:
    found = load_domain(PV, source="pv")
    assert (found.type, found.cmdline) == ("pv", "root=/dev/xvda1 ro quiet")
    assert warnings(found) == ["bootloader"]
    assert load_domain(PV + 'type = "pvh"', source="pv").type == "pvh"
    assert load_domain('name="x"; builder="generic"', source="pv").type == "pv"


def test_a_full_configuration_fills_every_field() -> None:
    found = load(
        """
        machine = "q35"; accel = "tcg"; bios = "ovmf"; bios_path_override = "/usr/share/ovmf/OVMF.fd"
        kernel = "/boot/vmlinuz"; ramdisk = "/boot/initrd"; cmdline = "console=ttyS0"; acpi = 0; localtime = 1
        disk = [ "vdev=xvda,format=qcow2,target=/srv/a.qcow2" ]
        disk_backing = [ "vdev=xvda,format=qcow2,target=/srv/base.qcow2", "vdev=xvda,format=raw,target=/srv/base" ]
        device_model_user = "vm-web1"; device_model_override = "/opt/qemu"; serial = "none"
        device_model_args = [ "-cpu", "qemu64" ]; device_model_args_hvm = [ "-usb" ]
        """
    )
    chain = (Layer(target="/srv/base.qcow2", format="qcow2"), Layer(target="/srv/base", format="raw"))
    assert found.replace(places=()) == Domain(
        name="web1",
        machine="q35",
        accel="tcg",
        bios="ovmf",
        firmware="/usr/share/ovmf/OVMF.fd",
        kernel="/boot/vmlinuz",
        ramdisk="/boot/initrd",
        cmdline="console=ttyS0",
        acpi=False,
        localtime=True,
        disks=(Disk(vdev="xvda", target="/srv/a.qcow2", format="qcow2", chain=chain),),
        device_model_user="vm-web1",
        device_model_override="/opt/qemu",
        device_model_args=("-cpu", "qemu64", "-usb"),
        serial=False,
        source="web1.cfg",
    )


def test_arguments_override_the_file() -> None:
    assert load("memory = 256", "memory=512", 'name="web2"').memory_mib == 512
    assert refuse("memory = 256", "memory=512", "memory=0").source == "argument 2"


def test_restriction_is_on_unless_switched_off_aloud() -> None:
    assert load("dm_restrict = 1").notes == ()
    found = load("dm_restrict = 0")
    assert not found.dm_restrict
    assert warnings(found) == ["dm_restrict"]
    assert "WITHOUT" in found.notes[0].text


@pytest.mark.parametrize("value", ['"yes"', '"True"', '"1 "', '""', "[1]", "[]", "True", "1k", '"on"'])
def test_a_mistyped_dm_restrict_is_never_taken_for_anything(value: str) -> None:
    refuse(f"dm_restrict = {value}")


def test_a_boolean_in_words_is_refused_with_the_number_to_write() -> None:
    assert refuse('dm_restrict = "yes"').fix == "write dm_restrict = 1"
    assert refuse('acpi = "off"').fix == "write acpi = 0"


@pytest.mark.parametrize("name", all_keys())
def test_the_wrong_type_is_an_error_for_every_key(name: str) -> None:
    key = find_key(name)
    assert key is not None
    if key.type != "string-or-list":
        refuse(f'{name} = "x"' if key.type == "list" else f"{name} = [1]")
    if key.type in ("int", "bool"):
        refuse(f'{name} = "x"')
        assert "+=" in refuse(f"{name} = 1\n{name} += 1").what


@pytest.mark.parametrize("name", [name for name in all_keys() if (key := find_key(name)) and not key.used])
def test_every_ignored_key_leaves_a_note_with_the_reason(name: str) -> None:
    key = find_key(name)
    assert key is not None
    value = {"list": '["x"]', "bool": "1", "int": "1"}.get(key.type, '"destroy"')
    (note,) = load(f"{name} = {value}").notes
    assert (note.key, note.line, note.column, note.warning) == (name, 3, 1, key.loud)
    assert key.reason in note.text


def test_an_ignored_key_that_asks_for_nothing_is_no_warning() -> None:
    assert warnings(load('vnc = 0; vfb = []; soundhw = ""; driver_domain = 0')) == []


def test_an_unknown_key_is_a_warning() -> None:
    (note,) = load("\ncomment_of_mine = 1").notes
    assert (note.key, note.line, note.warning) == ("comment_of_mine", 4, True)


@pytest.mark.parametrize("line", ["dm_restrit = 1", "device_model_uesr = 'x'", "disks = []", "device_modelargs = []"])
def test_a_misspelt_security_key_is_an_error(line: str) -> None:
    assert "did you mean" in refuse(line).fix


@pytest.mark.parametrize(
    "line",
    [
        "pci = ['01:00.0']",
        "usbdev = ['hostbus=1,hostaddr=2']",
        "usbdevice = 'host:1.2'",
        "usbdevice = ['tablet', 'host:1.2']",
        "usbdevice = 'disk:/etc/shadow'",
        "gfx_passthru = 1",
        "gfx_passthru = 'igd'",
        "p9 = ['tag=t,security_model=none,path=/']",
        "dtdev = ['/soc']",
        "iomem = ['fe000,1']",
        "ioports = ['3f8']",
        "irqs = [7]",
        "vtpm = ['backend=vtpm']",
        "device_model_stubdomain_override = 1",
    ],
)
def test_what_needs_the_host_is_refused_and_never_dropped(line: str) -> None:
    assert "refused" in refuse(line).what or "not supported" in refuse(line).what


def test_refused_keys_that_ask_for_nothing_are_fine() -> None:
    assert load("pci = []; gfx_passthru = 0; p9 = []; device_model_stubdomain_override = 0; usbdev=[]").notes == ()


@pytest.mark.parametrize(
    "name",
    ["", "a" * 64, "-x", ".x", "..", "a/b", "a b", "a\\nb", "ü", "a,b", "a=b", "\\x1b[0m", "a%b", "web\u0430", "a:b"],
)
def test_impossible_names_are_refused(name: str) -> None:
    refuse(f'name = "{name}"')


@pytest.mark.parametrize("name", ["a", "a" * 63, "Web-1.example_x+y", "0a", "0.5", "_"])
def test_ordinary_names_are_taken(name: str) -> None:
    assert load(f'name = "{name}"').name == name


@pytest.mark.parametrize("name", ["0", "7", "32751", "007"])
def test_number_for_a_name_is_refused_for_commands_would_take_it_for_a_domid(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}' is a number") as caught:
        load(f'name = "{name}"')
    assert f'"vm{name}"' in caught.value.fix


def test_a_missing_name_is_told_with_the_file() -> None:
    with pytest.raises(ConfigError, match=r"^web1.cfg: there is no name$"):
        load_domain('type = "hvm"', source="web1.cfg")


@pytest.mark.parametrize(
    "line",
    [
        "memory = 0",
        "memory = '-1'",
        "memory = '512M'",
        "memory = 99999999999999999999",
        "memory = 2; maxmem = 1",
        "maxmem = 0",
        "vcpus = 0",
        "vcpus = 2; maxvcpus = 1",
        "type = 'HVM'",
        "type = ''",
        "type = 'hv'",
        "type = 'hvm'; builder = 'generic'",
        "builder = 'linux'",
        "builder = ''\nbuilder = 'x'",
        "uuid = 'x'",
        "uuid = '6f1a3c7e-9f5b-4b8e-9c36-0d2f8a1b4c5'",
        "uuid = '6f1a3c7e9f5b-4b8e-9c36-0d2f-8a1b4c5d'",
        "uuid = '../../etc'",
        "machine = 'isapc'",
        "accel = 'hax'",
        "kernel = 'vmlinuz'",
        "kernel = '/boot/\\x1b'",
        "ramdisk = '/boot/initrd'",
        "kernel = '/k'; cmdline = 'a\\nb'",
        "bios = 'rombios'",
        "bios = 'coreboot'",
        "firmware = 'rombios'",
        "firmware = 'OVMF.fd'",
        "bios_path_override = 'x'",
        "bios_path_override = '/a'; firmware_override = '/b'",
        "on_crash = 'dump'",
        "on_crash = ''",
        "on_poweroff = 'soft-reset'",
        "on_reboot = 'coredump-destroy'",
        "on_crash = 'coredump-restart'",
        "on_crash = 'coredump-x'",
        "on_watchdog = 'x'",
        "boot = 'cx'",
        "boot = 'cc'",
        "boot = 'c d'",
        "serial = '/dev/ttyS0'",
        "serial = 'tcp:0.0.0.0:1'",
        "serial = ['pty', 'file:/x']",
        "serial = ''",
        "serial = [['pty']]",
        "rtc_timeoffset = 99999999999",
        "device_model_version = 'qemu-xen-traditional'",
        "device_model_version = 'qemu'",
        "device_model_override = 'qemu'",
        "device_model_user = 'root'",
        "device_model_user = '0'",
        "device_model_user = 'a:b'",
        "device_model_user = 'a\\nb'",
        "device_model_user = '-x'",
        "device_model_args = ['-runas', 'root']",
        "device_model_args_hvm = ['-chroot', '/']",
        "device_model_args_pv = ['-monitor', 'stdio']",
        "device_model_args = [['-usb']]",
        "disk = ['/a,raw,xvda,w', '/b,raw,d0,w']",
        "disk = [['/a,raw,xvda,w']]",
        "disk_backing = ['vdev=xvda,format=raw,target=/x']",
        "vif = ['foo']",
        "vif = [[]]",
    ],
)
def test_wrong_values_are_refused_at_their_place(line: str) -> None:
    refuse(line)


def test_traditional_qemu_is_refused_by_name() -> None:
    assert "cannot be confined" in refuse("device_model_version = 'qemu-xen-traditional'").what


def test_memory_and_cpus_follow_xl() -> None:
    assert load("maxmem = 300").memory_mib == 300
    assert warnings(load("memory = 200; maxmem = 300")) == ["maxmem"]
    assert warnings(load("vcpus = 1; maxvcpus = 4")) == ["maxvcpus"]
    odd = load("memory = 0x100; vcpus = '010'").replace(notes=(), places=())
    assert odd == load("memory = 256; vcpus = 8").replace(places=())


def test_the_command_line_of_the_kernel_follows_xl() -> None:
    assert load("kernel='/k'; root='/dev/a'").cmdline == "root=/dev/a"
    assert load("kernel='/k'; extra='ro'").cmdline == "ro"
    found = load("kernel='/k'; cmdline='x'; extra='ro'")
    assert (found.cmdline, warnings(found)) == ("x", ["extra"])
    assert warnings(load("extra = 'ro'")) == ["extra"]


def test_hvmloader_is_no_kernel() -> None:
    found = load("kernel = '/usr/lib/xen-4.1/boot/hvmloader'; firmware_override = 'hvmloader'")
    assert (found.kernel, found.firmware, warnings(found)) == ("", "", ["kernel", "firmware_override"])


@pytest.mark.parametrize(
    ("line", "bios", "path"),
    [
        ("firmware = 'uefi'", "ovmf", ""),
        ("firmware = 'bios'", "", ""),
        ("firmware = 'seabios'", "seabios", ""),
        ("firmware = '/f.fd'", "", "/f.fd"),
        ("firmware_override = '/f.fd'", "", "/f.fd"),
        ("bios = 'ovmf'; bios_path_override = '/f.fd'", "ovmf", "/f.fd"),
    ],
)
def test_every_way_to_name_a_firmware_is_understood(line: str, bios: str, path: str) -> None:
    found = load(line)
    assert (found.bios, found.firmware) == (bios, path)


@pytest.mark.parametrize(
    ("value", "serial"),
    [("'pty'", True), ("'none'", False), ("['pty']", True), ("[]", False), ("['none','pty']", False)],
)
def test_the_serial_port_leads_to_the_console_or_nowhere(value: str, serial: bool) -> None:
    assert load(f"serial = {value}").serial is serial


def test_more_than_one_serial_port_is_told() -> None:
    assert warnings(load("serial = ['pty', 'pty']")) == ["serial"]


def test_a_floppy_in_the_boot_order_is_noted() -> None:
    found = load("boot = 'acn'")
    assert (found.boot, [note.key for note in found.notes]) == ("cn", ["boot"])
    assert load("boot = ''").boot == load("boot = 'a'").boot == "cd"


def test_arguments_for_the_other_type_of_guest_are_checked_and_noted() -> None:
    found = load("device_model_args_pv = ['-usb']")
    assert (found.device_model_args, [note.key for note in found.notes]) == ((), ["device_model_args_pv"])
    found = load_domain("name='x'; device_model_args_pv = ['-usb']; device_model_args=['-no-hpet']", source="x")
    assert found.device_model_args == ("-no-hpet", "-usb")


@pytest.mark.parametrize(("action", "instead"), [("coredump-restart", "restart"), ("coredump-destroy", "destroy")])
def test_core_dumps_are_refused_with_what_to_write_instead(action: str, instead: str) -> None:
    error = refuse(f"on_crash = '{action}'")
    assert (error.line, error.column) == (3, 12)
    assert error.what.startswith(f"on_crash = {action} is refused: a dump is all of the guest's memory")
    assert error.fix.startswith(f'write "{instead}", or "preserve"')


def test_soft_reset_is_refused_with_what_to_write_instead() -> None:
    error = refuse("on_crash = 'soft-reset'")
    assert error.what.startswith("on_crash = soft-reset is refused: it hands a guest of Xen's over")
    assert error.fix == 'write "restart"'


@pytest.mark.parametrize("action", ["destroy", "restart", "preserve", "rename-restart"])
@pytest.mark.parametrize("key", ["on_poweroff", "on_reboot", "on_crash"])
def test_each_ending_takes_each_of_the_four_actions(key: str, action: str) -> None:
    found = load(f"{key} = '{action}'")
    assert (getattr(found, key), warnings(found)) == (action, [])


@pytest.mark.parametrize("key", ["on_poweroff", "on_reboot", "on_crash"])
@pytest.mark.parametrize(
    ("text", "held"),
    [("disk = ['/a.img,raw,xvda,w']", "xvda"), ("device_model_user = 'alice'", "the user alice")],
)
def test_domain_is_not_kept_beside_the_next_one_if_it_holds_what_that_one_needs(key: str, text: str, held: str) -> None:
    error = refuse(f"{text}\n{key} = 'rename-restart'")
    assert (error.line, error.column) == (4, len(key) + 4)
    assert error.what.startswith(f"{key} = rename-restart is refused: the domain that is kept would hold {held}, ")
    assert '"restart"' in error.fix
    assert '"preserve"' in error.fix


@pytest.mark.parametrize(
    "text",
    [
        "disk = ['/a.img,raw,xvda,r', '/b.iso,raw,hdc:cdrom,r', ',,hdd:cdrom,r']",
        "device_model_user = 'xen-qemuuser-shared'",
    ],
)
def test_domain_that_holds_nothing_alone_may_be_kept_beside_the_next_one(text: str) -> None:
    assert load(f"{text}\non_crash = 'rename-restart'").on_crash == "rename-restart"


@pytest.mark.parametrize("action", ["coredump-restart", "soft-reset", "rename-restart"])
def test_actions_of_xl_are_known_where_the_key_has_no_effect(action: str) -> None:
    assert [note.key for note in load(f"on_watchdog = '{action}'").notes] == ["on_watchdog"]


def test_notes_on_disks_and_cards_reach_the_domain() -> None:
    found = load("disk = ['phy:/dev/a,hda,w', 'backendtype=phy,vdev=hdb,target=/b']\nvif = ['accel=1']")
    assert [(note.key, note.line) for note in found.notes] == [("disk", 3), ("vif", 4), ("vif", 4)]


def test_the_error_shows_the_line_and_the_remedy() -> None:
    assert render(refuse("vcpus = 2\nmemory = '2G'")).splitlines() == [
        "error: web1.cfg:4:10: memory is `2G', which is no number",
        "  memory = '2G'",
        "           ^",
        "  fix: write a number without a unit: 512, 0x200 (memory is in MiB)",
    ]


LINES = st.builds(
    "{} {} {}".format,
    st.sampled_from([*all_keys(), "frob", "dm_restrit"]),
    st.sampled_from(["=", "+="]),
    st.sampled_from(
        ["0", "1", "'1'", "'x'", "[]", "['x']", "[['x']]", "'/a'", "['/a,raw,xvda,w']", "'pty'", "'hvm'", "''"]
    ),
)


@given(st.lists(LINES, max_size=5))
@settings(max_examples=300, deadline=None)
def test_any_settings_make_a_domain_or_an_error_at_a_place(lines: list[str]) -> None:
    try:
        found = load("\n".join(lines))
    except ConfigError as error:
        assert error.text  # noqa: PT017 (either outcome is right)
        assert 1 <= error.column <= len(error.text) + 1  # noqa: PT017
    else:
        assert found.dm_restrict or "dm_restrict" in warnings(found)
        assert all(disk.target.startswith("/") for disk in found.disks)
