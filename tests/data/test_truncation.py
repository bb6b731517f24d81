"""Rows longer than a training sequence: every cut keeps the tokens and the mask that it says it keeps."""

import dataclasses
import json
import re

import numpy as np
import pytest

from jaxft.config import DataConfig, with_overrides
from jaxft.data.batch import Example
from jaxft.data.examine import ReadCounts, combine_examinations, examine
from jaxft.data.prepare import prepare
from jaxft.data.truncation import LengthLimit, ModelLimits, last_tokens_of, mend_for_length, windows_of
from jaxft.errors import DataError
from jaxft.nn.virtual import virtual_ids

BOS, END = 1, 2


def example(mask, row=0, first=100):
    """Tokens that tell their position, with an array that does so too."""
    mask = np.array(mask, np.uint8)
    at = np.arange(len(mask), dtype=np.int32)
    return Example(tokens=at + first, mask=mask, row=row, arrays={"at": np.stack([at, -at], axis=1)})


@pytest.mark.parametrize("seed", range(20))
def test_windows_train_every_trained_token_once(seed):
    random = np.random.default_rng(seed)
    length, max_length = int(random.integers(2, 200)), int(random.integers(8, 40))
    lead = int(random.integers(0, 4))
    overlap = int(random.integers(1, max_length - lead))
    mask = np.repeat(random.integers(0, 2, length), random.integers(1, 30, length))[:length]
    mask[: max(1, lead)] = 0
    mask[-1] = 1
    whole = example(mask)
    windows = windows_of(whole, max_length, overlap, lead)
    trained = [int(at) - 100 for one in windows for at in one.tokens[one.mask == 1]]
    assert trained == np.flatnonzero(mask).tolist(), "in order, and none twice"
    for one in windows:
        positions = one.tokens - 100
        own = positions[lead:]
        assert len(one) <= max_length and one.mask[0] == 0 and one.mask[-1] == 1
        assert positions[:lead].tolist() == list(range(lead)) and (np.diff(own) == 1).all(), "a stretch of the whole"
        np.testing.assert_array_equal(one.arrays["at"], whole.arrays["at"][positions])
        first = int(np.argmax(one.mask)) - lead
        assert own[0] == lead or first == overlap, "the tokens before are shown"
    if len(whole) <= max_length:
        assert len(windows) == 1


@pytest.mark.parametrize("lead", [0, 3])
def test_the_last_tokens_stay(lead):
    whole = example([0] * 5 + [1] * 4 + [0] * 6 + [1] * 5)
    cut = last_tokens_of(whole, 10, lead)
    kept = [*range(lead), *range(10 + lead, 20)]
    assert (cut.tokens - 100).tolist() == kept
    assert cut.mask.tolist() == [int(whole.mask[at]) for at in kept]
    np.testing.assert_array_equal(cut.arrays["at"], whole.arrays["at"][kept])
    assert last_tokens_of(example([0] + [1] * 19), 10).mask.tolist() == [0] + [1] * 9, "nothing predicts the first"


def look(examples, chats=0, model=None, **config):
    counts = ReadCounts()
    counts.formats["text"], counts.chats["messages"] = len(examples), chats
    model = model or ModelLimits(stop_ids=frozenset({END}), bos_id=BOS)
    config = DataConfig(**{"max_length": 16, **config})
    return examine(
        examples, config, model=model, where=lambda row: f"set line {row + 1}", source="the set", counts=counts
    )


def document(length, trained, row=0, first=()):
    tokens = np.array([*first, BOS, *range(100, 99 + length - len(first))], np.int32)
    tokens[-1] = END
    mask = np.zeros(length, np.uint8)
    mask[length - trained :] = 1
    return Example(tokens=tokens, mask=mask, row=row)


def test_windows_are_counted_and_begin_as_documents_do():
    virtual = virtual_ids(2)
    long, short = document(60, 57, first=virtual), document(10, 7, row=1, first=virtual)
    kept, seen = look([long, short], truncation="windows", window_overlap=3)
    assert all(one.tokens[:3].tolist() == [*virtual, BOS] for one in kept)
    assert (seen.rows, seen.windowed, seen.truncated, seen.dropped) == (2, 1, 0, 0)
    # 13 tokens after the first three: the first window trains 13, each later one 10.
    assert seen.windows == 1 + -(-(57 - 13) // 10) and seen.examples == seen.windows + 1 == len(kept)
    assert seen.trained_tokens == 57 + 7 and seen.warnings == () and seen.before_fitting == 2
    both = combine_examinations([seen, seen], [*kept, *kept], "sets")
    assert (both.windowed, both.windows) == (2, 2 * seen.windows)
    kept, seen = look([long], truncation="windows")
    assert kept[1].mask.tolist() == [0] * 5 + [1] * 11, "an eighth of 16 is shown again after the first three"


def test_left_keeps_answers_where_right_loses_them():
    examples = [document(30, 4), document(10, 4, row=1)]
    with pytest.raises(
        DataError, match=r"1 example .* train on zero tokens.* set line 1.*Set data.truncation to 'left'"
    ):
        look(examples, truncation="right")
    kept, seen = look(examples, truncation="left")
    assert [len(one) for one in kept] == [16, 10] and all(one.tokens[0] == BOS for one in kept)
    assert (seen.truncated, seen.trained_tokens, seen.examples) == (1, 8, 2)
    assert seen.warnings == ("1 example is longer than 16 tokens and cut",)
    _, seen = look([document(30, 20)], truncation="left")
    assert any("1 example begins within an answer, which alone is longer than 16 tokens" in w for w in seen.warnings)
    _, seen = look([document(30, 29)], truncation="left")
    assert not any("begin within an answer" in w for w in seen.warnings), "plain text has no answer"


def test_windows_of_chats_are_refused():
    with pytest.raises(
        DataError, match=r"1 of 2 .* longer than data.max_length=16, and some are chats.* set line 2.*'left'"
    ):
        look([document(10, 4), document(30, 4, row=1)], chats=1, truncation="windows")
    assert look([document(10, 4)], chats=1, truncation="windows")[1].windows == 0
    with pytest.raises(
        DataError, match=r"begin with 3 tokens that every document has.*data.window_overlap=13, which leaves"
    ):
        look([document(30, 4, first=virtual_ids(2))], truncation="windows", window_overlap=13)


@pytest.mark.parametrize("nested", [False, True])
def test_no_length_beyond_the_model_is_suggested(tmp_path, nested):
    own = {"max_position_embeddings": 20}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": own} if nested else own))
    model = ModelLimits(stop_ids=frozenset({END}), path=str(tmp_path))
    with pytest.raises(DataError, match=r"has 20 tokens. Set data.max_length=20, or data.truncation to 'left'"):
        look([document(20, 4)], model=model)
    with pytest.raises(DataError, match=r"has 21 tokens. The model was made for 20 positions, so set data.truncation"):
        look([document(21, 4)], model=model)
    with pytest.raises(DataError, match=r"shortest has 21 tokens. The model was made for 20 positions, .*'left'"):
        look([document(21, 4)], model=model, truncation="drop")
    for text in ("[]", "{", '{"max_position_embeddings": null}'):
        (tmp_path / "config.json").write_text(text)
        assert model.positions is None
    assert ModelLimits(stop_ids=frozenset(), path=str(tmp_path / "none")).positions is None


@pytest.mark.parametrize("trained", [4, 20, 29], ids=["question", "long answer", "text"])
@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("chats", [0, 1])
def test_every_setting_that_is_suggested_works(trained, others, chats):
    examples = [document(30, trained), *[document(10, 4, row=1)] * others]
    with pytest.raises(DataError, match=r"has 30 tokens\. Set data.max_length=30, or data.truncation to") as refused:
        look(examples, chats=chats)
    ways = re.findall(r"'(\w+)'", str(refused.value).partition("truncation")[2])
    assert ways
    for way in ("drop", "left", "right", "windows"):
        if way in ways:
            assert look(examples, chats=chats, truncation=way)[1].trained_tokens
        else:
            with pytest.raises(DataError):
                look(examples, chats=chats, truncation=way)
    assert look(examples, chats=chats, max_length=30)[1].truncated == 0


def test_mends_without_any_truncation():
    assert mend_for_length(9, None, []) == "Set data.max_length=9."
    assert mend_for_length(9, 8, []) == "The model was made for 8 positions, so shorten the rows."
    assert mend_for_length(9, 8, ["drop"]).endswith("so set data.truncation to 'drop'.")
    assert mend_for_length(9, 9, ["drop", "left", "right"]).endswith("or data.truncation to 'drop', 'left' or 'right'.")


def test_pairs_are_only_dropped():
    limit = LengthLimit(
        config=DataConfig(max_length=4), model=ModelLimits(stop_ids=frozenset()), source="s", where=str, pairs=True
    )
    with pytest.raises(DataError, match=r"data.max_length=9, or data.truncation to 'drop'\.$"):
        limit.fit([document(9, 2), document(4, 2)], np.array([9, 4]))
    with pytest.raises(DataError, match=r"data.max_length=9\.$"):
        limit.fit([document(9, 2)], np.array([9]))


def test_a_long_text_of_a_file_becomes_windows_in_both_sets(jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    texts = [" ".join(f"word{n} is {n * n}" for n in range(60)), "short one"]
    path = jsonl([{"text": text} for text in texts])
    settings = {
        "model.path": "m",
        "data.train": path,
        "data.eval": path,
        "data.max_length": 64,
        "data.truncation": "windows",
    }
    data = prepare(with_overrides(settings), tokenizer)
    for examples, seen in ((data.train_examples, data.examination), (data.eval_examples, data.eval_examination)):
        assert seen.windowed == 1 and len(examples) == seen.windows + 1 > 4
        ids = [int(token) for one in examples if one.row == 0 for token in one.tokens[one.mask == 1]]
        whole = tokenizer.encode(texts[0])
        assert ids == [*whole[1:], tokenizer.eos_id], "all of the text but its first token, once"
    chats = jsonl(
        [{"messages": [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": "a"}]}], name="c.jsonl"
    )
    with pytest.raises(DataError, match=r"some are chats: .*The longest is c.jsonl line 1"):
        prepare(with_overrides(settings | {"data.train": chats}), tokenizer)
    cut = prepare(
        with_overrides(settings | {"data.train": chats, "data.eval": None, "data.truncation": "left"}), tokenizer
    )
    (one,) = cut.train_examples
    assert tokenizer.decode(one.tokens[one.mask == 1], skip_special_tokens=False) == "a<|im_end|>" and len(one) == 64
    assert dataclasses.asdict(cut.examination)["truncated"] == 1
