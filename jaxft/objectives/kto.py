"""KTO: answers that people labelled good become more likely than under the reference, and bad ones less likely."""

# B batch, S sequence, P documents that a row can hold

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.objectives.documents import document_logps, document_sums, existing_documents, target_logps
from jaxft.objectives.loss import LossSums, Ratio
from jaxft.objectives.router import RouterCoefficients, hidden_and_routing, with_router_losses

LossType = Literal["kto", "apo_zero_unpaired"]


class KTOSums(NamedTuple):
    """Sums over the whole batch that the loss of every micro-batch needs, float32 scalars.

    desirable, undesirable: numbers of answers. log_ratio: log-ratio of policy to reference, summed over the mismatched
    documents, of which there are as many; None if the loss does not estimate a KL divergence.
    """

    desirable: jax.Array
    undesirable: jax.Array
    log_ratio: jax.Array | None = None

    @property
    def kl(self) -> jax.Array:
        """The estimate z of the KL divergence in nats, never below 0; 0 without mismatched documents."""
        if self.log_ratio is None:
            return jnp.float32(0)
        answers = jnp.maximum(self.desirable + self.undesirable, 1)
        return jax.lax.stop_gradient(jnp.maximum(self.log_ratio / answers, 0))


def kto_sums(answers: Batch[jax.Array], log_ratio: jax.Array | None) -> KTOSums:
    """The sums of one batch or micro-batch, whose documents carry their labels as values "desirable".

    log_ratio: the `summed_log_ratio` of the mismatched documents.
    """
    exists_BP, good_BP = existing_documents(answers.segments_BS), answers.values["desirable"]
    return KTOSums(jnp.sum(good_BP * exists_BP), jnp.sum((1 - good_BP) * exists_BP), log_ratio)


def summed_log_ratio(model: Decoder, batch: Batch[jax.Array], reference_BP: jax.Array) -> jax.Array:
    """The log-ratio of model to reference in nats, summed over the documents of a batch: a scalar.

    reference_BP: the reference's log-probabilities of the documents.
    """
    ratio_BP = document_logps(model, batch) - reference_BP
    return jnp.sum(ratio_BP * existing_documents(batch.segments_BS))


def kto_terms(ratio: jax.Array, desirable: jax.Array, kl: jax.Array, *, beta: float, loss_type: LossType) -> jax.Array:
    """The loss of each answer before its weight.

    It is 1 - s(beta (d - z)) for desirable answers and 1 - s(beta (z - d)) for the others, with s the logistic
    function. ratio: d, the log-ratio of policy to reference in nats. desirable: 1 or 0. kl: z, which apo_zero_unpaired
    takes as 0. Source: KTO, arXiv:2402.01306, eq. 7; APO-zero, arXiv:2408.06266, eq. 7, of which this is TRL's form for
    answers without a pair.
    """
    distance = ratio if loss_type == "apo_zero_unpaired" else ratio - kl
    return jax.nn.sigmoid(-beta * jnp.where(desirable > 0, distance, -distance))


def kto_loss(
    model: Decoder,
    reference_BP: jax.Array,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    whole: KTOSums,
    *,
    beta: float,
    loss_type: LossType = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    router: RouterCoefficients | None = None,
) -> LossSums:
    """`kto_terms` times the weight of their class, summed over the answers of a batch; the weight is their number.

    reference_BP: the reference's log-probability of each answer, without gradient. batch: [B, S]; each document is an
    answer after its prompt, with its label in values "desirable". whole: of the batch that this is a part of. Metrics
    have TRL's names: means over the answers of a class of rewards (beta times the log-ratio) and of log-probabilities,
    0 if the batch has none; rewards/margins, the difference of the rewards, 0 if a class has none; kl, the estimate z;
    count/chosen and count/rejected, the numbers of desirable and undesirable answers in the batch.
    """
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router)
    policy_BP = document_sums(target_logps(model, hidden_BSD, batch), batch.segments_BS)
    exists_BP, desirable_BP = existing_documents(batch.segments_BS), batch.values["desirable"]
    good_BP, bad_BP = desirable_BP * exists_BP, (1 - desirable_BP) * exists_BP
    ratio_BP = policy_BP - reference_BP
    terms_BP = kto_terms(ratio_BP, desirable_BP, whole.kl, beta=beta, loss_type=loss_type)
    good, bad, answers = jnp.sum(good_BP), jnp.sum(bad_BP), jnp.sum(exists_BP)
    reward_BP = beta * ratio_BP
    # Each class in units of all answers, so that the sum over micro-batches is the difference of two means.
    total, both = whole.desirable + whole.undesirable, (whole.desirable > 0) & (whole.undesirable > 0)
    good_share, bad_share = (total / jnp.maximum(count, 1) for count in (whole.desirable, whole.undesirable))
    margin = jnp.where(both, jnp.sum(reward_BP * (good_BP * good_share - bad_BP * bad_share)), 0)
    metrics = {
        "rewards/chosen": Ratio(jnp.sum(reward_BP * good_BP), good),
        "rewards/rejected": Ratio(jnp.sum(reward_BP * bad_BP), bad),
        "rewards/margins": Ratio(margin, answers),
        "logps/chosen": Ratio(jnp.sum(policy_BP * good_BP), good),
        "logps/rejected": Ratio(jnp.sum(policy_BP * bad_BP), bad),
        "count/chosen": Ratio(good * total, answers),
        "count/rejected": Ratio(bad * total, answers),
    }
    if whole.log_ratio is not None:
        metrics["kl"] = Ratio(whole.kl * answers, answers)
    sums = LossSums(
        total=jnp.sum(terms_BP * (desirable_weight * good_BP + undesirable_weight * bad_BP)),
        weight=answers,
        tokens=jnp.sum(batch.segments_BS > 0).astype(jnp.float32),
        trained_tokens=jnp.sum(batch.weights_BS),
        metrics=metrics,
    )
    return with_router_losses(sums, router, routing)
