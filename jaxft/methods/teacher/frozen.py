"""A frozen model beside the trained one, such as a teacher: its shapes before it is read, and its loading."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx

from jaxft import models
from jaxft.checkpoint.load import hf_config_of, load_model, resolve
from jaxft.data import Tokenizer, load_tokenizer
from jaxft.errors import ConfigError, listed
from jaxft.files.paths import read_json
from jaxft.models.score_model import is_score_model
from jaxft.nn.decoder import Decoder
from jaxft.objectives.distill import FrozenArrays
from jaxft.sharding.mesh import MeshPlan

SHOWN = 4  # tokens that a message lists


@dataclass(frozen=True, kw_only=True)
class FrozenModel:
    """Which model, and how it is kept in memory.

    setting: the config field that names it, for messages. path, revision: as in the config section `model`.
    random_seed: to draw the weights from, instead of loading them; None: they are loaded. dtype: of computation.
    quantization: of its linear layers, a name in `quant.FORMATS`. in_step: whether every training step computes it; if
    not, only `Method.precompute` does. part: the field of `MethodState` that has its arrays while the run trains.
    """

    part: ClassVar[str] = "rebuilt"

    setting: str
    path: str
    revision: str | None = None
    random_seed: int | None = None
    dtype: str = "float32"
    quantization: str | None = None
    in_step: bool = True

    @property
    def in_memory(self) -> bool:
        """Whether its arrays are in memory while the run trains."""
        return self.in_step

    @property
    def shapes_path(self) -> str:
        """Where the config.json is that its shapes follow from."""
        return self.path

    def hf_config(self) -> dict[str, Any]:
        """Its config.json; a model on the hub is fetched. Raises as `checkpoint.load.hf_config_of` does."""
        folder = resolve(self.path, self.revision)
        return hf_config_of(folder) if self.random_seed is None else read_json(os.path.join(folder, "config.json"))

    def abstract(self, hf_config: dict[str, Any], *, student: Decoder, max_length: int) -> Decoder:
        """The model without arrays, from the content of its config.json.

        student: the trained model, which may be abstract. Raises ConfigError if the sizes of their vocabularies differ,
        rows of max_length tokens are longer than its positions, or it is a reward model.
        """
        if is_score_model(hf_config):
            raise ConfigError(
                f"{self.setting}={self.path!r} is a reward model: it has a score head and no distribution over tokens. "
                "Give the language model that it was made of."
            )
        family = models.config_from_hf(hf_config)
        ours, theirs = student.config.vocab_size, family.vocab_size
        if ours != theirs:
            raise ConfigError(
                f"{self.setting}={self.path!r} has a vocabulary of {theirs:,} tokens and the trained model one of "
                f"{ours:,}, so their distributions cannot be compared. Choose a model of the same family as "
                "model.path, with the same vocab_size in its config.json."
            )
        if max_length > family.max_position_embeddings:
            raise ConfigError(
                f"data.max_length={max_length} is beyond the {family.max_position_embeddings} positions of "
                f"{self.setting}={self.path!r}. Lower it, or choose another model."
            )
        return models.abstract_model(family, quantization=self.quantization, **self._types(hf_config))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError if its tokenizer has other tokens than that of the trained model.

        The chat templates may differ: the rows are those of the trained model.
        """
        ours = tokenizer.backend.get_vocab()
        theirs = load_tokenizer(self.path, revision=self.revision).backend.get_vocab()
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        if differing:
            lines = [f"{token!r} is {ours.get(token)} here and {theirs.get(token)} there" for token in differing]
            raise ConfigError(
                f"the tokenizer of {self.setting}={self.path!r} differs from that of the trained model in "
                f"{len(differing):,} tokens ({listed(lines, SHOWN)}), so that the same ids would mean other texts. "
                "Choose a model with the tokenizer of model.path."
            )

    def load(self, mesh: MeshPlan) -> Decoder:
        """The model on the devices of a mesh, with its weights. Raises as `checkpoint.load.load_model` does."""
        types = self._types(self.hf_config())
        if self.random_seed is None:
            types |= {"revision": self.revision, "quantization": self.quantization}
            return load_model(self.path, mesh=mesh, **types).module
        family = models.config_from_hf(self.hf_config())
        module = models.random_model(family, seed=self.random_seed, quantization=self.quantization, **types)
        mesh.shard_module(module)
        return module

    def arrays(self, mesh: MeshPlan, base: Decoder | None = None) -> Any:
        """What the field `part` of `MethodState` holds: the loaded model on the devices of a mesh.

        base: the model that is trained, with its weights; None if the base of the run is not in memory.
        """
        return frozen_arrays(self.load(mesh))

    def abstract_arrays(self, model: Decoder, *, student: Decoder) -> Any:
        """The same without arrays. model: from `abstract`."""
        return frozen_arrays(model)

    def _types(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        # Weights in bfloat16 stay so, since nothing is gained by widening them; others are rounded to the type of
        # computation, as their layers would do in every step.
        own = hf_config.get("dtype") or hf_config.get("torch_dtype")
        return {"dtype": self.dtype, "param_dtype": "bfloat16" if own == "bfloat16" else self.dtype}


def frozen_arrays(model: Decoder) -> FrozenArrays:
    """A model, which may be abstract, as `MethodState.rebuilt`."""
    return FrozenArrays(*nnx.split(model))
