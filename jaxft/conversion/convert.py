"""Converts a model file or folder into another format, tensor by tensor."""

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.console import Console

from jaxft import models
from jaxft.checkpoint import hf
from jaxft.checkpoint.finite import FiniteSource, all_finite
from jaxft.checkpoint.folders.sums import write_sums
from jaxft.checkpoint.gguf.write import gguf_bytes as gguf_bytes
from jaxft.checkpoint.load import is_adapter, open_merged, refuse_base, resolve, resolve_base
from jaxft.checkpoint.merged import MergedSource
from jaxft.checkpoint.peft.folder import AdapterTensors
from jaxft.checkpoint.safetensors_writer import Index, LazyTensor
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.conversion import targets
from jaxft.conversion.progress import progress
from jaxft.data.tokenizers.load import TOKENIZER_FILES, load_tokenizer
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ConfigError, ExportError, JaxftError
from jaxft.files.atomic import publish, unfinished_folder
from jaxft.files.paths import is_file, is_remote, open_folder
from jaxft.files.targets import check_space, locked_output, refuse_address, refused_target
from jaxft.home import local_path
from jaxft.system import described
from jaxft.terminal.console import SafeConsole, say
from jaxft.trees import flatten

STATE = "convert.json"  # in an unfinished folder: source and settings of the conversion
DTYPES = {
    "hf": ("float32", "bfloat16", "float16"),
    "orbax": ("float32", "bfloat16"),
    "gguf": ("float32", "float16", "bfloat16", "q8_0", "q4_k_m", "q5_k_m"),
    "gguf-adapter": ("float32", "float16", "bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model that can be read tensor by tensor.

    base: path of the weights, of which a PEFT folder in `path` changes some. dtypes: of each tensor in the source's
    files. left_out, notes: as in LoadedModel. fingerprint: changes if the source does.
    """

    path: str
    base: str
    hf_config: dict[str, Any]
    source: TensorSource
    dtypes: dict[str, np.dtype]
    generation: dict[str, Any] | None
    tokenizer: Tokenizer | None
    left_out: str | None
    notes: tuple[str, ...]
    fingerprint: dict[str, Any]


def convert(
    source: str,
    to: str,
    *,
    form: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
    revision: str | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    console: Console | None = None,
    allow_unknown: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the model in `source` to `to` in another format and compares the result with the source.

    source: a Hugging Face, PEFT (merged while reading), Orbax or run folder, a GGUF file, an address such as
    gs://bucket/model, or hf://owner/name[@revision]. form: one of DTYPES; by default gguf for a path that ends in
    .gguf, else hf. dtype: of the written tensors, the source's own if None. base: of a PEFT folder, where its base is.
    tokenizer: where the tokenizer is, if not in the source. allow_unknown: as for `load_model`.
    Everything is written in `to`.jaxft.partial and renamed once it is whole and has been compared. After an
    interruption the same call continues (hf) or starts again. Returns paths, sizes, seconds and the checks.
    Raises ConfigError for options that do not fit, CheckpointError or ModelError for a source that is damaged or not
    implemented, ExportError if the target is in the way, the disk is too small or the result differs.
    """
    console = console or SafeConsole()
    form = form or ("gguf" if to.endswith(".gguf") else "hf")
    source, to = local_path(source), local_path(to)
    _check_request(form, dtype, to)
    with locked_output(to, "jaxft convert"):
        return _convert(source, to, form, dtype, max_shard_bytes, revision, base, tokenizer, console, allow_unknown)


def _convert(
    source: str,
    to: str,
    form: str,
    dtype: str | None,
    max_shard_bytes: int,
    revision: str | None,
    base: str | None,
    tokenizer: str | None,
    console: Console,
    allow_unknown: Sequence[str],
) -> dict[str, Any]:
    start = time.monotonic()
    origin = _open_origin(source, revision, base, allow_unknown, tokenizer=tokenizer, merge=form != "gguf-adapter")
    for line in (*([] if origin.left_out is None else [origin.left_out]), *origin.notes):
        say(console, line)
    dtype = dtype or _own_dtype(origin, form)
    _check_space(Path(to), _written_bytes(origin, form, dtype))
    job = origin.fingerprint | {"form": form, "dtype": dtype, "max_shard_bytes": max_shard_bytes}
    with _unfinished(Path(to), job, resumable=form == "hf") as folder:
        report = _write(origin, folder, form, dtype, max_shard_bytes, console)
        if form == "hf":
            write_sums(folder)
        whole = folder / targets.GGUF_NAME if form.startswith("gguf") else folder
        publish(whole, to)
    if form == "hf":
        chats = origin.tokenizer is not None and origin.tokenizer.chat_template is not None
        targets.write_hf_card(Path(to), origin.path, origin.base, origin.hf_config, chats=chats)
    report |= {} if origin.left_out is None else {"left_out": origin.left_out}
    return {"to": to, "form": form, "dtype": dtype, **report, "seconds": round(time.monotonic() - start, 2)}


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
        base=origin.base,
    )
    write = {"hf": targets.write_hf, "gguf": targets.write_gguf, "orbax": targets.write_orbax}[form]
    with progress(console, "writing", total) as advance:
        write(target, _count_bytes(lazy, advance))
    check = {"hf": targets.check_hf, "gguf": targets.check_gguf, "orbax": targets.check_orbax}[form]
    with progress(console, "comparing", total) as advance:
        checks = check(target, _count_bytes(lazy, advance), origin.path)
    written = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return {"tensors": len(lazy), "bytes": written, "checks": checks}


def _check_request(form: str, dtype: str | None, to: str) -> None:
    if form not in DTYPES:
        raise ConfigError(f"--to={form} is not one of {', '.join(DTYPES)}")
    if dtype is not None and dtype not in DTYPES[form]:
        raise ConfigError(f"--dtype={dtype} is not one of {', '.join(DTYPES[form])}, which {form} takes")
    refuse_address(to)
    if form.startswith("gguf") != to.endswith(".gguf"):
        raise ConfigError(f"--to={form} writes {'a file that ends in .gguf' if 'gguf' in form else 'a folder'}: {to}")
    target = Path(to)
    if (problem := refused_target(target)) is not None:
        raise ExportError(f"{to} cannot be written: {problem}")
    if target.is_file() or target.is_symlink() or (target.is_dir() and any(target.iterdir())):
        raise ExportError(f"{to} is already there: choose a new path, or remove it first")


def _written_bytes(origin: Origin, form: str, dtype: str) -> int:
    """Bytes that a conversion will write, without headers and the tokenizer."""
    if form == "gguf-adapter":
        return sum(spec.size * np.dtype(dtype).itemsize for spec in AdapterTensors(origin.path).specs().values())
    lazy = _lazy_tensors(origin, "float32" if form == "gguf" else dtype)
    if form == "gguf":
        return gguf_bytes(lazy, origin.hf_config, dtype)
    return sum(spec.nbytes for spec, _ in lazy.values())


def _check_space(to: Path, size: int) -> None:
    """Raises ExportError if the disk has no room. Files of an earlier call count as room: they are kept or removed."""
    check_space(to, size, sum(f.stat().st_size for f in unfinished_folder(to).rglob("*") if f.is_file()))


def _open_origin(
    named: str,
    revision: str | None,
    base: str | None,
    allow_unknown: Sequence[str],
    *,
    tokenizer: str | None,
    merge: bool,
) -> Origin:
    path = resolve(named, revision)
    adapter = None
    if is_adapter(path):
        adapter, path = path, resolve_base(path, base)
    elif not merge:
        raise ConfigError(f"{named} is not a PEFT folder, so there is no adapter to write")
    else:
        refuse_base(named, base)
    hf_config, weights, generation = open_merged(path, allow_unknown=allow_unknown)
    own, source = weights.specs(), weights.source
    notes = weights.notes
    check_against_config(hf_config, weights)
    if adapter is not None and merge:
        merged = MergedSource(weights, adapter, hf_config)
        hf_config, source, notes = merged.hf_config or hf_config, merged, (*notes, *merged.notes)
    expected = check_against_config(hf_config, source)
    return Origin(
        path=adapter or path,
        base=path,
        hf_config=hf_config,
        source=FiniteSource(source),
        # A head that an adapter unties has the type of the table that it was.
        dtypes={name: own.get(name, own[hf.EMBEDDING]).dtype for name in source.specs() if name in expected},
        generation=generation,
        tokenizer=_find_tokenizer(adapter or path, path, tokenizer),
        left_out=weights.left_out,
        notes=notes,
        fingerprint={"source": [_files_of(p) for p in (path, adapter) if p]},
    )


def check_against_config(hf_config: dict[str, Any], source: TensorSource) -> set[str]:
    """Names of the tensors that config.json asks for. Refuses a source with others, unless they are copies of these."""
    model = models.abstract_model(models.config_from_hf(hf_config))
    table = hf.param_tensors(model)
    hf.check_tensors(flatten(nnx.state(model))[0], table, source)
    return {piece.hf for param in table.values() for piece in param.pieces}


def _find_tokenizer(path: str, base: str, elsewhere: str | None) -> Tokenizer | None:
    if elsewhere is not None:
        return load_tokenizer(elsewhere, model=path)
    for folder in (path, base):
        if folder.endswith(".gguf") or any(is_file(os.path.join(folder, name)) for name in TOKENIZER_FILES):
            return load_tokenizer(folder)
    return None


def _own_dtype(origin: Origin, form: str) -> str:
    own = str(origin.dtypes[hf.EMBEDDING])
    if form == "gguf-adapter" or own not in DTYPES[form]:
        return "float32"
    return own


def _lazy_tensors(origin: Origin, dtype: str) -> dict[str, LazyTensor]:
    """The source's tensors in the source's order, cast when they are read."""
    target = np.dtype(dtype)

    def make(name: str, index: Index | None = None) -> np.ndarray:
        value = origin.source.read(name, index)
        with np.errstate(over="ignore"):  # overflow is refused below, by name
            cast = value.astype(target, copy=False)
        if target == np.float16 and not all_finite(cast):
            raise ExportError(f"tensor {name!r} has values beyond 65504, the end of float16: use bfloat16")
        return cast

    specs = origin.source.specs()
    return {
        name: (TensorSpec(specs[name].shape, target), functools.partial(make, name))
        for name in specs
        if name in origin.dtypes
    }


def _count_bytes(lazy: dict[str, LazyTensor], advance: Callable[[int], None]) -> dict[str, LazyTensor]:
    def watch(spec: TensorSpec, make: Callable[..., np.ndarray]) -> LazyTensor:
        def make_and_count(index: Index | None = None) -> np.ndarray:
            array = make(index)
            advance(array.nbytes)
            return array

        return spec, make_and_count

    return {name: watch(*tensor) for name, tensor in lazy.items()}


def _files_of(path: str) -> list[Any]:
    """Paths, sizes and times of a source's files: they differ for another source, or after a change of this one."""
    if os.path.isfile(path):
        stat = os.stat(path)
        return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]
    folder = open_folder(path)
    files = [n for n in folder.names() if is_remote(path) or os.path.isfile(os.path.join(path, n))]
    times = {} if is_remote(path) else {n: os.stat(os.path.join(path, n)).st_mtime_ns for n in files}
    return [path if is_remote(path) else os.path.abspath(path), [[n, folder.size(n), times.get(n)] for n in files]]


@contextlib.contextmanager
def _unfinished(to: Path, job: dict[str, Any], *, resumable: bool) -> Iterator[Path]:
    """The folder `out` in `to`.jaxft.partial.

    resumable: keep it after an interruption, so that the next call of the same job continues there. Otherwise it is
    removed after an error, and files of a killed call are removed first.
    """
    parent = unfinished_folder(to)
    if parent.exists() and not (parent / STATE).is_file():
        raise ExportError(f"{parent} is in the way and is not an unfinished conversion: remove it")
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{parent} cannot be made. {described(error)}") from error
    folder = parent / "out"
    with open(parent / STATE, "a+", encoding="utf-8") as state:
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
            # Continuing cannot mend an error of ours; after a full disk or Ctrl-C it can.
            if not resumable or isinstance(error, JaxftError):
                shutil.rmtree(parent)
            raise
        shutil.rmtree(parent)
