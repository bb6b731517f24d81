"""The products of linear layers: kernels wider than their computation, the form of gradients on CPUs and on TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.config import MeshConfig
from jaxft.nn.linear import KERNEL_DIMS, product
from jaxft.nn.mlp import MLP, MLPShape
from jaxft.sharding.mesh import make_mesh_plan


def drawn(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("tp_side", ["inputs", "outputs"])
@pytest.mark.parametrize("axes", [None, {"fsdp": 4, "tensor": 2}])
def test_the_gradient_of_a_wide_kernel_is_not_rounded(tp_side, axes):
    x, kernel, out = drawn(0, 8, 4, 16).astype(jnp.bfloat16), drawn(1, 16, 32), drawn(2, 8, 4, 32).astype(jnp.bfloat16)

    def pulled(kernel):
        y, pull = jax.vjp(lambda x, kernel: product(x, kernel, tp_side), x, kernel)
        return y, *pull(out)

    step = pulled
    if axes is not None:
        plan = make_mesh_plan(MeshConfig(**axes))
        axes_of = {"weight": "fsdp", "tensor": "tensor"}
        kernel = jax.device_put(kernel, NamedSharding(plan.mesh, P(*map(axes_of.get, KERNEL_DIMS[tp_side]))))
        step = plan.bind(pulled)
    y, grad_x, grad_kernel = jax.jit(step)(kernel)
    assert (y.dtype, grad_x.dtype, grad_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    # Products of bfloat16 are exact in float32, so only the order of the sum differs.
    expected = np.einsum("bsi,bso->io", np.float32(x), np.float32(out))
    np.testing.assert_allclose(grad_kernel, expected, rtol=0, atol=1e-5)
    narrow = pulled(kernel.astype(jnp.bfloat16))
    for found, theirs in zip((y, grad_x), narrow[:2], strict=True):
        np.testing.assert_allclose(np.float32(found), np.float32(theirs), rtol=2**-7, atol=2**-5)
    assert narrow[2].dtype == jnp.bfloat16
    assert np.abs(np.float32(narrow[2]) - expected).max() > 1e-3


def test_the_gradient_on_cpus_transposes_no_wide_array():
    x, kernel, out = drawn(0, 2, 64, 96), drawn(1, 96, 160), drawn(2, 2, 64, 160)

    def gradients(multiply, *args):
        def total(x, kernel, out):
            return (multiply(jnp.tanh(x), kernel) * jnp.tanh(out)).sum()

        return jax.grad(total, (0, 1))(*args)

    ours, theirs = (
        jax.jit(gradients, static_argnums=0).lower(multiply, x, kernel, out).compile()
        for multiply in (lambda x, kernel: product(x, kernel, "outputs"), jnp.matmul)
    )
    # JAX's own form transposes the gradient. Both give the same sums.
    assert [" transpose(" in program.as_text() for program in (ours, theirs)] == [False, True]
    jax.tree.map(np.testing.assert_array_equal, ours(x, kernel, out), theirs(x, kernel, out))


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_gate_and_up_are_arrays_that_no_product_computes_anew(fused):
    types = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    mlp = MLP(MLPShape(width=8, hidden=24, fused=fused), stddev=1.0, rngs=nnx.Rngs(params=jax.random.key(0)), **types)
    program = jax.make_jaxpr(jax.grad(lambda x: mlp(x, None).sum()))(drawn(1, 2, 4, 8)).jaxpr
    barriers = [eqn for eqn in program.eqns if eqn.primitive.name == "optimization_barrier"]
    (barrier,) = (eqn for eqn in barriers if len(eqn.outvars) == 2)
    assert [out.aval.shape for out in barrier.outvars] == [(2, 4, 24)] * 2
    others = [var for eqn in program.eqns if eqn is not barrier for var in eqn.invars]
    assert not any(own is var for own in barrier.invars for var in others)
