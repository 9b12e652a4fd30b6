# SPDX-License-Identifier: Apache-2.0
"""Options about the process that QEMU is, and the table of all that are no disk, chardev, display or network. Pure."""

from __future__ import annotations

from depriv.qemu import device_options, file_options, machine_options, object_options
from depriv.qemu.options import OPTIONS
from depriv.qemu.words import parse_list, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from depriv.qemu.draft import Draft
    from depriv.qemu.words import Word


def _paused(draft: Draft, word: Word) -> None:
    del word
    draft.facts["paused"] = True  # the launcher says -S in any case


def _daemonize(draft: Draft, word: Word) -> None:
    del word
    draft.facts["daemonize"] = True


def _pidfile(draft: Draft, word: Word) -> None:
    draft.facts["pidfile"] = draft.path(word, word.value)


def _taken_over(draft: Draft, word: Word) -> None:
    draft.note(word, f"{word.text}: not passed on: {OPTIONS[word.name].why}")


def _nothing_to_do(draft: Draft, word: Word) -> None:
    """Drop what the launcher says anyway."""
    del draft, word


def _run_with(draft: Draft, word: Word) -> None:
    for key in values(parse_list(word)):
        draft.note(word, f"{key}= is not passed on: {OPTIONS['run-with'].why}")


def _log(draft: Draft, word: Word) -> None:
    if word.value in ("help", "?"):
        draft.facts["no_guest"] = True
        draft.emit("-d", word.value)
        return
    draft.emit("-d", word.value, dry=())


def _not_dry(draft: Draft, word: Word) -> None:
    """A snapshot is in the disks, of which the dry run has none."""
    draft.emit(f"-{word.name}", word.value, dry=())


HANDLERS = {
    **machine_options.HANDLERS,
    **file_options.HANDLERS,
    **device_options.HANDLERS,
    **object_options.HANDLERS,
    "S": _paused,
    "daemonize": _daemonize,
    "pidfile": _pidfile,
    "no-user-config": _nothing_to_do,
    "nodefconfig": _nothing_to_do,
    "runas": _taken_over,
    "chroot": _taken_over,
    "sandbox": _taken_over,
    "async-teardown": _taken_over,
    "enable-fips": _taken_over,
    "D": _taken_over,
    "iscsi": _taken_over,
    "run-with": _run_with,
    "d": _log,
    "loadvm": _not_dry,
}


def finish(draft: Draft) -> None:
    """Note what follows from all the words together."""
    machine_options.finish(draft)
