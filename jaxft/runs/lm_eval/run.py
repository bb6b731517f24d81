"""Runs tasks of lm-evaluation-harness on a model, and prints and writes what they give."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxft.errors import ConfigError, did_you_mean
from jaxft.files.atomic import write_text
from jaxft.home import local_path
from jaxft.sharding.expectations import refuse_lonely_worker
from jaxft.sharding.processes import is_multi_process
from jaxft.terminal.console import cell

LIBRARY = "lm_eval"


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """What is asked of the harness; None leaves a setting to it, or to the task.

    names: of tasks, groups or tags, patterns of them, or YAML files. num_fewshot: examples before a question. limit:
    questions of each task, from the first, or a share below 1. include_path: a folder with YAML files of tasks.
    apply_chat_template: whether questions are user messages of a chat. system: its system message. gen_kwargs: settings
    of generation, `name=value` with commas between them. samples: whether the results hold every question and answer.
    seed: of the choice of examples; by default that of the harness, with which published results were made.
    """

    names: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: str | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system: str | None = None
    gen_kwargs: str | None = None
    samples: bool = False
    seed: int | None = None


def check_installed() -> None:
    """Raises ConfigError if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec(LIBRARY) is None:
        raise ConfigError("lm-eval needs lm-evaluation-harness: pip install 'jaxft[lm-eval]'")


def check_one_process() -> None:
    """Raises ConfigError in one of several processes, and on one host of several, which would ask and write alone."""
    if is_multi_process():
        raise ConfigError(
            f"lm-eval is for one process, which uses all devices of its machine, and not for {jax.process_count()}: "
            "start it on a single machine, with the run folder or an export of the model"
        )
    refuse_lonely_worker()


def run_tasks(model: Any, tasks: Tasks) -> dict[str, Any]:
    """The results of the tasks, as the harness gives them. model: a `JaxftLM`.

    Raises ConfigError for a task that does not exist.
    """
    from lm_eval.evaluator import simple_evaluate

    manager = _manager_of(tasks)
    seeds = ("random_seed", "numpy_random_seed", "fewshot_random_seed")
    results = simple_evaluate(
        model=model,
        tasks=list(tasks.names),
        num_fewshot=tasks.num_fewshot,
        batch_size=model.batch_size,
        limit=tasks.limit,
        log_samples=tasks.samples,
        system_instruction=tasks.system,
        apply_chat_template=tasks.apply_chat_template,
        fewshot_as_multiturn=tasks.fewshot_as_multiturn,
        gen_kwargs=tasks.gen_kwargs,
        task_manager=manager,
        **({} if tasks.seed is None else dict.fromkeys(seeds, tasks.seed)),
    )
    plain: dict[str, Any] = json.loads(json.dumps(results, default=str))
    return plain


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """Prints the metrics of every task with their standard errors."""
    table = Table("task", "metric", "value", "stderr", box=None, pad_edge=False)
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not filtered:
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            table.add_row(
                cell(task), cell(shown), f"{value:.4f}", f"{error:.4f}" if isinstance(error, int | float) else ""
            )
    console.print(table)


def write_results(results: Mapping[str, Any], path: str) -> None:
    """Writes the results as JSON, whole or not at all."""
    write_text(local_path(path), json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _manager_of(tasks: Tasks) -> Any:
    """The harness's table of tasks. Its own tasks, which take a while to read, only if some name needs them."""
    from lm_eval.tasks import TaskManager

    if tasks.include_path is not None:
        own = TaskManager(include_path=local_path(tasks.include_path), include_defaults=False)
        if not _unknown(own, tasks):
            return own
    manager = TaskManager(include_path=None if tasks.include_path is None else local_path(tasks.include_path))
    for name in _unknown(manager, tasks):
        where = "" if tasks.include_path else " Tasks of your own are found by --include_path=FOLDER."
        raise ConfigError(f"there is no task {name!r}.{did_you_mean(name, manager.all_tasks)}{where}")
    return manager


def _unknown(manager: Any, tasks: Tasks) -> list[str]:
    """The names that the manager does not know and that are no files."""
    return [name for name in tasks.names if not name.endswith((".yaml", ".yml")) and not manager.match_tasks([name])]
