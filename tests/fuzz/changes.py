"""Changes of valid inputs: values of JSON that nobody expects, and bytes that were lost, turned, moved or put in."""

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]
NUMBERS = [0, 1, 2, 3, 7, -1, -2, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]
VALUES = [
    None, True, False, *NUMBERS,
    10**400, 0.0, 0.5, -1.5, 1e-300, 1e300, float("inf"), float("nan"), "", "a", "default",
    "../../../etc/passwd", "/dev/zero", "model.safetensors", "1", "F32", "F8_E4M3", "x" * 3000, "\x00", "\x1b[2J",
    "%s{}", "[",
    "(a+)+$", [], [[]], [0], [1, 2], [-1], [2**40, 2**40], ["a"], ["lm_head"], [None], {}, {"a": 1}, {"": None},
    {"type": "linear", "factor": 2.0}, {"0": [1]}, DEEP,
]  # fmt: skip
Path = tuple[Any, ...]

at = st.integers(0, 2**16 - 1)
# (what, where, which value, a number)
json_change = st.tuples(st.sampled_from("svvvvdrmwgn"), at, st.integers(0, len(VALUES) - 1), at)
json_changes = st.lists(json_change, min_size=1, max_size=3)
byte_change = st.tuples(st.sampled_from("bbcinnsz"), at, at, st.integers(0, len(NUMBERS) - 1))
byte_changes = st.lists(byte_change, min_size=1, max_size=3)


def changed_json(value: Any, changes: Sequence[tuple[str, int, int, int]]) -> Any:
    """A copy of a JSON value with changes, each in one of its parts."""
    value = copy.deepcopy(value)
    for what, where, which, number in changes:
        paths = list(_paths(value))
        if not paths:
            return value
        *parents, last = paths[where % len(paths)]
        inner = value
        for part in parents:
            inner = inner[part]
        _change(inner, last, what, copy.deepcopy(VALUES[which]), number)
    return value


def _change(inner: Any, last: Any, what: str, other: Any, number: int) -> None:
    if what == "v":
        inner[last] = other
    elif what == "d":
        del inner[last]
    elif what == "m" and isinstance(inner, dict):
        inner[f"{last}{number % 3 or ''}_"] = inner.pop(last)
    elif what == "w":
        inner[last] = [inner[last]] if number % 2 else {"a": inner[last]}
    elif what == "g" and type(inner[last]) in (int, float):
        inner[last] = inner[last] * (number % 9) - number % 2 if number % 3 else -inner[last]
    elif what == "n" and isinstance(inner, dict):
        inner[f"new_{number % 5}"] = other
    elif what == "r" and isinstance(inner[last], list):
        inner[last] = inner[last] * (number % 4)
    elif what == "s" and isinstance(inner[last], str):
        cut = number % (len(inner[last]) + 1)
        inner[last] = inner[last][:cut] + str(other)[:20] + inner[last][cut:]
    else:
        inner[last] = other


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*path, name)
        if len(path) < 6:
            yield from _paths(inner, (*path, name))


def changed_bytes(content: bytes, changes: Sequence[tuple[str, int, int, int]], *, within: int = 2**16) -> bytes:
    """Content with changes in its first `within` bytes: bits, cuts, insertions, numbers in its place, moved runs."""
    out = bytearray(content)
    for what, where, number, which in changes:
        size = min(len(out), within)
        start = where % (size + 1)
        if what == "b" and start < len(out):
            out[start] ^= 1 << number % 8
        elif what == "c":
            del out[start:]
        elif what == "i":
            out[start:start] = bytes([number % 256]) * (1 + number % 9)
        elif what == "n":
            width = 8 if number % 2 else 4
            out[start : start + width] = (NUMBERS[which] % 2 ** (8 * width)).to_bytes(width, "little")
        elif what == "s":
            run = number % (size + 1)
            out[start:start] = out[run : run + 40]
        elif what == "z":
            del out[start : start + number % 50]
    return bytes(out)


def as_json(value: Any) -> bytes:
    """JSON text, also of numbers that JSON has not; of what nests too deep for Python's writer, the same by hand."""
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 5000 + b"]" * 5000
