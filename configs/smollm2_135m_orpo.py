"""ORPO with LoRA on SmolLM2-135M-Instruct: chosen answers are learned, and preferred to rejected ones; no reference.

`make quickstart` writes the folder of the base model. Give your own pairs (docs/preferences.md):
`jaxft train --config=configs/smollm2_135m_orpo.py --config.data.train=pairs.jsonl`.
"""

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/smollm2-135m-orpo"
    config.method.name = "orpo"
    config.method.orpo.beta = 0.1

    config.model.path = "runs/models/SmolLM2-135M-Instruct"

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.train = "pairs.jsonl"
    config.data.eval_fraction = 0.05
    config.data.max_length = 1024

    config.optim.learning_rate = 2e-4
    config.optim.warmup_ratio = 0.05
    config.optim.min_ratio = 0.1

    config.train.batch_size = 8
    config.train.epochs = 1.0
    config.train.log_every = 5
    config.train.eval_every = 10
    config.checkpoint.every = 10
    config.checkpoint.best_metric = "eval_loss"
    return with_arg(config, arg)
