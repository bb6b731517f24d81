"""What the sum of a policy loss over the tokens of a batch is divided by."""

# B batch, S sequence, P documents that a row can hold

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.objectives.documents import by_position, document_sums, existing_documents
from jaxft.objectives.policy.surrogate import PolicySettings

# `Batch.values`: the part of each answer in the denominator. Without it, `answer_units` of the answers in the batch.
UNITS = "units"
# `Batch.values`: 1 for answers that were cut off at their greatest length.
TRUNCATED = "truncated"


class PolicyCounts(NamedTuple):
    """Sums over the whole batch, float32: units of the loss, and tokens that count."""

    units: jax.Array
    tokens: jax.Array


def answer_units(batch: Batch[jax.Array], settings: PolicySettings) -> jax.Array:
    """The part of each answer in the denominator of the loss, [B, P] float32.

    `dapo`, `bnpo` and `cispo` divide by tokens that are trained (DAPO, arXiv:2503.14476, section 3.3), `grpo` and
    `luspo` by answers (GRPO, arXiv:2402.03300, eq. 3; LUSPO, arXiv:2602.05261), and `dr_grpo` by answers times
    max_completion_length (Dr. GRPO, arXiv:2503.20783). Answers without a trained token are answers, too.
    If some answers of a batch were left out because they have no gradient, values[UNITS] keeps their part.
    """
    if UNITS in batch.values:
        return batch.values[UNITS]
    if settings.loss_type in ("dapo", "bnpo", "cispo"):
        return document_sums(batch.weights_BS, batch.segments_BS)
    length = settings.max_completion_length if settings.loss_type == "dr_grpo" else None
    return existing_documents(batch.segments_BS) * (1.0 if length is None else float(length))


def token_scale(batch: Batch[jax.Array], settings: PolicySettings) -> jax.Array:
    """The factor of every token in the sum, [B, S] float32: for `grpo` 1 / trained tokens of its answer, otherwise 1.

    It is 0 on tokens that are not trained.
    """
    if settings.loss_type != "grpo":
        return batch.weights_BS
    lengths_BP = jnp.maximum(document_sums(batch.weights_BS, batch.segments_BS), 1)
    return batch.weights_BS * by_position(1 / lengths_BP, batch.segments_BS)


def without_truncated(batch: Batch[jax.Array], settings: PolicySettings) -> Batch[jax.Array]:
    """The batch without trained tokens in answers that were cut off, if `mask_truncated_completions`.

    These answers are still counted as answers. Raises ValueError if the batch does not say which were cut off.
    """
    if not settings.mask_truncated_completions:
        return batch
    if TRUNCATED not in batch.values:
        raise ValueError(f"mask_truncated_completions needs values[{TRUNCATED!r}] of the batch, which has none")
    whole_BS = by_position(1 - batch.values[TRUNCATED], batch.segments_BS)
    return batch._replace(weights_BS=batch.weights_BS * whole_BS)


def policy_counts(batch: Batch[jax.Array], settings: PolicySettings) -> PolicyCounts:
    """`BatchSums` of `policy_loss`: it needs them of the whole batch for the mean entropy over tokens."""
    batch = without_truncated(batch, settings)
    return PolicyCounts(jnp.sum(answer_units(batch, settings)), jnp.sum(batch.weights_BS))
