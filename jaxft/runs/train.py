"""`jaxft train`: a training run, from its config to its report."""

# B batch, S sequence

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from rich.console import Console

from jaxft.adapters import make as adapters
from jaxft.adapters.attach import detach
from jaxft.adapters.critic import drop_critic
from jaxft.adapters.lora import eva
from jaxft.checkpoint.load import LoadedModel
from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.config import RunConfig
from jaxft.data import render_rows, tokenizer_of
from jaxft.files import run_folder
from jaxft.methods import method_of
from jaxft.methods.method import Run
from jaxft.methods.parts.sequences import device_batch, evaluated_weights
from jaxft.nn.decoder import Decoder
from jaxft.optim.make import make_schedule
from jaxft.runs.build import (
    abstract_model,
    build_model,
    check_frozen,
    load_frozen,
    make_mesh,
    make_step,
    make_tx,
    start_state,
    with_frozen,
)
from jaxft.runs.data_summary import data_summary, print_mixture
from jaxft.runs.export import export_run
from jaxft.runs.folder import check_shared, dated, open_run
from jaxft.runs.report import write_report
from jaxft.runs.scores import answer, samples, score_summary
from jaxft.sharding import distributed
from jaxft.sharding.processes import is_primary, on_primary
from jaxft.training.likelihoods import FallingLikelihoods
from jaxft.training.log import NoLog, RunLog
from jaxft.training.loop import Cadence, Hooks, fit
from jaxft.training.reward_watch import RewardWatch
from jaxft.training.state import TrainState, divide, saved_part, with_saved


def train(config: RunConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Trains, evaluates, exports and reports. The same call after an interruption resumes the run.

    Returns the content of `summary.json` in the run folder, with paths relative to it. Raises a JaxftError before any
    weight is loaded for a config or data that would train silently wrong, and errors.Preempted if SIGTERM stopped it
    after saving. With several processes, every one calls it with the same config; process 0 alone writes and prints.
    """
    console = (console or Console()) if is_primary() else Console(quiet=True)
    run = dataclasses.replace(set_up(config), print_line=partial(console.print, highlight=False))
    config, method = run.config, method_of(config)
    with (
        method.rewards(config, run.data) as rewards,
        method.environments(config, run.data, run.tokenizer) as environments,
    ):
        return _train(dataclasses.replace(run, rewards=rewards, environments=environments), console)


def _train(run: Run, console: Console) -> dict[str, Any]:
    config = run.config
    console.print(describe(run), highlight=False, soft_wrap=True)
    print_mixture(run.source, console)
    console.print("\ntwo training rows, their trained tokens marked:", highlight=False)
    render_rows(run.data.train_examples, run.tokenizer, limit=2, console=console)
    loaded = build_model(config, run.mesh, random_base=run.folder / run_folder.BASE)
    if loaded.left_out is not None:
        console.print(loaded.left_out, highlight=False, soft_wrap=True)
    scores = on_primary(lambda: run_folder.read_json(run.folder / run_folder.SCORES, {}))
    if config.eval.metric and "base" not in scores:
        console.print(f"base model, {len(run.data.eval_prompts)} held-out rows, by generation ...", highlight=False)
        base = answer(_base(loaded.module), run.tokenizer, run.data, config.eval, config.eval.metric)
        scores = {"metric": config.eval.metric, "base": score_summary(base, run.data.eval_references)}
        scores["base_answers"] = list(base.texts)
        on_primary(lambda: run_folder.write_json(run.folder / run_folder.SCORES, scores))
    run = method_of(config).precompute(run, lambda: loaded.module)
    held_out = _fit(run, loaded, console)
    if config.eval.metric:
        console.print(f"tuned model, {len(run.data.eval_prompts)} held-out rows, by generation ...", highlight=False)
        tuned = answer(loaded.module, run.tokenizer, run.data, config.eval, config.eval.metric)
        scores["tuned"] = score_summary(tuned, run.data.eval_references)
        scores["samples"] = samples(run.tokenizer, run.data, scores["base_answers"], tuned)
        on_primary(lambda: run_folder.write_json(run.folder / run_folder.SCORES, scores))
    exports = export_run(loaded, run.tokenizer, config, run.folder, console, run.mesh)

    def finish() -> dict[str, Any]:
        html, png = write_report(run.folder)
        summary = _summary(run, held_out, scores, exports) | {"report": html.name, "loss_plot": png.name}
        run_folder.write_json(run.folder / run_folder.SUMMARY, summary)
        return summary

    return on_primary(finish)


def _base(module: Decoder) -> Decoder:
    """A model that answers as the base does. Fresh adapters change nothing, but a prompt or a prefix does."""
    if not module.virtual_tokens:
        return module
    base = nnx.merge(*nnx.split(module))
    detach(base)
    return base


def set_up(config: RunConfig) -> Run:
    """Sets a run up and checks everything that needs no weights: settings, data, devices, steps, the run folder."""
    method = method_of(config)
    config, tokenizer = dated(config, tokenizer_of(config))
    model = abstract_model(config)
    method.check(config, model)
    data = method.prepare(config, tokenizer)
    micro_batch = config.train.batch_size // config.train.accumulation_steps
    mesh = make_mesh(config, model, jax.devices())
    mesh.check_batch(micro_batch)
    check_frozen(config, model, tokenizer, mesh)
    source = method.source(config, data, tokenizer)
    make_schedule(config.optim, source.total_steps)
    folder = Path(config.output_dir)
    on_primary(lambda: open_run(config, data_summary(data, source), tokenizer.chat_template))
    check_shared(folder)
    return Run(config=config, folder=folder, tokenizer=tokenizer, data=data, mesh=mesh, model=model, source=source)


def describe(run: Run) -> str:
    """The method, model, data and length of a run, in a few lines for people."""
    config, data = run.config, run.data.examination
    _, trainable, frozen = divide(run.model)
    trained, fixed = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (trainable, frozen))
    if config.adapter.kind == "none" and run.model.trainable_paths is None:
        part, size = "all weights", f"{trained:,} parameters, all trained"
    elif config.adapter.kind == "none":
        part = str(config.model.trainable)
        size = f"{trained:,} of {fixed + trained:,} parameters are trained ({trained / (fixed + trained):.2%})"
    else:
        part = adapters.describe(config.adapter)
        size = f"{fixed:,} parameters are frozen, {trained:,} in adapters are trained ({trained / fixed:.2%})"
    return (
        f"{method_of(config).describe(config)} of {config.model.path}: {part}\n"
        f"  {size}; {config.model.dtype} on {run.mesh.describe()}\n"
        f"  {data.examples:,} rows, {data.tokens:,} tokens ({data.trained_tokens:,} trained) in {data.sequences:,} "
        f"sequences of {config.data.max_length}\n"
        f"  {run.total_steps:,} steps of {config.train.batch_size} sequences, "
        f"{run.source.epoch_of(run.total_steps):.2f} epochs -> {run.folder}"
    )


def _fit(run: Run, loaded: LoadedModel, console: Console) -> dict[str, float]:
    """Trains `loaded` in place, from the newest checkpoint if there is one. Returns the last held-out metrics."""
    config, method = run.config, method_of(run.config)
    schedule = make_schedule(config.optim, run.total_steps)
    tx = make_tx(config, loaded.module, schedule)
    checkpoints = RunCheckpoints(
        run.folder / run_folder.CHECKPOINTS,
        keep=config.checkpoint.keep,
        best_metric=config.checkpoint.best_metric,
        best_mode=config.checkpoint.best_mode,
    )
    with checkpoints:
        if config.adapter.by_data and on_primary(checkpoints.latest_step) is None:
            console.print("directions in which the layers' inputs vary ...", highlight=False)
            key = jax.random.key(config.seed)
            eva.initialize_eva(
                loaded.module, config.adapter.init_lora_weights, partial(device_batch, run), run.mesh, key
            )
        graphdef, state = start_state(config, loaded.module, tx, run.mesh)
        state = with_frozen(state, load_frozen(config, run.mesh, loaded.module))
        restored = checkpoints.restore(saved_part(_shapes(state)))
        start, progress, held_out = 0, {}, {}
        if restored is not None:
            saved, extra = restored
            state = with_saved(state, saved)
            start, progress, held_out = int(extra["step"]), extra["progress"], extra["held_out"]
        with _log(run, start if restored else None, console) as log:
            if start:
                log.note(f"going on from step {start} of {run.total_steps}")
            feed = method.feed(run, graphdef)
            hooks = Hooks(
                train_step=_jitted_step(run, graphdef, tx, schedule, state),
                batch=feed,
                evaluate=method.evaluator(run, graphdef),
                save=_saver(config, checkpoints),
                preempted=distributed.reached_preemption,
                may_stop=feed.may_stop,
                data_metrics=feed.metrics,
                evaluate_start=method.evaluates_start,
                evaluated=partial(_show_report, run.folder),
            )
            cadence = Cadence(
                total_steps=run.total_steps,
                steps_per_epoch=run.source.steps_per_epoch,
                log_every=config.train.log_every,
                eval_every=config.train.eval_every,
                save_every=config.checkpoint.every,
            )
            if start < run.total_steps:
                state, held_out = fit(state, hooks, cadence, log, start=start, progress=progress)
    nnx.update(loaded.module, evaluated_weights(config, state), state.frozen)
    # It was needed for training alone, and is in the checkpoints.
    drop_critic(loaded.module)
    return held_out


def _show_report(folder: Path) -> None:
    # So that a run can be watched.
    if is_primary():
        write_report(folder)


def _log(run: Run, resume_step: int | None, console: Console) -> RunLog | NoLog:
    if not is_primary():
        return NoLog()
    watches = (FallingLikelihoods().add, RewardWatch().add)

    def watch(row: Mapping[str, float]) -> str | None:
        return " ".join(warning for add in watches if (warning := add(row)) is not None) or None

    return RunLog(run.folder, total_steps=run.total_steps, resume_step=resume_step, console=console, watch=watch)


def _shapes(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _jitted_step(
    run: Run,
    graphdef: nnx.GraphDef[Decoder],
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    step = make_step(run.config, run.model, graphdef, tx, schedule)
    # Without these shardings XLA could lay the new state out differently, and the next step would be compiled again.
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(run.mesh.bind(step), donate_argnums=0, out_shardings=(shardings, None))


def _saver(
    config: RunConfig, checkpoints: RunCheckpoints
) -> Callable[[int, TrainState, dict[str, float], dict[str, float]], None]:
    def save(step: int, state: TrainState, progress: dict[str, float], held_out: dict[str, float]) -> None:
        extra = {"step": step, "progress": progress, "held_out": held_out, "config": config.to_dict()}
        checkpoints.save(step, saved_part(state), extra, held_out or None)

    return save


def _summary(run: Run, held_out: dict[str, float], scores: dict[str, Any], exports: dict[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {"output_dir": str(run.folder), "steps": run.total_steps, **held_out}
    if run.config.eval.metric:
        summary |= {
            "metric": scores["metric"],
            "base_score": scores["base"]["value"],
            "tuned_score": scores["tuned"]["value"],
            "base_correct": scores["base"]["correct"],
            "tuned_correct": scores["tuned"]["correct"],
            "examples": scores["tuned"]["total"],
        }
    return summary | exports
