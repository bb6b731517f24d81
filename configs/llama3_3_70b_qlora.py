"""QLoRA on Llama 3.3 70B Instruct: the frozen base as NF4 with double quantisation, on four small chips.

Meant for four chips of 16 GiB that share each sequence, four sequences per update. Compiled for the slice below and
run as `:smoke`, but never run with the real weights nor on an accelerator. Access to the weights is granted on the
Hugging Face hub; log in first (`hf auth login`). Rows: `--config.data.train=...`.

Planned for v5e:2x2: 4 x 4,096 tokens, 13.82 of 15.75 GiB HBM, 200 tokens/s a chip; 1,000 steps: 5.68 h, USD 27.26
"""

from ml_collections import ConfigDict

from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/llama3.3-70b-qlora"

    config.model.path = "hf://meta-llama/Llama-3.3-70B-Instruct"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat = "auto"
    config.model.quantization = "nf4-dq"
    config.mesh.fsdp = -1
    config.mesh.tensor = 4

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.train = "data/train.jsonl"
    config.data.eval_fraction = 0.02
    config.data.max_length = 4096
    config.data.truncation = "drop"

    config.optim.learning_rate = 1e-4
    config.optim.warmup_ratio = 0.03

    config.train.batch_size = 4
    config.train.accumulation_steps = 4
    config.train.eval_every = 50
    config.checkpoint.every = 50
    config.checkpoint.best_metric = "eval_loss"
    return with_arg(config, arg)
