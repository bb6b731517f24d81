"""Checks of Hugging Face's `config.json`: every field is used, known to be harmless, or refused by name."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxft.errors import ModelError

# Not a field of files: `checkpoint.folders` adds it to the config.json of a model that is quantised in its files. The
# tensors that the files keep dense.
DENSE_TENSORS = "dense_tensors"
# Bookkeeping that does not change what the network computes. auto_map names code in the model's folder: families
# implemented here do not need it, so it is never run, and exports leave it out.
HARMLESS = frozenset(
    "architectures model_type transformers_version torch_dtype dtype use_cache _name_or_path name_or_path "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id "
    "initializer_range max_position_embeddings vocab_size auto_map pretraining_tp "
    "id2label label2id num_labels problem_type task_specific_params tokenizer_class finetuning_task "
    "output_attentions output_hidden_states return_dict chunk_size_feed_forward "
    "is_llama_config rope_interleaved transformers.js_config unsloth_version unsloth_fixed".split()
)
# Fields that transformers 4 wrote into every config: harmless only at these values.
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
    "rope_interleaved": False,
    "is_llama_config": True,
    "quantization_config": None,
}


def check_fields(hf: Mapping[str, Any], *, used: Iterable[str], must_equal: Mapping[str, Any]) -> None:
    """Raises ModelError naming every field that is neither used, nor harmless, nor at its one implemented value.

    used: fields that the family reads. must_equal: fields with only one implemented value, and that value.
    """
    known, expected = set(used), DEFAULTS | dict(must_equal)
    refused = []
    for name, value in sorted(hf.items()):
        if name in known:
            continue
        if name in expected:
            if value != expected[name] and value is not None:
                refused.append(f"{name}={value!r} (only {expected[name]!r} is implemented)")
        elif name not in HARMLESS and name != DENSE_TENSORS and value is not None:
            refused.append(f"{name}={value!r} (unknown)")
    if refused:
        raise ModelError(
            f"config.json of model_type {hf.get('model_type')!r} has fields that jaxft does not implement: "
            + "; ".join(refused)
            + ". Ignoring them would compute something other than the model's authors intended."
        )


def require(hf: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ModelError listing the fields that are missing."""
    missing = [name for name in names if hf.get(name) is None]
    if missing:
        raise ModelError(f"config.json of model_type {hf.get('model_type')!r} lacks {', '.join(missing)}")
