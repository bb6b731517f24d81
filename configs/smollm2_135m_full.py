"""Full fine-tuning of SmolLM2-135M-Instruct: every weight is trained, so the whole model is written.

`make quickstart` writes the folder of the base model. The learning rate is less than a tenth of LoRA's, and only
matrices have weight decay.
"""

from ml_collections import ConfigDict

from jaxft.assets import ASSETS
from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/smollm2-135m-full"

    config.model.path = "runs/models/SmolLM2-135M-Instruct"
    # The optimizer keeps two moments of every weight; recomputing the layers saves some memory in return.
    config.model.remat = "full"

    config.adapter.kind = "none"

    config.data.train = str(ASSETS / "quickstart" / "train.jsonl")
    config.data.eval = str(ASSETS / "quickstart" / "heldout.jsonl")
    config.data.max_length = 512

    config.optim.learning_rate = 5e-5
    config.optim.schedule = "linear"
    config.optim.warmup_ratio = 0.1
    config.optim.weight_decay = 0.01

    config.train.batch_size = 8
    config.train.epochs = 2.0
    config.train.log_every = 5
    config.train.eval_every = 10
    config.checkpoint.every = 10
    # A checkpoint contains every weight and two moments of each.
    config.checkpoint.keep = 1

    config.eval.metric = "json_exact"
    config.eval.max_new_tokens = 64
    return with_arg(config, arg)
