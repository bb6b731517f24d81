"""Tiny random models of every family that is written to GGUF: llama.cpp's logits against ours."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from jaxft import models
from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.gguf.write import write_gguf
from jaxft.checkpoint.hf import hf_tensors, load_weights
from jaxft.checkpoint.load import LoadedModel, load_model
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.nn import mlp

pytestmark = pytest.mark.slow

VOCAB, PROMPT = 300, 50
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5] * 3, "long_factor": [2.0, 3.25] * 3}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MINISTRAL = YARN | {
    "rope_theta": 1e4, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 16,
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.4, "logits_scaling": 0.8,
}  # fmt: skip
GLM_MOE = {
    "head_dim": 32, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "routed_scaling_factor": 1.5, "num_hidden_layers": 3,
}  # fmt: skip
LLAMA4 = {"head_dim": 32, "intermediate_size": 48, "intermediate_size_mlp": 80, "num_hidden_layers": 5}
GRANITE4 = GRANITE | {
    "num_hidden_layers": 4, "layer_types": ["mamba", "attention", "mamba", "mamba"], "shared_intermediate_size": 48,
    "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16,
}  # fmt: skip
NEMOTRON = {
    "num_hidden_layers": 5, "head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2,
    "ssm_state_size": 16,
}  # fmt: skip
DELTA_NET = {
    "num_hidden_layers": 5, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
SMALL_EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "head_dim": None, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16,
    "v_head_dim": 20, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "rms_norm_eps": 1e-6,
    "num_hidden_layers": 3,
}  # fmt: skip
GEMMA4 = {
    "sliding_window": 16, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "rope_theta": None,
    "attention_k_eq_v": True, "final_logit_softcapping": 4.0, "num_hidden_layers": 5, "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0, "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
GPT_OSS = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "intermediate_size": 64,
    "rope_scaling": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}, "swiglu_limit": 7.0,
}  # fmt: skip
OLMO3 = {
    "sliding_window": 16, "rope_parameters": {
        "full_attention": YARN | {"rope_theta": 1e4}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
CONFIGS = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3": {"model_type": "llama", "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "smollm3": {"model_type": "smollm3", "head_dim": 32, "num_hidden_layers": 5},
    "gemma": {"model_type": "gemma", "head_dim": 32, "tie_word_embeddings": True},
    # llama.cpp has a scale of its own for the number of layers that Gemma 2 27B has.
    "gemma2": {"model_type": "gemma2", **GEMMA, "head_dim": 32, "query_pre_attn_scalar": 32},
    "gemma2_27b": {"model_type": "gemma2", **GEMMA, "head_dim": 32, "num_hidden_layers": 46},
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7},
    "gemma3_linear": {
        "model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {"model_type": "phi3", "sliding_window": None},
    # llama.cpp takes the long factors where its context, 512 here, is beyond the original; we where the text is.
    "phi3_long": {
        "model_type": "phi3", "sliding_window": None, "rope_scaling": LONGROPE, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
    },
    "olmo2": {"model_type": "olmo2"},
    "qwen3_yarn": {"model_type": "qwen3", "rope_scaling": YARN},
    "llama_yarn": {"model_type": "llama", "rope_scaling": YARN | {"attention_factor": 0.75}},
    "ministral3": {"model_type": "ministral3", "rope_parameters": MINISTRAL},
    "ministral3_scales": {"model_type": "ministral3", "rope_parameters": MINISTRAL | {"mscale_all_dim": 0.5}},
    "olmo3": {"model_type": "olmo3", **OLMO3, "num_hidden_layers": 5},
    "olmo3_order": {"model_type": "olmo3", **OLMO3, "layer_types": ["full_attention", "sliding_attention"]},
    "gpt_oss": {"model_type": "gpt_oss", **GPT_OSS},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 32},
    "granite": {"model_type": "granite", "attention_bias": True, "mlp_bias": True, **GRANITE},
    "granite_tied": {"model_type": "granite", **GRANITE, "tie_word_embeddings": True, "rope_scaling": LLAMA3},
    "exaone4": {"model_type": "exaone4", "sliding_window": None, "rope_scaling": LLAMA3},
    # llama.cpp knows the model with windows by its 64 layers.
    "exaone4_32b": {"model_type": "exaone4", "sliding_window": 16, "num_hidden_layers": 64},
    "cohere2": {
        "model_type": "cohere2", "sliding_window": 16, "tie_word_embeddings": True, "num_hidden_layers": 5,
        "logit_scale": 0.25,
    },
    "glm": {"model_type": "glm"},
    "glm4": {"model_type": "glm4", "head_dim": 32},
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 32},
    "hunyuan_v1_dense": {
        "model_type": "hunyuan_v1_dense", "head_dim": 32,
        "rope_scaling": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0},
    },
    "internlm3": {"model_type": "internlm3", "head_dim": 32, "qkv_bias": True, "bias": True},
    "apertus": {"model_type": "apertus", "head_dim": 32, "rope_scaling": LLAMA3},
    "granitemoe": {
        "model_type": "granitemoe", **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True,
    },
    "glm4_moe": {"model_type": "glm4_moe", **GLM_MOE, "attention_bias": True, "use_qk_norm": True},
    "glm4_moe_air": {"model_type": "glm4_moe", **GLM_MOE, "attention_bias": True, "norm_topk_prob": False},
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe", "moe_intermediate_size": 32, "moe_num_experts": 8, "moe_k": 3,
        "moe_num_shared_experts": 2, "num_hidden_layers": 3, "moe_layer_start_index": 2, "head_dim": 32,
    },
    "hunyuan_v1_moe": {
        "model_type": "hunyuan_v1_moe", "num_experts": 4, "moe_topk": 2, "head_dim": 32,
        "rope_scaling": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0},
    },
    "llama4": {
        "model_type": "llama4_text", **LLAMA4, "num_local_experts": 4, "interleave_moe_layer_step": 2,
        "rope_scaling": LLAMA3,
    },
    "llama4_maverick": {"model_type": "llama4_text", **LLAMA4, "num_local_experts": 128, "use_qk_norm": False},
    "lfm2": {
        "model_type": "lfm2", "num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"],
        "block_multiple_of": 16,
    },
    "lfm2_moe": {
        "model_type": "lfm2_moe", "num_hidden_layers": 4, "num_dense_layers": 1, "num_experts": 8,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
    },
    "granitehybrid": {"model_type": "granitemoehybrid", **GRANITE4, "num_local_experts": 0, "attention_bias": True},
    "granitehybrid_moe": {
        "model_type": "granitemoehybrid", **GRANITE4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "position_embedding_type": "rope",
    },
    "nemotron_h": {"model_type": "nemotron_h", **NEMOTRON, "hybrid_override_pattern": "M-*M-", "mlp_bias": True},
    "nemotron_h_moe": {
        "model_type": "nemotron_h", **NEMOTRON, "hybrid_override_pattern": "ME*ME", "n_routed_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48,
        "routed_scaling_factor": 1.5,
    },
    "qwen3_next": {"model_type": "qwen3_next", **DELTA_NET, **SMALL_EXPERTS},
    "qwen3_5": {"model_type": "qwen3_5_text", **DELTA_NET},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text", **DELTA_NET, **SMALL_EXPERTS},
    # llama.cpp knows models whose queries have no latent vector by their layers.
    "deepseek_v2": {"model_type": "deepseek_v2", **LATENT, "q_lora_rank": None, "num_hidden_layers": 26},
    "deepseek_v2_yarn": {
        "model_type": "deepseek_v2", **LATENT, "q_lora_rank": 24,
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": 24, "n_group": 4, "topk_group": 2},
    "deepseek_v3_yarn": {
        "model_type": "deepseek_v3", **LATENT, "q_lora_rank": 24, "n_group": 1, "topk_group": 1,
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "glm4_moe_lite": {"model_type": "glm4_moe_lite", **LATENT, "q_lora_rank": 24},
    "gemma4": {"model_type": "gemma4_text", **GEMMA4},
    # llama.cpp knows the number of layers with keys, and all sizes of the streams.
    "gemma3n": {
        "model_type": "gemma3n_text", "num_hidden_layers": 25, "num_kv_shared_layers": 5, "sliding_window": 16,
        "vocab_size_per_layer_input": VOCAB - 20, "rope_local_base_freq": 1e4, "tie_word_embeddings": True,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 15,
    },
    "gemma4_small": {
        "model_type": "gemma4_text", **GEMMA4, "attention_k_eq_v": False, "num_global_key_value_heads": None,
        "layer_types": ["sliding_attention", "full_attention"] * 3, "num_hidden_layers": 6, "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB,
    },
    "gemma4_moe": {
        "model_type": "gemma4_text", **GEMMA4, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 3,
        "moe_intermediate_size": 32, "attention_k_eq_v": False, "num_global_key_value_heads": None,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "norm_topk_prob": True, "head_dim": 32,
    },
}  # fmt: skip
# What would show if Gemma's settings were lost on the way.
LOST = {
    "window": {"sliding_window": 512},
    "scale": {"query_pre_attn_scalar": 64},
    "local rope": {"rope_local_base_freq": 5e5},
    "global rope": {"rope_theta": 1e4},
    "cap of scores": {"attn_logit_softcapping": 1.0},
    "cap of logits": {"final_logit_softcapping": 1.0},
}


def tokenizer() -> dict:
    """A byte-level tokenizer all of whose tokens are text: llama.cpp says nothing of one that is part of a letter."""
    characters = [c for c in sorted(ByteLevel.alphabet()) if c.isascii()] + ["Ċ", "Ġ", "he"]
    words = [f"w{i}" for i in range(VOCAB - len(characters) - 1)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*characters, *words, "<eos>"],
        "tokenizer.ggml.token_type": [1] * (VOCAB - 1) + [3],
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.eos_token_id": VOCAB - 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def lively(name: str, array: np.ndarray, rng: np.random.Generator, gemma: bool, width: float = 4) -> np.ndarray:
    """Weights large enough for every part to matter, and norms and biases that are not just ones and zeros."""
    if array.ndim > 1:
        return width * array
    center = 0 if gemma or name.endswith("bias") else 1
    return (center + 0.1 * rng.normal(size=array.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def answers(llama_cpp, tmp_path_factory):
    """(name, stored type) -> (path of the file, prompt, what llama.cpp says of the next token)."""

    def ask(name, dtype="float32"):
        config, rng = SIZES | CONFIGS[name], np.random.default_rng(0)
        if config["model_type"] == "qwen2":
            del config["head_dim"]
        model = models.random_model(models.config_from_hf(config), seed=0)
        gemma = config["model_type"] in ("gemma", "gemma2", "gemma3_text")
        # With wider weights the last bits of float32 show in a delta-net's answers, those of float16 in Gemma 3n's.
        width = 1 if config["model_type"].startswith(("qwen3_5", "qwen3_next", "gemma3n")) else 4
        arrays = {hf: lively(hf, make(), rng, gemma, width) for hf, (_, make) in hf_tensors(model).items()}
        tensors = {hf: (TensorSpec(a.shape, a.dtype), lambda at=(), a=a: a[at]) for hf, a in arrays.items()}
        path = str(tmp_path_factory.mktemp("tiny") / f"{name}.gguf")
        # llama.cpp looks for tokens of Phi-3 in a file that is named after it.
        write_gguf(path, config, tensors, dtype=dtype, tokenizer=tokenizer(), name="tiny")
        prompt = rng.integers(0, 256, PROMPT).tolist()
        choice = llama_cpp(path).complete(prompt, 1, logprobs=20)
        best = choice["logprobs"]["content"][0]["top_logprobs"]
        return path, prompt, {token["id"]: token["logprob"] for token in best}

    return ask


def difference(logits_V: np.ndarray, theirs: dict[int, float]) -> float:
    """Largest difference of the log-probabilities that llama.cpp gave."""
    ours_V = np.asarray(jax.nn.log_softmax(logits_V))
    return max(abs(float(ours_V[i]) - logprob) for i, logprob in theirs.items())


def rounded_gelu(x: jax.Array) -> jax.Array:
    """GELU as ggml has it, with inputs and outputs in float16."""
    y = jax.nn.gelu(x.astype(jnp.float16).astype(jnp.float32), approximate=True)
    return jnp.where(jnp.abs(x) < 10, y.astype(jnp.float16).astype(jnp.float32), jnp.maximum(x, 0))


def above_sampled_quantile(x: jax.Array, share: float) -> jax.Array:
    """`mlp.above_quantile` with the deviation of a sample, which llama.cpp has in place of transformers'."""
    count = x.shape[-1]
    mean = jnp.mean(x, axis=-1, keepdims=True)
    deviation = jnp.std(x, axis=-1, keepdims=True) * (count / (count - 1)) ** 0.5
    return jax.nn.relu(x - mean - deviation * statistics.NormalDist().inv_cdf(share))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_next_token_has_the_same_probabilities(answers, name, monkeypatch):
    path, prompt, theirs = answers(name)
    assert len(theirs) == 20
    # ggml rounds the GELU of Gemma to float16; all else is float32 on both sides.
    tolerance = 2e-3 if name.startswith("gemma") else 1e-5
    if name == "gemma4_moe":  # the roundings of many experts add up to more
        monkeypatch.setitem(mlp.ACTIVATIONS, "gelu_tanh", rounded_gelu)
    if name == "gemma3n":  # of 96 inner units; of the 8,192 of E2B, the two differ by one in 16,000
        monkeypatch.setattr(mlp, "above_quantile", above_sampled_quantile)
    model = load_model(path)
    if name == "gpt_oss":
        # llama.cpp rounds the ends of yarn's ramp, which the makers of gpt-oss do not.
        assert model.hf_config["rope_scaling"]["truncate"] is False
        rounded = model.hf_config["rope_scaling"] | {"truncate": True}
        model = load_model_with(path, model.hf_config | {"rope_scaling": rounded})
    assert difference(model.logits([prompt])[0, -1], theirs) < tolerance
    if name not in ("gemma2", "gemma3"):
        return
    for what, change in LOST.items():
        if set(change) <= set(model.hf_config):
            other = load_model_with(path, model.hf_config | change)
            assert difference(other.logits([prompt])[0, -1], theirs) > 5 * tolerance, what


# llama.cpp rounds activations to the type of the matrix that it multiplies with.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 3e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_files_of_narrower_types_give_nearly_the_same_probabilities(answers, name, dtype, tolerance):
    path, prompt, theirs = answers(name, dtype)
    found = difference(load_model(path).logits([prompt])[0, -1], theirs)
    assert found < tolerance


def load_model_with(path: str, config: dict):
    """The weights of a file under another config."""
    module = load_weights(models.abstract_model(models.config_from_hf(config)), GGUFFile(path).tensors())
    return LoadedModel(module, config, path)
