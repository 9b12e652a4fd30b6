# SPDX-License-Identifier: Apache-2.0
"""-object: secrets, certificates, random numbers, memory, and the ones that reach for the host. Pure.

Held to ``qemu-system-x86_64 -object NAME,help`` of every kind of QEMU 7.2; qapi/qom.json of QEMU 10.0 for later ones.
"""

from __future__ import annotations

from depriv.qemu.properties import Properties, is_own_set, refuse_paths
from depriv.qemu.words import error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.qemu.draft import Draft
    from depriv.qemu.words import Word

_INPUT = ("it reads what is typed at the host", "give QEMU the device: -device usb-host,hostdevice=/dev/bus/usb/BUS/N")
_PROCESS = ("the device would be another process, with all of the guest's memory", "use a vhost-user device")
_SEV = ("it needs the host's /dev/sev", "leave it out")
REFUSED_OBJECTS = {
    "secret_keyring": ("QEMU may not use the kernel's keyrings", "use -object secret,id=ID,file=FILE"),
    "authz-pam": ("PAM reads its rules from /etc by name", "use -object authz-list or authz-list-file"),
    "memory-backend-file": (
        "guest memory would be a file of the host, by name",
        "use memory-backend-memfd,size=SIZE (share=on, hugetlb=on as needed); ivshmem by ivshmem-doorbell",
    ),
    "memory-backend-shm": ("QEMU would make shared memory by name", "use memory-backend-memfd,share=on"),
    "memory-backend-epc": ("it needs the host's /dev/sgx_vepc", "leave it out"),
    "filter-dump": (
        "QEMU would write its file by name",
        "run tcpdump -w FILE on the tap, or use filter-mirror with outdev= a chardev",
    ),
    "can-host-socketcan": (
        "QEMU sees no interface of the host",
        "use -object can-bus alone: a bus among the guest's cards",
    ),
    "input-linux": _INPUT,
    "input-barrier": ("QEMU has no network", "use -vnc 127.0.0.1:0"),
    "pr-manager-helper": ("QEMU would connect to it by name, again when it is gone", "leave pr-manager out"),
    "x-remote-object": _PROCESS,
    "x-vfio-user-server": _PROCESS,
    "cryptodev-backend-lkcf": ("it uses the kernel's keyrings and sockets", "use cryptodev-backend-builtin"),
    "dbus-vmstate": ("QEMU has no bus to connect to", "leave it out"),
    "sev-guest": _SEV,
    "sev-snp-guest": _SEV,
    "qtest": ("it drives devices in place of a guest, for QEMU's own tests", "use -qmp and -S"),
}
# Files of a credential's folder, by kind and end: those it cannot do without, then the others.
# Source: crypto/tlscredsx509.c, tlscredsanon.c, tlscredspsk.c (qcrypto_tls_creds_get_path), QEMU 7.2.
_CREDENTIALS = {
    ("tls-creds-x509", "server"): (
        ("ca-cert.pem", "server-cert.pem", "server-key.pem"),
        ("ca-crl.pem", "dh-params.pem"),
    ),
    ("tls-creds-x509", "client"): (("ca-cert.pem",), ("ca-crl.pem", "client-cert.pem", "client-key.pem")),
    ("tls-creds-anon", "server"): ((), ("dh-params.pem",)),
    ("tls-creds-anon", "client"): ((), ()),
    ("tls-creds-psk", "server"): (("keys.psk",), ("dh-params.pem",)),
    ("tls-creds-psk", "client"): (("keys.psk",), ()),
}
_RANDOM = "/dev/urandom"


def _object(draft: Draft, word: Word) -> None:
    made = Properties(word, "qom-type")
    kind = made.text("qom-type")
    if made.help:
        draft.facts["no_guest"] = True
        draft.emit("-object", word.value)
        return
    if kind in REFUSED_OBJECTS:
        why, instead = REFUSED_OBJECTS[kind]
        draft.refuse(word, f"{kind}: {why}", fix=instead)
    handler = _KINDS.get(kind)
    if handler is None:
        refuse_paths(draft, word, made.data)
        draft.emit("-object", made.value())
    else:
        handler(draft, word, made)


def _secret(draft: Draft, word: Word, made: Properties) -> None:
    if made.data.get("file"):
        made.data["file"] = draft.private(word, made.text("file"), role=f"secret-{_id(word, made)}")
    elif made.data.get("data") and not made.data.get("keyid"):
        draft.note(word, "the secret is on the command line, which every user sees: use file=", warning=True)
    refuse_paths(draft, word, {key: value for key, value in made.data.items() if key != "data"})
    draft.emit("-object", made.value())


def _credentials(draft: Draft, word: Word, made: Properties) -> None:
    """Copy the files that are known of the folder, under the names that QEMU looks for."""
    folder = made.text("dir")
    if folder:
        end = made.text("endpoint") or "client"
        needed, others = _CREDENTIALS.get((made.text("qom-type"), end), ((), ()))
        own = f"tls-{_id(word, made)}"
        for name in (*needed, *others):
            path = f"{folder.rstrip('/')}/{name}"
            if name in needed or draft.look(draft.path(word, path)).kind != "missing":
                draft.private(word, path, role=f"{own}/{name}")
        made.data["dir"] = f"/private/{own}"
    refuse_paths(draft, word, made.data)
    draft.emit("-object", made.value())


def _memory(draft: Draft, word: Word, made: Properties) -> None:
    """reserve=off makes QEMU read /proc/sys/vm/overcommit_memory. Source: util/mmap-alloc.c, QEMU 7.2."""
    if made.text("reserve") not in ("", "on", "yes", "true", "y"):
        draft.note(word, "reserve= is left out: QEMU sees no /proc to learn whether the host can do it")
        del made.data["reserve"]
    refuse_paths(draft, word, made.data)
    draft.emit("-object", made.value())


def _id(word: Word, made: Properties) -> str:
    """Return the object's id, which becomes part of a file's name. Source: id_wellformed, util/id.c."""
    name = made.text("id")
    if not name[:1].isalpha() or not name.isascii() or not all(char.isalnum() or char in "-._" for char in name):
        raise error(
            word, f"id={name} is no name for an object", fix="begin with a letter, go on with those, digits, - . _"
        )
    return name


def _authz_file(draft: Draft, word: Word, made: Properties) -> None:
    made.data["filename"] = draft.private(word, made.text("filename"), role=f"authz-{_id(word, made)}")
    if made.text("refresh") not in ("", "off", "no", "false", "n"):
        draft.note(word, "refresh= has no effect: QEMU has a copy of the list as it is now")
    made.data["refresh"] = False if made.json else "off"
    draft.emit("-object", made.value())


def _random(draft: Draft, word: Word, made: Properties) -> None:
    """Hand in the node; QEMU reads it without blocking. Source: backends/rng-random.c, QEMU 7.2."""
    path = made.text("filename") or _RANDOM
    if not is_own_set(path):
        opened = draft.file(word, path, role=f"rng-{_id(word, made)}", access="ro", kinds=("char",))
        made.data["filename"] = draft.fdset(opened.number)
    draft.emit("-object", made.value(), dry=("-object", f"rng-builtin,id={made.text('id')}"))


def _vhost_crypto(draft: Draft, word: Word, made: Properties) -> None:
    refuse_paths(draft, word, made.data)
    draft.emit("-object", made.value(), dry=("-object", f"cryptodev-backend-builtin,id={made.text('id')}"))


def _threads(draft: Draft, word: Word, made: Properties) -> None:
    """Setting an affinity is a system call that ends QEMU 7.2 (-sandbox resourcecontrol=deny)."""
    for key in made.data:
        if key.partition(".")[0] in ("cpu-affinity", "node-affinity"):
            draft.refuse(
                word, f"{key}: a device model may not choose its processors", fix="set cpuset.cpus of its cgroup"
            )
    draft.emit("-object", made.value())


def _iommufd(draft: Draft, word: Word, made: Properties) -> None:
    if not made.data.get("fd"):
        draft.refuse(word, "QEMU has no /dev/iommu", fix="open it yourself and write fd=N")
    made.data["fd"] = str(draft.inherited(word, made.text("fd"), role=f"iommufd-{_id(word, made)}"))
    draft.emit("-object", made.value(), dry=())


def _igvm(draft: Draft, word: Word, made: Properties) -> None:
    made.data["file"] = draft.private(word, made.text("file"), role=f"igvm-{_id(word, made)}")
    draft.emit("-object", made.value())


_KINDS = {
    "secret": _secret,
    **dict.fromkeys(("memory-backend-memfd", "memory-backend-ram"), _memory),
    "tls-creds-x509": _credentials,
    "tls-creds-anon": _credentials,
    "tls-creds-psk": _credentials,
    "authz-list-file": _authz_file,
    "authz-listfile": _authz_file,  # its name in qapi/qom.json; QEMU 7.2 can make it by neither
    "rng-random": _random,
    "cryptodev-vhost-user": _vhost_crypto,
    "thread-context": _threads,
    "iommufd": _iommufd,
    "igvm-cfg": _igvm,
}

HANDLERS = {"object": _object}
