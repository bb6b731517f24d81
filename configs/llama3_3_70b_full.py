"""Full fine-tuning of Llama 3.3 70B Instruct: float32 weights and moments, split over all devices.

Meant for 16 chips of 95 GiB, one sequence each. Compiled for the slice below, but never run with the real weights
nor on an accelerator. Access to the weights is granted on the Hugging Face hub; log in first (`hf auth login`).
Rows: `--config.data.train=...`.

Planned for v5p:2x2x4: 16 x 4,096 tokens, 77.62 of 95.74 GiB HBM, 617 tokens/s a chip; 1,000 steps: 1.85 h, USD 124.00
"""

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/llama3.3-70b-full"

    config.model.path = "hf://meta-llama/Llama-3.3-70B-Instruct"
    config.model.dtype = "bfloat16"
    # The type of frozen weights. No weight is frozen here, and trained weights are float32 anyway.
    config.model.param_dtype = "bfloat16"
    config.model.remat = "auto"
    config.mesh.fsdp = -1

    config.adapter.kind = "none"

    config.data.train = "data/train.jsonl"
    config.data.eval_fraction = 0.02
    config.data.max_length = 4096
    config.data.truncation = "drop"

    config.optim.learning_rate = 1e-5
    config.optim.warmup_ratio = 0.03
    config.optim.weight_decay = 0.01
    config.optim.adamw.b2 = 0.95

    config.train.batch_size = 16
    config.train.eval_every = 50
    config.checkpoint.every = 100
    config.checkpoint.keep = 1
    return with_arg(config, arg)
