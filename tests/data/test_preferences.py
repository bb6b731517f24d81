"""Pairs from rows of prompt, chosen and rejected: what is trained, how pairs are packed, and what is refused."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from jaxft.config import DataConfig, EvalConfig, ModelConfig, RunConfig
from jaxft.config.data import MixtureSet
from jaxft.data.loader import Loader
from jaxft.data.preferences import Pair, prepare_pairs
from jaxft.data.show import print_examination, render_rows
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
    assert data.examination.formats == {"preference": 3} and data.examination.rows == 3
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
        DataError, match=r"1 of 2 examples .* is longer than data.max_length=64; the longest, .*line 2.* 'drop'"
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
        (
            {"prompt": "q", "chosen": " a"},
            r"line 1: it is no preference: it lacks 'rejected'. A row needs 'prompt', 'cho",
        ),
        (
            {"query": "q", "chosen": " a", "rejected": " b"},
            r"no column 'prompt', and .* in 'query'. Set data.prompt_field='query'",
        ),
        (text_row(0, " a", " a"), r"line 1: 'chosen' and 'rejected' are the same, so the row prefers nothing"),
        (text_row(0, "", " b"), r"line 1, chosen .*'chosen' is empty"),
        (text_row(0) | {"rejected": [{"role": "assistant", "content": "b"}]}, r"line 1, rejected .*both must be text"),
    ],
)
def test_refusals_name_the_row_and_the_answer(jsonl, tokenizer_of, row, message):
    with pytest.raises(DataError, match=message):
        prepare_pairs(run(jsonl([row])), tokenizer_of("chatml"))


def test_margins_go_with_both_documents(jsonl, tokenizer_of):
    rows = [text_row(n) | {"score_chosen": n, "score_rejected": 1} for n in range(3)]
    data = prepare_pairs(run(jsonl(rows)), tokenizer_of("chatml"))
    assert [pair.values for pair in data.train_examples] == [{"margin": (n - 1.0, n - 1.0)} for n in range(3)]
    (batch,) = [Loader(data.train_examples, batch_size=1, max_length=256, shuffle=False).eval_batch(0)]
    assert batch.values["margin"][0, :6].tolist() == [-1, -1, 0, 0, 1, 1]
    without = prepare_pairs(run(jsonl([text_row(0)], name="bare.jsonl")), tokenizer_of("chatml"))
    assert without.train_examples[0].values == {"margin": (0.0, 0.0)}


def test_margins_of_some_rows_only_are_refused(jsonl, tokenizer_of):
    rows = [text_row(0), text_row(1), text_row(2) | {"margin": 1.0}]
    with pytest.raises(DataError, match=r"line 3 has a margin, or scores .* and .*line 1 has none. Give all rows one"):
        prepare_pairs(run(jsonl(rows)), tokenizer_of("chatml"))


def ranked_row(number, *scores):
    answers = [{"response": f"{number} {' well' * place}", "score": score} for place, score in enumerate(scores, 1)]
    return {"instruction": f"question {number}", "completions": answers}


def test_a_list_gives_several_pairs_of_its_row(jsonl, tokenizer_of):
    path = jsonl([ranked_row(0, 1, 3, 2), ranked_row(1, 5, 5), ranked_row(2, 1, 1, 2)])
    data = prepare_pairs(
        run(path, pairs="all", max_length=128, eval=path, metric="exact_match"), tokenizer_of("chatml")
    )
    assert [(pair.row, pair.part) for pair in data.train_examples] == [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2)]
    assert [pair.values["margin"][0] for pair in data.train_examples] == [1, 2, 1, 1, 1]
    examination = data.examination
    assert (examination.rows, examination.examples, examination.formats) == (3, 5, {"ranked": 2})
    assert (examination.pairs.ties, examination.pairs.rows_left_out) == (2, 1)
    assert data.eval_references == ["0  well well", "2  well well well"]  # once for each row


def test_a_set_without_a_pair_is_refused(jsonl, tokenizer_of):
    with pytest.raises(DataError, match=r"none of the 2 rows of .* ranked differently.*data.score_field"):
        prepare_pairs(run(jsonl([ranked_row(0, 1, 1), ranked_row(1, 2)])), tokenizer_of("chatml"))


def test_an_answer_that_is_cut_into_several_sequences_is_refused(jsonl, tokenizer_of):
    thought = {"role": "assistant", "content": "<think>so</think>Yes."}
    turns = [thought, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": turns, "rejected": turns[:1]}
    with pytest.raises(DataError, match=r"an answer of rows.jsonl line 1 was cut into several sequences"):
        prepare_pairs(run(jsonl([row])), tokenizer_of("thinking"))


def test_the_examination_compares_both_answers(jsonl, tokenizer_of):
    rows = [text_row(n, " yes" * 4, " no") | {"margin": (-1.0 if n == 0 else n)} for n in range(30)]
    rows += [rows[1], text_row(2, " no", " yes" * 4) | {"margin": 0.0}]
    data = prepare_pairs(run(jsonl(rows)), tokenizer_of("chatml"))
    pairs = data.examination.pairs
    assert (pairs.count, pairs.chosen_longer, pairs.rejected_longer) == (32, 31, 1)
    assert pairs.chosen["p100"] == pairs.rejected["p100"] > pairs.rejected["p50"] and pairs.length_bias == "chosen"
    assert pairs.mean_chosen - pairs.mean_rejected == pytest.approx(
        30 / 32 * (pairs.chosen["p50"] - pairs.rejected["p50"]), abs=0.01
    )
    assert (pairs.repeated, pairs.both_orders, pairs.swapped, pairs.level) == (1, 2, 1, 1)
    assert (pairs.margins["p0"], pairs.margins["p100"]) == (-1, 29)
    assert data.examination.to_dict()["pairs"]["both_orders"] == 2
    told = " ".join(data.examination.warnings)
    for words in ("chosen answer is the longer one in 97%", "in 1 of 32 pairs the chosen answer has the lower score",
                  "1 of 32 pairs both answers have the same score", "2 of 32 pairs also occur the other way round",
                  "1 of 32 pairs are repetitions"):  # fmt: skip
        assert words in told, words


def test_a_few_pairs_or_balanced_ones_tell_no_bias(jsonl, tokenizer_of):
    few = prepare_pairs(run(jsonl([text_row(n, " yes" * 4) for n in range(5)])), tokenizer_of("chatml"))
    assert few.examination.pairs.length_bias is None and few.examination.pairs.margins is None
    rows = [text_row(n, " yes" * (1 + n % 2), " no" * (2 - n % 2)) for n in range(40)]
    even = prepare_pairs(run(jsonl(rows, name="even.jsonl")), tokenizer_of("chatml"))
    assert even.examination.pairs.length_bias is None and not even.examination.warnings


def test_sets_of_a_mixture_are_examined_together(jsonl, tokenizer_of):
    sets = {
        "scored": MixtureSet(path=jsonl([ranked_row(n, 1, 1, 4) for n in range(3)]), pairs="best_others"),
        "plain": MixtureSet(
            path=jsonl([{"q": "a?", "chosen": " a", "rejected": " b"}], name="p.jsonl"), prompt_field="q"
        ),
    }
    data = prepare_pairs(run("", mixture=sets, max_length=128), tokenizer_of("chatml"))
    assert [one.examination.pairs.count for one in data.sets] == [1, 6]
    assert (data.examination.pairs.count, data.examination.pairs.margins["p100"]) == (7, 3.0)
    assert data.sets[0].examination.pairs.margins is None


def test_both_answers_are_printed_with_their_names(jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    data = prepare_pairs(run(jsonl([text_row(0)])), tokenizer)
    out = io.StringIO()
    console = Console(file=out, width=100)
    render_rows(data.train_examples, tokenizer, console=console)
    print_examination(data.examination, console=console)
    text = out.getvalue()
    end = "<|im_end|>"
    assert re.search(
        r"row 0: \d+ tokens, \d+ trained\nchosen: \d+ tokens, \d+ trained\nquestion 0:\[\[ yes" + re.escape(end), text
    )
    assert re.search(r"\nrejected: \d+ tokens, \d+ trained\nquestion 0:\[\[ no indeed" + re.escape(end), text)
    assert "1 row (preference 1)" in text
    assert "1 pair; the chosen answer is longer in 0% and shorter in 100%, by -" in text
    assert "chosen answers: " in text and "margins" not in text
