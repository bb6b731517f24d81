"""VeRA in PEFT's folders.

Keys: `<module>.vera_lambda_d` [r] and `.vera_lambda_b` [O], and shared by all layers `base_model.vera_A` [r, I] and
`base_model.vera_B` [O, r] of the largest I and O. A folder without the shared ones (`save_projection` false) stands for
those that PEFT draws from `projection_prng_key`; we write them.
"""

# I inputs, O outputs, r rank

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

from jaxft.adapters.attach import adapters, last_name
from jaxft.adapters.vera import VeRA, VeRASettings, attach_vera, draw_projections
from jaxft.checkpoint.peft.folder import (
    PREFIX,
    MergeBlock,
    PeftTensor,
    ReadBlock,
    layers_named,
    misfit_error,
    modules,
    refuse_unknown,
)
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError, ModelError
from jaxft.models.tensor_map import TRANSPOSED
from jaxft.nn.decoder import Decoder

PEFT_TYPE = "VERA"
FACTORS = ("lambda_d", "lambda_b")
SHARED = {"base_model.vera_A": "a", "base_model.vera_B": "b"}
READ = ("r", "vera_dropout", "projection_prng_key", "save_projection", "target_modules", "d_initial", "init_weights")


def attach_to(
    model: Decoder, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], folder: str
) -> tuple[str, ...]:
    """Attaches adapters to the layers that a folder's keys name, values still to be read.

    The matrices that all layers share are drawn from the folder's seed.
    """
    paths = layers_named(model, [key for key in specs if key not in SHARED], "vera_lambda_", folder)
    settings = _settings(config)
    for key, spec in specs.items():  # before matrices of the claimed rank are drawn
        if key.endswith("vera_lambda_d") and spec.shape != (settings.r,):
            raise CheckpointError(
                f"{folder}: adapter_config.json claims r={settings.r:,}, and {key} has shape {list(spec.shape)}: they "
                "are of different adapters"
            )
    return attach_vera(model, paths, settings)


def peft_tensors(model: Decoder) -> Iterator[PeftTensor]:
    """The folder's tensors for a model's adapters."""
    attached = adapters(model)
    for module, path, piece in modules(model):
        if path in attached:
            for name in FACTORS:
                yield PeftTensor(f"{module}.vera_{name}", f"{path}/adapter/{name}", piece.at)
    yield PeftTensor("base_model.vera_A", "shared/a")
    yield PeftTensor("base_model.vera_B", "shared/b", transform=TRANSPOSED)


def optional_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys that a folder may leave out: the model then keeps the values that `attach_to` draws."""
    return () if config.get("save_projection", True) else tuple(SHARED)


def adapter_config_fields(model: Decoder) -> dict[str, Any]:
    """The fields of adapter_config.json for a model's adapters."""
    settings = cast(VeRA, next(iter(adapters(model).values()))).settings
    return {
        "r": settings.r,
        "vera_dropout": settings.dropout,
        "projection_prng_key": settings.seed,
        "save_projection": True,
        "target_modules": sorted({last_name(path).replace("/", ".") for path in adapters(model)}),
        "bias": "none",
    }


def merge_blocks(base: TensorSource, config: Mapping[str, Any], source: TensorSource) -> dict[str, MergeBlock]:
    """How each of the base's matrices is merged, by its name. Only the adapter's own tensors stay in memory.

    Raises ModelError for settings not implemented, and CheckpointError listing tensors that name no matrix of the
    base, lack their other half or have another shape.
    """
    settings, specs = _settings(config), base.specs()
    factors = _factors(specs, source, settings.r)
    shapes = [specs[name].shape for name in factors]
    outputs, inputs = (max(sizes) for sizes in zip(*shapes, strict=True))
    if set(SHARED) <= set(source.specs()):
        a_rI, b_Or = (source.read(key).astype(np.float32) for key in SHARED)
    elif config.get("save_projection", True):
        raise CheckpointError(f"the adapter lacks {' or '.join(SHARED)}, though its save_projection is true")
    else:
        a_rI, b_Or = draw_projections(settings.r, inputs, outputs, settings.seed)
    if a_rI.shape != (settings.r, inputs) or b_Or.shape != (outputs, settings.r):
        raise CheckpointError(
            f"the adapter's shared matrices are {list(a_rI.shape)} and {list(b_Or.shape)}, its layers want "
            f"{[settings.r, inputs]} and {[outputs, settings.r]}"
        )
    return {name: _merge_block(a_rI, b_Or, *pair) for name, pair in factors.items()}


def _merge_block(a_rI: np.ndarray, b_Or: np.ndarray, lambda_d: np.ndarray, lambda_b: np.ndarray) -> MergeBlock:
    def merge(read: ReadBlock, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        wide = lambda_b[slice(*rows), None] * b_Or[slice(*rows)]
        return read(rows, columns) + wide @ (lambda_d[:, None] * a_rI[:, slice(*columns)])

    return merge


def _factors(specs: Mapping[str, TensorSpec], source: TensorSource, r: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    factors: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for key, spec in source.specs().items():
        module, _, part = key.removeprefix(PREFIX).rpartition(".vera_")
        name = f"{module}.weight"
        if key in SHARED:
            continue
        if not key.startswith(PREFIX) or part not in FACTORS or len(getattr(specs.get(name), "shape", ())) != 2:
            problems.append(f"{key} names no linear layer of the base")
            continue
        expected = (r,) if part == "lambda_d" else (specs[name].shape[0],)
        if spec.shape != expected:
            problems.append(f"{key} is {list(spec.shape)}, the base wants {list(expected)}")
        factors.setdefault(name, {})[part] = source.read(key).astype(np.float32)
    problems += [f"{name} has {', '.join(parts)} only" for name, parts in factors.items() if len(parts) != 2]
    if problems or not factors:
        raise misfit_error(problems)
    return {name: (parts["lambda_d"], parts["lambda_b"]) for name, parts in factors.items()}


def _settings(config: Mapping[str, Any]) -> VeRASettings:
    refuse_unknown(config, lambda name, value: name in READ or (name, value) == ("bias", "none"))
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ModelError(f"adapter_config.json has r={config.get('r')!r}; a rank is a whole number above zero")
    return VeRASettings(
        r=config["r"],
        dropout=float(config.get("vera_dropout") or 0.0),
        seed=int(config.get("projection_prng_key") or 0),
    )
