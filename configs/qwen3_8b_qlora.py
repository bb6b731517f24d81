"""QLoRA on Qwen3 8B: the frozen base as NF4 with double quantisation, on the smallest chips that clouds lend.

Meant for one chip or GPU of 15 GB or more, one sequence at a time, four per update. No account is needed for the
weights. The rows are those of the quickstart; give your own with `--config.data.train=... --config.data.eval=...`.
`notebooks/qlora_8b.ipynb` goes through this run step by step. Compiled for the slice below and run as `:smoke`, but
never run with the real weights nor on an accelerator.

Planned for v5e:1x1: 4 x 1,024 tokens, 9.56 of 15.75 GiB HBM, 1,771 tokens/s a chip; 1,000 steps: 0.64 h, USD 0.77
"""

from ml_collections import ConfigDict

from jaxft.assets import ASSETS
from jaxft.config import default_config
from jaxft.config.smoke import with_arg


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config()
    config.output_dir = "runs/qwen3-8b-qlora"

    config.model.path = "hf://Qwen/Qwen3-8B"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"
    config.model.remat = "auto"
    config.model.quantization = "nf4-dq"
    config.mesh.fsdp = -1

    config.adapter.r = 16
    config.adapter.alpha = 32.0

    config.data.train = str(ASSETS / "quickstart" / "train.jsonl")
    config.data.eval = str(ASSETS / "quickstart" / "heldout.jsonl")
    config.data.max_length = 1024
    config.data.truncation = "drop"
    # The rows have no thoughts, so the model learns to answer at once, as it is then asked to.
    config.data.chat_template_kwargs = {"enable_thinking": False}

    config.optim.learning_rate = 1e-4
    config.optim.warmup_ratio = 0.1

    config.train.epochs = 3.0
    config.train.batch_size = 4
    config.train.accumulation_steps = 4
    config.train.log_every = 1
    config.train.eval_every = 10
    config.checkpoint.every = 5

    config.eval.metric = "json_exact"
    config.eval.max_new_tokens = 48
    config.eval.limit = 16
    return with_arg(config, arg)
