"""Strategies that several inputs share: texts, values of JSON, damaged bytes; and the settings of every test."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def fixed(count: int) -> Any:
    """The same `count` inputs in every run, without a data base of failures and whatever the machine does."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


NASTY = [
    "", " ", "\n", "\r\n", "\0", "\x1b[2J", "\u202e", "\ufeff", "\ud83d", "😀", "e\u0301", "漢字", "null", "NaN",
    "true", "-1", "1e999", "[", "]", "{", "}", '"', "\\", "'", "=", ",", ":", "#", "%s", "{0}", "{{", "{%", "</think>",
    "<think>", "<|im_end|>", "<|im_start|>", "</s>", "[INST]", "__class__", "../../x", "/dev/zero", "~", "hf://a/b",
    "a" * 2000, "[" * 300, '{"a":' * 300,
]  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from(NASTY), st.lists(st.sampled_from(NASTY), max_size=4).map("".join)
)
NUMBERS = st.one_of(
    st.integers(-2, 3), st.sampled_from([2**31, -(2**63), 2**64, 10**40, 10**400]), st.floats(), st.just(1e-320)
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def nested(keys: st.SearchStrategy[str], leaves: int = 8) -> st.SearchStrategy[Any]:
    """Any value of JSON, whose objects have these keys."""
    return st.recursive(
        SCALARS,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)),
        max_leaves=leaves,
    )


@st.composite
def damaged(draw: st.DrawFn, raw: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of which up to three pieces are changed, removed, repeated or put in."""
    data = draw(raw)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 12)))
        new = draw(st.one_of(st.binary(max_size=6), st.just(data[at:end] * 3), st.sampled_from(NASTY).map(as_bytes)))
        data = data[:at] + new + data[end:]
    return data


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
