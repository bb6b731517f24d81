"""Values of rows: which are absent, how those that are not text are written as text, and which text is none."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxft.files import strict_json

SHOWN = 60  # characters of a value that a message shows
HALF = re.compile("[\ud800-\udfff]")


class RowProblem(ValueError):
    """A problem with a row; the reader of the row adds the row's name."""


def is_absent(value: Any) -> bool:
    """Whether a cell is empty: null, or the NaN that tables write in place of it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not absent."""
    return {name: value for name, value in fields.items() if not is_absent(value)}


def sample(value: Any) -> str:
    """A value for a message: as JSON spells it, shortened."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def text_of(value: Any, what: str) -> str:
    """A value as text: text as it is; numbers, lists and objects as JSON spells them.

    what: the name of the value in errors, such as `'output'`. Raises RowProblem for values that JSON does not have
    (NaN, infinite numbers, dates, bytes), and for true and false, which rows mean in too many ways.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        raise RowProblem(
            f"{what} is {str(value).lower()}, which is not text: write the text that is meant, such as "
            f'"{"yes" if value else "no"}" or "{str(value).lower()}"'
        )
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RowProblem(
            f"{what} holds NaN or an infinite number, which JSON cannot spell: {sample(value)!r}. Write null, or text"
        ) from error
    except TypeError as error:
        raise RowProblem(f"{what} holds a value that is neither text nor JSON ({error}): write it as text") from error


def parse_json(text: str, what: str) -> Any:
    """The value that JSON text spells. Raises RowProblem if it is none, is nested too deeply, or holds NaN."""
    try:
        return strict_json.parse_json(text, finite=True, whole_characters=False)
    except ValueError as error:
        raise RowProblem(f"{what} is text but not JSON: {error}") from error


def refuse_unwritable(value: Any, what: str) -> None:
    """Raises RowProblem for half of a character in text within a value, as in a cut emoji, and for NaN.

    what: the name of the value in errors.
    """
    if isinstance(value, str):
        if value.isascii():
            return
        if half := HALF.search(value):
            raise RowProblem(
                f"{what} holds half of a character (the surrogate {half[0]!r} at position {half.start()}), such as a "
                "cut emoji, which no tokenizer can read: remove it, or write the whole character"
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RowProblem(f"{what} is {value}, which JSON cannot spell. Write null, or text")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            refuse_unwritable(key, f"the name of a field in {what}")
            refuse_unwritable(item, f"{what}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value, 1):
            refuse_unwritable(item, f"{what} entry {number}")
