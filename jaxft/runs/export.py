"""Writing what was trained for others to use, and making sure that they can."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from jaxft.adapters.attach import StartParam, adapters, virtual_modules
from jaxft.checkpoint import hf, peft
from jaxft.checkpoint.load import LoadedModel, load_model
from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.checkpoint.verify import Check, check_export, logit_difference, probe
from jaxft.config import RunConfig
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ConfigError, ExportError
from jaxft.files.run_folder import ADAPTER, CHECKPOINTS, MERGED, MODEL, is_run_folder
from jaxft.runs.build import build_model
from jaxft.runs.folder import fresh_subfolder, run_config
from jaxft.sharding.mesh import MeshPlan
from jaxft.sharding.processes import on_primary
from jaxft.training.state import divide

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
) -> dict[str, Any]:
    """Writes a model as a PEFT folder (`adapter`) or a whole Hugging Face folder (`merged`).

    source: a run folder, a PEFT folder, a Hugging Face folder or a GGUF file. step: a checkpoint of a
    run folder, its export or newest where None. dtype: stored type of a merged model. base: what the adapter of a run
    with a quantised base is merged into: `trained`, the dense form of the quantised kernels, or `original`, the kernels
    that they were made of, which gives another model than the one that was trained. Returns the
    folder, how far each reader's logits were from the live model's at most (`checks`) and on average (`mean`), as
    shares of the largest logit, which for `merged` is what merging changed; and what of a model that takes images
    too was left out. Of a run with a quantised base also what merging loses: `original_base`, how far a model merged
    into the original base is from the trained one, or `quantised_again`, how far the merged model would be once
    quantised like its base. Raises ExportError where a reader differs by more than rounding.
    """
    if base not in BASES:
        raise ConfigError(f"base {base!r} is not one of {', '.join(BASES)}")
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    target = Path(to)
    if target.exists() and any(target.iterdir()):
        raise ExportError(f"{to} is not empty: choose a new folder, so that nothing of an older export is mixed in")
    loaded = load_trained(source, step)
    quantization = loaded.quantization if format == "merged" else None
    if base == "original" and quantization is None:
        raise ConfigError("base='original' is for merging a run's adapter whose base is quantised: this is no such run")
    tokens = probe(loaded.module.config.vocab_size)
    trained = loaded.logits(tokens) if quantization is not None else None
    if base == "original":
        loaded = load_trained(source, step, quantized=False)
    tokenizer = load_tokenizer(source)
    target.mkdir(parents=True, exist_ok=True)
    checks = write(loaded, tokenizer, target, format=format, dtype=dtype)
    said = {} if loaded.left_out is None else {"left_out": loaded.left_out}
    if base == "original":
        said["original_base"] = logit_difference(loaded.logits(tokens), trained)
    elif quantization is not None:
        again = load_model(to, dtype=str(loaded.module.dtype), quantization=quantization)
        said["quantised_again"] = logit_difference(again.logits(tokens), trained)
    figures = {"checks": {c.reader: c.difference for c in checks}, "mean": {c.reader: c.mean for c in checks}}
    return {"folder": str(target), "format": format} | figures | said


def load_trained(source: str, step: int | None = None, *, quantized: bool = True) -> LoadedModel:
    """Loads a model of any kind; of a run folder, the evaluated weights of a checkpoint.

    step: of a run folder, the newest if None. quantized: False puts a run's adapter on its base in the base's original
    precision. Raises ConfigError for a step of anything but a run folder, and for a run without a checkpoint.
    """
    if not is_run_folder(source):
        if step is not None:
            raise ConfigError(f"{source} is not a run folder, so it has no step {step}")
        return load_model(source)
    config = run_config(source)
    if not quantized:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization=None))
    loaded = build_model(config)
    _, trainable, frozen = divide(loaded.module)
    start = nnx.filter_state(frozen, StartParam)  # what adapters began with: frozen, but saved
    with RunCheckpoints(Path(source) / CHECKPOINTS, keep=1, read_only=True) as checkpoints:
        saved = checkpoints.open(step)
        if saved is None:
            raise ConfigError(f"{source} has no whole checkpoint yet")
        weights = saved.evaluated_weights(trainable, use_average=config.train.use_ema)
        nnx.update(loaded.module, weights, saved.read_parts({"start": start})["start"])
    return loaded


def export_run(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    config: RunConfig,
    folder: Path,
    console: Console,
    mesh: MeshPlan | None = None,
) -> dict[str, Any]:
    """The exports that a run's config asks for. Returns their folders' names and the checks."""
    out: dict[str, Any] = {}
    wanted = []
    if adapters(loaded.module) or virtual_modules(loaded.module):
        wanted += [("adapter", ADAPTER)] if config.export.adapter else []
        wanted += [("merged", MERGED)] if config.export.merged else []
    else:
        wanted.append(("merged", MODEL))
    for format, name in wanted:
        target = Path(on_primary(lambda name=name: str(fresh_subfolder(folder, name))))
        checks = write(loaded, tokenizer, target, format=format, mesh=mesh)
        out[name] = name
        out[f"{name}_checks"] = {c.reader: c.difference for c in checks}
        out[f"{name}_mean"] = {c.reader: c.mean for c in checks}
        console.print(f"{target}: read back by {_said(checks)}", highlight=False, soft_wrap=True)
    return out


def write(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    target: Path,
    *,
    format: str,
    dtype: str | None = None,
    mesh: MeshPlan | None = None,
) -> tuple[Check, ...]:
    """Writes one export and checks it. mesh: where the model is. Every process takes part; process 0 writes."""
    # What partial fine-tuning moved is float32, whatever the rest is stored in.
    own = jax.tree.leaves(nnx.state(loaded.module.embed_tokens))[0].dtype
    stored = dtype or str(own if loaded.module.trainable_paths is None else "float32")
    if format == "adapter":
        base = loaded.base if "://" in loaded.base else os.path.abspath(loaded.base)
        peft.write_adapter(loaded.module, str(target), base=base, nested=loaded.left_out is not None)
        stored = "float32"
    else:
        hf.write_weights(loaded.module, str(target), dtype=stored)

    def the_rest() -> None:
        if format != "adapter":
            generation = tokenizer.generation_config(loaded.generation)
            hf.write_config(str(target), loaded.hf_config, dtype=stored, generation=generation)
        tokenizer.save(target)

    on_primary(the_rest)
    return check_export(loaded, str(target), dtype=stored, mesh=mesh)


def _said(checks: tuple[Check, ...]) -> str:
    # Of a merged model this is what merging changed: the live one has its adapter apart.
    return ", ".join(f"{c.reader} (logits within {c.difference:.1e}, {c.mean:.1e} on average)" for c in checks)
