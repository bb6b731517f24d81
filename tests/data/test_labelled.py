"""Rows with a label: their forms, mismatched documents, what is refused, and the balance of labels."""

import json

import jax
import numpy as np
import pytest

from jaxft import api
from jaxft.config import MeshConfig, load
from jaxft.data.batch import Example
from jaxft.data.formats import DESIRABLE
from jaxft.data.loader import Loader
from jaxft.data.preferences.labelled import Labelled, mismatch, prepare_labelled
from jaxft.errors import DataError
from jaxft.sharding.mesh import make_mesh_plan


def prepared(tmp_path, rows, **overrides):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "method.name": "kto", "data.train": str(path), "data.eval": None, "eval.metric": None, "data.limit": None,
        "data.max_length": 96,
    }  # fmt: skip
    config = load("configs/quickstart.py:smoke", settings | overrides)
    return prepare_labelled(config, api.load_tokenizer(config.model.path))


def text_rows(count=6):
    return [{"prompt": f"Colour {n}?", "completion": f" {n} red", "label": n % 2 == 0} for n in range(count)]


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def test_labels_and_forms(tmp_path):
    forms = [
        {"prompt": [USER], "completion": [ANSWER], "label": 1},
        {"prompt": [{**USER, "content": "Ho"}], "completion": [ANSWER], "label": False},
        {"completion": [USER, ANSWER], "label": 0},
        {"messages": [USER, ANSWER], "label": True},
        {"question": "Hi", "completion": "Hello", "label": "false"},
        {"messages": [USER, ANSWER, USER, {**ANSWER, "content": "Bye"}], "label": "true"},
    ]
    (one,) = prepared(tmp_path, forms).sets
    assert [example.values[DESIRABLE] for example in one.examples] == [(1.0,), (0.0,), (0.0,), (1.0,), (0.0,), (1.0,)]
    # The form does not matter, and of a conversation the last answer is trained.
    for other in one.examples[2:5]:
        np.testing.assert_array_equal(other.tokens, one.examples[0].tokens)
        np.testing.assert_array_equal(other.mask, one.examples[0].mask)
    assert one.examples[5].mask.sum() < one.examples[0].mask.sum()
    assert one.examination.holds["a good label"] == 3 and one.examination.holds["a bad label"] == 3


def test_labels_of_another_column(tmp_path):
    rows = [{"q": row["prompt"], "a": row["completion"], "thumbs_up": row["label"]} for row in text_rows()]
    columns = {"data.prompt_field": "q", "data.completion_field": "a", "data.label_field": "thumbs_up"}
    examples, expected = prepared(tmp_path, rows, **columns).train_examples, prepared(tmp_path, text_rows())
    for one, other in zip(examples, expected.train_examples, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.values == other.values


def examples_of(prompts, lengths, longest=64):
    out = []
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens = np.array([prompt] * 3 + [10 * row + 10 + i for i in range(length)], np.int32)
        out.append(Example(tokens=tokens, mask=(np.arange(len(tokens)) >= 3).astype(np.uint8), row=row))
    return out


def test_mismatched_documents_have_another_prompts_answer():
    examples = examples_of([1, 1, 2, 1, 3, 1, 2, 1], [2, 3, 4, 5, 2, 3, 4, 5])
    out = mismatch(examples, seed=3, max_length=64)
    answers = {tuple(e.tokens[3:].tolist()): e.tokens[0] for e in examples}
    for example, own in zip(out, examples, strict=True):
        other = example.mismatched
        assert (
            other.tokens[:3].tolist() == own.tokens[:3].tolist() and not other.mask[:3].any() and other.mask[3:].all()
        )
        assert answers[tuple(other.tokens[3:].tolist())] != own.tokens[0]
        assert len(example) == max(len(own.tokens), len(other)) and len(example.documents[0]) == len(own.tokens)
    again, elsewhere = mismatch(examples, seed=3, max_length=64), mismatch(examples, seed=4, max_length=64)
    same = [np.array_equal(a.mismatched.tokens, b.mismatched.tokens) for a, b in zip(out, again, strict=True)]
    assert all(same)
    assert any(
        not np.array_equal(a.mismatched.tokens, b.mismatched.tokens) for a, b in zip(out, elsewhere, strict=True)
    )


def test_if_all_prompts_differ_every_answer_is_mismatched_once():
    examples = examples_of(range(8), [2, 3, 4, 5, 6, 7, 8, 9])
    used = [tuple(example.mismatched.tokens[3:].tolist()) for example in mismatch(examples, 0, 64)]
    assert sorted(used) == sorted(tuple(example.tokens[3:].tolist()) for example in examples)


def test_an_answer_that_does_not_fit_is_passed_over():
    examples = examples_of(range(6), [2, 2, 9, 2, 2, 2])
    out = mismatch(examples, 0, max_length=6)
    assert [len(example.mismatched) for example in out] == [5] * 6


def test_parallel_batches_have_the_same_documents_in_the_same_places(tmp_path):
    from jaxft.methods.kto import mismatched_of

    data = prepared(tmp_path, [*text_rows(9), {"prompt": "Longer prompt?", "completion": " long" * 6, "label": True}])
    loaders = [
        Loader(examples, batch_size=2, max_length=96, seed=1)
        for examples in (data.train_examples, mismatched_of(data.train_examples))
    ]
    assert loaders[0].plan == loaders[1].plan
    for step in range(3):
        answers, mismatched = (loader.batch(step) for loader in loaders)
        np.testing.assert_array_equal(answers.segments_BS.max(axis=1), mismatched.segments_BS.max(axis=1))
        assert not np.array_equal(answers.tokens_BS, mismatched.tokens_BS)


def test_apo_needs_no_mismatched_documents(tmp_path):
    rows = [{**row, "prompt": "The same?"} for row in text_rows()]
    data = prepared(tmp_path, rows, **{"method.kto.loss_type": "apo_zero_unpaired"})
    assert not any(isinstance(example, Labelled) for example in data.train_examples)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, r"line 1: it has no 'label', which says whether .*Set data.label_field"),
        ({"label": 2}, r"line 1: 'label' is '2'; it may be true or false, or 1 or 0"),
        ({"label": "good"}, r"'label' is 'good'"),
        ({"prompt": None}, r"line 1: it has no prompt: there is no 'prompt', and 'completion' is text"),
        ({"prompt": None, "completion": None}, r"line 1 .*prompt and completion are null"),
        ({"prompt": None, "completion": None, "text": "all"}, r"it is plain text, which has no prompt"),
        ({"completion": ""}, r"'completion' is empty"),
    ],
)
def test_rows_that_are_refused(tmp_path, change, message):
    rows = text_rows()
    rows[0] |= change
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, rows)


def test_data_that_teaches_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"all 6 training rows have the label True.* Add rows with the label False"):
        prepared(tmp_path, [{**row, "label": True} for row in text_rows()])
    with pytest.raises(DataError, match=r"rows.jsonl .*: all 6 rows have the same prompt, .*'apo_zero_unpaired'"):
        prepared(tmp_path, [{**row, "prompt": "The same?"} for row in text_rows()])


def test_a_mixture_may_have_a_set_for_each_label(tmp_path):
    """The balance is that of all sets; mismatched documents stay within a set, and both batches take the same rows."""
    from jaxft.methods import kto
    from jaxft.methods.method import Run
    from jaxft.methods.parts import sequences

    for name, label in (("good", True), ("bad", False)):
        rows = [{**row, "label": label} for row in text_rows()]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = {name: {"path": str(tmp_path / f"{name}.jsonl"), "weight": 1.0} for name in ("good", "bad")}
    settings = {
        "method.name": "kto", "data.train": "", "data.mixture": mixture, "data.eval": None, "eval.metric": None,
        "data.limit": None, "data.max_length": 96, "train.batch_size": 8,
    }  # fmt: skip
    config = load("configs/quickstart.py:smoke", settings)
    tokenizer = api.load_tokenizer(config.model.path)
    data = prepare_labelled(config, tokenizer)
    source = sequences.source(config, data, tokenizer)
    mesh = make_mesh_plan(MeshConfig(), jax.devices()[:1])
    run = Run(
        config=config, folder=tmp_path, tokenizer=tokenizer, data=data, mesh=mesh, model=None, source=source
    )  # fmt: skip
    batch = kto.feed(run, None)(None, 1)
    assert {0.0, 1.0} == set(np.unique(batch.answers.values[DESIRABLE][:, 0]))
    np.testing.assert_array_equal(batch.answers.segments_BS.max(axis=1), batch.mismatched.segments_BS.max(axis=1))
    for own, other in zip(np.asarray(batch.answers.tokens_BS), np.asarray(batch.mismatched.tokens_BS), strict=True):
        assert np.array_equal(own[:9], other[:9]) and not np.array_equal(own, other)  # the same first prompt


def test_references_of_scores_are_answers_labelled_good(tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in text_rows(4)))
    overrides = {"data.eval": str(held_out), "eval.metric": "exact_match"}
    assert prepared(tmp_path, text_rows(), **overrides).eval_references == [" 0 red", " 2 red"]
    held_out.write_text("".join(json.dumps({**row, "label": 0}) + "\n" for row in text_rows(4)))
    with pytest.raises(DataError, match=r"no held-out row is labelled good"):
        prepared(tmp_path, text_rows(), **overrides)


def test_an_imbalance_of_labels_is_warned_about(tmp_path):
    rows = [{**row, "label": n < 2} for n, row in enumerate(text_rows(8))]
    (warning,) = [w for w in prepared(tmp_path, rows).examination.warnings if "desirable" in w]
    assert warning.startswith("2 desirable and 6 undesirable answers, each with its weight, are as 0.33 to 1")
    assert "method.kto.desirable_weight to between 3.00 and 4.00" in warning
    assert "method.kto.undesirable_weight to between 0.25 and 0.33" in warning
    data = prepared(tmp_path, rows, **{"method.kto.desirable_weight": 3.5})
    assert not [w for w in data.examination.warnings if "desirable" in w]
