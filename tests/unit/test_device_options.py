# SPDX-License-Identifier: Apache-2.0
"""Options about devices, shared folders and objects: what QEMU gets in place of what names the host."""

from __future__ import annotations

import json

import pytest
from tests.support.words import Done, refused

from depriv.openings import ConnectUnix, Inherited, WriteFile

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
