"""Products of sorted rows with the matrices of experts, by form: CPU seconds and temporaries, float32.

python benchmarks/expert_products.py [--rounds=3]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.nn.experts.grouped import Form, grouped

# Rows, experts, inputs, outputs.
CASES = [(2048, 8, 576, 1536), (4096, 32, 512, 256), (4096, 128, 512, 192)]
FORMS: tuple[Form, ...] = ("ragged", "loop", "blocks")


def measured(function: Callable[..., Any], *args: jax.Array, rounds: int) -> str:
    """CPU milliseconds of the quickest of `rounds` calls, and the temporaries."""
    compiled = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.process_time() - start)
    return f"{1000 * min(seconds):.0f} ms, {compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f} MiB"


def main() -> None:
    """Prints a row of the table for each case: every form forward, and its gradients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print("| rows, experts, inputs, outputs |", " | ".join(f"{form} | gradients" for form in FORMS), "|", flush=True)
    for rows, experts, inputs, outputs in CASES:
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = (rows, inputs), (experts, inputs, outputs), (rows, outputs)
        x, kernel, aim = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
        sizes = jnp.bincount(jax.random.randint(keys[3], (rows,), 0, experts), length=experts).astype(jnp.int32)
        cells = []
        for form in FORMS:

            def forward(x: jax.Array, kernel: jax.Array, sizes: jax.Array, form: Form = form) -> jax.Array:
                return grouped(x, kernel, sizes, form)

            def gradients(x: jax.Array, kernel: jax.Array, sizes: jax.Array, forward: Any = forward) -> Any:
                return jax.vjp(lambda x, kernel: forward(x, kernel, sizes), x, kernel)[1](aim)  # noqa: B023

            cells += [measured(function, x, kernel, sizes, rounds=rounds) for function in (forward, gradients)]
        print(f"| {rows}, {experts}, {inputs}, {outputs} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
