# SPDX-License-Identifier: Apache-2.0
"""The device model of one Xen domain: libxl's command line, confined and audited before libxl gets to speak to it."""

from __future__ import annotations

import contextlib
import os
import sys

from depriv import detect, foreground, xenstore
from depriv.cgroup import folder_name
from depriv.ending import finish
from depriv.errors import ConfigError, PlanError
from depriv.host import CACHE_DIR, STATE_DIR
from depriv.identity import RANGE_BASE
from depriv.qemu.draft import Allowed
from depriv.registry import Registry
from depriv.spawn import Jail
from depriv.xenprobe import listener

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Final

    from depriv.assembly import Launch
    from depriv.entry import Entry
    from depriv.host import Holding, Host
    from depriv.launching import Running
    from depriv.qemu.draft import Request

_LIBXL: Final = "libxl-cmd"  # id of libxl's monitor
_REAPER_LOCK: Final = "/run/xen/dm-reaper-lock"  # libxl's: two reapers at once would kill each other


class DeviceModel:
    """One start."""

    def __init__(self, words: tuple[str, ...]) -> None:
        """Take libxl's words.

        Raises:
            DeprivError: this is no Xen host, xenstore does not answer, the domain is not ours, or is not restricted.
        """
        self._words = words
        self._domid = _domid(words)
        if not xenstore.is_dom0():
            raise PlanError("this host does not run Xen, or this is not its domain 0", fix="use depriv run, or create")
        if "-xen-domid-restrict" not in words:
            raise ConfigError(
                "the domain's device model is not to be restricted",
                cause="libxl gives no -xen-domid-restrict",
                fix="add to its configuration: dm_restrict = 1",
            )
        with xenstore.Xenstore() as store:
            base = f"/local/domain/{self._domid}"
            recorded = store.read(f"{base}/image/device-model-pid")
            self._kill_uid = store.read(f"{base}/image/device-model-kill-uid")
            served = _served(store, self._domid)
        if recorded != str(os.getpid()):
            raise ConfigError(
                f"domain {self._domid} is not ours",
                cause=f"libxl has recorded {'no process' if recorded is None else f'process {recorded}'} for it",
                fix="depriv-dm is started by libxl; start the domain with xl create",
            )

        if served:
            raise ConfigError(
                f"disk {served} would be served by a QEMU that cannot be confined",
                cause="a PV disk whose back end is QEMU (qdisk) needs xenstore and the guest's grants while it runs",
                fix="make it raw: then blkback in domain 0 serves it; or give it an hd vdev",
            )

    def run(self, program: str) -> int:
        """Start QEMU, let libxl speak to it, and return its exit status at its end."""
        registry = Registry(STATE_DIR)
        registry.prepare()
        self._clear(registry)
        heard = listener(self._words)
        if heard is None:
            raise _another_version("it hands in no monitor")
        where = str(heard.getsockname())
        request = understand(self._words, where, self._domid)
        options = foreground.Options(name="", user=self._user())
        wish = _Wish(program, request, options, registry, CACHE_DIR)
        wish.place(self._domid, heard, self._kill_uid or "")
        with contextlib.suppress(OSError):
            os.rmdir(f"/run/xen/qemu-root-{self._domid}")  # libxl's, for -chroot: it would stay for ever
        return foreground.supervise(wish, registry, cache_dir=CACHE_DIR, paused=True, say=_say)

    def _clear(self, registry: Registry) -> None:
        """Clear away what is left of an earlier domain with this number: Xen says it is free."""
        entry = registry.read(self._domid)
        if entry is not None:
            with registry.locked_domain(self._domid), Jail() as jail:
                finish(entry, registry, jail)

    def _user(self) -> str:
        """Return the user that libxl wants QEMU to run as by name; "": one of the range."""
        for option, value in zip(self._words, self._words[1:], strict=False):
            named = value if option == "-runas" else value.partition("user=")[2] if option == "-run-with" else ""
            if named and not named.replace(":", "").isdecimal():
                return named
        return ""


def _libxl(domid: int) -> str:
    return f"/libxl/{domid}/device/vkbd"


def _served(store: xenstore.Xenstore, domid: int) -> str:
    """Return a PV disk that libxl wants this QEMU to serve, or ""."""
    base = f"/libxl/{domid}/device/vbd"
    for name in store.list(base):
        vdev = store.read(f"{base}/{name}/dev") or ""
        if vdev.startswith("xvd") and store.read(f"{base}/{name}/type") == "qdisk":
            return vdev
    return ""


def _domid(words: tuple[str, ...]) -> int:
    at = words.index("-xen-domid") + 1
    if at == len(words) or not words[at].isdecimal() or int(words[at]) == 0:
        raise _another_version("-xen-domid has no number")
    return int(words[at])


def _another_version(cause: str) -> ConfigError:
    return ConfigError("this is not the command line of a libxl that is known", cause=cause, fix="use Xen 4.17 to 4.20")


def understand(words: tuple[str, ...], monitor: str, domid: int) -> Request:
    """Return what libxl's words come to, its monitor on a socket of ours."""
    changed = tuple(
        f"socket,id={_LIBXL},path={monitor.replace(',', ',,')},server=on,wait=off"
        if word.startswith(f"socket,id={_LIBXL},")
        else word
        for word in words
    )
    return foreground.understand_with(changed, Allowed(xen=True), cwd="/").replace(domid=domid)


class _Wish(foreground.Wish):
    """A Xen domain's device model as something to start."""

    _domid = 0

    may_move = False  # its domid, and with it its uid, are Xen's choice

    def place(self, domid: int, heard: socket.socket, kill_uid: str) -> None:
        """Take which domain it is, libxl's listening socket, and the uid that libxl will kill."""
        self._domid = domid
        self._kill_uid = kill_uid
        self._heard = heard
        self.run = self.run.replace(reaper_lock=_REAPER_LOCK)

    def domid(self) -> int:
        """Return Xen's; the name is that of -name, unless another has it."""
        self.choose_name(self._domid, {entry.name for entry in self._registry.entries()})
        return self._domid

    def look(self, domid: int, others: tuple[Holding, ...]) -> Host:
        host = detect.look_host(
            program=self.program, device_model_user=self._options.user, domid=domid, holdings=others
        )
        folder = self._registry.folder
        program = host.program.replace(seccomp=detect.has_seccomp(host.program.path))
        return host.replace(
            program=program,
            xen_nodes=xenstore.nodes(),
            memory_mib=0,  # the guest's is Xen's, not domain 0's
            state_dir=folder,
            cgroup_folder=folder_name(folder),
            cache_dir=self._cache_dir,
        )

    def plan(self, host: Host) -> Launch:
        launch = super().plan(host)
        if self._kill_uid != str(launch.identity.uid):
            raise PlanError(
                f"domain {self._domid} would run as {launch.identity.uid}, and libxl is to kill "
                f"{f'uid {self._kill_uid}' if self._kill_uid else 'nobody by uid'}",
                fix=f"have one user {RANGE_BASE}, and remove xen-qemuuser-shared; see depriv doctor",
            )
        return launch

    def prepare(self, entry: Entry) -> None:
        """Open what the toolstack opens, and take the PV keyboard away.

        QEMU would serve it through xenstore, which a restricted QEMU has no more. QEMU 10 dies of it: it takes the
        silence for a device that went, and finds it again by the same name (hw/xen/xen-legacy-backend.c). libxl
        leaves it out with vkb_device=0, and a guest has its emulated keyboard in any case.
        """
        super().prepare(entry)
        base = f"/local/domain/{self._domid}"
        with xenstore.Xenstore() as store:
            for path in (f"/local/domain/0/backend/vkbd/{self._domid}", f"{base}/device/vkbd", _libxl(self._domid)):
                store.remove(path)

    def loaded(self, running: Running) -> None:
        """Have QEMU open its images for writing, and lock them, so that the audit sees it: on Xen it does so at cont.

        The guest itself does not run: Xen holds its domain until libxl lets it go.
        """
        running.cont()
        running.monitor.execute("stop", timeout_s=10)

    def let_run(self, running: Running, *, paused: bool) -> None:
        """Hand over whoever already waits at libxl's socket, which ours has taken the place of."""
        del paused  # libxl says cont
        self._heard.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client, _ = self._heard.accept()
                with client:
                    running.monitor.execute("getfd", {"fdname": "libxl"}, fds=(client.fileno(),), timeout_s=10)
                    running.monitor.execute("add_client", {"protocol": _LIBXL, "fdname": "libxl"}, timeout_s=10)
        self._heard.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 (libxl has made it the device model's log)
