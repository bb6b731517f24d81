"""LoRA on the text model of Qwen3.6 35B-A3B, the frozen base in bfloat16, split over all devices.

Attention, delta-nets and shared experts get adapters, the other experts and the routers none. Meant for 16 chips of
16 GiB, one sequence each: each chip gathers all experts of a layer before it uses them, and with more rows this
costs less per token. Compiled for the slice below, but never run with the real weights nor on an accelerator. The
sizes of the layers are those of Qwen3.5 35B-A3B. Rows: `--config.data.train=...`.

Planned for v5e:4x4: 16 x 4,096 tokens, 13.80 of 15.75 GiB HBM, 1,473 tokens/s a chip; 1,000 steps: 0.77 h, USD 14.83
"""

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/qwen3.6-35b-a3b-lora"

    config.model.path = "hf://Qwen/Qwen3.6-35B-A3B"
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
