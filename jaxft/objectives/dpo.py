"""Direct preference optimization: the answers that people chose become more likely than those that they rejected."""

# B batch, S sequence, P pairs that a row can hold

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import LossSums, Ratio
from jaxft.objectives.router import RouterCoefficients, hidden_and_routing, with_router_losses
from jaxft.objectives.token_logps import token_logps

MIN_PAIR_TOKENS = 4


class PairLogps(NamedTuple):
    """Log-probability of each pair's answers, in nats, summed over the answer's tokens, [B, P] float32."""

    chosen: jax.Array
    rejected: jax.Array


def dpo_terms(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> jax.Array:
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
    reference: Decoder,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    router: RouterCoefficients | None = None,
) -> LossSums:
    """`dpo_terms` summed over the pairs of a batch; the weight is the number of pairs.

    reference: the frozen model that log-ratios are taken against. batch: [B, S]; in each row the documents 1 and 2, 3
    and 4, ... are the chosen and the rejected answer of a pair, each after its prompt, and weights are 1 on the
    answers' tokens. Metrics have TRL's names and are means over pairs: rewards/chosen and rewards/rejected (beta times
    the log-ratio), rewards/margins, rewards/accuracies, logps/chosen, logps/rejected.
    """
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router)
    policy = pair_logps(model, hidden_BSD, batch)
    reference_BSD, _ = reference(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
    frozen = jax.tree.map(jax.lax.stop_gradient, pair_logps(reference, reference_BSD, batch))
    terms_BP = dpo_terms(policy, frozen, beta=beta, label_smoothing=label_smoothing)
    chosen_BP, rejected_BP = beta * (policy.chosen - frozen.chosen), beta * (policy.rejected - frozen.rejected)
    # A pair exists if its second document does.
    last_B = jnp.max(batch.segments_BS, axis=1)
    exists_BP = (2 * jnp.arange(1, terms_BP.shape[1] + 1) <= last_B[:, None]).astype(jnp.float32)
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


def pair_logps(model: Decoder, hidden_BSD: jax.Array, batch: Batch[jax.Array]) -> PairLogps:
    """The summed log-probabilities of the answers of a batch, by row and pair; 0 for pairs that do not exist."""
    unembed, head, dimensions = model.split_unembed()
    logps_BS = token_logps(unembed, head, hidden_BSD, batch.targets_BS, batch.weights_BS, dimensions=dimensions)
    # A document has at least one token of its prompt and one of its answer, so a pair has four.
    segments = 2 * (logps_BS.shape[1] // MIN_PAIR_TOKENS) + 1
    by_segment = jax.vmap(partial(jax.ops.segment_sum, num_segments=segments))(logps_BS, batch.segments_BS)
    return PairLogps(by_segment[:, 1::2], by_segment[:, 2::2])
