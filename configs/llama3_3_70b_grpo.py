"""GRPO with LoRA on Llama 3.3 70B Instruct: word problems of GSM8K, by whether the answers are right.

Meant for 16 large chips. While answers are sampled, eight chips share the weights; each eight have half of the rows.
Compiled for the slice below and run as `:smoke`, but never run with the real weights nor on an accelerator. Access to
the weights is granted on the Hugging Face hub; log in first (`hf auth login`). The prompts are made from GSM8K's files,
which are not part of jaxft, by the script that holds the reward:

    python configs/reward_functions/gsm8k.py < train.jsonl > data/gsm8k_train.jsonl
    python configs/reward_functions/gsm8k.py < test.jsonl > data/gsm8k_test.jsonl

Planned for v5p:2x2x4: 128 x 1,024 tokens, 37.62 of 95.74 GiB HBM, 612 tokens/s a chip; 1,000 steps: 3.72 h, USD 249.93
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/llama3.3-70b-grpo"

    config.model.path = "hf://meta-llama/Llama-3.3-70B-Instruct"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat = "auto"
    config.mesh.fsdp = -1

    config.method.name = "grpo"
    config.rewards.functions = f"{Path(__file__).parent / 'reward_functions' / 'gsm8k.py'}:right_number"
    config.rollout.num_generations = 8
    config.rollout.max_completion_length = 512
    config.rollout.slots = 128

    config.adapter.r = 16
    config.adapter.alpha = 32.0
    config.adapter.dropout = 0.0

    config.data.train = "data/gsm8k_train.jsonl"
    config.data.eval = "data/gsm8k_test.jsonl"
    config.data.eval_limit = 256
    config.data.max_length = 1024

    config.optim.learning_rate = 1e-5
    config.optim.warmup_steps = 10
    config.optim.min_ratio = 1.0

    config.train.batch_size = 128
    config.train.accumulation_steps = 4
    config.train.log_every = 1
    config.train.eval_every = 50
    config.checkpoint.every = 50
    config.checkpoint.best_metric = "eval_reward"
    return with_arg(config, arg)
