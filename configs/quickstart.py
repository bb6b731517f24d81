"""LoRA on SmolLM2-135M: customer messages to strict JSON, in minutes on two CPU cores.

`make quickstart` installs jaxft and runs it. `jaxft quickstart` only runs it. Once that has written runs/models,
`jaxft train --config=configs/quickstart.py` runs it too.
"""

from ml_collections import ConfigDict

from jaxft.assets import ASSETS
from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/quickstart"

    config.model.path = "runs/models/SmolLM2-135M-Instruct"
    config.model.remat = "dots"

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.train = str(ASSETS / "quickstart" / "train.jsonl")
    config.data.eval = str(ASSETS / "quickstart" / "heldout.jsonl")
    config.data.max_length = 512

    config.optim.learning_rate = 1.5e-3
    config.optim.adamw.b2 = 0.99  # the default 0.999 averages over more steps than the 80 of this run
    config.optim.warmup_ratio = 0.1

    config.train.batch_size = 1
    config.train.epochs = 1.0
    config.train.log_every = 5
    config.checkpoint.every = 20

    config.eval.metric = "json_exact"
    config.eval.max_new_tokens = 48
    config.export.merged = True
    return with_arg(config, arg)
