"""DPO with LoRA on Llama 3.1 8B Instruct, against the frozen base in bfloat16, which is split over all devices.

The base is also the reference, so there is no second model. Meant for one TPU host, two sequences a chip, or a few
GPUs; a sequence holds both answers of a pair, each with its prompt. Compiled for the slice below and run as `:smoke`,
but never run with the real weights nor on an accelerator. Access to the weights is granted on the Hugging Face hub;
log in first (`hf auth login`). Pairs: `--config.data.train=...`.

Planned for v5e:2x4: 16 x 4,096 tokens, 7.55 of 15.75 GiB HBM, 2,474 tokens/s a chip; 1,000 steps: 0.92 h, USD 8.83
"""

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/llama3.1-8b-dpo"
    config.method.name = "dpo"
    config.method.dpo.beta = 0.1

    config.model.path = "hf://meta-llama/Llama-3.1-8B-Instruct"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat = "auto"
    config.mesh.fsdp = -1

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.train = "data/pairs.jsonl"
    config.data.eval_fraction = 0.02
    config.data.max_length = 4096
    config.data.truncation = "drop"

    config.optim.learning_rate = 1e-5
    config.optim.warmup_ratio = 0.1

    config.train.batch_size = 16
    config.train.eval_every = 50
    config.checkpoint.every = 50
    config.checkpoint.best_metric = "eval_loss"
    return with_arg(config, arg)
