"""What gpt-oss refuses, and how it reads what its config.json leaves out."""

import json

import pytest

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.checkpoint.load import shardings_by_path
from jaxft.config import MeshConfig
from jaxft.errors import ModelError
from jaxft.nn.stack import group_layers
from jaxft.sharding.mesh import make_mesh_plan

HF = json.loads((ASSETS / "published" / "gpt-oss-20b.json").read_text(encoding="utf-8"))
YARN = HF["rope_scaling"]
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config={'quant_method': 'fp8'} is not implemented",
        ),
        (
            {"quantization_config": {"quant_method": "mxfp4", "bits": 8}},
            "'bits': 8} is not implemented.*only quant_method 'mxfp4'",
        ),
        ({"quantization_config": "mxfp4"}, "quantization_config='mxfp4' is not implemented"),
        ({"experts_per_token": 2}, r"experts_per_token=2 \(only 4 is implemented\)"),
        ({"num_experts": 8}, r"num_experts=8 \(only 32 is implemented\)"),
        ({"initial_context_length": 8192}, r"initial_context_length=8192 \(only 4096 is implemented\)"),
        ({"num_experts_per_tok": 33, "experts_per_token": 33}, "num_experts_per_tok=33 of 32 experts"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": None}, "sliding_window=None: a window is a whole number"),
        ({"layer_types": ["sliding_attention"]}, "layer_types must name"),
        ({"rope_scaling": YARN | {"curve": 2}}, r"unknown fields \['curve'\]"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(change, message):
    with pytest.raises(ModelError, match=message):
        models.config_from_hf(HF | change)


@pytest.mark.parametrize("left_out", [(), ("rope_scaling", "rope_parameters")])
def test_what_is_absent_has_transformers_default(left_out):
    transformers = pytest.importorskip("transformers")
    bare = {k: HF[k] for k in REQUIRED} | dict.fromkeys(left_out)
    theirs = transformers.AutoConfig.for_model(**bare).to_dict()
    config = models.config_from_hf(bare)
    assert config == models.config_from_hf(theirs)
    assert (config.rope.kind, config.rope.theta, config.rope.truncate) == ("yarn", 150000.0, False)


def test_an_unscaled_rope_is_written_as_such():
    config = models.config_from_hf(HF | {"rope_scaling": {"rope_type": "default"}, "initial_context_length": None})
    assert config.rope.kind == "default"
    assert models.config_from_hf(config.to_hf()) == config
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**config.to_hf()).to_dict()
    assert models.config_from_hf(theirs) == config


def test_how_files_keep_the_experts_is_not_what_the_model_is():
    plain = {k: v for k, v in HF.items() if k != "quantization_config"}
    assert models.config_from_hf(HF) == models.config_from_hf(plain)
    assert "quantization_config" not in models.config_from_hf(HF).to_hf()


@pytest.mark.parametrize(("layers", "experts"), [(24, 32), (36, 128)])
def test_the_published_models_stack_and_split(layers, experts):
    types = ["sliding_attention", "full_attention"] * (layers // 2)
    change = {"num_hidden_layers": layers, "num_local_experts": experts, "layer_types": types}
    model = models.abstract_model(models.config_from_hf(HF | change))
    groups = group_layers(model.segments)
    assert [group[:3] for group in groups] == [(0, 2, 4), (1, 3, 5)]
    assert sorted({part.slots for part in model.init_cache(1, 512)}) == [128, 512]
    shardings, stack = shardings_by_path(model, make_mesh_plan(MeshConfig(fsdp=8))), (layers // 2, experts)
    kernel, bias = (shardings[f"layers/0/mlp/gate_up_proj/{part}"] for part in ("kernel", "bias"))
    assert kernel.shard_shape((*stack, 2880, 5760)) == (*stack, 360, 5760)
    assert bias.shard_shape((*stack, 5760)) == (*stack, 720)
