# SPDX-License-Identifier: Apache-2.0
"""Command lines as tools and documents write them, and how each of those ends its QEMU.

Each is written for these tests after the habits of what ``tool`` names: its source, its documentation, or the lines
that its tests hold it to. Changed only as far as a test has to: no KVM (``accel=tcg``), little memory, files in the
folder of the test (``$D``, which is the caller's current folder, too). Formats are given where the tool does.
"""

# ruff: noqa: E501 (a word of a command line cannot be wrapped)

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """One command line that runs."""

    name: str
    tool: str
    words: str  # as a shell has them; $D is the folder, $P a free TCP port, $F that of a listening socket, $L of a log
    end: str  # how the tool ends it: "qmp PATH|PORT", "hmp PATH|PORT", "TERM", "INT", "HUP", "pidfile PATH", "stdin TEXT", "exit N"
    needs: str = ""  # "passt"


LINES = (
    Line(
        "libvirt-i440fx",
        "libvirt, tests/qemuxmlconfdata: minimal",
        """-name guest=QEMUGuest1,debug-threads=on -S
        -object '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"$D/key.aes"}'
        -machine pc,usb=off,dump-guest-core=off,memory-backend=pc.ram,acpi=off -accel tcg -cpu qemu64
        -m size=65536k -object '{"qom-type":"memory-backend-ram","id":"pc.ram","size":67108864}'
        -overcommit mem-lock=off -smp 1,sockets=1,cores=1,threads=1 -uuid c7a5fdbd-edaf-9455-926a-d65c16db1809
        -display none -no-user-config -nodefaults
        -chardev socket,id=charmonitor,path=$D/monitor.sock,server=on,wait=off
        -mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc -no-shutdown -boot strict=on
        -device '{"driver":"piix3-usb-uhci","id":"usb","bus":"pci.0","addr":"0x1.0x2"}'
        -blockdev '{"driver":"file","filename":"$D/disk.raw","node-name":"libvirt-1-storage","read-only":false}'
        -device '{"driver":"ide-hd","bus":"ide.0","unit":0,"drive":"libvirt-1-storage","id":"ide0-0-0","bootindex":1}'
        -audiodev '{"id":"audio1","driver":"none"}'
        -device '{"driver":"virtio-balloon-pci","id":"balloon0","bus":"pci.0","addr":"0x3"}'
        -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -msg timestamp=on""",
        "qmp monitor.sock",
    ),
    Line(
        "libvirt-q35-qcow2-chain",
        "libvirt, as virt-manager has it make a desktop guest",
        """-name guest=debian12,debug-threads=on -S
        -object '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"$D/key.aes"}'
        -machine pc-q35-7.2,usb=off,vmport=off,dump-guest-core=off,hpet=off,acpi=on -accel tcg -cpu qemu64 -m size=131072k
        -overcommit mem-lock=off -smp 2,sockets=2,cores=1,threads=1 -uuid b5e27526-692f-4c81-93b4-b854f21a2d1d
        -no-user-config -nodefaults -chardev socket,id=charmonitor,path=$D/monitor.sock,server=on,wait=off
        -mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc,driftfix=slew
        -global kvm-pit.lost_tick_policy=delay -no-shutdown -global ICH9-LPC.disable_s3=1
        -global ICH9-LPC.disable_s4=1 -boot strict=on
        -device '{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}'
        -device '{"driver":"pcie-root-port","port":17,"chassis":2,"id":"pci.2","bus":"pcie.0","addr":"0x2.0x1"}'
        -device '{"driver":"pcie-root-port","port":18,"chassis":3,"id":"pci.3","bus":"pcie.0","addr":"0x2.0x2"}'
        -device '{"driver":"qemu-xhci","p2":15,"p3":15,"id":"usb","bus":"pci.1","addr":"0x0"}'
        -device '{"driver":"virtio-serial-pci","id":"virtio-serial0","bus":"pci.2","addr":"0x0"}'
        -blockdev '{"driver":"file","filename":"$D/base.qcow2","node-name":"libvirt-3-storage","auto-read-only":true,"discard":"unmap"}'
        -blockdev '{"node-name":"libvirt-3-format","read-only":true,"discard":"unmap","driver":"qcow2","file":"libvirt-3-storage","backing":null}'
        -blockdev '{"driver":"file","filename":"$D/overlay.qcow2","node-name":"libvirt-2-storage","auto-read-only":true,"discard":"unmap"}'
        -blockdev '{"node-name":"libvirt-2-format","read-only":false,"discard":"unmap","driver":"qcow2","file":"libvirt-2-storage","backing":"libvirt-3-format"}'
        -device '{"driver":"virtio-blk-pci","bus":"pci.3","addr":"0x0","drive":"libvirt-2-format","id":"virtio-disk0","bootindex":1}'
        -blockdev '{"driver":"file","filename":"$D/cd.iso","node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap"}'
        -blockdev '{"node-name":"libvirt-1-format","read-only":true,"driver":"raw","file":"libvirt-1-storage"}'
        -device '{"driver":"ide-cd","bus":"ide.0","drive":"libvirt-1-format","id":"sata0-0-0"}'
        -chardev pty,id=charserial0 -device '{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}'
        -chardev socket,id=charchannel0,path=$D/agent.sock,server=on,wait=off
        -device '{"driver":"virtserialport","bus":"virtio-serial0.0","nr":1,"chardev":"charchannel0","id":"channel0","name":"org.qemu.guest_agent.0"}'
        -device '{"driver":"usb-tablet","id":"input0","bus":"usb.0","port":"1"}' -audiodev '{"id":"audio1","driver":"none"}'
        -vnc 127.0.0.1:$V,audiodev=audio1 -device '{"driver":"virtio-vga","id":"video0","max_outputs":1,"bus":"pcie.0","addr":"0x1"}'
        -global ICH9-LPC.noreboot=off -watchdog-action reset
        -object '{"qom-type":"rng-random","id":"objrng0","filename":"/dev/urandom"}'
        -device '{"driver":"virtio-rng-pci","rng":"objrng0","id":"rng0","bus":"pcie.0","addr":"0x3"}'
        -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -msg timestamp=on""",
        "qmp monitor.sock",
    ),
    Line(
        "libvirt-inherited-monitor",
        "libvirt from 4.1 on: the monitor's socket is made by it and inherited",
        """-name guest=fdmon -S -machine q35 -accel tcg -m 64 -display none -no-user-config -nodefaults
        -chardev socket,id=charmonitor,fd=$F,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control
        -no-shutdown -boot menu=on,strict=on -device virtio-scsi-pci,id=scsi0
        -blockdev driver=file,filename=$D/disk.qcow2,node-name=f0,cache.direct=on,cache.no-flush=off,aio=native
        -blockdev driver=qcow2,node-name=d0,file=f0,cache.direct=on,discard=unmap
        -device scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=0,drive=d0,id=scsi0-0-0-0,write-cache=on,rotation_rate=1
        -device pvpanic,ioport=1285""",
        "qmp fd",
    ),
    Line(
        "libvirt-uefi",
        "libvirt with <os firmware='efi'>",
        """-name guest=efi -machine pc-q35-7.2,pflash0=libvirt-pflash0-format,pflash1=libvirt-pflash1-format -accel tcg -m 128
        -display none -no-user-config -nodefaults
        -blockdev '{"driver":"file","filename":"$D/OVMF_CODE.fd","node-name":"libvirt-pflash0-storage","auto-read-only":true,"discard":"unmap"}'
        -blockdev '{"node-name":"libvirt-pflash0-format","read-only":true,"driver":"raw","file":"libvirt-pflash0-storage"}'
        -blockdev '{"driver":"file","filename":"$D/OVMF_VARS.fd","node-name":"libvirt-pflash1-storage","auto-read-only":true,"discard":"unmap"}'
        -blockdev '{"node-name":"libvirt-pflash1-format","read-only":false,"driver":"raw","file":"libvirt-pflash1-storage"}'
        -chardev socket,id=charmonitor,path=$D/monitor.sock,server=on,wait=off -mon chardev=charmonitor,mode=control
        -chardev file,id=charserial0,path=$D/serial.log,append=on -device isa-serial,chardev=charserial0""",
        "qmp monitor.sock",
    ),
    Line(
        "libvirt-virtiofs-memory",
        "libvirt with <memoryBacking><source type='memfd'/><access mode='shared'/>",
        """-name guest=shared -machine pc-q35-7.2 -accel tcg -m size=65536k,slots=16,maxmem=1048576k
        -smp 2,maxcpus=4,sockets=4,dies=1,cores=1,threads=1
        -object '{"qom-type":"iothread","id":"iothread1"}'
        -object '{"qom-type":"memory-backend-memfd","id":"ram-node0","share":true,"size":67108864}'
        -numa node,nodeid=0,cpus=0-3,memdev=ram-node0 -display none -no-user-config -nodefaults
        -chardev socket,id=charmonitor,path=$D/monitor.sock,server=on,wait=off -mon chardev=charmonitor,mode=control
        -blockdev '{"driver":"file","filename":"$D/disk.raw","node-name":"s1","cache":{"direct":true,"no-flush":false}}'
        -device '{"driver":"virtio-blk-pci","iothread":"iothread1","drive":"s1","id":"virtio-disk0","num-queues":2,"write-cache":"on"}'""",
        "qmp monitor.sock",
    ),
    Line(
        "ganeti",
        "Ganeti, lib/hypervisor/hv_kvm: _GenerateKVMRuntime",
        """-name instance1.example.com -m 64 -smp 1 -pidfile $D/pid -device virtio-balloon -daemonize -D $D/kvm.log
        -machine pc-i440fx-7.2 -rtc base=utc -usb -usbdevice tablet -boot c -vnc none -monitor unix:$D/monitor,server,nowait
        -serial unix:$D/serial,server,nowait -qmp unix:$D/qmp,server,nowait -qmp unix:$D/kvmd,server,nowait -S -nodefaults
        -device virtio-blk-pci,drive=hotdisk-0,id=hotdisk-0,bus=pci.0,addr=0xd
        -drive file=$D/disk.raw,format=raw,if=none,cache=none,auto-read-only=off,id=hotdisk-0""",
        "qmp qmp",
    ),
    Line(
        "ganeti-kernel",
        "Ganeti, hv_kvm with kernel_path",
        """-name instance2 -m 64 -smp 1 -pidfile $D/pid -device virtio-balloon-pci -daemonize -monitor unix:$D/monitor,server,nowait
        -kernel $D/bzImage -initrd $D/initrd.img -append 'root=/dev/vda1 ro console=ttyS0,38400' -vnc none -nic none
        -serial unix:$D/serial,server,nowait -drive file=$D/disk.raw,format=raw,if=virtio -uuid 2f8d0c57-15ca-4d25-a41d-1a8e4e2ae2a5
        -runas nobody -chroot $D""",
        "hmp monitor",
    ),
    Line(
        "labgrid",
        "labgrid, labgrid/driver/qemudriver.py",
        """-machine pc -cpu qemu64 -m 64 -S -qmp stdio -nic none -nodefaults -display none
        -drive if=virtio,format=raw,file=$D/disk.raw,id=disk0
        -chardev socket,id=serialsocket,path=$D/serialrw,server=on,wait=off -serial chardev:serialsocket""",
        "stdin qmp",
    ),
    Line(
        "labgrid-kernel",
        "labgrid, with a kernel and a root file system",
        """-machine q35 -m 64 -S -qmp stdio -nographic -serial none -parallel none -monitor none -nic none
        -kernel $D/bzImage -append 'root=/dev/vda console=ttyS0,115200' -drive if=none,file=$D/disk.qcow2,format=qcow2,id=hd0
        -device virtio-blk-pci,drive=hd0""",
        "stdin qmp",
    ),
    Line(
        "nomad",
        "Nomad, drivers/qemu/driver.go",
        """-machine type=pc,accel=tcg -name linux.raw -m 64M -drive file=$D/disk.raw,format=raw -nographic -nodefaults
        -monitor unix:$D/qemu-monitor.sock,server,nowait""",
        "hmp qemu-monitor.sock",
    ),
    Line(
        "nomad-agent",
        "Nomad, with guest_agent",
        """-machine type=pc,accel=tcg -name vm -m 64M -drive file=$D/disk.qcow2,format=qcow2 -nographic -nic none
        -chardev socket,path=$D/qa.sock,server=on,wait=off,id=qga0 -device virtio-serial
        -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0""",
        "INT",
    ),
    Line(
        "proxmox-simple",
        "Proxmox VE, qemu-server: test/cfg2cmd/simple1",
        """-name 'simple,debug-threads=on' -no-shutdown
        -chardev 'socket,id=qmp,path=$D/8006.qmp,server=on,wait=off' -mon 'chardev=qmp,mode=control'
        -chardev 'socket,id=qmp-event,path=$D/peer.sock,reconnect=5' -mon 'chardev=qmp-event,mode=control'
        -pidfile $D/8006.pid -daemonize -smbios 'type=1,uuid=7b10d7af-b932-4c66-b2c3-3996152ec465'
        -smp '3,sockets=1,cores=3,maxcpus=3' -nodefaults
        -boot 'menu=on,strict=on,reboot-timeout=1000,splash=$D/bootsplash.jpg'
        -vnc 'unix:$D/8006.vnc,password=on' -cpu qemu64,+lahf_lm,+sep -m 64
        -device 'pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e'
        -device 'pci-bridge,id=pci.2,chassis_nr=2,bus=pci.0,addr=0x1f' -device 'piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2'
        -device 'usb-tablet,id=tablet,bus=uhci.0,port=1' -device 'VGA,id=vga,bus=pci.0,addr=0x2'
        -device 'virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3,free-page-reporting=on'
        -iscsi 'initiator-name=iqn.1993-08.org.debian:01:aabbccddeeff'
        -drive 'if=none,id=drive-ide2,media=cdrom,aio=io_uring' -device 'ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2,bootindex=200'
        -device 'virtio-scsi-pci,id=scsihw0,bus=pci.0,addr=0x5'
        -drive 'file=$D/disk.qcow2,if=none,id=drive-scsi0,discard=on,format=qcow2,cache=none,aio=io_uring,detect-zeroes=unmap'
        -device 'scsi-hd,bus=scsihw0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0'
        -machine 'type=pc'""",
        "qmp 8006.qmp",
    ),
    Line(
        "proxmox-q35-efi-serial",
        "Proxmox VE, qemu-server: test/cfg2cmd/efi, q35",
        """-name 'efi,debug-threads=on' -no-shutdown -chardev 'socket,id=qmp,path=$D/100.qmp,server=on,wait=off'
        -mon 'chardev=qmp,mode=control' -pidfile $D/100.pid -daemonize
        -drive 'if=pflash,unit=0,format=raw,readonly=on,file=$D/OVMF_CODE.fd'
        -drive 'if=pflash,unit=1,id=drive-efidisk0,format=raw,file=$D/OVMF_VARS.fd,size=$S'
        -smp '1,sockets=1,cores=1,maxcpus=1' -nodefaults -vga none -nographic -cpu qemu64 -m 128
        -readconfig $D/pve-q35.cfg -chardev 'socket,id=serial0,path=$D/100.serial0,server=on,wait=off'
        -device 'isa-serial,chardev=serial0' -device 'vmgenid,guid=54d1c06c-8f5b-440f-b5b2-6eab1380e13d'
        -rtc 'driftfix=slew,base=localtime' -global 'kvm-pit.lost_tick_policy=discard' -machine 'type=q35'""",
        "qmp 100.qmp",
    ),
    Line(
        "packer",
        "Packer, builder/qemu/step_run.go",
        """-name packer-debian -machine type=pc,accel=tcg -m 64M -smp 1 -boot once=d -vnc 127.0.0.1:$V
        -drive file=$D/disk.qcow2,if=virtio,cache=writeback,discard=ignore,format=qcow2
        -drive file=$D/cd.iso,media=cdrom -nic none -qmp unix:$D/packer.monitor,server,nowait""",
        "TERM",
    ),
    Line(
        "packer-scsi-efi",
        "Packer, with disk_interface virtio-scsi, efi_boot and a TPM left out",
        """-name packer -machine type=q35,accel=tcg -m 128M -smp 1,sockets=1 -boot c -vnc 0.0.0.0:$V
        -device virtio-scsi-pci,id=scsi0 -device scsi-hd,bus=scsi0.0,drive=drive0
        -drive if=none,file=$D/disk.qcow2,id=drive0,cache=writeback,discard=unmap,format=qcow2,detect-zeroes=unmap
        -drive file=$D/OVMF_CODE.fd,if=pflash,unit=0,format=raw,readonly=on
        -drive file=$D/OVMF_VARS.fd,if=pflash,unit=1,format=raw -nic none""",
        "INT",
    ),
    Line(
        "lima",
        "Lima, pkg/driver/qemu/qemu.go: Cmdline",
        """-m 128 -cpu qemu64 -machine q35,vmport=off -accel tcg,thread=multi,tb-size=64 -smp 2,sockets=1,cores=2,threads=1
        -drive if=pflash,format=raw,readonly=on,file=$D/OVMF_CODE.fd -boot order=d,splash-time=0,menu=on
        -drive file=$D/cd.iso,format=raw,media=cdrom,readonly=on
        -drive file=$D/overlay.qcow2,if=virtio,discard=on,format=qcow2,backing.driver=qcow2,backing.file.driver=file,backing.file.filename=$D/base.qcow2
        -cdrom $D/seed.iso -device virtio-rng-pci -display none -device virtio-vga -device virtio-keyboard-pci
        -device virtio-mouse-pci -device qemu-xhci,id=usb-bus -parallel none
        -chardev socket,id=char-serial,path=$D/serial.sock,server=on,wait=off,logfile=$D/serial.log -serial chardev:char-serial
        -chardev socket,id=char-serial-virtio,path=$D/serialv.sock,server=on,wait=off,logfile=$D/serialv.log
        -device virtio-serial-pci,id=virtio-serial0,max_ports=1
        -device virtconsole,chardev=char-serial-virtio,id=console0 -chardev socket,id=char-qmp,path=$D/qmp.sock,server=on,wait=off
        -qmp chardev:char-qmp -name lima-default -pidfile $D/qemu.pid -nic none""",
        "qmp qmp.sock",
    ),
    Line(
        "quickemu",
        "quickemu: vm_boot",
        """-name ubuntu,process=ubuntu -machine q35,smm=off,vmport=off,accel=tcg -global kvm-pit.lost_tick_policy=discard
        -cpu qemu64 -smp cores=1,threads=1,sockets=1 -m 128M -device virtio-balloon -rtc base=utc,clock=host
        -vga none -device virtio-vga,xres=1152,yres=648 -display none -audiodev none,id=audio0 -device intel-hda
        -device hda-micro,audiodev=audio0 -device virtio-rng-pci,rng=rng0 -object rng-random,id=rng0,filename=/dev/urandom
        -device qemu-xhci,id=spicepass -device usb-ehci,id=input -device usb-kbd,bus=input.0 -k en-us -device usb-tablet,bus=input.0
         -drive if=pflash,format=raw,unit=0,file=$D/OVMF_CODE.fd,readonly=on
        -drive if=pflash,format=raw,unit=1,file=$D/OVMF_VARS.fd -drive media=cdrom,index=0,file=$D/cd.iso
        -device virtio-blk-pci,drive=SystemDisk -drive id=SystemDisk,if=none,format=qcow2,file=$D/disk.qcow2 -nic none
        -monitor unix:$D/ubuntu-monitor.socket,server,nowait -serial unix:$D/ubuntu-serial.socket,server,nowait
        -pidfile $D/ubuntu.pid""",
        "pidfile ubuntu.pid",
    ),
    Line(
        "nixos-test",
        "NixOS, nixos/lib/test-driver and qemu-vm.nix",
        """-name machine -m 64 -smp 1 -device virtio-rng-pci -nic none
        -drive cache=writeback,file=$D/disk.qcow2,format=qcow2,id=drive1,if=none,index=1,werror=report
        -device virtio-blk-pci,bootindex=1,drive=drive1,serial=root -device virtio-keyboard -usb -device usb-tablet,bus=usb-bus.0
        -kernel $D/bzImage -initrd $D/initrd.img -append 'loglevel=4 init=/nix/store/x/init console=ttyS0'
        -machine accel=kvm:tcg -cpu max -qmp unix:$D/qmp,server=on,wait=off -monitor unix:$D/peer.sock
        -chardev socket,id=shell,path=$D/peer.sock -device virtio-serial -device virtconsole,chardev=shell
        -serial stdio -no-reboot -nographic""",
        "qmp qmp",
    ),
    Line(
        "syzkaller",
        "syzkaller, vm/qemu/qemu.go",
        """-m 64 -smp 2 -chardev socket,id=SOCKSYZ,server=on,wait=off,host=localhost,port=$P -mon chardev=SOCKSYZ,mode=control
        -display none -serial stdio -no-reboot -name VM-0 -device virtio-rng-pci -cpu qemu64 -nic none
        -device virtio-blk-pci,drive=image -drive file=$D/disk.raw,if=none,format=raw,id=image,media=disk,index=0
        -kernel $D/bzImage -append 'root=/dev/sda console=ttyS0'""",
        "qmp $P",
    ),
    Line(
        "virtme-ng",
        "virtme-ng, virtme/commands/run.py, its root given as a disk",
        """-name virtme -m 64M -machine microvm,accel=kvm:tcg,pcie=on -cpu max -parallel none -net none -smp 2 -echr 1
        -chardev stdio,id=console,signal=off,mux=on -serial chardev:console -mon chardev=console -vga none -display none
        -kernel $D/bzImage -append 'virtme_hostname=v console=ttyS0 panic=-1' -initrd $D/initrd.img -no-reboot""",
        "stdin \x01x",
    ),
    Line(
        "mkosi",
        "mkosi, mkosi/qemu.py: run_qemu",
        """-machine type=q35,smm=off,hpet=off -smp 2 -m 128M -object rng-random,filename=/dev/urandom,id=rng0
        -device virtio-rng-pci,rng=rng0,id=rng-device0 -device virtio-balloon,free-page-reporting=on -no-user-config -nic none
        -cpu max -accel tcg -nographic -nodefaults -chardev stdio,mux=on,id=console,signal=off
        -device virtio-serial-pci,id=mkosi-virtio-serial-pci -device virtconsole,chardev=console -mon console
        -drive if=pflash,format=raw,readonly=on,file=$D/OVMF_CODE.fd -drive file=$D/OVMF_VARS.fd,if=pflash,format=raw
        -blockdev driver=raw,node-name=mkosi,discard=unmap,file.driver=file,file.filename=$D/disk.raw,file.aio=threads,cache.direct=off,cache.no-flush=on
        -device virtio-blk-pci,drive=mkosi,bootindex=1 -smbios type=11,value=io.systemd.credential.binary:x=YQ==
        -fw_cfg name=opt/io.systemd.credentials/vmm.notify,string=vsock""",
        "stdin \x01x",
    ),
    Line(
        "systemd-vmspawn",
        "systemd-vmspawn, src/vmspawn/vmspawn.c: its -readconfig comes later, this is v256",
        """-machine type=q35,smm=off,accel=tcg -smp 1 -m 128M -object rng-random,filename=/dev/urandom,id=rng0
        -device virtio-rng-pci,rng=rng0,id=rng-device0 -nic none -cpu max -uuid 2f8d0c57-15ca-4d25-a41d-1a8e4e2ae2a6
        -nographic -nodefaults -chardev stdio,mux=on,id=console,signal=off -device virtio-serial-pci,id=vmspawn-virtio-serial-pci
        -device virtconsole,chardev=console -mon console -drive if=pflash,format=raw,readonly=on,file=$D/OVMF_CODE.fd
        -device virtio-scsi-pci,id=scsi -drive if=none,id=vmspawn,file=$D/disk.raw,format=raw,discard=on
        -device scsi-hd,drive=vmspawn,bootindex=1 -smbios type=11,path=$D/smbios.txt -append console=hvc0 -kernel $D/bzImage""",
        "TERM",
    ),
    Line(
        "kdump-ci",
        "kdump-utils, tests: a crash kernel's guest with its disks",
        """-nodefaults -nographic -smp 2 -m 64 -monitor none -serial stdio -drive file=$D/disk.qcow2,format=qcow2,id=boot,if=virtio
        -drive file=$D/data.raw,format=raw,if=virtio -nic none -device i6300esb -action watchdog=reset""",
        "TERM",
    ),
    Line(
        "crash-dump",
        "crash and drgn test set-ups: vmcoreinfo, a debugger's port",
        """-machine q35,dump-guest-core=on -m 64 -nodefaults -display none -device vmcoreinfo -gdb tcp:127.0.0.1:$P
        -qmp unix:$D/qmp.sock,server=on,wait=off -device isa-debugcon,iobase=0x402,chardev=dbg -chardev file,id=dbg,path=$D/dbg.log
        -drive file=$D/disk.raw,format=raw,if=virtio,snapshot=off""",
        "qmp qmp.sock",
    ),
    Line(
        "buildroot",
        "Buildroot, board/qemu/x86_64/readme.txt",
        """-M pc -kernel $D/bzImage -drive file=$D/disk.raw,if=virtio,format=raw -append 'rootwait root=/dev/vda console=tty1 console=ttyS0'
        -net none -nographic -m 64""",
        "stdin \x01x",
    ),
    Line(
        "yocto-runqemu",
        "Yocto, scripts/runqemu with nographic and slirp left out",
        """-nic none -object rng-random,filename=/dev/urandom,id=rng0 -device virtio-rng-pci,rng=rng0
        -drive file=$D/disk.raw,if=virtio,format=raw -usb -device usb-tablet -usb -device usb-kbd -cpu IvyBridge,check=off -machine q35,i8042=off
        -smp 2 -m 64 -serial mon:stdio -serial null -nographic -kernel $D/bzImage
        -append 'root=/dev/vda rw ip=dhcp console=ttyS0 oprofile.timer=1 tsc=reliable no_timer_check rcupdate.rcu_expedited=1'""",
        "stdin \x01x",
    ),
    Line(
        "openstack-like",
        "Nova on libvirt: config drive, serial console to a log and a socket",
        """-name guest=instance-0000001a,debug-threads=on -S -machine pc-i440fx-7.2,usb=off,dump-guest-core=off -accel tcg
        -cpu qemu64,+x2apic -m 64 -overcommit mem-lock=off -smp 1,sockets=1,dies=1,cores=1,threads=1
        -smbios 'type=1,manufacturer=OpenStack Foundation,product=OpenStack Nova,version=25.0.0,serial=b5e27526,uuid=b5e27526-692f-4c81-93b4-b854f21a2d1d,family=Virtual Machine'
        -no-user-config -nodefaults -chardev socket,id=charmonitor,path=$D/monitor.sock,server=on,wait=off
        -mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc,driftfix=slew -no-hpet -no-shutdown -boot strict=on
        -blockdev '{"driver":"file","filename":"$D/base.raw","node-name":"libvirt-3-storage","cache":{"direct":true,"no-flush":false},"auto-read-only":true,"discard":"unmap"}'
        -blockdev '{"node-name":"libvirt-3-format","read-only":true,"discard":"unmap","cache":{"direct":true,"no-flush":false},"driver":"raw","file":"libvirt-3-storage"}'
        -blockdev '{"driver":"file","filename":"$D/onraw.qcow2","node-name":"libvirt-2-storage","cache":{"direct":true,"no-flush":false},"auto-read-only":true,"discard":"unmap"}'
        -blockdev '{"node-name":"libvirt-2-format","read-only":false,"cache":{"direct":true,"no-flush":false},"driver":"qcow2","file":"libvirt-2-storage","backing":"libvirt-3-format"}'
        -device virtio-blk-pci,bus=pci.0,addr=0x4,drive=libvirt-2-format,id=virtio-disk0,bootindex=1,write-cache=on
        -blockdev '{"driver":"file","filename":"$D/seed.iso","node-name":"libvirt-1-storage","auto-read-only":true}'
        -blockdev '{"node-name":"libvirt-1-format","read-only":true,"driver":"raw","file":"libvirt-1-storage"}'
        -device ide-cd,bus=ide.0,unit=0,drive=libvirt-1-format,id=ide0-0-0
        -add-fd set=3,fd=$L -chardev pty,id=charserial0,logfile=/dev/fdset/3,logappend=on -device isa-serial,chardev=charserial0,id=serial0
        -device virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x5 -msg timestamp=on""",
        "qmp monitor.sock",
    ),
    Line(
        "kata",
        "Kata Containers, src/runtime/virtcontainers/qemu.go, without shared memory in files",
        """-name sandbox-41cb,debug-threads=on -uuid e62392aa-df4d-4482-b269-622a8d89fc51 -machine q35,accel=tcg -cpu qemu64
        -qmp unix:$D/qmp.sock,server=on,wait=off -m 64M,slots=10,maxmem=1024M
        -device pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2,io-reserve=4k,mem-reserve=1m,pref64-reserve=1m
        -device virtio-serial-pci,disable-modern=false,id=serial0 -device virtconsole,chardev=charconsole0,id=console0
        -chardev socket,id=charconsole0,path=$D/console.sock,server=on,wait=off -device virtio-scsi-pci,id=scsi0,disable-modern=false
        -object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0
        -device virtio-blk-pci,disable-modern=false,drive=image-f15d,config-wce=off,share-rw=on,serial=image-f15d
        -drive id=image-f15d,file=$D/disk.raw,aio=threads,format=raw,if=none,readonly=on -rtc base=utc,driftfix=slew,clock=host
        -global kvm-pit.lost_tick_policy=discard -vga none -no-user-config -nodefaults -nographic --no-reboot
        -object memory-backend-memfd,id=dimm1,size=64M,share=on -numa node,memdev=dimm1 -kernel $D/bzImage
        -append 'tsc=reliable root=/dev/vda1 ro console=hvc0 systemd.unit=kata-containers.target'
        -pidfile $D/pid -D $D/qemu.log -smp 1,cores=1,threads=1,sockets=4,maxcpus=4 -daemonize""",
        "qmp qmp.sock",
    ),
    Line(
        "avocado-vt",
        "avocado-vt: how it writes RHEL's guests",
        """-S -name 'avocado-vt-vm1' -sandbox on -machine q35 -nodefaults -device VGA,bus=pcie.0,addr=0x1
        -device pvpanic,ioport=0x505,id=idZcGD6F -m 64 -smp 2,maxcpus=2,cores=1,threads=1,dies=1,sockets=2 -cpu qemu64
        -chardev socket,wait=off,id=qmp_id_qmpmonitor1,path=$D/monitor-qmpmonitor1,server=on
        -mon chardev=qmp_id_qmpmonitor1,mode=control
        -chardev socket,wait=off,id=qmp_id_catch_monitor,path=$D/monitor-catch_monitor,server=on
        -mon chardev=qmp_id_catch_monitor,mode=control -chardev socket,wait=off,id=chardev_serial0,path=$D/serial-serial0,server=on
        -device isa-serial,id=serial0,chardev=chardev_serial0
        -chardev socket,id=seabioslog_id,path=$D/seabios,server=on,wait=off -device isa-debugcon,chardev=seabioslog_id,iobase=0x402
        -device pcie-root-port,id=pcie-root-port-1,port=0x1,bus=pcie.0,addr=0x2,chassis=2 -device qemu-xhci,id=usb1,bus=pcie-root-port-1,addr=0x0
        -device usb-tablet,id=usb-tablet1,bus=usb1.0,port=1 -object iothread,id=iothread0
        -device pcie-root-port,id=pcie-root-port-2,port=0x2,bus=pcie.0,addr=0x3,chassis=3
        -blockdev node-name=file_image1,driver=file,auto-read-only=on,discard=unmap,aio=threads,filename=$D/disk.qcow2,cache.direct=on,cache.no-flush=off
        -blockdev node-name=drive_image1,driver=qcow2,read-only=off,cache.direct=on,cache.no-flush=off,file=file_image1
        -device virtio-blk-pci,id=image1,drive=drive_image1,bootindex=0,write-cache=on,iothread=iothread0,bus=pcie-root-port-2,addr=0x0
        -drive id=drive_cd1,if=none,snapshot=off,aio=threads,cache=none,media=cdrom,file=$D/cd.iso
        -device ide-cd,id=cd1,drive=drive_cd1,bootindex=2,bus=ide.0,unit=0
        -vnc :$V -rtc base=utc,clock=host,driftfix=slew -boot menu=off,order=cdn,once=c,strict=off""",
        "qmp monitor-qmpmonitor1",
    ),
    Line(
        "cloud-init",
        "cloud-init documentation, tutorial/qemu: seed by SMBIOS",
        """-net none -machine accel=kvm:tcg -m 64 -nographic -drive if=virtio,format=qcow2,file=$D/disk.qcow2
        -smbios type=1,serial=ds='nocloud;s=http://10.0.2.2:8000/'""",
        "stdin \x01x",
    ),
    Line(
        "cloud-init-iso",
        "cloud-init documentation, NoCloud: a seed as a second disk",
        """-m 64 -nic none -drive file=overlay.qcow2,format=qcow2,if=virtio,backing.driver=qcow2,backing.file.filename=base.qcow2
        -drive file=seed.iso,if=virtio,format=raw -nographic""",
        "TERM",
    ),
    Line(
        "gentoo-wiki",
        "Gentoo wiki, QEMU/Options: a script's array",
        """-name Gentoo -machine type=q35,accel=tcg -cpu max -smp 2,cores=2,threads=1,sockets=1 -m 64M
        -drive file=$D/disk.raw,if=virtio,format=raw,aio=threads,cache.direct=on -boot order=dc,menu=on -cdrom $D/cd.iso
        -vga std -display vnc=unix:$D/vnc.sock -nic none -monitor tcp:127.0.0.1:$P,server,nowait""",
        "hmp $P",
    ),
    Line(
        "arch-wiki",
        "Arch wiki, QEMU: Running a virtualized system, monitor on a UNIX socket",
        """-cdrom cd.iso -boot order=d -drive file=disk.raw,format=raw -m 64M -nic none -monitor unix:monitor.sock,server,nowait
        -vnc :$V,password=off -device virtio-balloon -audiodev none,id=snd0 -device ich9-intel-hda -device hda-output,audiodev=snd0""",
        "hmp monitor.sock",
    ),
    Line(
        "arch-wiki-daemon",
        "Arch wiki, QEMU: starting as a service",
        """-name myvm -daemonize -display none -serial null -parallel null -monitor telnet:127.0.0.1:$P,server,nowait,nodelay -m 64 -nic none
        -drive file=$D/disk.raw,format=raw,if=virtio -pidfile $D/vm.pid""",
        "pidfile vm.pid",
    ),
    Line(
        "obs-build",
        "obs-build, build-vm-kvm",
        """-nodefaults -no-reboot -nographic -vga none -cpu max -object rng-random,filename=/dev/urandom,id=rng0 -device virtio-rng-pci,rng=rng0
        -runas nobody -net none -kernel $D/bzImage -initrd $D/initrd.img
        -append 'root=/dev/disk/by-id/virtio-0 rootfstype=ext4 panic=1 quiet no-kvmclock elevator=noop nmi_watchdog=0 rw rd.driver.pre=binfmt_misc console=hvc0 init=/.build/build'
        -m 64 -drive file=$D/disk.raw,format=raw,if=none,id=disk,cache=unsafe,aio=threads -device virtio-blk-pci,drive=disk,serial=0
        -drive file=$D/data.raw,format=raw,if=none,id=swap,cache=unsafe,aio=threads -device virtio-blk-pci,drive=swap,serial=1
        -device virtio-serial,max_ports=2 -device virtconsole,chardev=virtiocon0 -chardev stdio,mux=on,id=virtiocon0 -mon chardev=virtiocon0
        -chardev socket,id=monitor,server=on,wait=off,path=$D/monitor -mon chardev=monitor,mode=readline -smp 2""",
        "hmp monitor",
    ),
    Line(
        "boxes-like",
        "GNOME Boxes-like: a desktop guest on VNC with USB and sound without a card of the host",
        """-name Boxes -machine q35 -accel tcg -m 64 -nic none -device qemu-xhci,id=usb -device usb-tablet -device usb-kbd
        -device ich9-usb-ehci1,id=ehci -device ich9-usb-uhci1,masterbus=ehci.0,firstport=0,multifunction=on
        -device virtio-vga,max_outputs=1,xres=1280,yres=800 -vnc unix:$D/vnc.sock,share=force-shared -audiodev none,id=a
        -device ich9-intel-hda -device hda-duplex,audiodev=a -chardev qemu-vdagent,id=vdagent,name=vdagent,clipboard=off,mouse=off
        -device virtio-serial -device virtserialport,chardev=vdagent,name=com.redhat.spice.0
        -drive file=$D/disk.qcow2,format=qcow2,if=none,id=d -device ide-hd,drive=d,bus=ide.2""",
        "HUP",
    ),
    Line(
        "autopkgtest",
        "autopkgtest-virt-qemu: its argv",
        """-machine q35 -m 64 -smp 1 -nographic -net none -object rng-random,filename=/dev/urandom,id=rng0
        -device virtio-rng-pci,rng=rng0,id=rng-device0 -monitor unix:$D/monitor,server=on,wait=off
         -drive file=$D/onraw.qcow2,cache=unsafe,if=virtio,discard=unmap,index=0,format=qcow2,backing.driver=raw,backing.file.filename=$D/base.raw
        -serial unix:$D/ttyS0,server=on,wait=off -serial unix:$D/ttyS1,server=on,wait=off
        -device virtio-serial -chardev socket,path=$D/hvc0,server=on,wait=off,id=hvc0 -device virtconsole,chardev=hvc0 """,
        "hmp monitor",
    ),
    Line(
        "android-like",
        "Android emulator-like: many small read-only and writable images",
        """-machine pc -m 64 -nodefaults -nographic -serial stdio -kernel $D/bzImage -initrd $D/initrd.img -append 'no_timer_check clocksource=pit console=ttyS0,38400 androidboot.hardware=ranchu'
        -drive if=none,index=0,id=system,if=none,file=$D/base.raw,read-only=on,format=raw -device virtio-blk-pci,drive=system
        -drive if=none,index=1,id=cache,file=$D/disk.qcow2,overlap-check=none,cache=unsafe,l2-cache-size=1048576,format=qcow2
        -device virtio-blk-pci,drive=cache
        -drive if=none,index=2,id=userdata,file=$D/data.raw,cache=unsafe,format=raw -device virtio-blk-pci,drive=userdata
        -device virtio-gpu-pci -device virtio-serial,ioeventfd=off -chardev null,id=forhvc0 -device virtconsole,chardev=forhvc0
        -chardev null,id=forhvc1 -device virtconsole,chardev=forhvc1""",
        "TERM",
    ),
    Line(
        "osdev-floppy",
        "OSDev wiki and class Makefiles: a boot sector",
        "-drive format=raw,file=floppy.img,if=floppy -boot a -net none -monitor stdio -vnc :$V -m 16",
        "stdin quit\n",
    ),
    Line(
        "osdev-gdb",
        "MIT xv6, Makefile: qemu-gdb",
        """-nographic -drive file=$D/fs.raw,index=1,media=disk,format=raw -drive file=$D/disk.raw,index=0,media=disk,format=raw
        -smp 2 -m 64 -nic none -S -gdb tcp::$P""",
        "stdin \x01x",
    ),
    Line(
        "osdev-exit",
        "Rust OS tutorials (bootimage): the guest ends QEMU with a status",
        """-drive format=raw,file=$D/exit.raw -device isa-debug-exit,iobase=0xf4,iosize=0x04 -serial stdio -display none -no-reboot
        -nic none -m 32""",
        "exit 33",
    ),
    Line(
        "osdev-poweroff",
        "kernel self-tests: -no-reboot and a triple fault",
        "-drive format=raw,file=$D/fault.raw -no-reboot -display none -nodefaults -m 32",
        "exit 0",
    ),
    Line(
        "osdev-log",
        "hobby systems: everything logged, debug port on a file",
        """-cdrom cd.iso -m 64 -no-reboot -no-shutdown -d int,cpu_reset,guest_errors -D qemu.log -debugcon file:debug.log
        -global isa-debugcon.iobase=0xe9 -M q35,smm=off -monitor none -serial file:serial.log -vga std -display none -net none""",
        "TERM",
    ),
    Line(
        "coreboot",
        "coreboot documentation, mainboard/emulation/qemu-q35",
        """-M q35 -m 64 -bios $D/firmware.bin -serial stdio -display none -nic none -device isa-debugcon,iobase=0x402,chardev=d
        -chardev file,id=d,path=$D/coreboot.log""",
        "TERM",
    ),
    Line(
        "edk2-ovmf",
        "EDK II, OvmfPkg/README",
        """-pflash OVMF.fd -debugcon file:debug.log -global isa-debugcon.iobase=0x402 -net none -m 128 -nographic
        -serial mon:stdio""",
        "stdin \x01x",
    ),
    Line(
        "edk2-ovmf-smm",
        "EDK II, OvmfPkg/README: SMM with separate variables",
        """-machine q35,smm=on,accel=tcg -m 128 -global driver=cfi.pflash01,property=secure,value=on
        -drive file=$D/OVMF_CODE_4M.fd,if=pflash,format=raw,unit=0,readonly=on -drive file=$D/OVMF_VARS_4M.fd,if=pflash,format=raw,unit=1
        -global ICH9-LPC.disable_s3=1 -qmp unix:$D/qmp-socket,server,nowait -net none -serial telnet:localhost:$P,server,nowait -nographic""",
        "qmp qmp-socket",
    ),
    Line(
        "ovmf-bios",
        "wikis: -bios OVMF.fd",
        "-bios /usr/share/ovmf/OVMF.fd -m 128 -display none -nic none -drive file=$D/disk.raw,format=raw -serial null -monitor none",
        "TERM",
    ),
    Line(
        "u-root",
        "u-root, README: an initramfs alone",
        """-kernel $D/bzImage -initrd $D/initrd.img -nographic -append 'console=ttyS0 uroot.uinitflags=x' -m 64 -nic none
        -device virtio-rng-pci -device i6300esb,id=watchdog0 -action watchdog=poweroff""",
        "stdin \x01x",
    ),
    Line(
        "microvm",
        "QEMU, docs/system/i386/microvm.rst",
        """-M microvm,x-option-roms=off,pit=off,pic=off,isa-serial=off,rtc=off -accel tcg -cpu max -m 64m -smp 2
        -kernel $D/bzImage -append 'console=hvc0 root=/dev/vda' -nodefaults -no-user-config -nographic
        -chardev stdio,id=virtiocon0 -device virtio-serial-device -device virtconsole,chardev=virtiocon0
        -drive id=test,file=$D/disk.raw,format=raw,if=none -device virtio-blk-device,drive=test""",
        "TERM",
    ),
    Line(
        "firecracker-like",
        "microvm guests of NixOS (microvm.nix): PCI off, memfd, QMP on a relative path",
        """-name my-microvm -M microvm,accel=kvm:tcg,acpi=on,mem-merge=on,pcie=off,pic=off,pit=off,usb=off -m 64 -smp 1
        -nodefaults -no-user-config -no-reboot -kernel $D/bzImage -initrd $D/initrd.img -chardev stdio,id=stdio,signal=off
        -device virtio-rng-device -cpu qemu64,+x2apic,-sgx -append 'earlyprintk=ttyS0 console=ttyS0 reboot=t panic=-1'
        -nographic -serial chardev:stdio -qmp unix:my-microvm.sock,server,nowait
        -drive id=vda,format=raw,file=$D/disk.raw,if=none,aio=io_uring,discard=unmap,cache=none,read-only=off
        -device virtio-blk-device,drive=vda,serial=s -object memory-backend-memfd,id=mem,size=64M,share=on -numa node,memdev=mem""",
        "qmp my-microvm.sock",
    ),
    Line(
        "multipass",
        "Multipass, src/platform/backends/qemu",
        """-device virtio-scsi-pci,id=scsi0 -drive file=$D/disk.qcow2,if=none,format=qcow2,discard=unmap,id=hda
        -device scsi-hd,drive=hda,bus=scsi0.0 -smp 1 -m 64M -qmp stdio -chardev null,id=char0 -serial chardev:char0 -nographic
        -cdrom $D/seed.iso -nic none -cpu max""",
        "stdin qmp",
    ),
    Line(
        "minikube",
        "minikube, pkg/drivers/qemu",
        """-display none -cpu max -m 64 -smp 1 -boot d -cdrom $D/cd.iso -qmp unix:$D/monitor,server,nowait -pidfile $D/qemu.pid
        -drive file=$D/disk.raw,format=raw,if=virtio -net none -daemonize""",
        "qmp monitor",
    ),
    Line(
        "openqa",
        "openQA, os-autoinst: backend/qemu, without its FIFOs",
        """-device virtio-vga,edid=on,xres=1024,yres=768 -chardev ringbuf,id=serial0,logfile=$D/serial0,logappend=on -serial chardev:serial0
        -audiodev none,id=snd0 -device intel-hda -device hda-output,audiodev=snd0 -m 64 -cpu qemu64 -nic none
        -object rng-random,filename=/dev/urandom,id=rng0 -device virtio-rng-pci,rng=rng0 -boot once=d -device qemu-xhci -device usb-tablet
        -smp 1 -machine accel=kvm:tcg -no-shutdown -vnc :$V,share=force-shared -device virtio-serial
        -chardev socket,path=$D/virtio_console.sock,server=on,wait=off,id=virtio_console,logfile=$D/virtio_console.log,logappend=on
        -device virtconsole,chardev=virtio_console,name=org.openqa.console.virtio_console
        -chardev socket,path=qmp_socket,server=on,wait=off,id=qmp_socket,logfile=qmp_socket.log,logappend=on -qmp chardev:qmp_socket -S
        -device virtio-scsi-pci,id=scsi0
        -blockdev driver=file,node-name=hd0-overlay0-file,filename=$D/overlay.qcow2,cache.no-flush=on
        -blockdev driver=file,node-name=hd0-file,filename=$D/base.qcow2,cache.no-flush=on,read-only=on
        -blockdev driver=qcow2,node-name=hd0,file=hd0-file,cache.no-flush=on,read-only=on,discard=unmap
        -blockdev driver=qcow2,node-name=hd0-overlay0,file=hd0-overlay0-file,cache.no-flush=on,discard=unmap,backing=hd0
        -device virtio-blk,id=hd0-device,drive=hd0-overlay0,bootindex=0,serial=hd0
        -blockdev driver=file,node-name=cd0-file,filename=$D/cd.iso,cache.no-flush=on,read-only=on
        -blockdev driver=raw,node-name=cd0,file=cd0-file,cache.no-flush=on,read-only=on -device scsi-cd,id=cd0-device,drive=cd0,serial=cd0""",
        "qmp qmp_socket",
    ),
    Line(
        "ctf",
        "kernel exercise scripts: run.sh",
        """-m 64M -kernel ./bzImage -initrd ./initrd.img -cpu kvm64,+smep,+smap -smp 1 -monitor /dev/null -nographic -no-reboot
        -append 'console=ttyS0 oops=panic panic=1 kpti=1 nokaslr quiet' -nic none -drive file=flag.txt,if=virtio,format=raw,readonly=on""",
        "TERM",
    ),
    Line(
        "osv-loader",
        "unikernels (OSv, Unikraft): a multiboot kernel, virtio disks, RTC and USB off",
        """-vnc :$V -m 64M -smp 1 -device virtio-blk-pci,id=blk0,drive=hd0 -drive file=$D/disk.qcow2,if=none,id=hd0,cache=none,aio=native,format=qcow2
        -device virtio-rng-pci -chardev stdio,mux=on,id=stdio,signal=off -device isa-serial,chardev=stdio -mon chardev=stdio,mode=readline
        -nic none -kernel $D/multiboot.bin -initrd '$D/mod1 args one,$D/mod2'""",
        "stdin \x01x",
    ),
    Line(
        "nvme-spdk",
        "QEMU, docs/system/devices/nvme.rst",
        """-M q35 -m 64 -nodefaults -display none -drive file=$D/disk.raw,format=raw,if=none,id=nvm -device nvme,serial=deadbeef,drive=nvm
        -device nvme-subsys,id=nvme-subsys-0,nqn=subsys0 -device nvme,serial=beef,subsys=nvme-subsys-0,id=n1
        -drive file=$D/data.raw,format=raw,if=none,id=nvm1 -device nvme-ns,drive=nvm1,bus=n1,nsid=1
        -qmp unix:$D/qmp,server=on,wait=off""",
        "qmp qmp",
    ),
    Line(
        "usb-and-sd",
        "QEMU, docs/system/devices/usb.rst: sticks, hubs, cards",
        """-M pc -m 64 -display none -nic none -usb -drive if=none,id=usbstick,format=raw,file=$D/disk.raw -device usb-ehci,id=ehci
        -device usb-storage,bus=ehci.0,drive=usbstick -device usb-hub,bus=usb-bus.0 -device usb-audio,audiodev=a,bus=usb-bus.0 -audiodev none,id=a
        -device sdhci-pci -drive if=none,id=card,format=raw,file=$D/data.raw -device sd-card,drive=card -monitor unix:$D/mon,server=on,wait=off""",
        "hmp mon",
    ),
    Line(
        "ipmi-and-tco",
        "server firmware tests: an IPMI BMC, pvpanic, TCO watchdog, CXL left out",
        """-M q35 -m 64 -nodefaults -display none -device ipmi-bmc-sim,id=bmc0 -device isa-ipmi-kcs,bmc=bmc0,ioport=0xca2
        -device pvpanic-pci -device edu -device pci-testdev -global ICH9-LPC.noreboot=false -qmp-pretty unix:$D/qmp,server=on,wait=off
        -acpitable sig=TEST,data=$D/acpi.dat -fw_cfg name=opt/org.example/x,file=$D/fwcfg.bin -option-rom $D/rom.bin""",
        "qmp qmp",
    ),
    Line(
        "legacy-nics",
        "wikis: -net nic with no -net of the host's, each old card",
        """-m 64 -display none -net nic,model=rtl8139 -net nic,model=ne2k_pci -device e1000 -device e1000e -device pcnet -device i82551
        -device virtio-net-pci -device vmxnet3 -monitor none -serial none""",
        "TERM",
    ),
    Line(
        "throttle",
        "hosting panels (SolusVM-like): limited disks and a password on VNC",
        """-name vps101 -m 64 -smp 1 -nic none -object throttle-group,id=tg0,x-iops-total=100,x-bps-total=10485760
        -blockdev '{"driver":"throttle","node-name":"t0","throttle-group":"tg0","file":{"driver":"qcow2","node-name":"q0","file":{"driver":"file","filename":"$D/disk.qcow2"}}}'
        -device virtio-blk-pci,drive=t0 -drive file=$D/data.raw,format=raw,if=virtio,throttling.iops-total=50,throttling.bps-read=1048576
        -object secret,id=vncpass,file=$D/vncpass -vnc unix:$D/101.vnc,password-secret=vncpass -qmp tcp:127.0.0.1:$P,server=on,wait=off -daemonize
        -pidfile $D/101.pid""",
        "qmp $P",
    ),
    Line(
        "vnc-tls",
        "QEMU, docs/system/vnc-security.rst: TLS, here without certificates",
        """-m 64 -nic none -nodefaults -device VGA -object tls-creds-anon,id=tls0,dir=$D,endpoint=server
        -vnc 127.0.0.1:$V,tls-creds=tls0 -qmp unix:$D/qmp,server=on,wait=off""",
        "qmp qmp",
    ),
    Line(
        "backup-nbd",
        "backup tools: a disk that qemu-nbd serves on a UNIX socket",
        """-m 64 -nodefaults -display none -drive file=nbd+unix:///?socket=$D/nbd.sock,format=raw,if=virtio
        -qmp unix:$D/qmp,server=on,wait=off""",
        "qmp qmp",
    ),
    Line(
        "stdin-null-cron",
        "scripts from cron: everything in files",
        """-m 64 -nographic -nic none -serial file:$D/console.log -monitor none -drive file=$D/disk.raw,format=raw,if=virtio,werror=stop,rerror=stop
        -pidfile $D/cron.pid -no-reboot -rtc base=localtime -k de""",
        "pidfile cron.pid",
    ),
    Line(
        "i386",
        "Debian installer hacking notes: the 32-bit emulator, old hardware",
        """qemu-system-i386 -M isapc -cpu 486 -m 16 -nic none -vga cirrus -display none -drive file=$D/disk.raw,format=raw,if=ide
        -device sb16,audiodev=a -audiodev none,id=a -device adlib,audiodev=a -serial null -parallel none -monitor none""",
        "TERM",
    ),
    Line(
        "migration-target",
        "Ganeti and hand-made migration: a target that waits",
        """-m 64 -nodefaults -display none -S -incoming defer -qmp unix:$D/qmp,server=on,wait=off
        -drive file=$D/disk.raw,format=raw,if=virtio""",
        "qmp qmp",
    ),
    Line(
        "snapshot-load",
        "quickemu, test farms: -loadvm of a qcow2's own snapshot",
        """-m 64 -nodefaults -display none -drive file=$D/snap.qcow2,format=qcow2,if=virtio -loadvm clean
        -qmp unix:$D/qmp,server=on,wait=off""",
        "qmp qmp",
    ),
    Line(
        "lima-net",
        "Lima, with its user-mode network",
        """-m 64 -machine q35 -accel tcg -nographic -serial none -monitor none
        -netdev user,id=net0,net=192.168.5.0/24,dhcpstart=192.168.5.15,hostfwd=tcp:127.0.0.1:$P-:22
        -device virtio-net-pci,netdev=net0,mac=52:55:55:00:00:01 -qmp unix:$D/qmp,server=on,wait=off""",
        "qmp qmp",
        "passt",
    ),
    Line(
        "vagrant-qemu",
        "vagrant-qemu, lib/vagrant-qemu/driver.rb",
        """-machine q35 -cpu qemu64 -smp 1 -m 64M -device virtio-net-pci,netdev=net0 -netdev user,id=net0,hostfwd=tcp:127.0.0.1:$P-:22
        -drive if=virtio,format=qcow2,file=$D/disk.qcow2 -chardev socket,id=mon0,path=$D/qemu_socket,server=on,wait=off
        -mon chardev=mon0,mode=readline -chardev socket,id=ser0,path=$D/qemu_socket_serial,server=on,wait=off -serial chardev:ser0
        -pidfile $D/qemu.pid -parallel null -monitor none -display none -vga none -daemonize""",
        "hmp qemu_socket",
        "passt",
    ),
    Line(
        "syzkaller-net",
        "syzkaller, docs/linux/setup: by hand",
        """-m 64 -smp 2 -kernel $D/bzImage -append 'console=ttyS0 root=/dev/sda earlyprintk=serial net.ifnames=0'
        -drive file=$D/disk.raw,format=raw -net user,hostfwd=tcp:127.0.0.1:$P-:22 -net nic,model=e1000 -nographic -pidfile vm.pid""",
        "pidfile vm.pid",
        "passt",
    ),
    Line(
        "default-net",
        "anybody: no word about the network",
        "-m 64 -drive file=disk.raw,format=raw -nographic",
        "stdin \x01x",
        "passt",
    ),
)
