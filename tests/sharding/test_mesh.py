"""The mesh and the shardings of a whole train state, on 8 fake devices and on one."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft import sharding
from jaxft.config import MeshConfig
from jaxft.errors import ConfigError
from jaxft.nn.storage import StorageDims
from jaxft.sharding.mesh import auto_mesh, make_mesh_plan

ONE_EACH = {"slice": 1, "data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


class State(NamedTuple):
    step: jax.Array
    trainable: dict
    frozen: dict
    opt_state: tuple
    key: jax.Array


DIMS = {
    "layers/q_proj/kernel": StorageDims(("weight", "tensor")),
    "layers/norm/scale": StorageDims(("weight",)),
    "embed/embedding": StorageDims(("tensor", "weight")),
}


def init():
    kernel = jnp.arange(2 * 16 * 8, dtype=jnp.float32).reshape(2, 16, 8) / 256
    trainable = {"layers": {"q_proj": {"kernel": kernel}, "norm": {"scale": jnp.ones((2, 16))}}}
    frozen = {"embed": {"embedding": jnp.ones((11, 16), jnp.bfloat16)}}
    return State(jnp.int32(0), trainable, frozen, optax.adamw(1e-2).init(trainable), jax.random.key(0))


def test_every_name_that_the_package_lists_exists():
    assert {name: hasattr(sharding, name) for name in sharding.__all__} == dict.fromkeys(sharding.__all__, True)


def test_one_device_is_a_mesh_of_one():
    plan = make_mesh_plan(MeshConfig(), jax.devices()[:1])
    assert plan.axes == ONE_EACH
    assert plan.batch_shards == 1
    state = plan.shard(init(), DIMS)
    assert state.trainable["layers"]["q_proj"]["kernel"].devices() == {jax.devices()[0]}


@pytest.mark.parametrize(
    ("config", "axes"),
    [
        (MeshConfig(), {"data": 1, "fsdp": 8, "expert": 1}),
        (MeshConfig(data=-1, fsdp=2), {"data": 4, "fsdp": 2, "expert": 1}),
        (MeshConfig(data=2, fsdp=4), {"data": 2, "fsdp": 4, "expert": 1}),
        (MeshConfig(data=8, fsdp=1), {"data": 8, "fsdp": 1, "expert": 1}),
        (MeshConfig(expert=4), {"data": 1, "fsdp": 2, "expert": 4}),
    ],
)
def test_sizes_are_filled_and_axes_are_auto(config, axes):
    plan = make_mesh_plan(config)
    assert plan.axes == ONE_EACH | axes
    assert set(plan.mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in plan.mesh.devices.flat) == list(range(8))
    assert plan.batch_shards == 8
    assert plan.describe().startswith("8 cpu devices: ")


def test_any_ordered_axes_are_taken():
    @dataclasses.dataclass(frozen=True)
    class Wider:
        data: int = 2
        fsdp: int = -1
        tensor: int = 2

    plan = make_mesh_plan(Wider())
    assert plan.axes == {"data": 2, "fsdp": 2, "tensor": 2}
    assert plan.batch_shards == 4
    assert plan.batch_sharding().spec == P(("data", "fsdp"))
    dims = {"w": StorageDims(("weight", "tensor"))}
    assert plan.shardings({"w": jnp.ones((4, 4))}, dims)["w"].spec == P("fsdp", "tensor")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (MeshConfig(data=3, fsdp=-1), r"mesh\.data=3 make 3 devices.*does not divide the 8.*1, 2, 4, 8"),
        (MeshConfig(data=1, fsdp=4), r"mesh\.fsdp=4 make 4 devices.*are not the 8.*1, 2, 4, 8"),
        (MeshConfig(data=16, fsdp=1), r"16 devices"),
        (MeshConfig(data=-1, fsdp=-1), r"only one mesh axis may be -1.*data and fsdp"),
        (MeshConfig(data=0), r"mesh\.data=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config, match):
    with pytest.raises(ConfigError, match=match):
        make_mesh_plan(config)


@pytest.mark.parametrize("concrete", [True, False])
def test_the_whole_state_is_placed_moments_included(concrete):
    plan = make_mesh_plan(MeshConfig())
    shardings = plan.shardings(init() if concrete else jax.eval_shape(init), DIMS)
    assert jax.tree.structure(shardings) == jax.tree.structure(jax.eval_shape(init))
    kernel = P(None, "fsdp")
    assert shardings.trainable["layers"]["q_proj"]["kernel"].spec == kernel
    assert shardings.opt_state[0].mu["layers"]["q_proj"]["kernel"].spec == kernel
    assert shardings.opt_state[0].nu["layers"]["q_proj"]["kernel"].spec == kernel
    assert shardings.frozen["embed"]["embedding"].spec == P(None, "fsdp")
    assert shardings.step.spec == shardings.key.spec == shardings.opt_state[0].count.spec == P()


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(data=2, fsdp=4), MeshConfig(data=8, fsdp=1)])
def test_a_step_on_8_devices_equals_a_step_on_one(config):
    tokens_BS = np.arange(32).reshape(16, 2) % 11

    def step(state, tokens_BS):
        def loss(trainable):
            x_BSD = state.frozen["embed"]["embedding"][tokens_BS].astype(jnp.float32)
            for layer in range(2):
                x_BSD = x_BSD * trainable["layers"]["norm"]["scale"][layer]
                y_BSF = x_BSD @ trainable["layers"]["q_proj"]["kernel"][layer]
                x_BSD = jnp.concatenate([y_BSF, jnp.sin(y_BSF)], -1)
            return jnp.mean(x_BSD**2)

        value, grads = jax.value_and_grad(loss)(state.trainable)
        updates, opt_state = optax.adamw(1e-2).update(grads, state.opt_state, state.trainable)
        return state._replace(trainable=optax.apply_updates(state.trainable, updates), opt_state=opt_state), value

    def run(plan):
        shardings = plan.shardings(jax.eval_shape(init), DIMS)
        state = jax.device_put(init(), shardings)
        batch = jax.device_put(tokens_BS, plan.batch_sharding())
        state, value = jax.jit(step, out_shardings=(shardings, NamedSharding(plan.mesh, P())))(state, batch)
        return jax.device_get(state._replace(key=jax.random.key_data(state.key))), float(value)

    one, many = run(make_mesh_plan(MeshConfig(), jax.devices()[:1])), run(make_mesh_plan(config))
    # float32 sums in another order; Adam divides by the gradient's own size
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, many)


def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_do():
    plan = make_mesh_plan(MeshConfig())
    plan.check_batch(16)
    with pytest.raises(ConfigError, match=r"batch_size .* = 12 rows are not divisible by 8 devices.*Use 8 or 16 rows"):
        plan.check_batch(12)
    with pytest.raises(ConfigError, match=r"eval rows = 3 .*Use 8 rows"):
        plan.check_batch(3, "eval rows")


def test_the_error_names_the_path_in_the_state():
    plan = make_mesh_plan(MeshConfig())
    tree = {"trainable": {"layers": {"0": {"q_proj": {"kernel": jax.ShapeDtypeStruct((2, 4100, 64), jnp.float32)}}}}}
    with pytest.raises(ConfigError, match=r"trainable/layers/0/q_proj/kernel \[2, 4100, 64\].*fsdp=8"):
        plan.shardings(tree, {"layers/0/q_proj/kernel": StorageDims(("weight", "tensor"))})


@pytest.mark.parametrize(
    ("devices", "rows", "slices", "expected"),
    [
        (16, 16, 1, MeshConfig(fsdp=16)),
        (16, 4, 1, MeshConfig(fsdp=4, tensor=4)),
        (8, 1, 1, MeshConfig(fsdp=1, tensor=8)),
        (64, 2, 1, MeshConfig(fsdp=2, tensor=8, context=4)),
        (32, 16, 2, MeshConfig(slice=2, fsdp=8, tensor=2)),
        (12, 6, 1, MeshConfig(fsdp=6, tensor=2)),
    ],
)
def test_auto_gives_rows_to_fsdp_and_shares_rows_by_heads_then_positions(devices, rows, slices, expected):
    sizes = {"heads": 64, "kv_heads": 8, "max_length": 4096}
    assert auto_mesh(devices, rows=rows, slices=slices, **sizes) == expected


def test_auto_refuses_what_it_finds_no_use_for():
    with pytest.raises(
        ConfigError, match="cannot use all 16 devices in 1 slices: no mesh divides 1 rows of 1000 positions"
    ):
        auto_mesh(16, rows=1, heads=64, kv_heads=1, max_length=1000)


def test_slices_are_an_axis_of_their_own(monkeypatch):
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    topologies = pytest.importorskip("jax.experimental.topologies")
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=2).devices
    plan = make_mesh_plan(MeshConfig(slice=2, fsdp=-1), devices)
    assert plan.axes == ONE_EACH | {"slice": 2, "fsdp": 8}
    assert [{d.slice_index for d in part.flat} for part in plan.mesh.devices] == [{0}, {1}]
    with pytest.raises(ConfigError, match=r"these devices are 2 slices.*set mesh\.slice=2"):
        make_mesh_plan(MeshConfig(fsdp=-1), devices)


def test_heads_and_positions_must_divide():
    plan = make_mesh_plan(MeshConfig(fsdp=1, context=2, tensor=4))
    plan.check_sizes(heads=8, kv_heads=2, max_length=64)
    with pytest.raises(ConfigError, match=r"mesh\.tensor=4 does not divide 6 query heads.*one of 1, 3, 6\."):
        plan.check_sizes(heads=6, kv_heads=3, max_length=64)
    with pytest.raises(
        ConfigError, match=r"data\.max_length=60 is not divisible by mesh\.context=2 times mesh\.tensor=4.*Use 64"
    ):
        plan.check_sizes(heads=8, kv_heads=2, max_length=60)
