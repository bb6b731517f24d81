"""Runs that cannot teach are announced before they start, with settings that help."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxft.assets import ASSETS
from jaxft.cli import main
from jaxft.config import load
from jaxft.data.batch import Example
from jaxft.data.loader import Loader
from jaxft.errors import DataError
from jaxft.runs.course import ENOUGH, recommended
from jaxft.runs.examine import examine
from jaxft.runs.train import set_up

ROOT = Path(__file__).parents[2]
LENGTH = 100


def loader_of(lengths, settings, **fields) -> Loader:
    examples = [
        Example(tokens=np.zeros(length, np.int32), mask=np.ones(length, np.uint8), row=row)
        for row, length in enumerate(lengths)
    ]
    given = {"packing": True, "batch_size": 16, "epochs": 1.0} | fields
    given |= {key.rpartition(".")[2]: value for key, value in settings.items()}
    return Loader(examples, max_length=LENGTH, **given)


@pytest.mark.parametrize("unit", [1, 2, 8])
@pytest.mark.parametrize("epochs", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("lengths", [[5] * 40, [5] * 400, [90] * 40, [50] * 3, [7] * 9], ids=str)
def test_the_settings_that_are_recommended_help(lengths, epochs, unit):
    sequences = len(loader_of(lengths, {}, epochs=epochs).plan)
    settings, steps = recommended(
        sequences=sequences, examples=len(lengths), packing=True, batch_size=16, epochs=epochs, unit=unit
    )
    loader = loader_of(lengths, settings, epochs=epochs)
    assert loader.total_steps == steps >= ENOUGH and loader.batch_size % unit == 0
    if len(lengths) >= unit:
        assert loader.batch_size <= len(loader.plan)


def write_rows(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def short_rows(path: Path, count: int) -> str:
    words = ("red", "green", "blue")
    return write_rows(path, [{"prompt": f"Colour {n}?", "completion": f" {words[n % 3]}"} for n in range(count)])


def smoke(tmp_path, **overrides):
    settings = {
        "output_dir": str(tmp_path / "run"), "data.train": short_rows(tmp_path / "rows.jsonl", 40), "data.eval": None,
        "data.limit": None, "train.steps": None, "train.batch_size": 8, "train.epochs": 2.0, "eval.metric": None,
        "optim.warmup_ratio": None, "train.accumulation_steps": 1, "checkpoint.best_metric": None,
    }  # fmt: skip
    return load(str(ROOT / "configs" / "smollm2_135m_lora.py") + ":smoke", settings | overrides)


def test_forty_short_rows_are_told_which_settings_suit_them(tmp_path, capsys):
    data = examine(smoke(tmp_path), Console(soft_wrap=True), rows=0)
    printed = capsys.readouterr().out
    assert "the run: 1 step of 8 sequences" in printed and data["course"]["steps"] == 1
    (warning,) = [one for one in data["warnings"] if "whole run" in one]
    assert warning in printed and "the same rows several times (8 places for 2 sequences)" in warning
    found = dict(re.findall(r"([\w.]+)=(\S+)", warning))
    changes = {key: json.loads(value.lower()) for key, value in found.items()}
    better = examine(smoke(tmp_path, **changes), Console(quiet=True), rows=0)
    assert better["course"]["steps"] >= ENOUGH and not [one for one in better["warnings"] if "whole run" in one]


def test_the_run_itself_says_so_too(tmp_path):
    run = set_up(smoke(tmp_path))
    (note,) = run.notes
    assert note.startswith("warning: every batch holds the same rows") and "the whole run is 1 step" in note
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert note.removeprefix("warning: ") in kept["warnings"] and kept["course"]["steps"] == 1


def test_a_set_that_a_mixture_repeats_within_a_batch_is_told(tmp_path):
    small, large = short_rows(tmp_path / "small.jsonl", 3), short_rows(tmp_path / "large.jsonl", 300)
    mixture = {"small": {"path": small, "weight": 1.0}, "large": {"path": large, "weight": 1.0}}
    config = smoke(tmp_path, **{"data.train": "", "data.mixture": mixture, "train.steps": 30})
    (note,) = set_up(config).notes
    assert re.search(r"of the set 'small' \d places for 1 sequence", note) and "large" not in note


def test_the_command_of_the_quickstart_suits_forty_rows(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    command = re.search(r"jaxft (data --model=\S+ --data=rows\.jsonl.*?)\n\n", page, re.DOTALL).group(1)
    arguments = shlex.split(command.replace("\\\n", " "))
    arguments = [one.replace("runs/models/SmolLM2-135M-Instruct", str(ASSETS / "smoke")) for one in arguments]
    monkeypatch.chdir(tmp_path)
    short_rows(Path("rows.jsonl"), 40)
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["course"]["steps"] == 29 and not [one for one in data["warnings"] if "whole run" in one]


def held_out(tmp_path, answers, **overrides):
    rows = [{"prompt": f"Number {n}?", "completion": answer} for n, answer in enumerate(answers)]
    path = write_rows(tmp_path / "held_out.jsonl", rows)
    return smoke(tmp_path, **{"data.eval": path, "eval.limit": None, "data.eval_limit": None} | overrides)


def test_answers_that_are_cut_off_before_they_can_be_right_are_counted(tmp_path):
    # The tokenizer knows bytes, so that answers have as many tokens as letters.
    config = held_out(tmp_path, ["seven", "eleven", "one hundred"], **{"eval.metric": "exact_match",
                                                                     "eval.max_new_tokens": 5})  # fmt: skip
    warnings = examine(config, Console(quiet=True), rows=0)["warnings"]
    (warning,) = [one for one in warnings if "max_new_tokens" in one]
    assert warning.startswith("2 of 3 held-out answers are longer") and "Set eval.max_new_tokens=12" in warning
    whole = held_out(tmp_path, ["seven"], **{"eval.metric": "exact_match", "eval.max_new_tokens": 5})
    assert not [one for one in examine(whole, Console(quiet=True), rows=0)["warnings"] if "max_new_tokens" in one]


@pytest.mark.parametrize("call", [set_up, lambda config: examine(config, Console(quiet=True), rows=0)])
def test_references_are_refused_before_a_model_is_loaded(tmp_path, call):
    config = held_out(tmp_path, ["[1, 2]", "{'a': 1}", "yes"], **{"eval.metric": "json_exact"})
    message = r"2 of 3 held-out answers cannot be scored by json_exact:\n  .*held_out\.jsonl line 2 is not JSON"
    with pytest.raises(DataError, match=message):
        call(config)
    assert not (tmp_path / "run").exists()


def test_prompts_without_room_for_an_answer_are_refused_before_a_model_is_loaded(tmp_path):
    config = held_out(tmp_path, ["yes"], **{"eval.metric": "exact_match", "eval.max_new_tokens": 10**6})
    with pytest.raises(DataError, match=r"leaves room for [\d,]+ tokens.*=1000000\. Set it to at most \d+"):
        set_up(config)
