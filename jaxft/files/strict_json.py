"""JSON of others: one reading for every file, which raises ValueError alone, whatever is wrong with the text."""

import json
import re
from typing import Any, NoReturn

MAX_DEPTH = 200  # lists and objects within each other; the deepest that models and tools write is about 20
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")


def parse_json(content: bytes | str, *, finite: bool = False, whole_characters: bool = True) -> Any:
    """The value that JSON text spells, in UTF-8 with or without a byte order mark.

    finite: whether NaN and Infinity, which Python reads and JSON has not, are refused. whole_characters: whether half
    of a character is, such as a lone \\ud83d of a cut emoji, which no file or tokenizer can hold. Raises ValueError
    with the reason, also for a name that is twice in one object and for nesting deeper than MAX_DEPTH; its class is
    json.JSONDecodeError where the text is not JSON at some column.
    """
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode() if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: byte 0x{raw[error.start]:02x} at {error.start:,}") from error
    try:
        value = json.loads(text, object_pairs_hook=unique_names, parse_constant=_refuse_constant if finite else None)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} lists and objects") from error
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if whole_characters and (_ESCAPED_HALF.search(raw) or (isinstance(content, str) and _HALF.search(content))):
        _check_characters(value)
    return value


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError if a name is there twice: one of its values would be lost."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:100]!r} is there twice")
    return out


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value: write null, or a number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for one in level for inner in _inner(one)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} lists and objects")


def _inner(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in values if isinstance(one, dict | list)]


def _check_characters(value: Any) -> None:
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            rest += [*one, *one.values()]
        elif isinstance(one, list):
            rest += one
        elif isinstance(one, str) and (half := _HALF.search(one)):
            raise ValueError(f"it has half of a character, \\u{ord(half.group()):04x}, in {one[:40]!r}")
