"""One model file or folder into another format, tensor by tensor."""

import contextlib
import fcntl
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.console import Console

from jaxft import models
from jaxft.checkpoint import hf
from jaxft.checkpoint.finite import FiniteSource, all_finite
from jaxft.checkpoint.gguf.write import gguf_bytes as gguf_bytes
from jaxft.checkpoint.load import base_of, left_out, open_weights, resolve
from jaxft.checkpoint.merged import MergedSource
from jaxft.checkpoint.peft.folder import CONFIG, AdapterTensors
from jaxft.checkpoint.safetensors_writer import Index, LazyTensor
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.conversion import targets
from jaxft.conversion.progress import progress
from jaxft.data.tokenizers.load import TOKENIZER_FILES, load_tokenizer
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ConfigError, ExportError, JaxftError
from jaxft.files.atomic import publish, unfinished_folder
from jaxft.files.paths import is_file, is_remote, open_folder
from jaxft.trees import flatten

STATE = "convert.json"  # in an unfinished folder: of what, and how
SMALL_FILES = 64 * 2**20  # bytes for headers, configs and the tokenizer
DTYPES = {
    "hf": ("float32", "bfloat16", "float16"),
    "orbax": ("float32", "bfloat16"),
    "gguf": ("float32", "float16", "bfloat16", "q8_0"),
    "gguf-adapter": ("float32", "float16", "bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model that can be read tensor by tensor.

    stored: element type of each tensor in its own files. left_out: as in LoadedModel.
    """

    path: str
    hf_config: dict[str, Any]
    source: TensorSource
    stored: dict[str, np.dtype]
    generation: dict[str, Any] | None
    tokenizer: Tokenizer | None
    left_out: str | None
    fingerprint: dict[str, Any]


def convert(
    source: str,
    to: str,
    *,
    form: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
    revision: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Writes the model in `source` to `to` in another format and compares what was written with the source.

    source: a Hugging Face, PEFT (merged on the way), Orbax or run folder, a GGUF file, an address such
    as gs://bucket/model, or hf://owner/name[@revision]. form: one of DTYPES; by default gguf for a path
    that ends so, else hf. dtype: stored type, the source's own where None.
    Everything is written beside the target, in `to`.partial, and renamed when it is whole and compared.
    After an interruption the same command goes on (hf) or begins again. Returns figures.
    Raises ConfigError, CheckpointError, ModelError or ExportError.
    """
    console = console or Console()
    form = form or ("gguf" if to.endswith(".gguf") else "hf")
    _check_request(form, dtype, to)
    start = time.monotonic()
    origin = _origin(source, revision, merge=form != "gguf-adapter")
    if origin.left_out is not None:
        console.print(origin.left_out, highlight=False, soft_wrap=True)
    dtype = dtype or _own_dtype(origin, form)
    _check_space(Path(to), _written_bytes(origin, form, dtype))
    job = origin.fingerprint | {"form": form, "dtype": dtype, "max_shard_bytes": max_shard_bytes}
    with _unfinished(Path(to), job, resumable=form == "hf") as folder:
        figures = _write(origin, folder, form, dtype, max_shard_bytes, console)
        whole = folder / targets.GGUF_NAME if form.startswith("gguf") else folder
        publish(whole, to)
    figures |= {} if origin.left_out is None else {"left_out": origin.left_out}
    return {"to": to, "form": form, "dtype": dtype, **figures, "seconds": round(time.monotonic() - start, 2)}


def _write(
    origin: Origin, folder: Path, form: str, dtype: str, max_shard_bytes: int, console: Console
) -> dict[str, Any]:
    if form == "gguf-adapter":
        return targets.write_gguf_adapter(origin.path, origin.hf_config, folder, dtype)
    lazy = _lazy_tensors(origin, "float32" if form == "gguf" else dtype)
    total = sum(spec.nbytes for spec, _ in lazy.values())
    target = targets.Target(
        folder=folder,
        hf_config=origin.hf_config,
        generation=origin.generation,
        tokenizer=origin.tokenizer,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        name=os.path.basename(os.path.normpath(origin.path)),
    )
    write = {"hf": targets.write_hf, "gguf": targets.write_gguf, "orbax": targets.write_orbax}[form]
    with progress(console, "writing", total) as advance:
        write(target, _watched(lazy, advance))
    check = {"hf": targets.check_hf, "gguf": targets.check_gguf, "orbax": targets.check_orbax}[form]
    with progress(console, "comparing", total) as advance:
        checks = check(target, _watched(lazy, advance), origin.path)
    written = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return {"tensors": len(lazy), "bytes": written, "checks": checks}


def _check_request(form: str, dtype: str | None, to: str) -> None:
    if form not in DTYPES:
        raise ConfigError(f"--to={form} is not one of {', '.join(DTYPES)}")
    if dtype is not None and dtype not in DTYPES[form]:
        raise ConfigError(f"--dtype={dtype} is not one of {', '.join(DTYPES[form])}, which {form} takes")
    if "://" in to:
        raise ConfigError(f"{to}: conversions are written to a local or mounted folder")
    if form.startswith("gguf") != to.endswith(".gguf"):
        raise ConfigError(f"--to={form} writes {'a file that ends in .gguf' if 'gguf' in form else 'a folder'}: {to}")
    target = Path(to)
    if target.is_file() or target.is_symlink() or (target.is_dir() and any(target.iterdir())):
        raise ExportError(f"{to} is already there: choose a new path, or remove it first")


def _written_bytes(origin: Origin, form: str, dtype: str) -> int:
    """How much a conversion will write, in bytes, but for headers and the tokenizer."""
    if form == "gguf-adapter":
        return sum(spec.size * np.dtype(dtype).itemsize for spec in AdapterTensors(origin.path).specs().values())
    lazy = _lazy_tensors(origin, "float32" if form == "gguf" else dtype)
    if form == "gguf":
        return gguf_bytes(lazy, origin.hf_config, dtype)
    return sum(spec.nbytes for spec, _ in lazy.values())


def _check_space(to: Path, size: int) -> None:
    """Raises ExportError where the disk has no room. What an earlier call left there is kept, or goes first."""
    there = next(p for p in to.absolute().parents if p.exists())
    left = sum(f.stat().st_size for f in unfinished_folder(to).rglob("*") if f.is_file())
    free, needed = shutil.disk_usage(there).free, size + SMALL_FILES - left
    if needed > free:
        raise ExportError(
            f"{to} needs {needed / 1e9:.2f} GB and the disk of {there} has {free / 1e9:.2f} GB left: make room, or "
            "choose another disk or a smaller --dtype. Nothing was written."
        )


def _origin(named: str, revision: str | None, *, merge: bool) -> Origin:
    path = resolve(named, revision)
    adapter = None
    if is_file(os.path.join(path, CONFIG)):
        adapter, path = path, resolve(base_of(path), revision)
    elif not merge:
        raise ConfigError(f"{named} is not a PEFT folder, so there is no adapter to write")
    hf_config, source, generation = open_weights(path)
    expected, without = _check_against_config(hf_config, source), left_out(source)
    own = {name: spec.dtype for name, spec in source.specs().items() if name in expected}
    source = FiniteSource(source if adapter is None or not merge else MergedSource(source, adapter))
    return Origin(
        path=adapter or path,
        hf_config=hf_config,
        source=source,
        stored=own,
        generation=generation,
        tokenizer=_tokenizer(adapter or path, path),
        left_out=without,
        fingerprint={"source": [_files_of(p) for p in (path, adapter) if p]},
    )


def _check_against_config(hf_config: dict[str, Any], source: TensorSource) -> set[str]:
    """Names of the tensors that config.json asks for; the source's others are harmless copies, or it is refused."""
    model = models.abstract_model(models.config_from_hf(hf_config))
    table = hf.param_tensors(model)
    hf.check_tensors(flatten(nnx.state(model))[0], table, source)
    return {piece.hf for placed in table.values() for piece in placed.pieces}


def _tokenizer(path: str, base: str) -> Tokenizer | None:
    for place in (path, base):
        if place.endswith(".gguf") or any(is_file(os.path.join(place, name)) for name in TOKENIZER_FILES):
            return load_tokenizer(place)
    return None


def _own_dtype(origin: Origin, form: str) -> str:
    own = str(origin.stored[hf.EMBEDDING])
    if form == "gguf-adapter" or own not in DTYPES[form]:
        return "float32"
    return own


def _lazy_tensors(origin: Origin, dtype: str) -> dict[str, LazyTensor]:
    """The source's tensors in its own order, cast as they are read."""
    target = np.dtype(dtype)

    def make(name: str, index: Index | None = None) -> np.ndarray:
        value = origin.source.read(name, index)
        with np.errstate(over="ignore"):  # refused below, by name
            cast = value.astype(target, copy=False)
        if target == np.float16 and not all_finite(cast):
            raise ExportError(f"tensor {name!r} has values beyond 65504, the end of float16: use bfloat16")
        return cast

    specs = origin.source.specs()
    return {
        name: (TensorSpec(specs[name].shape, target), functools.partial(make, name))
        for name in specs
        if name in origin.stored
    }


def _watched(lazy: dict[str, LazyTensor], advance: Callable[[int], None]) -> dict[str, LazyTensor]:
    def watch(spec: TensorSpec, make: Callable[..., np.ndarray]) -> LazyTensor:
        def made(index: Index | None = None) -> np.ndarray:
            array = make(index)
            advance(array.nbytes)
            return array

        return spec, made

    return {name: watch(*tensor) for name, tensor in lazy.items()}


def _files_of(path: str) -> list[Any]:
    """What tells this source from another, or from itself after a change."""
    if os.path.isfile(path):
        found = os.stat(path)
        return [os.path.abspath(path), found.st_size, found.st_mtime_ns]
    folder = open_folder(path)
    files = [n for n in folder.names() if is_remote(path) or os.path.isfile(os.path.join(path, n))]
    times = {} if is_remote(path) else {n: os.stat(os.path.join(path, n)).st_mtime_ns for n in files}
    return [path if is_remote(path) else os.path.abspath(path), [[n, folder.size(n), times.get(n)] for n in files]]


@contextlib.contextmanager
def _unfinished(to: Path, job: dict[str, Any], *, resumable: bool) -> Iterator[Path]:
    """The folder `out` in `to`.partial, locked.

    It is kept for the next call where that can go on with what is there, else removed when anything
    goes wrong, and whatever a killed call left is removed first.
    """
    parent = unfinished_folder(to)
    if parent.exists() and not (parent / STATE).is_file():
        raise ExportError(f"{parent} is in the way and is not an unfinished conversion: remove it")
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / "out"
    with open(parent / STATE, "a+", encoding="utf-8") as state:
        try:
            fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExportError(f"another conversion is writing {parent}") from error
        state.seek(0)
        if not resumable or state.read() != json.dumps(job):
            shutil.rmtree(folder, ignore_errors=True)
            state.truncate(0)
            state.write(json.dumps(job))
            state.flush()
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        except BaseException as error:
            # What an error of ours says will not get better by going on; a full disk or Ctrl-C may.
            if not resumable or isinstance(error, JaxftError):
                shutil.rmtree(parent)
            raise
        shutil.rmtree(parent)
