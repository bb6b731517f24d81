"""A frozen reference's log-probabilities of all documents, computed once before training and kept in the run folder."""

# B batch, S sequence, P documents that a row can hold

import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.checkpoint.load import is_adapter, resolve, resolve_base
from jaxft.config import RunConfig
from jaxft.data.batch import Batch, Example
from jaxft.errors import ModelError
from jaxft.files.atomic import write_file
from jaxft.files.buckets.working_copy import shown
from jaxft.files.paths import sizes_and_times
from jaxft.files.run_folder import BASE, REFERENCE
from jaxft.files.weights_digest import weights_digest
from jaxft.methods.method import Run
from jaxft.methods.parts import sequences
from jaxft.methods.parts.reference import REFERENCE_LOGPS, is_cached
from jaxft.nn.decoder import Decoder
from jaxft.sharding.arrays import to_host
from jaxft.sharding.processes import on_primary
from jaxft.sharding.shared_folder import share
from jaxft.training.state import divide
from jaxft.training.step import rounded

HELD_OUT = "held out"  # a name that no training set can have, because of the space

# (model, batch) -> the log-probability of each document, [B, P], as the loss compares it with the policy's.
LogpsOf = Callable[[Decoder, Batch[jax.Array]], jax.Array]
# The examples of a set -> those whose documents are scored, in an order of their own.
Scored = Callable[[Sequence[Example]], list[Example]]
# (examples of a set, its scored examples, which now carry their sums) -> the examples of the set with their sums.
Joined = Callable[[Sequence[Example], list[Example]], list[Example]]


def with_reference_logps(
    run: Run,
    base: Callable[[], Decoder],
    logps_of: LogpsOf,
    *,
    settings: Any = None,
    scored: Scored = list,
    joined: Joined = lambda examples, scored: scored,
) -> Run:
    """The run, whose documents carry the reference's log-probabilities as values REFERENCE_LOGPS, if they are cached.

    The reference is the model at the start of the run, with its fresh adapter: base(). What was computed is a file of
    the run folder, under a hash of the model's files, of its precision and quantization, of the tokens, and of
    `settings`, JSON values that `logps_of` depends on. A set whose hash is another is computed anew. An evaluation
    computes held-out rows alone and writes nothing. All processes must call this.
    """
    if not is_cached(run.config):
        return run
    data, file = run.data, run.folder / REFERENCE
    sets = {} if run.held_out_only else {one.name: scored(one.examples) for one in data.sets}
    if data.eval_examples is not None:
        sets[HELD_OUT] = scored(data.eval_examples)
    hashes = on_primary(lambda: {name: _hash(run, examples, settings) for name, examples in sets.items()})
    kept = on_primary(lambda: sorted(_read(file, hashes)))
    if kept:
        share(file)
    sums = {name: values for name, values in _read(file, hashes).items() if name in kept} if kept else {}
    if len(sums) < len(sets):
        if on_primary(file.is_file):
            run.print_line(f"{shown(file)} belongs to another model or other rows, so it is computed again")
        score = _scorer(run, base(), logps_of)
        sums |= {name: _computed(run, name, rows, score) for name, rows in sets.items() if name not in sums}
        if not run.held_out_only:
            on_primary(lambda: _write(file, hashes, sums))
    with_sums = {name: _with_values(examples, sums[name]) for name, examples in sets.items()}
    held_out = None if data.eval_examples is None else joined(data.eval_examples, with_sums[HELD_OUT])
    if run.held_out_only:
        return replace(run, data=replace(data, eval_examples=held_out))
    train = tuple(replace(one, examples=joined(one.examples, with_sums[one.name])) for one in data.sets)
    data = replace(data, sets=train, eval_examples=held_out)
    return replace(run, data=data, source=sequences.source(run.config, data, run.tokenizer))


def _scorer(run: Run, model: Decoder, logps_of: LogpsOf) -> Callable[[Batch[jax.Array]], np.ndarray]:
    """`batch -> [B, P]` on the host of every process, by the model as the first training step computes with it."""
    graphdef, trainable, frozen = divide(model)
    dtype = jnp.dtype(run.config.train.gradient_dtype or run.config.model.dtype)

    def logps(trainable: nnx.State, frozen: nnx.State, batch: Batch[jax.Array]) -> jax.Array:
        return logps_of(nnx.merge(graphdef, rounded(trainable, dtype), frozen), batch)

    compiled = jax.jit(run.mesh.bind(logps))
    return lambda batch: to_host(compiled(trainable, frozen, batch))


def _computed(
    run: Run, name: str, examples: Sequence[Example], score: Callable[[Batch[jax.Array]], np.ndarray]
) -> np.ndarray:
    """The sums of all documents, example after example, float32."""
    counts = [len(example.documents) for example in examples]
    starts = np.cumsum([0, *counts])
    out = np.zeros(starts[-1], np.float32)
    run.print_line(f"reference log-probabilities of {starts[-1]:,} documents ({name}) ...")
    for batch, rows in sequences.each_once(run, examples, f"reference log-probabilities ({name})"):
        logps_BP = score(batch)
        for row, sequence in enumerate(rows):
            first = 0
            for index in sequence:
                _check_finite(name, index, logps_BP[row, first : first + counts[index]])
                out[starts[index] : starts[index + 1]] = logps_BP[row, first : first + counts[index]]
                first += counts[index]
    return out


def _check_finite(name: str, index: int, logps: np.ndarray) -> None:
    if not np.isfinite(logps).all():
        raise ModelError(
            f"the reference gives row {index + 1} of the training sequences ({name}) the log-probabilities "
            f"{logps.tolist()}, which are not all finite, and every loss on them would not be a number. Set "
            "model.dtype='float32'; if it stays so, the base model is damaged: fetch it again."
        )


def _with_values(examples: Sequence[Example], sums: np.ndarray) -> list[Example]:
    out, first = [], 0
    for example in examples:
        end = first + len(example.documents)
        own = tuple(float(value) for value in sums[first:end])
        out.append(replace(example, values={**example.values, REFERENCE_LOGPS: own}))
        first = end
    return out


def _hash(run: Run, examples: Iterable[Example], settings: Any) -> str:
    """The cache key of a set's sums: everything that they depend on except the devices."""
    return sequences.digest_of({"model": _model_of(run.config, run.folder), "settings": settings}, examples)


def _model_of(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What the model at the start of a run depends on: its files, the section `model`, and a start by LoftQ."""
    if config.model.random_init:  # by its contents: a copy of the run, as on another host, has other times
        path = str(folder / BASE)
        known = asdict(config.model) | {"files": weights_digest(path)}
    else:
        path = resolve(config.model.path, config.model.revision)
        known = asdict(config.model) | {"files": sizes_and_times(path)}
    if is_adapter(path):
        known["base"] = sizes_and_times(resolve_base(path, config.model.base))
    known |= {"gradient_dtype": config.train.gradient_dtype}
    if config.adapter.kind == "lora" and config.adapter.init_lora_weights.startswith("loftq"):
        known |= {"adapter": asdict(config.adapter), "seed": config.seed}
    return known


def _read(file: Path, hashes: dict[str, str]) -> dict[str, np.ndarray]:
    """The sums of the sets whose hash is the same; those that cannot be read are computed anew."""
    try:
        with np.load(file, allow_pickle=False) as content:
            known = json.loads(str(content["hashes"]))
            if not isinstance(known, dict):
                return {}
            sums = {name: content[own] for name, own in hashes.items() if known.get(name) == own and own in content}
            return {name: values for name, values in sums.items() if np.isfinite(values).all()}
    except (ValueError, KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile):  # whatever is damaged in it
        return {}


def _write(file: Path, hashes: dict[str, str], sums: dict[str, np.ndarray]) -> None:
    arrays: dict[str, Any] = {hashes[name]: values for name, values in sums.items()}
    write_file(file, lambda out: np.savez(out, hashes=np.array(json.dumps(hashes)), **arrays))
