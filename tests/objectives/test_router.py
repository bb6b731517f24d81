"""The losses on routers, against transformers with padding, and however the model is run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.checkpoint.hf import param_tensors
from jaxft.checkpoint.load import load_model
from jaxft.config import AdamWConfig, OptimConfig
from jaxft.data.batch import Batch
from jaxft.nn.experts.router_sums import RouterSums
from jaxft.objectives.router import RouterCoefficients, load_balancing_loss, router_z_loss
from jaxft.objectives.sft import sft_loss
from jaxft.optim.make import make_optimizer, make_schedule
from jaxft.training.state import create
from jaxft.training.step import make_train_step
from jaxft.trees import flatten

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
}  # fmt: skip
KINDS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True, "moe_intermediate_size": 24},
}
BOTH = RouterCoefficients(load_balancing=0.5, z_loss=0.05)


def make_batch(rows=4, length=12):
    """Rows of unlike lengths with unlike shares of trained tokens, padded on the right."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 96, (rows, length))
    real = np.arange(length) < rng.integers(4, length + 1, (rows, 1))
    weights = (real & np.roll(real, -1, axis=1) & (rng.random(real.shape) < rng.random((rows, 1)))).astype(np.float32)
    weights[:, -1], weights[:, 0] = 0, 1
    positions = np.where(real, np.arange(length), 0)
    return Batch(*map(jnp.asarray, (tokens, np.roll(tokens, -1, axis=1), weights, positions, real.astype(np.int32))))


def mean_loss(graphdef, batch, coefficients):
    def loss(state):
        sums = sft_loss(nnx.merge(graphdef, state), batch, None, router=coefficients)
        means = sums.means()
        return means.pop("loss"), means

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_loss_and_gradients_are_those_of_transformers(kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.core_model_loading import revert_weight_conversion

    config = transformers.AutoConfig.for_model(
        kind, **SIZES, **KINDS[kind], output_router_logits=True, router_aux_loss_coef=BOTH.load_balancing
    )
    reference = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    reference.save_pretrained(tmp_path)
    batch = make_batch()
    trained = torch.tensor(np.asarray(batch.weights_BS[:, :-1]) > 0)
    labels = torch.full(batch.tokens_BS.shape, -100)
    labels[:, 1:][trained] = torch.tensor(np.asarray(batch.targets_BS[:, :-1])).long()[trained]
    mask = torch.tensor(np.asarray(batch.segments_BS)).long()
    out = reference(torch.tensor(np.asarray(batch.tokens_BS)).long(), attention_mask=mask, labels=labels)
    # Of every layer's real tokens; transformers has no such loss.
    squares = [torch.logsumexp(logits, -1).square()[mask.reshape(-1) > 0] for logits in out.router_logits]
    z_loss = torch.cat(squares).mean()
    (out.loss + BOTH.z_loss * z_loss).backward()
    expected = revert_weight_conversion(reference, {name: p.grad for name, p in reference.named_parameters()})

    ours = load_model(str(tmp_path)).module
    graphdef, state = nnx.split(ours)
    (value, metrics), grads = mean_loss(graphdef, batch, BOTH)(state)
    assert float(metrics["load_balancing_loss"]) == pytest.approx(out.aux_loss.item(), abs=1e-5)
    assert float(metrics["router_z_loss"]) == pytest.approx(z_loss.item(), abs=1e-5)
    assert float(value) == pytest.approx((out.loss + BOTH.z_loss * z_loss).item(), abs=1e-5)
    (_, _), plain = mean_loss(graphdef, batch, None)(state)
    grads, plain, seen = flatten(grads)[0], flatten(plain)[0], set()
    assert np.abs(grads["layers/0/mlp/router/kernel"] - plain["layers/0/mlp/router/kernel"]).max() > 1e-2
    for path, placed in param_tensors(ours).items():
        for piece in placed.pieces:
            part = placed.transform.to_hf(np.asarray(grads[path][piece.at]))
            np.testing.assert_allclose(part, expected[piece.hf].numpy(), rtol=0, atol=1e-4, err_msg=piece.hf)
            seen.add(piece.hf)
    assert seen == set(expected)


@functools.cache
def tiny():
    hf = SIZES | KINDS["mixtral"] | {"model_type": "mixtral", "initializer_range": 0.2}
    return models.random_model(models.config_from_hf(hf), seed=0)


def test_losses_by_hand():
    logits_BSE = jnp.log(jnp.array([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]])) + 2.0
    experts_BSK = jnp.array([[[0, 1], [0, 1], [2, 0]]])
    sums = RouterSums.zero(3).add(logits_BSE, experts_BSK, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(sums.chosen_E, [2, 2, 0])
    np.testing.assert_allclose(sums.probability_E, [1.1, 0.6, 0.3], rtol=1e-6)
    assert float(sums.tokens) == 2
    assert float(load_balancing_loss(sums)) == pytest.approx(3 * (1 * 0.55 + 1 * 0.3), rel=1e-6)
    assert float(router_z_loss(sums)) == pytest.approx(4.0, rel=1e-6)
    twice = sums.add(logits_BSE, experts_BSK, jnp.array([[True, True, False]]))
    assert float(load_balancing_loss(twice)) == pytest.approx(float(load_balancing_loss(sums)), rel=1e-6)


def test_even_routing_has_the_least_balancing_loss():
    even = RouterSums(jnp.full(4, 6.0), jnp.full(4, 3.0), jnp.float32(0), jnp.float32(12))
    assert float(load_balancing_loss(even)) == pytest.approx(2.0)  # K = 24 choices of 12 tokens
    assert float(load_balancing_loss(RouterSums.zero(4))) == 0.0


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_changes_no_gradient(remat):
    state, batch = nnx.split(tiny())[1], make_batch()
    again = nnx.split(models.abstract_model(tiny().config, remat=remat))[0]
    (value, metrics), grads = mean_loss(nnx.split(tiny())[0], batch, BOTH)(state)
    (other, other_metrics), other_grads = mean_loss(again, batch, BOTH)(state)
    assert float(value) == pytest.approx(float(other), abs=1e-5)
    assert metrics.keys() == other_metrics.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), grads, other_grads)


def test_accumulation_weighs_each_part_by_its_trained_targets():
    batch, optim = make_batch(), OptimConfig(adamw=AdamWConfig(eps=1e-1), schedule="constant")
    schedule = make_schedule(optim, 10)
    tx = make_optimizer(optim, schedule)
    graphdef, state = create(nnx.merge(*nnx.split(tiny())), tx, seed=0)
    loss = functools.partial(sft_loss, router=BOTH)
    step = jax.jit(make_train_step(graphdef, loss, tx, schedule, accumulation_steps=2))
    _, metrics = step(state, batch)
    parts = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    sums = [loss(nnx.merge(graphdef, state.trainable, state.frozen), part, None) for part in parts]
    weight = sum(part.weight for part in sums)
    assert sums[0].weight != sums[1].weight
    assert float(metrics["loss"]) == pytest.approx(float(sum(part.total for part in sums) / weight), abs=1e-5)
    for name in ("load_balancing_loss", "router_z_loss"):
        mean = sum(part.metrics[name].total for part in sums) / weight
        assert float(metrics[name]) == pytest.approx(float(mean), abs=1e-5)
    assert "tokens" not in metrics
