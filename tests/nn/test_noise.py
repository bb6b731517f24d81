"""NEFTune's noise: bounded by each document's own length, absent outside training, drawn anew for every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.data.batch import Batch
from jaxft.nn.noise import add_noise
from jaxft.objectives.sft import sft_loss

D = 64
SEGMENTS = jnp.array([[1] * 9 + [2] * 4 + [3] * 1 + [0] * 2, [1] * 16])
LENGTHS = np.array([[9] * 9 + [4] * 4 + [1] * 1 + [2] * 2, [16] * 16])


def test_the_noise_is_uniform_within_the_bound_of_its_document():
    x = jnp.zeros((2, 16, D))
    noise = np.asarray(add_noise(x, SEGMENTS, 5.0, jax.random.key(0)))
    relative = noise / (5.0 / np.sqrt(LENGTHS * D))[..., None]
    assert np.abs(relative).max() <= 1.0
    # Each number uniform on [-1, 1]: four standard errors of mean and of variance.
    count = relative.size
    assert abs(relative.mean()) < 4 * (1 / 3 / count) ** 0.5
    assert abs(relative.var() - 1 / 3) < 4 * (4 / 45 / count) ** 0.5
    assert (noise != np.asarray(add_noise(x, SEGMENTS, 5.0, jax.random.key(1)))).any()


def test_the_bound_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.neftune import neftune_post_forward_hook

    assert transformers
    module = torch.nn.Embedding(3, D).train()
    module.neftune_noise_alpha = 5.0
    torch.manual_seed(0)
    theirs = neftune_post_forward_hook(module, None, torch.zeros(64, 16, D))
    ours = add_noise(jnp.zeros((64, 16, D)), jnp.ones((64, 16), jnp.int32), 5.0, jax.random.key(0))
    # The largest of 65,536 uniform draws is within a thousandth of the bound.
    assert float(jnp.abs(ours).max()) == pytest.approx(float(theirs.abs().max()), rel=1e-3)


def test_only_training_is_noisy(smoke_config):
    graphdef, state = nnx.split(models.random_model(models.config_from_hf(smoke_config), seed=0))
    tokens = np.arange(32).reshape(2, 16) % 11
    positions = np.broadcast_to(np.arange(16), (2, 16))
    batch = Batch(tokens, np.roll(tokens, -1, 1), np.ones((2, 16), np.float32), positions, np.ones((2, 16), int))

    def loss(key, alpha):
        return float(sft_loss(nnx.merge(graphdef, state), batch, key, neftune_noise_alpha=alpha).total)

    key = jax.random.key(0)
    assert loss(None, 50.0) == loss(None, None) == loss(key, None)
    assert loss(key, 50.0) != loss(None, None)
    assert loss(key, 50.0) == loss(key, 50.0) != loss(jax.random.key(1), 50.0)
