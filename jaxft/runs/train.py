"""`jaxft train`: a training run, from its config to its report."""

# B batch, S sequence

import dataclasses
from functools import partial
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from jaxft.adapters import make as adapters
from jaxft.adapters.attach import detach
from jaxft.checkpoint.load import LoadedModel
from jaxft.config import RunConfig
from jaxft.data import render_rows, tokenizer_of
from jaxft.errors import counted
from jaxft.files import run_folder
from jaxft.files.buckets.store import is_bucket
from jaxft.files.buckets.working_copy import fetch, push, shown
from jaxft.hardware.attached import check_matmul
from jaxft.hardware.compile_cache import keep_compiled
from jaxft.methods import method_of
from jaxft.methods.method import Run
from jaxft.nn.decoder import Decoder
from jaxft.nn.quantized import use_matmul
from jaxft.optim.make import make_schedule
from jaxft.runs.build import (
    abstract_model,
    build_model,
    check_frozen,
    make_mesh,
)
from jaxft.runs.course import course_of, warnings_of
from jaxft.runs.data_summary import data_notes, data_summary, print_mixture
from jaxft.runs.export import export_run
from jaxft.runs.fitting import Fitted, fit_run
from jaxft.runs.folder import check_shared, dated, locked_run, newest_step, open_run
from jaxft.runs.going_on import describe as describe_start
from jaxft.runs.going_on import going_on
from jaxft.runs.identity.agreement import check_contents, check_settings
from jaxft.runs.identity.contents import reads_of
from jaxft.runs.identity.record import record_of
from jaxft.runs.memory.recomputation import recomputation_of
from jaxft.runs.report import KeptReport
from jaxft.runs.scores import (
    AnswersFile,
    Kept,
    answer,
    check_scores,
    samples,
    score_summary,
    scores_key,
    scores_of,
)
from jaxft.runs.tracking import trackers_of
from jaxft.sharding.processes import is_primary, on_primary, primary_first
from jaxft.sharding.shared_folder import open_shared
from jaxft.sharding.stopping import hangups_answered, stop_if_requested
from jaxft.terminal.console import SafeConsole, say
from jaxft.terminal.output import lasting
from jaxft.training.goodput import TimeUse, goodput
from jaxft.training.log import read_metrics
from jaxft.training.state import divide
from jaxft.training.trackers import require
from jaxft.training.watch import Watch

UPLOADED_SECONDS = 1.0  # what compiles faster is not worth an upload to a bucket


def train(config: RunConfig, *, console: Console | None = None, watch: Watch | None = None) -> dict[str, Any]:
    """Trains, evaluates, exports and reports. The same call after an interruption resumes the run.

    watch: is told the phases, and may export checkpoints.
    Returns the content of `summary.json` in the run folder, with paths relative to it. Raises a JaxftError before any
    weight is loaded for a config or data that would train silently wrong, FolderInUseError if another process writes in
    the run folder, and errors.Preempted if SIGTERM or SIGHUP stopped it after saving. With several processes, every one
    calls it with the same config; process 0 alone writes and prints.
    """
    console = lasting((console or SafeConsole()) if is_primary() else SafeConsole(quiet=True))
    with locked_run(config.output_dir, "jaxft train"):
        return _train_locked(config, console, watch or Watch())


def _train_locked(config: RunConfig, console: Console, watch: Watch) -> dict[str, Any]:
    times = TimeUse()
    with times.during("setup"):
        run = dataclasses.replace(set_up(config), print_line=partial(say, console), times=times)
        _keep_compiled(run)
    config, method = run.config, method_of(config)
    with (
        hangups_answered(),
        method.rewards(config, run.data) as rewards,
        method.environments(config, run.data, run.tokenizer) as environments,
        trackers_of(run) as trackers,
    ):
        run = dataclasses.replace(run, rewards=rewards, environments=environments, track=trackers.log)
        summary = _train(run, console, watch)
        trackers.summarize(summary)
        return summary


def _keep_compiled(run: Run) -> None:
    """Several processes, and a later start on another machine, find compiled programs in the run folder alone."""
    in_bucket = is_bucket(run.config.output_dir)
    if not in_bucket and jax.process_count() == 1:
        keep_compiled()
        return
    folder = run.folder / run_folder.COMPILED
    if on_primary(folder.is_dir) and not is_primary():
        fetch(folder)
    keep_compiled(folder, least_seconds=UPLOADED_SECONDS if in_bucket else 0.0)


def _train(run: Run, console: Console, watch: Watch) -> dict[str, Any]:
    config = run.config
    between = partial(stop_if_requested, on_primary(lambda: newest_step(run.folder)) or 0)
    between()
    on_primary(lambda: watch.phase("loading"))
    _introduce(run, console)
    with run.times.during("setup"):
        loaded = build_model(config, run.mesh, random_base=run.folder / run_folder.BASE)
    for note in (*filter(None, [loaded.left_out]), *loaded.notes):
        say(console, note)
    if config.model.allowed:
        names = ", ".join(config.model.allowed)
        say(console, f"config.json of the model: ignored by model.allow_unknown: {names}")
    between()
    scores = on_primary(lambda: scores_of(run.folder))
    key = scores_key(run.data, config.eval)
    if config.eval.metric and scores.get("key") != key:
        on_primary(lambda: watch.phase("scoring"))
        say(console, f"base model, {len(run.data.eval_prompts)} held-out rows, by generation ...")
        with run.times.during("scoring"):
            kept = Kept(file=AnswersFile(run.folder), way="base")
            base = answer(_base(loaded), run.tokenizer, run.data, config.eval, between, kept=kept)
        scores = {"key": key, "metric": base.score.name, "base": score_summary(base)}
        scores["base_answers"] = list(base.texts)
        on_primary(lambda: run_folder.write_json(run.folder / run_folder.SCORES, scores))
    use_matmul(loaded.module, config.train.matmul_dtype)
    with run.times.during("setup"):
        run = method_of(config).precompute(run, lambda: loaded.module)
    between()
    on_primary(lambda: watch.phase("training"))
    fitted = fit_run(run, loaded, console, watch)
    between = partial(stop_if_requested, fitted.steps)
    between()
    if config.eval.metric:
        on_primary(lambda: watch.phase("scoring"))
        say(console, f"tuned model, {len(run.data.eval_prompts)} held-out rows, by generation ...")
        with run.times.during("scoring"):
            kept = Kept(file=AnswersFile(run.folder), way="tuned", model=fitted.exported)
            tuned = answer(loaded.module, run.tokenizer, run.data, config.eval, between, kept=kept)
        scores["tuned"] = score_summary(tuned)
        scores["samples"] = samples(run.tokenizer, run.data, scores["base_answers"], tuned)
        on_primary(lambda: run_folder.write_json(run.folder / run_folder.SCORES, scores))
    on_primary(lambda: watch.phase("exporting"))
    with run.times.during("export"):
        exports = export_run(loaded, run.tokenizer, config, run.folder, console, run.mesh, between)

    between()

    def finish() -> dict[str, Any]:
        report = KeptReport(run.folder, run.print_line).write()
        summary = _summary(run, fitted, scores, exports) | report | _times(run)
        run_folder.write_json(run.folder / run_folder.SUMMARY, summary)
        push(run.folder)
        return summary

    return on_primary(finish)


def _introduce(run: Run, console: Console) -> None:
    """Prints what is about to be trained, on which rows."""
    say(console, describe(run))
    print_mixture(run.source, console)
    if run.recomputation is not None:
        say(console, run.recomputation.describe())
    for note in run.notes:
        say(console, note, style="yellow")
    console.print()
    say(console, "two training rows, their trained tokens marked:")
    render_rows(run.data.train_examples, run.tokenizer, limit=2, console=console)


def _base(loaded: LoadedModel) -> Decoder:
    """A model that answers as before training. Fresh adapters change nothing, but a prompt or a prefix does."""
    module = loaded.module
    if not module.virtual_tokens or loaded.adapter is not None:
        return module
    base = nnx.merge(*nnx.split(module))
    detach(base)
    return base


def set_up(config: RunConfig) -> Run:
    """Sets a run up and checks everything that needs no weights: settings, data, devices, steps, the run folder."""
    check_settings(config)
    config = going_on(config)
    method = method_of(config)
    on_primary(lambda: require(config.train.trackers))
    config, tokenizer = dated(config, tokenizer_of(config))
    model = abstract_model(config)
    method.check(config, model)
    data = primary_first(partial(method.prepare, config, tokenizer))  # the others find the rows that it kept
    micro_batch = config.train.batch_size // config.train.accumulation_steps
    mesh = make_mesh(config, model, jax.devices())
    mesh.check_batch(micro_batch)
    check_matmul(config.train.matmul_dtype, mesh.mesh.devices.flat[0])
    check_frozen(config, model, tokenizer, mesh)
    source = method.source(config, data, tokenizer)
    make_schedule(config.optim, source.total_steps)
    course = course_of(config, data, source)
    unit = config.train.accumulation_steps * mesh.batch_shards
    warnings = [*warnings_of(course, config, data, unit), *check_scores(config, data, tokenizer, model)]
    reads = reads_of(config, tokenizer, data)
    check_contents(reads, tokenizer)
    notes = on_primary(
        lambda: open_run(
            config,
            reads=reads,
            steps=source.total_steps,
            data=data_summary(data, source, course, warnings),
            template=tokenizer.chat_template,
        )
    )
    folder = open_shared(config.output_dir)
    check_shared(folder)
    before = on_primary(lambda: dict(record_of(folder).recomputation))
    return Run(
        config=config,
        folder=folder,
        tokenizer=tokenizer,
        data=data,
        mesh=mesh,
        model=model,
        source=source,
        recomputation=recomputation_of(config, model, mesh, steps=source.total_steps, before=before),
        notes=(*describe_start(config), *notes, *(f"warning: {warning}" for warning in [*data_notes(data), *warnings])),
    )


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
        f"  {counted(data.examples, 'row')}, {counted(data.tokens, 'token')} ({data.trained_tokens:,} trained) in "
        f"{counted(data.sequences, 'sequence')} of {config.data.max_length}\n"
        f"  {counted(run.total_steps, 'step')} of {counted(config.train.batch_size, 'sequence')}, "
        f"{run.source.epoch_of(run.total_steps):.2f} epochs -> {shown(run.folder)}"
    )


def _times(run: Run) -> dict[str, Any]:
    """What took the time of the run, and how many updates were left out."""
    seconds = run.times.seconds()
    counted = [row for row in read_metrics(run.folder) if "learning_rate" in row][-1:]
    counts = {name: int(row[name]) for row in counted for name in ("spikes", "skipped_updates") if name in row}
    return counts | {"goodput": goodput(seconds), "seconds": seconds}


def _summary(run: Run, fitted: Fitted, scores: dict[str, Any], exports: dict[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {"output_dir": shown(run.folder), "steps": fitted.steps, **fitted.held_out}
    if fitted.exported != fitted.steps:
        summary["exported_step"] = fitted.exported
    if run.config.eval.metric:
        summary |= {"metric": scores["metric"], "examples": scores["tuned"]["total"]}
        for way in ("base", "tuned"):
            own = scores[way]
            summary |= {f"{way}_score": own["value"], f"{way}_interval": own["interval"]}
            summary |= {f"{way}_correct": own["correct"]} if "correct" in own else {}
            for name, one in own.get("metrics", {}).items():
                summary |= {f"{way}_{name}": one["value"], f"{way}_{name}_interval": one["interval"]}
    return summary | exports
