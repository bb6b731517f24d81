"""What a decoding step asks of a TPU that is not here: cycles by the compiler's estimate, and copies of a dispatch.

python benchmarks/decode_cycles.py --model=llama-3.2-3b --topology=v5e:1x1 [--slots=8] [--length=2048] [--lines=12]

The model is a file of jaxft/assets/published, in bfloat16 on one chip. Needs libtpu. The estimates know no contention,
and some instructions have none, such as the write of a row into the cache: compare two forms of one program.
"""

import os

from jaxft.hardware.compile import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before JAX starts

import argparse
import functools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

import jaxft
from jaxft.generation import steps
from jaxft.generation.sampling import Knobs
from jaxft.hardware import hlo, topology, trips
from jaxft.models import config_from_hf, random_model

HERTZ = {"v5e": 1.503e9, "v5p": 1.75e9, "v6e": 1.75e9}
Cost = tuple[int, hlo.Instruction]  # cycles of all turns


def lowered(config: dict[str, Any], slots: int, length: int, chip: jax.Device) -> tuple[jax.stages.Lowered, int]:
    """The program of a run of decoding steps, and the bytes of weights and cache that each of them reads."""
    model_config = config_from_hf(config)
    model = nnx.eval_shape(lambda: random_model(model_config, dtype="bfloat16", param_dtype="bfloat16", seed=0))
    graphdef, params = nnx.split(model)
    integers, scalar = jax.ShapeDtypeStruct((slots,), np.int32), jax.ShapeDtypeStruct((), np.int32)
    kinds = {"top_k_B": np.int32, "seed_B": np.uint32, "stream_B": np.uint32}
    knobs = Knobs(*(jax.ShapeDtypeStruct((slots,), kinds.get(name, np.float32)) for name in Knobs._fields))
    rest = (steps.Rows(integers, integers, integers, knobs), jax.ShapeDtypeStruct((8,), np.int32), scalar, scalar)
    with jax.sharding.use_abstract_mesh(Mesh(np.array([chip]), ("data",)).abstract_mesh):
        make = functools.partial(steps.make_memory, slots=slots, length=length, rows=None)
        memory = jax.eval_shape(lambda params: make(graphdef, params), params)
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(chip)),
            (params, memory, *rest),
        )
        read = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, memory.cache)))
        return steps.decode.lower(graphdef, *placed, rows=None), read


def costs(module: hlo.Module, computation: hlo.Computation, turns: int = 1) -> Iterator[Cost]:
    """The instructions that a computation runs, loops in it included; of a conditional the cheapest branch."""
    for one in computation.instructions.values():
        estimate = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
        yield turns * int(estimate[1]) if estimate else 0, one
        if one.opcode == "while":
            inner = module.computations[one.callees("body")[0]]
            yield from costs(module, inner, turns * (trips.trip_count(module, computation, one) or 1))
        elif one.opcode == "conditional":
            branches = one.callees("branch_computations") or one.callees("true_computation")
            each = [list(costs(module, module.computations[name], turns)) for name in branches]
            yield from min(each, key=total)


def total(found: list[Cost]) -> int:
    """The sum of the cycles."""
    return sum(cycles for cycles, _ in found)


def main() -> None:
    """Prints the time of a token, that of a dispatch, the bound by bandwidth, and the longest instructions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-3b")
    parser.add_argument("--topology", default="v5e:1x1")
    for name, default in (("slots", 8), ("length", 2048), ("lines", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    shapes = Path(jaxft.__file__).parent / "assets" / "published" / f"{given.model}.json"
    target = topology.parse(given.topology)
    program, read = lowered(
        json.loads(shapes.read_text(encoding="utf-8")), given.slots, given.length, topology.devices(target)[0]
    )
    start = time.process_time()
    module = hlo.parse(program.compile().as_text() or "")
    seconds = time.process_time() - start
    per_ms = HERTZ[target.chip.name] / 1000  # cycles
    around = [one for one in module.entry.instructions.values() if one.opcode != "while"]
    entry = total(list(costs(module, hlo.Computation("entry", {one.name: one for one in around}))))
    loop = next(one for one in module.entry.instructions.values() if one.opcode == "while")
    token = list(costs(module, module.computations[loop.callees("body")[0]]))
    bound = 1000 * read / target.chip.hbm_bandwidth
    each = (total(token) + entry / steps.RUN) / per_ms
    print(
        f"compiled in {seconds:.0f} CPU s; a token {total(token) / per_ms:.2f} ms, a dispatch {entry / per_ms:.2f} ms"
    )
    print(f"bandwidth bound {bound:.2f} ms; {each:.2f} ms a token in all, {each / bound:.2f} times the bound")
    for cycles, one in sorted(token, key=lambda cost: -cost[0])[: given.lines]:
        print(f"{cycles / per_ms:8.3f} ms  {one.name:40} {one.arrays[0].dtype}{list(one.arrays[0].dims)}")


if __name__ == "__main__":
    main()
