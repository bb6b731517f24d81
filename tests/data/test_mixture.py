"""Batches of several sets: a pure function of the step, token shares as asked for, stages, exhaustion."""

from collections import Counter

import numpy as np
import pytest

from jaxft.config import DataConfig, MixtureSet, ModelConfig, RunConfig, TrainConfig
from jaxft.data.batch import Example
from jaxft.data.mixture import Mixture
from jaxft.data.prepare import TrainSet, prepare
from jaxft.errors import DataError
from jaxft.methods.parts import sequences
from jaxft.runs.course import course_of
from jaxft.runs.data_summary import data_summary, print_mixture

LENGTH = 64
# First token of a row -> its set: see `rows`.
MARKS = {"long": 1000, "short": 2000, "tiny": 3000}


def rows(name, count, low, high, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for row in range(count):
        tokens = np.full(int(rng.integers(low, high)), MARKS[name] + row % 1000, np.int32)
        mask = np.ones(len(tokens), np.uint8)
        mask[: 1 + len(tokens) // 2] = 0
        made.append(Example(tokens=tokens, mask=mask, row=row))
    return TrainSet(name=name, examples=made, examination=None)


SETS = (rows("long", 300, 30, 60), rows("short", 500, 4, 9), rows("tiny", 30, 10, 20))


def mixture(weights, *, sets=SETS, stages=None, seed=3, steps=60, batch_size=8, packing=True, shuffle=True, **limits):
    sets = tuple(one for one in sets if one.name in weights)
    data = DataConfig(
        mixture={n: MixtureSet(path="x", weight=w, max_epochs=limits.get(n)) for n, w in weights.items()},
        stages=stages,
        max_length=LENGTH,
        packing=packing,
        shuffle=shuffle,
    )
    return Mixture(sets, data, batch_size=batch_size, seed=seed, steps=steps)


def counted(made, steps, rows=None):
    """Tokens of every set in these steps' batches, and how often each document came, counted in the arrays."""
    tokens, seen = Counter(), Counter()
    for step in steps:
        batch = made.batch(step, rows)
        for b in range(len(batch.tokens_BS)):
            for segment in range(1, batch.segments_BS[b].max() + 1):
                document = batch.tokens_BS[b][batch.segments_BS[b] == segment]
                name = next(n for n, mark in MARKS.items() if mark <= document[0] < mark + 1000)
                tokens[name] += len(document)
                seen[name, int(document[0])] += 1
    return tokens, seen


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", [{"long": 0.7, "short": 0.3}, {"long": 5, "short": 3, "tiny": 0.5}])
def test_weights_are_shares_of_tokens(weights, packing):
    made = mixture(weights, packing=packing)
    tokens, _ = counted(made, range(60))
    for name, weight in weights.items():
        assert tokens[name] / tokens.total() == pytest.approx(weight / sum(weights.values()), rel=0.05, abs=0.01)
    # What is said is what was counted, at the end and on the way.
    for upto in (1, 25, 60):
        tokens, _ = counted(made, range(upto))
        said = {share.name: share.tokens for share in made.shares(0, upto)}
        assert said == {name: tokens[name] for name in said}
        metrics = made.metrics(upto)
        assert metrics == {f"token_share/{n}": pytest.approx(tokens[n] / tokens.total()) for n in said}


def test_every_batch_is_mixed():
    made = mixture({"long": 0.5, "short": 0.5})
    for step in range(10):
        tokens, _ = counted(made, [step])
        assert 0.25 < tokens["long"] / tokens.total() < 0.75


def test_a_batch_is_a_function_of_seed_and_step():
    weights, stages = {"long": 0.7, "short": 0.3, "tiny": 0.1}, "0.5: long, short; 0.5: short, tiny"
    made = mixture(weights, stages=stages)
    stream = [made.batch(step) for step in range(60)]
    fresh = mixture(weights, stages=stages, sets=SETS[::-1])  # nor of the order of the sets
    for step in (59, 0, 30, 29, 41):
        for ours, theirs in zip(fresh.batch(step)[:5], stream[step][:5], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for part in (slice(0, 4), slice(4, 8), slice(2, 3)):  # a process that feeds these rows
            for ours, theirs in zip(fresh.batch(step, part)[:5], stream[step][:5], strict=True):
                np.testing.assert_array_equal(ours, theirs[part])
    assert (mixture(weights, stages=stages, seed=4).batch(0).tokens_BS != stream[0].tokens_BS).any()


def test_another_set_does_not_reorder_the_others():
    one, two = mixture({"long": 1}), mixture({"long": 1, "tiny": 1})
    assert [e.row for e in one.streams["long"][5]] == [e.row for e in two.streams["long"][5]]


def test_sets_repeat_whole():
    made = mixture({"long": 1, "tiny": 1}, steps=40)
    _, seen = counted(made, range(40))
    epochs = {share.name: share.epochs for share in made.shares(0, 40)}
    assert epochs["tiny"] > 4 and epochs["long"] < 2
    for name, epoch in epochs.items():
        times = [count for (of, _), count in seen.items() if of == name]
        assert max(times) <= int(epoch) + 1 and min(times) >= int(epoch)


def test_stages_change_the_weights_at_their_step():
    made = mixture({"long": 0.7, "short": 0.3}, stages="0.7: long, short; 0.3: short=1", steps=100)
    assert made.stages() == [(0, 70, {"long": 0.7, "short": 0.3}), (70, 100, {"short": 1.0})]
    first, last = counted(made, range(70))[0], counted(made, range(70, 100))[0]
    assert set(last) == {"short"} and first["long"] / first.total() == pytest.approx(0.7, rel=0.03)
    (long, short), whole = made.shares(70, 100), made.shares(0, 100)
    assert (long.tokens, short.tokens) == (0, last["short"])
    # The second stage goes on in the set where the first one stopped.
    assert whole[1].sequences == made.shares(0, 70)[1].sequences + short.sequences


def test_more_epochs_than_asked_are_refused():
    with pytest.raises(DataError, match=r"'tiny' would be seen \d+\.\d\d times in 40 steps.*max_epochs=2.*about \d+"):
        mixture({"long": 1, "tiny": 1}, steps=40, tiny=2.0).check_epochs()
    mixture({"long": 1, "tiny": 1}, steps=40, tiny=100.0).check_epochs()


def test_epochs_count_the_sequences_of_all_sets():
    made = mixture({"long": 1, "short": 1}, steps=None)
    sequences = sum(len(stream) for stream in made.streams.values())
    assert made.total_steps == -(-sequences // 8) and made.steps_per_epoch == sequences / 8
    assert made.epoch_of(made.total_steps) >= 1


# From a config


def chat(question, answer, **fields):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]}


def run(mixture, *, steps=None, batch_size=4, **data):
    sets = {name: MixtureSet(**fields) for name, fields in mixture.items()}
    return RunConfig(
        model=ModelConfig(path="x"),
        data=DataConfig(mixture=sets, max_length=48, **data),
        train=TrainConfig(steps=steps, batch_size=batch_size),
    )


def test_each_set_has_its_own_format(jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    talk = jsonl([chat(f"q{i}", f"a{i}") for i in range(30)], name="talk.jsonl")
    sums = jsonl([{"ask": f"{i} + 1 =", "tell": f" {i + 1}"} for i in range(40)], name="sums.jsonl")
    config = run(
        {
            "talk": {"path": talk, "train_on": "last", "limit": 20},
            "sums": {"path": sums, "format": "prompt_completion", "prompt_field": "ask", "completion_field": "tell"},
        },
        eval_fraction=0.1,
    )
    data = prepare(config, tokenizer)
    assert [(one.name, one.examination.rows) for one in data.sets] == [("sums", 36), ("talk", 20)]
    assert data.examination.rows == 56 and len(data.train_examples) == 56
    assert data.examination.formats == {"prompt_completion": 36, "messages": 20}
    assert len(data.eval_examples) == 4 + 3 and data.eval_examination.rows == 7
    assert data.eval_references[0].startswith(" ") and data.eval_references[1].startswith("a")  # in turn
    batches = sequences.source(config, data, tokenizer)
    found, steps = data_summary(data, batches, course_of(config, data, batches)), batches.total_steps
    assert found["stages"][0]["steps"] == [0, steps]
    assert list(found["mixture"]) == ["sums", "talk"] and "% of tokens" in found["mixture"]["talk"]
    assert [one["rows"] for one in found["sets"]] == [36, 20]


def test_a_common_held_out_set(jsonl, tokenizer_of):
    one, two, held = (jsonl([chat(f"{n}{i}", "a") for i in range(9)], name=f"{n}.jsonl") for n in "abc")
    data = prepare(run({"one": {"path": one}, "two": {"path": two}}, eval=held), tokenizer_of("chatml"))
    assert data.eval_examination.rows == 9 and len(data.eval_prompts) == 9


def test_warnings_name_the_set_and_tables_are_printed(jsonl, tokenizer_of):
    import io

    from rich.console import Console

    tokenizer = tokenizer_of("chatml")
    one, two = (
        jsonl([chat("q", "a")] * 4, name="one.jsonl"),
        jsonl([chat("q" * 90, "a"), chat("q", "b")], name="two.jsonl"),
    )
    config = run(
        {"one": {"path": one}, "two": {"path": two, "weight": 1e-6}},
        steps=2, truncation="drop", stages="0.5: one, two; 0.5: one",
    )  # fmt: skip
    data = prepare(config, tokenizer)
    assert any("two.jsonl" in warning and "dropped" in warning for warning in data.examination.warnings)
    batches = sequences.source(config, data, tokenizer)
    out = io.StringIO()
    print_mixture(batches, Console(file=out, width=120))
    assert "warning: the set 'two' is never seen" in out.getvalue()
    summary = data_summary(data, batches, course_of(config, data, batches))
    assert any("never seen" in warning for warning in summary["warnings"])
    assert out.getvalue().count("\n") > 8


def test_rows_without_a_trained_answer_are_listed(jsonl, tokenizer_of):
    rows = [chat("q", "a", train=i % 3 > 0) for i in range(40)]
    with pytest.raises(
        DataError,
        match=r"14 of 40 rows of .*\n.* line 1 trains on zero tokens: .*weight: 0.*13 more: rows.jsonl line 4, .* 40",
    ):
        prepare(run({"one": {"path": jsonl(rows)}}), tokenizer_of("chatml"))


def test_what_rows_hold_is_counted(jsonl, tokenizer_of):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    full = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, call,
        {"role": "tool", "content": "r"}, {"role": "assistant", "content": "<think>t</think>a"},
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False},
    ]  # fmt: skip
    rows = [{"messages": full, "tools": [tool]}, chat("q", "a")]
    config = RunConfig(model=ModelConfig(path="x"), data=DataConfig(train=jsonl(rows), max_length=512))
    found = prepare(config, tokenizer_of("qwen3")).examination
    assert found.holds == {
        "a system message": 1, "several answers": 1, "tools": 1, "tool calls": 1, "thoughts": 1,
        "answers not to be trained": 1,
    }  # fmt: skip
    assert found.rows == 2


def test_split_rows_are_told(jsonl, tokenizer_of):
    talk = [m for i in range(3) for m in chat(f"q{i}", f"<think>t{i}</think>a{i}")["messages"]]
    config = RunConfig(model=ModelConfig(path="x"), data=DataConfig(train=jsonl([{"messages": talk}]), max_length=512))
    found = prepare(config, tokenizer_of("qwen3")).examination
    assert (found.rows, found.examples) == (1, 3)
    assert any("1 row became 3 examples, " in warning for warning in found.warnings)
