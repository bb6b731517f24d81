"""A reward model as a reward: which one a run has, where its weights come from, and its scores of sampled answers."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from flax import nnx

from jaxft import models
from jaxft.adapters.attach import AdapterParam, detach
from jaxft.checkpoint.load import adapted_config, base_of, is_score_adapter, resolve
from jaxft.checkpoint.peft import read_adapter
from jaxft.checkpoint.peft.folder import CONFIG
from jaxft.config import RunConfig
from jaxft.data import Tokenizer, load_tokenizer
from jaxft.data.tokenizers.load import TOKENIZER_FILES
from jaxft.errors import ConfigError
from jaxft.files.paths import HUB, is_file
from jaxft.methods.teacher.frozen import FrozenModel, frozen_arrays
from jaxft.models.family import FamilyConfig
from jaxft.models.score_model import is_score_model
from jaxft.nn.decoder import Decoder
from jaxft.nn.score import ScoreHead
from jaxft.sharding.mesh import MeshPlan


class AdapterArrays(NamedTuple):
    """A reward model whose base is that of the trained model: the arrays that it has beside it.

    graphdef: of the whole reward model. arrays: its adapter and its score head.
    """

    graphdef: nnx.GraphDef[Decoder]
    arrays: nnx.State

    def model_on(self, trained: Decoder) -> Decoder:
        """The reward model on the base of the trained one, whose own adapter has no part in it."""
        own = {path for path, _ in nnx.to_flat_state(self.arrays)}
        base, _ = nnx.split_state(nnx.state(bare(trained)), lambda path, _: path not in own, ...)
        return nnx.merge(self.graphdef, self.arrays, base)


def bare(model: Decoder) -> Decoder:
    """A copy of a model, on the same arrays, without adapters and without a head."""
    copy = nnx.merge(*nnx.split(model))
    detach(copy)
    copy.lm_head, copy.value = nnx.data(None), nnx.data(None)
    return copy


@dataclass(frozen=True, kw_only=True)
class RewardModel(FrozenModel):
    """The frozen model of `rewards.model`. No step of training computes it; it scores the answers of each rollout.

    shares_base: whether it is an adapter on the base of the run, of which every weight is frozen, so that the base is
    in memory once.
    """

    part: ClassVar[str] = "judge"

    in_step: bool = False
    shares_base: bool = False

    @property
    def in_memory(self) -> bool:
        return True

    @property
    def shapes_path(self) -> str:
        return base_of(self._folder) if self._is_adapter else self.path

    def abstract(self, hf_config: dict[str, Any], *, student: Decoder, max_length: int) -> Decoder:
        """The reward model without arrays. hf_config: config.json of `shapes_path`, or of the reward model.

        Raises ConfigError if it has no score head, or rows of max_length tokens are longer than its positions;
        CheckpointError if its adapter does not fit its base.
        """
        if not (is_score_adapter(self._folder) if self._is_adapter else is_score_model(hf_config)):
            raise ConfigError(
                f"{self.setting}={self.path!r} is a language model, which has no score head and gives no scores. Give "
                "a run with method.name='reward', its export, or a `*ForSequenceClassification` with one label."
            )
        own = adapted_config(self._folder, hf_config) if self._is_adapter else hf_config
        family = models.config_from_hf(models.score_config(own))
        if max_length > family.max_position_embeddings:
            raise ConfigError(
                f"data.max_length={max_length} is beyond the {family.max_position_embeddings} positions of "
                f"{self.setting}={self.path!r}. Lower it, or choose another reward model."
            )
        if self.shares_base:
            return nnx.eval_shape(lambda base: self._on_base(base, family), student)
        model = models.abstract_model(family, quantization=self.quantization, **self._types(hf_config))
        return nnx.eval_shape(self._with_adapter, model) if self._is_adapter else model

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Nothing: a reward model with another tokenizer reads the text of prompts and answers."""

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer: that of its folder, or of its base if an adapter comes without one."""
        if self._is_adapter and not any(is_file(os.path.join(self._folder, name)) for name in TOKENIZER_FILES):
            return load_tokenizer(self.shapes_path)
        return load_tokenizer(self.path)

    def arrays(self, mesh: MeshPlan, base: Decoder | None = None) -> Any:
        """`FrozenArrays` of a whole model, or `AdapterArrays` if it shares the base of the run.

        base: as for `FrozenModel.arrays`; without it the reward model has a base of its own.
        """
        if not self.shares_base or base is None:
            return frozen_arrays(self.load(mesh))
        model = self._on_base(base, models.config_from_hf(models.score_config(self.hf_config())))
        mesh.shard_module(model)
        return self.abstract_arrays(model, student=base)

    def abstract_arrays(self, model: Decoder, *, student: Decoder) -> Any:
        if not self.shares_base:
            return frozen_arrays(model)
        base = {path for path, _ in nnx.to_flat_state(nnx.state(bare(student)))}
        graphdef, state = nnx.split(model)

        def is_own(path: Any, variable: Any) -> bool:
            # A module of the base that was trained with the adapter has the same path there.
            return path not in base or isinstance(variable, AdapterParam)

        return AdapterArrays(graphdef, nnx.split_state(state, is_own, ...)[0])

    @property
    def _folder(self) -> str:
        return resolve(self.path, self.revision)

    @property
    def _is_adapter(self) -> bool:
        return _is_adapter(self.path)

    def _on_base(self, base: Decoder, family: FamilyConfig) -> Decoder:
        model = bare(base)
        model.config, model.value = family, ScoreHead(family.hidden_size)
        return self._with_adapter(model)

    def _with_adapter(self, model: Decoder) -> Decoder:
        copy = nnx.merge(*nnx.split(model))
        read_adapter(copy, self._folder)
        return copy


def _is_adapter(path: str) -> bool:
    # A plan fetches nothing from the hub, so what is there counts as a whole model.
    return not path.startswith(HUB) and is_file(os.path.join(resolve(path), CONFIG))


def reward_model_of(config: RunConfig) -> RewardModel | None:
    """`Method.frozen` of methods that learn from rewards: the reward model of a run, if it has one."""
    path = config.rewards.model
    if path is None:
        return None
    return RewardModel(
        setting="rewards.model", path=path, dtype=config.model.dtype, shares_base=_shares_base(path, config)
    )


def _shares_base(path: str, config: RunConfig) -> bool:
    """Whether a reward model is an adapter on the base of a run, of which every weight is frozen."""
    adapter, model = config.adapter, config.model
    if adapter.kind == "none" or adapter.saved or model.random_init or not _is_adapter(path):
        return False
    theirs, ours = base_of(resolve(path)), model.path
    if HUB in theirs + ours:
        return theirs == ours
    return os.path.realpath(resolve(theirs)) == os.path.realpath(resolve(ours))
