"""Evaluation of any model on a config's held-out rows."""

from typing import Any

import jax
from flax import nnx

from jaxft.checkpoint.load import LoadedModel
from jaxft.config import RunConfig
from jaxft.data import Tokenizer, prepare
from jaxft.errors import ConfigError
from jaxft.evaluation.held_out import held_out_loss
from jaxft.objectives.sft import sft_loss
from jaxft.runs.batches import make_loader
from jaxft.runs.scores import answer, figures


def evaluate(model: LoadedModel, tokenizer: Tokenizer, config: RunConfig) -> dict[str, Any]:
    """Held-out loss, perplexity and, where eval.metric is set, the score by generation.

    Raises ConfigError where the config holds no rows out.
    """
    data = prepare(config, tokenizer)
    if data.eval_examples is None:
        raise ConfigError("nothing is held out: set data.eval or data.eval_fraction")
    loader = make_loader(data.eval_examples, config, tokenizer, shuffle=False)
    graphdef, state = nnx.split(model.module)
    step = jax.jit(lambda state, batch: sft_loss(nnx.merge(graphdef, state), batch, None))
    out: dict[str, Any] = held_out_loss(lambda batch: step(state, batch), loader.eval_batches())
    out["eval_rows"] = len(data.eval_examples)
    if config.eval.metric:
        answers = answer(model.module, tokenizer, data, config.eval)
        out |= {"metric": config.eval.metric, **figures(answers, data.eval_references)}
    return out
