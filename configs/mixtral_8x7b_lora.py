"""LoRA on the attention of Mixtral 8x7B Instruct, the frozen base in bfloat16, split over all devices.

Experts and routers are not trained. Meant for one TPU host, four sequences a chip: each chip gathers all experts of a
layer before it uses them, and with more rows this costs less per token. Compiled for the slice below, but never run
with the real weights nor on an accelerator. Rows: `--config.data.train=...`.

Planned for v5p:2x2x1: 16 x 4,096 tokens, 36.86 of 95.74 GiB HBM, 4,090 tokens/s a chip; 1,000 steps: 1.11 h, USD 18.69
"""

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/mixtral-8x7b-lora"

    config.model.path = "hf://mistralai/Mixtral-8x7B-Instruct-v0.1"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat = "auto"
    config.mesh.fsdp = -1

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.train = "data/train.jsonl"
    config.data.eval_fraction = 0.02
    config.data.max_length = 4096
    config.data.truncation = "drop"

    config.optim.learning_rate = 1e-4
    config.optim.warmup_ratio = 0.03

    config.train.batch_size = 16
    config.train.eval_every = 50
    config.checkpoint.every = 50
    config.checkpoint.best_metric = "eval_loss"
    return with_arg(config, arg)
