# SPDX-License-Identifier: Apache-2.0
"""The emulated Xen host on disk: hypervisor, kernel, initramfs and root disk, from Debian's packages alone.

Built when it is absent, in about 40 seconds, below ``$DEPRIV_XENLAB``, else ``~/.cache/depriv-tests/xenlab``. The
folder's name has a digest of what it is made from, this package's files; a newer package in the archive makes no new
one. Builds at the same time wait for each other; what has its final name is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import lzma
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import cpio, iso
from tests.support.xenlab import bootsector

from depriv.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
SUITES = {"bookworm": "4.17", "trixie": "4.20"}  # Debian's suite -> its version of Xen
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "zstd": "zstd",
    "mke2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "gcc": "gcc",
}
PACKAGES = (
    *("xenstore-utils", "qemu-system-xen", "qemu-utils", "python3", "busybox-static", "kmod", "iproute2", "procps"),
    *("passwd", "adduser", "libcap2-bin", "util-linux", "mount", "strace"),
)
# For the root disk's sake in the initramfs; the rest in dom0, with what they depend on.
EARLY_MODULES = ("virtio_pci", "virtio_blk", "ext4")
MODULES = (
    *EARLY_MODULES,
    *("virtio_net", "xen-privcmd", "xen-evtchn", "xen-gntdev", "xen-gntalloc", "xenfs", "xen-blkback", "xen-netback"),
    *("loop", "nbd", "tun", "bridge", "veth", "dummy", "macvtap", "overlay", "isofs", "fuse", "nf_tables"),
)
DISK_MB = 1400
USERS = (
    # Xen's docs/features/qemu-deprivilege.pandoc, "Setup".
    "adduser --quiet --system --uid 131072 --group --no-create-home xen-qemuuser-range-base",
    "adduser --quiet --system --group --no-create-home xen-qemuuser-reaper",
)
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
KEPT_S = 14 * 86400.0


class Image(Record):
    """A built host; all paths are absolute."""

    suite: str
    folder: str

    @property
    def hypervisor(self) -> str:
        """Xen, unpacked: QEMU loads it as a multiboot kernel."""
        return f"{self.folder}/xen"

    @property
    def kernel(self) -> str:
        """dom0's Linux."""
        return f"{self.folder}/vmlinuz"

    @property
    def initramfs(self) -> str:
        """Of dom0."""
        return f"{self.folder}/initrd"

    @property
    def disk(self) -> str:
        """The root disk, qcow2; never written."""
        return f"{self.folder}/disk.qcow2"

    @property
    def python(self) -> str:
        """A root directory with the suite's Python, for the machine itself to byte-compile with."""
        return f"{self.folder}/python"


def cache_folder() -> Path:
    """Return where images are kept, made if need be."""
    chosen = os.environ.get("DEPRIV_XENLAB")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(chosen) if chosen else Path(home) / "depriv-tests" / "xenlab"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path.resolve()


def missing() -> list[str]:
    """Return the Debian packages that are needed to build and to run, and are not here."""
    return sorted({package for tool, package in TOOLS.items() if shutil.which(tool, path=PATH) is None})


def ensure(suite: str) -> Image:
    """Return the image of ``suite``, built now if it is not there.

    Raises:
        RuntimeError: a tool is missing or failed, with what it said. What was half built is removed.
    """
    digest = _digest(suite)
    final = cache_folder() / f"{suite}-{digest}"
    made = Image(suite=suite, folder=str(final))
    with locked(f"{suite}.lock"):
        if not final.exists():
            _remove_old(suite)
            with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=f"build-{suite}-") as work:
                _build(suite, Path(work))
                os.rename(f"{work}/result", final)
        os.utime(final)
    return made


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock of the cache folder; whoever else wants it waits."""
    with (cache_folder() / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(argv: list[str], *, timeout_s: float = 600, cwd: str | None = None) -> str:
    """Return what a command printed.

    Raises:
        RuntimeError: it is missing, it failed, or it took too long.
    """
    environment = {"PATH": PATH, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    environment |= {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=environment, check=False, capture_output=True, text=True, timeout=timeout_s
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"the emulated Xen host: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} failed:\n{done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _digest(suite: str) -> str:
    """Return what tells images apart: a digest of all that this package puts into one."""
    parts = [suite.encode()]
    sources = [*HERE.glob("inside/*"), HERE / "image.py", HERE / "bootsector.S", HERE / "bootsector.py"]
    for path in sorted(sources):
        if path.is_file():
            parts += [path.name.encode(), path.read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def _remove_old(suite: str) -> None:
    """Remove what a killed build left, and images that nobody used for two weeks; the caller holds the suite's lock."""
    for path in cache_folder().glob(f"build-{suite}-*"):
        shutil.rmtree(path)
    for path in cache_folder().glob(f"{suite}-*"):
        if time.time() - path.stat().st_mtime > KEPT_S:
            shutil.rmtree(path)


def _build(suite: str, work: Path) -> None:
    """Make everything in ``work``/result."""
    if missing():
        raise RuntimeError(f"the emulated Xen host needs {' '.join(missing())}")
    root, result = work / "root", work / "result"
    result.mkdir()
    _debootstrap(suite, root, work / "debs")
    _unpack_kernel(root, work / "debs", result)
    _install_inside(root)
    _install_guests(root)
    _keep_python(root, result / "python")
    run(
        [
            *("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0", "-d", str(root)),
            *(str(work / "disk.raw"), f"{DISK_MB}M"),
        ]
    )
    run(["qemu-img", "convert", "-O", "qcow2", str(work / "disk.raw"), str(result / "disk.qcow2")])


def mirrors(suite: str) -> list[str]:
    """Return the lines of sources.list(5) for ``suite``, with the mirrors that this machine's apt uses.

    Raises:
        RuntimeError: apt has no Debian mirror.
    """
    said = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"])
    known = sorted({line.rstrip("/") for line in said.splitlines()})
    main = [uri for uri in known if uri.endswith("/debian")]
    security = [uri for uri in known if uri.endswith("/debian-security")]
    if not main:
        raise RuntimeError(f"apt knows no Debian mirror here: {known}")
    lines = [f"deb {main[0]} {suite} main", f"deb {main[0]} {suite}-updates main"]
    return [*lines, *(f"deb {uri} {suite}-security main" for uri in security[:1])]


def _debootstrap(suite: str, root: Path, debs: Path) -> None:
    """Make the root file system; fetch kernel and hypervisor without installing them.

    To install them would run update-initramfs and GRUB's scripts, and bring 350 MB of modules.
    """
    version = SUITES[suite]
    packages = ",".join((f"xen-utils-{version}", *PACKAGES))
    depends = "apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: //p' | head -n 1"
    fetch = f"mkdir /debs && cd /debs && apt-get -qq download $({depends}) xen-hypervisor-{version}-amd64"
    left_out = ("man", "doc", "locale", "info")
    debs.mkdir()
    run(
        ["mmdebstrap", "--quiet", "--mode=root", "--variant=apt", "--format=directory", f"--include={packages}"]
        + ["--aptopt=APT::Install-Recommends false", "--aptopt=APT::Sandbox::User root"]
        + [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in left_out]
        + [f'--customize-hook=chroot "$1" sh -c "{fetch.replace("$", chr(92) + "$")}"']
        + [f"--customize-hook=sync-out /debs {debs}"]
        + ['--customize-hook=rm -rf "$1"/debs "$1"/var/lib/apt/lists/* "$1"/var/cache/*']
        + [*(f'--customize-hook=chroot "$1" {words}' for words in USERS)]
        + [suite, str(root), *mirrors(suite)]
    )


def _unpack_kernel(root: Path, debs: Path, result: Path) -> None:
    """Take hypervisor, kernel and modules out of their packages, and make the initramfs."""
    unpacked = root / "unpacked"
    for package in debs.glob("*.deb"):
        run(["dpkg-deb", "-x", str(package), str(unpacked)])
    (hypervisor,) = unpacked.glob("boot/xen-*-amd64.gz")
    (result / "xen").write_bytes(gzip.decompress(hypervisor.read_bytes()))
    (kernel,) = unpacked.glob("boot/vmlinuz-*")
    shutil.copyfile(kernel, result / "vmlinuz")
    release = kernel.name.removeprefix("vmlinuz-")
    (modules,) = unpacked.glob(f"**/lib/modules/{release}")
    base = "/" + str(modules.parents[2].relative_to(root))  # /unpacked, from Debian 13 on /unpacked/usr
    run(["chroot", str(root), "depmod", "-b", base, release])
    ours = root / "usr/lib/modules" / release
    for file in _in_load_order(root, base, release, MODULES):
        target = ours / file.relative_to(modules)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        shutil.copyfile(modules / name, ours / name)
    run(["chroot", str(root), "depmod", release])
    early = _in_load_order(root, base, release, EARLY_MODULES)
    (result / "initrd").write_bytes(_initramfs(root, early))
    shutil.rmtree(unpacked)


def _in_load_order(root: Path, base: str, release: str, names: tuple[str, ...]) -> list[Path]:
    """Return the files of modules and what they depend on, each after its dependencies; built-in ones have none."""
    found: dict[Path, None] = {}
    for name in names:
        said = run(["chroot", str(root), "modprobe", "-d", base, "-S", release, "--show-depends", name])
        for line in said.splitlines():
            kind, path = line.split()[:2]
            if kind == "insmod":
                found[root / path.lstrip("/")] = None
    return list(found)


def _initramfs(root: Path, modules: list[Path]) -> bytes:
    """Return the archive, not compressed: to unpack is slow under emulation."""
    plain: dict[str, bytes] = {}
    for path in modules:
        data = path.read_bytes()
        if path.suffix == ".xz":  # from Debian 13 on; busybox insmod wants them plain
            data = lzma.decompress(data)
        plain[path.name.removesuffix(".xz")] = data
    busybox = (root / "usr/bin/busybox").read_bytes()
    return cpio.archive(
        [
            *(cpio.directory(name) for name in ("bin", "dev", "modules", "new")),
            cpio.character_device("dev/console", 5, 1),
            cpio.file("bin/busybox", busybox, 0o755),
            cpio.file("init", (HERE / "inside/initramfs-init").read_bytes(), 0o755),
            cpio.file("modules/order", "\n".join(plain).encode() + b"\n"),
            *(cpio.file(f"modules/{name}", data) for name, data in plain.items()),
        ]
    )


def _install_inside(root: Path) -> None:
    """Put our own files into dom0, byte-compiled: Python's compiler is slow under emulation."""
    package = root / "usr/lib/xenlab/inside"
    package.mkdir(parents=True)
    programs = {"lab-init": "usr/sbin", "lift-dm": "usr/lib/xenlab", "record_dm.py": "usr/lib/xenlab"}
    for name, folder in programs.items():
        shutil.copyfile(HERE / "inside" / name, root / folder / name)
        (root / folder / name).chmod(0o755)
    for path in set(HERE.glob("inside/*.py")) - {HERE / "inside/record_dm.py"}:
        shutil.copyfile(path, package / path.name)
    compiled = ["/usr/lib/xenlab", *("/" + str(path.relative_to(root)) for path in root.glob("usr/lib/python3*"))]
    compile_python(root, compiled)


def compile_python(root: Path, folders: list[str]) -> None:
    """Byte-compile what is in ``folders`` of a root directory, for good: the source's time does not matter then."""
    # Some of Debian's files are for other versions: their failure is no failure.
    words = ["-m", "compileall", "-q", "-q", "--invalidation-mode", "unchecked-hash", *folders]
    argv = ["chroot", str(root), "/usr/bin/python3", "-I", "-S", *words]
    subprocess.run(argv, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)


def _install_guests(root: Path) -> None:
    """Make /guests: disks that nobody has used yet, and two CDs."""
    guests = root / "guests"
    guests.mkdir(mode=0o755)
    (guests / "tick.img").write_bytes(bootsector.disk(writes=False))
    (guests / "write.img").write_bytes(bootsector.disk(writes=True))
    for name, label in (("one.iso", "ISO-ONE"), ("two.iso", "ISO-TWO")):
        (guests / name).write_bytes(iso.iso({"HELLO.TXT": b"hello\n"}, label=label))


def _keep_python(root: Path, kept: Path) -> None:
    """Copy the suite's Python and the libraries it is linked with."""
    said = run(["chroot", str(root), "ldd", "/usr/bin/python3"])
    libraries = [word for line in said.splitlines() for word in line.split() if word.startswith("/")]
    for name in ("/usr/bin/python3", *libraries):
        target = kept / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name.lstrip("/"), target)  # follows links
    for path in root.glob("usr/lib/python3.*"):
        shutil.copytree(path, kept / path.relative_to(root), symlinks=True)
    (kept / "tmp").mkdir()
