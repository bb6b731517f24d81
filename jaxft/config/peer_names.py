"""What other fine-tuning programs call a setting, and which field of jaxft's has that meaning.

Their values are never taken over: a batch size per device, for example, is another number than one over all devices.
The names are those of TRL and transformers' TrainingArguments, axolotl, LLaMA-Factory, torchtune, Unsloth, litgpt and
MLX.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxft.errors import ConfigError, listed

PER_STEP = "which counts the sequences of an optimizer step over all devices"
DIVIDES = "which divides train.batch_size into parts, and does not multiply it"
# Field of jaxft -> (names elsewhere, what differs).
FIELDS: dict[str, tuple[str, str]] = {
    "model.path": (
        "model_name_or_path base_model model_name pretrained_model_name_or_path checkpoint_dir model_id hf_model",
        "",
    ),
    "model.revision": ("model_revision revision_of_model", ""),
    "model.dtype": ("torch_dtype bf16 fp16 dtype precision bfloat16", "and model.param_dtype for frozen weights"),
    "model.quantization": ("load_in_4bit load_in_8bit quantization_bit quantize use_qlora qlora", "such as nf4"),
    "model.remat": (
        "gradient_checkpointing activation_checkpointing enable_activation_checkpointing grad_checkpoint "
        "use_gradient_checkpointing",
        "",
    ),
    "adapter.kind": ("finetuning_type use_peft use_lora peft_type fine_tune_type peft", "none or lora"),
    "adapter.r": ("lora_r lora_rank peft_lora_r", ""),
    "adapter.alpha": ("lora_alpha peft_lora_alpha", ""),
    "adapter.dropout": ("lora_dropout", ""),
    "adapter.target_modules": (
        "lora_target lora_target_modules lora_target_linear lora_attn_modules lora_layers",
        "where all-linear means every linear layer but the LM head",
    ),
    "adapter.modules_to_save": ("lora_modules_to_save additional_target", ""),
    "adapter.use_dora": ("peft_use_dora lora_use_dora", ""),
    "adapter.use_rslora": ("peft_use_rslora", ""),
    "data.train": (
        "dataset dataset_name datasets train_file train_dataset data_path dataset_path train_files data_files", "",
    ),
    "data.eval": ("eval_dataset validation_file test_datasets val_dataset eval_file validation_dataset", ""),
    "data.eval_fraction": ("val_set_size val_size test_size validation_split_percentage", "a share of the rows"),
    "data.train_split": ("dataset_train_split dataset_split", ""),
    "data.eval_split": ("dataset_test_split", ""),
    "data.limit": ("max_samples max_train_samples", ""),
    "data.eval_limit": ("max_eval_samples", ""),
    "data.text_field": ("dataset_text_field field_text text_column", ""),
    "data.chat_template": ("template chat_template_path chat_template_jinja", "the path of a Jinja file"),
    "data.train_on": (
        "train_on_inputs train_on_prompt train_on_input train_on_source completion_only_loss assistant_only_loss "
        "mask_prompt train_on_responses_only",
        "one of assistant, last and all",
    ),
    "data.max_length": (
        "cutoff_len sequence_len max_seq_length max_seq_len model_max_length block_size seq_length", "",
    ),
    "data.packing": ("sample_packing neat_packing", ""),
    "optim.name": ("optimizer optimizer_name", ""),
    "optim.learning_rate": ("lr peak_lr", ""),
    "optim.schedule": ("lr_scheduler_type lr_scheduler lr_schedule", ""),
    "optim.warmup_steps": ("num_warmup_steps lr_warmup_steps warmup", ""),
    "optim.warmup_ratio": ("warmup_fraction lr_warmup_ratio", ""),
    "optim.clip_norm": ("max_grad_norm clip_grad_norm gradient_clip_val max_norm grad_clip", ""),
    "optim.adamw.b1": ("adam_beta1 beta1", ""),
    "optim.adamw.b2": ("adam_beta2 beta2", ""),
    "optim.adamw.eps": ("adam_epsilon", ""),
    "method.name": ("stage rl trl_method", "such as sft or dpo"),
    "method.dpo.beta": ("pref_beta dpo_beta rl_beta", ""),
    "train.batch_size": (
        "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size train_batch_size global_batch_size bs",
        PER_STEP,
    ),
    "train.accumulation_steps": (
        "gradient_accumulation_steps grad_accum accumulate_grad_batches gradient_accumulation grad_accumulation_steps "
        "accumulation",
        DIVIDES,
    ),
    "train.epochs": ("num_train_epochs num_epochs n_epochs epoch", ""),
    "train.steps": ("max_steps max_train_steps iters num_steps max_iters total_steps", ""),
    "train.log_every": ("logging_steps log_every_n_steps steps_per_report log_interval", ""),
    "train.eval_every": (
        "eval_steps eval_strategy evaluation_strategy steps_per_eval eval_interval",
        "in steps; train.eval_every_epochs in epochs",
    ),
    "train.report_to": ("wandb_project wandb mlflow use_wandb logger_name", "such as wandb"),
    "train.eval_every_epochs": ("evals_per_epoch", "the inverse"),
    "train.early_stopping_patience": ("early_stopping_patience early_stop_patience early_stopping", ""),
    "checkpoint.every": ("save_steps save_strategy save_interval", "in steps; checkpoint.every_epochs in epochs"),
    "checkpoint.every_epochs": ("saves_per_epoch", "the inverse"),
    "checkpoint.keep": ("save_total_limit", ""),
    "checkpoint.best_metric": ("metric_for_best_model", ""),
    "export.checkpoint": ("load_best_model_at_end", "best"),
    "eval.batch_size": ("per_device_eval_batch_size eval_batch_size", ""),
    "rewards.functions": ("reward_funcs reward_functions", ""),
    "rollout.num_generations": ("num_samples num_return_sequences group_size", ""),
    "rollout.max_completion_length": ("max_response_length response_length", ""),
    "mesh.fsdp": ("deepspeed fsdp_config fsdp_version tensor_parallel_degree dp_shard", "and the other mesh fields"),
    "output_dir": ("save_dir run_dir out_dir output_path adapter_path", ""),
    "seed": ("random_seed data_seed random_state", ""),
}  # fmt: skip
NAMES = {name: field for field, (names, _) in FIELDS.items() for name in names.split()}
# A file with one of these keys, or with a `_component_` in a section, is of this program.
PROGRAMS = {
    "axolotl": ("base_model", "micro_batch_size", "sequence_len", "datasets", "sample_packing"),
    "LLaMA-Factory": ("finetuning_type", "cutoff_len", "stage", "do_train", "lora_target"),
    "TRL": ("dataset_name", "model_name_or_path", "per_device_train_batch_size"),
    "MLX": ("fine_tune_type", "iters", "mask_prompt"),
}


def field_for(name: str) -> tuple[str, str] | None:
    """(field of jaxft, what differs) for another program's name of a setting; None for a name that is not known."""
    field = NAMES.get(name.replace("-", "_"))
    return None if field is None else (field, FIELDS[field][1])


def correspondence(name: str) -> str | None:
    """`"lr is optim.learning_rate"`, with what differs; None for a name that is not known."""
    field = field_for(name)
    return field and f"{name} is {field[0]}" + (f", {field[1]}" if field[1] else "")


def refuse_peer_config(values: Mapping[str, Any], path: str) -> None:
    """Raises ConfigError for the config of another program, with the fields that its own correspond to."""
    program = _program(values)
    names = [name for name in (*values, *_inner(values)) if name in NAMES]
    if program is None and not any(name in values for name in names):
        return
    lines = [text for name in dict.fromkeys(names) if (text := correspondence(name)) is not None]
    raise ConfigError(
        f"{path} is a config of {program or 'another program'}, and is not converted, because equal names may mean "
        "something else. Write the fields of jaxft in sections (model:, data:, train:, ...), or as flags:\n"
        f"{listed(lines, 40, lines=True)}\nThe others are in docs/configuration.md."
    )


def _program(values: Mapping[str, Any]) -> str | None:
    if any(isinstance(own, Mapping) and "_component_" in own for own in values.values()):
        return "torchtune"
    counts = {program: sum(key in values for key in keys) for program, keys in PROGRAMS.items()}
    best = max(counts, key=lambda program: counts[program])
    return best if counts[best] else None


def _inner(values: Mapping[str, Any]) -> Iterable[str]:
    return [name for own in values.values() if isinstance(own, Mapping) for name in own]
