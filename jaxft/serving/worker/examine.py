"""The examination of a job's rows, without JAX: what is in them, and the run that they make."""

import json
import os
from typing import Any

from jaxft.config import RunConfig, resolve
from jaxft.data import prepare, tokenizer_of
from jaxft.data.loader import steps_for
from jaxft.data.prepare import Prepared
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import counted
from jaxft.files.run_folder import write_json
from jaxft.serving.jobs.folder import JobFolder, JobSpec
from jaxft.serving.jobs.hyperparameters import Counts, Hyperparameters, resolved
from jaxft.serving.jobs.run_config import config_of
from jaxft.serving.worker.telling import Telling

FEW_ROWS = 10  # fewer than providers take
SHOWN_ROWS, SHOWN_CHARACTERS = 2, 4000
MOST_LOGGED = 2000  # steps of a run


def examine(spec: JobSpec, folder: JobFolder, telling: Telling) -> dict[str, Any]:
    """Reads and tokenises the rows, and writes `resolved.json`, which it returns.

    Raises DataError for rows that cannot be trained on, naming them, and ConfigError for settings that do not fit.
    """
    telling.phase("validating")
    positions = positions_of(spec.base)
    config = config_of(spec, folder, positions=positions)
    tokenizer = tokenizer_of(config)
    data = prepare(config, tokenizer)
    examination = data.examination
    counts = Counts(rows=examination.examples, sequences=examination.sequences)
    numbers, sequences = resolved(Hyperparameters(**spec.hyperparameters), counts)
    settled = {**numbers.shown(), "sequences": sequences}
    config = config_of(spec, folder, positions=positions, resolved=settled)
    steps = steps_for(config.train.epochs, examination.sequences, sequences)
    warnings = [telling.without_paths(text) for text in (*examination.warnings, *_few(examination.examples))]
    out = {
        "hyperparameters": numbers.shown(),
        "settled": settled,
        "positions": positions,
        "plan": {
            "steps": steps, "epochs": config.train.epochs, "batch_sequences": sequences,
            "max_length": config.data.max_length, "trained_tokens": round(examination.tokens * config.train.epochs),
        },
        "examination": _examination(data, tokenizer, telling),
        "warnings": warnings,
        "log_every": max(1, steps // MOST_LOGGED),
    }  # fmt: skip
    write_json(folder.resolved, out)
    return out


def tell_examined(telling: Telling, out: dict[str, Any]) -> None:
    """Tells what the examination found, warnings first. To be called by every worker of a job: the one that examined
    the rows may have died before.
    """
    for number, warning in enumerate(out["warnings"]):
        telling.event("warning", warning, step=number, level="warn")
    examination, numbers = out["examination"], out["hyperparameters"]
    words = ", ".join(f"{name} {value}" for name, value in numbers.items())
    telling.event(
        "validated",
        f"Files validated: {counted(examination['rows'], 'row')}, {counted(examination['tokens'], 'token')} "
        f"({examination['trained_tokens']:,} trained), {counted(out['plan']['steps'], 'step')}; {words}",
        hyperparameters=numbers,
        plan=out["plan"],
    )


def _few(rows: int) -> list[str]:
    return [f"only {counted(rows, 'row')} to learn from: providers ask for {FEW_ROWS}"] if rows < FEW_ROWS else []


def _examination(data: Prepared, tokenizer: Tokenizer, telling: Telling) -> dict[str, Any]:
    """What clients see of the examination: counts, and the first rows in pieces of trained and other text."""
    values = data.examination.to_dict()
    names = (
        "rows", "examples", "tokens", "trained_tokens", "max_length", "truncated", "dropped", "sequences", "fill",
        "quantiles", "histogram", "formats", "holds", "skipped", "bad_rows",
    )  # fmt: skip
    out = {name: values[name] for name in names}
    out["bad_rows"] = [telling.without_paths(text) for text in out["bad_rows"]]
    out["first_rows"] = [_pieces(example, tokenizer) for example in data.train_examples[:SHOWN_ROWS]]
    held_out = data.eval_examination
    out["validation"] = None if held_out is None else {"rows": held_out.rows, "tokens": held_out.tokens}
    return out


def _pieces(example: Any, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The text of an example in pieces, each either trained or not."""
    out: list[dict[str, Any]] = []
    for document in example.documents:
        start = 0
        flags = [bool(flag) for flag in document.mask]
        for end in range(1, len(flags) + 1):
            if end < len(flags) and flags[end] == flags[start]:
                continue
            text = tokenizer.decode(document.tokens[start:end], skip_special_tokens=False)
            out.append({"text": text[:SHOWN_CHARACTERS], "trained": flags[start]})
            start = end
    return out


def positions_of(base: str) -> int | None:
    """The longest sequence that the config.json of a model folder names; None if it names none."""
    path = os.path.join(base, "config.json")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    number = values.get("max_position_embeddings") if isinstance(values, dict) else None
    return number if isinstance(number, int) and number > 0 else None


def final_config(spec: JobSpec, folder: JobFolder, out: dict[str, Any]) -> RunConfig:
    """The config of the run, from what the examination has settled."""
    config = config_of(spec, folder, positions=out["positions"], resolved=out["settled"])
    if "train.log_every" in spec.config:
        return config
    values = config.to_dict()
    values["train"]["log_every"] = out["log_every"]
    return resolve(values)
