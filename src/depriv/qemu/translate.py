# SPDX-License-Identifier: Apache-2.0
"""Understand a QEMU command line: any of its words in, what it asks of the host out. Pure.

Every option has one treatment (:mod:`depriv.qemu.options`): passed as it is, by descriptor, as a private copy, taken
over by depriv, or refused. An option that names a resource of the host and has no handler would be a hole: a test
holds the table to what QEMU itself lists.
"""

from __future__ import annotations

from depriv.qemu import block_options, char_options, display_options, net_options, other_options
from depriv.qemu.draft import Allowed, Draft, Request
from depriv.qemu.expand import expand
from depriv.qemu.options import OPTIONS, PASSED
from depriv.qemu.words import error, parse_words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from depriv.host import FileFacts
    from depriv.qemu.words import Word

HANDLERS = {
    **block_options.HANDLERS,
    **char_options.HANDLERS,
    **display_options.HANDLERS,
    **net_options.HANDLERS,
    **other_options.HANDLERS,
}


def translate(  # noqa: PLR0913 (what is pure has all it may know handed in)
    argv: tuple[str, ...],
    *,
    look: Callable[[str], FileFacts],
    allowed: Allowed,
    cwd: str = "/",
    formats: dict[str, str] | None = None,
    read: Callable[[str], str] | None = None,
) -> Request:
    """Return what QEMU's words after the program come to.

    Args:
        argv: The words.
        look: Returns the facts of a file by its absolute path.
        allowed: What the caller has allowed beyond the strict defaults.
        cwd: The caller's folder, for relative paths.
        formats: Path -> format of images that were probed.
        read: Returns the text of a file by its absolute path (-readconfig); None: no file can be read.

    Raises:
        ConfigError: a word is wrong, names a file that is not fit, or asks for what cannot be had confined; which
            word, why, and what to write instead.
    """
    words = parse_words(argv, {name: option.takes_value for name, option in OPTIONS.items()})
    draft = Draft(look, allowed, cwd, formats or {})

    def text_of(word: Word) -> str:
        if read is None:
            raise error(word, "no file can be read here", fix="write its sections as options")
        path = draft.path(word, word.value)
        try:
            return read(path)
        except (OSError, ValueError) as failed:
            raise error(word, f"cannot read {path}", cause=str(failed), fix="name a text file") from failed

    words = expand(words, text_of)
    draft.seen = {word.name for word in words}
    for word in words:
        handler = HANDLERS.get(word.name)
        if handler is not None:
            handler(draft, word)
        elif OPTIONS[word.name].how == PASSED:
            draft.emit(f"-{word.name}", *((word.value,) if OPTIONS[word.name].takes_value else ()))
        else:
            draft.refuse(word, OPTIONS[word.name].why, fix=OPTIONS[word.name].instead)
    for finish in (block_options.finish, display_options.finish, net_options.finish, other_options.finish):
        finish(draft)
    return Request(
        argv=tuple(draft.argv),
        dry=tuple(draft.dry),
        files=tuple(draft.files),
        disks=tuple(draft.disks),
        privates=tuple(draft.privates),
        listens=tuple(draft.listens),
        openings=tuple(draft.openings),
        vncs=tuple(draft.vncs),
        notes=tuple(draft.notes),
        unknown_formats=tuple(draft.unknown_formats),
        **draft.facts,
    )
