"""Text of others made safe to show: characters that a terminal obeys are escaped, and long text is cut."""

import json
import logging
import re
import sys
import warnings
from typing import Any

NAME_CHARACTERS = 300  # of a name or a path within a message
LINE_CHARACTERS = 4_000  # of one line of a message
MESSAGE_LINES = 200

# What a terminal obeys or does not show: control characters (C0 but tab and newline, DEL, C1), marks, overrides and
# isolates of direction, characters without width or without a glyph, tags, separators of lines, and lone surrogates.
# The joiners U+200C and U+200D stay: Persian and emoji are written with them.
_UNSAFE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f"
)
_IN_TEXT = re.compile(f"[{_UNSAFE}]")
_IN_LINE = re.compile(f"[{_UNSAFE}\t\n\u200c\u200d]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def safe_text(text: str) -> str:
    """Text of several lines with every character that a terminal obeys or hides as an escape, such as `\\x1b`.

    Tabs and newlines stay, and so do joiners of letters and emoji.
    """
    return _IN_TEXT.sub(_escape, text)


def safe_line(text: object, most: int = NAME_CHARACTERS) -> str:
    """A name, a path or another text that stands within a line, escaped and cut in its middle to `most` characters."""
    return _IN_LINE.sub(_escape, _cut(str(text), most))


def safe_message(text: object) -> str:
    """A message that may name things of others: escaped, and cut to MESSAGE_LINES lines of LINE_CHARACTERS each.

    Lines after the first are indented, so that no name with a newline can pass for a line of the program itself.
    Long lines lose their middle, since the correction stands at the end.
    """
    lines = str(text).split("\n")
    if (rest := len(lines) - MESSAGE_LINES) > 0:
        lines = [*lines[: MESSAGE_LINES - 20], f"  ... {rest:,} lines left out ...", *lines[-20:]]
    first, *others = (safe_text(_cut(line, LINE_CHARACTERS)) for line in lines)
    return "\n".join([first, *(line if not line or line[0] == " " else f"  {line}" for line in others)])


def safe_json(value: Any, *, only_ascii: bool = False) -> str:
    """JSON on indented lines; a character that a terminal would obey or hide is written as JSON's own escape.

    only_ascii: so is every character that ASCII lacks.
    """
    return _IN_TEXT.sub(_json_escape, json.dumps(value, indent=2, ensure_ascii=only_ascii))


def protect_logs() -> None:
    """Makes the logs and warnings of every library of this process safe to show."""

    class SafeRecord(logging.LogRecord):
        def getMessage(self) -> str:
            return safe_message(super().getMessage())

    logging.setLogRecordFactory(SafeRecord)
    form = warnings.formatwarning
    if form.__module__ == "warnings":
        warnings.formatwarning = lambda *args, **values: safe_text(form(*args, **values))


def write(text: str, *, error: bool = False) -> None:
    """Prints a message of a command as a line on standard output, or on standard error."""
    print(safe_message(text), file=sys.stderr if error else sys.stdout)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end]}... ({len(text) - most:,} characters left out) ...{text[-end:]}"


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    code = ord(character)
    return _SHORT.get(character) or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match.group()).strip('"') if ord(match.group()) > 0x7F else f"\\u{ord(match.group()):04x}"
