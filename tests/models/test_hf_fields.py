"""config.json: both dialects of transformers, every refusal, and published sizes without memory."""

import json

import numpy as np
import pytest

from jaxft import models
from jaxft.checkpoint.hf import write_config
from jaxft.errors import ModelError
from jaxft.models.families.llama import Config
from jaxft.models.hf_fields import with_allowed
from jaxft.nn.attention.rope import Rope, rotation

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def size(vocab, width, inner, layers, heads, kv_heads, **more):
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("hf", "published"),
    [
        pytest.param(size(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True), 134_515_008, id="SmolLM2-135M"),
        pytest.param(size(32000, 4096, 11008, 32, 32, 32), 6_738_415_616, id="Llama-2-7B"),
        pytest.param(size(128256, 4096, 14336, 32, 32, 8), 8_030_261_248, id="Llama-3.1-8B"),
        pytest.param(size(128256, 8192, 28672, 80, 64, 8), 70_553_706_496, id="Llama-3.1-70B"),
        pytest.param(size(128256, 16384, 53248, 126, 128, 8), 405_853_388_800, id="Llama-3.1-405B"),
    ],
)
def test_published_parameter_counts_from_an_abstract_model(hf, published):
    assert models.parameter_count(models.abstract_model(models.config_from_hf(hf))) == published


@pytest.mark.parametrize(
    ("four", "five"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        ),
    ],
)
def test_both_dialects_mean_the_same_and_survive_a_round_trip(four, five):
    old = Config.from_hf(LLAMA | four | {"torch_dtype": "bfloat16", "transformers_version": "4.44.0"})
    new = Config.from_hf(LLAMA | five | {"dtype": "bfloat16", "head_dim": 8, "transformers_version": "5.2.0"})
    assert old == new
    assert old.rope.theta == 5e5
    assert Config.from_hf(old.to_hf()) == old


def test_transformers_reads_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = Config.from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}})
    theirs = transformers.LlamaConfig.from_dict(ours.to_hf()).to_dict()
    assert Config.from_hf(theirs) == ours


def test_what_is_absent_has_transformers_default():
    bare = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    config = Config.from_hf(bare)
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (4, 8, 1e-6)
    assert config.rope == Rope(theta=10000.0)
    assert not config.tie_word_embeddings


def test_null_and_harmless_fields_are_let_through():
    noise = {
        "pretraining_tp": 1,
        "use_cache": True,
        "pad_token_id": None,
        "some_future_field": None,
        "pruned_heads": {},
    }
    assert Config.from_hf(LLAMA | noise) == Config.from_hf(LLAMA)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_scale": 3}, r"window_scale=3 \(unknown\)"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' \(only 'silu' is implemented\)"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0.1 \(only 0.0 is implemented\)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"window_scale": 3, "hidden_act": "gelu"}, "hidden_act.*; window_scale"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope scaling 'spiral' is not implemented"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, r"missing fields \['factor'\]"),
        ({"window_scale": 3}, "--allow-unknown=window_scale"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"missing fields \['factor'\]"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 1}}, r"unknown fields \['twist'\]"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"vocab_size": None, "hidden_size": None}, "lacks vocab_size, hidden_size"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(fields, message):
    with pytest.raises(ModelError, match=message):
        models.config_from_hf(LLAMA | fields)


ATTENTION = {
    "_attn_implementation": "eager", "_attn_implementation_autoset": True, "attn_implementation": "flash_attention_2",
    "use_flash_attention_2": True,
}  # fmt: skip
NEUTRAL = {
    "qwen3_moe": {
        "use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0, "num_experts": 4,
        "moe_intermediate_size": 16,
    },
    "llama": {"use_qk_norm": False, "qkv_bias": True, "attention_bias": True, "n_shared_experts": 0},
    "qwen2": {"qkv_bias": True, "attention_bias": True},
    "mistral": {"attention_bias": False, "mlp_bias": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", NEUTRAL)
def test_what_changes_no_number_is_read(kind):
    """Also what transformers 4 wrote of generation, by its own list."""
    transformers = pytest.importorskip("transformers")
    generation = {
        "temperature": 0.6, "top_k": 50, "top_p": 1.0, "num_beams": 1, "max_length": 20, "do_sample": False,
        "early_stopping": False, "length_penalty": 1.0, "repetition_penalty": 1.0, "min_length": 0,
    }  # fmt: skip
    assert set(generation) <= set(transformers.GenerationConfig().to_dict())
    plain = SHARED | {"model_type": kind, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    plain |= {"attention_bias": True} if kind == "llama" else {}
    plain = plain if kind == "qwen3_moe" else {k: v for k, v in plain.items() if "expert" not in k and "moe" not in k}
    assert models.config_from_hf(plain | generation | ATTENTION | NEUTRAL[kind]) == models.config_from_hf(plain)


def test_what_changes_no_number_is_told_once(caplog):
    caplog.set_level("INFO", logger="jaxft.models.hf_fields")
    strange = {
        "temperature": 0.25,
        "num_shared_experts": 0,
        "use_sdpa": True,
        "torchscript": False,
        "n_shared_experts": None,
    }
    for _ in range(2):
        models.config_from_hf(LLAMA | strange)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.endswith("are passed over: num_shared_experts, temperature, use_sdpa")


def test_fields_that_the_user_allows_are_ignored_and_left_out_of_exports(tmp_path):
    yarn = YARN | {"attn_factor": 0.8}
    strange = {"window_scale": 3, "attention_dropout": 0.1, "rope_scaling": yarn, "max_position_embeddings": 256}
    names = ["window_scale", "attention_dropout", "attn_factor"]
    allowed = with_allowed(LLAMA | strange, names)
    plain = LLAMA | {"rope_scaling": YARN, "max_position_embeddings": 256}
    assert models.config_from_hf(allowed) == models.config_from_hf(plain)
    write_config(str(tmp_path), allowed, dtype="float32")
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {*names, "allow_unknown"} & {*written, *written["rope_scaling"], *written["rope_parameters"]}
    assert models.config_from_hf(written) == models.config_from_hf(plain)
    # A field that is understood is read all the same.
    assert models.config_from_hf(with_allowed(plain, ["rms_norm_eps", "rope_scaling"])) == models.config_from_hf(plain)
    with pytest.raises(
        ModelError, match="'window_scal', which is no field of config.json. Did you mean 'window_scale'"
    ):
        with_allowed(LLAMA | strange, ["window_scal"])


def test_dynamic_rope_is_that_of_transformers_in_and_beyond_the_trained_positions():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = LLAMA | {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    config = models.config_from_hf(hf)
    for length in (4, 16, 17, 40):
        theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**{k: v for k, v in hf.items() if k != "model_type"}))
        cos, sin = theirs(torch.zeros(1, length, 32), torch.arange(length)[None])
        ours = rotation(config.rope, config.head_dim, np.arange(length)[None])
        np.testing.assert_allclose(ours.cos_BSF, cos.numpy()[..., :4], atol=2e-6)
        np.testing.assert_allclose(ours.sin_BSF, sin.numpy()[..., :4], atol=2e-6)
    # A short document beside a long one is rotated as if it were alone.
    segments = np.array([[1] * 40 + [2] * 8])
    positions = np.concatenate([np.arange(40), np.arange(8)])[None]
    packed = rotation(config.rope, config.head_dim, positions, segments)
    alone = rotation(config.rope, config.head_dim, np.arange(8)[None])
    np.testing.assert_allclose(packed.cos_BSF[:, 40:], alone.cos_BSF, atol=1e-7)


def test_an_unknown_family_lists_those_that_exist():
    with pytest.raises(ModelError, match=r"model_type 'lama' is not implemented. Did you mean 'llama'\?.*llama"):
        models.config_from_hf(LLAMA | {"model_type": "lama"})
    with pytest.raises(ModelError, match="model_type None"):
        models.config_from_hf({})


def test_a_model_of_more_than_text_is_refused_where_its_text_model_is_not_known():
    with pytest.raises(ModelError, match="'llava' takes more than text.*model_type 'llama'.*of gemma3, .*mistral3"):
        models.config_from_hf({"model_type": "llava", "text_config": LLAMA, "vision_config": {}})


SHARED = {k: v for k, v in LLAMA.items() if k != "model_type"}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window=0: a window is a whole number"),
        ("mistral", {"attention_bias": True}, r"attention_bias=True \(only False is implemented\)"),
        ("qwen2", {"qkv_bias": False}, r"qkv_bias=False \(only True is implemented\)"),
        ("qwen3", {"use_qk_norm": False}, r"use_qk_norm=False \(only True is implemented\)"),
        ("llama", {"use_qk_norm": True}, r"use_qk_norm=True \(only False is implemented\)"),
        ("llama", {"qkv_bias": True}, r"qkv_bias=True \(only False is implemented\)"),
        ("qwen3", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
        (
            "qwen3",
            {"rope_scaling": YARN | {"attn_factor": 0.5}},
            r"multiply yarn's own factor, 1.13863, by it.*.attention_factor.: 0.569315; to compute as transformers, .*"
            "--allow-unknown=attn_factor",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 1},
            "sliding_window=0: a window",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "each of num_hidden_layers=3 layers, got 1"),
        ("qwen3", {"layer_types": ["full_attention"] * 2 + ["ring"]}, "got 3 with ring"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window=None: a window"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("gemma2", {"sliding_window": None}, "sliding_window=None: a window"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30.0"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_theta": 1e6}},
            r"nested by kind of layer; unknown: \['rope_theta'\]",
        ),
        (
            "phi3",
            {"rope_scaling": LONGROPE | {"short_factor": [1.0]}},
            "short_factor has 1 numbers, but 8 rotated.* need 4",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "'linear' is not implemented for model_type 'phi3'",
        ),
        ("phi3", {"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4 of head_dim=8 is 3"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
        (
            "ministral3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_type='default' with llama_4",
        ),
        ("ministral3", {"rope_parameters": YARN}, "llama_4_scaling_beta=None; implemented: yarn with a number"),
        (
            "mistral",
            {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
            "llama_4_scaling_beta=0.1 is not implemented for model_type 'mistral'",
        ),
        ("olmo3", {"rope_theta": 10000.0}, "rope_theta=10000.0 of model_type 'olmo3' is ambiguous: transformers 4"),
        ("olmo3", {"rope_parameters": YARN}, r"'olmo3' are nested by kind of layer; unknown: \['factor'"),
        ("olmo3", {"sliding_window": None}, "sliding_window=None: a window"),
        ("olmo2", {"clip_qkv": 8.0}, r"clip_qkv=8.0 \(unknown\)"),
    ],
)
def test_what_a_family_does_not_do_is_refused_by_name(kind, fields, message):
    with pytest.raises(ModelError, match=message):
        models.config_from_hf(SHARED | {"model_type": kind, "head_dim": 8} | fields)


def test_gemma3_of_a_multimodal_folder_says_only_what_differs():
    nested = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    assert models.parameter_count(models.abstract_model(models.config_from_hf(nested))) == 3_880_263_168


def test_the_older_names_of_longrope_mean_the_same():
    hf = SHARED | {"model_type": "phi3", "rope_scaling": LONGROPE, "original_max_position_embeddings": 64}
    renamed = [models.config_from_hf(hf | {"rope_scaling": LONGROPE | {"type": name}}) for name in ("su", "yarn")]
    assert renamed == [models.config_from_hf(hf)] * 2


def test_code_that_a_folder_brings_along_is_not_needed_or_refused():
    code = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    assert models.config_from_hf(LLAMA | code) == models.config_from_hf(LLAMA)
    with pytest.raises(ModelError, match=r"'mine' is not implemented. Code in the model's folder .* is never run"):
        models.config_from_hf(LLAMA | code | {"model_type": "mine"})


def test_a_scaling_that_is_not_nested_is_of_global_layers():
    flat = SHARED | {"model_type": "olmo3", "rope_scaling": YARN | {"rope_theta": 5e5}}
    config = models.config_from_hf(flat)
    assert (config.rope.kind, config.local_rope) == ("yarn", Rope(theta=5e5))
    theirs = pytest.importorskip("transformers").AutoConfig.for_model(**flat).to_dict()
    assert models.config_from_hf(theirs) == config
