"""GRPO with LoRA on SmolLM2-135M-Instruct: it learns to answer in JSON from rewards, without being shown an answer.

`make quickstart` writes the folder of the base model. The prompts are sentences about a person; the answers in their
rows are only compared with. Your own prompts and rewards (docs/rewards.md): `jaxft train
--config=configs/smollm2_135m_grpo.py --config.data.train=prompts.jsonl --config.data.eval=None
--config.rewards.functions=rewards.py:exact`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxft.assets import ASSETS
from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/smollm2-135m-grpo"

    config.model.path = "runs/models/SmolLM2-135M-Instruct"
    config.model.dtype = "float32"

    config.method.name = "grpo"
    config.rewards.functions = f"{Path(__file__).parent / 'reward_functions' / 'json_fields.py'}:fields"

    config.adapter.r = 16
    config.adapter.alpha = 32.0
    config.adapter.dropout = 0.0

    config.rollout.num_generations = 8
    config.rollout.max_completion_length = 40
    config.rollout.slots = 48

    config.data.train = str(ASSETS / "people" / "train.jsonl")
    config.data.eval = str(ASSETS / "people" / "heldout.jsonl")
    config.data.eval_limit = 32
    config.data.max_length = 384

    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 0
    config.optim.min_ratio = 1.0

    config.train.batch_size = 48
    config.train.steps = 8
    config.train.log_every = 1
    config.train.eval_every = 4
    config.checkpoint.every = 4

    config.eval.metric = "json_exact"
    config.eval.max_new_tokens = 64
    config.eval.limit = 32
    return with_arg(config, arg)
