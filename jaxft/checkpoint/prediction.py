"""Tensors that are left out of a source: of layers that predict several tokens at once (MTP), which no method here
trains, and keys and values of layers that use those of another.
"""

import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.models.family import FamilyConfig


def without_prediction(source: TensorSource, config: FamilyConfig) -> tuple[TensorSource, str | None]:
    """(the source without the tensors that its family leaves out, a sentence that counts them); (source, None) if there
    are none.
    """
    specs = source.specs()
    left_out = {name: spec for name, spec in specs.items() if config.is_for_prediction(name)}
    if not left_out:
        return source, None
    note = left_out_note(len(left_out), sum(spec.size for spec in left_out.values()))
    return _Part(source, {name: spec for name, spec in specs.items() if name not in left_out}), note


def left_out_note(tensors: int, numbers: int) -> str:
    """The sentence for so many tensors of so many numbers in all."""
    return (
        f"{tensors} tensors of {numbers:,} numbers predict several tokens at once (MTP), and are left out: they "
        "are neither trained nor exported"
    )


def without_unused(source: TensorSource, config: FamilyConfig) -> tuple[TensorSource, str | None]:
    """As `without_prediction`, for tensors that have no effect (`FamilyConfig.is_unused`)."""
    specs = source.specs()
    left_out = {name: spec for name, spec in specs.items() if config.is_unused(name)}
    if not left_out:
        return source, None
    note = unused_note(len(left_out), sum(spec.size for spec in left_out.values()))
    return _Part(source, {name: spec for name, spec in specs.items() if name not in left_out}), note


def unused_note(tensors: int, numbers: int) -> str:
    """What is said of such tensors."""
    return (
        f"{tensors} tensors of {numbers:,} numbers are for keys and values of layers that use those of another "
        "layer, and are left out: they have no effect, and are not exported"
    )


class _Part:
    """Some of the tensors of a source."""

    def __init__(self, source: TensorSource, specs: dict[str, TensorSpec]) -> None:
        self._source, self._specs = source, specs

    def specs(self) -> dict[str, TensorSpec]:
        return self._specs

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._source.read(name, index)
