"""Pairs from rows of prompt, chosen and rejected: what is trained, how pairs are packed, and what is refused."""

import numpy as np
import pytest

from jaxft.config import DataConfig, EvalConfig, ModelConfig, RunConfig
from jaxft.data.loader import Loader
from jaxft.data.preferences import Pair, prepare_pairs
from jaxft.errors import DataError


def run(path, *, metric=None, **data):
    data = {"train": path, "max_length": 64} | data
    return RunConfig(model=ModelConfig(path="model"), data=DataConfig(**data), eval=EvalConfig(metric=metric))


def text_row(number, chosen=" yes", rejected=" no indeed"):
    return {"prompt": f"question {number}:", "chosen": chosen, "rejected": rejected}


def message_row(number):
    return {
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no indeed"}],
    }


def trained_text(example, tokenizer):
    return tokenizer.decode(example.tokens[example.mask == 1], skip_special_tokens=False)


@pytest.mark.parametrize("row", [text_row, message_row], ids=["text", "messages"])
def test_only_the_answers_are_trained(jsonl, tokenizer_of, row):
    tokenizer = tokenizer_of("chatml")
    data = prepare_pairs(run(jsonl([row(n) for n in range(3)])), tokenizer)
    assert data.examination.formats == {"preference": 6} and data.examination.rows == 3
    for number, pair in enumerate(data.train_examples):
        assert isinstance(pair, Pair) and pair.row == number
        chosen, rejected = pair.documents
        assert len(chosen) + len(rejected) == len(pair)
        ends = {tokenizer.token(stop) for stop in tokenizer.stop_ids}
        for document, answer in ((chosen, "yes"), (rejected, "no indeed")):
            trained = trained_text(document, tokenizer)
            assert trained.strip().startswith(answer) and trained.strip().endswith(tuple(ends))
            prompt = tokenizer.decode(document.tokens[document.mask == 0])
            assert f"question {number}" in prompt and answer not in prompt


def test_a_pair_is_packed_as_one(jsonl, tokenizer_of):
    """Both documents of a pair are neighbours in one row: odd segments are chosen, even ones rejected."""
    rows = [text_row(n, " yes" * (1 + n % 3), " no" * (1 + n % 5)) for n in range(12)]
    data = prepare_pairs(run(jsonl(rows)), tokenizer_of("chatml"))
    loader = Loader(data.train_examples, batch_size=2, max_length=64, shuffle=False)
    seen = 0
    for step in range(loader.eval_steps):
        batch = loader.eval_batch(step)
        for tokens, segments, weights in zip(batch.tokens_BS, batch.segments_BS, batch.weights_BS, strict=True):
            for number in range(1, int(segments.max()), 2):
                first, second = (tokens[segments == number + side] for side in (0, 1))
                pair = next(p for p in data.train_examples if np.array_equal(p.documents[0].tokens, first))
                np.testing.assert_array_equal(pair.documents[1].tokens, second)
                assert weights[segments == number].sum() == pair.documents[0].mask.sum()
                seen += 1
    assert seen == len(rows)


def test_a_pair_that_is_too_long_is_dropped_whole_or_refused(jsonl, tokenizer_of):
    path = jsonl([text_row(0), text_row(1, rejected=" no" * 80)])
    with pytest.raises(
        DataError, match=r"1 of 2 examples .* are longer than data.max_length=64; the longest, .*line 2"
    ):
        prepare_pairs(run(path), tokenizer_of("chatml"))
    data = prepare_pairs(run(path, truncation="drop"), tokenizer_of("chatml"))
    assert [pair.row for pair in data.train_examples] == [0] and data.examination.dropped == 1


def test_held_out_prompts_and_the_chosen_answers_are_scored(jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    held_out = jsonl([message_row(9)], name="held.jsonl")
    data = prepare_pairs(run(jsonl([message_row(0)]), eval=held_out, metric="exact_match"), tokenizer)
    assert data.eval_references == ["yes"] and len(data.eval_examples) == 1
    assert "question 9" in tokenizer.decode(data.eval_prompts[0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": " a"}, r"line 1 is no preference: it lacks 'rejected'. A row needs 'prompt', 'cho"),
        ({"question": "q", "chosen": " a", "rejected": " b"}, r"it lacks 'prompt'.*keys: chosen, question, rejected"),
        (text_row(0, " a", " a"), r"line 1: 'chosen' and 'rejected' are the same, so the row prefers nothing"),
        (text_row(0, "", " b"), r"line 1, chosen .*'chosen' is empty"),
        (text_row(0) | {"rejected": [{"role": "assistant", "content": "b"}]}, r"line 1, rejected .*both must be text"),
    ],
)
def test_refusals_name_the_row_and_the_answer(jsonl, tokenizer_of, row, message):
    with pytest.raises(DataError, match=message):
        prepare_pairs(run(jsonl([row])), tokenizer_of("chatml"))
