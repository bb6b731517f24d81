"""LoRA on SmolLM2-135M-Instruct: careless notes rewritten in a house style, with its dates, hours and prices.

`make quickstart` writes the folder of the base model, `python benchmarks/make_recipe_rows.py style` the rows;
docs/recipes.md has the rest.
"""

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/smollm2-135m-style"

    config.model.path = "runs/models/SmolLM2-135M-Instruct"
    config.model.remat = "dots"

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.train = "runs/data/style/train.jsonl"
    config.data.eval = "runs/data/style/heldout.jsonl"
    config.data.max_length = 512

    config.optim.learning_rate = 1.5e-3
    config.optim.adamw.b2 = 0.99
    config.optim.warmup_ratio = 0.1

    config.train.batch_size = 1
    config.train.epochs = 2.0
    config.train.log_every = 5

    # Whether all of it is right, and whether it has the form at all.
    config.eval.metric = "exact_match,regex"
    config.eval.pattern = r"^[A-Z][a-z ]+: \d{4}-\d\d-\d\d, \d\d:\d\d\. EUR [\d,]+\.\d\d\.$"
    config.eval.max_new_tokens = 48
    return with_arg(config, arg)
