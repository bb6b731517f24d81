"""Tunix's training step: what its PeftTrainer jits, compiled on abstract sharded state.

Runs in Tunix's environment: `python tunix_step.py FOLDER TOPOLOGY BATCH LENGTH LAYERS`. Llama 3.1 8B, LoRA rank 16 on
all linear layers by qwix, bfloat16 base, every layer rematerialised, weights split over all devices by its own default
sharding, its default loss and AdamW. It has no way to compile without a TPU, so the state is made here as its command
line makes it, abstractly.
"""

# B batch, S sequence

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from record import ENVIRONMENT, record

# Before JAX starts.
os.environ.update(ENVIRONMENT)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer, utils

RANK = 16
TARGETS = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def main(folder: str, topology: str, batch: str, length: str, layers: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"))
    trainer = trainer_of(mesh, int(layers))
    step, _ = trainer.jit_train_and_eval_step()
    split = NamedSharding(mesh, PartitionSpec(*trainer.config.data_sharding_axis))
    tokens_BS = jax.ShapeDtypeStruct((int(batch), int(length)), jnp.int32, sharding=split)
    inputs = peft_trainer.TrainingInput(input_tokens=tokens_BS, input_mask=tokens_BS)
    # It leaves its sharding constraints out where the first device is a CPU; on the slice it would not.
    jax.devices = lambda *_: list(devices)
    with mesh:
        record(
            lambda: step.func.lower(*step.args, inputs).compile(), Path(folder), ("google-tunix", "qwix")
        )  # fmt: skip


def trainer_of(mesh: Mesh, layers: int) -> peft_trainer.PeftTrainer:
    """The trainer of a model with adapters, its state abstract and split over the mesh."""
    config = dataclasses.replace(
        llama3.ModelConfig.llama3p1_8b(), num_layers=layers, remat_config=llama3.RematConfig.DECODER
    )
    made = []

    def build() -> tuple[nnx.Module, nnx.Optimizer]:
        graphdef, state = nnx.split(llama3.Llama3(config, rngs=nnx.Rngs(0)))
        base = nnx.merge(graphdef, jax.tree.map(lambda array: array.astype(jnp.bfloat16), state))
        provider = qwix.LoraProvider(module_path=TARGETS, rank=RANK, alpha=2.0 * RANK)
        model = qwix.apply_lora_to_model(base, provider, **base.get_model_input())
        made.append(
            peft_trainer.PeftTrainer(model, optax.adamw(1e-4), peft_trainer.TrainingConfig(eval_every_n_steps=1))
        )
        return made[-1].model, made[-1].optimizer

    model, optimizer = nnx.eval_shape(build)
    trainer = made[-1].with_gen_model_input_fn(model_input)
    trainer.model, trainer.optimizer = placed(model, mesh), placed(optimizer, mesh)
    return trainer


def placed(node: Any, mesh: Mesh) -> Any:
    """A module's abstract arrays with the shardings that their own metadata names."""
    graphdef, state = nnx.split(node)
    specs = nnx.get_partition_spec(state)
    state = jax.tree.map(
        lambda array, spec: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec)),
        state, specs,
    )  # fmt: skip
    return nnx.merge(graphdef, state)


def model_input(batch: peft_trainer.TrainingInput) -> dict[str, Any]:
    """What the loss reads, as Tunix's command line makes it of a batch."""
    written_BS = batch.input_tokens != 0
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(written_BS),
        "attention_mask": utils.make_causal_attn_mask(written_BS),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
