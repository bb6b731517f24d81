"""LoRA on SmolLM2-135M-Instruct: the intent of a customer's message, one of ten of Banking77.

`make quickstart` writes the folder of the base model, `python benchmarks/make_recipe_rows.py intents` the rows;
docs/recipes.md has the rest.
"""

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/smollm2-135m-intents"

    config.model.path = "runs/models/SmolLM2-135M-Instruct"
    config.model.remat = "dots"

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.train = "runs/data/intents/train.jsonl"
    config.data.eval = "runs/data/intents/heldout.jsonl"
    config.data.max_length = 512

    config.optim.learning_rate = 1e-3
    config.optim.adamw.b2 = 0.99
    config.optim.warmup_ratio = 0.1

    config.train.batch_size = 1
    config.train.epochs = 1.0
    config.train.log_every = 5

    config.eval.metric = "classification"
    config.eval.max_new_tokens = 24
    return with_arg(config, arg)
