"""`jaxft data --deep`: prints what the deep checks find, and writes cleaned rows if asked."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from jaxft.config import RunConfig
from jaxft.data.deep.clean import write_cleaned
from jaxft.data.deep.examine import REASONS, examine_deep
from jaxft.data.deep.show import print_deep
from jaxft.errors import ConfigError, counted, did_you_mean
from jaxft.files.targets import check_new_file, locked_output
from jaxft.home import local_path
from jaxft.terminal.console import say

NO_MODEL = "no-model"  # `model.path` of a config for checks that read no model


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a deep examination.

    rows: findings of each kind that are printed. write: a new file for the cleaned rows. drop: the reasons for which
    rows are left out of it, of REASONS. noise: whether a model looks for answers that may be wrong. noise_steps: most
    updates of each of its two trainings.
    """

    rows: int = 2
    write: str | None = None
    drop: tuple[str, ...] = REASONS
    noise: bool = False
    noise_steps: int = 100


def examine_deep_rows(config: RunConfig, console: Console, request: Request) -> dict[str, Any]:
    """Prints the findings and returns all of them by row. Nothing is written but `request.write`.

    Raises ConfigError for reasons that do not exist and for what needs a model without one; ExportError if the file
    that is to be written exists; DataError as reading does.
    """
    _check(config, request)
    examination, table = examine_deep(config)
    if request.noise:
        from jaxft.runs.deep.noise import find_noise

        suspects = find_noise(config, examination.texts, table, console, steps=request.noise_steps)
        examination = dataclasses.replace(examination, suspects=suspects)
    print_deep(examination, console, request.rows)
    result = examination.to_dict()
    if request.write is not None:
        dropped = examination.dropped(request.drop)
        path = local_path(request.write)
        with locked_output(path, "jaxft data --deep"):
            check_new_file(path)  # again: the checks may have taken long
            written = write_cleaned(examination.texts, dropped, path)
        say(console, f"wrote {counted(written, 'row')} to {path}, without {len(dropped):,}")
        result["written"] = {"path": path, "rows": written, "dropped": len(dropped)}
    return result


def reasons_in(text: str | None) -> tuple[str, ...]:
    """The reasons that `--drop` names, with commas between them; all of them for None. Raises ConfigError."""
    names = REASONS if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in REASONS:
            raise ConfigError(f"--drop={name} is none of {', '.join(REASONS)}.{did_you_mean(name, REASONS)}")
    return names


def _check(config: RunConfig, request: Request) -> None:
    if request.write is not None:
        if len(config.data.mixture) > 1:
            raise ConfigError(
                f"--write writes one set, and data.mixture has {len(config.data.mixture)}: clean each by itself, with "
                "--data=ROWS"
            )
        check_new_file(local_path(request.write))
        if os.path.realpath(local_path(request.write)) == os.path.realpath(local_path(config.data.train or ".")):
            raise ConfigError("--write names the training rows themselves: choose another file")
    if not request.noise:
        return
    if config.model.path == NO_MODEL:
        raise ConfigError("--noise trains on the rows, so it needs a model: --model=PATH, or a config")
    if config.method.name != "sft":
        raise ConfigError(
            f"--noise looks at rows with one answer each, and method.name={config.method.name!r} has others: leave it "
            "out, or set method.name to 'sft'"
        )
    if request.noise_steps < 1:
        raise ConfigError(f"--noise_steps={request.noise_steps} must be at least 1")
