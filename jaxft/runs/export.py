"""Writes trained models and adapters for other programs, and checks that these can read them."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx
from rich.console import Console

from jaxft.adapters.attach import StartParam, adapters, virtual_modules
from jaxft.adapters.critic import drop_critic
from jaxft.checkpoint import hf, peft
from jaxft.checkpoint.folders.sums import write_sums
from jaxft.checkpoint.hub.card import write_card
from jaxft.checkpoint.hub.push import Push
from jaxft.checkpoint.load import LoadedModel, load_model, resolve
from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.checkpoint.steps.access import steps_in
from jaxft.checkpoint.verify import Check, check_export, is_score_model, output_difference
from jaxft.config import RunConfig
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.padding import with_separate_pad
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import CheckpointError, ConfigError
from jaxft.files.atomic import unfinished_folder
from jaxft.files.buckets.working_copy import checkpoints_of, run_in_bucket, shown
from jaxft.files.buckets.working_copy import push as push_folder
from jaxft.files.companions import copy_companions
from jaxft.files.run_folder import ADAPTER, BASE, MERGED, MODEL, is_run_folder
from jaxft.files.targets import check_space, locked_output, whole_folder
from jaxft.home import local_path
from jaxft.runs.build import build_model
from jaxft.runs.cards.run_card import base_of_export, card_of
from jaxft.runs.folder import refuse_other_base, run_config
from jaxft.runs.identity.contents import base_read
from jaxft.runs.identity.exports import begin_export, end_export
from jaxft.runs.identity.record import record_of
from jaxft.sharding.mesh import MeshPlan
from jaxft.sharding.processes import is_multi_process, on_primary
from jaxft.sharding.shared_folder import uploaded
from jaxft.terminal.console import say
from jaxft.training.state import divide

READS = 5  # of steps that a run deletes while they are read
Value = TypeVar("Value")
FORMATS = ("adapter", "merged")
BASES = ("trained", "original")


def export(
    source: str,
    to: str,
    *,
    format: str = "merged",
    dtype: str | None = None,
    step: int | None = None,
    base: str = "trained",
    allow_unknown: Sequence[str] = (),
    push: Push | None = None,
) -> dict[str, Any]:
    """Writes a model as a PEFT folder (`adapter`) or a whole Hugging Face folder (`merged`).

    source: a run folder, a PEFT folder, a Hugging Face folder or a GGUF file. step: a checkpoint of a run folder; None:
    the one that the run has exported, or its newest. dtype: type of a merged model's tensors in the files; None: that
    of its base's own files, or float32 if a run trained all of it. base: of a PEFT folder, where its base is; for a run
    with a quantised base, what the adapter is merged into: `trained`, the dequantised kernels, or `original`, the
    kernels before quantisation, which gives another model than the one that was trained. allow_unknown: as for
    `load_model`, if the source is not a run folder, which has its own.
    Returns the folder; what was `compared`, logits or a reward model's scores; the largest (`checks`) and mean (`mean`)
    difference between those of the live model and of each reader of the export, as shares of the largest (for `merged`
    this is the change by merging); and, of a
    model that takes images too, the parts that were left out. For a run with a quantised base also the loss by merging:
    `original_base`, the difference between the model merged into the original base and the trained one, or
    `quantised_again`, the difference once the merged model is quantised like its base. Raises ExportError if a reader
    differs by more than rounding. push: the repository on the Hugging Face Hub to which the folder is uploaded once it
    was read back, whose address is then returned as `pushed`.
    """
    source = run_in_bucket(local_path(source))
    elsewhere = _check_request(source, base, format, push)
    with locked_output(to, "jaxft export"):
        with whole_folder(local_path(to)) as unfinished:
            out, hub_base = _export(source, unfinished, format, dtype, step, base, elsewhere, allow_unknown, push)
        out["folder"] = local_path(to)
        if push is not None:
            out["pushed"] = push.push(Path(local_path(to)), hub_base)
        return out


def _export(
    source: str,
    target: Path,
    format: str,
    dtype: str | None,
    step: int | None,
    base: str,
    elsewhere: str | None,
    allow_unknown: Sequence[str],
    push: Push | None,
) -> tuple[dict[str, Any], str | None]:
    """`export` into an empty folder: what it returns, and the base's name on the Hub."""
    loaded = load_trained(source, step, base=elsewhere, allow_unknown=allow_unknown)
    known = base_of_export(loaded)
    if push is not None:
        known = push.with_base(known, loaded.base, adapter=format == "adapter")
    quantization = loaded.quantization if format == "merged" else None
    if base == "original" and quantization is None:
        raise ConfigError("base='original' is for merging an adapter whose base was quantised, and this base was not")
    trained = loaded
    if base == "original":
        loaded = load_trained(source, step, quantized=False)
    tokenizer = load_tokenizer(source, base=elsewhere)
    checks = write(loaded, tokenizer, target, format=format, dtype=dtype)
    run = Path(source) if is_run_folder(source) else None
    write_card(target, card_of(loaded, tokenizer, checks, form=format, base=known, run=run, step=step))
    out = _report(loaded, target, format, checks)
    if loaded.notes:
        out["notes"] = list(loaded.notes)
    if base == "original":
        out["original_base"] = output_difference(loaded, trained)
    elif quantization is not None:
        again = load_model(str(target), dtype=str(loaded.module.dtype), quantization=quantization)
        out["quantised_again"] = output_difference(again, trained)
    return out, known.name


def _check_request(source: str, base: str, format: str, push: Push | None) -> str | None:
    """Refuses what cannot be exported, and returns where the base of a PEFT folder is, if `base` says so."""
    elsewhere = None if base in BASES else base
    if elsewhere is not None and is_run_folder(local_path(source)):
        raise ConfigError(
            f"base {base!r} is not one of {', '.join(BASES)}, and a path is for PEFT folders: a run's base is in its "
            "config (model.path)"
        )
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if push is not None:
        push.check()
    return elsewhere


def _report(loaded: LoadedModel, target: Path, format: str, checks: Sequence[Check]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "folder": str(target),
        "format": format,
        "compared": _compared(loaded),
        "checks": {check.reader: check.difference for check in checks},
        "mean": {check.reader: check.mean for check in checks},
    }
    return out if loaded.left_out is None else out | {"left_out": loaded.left_out}


def load_trained(
    source: str,
    step: int | None = None,
    *,
    quantized: bool = True,
    base: str | None = None,
    allow_unknown: Sequence[str] = (),
) -> LoadedModel:
    """Loads a model of any kind; of a run folder, the evaluated weights of a checkpoint, without a critic.

    step: of a run folder; None: the one that the run has exported, or the newest if training has not ended. quantized:
    False puts a run's adapter on its base in the base's original precision. allow_unknown: as for `export`. Raises
    ConfigError for a step of anything but a run folder, for a run without a checkpoint, and for a run whose base has
    other weights than it was trained on.
    """
    source = run_in_bucket(local_path(source))
    if not is_run_folder(source):
        if step is not None:
            raise ConfigError(f"{source} is not a run folder, so it has no step {step}")
        return load_model(source, base=base, allow_unknown=allow_unknown)
    config = run_config(source)
    if not quantized:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization=None))
    refuse_other_base(Path(source), {"model.path": base_read(config)})
    loaded = build_model(config, random_base=Path(source) / BASE)
    _, trainable, frozen = divide(loaded.module)
    start = nnx.filter_state(frozen, StartParam)  # initial values of adapters, which are frozen, but saved

    def read(checkpoints: RunCheckpoints, step: int) -> None:
        saved = checkpoints.open(step)
        if saved is None:
            raise RuntimeError(f"step {step} is None")
        weights = saved.evaluated_weights(trainable, use_average=config.train.use_ema)
        nnx.update(loaded.module, weights, saved.read_parts({"start": start})["start"])

    read_step(Path(source), step, read, preferred=record_of(Path(source)).exported)
    drop_critic(loaded.module)
    return loaded


def read_step(
    folder: Path, step: int | None, read: Callable[[RunCheckpoints, int], Value], *, preferred: int | None = None
) -> Value:
    """What `read` returns of a whole step of a run that may be running: again of a newer one, if the run deletes it.

    step: None: the `preferred` one if it is there, else the newest. Raises ConfigError for a run without a whole step,
    and for a given step that is deleted meanwhile; CheckpointError if READS steps in a row are deleted while they are
    read; and as `read` does.
    """
    with RunCheckpoints(checkpoints_of(folder), keep=1, read_only=True) as checkpoints:
        for _ in range(READS):
            steps = on_primary(checkpoints.all_steps)
            if not steps:
                raise ConfigError(f"{folder} has no whole checkpoint yet")
            chosen = preferred if step is None and preferred in steps else max(steps) if step is None else step
            try:
                return read(checkpoints, chosen)
            except Exception as error:  # whatever a library says of files that have gone
                # Several processes would have to agree that it is read again.
                if is_multi_process() or chosen not in steps or steps_in(checkpoints.folder).exists(chosen):
                    raise
                if step is not None:
                    raise ConfigError(
                        f"step {step} of {folder} was deleted while it was read: the run that writes there keeps its "
                        f"newest steps alone. It has {list(checkpoints.all_steps())} now: name one of them, or none "
                        "for the newest, or raise checkpoint.keep of the run."
                    ) from error
        raise CheckpointError(
            f"{READS} steps of {folder} in a row were deleted while they were read: the run saves faster than they can "
            "be read. Wait until it ends, or give it a larger checkpoint.keep or checkpoint.every."
        )


def export_step(loaded: LoadedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the model of a checkpoint as the run's own export is written, with checksums, but does not read it back.

    folder: empty. For runs of one process.
    """
    trained_all = not (adapters(loaded.module) or virtual_modules(loaded.module))
    write_unchecked(loaded, tokenizer, folder, format="merged" if trained_all else "adapter")
    write_sums(folder)


def export_run(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    config: RunConfig,
    folder: Path,
    console: Console,
    mesh: MeshPlan | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The exports that a run's config asks for. Returns their folders' names and the checks.

    between: called before each of them, and before it is read back; it may raise, to stop there.
    """
    out: dict[str, Any] = {}
    wanted = []
    if adapters(loaded.module) or virtual_modules(loaded.module):
        wanted += [("adapter", ADAPTER)] if config.export.adapter else []
        wanted += [("merged", MERGED)] if config.export.merged else []
    else:
        wanted.append(("merged", MODEL))
    for format, name in wanted:
        between()
        on_primary(partial(begin_export, folder, name))
        target = unfinished_folder(folder / name)
        checks = write(loaded, tokenizer, target, format=format, mesh=mesh, between=between)
        on_primary(partial(_write_run_card, target, loaded, tokenizer, checks, format, folder))
        on_primary(partial(end_export, folder, name))
        on_primary(partial(push_folder, folder))
        out[name] = name
        out[f"{name}_checks"] = {c.reader: c.difference for c in checks}
        out[f"{name}_mean"] = {c.reader: c.mean for c in checks}
        read_back = _check_text(checks, _compared(loaded))
        say(console, f"{shown(folder / name)}: read back by {read_back}")
    return out


def write(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    target: Path,
    *,
    format: str,
    dtype: str | None = None,
    mesh: MeshPlan | None = None,
    between: Callable[[], None] = lambda: None,
) -> tuple[Check, ...]:
    """Writes one export and checks it. Every process takes part; process 0 writes.

    dtype: of a merged model's tensors in the files; that of the base's own files if None. mesh: where the model is.
    between: called before the check; it may raise, to stop there.
    """
    loaded, file_dtype = write_unchecked(loaded, tokenizer, target, format=format, dtype=dtype)
    between()
    checks = check_export(loaded, uploaded(target), dtype=file_dtype, mesh=mesh)
    on_primary(partial(write_sums, target))
    return checks


def write_unchecked(
    loaded: LoadedModel, tokenizer: Tokenizer, target: Path, *, format: str, dtype: str | None = None
) -> tuple[LoadedModel, str]:
    """Writes one export as `write` does, without its checksums and without reading it back.

    Returns the model as it was written, and the type of its tensors in the files.
    """
    file_dtype = dtype or loaded.file_dtype
    if is_score_model(loaded):
        tokenizer = with_separate_pad(tokenizer)
        ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        loaded = dataclasses.replace(loaded, hf_config=loaded.hf_config | ids)
    if format == "adapter":
        base = shown(loaded.base if "://" in loaded.base else os.path.abspath(loaded.base))
        peft.write_adapter(loaded.module, str(target), base=base, nested=loaded.left_out is not None)
        file_dtype = "float32"
    else:
        on_primary(partial(_check_room, loaded, target, file_dtype))
        hf.write_weights(loaded.module, str(target), dtype=file_dtype)

    def write_config_and_tokenizer() -> None:
        if format != "adapter":
            generation = tokenizer.generation_config(loaded.generation)
            hf.write_config(str(target), loaded.hf_config, dtype=file_dtype, generation=generation)
        tokenizer.save(target)

        if format != "adapter":
            copy_companions(resolve(loaded.base), str(target))

    on_primary(write_config_and_tokenizer)
    return loaded, file_dtype


def _check_room(loaded: LoadedModel, target: Path, dtype: str) -> None:
    check_space(target, sum(spec.nbytes for spec, _ in hf.hf_tensors(loaded.module, dtype).values()))


def _write_run_card(
    target: Path, loaded: LoadedModel, tokenizer: Tokenizer, checks: tuple[Check, ...], format: str, run: Path
) -> bool:
    base = base_of_export(loaded)
    return write_card(target, card_of(loaded, tokenizer, checks, form=format, base=base, run=run))


def _compared(loaded: LoadedModel) -> str:
    return "scores" if is_score_model(loaded) else "logits"


def _check_text(checks: tuple[Check, ...], what: str) -> str:
    # For a merged model the differences include the change by merging, since the live model's adapter is not merged.
    return ", ".join(f"{c.reader} ({what} within {c.difference:.1e}, {c.mean:.1e} on average)" for c in checks)
