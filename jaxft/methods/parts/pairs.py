"""What methods that train on pairs of answers share."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from jaxft.config import RunConfig
from jaxft.config.data import CUTTING
from jaxft.data.batch import Batch
from jaxft.data.examine_pairs import MARGIN
from jaxft.data.preferences import prepare_pairs
from jaxft.errors import ConfigError
from jaxft.methods.method import Method, Run, no_state
from jaxft.methods.parts import sequences
from jaxft.methods.parts.charts import PAIR_CHARTS
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import BatchSums, Loss, MethodState
from jaxft.objectives.pairs import PairCounts, count_units


def batch_shapes(config: RunConfig, values: Sequence[str] = ()) -> Batch[jax.ShapeDtypeStruct]:
    """The shapes of a batch of pairs, whose documents carry the margin of their pair, and `values`."""
    return sequences.batch_shapes(config, values=(MARGIN, *values))


def check_pairs(config: RunConfig) -> None:
    """Raises ConfigError for settings of data that would cut a pair or read rows that are none."""
    data, method = config.data, f"method.name={config.method.name!r}"
    if data.truncation in CUTTING:
        raise ConfigError(
            f"data.truncation={data.truncation!r} would cut the rejected answer of a pair and leave the chosen one "
            "whole. Use 'drop' or 'refuse', or raise data.max_length: it must hold both answers, each with its prompt."
        )
    formats = {f"data.mixture.{name}.format": one.format for name, one in data.mixture.items()}
    for field, value in {"data.format": data.format, **formats}.items():
        if value not in ("auto", None):
            raise ConfigError(
                f"{field}={value!r} has one answer in a row, but {method} reads rows of prompt, chosen and "
                "rejected. Leave it out."
            )
    if data.train_on == "all":
        raise ConfigError(
            "data.train_on='all' trains prompts too, which are the same in both answers of a pair. Use 'assistant'."
        )


def unit_counts(*, with_prompt: bool = False) -> BatchSums:
    """`Method.batch_sums` of losses that add a mean over chosen tokens to one over pairs: the numbers of both.

    with_prompt: whether the tokens of prompts before chosen answers count too.
    """

    def counts(model: Decoder, batch: Batch[jax.Array], state: MethodState | None) -> PairCounts:
        return count_units(batch, with_prompt=with_prompt)

    return counts


def pair_method(
    loss: Callable[[RunConfig, Decoder], Loss],
    describe: Callable[[RunConfig], str],
    batch_sums: Callable[[RunConfig, Decoder], BatchSums | None],
) -> Method:
    """A method on pairs of answers that has no reference model. The arguments are fields of `Method`."""

    def check(config: RunConfig, model: Decoder) -> None:
        check_pairs(config)
        router_coefficients(config, model)

    def evaluator(run: Run, graphdef: nnx.GraphDef[Decoder]) -> sequences.Evaluator | None:
        config, model = run.config, run.model
        return sequences.make_evaluator(run, graphdef, loss(config, model), batch_sums(config, model))

    return Method(
        prepare=prepare_pairs,
        source=sequences.source,
        feed=sequences.feed,
        batch_shapes=batch_shapes,
        check=check,
        initial_state=no_state,
        batch_sums=batch_sums,
        loss=loss,
        evaluator=evaluator,
        describe=describe,
        loss_unit="mean over pairs",
        charts=PAIR_CHARTS,
    )
