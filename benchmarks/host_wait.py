"""The time in which a device waits for the training loop, by whether the next step is dispatched ahead.

    python benchmarks/host_wait.py [--steps=40] [--seconds=0.1]

No accelerator is needed: the device is one core of the host, which counts in a compiled loop, and the next step depends
on it. Leave another core to the host. Reading, packing, batches, the loop and its log are those of `jaxft train`. Rows
are drawn: documents of so many bytes, packed into rows of 4,096. A loop that waits for every step is how runs on CPUs
work, and what runs on accelerators did before.
"""

import argparse
import tempfile
import time
import timeit
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_cases
import jax
import jax.numpy as jnp
from flax import nnx

from jaxft import config as config_module
from jaxft.methods import method_of
from jaxft.runs.build import abstract_model
from jaxft.runs.fitting import cadence_of, hooks_of
from jaxft.runs.train import set_up
from jaxft.training.goodput import TimeUse
from jaxft.training.loop import fit

LENGTH = 4096
CASES = [(16, 300), (64, 60)]  # rows of a batch, bytes of a document
LOG_EVERY = 5


def device_step(turns: int, state: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A step that keeps one core busy for so many turns of a loop."""
    tokens = jax.tree.leaves(batch)[0]
    # XLA runs a program on CPUs before it returns if it counts few FLOPs in it, a loop's once.
    square = jnp.full((256, 256), state)
    worked = jax.lax.fori_loop(0, turns, lambda _, number: jnp.sin(number) + 1.0, state + 0.0 * tokens[0, 0])
    worked += 0.0 * jnp.sum(square @ square)
    counts = jnp.float32(tokens.size)
    return worked, {"loss": worked, "num_tokens": counts, "trained_tokens": counts}


def turns_of(seconds: float) -> int:
    """Turns of that loop in which the core is busy so long."""
    tokens, turns = jnp.zeros((1, 1), jnp.int32), 1_000_000
    step = jax.jit(partial(device_step, turns))
    jax.block_until_ready(step(jnp.float32(0), tokens))
    started = time.perf_counter()
    jax.block_until_ready(step(jnp.float32(0), tokens))
    return int(turns * seconds / (time.perf_counter() - started))


def measure(rows: int, size: int, steps: int, turns: int, *, ahead: bool) -> tuple[float, float, float]:
    """Seconds of a step in the loop and of the device alone, and the share of the time in which the device waits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = rows * steps * (LENGTH // size + 1)
        text = "a" * (size - 2)
        (folder / "rows.jsonl").write_text(f'{{"text": "{text}"}}\n' * count, encoding="utf-8")
        config = config_module.default_config()
        config.update_from_flattened_dict({
            "output_dir": str(folder / "run"), "data.train": str(folder / "rows.jsonl"), "data.format": "text",
            "model.path": str(gpu_cases.write_model(gpu_cases.CASES["lora"], folder / "model", smoke=True)),
            "model.random_init": True, "data.max_length": LENGTH, "data.truncation": "drop", "train.steps": steps,
            "train.batch_size": rows, "train.log_every": LOG_EVERY, "eval.metric": None,
        })  # fmt: skip
        run = replace(set_up(config_module.resolve(config)), times=TimeUse())
        graphdef = nnx.split(abstract_model(run.config))[0]
        step = jax.jit(partial(device_step, turns))
        hooks = hooks_of(run, graphdef, method_of(run.config).feed(run, graphdef), step, save=lambda *_: None)
        log = gpu_cases.Rows()
        fit(jnp.float32(0), replace(hooks, ahead=ahead), cadence_of(run), log, start=0, progress={})
        batch = hooks.batch(jnp.float32(0), 0)
        alone = min(timeit.repeat(lambda: jax.block_until_ready(step(jnp.float32(0), batch)), number=1, repeat=9))
    figures = gpu_cases.figures_of(log.logged)
    return figures["step_seconds"], alone, figures["host_wait"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.1, help="that the device works on a step")
    arguments = parser.parse_args()
    turns = turns_of(arguments.seconds)
    for rows, size in CASES:
        for ahead in (False, True):
            step, alone, waits = measure(rows, size, arguments.steps, turns, ahead=ahead)
            print(
                f"{rows} rows, documents of {size}, {'ahead' if ahead else 'waiting'}: the device waits {waits:.1%} of "
                f"the time; a step takes {1e3 * step:.1f} ms, {1e3 * alone:.1f} of the device alone",
                flush=True,
            )


if __name__ == "__main__":
    main()
