"""The divergence of two heads' distributions: formulas, a vocabulary on a mesh, and how many products are computed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import MeshConfig
from jaxft.objectives.token_divergence import Divergence, Student, Teacher, TopLogps, divergence_sums, top_logps
from jaxft.sharding.mesh import make_mesh_plan

B, S, D, E = 4, 16, 32, 40
VOCABULARIES = {"wide": 1024, "narrow": 64, "odd": 61}
SETTINGS = Divergence(beta=0.3, temperature=1.5, sft_weight=0.25)


def drawn(vocab):
    """(student's head, its hidden vectors, teacher's head, its hidden vectors, targets, weights)."""
    rng = np.random.default_rng(0)
    heads = [{"kernel": rng.normal(size=(w, vocab)), "bias": rng.normal(size=vocab)} for w in (D, E)]
    hidden = [rng.normal(size=(B, S, w)) / w**0.5 for w in (D, E)]
    floats = jax.tree.map(np.float32, (heads[0], hidden[0], heads[1], hidden[1]))
    return (*floats, rng.integers(0, vocab, (B, S)).astype(np.int32), np.float32(rng.random((B, S)) < 0.6))


def unembed(head, hidden):
    return hidden @ head["kernel"] + head["bias"]


def by_formula(head, hidden, other, other_hidden, targets, weights, settings=SETTINGS):
    logits, beta = unembed(head, hidden), settings.beta
    q = jax.nn.softmax(logits / settings.temperature)
    p = jax.nn.softmax(unembed(other, other_hidden) / settings.temperature)
    m = beta * p + (1 - beta) * q
    divergence = beta * jnp.sum(p * jnp.log(p / m), -1) + (1 - beta) * jnp.sum(q * jnp.log(q / m), -1)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    loss = (1 - settings.sft_weight) * divergence + settings.sft_weight * nll
    correct, agreeing = logits.argmax(-1) == targets, logits.argmax(-1) == p.argmax(-1)
    return tuple(jnp.sum(x * weights) for x in (loss, divergence, nll, correct, agreeing))


def chunked(head, hidden, other, other_hidden, targets, weights, settings=SETTINGS, dimensions=None, top=None):
    student = Student(unembed, head, hidden, targets, weights, dimensions)
    teacher = Teacher(unembed, other, other_hidden, dimensions)
    if top is not None:
        teacher = top_logps(teacher, weights, top, temperature=settings.temperature, chunk=3)
    return tuple(divergence_sums(student, teacher, settings, chunk=3))


def with_gradient(compute, argnums=(0, 1)):
    def first(*data):
        sums = compute(*data)
        return 2.5 * sums[0], sums

    return jax.jit(jax.value_and_grad(first, argnums=argnums, has_aux=True))


def assert_close(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1e-3, float(jnp.max(jnp.abs(b)))))


def test_sums_and_gradients_are_the_formula_s():
    data = drawn(61)
    assert_close(with_gradient(chunked)(*data), with_gradient(by_formula)(*data))
    assert_close(jax.jit(chunked)(*data), by_formula(*data))


def test_the_teacher_has_no_gradient():
    _, (head, hidden) = with_gradient(chunked, (2, 3))(*drawn(61))
    assert not any(np.any(x) for x in jax.tree.leaves((head, hidden)))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_all_log_probabilities_equal_the_teacher_itself(beta):
    settings = Divergence(beta=beta, temperature=1.5)
    data = drawn(61)
    live, cached = (with_gradient(partial(chunked, settings=settings, top=top))(*data) for top in (None, 61))
    assert_close(cached, live)


def test_top_log_probabilities_are_the_largest_and_the_rest():
    _, _, head, hidden, _, weights = drawn(61)
    top = top_logps(Teacher(unembed, head, hidden), weights, 4, temperature=0.7, chunk=3)
    logps, ids = jax.lax.top_k(jax.nn.log_softmax(unembed(head, hidden) / 0.7), 4)
    at = weights > 0
    np.testing.assert_array_equal(top.ids_BSK[at], ids[at])
    np.testing.assert_allclose(top.logps_BSR[at][:, :4], logps[at], rtol=1e-5, atol=1e-5)
    rest = np.log(1 - np.exp(np.float64(logps[at])).sum(-1))
    np.testing.assert_allclose(top.logps_BSR[at][:, 4], rest, rtol=1e-4)
    assert not np.any(top.ids_BSK[~at]) and not np.any(top.logps_BSR[~at])


@pytest.mark.parametrize("top", [None, 7], ids=["live", "cached"])
@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
def test_eight_devices_equal_one(vocab, top):
    data = drawn(vocab)
    plan = make_mesh_plan(MeshConfig(fsdp=2, context=2, tensor=2))
    everywhere = jax.sharding.NamedSharding(plan.mesh, jax.sharding.PartitionSpec())
    heads = jax.device_put((data[0], data[2]), everywhere)
    hidden, other_hidden, targets, weights = jax.device_put((data[1], data[3], data[4], data[5]), plan.batch_sharding())
    on_mesh = partial(chunked, dimensions=[("both",), ("weight", "tensor")], top=top)
    ours = jax.jit(plan.bind(with_gradient(on_mesh)))(heads[0], hidden, heads[1], other_hidden, targets, weights)
    assert_close(ours, with_gradient(partial(chunked, top=top) if top else by_formula)(*data))


def test_a_frozen_head_costs_two_products_and_the_teacher_s_one():
    """Counted in the program, in which logits of a whole batch do not exist either."""
    data = drawn(1024)

    def products(argnums, top=None):
        text = str(jax.make_jaxpr(with_gradient(chunked, argnums))(*data))
        assert f"f32[{B},{S},1024]" not in text and f"f32[{B},3,1024]" in text
        return sum("dot_general" in line for line in text.splitlines())

    assert products((1,)) == 3
    assert products((0, 1)) == 4  # the head's own gradient


def test_cached_log_probabilities_need_no_product_of_a_teacher():
    data = drawn(1024)
    top = TopLogps(np.zeros((B, S, 4), np.int32), np.full((B, S, 5), -1.6, np.float32))

    def loss(hidden):
        return divergence_sums(Student(unembed, data[0], hidden, *data[4:]), top, SETTINGS, chunk=3).loss

    text = str(jax.make_jaxpr(jax.grad(loss))(data[1]))
    assert f"f32[{B},{S},1024]" not in text
    assert sum("dot_general" in line for line in text.splitlines()) == 2


def test_a_token_that_the_teacher_excludes_leaves_finite_values():
    data = drawn(61)
    data[2]["bias"][7] = -np.inf
    for beta in (0.0, 0.5):
        outcome = with_gradient(partial(chunked, settings=Divergence(beta=beta)))(*data)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(outcome))
