# SPDX-License-Identifier: Apache-2.0
r"""The grammar of xl.cfg(5): text in, settings with their places out. Pure.

Nothing here knows what a key means (:mod:`depriv.xlkeys`, :mod:`depriv.xlconfig`). The grammar is that of Xen's
libxlu_cfg_l.l, libxlu_cfg_y.y and libxlu_cfg.c, with these differences, all of them in favour of real files: a comment
may end the file without a newline, lines may end in CR LF, a byte order mark is skipped, and the escapes ``\xHH`` and
``\OOO`` mean what they say (xl always refuses the first and drops the character of the second).
"""

from __future__ import annotations

from depriv.errors import ConfigError
from depriv.records import Record

MAX_CHARACTERS = 1 << 20  # a configuration is a page or two; more is a mistake (a disk image, a log)
MAX_DEPTH = 32  # vnuma nests three lists; the parser recurses
MAX_ERRORS = 100
_KEY_MAX = 40  # characters of a word that may have been meant for a key

_DIGITS = frozenset("0123456789")
_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz")
_IN_KEY = _LOWER | _DIGITS | {".", "_"}
_IN_NUMBER = _DIGITS | frozenset("abcdefx")
_IN_WORD = _IN_KEY | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ-")
_ESCAPES = {
    "\\": "\\",
    "'": "'",
    '"': '"',
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
}
_PYTHON_WORDS = frozenset(
    ("import", "from", "def", "if", "else", "elif", "for", "while", "print", "class", "return", "try")
)
_NOT_PYTHON = "xl.cfg is not Python: write every value out"
_TRUTH = {"true": "1", "yes": "1", "on": "1", "false": "0", "no": "0", "off": "0", "none": "0"}


class Place(Record):
    """A character of the configuration; ``line`` and ``column`` count from 1, ``text`` is the whole line."""

    source: str = ""
    line: int = 0
    column: int = 0
    text: str = ""


class Value(Record):
    """What stands right of an ``=``: a string or number (both atoms to xl), or a list of values."""

    kind: str  # "string", "number" or "list"
    text: str = ""  # of an atom: a string without quotes and escapes, a number as written
    items: tuple[Value, ...] = ()
    place: Place = Place()


class Setting(Record):
    """One key with the value that counts in the end."""

    key: str
    value: Value
    place: Place  # of the key, where it was last assigned
    appended: bool = False  # the last assignment was `+=`, which xl refuses for numbers


class GrammarError(ConfigError):
    """The text is not xl.cfg. ``others`` holds every further error found after this one, in order."""


def error_at(place: Place, what: str, *, fix: str = "", cause: str = "") -> ConfigError:
    """Return the error that points at ``place``."""
    return ConfigError(
        what, fix=fix, cause=cause, source=place.source, line=place.line, column=place.column, text=place.text
    )


def place_in(value: Value, offset: int) -> Place:
    """Return the place of one character of an atom, or of its start where escapes or ``+=`` moved the characters."""
    start = value.place.column - (value.kind != "string")
    if value.place.text[start : start + len(value.text)] != value.text:
        return value.place
    return value.place.replace(column=start + 1 + min(offset, len(value.text)))


def parse(text: str | bytes, *, source: str, arguments: tuple[str, ...] = ()) -> dict[str, Setting]:
    """Return the settings of a file, in the order of their first assignment.

    Args:
        text: The file. Bytes must be UTF-8.
        source: The file's name, for messages.
        arguments: Further lines as ``xl create FILE key=value ...`` takes them; they count as appended to the file.

    Raises:
        GrammarError: the first error; ``others`` has the rest.
    """
    settings, errors = parse_all(text, source=source, arguments=arguments)
    if errors:
        first, *rest = errors
        if rest:
            first.what += f" (and {len(rest)} more error{'s' if len(rest) > 1 else ''})"
        first.others = tuple(rest)
        raise first
    return settings


def parse_all(
    text: str | bytes, *, source: str, arguments: tuple[str, ...] = ()
) -> tuple[dict[str, Setting], tuple[GrammarError, ...]]:
    """Return what could be read, and every error (at most ``MAX_ERRORS``): after one, reading goes on at a newline."""
    settings: dict[str, Setting] = {}
    errors: list[GrammarError] = []
    units = [(source, text), *((f"argument {n}", argument) for n, argument in enumerate(arguments, 1))]
    for name, unit in units:
        try:
            _Parser(name, _checked(name, unit), settings, errors).run()
        except GrammarError as error:  # of the text as a whole, or one too many
            errors.append(error)
    return settings, tuple(errors[:MAX_ERRORS])


def render_value(value: Value) -> str:
    """Return text that parses to an equal value (places apart)."""
    if value.kind == "number":
        return value.text
    if value.kind == "list":
        return "[" + ", ".join(render_value(item) for item in value.items) + "]"
    return quote(value.text)


def quote(text: str) -> str:
    """Return ``text`` as a string of the grammar."""
    shown = text.replace("\\", "\\\\").replace('"', '\\"')
    for letter, meaning in _ESCAPES.items():
        if meaning not in "\\'\"":
            shown = shown.replace(meaning, "\\" + letter)
    return f'"{shown}"'


def _checked(source: str, text: str | bytes) -> str:
    """Return the text, decoded, of acceptable size and without a NUL.

    Raises:
        GrammarError: none of that.
    """
    if len(text) > MAX_CHARACTERS:
        start = bytes(text[:200]).decode(errors="replace") if isinstance(text, bytes) else text[:200]
        what = f"the configuration is {len(text)} characters long, more than {MAX_CHARACTERS}"
        raise _error(source, start, 0, what, "give the name of a configuration file")
    try:
        data = text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as error:  # an argument whose bytes were not UTF-8: surrogates from os.fsdecode()
        raise _error(source, str(text), error.start, "this is not UTF-8", "save the configuration as UTF-8") from None
    try:
        shown = data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        line = before + data[error.start :].split(b"\n", 1)[0].decode(errors="replace")
        what = f"the byte 0x{data[error.start]:02x} is not UTF-8"
        raise _error(source, line, len(before), what, "save the configuration as UTF-8") from None
    at = shown.find("\0")
    if at >= 0:
        raise _error(source, shown, at, "a NUL byte", "remove it: a configuration is text")
    return shown


def _error(source: str, text: str, at: int, what: str, fix: str) -> GrammarError:
    """Return the error that points at the character ``at`` of ``text``."""
    place = _place(source, text, at)
    shown = place.text.encode(errors="replace").decode()
    return GrammarError(what, fix=fix, source=source, line=place.line, column=place.column, text=shown)


def _place(source: str, text: str, at: int) -> Place:
    """Return the place of the character ``at`` of ``text``."""
    start = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at)
    line = text[start : end if end >= 0 else len(text)].removesuffix("\r")
    return Place(source=source, line=text.count("\n", 0, at) + 1, column=min(at - start, len(line)) + 1, text=line)


class _Parser:
    """One text being read: recursive descent, one character of look-ahead."""

    def __init__(self, source: str, text: str, settings: dict[str, Setting], errors: list[GrammarError]) -> None:
        self.source = source
        self.text = text
        self.at = 1 if text.startswith("\ufeff") else 0
        self.depth = 0
        self.settings = settings
        self.errors = errors
        # Where lines start is counted as reading goes on, not from the start for each place: files may be long.
        self.line = 1
        self.line_start = 0
        self.line_text = ""
        self.counted = 0

    def run(self) -> None:
        """Read every statement; on an error go on at the next line."""
        while True:
            try:
                self.skip_blank(newlines=True, semicolons=True)
                if self.at >= len(self.text):
                    return
                self.statement()
            except GrammarError as error:
                self.errors.append(error)
                if len(self.errors) >= MAX_ERRORS:
                    return
                self.resync()

    def resync(self) -> None:
        """Go to the next newline; out of a broken list, to the next line that starts a statement."""
        while True:
            end = self.text.find("\n", self.at)
            self.at = end if end >= 0 else len(self.text)
            if not self.depth or end < 0:
                break
            line = self.text[end + 1 : self.text.find("\n", end + 1) % (len(self.text) + 1)]
            key, equals, _ = line.partition("=")
            if equals and key.strip(" \t+") and not set(key.strip(" \t+")) - _IN_KEY:
                break
            self.at = end + 1
        self.depth = 0

    def place(self, at: int) -> Place:
        """Return the place of a character, which must not lie before that of an earlier call's line."""
        if at < self.line_start:
            return _place(self.source, self.text, at)
        newlines = self.text.count("\n", self.counted, at) if at > self.counted else 0
        if newlines:
            self.line += newlines
            self.line_start = self.text.rfind("\n", 0, at) + 1
        if newlines or not self.counted:
            end = self.text.find("\n", self.line_start)
            self.line_text = self.text[self.line_start : end if end >= 0 else len(self.text)].removesuffix("\r")
        self.counted = max(self.counted, at)
        text = self.line_text
        return Place(source=self.source, line=self.line, column=min(at - self.line_start, len(text)) + 1, text=text)

    def bad(self, at: int, what: str, fix: str = "") -> GrammarError:
        """Return the error that points at a character."""
        return _error(self.source, self.text, at, what, fix)

    def skip_blank(self, *, newlines: bool, semicolons: bool = False) -> None:
        """Skip blanks and comments, and what separates statements if asked to."""
        text, at, length = self.text, self.at, len(self.text)
        while at < length:
            character = text[at]
            if (
                character in " \t"
                or (newlines and (character == "\n" or text.startswith("\r\n", at)))
                or (semicolons and character == ";")
            ):
                at += 1
            elif character == "#":
                end = text.find("\n", at)
                at = end if end >= 0 else length
            else:
                break
        self.at = at

    def end_of(self, allowed: frozenset[str]) -> int:
        """Return where the run of ``allowed`` characters from here ends."""
        text, at, length = self.text, self.at, len(self.text)
        while at < length and text[at] in allowed:
            at += 1
        return at

    def statement(self) -> None:
        """Read ``KEY = VALUE`` or ``KEY += VALUE`` with what ends it, and store it."""
        start = self.at
        key = self.key()
        place = self.place(start)
        self.skip_blank(newlines=False)
        appended = self.text.startswith("+=", self.at)
        if not appended and not self.text.startswith("=", self.at):
            raise self.unexpected("`=' after the key", word_before=key)
        self.at += 2 if appended else 1
        self.skip_blank(newlines=False)
        value_at = self.at
        value = self.value(key)
        self.skip_blank(newlines=False)
        if self.at < len(self.text) and self.text[self.at] not in "\n;" and not self.text.startswith("\r\n", self.at):
            raise self.unexpected("the end of the line", word_before=value.text if value.kind == "number" else "")
        before = self.settings.get(key)
        if appended and before:
            value = self.joined(before, value, value_at)
        self.settings[key] = Setting(key=key, value=value, place=place, appended=appended)

    def key(self) -> str:
        """Read a key."""
        start = self.at
        if self.text[start] in _LOWER:
            self.at = self.end_of(_IN_KEY)
            if self.at == len(self.text) or self.text[self.at] not in _IN_WORD:
                return self.text[start : self.at]
        self.at = max(self.end_of(_IN_WORD), start + 1)
        word = self.text[start : self.at]
        plain = word.lower().replace("-", "_")
        fix = f"write {plain}" if plain[0] in _LOWER else "a line is `key = value', or a comment that starts with #"
        if not word.isprintable():
            word = ascii(word)[1:-1]
        raise self.bad(start, f"`{word}' is no key: keys are lower-case letters, digits, `_' and `.'", fix)

    def value(self, key: str) -> Value:
        """Read an atom or a list."""
        start = self.at
        character = self.text[start : start + 1]
        if character in ("'", '"'):
            place = self.place(start)
            return Value(kind="string", text=self.string(), place=place)
        if character in _DIGITS:
            self.at = self.end_of(_IN_NUMBER)
            return Value(kind="number", text=self.text[start : self.at], place=self.place(start))
        if character == "[":
            return self.list_(key)
        word = self.text[start : self.end_of(_IN_WORD)]
        raise self.unexpected("a value: a string in quotes, a number or a [list]", word_here=word, key=key)

    def list_(self, key: str) -> Value:
        """Read a list; newlines may stand anywhere in it, and a comma after the last item."""
        start = self.at
        place = self.place(start)
        if self.depth == MAX_DEPTH:
            raise self.bad(start, f"more than {MAX_DEPTH} lists within one another", "remove the surplus brackets")
        self.depth += 1
        self.at += 1
        items: list[Value] = []
        while True:
            self.skip_blank(newlines=True)
            if self.text.startswith("]", self.at):
                break
            if self.at >= len(self.text):
                raise self.bad(start, "this list is never closed", "end it with ]")
            if self.text[self.at] in _LOWER and self.text[self.end_of(_IN_KEY) :].lstrip(" \t").startswith(("=", "+=")):
                self.at = max(self.text.rfind("\n", start, self.at), start)  # the next statement deserves its own check
                raise self.bad(start, "this list is never closed", "end it with ]")
            items.append(self.value(key))
            self.skip_blank(newlines=True)
            if self.text.startswith(",", self.at):
                self.at += 1
            elif self.at < len(self.text) and not self.text.startswith("]", self.at):
                raise self.unexpected("`,' or `]'")
        self.at += 1
        self.depth -= 1
        return Value(kind="list", items=tuple(items), place=place)

    def string(self) -> str:
        """Read a quoted string; it ends on its line."""
        start = self.at
        mark = self.text[start]
        at = start + 1
        parts: list[str] = []
        while True:
            character = self.text[at : at + 1]
            if character == mark:
                self.at = at + 1
                return "".join(parts)
            if character in ("", "\n") or self.text.startswith("\r\n", at):
                self.at = at
                raise self.bad(start, "this string does not end on its line", f"close it with {mark}")
            if character == "\\":
                meaning, at = self.escape(at)
                parts.append(meaning)
                continue
            stop = at
            while self.text[stop : stop + 1] not in (mark, "\\", "\n", "\r", ""):
                stop += 1
            stop = max(stop, at + 1)  # a lone CR is a character like others
            parts.append(self.text[at:stop])
            at = stop

    def escape(self, at: int) -> tuple[str, int]:
        """Return what the escape at ``at`` means, and where it ends."""
        letter = self.text[at + 1 : at + 2]
        if letter in _ESCAPES:
            return _ESCAPES[letter], at + 2
        if letter == "x":
            digits = self.text[at + 2 : at + 4]
            good = len(digits) == 2 and not set(digits) - frozenset("0123456789abcdefABCDEF")
            code, end = (int(digits, 16), at + 4) if good else (-1, at)
        else:
            end = at + 1
            while end < at + 4 and self.text[end : end + 1] in tuple("01234567"):
                end += 1
            code = int(self.text[at + 1 : end], 8) if end > at + 1 else -1
        self.at = at
        if code < 0:
            known = "\\\\ \\' \\\" \\a \\b \\f \\n \\r \\t \\v \\xHH \\OOO"
            raise self.bad(at, "this escape means nothing", f"for a backslash write \\\\; the escapes are {known}")
        if not 0 < code < 128:
            raise self.bad(at, f"an escape for the byte 0x{code:02x}", "write the character itself, in UTF-8")
        return chr(code), end

    def joined(self, before: Setting, value: Value, at: int) -> Value:
        """Return the value after ``+=``, which has the later place."""
        if (before.value.kind == "list") != (value.kind == "list"):
            kinds = "a string to a list" if before.value.kind == "list" else "a list to a string"
            where = f"line {before.place.line}" if before.place.source == self.source else before.place.source
            raise self.bad(at, f"cannot add {kinds}", f"{before.key} was assigned in {where}; make both alike")
        if value.kind == "list":
            return value.replace(items=before.value.items + value.items)
        return value.replace(kind="string", text=before.value.text + value.text)

    def unexpected(self, wanted: str, *, word_before: str = "", word_here: str = "", key: str = "") -> GrammarError:
        """Return the error for a character that cannot stand here, with the likeliest remedy."""
        at = self.at
        character = self.text[at : at + 1]
        if character == "\r" and self.text[at + 1 : at + 2] != "\n":
            return self.bad(at, "a carriage return within a line", "end lines with a newline")
        found = {"": "the end", "\n": "the end of the line", "\r": "the end of the line"}.get(character, "")
        if not found:
            shown = word_here or character
            found = f"`{shown if shown.isprintable() else ascii(shown)[1:-1]}'"
        remedy = _remedy(character, word_before, word_here, key)
        if not remedy and len(word_before) <= _KEY_MAX and found.startswith("the end") and wanted.startswith("`='"):
            alone = self.source.startswith("argument ")
            remedy = f"write it as one word: {word_before}=VALUE" if alone else f"write {word_before} = VALUE"
        return self.bad(at, f"found {found} instead of {wanted}", remedy)


def _remedy(character: str, word_before: str, word_here: str, key: str) -> str:
    """Return what to do about a character that cannot stand where it stands."""
    if word_here.lower() in _TRUTH:
        return f"write {_TRUTH[word_here.lower()]}: booleans are 1 and 0"
    if word_before in _PYTHON_WORDS or (character and character in "().+*%{}:@"):
        return _NOT_PYTHON
    if character == "-":
        return (
            f'quote a negative number: {key} = "{word_here or "-1"}"'
            if key
            else "keys have `_' where other tools have `-'"
        )
    if word_here:
        return f'quote it: {key} = "{word_here}"'
    if word_before[:1] in _DIGITS and character.isalpha():
        return "a number has no unit: memory is in MiB"
    return ""
