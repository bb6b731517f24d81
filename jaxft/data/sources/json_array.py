"""Rows of a .json file: the items of an array, which is the file itself or a field of its object."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxft.data.sources.json_rows import BOM, JsonlRows, JsonRows, decode
from jaxft.data.sources.text import Spool, Text
from jaxft.errors import DataError, did_you_mean, listed
from jaxft.files.paths import file_name

WHITESPACE = " \t\r\n"


def rows_of_array(path: str, text: Text, field: str | None) -> JsonRows:
    """The items of the array in a .json file, or of the one in `field` of its object.

    field: a name, or names joined by dots. Several objects one after another are rows too, as those of a .jsonl file.
    Raises DataError for other JSON, and for an object without a field to read.
    """
    raw = text.read(0, text.size)
    content = decode(raw.removeprefix(BOM), path, file_name(path))
    del raw
    start = _skip(content, 0)
    if field is not None:
        start = _seek(content, start, field, path)
    elif content[start : start + 1] == "{":
        _, end = _value(content, start, path)
        if _skip(content, end) < len(content):
            on_one_line = "\n" not in content[start:end]
            return JsonlRows(path, text) if on_one_line else _spooled(path, content, _objects(content, start, path))
        raise DataError(_one_object(json.loads(content), path))
    if content[start : start + 1] != "[":
        what = "" if field is None else f" in field {field!r}"
        raise DataError(f"{path!r} has no array of rows{what}: it has {content[start : start + 40]!r} there")
    return _spooled(path, content, _items(content, start, path))


def _spooled(path: str, content: str, items: Iterator[tuple[int, int]]) -> JsonRows:
    """Rows of the items of a file. items: (start, end) of each in its content."""
    spool, spans, lines, line, counted = Spool(), [], [], 1, 0
    for first, end in items:
        line, counted = line + content.count("\n", counted, first), first
        spans.append(spool.append(content[first:end].encode()))
        lines.append(line)
    positions = np.array(spans, np.int64).reshape(-1, 2)
    return JsonRows(path, spool, positions[:, 0], positions[:, 1], np.array(lines, np.int64), items=True)


def _skip(content: str, at: int) -> int:
    while at < len(content) and content[at] in WHITESPACE:
        at += 1
    return at


def _value(content: str, at: int, path: str) -> tuple[Any, int]:
    """(the JSON value that begins at a position, where it ends)."""
    try:
        return json.JSONDecoder().raw_decode(content, at)
    except RecursionError as error:
        raise DataError(f"{file_name(path)} line {content.count(chr(10), 0, at) + 1} is nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{path!r} is not valid JSON: {error}") from error


def _items(content: str, at: int, path: str) -> Iterator[tuple[int, int]]:
    """(start, end) of every item of the array that begins at a position."""
    at = _skip(content, at + 1)
    while content[at : at + 1] != "]":
        _, end = _value(content, at, path)
        yield at, end
        at = _skip(content, end)
        if content[at : at + 1] == ",":
            at = _skip(content, at + 1)
        elif content[at : at + 1] != "]":
            raise DataError(_no_comma(content, at, path))


def _objects(content: str, at: int, path: str) -> Iterator[tuple[int, int]]:
    """(start, end) of every value from a position on, one after another without commas."""
    while at < len(content):
        _, end = _value(content, at, path)
        yield at, end
        at = _skip(content, end)


def _seek(content: str, at: int, field: str, path: str) -> int:
    """Where the value of a field begins, in the object that begins at a position."""
    known = []
    if content[at : at + 1] != "{":
        raise DataError(f"{path!r} has no field {field!r} (data.rows_field): it does not begin with an object")
    at = _skip(content, at + 1)
    while content[at : at + 1] != "}":
        name, at = _value(content, at, path)
        at = _skip(content, at)
        if content[at : at + 1] != ":":
            raise DataError(_no_comma(content, at, path))
        at = _skip(content, at + 1)
        if name == field:
            return at
        if field.startswith(f"{name}."):
            return _seek(content, at, field.removeprefix(f"{name}."), path)
        known.append(str(name))
        _, at = _value(content, at, path)
        at = _skip(content, at)
        if content[at : at + 1] == ",":
            at = _skip(content, at + 1)
        elif content[at : at + 1] != "}":
            raise DataError(_no_comma(content, at, path))
    hint = did_you_mean(field, known)
    raise DataError(f"{path!r} has no field {field!r} (data.rows_field).{hint} Its fields: {listed(known) or 'none'}.")


def _no_comma(content: str, at: int, path: str) -> str:
    line = content.count("\n", 0, at) + 1
    there = repr(content[at : at + 20]) if at < len(content) else "the end of the file"
    cut = " It is cut short: fetch or write it again." if at >= len(content) else ""
    return f"{path!r} is not valid JSON: line {line} has {there} where ',' or a closing bracket must stand.{cut}"


def _one_object(value: dict[str, Any], path: str) -> str:
    lists = [name for name, inner in value.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
    mend = f"set data.rows_field={lists[0]!r}" if lists else "set data.rows_field to the field that holds them"
    return (
        f"{path!r} is one JSON object, not an array of rows (its fields: {listed(list(value)) or 'none'}). If its rows "
        f"are a list in one of them, {mend}. If the object is itself the only row, rename the file to .jsonl and write "
        "it on one line, or put [ ] around it. If it holds no rows, name the files that do, as in folder/*.jsonl."
    )
