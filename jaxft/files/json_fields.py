"""Kinds of values that fields of strangers' JSON files must have, checked before anything computes with them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError

LARGEST = 2**31 - 1  # of sizes and token ids: arrays of ids are int32
SHOWN = 80  # characters of a wrong value in a message


@dataclass(frozen=True, kw_only=True)
class FieldKind:
    """What a field may hold. text: for messages, as the object of `must be`. fits(value): whether it does."""

    text: str
    fits: Callable[[Any], bool]

    def __or__(self, other: "FieldKind") -> "FieldKind":
        return FieldKind(text=f"{self.text}, or {other.text}", fits=lambda value: self.fits(value) or other.fits(value))


def listing(kind: FieldKind, text: str) -> FieldKind:
    """Lists whose items are all of a kind."""
    return FieldKind(text=text, fits=lambda value: isinstance(value, list) and all(map(kind.fits, value)))


def mapping(kind: FieldKind, text: str) -> FieldKind:
    """Objects whose values are all of a kind."""
    return FieldKind(text=text, fits=lambda value: isinstance(value, Mapping) and all(map(kind.fits, value.values())))


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float. Whole numbers of files may be larger than any float, and are not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and is_finite(value)


ANYTHING = FieldKind(text="anything", fits=lambda value: True)
COUNT = FieldKind(
    text=f"a whole number, 1 or more and at most {LARGEST}", fits=lambda value: _is_whole(value) and value > 0
)
INDEX = FieldKind(
    text=f"a whole number, 0 or more and at most {LARGEST}", fits=lambda value: _is_whole(value) and value >= 0
)
WHOLE = FieldKind(text=f"a whole number of at most {LARGEST}", fits=_is_whole)
NUMBER = FieldKind(text="a finite number", fits=_is_number)
POSITIVE = FieldKind(text="a finite number above zero", fits=lambda value: _is_number(value) and value > 0)
FLAG = FieldKind(text="true or false", fits=lambda value: type(value) is bool)
TEXT = FieldKind(text="a text", fits=lambda value: isinstance(value, str))
OBJECT = mapping(ANYTHING, "an object")
TEXTS = listing(TEXT, "a list of texts")
TOKEN_IDS = FieldKind(text="a token id", fits=_is_whole) | listing(WHOLE, "a list of ids")  # negative: no token


def check_kinds(fields: Mapping[str, Any], kinds: Mapping[str, FieldKind], where: str) -> None:
    """Raises ModelError naming the first field whose value is of another kind than `kinds` says.

    Absent fields and null pass: what they mean is for the reader to say. where: the file, for messages.
    """
    for name, kind in kinds.items():
        value = fields.get(name)
        if value is not None and not kind.fits(value):
            shown = repr(value)
            shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}... ({len(shown)} characters)"
            raise ModelError(
                f"{where}: {name}={shown} must be {kind.text}. Correct the field, or take the file again from where "
                "the model was published."
            )
