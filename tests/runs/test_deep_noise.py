"""Wrong answers are found by a model that did not see them: with a model that knows the rule, and with a real one."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxft import cli
from jaxft.assets import ASSETS
from jaxft.checkpoint import hf
from jaxft.checkpoint.load import random_model
from jaxft.config import RunConfig, load
from jaxft.data.batch import Example
from jaxft.data.deep.examine import examine_deep
from jaxft.data.deep.noise import Suspect
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import ConfigError, DataError
from jaxft.runs.deep import noise
from jaxft.runs.quickstart import find_gguf

QUICKSTART = Path(__file__).parents[2] / "jaxft" / "assets" / "quickstart" / "train.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of the tiny model that ships with jaxft, with drawn weights and its tokenizer."""
    folder = tmp_path_factory.mktemp("noise") / "model"
    folder.mkdir()
    drawn = random_model(str(ASSETS / "smoke"), seed=0, dtype="float32", param_dtype="float32")
    hf.write_weights(drawn.module, str(folder))
    hf.write_config(str(folder), drawn.hf_config, dtype="float32")
    load_tokenizer(str(ASSETS / "smoke")).save(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _needs_a_library() -> None:
    pytest.importorskip("rensa")


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def found(config: RunConfig, **settings: Any) -> list[Suspect]:
    examination, table = examine_deep(config)
    return noise.find_noise(config, examination.texts, table, Console(quiet=True), **settings)


class Knowing:
    """Stands in for a session: it knows that a colour is answered by its length, and which rows it has trained."""

    made: list["Knowing"] = []

    def __init__(self, config: RunConfig) -> None:
        self.config, self.tokenizer = config, noise.tokenizer_of(config)
        self.trained: list[int] = []
        self.judged: list[int] = []
        self.updates = 0
        Knowing.made.append(self)

    def forward_backward(self, examples: list[Example]) -> None:
        self.trained += [example.row for example in examples]

    def optim_step(self) -> None:
        self.updates += 1

    def logprobs(self, examples: list[Example], *, temperature: float) -> list[np.ndarray]:
        if not self.judged:
            self.judged = [example.row for example in examples]
        return [np.full(int(one.mask.sum()), -0.1 if self._right(one) else -2.0) for one in examples]

    def sample(self, prompts: list[str], **_: Any) -> list[list[Any]]:
        return [[SimpleNamespace(text=f" {len(prompt.split()[0])}")] for prompt in prompts]

    def _right(self, example: Example) -> bool:
        words = self.tokenizer.decode(example.tokens).split()
        return int(words[-1]) == len(words[0])


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch) -> type[Knowing]:
    Knowing.made = []
    monkeypatch.setattr(noise, "Session", Knowing)
    return Knowing


def rows_of(count: int, wrong: set[int], answers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows whose answer is the length of their first word, but for the wrong ones."""
    rng = random.Random(0)
    out = []
    for row in range(count):
        length = int(answers[row % len(answers)])
        word = "".join(rng.choices("abcdefgh", k=length))
        answer = next(one for one in answers if int(one) != length) if row in wrong else str(length)
        out.append({"prompt": f"{word} has the length", "completion": f" {answer}"})
    return out


@pytest.mark.parametrize("answers", [("2", "3", "4"), tuple(str(n) for n in range(1, 15))], ids=["listed", "many"])
def test_rows_are_judged_by_the_half_that_did_not_see_them(
    tmp_path: Path, model: str, knowing: type[Knowing], answers: tuple[str, ...]
) -> None:
    wrong = {7, 20, 33}
    rows = write(tmp_path, rows_of(70, wrong, answers))
    config = load(None, [f"model.path={model}", f"data.train={rows}", "adapter.kind=none"])
    suspects = found(config, share=0.1)
    first, second = knowing.made
    assert sorted(first.judged + second.judged) == list(range(70)) and len(suspects) == 8
    assert not set(first.judged) & set(first.trained) and not set(second.judged) & set(second.trained)
    assert set(first.trained) == set(second.judged) and first.config.adapter.kind == "lora"
    assert wrong <= {one.row for one in suspects}
    assert {one.row for one in suspects[:3]} == wrong
    for one in suspects[:3]:
        assert one.loss == pytest.approx(2.0) and one.excess > 1 and one.model != one.answer
        assert one.model == f" {len(json.loads(Path(rows).read_text().splitlines()[one.row])['prompt'].split()[0])}"


def test_updates_and_rows_are_bounded(
    tmp_path: Path, model: str, knowing: type[Knowing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "ROWS", 40)
    rows = write(tmp_path, rows_of(90, set(), ("2", "3", "4")))
    found(load(None, [f"model.path={model}", f"data.train={rows}"]), steps=3)
    assert [session.updates for session in knowing.made] == [3, 3]
    assert sum(len(session.judged) for session in knowing.made) == 40
    assert all(len(set(session.trained)) == len(session.trained) <= 20 for session in knowing.made)


def test_what_cannot_be_judged_is_refused(tmp_path: Path, model: str) -> None:
    rows = write(tmp_path, rows_of(3, set(), ("2", "3")))
    config = load(None, [f"model.path={model}", f"data.train={rows}"])
    with pytest.raises(DataError, match="3 rows of 3 can be judged, .* need 4 or more"):
        found(config)
    config = load(None, [f"model.path={model}", f"data.train={rows}", "model.random_init=True"])
    with pytest.raises(ConfigError, match="a model that knows nothing judges nothing"):
        found(config)


def test_the_command_trains_and_shows_what_the_model_answers(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    rows = write(tmp_path, rows_of(12, {5}, ("2", "3")))
    command = ["data", f"--model={model}", f"--data={rows}", "--deep", "--noise", "--noise_steps=2", "--json"]
    assert cli.main([*command, "--max_length=64"]) == 0, capsys.readouterr().err
    suspects = json.loads(capsys.readouterr().out)["noise"]
    assert len(suspects) == 2
    for one in suspects:
        assert one["where"].startswith("rows.jsonl line") and one["loss"] > 0 and isinstance(one["model"], str)


@pytest.mark.slow
def test_swapped_labels_are_among_the_least_likely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 % of the labels of a closed list are swapped: half of them or more are among the worst 5 %."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    try:
        model = find_gguf()
    except ConfigError as error:
        pytest.skip(str(error))
    rng = random.Random(0)
    messages = [json.loads(line)["messages"] for line in QUICKSTART.read_text(encoding="utf-8").splitlines()[:240]]
    labels = [json.loads(one[2]["content"])["intent"] for one in messages]
    swapped = set(rng.sample(range(len(messages)), 12))
    rows = []
    for row, one in enumerate(messages):
        others = sorted(set(labels) - {labels[row]})
        label = rng.choice(others) if row in swapped else labels[row]
        rows.append({"messages": [one[1], {"role": "assistant", "content": label}]})
    settings = ["optim.learning_rate=1.5e-3", "optim.adamw.b2=0.99", "model.remat=dots", "data.max_length=512"]
    config = load(None, [f"model.path={model}", f"data.train={write(tmp_path, rows)}", *settings])
    suspects = found(config, share=0.05)
    assert len(suspects) == 12
    assert len({one.row for one in suspects} & swapped) >= 6
