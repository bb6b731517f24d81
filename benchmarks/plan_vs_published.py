"""Predicted against published training throughput: how accurate the roofline of `jaxft plan` is.

    python benchmarks/plan_vs_published.py

Published: MaxText, docs/reference/models/tiering.md (tokens per second and chip) and MaxText/configs/v5e, v5p/README.md
(TFLOPs per second and chip; of these models only the size is known); on GPUs NeMo AutoModel and torchtitan, their own
pages on performance. Batches, meshes and rematerialisation: the recipes that these pages name
(AI-Hypercomputer/tpu-recipes; MaxText/configs/*/*.sh). The share of the forward pass that they recompute is estimated
from what they keep, and so is a batch that none of them names; Mixtral's recipes pad experts to a capacity of 1.25. The
work is estimated by arithmetic, since these are not jaxft's steps. The efficiencies in jaxft/hardware/roofline.py were
fitted to the rows marked *.
"""

import json
import os
import statistics
from dataclasses import replace
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxft import config
from jaxft.assets import ASSETS
from jaxft.hardware.analytic import layer_kernels
from jaxft.hardware.costs import Work
from jaxft.hardware.roofline import efficiency_of
from jaxft.hardware.topology import parse
from jaxft.planning.job import abstract_step_of, estimate_step, sharded_step_of, time_of


class Named(NamedTuple):
    """A published row of a known model. recomputed: share of the forward pass that the backward pass repeats.

    narrow: whether all three products of linear layers have fp8 operands. lora: whether adapters of rank 8 are trained.
    """

    model: str
    topology: str
    rows_per_chip: int
    length: int
    tokens: float
    recomputed: float
    fitted: bool
    capacity: float = 1.0
    tensor: int = 1
    narrow: bool = False
    lora: bool = False

    @property
    def label(self) -> str:
        parts = [self.model, *["LoRA"] * self.lora, *["fp8"] * self.narrow]
        return " ".join(parts)


class Sized(NamedTuple):
    """A published row of a model of which only the size is known. tflops: of the model, per second and chip."""

    model: str
    topology: str
    tflops: float
    recomputed: float
    fitted: bool


NAMED = (
    Named("llama-3.1-8b", "v6e:16x16", 4, 8192, 7207, 0.65, True),
    Named("llama-2-70b", "v6e:16x16", 2, 4096, 900, 0.65, True),
    Named("llama-3.3-70b", "v6e:16x16", 5, 8192, 960, 0.65, False),
    Named("llama-3.1-405b", "v6e:16x16", 1, 8192, 123, 0.65, False, tensor=4),
    Named("mixtral-8x7b", "v6e:16x16", 12, 4096, 3899, 0.65, False, capacity=1.25),
    Named("mixtral-8x22b", "v6e:16x16", 8, 4096, 1326, 0.65, False, capacity=1.25),
    Named("llama-2-70b", "v5p:8x8x8", 4, 4096, 692, 0.6, True),
    Named("mixtral-8x7b", "v5p:4x4x8", 8, 4096, 2909, 0.65, False, capacity=1.25),
    Named("llama-3.1-8b", "v6e:2x4", 3, 8192, 7139, 0.65, False),
    Named("llama-3.3-70b", "tpu7x:4x4x4", 4, 8192, 2687, 0.65, True),
    Named("llama-3.3-70b", "tpu7x:4x4x4", 4, 8192, 4128, 0.65, False, narrow=True),
    Named("llama-3.1-8b", "h100:8", 2, 8192, 6667, 0.3, True),
    Named("llama-3.1-8b", "h100:8", 2, 8192, 8532, 0.3, False, narrow=True),
    Named("llama-3-8b", "h100:1", 2, 4096, 12473, 0.0, False, lora=True),
    Named("qwen3-30b-a3b", "h100:8", 8, 4096, 12040, 0.0, False),
)
SIZED = (
    Sized("16B", "v5e:16x16", 120, 0.94, True),
    Sized("64B", "v5e:16x16", 118, 0.94, True),
    Sized("32B", "v5e:16x16", 132, 0.94, False),
    Sized("128B", "v5e:16x16", 110, 0.1, False),
    Sized("64B", "v5p:4x4x4", 323, 0.1, True),
    Sized("32B", "v5p:4x4x4", 328, 0.1, False),
    Sized("128B", "v5p:4x4x8", 315, 0.1, False),
)


def predicted(row: Named) -> float:
    """Predicted tokens per second and chip."""
    topology = parse(row.topology)
    batch = row.rows_per_chip * topology.chips
    values = {
        "model.path": "hf://any/model", "model.dtype": "bfloat16", "model.remat": "full", "adapter.kind": "none",
        "data.train": "rows.jsonl", "data.max_length": row.length, "train.batch_size": batch, "mesh.tensor": row.tensor,
    }  # fmt: skip
    run = config.default_config()
    if row.lora:
        values |= {"adapter.kind": "lora", "adapter.r": 8}
    for key, value in values.items():
        section, name = key.split(".")
        run[section][name] = value
    run = config.resolve(run)
    shapes = json.loads((ASSETS / "published" / f"{row.model}.json").read_text(encoding="utf-8"))
    step = sharded_step_of(abstract_step_of(run, shapes, 1000), run, topology, real=False)
    costs = estimate_step(step).costs
    hbm_bytes = costs.hbm_bytes
    costs.work.clear()
    flops, narrow = int(step.model_flops * (1 + row.recomputed / 3) * row.capacity), 0
    if row.narrow:
        passes = 6 + 2 * row.recomputed
        narrow = int(passes * layer_kernels(step.sizes) * batch * row.length / topology.devices)
        step = replace(step, config=replace(step.config, train=replace(step.config.train, matmul_dtype="fp8")))
    costs.work[Work(flops, hbm_bytes, narrow=narrow)] += 1
    return batch * row.length / topology.chips / time_of(step, costs).total


def main() -> None:
    """Prints the table of docs/plan.md."""
    print("| model | slice | published | predicted | error |")
    print("|---|---|---|---|---|")
    errors = {True: [], False: []}

    def show(row: Named | Sized, published: float, value: float, unit: str) -> None:
        error = value / published - 1
        errors[row.fitted].append(abs(error))
        star = " *" if row.fitted else ""
        name = row.label if isinstance(row, Named) else row.model
        print(f"| {name}{star} | {row.topology} | {published:,.0f} {unit} | {value:,.0f} | {error:+.0%} |")

    for row in NAMED:
        show(row, row.tokens, predicted(row), "tokens/s")
    for row in SIZED:
        chip = parse(row.topology).chip
        value = chip.flops * efficiency_of(chip).products / (1 + row.recomputed / 3) / 1e12
        show(row, row.tflops, value, "TFLOP/s")
    for fitted, name in ((True, "the rows that the efficiencies are fitted to (*)"), (False, "the other rows")):
        mean, worst = statistics.mean(errors[fitted]), max(errors[fitted])
        print(f"\nOn {name}: mean error {mean:.0%}, largest {worst:.0%}.")


if __name__ == "__main__":
    main()
