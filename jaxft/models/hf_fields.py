"""Checks of Hugging Face's `config.json`: every field is used, known to change no number, or refused by name."""

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from jaxft.errors import ModelError, did_you_mean

log = logging.getLogger(__name__)

# Not fields of files: `checkpoint.folders` adds them to a config.json that it opens. The tensors that a model which is
# quantised in its files keeps dense; the unknown fields that the user allows to be ignored.
DENSE_TENSORS, ALLOWED = "dense_tensors", "allow_unknown"
_OF_EXPERTS = frozenset(
    "n_group topk_group n_shared_experts first_k_dense_replace use_qk_norm routed_scaling_factor "
    "moe_intermediate_size num_experts_per_tok num_local_experts moe_num_shared_experts moe_layer_start_index "
    "moe_layer_end_index moe_layer_interval moe_norm_min".split()
)
# Fields in which null can only mean that they were left out. In others, such as sliding_window, it is a value.
NULL_IS_ABSENT = _OF_EXPERTS | frozenset(
    "rope_theta rope_local_base_freq rms_norm_eps tie_word_embeddings initializer_range max_position_embeddings "
    "attention_bias mlp_bias norm_topk_prob router_aux_loss_coef output_router_logits attention_out_bias qkv_bias "
    "bias layer_norm_eps logit_scale use_bias partial_rotary_factor embedding_multiplier residual_multiplier "
    "attention_multiplier logits_scaling full_attention_interval decoder_sparse_step mlp_only_layers "
    "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_interleave topk_method mlp_layer_types "
    "mamba_n_heads mamba_n_groups mamba_d_state mamba_d_conv mamba_expand mamba_proj_bias mamba_conv_bias "
    "shared_intermediate_size norm_eps layer_norm_epsilon use_conv_bias mamba_num_heads mamba_head_dim n_groups "
    "ssm_state_size conv_kernel time_step_min moe_shared_expert_intermediate_size conv_bias conv_L_cache block_ff_dim "
    "block_multiple_of block_ffn_dim_multiplier block_auto_adjust_ff_dim tie_embedding num_dense_layers "
    "use_expert_bias intermediate_size_mlp interleave_moe_layer_step moe_layers floor_scale attn_scale "
    "attn_temperature_tuning".split()
)
# Bookkeeping that does not change what the network computes. auto_map names code in the model's folder: families
# implemented here do not need it, so it is never run, and exports leave it out.
BOOKKEEPING = (
    "architectures model_type transformers_version torch_dtype dtype use_cache _name_or_path name_or_path "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id mask_token_id "
    "initializer_range max_position_embeddings vocab_size auto_map pretraining_tp "
    "id2label label2id num_labels problem_type task_specific_params tokenizer_class finetuning_task "
    "output_attentions output_hidden_states return_dict chunk_size_feed_forward "
    "is_llama_config rope_interleaved transformers.js_config unsloth_version unsloth_fixed "
    "_commit_hash _auto_class transformers_weights gradient_checkpointing "
    "original_vocab_size vocab_size_padded_to pad_vocab_size_multiple"
)
# How attention is computed, not what.
ATTENTION = (
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation "
    "_experts_implementation use_flash_attention use_flash_attention_2 use_flash_attn use_flash_attn_2 "
    "_flash_attn_2_enabled use_sdpa use_memory_efficient_attention use_xformers flash_attention use_fused_rms_norm "
    "use_fused_cross_entropy"
)
# Settings of generation, which transformers 4 wrote into config.json before there was a generation_config.json.
GENERATION = (
    "do_sample early_stopping num_beams num_beam_groups num_return_sequences temperature top_k top_p typical_p min_p "
    "max_length min_length max_new_tokens min_new_tokens max_time length_penalty diversity_penalty repetition_penalty "
    "encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids force_words_ids "
    "forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens remove_invalid_values "
    "exponential_decay_length_penalty output_scores output_logits return_dict_in_generate penalty_alpha "
    "epsilon_cutoff eta_cutoff renormalize_logits guidance_scale cache_implementation prefix stop_strings"
)
HARMLESS = frozenset(f"{BOOKKEEPING} {ATTENTION} {GENERATION} {DENSE_TENSORS} {ALLOWED}".split())
# Fields of other architectures that change nothing at these values.
OTHER_ARCHITECTURES: dict[str, Any] = {
    "attention_out_bias": False,
    "o_bias": False,
    "use_bias": False,
    "bias": False,
    "lm_head_bias": False,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "shared_expert_intermediate_size": 0,
    "n_shared_experts": 0,
    "num_shared_experts": 0,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
    "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "use_mrope": False,
}
# Fields that transformers writes for many architectures, and those above: harmless only at these values.
DEFAULTS: dict[str, Any] = {
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "torchscript": False,
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "rope_interleaved": False,
    "is_llama_config": True,
    "quantization_config": None,
    "compression_config": None,
    "attention_bias": False,
    "mlp_bias": False,
    **OTHER_ARCHITECTURES,
}
TOLD = frozenset(f"{ATTENTION} {GENERATION} qkv_bias".split()) | OTHER_ARCHITECTURES.keys()


def check_fields(hf: Mapping[str, Any], *, used: Iterable[str], must_equal: Mapping[str, Any]) -> None:
    """Raises ModelError naming every field that is neither used, nor harmless, nor at its one implemented value.

    used: fields that the family reads. must_equal: fields with only one implemented value, and that value. Fields that
    the user allows (`ALLOWED`) are passed over. Fields that usually mean something, but change nothing for this model,
    such as an attention implementation, are named in the log.
    """
    known, expected = {*used, *(hf.get(ALLOWED) or ())}, DEFAULTS | _biases(hf) | dict(must_equal)
    refused = {}
    for name, value in sorted(hf.items()):
        if name in known:
            continue
        if name in expected:
            if value != expected[name] and value is not None:
                refused[name] = f"{name}={value!r} (only {expected[name]!r} is implemented)"
        elif name not in HARMLESS and value is not None:
            refused[name] = f"{name}={value!r} (unknown)"
    if refused:
        raise ModelError(
            f"config.json of model_type {hf.get('model_type')!r} has fields that jaxft does not implement: "
            + "; ".join(refused.values())
            + ". Ignoring them would compute something other than the model's authors intended. "
            + allowing(refused)
        )
    neutral = [name for name in sorted(hf) if name in TOLD - known and hf[name] is not None]
    if neutral:
        _tell(tuple(neutral))


@functools.cache  # once in a process, however often the file is read
def _tell(names: tuple[str, ...]) -> None:
    log.info("config.json: fields that change nothing for this model are passed over: %s", ", ".join(names))


def tell_dropout(hf: Mapping[str, Any], names: Iterable[str]) -> None:
    """Says in the log that the dropout of these fields, which is for training, stays off here."""
    given = tuple(f"{name}={hf[name]!r}" for name in names if hf.get(name))
    if given:
        _tell_dropout(given)


@functools.cache
def _tell_dropout(given: tuple[str, ...]) -> None:
    log.info("config.json: dropout inside the model stays off in training: %s", ", ".join(given))


def allowing(names: Iterable[str]) -> str:
    """How a user lets fields of config.json be ignored, as a sentence."""
    names = list(names)
    flags = " ".join(f"--allow-unknown={name}" for name in names)
    return (
        "If they change nothing for this model, or you take the responsibility, have them ignored by "
        f"{flags} (model.allow_unknown={','.join(names)!r} in a config): exports then leave them out."
    )


def with_allowed(hf: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """config.json with the unknown fields that the user allows to be ignored; a file cannot allow any itself.

    Raises ModelError for a name that occurs nowhere in it.
    """
    names, hf = list(names), {name: value for name, value in hf.items() if name not in (DENSE_TENSORS, ALLOWED)}
    if not names:
        return hf
    there = {name for fields in _objects(hf) for name in fields}
    for name in names:
        if name not in there:
            raise ModelError(
                f"allow_unknown names {name!r}, which is no field of config.json.{did_you_mean(name, there)}"
            )
    return hf | {ALLOWED: names}


def without_allowed(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the fields that were ignored, for exports."""
    ignored = {*(hf.get(ALLOWED) or ()), ALLOWED}
    return {name: value for name, value in hf.items() if name not in ignored}


def _objects(hf: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    yield hf
    for value in hf.values():
        if isinstance(value, Mapping):
            yield from _objects(value)


def _biases(hf: Mapping[str, Any]) -> dict[str, Any]:
    # Another name for the biases of queries, keys and values.
    return {"qkv_bias": bool(hf.get("attention_bias"))}


def require(hf: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ModelError listing the fields that are missing."""
    missing = [name for name in names if hf.get(name) is None]
    if missing:
        raise ModelError(f"config.json of model_type {hf.get('model_type')!r} lacks {', '.join(missing)}")
