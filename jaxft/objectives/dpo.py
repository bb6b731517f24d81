"""Direct preference optimization: the answers that people chose become more likely than those that they rejected."""

# B batch, S sequence, D documents that a row can hold, P pairs that a row can hold

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.objectives.documents import document_sums, target_logps
from jaxft.objectives.loss import LossSums, Ratio
from jaxft.objectives.pairs import Pairs, by_pair, existing_pairs
from jaxft.objectives.router import RouterCoefficients, hidden_and_routing, with_router_losses


def dpo_terms(policy: Pairs, reference: Pairs, *, beta: float, label_smoothing: float) -> jax.Array:
    """The loss of each pair, [B, P]: -(1 - e) log s(beta (c - r)) - e log s(-beta (c - r)), with s the logistic
    function.

    c, r: log-ratio of policy to reference of the chosen and of the rejected answer. Source: DPO, arXiv:2305.18290, eq.
    7, and for label_smoothing e, the probability that a label is the wrong way round, conservative DPO (E. Mitchell, "A
    note on DPO with noisy preferences and relationship to IPO", 2023).
    """
    margin_BP = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    right_BP, wrong_BP = jax.nn.log_sigmoid(beta * margin_BP), jax.nn.log_sigmoid(-beta * margin_BP)
    return -(1 - label_smoothing) * right_BP - label_smoothing * wrong_BP


def dpo_loss(
    model: Decoder,
    reference_BD: jax.Array,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    router: RouterCoefficients | None = None,
) -> LossSums:
    """`dpo_terms` summed over the pairs of a batch; the weight is the number of pairs.

    reference_BD: the reference's log-probability of each document, summed over its trained tokens, without gradient;
    see `documents.document_logps`. batch: [B, S]; in each row the documents 1 and 2, 3 and 4, ... are the chosen and
    the rejected answer of a pair, each after its prompt, and weights are 1 on the answers' tokens. Metrics have TRL's
    names and are means over pairs: rewards/chosen and rewards/rejected (beta times the log-ratio), rewards/margins,
    rewards/accuracies, logps/chosen, logps/rejected.
    """
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router)
    logps_BS = target_logps(model, hidden_BSD, batch)
    policy, frozen = by_pair(document_sums(logps_BS, batch.segments_BS)), by_pair(reference_BD)
    terms_BP = dpo_terms(policy, frozen, beta=beta, label_smoothing=label_smoothing)
    chosen_BP, rejected_BP = beta * (policy.chosen - frozen.chosen), beta * (policy.rejected - frozen.rejected)
    exists_BP = existing_pairs(batch.segments_BS)
    pairs = jnp.sum(exists_BP)
    values = {
        "rewards/chosen": chosen_BP,
        "rewards/rejected": rejected_BP,
        "rewards/accuracies": chosen_BP > rejected_BP,
        "rewards/margins": chosen_BP - rejected_BP,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    sums = LossSums(
        total=jnp.sum(terms_BP * exists_BP),
        weight=pairs,
        tokens=jnp.sum(batch.segments_BS > 0).astype(jnp.float32),
        trained_tokens=jnp.sum(batch.weights_BS),
        metrics={name: Ratio(jnp.sum(value * exists_BP), pairs) for name, value in values.items()},
    )
    return with_router_losses(sums, router, routing)
