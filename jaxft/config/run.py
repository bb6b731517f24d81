"""The whole run, and the combinations of sections that cannot be carried out."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

from jaxft.config.adapter import AdapterConfig
from jaxft.config.data import DataConfig
from jaxft.config.fields import FREE_TO_CHANGE, PATH, Section
from jaxft.config.mesh import MeshConfig
from jaxft.config.method import MethodConfig
from jaxft.config.model import ModelConfig
from jaxft.config.optim import OptimConfig
from jaxft.config.rewards import RewardsConfig
from jaxft.config.rollout import RolloutConfig
from jaxft.config.train import CheckpointConfig, EvalConfig, ExportConfig, RouterConfig, TrainConfig
from jaxft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """One training run, whole."""

    output_dir: Annotated[str, FREE_TO_CHANGE, PATH, "the run folder"] = "runs/unnamed"
    seed: Annotated[
        int, "seed of initial adapters, drawn weights, shuffling, dropout and the choice of `data.eval_fraction`"
    ] = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: Annotated[MeshConfig, FREE_TO_CHANGE] = field(default_factory=MeshConfig)
    eval: Annotated[EvalConfig, FREE_TO_CHANGE] = field(default_factory=EvalConfig)
    export: Annotated[ExportConfig, FREE_TO_CHANGE] = field(default_factory=ExportConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as written to `config.json` in the run folder."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        if not self.model.path:
            raise ConfigError("model.path is empty: give a Hugging Face folder, a GGUF file or hf://owner/name")
        _check_adapter(self)
        _check_optimizer(self)
        _check_held_out(self)


def _check_adapter(config: RunConfig) -> None:
    adapter, count = config.adapter, config.adapter.virtual_tokens
    if adapter.init_lora_weights.startswith("loftq") and not config.model.quantization:
        raise ConfigError(
            f"adapter.init_lora_weights={adapter.init_lora_weights!r} corrects the error of quantization, but "
            "model.quantization is None: set it, or set adapter.init_lora_weights to 'default'"
        )
    if count and count >= config.data.max_length:
        raise ConfigError(
            f"adapter.num_virtual_tokens={count} leaves no room for rows in data.max_length={config.data.max_length}: "
            "every row begins with the virtual tokens. Lower the former or raise the latter."
        )
    if count and config.export.merged:
        raise ConfigError(
            f"export.merged=True, but adapter.kind={adapter.kind!r} cannot be merged into weights: set it to False"
        )
    if count and adapter.saved:
        raise ConfigError(
            f"adapter.modules_to_save={adapter.modules_to_save!r} cannot be written to PEFT's folders of "
            f"adapter.kind={adapter.kind!r}, which have no place for it: set it to None"
        )


def _check_optimizer(config: RunConfig) -> None:
    if config.optim.name == "schedule_free_adamw" and config.train.ema_decay is not None:
        raise ConfigError(
            f"optim.name='schedule_free_adamw' averages the weights itself: set train.ema_decay="
            f"{config.train.ema_decay} to None"
        )
    if config.optim.name == "apollo" and config.adapter.kind != "none":
        raise ConfigError(
            f"optim.name='apollo' projects large matrices to a low rank, and adapter.kind={config.adapter.kind!r} "
            "trains only a few numbers: use another optimizer, or adapter.kind='none'"
        )


def _check_held_out(config: RunConfig) -> None:
    data, checkpoint = config.data, config.checkpoint
    held_out = data.eval is not None or data.eval_fraction is not None
    if config.eval.metric and not held_out:
        raise ConfigError(
            f"eval.metric={config.eval.metric!r} scores held-out rows, but there are none: set data.eval or "
            "data.eval_fraction"
        )
    if config.eval.metric and data.format == "text":
        raise ConfigError(
            f"eval.metric={config.eval.metric!r} compares answers with references, but data.format='text' has no "
            "answers: set eval.metric to None"
        )
    if checkpoint.best_metric is None:
        _check_unranked(config)
        return
    if not held_out:
        raise ConfigError(
            f"checkpoint.best_metric={checkpoint.best_metric!r} needs held-out rows: set data.eval or "
            "data.eval_fraction"
        )
    known = config.method.chosen.HELD_OUT_METRICS
    if checkpoint.best_metric not in known:
        raise ConfigError(
            f"checkpoint.best_metric={checkpoint.best_metric!r} is not reported by method.name={config.method.name!r}: "
            f"set it to one of {', '.join(known)}"
        )
    _check_cadence(config)


def _check_unranked(config: RunConfig) -> None:
    """Refuses settings that need a metric by which checkpoints are compared."""
    if config.export.checkpoint == "best":
        raise ConfigError(
            "export.checkpoint='best' needs a metric by which checkpoints are compared: set checkpoint.best_metric, "
            "such as to 'eval_loss'"
        )
    if config.train.early_stopping_patience is not None:
        raise ConfigError(
            f"train.early_stopping_patience={config.train.early_stopping_patience} needs a metric that is watched: set "
            "checkpoint.best_metric, such as to 'eval_loss'"
        )


def _check_cadence(config: RunConfig) -> None:
    """Checkpoints are ranked by held-out metrics of the same step, so they are saved when the rows are evaluated."""
    train, checkpoint = config.train, config.checkpoint
    if train.early_stopping_patience is not None and train.eval_every is None and train.eval_every_epochs is None:
        raise ConfigError(
            f"train.early_stopping_patience={train.early_stopping_patience} counts evaluations, and there is only one, "
            "at the end: set train.eval_every or train.eval_every_epochs"
        )
    if checkpoint.every is not None and (train.eval_every is None or checkpoint.every % train.eval_every):
        raise ConfigError(
            f"checkpoint.best_metric={checkpoint.best_metric!r} ranks checkpoints by held-out metrics of the same "
            f"step, but checkpoint.every={checkpoint.every} is not a multiple of "
            f"train.eval_every={train.eval_every}: set train.eval_every to a divisor of checkpoint.every"
        )
    every, evaluated = checkpoint.every_epochs, train.eval_every_epochs
    if every is not None and (evaluated is None or abs(every / evaluated - round(every / evaluated)) > 1e-9):
        raise ConfigError(
            f"checkpoint.best_metric={checkpoint.best_metric!r} ranks checkpoints by held-out metrics of the same "
            f"step, but checkpoint.every_epochs={every} is not a multiple of train.eval_every_epochs={evaluated}: set "
            "the latter to the same, or to a part of it"
        )
    if config.export.checkpoint == "best" and checkpoint.every is None and every is None:
        raise ConfigError(
            "export.checkpoint='best' chooses among checkpoints, and there is only one, at the end: set "
            "checkpoint.every or checkpoint.every_epochs"
        )
