"""LoRA on SmolLM2-135M-Instruct with everyday settings: a starting point for a config of your own.

`make quickstart` writes the folder of the base model; any other model that jaxft reads will do. Your own rows:
`jaxft train --config=smollm2_135m_lora --data=rows.jsonl --data.eval=None --data.eval_fraction=0.05
--eval.metric=exact_match --output=runs/mine`. For less
than about 500 rows add `--no_packing --batch_size=4 --epochs=3`, so that there are enough steps.
"""

from ml_collections import ConfigDict

from jaxft.assets import ASSETS
from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/smollm2-135m-lora"

    config.model.path = "runs/models/SmolLM2-135M-Instruct"

    config.adapter.r = 16
    config.adapter.alpha = 32.0
    config.adapter.dropout = 0.05

    config.data.train = str(ASSETS / "quickstart" / "train.jsonl")
    config.data.eval = str(ASSETS / "quickstart" / "heldout.jsonl")
    config.data.max_length = 512

    config.optim.learning_rate = 1e-3
    config.optim.warmup_ratio = 0.05
    config.optim.min_ratio = 0.1

    config.train.batch_size = 8
    config.train.epochs = 2.0
    config.train.log_every = 5
    config.train.eval_every = 10
    config.checkpoint.every = 10
    config.checkpoint.best_metric = "eval_loss"

    config.eval.metric = "json_exact"
    config.eval.max_new_tokens = 64
    return with_arg(config, arg)
