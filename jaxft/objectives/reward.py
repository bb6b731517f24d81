"""Reward models: the score of the answer that people chose becomes larger than that of the one they rejected."""

# B batch, S sequence, D documents that a row can hold, P pairs that a row can hold

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.data.examine_pairs import MARGIN
from jaxft.errors import ModelError
from jaxft.nn.decoder import Decoder
from jaxft.objectives.documents import document_sums
from jaxft.objectives.loss import LossSums, MethodState, Ratio
from jaxft.objectives.pairs import Pairs, by_pair, existing_pairs
from jaxft.objectives.router import RouterCoefficients, hidden_and_routing, with_router_losses


def reward_terms(scores: Pairs, margin_BP: jax.Array | float = 0.0, center: float | None = None) -> jax.Array:
    """The loss of each pair, [B, P]: -log s(c - r - m) + k (c + r)^2, with s the logistic function.

    c, r: scores of the chosen and of the rejected answer. m: margin_BP. k: center, 0 if None. Source: Bradley-Terry
    (arXiv:2203.02155, eq. 1), with margins Llama 2 (arXiv:2307.09288, eq. 2), centring arXiv:2312.09244.
    """
    terms_BP = -jax.nn.log_sigmoid(scores.chosen - scores.rejected - margin_BP)
    return terms_BP if center is None else terms_BP + center * (scores.chosen + scores.rejected) ** 2


def scores_at_ends(model: Decoder, hidden_BSD: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """The score of each document, read at its last token, [B, D] float32; 0 at places without a document.

    The last token is found by its place, whichever token it is. Raises ModelError if the model has no score head.
    """
    if model.value is None:
        raise ModelError("the model has no score head, so it gives no scores: it is not a reward model")
    # The next token belongs to another document, or to the padding, or there is none.
    next_BS = jnp.pad(segments_BS[:, 1:], ((0, 0), (0, 1)))
    ends_BS = (segments_BS > 0) & (segments_BS != next_BS)
    return document_sums(model.value(hidden_BSD) * ends_BS, segments_BS)


def document_scores(model: Decoder, batch: Batch[jax.Array]) -> jax.Array:
    """The score of each document of a batch, without dropout, [B, D] float32; see `scores_at_ends`."""
    hidden_BSD, _ = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
    return scores_at_ends(model, hidden_BSD, batch.segments_BS)


def reward_loss(
    model: Decoder,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    method_state: MethodState | None = None,
    *,
    center_rewards_coefficient: float | None = None,
    margin_coefficient: float = 1.0,
    router: RouterCoefficients | None = None,
) -> LossSums:
    """`reward_terms` summed over the pairs of a batch; the weight is the number of pairs.

    batch: [B, S]; in each row the documents 1 and 2, 3 and 4, ... are the chosen and the rejected answer of a pair,
    each after its prompt. Margins are margin_coefficient times `values[MARGIN]`, 0 without it. Metrics have TRL's
    names: accuracy (share of pairs whose chosen answer has the larger score), margin (difference of the scores) and
    mean_reward are means over pairs; min_reward and max_reward are those of a batch or micro-batch.
    """
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router)
    scores = by_pair(scores_at_ends(model, hidden_BSD, batch.segments_BS))
    given = MARGIN in batch.values
    margin_BP = margin_coefficient * by_pair(batch.values[MARGIN]).chosen if given else 0.0
    terms_BP = reward_terms(scores, margin_BP, center_rewards_coefficient)
    exists_BP = existing_pairs(batch.segments_BS)
    pairs = jnp.sum(exists_BP)
    values = {
        "accuracy": scores.chosen > scores.rejected,
        "margin": scores.chosen - scores.rejected,
        "mean_reward": (scores.chosen + scores.rejected) / 2,
    }
    metrics = {name: Ratio(jnp.sum(value * exists_BP), pairs) for name, value in values.items()}
    lowest, highest = _extremes(scores, exists_BP)
    sums = LossSums(
        total=jnp.sum(terms_BP * exists_BP),
        weight=pairs,
        tokens=jnp.sum(batch.segments_BS > 0).astype(jnp.float32),
        trained_tokens=2 * pairs,  # the last token of each document
        metrics=metrics | {"min_reward": Ratio(lowest * pairs, pairs), "max_reward": Ratio(highest * pairs, pairs)},
    )
    return with_router_losses(sums, router, routing)


def _extremes(scores: Pairs, exists_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lowest and the highest score; finite if there is no pair."""
    some = jnp.sum(exists_BP) > 0
    lowest = jnp.min(jnp.where(exists_BP > 0, jnp.minimum(*scores), jnp.inf))
    highest = jnp.max(jnp.where(exists_BP > 0, jnp.maximum(*scores), -jnp.inf))
    return jnp.where(some, lowest, 0.0), jnp.where(some, highest, 0.0)
