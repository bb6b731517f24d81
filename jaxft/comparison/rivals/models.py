"""The rivals of a comparison that are on this machine: the base, other models, and the tuned models of runs."""

import os
from collections.abc import Callable
from pathlib import Path

from jaxft.adapters.attach import detach
from jaxft.checkpoint.load import hf_config_of, load_model, resolve
from jaxft.comparison.rivals.cache import AnswerCache, digest_of
from jaxft.comparison.rivals.local import Local
from jaxft.config import RunConfig
from jaxft.data import Tokenizer, load_tokenizer, tokenizer_of
from jaxft.errors import ConfigError
from jaxft.files.run_folder import is_run_folder
from jaxft.files.weights_digest import weights_digest
from jaxft.home import local_path
from jaxft.nn.decoder import Decoder
from jaxft.runs import folder as run_folders
from jaxft.runs.build import abstract_model, build_model
from jaxft.runs.export import load_trained
from jaxft.runs.identity.contents import base_read
from jaxft.runs.identity.record import record_of


class Memory:
    """One model at a time: a second one takes the place of the first."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._module: Decoder | None = None

    def load(self, name: str, make: Callable[[], Decoder]) -> Decoder:
        """The model of a name, made if another one is there."""
        if self._name != name or self._module is None:
            self._module = None
            self._name, self._module = name, make()
        return self._module


def base_rival(
    config: RunConfig,
    tokenizer: Tokenizer,
    runs: list[str],
    cache: AnswerCache,
    memory: Memory,
    between: Callable[[], None],
    random_base: Path,
) -> Local:
    """The base model of a config, without adapters; it takes the zero-shot answers that runs of this base have kept.

    random_base: the folder for drawn or merged weights, as for `build_model`.
    """
    digest, model = base_read(config)["digest"], config.model

    def make() -> Decoder:
        module = build_model(config, random_base=random_base).module
        detach(module)
        return module

    own = [
        (Path(run), "base", None)
        for run in runs
        if record_of(Path(run)).reads.get("model.path", {}).get("digest") == digest
        and _numerics(run_folders.run_config(run)) == _numerics(config)
    ]
    abstract = abstract_model(config)
    name = os.path.basename(model.path.rstrip("/"))
    return Local(
        name,
        "base",
        tokenizer=tokenizer,
        config=config,
        digest=digest_of(digest, _numerics(config)),
        cache=cache,
        load=lambda: memory.load("base", make),
        positions=abstract.config.max_position_embeddings,
        answers_of=own,
        between=between,
    )


def _numerics(config: RunConfig) -> list[object]:
    model = config.model
    drawn = config.seed if model.random_init else None
    return [model.dtype, model.param_dtype, model.quantization, drawn]


def model_rival(path: str, config: RunConfig, cache: AnswerCache, memory: Memory, between: Callable[[], None]) -> Local:
    """Another model, prompted by its own chat template. Raises ConfigError for a run folder."""
    path = local_path(path)
    if is_run_folder(path):
        raise ConfigError(f"--model={path} is the folder of a run: give it as --run={path}")
    folder, own = resolve(path), config.model
    hf_config = hf_config_of(path)
    text = hf_config.get("text_config") or {}
    positions = hf_config.get("max_position_embeddings") or text.get("max_position_embeddings")
    if not isinstance(positions, int):
        raise ConfigError(f"--model={path} does not say how many positions it has: no examples can be fitted")

    def make() -> Decoder:
        return load_model(path, dtype=own.dtype, param_dtype=own.param_dtype, quantization=own.quantization).module

    return Local(
        os.path.basename(path.rstrip("/")),
        "model",
        tokenizer=tokenizer_of(config, path),
        config=config,
        digest=digest_of(weights_digest(folder), _numerics(config)),
        cache=cache,
        load=lambda: memory.load(path, make),
        positions=positions,
        between=between,
    )


def run_rival(run: str, config: RunConfig, cache: AnswerCache, memory: Memory, between: Callable[[], None]) -> Local:
    """The tuned model of a run, with the run's own template; it takes the answers that the run has kept.

    Raises ConfigError for a folder that is not that of a run, and for a run without a checkpoint.
    """
    run = local_path(run)
    if not is_run_folder(run):
        raise ConfigError(f"--run={run} is not the folder of a run")
    record, own = record_of(Path(run)), run_folders.run_config(run)
    step = record.exported or run_folders.newest_step(Path(run))
    if step is None:
        raise ConfigError(f"--run={run} has no whole checkpoint: let the run end first")
    tokenizer = load_tokenizer(
        own.model.tokenizer or own.model.path,
        revision=own.model.revision if own.model.tokenizer is None else None,
        base=own.model.base if own.model.tokenizer is None else None,
        chat_template=run_folders.chat_template(run),
        chat_template_kwargs=own.data.chat_template_kwargs,
    )
    abstract = abstract_model(own)
    return Local(
        os.path.basename(os.path.abspath(run)),
        "tuned",
        tokenizer=tokenizer,
        config=config,
        digest=digest_of(record.id, step),
        cache=cache,
        load=lambda: memory.load(run, lambda: load_trained(run).module),
        positions=abstract.config.max_position_embeddings - abstract.virtual_tokens,
        answers_of=[(Path(run), "tuned", step)],
        between=between,
    )
