"""Runs that a comparison trains itself: missing methods, several seeds, and parts of the training rows."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.comparison.plan import Budget, OutOfTime, Plan
from jaxft.config import RunConfig
from jaxft.data import tokenizer_of
from jaxft.data.prepare import open_sets
from jaxft.data.sources import Rows
from jaxft.errors import ConfigError, DataError
from jaxft.files.atomic import make_folder, write_text
from jaxft.files.run_folder import SUMMARY, is_run_folder, read_if_whole, write_json
from jaxft.runs.evaluate import evaluate
from jaxft.runs.export import load_trained
from jaxft.runs.folder import run_config
from jaxft.runs.identity.changes import other_values
from jaxft.runs.train import train
from jaxft.terminal.console import SafeConsole

# Learning rates of LoRA are about ten times those of all weights: Schulman et al. 2025, "LoRA Without Regret",
# doi:10.64434/tml.20250929.
LORA_OVER_FULL = 10.0
MOST_EPOCHS = 8  # of a part of the rows that is trained for as many steps as all of them
DEV_SHARE, MOST_DEV = 0.1, 200  # of the rows, by whose loss the checkpoint of a part is taken
CHECKPOINTS = 8  # of a part, of which the best is taken
HELD_OUT = "held_out.json"  # of a part's run: its held-out metrics


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that was trained here. name: of its folder. rows: training rows. share: of all of them."""

    name: str
    folder: Path
    method: str
    seed: int
    rows: int
    share: float

    @property
    def summary(self) -> dict[str, Any]:
        """Its summary.json; of a part of the rows, with the metrics of its best checkpoint on the held-out rows."""
        return read_if_whole(self.folder / SUMMARY) | read_if_whole(self.folder / HELD_OUT)


class Trainer:
    """Trains what a plan asks for below its folder; a run that is whole is not trained again.

    say: told what is trained. run: trains a config, as `jaxft.train` does. evaluate: as `held_out_metrics`, which is
    the default.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        folder: Path,
        budget: Budget,
        say: Callable[[str], None],
        run: Callable[..., Any] = train,
        evaluate: Callable[[Path, RunConfig], dict[str, Any]] | None = None,
    ) -> None:
        if config.data.mixture:
            raise ConfigError(
                "--methods trains on one set, and the config has a mixture: train its runs with `jaxft train`, and "
                "give them as --run"
            )
        self._plan, self._folder, self._budget, self._say, self._run = plan, folder, budget, say, run
        (train_set,), held_out = open_sets(config)
        self._evaluate = evaluate or held_out_metrics
        self._rows: Rows = train_set.rows
        make_folder(folder / "data")
        held_out_file = self._write("held_out", held_out[0].rows, range(len(held_out[0].rows)))
        data = replace(
            config.data, eval=held_out_file, eval_fraction=None, eval_limit=None, train=self._part(1.0), limit=None
        )
        self._config = replace(config, data=data, eval=replace(config.eval, metric=None, schema=None, pattern=None))

    def methods(self) -> list[Trained]:
        """Every method with every seed, on all rows."""
        return self._trained([(method, seed, 1.0) for method in self._plan.methods for seed in range(self._plan.seeds)])

    def sizes(self, steps: int) -> list[Trained]:
        """The first method on nested parts of the rows, each for `steps` steps, but at most `MOST_EPOCHS` epochs.

        Of each the checkpoint with the least loss on dev rows is taken, which are in no part; then its held-out loss
        is measured.
        """
        shares = sorted(share for share in self._plan.sizes if share < 1)
        out = self._trained([(self._plan.methods[0], 0, share) for share in shares], steps)
        for one in out:
            if not (one.folder / HELD_OUT).is_file():
                write_json(one.folder / HELD_OUT, self._evaluate(one.folder, self._config))
        return out

    def _trained(self, wanted: list[tuple[str, int, float]], steps: int | None = None) -> list[Trained]:
        out = []
        for method, seed, share in wanted:
            part = "" if share == 1 else f"-{round(1000 * share)}"
            name = f"{method}-seed{seed}{part}"
            one = Trained(
                name=name,
                folder=self._folder / "runs" / name,
                method=method,
                seed=seed,
                rows=len(part_of(len(self._rows), share)),
                share=share,
            )
            try:
                self._budget.check()
                self._train(self._config_of(one, steps))
            except OutOfTime:
                self._budget.leave_out(f"training of {name}")
                continue
            out.append(one)
        return out

    def _train(self, config: RunConfig) -> None:
        folder = Path(config.output_dir)
        whole = is_run_folder(folder) and (folder / SUMMARY).is_file()
        if whole and not other_values(run_config(folder), config, spelling=False):
            return
        self._say(f"training {folder.name}")
        self._run(config, console=SafeConsole(quiet=True))

    def _config_of(self, one: Trained, steps: int | None) -> RunConfig:
        config, kind = self._config, self._config.adapter.kind
        rate = config.optim.learning_rate
        if one.method == "full" and kind != "none":
            kind, rate = "none", rate / LORA_OVER_FULL
        elif one.method == "lora" and kind == "none":
            kind, rate = "lora", rate * LORA_OVER_FULL
        train_section = config.train
        if steps is not None:
            epoch = steps / (config.train.epochs if config.train.steps is None else 1)
            most = max(1, round(MOST_EPOCHS * one.share * epoch))
            train_section = replace(train_section, steps=min(steps, most))
        data, checkpoint, export = replace(config.data, train=self._part(one.share)), config.checkpoint, config.export
        if steps is not None:
            every = max(1, (train_section.steps or 1) // CHECKPOINTS)
            data = replace(data, eval=self._dev())
            train_section = replace(train_section, eval_every=every, eval_every_epochs=None)
            checkpoint = replace(checkpoint, every=every, best_metric="eval_loss")
            export = replace(export, checkpoint="best")
        changed = replace(
            config,
            output_dir=str(one.folder),
            seed=config.seed + one.seed,
            adapter=replace(config.adapter, kind=kind),
            optim=replace(config.optim, learning_rate=rate),
            train=train_section,
            data=data,
            checkpoint=checkpoint,
            export=replace(export, merged=False),
        )
        changed.check()
        return changed

    def _part(self, share: float) -> str:
        """The file of a part of the rows."""
        name = "train" if share == 1 else f"train-{round(1000 * share)}"
        return self._write(name, self._rows, part_of(len(self._rows), share))

    def _dev(self) -> str:
        """The file of the rows that are in no part."""
        return self._write("dev", self._rows, dev_of(len(self._rows)))

    def _write(self, name: str, rows: Rows, indices: Any) -> str:
        path = self._folder / "data" / f"{name}.jsonl"
        try:
            lines = [json.dumps(rows[int(index)], ensure_ascii=False) + "\n" for index in indices]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the rows of {rows.describe()} cannot be written as JSON lines ({error}), which runs with other seeds "
                "or parts of the rows read: train them with `jaxft train`, and give them as --run"
            ) from error
        text = "".join(lines)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        return str(path)


def part_of(rows: int, share: float) -> list[int]:
    """The numbers of a share of the rows, in ascending order: the first of an order that does not depend on the share.

    Of a share below 1, none is in `dev_of`; it has one row at least, if there are two.
    """
    if share == 1:
        return list(range(rows))
    return sorted(_order(rows)[: min(max(1, math.floor(share * rows)), rows - _dev_rows(rows))])


def dev_of(rows: int) -> list[int]:
    """The numbers of the last rows of that order, by whose loss the checkpoint of a part is taken."""
    return sorted(_order(rows)[rows - _dev_rows(rows) :])


def _dev_rows(rows: int) -> int:
    return min(MOST_DEV, max(1, round(DEV_SHARE * rows)))


def _order(rows: int) -> list[int]:
    return [int(index) for index in np.random.default_rng([0, 3]).permutation(rows)]


def held_out_metrics(folder: Path, config: RunConfig) -> dict[str, Any]:
    """The held-out metrics of a run's exported checkpoint on the rows of a config."""
    return evaluate(load_trained(str(folder)), tokenizer_of(config), config)
