import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax import monitoring

from jaxft.adapters.attach import attach
from jaxft.adapters.lora import LoRA, LoRASettings
from jaxft.config import MeshConfig
from jaxft.errors import ConfigError, DataError
from jaxft.generate import Sampling, generate_tokens
from jaxft.models import config_from_hf, random_model
from jaxft.models.tensor_map import place
from jaxft.nn.stack import group_layers
from jaxft.sharding.mesh import make_mesh_plan
from tests.generate.conftest import tiny_hf

GREEDY = Sampling(max_new_tokens=32)
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95, seed=5)


def tokens(results):
    return [r.tokens for r in results]


def copy_weights(model, torch_model):
    """Hand-made import, so that this test leans on no other."""
    theirs = {name: value.numpy() for name, value in torch_model.state_dict().items()}
    for placed in place(model.config.tensors(), group_layers(model.segments)):
        arrays = [placed.transform.from_hf(theirs[piece.hf]) for piece in placed.pieces]
        at = model
        for name in placed.path.split("/"):
            at = at[int(name)] if name.isdigit() else getattr(at, name)
        at.set_value(jax.numpy.array(arrays[0] if placed.pieces[0].layer is None else np.stack(arrays)))


def test_greedy_equals_transformers(prompts):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {k: v for k, v in tiny_hf().items() if k != "model_type"}
    theirs = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**settings), attn_implementation="eager", dtype=torch.float32
    ).eval()
    ours = random_model(config_from_hf(theirs.config.to_dict()), seed=0)
    copy_weights(ours, theirs)
    stop_ids = (7, 30, 99, 140, 201)
    penalised = Sampling(max_new_tokens=32, repetition_penalty=1.4)
    results = generate_tokens(
        ours, prompts + prompts, sampling=[GREEDY] * len(prompts) + [penalised] * len(prompts), stop_ids=stop_ids, slots=4
    )
    for i, prompt in enumerate(prompts + prompts):
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
    drawn = Sampling(max_new_tokens=10, temperature=1.3, top_k=50, repetition_penalty=1.2)
    for prompt, result in zip(prompts, generate_tokens(model, prompts, sampling=drawn, slots=4), strict=True):
        full = logprobs_of(model, prompt + list(result.tokens))
        expected = [full[len(prompt) - 1 + i, token] for i, token in enumerate(result.tokens)]
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_results_do_not_depend_on_slots_or_company(model, prompts, sampling):
    together = tokens(generate_tokens(model, prompts, sampling=sampling, slots=16))
    assert tokens(generate_tokens(model, prompts, sampling=sampling, slots=3)) == together
    # Row 0 of another call with other company, of other lengths and settings.
    company = [prompts[0], *prompts[5:]]
    others = [sampling] + [Sampling(max_new_tokens=5, temperature=0.7)] * 5
    assert generate_tokens(model, company, sampling=others, slots=2)[0].tokens == together[0]
    assert generate_tokens(model, prompts[:1], sampling=sampling)[0].tokens == together[0]


def test_equal_prompts_draw_differently_and_repeatably(model, prompts):
    first = tokens(generate_tokens(model, [prompts[0]] * 6, sampling=DRAWN))
    assert len(set(first)) == 6
    assert tokens(generate_tokens(model, [prompts[0]] * 6, sampling=DRAWN)) == first
    other_seed = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95, seed=6)
    assert not set(tokens(generate_tokens(model, [prompts[0]] * 6, sampling=other_seed))) & set(first)


def test_a_common_prefix_changes_nothing(model, prompts):
    common = np.random.default_rng(9).integers(0, 256, 77).tolist()
    sharing = [common + prompt for prompt in prompts] + [common]
    alone = [generate_tokens(model, [prompt], sampling=GREEDY)[0].tokens for prompt in sharing]
    penalised = Sampling(max_new_tokens=20, repetition_penalty=1.5)
    alone_penalised = [generate_tokens(model, [prompt], sampling=penalised)[0].tokens for prompt in sharing]
    assert tokens(generate_tokens(model, sharing, sampling=GREEDY, slots=4)) == alone
    assert tokens(generate_tokens(model, sharing, sampling=penalised, slots=4)) == alone_penalised


def test_limits_of_each_row(model, prompts):
    limits = [1, 2, 31, 5, 16, 17, 1, 40, 3, 9]
    results = generate_tokens(model, prompts, sampling=[Sampling(max_new_tokens=n) for n in limits], slots=4)
    assert [len(r.tokens) for r in results] == limits
    assert {r.finish_reason for r in results} == {"length"}


def test_stop_token_ends_a_row_and_is_its_last(model, prompts):
    free = generate_tokens(model, prompts, sampling=GREEDY)
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
    free = tokens(generate_tokens(model, prompts, sampling=GREEDY))
    assert [r.tokens for r in results] == [t[:7] if row == 4 else t for row, t in enumerate(free)]


def test_adapters_take_part(model, prompts):
    def with_lora(b_scale):
        adapted = random_model(model.config, seed=1)
        settings = LoRASettings(r=4, alpha=8)
        attach(adapted, ["all-linear"], lambda i, o, s, key: LoRA(i, o, settings, stack=s, key=key), jax.random.key(0))
        for _, module in nnx.iter_modules(adapted):
            if isinstance(module, LoRA):
                module.lora_b.set_value(module.lora_b.get_value() + b_scale)
        return tokens(generate_tokens(adapted, prompts, sampling=GREEDY))

    base = tokens(generate_tokens(model, prompts, sampling=GREEDY))
    assert with_lora(0.0) == base
    assert with_lora(0.1) != base


def test_nothing_is_compiled_again_for_new_parameters_lengths_and_settings(model, prompts):
    compiled = []
    monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    generate_tokens(model, prompts, sampling=DRAWN, slots=4, stop_ids=[1])
    assert compiled, "the listener hears compilations"
    fresh = random_model(model.config, seed=2)
    generate_tokens(fresh, prompts, sampling=DRAWN, slots=4, stop_ids=[1])
    compiled.clear()
    shorter = [prompt[: max(1, len(prompt) - 1)] for prompt in prompts]
    others = [Sampling(max_new_tokens=10 + i % 2, temperature=0.1 * i, top_k=5 + i) for i in range(len(prompts))]
    generate_tokens(random_model(model.config, seed=2), shorter, sampling=others, slots=4, stop_ids=[2, 3])
    assert compiled == []


def test_eight_devices_equal_one(model, prompts):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    plan = make_mesh_plan(MeshConfig(data=2, fsdp=4))
    graphdef, params = nnx.split(model)
    split = nnx.merge(graphdef, jax.device_put(params, plan.shardings(params)))
    one = generate_tokens(model, prompts, sampling=DRAWN, slots=8)
    eight = generate_tokens(split, prompts, sampling=DRAWN, slots=8)
    assert tokens(eight) == tokens(one)
    np.testing.assert_allclose(
        np.concatenate([r.logprobs for r in eight]), np.concatenate([r.logprobs for r in one]), atol=1e-4
    )


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


def test_the_last_position_can_be_filled(model):
    assert len(generate_tokens(model, [[1] * 224], sampling=GREEDY)[0].tokens) == 32
