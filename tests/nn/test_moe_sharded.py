"""Experts on eight devices: the result of one, and what travels for it, read from the compiled program."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.config import MeshConfig
from jaxft.hardware.groups import collectives
from jaxft.hardware.hlo import parse
from jaxft.nn.experts import exchange, sharded
from jaxft.nn.experts.layer import MoE, MoEShape
from jaxft.nn.experts.router import RouterShape
from jaxft.nn.experts.sharded import divides
from jaxft.nn.mlp import MLPShape
from jaxft.nn.storage import storage_dims_of
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.trees import path_str

MESHES = {
    "expert4_fsdp2": MeshConfig(fsdp=2, expert=4),
    "expert2_data2_fsdp2": MeshConfig(data=2, fsdp=2, expert=2),
    "fsdp8": MeshConfig(fsdp=8),
    "expert8": MeshConfig(fsdp=1, expert=8),
}
# One device's rows, 5 a sequence, are of no other size: what gathers rows shows in the shape.
SHAPE = MoEShape(width=16, hidden=24, experts=8, router=RouterShape(chosen=2, renormalize=True))
ROWS = 5


def layer(shape=SHAPE):
    return MoE(shape, stddev=0.5, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(params=3))


def value_and_grads(moe, trained=""):
    graphdef, state = nnx.split(moe)

    def one(path, x):
        return x if trained in path_str(path) else jax.lax.stop_gradient(x)

    def loss(state, x_BSD):
        state = jax.tree_util.tree_map_with_path(one, state)
        return jnp.sin(nnx.merge(graphdef, state)(x_BSD)).mean()

    return jax.value_and_grad(loss, (0, 1)), state


def on_mesh(moe, plan, x_BSD, trained=""):
    """(compiled value and gradients, its arguments on their devices)."""
    step, state = value_and_grads(moe, trained)
    args = plan.shard(state, storage_dims_of(moe)), jax.device_put(x_BSD, plan.batch_sharding())
    return jax.jit(plan.bind(step)).lower(*args).compile(), args


def assert_same(got, wanted):
    (value, grads), (expected, expected_grads) = got, wanted
    assert float(value) == pytest.approx(float(expected), abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), grads, expected_grads)


def exchanged(compiled, kind):
    """(dimensions of the result, groups of devices) of every collective of a kind in the program."""
    for array, groups in collectives(parse(compiled.as_text()), kind, jax.device_count()):
        yield array.dims, frozenset(frozenset(group.tolist()) for group in groups)


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one_and_rows_travel_between_experts_alone(name):
    plan, moe = make_mesh_plan(MESHES[name]), layer()
    x_BSD = jax.random.normal(jax.random.key(0), (8, ROWS, SHAPE.width))
    step, state = value_and_grads(moe)
    compiled, args = on_mesh(moe, plan, x_BSD)
    assert_same(compiled(*args), jax.jit(step)(state, x_BSD))

    places, fsdp = plan.axes["expert"], plan.axes["fsdp"]
    ids = np.vectorize(lambda device: device.id)(plan.mesh.devices)  # [data, fsdp, expert]
    between_experts = frozenset(frozenset(group.tolist()) for group in ids.reshape(-1, places))
    gathers = list(exchanged(compiled, "all-gather"))
    rows = [(dims, groups) for dims, groups in gathers if math.prod(dims) % ROWS == 0]
    weights = [(dims, groups) for dims, groups in gathers if math.prod(dims) % ROWS]
    assert bool(rows) == (places > 1)
    assert bool(weights) == (fsdp * places > 1)  # of experts, and the router
    for dims, groups in rows:
        assert groups == between_experts, dims
        assert dims[0] == places * ROWS
    # The weights come whole along the model dimension, those of the device's experts only.
    assert {math.prod(dims) for dims, _ in weights} <= {
        SHAPE.experts // places * SHAPE.width * SHAPE.hidden, SHAPE.width * SHAPE.experts,
    }  # fmt: skip
    # Their gradients go back scattered, not as a copy on every device.
    small = SHAPE.width * SHAPE.experts
    assert all(math.prod(dims) <= small for dims, _ in exchanged(compiled, "all-reduce") if plan.axes["data"] == 1)
    assert not list(exchanged(compiled, "all-to-all"))


def test_nothing_is_dropped_when_all_rows_choose_experts_of_one_device():
    moe, plan = layer(), make_mesh_plan(MESHES["expert4_fsdp2"])
    favored = np.zeros((SHAPE.width, SHAPE.experts), np.float32)
    favored[:, 2:4] = 3.0, 2.9
    moe.router.kernel.set_value(jnp.asarray(favored))
    x_BSD = jnp.abs(jax.random.normal(jax.random.key(0), (8, ROWS, SHAPE.width)))
    step, state = value_and_grads(moe)
    compiled, args = on_mesh(moe, plan, x_BSD)
    assert_same(compiled(*args), jax.jit(step)(state, x_BSD))


def test_more_choices_than_experts_of_a_device_and_a_width_that_does_not_divide():
    shape = MoEShape(width=15, hidden=24, experts=8, router=RouterShape(chosen=5, renormalize=False))
    moe, plan = layer(shape), make_mesh_plan(MESHES["expert4_fsdp2"])
    x_BSD = jax.random.normal(jax.random.key(0), (8, ROWS, shape.width))
    step, state = value_and_grads(moe)
    compiled, args = on_mesh(moe, plan, x_BSD)
    assert_same(compiled(*args), jax.jit(step)(state, x_BSD))


def test_a_mesh_is_in_sight_only_where_its_devices_get_equal_rows():
    plan = make_mesh_plan(MESHES["expert4_fsdp2"])
    assert not divides((8, 3, 16))
    assert plan.bind(divides)((8, 3, 16))
    assert not plan.bind(divides)((6, 3, 16))
    assert not make_mesh_plan(MeshConfig(), jax.devices()[:1]).bind(divides)((8, 3, 16))


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=2, expert=2, tensor=2), MeshConfig(fsdp=8)], ids=["expert2_tensor2", "fsdp8"]
)
def test_a_shared_expert_and_a_biased_router_on_eight_devices_equal_one(mesh):
    router = RouterShape(
        chosen=3, renormalize=True, scores="sigmoid", choice_bias=True, groups=4, chosen_groups=2, group_best=2
    )
    shape = dataclasses.replace(
        SHAPE, router=router, shared=MLPShape(width=SHAPE.width, hidden=8), shared_gate=True, fused="halves"
    )
    moe, plan = layer(shape), make_mesh_plan(mesh)
    moe.router.choice_bias.set_value(jax.random.normal(jax.random.key(4), (SHAPE.experts,)))
    x_BSD = jax.random.normal(jax.random.key(0), (8, 4, SHAPE.width))
    step, state = value_and_grads(moe)
    compiled, args = on_mesh(moe, plan, x_BSD)
    assert_same(compiled(*args), jax.jit(step)(state, x_BSD))
    # The rows of the shared expert's kernels are split over fsdp, as those of a dense feed-forward are.
    placed = {path_str(path): x.sharding for path, x in jax.tree_util.tree_flatten_with_path(args[0])[0]}
    assert "fsdp" in str(placed["shared_expert/gate_proj/kernel"].spec)
    assert placed["router/choice_bias"].is_fully_replicated


def by_gathering(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all`, which XLA's CPU backend lacks: everyone gathers everything and takes its slices."""
    shards, own = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    tables = (jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets))
    operands, starts, sizes, places = tables
    slices = len(input_offsets) // shards
    at = jnp.arange(len(output))
    for source in range(shards):
        for index in range(slices):
            start, size, place = (table[source, own * slices + index] for table in (starts, sizes, places))
            inside = (at >= place) & (at < place + size)
            taken = jnp.take(operands[source], start + at - place, axis=0, mode="clip")
            output = jnp.where(inside[:, None, None], taken, output)
    # The receiver's own account of the sizes agrees with that of the senders.
    agree = (recv_sizes == jax.lax.all_to_all(send_sizes, axis_name, 0, 0, tiled=True)).all()
    return jnp.where(agree, output, jnp.nan)


@pytest.fixture
def exchanging(monkeypatch):
    monkeypatch.setattr(sharded, "exchanges", lambda: True)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", by_gathering)


# With a window of nearly no room, the rows of one layer take many turns.
@pytest.mark.parametrize(
    ("name", "room", "trained"), [("expert4_fsdp2", exchange.ROOM, ""), ("expert2_data2_fsdp2", 0.3, "down_proj")]
)
def test_exchanged_rows_give_the_result_of_one_device(name, room, trained, exchanging, monkeypatch):
    monkeypatch.setattr(exchange, "ROOM", room)
    monkeypatch.setattr(exchange, "ALIGNMENT", 1)
    plan, moe = make_mesh_plan(MESHES[name]), layer()
    step, state = value_and_grads(moe, trained)
    mixed_BSD = jax.random.normal(jax.random.key(0), (8, ROWS, SHAPE.width))
    compiled, (placed, _) = on_mesh(moe, plan, mixed_BSD, trained)
    single = jax.jit(step)
    # Rows that are all alike choose the same experts: those of other shards get none.
    for x_BSD in (mixed_BSD, jnp.broadcast_to(mixed_BSD[0, 0], mixed_BSD.shape)):
        got = compiled(placed, jax.device_put(x_BSD, plan.batch_sharding()))
        assert_same(got, single(state, x_BSD))
