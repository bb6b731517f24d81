"""LoRA on SmolLM2-135M-Instruct: GSM8K's problems in short steps that end in a line `#### NUMBER`.

`make quickstart` writes the folder of the base model, `python benchmarks/make_recipe_rows.py reasoning` the rows;
docs/recipes.md has the rest. A model of this size learns the form, and hardly to calculate: take a larger one with
`--model`.
"""

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/smollm2-135m-reasoning"

    config.model.path = "runs/models/SmolLM2-135M-Instruct"
    config.model.remat = "dots"

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.train = "runs/data/reasoning/train.jsonl"
    config.data.eval = "runs/data/reasoning/heldout.jsonl"
    config.data.eval_limit = 200
    config.data.max_length = 512

    config.optim.learning_rate = 5e-4
    config.optim.warmup_ratio = 0.03

    config.train.batch_size = 8
    config.train.epochs = 1.0
    config.train.log_every = 10
    config.checkpoint.every = 50

    # The number behind the last mark; an answer without the mark is wrong.
    config.eval.metric = "regex"
    config.eval.pattern = r"#### *\$?(-?[\d,.]*\d)"
    config.eval.max_new_tokens = 256
    return with_arg(config, arg)
