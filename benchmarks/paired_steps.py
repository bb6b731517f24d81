"""Steps of training by two trees of jaxft's source in turn, one step each: the ratio of their times.

    git worktree add ../before COMMIT
    python benchmarks/paired_steps.py --before=../before --after=. [--methods=full,lora,qlora]

Each tree has a process of its own, which compiles once and then makes a step whenever it is told to. So both sides see
the same hour of a busy machine, and CPU seconds are counted apart from seconds. The model has the sizes of
SmolLM2-135M, random weights and as many layers as asked for; the rows are random tokens, all of them trained.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import IO, Any

SIZES = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def serve(arguments: argparse.Namespace) -> None:
    """Makes a step for each line of standard input, and prints its seconds, CPU seconds and loss."""
    import jax
    import numpy as np

    from jaxft import models
    from jaxft.config import AdapterConfig, OptimConfig
    from jaxft.data.batch import Batch
    from jaxft.objectives.sft import sft_loss
    from jaxft.optim.make import make_optimizer, make_schedule
    from jaxft.runs.build import attach_adapter
    from jaxft.training.state import create
    from jaxft.training.step import make_train_step

    family = models.config_from_hf(SIZES | {"vocab_size": arguments.vocab, "num_hidden_layers": arguments.layers})
    types = {"dtype": arguments.dtype, "remat": arguments.remat}
    module = models.random_model(
        family, seed=0, quantization="nf4-dq" if arguments.method == "qlora" else None, **types
    )
    kind = "none" if arguments.method == "full" else "lora"
    attach_adapter(module, AdapterConfig(kind=kind, r=16, alpha=32.0), seed=0)
    optim = OptimConfig(schedule="constant", learning_rate=1e-3)
    schedule = make_schedule(optim, 100)
    tx = make_optimizer(optim, schedule)
    graphdef, state = create(module, tx, 0)
    step = jax.jit(make_train_step(graphdef, sft_loss, tx, schedule), donate_argnums=0)
    shape = arguments.batch, arguments.length
    tokens = np.random.default_rng(0).integers(0, arguments.vocab, shape, np.int32)
    places = np.broadcast_to(np.arange(arguments.length, dtype=np.int32), shape).copy()
    batch = Batch(tokens, np.ones_like(tokens), np.ones(shape, np.float32), places, np.ones_like(tokens))
    memory = step.lower(state, batch).compile().memory_analysis()
    print(json.dumps({"temporaries": memory.temp_size_in_bytes}), flush=True)
    for _ in sys.stdin:
        seconds, spent = time.perf_counter(), time.process_time()
        state, metrics = step(state, batch)
        loss = float(metrics["loss"])
        done = {"seconds": time.perf_counter() - seconds, "cpu": time.process_time() - spent, "loss": loss}
        print(json.dumps(done), flush=True)


class Side:
    """The process of one tree."""

    def __init__(self, tree: str, method: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, os.path.abspath(__file__), "--serve", f"--method={method}"]
        command += [f"--{name}={getattr(arguments, name)}" for name in SHARED]
        environment = os.environ | {"PYTHONPATH": os.path.abspath(tree)}
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.temporaries = self._answer()["temporaries"]

    def step(self) -> dict[str, Any]:
        _open(self.process.stdin).write("step\n")
        _open(self.process.stdin).flush()
        return self._answer()

    def end(self) -> None:
        _open(self.process.stdin).close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = _open(self.process.stdout).readline()
        return json.loads(line) if line else sys.exit("a side has ended; its errors are above")


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def compare(method: str, arguments: argparse.Namespace) -> None:
    """Prints the ratios of one method."""
    sides = [Side(tree, method, arguments) for tree in (arguments.before, arguments.after)]
    first = [side.step() for side in sides]
    pairs = [[side.step() for side in sides] for _ in range(arguments.steps)]
    for side in sides:
        side.end()
    for name in ("seconds", "cpu"):
        before, after = (statistics.median(pair[at][name] for pair in pairs) for at in range(2))
        ratios = sorted(pair[0][name] / pair[1][name] for pair in pairs)
        print(
            f"{method} {name}: {before:.2f} before, {after:.2f} after; before / after of pairs: median "
            f"{statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}"
        )
    megabytes = ", ".join(f"{side.temporaries / 1e6:.0f}" for side in sides)
    losses = ", ".join(f"{one['loss']:.6f} to {last['loss']:.6f}" for one, last in zip(first, pairs[-1], strict=True))
    print(f"{method}: temporaries {megabytes} MB; losses {losses}", flush=True)


SHARED = ("batch", "length", "layers", "vocab", "dtype", "remat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", help="a tree of the source")
    parser.add_argument("--after", default=".", help="another")
    parser.add_argument("--methods", default="full,lora", help="of full, lora and qlora, with commas")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--method", default="full", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    for method in arguments.methods.split(","):
        compare(method, arguments)


if __name__ == "__main__":
    main()
