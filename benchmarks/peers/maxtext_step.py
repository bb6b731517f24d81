"""MaxText's training step, compiled by its own `train_compile`, which reads no weights and needs no TPU.

Runs in MaxText's environment: `python maxtext_step.py FOLDER TOPOLOGY BATCH_PER_DEVICE LENGTH LAYERS`. Llama 3.1 8B,
all parameters, float32 weights and moments with bfloat16 compute, full rematerialisation, weights sharded over all
devices, as MaxText's base config has it, but without dataset and checkpoints.
"""

import os
import sys
from pathlib import Path
from typing import Any

from record import ENVIRONMENT, record

# Must be set before JAX starts.
os.environ.update(ENVIRONMENT)

import maxtext
from maxtext.trainers.pre_train import train_compile

LAYERS = 32


def main(folder: str, topology: str, batch_per_device: str, length: str, layers: str) -> None:
    original = train_compile.jit_and_compile

    def recorded(*args: Any, **kwargs: Any) -> Any:
        return record(lambda: original(*args, **kwargs), Path(folder), ("maxtext",))

    # The only function that returns the compiled step; its behaviour stays the same.
    train_compile.jit_and_compile = recorded
    settings = {
        "run_name": "plan_vs_peers",
        "model_name": "llama3.1-8b",
        "compile_topology": topology,
        "compile_topology_num_slices": 1,
        "per_device_batch_size": batch_per_device,
        "max_target_length": length,
        "remat_policy": "full",
        "dataset_type": "synthetic",
        "enable_checkpointing": "false",
        "base_output_directory": folder,
    }
    if int(layers) != LAYERS:
        settings |= {"override_model_config": "true", "base_num_decoder_layers": layers}
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    train_compile.main(["train_compile", str(base), *(f"{name}={value}" for name, value in settings.items())])


if __name__ == "__main__":
    main(*sys.argv[1:])
