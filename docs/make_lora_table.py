"""Writes the table of slices for LoRA into docs/models.md: `python docs/make_lora_table.py`.

For each model type the smallest published model of 6 billion parameters or more, else the largest: the smallest slice
of v5e on which a LoRA step fits by the plan's arithmetic, one sequence of 2,048 tokens a chip. Nothing is compiled; a
model takes a few seconds. The base is divided over all chips; where its dimensions do not divide so far, the experts
are divided too.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.config import RunConfig
from jaxft.config.reading import with_overrides
from jaxft.errors import ConfigError
from jaxft.hardware.topology import Topology, parse
from jaxft.planning.job import abstract_step_of, sharded_step_of
from jaxft.planning.rollout import decoding_of_run, estimate_run
from jaxft.planning.search import MARGIN

PAGE = Path(__file__).with_name("models.md")
START, END = "<!-- Written by docs/make_lora_table.py; do not edit. -->", "<!-- The end of what it writes. -->"
SLICES = ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16")
LEAST, LENGTH, GIB = 6e9, 2048, 2**30
HEAD = ("model_type", "model", "billion parameters", "smallest slice", "GiB of a chip")


def representatives() -> Iterator[tuple[str, str, float, dict[str, Any]]]:
    """(model_type, name, billions of parameters, config.json), one of each model type, by their names."""
    of_type: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}
    for path in sorted((ASSETS / "published").glob("*.json")):
        hf_config = json.loads(path.read_text(encoding="utf-8"))
        count = models.parameter_count(models.abstract_model(models.config_from_hf(hf_config)))
        of_type.setdefault(models.config_from_hf(hf_config).to_hf()["model_type"], []).append(
            (count, path.stem, hf_config)
        )
    for kind, known in sorted(of_type.items()):
        known.sort(key=lambda each: each[0])
        count, name, hf_config = next((each for each in known if each[0] >= LEAST), known[-1])
        yield kind, name, count / 1e9, hf_config


def lora(topology: Topology, expert: int) -> RunConfig:
    """A run of LoRA with one sequence on each device. expert: ways by which experts are divided."""
    return with_overrides(
        {
            "model.path": "hf://owner/name", "model.dtype": "bfloat16", "model.param_dtype": "bfloat16",
            "model.remat": "full", "data.train": "rows.jsonl", "data.max_length": LENGTH, "mesh.fsdp": -1,
            "mesh.expert": expert, "train.batch_size": topology.devices,
        }
    )  # fmt: skip


def smallest(hf_config: dict[str, Any]) -> tuple[str, float] | None:
    """(the smallest slice on which LoRA fits, GiB of one chip), None if it fits on none."""
    has_experts = models.abstract_model(models.config_from_hf(hf_config)).experts is not None
    for name, expert in itertools.product(SLICES, (1, 4, 8) if has_experts else (1,)):
        topology = parse(name, 1)
        config = lora(topology, expert)
        try:
            step = sharded_step_of(abstract_step_of(config, hf_config, 1000), config, topology, real=False)
        except ConfigError:
            continue  # the mesh does not divide the arrays or the devices
        peak = estimate_run(step, decoding_of_run(step)).peak
        if peak <= MARGIN * topology.chip.hbm_bytes / topology.chip.devices:
            return name, peak / GIB
    return None


def table() -> str:
    """The table as Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for kind, name, billions, hf_config in representatives():
        found = smallest(hf_config)
        where = ("none", "") if found is None else (found[0], f"{found[1]:.1f}")
        lines.append(f"| {kind} | {name} | {billions:,.2f} | {where[0]} | {where[1]} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{START}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
