"""The model's shapes and the number of steps of a run, as far as they are known without weights or data."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.assets import ASSETS
from jaxft.checkpoint.load import adapted_config, base_of, hf_config_of, is_adapter, resolve
from jaxft.checkpoint.quantized import dialects
from jaxft.config import RunConfig
from jaxft.data import tokenizer_of
from jaxft.data.loader import steps_for
from jaxft.data.sources import is_here
from jaxft.errors import ConfigError, did_you_mean
from jaxft.files.gguf.parts import part_names
from jaxft.files.hub import HubPath, cached_hub_file, hub_path
from jaxft.files.paths import HUB, read_json
from jaxft.methods import method_of
from jaxft.methods.teacher.frozen import FrozenModel
from jaxft.models.hf_fields import with_allowed

UNKNOWN_STEPS = 1000
# Share of a packed sequence that is tokens, if the data is not on this machine.
FILL = 0.97


@dataclass(frozen=True, kw_only=True)
class Length:
    """Length of a run. source: where the number of steps comes from, in words. known: False if it is a guess."""

    steps: int
    source: str
    known: bool


def shapes_of(config: RunConfig) -> tuple[dict[str, Any], str]:
    """(config.json, where it comes from in words).

    Read from the model's folder or the Hugging Face cache, else from the published shapes that ship with jaxft; nothing
    is fetched. Raises ConfigError for a hub model that is in neither.
    """
    model = config.model
    folder = model.path if model.path.startswith(HUB) else resolve(model.path)
    if model.random_init or not is_adapter(folder):
        return _shapes(model.path, model.revision, drawn=model.random_init, allowed=model.allowed)
    of_base, where = _shapes(base_of(folder, model.base), None, drawn=False, allowed=model.allowed)
    return adapted_config(folder, of_base), f"{where}, the base of {model.path}"


def frozen_shapes_of(model: FrozenModel) -> dict[str, Any]:
    """config.json of a method's frozen model, from the same places."""
    return _shapes(model.shapes_path, model.revision, drawn=model.random_seed is not None)[0]


def _shapes(path: str, revision: str | None, *, drawn: bool, allowed: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """`shapes_of` a model. drawn: whether its weights are drawn, so that only its config.json need be there.

    allowed: unknown fields that are ignored.
    """
    if not path.startswith(HUB):
        folder = resolve(path)
        if drawn:
            return with_allowed(read_json(os.path.join(folder, "config.json")), allowed), f"config.json of {path}"
        return hf_config_of(folder, allow_unknown=allowed), f"config.json of {path}"
    location = hub_path(path, revision)
    if location.file is not None:
        return _gguf_shapes(path, location)
    name, cached = location.repo, cached_hub_file(location, "config.json")
    if cached is not None:
        hf_config = with_allowed(read_json(cached), allowed)
        dialects.quantization_of(hf_config, name)
        return dialects.without_quantization(hf_config), f"config.json of {name} in the Hugging Face cache"
    known = published()
    if name not in known:
        lower = {candidate.lower(): candidate for candidate in known}
        if name.lower() not in lower:
            raise ConfigError(
                f"the shapes of {path} are not known: it is not in the Hugging Face cache, and it is not one of the "
                f"{len(known)} models whose shapes ship with jaxft.{did_you_mean(name, known)} Fetch its config.json "
                f"once (hf download {name} config.json), or give a folder with one: --config.model.path=FOLDER"
            )
        name = lower[name.lower()]
    text = (ASSETS / "published" / f"{known[name]}.json").read_text(encoding="utf-8")
    note = ", the text model alone" if known[name].endswith("-text") else ""
    return json.loads(text), f"shapes of {name} that ship with jaxft{note}; {path} itself was not read"


def published() -> dict[str, str]:
    """Hub name -> stem of the file with its shapes."""
    table = json.loads((ASSETS / "published_names.json").read_text(encoding="utf-8"))
    return {name: stem for stem, names in table.items() for name in names}


def _gguf_shapes(path: str, location: HubPath) -> tuple[dict[str, Any], str]:
    """`_shapes` of a GGUF file of the Hub. Raises ConfigError if it is not in the cache."""
    copies = [cached_hub_file(location, name) for name in part_names(location.file or "")]
    if None in copies:
        raise ConfigError(
            f"the shapes of {path} are not known, because a plan fetches nothing and the file is not in the Hugging "
            f"Face cache. Fetch it once (hf download {location.repo} {location.file}), or give a folder with the "
            "model's config.json: --config.model.path=FOLDER"
        )
    return hf_config_of(str(copies[0])), f"{location.file} of {location.repo} in the Hugging Face cache"


def length_of(config: RunConfig, *, tokens: int | None = None, examples: int | None = None) -> Length:
    """Steps of the run: train.steps, else from `tokens` or `examples` of the training set, else from the data itself.

    If none of these is known, 1,000 steps with `known` False. Raises ConfigError for counts below 1, and for `tokens`
    alone if rows are not packed or are prompts.
    """
    train, data = config.train, config.data
    if train.steps is not None:
        return Length(steps=train.steps, source="train.steps", known=True)
    if tokens is not None or examples is not None:
        if any(count is not None and count < 1 for count in (tokens, examples)):
            raise ConfigError("--tokens and --examples are the size of the training set: give at least 1")
        if config.method.chosen.ROWS == "prompts":
            return _length_of_prompts(config, examples)
        if tokens is None or not data.packing:
            if examples is None:
                raise ConfigError(
                    "data.packing=False: each example is a sequence of its own, so give --examples, not --tokens"
                )
            sequences, source = examples, f"--examples={examples:,}, a sequence each"
        else:
            sequences = math.ceil(tokens / (data.max_length * FILL))
            source = f"--tokens={tokens:,}, packed to {FILL:.0%}"
        steps = max(1, math.ceil(round(train.epochs * sequences / train.batch_size, 6)))
        return Length(steps=steps, source=source, known=True)
    paths = [one.path for one in data.mixture.values()] or [data.train]
    if all(map(is_here, paths)) and os.path.isdir(config.model.path):
        tokenizer = tokenizer_of(config)
        method = method_of(config)
        prepared = method.prepare(config, tokenizer)
        steps = method.source(config, prepared, tokenizer).total_steps
        return Length(
            steps=steps,
            source=f"the {prepared.examination.sequences:,} sequences of {', '.join(paths)}",
            known=True,
        )
    return Length(
        steps=UNKNOWN_STEPS,
        source=f"{UNKNOWN_STEPS} steps, because the data is not on this machine: give --tokens=N or --examples=N",
        known=False,
    )


def _length_of_prompts(config: RunConfig, examples: int | None) -> Length:
    """The length of a run whose rows are prompts, each of which gets several answers."""
    size = method_of(config).rollout_size(config)
    if examples is None or size is None:
        raise ConfigError(
            f"method.name={config.method.name!r} has as many steps as its prompts need, however long they are: give "
            "--examples, not --tokens"
        )
    steps = int(steps_for(config.train.epochs, examples, size.prompts) * size.updates)
    return Length(steps=steps, source=f"--examples={examples:,}, {size.prompts:,} prompts a rollout", known=True)
