# SPDX-License-Identifier: Apache-2.0
"""Options about machine, files, devices, objects and the process: what QEMU gets in place of what names the host."""

from __future__ import annotations

import json

import pytest

from depriv.errors import ConfigError
from depriv.host import FileFacts
from depriv.openings import ConnectUnix, Inherited, ReadFile, WriteFile
from depriv.qemu.draft import Allowed, Draft, Request
from depriv.qemu.expand import expand
from depriv.qemu.options import OPTIONS, PASSED
from depriv.qemu.other_options import HANDLERS, finish
from depriv.qemu.words import Word, parse_words

FILES = {
    path: FileFacts(path=path, kind=kind, dev=1, ino=number, rdev=number if kind == "char" else 0, size=4096)
    for number, (path, kind) in enumerate(
        {
            "/vm/bzImage": "file",
            "/vm/initrd.gz": "file",
            "/vm/a,b": "file",
            "/vm/mod1": "file",
            "/vm/mod2": "file",
            "/vm/bios.bin": "file",
            "/vm/secret": "file",
            "/vm/state": "file",
            "/vm/keymap": "file",
            "/vm/dir": "directory",
            "/vm/link": "symlink",
            "/vm/tls/ca-cert.pem": "file",
            "/vm/tls/server-cert.pem": "file",
            "/vm/tls/server-key.pem": "file",
            "/vm/tls/ca-crl.pem": "file",
            "/vm/tls/keys.psk": "file",
            "/dev/urandom": "char",
            "/dev/hwrng": "char",
            "/dev/bus/usb/001/002": "char",
            "/dev/vhost-vsock": "char",
            "/dev/sda": "block",
        }.items(),
        start=1,
    )
}


def look(path: str) -> FileFacts:
    return FILES.get(path, FileFacts(path=path, kind="missing"))


class Done:
    """The draft after all words, and what it comes to."""

    def __init__(self, *argv: str, allowed: Allowed | None = None, files: dict[str, str] | None = None) -> None:
        words = parse_words(argv, {name: option.takes_value for name, option in OPTIONS.items()})
        self.draft = Draft(look, allowed or Allowed(), "/vm", {})
        for word in expand(words, lambda word: (files or {})[self.draft.path(word, word.value)]):
            if word.name in HANDLERS:
                HANDLERS[word.name](self.draft, word)
            else:
                assert OPTIONS[word.name].how == PASSED, word
                self.draft.emit(f"-{word.name}", *((word.value,) if OPTIONS[word.name].takes_value else ()))
        finish(self.draft)
        self.argv = " ".join(self.draft.argv)
        self.dry = " ".join(self.draft.dry)
        self.notes = [note.text for note in self.draft.notes]
        self.copies = [(item.source, item.target) for item in self.draft.privates]
        facts = self.draft.facts
        self.request = Request(argv=(), dry=(), **facts)


def refused(*argv: str, allowed: Allowed | None = None, files: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Done(*argv, allowed=allowed, files=files)
    assert str(caught.value).startswith("word ")
    assert caught.value.fix
    return caught.value


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


# --- devices


def test_a_plain_device_is_passed() -> None:
    done = Done("-device", "virtio-net-pci,netdev=n,mac=52:54:00:12:34:56,bus=/i440fx,serial=/x")
    assert done.argv == "-device driver=virtio-net-pci,netdev=n,mac=52:54:00:12:34:56,bus=/i440fx,serial=/x"
    assert done.dry == done.argv


def test_a_rom_is_a_copy_a_name_or_none() -> None:
    assert Done("-device", "e1000,id=n,romfile=/vm/bios.bin").argv == (
        "-device driver=e1000,id=n,romfile=/private/n-romfile"
    )
    assert Done("-device", "e1000,romfile=pxe-e1000.rom").argv == "-device driver=e1000,romfile=pxe-e1000.rom"
    assert Done("-device", "e1000,romfile=").argv == "-device driver=e1000,romfile="
    refused("-device", "e1000,romfile=/vm/none")


def test_json_gets_the_same_treatment_and_stays_json() -> None:
    done = Done("-device", '{"driver":"e1000","romfile":"/vm/bios.bin","x":true}')
    assert json.loads(done.draft.argv[1]) == {"driver": "e1000", "romfile": "/private/e1000-romfile", "x": True}
    refused("-device", '{"driver":"e1000","unknown":{"deep":"/etc/shadow"}}')


def test_files_of_devices_that_read_them_are_copies() -> None:
    done = Done(
        "-device", "loader,file=mod1,addr=0x1000", "-device", "ipmi-bmc-sim,id=b,sdrfile=mod2,frudatafile=/vm/a,,b"
    )
    assert done.argv == (
        "-device driver=loader,file=/private/loader-file,addr=0x1000"
        " -device driver=ipmi-bmc-sim,id=b,sdrfile=/private/b-sdrfile,frudatafile=/private/b-frudatafile"
    )
    assert done.copies[-1][0] == "/vm/a,b"


@pytest.mark.parametrize(
    "value",
    [
        "vfio-pci,host=01:00.0",
        "vfio-pci-nohotplug,sysfsdev=/sys/x",
        "virtio-input-host-pci,evdev=/dev/input/event0",
        "usb-mtp,rootdir=/srv",
        "u2f-passthru",
        "u2f-passthru,hidraw=/dev/hidraw0",
        "ccid-card-emulated,db=x",
        "pvrdma,ibdev=x",
        "hv-syndbg,host_ip=10.0.0.1",
        "x-pci-proxy-dev,fd=5",
        "usb-host,hostbus=1,hostaddr=2",
        "usb-host,vendorid=0x1234,productid=1",
        "usb-host,hostdevice=/vm/secret",
        "usb-host,hostdevice=/dev/bus/usb/009/009",
        "virtio-rng-pci,what=/etc/shadow",
        "usb-mouse,pcap=/dev/fdset/x",
    ],
)
def test_a_device_that_reaches_for_the_host_is_refused(value: str) -> None:
    refused("-device", value)


def test_a_usb_device_of_the_host_is_handed_in() -> None:
    done = Done("-device", "usb-host,id=stick,hostdevice=/dev/bus/usb/001/002")
    assert done.argv == "-add-fd fd=10,set=1010 -device driver=usb-host,id=stick,hostdevice=/dev/fdset/1010"
    assert done.dry == ""
    opened = done.draft.files[0]
    assert (opened.path, opened.access, opened.kind, opened.rdev != 0) == ("/dev/bus/usb/001/002", "rw", "char", True)


def test_the_callers_own_set_is_left_alone() -> None:
    done = Done("-add-fd", "fd=7,set=3", "-device", "usb-host,hostdevice=/dev/fdset/3")
    assert done.argv == "-add-fd fd=10,set=3 -device driver=usb-host,hostdevice=/dev/fdset/3"
    assert done.draft.openings == [Inherited(role="add-fd-3", number=10, source=7)]
    assert done.dry == ""


def test_recorded_usb_traffic_is_written_by_descriptor() -> None:
    done = Done("-device", "usb-mouse,pcap=out.pcap")
    assert done.argv == "-add-fd fd=10,set=1010 -device driver=usb-mouse,pcap=/dev/fdset/1010"
    assert done.dry == "-device driver=usb-mouse"
    assert done.draft.openings == [WriteFile(role="usb-mouse-pcap", number=10, path="/vm/out.pcap")]


def test_vhost_is_by_descriptor_and_warned_of() -> None:
    done = Done("-device", "vhost-vsock-pci,guest-cid=3")
    assert done.argv == "-device driver=vhost-vsock-pci,guest-cid=3,vhostfd=10"
    assert done.draft.files[0].path == "/dev/vhost-vsock"
    assert done.draft.notes[0].warning
    assert Done("-device", "vhost-vsock-pci,guest-cid=3,vhostfd=9").draft.files == []
    refused("-device", "vhost-scsi-pci,wwpn=naa.1")


def test_devices_with_another_process_behind_them_are_not_in_the_dry_run() -> None:
    argv = ("vhost-user-fs-pci,chardev=c", "tpm-tis,tpmdev=t", "ivshmem-doorbell,chardev=c", "vhost-user-vga,chardev=c")
    done = Done(*(word for value in argv for word in ("-device", value)))
    assert done.argv.count("-device") == 4
    assert done.dry == "-device virtio-vga"


def test_the_short_form_of_usb_devices_is_passed_but_for_braille() -> None:
    assert Done("-usbdevice", "tablet").argv == "-usbdevice tablet"
    refused("-usbdevice", "braille")


@pytest.mark.parametrize(
    "value",
    [
        "usb-mouse.pcap=x",
        "virtio-net-pci.romfile=/vm/bios.bin",
        "driver=usb-host,property=hostdevice,value=/dev/sda",
        "x.y=/etc/shadow",
        "usb-mtp.rootdir=here",
    ],
)
def test_global_properties_name_nothing_of_the_host(value: str) -> None:
    refused("-global", value)


@pytest.mark.parametrize("value", ["virtio-net-pci.romfile=", "PIIX4_PM.disable_s3=1", "e1000.romfile=pxe-e1000.rom"])
def test_other_global_properties_are_passed(value: str) -> None:
    assert Done("-global", value).draft.argv == ["-global", value]


# --- shared folders


def test_a_shared_folder_is_refused_and_virtiofsd_named() -> None:
    for argv in (
        ("-fsdev", "local,id=f,path=/srv,security_model=none"),
        ("-virtfs", "local,path=/srv,mount_tag=t,security_model=none"),
        ("-fsdev", "handle,id=f,path=/srv"),
    ):
        assert "virtiofsd" in refused(*argv).fix


def test_synth_is_passed_and_proxy_is_by_descriptor() -> None:
    assert Done("-fsdev", "synth,id=f").argv == "-fsdev fsdriver=synth,id=f"
    done = Done("-virtfs", "proxy,mount_tag=t,socket=/run/proxy")
    assert done.argv == "-virtfs fsdriver=proxy,mount_tag=t,sock_fd=10"
    assert done.dry == "-virtfs fsdriver=synth,mount_tag=t"
    assert done.draft.openings == [ConnectUnix(role="t", number=10, path="/run/proxy")]
    assert Done("-fsdev", "proxy,id=f,sock_fd=8").draft.openings == [Inherited(role="f", number=10, source=8)]
    refused("-fsdev", "proxy,id=f")


# --- objects


def test_a_secrets_file_is_a_copy_and_one_on_the_command_line_is_warned_of() -> None:
    done = Done("-object", "secret,id=s,file=/vm/secret,format=base64")
    assert done.argv == "-object qom-type=secret,id=s,file=/private/secret-s,format=base64"
    done = Done("-object", "secret,id=s,data=/x")
    assert done.draft.argv == ["-object", "qom-type=secret,id=s,data=/x"]
    assert done.draft.notes[0].warning
    assert Done("-object", "secret,id=s,data=x,keyid=k,iv=y").notes == []
    assert json.loads(Done("-object", '{"qom-type":"secret","id":"s","file":"secret"}').draft.argv[1])["file"] == (
        "/private/secret-s"
    )


def test_a_folder_of_certificates_is_a_folder_of_copies() -> None:
    done = Done("-object", "tls-creds-x509,id=t,dir=tls/,endpoint=server,verify-peer=no")
    assert done.argv == "-object qom-type=tls-creds-x509,id=t,dir=/private/tls-t,endpoint=server,verify-peer=no"
    names = ["ca-cert.pem", "server-cert.pem", "server-key.pem", "ca-crl.pem"]
    assert done.copies == [(f"/vm/tls/{name}", f"/private/tls-t/{name}") for name in names]


def test_a_client_needs_no_certificate_of_its_own_and_a_psk_only_keys() -> None:
    assert [source for source, _ in Done("-object", "tls-creds-x509,id=t,dir=/vm/tls").copies] == [
        "/vm/tls/ca-cert.pem",
        "/vm/tls/ca-crl.pem",
    ]
    assert [source for source, _ in Done("-object", "tls-creds-psk,id=t,dir=tls,endpoint=server").copies] == [
        "/vm/tls/keys.psk"
    ]
    assert "ca-cert.pem" in str(refused("-object", "tls-creds-x509,id=t,dir=/vm/dir"))


@pytest.mark.parametrize("name", ["../x", "a/b", "", "1a", "ä"])
def test_an_id_that_would_leave_the_private_folder_is_refused(name: str) -> None:
    refused("-object", json.dumps({"qom-type": "secret", "id": name, "file": "/vm/secret"}))
    refused("-object", json.dumps({"qom-type": "tls-creds-x509", "id": name, "dir": "/vm/tls"}))


def test_random_numbers_come_from_a_descriptor() -> None:
    done = Done("-object", "rng-random,id=r,filename=/dev/hwrng", "-object", "rng-random,id=s")
    assert done.argv == (
        "-add-fd fd=10,set=1010 -object qom-type=rng-random,id=r,filename=/dev/fdset/1010"
        " -add-fd fd=11,set=1011 -object qom-type=rng-random,id=s,filename=/dev/fdset/1011"
    )
    assert [opened.path for opened in done.draft.files] == ["/dev/hwrng", "/dev/urandom"]
    assert done.dry == "-object rng-builtin,id=r -object rng-builtin,id=s"
    refused("-object", "rng-random,id=r,filename=/vm/secret")


def test_a_list_of_names_is_a_copy_that_is_never_read_again() -> None:
    done = Done("-object", "authz-list-file,id=a,filename=secret,refresh=on")
    assert done.argv == "-object qom-type=authz-list-file,id=a,filename=/private/authz-a,refresh=off"
    assert done.notes


@pytest.mark.parametrize(
    "value",
    [
        "secret_keyring,id=s,serial=1",
        "authz-pam,id=a,service=x",
        "memory-backend-file,id=m,size=1G,mem-path=/dev/shm/x",
        "memory-backend-shm,id=m,size=1G",
        "filter-dump,id=f,netdev=n,file=x",
        "can-host-socketcan,id=c,if=can0,canbus=b",
        "input-linux,id=i,evdev=/dev/input/event0",
        "input-barrier,id=i,server=x",
        "pr-manager-helper,id=p,path=/run/x",
        "x-remote-object,id=x,fd=5",
        "cryptodev-backend-lkcf,id=c",
        "sev-guest,id=s",
        "dbus-vmstate,id=d,addr=x",
        "qtest,id=q,chardev=c",
        "iommufd,id=i",
        "thread-context,id=t,cpu-affinity=0-3",
        "something-new,id=x,path=/etc/shadow",
        '{"qom-type":"something-new","id":"x","paths":["/etc/shadow"]}',
    ],
)
def test_an_object_that_reaches_for_the_host_is_refused(value: str) -> None:
    refused("-object", value)


@pytest.mark.parametrize(
    "value",
    [
        "iothread,id=i",
        "memory-backend-memfd,id=m,size=1G,share=on",
        "throttle-group,id=t,x-iops-total=5",
        "can-bus,id=c",
    ],
)
def test_other_objects_are_passed(value: str) -> None:
    assert Done("-object", value).draft.argv == ["-object", f"qom-type={value}"]


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
