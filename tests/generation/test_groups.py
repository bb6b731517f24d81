"""Several answers to each prompt: the prompt is computed once, and every answer is the one it would be alone."""

import jax
import numpy as np
import pytest
from jax import monitoring

from jaxft.errors import ConfigError, DataError
from jaxft.generation import steps
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.objectives.token_logps import token_logps

DRAWN = Sampling(max_new_tokens=12, temperature=1.3, seed=5)
STOPS = (7, 30, 99, 140, 201)


@pytest.mark.parametrize("slots", [8, 3, 1], ids=["two groups", "less than a group", "one"])
def test_answers_of_a_group_are_those_of_separate_rows(model, prompts, slots):
    repeated = [prompt for prompt in prompts[:5] for _ in range(4)]
    alone = generate_tokens(model, repeated, sampling=DRAWN, stop_ids=STOPS, slots=8)
    grouped = generate_tokens(model, prompts[:5], sampling=DRAWN, stop_ids=STOPS, slots=slots, answers=4)
    assert [one.tokens for one in grouped] == [one.tokens for one in alone]
    for ours, theirs in zip(grouped, alone, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-5)
    assert len({one.tokens for one in grouped[:4]}) > 1


def test_a_prompt_is_prefilled_once_for_its_group(model, prompts, monkeypatch):
    prefilled = []
    real = steps.prefill

    def prefill(graphdef, params, memory, prefix, group, **static):
        prefilled.append(int((np.asarray(group.tokens_PS)[:, 0] >= 0).sum()))
        return real(graphdef, params, memory, prefix, group, **static)

    monkeypatch.setattr(steps, "prefill", prefill)
    generate_tokens(model, prompts[:6], sampling=DRAWN, slots=8, answers=4)
    assert sum(prefilled) == 6


def test_tempered_log_probabilities_are_those_of_training_under_the_temperature(model, prompts):
    results = generate_tokens(model, prompts[:3], sampling=DRAWN, answers=2, tempered_logprobs=True, slots=8)
    plain = generate_tokens(model, prompts[:3], sampling=DRAWN, answers=2, slots=8)
    unembed, head, dimensions = model.split_unembed()
    for number, (result, other) in enumerate(zip(results, plain, strict=True)):
        assert result.tokens == other.tokens
        prompt = prompts[:3][number // 2]
        row = np.array([[*prompt, *result.tokens]], np.int32)
        hidden, _ = model(row)
        targets, mask = np.roll(row, -1, axis=1), np.ones(row.shape, np.float32)
        for logprobs, temperature in ((result.logprobs, 1.3), (other.logprobs, 1.0)):
            logps = token_logps(unembed, head, hidden, targets, mask, temperature=temperature, dimensions=dimensions)
            np.testing.assert_allclose(logprobs, np.asarray(logps)[0, len(prompt) - 1 : -1], rtol=0, atol=1e-4)
    assert max(abs(a - b) for a, b in zip(results[0].logprobs, plain[0].logprobs, strict=True)) > 1e-3


def test_calls_of_one_length_are_compiled_once(model, prompts):
    def sample(chosen):
        return generate_tokens(model, chosen, sampling=DRAWN, answers=4, slots=8, length=40, tempered_logprobs=True)

    sample([prompts[2], prompts[0]])
    compiled = []
    monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    try:
        for chosen in ([prompts[1], prompts[6]], [prompts[3], prompts[4]], [prompts[8], prompts[9]]):
            assert len(sample(chosen)) == 8
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled


def test_a_group_is_given_out_when_its_last_answer_ends(model, prompts):
    limits = [3, 2, 12, 11, 5, 12]
    events, given = [], {}

    def on_group(number, results):
        events.append(("group", number))
        given[number] = results

    results = generate_tokens(
        model,
        prompts[:3],
        sampling=[Sampling(max_new_tokens=n, temperature=1.0) for n in limits],
        slots=8,
        answers=2,
        on_token=lambda row, *_: events.append(("row", row)),
        on_group=on_group,
    )
    assert given == {number: results[2 * number : 2 * number + 2] for number in range(3)}
    assert [name for name, _ in events].count("group") == 3
    after = events[events.index(("group", 0)) :]
    assert {row for name, row in after if name == "row"} == {2, 3, 4, 5}


def test_rows_beyond_the_length_and_no_answers_are_refused(model, prompts):
    with pytest.raises(DataError, match="1 of 1 prompts with their max_new_tokens exceed length=20"):
        generate_tokens(model, [prompts[2]], sampling=DRAWN, length=20)
    with pytest.raises(ConfigError, match="answers=0 must be at least 1"):
        generate_tokens(model, prompts, sampling=DRAWN, answers=0)
