"""Reward models: a score head on a language model learns from pairs which answers people prefer."""

from functools import partial

from flax import nnx

from jaxft.config import RunConfig
from jaxft.data import Prepared, Tokenizer
from jaxft.data.examine import Examination
from jaxft.data.preferences import prepare_pairs
from jaxft.data.tokenizers.padding import separate_pad_id
from jaxft.errors import ConfigError, DataError
from jaxft.methods.method import Method, Run, no_state
from jaxft.methods.parts import sequences
from jaxft.methods.parts.charts import SCORE_CHARTS
from jaxft.methods.parts.pairs import batch_shapes, check_pairs
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import Loss
from jaxft.objectives.reward import reward_loss


def check(config: RunConfig, model: Decoder) -> None:
    """Raises ConfigError for what needs an LM head, for virtual tokens, and for rows that are no pairs."""
    adapter = config.adapter
    check_pairs(config)
    if config.eval.metric is not None:
        raise ConfigError(
            f"eval.metric={config.eval.metric!r} has held-out prompts answered, but a reward model has no LM head and "
            "generates nothing. Set it to None: eval_accuracy says how often the better answer has the larger score."
        )
    if adapter.kind in ("prompt", "prefix"):
        raise ConfigError(
            f"adapter.kind={adapter.kind!r} puts virtual tokens into every row, which is not implemented for reward "
            "models. Use adapter.kind='lora'."
        )
    if adapter.kind != "none" and "score" in adapter.saved:
        raise ConfigError(
            "adapter.modules_to_save names score, which a reward model always trains and saves. Leave it out."
        )
    router_coefficients(config, model)


def prepare_rewards(config: RunConfig, tokenizer: Tokenizer) -> Prepared:
    """Pairs as `prepare_pairs` reads them.

    Raises DataError also for a tokenizer without a token to pad with, and for rows with margins if the config does not
    say what becomes of them.
    """
    separate_pad_id(tokenizer)
    data = prepare_pairs(config, tokenizer)
    for examination in (data.examination, data.eval_examination):
        if examination is not None and config.method.reward.margin_coefficient is None:
            _refuse_margins(examination)
    return data


def _refuse_margins(examination: Examination) -> None:
    pairs = examination.pairs
    if pairs is None or pairs.margins is None:
        return
    low, middle, high = (pairs.margins[name] for name in ("p0", "p50", "p100"))
    raise DataError(
        f"rows of {examination.source} have margins ({low:g} to {high:g}, median {middle:g}): a column 'margin', or "
        "the difference of two scores. In the loss they are differences of scores that the reward model is to reach. "
        "Set method.reward.margin_coefficient=1 to use them as they are, another factor to scale them, or 0 to leave "
        "them out."
    )


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`reward_loss` with the settings of `method.reward`."""
    settings = config.method.reward
    return partial(
        reward_loss,
        center_rewards_coefficient=settings.center_rewards_coefficient,
        margin_coefficient=settings.margin_coefficient or 0.0,
        router=router_coefficients(config, model),
    )


def evaluator(run: Run, graphdef: nnx.GraphDef[Decoder]) -> sequences.Evaluator | None:
    """The held-out loss and its metrics."""
    return sequences.make_evaluator(run, graphdef, loss(run.config, run.model))


METHOD = Method(
    prepare=prepare_rewards,
    source=sequences.source,
    feed=sequences.feed,
    batch_shapes=batch_shapes,
    check=check,
    initial_state=no_state,
    loss=loss,
    evaluator=evaluator,
    describe=lambda config: "reward model",
    loss_unit="mean over pairs",
    charts=SCORE_CHARTS,
    head="score",
)
