"""Models with recurrent layers: packed rows, padding, a cache that goes on, conversations, what is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.config import MeshConfig
from jaxft.errors import ConfigError
from jaxft.generation.conversation_cache import ConversationCache
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.nn.recurrent import delta_rule, state_space
from jaxft.runs.build import check_context
from jaxft.sharding.mesh import make_mesh_plan

QWEN3_5 = {
    "model_type": "qwen3_5_text", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
}  # fmt: skip
QWEN3_NEXT = QWEN3_5 | {
    "model_type": "qwen3_next", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "mlp_only_layers": [1],
}  # fmt: skip
GRANITE = {
    "model_type": "granitemoehybrid", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 0,
    "shared_intermediate_size": 24, "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 8,
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
}  # fmt: skip
NEMOTRON = {
    "model_type": "nemotron_h", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "n_groups": 2, "ssm_state_size": 8, "n_routed_experts": 4, "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24, "hybrid_override_pattern": "ME*M-",
}  # fmt: skip
LFM2 = {
    "model_type": "lfm2", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "conv_bias": True, "full_attn_idxs": [1],
}  # fmt: skip
CONFIGS = {
    "qwen3_5_text": QWEN3_5, "qwen3_next": QWEN3_NEXT, "granitemoehybrid": GRANITE, "nemotron_h": NEMOTRON,
    "lfm2": LFM2,
}  # fmt: skip


# Whose layers are in other models here.
ALIKE = ("granitemoehybrid", "qwen3_next")


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.slow) if kind in ALIKE else kind for kind in CONFIGS])
def model(request, monkeypatch):
    monkeypatch.setattr(delta_rule, "CHUNK", 8)
    monkeypatch.setattr(state_space, "CHUNK", 8)
    module = models.random_model(models.config_from_hf(CONFIGS[request.param]), seed=0)
    graphdef, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    wide = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, wide))


def logits(model, tokens, **where):
    @jax.jit
    def run(tokens, where):
        return model.unembed(model(tokens, **where)[0])

    return np.asarray(run(jnp.asarray(tokens), {k: jnp.asarray(v) for k, v in where.items()}))


def test_packed_documents_are_as_if_each_were_alone(model):
    lengths = (8, 3, 1, 7, 10)  # borders inside, on and beside those of chunks
    tokens = np.random.default_rng(0).integers(1, 96, sum(lengths) + 3)
    segments = np.concatenate([np.repeat(np.arange(1, 6), lengths), np.zeros(3, int)])
    positions = np.concatenate([np.arange(n) for n in (*lengths, 3)])
    packed = logits(model, tokens[None], positions_BS=positions[None], segments_BS=segments[None])
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        np.testing.assert_allclose(packed[0, part], logits(model, tokens[None, part])[0], rtol=0, atol=1e-5)
        start += length


def test_padding_before_and_after_changes_nothing(model):
    tokens = np.random.default_rng(0).integers(1, 96, (1, 13))
    whole = logits(model, tokens)
    padded = np.pad(tokens, ((0, 0), (0, 6)))
    segments = np.pad(np.ones((1, 13), int), ((0, 0), (0, 6)))
    np.testing.assert_allclose(logits(model, padded, segments_BS=segments)[:, :13], whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_rematerialisation(model, remat):
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 96, (2, 13)))

    def gradients(remat):
        model.remat = remat
        graphdef, state = nnx.split(model)
        return jax.jit(jax.grad(lambda state: jnp.mean(nnx.merge(graphdef, state)(tokens)[0] ** 2)))(state)

    for kept, again in zip(jax.tree.leaves(gradients("none")), jax.tree.leaves(gradients(remat)), strict=True):
        np.testing.assert_allclose(kept, again, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(kept).max())))


def test_a_prompt_in_parts_equals_the_whole(model):
    tokens = np.random.default_rng(0).integers(1, 96, (2, 17))
    whole = logits(model, tokens)
    cache, parts = model.init_cache(2, 32), []
    for start, stop in ((0, 9), (9, 10), (10, 17)):
        positions = np.broadcast_to(np.arange(start, stop), (2, stop - start))
        # With padding behind each part.
        padded = np.pad(tokens[:, start:stop], ((0, 0), (0, 2)))
        segments = np.pad(np.ones((2, stop - start), int), ((0, 0), (0, 2)))
        hidden, cache = model(
            jnp.asarray(padded), jnp.asarray(np.pad(positions, ((0, 0), (0, 2)))), jnp.asarray(segments), cache
        )
        parts.append(np.asarray(model.unembed(hidden))[:, : stop - start])
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)


def test_prompts_that_begin_alike_share_their_state(model, monkeypatch):
    monkeypatch.setattr("jaxft.generation.engine.MIN_SPARED", 8)
    start = np.random.default_rng(0).integers(1, 96, 12).tolist()
    prompts = [[*start, *end] for end in ([5, 6], [7], [8, 9, 10])]
    sampling = Sampling(max_new_tokens=6)
    together = generate_tokens(model, prompts, sampling=sampling)
    for prompt, result in zip(prompts, together, strict=True):
        assert list(generate_tokens(model, [prompt], sampling=sampling)[0].tokens) == list(result.tokens)


def test_a_conversation_goes_on_from_its_state_or_begins_again(model):
    rng, sampling, held = np.random.default_rng(0), Sampling(max_new_tokens=5), ConversationCache()
    prompt = rng.integers(1, 96, 9).tolist()
    first = generate_tokens(model, [prompt], sampling=sampling, cache=held)[0]
    goes_on, differs = [*prompt, *first.tokens, 3, 4], [*prompt[:5], 7, 8]
    for prompt, computed in ((goes_on, 3), (differs, len(differs))):  # a state cannot be cut
        again = generate_tokens(model, [prompt], sampling=sampling, cache=held)[0]
        assert list(again.tokens) == list(generate_tokens(model, [prompt], sampling=sampling)[0].tokens)
        assert held.computed == computed


def test_rows_are_not_split_along_positions():
    model = models.abstract_model(models.config_from_hf(QWEN3_5))
    with pytest.raises(ConfigError, match="recurrent layers of this model pass a state along them. Use mesh.fsdp"):
        check_context(model, make_mesh_plan(MeshConfig(context=2, fsdp=4)))
    check_context(model, make_mesh_plan(MeshConfig(fsdp=4, tensor=2)))
