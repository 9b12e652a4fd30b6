# SPDX-License-Identifier: Apache-2.0
"""The folder that becomes QEMU's root while it starts: exactly the files that this QEMU, for this machine, loads.

Nobody keeps a list. The machine is started once, stopped at its first instruction, in the same jail but over the
host's own program folders and without disks, and three witnesses tell what was opened: the dynamic linker
(LD_DEBUG=files) names the libraries and modules, QEMU (-trace load_file) the firmware, and the plan the program.
Those are copied; the program's copy may be executed but not read, which makes the kernel treat the process as not
dumpable (would_dump() in fs/exec.c). The copy is used until any of the originals changes.

There is one such folder for every set of devices. They share what they have in common by hard links, and those that
have not been used for long are removed when there are many.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time

from depriv.durable import is_beside, locked
from depriv.errors import HostError
from depriv.qemu.cmdline import PRIVATE
from depriv.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from depriv.assembly import Launch

_MANIFEST = "manifest.json"
_VERSION = 1
_LOCK_TIMEOUT_S = 90.0  # whoever holds it does a dry run, which has its own deadlines
_KEPT_MAX = 32
_IN_USE_S = 600.0  # longer than any start takes from the choice of its copy until that is bound


class Source(Record):
    """One file of the host that was copied, as it was then."""

    path: str
    size: int
    mtime_ns: int
    ino: int


def ensure(launch: Launch, discover: Callable[[], str]) -> None:
    """Have ``launch.runtime`` there and up to date.

    Args:
        launch: What is about to start.
        discover: Does the dry run and returns what QEMU and the dynamic linker printed.

    Raises:
        HostError: the folder cannot be made, or somebody else could have written in it.
    """
    if _is_current(launch):
        return
    with _locked(os.path.dirname(launch.runtime)):
        if not _is_current(launch):  # another start may have made it while this one waited
            files = files_loaded(discover(), launch.plan.steps[-1].as_dict()["path"])
            _build(launch, files)


@contextlib.contextmanager
def _locked(parent: str) -> Generator[None]:
    """Make the folder of all copies and let nobody else change what is in it.

    Two starts that each made a copy would pull it from under each other: one removes what the other's jail is binding.
    """
    try:
        os.makedirs(os.path.dirname(os.path.dirname(parent)), 0o755, exist_ok=True)
        for folder in (os.path.dirname(parent), parent):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)
                os.chmod(folder, 0o755)  # noqa: S103 (whatever the caller's umask: QEMU reads here)
        _check_owner(parent)
    except OSError as error:
        raise HostError(f"cannot use {parent}", fix="run this as root, on a host where /var is writable") from error
    with locked(f"{parent}.lock", "the copies of QEMU's files", timeout_s=_LOCK_TIMEOUT_S):
        yield


def _is_current(launch: Launch) -> bool:
    """Tell whether the folder is whole, root's, its program unreadable, and every original as it was."""
    try:
        with open(f"{launch.runtime}/{_MANIFEST}", "rb") as file:
            data = json.load(file)
        if data["version"] != _VERSION or data["key"] != list(launch.runtime_key):
            return False
        _check_owner(launch.runtime)
        for path, size, mtime_ns, ino in data["sources"]:
            have = os.stat(path)
            if (have.st_size, have.st_mtime_ns, have.st_ino) != (size, mtime_ns, ino):
                return False
        if os.stat(launch.runtime).st_mode & 0o7777 != 0o755:
            return False
        program = os.stat(launch.runtime + data["program"])
        if program.st_mode & 0o7777 != 0o111 or program.st_uid != 0:
            raise HostError(
                f"{launch.runtime}{data['program']} can be read: QEMU would be dumpable",
                cause=f"its mode is {program.st_mode & 0o7777:04o}, it has to be 0111, owner root",
                fix=f"find out who changed it, then: rm -r {launch.runtime}",
            )
        _note_use(launch.runtime)
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError):
        return False
    return True


def _note_use(folder: str) -> None:
    """Write down the time: see ``_remove_unused``, which may have been faster."""
    try:
        os.utime(f"{folder}/{_MANIFEST}")
    except FileNotFoundError:
        raise
    except OSError:  # on a read-only file system nothing is removed, either
        pass


def _check_owner(path: str) -> None:
    """Refuse a folder that somebody other than root made, or can write in, or the folders above it."""
    while True:
        have = os.lstat(path)
        if stat.S_ISLNK(have.st_mode):
            raise HostError(f"{path} is a symbolic link, which could come to lead elsewhere", fix=f"rm {path}")
        sticky = have.st_mode & 0o1000
        if have.st_uid != 0 or (have.st_mode & 0o022 and not sticky):
            raise HostError(
                f"{path} can be written by somebody other than root",
                cause=f"owner {have.st_uid}, mode {have.st_mode & 0o7777:04o}",
                fix=f"chown root:root {path}; chmod go-w {path}; rm -r what depriv keeps in it",
            )
        if path == "/":
            return
        path = os.path.dirname(path)


def files_loaded(output: str, program: str) -> tuple[str, ...]:
    """Return the paths, as opened, that the dry run's output names, the program first.

    Lines that matter: ``calling init: PATH`` and ``file=PATH [0];  dynamically loaded by`` (ld.so(8), LD_DEBUG=files,
    glibc 2.36), ``load_file name N location PATH`` (util/trace-events, QEMU 7.2).
    """
    found: dict[str, None] = {program: None}
    for line in output.splitlines():
        path = ""
        if "\tcalling init: " in line:
            path = line.partition("\tcalling init: ")[2].strip()
        elif " location " in line and "load_file name " in line:
            path = line.partition(" location ")[2].strip()
        # What lies below /private is the domain's own: it is copied for each start.
        if path.startswith("/") and not path.startswith(f"{PRIVATE}/"):
            found[os.path.normpath(path)] = None
    return tuple(found)


def _build(launch: Launch, files: tuple[str, ...]) -> None:
    """Copy the files beside, then rename the whole: a half-made folder is never used."""
    import shutil  # noqa: PLC0415 (only the first start of its kind pays for it)

    parent = os.path.dirname(launch.runtime)
    beside = f"{launch.runtime}.{os.getpid()}"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        sources: list[tuple[str, int, int, int]] = []
        copied = _copied(parent)
        for number, path in enumerate(files):
            sources.append(_copy(beside, path, mode=0o111 if number == 0 else 0o555, copied=copied))
        for name in {step.source.rpartition("/")[2] for step in launch.plan.steps if type(step).__name__ == "BindTree"}:  # type: ignore[union-attr]
            os.makedirs(f"{beside}/{name}", 0o755, exist_ok=True)
        for folder, _folders, _files in os.walk(beside):
            os.chmod(folder, 0o755)  # noqa: S103 (as above)
        data = {"version": _VERSION, "key": launch.runtime_key, "program": files[0], "sources": sources}
        with open(f"{beside}/{_MANIFEST}", "x", encoding="utf-8") as file:
            json.dump(data, file)
            os.fchmod(file.fileno(), 0o644)  # it decides whether the copy is stale: nobody else's to write
        _remove_stale(parent)
        shutil.rmtree(launch.runtime, ignore_errors=True)
        os.rename(beside, launch.runtime)
        _remove_unused(parent)
    except OSError as error:
        raise HostError(f"cannot make {launch.runtime}", fix="see that there is room for 60 MB") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _copy(
    root: str, path: str, *, mode: int, copied: dict[tuple[str, int, int, int], str]
) -> tuple[str, int, int, int]:
    """Copy one file to where QEMU will look for it, and to where the path leads: libraries are opened by link names.

    A copy that another folder has of the very same file is linked instead.
    """
    import shutil  # noqa: PLC0415 (as above)

    real = os.path.realpath(path)
    have = os.stat(real)
    # The name it is opened by, not the real one: a link that leads elsewhere by now makes the copy stale.
    source = (path, have.st_size, have.st_mtime_ns, have.st_ino)
    inside = os.path.realpath(os.path.dirname(path)) + "/" + os.path.basename(path)
    target = root + inside
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    if not (source in copied and _link(copied[source] + inside, target, size=have.st_size, mode=mode)):
        shutil.copyfile(real, target)
        os.chmod(target, mode)
    return source


def _link(existing: str, target: str, *, size: int, mode: int) -> bool:
    """Link a copy that is as this one would be, or return False: there is none, or it has links enough."""
    try:
        have = os.lstat(existing)
        if (have.st_mode, have.st_uid, have.st_size) != (stat.S_IFREG | mode, 0, size):
            return False
        os.link(existing, target, follow_symlinks=False)
    except OSError:
        return False
    return True


def _copied(parent: str) -> dict[tuple[str, int, int, int], str]:
    """Return for each file that was copied before the folder of a copy."""
    found: dict[tuple[str, int, int, int], str] = {}
    for name in os.listdir(parent):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(f"{parent}/{name}/{_MANIFEST}", "rb") as file:
                sources = json.load(file)["sources"]
            found |= dict.fromkeys(map(tuple, sources), f"{parent}/{name}")
    return found


def _remove_unused(parent: str) -> None:
    """Keep as many folders as are of use; those used last stay. The lock is held.

    A start takes no lock for a folder that is there already; it notes the time. So the time is looked at again once
    the folder has no name any more by which a start could find it.
    """
    import shutil  # noqa: PLC0415 (as above)

    used: list[tuple[int, str]] = []
    for name in os.listdir(parent):
        with contextlib.suppress(OSError):
            if "." not in name:
                used.append((os.stat(f"{parent}/{name}/{_MANIFEST}").st_mtime_ns, f"{parent}/{name}"))
    used.sort(reverse=True)
    for mtime_ns, folder in used[_KEPT_MAX:]:
        if time.time() - mtime_ns / 1e9 < _IN_USE_S:
            continue
        aside = f"{folder}.{os.getpid()}"
        os.rename(folder, aside)
        if os.stat(f"{aside}/{_MANIFEST}").st_mtime_ns != mtime_ns:
            os.rename(aside, folder)
        else:
            shutil.rmtree(aside, ignore_errors=True)


def half_made(cache_dir: str) -> tuple[str, ...]:
    """Return the folders that a command was making when it was killed."""
    parent = f"{cache_dir}/runtime"
    try:
        names = os.listdir(parent)
    except OSError:
        return ()
    return tuple(f"{parent}/{name}" for name in names if is_beside(name))


def _remove_stale(parent: str) -> None:
    """Remove copies whose program has changed: they will never be used again. Running guests need none of them."""
    import shutil  # noqa: PLC0415 (as above)

    for name in os.listdir(parent):
        folder = f"{parent}/{name}"
        try:
            with open(f"{folder}/{_MANIFEST}", "rb") as file:
                sources = json.load(file)["sources"]
            path, size, mtime_ns, ino = sources[0]
            have = os.stat(path)
            if (have.st_size, have.st_mtime_ns, have.st_ino) == (size, mtime_ns, ino):
                continue
        except FileNotFoundError:
            if "." in name:
                continue  # another command is making it
        except (OSError, ValueError, KeyError, IndexError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
