"""The tensors of a folder or file under the names of one of our models, and what opening it found out."""

from dataclasses import dataclass

import numpy as np

from jaxft.checkpoint.quantized.bitsandbytes import NF4Source
from jaxft.checkpoint.tensors import TensorSource, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A `TensorSource`, with what else is known about it.

    nf4: the part of it with bitsandbytes' codes, which a quantised model can take over; None if there are none.
    left_out: if it is the language model of one that takes images too, a sentence on what was left out. notes:
    sentences for the user on what is read otherwise than the files say.
    """

    source: TensorSource
    nf4: NF4Source | None = None
    left_out: str | None = None
    notes: tuple[str, ...] = ()

    def specs(self) -> dict[str, TensorSpec]:
        return self.source.specs()

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self.source.read(name, index)


def nf4_codes(source: TensorSource) -> NF4Source | None:
    """The codes of a source that has bitsandbytes' NF4."""
    return source.nf4 if isinstance(source, Weights) else source if isinstance(source, NF4Source) else None
