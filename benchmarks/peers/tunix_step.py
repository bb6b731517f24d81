"""Tunix's training step, as its PeftTrainer jits it, compiled on abstract sharded state.

Runs in Tunix's environment: `python tunix_step.py FOLDER TOPOLOGY BATCH LENGTH LAYERS`. Llama 3.1 8B, LoRA rank 16 on
all linear layers by qwix, bfloat16 base, every layer rematerialised, weights sharded over all devices by Tunix's
default rules, Tunix's default loss and AdamW. Tunix cannot compile without a TPU, so the abstract state is made here in
the way of its command line.
"""

# B batch, S sequence

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from record import ENVIRONMENT, record

# Must be set before JAX starts.
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
    # Tunix omits its sharding constraints if the first device is a CPU; on the slice it would not.
    jax.devices = lambda *_: list(devices)
    with mesh:
        record(
            lambda: step.func.lower(*step.args, inputs).compile(), Path(folder), ("google-tunix", "qwix")
        )  # fmt: skip


def trainer_of(mesh: Mesh, layers: int) -> peft_trainer.PeftTrainer:
    """The trainer of a model with adapters, its state abstract and sharded over the mesh."""
    config = dataclasses.replace(
        llama3.ModelConfig.llama3p1_8b(), num_layers=layers, remat_config=llama3.RematConfig.DECODER
    )
    trainers = []

    def build() -> tuple[nnx.Module, nnx.Optimizer]:
        graphdef, state = nnx.split(llama3.Llama3(config, rngs=nnx.Rngs(0)))
        base = nnx.merge(graphdef, jax.tree.map(lambda array: array.astype(jnp.bfloat16), state))
        provider = qwix.LoraProvider(module_path=TARGETS, rank=RANK, alpha=2.0 * RANK)
        model = qwix.apply_lora_to_model(base, provider, **base.get_model_input())
        trainers.append(
            peft_trainer.PeftTrainer(model, optax.adamw(1e-4), peft_trainer.TrainingConfig(eval_every_n_steps=1))
        )
        return trainers[-1].model, trainers[-1].optimizer

    model, optimizer = nnx.eval_shape(build)
    trainer = trainers[-1].with_gen_model_input_fn(model_input)
    trainer.model, trainer.optimizer = with_shardings(model, mesh), with_shardings(optimizer, mesh)
    return trainer


def with_shardings(node: Any, mesh: Mesh) -> Any:
    """A module's abstract arrays with the shardings that their own metadata names."""
    graphdef, state = nnx.split(node)
    specs = nnx.get_partition_spec(state)
    state = jax.tree.map(
        lambda array, spec: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec)),
        state, specs,
    )  # fmt: skip
    return nnx.merge(graphdef, state)


def model_input(batch: peft_trainer.TrainingInput) -> dict[str, Any]:
    """The arguments of the loss, as Tunix's command line makes them from a batch."""
    is_token_BS = batch.input_tokens != 0
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(is_token_BS),
        "attention_mask": utils.make_causal_attn_mask(is_token_BS),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
