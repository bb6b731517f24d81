"""Cost of each quantised format for a real model: perplexity, bits per weight, error of the kernels.

    python benchmarks/quantization_table.py --model=runs/models/SmolLM2-135M-Instruct --gsm8k=FOLDER --banking77=FOLDER

Perplexity of the model's own next-token predictions, float32, on the first rows of GSM8K's test set (question and
answer as plain text) and on the messages of Banking77's, packed into sequences without attention between rows. The
files are those of openai/grade-school-math and PolyAI-LDN/task-specific-datasets.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.checkpoint.load import LoadedModel, load_model
from jaxft.data import load_tokenizer
from jaxft.data.batch import Batch
from jaxft.nn.quantized import kernels
from jaxft.objectives.sft import sft_loss
from jaxft.quant import FORMATS, dense

ROWS, LENGTH = 4, 512


def texts(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The plain texts of each set."""
    with open(Path(arguments.gsm8k) / "test.jsonl", encoding="utf-8") as file:
        math = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, file)]
    with open(Path(arguments.banking77) / "test.csv", encoding="utf-8") as file:
        bank = [row["text"] for row in csv.DictReader(file)]
    return {"gsm8k": math, "banking77": bank}


def batches(rows: list[str], tokenizer: Any, tokens: int) -> list[Batch]:
    """At least `tokens` tokens of the rows in packed batches."""
    out, sequences, sequence = [], [], []
    for row in rows:
        ids = tokenizer.encode(row)[: LENGTH - 1]
        if sum(map(len, sequence)) + len(ids) > LENGTH:
            sequences.append(sequence)
            sequence = []
        sequence.append(ids)
        if len(sequences) == ROWS:
            out.append(_batch(sequences))
            sequences = []
            if len(out) * ROWS * LENGTH >= tokens:
                break
    return out


def _batch(sequences: list[list[list[int]]]) -> Batch:
    arrays = {name: np.zeros((ROWS, LENGTH), np.int32) for name in Batch._fields}
    arrays["weights_BS"] = arrays["weights_BS"].astype(np.float32)
    for b, sequence in enumerate(sequences):
        start = 0
        for segment, ids in enumerate(sequence, start=1):
            here = slice(start, start + len(ids))
            arrays["tokens_BS"][b, here], arrays["segments_BS"][b, here] = ids, segment
            arrays["positions_BS"][b, here] = np.arange(len(ids))
            arrays["targets_BS"][b, start : start + len(ids) - 1] = ids[1:]
            arrays["weights_BS"][b, start : start + len(ids) - 1] = 1.0
            start += len(ids)
    return Batch(**arrays)


def perplexity(loaded: LoadedModel, rows: list[Batch]) -> float:
    """exp of the mean loss of every next token."""
    graphdef, state = nnx.split(loaded.module)
    step = jax.jit(lambda state, batch: sft_loss(nnx.merge(graphdef, state), batch, None))
    sums = [step(state, batch) for batch in rows]
    return float(np.exp(sum(float(s.total) for s in sums) / sum(float(s.weight) for s in sums)))


def bits_per_weight(loaded: LoadedModel) -> float:
    """Bits per weight of the linear layers, scales included."""
    values = [layer.kernel.get_value() for layer in kernels(loaded.module).values()]
    size = sum(np.prod(value.shape) for value in values)
    return 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(values)) / size


def kernel_error(loaded: LoadedModel, base: LoadedModel) -> float:
    """Root mean square of the kernels' errors, divided by that of the kernels."""
    error = norm = 0.0
    for ours, theirs in zip(kernels(loaded.module).values(), kernels(base.module).values(), strict=True):
        exact = theirs.kernel.get_value()
        kernel = dense(ours.kernel.get_value(), jnp.float32)
        error, norm = error + float(jnp.sum((kernel - exact) ** 2)), norm + float(jnp.sum(exact**2))
    return (error / norm) ** 0.5


def main() -> None:
    """Prints one line of a Markdown table for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--banking77", required=True)
    parser.add_argument("--tokens", type=int, default=16384, help="of each set, about")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    sets = {name: batches(rows, tokenizer, arguments.tokens) for name, rows in texts(arguments).items()}
    counted = {name: int(sum(batch.weights_BS.sum() for batch in rows)) for name, rows in sets.items()}
    print(" | ".join(["format", "bits a weight", "kernel error", *(f"{n} ({c:,} tokens)" for n, c in counted.items())]))
    base = load_model(arguments.model)
    for name in (None, *FORMATS):
        loaded = base if name is None else load_model(arguments.model, quantization=name)
        columns = [f"{bits_per_weight(loaded):.2f}", f"{kernel_error(loaded, base):.4f}"]
        columns += [f"{perplexity(loaded, rows):.3f}" for rows in sets.values()]
        print(" | ".join([name or "float32", *columns]), flush=True)


if __name__ == "__main__":
    main()
