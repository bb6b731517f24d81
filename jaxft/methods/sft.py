"""Supervised fine-tuning: the answers of rows are learned token by token."""

import math
from functools import partial

from flax import nnx

from jaxft.config import RunConfig
from jaxft.data import prepare
from jaxft.methods.method import Method, Run, no_state
from jaxft.methods.parts import sequences
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import Loss
from jaxft.objectives.sft import sft_loss
from jaxft.objectives.token_loss import TokenLoss


def check(config: RunConfig, model: Decoder) -> None:
    """Raises ConfigError for router losses on a model without experts."""
    router_coefficients(config, model)


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`sft_loss` with the settings of `method.sft` and `router`."""
    settings = config.method.sft
    token_loss = TokenLoss(
        label_smoothing=settings.label_smoothing_factor, z_loss=settings.z_loss, dft=settings.loss_type == "dft"
    )
    return partial(
        sft_loss,
        router=router_coefficients(config, model),
        token_loss=token_loss,
        neftune_noise_alpha=settings.neftune_noise_alpha,
    )


def evaluator(run: Run, graphdef: nnx.GraphDef[Decoder]) -> sequences.Evaluator | None:
    """Held-out cross-entropy, whatever the training loss adds to it, and its perplexity."""
    evaluate = sequences.make_evaluator(run, graphdef, sft_loss)
    return None if evaluate is None else lambda state, between: with_perplexity(evaluate(state, between))


def with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics with `eval_perplexity`, the exponential of `eval_loss` (nats a token), beside the loss."""
    perplexity = math.exp(min(metrics["eval_loss"], 700.0))  # math.exp overflows above 709
    return {"eval_loss": metrics["eval_loss"], "eval_perplexity": perplexity} | metrics


METHOD = Method(
    prepare=prepare,
    source=sequences.source,
    feed=sequences.feed,
    batch_shapes=sequences.batch_shapes,
    check=check,
    initial_state=no_state,
    loss=loss,
    evaluator=evaluator,
    describe=lambda config: "supervised fine-tuning",
)
