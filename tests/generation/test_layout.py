"""Generation on a mesh: rows and heads are split, and no weight travels from token to token."""

import gc

import jax
import numpy as np
import pytest
from flax import nnx
from jax import monitoring

from jaxft.adapters.attach import adapters, attach
from jaxft.adapters.lora import LoRASettings, lora_factory
from jaxft.config import MeshConfig
from jaxft.errors import ConfigError
from jaxft.generation import engine, layout, steps
from jaxft.generation.layout import for_decoding
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.hardware.costs import COLLECTIVES
from jaxft.hardware.hlo import parse
from jaxft.models import config_from_hf, random_model
from jaxft.nn.quantized import quantize
from jaxft.nn.storage import storage_dims_of
from jaxft.quant import FORMATS
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.trees import flatten

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

# The smallest matrix has more elements than all that one token of 8 rows needs.
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 512, "initializer_range": 0.2,
}  # fmt: skip
MATRIX = 128 * 128
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, seed=5)
SETTINGS = {"sampling": DRAWN, "answers": 2, "slots": 8, "length": 32}


@pytest.fixture(scope="module")
def wide(tiny_config):
    """A model of which every dimension divides by 8."""
    return random_model(config_from_hf(tiny_config(**SIZES)), seed=1)


@pytest.fixture(scope="module")
def on_one_device(wide, prompts):
    return generate_tokens(wide, prompts[:5], **SETTINGS)


def on_mesh(model, **axes):
    plan = make_mesh_plan(MeshConfig(**axes))
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, plan.shard(params, storage_dims_of(model)))


@pytest.fixture
def decoded(monkeypatch):
    """decoded[0]: the text of the compiled decoding step; decoded[1]: the memory after it."""
    real, kept = steps.decode, []

    def decode(graphdef, params, *rest, **static):
        if not kept:
            kept.extend([real.lower(graphdef, params, *rest, **static).compile(), None])
        results = kept[0](params, *rest)
        kept[1] = results[0]
        return results

    monkeypatch.setattr(steps, "decode", decode)
    return kept


def largest_exchange(compiled):
    """The elements of the largest array that a collective in a loop of a program gives."""
    module = parse(compiled.as_text())
    inside, found = set(), []

    def visit(name):
        if name in inside:
            return
        inside.add(name)
        for instruction in module.computations[name].instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                found.extend(array.elements for array in instruction.arrays)
            for attribute in ("body", "condition", "calls", "to_apply", "branch_computations"):
                for callee in instruction.callees(attribute):
                    visit(callee)

    for instruction in module.entry.instructions.values():
        if instruction.opcode == "while":
            visit(instruction.callees("body")[0])
            visit(instruction.callees("condition")[0])
    assert found, "the condition of the loop is a sum over devices"
    return max(found)


def check(results, expected):
    assert [one.tokens for one in results] == [one.tokens for one in expected]
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)


MESHES = {
    "fsdp": ({"fsdp": 8}, None, 1, 8),
    "fsdp as tensor": ({"fsdp": 8}, 4, 4, 2),
    "tensor": ({"tensor": 8}, None, 8, 1),
    "both": ({"data": 2, "fsdp": 2, "tensor": 2}, None, 2, 4),
}


@pytest.mark.parametrize(("axes", "tensor", "rows", "heads"), MESHES.values(), ids=MESHES)
def test_no_weight_is_gathered_for_a_token_and_the_cache_is_split(
    wide, prompts, on_one_device, decoded, axes, tensor, rows, heads
):
    model = for_decoding(on_mesh(wide, **axes), tensor=tensor)
    check(generate_tokens(model, prompts[:5], **SETTINGS), on_one_device)
    compiled, memory = decoded
    assert largest_exchange(compiled) < MATRIX
    for part in memory.cache:
        assert part.k_RBKHT.sharding.shard_shape(part.k_RBKHT.shape)[1:3] == (rows, heads)
        assert part.v_RBKTH.sharding.shard_shape(part.v_RBKTH.shape)[1:3] == (rows, heads)


def test_without_the_layout_every_token_gathers_weights(wide, prompts, decoded, monkeypatch):
    monkeypatch.setattr(engine, "for_decoding", lambda model: model)
    generate_tokens(on_mesh(wide, fsdp=8), prompts[:5], **SETTINGS)
    assert largest_exchange(decoded[0]) >= MATRIX


def quantised_with_adapter(tiny_config):
    model = random_model(config_from_hf(tiny_config(**SIZES)), seed=1)
    quantize(model, FORMATS["nf4"])
    attach(model, ["all-linear"], lora_factory(LoRASettings(r=4, alpha=8)), jax.random.key(0))
    for lora in adapters(model).values():
        lora.lora_b.set_value(lora.lora_b.get_value() + 0.1)
    return model


def with_experts(tiny_config):
    experts = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    return random_model(config_from_hf(tiny_config(**SIZES, **experts)), seed=1)


def with_few_heads(tiny_config):
    return random_model(config_from_hf(tiny_config(**{**SIZES, "num_key_value_heads": 2})), seed=1)


OTHERS = {
    "codes and adapters": (quantised_with_adapter, {"data": 2, "fsdp": 2, "tensor": 2}, 4),
    "experts": (with_experts, {"fsdp": 2, "expert": 2, "tensor": 2}, 4),
    "more devices than heads": (with_few_heads, {"tensor": 8}, 2),
}


@pytest.mark.parametrize(("make", "axes", "heads"), OTHERS.values(), ids=OTHERS)
def test_codes_adapters_and_experts_stay_and_heads_that_do_not_divide_are_whole(
    make, axes, heads, tiny_config, prompts, decoded
):
    model = make(tiny_config)
    expected = generate_tokens(model, prompts[:5], **SETTINGS)
    decoded.clear()  # one device decodes by another program
    check(generate_tokens(on_mesh(model, **axes), prompts[:5], **SETTINGS), expected)
    compiled, memory = decoded
    assert largest_exchange(compiled) < MATRIX / 2  # codes of four bits are two in a byte
    assert memory.cache[0].k_RBKHT.sharding.shard_shape(memory.cache[0].k_RBKHT.shape)[2] == heads


def test_a_common_prefix_on_a_mesh(wide, prompts, monkeypatch):
    monkeypatch.setattr(engine, "MIN_SPARED", 8)
    sharing = [[*range(1, 13), *prompt[:3]] for prompt in prompts[:4]]
    one = generate_tokens(wide, sharing, **SETTINGS)
    check(generate_tokens(on_mesh(wide, fsdp=4, tensor=2), sharing, **SETTINGS), one)


def test_calls_keep_no_array_and_later_ones_compile_nothing(wide, prompts):
    model = on_mesh(wide, fsdp=8)
    generate_tokens(model, prompts[:5], **SETTINGS)
    gc.collect()
    before, compiled = len(jax.live_arrays()), []
    monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    try:
        generate_tokens(model, prompts[5:], **SETTINGS)
    finally:
        monitoring.clear_event_listeners()
    gc.collect()
    assert not compiled
    assert len(jax.live_arrays()) == before


def test_a_model_in_the_layout_stays_as_it_is(wide):
    assert for_decoding(wide) is wide
    moved = for_decoding(on_mesh(wide, fsdp=8))
    assert for_decoding(moved) is moved
    split = on_mesh(wide, data=2, tensor=4)
    assert for_decoding(split) is split


def sizes(model):
    return dict(layout.mesh_of(nnx.state(model)).shape)


def test_large_models_are_split_as_far_as_heads_and_arrays_allow(wide, tiny_config, monkeypatch):
    assert sizes(for_decoding(on_mesh(wide, fsdp=4, tensor=2))) == {"data": 4, "tensor": 2}
    total = sum(x.nbytes for x in jax.tree.leaves(nnx.state(wide)))
    monkeypatch.setattr(layout, "ENOUGH", total / 4)
    assert sizes(for_decoding(on_mesh(wide, fsdp=8))) == {"data": 2, "tensor": 4}
    monkeypatch.setattr(layout, "ENOUGH", 1)
    assert sizes(for_decoding(on_mesh(wide, fsdp=8))) == {"data": 1, "tensor": 8}
    assert sizes(for_decoding(on_mesh(with_few_heads(tiny_config), fsdp=8))) == {"data": 4, "tensor": 2}
    uneven = random_model(config_from_hf(tiny_config(**{**SIZES, "intermediate_size": 300})), seed=1)
    assert sizes(for_decoding(on_mesh(uneven, fsdp=8))) == {"data": 2, "tensor": 4}


def test_matrices_travel_in_the_type_of_computation_unless_adapters_read_them(tiny_config, prompts):
    types = {"dtype": "bfloat16", "param_dtype": "float32"}
    model = random_model(config_from_hf(tiny_config(**SIZES)), seed=1, **types)
    moved = for_decoding(on_mesh(model, fsdp=8))
    arrays = flatten(nnx.state(moved))[0]
    assert {x.dtype.name for path, x in arrays.items() if "proj/kernel" in path or "embed" in path} == {"bfloat16"}
    assert {x.dtype.name for path, x in arrays.items() if "norm" in path} == {"float32"}
    tokens = np.array([prompts[2]] * 8, np.int32)
    np.testing.assert_array_equal(*(np.asarray(one.unembed(one(tokens)[0])) for one in (moved, on_mesh(model, data=8))))
    attach(model, ["all-linear"], lora_factory(LoRASettings(r=4, alpha=8)), jax.random.key(0))
    exact = flatten(nnx.state(for_decoding(on_mesh(model, fsdp=8))))[0]
    assert {x.dtype.name for x in exact.values()} == {"float32"}


def test_sizes_that_do_not_fit_the_mesh_are_refused(wide):
    with pytest.raises(ConfigError, match="tensor=3 must be a multiple of the mesh's tensor=2 that divides 8"):
        for_decoding(on_mesh(wide, fsdp=4, tensor=2), tensor=3)
