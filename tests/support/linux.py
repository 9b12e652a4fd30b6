# SPDX-License-Identifier: Apache-2.0
"""A real Linux guest for the tests: Debian's own kernel, busybox, and an initramfs made on the spot.

Nothing is installed: the packages are fetched by apt into a cache directory and unpacked there. The guest is steered by
one word of its kernel command line, ``depriv.test=`` and a comma-separated list, done in this order:

    disk      for each disk (vd?, sd?): print the text of its first sector, write its last 4 KiB, read them back;
              for each CD-ROM drive: print the first line of the first file
    shell     a shell on the serial port, whose prompt is ``PROMPT`` (a terminal query, ESC [6n, may follow it)
    tick      print "guest: tick N" every second, for ever
    poweroff  switch off at the end

It prints "guest: up" when the modules are loaded and "guest: done" at the end. ``command_line`` has the words.

Debian's cloud kernel (the default) knows virtio, and IDE as on the machine pc. For AHCI, e1000 or rtl8139 ask for the
flavour "amd64", which is four times as large.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support import cpio

from depriv.records import Record

PROMPT = "guest:/# "
CLOUD = "cloud-amd64"

# Wanted in the guest, where the kernel has them as modules; what they depend on comes by itself.
MODULES = (
    *("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "virtio_net", "virtio_console"),
    *("ata_piix", "ata_generic", "ahci", "sd_mod", "sr_mod", "isofs"),
    *("e1000", "e1000e", "8139cp", "rtl8139"),
)

INIT = r"""#!/bin/sh
export PATH=/bin PS1='guest:$PWD# ' HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do
	insmod /modules/$module.ko || echo "guest: no $module"
done
# A SCSI or ATA disk is found in the background: wait up to 5 s for each one that has answered.
for device in /sys/class/scsi_device/*/device; do
	tries=0
	while [ -d $device ] && [ ! -d $device/block ] && [ $tries -lt 50 ]; do
		usleep 100000
		tries=$((tries + 1))
	done
done
echo "guest: up"

try_disk() {
	text=$(dd if=/dev/$1 bs=512 count=1 2>/dev/null | tr -dc ' -~' | cut -c 1-60)
	last=$(($(cat /sys/block/$1/size) / 8 - 1))
	sum=$({ echo "written by the guest"; cat /proc/sys/kernel/random/uuid; } | tee /pattern | md5sum)
	if dd if=/pattern of=/dev/$1 bs=4096 seek=$last conv=notrunc,fsync,sync 2>/dev/null; then
		echo 3 > /proc/sys/vm/drop_caches
		# The pattern is 58 bytes long.
		back=$(dd if=/dev/$1 bs=4096 skip=$last count=1 2>/dev/null | head -c 58 | md5sum)
		[ "$back" = "$sum" ] && write=ok || write=lost
	else
		write=failed
	fi
	echo "disk $1: read $text, write $write"
}

try_cd() {
	mkdir -p /cd
	if mount -t iso9660 -o ro /dev/$1 /cd 2>/dev/null; then
		first=$(ls /cd | head -n 1)
		echo "cd $1: $first: $(head -n 1 "/cd/$first")"
		umount /cd
	else
		echo "cd $1: empty"
	fi
}

run() {
	case $1 in
	disk)
		for name in $(ls /sys/block); do
			case $name in vd?|sd?) try_disk $name;; sr?) try_cd $name;; esac
		done
		;;
	shell) setsid cttyhack sh -i ;;
	tick)
		count=0
		while :; do count=$((count + 1)); echo "guest: tick $count"; sleep 1; done
		;;
	esac
}

words=
for word in $(cat /proc/cmdline); do
	case $word in depriv.test=*) words=$(echo "${word#depriv.test=}" | tr ',' ' ');; esac
done
for word in disk shell tick; do
	case " $words " in *" $word "*) run $word;; esac
done
echo "guest: done"
case " $words " in *" poweroff "*) poweroff -f;; esac
while :; do sleep 3600; done
"""

APPLETS = (
    *("sh", "mount", "umount", "insmod", "cat", "dd", "tr", "cut", "ls", "head", "tee", "md5sum", "echo", "mkdir"),
    *("sleep", "usleep", "setsid", "cttyhack", "poweroff", "reboot", "sync", "dmesg", "ip", "ping", "ps", "grep"),
    *("wc", "nc", "devmem", "uname", "df", "free", "kill", "eject", "blockdev", "uptime", "hexdump", "udhcpc"),
)


class LinuxGuest(Record):
    """What ``-kernel`` and ``-initrd`` want."""

    kernel: str  # absolute path
    initramfs: str  # absolute path
    release: str  # as uname -r prints it in the guest


def command_line(*tests: str, machine: str = "pc") -> str:
    """Return the kernel's command line for ``tests`` (see above) on QEMU's ``machine``.

    Under emulation a microvm has no clock that the kernel could measure the TSC against: it then marks the TSC unstable
    and mostly hangs, with QEMU 7.2 and Linux 6.1 in 3 of 4 starts and more. Told a frequency it always comes up; the
    guest's clock is wrong by the ratio to the host's.
    """
    words = ["console=ttyS0", "quiet", "panic=-1", f"depriv.test={','.join(tests)}"]
    if machine == "microvm":
        words.append("tsc_early_khz=2000000")
    return " ".join(words)


def cache_directory() -> Path:
    """Return where downloads and builds are kept: $DEPRIV_TEST_CACHE, or .cache/tests in the checkout."""
    chosen = os.environ.get("DEPRIV_TEST_CACHE")
    path = Path(chosen) if chosen else Path(__file__).parents[2] / ".cache" / "tests"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def linux_guest(flavour: str = CLOUD) -> LinuxGuest:
    """Return the newest kernel of ``flavour`` and its initramfs, from the cache or fetched and made now.

    Raises:
        RuntimeError: apt has no such kernel, or a command failed; with what it said. Nothing half-made is left behind.
    """
    kernel = _kernel(flavour)
    (vmlinuz,) = (kernel / "boot").glob("vmlinuz-*")
    release = vmlinuz.name.removeprefix("vmlinuz-")
    tools = _busybox()
    wanted = hashlib.sha256("\0".join((INIT, *MODULES, *APPLETS)).encode() + tools).hexdigest()[:16]
    initramfs = cache_directory() / f"initramfs-{release}-{wanted}.gz"
    if not initramfs.exists():
        (modules,) = kernel.glob(f"**/lib/modules/{release}")
        _write_whole(initramfs, cpio.compressed(cpio.archive(_entries(tools, modules))))
    return LinuxGuest(kernel=str(vmlinuz), initramfs=str(initramfs), release=release)


def module_order(modules: Path) -> dict[str, bytes]:
    """Return name -> content of the wanted modules below ``modules``, each after those it depends on.

    What a module depends on stands in its .modinfo section (kernel scripts/mod/modpost.c, "depends="); the package has
    no modules.dep, which depmod(8) only makes at installation.
    """
    found = {path.name.partition(".")[0].replace("-", "_"): path for path in sorted(modules.glob("kernel/**/*.ko*"))}
    result: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in result or name not in found:
            return
        data = found[name].read_bytes()
        if found[name].suffix == ".xz":  # from Debian 13 on; the guest's busybox insmod wants them plain
            data = lzma.decompress(data)
        depends = data.partition(b"\0depends=")[2].partition(b"\0")[0].decode()
        for other in filter(None, depends.split(",")):
            add(other.replace("-", "_"))
        result[name] = data

    for name in MODULES:
        add(name)
    if "virtio_blk" not in result:
        raise RuntimeError(f"no virtio_blk.ko below {modules}")
    return result


def _entries(tools: bytes, modules: Path) -> list[cpio.Entry]:
    """Return what is in the initramfs."""
    ordered = module_order(modules)
    return [
        *(cpio.directory(name) for name in ("bin", "dev", "modules", "proc", "sys")),
        # Before devtmpfs is mounted, the kernel opens this for init's standard input and output.
        cpio.character_device("dev/console", 5, 1),
        cpio.file("bin/busybox", tools, 0o755),
        *(cpio.link(f"bin/{name}", "busybox") for name in APPLETS),
        cpio.file("init", INIT.encode(), 0o755),
        cpio.file("modules/order", "\n".join(ordered).encode() + b"\n"),
        *(cpio.file(f"modules/{name}.ko", data) for name, data in ordered.items()),
    ]


def _kernel(flavour: str) -> Path:
    """Return the directory with the unpacked kernel package, the newest that apt or else the cache knows."""
    if not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        _run(["apt-get", "-q", "update"])
    said = _run(["apt-cache", "depends", "--important", f"linux-image-{flavour}"])
    names = [line.split()[-1] for line in said.splitlines() if "Depends: linux-image-" in line]
    if not names:
        raise RuntimeError(f"linux-image-{flavour} depends on no kernel here: {said}")
    return _unpacked(names[0])


def _busybox() -> bytes:
    """Return a statically linked busybox: Debian's busybox-static, the installed one if it is that one."""
    for path in ("/bin/busybox", "/usr/bin/busybox"):
        if os.path.exists(path):
            data = Path(path).read_bytes()
            # A dynamically linked program names its interpreter near its start (ELF, PT_INTERP).
            if b"/ld-linux" not in data[:4096]:
                return data
    (path_in_cache,) = _unpacked("busybox-static").glob("**/bin/busybox")
    return path_in_cache.read_bytes()


def _unpacked(package: str) -> Path:
    """Return the directory with the content of a Debian package; two processes at once do not disturb each other."""
    final = cache_directory() / package
    if final.exists():
        return final
    with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="fetch-") as work:
        # Root's apt would fetch as user _apt, who cannot write here.
        _run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package], cwd=work)
        (archive,) = Path(work).glob("*.deb")
        _run(["dpkg-deb", "-x", str(archive), f"{work}/content"])
        try:
            os.rename(f"{work}/content", final)
        except OSError:  # the other one was faster
            if not final.exists():
                raise
    return final


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that is complete as soon as its name exists."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as draft:
        draft.write(data)
        os.fchmod(draft.fileno(), 0o644)
    os.rename(draft.name, path)


def _run(argv: list[str], *, cwd: str | None = None) -> str:
    """Return what a command printed.

    Raises:
        RuntimeError: it is missing or it failed.
    """
    if shutil.which(argv[0]) is None:
        raise RuntimeError(f"the Linux test guest needs {argv[0]}")
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    environment |= {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    done = subprocess.run(argv, cwd=cwd, env=environment, check=False, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
