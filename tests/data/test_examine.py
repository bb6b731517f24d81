"""Counts, refusals and the printed look at a set."""

import io
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from jaxft.config import DataConfig
from jaxft.data.batch import Example
from jaxft.data.examine import ReadCounts, count_repeated, examine
from jaxft.data.show import print_examination, render_rows
from jaxft.data.truncation import ModelLimits
from jaxft.errors import DataError

END = 2


def example(length, trained=1, row=0, end=END):
    tokens = np.arange(10, 10 + length, dtype=np.int32)
    tokens[-1] = end
    mask = np.zeros(length, np.uint8)
    mask[length - trained :] = 1
    return Example(tokens=tokens, mask=mask, row=row)


def look(examples, **config):
    config = DataConfig(**{"max_length": 16, **config})
    return examine(
        examples,
        config,
        model=ModelLimits(stop_ids=frozenset({END})),
        where=lambda row: f"set line {row + 1}",
        source="the set",
        counts=ReadCounts(formats=Counter(messages=len(examples))),
    )


def test_counts():
    examples = [example(n, trained=2, row=n) for n in (4, 6, 8, 10, 12)]
    kept, found = look(examples)
    assert kept == examples
    assert (found.rows, found.examples, found.tokens, found.trained_tokens) == (5, 5, 40, 10)
    assert (found.truncated, found.dropped, found.warnings) == (0, 0, ())
    assert (found.sequences, found.fill) == (3, 40 / 48)
    assert (found.quantiles["p0"], found.quantiles["p50"], found.quantiles["p100"]) == (4, 8, 12)
    assert sum(count for _, _, count in found.histogram) == 5
    assert found.histogram[0][0] == 4 and found.histogram[-1][0] <= 12 <= found.histogram[-1][1]
    assert found.to_dict()["formats"] == {"messages": 5}
    assert look(examples, packing=False)[1].sequences == 5


def test_longer_than_max_length():
    examples = [example(4), example(20, trained=10, row=1), example(24, trained=12, row=2)]
    with pytest.raises(DataError, match=r"2 of 3 examples of the set .* set line 3, has 24 .* data.max_length=24, or"):
        look(examples)
    kept, found = look(examples, truncation="drop")
    assert len(kept) == 1 and (found.dropped, found.truncated, found.rows) == (2, 0, 3)
    assert any("2 examples are longer than 16 tokens and dropped" in w for w in found.warnings)
    kept, found = look(examples, truncation="right")
    assert [len(e) for e in kept] == [4, 16, 16] and (found.dropped, found.truncated) == (0, 2)
    assert found.trained_tokens == 1 + 6 + 4 and found.quantiles["p100"] == 24
    assert any("2 examples do not end in a trained end token" in w for w in found.warnings)


def test_refusals():
    with pytest.raises(DataError, match=r"the set has no rows"):
        look([])
    silent = Example(tokens=np.arange(3, dtype=np.int32), mask=np.zeros(3, np.uint8), row=6)
    with pytest.raises(DataError, match=r"1 of 2 rows of the set train on zero tokens: set line 7\. .*train: false"):
        look([example(4), silent])
    with pytest.raises(DataError, match=r"1 example of the set would train on zero tokens, .* first is set line 2"):
        look([example(4), example(20, trained=2, row=1)], truncation="right")
    with pytest.raises(DataError, match=r"1 example .* shortest has 20 tokens"):
        look([example(20)], truncation="drop")
    with pytest.raises(DataError, match=r"EOS is never trained: the set gives 1 example, and none"):
        look([example(20, trained=10)], truncation="right")
    with pytest.raises(DataError, match=r"EOS is never trained"):
        look([example(4, end=5)])


def test_warnings():
    _, found = look([example(3), example(3)], packing=False)
    assert any("81% of every batch is padding" in w for w in found.warnings)
    _, found = look([example(16), example(16, end=5)])
    assert found.warnings == ("1 example does not end in a trained end token",)


def test_repeated_rows():
    assert count_repeated([example(4), example(5)], [example(5), example(6), example(5)]) == 2


def printed(show, *args, **console):
    out = io.StringIO()
    show(*args, console=Console(file=out, width=100, **console))
    return out.getvalue()


def test_rows_are_marked(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    ids = tokenizer.encode("<|im_start|>user\n[bold]Hi<|im_end|>")
    mask = np.zeros(len(ids), np.uint8)
    mask[-3:] = 1
    shown = Example(tokens=np.array(ids, np.int32), mask=mask, row=3)
    text = printed(render_rows, [shown, shown, shown], tokenizer)
    assert text.count("row 3: ") == 2 and f"{len(ids)} tokens, 3 trained" in text
    assert "<|im_start|>user\n[bold][[Hi<|im_end|>]]" in text
    colored = printed(render_rows, [shown], tokenizer, force_terminal=True, color_system="standard")
    assert "[[" not in colored and "\x1b[1;32mHi<|im_end|>" in colored


def test_examination_is_printed():
    _, found = look([example(n, row=i) for i, n in enumerate((4, 4, 4, 9, 20))], truncation="drop")
    text = printed(print_examination, found)
    assert "5 rows (messages 5), 21 tokens, 4 trained (19%)" in text and "1 dropped" in text
    assert "################################" in text and "warning: 1 example is" in text
