"""Cycles that the compiler for a TPU estimates for a decoder layer, or for its feed-forward alone, in a training step.

    python benchmarks/layer_cycles.py [--chip=v5e] [--part=mlp] [--ranks=0,16] [--dropout=0.05] [--model=qwen3-30b-a3b]
        [--default]

No TPU is needed: libtpu compiles (`pip install 'jaxft[plan]'`), and nothing runs. Each fusion of the compiled text has
an estimate, and those of a loop count as often as it turns. The layer is that of Llama 3.1 8B in bfloat16, or of a
model of jaxft/assets/published, with the gradients of its input and of LoRA on all its matrices but experts'; rank 0 is
the layer without adapters. Pallas kernels, such as attention's, have no estimate and are left out. It is compiled with
the options of a run's step, or with `--default` without them.

Estimates of fusions that wait for main memory do not follow their bytes: adding 1 to an array costs as much in bfloat16
as in float32. So there is a second sum: of every instruction the longer of the times of its FLOPs and of its bytes, at
the peaks of the chip. Kernels have their FLOPs in it, and copies ahead of their use count as if nothing ran beside.
"""

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxft
from jaxft.hardware.compile import ENVIRONMENT

if TYPE_CHECKING:
    import jax

    from jaxft.hardware.hlo import Computation, Instruction, Module

SIZES: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 256, "max_position_embeddings": 131072, "num_hidden_layers": 3,
}  # fmt: skip
CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
HERTZ = {"v5e": 1.503e9, "v5p": 1.75e9, "v6e": 1.75e9}
MOVES = {"fusion", "copy", "transpose", "bitcast", "parameter", "copy-start", "copy-done", "slice", "dynamic-slice"}


def count(module: "Module", computation: "Computation", turns: int, sums: Counter[str]) -> None:
    """Adds the estimates of a computation, and of the loops in it, to those of products, copies and the rest."""
    from jaxft.hardware.trips import trip_count

    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            body = module.computations[instruction.callees("body")[0]]
            count(module, body, turns * (trip_count(module, computation, instruction) or 1), sums)
        elif match := CYCLES.search(instruction.attributes):
            sums[kind_of(module, instruction)] += turns * int(match[1])


def cycles_by_peaks(module: "Module", chip: str) -> float:
    """Of every instruction the longer of the times of its FLOPs and of its bytes, in cycles."""
    from jaxft.hardware.chips import CHIPS
    from jaxft.hardware.costs import costs_of

    limits = CHIPS[chip]
    seconds = (
        times * max(work.flops / limits.flops, work.bytes / limits.hbm_bandwidth)
        for work, times in costs_of(module, {}).work.items()
    )
    return HERTZ[chip] * sum(seconds)


def kind_of(module: "Module", instruction: "Instruction") -> str:
    """products, copies or other."""
    inner = [
        one.opcode for name in instruction.callees("calls") for one in module.computations[name].instructions.values()
    ]
    opcodes = {instruction.opcode, *inner}
    if opcodes & {"convolution", "dot"}:
        return "products"
    return "copies" if opcodes <= MOVES else "other"


def compiled_text(arguments: argparse.Namespace, rank: int) -> str:
    """The compiled gradients."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxft.hardware.attached import step_options
    from jaxft.hardware.topology import devices, parse
    from jaxft.sharding.mesh import AXES

    device = devices(parse(f"{arguments.chip}:{'1x1x1' if arguments.chip == 'v5p' else '1x1'}"))[:1]
    mesh = Mesh(np.array(device).reshape((1,) * len(AXES)), AXES)
    function, operands = program(arguments, rank)
    whole = NamedSharding(mesh, P())
    operands = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), operands)

    def on_mesh(*operands: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*operands)

    options = {} if arguments.default else step_options(device[0])
    return jax.jit(on_mesh, compiler_options=options).lower(*operands).compile().as_text() or ""


def program(arguments: argparse.Namespace, rank: int) -> tuple[Callable[..., Any], Any]:
    """A function that gives the gradients, and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxft.adapters.attach import AdapterParam

    model, alone = nnx.eval_shape(lambda: made(arguments, rank)), arguments.part == "mlp"
    graphdef, state = nnx.split(model.layers[0].mlp if alone else model)
    if alone:
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
    trained, frozen = nnx.split_state(state, AdapterParam, ...)
    rows = arguments.rows, arguments.length
    wide = jax.ShapeDtypeStruct((*rows, SIZES["hidden_size"]), jnp.bfloat16)
    key = jax.eval_shape(lambda: jax.random.key(0)) if rank and arguments.dropout else None

    def gradients(trained: Any, frozen: Any, x: "jax.Array", grad: "jax.Array", key: "jax.Array | None") -> Any:
        def of_mlp(trained: Any, x: "jax.Array") -> "jax.Array":
            return nnx.merge(graphdef, trained, frozen)(x, None if key is None else jax.random.split(key, 3))

        def of_model(trained: Any) -> "jax.Array":
            return nnx.merge(graphdef, trained, frozen)(x, key=key)[0]

        y, pull = jax.vjp(of_mlp, trained, x) if alone else jax.vjp(of_model, trained)
        return y, pull(grad)

    inputs = wide if alone else jax.ShapeDtypeStruct(rows, jnp.int32)
    return gradients, (trained, frozen, inputs, wide, key)


def made(arguments: argparse.Namespace, rank: int) -> Any:
    """The model, with LoRA if it has a rank."""
    from jaxft import models
    from jaxft.config import AdapterConfig
    from jaxft.runs.build import attach_adapter

    types = {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": arguments.remat}
    model = models.random_model(models.config_from_hf(SIZES), seed=0, **types)
    if rank:
        attach_adapter(model, AdapterConfig(kind="lora", r=rank, alpha=2.0 * rank, dropout=arguments.dropout), seed=0)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="v5e", help="v5e, v5p or v6e")
    parser.add_argument("--part", choices=("layer", "mlp"), default="layer")
    parser.add_argument("--ranks", default="0,16", help="of LoRA, with commas; 0 for none")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots", help="not for --part=mlp")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--text", help="a file for the last compiled text")
    parser.add_argument("--default", action="store_true", help="the compiler without the options of a run")
    parser.add_argument("--model", help="a file of jaxft/assets/published, of which three equal layers are taken")
    arguments = parser.parse_args()
    if arguments.model:
        path = Path(jaxft.__file__).parent / "assets" / "published" / f"{arguments.model}.json"
        sizes = {name: SIZES[name] for name in ("vocab_size", "num_hidden_layers")}
        SIZES.clear()
        SIZES.update(json.loads(path.read_text(encoding="utf-8")) | sizes)
    os.environ.update(ENVIRONMENT)
    from jaxft.hardware import hlo

    first: tuple[float, float] | None = None
    for rank in map(int, arguments.ranks.split(",")):
        text = compiled_text(arguments, rank)
        if arguments.text:
            with open(arguments.text, "w") as file:
                file.write(text)
        module, sums = hlo.parse(text), Counter[str]()
        count(module, module.entry, 1, sums)
        layers = 1 if arguments.part == "mlp" else SIZES["num_hidden_layers"]
        total, by_peaks = sum(sums.values()) / layers / 1e6, cycles_by_peaks(module, arguments.chip) / layers / 1e6
        first = first or (total, by_peaks)
        parts = ", ".join(f"{kind} {cycles / layers / 1e6:.2f}" for kind, cycles in sorted(sums.items()))
        name = f"{arguments.chip} {arguments.part} rank {rank}"
        print(f"{name}: {total:.2f}M cycles ({parts}), {total / first[0] - 1:+.1%}", end="; ")
        print(f"by FLOPs and bytes {by_peaks:.2f}M, {by_peaks / first[1] - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main()
