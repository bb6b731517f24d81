"""The teacher's largest log-probabilities at every trained token, computed once and kept in the run folder."""

# B batch, S sequence, K cached tokens, R those and the remaining probability, n tokens of a document

import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np

from jaxft.checkpoint.load import resolve
from jaxft.config import RunConfig
from jaxft.data.batch import Batch, Example
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.atomic import new_folder
from jaxft.files.paths import sizes_and_times
from jaxft.files.run_folder import TEACHER
from jaxft.methods.method import Run
from jaxft.methods.parts import sequences
from jaxft.methods.teacher.frozen import FrozenModel, frozen_arrays
from jaxft.objectives.distill import FrozenArrays, as_teacher
from jaxft.objectives.token_divergence import TopLogps, top_logps
from jaxft.sharding.arrays import to_host
from jaxft.sharding.processes import is_primary, on_primary
from jaxft.sharding.shared_folder import share

# Arrays of `Batch.arrays`, [B, S, K] int32 and [B, S, R] float32: the fields of `TopLogps`.
TEACHER_IDS, TEACHER_LOGPS = "teacher_ids", "teacher_logps"
FILES = {TEACHER_IDS: "ids.npy", TEACHER_LOGPS: "logps.npy"}


def with_teacher_logps(run: Run, teacher: FrozenModel) -> Run:
    """The run with `teacher_ids` and `teacher_logps` in the arrays of every example.

    They are files of the run folder under a hash of the teacher, the tokens and the settings, which appear whole or not
    at all; the teacher is loaded only if they are not there, and its memory is freed again. An evaluation computes
    held-out rows alone and writes nothing into the run folder.
    """
    load, data = functools.cache(lambda: frozen_arrays(teacher.load(run.mesh))), run.data
    if not run.held_out_only:
        trained = _with_files(run, teacher, data.train_examples, load)
        ends = np.cumsum([0, *(len(one.examples) for one in data.sets)])
        cuts = zip(data.sets, ends, ends[1:], strict=False)
        data = replace(data, sets=tuple(replace(one, examples=trained[start:end]) for one, start, end in cuts))
        run = replace(run, source=sequences.source(run.config, data, run.tokenizer))
    if data.eval_examples is not None:
        data = replace(data, eval_examples=_with_files(run, teacher, data.eval_examples, load))
    return replace(run, data=data)


def _with_files(
    run: Run, teacher: FrozenModel, examples: Sequence[Example], load: Callable[[], FrozenArrays]
) -> list[Example]:
    """The examples with arrays that are views of files, which are written first if they are not there."""
    folder = run.folder / TEACHER / on_primary(lambda: _hash(run.config, teacher, examples))
    if on_primary(folder.is_dir):
        share(folder)
        return _read(folder, examples)
    run.print_line(f"the teacher's log-probabilities of {len(examples):,} rows ...")
    if not run.held_out_only:
        _write(run, examples, load(), folder)
        share(folder)
        return _read(folder, examples)
    with tempfile.TemporaryDirectory() as scratch:
        _write(run, examples, load(), Path(scratch) / TEACHER)
        return _read(Path(scratch) / TEACHER, examples)


def _hash(config: RunConfig, teacher: FrozenModel, examples: Iterable[Example]) -> str:
    settings = config.method.distill
    known = asdict(teacher) | {
        "files": sizes_and_times(resolve(teacher.path, teacher.revision)),
        "cache_top_k": settings.cache_top_k,
        "temperature": settings.temperature,
    }
    return sequences.digest_of(known, examples)


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
    top_of = jax.jit(run.mesh.bind(_top_of(run.config)))
    for batch, rows in sequences.each_once(run, examples, "the teacher's log-probabilities"):
        ids_BSK, logps_BSR = map(to_host, top_of(teacher, batch))
        for row, sequence in enumerate(rows):
            start = 0
            for index in sequence:
                end = start + len(examples[index])
                arrays = {TEACHER_IDS: ids_BSK[row, start:end], TEACHER_LOGPS: logps_BSR[row, start:end]}
                _check_finite(index, logps_BSR[row, start:end][examples[index].mask[1:].nonzero()[0]])
                # What a position predicts belongs to the token after it.
                yield index, {name: np.roll(array, 1, axis=0) for name, array in arrays.items()}
                start = end


def _check_finite(index: int, logps: np.ndarray) -> None:
    # The remaining probability may be 0, whose logarithm is -inf.
    if np.isnan(logps).any() or np.isposinf(logps).any():
        raise ModelError(
            f"the teacher gives training sequence {index + 1} log-probabilities that are not numbers, and no loss on "
            "them would be one. Set model.dtype='float32'; if it stays so, the teacher is damaged: fetch it again."
        )


def _top_of(config: RunConfig) -> Callable[[FrozenArrays, Batch[jax.Array]], TopLogps]:
    settings = config.method.distill

    def top_of(arrays: FrozenArrays, batch: Batch[jax.Array]) -> TopLogps:
        teacher = as_teacher(arrays.model, batch)
        return top_logps(teacher, batch.weights_BS, settings.cache_top_k or 0, temperature=settings.temperature)

    return top_of


def _read(folder: Path, examples: Sequence[Example]) -> list[Example]:
    # The files stay on disk: a batch reads the rows that it needs.
    ends = np.cumsum([0, *map(len, examples)])
    files = {name: _rows_of(folder / file, int(ends[-1])) for name, file in FILES.items()}

    def arrays(start: int, end: int) -> dict[str, np.ndarray]:
        return {name: file[start:end] for name, file in files.items()}

    return [
        replace(example, arrays={**example.arrays, **arrays(start, end)})
        for example, start, end in zip(examples, ends, ends[1:], strict=False)
    ]


def _rows_of(file: Path, tokens: int) -> np.ndarray:
    """The array in a file, a row for each token. Raises CheckpointError if it is damaged."""
    try:
        rows = np.load(file, mmap_mode="r")
        reason = None if rows.ndim == 2 and len(rows) == tokens else f"its shape is {rows.shape}, not of {tokens} rows"
    except (ValueError, EOFError, FileNotFoundError) as error:
        reason = str(error)
    if reason is not None:
        raise CheckpointError(
            f"{file} is damaged: {reason}. Delete the folder {file.parent}, and give the same command again: the "
            "teacher's log-probabilities are then computed anew."
        )
    return rows
