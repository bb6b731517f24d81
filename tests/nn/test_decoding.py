"""Layers that leave their keys and values to the stack give what layers that write them first give."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.config import MeshConfig
from jaxft.generation import steps
from jaxft.generation.sampling import Knobs
from jaxft.hardware.compile import ENVIRONMENT
from jaxft.models import config_from_hf, random_model
from jaxft.nn.attention import cache as kv
from jaxft.nn.attention.decoding import attend_with_new, write_new
from jaxft.nn.attention.layer import attend_cached, causal_mask
from jaxft.nn.attention.score_form import PLAIN, ScoreForm
from jaxft.sharding.mesh import make_mesh_plan

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8,
}  # fmt: skip
FAMILIES = {
    # Layers with a window of six tokens, and layers at the end that use the keys of earlier ones.
    "windows and borrowed keys": SMALL | {
        "model_type": "gemma4_text", "vocab_size_per_layer_input": 96, "num_hidden_layers": 4, "sliding_window": 6,
        "global_head_dim": 16, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "latent": SMALL | {
        "model_type": "deepseek_v3", "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "num_key_value_heads": 4, "q_lora_rank": 12, "num_hidden_layers": 2,
        "first_k_dense_replace": 2, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
    },
    "recurrent": SMALL | {
        "model_type": "qwen3_5_text", "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 96, (3, 10))


@pytest.mark.parametrize(
    ("form", "sinks"), [(PLAIN, False), (ScoreForm(window=5, softcap=3.0, scale=0.4), True)], ids=["plain", "all"]
)
def test_a_query_sees_the_cache_and_its_own_key(form, sinks):
    rng = np.random.default_rng(1)
    draw = partial(rng.normal, size=(3, 1, 2, 8))
    cache = kv.empty(2, 3, 8, 2, 8, jnp.float32)
    for position in range(7):
        where = jnp.full((3, 1), position)
        cache = kv.write(cache, 1, where, draw(), draw())._replace(
            positions_BT=kv.write_positions(cache.positions_BT, where, where)
        )
    q, new, at = jnp.asarray(rng.normal(size=(3, 1, 4, 8))), kv.NewKeys(jnp.asarray(draw()), jnp.asarray(draw())), 7
    sinks_N = jnp.asarray(rng.normal(size=4)) if sinks else None
    mask = partial(causal_mask, jnp.full((3, 1), at), window=form.window)
    ours = attend_with_new(q, cache.k_RBKHT[1], cache.v_RBKTH[1], new, mask(cache.positions_BT), form, sinks_N)
    full = kv.write(cache, 1, jnp.full((3, 1), at), *new)
    positions = kv.write_positions(cache.positions_BT, jnp.full((3, 1), at), jnp.full((3, 1), at))
    theirs = attend_cached(q, full.k_RBKHT[1], full.v_RBKTH[1], mask(positions), form, sinks_N)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_gives_the_same_vectors_and_the_same_cache(family, monkeypatch):
    model = random_model(config_from_hf(FAMILIES[family]), seed=0)
    graphdef, params = nnx.split(model)

    def forward(cache, tokens, positions, segments):
        return nnx.merge(graphdef, params)(tokens, positions, segments, cache)

    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)

    def decoded(later: bool):
        for layer in ("layer", "latent"):
            monkeypatch.setattr(f"jaxft.nn.attention.{layer}.writes_later", lambda count: later and count == 1)
        step, cache, hidden = jax.jit(lambda *args: forward(*args)), model.init_cache(3, 16), []
        for at in range(TOKENS.shape[1]):
            # The second row ends after eight tokens, and its cache must stay as it is.
            segments = np.array([[1], [int(at < 8)], [1]])
            out, cache = step(cache, TOKENS[:, at : at + 1], positions[:, at : at + 1], segments)
            hidden.append(out * segments[..., None])
        return hidden, cache

    (ours, our_cache), (theirs, their_cache) = decoded(True), decoded(False)
    np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs), rtol=0, atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(our_cache), jax.tree.leaves(their_cache), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("idle", [(0, 5, 6, 11), tuple(range(12))], ids=["some", "all"])
def test_rows_without_a_slot_stay_and_a_mesh_exchanges_nothing(idle):
    rng = np.random.default_rng(2)
    cache = kv.LayerCache(*(jnp.asarray(rng.normal(size=(2, 12, 2, 4, 4))) for _ in range(2)), jnp.zeros((12, 4)))
    slots = rng.integers(0, 4, (12, 1))
    slots[list(idle)] = 4
    new = kv.NewKeys(*(jnp.asarray(rng.normal(size=(2, 12, 1, 2, 4))) for _ in range(2)))
    expected = cache
    for layer in range(2):
        expected = kv.write(expected, layer, jnp.asarray(slots), *(x[layer] for x in new))
    plan = make_mesh_plan(MeshConfig(data=4, fsdp=1, tensor=2))
    given = (cache, jnp.asarray(slots), new)
    on_mesh = jax.device_put(given, NamedSharding(plan.mesh, P()))
    over_mesh = jax.jit(plan.bind(write_new)).lower(*on_mesh).compile()
    for ours in (jax.jit(write_new)(*given), over_mesh(*on_mesh)):
        for mine, theirs in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert not re.search("all-|permute", over_mesh.as_text())


def knobs(count):
    types = {"top_k_B": np.int32, "seed_B": np.uint32, "stream_B": np.uint32}
    return Knobs(*(jax.ShapeDtypeStruct((count,), types.get(name, np.float32)) for name in Knobs._fields))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for TPU with libtpu")
def test_the_program_for_tpus_copies_no_cache_and_no_weights(monkeypatch):
    from jaxft.hardware import hlo
    from jaxft.hardware.topology import devices, parse

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_hidden_layers": 6}
    config = config_from_hf(SMALL | {"model_type": "llama"} | sizes)
    model = nnx.eval_shape(lambda: random_model(config, dtype="bfloat16", param_dtype="bfloat16", seed=0))
    graphdef, params = nnx.split(model)
    slots, mesh = 8, Mesh(np.array(devices(parse("v5e:1x1"))), ("data",))
    integers, scalar = jax.ShapeDtypeStruct((slots,), np.int32), jax.ShapeDtypeStruct((), np.int32)
    rows = steps.Rows(integers, integers, integers, knobs(slots))
    stops = jax.ShapeDtypeStruct((8,), np.int32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        memory = jax.eval_shape(partial(steps.make_memory, graphdef, params, slots=slots, length=1024, rows=None))
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(mesh.devices[0])
            ),
            (params, memory, rows, stops, scalar, scalar),
        )
        text = steps.decode.lower(graphdef, *arguments, rows=None).compile().as_text()
    module = hlo.parse(text)
    layer = memory.cache[0].k_RBKHT.size // 6
    made = [
        instruction
        for computation in module.computations.values()
        if not computation.name.startswith("fused_computation")
        for instruction in computation.instructions.values()
        if instruction.opcode in ("copy", "fusion", "dynamic-slice", "slice", "copy-start", "transpose")
    ]
    assert made
    # Smaller than the keys of one layer: the cache is written in place, and read where it is.
    assert max(max((array.elements for array in one.arrays), default=0) for one in made) < layer
