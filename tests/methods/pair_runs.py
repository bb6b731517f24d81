"""Small runs of methods on preferences, shared by their tests."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft import api
from jaxft.config import RunConfig, load
from jaxft.methods import method_of
from jaxft.methods.method import Run
from jaxft.optim.make import make_schedule
from jaxft.runs.build import (
    abstract_model,
    build_model,
    load_frozen,
    make_mesh,
    make_step,
    make_tx,
    start_state,
    with_frozen,
)
from jaxft.training.log import TIMING_KEYS

KINDS = {
    "lora": {},
    "full": {"adapter.kind": "none", "export.merged": False},
    "qlora": {"model.quantization": "nf4"},
}
ROWS = [{"prompt": f"Colour {n}?", "chosen": f" {n % 3} red", "rejected": f" {n % 5} blue, or not"} for n in range(24)]
# Plain gradient steps: Adam's first one would be the sign of gradients that are zero but for rounding.
SGD = {
    "optim.name": "sgd", "optim.adamw.b2": 0.999, "optim.sgd.momentum": 0.0, "optim.learning_rate": 1.0,
    "optim.clip_norm": None,
}  # fmt: skip


LABELLED = [
    {"prompt": f"Colour {n}?", "completion": f" {n % 5} {'red' if n % 2 else 'blue, or not'}", "label": n % 2 == 1}
    for n in range(24)
]


def write_rows(folder, rows=ROWS, name="rows.jsonl"):
    """The rows as a file, whose path is returned."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(method, rows, output_dir, **overrides) -> RunConfig:
    settings = {
        "output_dir": str(output_dir), "method.name": method, "data.train": rows, "data.eval": rows,
        "data.limit": None, "data.eval_limit": 4, "data.max_length": 128, "train.batch_size": 8, "train.steps": 6,
        "train.accumulation_steps": 1, "train.eval_every": 3, "train.log_every": 1, "checkpoint.every": 3,
        "eval.metric": None, "adapter.dropout": 0.0, "export.merged": False, "optim.learning_rate": 1e-2,
    }  # fmt: skip
    return load("configs/quickstart.py:smoke", settings | overrides)


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines]


def evaluate_export(config):
    """Held-out metrics of the model that a run exported, on a base that is quantised as it was in training."""
    folder = config.output_dir
    return api.evaluate(
        api.load_model(folder, quantization=config.model.quantization), api.load_tokenizer(folder), config
    )


def weights_of(folder):
    (file,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return file.read_bytes()


def train_lose_the_end_and_resume(config, folder):
    """Trains, loses the state of step 6, goes on from step 3, and compares every bit.

    Returns (logged lines with a loss, held-out metrics at the end).
    """
    summary = api.train(config)
    lines = metrics_of(folder)
    whole = folder.parent / "whole"
    shutil.copytree(folder, whole)
    shutil.rmtree(folder / "checkpoints" / "6")
    api.train(config)
    assert weights_of(folder) == weights_of(whole) and metrics_of(folder) == metrics_of(whole)
    return [line for line in lines if "loss" in line], summary


def assert_eight_devices_equal_one(config, folder, axes=("data", "fsdp", "tensor")):
    """One plain gradient step on one device and on a mesh of 2 x 2 x 2 with these axes; returns the metrics."""
    method = method_of(config)
    tokenizer = api.load_tokenizer(config.model.path)
    data = method.prepare(config, tokenizer)
    source = method.source(config, data, tokenizer)
    base = build_model(config, random_base=folder / "base").module
    schedule = make_schedule(config.optim, 6)
    outcomes = []
    for sizes in ({"fsdp": 1}, dict.fromkeys(axes, 2)):
        one = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
        model = abstract_model(one)
        mesh = make_mesh(one, model, jax.devices()[: math.prod(sizes.values())])
        module = nnx.merge(*nnx.split(base))
        tx = make_tx(one, module, schedule)
        graphdef, state = start_state(one, module, tx, mesh)
        state = with_frozen(state, load_frozen(one, mesh))
        # Away from the start, where a loss against a reference has nothing to say.
        moved = jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), state.trainable)
        step = jax.jit(mesh.bind(make_step(one, model, graphdef, tx, schedule)))
        run = Run(
            config=one, folder=folder, tokenizer=tokenizer, data=data, mesh=mesh, model=model, source=source
        )  # fmt: skip
        outcomes.append(step(state._replace(trainable=moved), method.feed(run, graphdef)(state, 0)))
    (state, metrics), (other, other_metrics) = outcomes
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(other.trainable), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)
    return metrics
