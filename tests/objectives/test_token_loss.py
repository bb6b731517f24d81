"""Label smoothing, z-loss and dynamic fine-tuning: value and gradient of the formulas, on one device and eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.config import MeshConfig
from jaxft.objectives.cross_entropy import token_sums
from jaxft.objectives.token_loss import TokenLoss
from jaxft.sharding.mesh import make_mesh_plan

B, S, D = 4, 16, 32
SHAPES = {
    "smoothed": TokenLoss(label_smoothing=0.1),
    "z": TokenLoss(z_loss=0.3),
    "dft": TokenLoss(dft=True),
    "smoothed, z": TokenLoss(label_smoothing=0.25, z_loss=1e-2),
    "dft, z": TokenLoss(dft=True, z_loss=1e-2),
}
# On eight devices: split over all of them, over the tensor axis alone, and, being prime, not at all.
VOCABULARIES = {"wide": 1024, "narrow": 64, "odd": 61}
by_shape = pytest.mark.parametrize("loss", SHAPES.values(), ids=SHAPES)


def drawn(vocab, hidden_scale=1.0):
    rng = np.random.default_rng(0)
    head = {"kernel": rng.normal(size=(D, vocab)), "bias": rng.normal(size=vocab)}
    hidden = hidden_scale * rng.normal(size=(B, S, D)) / D**0.5
    weights = (rng.random((B, S)) < 0.7) * rng.random((B, S))
    head, hidden, weights = jax.tree.map(np.float32, (head, hidden, weights))
    return head, hidden, rng.integers(0, vocab, (B, S)).astype(np.int32), weights


def unembed(head, hidden):
    return hidden @ head["kernel"] + head["bias"]


def by_formula(loss, head, hidden, targets, weights):
    """The formulas on whole float32 logits, differentiated by JAX."""
    logits = unembed(head, hidden)
    logp = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
    value = (1 - loss.label_smoothing) * nll - loss.label_smoothing * jnp.mean(logp, -1)
    if loss.dft:
        value = value * jax.lax.stop_gradient(jnp.exp(-nll))
    value = value + loss.z_loss * jax.nn.logsumexp(logits, -1) ** 2
    return jnp.sum(value * weights), jnp.sum(nll * weights)


def chunked(loss, dimensions=None):
    def compute(head, hidden, targets, weights):
        sums = token_sums(unembed, head, hidden, targets, weights, dimensions=dimensions, chunk=3, loss=loss)
        return sums.loss, sums.nll

    return compute


def assert_close(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1e-3, float(jnp.max(jnp.abs(b)))))


def with_gradient(compute):
    return jax.jit(jax.value_and_grad(compute, argnums=(0, 1), has_aux=True))


@by_shape
def test_value_and_gradient_are_the_formula_s(loss):
    data = drawn(61)
    expected = with_gradient(lambda *data: by_formula(loss, *data))(*data)
    assert_close(with_gradient(chunked(loss))(*data), expected)
    assert_close(jax.jit(chunked(loss))(*data), expected[0])


@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
@by_shape
def test_eight_devices_equal_one(loss, vocab):
    data = drawn(vocab)
    plan = make_mesh_plan(MeshConfig(fsdp=2, context=2, tensor=2))
    compute = with_gradient(chunked(loss, [("both",), ("weight", "tensor")]))
    expected = with_gradient(lambda *data: by_formula(loss, *data))(*data)
    (head, *rows), whole = data, NamedSharding(plan.mesh, P())
    given = (jax.device_put(head, whole), *jax.device_put(rows, plan.batch_sharding()))
    assert_close(jax.jit(plan.bind(compute))(*given), expected)


def test_label_smoothing_is_torch_s():
    torch = pytest.importorskip("torch")
    head, hidden, targets, weights = drawn(61)
    sums = token_sums(unembed, head, hidden, targets, weights, loss=TokenLoss(label_smoothing=0.2))
    logits = torch.tensor(np.asarray(unembed(head, hidden))).reshape(B * S, 61)
    each = torch.nn.functional.cross_entropy(
        logits, torch.tensor(targets).long().reshape(-1), reduction="none", label_smoothing=0.2
    )
    assert float(sums.loss) == pytest.approx(float(torch.sum(each * torch.tensor(weights).reshape(-1))), rel=1e-5)


@by_shape
def test_large_logits_do_not_overflow(loss):
    data = drawn(61, hidden_scale=1e3)
    assert_close(jax.jit(chunked(loss))(*data), by_formula(loss, *data))


def test_a_plain_loss_may_be_differentiated_by_either_name():
    head, *rest = drawn(61)
    by_loss, by_nll = (
        jax.grad(lambda head, name=name: getattr(token_sums(unembed, head, *rest), name))(head)
        for name in ("loss", "nll")
    )
    jax.tree.map(np.testing.assert_array_equal, by_loss, by_nll)
