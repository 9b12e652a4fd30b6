# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there whenever their writer dies, and locks that say who has them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.entries import killed_at

from depriv import durable
from depriv.durable import BusyError, DamagedError
from depriv.errors import HostError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

OLD, NEW = {"is": "old", "more": "x" * 500}, {"is": "new"}
AT_MOST = 500  # calls that one write makes, and then some


def put(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(0o600)
    return str(path)


def test_what_is_written_is_read_from_either_file(tmp_path: Path) -> None:
    paths = (str(tmp_path / "copy"), str(tmp_path / "state"))
    durable.write(paths, OLD)
    durable.write(paths, NEW)
    assert [durable.load(path) for path in paths] == [NEW, NEW]
    assert sorted(os.listdir(tmp_path)) == ["copy", "state"]
    assert {os.stat(path).st_mode & 0o7777 for path in paths} == {0o600}


def test_file_that_is_not_there_is_no_damage(tmp_path: Path) -> None:
    assert durable.load(str(tmp_path / "none")) is None
    assert durable.load(str(tmp_path / "no" / "folder")) is None


def test_file_cut_off_at_any_length_is_damaged_and_never_half_believed(tmp_path: Path) -> None:
    text = json.dumps({"version": 2, "name": "web", "nested": {"list": [1, 2, -3.5, None, True]}})
    path = tmp_path / "state"
    for length in range(len(text)):
        put(path, text[:length])
        with pytest.raises(DamagedError) as caught:
            durable.load(str(path))
        assert caught.value.cause, length
    assert durable.load(put(path, text)) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [b"[]", b"null", b"7", b'"x"', b'{"a": 1} x', b"\0" * 4096, b"\xff\xfe{}", b'{"a": "\xff"}', b"[" * 100_000],
    ids=["list", "null", "number", "word", "more", "noughts", "utf-16", "latin-1", "deep"],
)
def test_text_that_is_no_object_is_damaged(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(DamagedError, match="is damaged"):
        durable.load(put(tmp_path / "state", text))


# What stands in place of a file


def link(path: Path) -> None:
    other = path.with_name("elsewhere")
    put(other, "{}")
    path.symlink_to(other)


def second_name(path: Path) -> None:
    put(path, "{}")
    os.link(path, path.with_name("second"))


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)  # the path may be longer than an address
        try:
            made.bind(path.name)
        finally:
            os.chdir("/")


def sparse(path: Path) -> None:
    put(path, "{}")
    os.truncate(path, 2 << 20)


def somebodys(path: Path) -> None:
    put(path, "{}")
    os.chown(path, 65534, 65534)


def device(path: Path) -> None:
    os.mknod(path, 0o20600, os.makedev(1, 5))  # /dev/zero: never ends


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "link": (link, "Too many levels of symbolic links"),
    "second name": (second_name, "has 2 names"),
    "fifo": (os.mkfifo, "is no regular file"),
    "socket": (bound_socket, "No such device or address"),
    "folder": (os.mkdir, "is no regular file"),
    "sparse": (sparse, "has 2097152 bytes"),
}
ROOTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "somebody's": (somebodys, "belongs to uid 65534"),
    "device": (device, "is no regular file"),
}


def check_damaged(path: Path, make: Callable[[Path], None], why: str) -> None:
    make(path)
    began = time.monotonic()
    with pytest.raises(DamagedError) as caught:
        durable.load(str(path))
    assert why in f"{caught.value.cause} {caught.value.__cause__}"
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("kind", list(ODD))
def test_what_is_no_file_of_ours_is_damaged_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    check_damaged(tmp_path / "state", *ODD[kind])


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("kind", list(ROOTS))
def test_what_only_root_could_have_put_there_is_damaged_all_the_same(tmp_path: Path, kind: str) -> None:
    check_damaged(tmp_path / "state", *ROOTS[kind])


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_who_may_not_read_is_told_to_be_root_and_not_that_it_is_damaged(tmp_path: Path) -> None:
    path = put(tmp_path / "state", "{}")
    assert durable.load(path) == {}
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        os.setresuid(65534, 65534, 65534)
        try:
            durable.load(path)
        except DamagedError:
            os._exit(1)
        except HostError as error:
            os._exit(0 if error.fix == "run this as root" else 2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "folder"])
def test_writing_replaces_whatever_stands_there_and_follows_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state"
    ODD[kind][0](path)
    others = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path) if name != "state"}
    durable.write((str(path),), NEW)
    assert durable.load(str(path)) == NEW
    assert {name: (tmp_path / name).read_bytes() for name in others} == others


# A writer that dies


def whole(path: str) -> str:
    """Return which of the two contents a file has."""
    found = durable.load(path)
    assert found in (OLD, NEW)
    return str(found["is"])


def test_writer_killed_at_any_call_leaves_the_old_or_the_new_whole_and_debris_that_is_known(tmp_path: Path) -> None:
    copy, state = str(tmp_path / "state.copy"), str(tmp_path / "state.json")
    seen: list[tuple[str, str]] = []
    for number in range(1, AT_MOST):
        durable.write((copy, state), OLD)
        killed = killed_at(number, lambda: durable.write((copy, state), NEW))
        seen.append((whole(copy), whole(state)))
        # Every name beside is known as debris by now: its writer is dead.
        for name in set(os.listdir(tmp_path)) - {"state.copy", "state.json"}:
            assert durable.is_beside(name), name
            (tmp_path / name).unlink()
        if not killed:
            break
    # In this order: the copy is never older than what is read first.
    assert list(dict.fromkeys(seen)) == [("old", "old"), ("new", "old"), ("new", "new")]
    assert len(seen) < AT_MOST - 1, "it never came to its end"


def test_writer_that_lives_leaves_no_debris_to_be_taken_from_it(tmp_path: Path) -> None:
    assert not durable.is_beside(f"state.json.1.{os.getpid()}")
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    assert durable.is_beside(f"state.json.1.{dead.pid}")
    for name in ("state.json", "state.copy", "lock", "reaper.lock", "qmp", ".5", "boot", "5", "x.", "x.\u0665"):
        assert not durable.is_beside(name), name
    del tmp_path


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
def test_write_that_fails_leaves_the_old_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    paths = (str(tmp_path / "copy"), str(tmp_path / "state"))
    durable.write(paths, OLD)

    def full(*_arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(HostError, match="cannot write") as caught:
            durable.write(paths, NEW)
    assert "df -h" in caught.value.fix
    assert [whole(path) for path in paths] == ["old", "old"]
    assert sorted(os.listdir(tmp_path)) == ["copy", "state"]


def test_what_is_too_much_to_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "state"
    durable.write((str(path),), OLD)
    with pytest.raises(HostError, match="cannot write") as caught:
        durable.write((str(path),), {"much": "x" * (1 << 20)})
    assert "nobody would read it" in caught.value.cause
    assert durable.load(str(path)) == OLD
    most: dict[str, Any] = {"much": "x" * ((1 << 20) - len(json.dumps({"much": ""})))}
    durable.write((str(path),), most)
    assert durable.load(str(path)) == most


def test_file_of_which_only_a_part_could_be_written_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "state")
    durable.write((path,), OLD)
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
        with pytest.raises(HostError) as caught:
            durable.write((path,), NEW)
    assert "No space left" in str(caught.value.__cause__)
    assert whole(path) == "old"


# Locks

HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(fd, fcntl.LOCK_EX)
if sys.argv[2] == "hand down" and os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(path: Path, how: str = "") -> Generator[int]:
    """Hold a lock in another process; with "hand down", in a child of the one that took it, which is gone."""
    argv = [sys.executable, "-c", HOLD, str(path), how]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        pid = int(process.stdout.readline())
        try:
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            process.stdin.close()


def refusal(path: Path, *, timeout_s: float = 0.2) -> BusyError:
    began = time.monotonic()
    with pytest.raises(BusyError) as caught, durable.locked(str(path), "the registry", timeout_s=timeout_s):
        pass
    assert timeout_s <= time.monotonic() - began < timeout_s + 3
    return caught.value


def test_lock_that_a_process_holds_is_refused_at_the_deadline_with_its_number_and_name(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as pid:
        error = refusal(path)
        assert error.what == "another command has been busy with the registry for 0 seconds"
        assert error.cause == f"process {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()}) holds {path}"
        assert error.fix == "wait for it, or end it"
    with durable.locked(str(path), "the registry", timeout_s=0):
        pass


def test_lock_that_is_only_tried_is_refused_at_once(tmp_path: Path) -> None:
    with holder(tmp_path / "lock"):
        assert refusal(tmp_path / "lock", timeout_s=0).what == "another command is busy with the registry"


def test_lock_of_a_stopped_process_is_refused_and_the_remedy_is_to_let_it_go_on(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as pid:
        os.kill(pid, signal.SIGSTOP)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "T":
            time.sleep(0.005)
        error = refusal(path)
        assert f"process {pid} (" in error.cause
        assert ", stopped) holds" in error.cause
        assert error.fix == f"let it go on: kill -CONT {pid}; or end it: kill -9 {pid}"


def test_lock_whose_taker_is_dead_is_told_by_the_child_that_has_it_still(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path, "hand down") as pid:
        assert refusal(path).cause.startswith(f"process {pid} (")
        os.kill(pid, signal.SIGKILL)
        with durable.locked(str(path), "the registry", timeout_s=5):
            pass


def test_lock_is_had_as_soon_as_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as pid:
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        began = time.monotonic()
        with durable.locked(str(path), "the registry"):
            assert 0.1 < time.monotonic() - began < 5


def test_who_merely_waits_for_the_lock_is_not_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # open, and nothing more
    try:
        with holder(path) as pid:
            cause = refusal(path).cause
            assert f"process {pid} " in cause
            assert f"process {os.getpid()} " not in cause
    finally:
        os.close(fd)


def test_lock_of_what_was_removed_meanwhile_is_not_had(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as pid:
        waits: list[Exception] = []

        def wait() -> None:
            try:
                with durable.locked(str(path), "domain 1", timeout_s=10):
                    pass
            except NotFoundError as error:
                waits.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        while f"{path}" not in {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}:
            time.sleep(0.005)
        path.unlink()
        os.kill(pid, signal.SIGKILL)
        thread.join(10)
    assert [str(error) for error in waits] == ["domain 1 is gone: it was removed meanwhile"]


def test_lock_of_a_folder_that_was_moved_away_to_be_removed_is_not_had(tmp_path: Path) -> None:
    """Who removed it may have been killed half-way; by now there may be another domain at its path."""
    path = tmp_path / "domain" / "lock"
    path.parent.mkdir()
    had: list[str] = []

    def wait() -> None:
        try:
            with durable.locked(str(path), "domain 7", timeout_s=10):
                had.append("it")
        except NotFoundError as error:
            had.append(str(error))

    with durable.locked(str(path), "domain 7"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.1)
        path.parent.rename(tmp_path / "gone-domain")
        path.parent.mkdir()
        with durable.locked(str(path), "the next domain 7"):
            pass
    waiting.join()
    assert had == ["domain 7 is gone: it was removed meanwhile"]


def test_lock_of_a_folder_that_is_gone_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError), durable.locked(str(tmp_path / "1" / "lock"), "domain 1"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "fifo", "socket", "folder"])
def test_lock_that_is_no_file_is_refused_at_once_and_told_how_to_look(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "lock"
    ODD[kind][0](path)
    began = time.monotonic()
    with (
        pytest.raises(HostError, match="cannot lock the registry") as caught,
        durable.locked(str(path), "the registry"),
    ):
        pass
    assert caught.value.fix in (f"rm {path}", f"see what it is: ls -l {path}")
    assert time.monotonic() - began < 2


def test_lock_is_not_inherited_by_what_is_started_meanwhile(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with durable.locked(path, "the registry"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with durable.locked(path, "the registry", timeout_s=0):
            pass
    finally:
        child.kill()
        child.wait()


def test_error_inside_gives_the_lock_back(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), durable.locked(path, "the registry"):
        raise ZeroDivisionError
    assert len(os.listdir("/proc/self/fd")) == before
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
