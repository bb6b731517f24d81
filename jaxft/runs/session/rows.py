"""The rows that a `Session` trains on: answers that it sampled, rows of data, and how they become batches."""

# B rows of a batch, S sequence, n tokens of an answer

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxft.config import RunConfig
from jaxft.data import Tokenizer
from jaxft.data.batch import Batch, Example, assemble
from jaxft.data.chat.encode import encode_all
from jaxft.data.packing import one_each, pack
from jaxft.data.prepare import read_all
from jaxft.errors import ConfigError, DataError, listed
from jaxft.generation.settings import FinishReason
from jaxft.nn.virtual import virtual_ids
from jaxft.objectives.policy.loss import ADVANTAGES, OLD_LOGPS, SAMPLER_LOGPS
from jaxft.runs.rewards import GivenRows


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """A sampled answer, token for token.

    prompt_tokens: int32, before the answer. tokens: int32 [n], the stop token included. logprobs: float32 [n], of the
    tokens when they were sampled, in nats, under the temperature. trained: bool [n], the tokens that are trained; by
    default all, and none of those that an environment wrote. text: without stop tokens. finish_reason: `stop`, or
    `length` if it was cut off.
    """

    prompt_tokens: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    temperature: float
    trained: np.ndarray | None = None
    text: str = ""
    finish_reason: FinishReason = "stop"

    def example(self, row: int) -> Example:
        """The prompt and the answer as one document. row: its number, for errors. Raises DataError for other lengths.

        The log-probabilities of its sampling are with it.
        """
        before, count = len(self.prompt_tokens), len(self.tokens)
        trained = np.ones(count, bool) if self.trained is None else np.asarray(self.trained, bool)
        if not before or not count or len(trained) != count or len(self.logprobs) != count:
            raise DataError(
                f"answer {row} has {before} tokens of a prompt, {count} tokens, {len(self.logprobs)} log-probabilities "
                f"and {len(trained)} entries of `trained`: the prompt needs at least one, and the others must be as "
                "many as the tokens"
            )
        return Example(
            tokens=np.concatenate([self.prompt_tokens, self.tokens]).astype(np.int32),
            mask=np.concatenate([np.zeros(before, np.uint8), trained.astype(np.uint8)]),
            row=row,
            arrays={SAMPLER_LOGPS: _after(before, self.logprobs)},
        )


Row = Mapping[str, Any] | Example | Answer


def examples_of(rows: Sequence[Row], config: RunConfig, tokenizer: Tokenizer) -> list[Example]:
    """The document of every row, in order.

    Mappings are read as the rows of `data.train` are, and get the adapter's virtual tokens. Raises DataError, naming
    the row, if one cannot be read, or is longer than `data.max_length`.
    """
    if not len(rows):
        raise DataError("there are no rows: give at least one")
    given = [(number, row) for number, row in enumerate(rows) if isinstance(row, Mapping)]
    read = read_all(GivenRows([row for _, row in given]), config.data, tokenizer)
    encoded = list(encode_all(read, tokenizer, config.data))
    if len(encoded) != len(read):
        raise DataError(
            "the chat template cuts a row into several sequences, so that results would not be one for each row: give "
            "each of its answers as a row"
        )
    first = virtual_ids(config.adapter.virtual_tokens)
    of_mappings = dict(zip([number for number, _ in given], encoded, strict=True))
    out = []
    for number, row in enumerate(rows):
        if isinstance(row, Answer):
            out.append(row.example(number))
        else:
            out.append(row if isinstance(row, Example) else replace(of_mappings[number].prepend(first), row=number))
    limit = config.data.max_length
    if long := [f"row {number} ({len(one)} tokens)" for number, one in enumerate(out) if len(one) > limit]:
        raise DataError(f"{listed(long)} do not fit into data.max_length={limit}: raise it, or shorten them")
    return out


def plain(examples: Sequence[Example]) -> list[Example]:
    """The documents without values and arrays, so that rows of all kinds go into one batch."""
    return [replace(one, values={}, arrays={}) for one in examples]


def policy_rows(
    rows: Sequence[Row], loss: str, advantages: Sequence[npt.ArrayLike] | None, temperature: float
) -> Sequence[npt.ArrayLike]:
    """The advantages. temperature: of the loss.

    Raises ConfigError if there are none, and DataError for rows that were not sampled as the loss expects.
    """
    if advantages is None:
        raise ConfigError(
            f"loss={loss!r} needs advantages: a number for each answer, such as its reward less the mean reward of the "
            "answers to the same prompt"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, Answer):
            raise DataError(f"loss={loss!r} trains answers of `sample`, and row {number} is a {type(row).__name__}")
        if row.temperature != temperature:
            raise DataError(
                f"answer {number} was sampled at temperature {row.temperature}, and loss={loss!r} computes "
                f"log-probabilities at rollout.temperature={temperature}: make them equal"
            )
    return advantages


def with_numbers(
    examples: Sequence[Example],
    advantages: Sequence[npt.ArrayLike],
    old_logprobs: Sequence[npt.ArrayLike] | None,
) -> list[Example]:
    """Documents with what the policy loss reads of them.

    advantages: a number for each document, or an array over its trained tokens for each. old_logprobs: of the trained
    tokens of each. Raises DataError if there are not as many as documents, or as trained tokens.
    """
    for name, given in (("advantages", advantages), ("old_logprobs", old_logprobs)):
        if given is not None and len(given) != len(examples):
            raise DataError(f"{len(given)} {name} for {len(examples)} rows: give one for each row")
    of_tokens = any(np.ndim(one) for one in advantages)
    out = []
    for number, one in enumerate(examples):
        arrays = dict(one.arrays)
        values: dict[str, tuple[float, ...]] = {}
        if of_tokens:
            arrays[ADVANTAGES] = _by_token(one, advantages[number], f"advantages[{number}]")
        else:
            values[ADVANTAGES] = (float(np.asarray(advantages[number])),)
        if old_logprobs is not None:
            arrays[OLD_LOGPS] = _by_token(one, old_logprobs[number], f"old_logprobs[{number}]")
        out.append(replace(one, values=values, arrays=arrays))
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Documents in batches of equal shape, which are computed one after another.

    starts: of each document, its batch, its row there, and the position of its first token.
    """

    examples: tuple[Example, ...]
    batches: tuple[Batch[np.ndarray], ...]
    starts: tuple[tuple[int, int, int], ...]

    def trained_values(self, values_BS: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of the arrays [B, S] of all batches, the values of the trained tokens of each document."""
        return [
            values_BS[batch][row, start : start + len(one) - 1][one.mask[1:] > 0]
            for one, (batch, row, start) in zip(self.examples, self.starts, strict=True)
        ]

    def with_trained_values(self, name: str, values: Sequence[np.ndarray]) -> Iterator[Batch[np.ndarray]]:
        """The batches with `arrays[name]`: the values of the trained tokens of each document, 0 elsewhere."""
        arrays = [np.zeros(batch.tokens_BS.shape, np.float32) for batch in self.batches]
        for one, (batch, row, start), own in zip(self.examples, self.starts, values, strict=True):
            arrays[batch][row, start + np.flatnonzero(one.mask[1:])] = own
        for whole, array_BS in zip(self.batches, arrays, strict=True):
            yield whole._replace(arrays={name: array_BS})


def pack_examples(examples: Sequence[Example], config: RunConfig, pad_id: int) -> Packed:
    """The documents in batches of the rows of a micro-batch; the last is filled up with empty rows."""
    size, length = config.train.batch_size // config.train.accumulation_steps, config.data.max_length
    plan = pack([len(one) for one in examples], length) if config.data.packing else one_each(len(examples))
    starts: dict[int, tuple[int, int, int]] = {}
    for number, indices in enumerate(plan):
        start = 0
        for index in indices:
            starts[index] = (number // size, number % size, start)
            start += len(examples[index])
    rows = [[examples[index] for index in indices] for indices in plan]
    rows += [[] for _ in range(-len(rows) % size)]
    return Packed(
        examples=tuple(examples),
        batches=tuple(
            assemble(rows[first : first + size], length, pad_id, examples[0]) for first in range(0, len(rows), size)
        ),
        starts=tuple(starts[index] for index in range(len(examples))),
    )


def _by_token(one: Example, values: npt.ArrayLike, name: str) -> np.ndarray:
    """Values of the trained tokens of a document, at the positions of all its tokens, 0 elsewhere."""
    given, positions = np.asarray(values, np.float32), np.flatnonzero(one.mask)
    if given.shape != positions.shape:
        raise DataError(
            f"{name} has the shape {given.shape}, and the row has {len(positions)} trained tokens: give as many"
        )
    out = np.zeros(len(one), np.float32)
    out[positions] = given
    return out


def _after(before: int, values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(before, np.float32), np.asarray(values, np.float32)])
