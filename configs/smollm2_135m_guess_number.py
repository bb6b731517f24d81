"""GRPO with LoRA on SmolLM2-135M-Instruct in a game of several turns: it finds a number that it is told is higher or
lower.

`make quickstart` writes the folder of the base model. The game ships with jaxft; configs/environments/shorten.py is an
environment of one's own. See docs/rewards.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/smollm2-135m-guess-number"

    config.model.path = "runs/models/SmolLM2-135M-Instruct"
    config.model.dtype = "float32"

    config.method.name = "grpo"
    config.rollout.environment = "guess_number"
    config.rollout.max_turns = 5

    config.adapter.r = 16
    config.adapter.alpha = 32.0
    config.adapter.dropout = 0.0

    config.rollout.num_generations = 8
    config.rollout.max_completion_length = 160

    config.data.train = str(Path(__file__).parent / "environments" / "guess_number.jsonl")
    config.data.eval_fraction = 0.25
    config.data.max_length = 288

    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 0
    config.optim.min_ratio = 1.0

    config.train.batch_size = 48
    config.train.steps = 10
    config.train.log_every = 1
    config.train.eval_every = 5
    config.checkpoint.every = 5

    config.eval.metric = None
    return with_arg(config, arg)
