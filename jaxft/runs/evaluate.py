"""Evaluation of any model on a config's held-out rows."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.checkpoint.load import LoadedModel
from jaxft.config import MeshConfig, RunConfig
from jaxft.data import Tokenizer
from jaxft.errors import ConfigError
from jaxft.files.buckets.working_copy import folder_of
from jaxft.methods import method_of
from jaxft.methods.method import Method, Run
from jaxft.objectives.loss import MethodState
from jaxft.runs.build import abstract_model, build_model, check_frozen, load_frozen, with_frozen
from jaxft.runs.going_on import going_on
from jaxft.runs.scores import answer, check_scores, score_summary
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import TrainState, divide


def evaluate(model: LoadedModel, tokenizer: Tokenizer, config: RunConfig) -> dict[str, Any]:
    """The held-out metrics of the config's method and, if eval.metric is set, the score by generation.

    Raises ConfigError if the config holds no rows out, and if the model has another head than the method trains.
    """
    config = going_on(config)
    method = method_of(config)
    if model.module.config.head != method.head:
        raise ConfigError(
            f"method.name={config.method.name!r} evaluates models with a {method.head} head, and {model.base} has a "
            f"{model.module.config.head} head. Evaluate the model of a run with this method, or with another config."
        )
    data = method.prepare(config, tokenizer)
    if data.eval_examples is None:
        raise ConfigError("nothing is held out: set data.eval or data.eval_fraction")
    check_scores(config, data, tokenizer, model.module)
    graphdef, trainable, frozen = divide(model.module)
    mesh = make_mesh_plan(MeshConfig(), jax.devices()[:1])
    check_frozen(config, model.module, tokenizer, mesh)
    run = Run(
        config=config,
        folder=folder_of(config.output_dir),
        tokenizer=tokenizer,
        data=data,
        mesh=mesh,
        model=model.module,
        source=method.source(config, data, tokenizer),
        held_out_only=True,
    )
    run = method.precompute(run, lambda: build_model(config, run.mesh).module)
    state = TrainState(jnp.int32(0), trainable, frozen, (), jax.random.key(config.seed), _method_state(config, method))
    state = with_frozen(state, load_frozen(config, mesh))
    with (
        method.rewards(config, data) as rewards,
        method.environments(config, data, tokenizer) as environments,
    ):
        run = dataclasses.replace(run, rewards=rewards, environments=environments)
        evaluator = method.evaluator(run, graphdef)
        out: dict[str, Any] = {} if evaluator is None else dict(evaluator(state, lambda: None))
    out["eval_rows"] = len(data.eval_examples)
    if config.eval.metric:
        answers = answer(model.module, tokenizer, data, config.eval)
        out |= {"metric": answers.score.name, **score_summary(answers)}
    return out


def _method_state(config: RunConfig, method: Method) -> MethodState | None:
    """The method's arrays, made from the base model of the config, whichever model is evaluated."""
    trainable = divide(abstract_model(config))[1]
    shapes = jax.eval_shape(partial(method.initial_state, config), trainable)
    # Numbers that training adapts are not read by an evaluation.
    if shapes is None or shapes.rebuilt is None:
        return None
    return method.initial_state(config, divide(build_model(config).module)[1])
