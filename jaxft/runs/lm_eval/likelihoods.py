"""Log-likelihoods of continuations in batches, without the logits of whole rows."""

# B rows, S sequence, N continuations, C tokens of a continuation, c a chunk of them, D model, V vocab

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.generation.buckets import bucket, power_of_two
from jaxft.nn.decoder import Decoder
from jaxft.nn.virtual import virtual_ids
from jaxft.runs.rewards import mesh_of

LOGITS = 1_024  # positions whose logits exist at once


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Tokens that a model reads, and those that it is to predict at the last of their positions.

    inputs: token ids, one or more. targets: token ids, at most as many as inputs; the last input predicts the last.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


class Likelihoods:
    """Scores continuations with a model, on the devices that it is on.

    batch_size: rows that are computed at a time. Continuations of the same inputs, such as the letters of a question
    with choices, share a row.
    """

    def __init__(self, model: Decoder, batch_size: int) -> None:
        self._graphdef, self._state = nnx.split(model)
        self._mesh = mesh_of(model)
        shards = self._mesh.batch_shards
        self._rows = -(-batch_size // shards) * shards
        self._first, self._longest = virtual_ids(model.virtual_tokens), model.config.max_position_embeddings
        self._compute = jax.jit(self._mesh.bind(self._scores))

    def score(self, given: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """(sum of the log-probabilities of the targets in nats, whether each is the most probable token), in order."""
        out: list[tuple[float, bool]] = [(0.0, True)] * len(given)
        for rows, numbers in self._batches(given):
            sums_N, greedy_N = self._scored(rows, [given[number] for number in numbers])
            for number, total, greedy in zip(numbers, sums_N.tolist(), greedy_N.tolist(), strict=False):
                out[number] = float(total), bool(greedy)
        return out

    def _batches(self, given: Sequence[Continuation]) -> Iterator[tuple[list[tuple[int, ...]], list[int]]]:
        """(different inputs, the numbers of the continuations that follow one of them), the longest inputs first."""
        numbers: dict[tuple[int, ...], list[int]] = {}
        for number, one in enumerate(given):
            if one.targets:
                numbers.setdefault(one.inputs, []).append(number)
        inputs = sorted(numbers, key=lambda one: (-len(one), one))
        for start in range(0, len(inputs), self._rows):
            rows = inputs[start : start + self._rows]
            yield rows, [number for row in rows for number in numbers[row]]

    def _scored(
        self, rows: Sequence[tuple[int, ...]], continuations: Sequence[Continuation]
    ) -> tuple[np.ndarray, np.ndarray]:
        first = self._first
        length = len(first) + min(bucket(max(map(len, rows))), max(self._longest - len(first), max(map(len, rows))))
        tokens_BS, segments_BS = (np.zeros((self._rows, length), np.int32) for _ in range(2))
        for row, inputs in enumerate(rows):
            ids = [*first, *inputs]
            tokens_BS[row, : len(ids)], segments_BS[row, : len(ids)] = ids, 1
        number = {inputs: row for row, inputs in enumerate(rows)}
        shape = power_of_two(len(continuations)), power_of_two(max(len(one.targets) for one in continuations))
        rows_N = np.zeros(shape[0], np.int32)
        positions_NC, targets_NC = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        mask_NC = np.zeros(shape, bool)
        for n, one in enumerate(continuations):
            count, end = len(one.targets), len(first) + len(one.inputs)
            rows_N[n] = number[one.inputs]
            positions_NC[n, :count] = np.arange(end - count, end)
            targets_NC[n, :count], mask_NC[n, :count] = one.targets, True
        sharding = self._mesh.batch_sharding()
        arrays = (jax.device_put(array, sharding) for array in (tokens_BS, segments_BS))
        return jax.device_get(self._compute(self._state, *arrays, rows_N, positions_NC, targets_NC, mask_NC))

    def _scores(
        self,
        state: nnx.State,
        tokens_BS: jax.Array,
        segments_BS: jax.Array,
        rows_N: jax.Array,
        positions_NC: jax.Array,
        targets_NC: jax.Array,
        mask_NC: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(self._graphdef, state)
        hidden_BSD, _ = model(tokens_BS, None, segments_BS)
        hidden_NCD = hidden_BSD[rows_N[:, None], positions_NC]
        count, length = targets_NC.shape
        size = min(length, max(1, LOGITS // count))

        def chunk(start: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden_NcD = jax.lax.dynamic_slice_in_dim(hidden_NCD, start, size, axis=1)
            targets_Nc = jax.lax.dynamic_slice_in_dim(targets_NC, start, size, axis=1)
            mask_Nc = jax.lax.dynamic_slice_in_dim(mask_NC, start, size, axis=1)
            logits_NcV = model.unembed(hidden_NcD)
            own_Nc = jnp.take_along_axis(logits_NcV, targets_Nc[..., None], axis=-1)[..., 0]
            logps_Nc = own_Nc - jax.nn.logsumexp(logits_NcV, axis=-1)
            greedy_Nc = jnp.argmax(logits_NcV, axis=-1) == targets_Nc
            return jnp.sum(jnp.where(mask_Nc, logps_Nc, 0), axis=1), jnp.all(greedy_Nc | ~mask_Nc, axis=1)

        sums_KN, greedy_KN = jax.lax.map(chunk, jnp.arange(0, length, size))
        return jnp.sum(sums_KN, axis=0), jnp.all(greedy_KN, axis=0)
