"""Llama against transformers: logits, gradients; and the cache, packing and remat against plain calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.checkpoint.hf import param_tensors
from jaxft.checkpoint.load import load_model
from jaxft.data.batch import Batch
from jaxft.objectives.sft import sft_loss
from jaxft.trees import flatten

torch = pytest.importorskip("torch")

VARIANTS = ["plain", "tied", "one_kv_head", "all_kv_heads", "biases", "wide_heads", "llama3_rope", "linear_rope"]
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 20))


def batch_of(tokens):
    targets = np.concatenate([tokens[:, 1:], np.zeros_like(tokens[:, :1])], axis=1)
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return Batch(*(jnp.asarray(x) for x in (tokens, targets, weights, positions, np.ones_like(tokens))))


@pytest.mark.parametrize("first_position", [0, 900])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tiny_llama, torch_llama, variant, first_position):
    folder = tiny_llama(variant)
    positions = np.broadcast_to(first_position + np.arange(TOKENS.shape[1]), TOKENS.shape)
    with torch.no_grad():
        expected = torch_llama(folder)(torch.tensor(TOKENS), position_ids=torch.tensor(positions)).logits.numpy()
    module = load_model(folder).module
    logits = jax.jit(lambda: module.unembed(module(jnp.asarray(TOKENS), jnp.asarray(positions))[0]))()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["tied", "biases", "llama3_rope"])
def test_gradients_equal_torch(tiny_llama, torch_llama, variant):
    folder = tiny_llama(variant)
    reference = torch_llama(folder)
    loss = reference(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss
    loss.backward()
    expected = {name: p.grad.numpy() for name, p in reference.named_parameters()}

    module = load_model(folder).module
    graphdef, state = nnx.split(module)

    def mean_loss(state):
        sums = sft_loss(nnx.merge(graphdef, state), batch_of(TOKENS), None)
        return sums.total / sums.weight

    value, grads = jax.jit(jax.value_and_grad(mean_loss))(state)
    assert float(value) == pytest.approx(loss.item(), abs=1e-5)
    seen = set()
    grads = flatten(grads)[0]
    for path, placed in param_tensors(module).items():
        for piece in placed.pieces:
            part = np.asarray(grads[path][piece.at])
            np.testing.assert_allclose(
                placed.transform.to_hf(part), expected[piece.hf], rtol=0, atol=1e-4, err_msg=piece.hf
            )
            seen.add(piece.hf)
    assert seen == set(expected)


def cached_logits(module, tokens, positions, cache, segments=None):
    positions = jnp.broadcast_to(positions, tokens.shape)
    hidden, cache = module(tokens, positions, segments, cache=cache)
    return module.unembed(hidden), cache


@pytest.mark.parametrize("variant", ["plain", "one_kv_head"])
def test_decoding_token_by_token_equals_one_pass(tiny_llama, variant):
    loaded = load_model(tiny_llama(variant))
    whole = loaded.logits(TOKENS)
    step = jax.jit(lambda *x: cached_logits(loaded.module, *x))
    prompt = 7
    logits, cache = step(TOKENS[:, :prompt], np.arange(prompt)[None], loaded.module.init_cache(2, 32))
    parts = [logits]
    for at in range(prompt, TOKENS.shape[1]):
        logits, cache = step(TOKENS[:, at : at + 1], np.full((2, 1), at), cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)


def test_padding_never_enters_the_cache(tiny_llama):
    loaded = load_model(tiny_llama("plain"))
    padded = np.concatenate([TOKENS[:, :5], np.zeros((2, 4), TOKENS.dtype)], axis=1)
    segments = np.array([[1] * 5 + [0] * 4] * 2)
    step = jax.jit(lambda *x: cached_logits(loaded.module, *x))
    _, cache = step(padded, np.arange(9)[None], loaded.module.init_cache(2, 16), segments)
    assert (np.asarray(cache[0].positions_BT) >= 0).sum(axis=1).tolist() == [5, 5]
    logits, _ = step(TOKENS[:, 5:6], np.full((2, 1), 5), cache)
    np.testing.assert_allclose(logits[:, 0], loaded.logits(TOKENS[:, :6])[:, 5], rtol=0, atol=1e-5)


def test_packed_documents_do_not_see_each_other(tiny_llama):
    loaded = load_model(tiny_llama("plain"))
    first, second = TOKENS[0, :7], TOKENS[1, :9]
    packed = np.concatenate([first, second, np.zeros(4, TOKENS.dtype)])[None]
    positions = np.concatenate([np.arange(7), np.arange(9), np.zeros(4, int)])[None]
    segments = np.array([[1] * 7 + [2] * 9 + [0] * 4])
    logits = np.asarray(jax.jit(lambda *x: loaded.module.unembed(loaded.module(*x)[0]))(packed, positions, segments))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[0, :7], loaded.logits(first[None])[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits[0, 7:16], loaded.logits(second[None])[0], rtol=0, atol=1e-5)


def test_no_token_sees_a_later_one(tiny_llama):
    loaded = load_model(tiny_llama("plain"))
    changed = TOKENS.copy()
    changed[:, 11] = (changed[:, 11] + 1) % 96
    before, after = loaded.logits(TOKENS), loaded.logits(changed)
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert (np.abs(before[:, 11:] - after[:, 11:]).max(axis=(0, 2)) > 1e-4).all()


def test_rematerialisation_changes_no_value_and_no_gradient(tiny_llama):
    def value_and_grads(remat):
        graphdef, state = nnx.split(load_model(tiny_llama("plain"), remat=remat).module)
        total = lambda state: sft_loss(nnx.merge(graphdef, state), batch_of(TOKENS), None).total  # noqa: E731
        return jax.jit(jax.value_and_grad(total))(state)

    value, grads = value_and_grads("none")
    for remat in ("full", "dots"):
        again, again_grads = value_and_grads(remat)
        assert float(again) == pytest.approx(float(value), rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), grads, again_grads)


def test_a_model_of_one_seed_is_one_model(smoke_config):
    config = models.config_from_hf(smoke_config)
    same, again, other = (jax.tree.leaves(nnx.state(models.random_model(config, seed=seed))) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(same, again, strict=True))
    assert not np.array_equal(same[0], other[0])


def test_bfloat16_computes_in_bfloat16_and_scores_in_float32(tiny_llama):
    folder = tiny_llama("tied")
    half, whole = load_model(folder, dtype="bfloat16"), load_model(folder)
    assert jax.eval_shape(lambda: half.module(jnp.asarray(TOKENS))[0]).dtype == jnp.bfloat16
    logits = half.logits(TOKENS)
    assert logits.dtype == np.float32
    # bfloat16 keeps 8 bits; three layers of it stay within a few per cent of the largest logit.
    assert np.abs(logits - whole.logits(TOKENS)).max() < 0.05 * np.abs(logits).max()
