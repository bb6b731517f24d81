"""The contract of a training method, and what a run hands it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flax import nnx

from jaxft.config import RunConfig
from jaxft.data import Prepared, Tokenizer
from jaxft.data.batch_source import BatchSource
from jaxft.hardware.recomputation import Recomputation
from jaxft.methods.parts.charts import Chart
from jaxft.methods.teacher.frozen import FrozenModel
from jaxft.nn.decoder import Decoder
from jaxft.nn.score import Head
from jaxft.objectives.loss import BatchSums, Loss, MethodState, NextSaved
from jaxft.rollouts.environments.environments import Environments
from jaxft.rollouts.reward_functions import RewardFunctions
from jaxft.rollouts.size import RolloutSize, rollout_size
from jaxft.sharding.mesh import MeshPlan
from jaxft.training.goodput import TimeUse
from jaxft.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is set up but not started: no weights are loaded.

    folder: the run folder. model: abstract, with its adapters. source: the batches of every step. print_line: prints a
    line for people, such as the progress of long work. held_out_only: whether it is an evaluation, which needs nothing
    of the training rows and writes nothing into the run folder. rewards: the functions that judge sampled answers, if
    the method samples any. environments: what replies to the model in them, if anything does. notes: what people should
    know before it starts, such as what has changed since it was stopped. track: gets every row of metrics,
    in process 0. times: what takes the time of the run. recomputation: the choice of `model.remat='auto'`; None if the
    config chose.
    """

    config: RunConfig
    folder: Path
    tokenizer: Tokenizer
    data: Prepared
    mesh: MeshPlan
    model: Decoder
    source: BatchSource
    print_line: Callable[[str], None] = lambda line: None
    held_out_only: bool = False
    rewards: RewardFunctions | None = None
    environments: Environments | None = None
    notes: tuple[str, ...] = ()
    track: Callable[[Mapping[str, float]], None] | None = None
    recomputation: Recomputation | None = None
    times: TimeUse = field(default_factory=TimeUse)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.source.total_steps


class Feed(Protocol):
    """The batches of a run, on the devices of its mesh."""

    def __call__(self, state: TrainState, step: int) -> Any:
        """The batch of a step, from 0. Methods that sample their own data do so with the weights in `state`."""

    def metrics(self, step: int) -> dict[str, float]:
        """Values to log about the data of the first `step` steps."""

    def may_stop(self, step: int) -> bool:
        """Whether a run that stops after `step` steps can go on from there."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method, as the functions that runs, evaluation and planning call. This is the whole contract.

    prepare(config, tokenizer): the examined rows. Raises DataError, naming the row, for rows that would train wrong.
    source(config, data, tokenizer): the number of steps, and what the data of each step is, without a model.
    feed(run, graphdef): the batches, on the devices of the mesh.
    rewards(config, data): what judges sampled answers, open for as long as the run lasts; None if nothing does. Raises
    ConfigError if it cannot judge answers to these rows.
    environments(config, data, tokenizer): what replies to the model in answers of several turns, as `rewards`.
    batch_shapes(config): the batch as jax.ShapeDtypeStructs, for `jaxft plan`.
    check(config, model): raises ConfigError for settings that the method cannot train with. model: abstract.
    initial_state(config, trainable): the method's own arrays at step 0, made from the trainable parameters before the
    first step; None if it has none. It is traced by `jax.jit`.
    precompute(run, base): the run with data that was computed from the base model before the first step, such as
    cached log-probabilities of a reference. base(): the base with fresh adapters, on the mesh of the run.
    frozen(config): a frozen model beside the trained one, such as a teacher or a reward model; None if there is none.
    If it is `in_memory`, runs load it onto the mesh, plans count its arrays, and the field `part` of `MethodState` has
    it; if it is `in_step`, each training step has one forward pass of it.
    batch_sums(config, model): sums over the whole batch that the loss of every micro-batch needs; None if it needs
    none. model: abstract.
    next_saved(config): how `MethodState.saved` goes on after each optimizer step; None if it stays as it is.
    loss(config, model): the loss; evaluated with key=None, it is the held-out loss. model: abstract.
    evaluator(run, graphdef): `(state, between) -> held-out metrics`; None if no rows are held out. It calls `between`
    before each batch and lets its errors through, so that an evaluation can be stopped.
    loss_unit: what the loss is a mean of, for people. charts: the method's own charts in a run's report.
    head: what the trained model ends in: an LM head, or a score head in its place.
    evaluates_start: whether a run is evaluated before its first step too, so that its report shows what changed.
    critic: whether a critic with adapters of its own is trained beside the model (`jaxft.adapters.critic`).
    skips_empty: whether a batch without a trained token skips the update, see `make_train_step`; otherwise it is an
    error.
    reference_passes(config): forward passes in each training step beside the training pass, such as those of a frozen
    reference with the shapes of the base, for the work that `jaxft plan` reports.
    rollout_size(config): what the method samples for its updates, for `jaxft plan`; None if it samples nothing. By
    default the rollouts of the section `rollout`, if the rows of the method are prompts.
    describe(config): what the method does, in a few words for people, such as `DPO with beta=0.1`.
    """

    prepare: Callable[[RunConfig, Tokenizer], Prepared]
    source: Callable[[RunConfig, Prepared, Tokenizer], BatchSource]
    feed: Callable[[Run, nnx.GraphDef[Decoder]], Feed]
    batch_shapes: Callable[[RunConfig], Any]
    check: Callable[[RunConfig, Decoder], None]
    initial_state: Callable[[RunConfig, nnx.State], MethodState | None]
    loss: Callable[[RunConfig, Decoder], Loss]
    evaluator: Callable[
        [Run, nnx.GraphDef[Decoder]], Callable[[TrainState, Callable[[], None]], dict[str, float]] | None
    ]
    describe: Callable[[RunConfig], str]
    loss_unit: str = "nats per trained token"
    charts: tuple[Chart, ...] = ()
    head: Head = "vocabulary"
    reference_passes: Callable[[RunConfig], int] = lambda config: 0
    rollout_size: Callable[[RunConfig], RolloutSize | None] = rollout_size
    precompute: Callable[[Run, Callable[[], Decoder]], Run] = lambda run, base: run
    batch_sums: Callable[[RunConfig, Decoder], BatchSums | None] = lambda config, model: None
    frozen: Callable[[RunConfig], FrozenModel | None] = lambda config: None
    rewards: Callable[[RunConfig, Prepared], AbstractContextManager[RewardFunctions | None]] = lambda config, data: (
        nullcontext()
    )
    environments: Callable[[RunConfig, Prepared, Tokenizer], AbstractContextManager[Environments | None]] = (
        lambda config, data, tokenizer: nullcontext()
    )
    next_saved: Callable[[RunConfig], NextSaved | None] = lambda config: None
    critic: bool = False
    skips_empty: bool = False
    evaluates_start: bool = False


def no_state(config: RunConfig, trainable: nnx.State) -> None:
    """`initial_state` of a method without arrays of its own."""
    return None
