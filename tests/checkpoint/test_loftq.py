"""LoftQ: what quantising lost is made up for as well as a rank can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import models
from jaxft.adapters.attach import adapters, linears
from jaxft.adapters.make import attach_adapter
from jaxft.checkpoint import hf
from jaxft.checkpoint.load import load_model, open_weights
from jaxft.checkpoint.quantized import loftq
from jaxft.config import AdapterConfig, resolve
from jaxft.errors import ConfigError, ModelError
from jaxft.quant import dense

HF = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    hf.write_weights(models.random_model(models.config_from_hf(HF), seed=0), str(path))
    hf.write_config(str(path), HF, dtype="float32")
    return str(path)


def begun(folder, init, **settings):
    loaded = load_model(folder, quantization="int4")
    attach_adapter(loaded.module, AdapterConfig(r=8, alpha=16.0, init_lora_weights=init, **settings), 0)
    loftq.initialize_loftq(loaded.module, open_weights(folder)[1], init, jax.random.key(0))
    return loaded


def errors(loaded, exact):
    """(of quantised kernel and adapter together, the least possible) by layer, as Frobenius norms."""
    base = dict(linears(exact.module))
    for path, layer in linears(loaded.module):
        if layer.adapter is None:
            continue
        for at in range(2):
            wanted = np.asarray(base[path].kernel.get_value()[at])
            kernel = np.asarray(dense(layer.kernel.get_value()[at], jnp.float32))
            rank = layer.adapter.rank(at)
            left = np.linalg.svd(wanted - kernel, compute_uv=False)[rank:]
            yield np.linalg.norm(wanted - kernel - layer.adapter.delta((at,))), np.sqrt((left**2).sum())


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": "layers.0.mlp.down_proj:3"}, {"layers_to_transform": "1"}])
def test_what_is_left_is_the_least_that_a_rank_can_leave(folder, settings):
    """Eckart and Young: no matrix of that rank is closer to what was lost."""
    found = list(errors(begun(folder, "loftq", **settings), load_model(folder)))
    assert len(found) == 14
    for left, least in found:
        assert left == pytest.approx(least, rel=1e-4)


def test_by_iteration_it_is_nearly_so(folder):
    for left, least in errors(begun(folder, "loftq_niter_8"), load_model(folder)):
        assert least * (1 - 1e-5) <= left < 1.03 * least


def test_logits_come_closer_to_the_base(folder):
    exact = load_model(folder).logits(TOKENS)
    apart = np.abs(load_model(folder, quantization="int4").logits(TOKENS) - exact).mean()
    assert np.abs(begun(folder, "loftq").logits(TOKENS) - exact).mean() < 0.9 * apart


def test_it_wants_a_quantised_linear(folder):
    loaded = load_model(folder)
    attach_adapter(loaded.module, AdapterConfig(r=4), 0)
    assert adapters(loaded.module)
    with pytest.raises(ModelError, match="is not a quantised Linear"):
        loftq.initialize_loftq(loaded.module, open_weights(folder)[1], "loftq", jax.random.key(0))


@pytest.mark.parametrize(
    ("model", "adapter", "said"),
    [
        ({}, {}, "model.quantization is None"),
        (
            {"quantization": "nf4"},
            {"use_dora": True},
            "changes the base that the lengths of adapter.use_dora are taken from",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused(model, adapter, said):
    adapter = {"init_lora_weights": "loftq"} | adapter
    with pytest.raises(ConfigError, match=said):
        resolve({"model": {"path": "x"} | model, "data": {"train": "x"}, "adapter": adapter})
