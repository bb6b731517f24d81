"""QLoRA on the language model of Gemma 4 31B: the frozen base as NF4 with double quantisation, on four chips.

The image tower is left out; the adapter is written for the whole folder. Meant for four chips of 16 GiB, one
sequence a chip. Compiled for the slice below, but never run with the real weights nor on an accelerator. Access to
the weights is granted on the Hugging Face hub; log in first (`hf auth login`). Rows: `--config.data.train=...`.

Planned for v5e:2x2: 4 x 4,096 tokens, 14.43 of 15.75 GiB HBM, 479 tokens/s a chip; 1,000 steps: 2.37 h, USD 11.39
"""

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/gemma4-31b-qlora"

    config.model.path = "hf://google/gemma-4-31b-it"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat = "auto"
    config.model.quantization = "nf4-dq"
    config.mesh.fsdp = -1

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.train = "data/train.jsonl"
    config.data.eval_fraction = 0.02
    config.data.max_length = 4096
    config.data.truncation = "drop"

    config.optim.learning_rate = 1e-4
    config.optim.warmup_ratio = 0.03

    config.train.batch_size = 4
    config.train.eval_every = 50
    config.checkpoint.every = 50
    config.checkpoint.best_metric = "eval_loss"
    return with_arg(config, arg)
