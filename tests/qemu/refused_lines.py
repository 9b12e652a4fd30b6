# SPDX-License-Identifier: Apache-2.0
"""Command lines as tools and documents write them that are refused; those that run are in command_lines.py.

``$D`` is the folder of the test, which is the caller's current folder, too.
"""

# ruff: noqa: E501 (a word of a command line cannot be wrapped)

from __future__ import annotations

from typing import NamedTuple


class Refused(NamedTuple):
    """One that is refused; tests/golden has the words."""

    name: str
    tool: str
    words: str


REFUSED = (
    Refused(
        "virtme-ng-root",
        "virtme-ng: the host's root by 9p",
        "-m 64 -nic none -nographic -fsdev local,id=virtfs1,path=/,security_model=none,readonly=on,multidevs=remap -device virtio-9p-pci,fsdev=virtfs1,mount_tag=/dev/root",
    ),
    Refused(
        "quickemu-share",
        "quickemu: the public folder",
        "-m 64 -nic none -display none -fsdev local,id=fsdev0,path=$D,security_model=mapped-xattr -device virtio-9p-pci,fsdev=fsdev0,mount_tag=Public-user",
    ),
    Refused(
        "virtfs",
        "Yocto, NixOS: -virtfs",
        "-m 64 -nic none -nographic -virtfs local,path=$D,security_model=none,mount_tag=store",
    ),
    Refused(
        "kata-template",
        "Kata Containers: memory in /dev/shm",
        "-m 64 -nic none -nographic -object memory-backend-file,id=dimm1,size=64M,mem-path=/dev/shm,share=on -numa node,memdev=dimm1",
    ),
    Refused("mem-path", "hugetlbfs wikis", "-m 64 -nic none -nographic -mem-path /dev/hugepages -mem-prealloc"),
    Refused(
        "virt-manager-spice",
        "virt-manager's default display",
        "-m 64 -nic none -spice port=5901,addr=127.0.0.1,disable-ticketing=on,image-compression=off,seamless-migration=on -device qxl-vga",
    ),
    Refused("quickemu-sdl", "quickemu's default display", "-m 64 -nic none -display sdl,gl=on"),
    Refused("display-gtk", "wikis", "-m 64 -nic none -display gtk,show-cursor=on"),
    Refused("display-curses", "retro wikis", "-m 64 -nic none -display curses"),
    Refused(
        "audio-pa",
        "desktop wikis",
        "-m 64 -nic none -display none -audiodev pa,id=snd0 -device intel-hda -device hda-duplex,audiodev=snd0",
    ),
    Refused("soundhw", "older scripts", "-m 64 -nic none -display none -soundhw pcspk"),
    Refused(
        "openqa-fifo",
        "openQA: virtio consoles on FIFOs",
        "-m 64 -nic none -display none -chardev pipe,id=virtio_console,path=virtio_console,logfile=virtio_console.log,logappend=on -device virtio-serial -device virtconsole,chardev=virtio_console",
    ),
    Refused(
        "tf-m-monitor-pipe", "scripts: a monitor on two FIFOs", "-m 64 -nic none -display none -monitor pipe:$D/mon"
    ),
    Refused(
        "syzkaller-snapshot",
        "syzkaller: its default",
        "-m 64 -nic none -nographic -drive file=$D/disk.raw,format=raw -snapshot",
    ),
    Refused(
        "drive-snapshot", "test scripts", "-m 64 -nic none -nographic -drive file=$D/disk.raw,format=raw,snapshot=on"
    ),
    Refused(
        "edk2-fat",
        "EDK II and UEFI tutorials: a folder as a disk",
        "-bios OVMF.fd -m 64 -net none -nographic -drive format=raw,file=fat:rw:hda-contents",
    ),
    Refused("hda-fat", "UEFI tutorials: the short form", "-bios OVMF.fd -m 64 -net none -nographic -hda fat:rw:."),
    Refused("hda", "class Makefiles: a positional image", "-m 64 -nic none -nographic disk.raw"),
    Refused("fda", "boot sector tutorials", "-m 64 -nic none -nographic -fda floppy.img"),
    Refused(
        "no-format",
        "most of the world: a qcow2 image without its format",
        "-m 64 -nic none -nographic -drive file=disk.qcow2,if=virtio",
    ),
    Refused(
        "cloud-init-overlay",
        "cloud-init documentation: an overlay whose base is not named",
        "-m 64 -nic none -nographic -drive file=overlay.qcow2,format=qcow2,if=virtio",
    ),
    Refused(
        "blockdev-overlay",
        "an overlay by -blockdev",
        "-m 64 -nic none -nographic -blockdev qcow2,node-name=q,file.driver=file,file.filename=onraw.qcow2 -device virtio-blk-pci,drive=q",
    ),
    Refused(
        "wrong-format",
        "a raw image called qcow2",
        "-m 64 -nic none -nographic -drive file=disk.raw,format=qcow2,if=virtio",
    ),
    Refused("missing-disk", "anybody", "-m 64 -nic none -nographic -drive file=nothing.qcow2,format=qcow2,if=virtio"),
    Refused(
        "linked-disk",
        "anybody: a disk behind a symbolic link",
        "-m 64 -nic none -nographic -drive file=link.raw,format=raw,if=virtio",
    ),
    Refused(
        "same-disk-twice",
        "anybody: one image as two disks",
        "-m 64 -nic none -nographic -drive file=disk.raw,format=raw,if=virtio -drive file=disk.raw,format=raw,if=virtio",
    ),
    Refused("netboot-xyz", "wikis: a CD by HTTP", "-m 64 -nic none -nographic -cdrom https://example.org/boot.iso"),
    Refused(
        "nova-rbd",
        "OpenStack and Proxmox VE on Ceph",
        "-m 64 -nic none -nographic -drive file=rbd:vms/disk:id=libvirt:auth_supported=cephx,format=raw,if=none,id=d -device virtio-blk-pci,drive=d",
    ),
    Refused(
        "iscsi",
        "libvirt: an iSCSI disk",
        "-m 64 -nic none -nographic -drive file=iscsi://192.0.2.1:3260/iqn.2001-05.com.example/0,format=raw,if=virtio",
    ),
    Refused(
        "ssh-disk",
        "QEMU's documentation",
        "-m 64 -nic none -nographic -drive file=ssh://user@example.org/disk.img,format=raw,if=virtio",
    ),
    Refused(
        "gentoo-tap-script",
        "wikis: a tap that a script sets up",
        "-m 64 -nographic -netdev tap,id=net0,script=/etc/qemu-ifup,downscript=no -device virtio-net-pci,netdev=net0",
    ),
    Refused(
        "tap-default-script",
        "avocado-vt and wikis: a tap without a word about it",
        "-m 64 -nographic -netdev tap,id=net0,vhost=on -device virtio-net-pci,netdev=net0",
    ),
    Refused(
        "pxe-tftp",
        "PXE tutorials",
        "-m 64 -nographic -boot n -netdev user,id=n0,tftp=$D,bootfile=pxelinux.0 -device virtio-net-pci,netdev=n0",
    ),
    Refused("smb", "Windows guest wikis", "-m 64 -nographic -nic user,smb=$D"),
    Refused(
        "guestfwd",
        "test farms: a program behind an address",
        "-m 64 -nographic -nic user,guestfwd=tcp:10.0.2.100:1234-cmd:cat",
    ),
    Refused(
        "mcast",
        "QEMU's documentation: guests on a multicast group",
        "-m 64 -nographic -netdev socket,id=n0,mcast=230.0.0.1:1234 -device e1000,netdev=n0",
    ),
    Refused("vde", "VDE wikis", "-m 64 -nographic -netdev vde,id=n0,sock=/run/vde.ctl -device e1000,netdev=n0"),
    Refused(
        "vhost-user",
        "DPDK and OVS guides",
        "-m 64 -nographic -chardev socket,id=c0,path=$D/peer.sock -netdev vhost-user,id=n0,chardev=c0 -device virtio-net-pci,netdev=n0",
    ),
    Refused("vfio", "passthrough wikis", "-m 64 -nic none -nographic -device vfio-pci,host=01:00.0,multifunction=on"),
    Refused(
        "usb-vendor",
        "passthrough wikis",
        "-m 64 -nic none -nographic -usb -device usb-host,vendorid=0x1234,productid=0x5678",
    ),
    Refused(
        "evdev",
        "passthrough wikis",
        "-m 64 -nic none -nographic -object input-linux,id=kbd1,evdev=/dev/input/by-id/kbd,grab_all=on",
    ),
    Refused(
        "tpm-passthrough",
        "TPM wikis",
        "-m 64 -nic none -nographic -tpmdev passthrough,id=tpm0,path=/dev/tpm0 -device tpm-tis,tpmdev=tpm0",
    ),
    Refused(
        "kgdb-udp", "kernel documentation: a log by UDP", "-m 64 -nic none -nographic -serial udp::4555@127.0.0.1:4556"
    ),
    Refused(
        "debugcon-stdout", "hobby systems", "-m 64 -nic none -display none -debugcon file:/dev/stdout -serial null"
    ),
    Refused(
        "incoming-tcp",
        "libvirt, Ganeti: the target of a migration",
        "-m 64 -nic none -nographic -S -incoming tcp:0.0.0.0:8102",
    ),
    Refused(
        "incoming-exec",
        "snapshots of old: a compressed state",
        "-m 64 -nic none -nographic -incoming 'exec:gzip -dc state.gz'",
    ),
    Refused(
        "plugin",
        "QEMU's documentation, devel/tcg-plugins",
        "-m 64 -nic none -nographic -plugin ./libexeclog.so -d plugin",
    ),
    Refused("preconfig", "QEMU's documentation", "-m 64 -nic none -nographic -preconfig"),
    Refused(
        "filter-dump",
        "wikis: a capture file",
        "-m 64 -netdev hubport,id=n0,hubid=0 -device e1000,netdev=n0 -object filter-dump,id=f1,netdev=n0,file=dump.pcap -nographic",
    ),
    Refused(
        "qemu-tree",
        "developers: the firmware of a build tree",
        "-L ../qemu/pc-bios -bios bios.bin -m 64 -nic none -nographic",
    ),
    Refused(
        "missing-kernel", "anybody", "-kernel arch/x86/boot/bzImage -append console=ttyS0 -m 64 -nic none -nographic"
    ),
    Refused("proxmox-id", "Proxmox VE: an option of its own QEMU", "-id 8006 -name simple -m 64"),
    Refused("equals", "anybody: an option with =", "-m=64 -nic none"),
    Refused("typo", "anybody", "-nographics -m 64"),
    Refused("no-value", "anybody: a list that ends early", "-nic none -nographic -m"),
    Refused(
        "replay",
        "QEMU's documentation, system/replay",
        "-icount shift=auto,rr=record,rrfile=record.bin -m 64 -nic none -nographic",
    ),
    Refused("mem-lock", "real-time guides", "-m 64 -nic none -nographic -overcommit mem-lock=on"),
    Refused("two-vnc", "wikis", "-m 64 -nic none -vnc :90 -vnc :91"),
    Refused("websocket", "noVNC guides", "-m 64 -nic none -vnc :90,websocket=on"),
)
