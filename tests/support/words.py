# SPDX-License-Identifier: Apache-2.0
"""What options of a command line come to, by the handlers of :mod:`depriv.qemu.other_options`, on a host of files."""

from __future__ import annotations

import pytest

from depriv.errors import ConfigError
from depriv.host import FileFacts
from depriv.qemu.draft import Allowed, Draft, Request
from depriv.qemu.expand import expand
from depriv.qemu.options import OPTIONS, PASSED
from depriv.qemu.other_options import HANDLERS, finish
from depriv.qemu.words import parse_words

FILES = {
    path: FileFacts(path=path, kind=kind, dev=1, ino=number, rdev=number if kind == "char" else 0, size=4096)
    for number, (path, kind) in enumerate(
        {
            "/vm/bzImage": "file",
            "/vm/initrd.gz": "file",
            "/vm/a,b": "file",
            "/vm/mod1": "file",
            "/vm/mod2": "file",
            "/vm/bios.bin": "file",
            "/vm/secret": "file",
            "/vm/state": "file",
            "/vm/keymap": "file",
            "/vm/dir": "directory",
            "/vm/link": "symlink",
            "/vm/tls/ca-cert.pem": "file",
            "/vm/tls/server-cert.pem": "file",
            "/vm/tls/server-key.pem": "file",
            "/vm/tls/ca-crl.pem": "file",
            "/vm/tls/keys.psk": "file",
            "/dev/urandom": "char",
            "/dev/hwrng": "char",
            "/dev/bus/usb/001/002": "char",
            "/dev/vhost-vsock": "char",
            "/dev/sda": "block",
        }.items(),
        start=1,
    )
}


def look(path: str) -> FileFacts:
    return FILES.get(path, FileFacts(path=path, kind="missing"))


class Done:
    """The draft after all words, and what it comes to."""

    def __init__(self, *argv: str, allowed: Allowed | None = None, files: dict[str, str] | None = None) -> None:
        words = parse_words(argv, {name: option.takes_value for name, option in OPTIONS.items()})
        self.draft = Draft(look, allowed or Allowed(), "/vm", {})
        for word in expand(words, lambda word: (files or {})[self.draft.path(word, word.value)]):
            if word.name in HANDLERS:
                HANDLERS[word.name](self.draft, word)
            else:
                assert OPTIONS[word.name].how == PASSED, word
                self.draft.emit(f"-{word.name}", *((word.value,) if OPTIONS[word.name].takes_value else ()))
        finish(self.draft)
        self.argv = " ".join(self.draft.argv)
        self.dry = " ".join(self.draft.dry)
        self.notes = [note.text for note in self.draft.notes]
        self.copies = [(item.source, item.target) for item in self.draft.privates]
        facts = self.draft.facts
        self.request = Request(argv=(), dry=(), **facts)


def refused(*argv: str, allowed: Allowed | None = None, files: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Done(*argv, allowed=allowed, files=files)
    assert str(caught.value).startswith("word ")
    assert caught.value.fix
    return caught.value
