"""Every family against transformers, from tiny models with random weights. A family without an entry here fails."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.adapters.attach import adapters, attach
from jaxft.adapters.lora import LoRASettings, lora_factory
from jaxft.adapters.make import attach_adapter
from jaxft.checkpoint import peft as peft_format
from jaxft.checkpoint.hf import param_tensors, write_config, write_weights
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.peft.lora import REFUSED_EXPERTS
from jaxft.config import AdapterConfig, MeshConfig
from jaxft.data.batch import Batch
from jaxft.data.prompts import Prompt
from jaxft.errors import ModelError
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.nn.param_kind import Constant
from jaxft.objectives.policy.loss import policy_logps
from jaxft.objectives.sft import sft_loss
from jaxft.rollouts.packed import pack_rollouts
from jaxft.rollouts.rollout import Rollout
from jaxft.rollouts.shared_prompts import pack_with_shared_prompts
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.trees import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
revert_weight_conversion = pytest.importorskip("transformers.core_model_loading").revert_weight_conversion

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.5, 4.0, 9.0],
}  # fmt: skip
GEMMA4 = {
    "sliding_window": 6, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1,
    "attention_k_eq_v": True, "final_logit_softcapping": 4.0, "layer_types": [SLIDING, FULL] * 2,
    "rope_parameters": {
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 100.0},
        SLIDING: {"rope_type": "default", "rope_theta": 50.0},
    },
}  # fmt: skip
# Windows are shorter than the texts below, so that every layer kind shows.
TINY = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"sliding_window": 6, "head_dim": 16},
    # Queries grow after every eight tokens.
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8,
            "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.4,
        },
    },
    "qwen2": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "head_dim": 16},
    "gemma2": {"sliding_window": 6, "head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {
        "sliding_window": 7, "head_dim": 16, "query_pre_attn_scalar": 24, "layer_types": [SLIDING, FULL] * 2,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "qwen3_5_text": {
        "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "qwen3_5_moe_text": {
        "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 12, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "qwen3_next": {
        "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 12, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20, "mlp_only_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    # Rows of 20 tokens are two chunks of transformers, and one of ours.
    "granitemoehybrid": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24, "mamba_n_heads": 4,
        "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_chunk_size": 16, "mamba_proj_bias": True,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        "position_embedding_type": "rope", "embedding_multiplier": 3.0, "residual_multiplier": 0.7,
        "attention_multiplier": 0.2, "logits_scaling": 0.8,
    },
    # Chunks and a growth of queries that 20 tokens show.
    "llama4_text": {
        "head_dim": 8, "intermediate_size_mlp": 40, "num_local_experts": 4, "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0, 1, 1], "attention_chunk_size": 8, "floor_scale": 4, "attn_scale": 0.5,
        "attention_bias": True,
    },
    # One part a layer. Rows of 20 tokens are two chunks of transformers. Time steps are above their least one, which
    # transformers leaves out in a single step.
    "nemotron_h": {
        "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8,
        "chunk_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 20, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
        "mlp_bias": True, "use_bias": True, "time_step_min": 1e-6,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "mlp"],
    },
    # An inner width that is rounded up to a multiple of 5.
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv", "conv"], "block_multiple_of": 5, "conv_bias": True,
        "block_ffn_dim_multiplier": 1.2,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1, "num_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 24, "routed_scaling_factor": 1.5,
        "tie_word_embeddings": False,
    },
    "deepseek_v2": {
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2, "num_key_value_heads": 4,
        "q_lora_rank": None,
        "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5, "num_local_experts": 8,
    },
    "deepseek_v3": {
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2, "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 2, "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "mscale": 1.0, "mscale_all_dim": 0.8,
        },
    },
    "glm4_moe_lite": {
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2, "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128, "sliding_window": 9},
    "olmo2": {"num_key_value_heads": 4},
    "olmo3": {
        "sliding_window": 6,
        "rope_parameters": {
            FULL: {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64,
                   "attention_factor": 1.3},
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "seed_oss": {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True},
    "internlm3": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "smollm3": {
        "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 6, "attention_bias": True,
        "layer_types": [SLIDING, FULL, FULL, SLIDING],
    },
    "exaone4": {"sliding_window": 6, "layer_types": [SLIDING, FULL] * 2, "head_dim": 16},
    # A scale of 1 keeps the logits large enough to compare.
    "cohere2": {"sliding_window": 6, "layer_types": [SLIDING, FULL] * 2, "attention_bias": True, "logit_scale": 1.25},
    "apertus": {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    # Factors that keep the logits large enough to compare.
    "granite": {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6, "attention_multiplier": 0.4, "logits_scaling": 0.8,
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16, "use_bias": True},
    "hunyuan_v1_dense": {
        "head_dim": 16, "attention_bias": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "head_dim": 16},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True, "moe_intermediate_size": 24,
                  "head_dim": 16, "mlp_only_layers": [0]},
    "glm4_moe": {
        "head_dim": 16, "attention_bias": True, "use_qk_norm": True, "moe_intermediate_size": 12, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 1.7,
    },
    # A sum of weights that is often less than the least.
    "ernie4_5_moe": {
        "head_dim": 16, "moe_intermediate_size": 12, "moe_num_experts": 8, "moe_k": 3,
        "moe_num_shared_experts": 2, "moe_layer_end_index": 2, "moe_norm_min": 0.4,
    },
    "granitemoe": {
        "attention_bias": True, "tie_word_embeddings": True, "num_local_experts": 4, "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.4, "logits_scaling": 0.8,
    },
    "hunyuan_v1_moe": {
        "head_dim": 16, "attention_bias": True, "num_experts": 4, "moe_topk": 2,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
    },
    # A limit that the experts' inner values reach.
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "head_dim": 16, "swiglu_limit": 0.8,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        },
    },
    # Global layers without v_proj, with larger heads of which a part is rotated.
    "gemma4_text": GEMMA4
    | {
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 3,
        "moe_intermediate_size": 24,
    },
    "gemma4_unified_text": GEMMA4,
    # Tokens beyond the second table, feed-forwards of two widths, half of the gates sparse, half of the keys shared.
    "gemma3n_text": {
        "vocab_size_per_layer_input": 80, "hidden_size_per_layer_input": 8, "sliding_window": 6, "head_dim": 8,
        "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2, "intermediate_size": [48, 48, 40, 40],
        "activation_sparsity_pattern": [0.7, 0.7, 0.0, 0.0], "laurel_rank": 6, "altup_num_inputs": 3,
        "altup_active_idx": 1, "final_logit_softcapping": 4.0,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}  # fmt: skip
# Families whose norms multiply by 1 + weight. A delta-net's own norm does not.
OFFSET_NORMS = {"gemma", "gemma2", "gemma3_text", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"}
# Where float32 would differ by more than the tolerance if the weights were as wide as those of others.
STDDEV = dict.fromkeys(
    ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "granitemoehybrid", "nemotron_h", "llama4_text"), 0.1
)
# Families whose answers in transformers depend on the padding before a prompt, so that each prompt is asked alone.
PADDING_COUNTS = {"granitemoehybrid", "lfm2", "llama4_text", "nemotron_h"}
# Families for which transformers has no class with a score head.
NO_REWARD_MODEL = {
    "apertus", "cohere2", "ernie4_5", "ernie4_5_moe", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm4_moe",
    "glm4_moe_lite", "granite", "granitemoe", "granitemoehybrid", "internlm3", "lfm2", "lfm2_moe", "llama4_text",
    "nemotron_h", "qwen3_5_moe_text",
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 96, (2, 20))
PROMPTS = [np.random.default_rng(n).integers(1, 96, n).tolist() for n in (16, 3, 12, 1)]


def test_every_family_has_an_entry():
    assert set(models.families()) == set(TINY)


def center(kind, name):
    """The mean of a tensor's drawn values."""
    if kind in OFFSET_NORMS and "linear_attn" not in name:
        return 0.0
    # There the scores are q k^T itself; larger ones make a softmax so sharp that float32's rounding shows.
    if kind.startswith(("gemma3n", "gemma4")) and ("q_norm" in name or "k_norm" in name):
        return 0.5
    return float("norm" in name or name.endswith(("layer_scalar", "router.scale", "per_expert_scale")))


class Case:
    """A family's tiny model as a folder, as transformers' module and as ours."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        config = transformers.AutoConfig.for_model(kind, **SMALL | TINY[kind])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            # Wide, norms and biases included, so that every parameter shows in the logits.
            buffers = [(name, x) for name, x in model.named_buffers() if name in model.state_dict()]
            for name, parameter in (*model.named_parameters(), *buffers):
                parameter.normal_(
                    center(kind, name), 0.1 if parameter.ndim == 1 else STDDEV.get(kind, 0.2), generator=generator
                )
                if name.endswith("A_log"):  # from slow to fast decays
                    parameter.uniform_(-3.0, 2.5, generator=generator)
        model.save_pretrained(folder)
        self.hf = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))

    def theirs(self):
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @functools.cached_property
    def ours(self):
        return load_model(self.folder)


# Families whose layers are those of another one in other sizes: their further checks are in `make test-all`.
ALIKE = {
    "deepseek_v2", "ernie4_5", "ernie4_5_moe", "gemma", "gemma4_unified_text", "glm", "glm4_moe_lite", "granite",
    "granitemoe", "hunyuan_v1_dense", "internlm3", "lfm2", "mistral", "olmo2", "qwen3_5_moe_text", "seed_oss",
    "smollm3",
}  # fmt: skip
KINDS = sorted(models.families())
WITH_EXPERTS = [kind for kind in KINDS if any("experts" in name for name in TINY.get(kind, ()))]
each_family = pytest.mark.parametrize("case", KINDS, indirect=True, scope="module")
each_kind = pytest.mark.parametrize(
    "case",
    [pytest.param(kind, marks=pytest.mark.slow) if kind in ALIKE else kind for kind in KINDS],
    indirect=True,
    scope="module",
)


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    if request.param not in TINY:
        pytest.fail(f"{request.param} has no tiny config in TINY")
    return Case(request.param, str(tmp_path_factory.mktemp(request.param)))


@each_kind
def test_scores_of_a_reward_model(case, tmp_path):
    """It has a score head in place of the LM head, and is a class of transformers."""
    if case.kind in NO_REWARD_MODEL:
        with pytest.raises(ModelError, match="no class for reward models"):
            load_model(case.folder, head="score")
        return
    loaded = load_model(case.folder, head="score")
    loaded.module.value.weight.set_value(jax.random.normal(jax.random.key(1), (SMALL["hidden_size"],)))
    write_weights(loaded.module, str(tmp_path))
    write_config(str(tmp_path), loaded.hf_config, dtype="float32")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(theirs).__name__ == loaded.module.config.score_architecture() == loaded.hf_config["architectures"][0]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)).logits[:, 0].numpy()
    np.testing.assert_allclose(loaded.scores(TOKENS.tolist()), expected, rtol=1e-4, atol=1e-4)


@each_family
def test_logits(case):
    with torch.no_grad():
        expected = case.theirs()(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(case.ours.logits(TOKENS), expected, rtol=0, atol=1e-5)


@each_family
def test_gradients_of_the_mean_loss(case):
    reference = case.theirs()
    loss = reference(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss
    loss.backward()
    # As files have them: transformers 5 keeps the experts of a layer in one tensor, its files do not.
    expected = revert_weight_conversion(
        reference, {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    )
    from_files = case.ours.module.config.from_files
    expected = {from_files(name): grad.numpy() for name, grad in expected.items()}
    graphdef, state = nnx.split(case.ours.module)
    weights = np.ones(TOKENS.shape, np.float32)
    weights[:, -1] = 0
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    batch = Batch(*map(jnp.asarray, (TOKENS, np.roll(TOKENS, -1, axis=1), weights, positions, np.ones_like(TOKENS))))

    def mean_loss(state):
        sums = sft_loss(nnx.merge(graphdef, state), batch, None)
        return sums.total / sums.weight

    value, grads = jax.jit(jax.value_and_grad(mean_loss))(state)
    assert float(value) == pytest.approx(loss.item(), abs=1e-5)
    grads, constants, seen = flatten(grads)[0], flatten(nnx.state(case.ours.module, Constant))[0], set()
    for path, placed in param_tensors(case.ours.module).items():
        for piece in placed.pieces:
            if path in constants:  # a buffer of transformers' module, which is never trained
                assert piece.hf not in expected
                continue
            part = np.asarray(grads[path][piece.at])
            np.testing.assert_allclose(
                placed.transform.to_hf(part), expected[piece.hf], rtol=0, atol=1e-4, err_msg=piece.hf
            )
            seen.add(piece.hf)
    assert seen == set(expected)


def greedy(model, prompts):
    """transformers' answers to prompts in one batch, the shorter ones padded in front."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(padded, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=0)
    return out[:, longest:].tolist()


@each_kind
def test_greedy_generation(case):
    theirs = case.theirs()
    groups = [[p] for p in PROMPTS] if case.kind in PADDING_COUNTS else [PROMPTS]
    expected = [answer for prompts in groups for answer in greedy(theirs, prompts)]
    # Three slots for four prompts: one waits, and takes over a cache that another row has filled.
    ours = generate_tokens(case.ours.module, PROMPTS, sampling=Sampling(max_new_tokens=32), slots=3)
    assert [list(r.tokens) for r in ours] == expected


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "phi3", "qwen3_5_text", "llama4_text"])
def test_documents_that_share_their_prompt_are_as_if_each_were_alone(kind, tmp_path):
    """Windows, chunks, sinks, softcaps, and rotations that depend on the length of a document."""
    model = Case(kind, str(tmp_path)).ours.module
    answers = [TOKENS[0, :n] for n in (9, 4, 12)]
    rollouts = [
        Rollout(
            prompt=Prompt(tokens=TOKENS[1, :11], mask=np.zeros(11, np.uint8), row=0, messages="", where=""),
            number=n, group=0, tokens=tokens, sampled=np.ones(len(tokens), bool), logprobs=np.zeros(len(tokens)),
            finish_reason="stop", text="",
        )
        for n, tokens in enumerate(answers)
    ]  # fmt: skip
    packed = pack_with_shared_prompts(rollouts, max_length=48, pad_id=0)
    together = packed.tokens_of(np.asarray(policy_logps(model, jax.tree.map(jnp.asarray, packed.batch))))
    for one, logps in zip(rollouts, together, strict=True):
        alone = pack_rollouts([one], max_length=48, pad_id=0)
        expected = alone.tokens_of(np.asarray(policy_logps(model, jax.tree.map(jnp.asarray, alone.batch))))
        np.testing.assert_allclose(logps, expected[0], rtol=0, atol=1e-5)


@each_family
def test_weights_and_config_survive_the_way_in_and_out(case, tmp_path):
    from safetensors.numpy import load_file

    write_weights(case.ours.module, str(tmp_path))
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (case.folder, tmp_path))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name].view(np.uint32), after[name].view(np.uint32), err_msg=name)
    config = models.config_from_hf(case.hf)
    assert models.config_from_hf(config.to_hf()) == config
    theirs = transformers.AutoConfig.for_model(**config.to_hf()).to_dict()
    assert models.config_from_hf(theirs) == config


@each_family
def test_an_unknown_field_is_refused(case):
    with pytest.raises(ModelError, match=r"window_scale=3 \(unknown\)"):
        models.config_from_hf(case.hf | {"window_scale": 3})
    without = {k: v for k, v in case.hf.items() if k != "num_hidden_layers"}
    if case.kind == "nemotron_h":  # whose types of layers say their number
        assert models.config_from_hf(without) == models.config_from_hf(case.hf)
        return
    with pytest.raises(ModelError, match="lacks num_hidden_layers|layer_types must name|no_rope_layers must have"):
        models.config_from_hf(without)


@each_kind
def test_eight_devices_equal_one(case):
    mesh = make_mesh_plan(MeshConfig(fsdp=4, tensor=2))
    split = load_model(case.folder, mesh=mesh)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(split.module)))
    graphdef, state = nnx.split(split.module)

    def logits(state, tokens_BS):
        module = nnx.merge(graphdef, state)
        return module.unembed(module(tokens_BS)[0])

    rows = np.tile(TOKENS, (4, 1))  # as many as the mesh splits
    got = jax.jit(mesh.bind(logits))(state, jax.device_put(rows, mesh.batch_sharding()))
    np.testing.assert_allclose(got, np.tile(case.ours.logits(TOKENS), (4, 1, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(kind, marks=() if kind in ("glm4_moe", "llama4_text") else pytest.mark.slow)
        for kind in WITH_EXPERTS
    ],
    indirect=True,
    scope="module",
)
def test_adapters_on_experts_mean_the_same_to_peft_or_are_refused(case, tmp_path):
    peft = pytest.importorskip("peft")
    loaded = load_model(case.folder)
    fused = any(group.moe is not None and group.moe.shape.fused for group in loaded.module.layers)
    gate = "" if case.kind == "nemotron_h" else "gate_proj,"
    targets = "gate_up_proj,down_proj" if fused else f"{gate}up_proj,down_proj"
    attach_adapter(loaded.module, AdapterConfig(r=2, alpha=4.0, target_modules=targets), 0)
    for i, adapter in enumerate(adapters(loaded.module).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.get_value().shape))
    if case.kind in REFUSED_EXPERTS:
        with pytest.raises(ModelError, match="does not load adapters on the experts of .*all-linear"):
            peft_format.write_adapter(loaded.module, str(tmp_path), base=case.folder)
        return
    peft_format.write_adapter(loaded.module, str(tmp_path), base=case.folder)
    ours = loaded.logits(TOKENS)
    assert np.abs(ours - case.ours.logits(TOKENS)).max() > 1e-2
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(case.theirs(), str(tmp_path))(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@each_kind
def test_adapters_on_every_linear_layer_mean_the_same_to_peft(case, tmp_path):
    peft = pytest.importorskip("peft")
    loaded = load_model(case.folder)
    settings = LoRASettings(r=2, alpha=4.0)
    attach(loaded.module, ["all-linear"], lora_factory(settings), jax.random.key(0))
    for i, adapter in enumerate(adapters(loaded.module).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.get_value().shape))
    peft_format.write_adapter(loaded.module, str(tmp_path), base=case.folder)
    ours = loaded.logits(TOKENS)
    assert np.abs(ours - case.ours.logits(TOKENS)).max() > 1e-2
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(case.theirs(), str(tmp_path))(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    again = load_model(case.folder)
    peft_format.read_adapter(again.module, str(tmp_path))
    (first, _), (second, _) = (flatten(nnx.state(m)) for m in (loaded.module, again.module))
    assert first.keys() == second.keys()
    for path in first:
        np.testing.assert_array_equal(first[path], second[path], err_msg=path)
