"""The configuration of a run: frozen dataclasses, their checks, and how config files are read.

`reading` makes a `RunConfig` of Python, YAML and JSON files, run folders, shipped configs and overrides. Unknown keys,
wrong types and combinations that cannot be carried out are refused before anything is loaded or compiled. `fields`
declares what a field is, and `peer_names` knows what other programs call it.
"""

from jaxft.config.adapter import AdapterConfig
from jaxft.config.data import DataConfig, MixtureSet
from jaxft.config.fields import choices
from jaxft.config.mesh import MeshConfig
from jaxft.config.method import MethodConfig, SFTConfig
from jaxft.config.model import ModelConfig
from jaxft.config.optim import (
    AdafactorConfig,
    AdamW8bitConfig,
    AdamWConfig,
    ApolloConfig,
    LionConfig,
    MuonConfig,
    OptimConfig,
    ScheduleFreeConfig,
    SGDConfig,
)
from jaxft.config.reading import default_config, from_json, load, mixture_set, resolve, with_overrides
from jaxft.config.run import RunConfig
from jaxft.config.train import CheckpointConfig, EvalConfig, ExportConfig, RouterConfig, TrainConfig

__all__ = [
    "AdafactorConfig", "AdamW8bitConfig", "AdamWConfig", "AdapterConfig", "ApolloConfig", "CheckpointConfig",
    "DataConfig", "EvalConfig", "ExportConfig", "LionConfig", "MeshConfig", "MethodConfig", "MixtureSet", "ModelConfig",
    "MuonConfig", "OptimConfig", "RouterConfig", "RunConfig", "SFTConfig", "SGDConfig", "ScheduleFreeConfig",
    "TrainConfig", "choices", "default_config", "from_json", "load", "mixture_set", "resolve",
    "with_overrides",
]  # fmt: skip
