"""Specs from what dimensions are at rest: by the ends of paths, right-aligned, and refusals that say how to mend."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxft import models
from jaxft.adapters.make import attach_adapter
from jaxft.assets import ASSETS
from jaxft.config import AdapterConfig
from jaxft.errors import ConfigError
from jaxft.nn.storage import StorageDims, storage_dims_of
from jaxft.sharding.specs import Leaf, divisors, specs_of, storage_of
from jaxft.trees import flatten, path_str

ONE_EACH = {"slice": 1, "data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
AXES = ONE_EACH | {"fsdp": 8}
DIMS = {
    "embed_tokens/embedding": StorageDims(("tensor", "weight")),
    "lm_head/kernel": StorageDims((None, "both"), ("weight", "tensor")),
    "lm_head/adapter/lora_a": StorageDims((None, "all_axes"), (None, "weight")),
    "layers/0/q_proj/kernel": StorageDims(("weight", "tensor")),
    "layers/0/q_proj/adapter/lora_a": StorageDims((None, "all_axes"), (None, "weight")),
    "layers/0/q_proj/adapter/lora_b": StorageDims((None, "both"), (None, "weight")),
    "layers/0/o_proj/kernel": StorageDims(("tensor", "weight")),
    "layers/0/norm/scale": StorageDims(("weight",)),
    "layers/0/down_proj/kernel": StorageDims(("expert", "tensor", "expert_weight")),
    "layers/0/largest": StorageDims((None, "weight"), may_be_whole=True),
    "norm/scale": StorageDims(("weight",)),
}


def specs(shapes, dims=DIMS, axes=AXES):
    leaves = [Leaf(path, shape, True) for path, shape in shapes.items()]
    return dict(zip(shapes, specs_of(leaves, dims, axes), strict=True))


class Pair(NamedTuple):
    first: object
    second: object


def paths(tree):
    return [path_str(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def test_path_str_of_each_kind_of_container():
    assert paths({"a": [1, Pair(2, {"b": 3})]}) == ["a/0", "a/1/first", "a/1/second/b"]
    assert path_str(()) == ""


def test_path_str_of_nnx_state_and_its_optimizer_moments():
    model = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])
    state = nnx.state(model)
    assert paths(state) == ["0/bias", "0/kernel"]
    moments = paths({"opt_state": optax.adam(1e-3).init(state)})
    assert "opt_state/0/mu/0/kernel" in moments


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("layers/0/q_proj/kernel", "layers/0/q_proj/kernel"),
        ("opt_state/0/mu/layers/0/q_proj/kernel", "layers/0/q_proj/kernel"),
        ("trainable/norm/scale", "norm/scale"),
        # The longest end counts.
        ("trainable/layers/0/norm/scale", "layers/0/norm/scale"),
        ("layers/0/my_q_proj/kernel", None),
        ("layers/1/q_proj/kernel", None),
        ("q_proj/kernel", None),
        ("layers/0/q_proj/kernel/scale", None),
        ("", None),
    ],
)
def test_an_array_is_found_by_the_end_of_its_path(path, parameter):
    assert storage_of(path, DIMS) == DIMS.get(parameter)


def test_the_model_dimension_is_split_moments_and_adapters_included():
    got = specs(
        {
            "frozen/embed_tokens/embedding": (50257, 64),
            "frozen/lm_head/kernel": (64, 50257),
            "frozen/layers/0/q_proj/kernel": (4, 64, 128),
            "frozen/layers/0/o_proj/kernel": (4, 128, 64),
            "frozen/layers/0/norm/scale": (4, 64),
            "trainable/layers/0/q_proj/adapter/lora_a": (4, 16, 64),
            "trainable/layers/0/q_proj/adapter/lora_b": (4, 16, 128),
            "trainable/lm_head/adapter/lora_a": (16, 64),
            "opt_state/0/mu/layers/0/q_proj/adapter/lora_a": (4, 16, 64),
            "opt_state/0/count": (),
            "key": (2,),
        }
    )
    assert got == {
        "frozen/embed_tokens/embedding": P(None, "fsdp"),
        "frozen/lm_head/kernel": P("fsdp"),
        "frozen/layers/0/q_proj/kernel": P(None, "fsdp"),
        "frozen/layers/0/o_proj/kernel": P(None, None, "fsdp"),
        "frozen/layers/0/norm/scale": P(None, "fsdp"),
        "trainable/layers/0/q_proj/adapter/lora_a": P(None, None, "fsdp"),
        "trainable/layers/0/q_proj/adapter/lora_b": P(None, None, "fsdp"),
        "trainable/lm_head/adapter/lora_a": P(None, "fsdp"),
        "opt_state/0/mu/layers/0/q_proj/adapter/lora_a": P(None, None, "fsdp"),
        "opt_state/0/count": P(),
        "key": P(),
    }


def test_a_fallback_is_taken_only_where_the_first_dimensions_do_not_divide():
    axes = ONE_EACH | {"fsdp": 4, "tensor": 2}
    assert specs({"lm_head/kernel": (64, 4096)}, axes=axes)["lm_head/kernel"] == P(None, ("tensor", "fsdp"))
    assert specs({"lm_head/kernel": (64, 4098)}, axes=axes)["lm_head/kernel"] == P("fsdp", "tensor")
    assert specs({"lm_head/kernel": (63, 4096)}, axes=axes)["lm_head/kernel"] == P(None, ("tensor", "fsdp"))


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        # Along the side that the tensor axis splits go the blocks: the other side is split.
        ("opt_state/1/mu_scales/layers/0/q_proj/kernel/absmax", (2, 64, 8), P(None, "fsdp")),
        ("opt_state/1/mu_scales/layers/0/o_proj/kernel/absmax", (2, 8, 64), P(None, None, "fsdp")),
        ("opt_state/1/mu_scales/lm_head/kernel/absmax", (8, 64), P(None, ("tensor", "fsdp"))),
        ("opt_state/1/mu_scales/layers/0/down_proj/kernel/absmax", (2, 4, 8, 64), P(None, None, None, "fsdp")),
        ("opt_state/1/nu_scales/layers/0/q_proj/adapter/lora_b/absmax", (2, 16, 8), P(None, None, ("tensor", "fsdp"))),
        ("opt_state/1/moments/layers/0/q_proj/kernel/row", (2, 64), P(None, ("tensor", "fsdp"))),
        ("opt_state/1/moments/layers/0/q_proj/kernel/col", (2, 64), P(None, ("tensor", "fsdp"))),
        ("opt_state/1/own/mu/layers/0/q_proj/kernel/low", (2, 16, 64), P(None, None, ("tensor", "fsdp"))),
        ("opt_state/1/own/norms/layers/0/q_proj/kernel/norm", (2,), P()),
    ],
)
def test_arrays_of_optimizers_in_other_shapes(path, shape, expected):
    assert specs({path: shape}, axes=ONE_EACH | {"fsdp": 4, "tensor": 2})[path] == expected


def test_arrays_of_optimizers_may_be_whole_however_many_elements_they_have(caplog):
    path = "opt_state/0/moments/layers/0/q_proj/kernel/row"
    assert specs({path: (1000, 1001)})[path] == P()
    assert "fsdp=8 does not divide dimension 1 = 1001" in caplog.text
    assert specs({"layers/0/largest": (1000, 1001)})["layers/0/largest"] == P()


def test_several_axes_on_one_dimension():
    dims = {"w": StorageDims(("weight", None))}
    assert specs({"w": (16, 4)}, dims, {"context": 2, "fsdp": 4}) == {"w": P(("fsdp", "context"))}


def test_axes_that_the_mesh_does_not_have_split_nothing():
    assert specs({"w": (16, 4)}, {"w": StorageDims(("expert", "weight"))}, {"fsdp": 4}) == {"w": P(None, "fsdp")}


def test_keys_are_never_split():
    leaf = Leaf("layers/0/q_proj/kernel", (8, 8), splittable=False)
    assert specs_of([leaf], DIMS, AXES) == [P()]


def test_a_big_array_that_does_not_divide_is_refused_with_the_sizes_that_fit():
    with pytest.raises(ConfigError) as caught:
        specs({"layers/0/q_proj/kernel": (2, 4096, 64)}, axes=ONE_EACH | {"data": 1, "fsdp": 6})
    text = str(caught.value)
    assert "layers/0/q_proj/kernel [2, 4096, 64]: fsdp=6 does not divide dimension 1 = 4096" in text
    assert "one of 1, 2:" in text and "the 6 devices" in text


def test_a_small_array_that_does_not_divide_stays_whole_and_is_reported(caplog):
    assert specs({"norm/scale": (2, 30)}) == {"norm/scale": P()}
    assert "norm/scale [2, 30]: fsdp=8 does not divide dimension 1 = 30" in caplog.text


def test_a_declaration_of_too_many_dimensions(caplog):
    dims = {"w": StorageDims((None, None, "weight"))}
    assert specs({"w": (8, 8)}, dims) == {"w": P()}
    assert "has 2 dimensions, but is declared as (None, None, 'weight')" in caplog.text
    with pytest.raises(ConfigError, match=r"w \[512, 512\]: has 2 dimensions, but is declared as .*'weight'"):
        specs({"w": (512, 512)}, dims)


def test_a_big_array_left_whole_is_refused_with_its_size_when_fsdp_is_above_one():
    shapes = {"layers/0/q_proj/kernel": (2, 64, 64), "layers/0/weird": (512, 512)}
    with pytest.raises(ConfigError, match=r"(?s)fsdp=8.*layers/0/weird \[512, 512\]: 262,144 elements.*storage_dims"):
        specs(shapes)
    with pytest.raises(ConfigError, match="weird"):
        specs({"weird": (512, 512)}, {"weird": StorageDims(())})
    assert specs(shapes, axes=ONE_EACH | {"data": 8, "fsdp": 1})["layers/0/weird"] == P()


def test_norm_stacks_of_real_models_are_split():
    # 32 layers of 4096: more than 2**16 elements, so a whole copy per device would be refused
    assert specs({"layers/0/norm/scale": (32, 4096)}) == {"layers/0/norm/scale": P(None, "fsdp")}
    assert jnp.prod(jnp.array((32, 4096))) > 2**16


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(12, lambda n: n % 2 == 0) == [2, 4, 6, 12]


ADAPTERS = {
    "none": {},
    "lora": {
        "target_modules": "all-linear,lm_head", "init_lora_weights": "olora", "rank_pattern": "0.self_attn.o_proj:2"
    },
    "dora": {"use_dora": True, "modules_to_save": "norm,lm_head"},
    "embeddings": {"target_modules": "embed_tokens,q_proj"},
    "vera": {"kind": "vera"},
    "ia3": {"kind": "ia3", "target_modules": "all-linear", "feedforward_modules": "o_proj"},
    "prompt": {"kind": "prompt"},
    "prefix": {"kind": "prefix"},
}  # fmt: skip


@pytest.mark.parametrize("quantization", [None, "nf4-dq"])
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2.5-7b", "gpt-oss-20b", "olmo-2-7b"])
def test_every_parameter_is_declared_with_as_many_dimensions_as_one_has(name, adapter, quantization):
    """Without the axes of stacks, which are in front of all."""
    hf = json.loads((ASSETS / "published" / f"{name}.json").read_text(encoding="utf-8"))
    if quantization is not None and (adapter == {} or name == "gpt-oss-20b"):
        pytest.skip("nothing to quantize, or seen on others")

    def make():
        model = models.random_model(models.config_from_hf(hf), seed=0, quantization=quantization)
        settings = {"kind": "lora", "target_modules": "q_proj,o_proj", "r": 4} | adapter
        attach_adapter(model, AdapterConfig(**(settings if adapter else {"kind": "none"})), 0)
        return model

    model = nnx.eval_shape(make)
    declared, leaves = storage_dims_of(model), flatten(nnx.state(model))[0]
    assert not leaves.keys() - declared.keys()
    for path, leaf in leaves.items():
        assert len(declared[path].dims) == leaf.ndim - path.startswith("layers/"), path


def test_experts_and_their_adapters_are_declared():
    hf = json.loads((ASSETS / "published" / "qwen3-30b-a3b.json").read_text(encoding="utf-8"))

    def make():
        model = models.random_model(models.config_from_hf(hf), seed=0, quantization="nf4-dq")
        attach_adapter(model, AdapterConfig(kind="lora", r=4, target_modules="up_proj,down_proj"), 0)
        return model

    model = nnx.eval_shape(make)
    declared, mlp = storage_dims_of(model), "layers/0/mlp"
    assert not flatten(nnx.state(model))[0].keys() - declared.keys()
    assert declared[f"{mlp}/down_proj/kernel"].dims == ("expert", "tensor", "expert_weight")
    assert declared[f"{mlp}/down_proj/kernel/scales/codes"].dims == ("expert", "tensor", "expert_weight")
    assert declared[f"{mlp}/down_proj/kernel/scales/largest"] == StorageDims(("expert", None), may_be_whole=True)
    assert declared[f"{mlp}/down_proj/kernel/scales/mean"].dims == ("expert",)
    assert declared[f"{mlp}/down_proj/adapter/lora_a"].dims == ("expert", None, "tensor")
    assert declared[f"{mlp}/up_proj/adapter/lora_a"].dims == ("expert", None, "expert_weight")
    assert declared[f"{mlp}/router/kernel"].dims == ("weight", None)
