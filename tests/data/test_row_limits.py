"""Rows and files that claim more than text has: judged before memory or disk is spent on them."""

import gzip
import json

import pytest

from jaxft.config import DataConfig
from jaxft.data.chat import row_limits
from jaxft.data.chat.encode import encode_all
from jaxft.data.formats import read_row
from jaxft.data.sources import json_rows, text
from jaxft.data.sources.json_rows import JsonlRows
from jaxft.data.sources.text import text_of
from jaxft.errors import DataError


@pytest.mark.parametrize("truncation", ["refuse", "drop", "windows", "right"])
def test_a_row_far_beyond_the_limit_is_not_tokenised(tokenizer_of, truncation, monkeypatch):
    monkeypatch.setattr(row_limits, "JUDGED", 100)
    monkeypatch.setattr(row_limits, "MOST", 100_000)
    tokenizer = tokenizer_of("plain")
    config = DataConfig(train="rows.jsonl", max_length=8, truncation=truncation)
    size = 8 * tokenizer.longest_token * 4 + 1

    def examples(characters):
        row = {"prompt": "Q", "completion": "a" * (characters - 1)}
        return list(encode_all([read_row(row, config, row=0, where="rows.jsonl line 1")], tokenizer, config))

    assert len(examples(50)) == 1
    if truncation in ("refuse", "drop"):
        with pytest.raises(DataError, match=rf"line 1 has {size:,} characters, more than data.max_length=8 tokens can"):
            examples(size)
    else:
        assert len(examples(size)) == 1
    with pytest.raises(DataError, match=r"line 1 has 100,001 characters"):
        examples(100_001)


def test_a_line_that_is_longer_than_a_row_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MOST_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"text": "a" * 200}) + "\n", encoding="utf-8")
    rows = JsonlRows(str(path))
    assert rows[0] == {"text": "a"}
    with pytest.raises(DataError, match=r"rows.jsonl line 2 has 212 bytes, and rows of at most 100 are read: split it"):
        rows[1]


def test_a_file_that_expands_without_measure_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 2**16)
    monkeypatch.setattr(text, "EXPANDED", 2**20)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' + b"0" * 2**24))
    with pytest.raises(DataError, match=r"bytes are .* bytes of text, more than 200 times as many"):
        text_of(str(path))
    many = b"".join(json.dumps({"text": f"row {number} of many"}).encode() + b"\n" for number in range(50_000))
    path.write_bytes(gzip.compress(many))
    assert text_of(str(path)).size == len(many) > text.EXPANDED
