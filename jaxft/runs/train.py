"""A training run, from its config to its report."""

# B batch, S sequence

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from jaxft.adapters import eva
from jaxft.adapters.attach import detach
from jaxft.checkpoint.load import LoadedModel
from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.config import AdapterConfig, RunConfig
from jaxft.data import Prepared, Tokenizer, prepare, render_rows, tokenizer_of
from jaxft.data.batch_source import BatchSource
from jaxft.evaluation.held_out import held_out_loss
from jaxft.files import run_folder
from jaxft.objectives.sft import sft_loss
from jaxft.optim.make import make_schedule
from jaxft.runs.batches import described, make_loader, print_mixture, training_batches
from jaxft.runs.build import (
    abstract_model,
    build_model,
    evaluated_weights,
    make_mesh,
    make_step,
    make_tx,
    place,
    router_coefficients,
)
from jaxft.runs.export import export_run
from jaxft.runs.folder import check_shared, open_run
from jaxft.runs.report import write_report
from jaxft.runs.scores import answer, figures, samples
from jaxft.sharding import distributed
from jaxft.sharding.arrays import from_rows
from jaxft.sharding.mesh import MeshPlan
from jaxft.sharding.processes import is_primary, on_primary
from jaxft.training.log import NoLog, RunLog
from jaxft.training.loop import Cadence, Hooks, fit
from jaxft.training.state import TrainState, create, divide, saved_part, with_saved
from jaxft.training.step import make_eval_step


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is set up: nothing in it has been loaded or trained. model: abstract, with its adapters."""

    config: RunConfig
    folder: Path
    tokenizer: Tokenizer
    data: Prepared
    mesh: MeshPlan
    model: Any
    loader: BatchSource
    total_steps: int


def train(config: RunConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Trains, evaluates, exports and reports. The same call after an interruption goes on where it was.

    Returns the figures that `summary.json` in the run folder holds, with paths relative to it. Raises
    a JaxftError before any weight is loaded for a config or data that would train silently wrong, and
    errors.Preempted when SIGTERM stopped it after saving. With several processes, every one calls it with the
    same config; process 0 alone writes and speaks.
    """
    console = (console or Console()) if is_primary() else Console(quiet=True)
    run = set_up(config)
    console.print(describe(run), highlight=False, soft_wrap=True)
    print_mixture(run.loader, console)
    console.print("\ntwo training rows, their trained tokens marked:", highlight=False)
    render_rows(run.data.train_examples, run.tokenizer, limit=2, console=console)
    loaded = build_model(config, run.mesh, random_base=run.folder / run_folder.BASE)
    if loaded.left_out is not None:
        console.print(loaded.left_out, highlight=False, soft_wrap=True)
    scores = on_primary(lambda: run_folder.read_json(run.folder / run_folder.SCORES, {}))
    if config.eval.metric and "base" not in scores:
        console.print(f"base model, {len(run.data.eval_prompts)} held-out rows, by generation ...", highlight=False)
        base = answer(_base(loaded.module), run.tokenizer, run.data, config.eval)
        scores = {"metric": config.eval.metric, "base": figures(base, run.data.eval_references)}
        scores["base_answers"] = list(base.texts)
        on_primary(lambda: run_folder.write_json(run.folder / run_folder.SCORES, scores))
    held_out = _fit(run, loaded, console)
    if config.eval.metric:
        console.print(f"tuned model, {len(run.data.eval_prompts)} held-out rows, by generation ...", highlight=False)
        tuned = answer(loaded.module, run.tokenizer, run.data, config.eval)
        scores["tuned"] = figures(tuned, run.data.eval_references)
        scores["samples"] = samples(run.tokenizer, run.data, scores["base_answers"], tuned)
        on_primary(lambda: run_folder.write_json(run.folder / run_folder.SCORES, scores))
    exports = export_run(loaded, run.tokenizer, config, run.folder, console, run.mesh)

    def finish() -> dict[str, Any]:
        html, png = write_report(run.folder)
        summary = _summary(run, held_out, scores, exports) | {"report": html.name, "loss_plot": png.name}
        run_folder.write_json(run.folder / run_folder.SUMMARY, summary)
        return summary

    return on_primary(finish)


def _base(module: Any) -> Any:
    """What answers as the base does: fresh adapters change nothing, but a prompt or a prefix does."""
    if not module.virtual_tokens:
        return module
    base = nnx.merge(*nnx.split(module))
    detach(base)
    return base


def set_up(config: RunConfig) -> Run:
    """Everything that can be refused without weights: data, devices, steps, the run folder."""
    tokenizer = tokenizer_of(config)
    data = prepare(config, tokenizer)
    model = abstract_model(config)
    micro_batch = config.train.batch_size // config.train.accumulation_steps
    mesh = make_mesh(config, model, jax.devices())
    mesh.check_batch(micro_batch)
    loader, total_steps = training_batches(data, config, tokenizer)
    make_schedule(config.optim, total_steps)
    router_coefficients(config, model)
    folder = Path(config.output_dir)
    on_primary(lambda: open_run(config, described(data, loader), tokenizer.chat_template))
    check_shared(folder)
    return Run(
        config=config,
        folder=folder,
        tokenizer=tokenizer,
        data=data,
        mesh=mesh,
        model=model,
        loader=loader,
        total_steps=total_steps,
    )


def describe(run: Run) -> str:
    """What is about to happen, and its size."""
    config, data = run.config, run.data.examination
    _, trainable, frozen = divide(run.model)
    moving, still = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (trainable, frozen))
    if config.adapter.kind == "none" and run.model.trainable_paths is None:
        method, size = "full fine-tuning", f"{moving:,} parameters, all trained"
    elif config.adapter.kind == "none":
        method = f"fine-tuning of {config.model.trainable}"
        size = f"{moving:,} of {still + moving:,} parameters are trained ({moving / (still + moving):.2%})"
    else:
        method = _method(config.adapter)
        size = f"{still:,} parameters stand still, {moving:,} in adapters are trained ({moving / still:.2%})"
    return (
        f"{method} of {config.model.path}\n"
        f"  {size}; {config.model.dtype} on {run.mesh.describe()}\n"
        f"  {data.examples:,} rows, {data.tokens:,} tokens ({data.trained_tokens:,} trained) in {data.sequences:,} "
        f"sequences of {config.data.max_length}\n"
        f"  {run.total_steps:,} steps of {config.train.batch_size} sequences, "
        f"{run.loader.epoch_of(run.total_steps):.2f} epochs -> {run.folder}"
    )


def _method(adapter: AdapterConfig) -> str:
    if adapter.virtual_tokens:
        return f"a {adapter.kind} of {adapter.virtual_tokens} virtual tokens"
    rank = "" if adapter.kind == "ia3" else f" r={adapter.r}"
    name = {"lora": "DoRA" if adapter.use_dora else "LoRA", "vera": "VeRA", "ia3": "IA3"}[adapter.kind]
    return f"{name}{rank} on {adapter.target_modules}"


def _fit(run: Run, loaded: LoadedModel, console: Console) -> dict[str, float]:
    """Trains `loaded` in place, from the newest checkpoint where there is one."""
    config = run.config
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
            eva.begin(loaded.module, config.adapter.init_lora_weights, partial(_batch, run), run.mesh, key)
        graphdef, state = create(loaded.module, tx, config.seed)
        state = place(state, run.mesh)
        restored = checkpoints.restore(saved_part(_shapes(state)))
        start, progress, held_out = 0, {}, {}
        if restored is not None:
            saved, extra = restored
            state = with_saved(state, saved)
            start, progress, held_out = int(extra["step"]), extra["progress"], extra["held_out"]
        with _log(run, start if restored else None, console) as log:
            if start:
                log.note(f"going on from step {start} of {run.total_steps}")
            shardings = jax.tree.map(lambda x: x.sharding, state)
            hooks = _hooks(run, graphdef, tx, schedule, checkpoints, shardings)
            cadence = Cadence(
                total_steps=run.total_steps,
                steps_per_epoch=run.loader.steps_per_epoch,
                log_every=config.train.log_every,
                eval_every=config.train.eval_every,
                save_every=config.checkpoint.every,
            )
            if start < run.total_steps:
                state, held_out = fit(state, hooks, cadence, log, start=start, progress=progress)
    nnx.update(loaded.module, evaluated_weights(config, state), state.frozen)
    return held_out


def _log(run: Run, resume_step: int | None, console: Console) -> RunLog | NoLog:
    if not is_primary():
        return NoLog()
    return RunLog(run.folder, total_steps=run.total_steps, resume_step=resume_step, console=console)


def _batch(run: Run, step: int) -> Any:
    """What a step is given, on its devices."""
    rows, sharding = run.config.train.batch_size, run.mesh.batch_sharding()
    return from_rows(lambda part: run.loader.batch(step, part), rows, sharding)


def _shapes(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _hooks(
    run: Run, graphdef: Any, tx: Any, schedule: Any, checkpoints: RunCheckpoints, shardings: TrainState
) -> Hooks:
    config = run.config
    step = make_step(config, run.model, graphdef, tx, schedule)

    def save(step: int, state: TrainState, progress: dict[str, float], held_out: dict[str, float]) -> None:
        extra = {"step": step, "progress": progress, "held_out": held_out, "config": config.to_dict()}
        checkpoints.save(step, saved_part(state), extra, held_out or None)

    return Hooks(
        # Said, not found: what comes out must lie as what goes in, or the next step would be compiled anew.
        train_step=jax.jit(run.mesh.within(step), donate_argnums=0, out_shardings=(shardings, None)),
        batch=partial(_batch, run),
        evaluate=held_out_evaluation(run, graphdef),
        save=save,
        preempted=distributed.reached_preemption,
        figures=run.loader.metrics,
    )


def held_out_evaluation(run: Run, graphdef: Any) -> Callable[[TrainState], dict[str, float]] | None:
    """state -> held-out figures; None where nothing is held out."""
    if run.data.eval_examples is None:
        return None
    loader = make_loader(run.data.eval_examples, run.config, run.tokenizer, shuffle=False)
    eval_step = jax.jit(run.mesh.within(make_eval_step(graphdef, sft_loss)))

    def batch(number: int) -> Any:
        return from_rows(lambda rows: loader.eval_batch(number, rows), loader.batch_size, run.mesh.batch_sharding())

    def evaluate(state: TrainState) -> dict[str, float]:
        weights = evaluated_weights(run.config, state)
        return held_out_loss(
            lambda batch: eval_step(weights, state.frozen, batch), map(batch, range(loader.eval_steps))
        )

    return evaluate


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
