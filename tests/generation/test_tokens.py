import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax import monitoring

from jaxft.adapters.attach import adapters, attach, merge
from jaxft.adapters.lora import LoRASettings, lora_factory
from jaxft.config import MeshConfig
from jaxft.errors import ConfigError, DataError
from jaxft.generation import engine
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.models import config_from_hf
from jaxft.models.tensor_map import iter_params
from jaxft.nn.stack import group_layers
from jaxft.nn.storage import storage_dims_of
from jaxft.sharding.mesh import make_mesh_plan

GREEDY = Sampling(max_new_tokens=32)
DRAWN = Sampling(max_new_tokens=32, temperature=1.0, top_p=0.95, seed=5)


def tokens(results):
    return [r.tokens for r in results]


def copy_weights(model, torch_model):
    """Hand-made import, so that this test leans on no other."""
    theirs = {name: value.numpy() for name, value in torch_model.state_dict().items()}
    for placed in iter_params(model.config.tensors(), group_layers(model.segments)):
        arrays = [placed.transform.from_hf(theirs[piece.hf]) for piece in placed.pieces]
        at = model
        for name in placed.path.split("/"):
            at = at[int(name)] if name.isdigit() else getattr(at, name)
        at.set_value(jax.numpy.array(arrays[0] if placed.pieces[0].layer is None else np.stack(arrays)))


def test_greedy_equals_transformers(model, prompts):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {k: v for k, v in model.config.to_hf().items() if k not in ("model_type", "architectures")}
    theirs = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**settings), attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert config_from_hf(theirs.config.to_dict()) == model.config
    ours = nnx.clone(model)
    copy_weights(ours, theirs)
    # Longer ones too, up to the bucket of 48.
    prompts = [*prompts[:6], (prompts[2] * 3)[:39], prompts[4] * 2, (prompts[8] * 3)[::-1]]
    stop_ids = (7, 30, 99, 140, 201)
    penalized = Sampling(max_new_tokens=32, repetition_penalty=1.4)
    rows = prompts + prompts[:3]
    samplings = [GREEDY] * len(prompts) + [penalized] * 3
    results = generate_tokens(ours, rows, sampling=samplings, stop_ids=stop_ids, slots=4)
    for i, prompt in enumerate(rows):
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=32,
                do_sample=False,
                repetition_penalty=1.0 if i < len(prompts) else 1.4,
                eos_token_id=list(stop_ids),
                pad_token_id=257,
            )[0, len(prompt) :].tolist()
        assert list(results[i].tokens) == out
        assert results[i].finish_reason == ("stop" if out[-1] in stop_ids else "length")
    reasons = {r.finish_reason for r in results}
    assert reasons == {"stop", "length"}


def test_logprobs_are_those_of_a_full_pass(model, prompts, logprobs_of):
    drawn = Sampling(max_new_tokens=32, temperature=1.3, top_k=50, repetition_penalty=1.2)
    for prompt, result in zip(prompts, generate_tokens(model, prompts, sampling=drawn, slots=4), strict=True):
        full = logprobs_of(model, prompt + list(result.tokens))
        expected = [full[len(prompt) - 1 + i, token] for i, token in enumerate(result.tokens)]
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)


def test_results_do_not_depend_on_slots_or_company(model, prompts):
    samplings = [GREEDY, DRAWN] * 5
    alone = tokens(generate_tokens(model, prompts, sampling=samplings, slots=1))
    assert tokens(generate_tokens(model, prompts, sampling=samplings, slots=4)) == alone
    # Rows 0 and 1 of another call, with company of other lengths and settings.
    others = [GREEDY, DRAWN] + [Sampling(max_new_tokens=5 + i, temperature=0.7) for i in range(5)]
    assert tokens(generate_tokens(model, prompts[:2] + prompts[5:], sampling=others, slots=4))[:2] == alone[:2]


def test_prompts_are_prefilled_in_groups(model, prompts):
    samplings = [GREEDY, DRAWN] * 10
    grouped = generate_tokens(model, prompts * 2, sampling=samplings, slots=16)
    assert tokens(grouped) == tokens(generate_tokens(model, prompts * 2, sampling=samplings, slots=4))


def test_equal_prompts_draw_differently_and_repeatably(model, prompts):
    first = tokens(generate_tokens(model, [prompts[0]] * 6, sampling=DRAWN, slots=4))
    assert len(set(first)) == 6
    assert tokens(generate_tokens(model, [prompts[0]] * 6, sampling=DRAWN, slots=4)) == first
    other_seed = dataclasses.replace(DRAWN, seed=6)
    assert not set(tokens(generate_tokens(model, [prompts[0]] * 6, sampling=other_seed, slots=4))) & set(first)


def test_a_common_prefix_changes_nothing(model, prompts, monkeypatch):
    common = np.random.default_rng(9).integers(0, 256, 33).tolist()
    sharing = [common + prompt for prompt in prompts + prompts] + [common]
    samplings = [GREEDY, DRAWN] * 5 + [dataclasses.replace(GREEDY, repetition_penalty=1.5)] * 11
    assert engine.start(model, requests(sharing), stop_ids=(), slots=4).prefix_tokens == 32
    shared = tokens(generate_tokens(model, sharing, sampling=samplings, slots=4))
    monkeypatch.setattr(engine, "MIN_SPARED", 10**6)
    assert engine.start(model, requests(sharing), stop_ids=(), slots=4).prefix_tokens == 0
    assert shared == tokens(generate_tokens(model, sharing, sampling=samplings, slots=4))


def requests(prompts):
    return [engine.Request(id=i, prompt=tuple(prompt), sampling=GREEDY) for i, prompt in enumerate(prompts)]


def test_limits_of_each_row(model, prompts):
    limits = [1, 2, 31, 5, 16, 17, 1, 32, 3, 9]
    results = generate_tokens(model, prompts, sampling=[Sampling(max_new_tokens=n) for n in limits], slots=4)
    assert [len(r.tokens) for r in results] == limits
    assert {r.finish_reason for r in results} == {"length"}


def test_stop_token_ends_a_row_and_is_its_last(model, prompts):
    free = generate_tokens(model, prompts, sampling=GREEDY, slots=4)
    stop = free[2].tokens[6]
    for result, unstopped in zip(
        generate_tokens(model, prompts, sampling=GREEDY, stop_ids=[stop], slots=4), free, strict=True
    ):
        cut = unstopped.tokens.index(stop) + 1 if stop in unstopped.tokens else len(unstopped.tokens)
        assert result.tokens == unstopped.tokens[:cut]
        assert result.finish_reason == ("stop" if stop in unstopped.tokens else "length")


def test_callback_sees_every_token_in_order_and_can_end_a_row(model, prompts):
    seen = {row: [] for row in range(len(prompts))}

    def on_token(row, token, logprob):
        seen[row].append((token, logprob))
        return row == 4 and len(seen[row]) == 7

    results = generate_tokens(model, prompts, sampling=GREEDY, slots=4, on_token=on_token)
    for row, result in enumerate(results):
        assert seen[row] == list(zip(result.tokens, result.logprobs, strict=True))
    assert len(results[4].tokens) == 7 and results[4].finish_reason == "stop"
    free = tokens(generate_tokens(model, prompts, sampling=GREEDY, slots=4))
    assert [r.tokens for r in results] == [t[:7] if row == 4 else t for row, t in enumerate(free)]


def test_adapters_take_part(model, prompts):
    base = tokens(generate_tokens(model, prompts, sampling=GREEDY, slots=4))
    adapted, settings = nnx.clone(model), LoRASettings(r=4, alpha=8)
    attach(adapted, ["all-linear"], lora_factory(settings), jax.random.key(0))
    assert tokens(generate_tokens(adapted, prompts, sampling=GREEDY, slots=4)) == base
    for lora in adapters(adapted).values():
        lora.lora_b.set_value(lora.lora_b.get_value() + 0.1)
    live = tokens(generate_tokens(adapted, prompts, sampling=GREEDY, slots=4))
    assert live != base
    merge(adapted)
    assert tokens(generate_tokens(adapted, prompts, sampling=GREEDY, slots=4)) == live


def test_nothing_is_compiled_again_for_new_parameters_lengths_and_settings(model, prompts):
    def scaled(by):
        graphdef, params = nnx.split(model)
        return nnx.merge(graphdef, jax.tree.map(lambda x: by * x, params))

    compiled = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    first = generate_tokens(scaled(1.1), prompts, sampling=DRAWN, slots=4, stop_ids=[1])
    other = scaled(1.2)
    monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 1)(1)
    assert compiled, "the listener hears compilations"
    compiled.clear()
    shorter = [prompt[: max(1, len(prompt) - 1)] for prompt in prompts]
    others = [Sampling(max_new_tokens=28 + i % 2, temperature=0.1 * i, top_k=5 + i) for i in range(len(prompts))]
    second = generate_tokens(other, shorter, sampling=others, slots=4, stop_ids=[2, 3])
    assert compiled == []
    assert tokens(second) != tokens(first)


def test_eight_devices_equal_one(model, prompts):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    plan = make_mesh_plan(MeshConfig(data=2, fsdp=4))
    graphdef, params = nnx.split(model)
    split = nnx.merge(graphdef, jax.device_put(params, plan.shardings(params, storage_dims_of(model))))
    one = generate_tokens(model, prompts, sampling=DRAWN, slots=4)
    eight = generate_tokens(split, prompts, sampling=DRAWN, slots=4)
    assert tokens(eight) == tokens(one)
    for ours, theirs in zip(eight, one, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def test_no_prompts_give_no_results(model):
    assert generate_tokens(model, [], sampling=GREEDY) == []


def test_refusals(model):
    with pytest.raises(DataError, match=r"1 of 2 prompts are empty \(rows 1\)"):
        generate_tokens(model, [[1], []], sampling=GREEDY)
    with pytest.raises(DataError, match=re.escape("exceed the model's 256 positions (row 1: 240 + 32 = 272)")):
        generate_tokens(model, [[1], [1] * 240], sampling=GREEDY)
    with pytest.raises(DataError, match=r"token ids outside 0\.\.259 \(rows 0, 2\)"):
        generate_tokens(model, [[260], [1], [-1]], sampling=GREEDY)
    with pytest.raises(ConfigError, match="1 samplings for 2 prompts"):
        generate_tokens(model, [[1], [2]], sampling=[GREEDY])
    with pytest.raises(ConfigError, match="slots=0 must be at least 1"):
        generate_tokens(model, [[1]], sampling=GREEDY, slots=0)
    with pytest.raises(ConfigError, match="use generate_text"):
        generate_tokens(model, [[1]], sampling=Sampling(max_new_tokens=1, stop=("x",)))
