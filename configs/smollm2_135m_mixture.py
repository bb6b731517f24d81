"""LoRA on SmolLM2-135M-Instruct on two sets in two stages: general conversation with a part of the task, then the task.

In the first 70 % of the steps, seven tokens in ten come from `general`; after that all come from `domain`. `jaxft data
--config=configs/smollm2_135m_mixture.py` shows how often each set is repeated, before anything is trained. To use your
own sets: `--config.data.mixture.general.path=rows.jsonl --config.data.mixture.general.split=None`.
"""

from ml_collections import ConfigDict

from jaxft.assets import ASSETS
from jaxft.config import default_config, mixture_set
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/smollm2-135m-mixture"

    config.model.path = "runs/models/SmolLM2-135M-Instruct"

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.mixture.general = mixture_set(
        path="hf://HuggingFaceTB/everyday-conversations-llama3.1-2k", split="train_sft", format="messages", weight=0.7
    )
    config.data.mixture.domain = mixture_set(path=str(ASSETS / "quickstart" / "train.jsonl"), weight=0.3, max_epochs=5)
    config.data.stages = "0.7: general, domain; 0.3: domain"
    config.data.eval = str(ASSETS / "quickstart" / "heldout.jsonl")
    config.data.max_length = 1024

    config.optim.learning_rate = 1e-3
    config.optim.warmup_ratio = 0.05
    config.optim.min_ratio = 0.1

    config.train.batch_size = 8
    config.train.steps = 40
    config.train.log_every = 5
    config.train.eval_every = 10
    config.checkpoint.every = 10
    config.checkpoint.best_metric = "eval_loss"

    config.eval.metric = "json_exact"
    config.eval.max_new_tokens = 64
    return with_arg(config, arg)
