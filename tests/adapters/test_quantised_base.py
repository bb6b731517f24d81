"""VeRA, IA3, prompts and prefixes on quantised kernels: they move, the codes do not, and what is merged is dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.adapters.attach import AdapterParam, linears, merge
from jaxft.adapters.make import attach_adapter
from jaxft.config import AdapterConfig
from jaxft.nn.virtual import virtual_ids
from jaxft.quant import is_quantized
from jaxft.training.state import divide

TOKENS = np.random.default_rng(0).integers(0, 250, (2, 12))


def moved(smoke_config, kind):
    """A quantised model with an adapter as if trained."""
    module = models.random_model(models.config_from_hf(smoke_config), seed=0, quantization="int8")
    targets = "k_proj,v_proj,down_proj" if kind == "ia3" else "all-linear"
    attach_adapter(module, AdapterConfig(kind=kind, r=8, num_virtual_tokens=3, target_modules=targets), 0)
    state = nnx.state(module, AdapterParam)
    nnx.update(module, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), state))
    return module


def forward(graphdef, *states):
    module = nnx.merge(graphdef, *states)
    first = np.tile(np.array(virtual_ids(module.virtual_tokens), np.int32), (2, 1))
    hidden_BSD, _ = module(jnp.concatenate([first, TOKENS], axis=1))
    return module.unembed(hidden_BSD[:, module.virtual_tokens :])


@pytest.mark.parametrize("kind", ["vera", "ia3", "prompt", "prefix"])
def test_every_number_has_a_gradient(smoke_config, kind):
    graphdef, moving, still = divide(moved(smoke_config, kind))
    grads = jax.jit(jax.grad(lambda moving: (forward(graphdef, moving, still) ** 2).mean()))(moving)
    assert all(np.isfinite(grad).all() and np.abs(grad).max() > 0 for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", ["vera", "ia3"])
def test_merged_kernels_are_dense_and_give_the_same(smoke_config, kind):
    module = moved(smoke_config, kind)
    apart = np.asarray(jax.jit(forward)(*nnx.split(module)))
    merge(module)
    kernels = {path: layer.kernel.get_value() for path, layer in linears(module)}
    assert not any(is_quantized(kernel) for path, kernel in kernels.items() if path.endswith("down_proj"))
    together = np.asarray(jax.jit(forward)(*nnx.split(module)))
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-4 * np.abs(apart).max())
