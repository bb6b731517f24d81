"""A model's tensors with rows for tokens that were added to its tokenizer."""

# R rows of a block, D model

import zlib
from functools import cache

import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.checkpoint.text_part import HEAD
from jaxft.data.tokenizers.table import AddedRows
from jaxft.errors import CheckpointError, ModelError

TABLES = ("model.embed_tokens.weight", HEAD)
LAYER_TABLE = "model.embed_tokens_per_layer.weight"
CHUNK = 8192  # rows that are read at a time for the mean
NOISE = 1e-5  # standard deviation of the noise, as a share of each column's


class GrownVocabulary:
    """A source whose embedding table, and LM head if it has one, have a row for every token of a grown tokenizer.

    A fresh row is the mean of the rows of the tokens that the model knows, with noise of 1e-5 of each column's standard
    deviation, so that new tokens can be told apart. The noise depends on the seed, the table and the row alone, so
    every block of a table is the same however a mesh splits it. Rows that stand empty in a padded table, as in Qwen's,
    are drawn too if a new token takes them. Source of the mean: "Vocabulary Expansion via Mean Initialization",
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """

    def __init__(self, source: TensorSource, added: AddedRows, seed: int) -> None:
        """seed: of the noise. Raises ModelError for a model with a second table of tokens, of its layers' inputs."""
        if LAYER_TABLE in source.specs():
            raise ModelError(
                "model.add_tokens: rows of embed_tokens_per_layer for new tokens are not implemented. Use the tokens "
                "that the tokenizer has, such as its unused ones."
            )
        self._source, self._added, self._seed = source, added, seed
        self._fresh = frozenset(added.fresh)
        self._statistics = cache(self._mean_and_deviation)

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, the tables with all of their rows."""
        return {name: self._grown(spec) if name in TABLES else spec for name, spec in self._source.specs().items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """As `TensorSource.read`. Fresh rows are rounded to the type of the table."""
        if name not in TABLES or name not in self._source.specs():
            return self._source.read(name, index)
        spec = self._source.specs()[name]
        if spec.shape[0] != self._added.before:
            raise CheckpointError(
                f"{name} has {spec.shape[0]} rows, but vocab_size of config.json is {self._added.before}"
            )
        (start, stop), (left, right) = block_bounds(self._grown(spec).shape, index)
        out_RD = np.empty((stop - start, right - left), spec.dtype)
        there = min(stop, spec.shape[0])
        if start < there:
            out_RD[: there - start] = self._source.read(name, (slice(start, there), slice(left, right)))
        fresh = [row for row in range(start, stop) if row in self._fresh or row >= spec.shape[0]]
        if fresh:
            mean_D, deviation_D = self._statistics(name)
            for row in fresh:
                noise_D = NOISE * deviation_D * _normal(self._seed, name, row, len(mean_D))
                out_RD[row - start] = (mean_D + noise_D)[left:right].astype(spec.dtype)
        return out_RD

    def describe(self) -> str:
        """A sentence for the user."""
        added = self._added
        tokens = f"{len(added.tokens):,} tokens were added"
        if not added.grows:
            return f"{tokens}, on rows that stood empty in the model's tables"
        return f"{tokens}, and the model's tables grew from {added.before:,} to {added.rows:,} rows"

    def _grown(self, spec: TensorSpec) -> TensorSpec:
        return TensorSpec((max(spec.shape[0], self._added.rows), *spec.shape[1:]), spec.dtype)

    def _mean_and_deviation(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Of each column of a table over the rows that the model knows, float64 [D]."""
        known = min(self._added.known, self._source.specs()[name].shape[0])
        blocks = (
            self._source.read(name, (slice(start, min(start + CHUNK, known)),)).astype(np.float64)
            for start in range(0, known, CHUNK)
        )
        width = self._source.specs()[name].shape[1]
        total_D, squares_D = np.zeros(width), np.zeros(width)
        for block_RD in blocks:
            total_D += block_RD.sum(0)
            squares_D += (block_RD**2).sum(0)
        mean_D = total_D / known
        return mean_D, np.sqrt(np.maximum(squares_D / known - mean_D**2, 0.0))


def _normal(seed: int, name: str, row: int, width: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), row]).standard_normal(width)
