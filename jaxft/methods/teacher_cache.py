"""The teacher's largest log-probabilities at every trained token, computed once and kept in the run folder."""

# B batch, S sequence, K cached tokens, R those and the remaining probability, n tokens of a document

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxft.checkpoint.load import resolve
from jaxft.config import RunConfig
from jaxft.data.batch import Batch, Example
from jaxft.data.loader import Loader
from jaxft.files.atomic import new_folder
from jaxft.files.run_folder import CONFIG, TEACHER
from jaxft.methods import sequences
from jaxft.methods.frozen import FrozenModel, frozen_arrays
from jaxft.methods.method import Run
from jaxft.objectives.distill import FrozenArrays, as_teacher
from jaxft.objectives.token_divergence import TopLogps, top_logps
from jaxft.sharding.arrays import from_rows, to_host
from jaxft.sharding.processes import is_primary, on_primary

# Arrays of `Batch.arrays`, [B, S, K] int32 and [B, S, R] float32: the fields of `TopLogps`.
TEACHER_IDS, TEACHER_LOGPS = "teacher_ids", "teacher_logps"
FILES = {TEACHER_IDS: "ids.npy", TEACHER_LOGPS: "logps.npy"}


def with_teacher_logps(run: Run, teacher: FrozenModel) -> Run:
    """The run with `teacher_ids` and `teacher_logps` in the arrays of every example.

    They are files of the run folder under a hash of the teacher, the tokens and the settings, which appear whole or not
    at all; the teacher is loaded only if they are not there, and its memory is freed again. Without a run folder, as in
    an evaluation, they are made anew.
    """
    load, data = functools.cache(lambda: frozen_arrays(teacher.load(run.mesh))), run.data
    trained = data.train_examples
    if trained:
        trained = _with_files(run, teacher, trained, load)
        ends = np.cumsum([0, *(len(one.examples) for one in data.sets)])
        cuts = zip(data.sets, ends, ends[1:], strict=False)
        data = replace(data, sets=tuple(replace(one, examples=trained[start:end]) for one, start, end in cuts))
        run = replace(run, source=sequences.source(run.config, data, run.tokenizer))
    if data.eval_examples:
        data = replace(data, eval_examples=_with_files(run, teacher, data.eval_examples, load))
    return replace(run, data=data)


def _with_files(
    run: Run, teacher: FrozenModel, examples: Sequence[Example], load: Callable[[], FrozenArrays]
) -> list[Example]:
    """The examples with arrays that are views of files, which are written first if they are not there."""
    folder = run.folder / TEACHER / _hash(run.config, teacher, examples)
    if on_primary(folder.is_dir):
        return _read(folder, examples)
    if on_primary((run.folder / CONFIG).is_file):
        _write(run, examples, load(), folder)
        return _read(folder, examples)
    with tempfile.TemporaryDirectory() as scratch:
        _write(run, examples, load(), Path(scratch) / TEACHER)
        return _read(Path(scratch) / TEACHER, examples)


def _hash(config: RunConfig, teacher: FrozenModel, examples: Iterable[Example]) -> str:
    folder = resolve(teacher.path, teacher.revision)
    files = sorted(os.scandir(folder), key=lambda entry: entry.name) if os.path.isdir(folder) else []
    settings = config.method.distill
    known = asdict(teacher) | {
        "hf_config": teacher.hf_config(),
        "files": [(entry.name, entry.stat().st_size) for entry in files if entry.is_file()],
        "cache_top_k": settings.cache_top_k,
        "temperature": settings.temperature,
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for example in examples:
        for array in (example.tokens, example.mask):
            digest.update(np.int64(len(array)).tobytes() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _write(run: Run, examples: Sequence[Example], teacher: FrozenArrays, folder: Path) -> None:
    """Computes and writes the arrays of all tokens, one example after another. All processes take part."""
    if not is_primary():
        for _ in _computed(run, examples, teacher):
            pass
        on_primary(lambda: None)
        return
    count = run.config.method.distill.cache_top_k or 0
    tokens = sum(map(len, examples))
    with new_folder(folder) as unfinished:
        shapes = {TEACHER_IDS: ((tokens, count), np.int32), TEACHER_LOGPS: ((tokens, count + 1), np.float32)}
        # Rows of untrained tokens are never written, and take no room on most file systems.
        files = {
            name: np.lib.format.open_memmap(unfinished / FILES[name], mode="w+", dtype=dtype, shape=shape)
            for name, (shape, dtype) in shapes.items()
        }
        starts = np.cumsum([0, *map(len, examples)])
        for index, arrays in _computed(run, examples, teacher):
            trained = np.flatnonzero(examples[index].mask)
            for name, array in arrays.items():
                files[name][starts[index] + trained] = array[trained]
        for file in files.values():
            file.flush()
    on_primary(lambda: None)  # the others go on once the files are there


def _computed(
    run: Run, examples: Sequence[Example], teacher: FrozenArrays
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(index of an example, its arrays by name, [n, ...])."""
    config = run.config
    loader = Loader(
        examples,
        batch_size=config.train.batch_size // config.train.accumulation_steps,
        max_length=config.data.max_length,
        packing=config.data.packing,
        pad_id=run.tokenizer.pad_id,
    )
    top_of = jax.jit(run.mesh.bind(_top_of(config)))
    for number in range(loader.eval_steps):
        batch = from_rows(partial(loader.eval_batch, number), loader.batch_size, run.mesh.batch_sharding())
        ids_BSK, logps_BSR = map(to_host, top_of(teacher, batch))
        for row, sequence in enumerate(loader.plan[number * loader.batch_size :][: loader.batch_size]):
            start = 0
            for index in sequence:
                end = start + len(examples[index])
                arrays = {TEACHER_IDS: ids_BSK[row, start:end], TEACHER_LOGPS: logps_BSR[row, start:end]}
                # What a position predicts belongs to the token after it.
                yield index, {name: np.roll(array, 1, axis=0) for name, array in arrays.items()}
                start = end


def _top_of(config: RunConfig) -> Callable[[FrozenArrays, Batch[jax.Array]], TopLogps]:
    settings = config.method.distill

    def top_of(arrays: FrozenArrays, batch: Batch[jax.Array]) -> TopLogps:
        teacher = as_teacher(arrays.model, batch)
        return top_logps(teacher, batch.weights_BS, settings.cache_top_k or 0, temperature=settings.temperature)

    return top_of


def _read(folder: Path, examples: Sequence[Example]) -> list[Example]:
    # The files stay on disk: a batch reads the rows that it needs.
    files = {name: np.load(folder / file, mmap_mode="r") for name, file in FILES.items()}
    ends = np.cumsum([0, *map(len, examples)])

    def arrays(start: int, end: int) -> dict[str, np.ndarray]:
        return {name: file[start:end] for name, file in files.items()}

    return [
        replace(example, arrays={**example.arrays, **arrays(start, end)})
        for example, start, end in zip(examples, ends, ends[1:], strict=False)
    ]
