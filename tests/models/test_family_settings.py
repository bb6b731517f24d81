"""Fields of config.json that one family alone has: read as transformers does, or refused by name."""

import numpy as np
import pytest

from jaxft import models
from jaxft.errors import ModelError
from jaxft.nn.attention.rope import rotation

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
ALPHA = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0, "mscale_all_dim": 0.0}

NEMOTRON = {"hybrid_override_pattern": "ME*-ME*-"}


def config_of(kind, **fields):
    return models.config_from_hf(SIZES | {"model_type": kind} | fields)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("internlm3", {"qkv_bias": True, "bias": False}, "qkv_bias=True and bias=False .* must be equal"),
        ("internlm3", {"qkv_bias": True, "attention_bias": False}, "attention_bias=False .only True is implemented"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "for each of num_hidden_layers=8 layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1] * 2}, r"no_rope_layers must have a 1 .*\[1, 0, 2"),
        ("smollm3", {"layer_types": [SLIDING] * 8, "sliding_window": 8}, "sliding_window=None: a window"),
        ("exaone4", {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern='LLLG' without layer_types"),
        ("exaone4", {"sliding_window": None, "layer_types": [SLIDING] * 8}, "sliding_window=None: a window"),
        ("gemma3_text", {"sliding_window_pattern": "LLG"}, "sliding_window_pattern='LLG' without layer_types"),
        ("cohere2", {"rms_norm_eps": 1e-6}, "rms_norm_eps of model_type 'cohere2' has no meaning"),
        ("cohere2", {"head_dim": 16}, "head_dim=16 of model_type 'cohere2' must be hidden_size / num_attention_heads"),
        ("cohere2", {"use_parallel_block": False}, "use_parallel_block=False"),
        ("apertus", {"hidden_act": "silu"}, "hidden_act='silu'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 2.0}}, "alpha=2.0 is not implemented"),
        ("hunyuan_v1_dense", {"use_cla": True}, "use_cla=True"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act='silu'"),
        ("nemotron_h", {}, "needs layers_block_type or hybrid_override_pattern"),
        ("nemotron_h", {"hybrid_override_pattern": "MM*MMX-M"}, r"in hybrid_override_pattern M \* - E.*, got X"),
        ("nemotron_h", {"hybrid_override_pattern": "M*-E"}, "num_hidden_layers=8, but the types of 4 layers are given"),
        ("nemotron_h", NEMOTRON | {"attention_bias": True}, "attention_bias=True .only False is implemented"),
        ("nemotron_h", NEMOTRON | {"moe_latent_size": 16}, "moe_latent_size=16 .only None is implemented"),
        ("nemotron_h", NEMOTRON | {"time_step_limit": [0.0, 1.0]}, "time_step_limit="),
        ("nemotron_h", NEMOTRON | {"norm_eps": 1e-6}, "layer_norm_epsilon=1e-05 and norm_eps=1e-06 must be equal"),
        ("nemotron_h", NEMOTRON | {"n_groups": 3}, "mamba_num_heads=128 is not a multiple of n_groups=3"),
        ("lfm2", {"layer_types": ["conv"] * 4}, "layer_types must name conv or full_attention for each of"),
        ("lfm2", {"layer_types": ["conv", "mamba"] * 4}, "got 8: conv, mamba"),
        ("lfm2", {"rms_norm_eps": 1e-6}, "rms_norm_eps of model_type 'lfm2' has no meaning"),
        ("lfm2", {"conv_dim": 64}, "conv_dim=64 .only 32 is implemented"),
        ("lfm2", {"block_ffn_dim_multiplier": 1e300}, "a feed-forward has from 1 to 1,048,576 inner units"),
        ("lfm2_moe", {"num_experts": 2}, "num_experts_per_tok=4 of 2 experts"),
    ],
)
def test_what_a_family_does_not_do_is_refused_by_name(kind, fields, message):
    with pytest.raises(ModelError, match=message):
        config_of(kind, **fields)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("seed_oss", {}),
        ("internlm3", {"qkv_bias": True, "bias": True}),
        ("gemma", {"hidden_act": "gelu"}),
        ("smollm3", {}),
        ("smollm3", {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 5}),
        ("exaone4", {}),
        ("exaone4", {"sliding_window": None, "layer_types": [FULL] * 8}),
        ("exaone4", {"sliding_window_pattern": "LLLG", "layer_types": [SLIDING, SLIDING, FULL, FULL] * 2}),
        ("cohere2", {"sliding_window_pattern": 2, "rope_theta": 5e4}),
        ("apertus", {}),
        ("apertus", {"rope_parameters": {"rope_type": "default"}}),
        ("granite", {"logits_scaling": 16.0, "attention_dropout": 0.1}),
        ("glm", {}),
        ("glm4", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.25}}),
        ("ernie4_5", {}),
        ("hunyuan_v1_dense", {"rope_scaling": ALPHA}),
        ("nemotron_h", NEMOTRON),
        ("lfm2", {}),
        ("lfm2", {"block_ff_dim": 60, "tie_embedding": False, "full_attn_idxs": [1, 3]}),
        ("lfm2_moe", {"tie_embedding": False}),
    ],
)
def test_what_transformers_fills_in_is_what_is_read(kind, fields):
    transformers = pytest.importorskip("transformers")
    config = config_of(kind, **fields)
    theirs = transformers.AutoConfig.for_model(kind, **SIZES | fields).to_dict()
    assert models.config_from_hf(theirs) == config
    ours = transformers.AutoConfig.for_model(**config.to_hf()).to_dict()
    assert models.config_from_hf(ours) == config


def test_layers_without_positions():
    def ropes(kind, **fields):
        return [block.mixer.rope for block in config_of(kind, **fields).shape().layers]

    assert ropes("smollm3") == [0, 0, 0, None] * 2
    assert ropes("exaone4") == [0, 0, 0, None] * 2
    assert ropes("exaone4", sliding_window=None) == [0] * 8
    assert ropes("cohere2") == [0, 0, 0, None] * 2


def test_dropout_in_training_is_said_to_be_off(caplog):
    caplog.set_level("INFO", logger="jaxft.models.hf_fields")
    config_of("seed_oss", attention_dropout=0.125, residual_dropout=0.0)
    assert caplog.records[-1].getMessage().endswith("stays off in training: attention_dropout=0.125")


def test_alpha_stretches_the_rope_by_a_fixed_factor():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding

    fields = {"rope_scaling": ALPHA, "max_position_embeddings": 16}
    config = config_of("hunyuan_v1_dense", **fields)
    theirs = HunYuanDenseV1RotaryEmbedding(transformers.HunYuanDenseV1Config(**SIZES | fields))
    for length in (8, 40):  # within the trained positions, and beyond
        cos, sin = theirs(torch.zeros(1, length, 32), torch.arange(length)[None])
        ours = rotation(config.rope, config.head_dim, np.arange(length)[None])
        np.testing.assert_allclose(ours.cos_BSF, cos.numpy()[..., :4], atol=2e-6)
        np.testing.assert_allclose(ours.sin_BSF, sin.numpy()[..., :4], atol=2e-6)
    assert config.to_hf()["rope_scaling"] == {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0}
