# SPDX-License-Identifier: Apache-2.0
"""Options about machine, files and the process: what QEMU gets in place of what names the host."""

from __future__ import annotations

import json

import pytest
from tests.support.words import Done, look, refused

from depriv.errors import ConfigError
from depriv.openings import Inherited, ReadFile
from depriv.qemu.draft import Allowed, Draft
from depriv.qemu.expand import expand
from depriv.qemu.words import Word

# --- files that are copied


def test_kernel_and_ramdisk_are_private_copies() -> None:
    done = Done("-kernel", "bzImage", "-initrd", "/vm/initrd.gz", "-append", "root=/dev/vda")
    assert done.argv == "-kernel /private/kernel -initrd /private/initrd -append root=/dev/vda"
    assert done.dry == done.argv
    assert done.copies == [("/vm/bzImage", "/private/kernel"), ("/vm/initrd.gz", "/private/initrd")]


def test_each_module_of_a_multiboot_kernel_is_a_copy_and_keeps_its_words() -> None:
    done = Done("-kernel", "bzImage", "-initrd", "mod1 root=a b,,c,/vm/mod2,a,,b x")
    assert done.draft.argv[-1] == "/private/initrd root=a b,,c,/private/initrd-2,/private/initrd-3 x"
    assert [source for source, _ in done.copies[1:]] == ["/vm/mod1", "/vm/mod2", "/vm/a,b"]
    assert done.notes


def test_a_ramdisk_whose_name_has_a_comma_is_one_file() -> None:
    assert Done("-initrd", "a,b").copies == [("/vm/a,b", "/private/initrd")]


def test_a_module_that_is_missing_is_named() -> None:
    assert "/vm/mod3" in str(refused("-initrd", "mod1,mod3"))


@pytest.mark.parametrize("option", ["-kernel", "-initrd", "-dtb", "-bios", "-option-rom"])
@pytest.mark.parametrize("path", ["/vm/dir", "/vm/link", "/dev/sda", "/vm/none"])
def test_what_is_no_regular_file_is_not_copied(option: str, path: str) -> None:
    refused(option, path)


def test_a_firmware_is_a_copy_where_a_file_of_that_name_is_there_and_else_a_name() -> None:
    assert Done("-bios", "bios.bin").argv == "-bios /private/firmware"
    assert Done("-bios", "bios-256k.bin").argv == "-bios bios-256k.bin"
    assert Done("-option-rom", "/vm/bios.bin,bootindex=3").argv == "-option-rom romfile=/private/option-rom,bootindex=3"


def test_a_data_folder_is_below_usr_or_refused() -> None:
    assert Done("-L", "/usr/share/qemu/").argv == "-L /usr/share/qemu"
    for path in ("pc-bios", "/vm/dir", "/usr/../vm", "/usr"):
        refused("-L", path)


def test_fw_cfg_smbios_and_acpitable_files_are_copies() -> None:
    done = Done(
        "-fw_cfg",
        "opt/a,file=/vm/secret",
        "-fw_cfg",
        "name=opt/b,string=/etc/passwd",
        "-smbios",
        "type=11,value=x,path=/vm/secret,value=y",
        "-smbios",
        "file=/vm/mod1",
        "-acpitable",
        "sig=ABCD,data=mod1:/vm/mod2",
    )
    assert done.argv == (
        "-fw_cfg name=opt/a,file=/private/fw_cfg -fw_cfg name=opt/b,string=/etc/passwd"
        " -smbios type=11,value=x,path=/private/smbios,value=y -smbios file=/private/smbios-2"
        " -acpitable sig=ABCD,data=/private/acpitable:/private/acpitable-2"
    )
    refused("-acpitable", "data=mod1:/vm/none")


def test_a_keymap_is_a_name_or_a_copy() -> None:
    assert Done("-k", "de").argv == "-k de"
    assert Done("-k", "/vm/keymap").argv == "-k /private/keymap"
    refused("-k", "/vm/none")


def test_a_splash_is_a_copy() -> None:
    assert Done("-boot", "order=cd,splash=/vm/mod1").argv == "-boot order=cd,splash=/private/splash"
    assert Done("-boot", "d").argv == "-boot order=d"


# --- the machine


def test_machine_type_accelerator_memory_and_processors_are_known() -> None:
    request = Done("-M", "q35,accel=kvm", "-m", "2G,slots=2,maxmem=8G", "-smp", "4").request
    assert (request.machine, request.accel, request.memory_mib, request.vcpus) == ("q35", "kvm", 2048, 4)


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("512", 512),
        ("512M", 512),
        ("1g", 1024),
        ("size=1.5G", 1536),
        ("1048576k", 1024),
        ("1048577k", 1025),
        ("0", 128),
        ("0x100", 256),
    ],
)
def test_memory_is_read_as_qemu_does(text: str, mib: int) -> None:
    assert Done("-m", text).request.memory_mib == mib


def test_memory_of_backends_counts_where_it_comes_on_top() -> None:
    backend = "memory-backend-memfd,id=mem,size=512M"
    assert Done("-object", backend, "-machine", "memory-backend=mem").request.memory_mib == 512
    assert Done("-m", "1G", "-object", backend, "-device", "pc-dimm,memdev=mem").request.memory_mib == 1536
    assert Done("-m", "512", "-object", backend, "-numa", "node,memdev=mem").request.memory_mib == 512


@pytest.mark.parametrize("text", ["lots", "-1", "1X", "nan", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    refused("-m", text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("3", 3), ("cpus=2,maxcpus=6", 6), ("sockets=2,cores=3,threads=2", 12), ("2,cores=4", 4), ("maxcpus=5", 5)],
)
def test_processors_are_counted_as_many_as_there_may_be(text: str, count: int) -> None:
    assert Done("-smp", text).request.vcpus == count
    assert Done("-smp", "1", "-smp", text).request.vcpus == count


def test_what_an_append_says_is_no_option() -> None:
    assert Done("-append", "-m", "-smp", "2").request.vcpus == 2


def test_machine_properties_that_name_files_are_copies() -> None:
    done = Done("-machine", "q35,kernel=bzImage,initrd=initrd.gz,firmware=bios.bin,dtb=mod1,append=/x")
    assert done.argv == (
        "-machine type=q35,kernel=/private/kernel,initrd=/private/initrd,firmware=/private/firmware,dtb=/private/dtb"
        ",append=/x"
    )


@pytest.mark.parametrize("value", ["q35,dumpdtb=x", "q35,unknown=/etc/shadow", '{"type":"q35","a":{"b":["/etc"]}}'])
def test_machine_properties_that_name_other_paths_are_refused(value: str) -> None:
    refused("-machine", value)


def test_a_list_of_accelerators_is_left_to_the_host() -> None:
    assert Done("-machine", "accel=kvm:tcg").request.accel == "auto"
    assert Done("-accel", "kvm", "-accel", "tcg").request.accel == "auto"
    assert Done("-enable-kvm").request.accel == "kvm"
    assert Done().request.accel == "tcg"


def test_another_device_of_the_accelerator_is_refused() -> None:
    refused("-accel", "kvm,device=/dev/other")
    assert Done("-accel", "kvm,device=/dev/kvm").argv == "-accel accel=kvm"


@pytest.mark.parametrize(
    "argv",
    [
        ("-version",),
        ("-h",),
        ("-help",),
        ("-M", "help"),
        ("-cpu", "help"),
        ("-device", "help"),
        ("-device", "?"),
        ("-device", "VGA,help"),
        ("-object", "help"),
        ("-object", "secret,help"),
        ("-accel", "help"),
        ("-L", "help"),
        ("-d", "help"),
        ("-trace", "help"),
        ("-vga", "help"),
        ("-boot", "help"),
        ("-smp", "help"),
        ("-action", "help"),
        ("-rtc", "help"),
        ("-msg", "?"),
    ],
)
def test_words_that_only_print_have_no_guest(argv: tuple[str, ...]) -> None:
    done = Done(*argv)
    assert done.request.no_guest
    assert done.draft.dry == done.draft.argv  # it is they that are asked
    assert done.draft.argv[0] == argv[0].replace("-M", "-machine")


def test_a_guest_is_one_where_help_is_a_value_of_something_else() -> None:
    assert not Done("-device", "VGA,id=help", "-name", "help").request.no_guest
    assert not Done("-k", "help", "-append", "help", "-boot", "order=help").request.no_guest


def test_machine_without_anything_waits_for_words_as_any_other() -> None:
    """libvirt asks such a one what it can do, by QMP."""
    assert not Done("-machine", "none").request.no_guest


def test_memory_is_reserved_for_qemu_cannot_ask_whether_it_need_not() -> None:
    done = Done("-object", "memory-backend-ram,id=m,size=64M,reserve=off")
    assert done.argv == "-object qom-type=memory-backend-ram,id=m,size=64M"
    assert "reserve= is left out" in done.notes[0]
    done = Done("-object", '{"qom-type":"memory-backend-memfd","id":"m","size":4096,"reserve":false}')
    assert done.argv == '-object {"qom-type":"memory-backend-memfd","id":"m","size":4096}'
    assert Done("-object", "memory-backend-ram,id=m,size=64M,reserve=on").notes == []


@pytest.mark.parametrize("argv", [("-vga", "qxl"), ("-device", "qxl"), ("-device", "qxl-vga,id=v")])
def test_card_of_a_server_that_there_is_not_is_refused(argv: tuple[str, ...]) -> None:
    assert "virtio" in refused(*argv).fix


def test_state_that_is_told_later_is_waited_for() -> None:
    assert Done("-incoming", "defer").request.waits
    assert not Done("-incoming", "fd:5").request.waits


def test_options_for_disks_by_iscsi_are_left_out() -> None:
    done = Done("-iscsi", "initiator-name=iqn.1993-08.org.debian:01:aabb")
    assert done.argv == ""
    assert "not passed on" in done.notes[0]


def test_relative_path_needs_a_folder() -> None:
    draft = Draft(look, Allowed(), "", {})
    word = Word(name="kernel", value="bzImage", place=1, text="-kernel bzImage")
    with pytest.raises(ConfigError, match="the current folder has been removed"):
        draft.path(word, "bzImage")
    assert draft.path(word, "/vm/bzImage") == "/vm/bzImage"


def test_locked_memory_is_refused() -> None:
    refused("-overcommit", "mem-lock=on")
    refused("-overcommit", "cpu-pm=on,mem-lock=on-fault")
    assert Done("-overcommit", "mem-lock=off,cpu-pm=on").argv == "-overcommit mem-lock=off,cpu-pm=on"


def test_recordings_are_refused() -> None:
    refused("-icount", "shift=auto,rr=record")
    refused("-icount", "rrfile=x,shift=auto")
    assert Done("-icount", "auto").argv == "-icount auto"


# --- Xen


@pytest.mark.parametrize(
    "argv",
    [("-xen-domid", "3"), ("-xen-attach",), ("-xen-domid-restrict",), ("-machine", "xenfv"), ("-accel", "xen")],
)
def test_xen_is_for_libxl_alone(argv: tuple[str, ...]) -> None:
    assert "device_model_override" in refused(*argv).fix
    assert Done(*argv, allowed=Allowed(xen=True)).draft.argv[0] == argv[0]


def test_the_dry_run_of_a_xen_domain_touches_no_domain() -> None:
    argv = ("-xen-domid", "3", "-xen-attach", "-xen-domid-restrict", "-machine", "xenfv,accel=xen,usb=off")
    done = Done(*argv, "-device", "xen-platform", allowed=Allowed(xen=True))
    assert done.argv == (
        "-xen-domid 3 -xen-attach -xen-domid-restrict -machine type=xenfv,accel=xen,usb=off -device driver=xen-platform"
    )
    assert done.dry == "-machine type=pc,accel=tcg,usb=off"
    assert done.request.domid == 3


@pytest.mark.parametrize("domid", ["0", "x", "-1"])
def test_what_is_no_domid_is_refused(domid: str) -> None:
    refused("-xen-domid", domid, allowed=Allowed(xen=True))


# --- saved states, descriptors, the process


def test_a_saved_state_is_opened_by_the_toolstack_and_handed_over_late() -> None:
    for argv in ("file:/vm/state", "exec:cat state", "exec:cat < /vm/state", "exec:/bin/cat /vm/state"):
        done = Done("-incoming", argv)
        assert done.argv == "-incoming defer"
        assert done.request.incoming_role == "incoming"
        assert done.draft.openings == [ReadFile(role="incoming", number=-1, path="/vm/state")]
        assert done.dry == ""
    done = Done("-incoming", "fd:5")
    assert done.argv == "-incoming defer"
    assert done.request.incoming_role == "incoming"
    assert done.draft.openings == [Inherited(role="incoming", number=-1, source=5)]


def test_a_state_that_the_caller_names_later_is_left_to_the_caller() -> None:
    done = Done("-incoming", "defer")
    assert (done.argv, done.request.incoming_role, done.draft.openings) == ("-incoming defer", "", [])
    (note,) = done.draft.notes
    assert note.warning
    assert "locks are not checked" in note.text


@pytest.mark.parametrize(
    "value",
    [
        "exec:zstd -dc state",
        "exec:cat state; id",
        "exec:cat $(id)",
        "exec:cat state other",
        "unix:/run/x",
        "tcp:0:4444",
        "rdma:host:1",
        "fd:x",
        "file:/vm/state,offset=4096",
        "file:/vm/none",
    ],
)
def test_other_sources_of_a_state_are_refused(value: str) -> None:
    refused("-incoming", value)


@pytest.mark.parametrize("words", ["cat $(id)", "cat state*", "cat state other", "cat 'state'", "gzip state"])
def test_what_needs_a_shell_or_another_program_is_never_taken_for_a_file(words: str) -> None:
    assert refused("-incoming", f"exec:{words}").cause == "QEMU may start no program"


def test_the_callers_descriptors_keep_their_sets() -> None:
    done = Done("-add-fd", "fd=5,set=2,opaque=a,,b")
    assert done.argv == "-add-fd fd=10,set=2,opaque=a,,b"
    assert done.draft.openings == [Inherited(role="add-fd-2", number=10, source=5)]


@pytest.mark.parametrize("value", ["fd=5,set=1000", "fd=5", "fd=x,set=1", "set=1", "fd=5,set=-1"])
def test_sets_that_are_depriv_s_own_and_bad_numbers_are_refused(value: str) -> None:
    refused("-add-fd", value)


def test_a_descriptor_is_given_once() -> None:
    refused("-add-fd", "fd=5,set=1", "-add-fd", "fd=5,set=1")


def test_what_the_launcher_does_itself_is_not_passed() -> None:
    done = Done("-S", "-daemonize", "-pidfile", "run/pid", "-no-user-config")
    assert done.argv == ""
    assert (done.request.paused, done.request.daemonize, done.request.pidfile) == (True, True, "/vm/run/pid")
    assert done.notes == []


@pytest.mark.parametrize(
    "argv",
    [
        ("-runas", "nobody"),
        ("-chroot", "/var/empty"),
        ("-sandbox", "off"),
        ("-run-with", "user=nobody,chroot=/var/empty"),
        ("-async-teardown",),
        ("-enable-fips",),
        ("-D", "/var/log/q"),
    ],
)
def test_what_would_loosen_or_repeat_the_confinement_is_said_to_be_left_out(argv: tuple[str, ...]) -> None:
    done = Done(*argv)
    assert done.argv == ""
    assert done.notes


def test_the_name_is_the_domains_too() -> None:
    assert Done("-name", "vm1,debug-threads=on").request.name == "vm1"
    assert Done("-name", "guest=a,,b,process=x").request.name == "a,b"


def test_traces_and_logs_go_to_the_error_output_and_not_into_the_dry_run() -> None:
    done = Done("-trace", "enable=load_file,file=/tmp/x,events=/vm/secret", "-d", "int", "-loadvm", "s1")
    assert done.argv == "-trace enable=load_file,events=/private/trace-events -d int -loadvm s1"
    assert done.dry == ""
    assert done.notes
    assert Done("-trace", "file=/tmp/x").argv == ""


# --- configuration files, and changes of what stands before

CONFIG = """\
# a comment
[machine]
  type = "q35"

[memory]
  size = "1G"
[device "net0"]
  driver = "e1000"
  romfile = "/vm/bios.bin"
[drive]
  file = "a,b"
"""


def test_a_configuration_file_counts_as_what_it_stands_for() -> None:
    words = expand((Word(name="readconfig", value="c", place=3, text="-readconfig c"),), lambda _: CONFIG)
    assert [(word.name, word.value) for word in words] == [
        ("machine", "type=q35"),
        ("m", "size=1G"),
        ("device", "id=net0,driver=e1000,romfile=/vm/bios.bin"),
        ("drive", "file=a,,b"),
    ]
    assert words[2].text == "-readconfig c, line 7: [device]"
    without_drive = CONFIG.partition("[drive]")[0]
    done = Done("-readconfig", "c", files={"/vm/c": without_drive})
    assert done.argv.endswith("-device id=net0,driver=e1000,romfile=/private/net0-romfile")
    assert (done.request.machine, done.request.memory_mib) == ("q35", 1024)


def test_what_a_configuration_file_names_is_refused_with_its_line() -> None:
    caught = refused("-readconfig", "c", files={"/vm/c": '\n[object "m"]\nqom-type = "memory-backend-file"\n'})
    assert "line 2: [object]" in str(caught)


@pytest.mark.parametrize(
    "text",
    [
        "[kernel]\n",
        "[nonsense]\n",
        "[device\n",
        'key = "value"\n',
        "[device]\nkey = value\n",
        "[device x]\n",
        "[device]\nk\n",
    ],
)
def test_what_is_no_configuration_file_is_refused(text: str) -> None:
    assert "line" in str(refused("-readconfig", "c", files={"/vm/c": text}))


def test_a_changed_property_gets_the_treatment_of_a_written_one() -> None:
    done = Done("-device", "e1000,id=n", "-set", "device.n.romfile=/vm/bios.bin")
    assert done.argv == "-device driver=e1000,id=n,romfile=/private/n-romfile"
    done = Done("-device", '{"driver":"e1000","id":"n"}', "-set", "device.n.romfile=/vm/bios.bin")
    assert json.loads(done.draft.argv[1])["romfile"] == "/private/n-romfile"
    assert "-set" in str(refused("-device", "e1000,id=n", "-set", "device.n.x=/etc/shadow"))


@pytest.mark.parametrize("value", ["device.other.x=1", "device.n=1", "nothing", "drive.n.file=x", "device.n.x"])
def test_a_change_of_what_is_not_there_is_refused(value: str) -> None:
    refused("-device", "e1000,id=n", "-set", value)
    refused("-set", "device.n.x=1", "-device", "e1000,id=n")
