"""The training of a run: from its newest checkpoint, if there is one, to its last step."""

# B batch, S sequence

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console

from jaxft.adapters.critic import drop_critic
from jaxft.adapters.lora import eva
from jaxft.checkpoint.load import LoadedModel
from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.config import RunConfig
from jaxft.errors import BucketError, listed
from jaxft.files import run_folder
from jaxft.files.buckets.working_copy import checkpoints_of, push
from jaxft.hardware.attached import step_options
from jaxft.hardware.recomputation import Recomputation
from jaxft.methods import method_of
from jaxft.methods.method import Feed, Run
from jaxft.methods.parts.sequences import device_batch, evaluated_weights
from jaxft.nn.decoder import Decoder
from jaxft.nn.quantized import use_matmul
from jaxft.optim.make import make_schedule
from jaxft.runs.build import load_frozen, make_step, make_tx, start_state, with_frozen
from jaxft.runs.export import export_step
from jaxft.runs.identity.record import record_of, resumed, write_record
from jaxft.runs.memory.recomputation import changed, recorded, refused
from jaxft.runs.memory.shapes import batch_on_mesh
from jaxft.runs.report import KeptReport
from jaxft.sharding import distributed
from jaxft.sharding.processes import is_primary, on_primary
from jaxft.terminal.console import say
from jaxft.training.early_stopping import EarlyStopping
from jaxft.training.likelihoods import FallingLikelihoods
from jaxft.training.log import NoLog, RunLog, evaluations, read_metrics, spans
from jaxft.training.loop import UNEVALUATED, Cadence, Epochs, Hooks, Period, evaluate, fit
from jaxft.training.reward_watch import RewardWatch
from jaxft.training.spikes import MEASURED, SpikeGuard
from jaxft.training.state import TrainState, divide, saved_part, with_saved
from jaxft.training.watch import Watch

# What a step's metrics and answers are logged in. A power cut must not take what a whole step has seen.
LOGS = (run_folder.METRICS, run_folder.COMPLETIONS, run_folder.HELD_OUT_COMPLETIONS)


class Fitted(NamedTuple):
    """A run whose training has ended. held_out: metrics of the weights that are exported. steps: that were trained.

    exported: the step whose weights are exported.
    """

    held_out: dict[str, float]
    steps: int
    exported: int


def fit_run(run: Run, loaded: LoadedModel, console: Console, watch: Watch) -> Fitted:
    """Trains `loaded` in place, from the newest checkpoint if there is one, and puts the exported weights into it.

    watch: may export checkpoints.
    """
    config, method = run.config, method_of(run.config)
    schedule = make_schedule(config.optim, run.total_steps)
    tx = make_tx(config, loaded.module, schedule)
    ranked_after = on_primary(lambda: record_of(run.folder).ranked_after)
    with _checkpoints(run, ranked_after) as checkpoints, ExitStack() as setup:
        setup.enter_context(run.times.during("setup"))
        if config.adapter.by_data and on_primary(checkpoints.latest_step) is None:
            _initialize_by_data(run, loaded, console)
        state = start_state(config, loaded.module, tx, run.mesh)[1]
        state = with_frozen(state, load_frozen(config, run.mesh, loaded.module))
        restored = checkpoints.restore(saved_part(_shapes(state)))
        start, progress, held_out = 0, {}, {}
        logged = None
        if restored is not None:
            saved, extra = restored
            state, logged = with_saved(state, saved), extra.get("logged")
            start, progress, held_out = int(extra["step"]), extra["progress"], extra["held_out"]
        if start <= ranked_after:  # what was seen on other held-out rows says nothing of these
            progress = {name: value for name, value in progress.items() if not name.startswith(EarlyStopping.PREFIX)}
        if config.train.on_spike == "off":  # what was seen is out of date when spikes are told again
            progress.pop(SpikeGuard.SEEN, None)
        setup.close()
        on_primary(lambda: _count_earlier_starts(run, start))
        unevaluated = UNEVALUATED in progress
        with _log(run, start if restored else None, console, unevaluated=unevaluated) as log:
            if start:
                log.note(f"going on from step {start} of {run.total_steps}")
                _tell_missing(run, log, start, logged)
            graphdef, step = _recorded_step(run, start, log, *step_that_fits(run, loaded.module, tx, schedule, state))
            feed = method.feed(run, graphdef)
            export = partial(_export_step, run, loaded, watch)
            if start:
                export(start, state)
            hooks = hooks_of(run, graphdef, feed, step, _saver(run, checkpoints, log, export))
            ended = hooks.early_stopping is not None and hooks.early_stopping.ends(progress)
            if (start < run.total_steps and not ended) or unevaluated:
                state, held_out = fit(state, hooks, cadence_of(run), log, start=start, progress=progress)
            elif start == ranked_after:  # other rows are held out than those of its metrics
                held_out = evaluate(hooks, state, start, log)
            last = int(state.step)
            if last < run.total_steps:
                log.note(_ended_early(config, last))
            state, held_out, exported = _exported(run, checkpoints, state, held_out)
            if exported != last:
                log.note(f"step {exported} is exported, the best by {config.checkpoint.best_metric}")
    on_primary(lambda: write_record(run.folder, replace(record_of(run.folder), exported=exported)))
    nnx.update(loaded.module, evaluated_weights(config, state), state.frozen)
    # They were needed for training alone; the critic is in the checkpoints.
    use_matmul(loaded.module, None)
    drop_critic(loaded.module)
    return Fitted(held_out, last, exported)


def _ended_early(config: RunConfig, step: int) -> str:
    return (
        f"training ended at step {step}: {config.checkpoint.best_metric} did not get better in "
        f"{config.train.early_stopping_patience} evaluations. It goes on if train.early_stopping_patience is raised."
    )


def _exported(
    run: Run, checkpoints: RunCheckpoints, state: TrainState, held_out: dict[str, float]
) -> tuple[TrainState, dict[str, float], int]:
    """(the state that is scored and exported, its held-out metrics, its step), by `export.checkpoint`."""
    last = int(state.step)
    checkpoints.wait()
    best = on_primary(checkpoints.best_step) if run.config.export.checkpoint == "best" else None
    if best is None or best == last:
        return state, held_out, last
    restored = checkpoints.restore(saved_part(_shapes(state)), best)
    if restored is None:
        raise RuntimeError(f"step {best} has gone")
    saved, extra = restored
    held_out = extra["held_out"] or on_primary(lambda: evaluations(run.folder).get(best, {}))
    return with_saved(state, saved), held_out, best


def _checkpoints(run: Run, ranked_after: int) -> RunCheckpoints:
    settings = run.config.checkpoint
    return RunCheckpoints(
        checkpoints_of(run.folder),
        keep=settings.keep,
        best_metric=settings.best_metric,
        best_mode=settings.best_mode,
        ranked_after=ranked_after,
        late_metrics=evaluations(run.folder) if settings.best_metric is not None else None,
        logs=[run.folder / name for name in LOGS],
    )


def _initialize_by_data(run: Run, loaded: LoadedModel, console: Console) -> None:
    say(console, "directions in which the layers' inputs vary ...")
    key = jax.random.key(run.config.seed)
    kind = run.config.adapter.init_lora_weights
    eva.initialize_eva(loaded.module, kind, partial(device_batch, run), run.mesh, key)


def hooks_of(
    run: Run,
    graphdef: nnx.GraphDef[Decoder],
    feed: Feed,
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    save: Callable[[int, TrainState, dict[str, Any], dict[str, float]], None],
) -> Hooks:
    """What the loop calls in a run. step: jitted. save: as `Hooks.save`."""
    method, spikes = method_of(run.config), _spikes(run)
    has_rows = method.rollout_size(run.config) is None
    return Hooks(
        train_step=step,
        batch=feed,
        evaluate=method.evaluator(run, graphdef),
        save=save,
        preempted=distributed.reached_preemption,
        may_stop=feed.may_stop,
        early_stopping=_early_stopping(run),
        spikes=spikes,
        data_metrics=feed.metrics,
        evaluate_start=method.evaluates_start,
        evaluated=_report_of(run),
        times=run.times,
        batch_part="input" if has_rows else "rollouts",
        # On CPUs the host is the device, and collectives of two programs at once may wait for each other.
        ahead=has_rows and spikes is None and jax.default_backend() != "cpu",
    )


def cadence_of(run: Run) -> Cadence:
    """How often a run logs, evaluates and saves."""
    train, checkpoint = run.config.train, run.config.checkpoint

    def period(steps: int | None, epochs: float | None) -> Period:
        return steps if epochs is None else Epochs(epochs)

    return Cadence(
        total_steps=run.total_steps,
        steps_per_epoch=run.source.steps_per_epoch,
        log_every=period(train.log_every, train.log_every_epochs),
        eval_every=period(train.eval_every, train.eval_every_epochs),
        save_every=period(checkpoint.every, checkpoint.every_epochs),
    )


def _early_stopping(run: Run) -> EarlyStopping | None:
    train, checkpoint = run.config.train, run.config.checkpoint
    if train.early_stopping_patience is None or checkpoint.best_metric is None:
        return None
    return EarlyStopping(
        metric=checkpoint.best_metric,
        mode=checkpoint.best_mode,
        patience=train.early_stopping_patience,
        threshold=train.early_stopping_threshold,
    )


def _count_earlier_starts(run: Run, start: int) -> None:
    """Adds the time of earlier starts to that of this one, and records it if the rows that tell it will be removed."""
    rows = read_metrics(run.folder) if (run.folder / run_folder.METRICS).is_file() else []
    record = record_of(run.folder)
    times = run.times.go_on(record.times, rows, start)
    if any(row["step"] > start for row in rows):
        write_record(run.folder, replace(record, times=times))


def _spikes(run: Run) -> SpikeGuard | None:
    train = run.config.train
    if train.on_spike == "off":
        return None
    return SpikeGuard(
        mode=train.on_spike,
        threshold=train.spike_threshold,
        window=train.spike_window,
        by_loss=run.config.method.chosen.ROWS != "prompts",
    )


def _report_of(run: Run) -> Callable[[], object]:
    """Makes the report anew now and then, so that a run can be watched; in process 0."""
    return KeptReport(run.folder, run.print_line).refresh if is_primary() else lambda: None


def _log(run: Run, resume_step: int | None, console: Console, *, unevaluated: bool) -> RunLog | NoLog:
    if not is_primary():
        return NoLog()
    watches = (FallingLikelihoods().add, RewardWatch().add)

    def watch(row: Mapping[str, float]) -> str | None:
        return " ".join(warning for add in watches if (warning := add(row)) is not None) or None

    return RunLog(
        run.folder,
        total_steps=run.total_steps,
        resume_step=resume_step,
        unevaluated=unevaluated,
        console=console,
        watch=watch,
        track=run.track,
    )


def _shapes(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def step_that_fits(
    run: Run, model: Decoder, tx: optax.GradientTransformation, schedule: optax.Schedule, state: TrainState
) -> tuple[nnx.GraphDef[Decoder], jax.stages.Wrapped, Recomputation | None]:
    """(the graph of the model, its jitted step, the policy that the compiler took if `model.remat` is `auto`).

    state: on the mesh of the run.
    """
    choice = run.recomputation
    batch = batch_on_mesh(run.config, run.mesh)
    limits = () if run.config.train.on_spike == "off" else (np.full(len(MEASURED), np.inf, np.float32),)
    while True:
        if choice is not None:
            model.remat = choice.policy
        graphdef = divide(model)[0]
        step = _jitted_step(run, tx, schedule, state, graphdef)
        if choice is None or choice.limit is None or not choice.after:
            return graphdef, step, choice
        if not refused(step.lower(_shapes(state), batch, *limits), choice.limit):
            return graphdef, step, choice
        choice = choice.refused()


def _recorded_step(
    run: Run,
    start: int,
    log: RunLog | NoLog,
    graphdef: nnx.GraphDef[Decoder],
    step: jax.stages.Wrapped,
    choice: Recomputation | None,
) -> tuple[nnx.GraphDef[Decoder], jax.stages.Wrapped]:
    """The graph and the step, once their policy is in the record, and what is otherwise than before has been said."""

    def keep() -> str | None:
        record, policy = record_of(run.folder), run.config.model.remat if choice is None else choice.policy
        note = changed(record.recomputation, policy) if start else None
        kept = {} if choice is None else recorded(choice, run.mesh)
        if note is not None or kept != record.recomputation:
            notes = [] if note is None else [note]
            write_record(run.folder, replace(resumed(record, start, notes), recomputation=kept))
        return note

    if choice is not None and choice != run.recomputation:
        log.note(choice.describe())
    if note := on_primary(keep):
        log.note(note)
    return graphdef, step


def _jitted_step(
    run: Run,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    graphdef: nnx.GraphDef[Decoder],
) -> jax.stages.Wrapped:
    step = make_step(run.config, run.model, graphdef, tx, schedule)
    # Without these shardings XLA could lay the new state out differently, and the next step would be compiled again.
    shardings = jax.tree.map(lambda x: x.sharding, state)
    options = step_options(run.mesh.mesh.devices.flat[0])
    return jax.jit(run.mesh.bind(step), donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def _tell_missing(run: Run, log: RunLog | NoLog, step: int, logged: int | None) -> None:
    """Says which rows of the metrics are missing that had been logged when `step` was saved. logged: their number."""
    if not is_primary() or logged is None or log.rows >= logged:
        return
    cadence, there = cadence_of(run), {row["step"] for row in read_metrics(run.folder)}
    steps = [n for n in range(1, step + 1) if cadence.due(n, cadence.log_every) and n not in there]
    which = f": of steps {listed(spans(steps))}" if steps else ""
    log.note(
        f"warning: {logged - log.rows} of the {logged} rows that {run_folder.METRICS} had at step {step} are missing"
        f"{which}. The run goes on, and its weights are the same; the report and the summary lack these rows. If you "
        "have a copy of the file, stop, put it back and run the same command again."
    )


def _upload_logs(run: Run) -> None:
    """Uploads what is new in the working copy of a run in a bucket. A failure is told, and the run goes on."""
    if is_primary():
        try:
            push(run.folder)
        except BucketError as error:
            run.print_line(f"warning: {error} The run goes on, and tries it again.")


def _export_step(run: Run, loaded: LoadedModel, watch: Watch, step: int, state: TrainState) -> None:
    """Exports a checkpoint that is due, and not saved because the run stops; the last one is the run's own export."""
    cadence = cadence_of(run)
    if watch.export is None or step == cadence.total_steps or not cadence.due(step, cadence.save_every):
        return
    nnx.update(loaded.module, evaluated_weights(run.config, state), state.frozen)
    watch.export(step, partial(export_step, loaded, run.tokenizer))


def _saver(
    run: Run, checkpoints: RunCheckpoints, log: RunLog | NoLog, export: Callable[[int, TrainState], None]
) -> Callable[[int, TrainState, dict[str, Any], dict[str, float]], None]:
    def save(step: int, state: TrainState, progress: dict[str, Any], held_out: dict[str, float]) -> None:
        extra = {"step": step, "progress": progress, "held_out": held_out, "config": run.config.to_dict()}
        extra["logged"] = log.rows
        _upload_logs(run)  # so that no row is lost of a step that is whole
        checkpoints.save(step, saved_part(state), extra, held_out or None)
        export(step, state)

    return save
