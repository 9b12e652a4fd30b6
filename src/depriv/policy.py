# SPDX-License-Identifier: Apache-2.0
"""What has become of a guest, and what its configuration wants done about it. Pure.

What happened is one of ``ENDS``: "poweroff", "reboot", "crash" (of the guest or of its QEMU) or "host" (somebody sent
QEMU a SIGTERM: the host goes down, or an administrator wanted it gone). QEMU is hostile: what it says about its guest
can end or restart that guest at most, and no word of its choice reaches anything but the tables below.
"""

from __future__ import annotations

from depriv.config import ACTIONS
from depriv.records import cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

ENDS: Final = ("poweroff", "reboot", "crash", "host")

# A guest that ends within a minute again and again is not started for ever. xend refused from the first time on:
# MINIMUM_RESTART_TIME = 60, xen/xend/XendConstants.py, Xen 4.4, the last with xend.
SHORT_LIFE_S: Final = 60.0
RESTARTS_MAX: Final = 5

# ShutdownCause, qapi/run-state.json, QEMU 7.2. With -no-reboot a reset is a SHUTDOWN with the reset's own cause:
# qemu_system_reset_request, softmmu/runstate.c. A word that is not here says nothing.
_REASONS: Final = {
    "guest-shutdown": "poweroff",
    "host-ui": "poweroff",
    "host-qmp-quit": "poweroff",
    "guest-reset": "reboot",
    "host-qmp-system-reset": "reboot",
    "guest-panic": "crash",
    "host-error": "crash",
    "host-signal": "host",
}
# RunState, qapi/run-state.json, QEMU 7.2: those in which a guest never runs again by itself.
_STATUSES: Final = {"shutdown": "poweroff", "guest-panicked": "crash", "internal-error": "crash"}


def reason_of_event(name: str, data: object) -> str:
    """Return what an event of QEMU's says has happened, or "": nothing, or nothing that makes sense.

    Args:
        name: The event's name.
        data: Its "data" as it came, of any type; None where there was none.
    """
    fields = cast("dict[object, object]", data) if isinstance(data, dict) else {}
    if name == "SHUTDOWN":
        reason = fields.get("reason")
        return _REASONS.get(reason, "") if isinstance(reason, str) else ""
    if name == "GUEST_PANICKED":
        return "" if fields.get("action") == "run" else "crash"  # "run": told, and the guest goes on
    return ""


def happened(*, alive: str, status: str, noted: str) -> str:
    """Return which of ``ENDS`` has come to a guest, or "": it goes on.

    Args:
        alive: What the kernel says of QEMU: "running", "dead-leader" or "dead" (``proc.alive``). It outranks QEMU.
        status: What QEMU says of the guest ("status" of query-status), or "": it was not asked or does not answer.
        noted: What was written down when the guest ended, or "". It tells which end it was, never that there was one:
            the guest may have gone on since, and a QEMU that hangs may come back.
    """
    known = noted if noted in ENDS else ""
    if alive in ("dead", "dead-leader"):
        return known or "crash"
    if status in _STATUSES:
        return known or _STATUSES[status]
    return ""


def action(  # noqa: PLR0913 (three answers of the configuration, three facts)
    happened: str, *, on_poweroff: str, on_reboot: str, on_crash: str, restarts: int, lived_s: float
) -> tuple[str, str]:
    """Return what is to be done, and why, in words.

    "none", "destroy", "preserve" (nothing is started; the domain stays listed for the administrator to see), "restart"
    or "rename-restart".

    Args:
        happened: One of ``ENDS``, or "".
        on_poweroff: One of ``config.ACTIONS``, as are the next two.
        on_reboot: The same for a reset; with "restart" QEMU does it in place, and none is ever heard of.
        on_crash: The same for a crash of the guest or of its QEMU.
        restarts: So many short lives came directly before this one (``restarts_after``).
        lived_s: How long this one was.
    """
    if happened == "host":
        return "destroy", "QEMU was told to end from outside: a guest is not started against whoever stopped it"
    wanted = {"poweroff": on_poweroff, "reboot": on_reboot, "crash": on_crash}.get(happened)
    if wanted is None:
        return "none", "the guest goes on"
    why = f"on_{happened} = {wanted}"
    if wanted not in ACTIONS:
        return "preserve", f"{why} is none of {', '.join(ACTIONS)}"
    if wanted in ("restart", "rename-restart") and _was_short(lived_s) and restarts >= RESTARTS_MAX:
        times = f"{restarts} restarts, each after less than {SHORT_LIFE_S:.0f} s"
        return "preserve", f"{why}, but not again: {times}"
    return wanted, why


def restarts_after(restarts: int, lived_s: float) -> int:
    """Return the next life's ``restarts``: one more after a short life, none after any other.

    Args:
        restarts: This life's own number.
        lived_s: How long it was.
    """
    return restarts + 1 if _was_short(lived_s) else 0


def _was_short(lived_s: float) -> bool:
    return not lived_s >= SHORT_LIFE_S  # this way round, "not a number" is short
