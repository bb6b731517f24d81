"""A reward model on SmolLM2-135M-Instruct, from pairs of a chosen and a rejected answer to the same prompt.

`make quickstart` writes the folder of the base model; any other language model that jaxft reads will do. The rows that
ship with jaxft are few and small. Your own: `jaxft train --config=configs/smollm2_135m_reward.py
--config.data.train=pairs.jsonl --config.data.eval=None --config.data.eval_fraction=0.05`. A column `margin` says by how
much the chosen answer is better. docs/reward_models.md explains the rest.
"""

from ml_collections import ConfigDict

from jaxft.assets import ASSETS
from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/smollm2-135m-reward"

    config.model.path = "runs/models/SmolLM2-135M-Instruct"
    config.method.name = "reward"

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.train = str(ASSETS / "smoke" / "pairs.jsonl")
    config.data.eval = str(ASSETS / "smoke" / "pairs_heldout.jsonl")
    config.data.max_length = 1024

    config.optim.learning_rate = 3e-4
    config.optim.warmup_ratio = 0.05
    config.optim.min_ratio = 0.1

    config.train.batch_size = 8
    config.train.epochs = 1.0
    config.train.log_every = 5
    config.train.eval_every = 10
    config.checkpoint.every = 10
    config.checkpoint.best_metric = "eval_accuracy"
    config.checkpoint.best_mode = "max"
    return with_arg(config, arg)
