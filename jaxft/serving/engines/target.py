"""Which engine answers for a model: that of its base, with its adapter, or one of its own."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.serving.http.errors import ApiError, no_such
from jaxft.serving.settings import ServeSettings
from jaxft.serving.storage.database import Row
from jaxft.serving.storage.models import folder_of, model_of, tuned_models
from jaxft.serving.storage.state import State

# What makes more of an adapter than matrices beside linear layers, which rows of one batch cannot have apart.
NOT_PLAIN = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "ensure_weight_tying",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter that answers beside others on one base. id: of its model."""

    id: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Target:
    """What answers. engine: the name of the process. path: of the model that it loads; base: of a PEFT folder, its
    base. adapter: of the answers, on that model. folder: name of a tuned model's folder, which stays while it answers.
    """

    engine: str
    path: str
    base: str | None = None
    adapter: Adapter | None = None
    folder: str | None = None

    @property
    def is_alone(self) -> bool:
        """Whether the engine is one tuned model's own."""
        return self.folder is not None and self.adapter is None


def target_of(state: State, settings: ServeSettings, model: str, alone: Collection[str] = ()) -> Target:
    """The target of a model. alone: models that need an engine of their own.

    Raises ApiError 404, with the nearest name.
    """
    if model in settings.models:
        return Target(engine=model, path=settings.models[model])
    try:
        row = model_of(state, model)
    except ApiError as error:
        known = [*settings.models, *(one["id"] for one in tuned_models(state))]
        raise no_such("model", model, "model_not_found", known) from error
    return _tuned(state, settings, row, by_row=model not in alone)


def _tuned(state: State, settings: ServeSettings, row: Row, *, by_row: bool) -> Target:
    id, folder, base = row["id"], folder_of(state, row), row["base"]
    if row["kind"] == "full":
        return Target(engine=id, path=str(folder), folder=row["folder"])
    if base not in settings.models:
        raise ApiError(
            404,
            f"The model {id!r} is an adapter of {base!r}, which this server was started without.",
            code="model_not_found",
        )
    path = settings.models[base]
    if by_row and settings.adapters and is_plain(folder, settings.max_rank):
        return Target(engine=base, path=path, adapter=Adapter(id, folder), folder=row["folder"])
    return Target(engine=id, path=str(folder), base=path, folder=row["folder"])


def is_plain(folder: Path, max_rank: int) -> bool:
    """Whether a PEFT folder is LoRA of at most this rank on linear layers alone, by its adapter_config.json."""
    path = folder / "adapter_config.json"
    config: Mapping[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    fits = all(isinstance(rank, int) and rank <= max_rank for rank in ranks)
    return config.get("peft_type") == "LORA" and fits and not any(config.get(name) for name in NOT_PLAIN)
