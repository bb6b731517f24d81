"""Pairs of a chosen and a rejected answer, which are neighbouring documents of a packed row."""

# B batch, S sequence, D documents that a row can hold, P pairs that a row can hold

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.objectives.documents import document_sums, target_logps
from jaxft.objectives.loss import LossSums, Ratio, in_units_of


class Pairs(NamedTuple):
    """A number of either answer of each pair, [B, P] float32: a log-probability, a length, a score."""

    chosen: jax.Array
    rejected: jax.Array


class PairCounts(NamedTuple):
    """Units of a batch, float32 scalars: pairs, and tokens of chosen answers whose negative log-likelihood is taken."""

    pairs: jax.Array
    tokens: jax.Array


def by_pair(values_BD: jax.Array) -> Pairs:
    """Numbers of documents, as in `Batch.values`, as those of pairs: documents 1 and 2 are a pair, 3 and 4, ..."""
    end = values_BD.shape[1] // 2 * 2
    return Pairs(values_BD[:, 0:end:2], values_BD[:, 1:end:2])


def existing_pairs(segments_BS: jax.Array) -> jax.Array:
    """1 if the row has the pair, else 0: [B, P] float32, P as in `by_pair` of numbers of documents."""
    # A document has at least two tokens, so a pair has four. A pair exists if its second document does.
    pairs = segments_BS.shape[1] // 4
    last_B = jnp.max(segments_BS, axis=1)
    return (2 * jnp.arange(1, pairs + 1) <= last_B[:, None]).astype(jnp.float32)


def chosen_mask(batch: Batch[jax.Array], *, with_prompt: bool = False) -> jax.Array:
    """1 if the target is a token of a chosen answer, else 0, [B, S] float32.

    with_prompt: also 1 for the tokens of its prompt, except the first token of the document.
    """
    targets_BS = _targets(batch.segments_BS) if with_prompt else batch.weights_BS
    return targets_BS * (batch.segments_BS % 2 == 1)


def count_units(batch: Batch[jax.Array], *, with_prompt: bool = False) -> PairCounts:
    """The pairs of a batch and its tokens under `chosen_mask`."""
    tokens = jnp.sum(chosen_mask(batch, with_prompt=with_prompt))
    return PairCounts(jnp.sum(existing_pairs(batch.segments_BS)), tokens)


def answer_sums(values_BS: jax.Array, batch: Batch[jax.Array], ld_alpha: float | None = None) -> jax.Array:
    """The values of each document's trained tokens, added up, [B, D].

    values_BS: 0 where a position is not trained. ld_alpha: factor of those tokens of the longer answer of a pair that
    come after the number of tokens that both have; None: 1. Source: LD-DPO, arXiv:2409.06411.
    """
    if ld_alpha is not None:
        values_BS = values_BS * _length_weights(batch, ld_alpha)
    return document_sums(values_BS, batch.segments_BS)


def answer_logps(model: Decoder, batch: Batch[jax.Array], ld_alpha: float | None = None) -> jax.Array:
    """The `answer_sums` of log-probabilities in nats without dropout, [B, D] float32, as for a reference."""
    hidden_BSD, _ = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
    return answer_sums(target_logps(model, hidden_BSD, batch), batch, ld_alpha)


def reward_metrics(rewards: Pairs, logps: Pairs) -> dict[str, jax.Array]:
    """TRL's metrics of pairs, [B, P] each, from the rewards that a method implies and from log-probabilities."""
    return {
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/accuracies": rewards.chosen > rewards.rejected,
        "rewards/margins": rewards.chosen - rewards.rejected,
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
    }


def pair_sums(batch: Batch[jax.Array], terms_BP: jax.Array, metrics: Mapping[str, jax.Array]) -> LossSums:
    """The losses of pairs that exist, added up; the weight is the number of these pairs.

    metrics: numbers of pairs, [B, P], whose means over pairs are reported.
    """
    exists_BP = existing_pairs(batch.segments_BS)
    pairs = jnp.sum(exists_BP)
    return LossSums(
        total=jnp.sum(terms_BP * exists_BP),
        weight=pairs,
        tokens=jnp.sum(batch.segments_BS > 0).astype(jnp.float32),
        trained_tokens=jnp.sum(batch.weights_BS),
        metrics={name: Ratio(jnp.sum(value * exists_BP), pairs) for name, value in metrics.items()},
    )


def with_nll(sums: LossSums, nll: Ratio, coefficient: float, counts: PairCounts | None) -> LossSums:
    """`sums` with the mean negative log-likelihood of chosen tokens, times a coefficient, reported as `nll_loss`.

    nll: its sum in nats and its tokens. counts: of the whole batch, so that it is a mean over its tokens beside one
    over its pairs; None if this is the whole batch.
    """
    whole = PairCounts(sums.weight, nll.weight) if counts is None else counts
    factor = in_units_of(whole.pairs, Ratio(jnp.float32(coefficient), whole.tokens))
    return sums._replace(total=sums.total + factor * nll.total, metrics=sums.metrics | {"nll_loss": nll})


def _targets(segments_BS: jax.Array) -> jax.Array:
    """1 if the next token is of the same document, else 0, [B, S] float32."""
    same_BS = jnp.pad(segments_BS[:, 1:] == segments_BS[:, :-1], ((0, 0), (0, 1)))
    return (same_BS & (segments_BS > 0)).astype(jnp.float32)


def _length_weights(batch: Batch[jax.Array], alpha: float) -> jax.Array:
    """alpha on trained tokens beyond the number that both answers of their pair have, 1 on others, [B, S]."""
    lengths_BD = document_sums(batch.weights_BS, batch.segments_BS)
    shared_BP = jnp.minimum(*by_pair(lengths_BD))
    shared_BD = jnp.repeat(shared_BP, 2, axis=1)
    # A document's tokens up to a position: those of the row, less those of the documents before.
    before_BD = jnp.cumsum(lengths_BD, axis=1) - lengths_BD
    limits_BD = before_BD[:, : shared_BD.shape[1]] + shared_BD
    index_BS = jnp.clip(batch.segments_BS - 1, 0, limits_BD.shape[1] - 1)
    limit_BS = jnp.take_along_axis(limits_BD, index_BS, axis=1)
    return jnp.where(jnp.cumsum(batch.weights_BS, axis=1) <= limit_BS, 1.0, alpha)
