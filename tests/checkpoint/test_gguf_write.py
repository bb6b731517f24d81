"""GGUF written here: read back by us and by the library, for every family, type and rope; and refusals."""

import dataclasses
import functools
import json
import re

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from jaxft import models
from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.gguf import write as gguf_write
from jaxft.checkpoint.gguf.kinds import KINDS
from jaxft.checkpoint.gguf.layout.values import to_file
from jaxft.checkpoint.gguf.names import WRITTEN, interleave
from jaxft.checkpoint.gguf.settings import family_of
from jaxft.checkpoint.gguf.write import check_gguf, model_metadata, write_gguf, write_gguf_adapter
from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.peft import folder as peft_folder
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.errors import ExportError, ModelError

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5] * 6, "long_factor": [2.0, 3.25] * 6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MINISTRAL = YARN | {
    "rope_theta": 1e6, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.125,
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0078125, "logits_scaling": 8.0,
}  # fmt: skip
GRANITE4 = GRANITE | {
    "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48, "mamba_n_heads": 8, "mamba_n_groups": 2,
    "mamba_d_state": 16,
}  # fmt: skip
NEMOTRON = {
    "num_hidden_layers": 3, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16,
}  # fmt: skip
DELTA_NET = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"], "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6,
}  # fmt: skip
SMALL_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "head_dim": None, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16,
    "v_head_dim": 20, "n_routed_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "q_lora_rank": 24,
}  # fmt: skip
GEMMA4 = {
    "sliding_window": 16, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "rope_theta": None,
    "attention_k_eq_v": True, "final_logit_softcapping": 4.0, "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0, "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
GPT_OSS = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "intermediate_size": 64,
    "rope_scaling": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}, "swiglu_limit": 7.0,
}  # fmt: skip
OLMO3 = {
    "head_dim": 16, "sliding_window": 16, "rope_parameters": {
        "full_attention": YARN | {"rope_theta": 5e5}, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
    },
}  # fmt: skip
CONFIGS = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_llama3": {"model_type": "llama", "rope_scaling": LLAMA3},
    "llama_linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 16, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "gemma3": {
        "model_type": "gemma3_text", "sliding_window": 16, "query_pre_attn_scalar": 32, "tie_word_embeddings": True,
        "num_hidden_layers": 7,
    },
    "gemma3_linear": {
        "model_type": "gemma3_text", "sliding_window": 16, "query_pre_attn_scalar": 32,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "gemma": {"model_type": "gemma", "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", "head_dim": 16, "sliding_window": None},
    "phi3_long": {
        "model_type": "phi3", "num_attention_heads": 2, "sliding_window": 512, "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 64, "partial_rotary_factor": 0.75,
    },
    "olmo2": {"model_type": "olmo2", "head_dim": 16},
    "qwen3_yarn": {"model_type": "qwen3", "rope_scaling": YARN},
    "llama_yarn": {"model_type": "llama", "rope_scaling": YARN | {"attention_factor": 0.75}},
    "ministral3": {"model_type": "ministral3", "rope_parameters": MINISTRAL},
    "ministral3_scales": {"model_type": "ministral3", "rope_parameters": MINISTRAL | {"mscale_all_dim": 0.5}},
    "olmo3": {"model_type": "olmo3", **OLMO3},
    "olmo3_order": {"model_type": "olmo3", **OLMO3, "layer_types": ["full_attention", "sliding_attention"]},
    "gpt_oss": {"model_type": "gpt_oss", **GPT_OSS},
    "seed_oss": {"model_type": "seed_oss"},
    "granite": {"model_type": "granite", "attention_bias": True, "mlp_bias": True, **GRANITE},
    "exaone4": {"model_type": "exaone4", "head_dim": 16, "sliding_window": None, "rope_scaling": LLAMA3},
    "cohere2": {"model_type": "cohere2", "head_dim": 16, "sliding_window": 16, "tie_word_embeddings": True},
    "glm": {"model_type": "glm", "head_dim": 16},
    "glm4": {"model_type": "glm4"},
    "ernie4_5": {"model_type": "ernie4_5"},
    "hunyuan_v1_dense": {
        "model_type": "hunyuan_v1_dense", "rope_scaling": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0},
    },
    "internlm3": {"model_type": "internlm3", "qkv_bias": True, "bias": True},
    "apertus": {"model_type": "apertus", "rope_scaling": LLAMA3},
    "granitemoe": {
        "model_type": "granitemoe", **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True,
    },
    "glm4_moe": {
        "model_type": "glm4_moe", "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 3,
        "n_shared_experts": 2, "routed_scaling_factor": 1.5, "attention_bias": True, "use_qk_norm": True,
        "norm_topk_prob": False,
    },
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe", "moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 3,
        "moe_num_shared_experts": 2,
    },
    "hunyuan_v1_moe": {"model_type": "hunyuan_v1_moe", "num_experts": 4, "moe_topk": 2},
    "llama4_text": {
        "model_type": "llama4_text", "num_local_experts": 4, "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 80,
    },
    "lfm2": {"model_type": "lfm2", "head_dim": 16, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {
        "model_type": "lfm2_moe", "head_dim": 16, "layer_types": ["full_attention", "conv"], "num_dense_layers": 1,
        "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    },
    "granitehybrid": {"model_type": "granitemoehybrid", **GRANITE4, "num_local_experts": 0, "attention_bias": True},
    "granitehybrid_moe": {"model_type": "granitemoehybrid", **GRANITE4, "num_local_experts": 4},
    "nemotron_h": {"model_type": "nemotron_h", **NEMOTRON, "hybrid_override_pattern": "M*-", "mlp_bias": True},
    "nemotron_h_moe": {
        "model_type": "nemotron_h", **NEMOTRON, "hybrid_override_pattern": "ME*", "n_routed_experts": 4,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64, "routed_scaling_factor": 1.5,
    },
    "qwen3_next": {"model_type": "qwen3_next", **DELTA_NET, **SMALL_EXPERTS},
    "qwen3_5": {"model_type": "qwen3_5_text", **DELTA_NET},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text", **DELTA_NET, **SMALL_EXPERTS},
    "deepseek_v2": {"model_type": "deepseek_v2", **LATENT, "q_lora_rank": None, "num_hidden_layers": 26},
    "deepseek_v3": {
        "model_type": "deepseek_v3", **LATENT, "n_group": 2, "topk_group": 2,
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "glm4_moe_lite": {"model_type": "glm4_moe_lite", **LATENT},
    "gemma4": {"model_type": "gemma4_text", **GEMMA4},
    "gemma3n": {
        "model_type": "gemma3n_text", "num_hidden_layers": 22, "num_kv_shared_layers": 2, "sliding_window": 16,
        "vocab_size_per_layer_input": SIZES["vocab_size"], "rope_local_base_freq": 1e4, "tie_word_embeddings": True,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
    },
    "gemma4_small": {
        "model_type": "gemma4_text", **GEMMA4, "attention_k_eq_v": False, "num_global_key_value_heads": None,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": SIZES["vocab_size"],
    },
    "gemma4_moe": {
        "model_type": "gemma4_text", **GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 3,
        "moe_intermediate_size": 32, "attention_k_eq_v": False, "num_global_key_value_heads": None,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}  # fmt: skip
DELTA_NETS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
# Their file types beyond float32 are slow tests.
NEWER = {
    "seed_oss", "granite", "exaone4", "cohere2", "glm", "glm4", "ernie4_5", "hunyuan_v1_dense", "internlm3", "apertus",
    "granitemoe", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "llama4_text", "lfm2", "lfm2_moe", "granitehybrid",
    "granitehybrid_moe", "nemotron_h", "nemotron_h_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe",
    "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gemma4", "gemma4_small", "gemma4_moe",
    "gemma3n",
}  # fmt: skip
ARCHS = {
    "mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss", "ministral3": "mistral3", "olmo3": "olmo2",
}  # fmt: skip


def made(name: str):
    """(config.json, tensors) of a random model."""
    config, arrays = drawn(name)
    return dict(config), {k: (TensorSpec(a.shape, a.dtype), lambda at=(), a=a: a[at]) for k, a in arrays.items()}


@functools.cache
def drawn(name: str):
    config = SIZES | CONFIGS[name]
    if config["model_type"] == "qwen2":
        config = {k: v for k, v in config.items() if k != "head_dim"}
    model = models.abstract_model(models.config_from_hf(config))
    rng = np.random.default_rng(0)
    # Norms and biases differ too: in ones and zeros a mix-up would not show.
    return config, {
        k: np.asarray(rng.normal(size=spec.shape), np.float32) * (1 if len(spec.shape) < 2 else 0.02)
        for k, (spec, _) in hf_tensors(model).items()
    }


def stored(hf: str, array: np.ndarray, kind, config) -> np.ndarray:
    """The array as a file of this kind keeps it, in Hugging Face's terms."""
    if hf.endswith("norm.weight") and config["model_type"] in ("gemma", "gemma2", "gemma3_text"):
        return (array + np.float32(1)) - np.float32(1)
    if hf.endswith("norm.weight") and config["model_type"] in DELTA_NETS and "linear_attn" not in hf:
        return (array + np.float32(1)) - np.float32(1)
    if hf.endswith("A_log"):
        return np.log(np.exp(array))
    if config["model_type"] == "gpt_oss" and ".experts." in hf:
        if hf.endswith("_bias") or kind == KINDS["float32"]:
            return array
        # Inputs are first here and last in GGUF, where they fill the blocks; gates and ups are rows of their own.
        return dequantize(quantize(np.ascontiguousarray(array.swapaxes(1, 2)), kind), kind).swapaxes(1, 2)
    router = hf.endswith("router.weight") or (
        hf.endswith("gate.weight") and "expert" not in hf and config["model_type"] in ("mixtral", "qwen3_moe")
    )
    return array if array.ndim < 2 or router or kind == KINDS["float32"] else dequantize(quantize(array, kind), kind)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] if name in NEWER and dtype != "float32" else [])
        for name in CONFIGS
        for dtype in ("float32", "float16", "bfloat16", "q8_0")
    ],
)
def test_what_is_written_reads_back_as_the_library_quantises_it(tmp_path, name, dtype):
    config, tensors = made(name)
    path = str(tmp_path / "model.gguf")
    write_gguf(path, config, tensors, dtype=dtype, tokenizer={"tokenizer.ggml.eos_token_id": 2}, name="a name")
    file, kind = GGUFFile(path), KINDS[dtype]
    source = file.tensors()
    assert set(source.specs()) == set(tensors)
    for hf, (spec, make) in tensors.items():
        assert source.specs()[hf].shape == spec.shape
        if name in NEWER and dtype != "float32":
            continue  # they are compared below
        np.testing.assert_array_equal(source.read(hf), stored(hf, make(), kind, config), err_msg=hf)
    check_gguf(path, tensors, dtype=dtype)
    ours, back = models.config_from_hf(config), models.config_from_hf(file.hf_config())
    if config["model_type"] == "mistral":
        assert back == models.config_from_hf(config | {"model_type": "llama"} | {"sliding_window": None})
    elif config["model_type"] == "phi3":
        assert back == dataclasses.replace(ours, sliding_window=None)
    elif config["model_type"] == "internlm3":
        llama = SIZES | {"model_type": "llama", "attention_bias": True, "mlp_bias": True}
        assert back == models.config_from_hf(llama)
    elif name in ("lfm2", "granitehybrid", "granitehybrid_moe", "nemotron_h", "nemotron_h_moe", "glm4_moe_lite"):
        assert back.shape() == ours.shape()  # the file has no such fields of config.json
    elif config.get("rope_scaling") != LLAMA3 and config["model_type"] != "hunyuan_v1_dense":
        assert back == ours
    np.testing.assert_allclose(back.rope.frequencies(ours.head_dim), ours.rope.frequencies(ours.head_dim), rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "mixtral", "qwen3_moe"])
def test_the_library_knows_the_names_and_finds_the_rows(tmp_path, name):
    config, tensors = made(name)
    path = str(tmp_path / "model.gguf")
    write_gguf(path, config, tensors, dtype="float32", tokenizer={}, name="x")
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    arch = ARCHS.get(config["model_type"], config["model_type"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    experts = {}
    for hf, (_, make) in tensors.items():
        each = re.sub(r"experts\.\d+\.", "experts.", hf)
        ours = f"{names.get_name(each.removesuffix('.weight'))}.weight"
        array = make()
        if arch.startswith("gemma") and hf.endswith("norm.weight"):
            array = array + np.float32(1)
        if arch == "llama" and ("q_proj" in hf or "k_proj" in hf):
            # Source of the order: llama.cpp's converter, LlamaModel.permute.
            heads = array.shape[0] // config["head_dim"]
            array = array.reshape(heads, 2, 16, 64).swapaxes(1, 2).reshape(array.shape)
        experts.setdefault(ours, []).append(array)
    assert set(found) == set(experts)
    for ours, arrays in experts.items():
        wanted = np.stack(arrays) if "_exps" in ours else arrays[0]
        np.testing.assert_array_equal(found[ours].data, wanted, err_msg=ours)


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_5"])
def test_layers_that_predict_several_tokens_are_left_out(tmp_path, monkeypatch, name):
    config, tensors = made(name)
    family, path = family_of(config), str(tmp_path / "model.gguf")
    metadata = model_metadata(config) | {f"{family.arch}.nextn_predict_layers": 1}
    monkeypatch.setattr(gguf_write, "model_metadata", lambda hf_config: metadata)
    write_gguf(path, config, tensors, dtype="float32", tokenizer={}, name="x")
    file = GGUFFile(path)
    assert file.hf_config()["num_hidden_layers"] == 1
    of_layer = {hf for hf in tensors if ".layers.1." in hf}
    assert set(file.specs()) == set(tensors) - of_layer
    assert "predict several tokens at once (MTP), and are left out" in file.notes()[0]
    numbers = sum(tensors[hf][0].size for hf in of_layer)
    assert f"of {numbers:,} numbers" in file.notes()[0]
    metadata[f"{family.arch}.nextn_predict_layers"] = 2
    write_gguf(path, config, tensors, dtype="float32", tokenizer={}, name="x")
    with pytest.raises(ModelError, match=r"nextn_predict_layers=2 of 2 layers"):
        GGUFFile(path)


def test_interleaving():
    q = np.arange(64 * 3).reshape(64, 3)
    np.testing.assert_array_equal(interleave(q, 2)[:4, 0], q[[0, 16, 1, 17], 0])


def test_a_block_of_an_expert_and_of_a_norm(tmp_path):
    for name, hf in (
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w2.weight"),
        ("gemma2", "model.layers.1.input_layernorm.weight"),
    ):
        config, tensors = made(name)
        path = str(tmp_path / f"{name}.gguf")
        write_gguf(path, config, tensors, dtype="float32", tokenizer={}, name="x")
        wanted = stored(hf, tensors[hf][1](), KINDS["float32"], config)
        np.testing.assert_array_equal(GGUFFile(path).read(hf, (slice(3, 9),)), wanted[3:9])


def test_a_norm_multiplies_by_the_same_number_after_the_file(tmp_path):
    config, tensors = made("gemma2")
    path = str(tmp_path / "model.gguf")
    tiny = np.array([1e-9, -1e-9, 3e-4, -0.75, 0.0, 12.5, 300.1, -1.0] * 8, np.float32)
    tensors["model.norm.weight"] = (TensorSpec(tiny.shape, tiny.dtype), lambda: tiny)
    write_gguf(path, config, tensors, dtype="float32", tokenizer={}, name="x")
    back = GGUFFile(path).read("model.norm.weight")
    assert not np.array_equal(back, tiny)
    np.testing.assert_array_equal(np.float32(1) + back, np.float32(1) + tiny)


def test_rows_that_do_not_fill_blocks_fall_back_to_float16(tmp_path):
    config, tensors = made("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    config = config | {"intermediate_size": 80}
    for hf, (spec, make) in list(tensors.items()):
        if "mlp" in hf:
            array = make()[:, :80] if "down" in hf else make()[:80]
            tensors[hf] = (TensorSpec(array.shape, spec.dtype), lambda array=array: array)
    path = str(tmp_path / "model.gguf")
    write_gguf(path, config, tensors, dtype="q8_0", tokenizer={}, name="x")
    check_gguf(path, tensors, dtype="q8_0")
    np.testing.assert_array_equal(GGUFFile(path).read(name), tensors[name][1]().astype(np.float16).astype(np.float32))


def test_a_damaged_value_is_noticed(tmp_path):
    config, tensors = made("llama")
    path = tmp_path / "model.gguf"
    write_gguf(str(path), config, tensors, dtype="float32", tokenizer={}, name="x")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ExportError, match=r"reads back differently"):
        check_gguf(str(path), tensors, dtype="float32")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mistral", "sliding_window": 100}, r"sliding_window=100 is below max_position_embeddings=512"),
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not written to GGUF"),
        ({"model_type": "olmo2", "head_dim": 16, "tie_word_embeddings": True}, r"olmo2 has an output matrix"),
        ({"model_type": "olmo2"}, r"num_attention_heads x head_dim = 128 is not hidden_size=64"),
        ({"model_type": "olmo2", "head_dim": 16, "attention_bias": True}, r"attention_bias=True: there are no such"),
        ({"model_type": "olmo2", "head_dim": 16, "rope_scaling": LLAMA3}, r"rope scaling 'llama3'"),
        ({"model_type": "seed_oss", "mlp_bias": True}, r"mlp_bias=True: there are no such biases"),
        (CONFIGS["exaone4"] | {"sliding_window": 16}, r"sliding_window=16 in a model of 2 layers: those of 64 layers"),
        (CONFIGS["cohere2"] | {"sliding_window_pattern": 2}, r"layer_types are not 3 local to one global layer"),
        (CONFIGS["cohere2"] | {"tie_word_embeddings": False}, r"cohere2 has no output matrix"),
        (CONFIGS["hunyuan_v1_dense"] | {"attention_bias": True}, r"attention_bias=True: there are no such biases"),
        (CONFIGS["apertus"] | {"tie_word_embeddings": True}, r"apertus has an output matrix"),
        (CONFIGS["glm4_moe"] | {"n_group": 2, "topk_group": 2}, r"n_group=2: experts are not in groups there"),
        (CONFIGS["ernie4_5_moe"] | {"moe_layer_end_index": 0}, r"moe_layer_end_index=0: the layers with experts end"),
        (CONFIGS["ernie4_5_moe"] | {"moe_layer_interval": 2}, r"moe_layer_interval=2: it is 1 there"),
        (CONFIGS["ernie4_5_moe"] | {"moe_norm_min": 0.1}, r"moe_norm_min=0.1: the weights of experts are divided"),
        (
            CONFIGS["llama4_text"] | {"attention_chunk_size": 64},
            r"attention_chunk_size=64 and layer_types: layers with",
        ),
        (CONFIGS["llama4_text"] | {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]: every fourth layer is 0"),
        (CONFIGS["llama4_text"] | {"floor_scale": 4}, r"attn_temperature_tuning, floor_scale, attn_scale=\(True, 4"),
        (CONFIGS["llama4_text"] | {"use_qk_norm": False}, r"use_qk_norm=False: models of 128 experts do without"),
        (CONFIGS["llama4_text"] | {"moe_layers": [0]}, r"moe_layers=\[0\]: they are every n-th layer"),
        (CONFIGS["lfm2"] | {"conv_bias": True}, r"conv_bias=True: there are no such biases"),
        (CONFIGS["lfm2_moe"] | {"routed_scaling_factor": 2.0}, r"routed_scaling_factor=2.0: it is 1.0 there"),
        (CONFIGS["granitehybrid"] | {"layer_types": ["mamba"] * 2}, r"layer_types of one kind: there are both"),
        (CONFIGS["nemotron_h_moe"] | {"hybrid_override_pattern": "M*-E", "num_hidden_layers": 4}, r"both mlp and moe"),
        (CONFIGS["nemotron_h"] | {"hybrid_override_pattern": "MM-"}, r"has only linear_attention, mlp: there is"),
        (CONFIGS["nemotron_h"] | {"time_step_min": 0.01}, r"time_step_min=0.01: it is 0.001"),
        (
            CONFIGS["qwen3_5"] | {"rms_norm_eps": 1e-5},
            r"rms_norm_eps=1e-05: queries and keys of delta-nets get the same",
        ),
        (CONFIGS["qwen3_5"] | {"layer_types": ["full_attention", "linear_attention"]}, r"layer_types are not periodic"),
        (CONFIGS["qwen3_5"] | {"linear_value_head_dim": 8}, r"linear_value_head_dim=8 is not linear_key_head_dim=16"),
        (CONFIGS["qwen3_next"] | {"mlp_only_layers": [0]}, r"mlp_only_layers or decoder_sparse_step: all layers have"),
        (CONFIGS["deepseek_v3"] | {"rope_interleave": False}, r"rope_interleave=False: neighbouring dimensions"),
        (CONFIGS["deepseek_v3"] | {"rope_scaling": YARN}, r"yarn with mscale=None, mscale_all_dim=None: the two are"),
        (
            CONFIGS["deepseek_v3"] | {"q_lora_rank": None},
            r"q_lora_rank=None in a model of 2 layers: those of 26 and 27",
        ),
        (CONFIGS["deepseek_v2"] | {"norm_topk_prob": True}, r"norm_topk_prob=True: it is False there|no such"),
        (
            CONFIGS["deepseek_v2"] | {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 2},
            r"topk_method=group_limited_greedy: it is greedy there",
        ),
        (CONFIGS["gemma4"] | {"attention_bias": True}, r"attention_bias=True: there are no such biases"),
        (CONFIGS["gemma4"] | {"layer_types": ["full_attention"] * 2}, r"layer_types of one kind: there are both local"),
        (
            CONFIGS["gemma4_small"] | {"num_kv_shared_layers": 1},
            r"num_kv_shared_layers=1: the last two layers with keys are not a local and a global one",
        ),
        (
            CONFIGS["gemma4"]
            | {
                "rope_parameters": GEMMA4["rope_parameters"]
                | {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            },
            r"ropes 'proportional' with factor None and 'linear'",
        ),
        ({"model_type": "qwen3", "attention_bias": True}, r"attention_bias=True: there are no such biases"),
        (CONFIGS["qwen3_moe"] | {"norm_topk_prob": False}, r"norm_topk_prob=False"),
        (CONFIGS["mixtral"] | {"sliding_window": 9}, r"sliding_window=9 is below max_position_embeddings=512"),
        (CONFIGS["phi3_long"] | {"sliding_window": 9}, r"sliding_window=9 is below max_position_embeddings=512"),
        (CONFIGS["smollm3"] | {"no_rope_layer_interval": 2}, r"no_rope_layers=.*every fourth layer is 0"),
        (CONFIGS["gemma2"] | {"tie_word_embeddings": False}, r"gemma2 has no output matrix"),
        (
            CONFIGS["gemma2"] | {"query_pre_attn_scalar": 64},
            r"query_pre_attn_scalar=64: in a model of 2 layers it is 32",
        ),
        (
            CONFIGS["gemma2"] | {"attn_logit_softcapping": None},
            r"attn_logit_softcapping=None: the architecture always caps",
        ),
        (
            CONFIGS["gemma2"] | {"final_logit_softcapping": None},
            r"final_logit_softcapping=None: the architecture always caps",
        ),
        (CONFIGS["gemma2"] | {"layer_types": ["full_attention"] * 2}, r"layer_types are not 1 local to one global"),
        (CONFIGS["gemma3"] | {"sliding_window_pattern": 3}, r"layer_types are not 5 local to one global"),
        (CONFIGS["gemma3"] | {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30.0: some versions leave"),
        (CONFIGS["gemma3"] | {"rope_local_base_freq": 5e3}, r"rope of local layers 'default' with base 5000.0"),
        (CONFIGS["gemma3"] | {"rope_scaling": YARN}, r"rope scaling 'yarn'"),
        (
            {"rope_scaling": YARN | {"beta_fast": 16.0}},
            r"yarn with beta_fast=16.0, .* its ramp runs from 32 to 1 turns",
        ),
        ({"rope_scaling": YARN | {"truncate": False}}, r"truncate=False: its ramp .* rounded to whole dimensions"),
        (
            CONFIGS["olmo3"]
            | {
                "rope_parameters": OLMO3["rope_parameters"]
                | {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
            },
            r"rope of local layers 'default' with base 10000.0: it is 'default' with the base of global layers, 500000",
        ),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(changes, match):
    with pytest.raises((ExportError, ModelError), match=match):
        model_metadata(SIZES | {"model_type": "llama"} | changes)


def test_values_and_types_that_do_not_fit_are_refused(tmp_path):
    config, tensors = made("llama")
    path = str(tmp_path / "model.gguf")
    with pytest.raises(ExportError, match=r"not 'q4_0'"):
        write_gguf(path, config, tensors, dtype="q4_0", tokenizer={}, name="x")
    huge = tensors["lm_head.weight"][1]() * 1e8
    tensors["lm_head.weight"] = (TensorSpec(huge.shape, huge.dtype), lambda: huge)
    with pytest.raises(ExportError, match=r"'lm_head\.weight' has values up to .* float16 ends at 65504"):
        write_gguf(path, config, tensors, dtype="float16", tokenizer={}, name="x")
    tensors["model.extra.weight"] = tensors["lm_head.weight"]
    with pytest.raises(ExportError, match=r"no name in GGUF's llama: model\.extra\.weight"):
        write_gguf(path, config, tensors, dtype="float32", tokenizer={}, name="x")


def write_lora(folder, module="model.layers.1.self_attn.k_proj", shapes=((4, 64), (64, 4)), **settings):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(np.float32) for s in shapes)
    key = f"{peft_folder.PREFIX}{module}"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, folder / peft_folder.WEIGHTS)
    (folder / peft_folder.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings))
    return a, b


@pytest.mark.parametrize(("settings", "alpha"), [({}, 8.0), ({"use_rslora": True}, 16.0)])
def test_an_adapter_has_llama_cpps_names_rows_and_scale(tmp_path, settings, alpha):
    a, b = write_lora(tmp_path, **settings)
    path = str(tmp_path / "lora.gguf")
    write_gguf_adapter(path, str(tmp_path), SIZES | CONFIGS["llama"])
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == alpha
    found = {t.name: t.data for t in reader.tensors}
    assert set(found) == {"blk.1.attn_k.weight.lora_a", "blk.1.attn_k.weight.lora_b"}
    np.testing.assert_array_equal(found["blk.1.attn_k.weight.lora_a"], a)
    np.testing.assert_array_equal(found["blk.1.attn_k.weight.lora_b"], interleave(b, 2))


@pytest.mark.parametrize(("module", "part"), [("in_proj_z", "attn_gate"), ("out_proj", "ssm_out")])
def test_an_adapter_on_a_delta_net_has_the_heads_in_the_files_order(tmp_path, module, part):
    config = SIZES | CONFIGS["qwen3_5"]
    name = f"model.layers.0.linear_attn.{module}"
    rng = np.random.default_rng(0)
    shapes = ((4, 64), (96, 4)) if module == "in_proj_z" else ((4, 96), (64, 4))
    a, b = write_lora(tmp_path, module=name, shapes=shapes)
    write_gguf_adapter(str(tmp_path / "lora.gguf"), str(tmp_path), config)
    # The file's matrix of the model with the change has to be the model's matrix in the file with the file's change.
    before = rng.normal(size=(shapes[1][0], shapes[0][1])).astype(np.float32)
    family, own = family_of(config), models.config_from_hf(config)
    wanted = to_file(family, own, f"{name}.weight", before + b @ a) - to_file(family, own, f"{name}.weight", before)
    found = {t.name: t.data for t in gguf.GGUFReader(str(tmp_path / "lora.gguf")).tensors}
    change = found[f"blk.0.{part}.weight.lora_b"] @ found[f"blk.0.{part}.weight.lora_a"]
    np.testing.assert_allclose(change, wanted, atol=1e-5)
    assert not np.allclose(change, b @ a, atol=0.1)


def test_keys_of_layers_that_share_are_left_out_and_told_of(tmp_path):
    """Files of llama.cpp's converter have them in every layer."""
    config, tensors = made("gemma4_small")
    spare = np.ones((32, 64), np.float32)
    path = str(tmp_path / "model.gguf")
    unused = {"model.layers.2.self_attn.k_proj.weight": (TensorSpec(spare.shape, spare.dtype), lambda at=(): spare[at])}
    write_gguf(path, config, tensors | unused, dtype="float32", tokenizer={}, name="a name")
    assert "blk.2.attn_k.weight" in {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    file = GGUFFile(path)
    assert file.notes()[0].startswith("1 tensors of 2,048 numbers are for keys and values of layers that use those of")
    assert set(file.tensors().specs()) == set(tensors)
    wide = GGUFFile(path).header.metadata["gemma4.feed_forward_length"]
    assert list(wide) == [96, 96, 192, 192]


def test_every_family_is_written():
    assert set(models.families()) == WRITTEN - {"kimi_k2"}
    assert {fields["model_type"] for fields in CONFIGS.values()} >= set(models.families()) - {"gemma4_unified_text"}


def test_an_adapter_without_a_place_or_in_blocks_is_refused(tmp_path):
    write_lora(tmp_path, module="model.layers.9.self_attn.k_proj")
    with pytest.raises(ExportError, match=r"GGUF has no name for .*layers\.9"):
        write_gguf_adapter(str(tmp_path / "x.gguf"), str(tmp_path), SIZES | CONFIGS["llama"])
    with pytest.raises(ExportError, match=r"do not fill blocks of q8_0"):
        write_gguf_adapter(str(tmp_path / "x.gguf"), str(tmp_path), SIZES | CONFIGS["llama"], dtype="q8_0")
    write_lora(tmp_path, module="model.per_layer_model_projection")
    with pytest.raises(ExportError, match=r"passes an adapter on per_layer_model_proj by without a word"):
        write_gguf_adapter(str(tmp_path / "x.gguf"), str(tmp_path), SIZES | CONFIGS["gemma4_small"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora, which llama.cpp's adapters do not have"),
        ({"rank_pattern": {"k_proj": 2}, "modules_to_save": ["lm_head"]}, "has rank_pattern, modules_to_save"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; llama.cpp reads only LoRA"),
    ],
)
def test_an_adapter_of_another_form_is_refused(tmp_path, settings, message):
    write_lora(tmp_path, **settings)
    with pytest.raises(ExportError, match=message):
        write_gguf_adapter(str(tmp_path / "x.gguf"), str(tmp_path), SIZES | CONFIGS["llama"])


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    config, tensors = made("llama")
    alive = []

    def make(array):
        alive.append(1)
        assert len(alive) == 1
        return array

    write_data = gguf.GGUFWriter.write_tensor_data

    def counted(self, array):
        write_data(self, array)
        alive.clear()

    monkeypatch.setattr(gguf_write.GGUFWriter, "write_tensor_data", counted)
    lazy = {k: (spec, lambda f=f: make(f())) for k, (spec, f) in tensors.items()}
    write_gguf(str(tmp_path / "m.gguf"), config, lazy, dtype="float32", tokenizer={}, name="x")


def test_blocks_of_fused_experts_are_parts_of_the_whole(tmp_path):
    config, tensors = made("gpt_oss")
    path = str(tmp_path / "model.gguf")
    write_gguf(path, config, tensors, dtype="float32", tokenizer={}, name="x")
    source, layer = GGUFFile(path).tensors(), "model.layers.1.mlp.experts."
    indices = [
        (slice(1, 3),),
        (slice(0, 4), slice(5, 9)),
        (slice(2, 4), slice(0, 64), slice(3, 8)),
        (slice(0, 1), slice(0, 0)),
    ]
    for part in ("gate_up_proj", "down_proj"):
        whole = tensors[layer + part][1]()
        for index in indices:
            np.testing.assert_array_equal(source.read(layer + part, index), whole[index])
    for part in ("gate_up_proj_bias", "down_proj_bias"):
        whole = tensors[layer + part][1]()
        for index in ((slice(1, 3),), (slice(0, 4), slice(5, 12))):
            np.testing.assert_array_equal(source.read(layer + part, index), whole[index])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"swiglu_limit": 5.0}, r"swiglu_alpha, swiglu_limit=\(1.702, 5.0\): they are"),
        ({"attention_bias": False}, "attention_bias=False: every projection has a bias"),
        ({"layer_types": ["full_attention"] * 2}, "no layer has a window"),
    ],
)
def test_other_forms_of_gpt_oss_are_refused(changes, match):
    with pytest.raises(ExportError, match=match):
        model_metadata(SIZES | CONFIGS["gpt_oss"] | changes)
