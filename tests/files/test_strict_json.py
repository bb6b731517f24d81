"""JSON of others: what is refused, always as ValueError, and what is read."""

import json

import pytest

from jaxft.files.strict_json import MAX_DEPTH, parse_json


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 200_000, "nested deeper than 200"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "nested deeper than 200"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested deeper than 200"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', "the name 'c' is there twice"),
        (b'{"a": "\xff"}', "not UTF-8 text: byte 0xff at 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
        (b'{"a": ["\\ud83d"]}', "half of a character"),
        (b'{"\\udc00": 1}', "half of a character"),
        ('["\ud800"]', "half of a character"),
        (b"9" * 5_000, "integer string conversion"),
        (b'{"a": 1} x', "Extra data"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_wrong_is_a_value_error_with_the_reason(content, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(content)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_has_not_are_refused_where_they_must_be(number):
    assert isinstance(parse_json(number), float)
    with pytest.raises(ValueError, match=f"{number} is no JSON value"):
        parse_json(number, finite=True)


@pytest.mark.parametrize("depth", [0, 1, MAX_DEPTH])
def test_what_is_whole_is_read_as_python_reads_it(depth):
    text = "[" * depth + json.dumps({"a": [1, 2.5, "\U0001f600", None], "b": {"a": True}}) + "]" * depth
    if depth == MAX_DEPTH:
        text = "[" * depth + "]" * depth
    assert parse_json(text) == parse_json(text.encode()) == parse_json(b"\xef\xbb\xbf" + text.encode())
    assert parse_json(text) == json.loads(text)


def test_half_a_character_is_left_to_a_reader_that_names_the_row():
    assert parse_json('"\\ud800"', whole_characters=False) == "\ud800"
