# SPDX-License-Identifier: Apache-2.0
"""Every option of QEMU and what becomes of it. Pure.

The options are those that QEMU 7.2's own table holds (qemu-options.hx; with the hidden and the deprecated ones), those
that came until QEMU 11, and old ones that scripts still have, with what replaced them. A word that is not here is
refused before QEMU sees it. docs/reference/qemu-options.md shows the table; tests hold both to each other, and this
one to what the installed QEMU lists.
"""

from __future__ import annotations

from depriv.records import Record

PASSED = "passed"  # as it is: it names nothing of the host
BY_FD = "by fd"  # what it names is opened by us and handed in as a descriptor
PRIVATE_COPY = "private copy"  # what it names is copied into QEMU's root, which vanishes
TAKEN_OVER = "taken over"  # depriv does itself what it asks for, or does it better
REFUSED = "refused"


class Option(Record):
    """One option."""

    takes_value: bool
    how: str  # the strongest of the treatments above that it can get
    why: str = ""  # of "taken over" and "refused": the reason; of others: what is special
    instead: str = ""  # of "refused": what to do


def _flag(how: str, why: str = "", instead: str = "") -> Option:
    return Option(takes_value=False, how=how, why=why, instead=instead)


def _value(how: str, why: str = "", instead: str = "") -> Option:
    return Option(takes_value=True, how=how, why=why, instead=instead)


_ENDS = "QEMU prints and ends: there is no guest"
_FORMAT = "the format cannot be said in this short form: without it QEMU would guess"
_OTHER = "no machine of x86 has it"

_MACHINE = {
    "h": _flag(PASSED, _ENDS),
    "help": _flag(PASSED, _ENDS),
    "version": _flag(PASSED, _ENDS),
    "machine": _value(PRIVATE_COPY, "kernel=, initrd=, dtb= and firmware= are copied; other paths are refused"),
    "M": _value(PRIVATE_COPY, "as -machine"),
    "cpu": _value(PASSED),
    "accel": _value(PASSED, "device= is refused: depriv gives QEMU its own /dev/kvm"),
    "enable-kvm": _flag(PASSED, "as -accel kvm"),
    "smp": _value(PASSED),
    "numa": _value(PASSED),
    "m": _value(PASSED, "the limits on memory follow from it"),
    "mem-path": _value(
        REFUSED,
        "guest memory would be a file of the host, by name",
        "use -object memory-backend-memfd,id=mem,size=SIZE and -machine memory-backend=mem (hugetlb=on for huge pages)",
    ),
    "mem-prealloc": _flag(PASSED),
    "overcommit": _value(PASSED, "mem-lock=on is refused: no memory may be locked (RLIMIT_MEMLOCK 0)"),
    "global": _value(PASSED, "values that name a path are refused"),
    "set": _value(TAKEN_OVER, "counts as if it were written into the option that it changes"),
    "boot": _value(PRIVATE_COPY, "splash= is copied"),
    "name": _value(PASSED, "guest= is the domain's name too"),
    "uuid": _value(PASSED),
    "rtc": _value(PASSED),
    "icount": _value(PASSED, "rr=record and rr=replay are refused: their file is opened by name"),
    "watchdog-action": _value(PASSED),
    "action": _value(PASSED),
    "no-reboot": _flag(PASSED),
    "no-shutdown": _flag(PASSED),
    "S": _flag(TAKEN_OVER, "QEMU always starts with the guest stopped; with -S it stays so"),
    "nodefaults": _flag(PASSED),
    "no-user-config": _flag(TAKEN_OVER, "QEMU never reads a configuration of its own accord"),
    "compat": _value(PASSED),
    "only-migratable": _flag(PASSED),
    "loadvm": _value(PASSED, "the snapshot is in the guest's own qcow2 images"),
    "incoming": _value(BY_FD, "fd:N, file:PATH, exec:cat PATH, defer; other programs and sockets are refused"),
    "seed": _value(PASSED),
    "k": _value(PRIVATE_COPY, "a name is passed, a file is copied"),
    "usb": _flag(PASSED),
    "usbdevice": _value(PASSED, "braille is refused"),
    "no-acpi": _flag(PASSED, "gone in QEMU 9.0: -machine acpi=off"),
    "no-hpet": _flag(PASSED, "gone in QEMU 9.0: -machine hpet=off"),
    "no-fd-bootchk": _flag(PASSED),
    "win2k-hack": _flag(PASSED),
    "singlestep": _flag(PASSED, "gone in QEMU 9.0: -accel tcg,one-insn-per-tb=on"),
}

_FILES = {
    "kernel": _value(PRIVATE_COPY),
    "shim": _value(PRIVATE_COPY, "since QEMU 10.0"),
    "initrd": _value(PRIVATE_COPY, "several, each with its words, if -kernel is a multiboot kernel"),
    "append": _value(PASSED),
    "dtb": _value(PRIVATE_COPY),
    "bios": _value(PRIVATE_COPY, "a name in QEMU's own data folders is passed"),
    "L": _value(PASSED, "a folder below /usr; others are refused: name the files themselves"),
    "option-rom": _value(PRIVATE_COPY, "a name in QEMU's own data folders is passed"),
    "fw_cfg": _value(PRIVATE_COPY, "file= is copied; string= and gen_id= are passed"),
    "smbios": _value(PRIVATE_COPY, "file= and path= are copied"),
    "acpitable": _value(PRIVATE_COPY, "each file of data= and file= is copied"),
    "readconfig": _value(TAKEN_OVER, "depriv reads the file; each section counts as an option on the command line"),
    "add-fd": _value(BY_FD, "the caller's open descriptors; sets from 1000 on are depriv's own"),
}

_DISKS = {
    "drive": _value(BY_FD),
    "blockdev": _value(BY_FD),
    "hda": _value(BY_FD, _FORMAT),
    "hdb": _value(BY_FD, _FORMAT),
    "hdc": _value(BY_FD, _FORMAT),
    "hdd": _value(BY_FD, _FORMAT),
    "fda": _value(BY_FD, _FORMAT),
    "fdb": _value(BY_FD, _FORMAT),
    "mtdblock": _value(BY_FD, _FORMAT),
    "sd": _value(BY_FD, _FORMAT),
    "cdrom": _value(BY_FD, "always raw"),
    "pflash": _value(BY_FD, "always raw"),
    "snapshot": _flag(
        REFUSED,
        "QEMU would make its temporary images by itself, in a folder that it does not have",
        "qemu-img create -f qcow2 -b FILE -F FORMAT overlay.qcow2, and give the overlay as the disk",
    ),
    "iscsi": _value(TAKEN_OVER, "it is about disks that QEMU reaches by iSCSI, and each of those is refused"),
}

_DEVICES = {
    "device": _value(BY_FD, "romfile= and file= are copied, host devices by descriptor or refused"),
    "object": _value(PRIVATE_COPY, "files of secrets and certificates are copied; other paths are refused"),
    "tpmdev": _value(PASSED, "emulator is passed; passthrough is refused"),
    "fsdev": _value(BY_FD, "synth, and proxy; local is refused: QEMU would open a folder by name, again and again"),
    "virtfs": _value(BY_FD, "as -fsdev"),
    "audio": _value(PASSED, "none only: others reach for the user's sound server"),
    "audiodev": _value(PASSED, "none only: others reach for the user's sound server"),
    "audio-help": _flag(PASSED, _ENDS + "; gone in QEMU 8.2"),
    "netdev": _value(BY_FD),
    "nic": _value(BY_FD),
    "net": _value(BY_FD),
    "chardev": _value(BY_FD),
    "serial": _value(BY_FD),
    "parallel": _value(BY_FD),
    "debugcon": _value(BY_FD),
    "monitor": _value(BY_FD),
    "qmp": _value(BY_FD),
    "qmp-pretty": _value(BY_FD),
    "mon": _value(PASSED),
    "echr": _value(PASSED),
    "gdb": _value(BY_FD),
    "s": _flag(BY_FD, "as -gdb tcp::1234"),
    "msg": _value(PASSED),
}

_DISPLAYS = {
    "display": _value(PASSED, "none, and vnc= as -vnc; windows are refused: they need the user's session"),
    "nographic": _flag(PASSED),
    "vnc": _value(BY_FD),
    "spice": _value(REFUSED, "its server takes no socket that is already open", "use -vnc 127.0.0.1:0"),
    "vga": _value(PASSED, "qxl is refused: it is SPICE's"),
    "g": _value(REFUSED, _OTHER, "leave it out, or use -device VGA,xres=X,yres=Y"),
    "full-screen": _flag(PASSED),
    "portrait": _flag(PASSED, "gone in QEMU 9.2"),
    "rotate": _value(PASSED, "gone in QEMU 9.2"),
}

_PROCESS = {
    "pidfile": _value(TAKEN_OVER, "depriv writes it, and removes it when QEMU has ended"),
    "daemonize": _flag(TAKEN_OVER, "depriv goes to the background itself, once the guest runs"),
    "runas": _value(TAKEN_OVER, "QEMU has a uid of its own from its first instruction on (gone in QEMU 10.0)"),
    "chroot": _value(TAKEN_OVER, "QEMU has an empty root of its own (gone in QEMU 9.0)"),
    "run-with": _value(TAKEN_OVER, "QEMU has a uid and an empty root of its own (since QEMU 8.1)"),
    "async-teardown": _flag(TAKEN_OVER, "QEMU may start no process, and so not the one that would free its memory"),
    "sandbox": _value(TAKEN_OVER, "depriv's is stricter: each group is denied"),
    "enable-fips": _flag(TAKEN_OVER, "which algorithms may be used is up to the libraries (gone in QEMU 7.1)"),
    "d": _value(PASSED, "the log goes to the standard error output"),
    "D": _value(TAKEN_OVER, "QEMU opens it by name: the log goes to the standard error output"),
    "dfilter": _value(PASSED),
    "trace": _value(PRIVATE_COPY, "events= is copied; file= is left out: traces go to the standard error output"),
    "enable-sync-profile": _flag(PASSED),
    "preconfig": _flag(
        REFUSED,
        "QEMU would wait before it makes the machine: depriv could not see that it runs confined",
        "give -numa and -smp on the command line; -S stops before the guest's first instruction",
    ),
    "plugin": _value(
        REFUSED, "a shared object of the host would be loaded into QEMU", "use -d, -trace or -gdb to observe the guest"
    ),
    "qtest": _value(REFUSED, "it drives devices in place of a guest, for QEMU's own tests", "use -qmp and -S"),
    "qtest-log": _value(REFUSED, "it belongs to -qtest", "use -trace"),
    "dump-vmstate": _value(REFUSED, "QEMU would write a file by name, without a guest", "run QEMU itself for it"),
    "xen-domid": _value(PASSED, "only as libxl's device model (depriv-dm)"),
    "xen-attach": _flag(PASSED, "only as libxl's device model (depriv-dm)"),
    "xen-domid-restrict": _flag(PASSED, "only as libxl's device model (depriv-dm)"),
    "prom-env": _value(REFUSED, _OTHER, "leave it out"),
    "old-param": _flag(REFUSED, _OTHER, "leave it out"),
    "semihosting": _flag(REFUSED, "the guest would read and write files of the host", "use a disk"),
    "semihosting-config": _value(REFUSED, "the guest would read and write files of the host", "use a disk"),
}

# Gone before QEMU 7.2, but found in scripts. Source: docs/about/removed-features.rst, QEMU 11.0.
_GONE = {
    "no-kvm": _flag(REFUSED, "gone in QEMU 5.2", "use -accel tcg"),
    "soundhw": _value(REFUSED, "gone in QEMU 7.1", "use -audiodev none,id=a and -device with audiodev=a"),
    "balloon": _value(REFUSED, "gone in QEMU 3.1", "use -device virtio-balloon"),
    "watchdog": _value(REFUSED, "gone in QEMU 7.2", "use -device with the watchdog's name"),
    "tb-size": _value(REFUSED, "gone in QEMU 6.0", "use -accel tcg,tb-size=MIB"),
    "realtime": _value(REFUSED, "gone in QEMU 6.0", "leave it out: memory is never locked"),
    "writeconfig": _value(REFUSED, "gone in QEMU 7.1", "keep the command line"),
    "sdl": _flag(REFUSED, "gone in QEMU 7.1", "use -vnc 127.0.0.1:0"),
    "curses": _flag(REFUSED, "gone in QEMU 7.1", "use -nographic"),
    "localtime": _flag(REFUSED, "gone in QEMU 3.1", "use -rtc base=localtime"),
    "startdate": _value(REFUSED, "gone in QEMU 3.1", "use -rtc base=DATE"),
    "redir": _value(REFUSED, "gone in QEMU 3.1", "use -nic user,hostfwd=..."),
    "tftp": _value(REFUSED, "gone in QEMU 3.1", "use -nic user,tftp=..."),
    "bootp": _value(REFUSED, "gone in QEMU 3.1", "use -nic user,bootfile=..."),
    "smb": _value(REFUSED, "gone in QEMU 3.1", "use a disk"),
    "nodefconfig": _flag(TAKEN_OVER, "gone in QEMU 3.1: as -no-user-config"),
}

OPTIONS: dict[str, Option] = {
    **_MACHINE,
    **_FILES,
    **_DISKS,
    **_DEVICES,
    **_DISPLAYS,
    **_PROCESS,
    **_GONE,
}


def table() -> str:
    """Return the table as docs/reference/qemu-options.md shows it: one line per option, in the order of names."""
    lines = ["| option | treatment | what to know | instead |", "|---|---|---|---|"]
    for name in sorted(OPTIONS, key=lambda name: (name.lower(), name)):
        option = OPTIONS[name]
        shown = f"`-{name}{' VALUE' if option.takes_value else ''}`"
        cells = [shown, option.how, option.why.replace("|", "\\|"), option.instead.replace("|", "\\|")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(line.replace("  |", " |") for line in lines) + "\n"
