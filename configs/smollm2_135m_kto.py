"""KTO on SmolLM2-135M-Instruct with LoRA: learning from single answers that are labelled good or bad.

`make quickstart` writes the folder of the base model. Rows have a prompt, a completion and a label, as
docs/preferences.md says. Your own: `jaxft train --config=configs/smollm2_135m_kto.py
--config.data.train=labelled.jsonl --config.data.eval=None --config.data.eval_fraction=0.05`.
"""

from ml_collections import ConfigDict

from jaxft.assets import ASSETS
from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/smollm2-135m-kto"

    config.model.path = "runs/models/SmolLM2-135M-Instruct"

    config.method.name = "kto"
    config.method.kto.beta = 0.1

    config.adapter.r = 16
    config.adapter.alpha = 32.0
    config.adapter.dropout = 0.0

    config.data.train = str(ASSETS / "smoke" / "labelled.jsonl")
    config.data.eval = str(ASSETS / "smoke" / "labelled_heldout.jsonl")
    config.data.max_length = 512

    config.optim.learning_rate = 1e-4
    config.optim.warmup_ratio = 0.1
    config.optim.min_ratio = 0.1

    config.train.batch_size = 8
    config.train.epochs = 1.0
    config.train.log_every = 5
    config.train.eval_every = 10
    config.checkpoint.every = 10
    config.checkpoint.best_metric = "eval_rewards/margins"
    return with_arg(config, arg)
