"""Learning curves: planted power laws are found, flat ones are called flat; runs that a comparison trains itself."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import jaxft
from jaxft.assets import ASSETS
from jaxft.comparison.plan import Budget, Plan
from jaxft.comparison.trained.curve import at, fit, more_rows
from jaxft.comparison.trained.drift import drift, few_enough, texts_of_probe
from jaxft.comparison.trained.probe import probed, requests_of, rows_of
from jaxft.comparison.trained.seeds import main_pair, methods_of, seeds_of, sides_of
from jaxft.comparison.trained.training import Trainer, dev_of, part_of
from jaxft.config import DataConfig
from jaxft.data.sources import train_and_eval
from jaxft.errors import ConfigError
from jaxft.evaluation.statistics import bca_interval, permutation_p

ROWS = (50, 100, 200, 400)


def points(function):
    return [{"rows": rows, "loss": function(rows)} for rows in ROWS]


def test_a_planted_power_law_is_found_and_continued():
    law = lambda n: 0.3 + 4.0 * n**-0.5  # noqa: E731
    curve = fit(ROWS, [law(n) for n in ROWS])
    assert curve == pytest.approx((0.3, 4.0, 0.5), abs=1e-6) and at(curve, 800) == pytest.approx(law(800))
    found = more_rows(points(law)[::-1])
    assert found["change"] == pytest.approx(law(800) / law(400) - 1, abs=1e-6)
    assert found["sentence"] == "Twice the rows would lower the held-out loss by 12 % (12 to 12), if it goes on so."


def test_flat_rising_and_short_curves():
    for law in (lambda n: 1.0, lambda n: 1.0 + n / 1e4):
        assert more_rows(points(law))["sentence"] == "The curve is flat: better rows would help, not more of them."
    assert more_rows(points(lambda n: 1 / n)[:3]) == {
        "sentence": "Too few points to say what more rows would do: 3 of at least 4."
    }


@pytest.fixture
def trainer(tmp_path):
    """make(**options) -> (a trainer, the configs that it has trained)."""

    def make(overrides=None, minutes=None, **options):
        trained = []

        def run(config, console):
            trained.append(config)
            folder = Path(config.output_dir)
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(config.to_dict()))
            (folder / "summary.json").write_text('{"steps": 40, "eval_loss": 1.0}')

        given = {"data.eval": None, "data.eval_fraction": 0.25, "data.limit": 12, "data.eval_limit": 4}
        config = jaxft.get_config("configs/quickstart.py:smoke", given | (overrides or {}))
        plan = Plan(to=str(tmp_path), **options)
        evaluate = lambda folder, config: {"eval_loss": len(lines(config.data.eval)) + len(folder.name)}  # noqa: E731
        return Trainer(config, plan, tmp_path, Budget(minutes), lambda line: None, run, evaluate), trained

    return make


def lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines()


def test_methods_and_seeds_train_on_the_same_rows(trainer):
    made, trained = trainer(methods=("lora", "full"), seeds=2)
    names = [one.name for one in made.methods()]
    assert names == ["lora-seed0", "lora-seed1", "full-seed0", "full-seed1"]
    lora, _, full, _ = trained
    assert [one.seed for one in trained] == [0, 1, 0, 1] and [one.adapter.kind for one in (lora, full)] == [
        "lora",
        "none",
    ]
    assert full.optim.learning_rate == pytest.approx(lora.optim.learning_rate / 10)
    assert len({one.data.train for one in trained}) == len({one.data.eval for one in trained}) == 1
    held, rows = lines(lora.data.eval), lines(lora.data.train)
    assert (len(held), len(rows)) == (4, 12) and not {*held} & {*rows}
    assert {*held, *rows} < {*lines(ASSETS / "quickstart" / "train.jsonl")}
    made.methods()
    assert len(trained) == 4  # whole runs are not trained again


def test_parts_are_nested_and_take_as_many_steps_up_to_eight_epochs(trainer):
    made, trained = trainer({"train.epochs": 2.0, "train.steps": None}, methods=("lora",), sizes=(0.5, 1.0, 0.1, 0.25))
    made.sizes(40)
    assert [one.output_dir.rpartition("-")[2] for one in trained] == ["100", "250", "500"]
    parts = [lines(one.data.train) for one in trained]
    assert [len(part) for part in parts] == [1, 3, 6] and {*parts[0]} < {*parts[1]} < {*parts[2]}
    # 40 steps are two epochs of all rows; eight epochs of a tenth are 16.
    assert [one.train.steps for one in trained] == [16, 40, 40]


def test_of_a_part_the_checkpoint_is_that_of_the_least_loss_on_rows_that_no_part_has(trainer):
    made, trained = trainer(methods=("lora",), sizes=(0.5, 0.99))
    halves = made.sizes(40)
    dev = {*lines(trained[0].data.eval)}
    assert len(dev) == 1 and not dev & {*lines(trained[0].data.train), *lines(trained[1].data.train)}
    assert [one.rows for one in halves] == [6, 11] == [len(lines(one.data.train)) for one in trained]
    for one in trained:
        assert (one.train.eval_every, one.checkpoint.every, one.checkpoint.best_metric) == (5, 5, "eval_loss")
        assert one.export.checkpoint == "best"
    # The loss of the curve is that of the four held-out rows.
    assert halves[0].summary["eval_loss"] == 4 + len("lora-seed0-500") and halves[0].summary["steps"] == 40
    (whole,) = made.methods()
    assert whole.summary["eval_loss"] == 1.0 and trained[-1].export.checkpoint == "last"


def test_no_held_out_row_is_in_a_part_and_parts_are_nested_for_every_seed(tmp_path):
    rows = [{"prompt": f"question {number}", "completion": "yes"} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(200):
        generator = np.random.default_rng(seed)
        fraction, *shares = generator.uniform(0.02, 0.98, 4).round(3).tolist()
        train, held_out = train_and_eval(DataConfig(train=str(tmp_path / "rows.jsonl"), eval_fraction=fraction), seed)
        asked = {row["prompt"] for row in held_out}
        parts = [{train[one]["prompt"] for one in part_of(len(train), share)} for share in (*sorted(shares), 1)]
        dev = {train[one]["prompt"] for one in dev_of(len(train))}
        assert len(parts[-1]) == len(train) == 60 - len(asked) and not asked & parts[-1]
        assert dev and all(smaller <= larger for smaller, larger in itertools.pairwise(parts))
        assert not any(part & dev for part in parts[:-1])


def test_no_time_trains_nothing_and_a_mixture_is_refused(trainer):
    made, trained = trainer(minutes=1e-9, methods=("lora",))
    assert made.methods() == [] and not trained
    sets = {"one": {"path": str(ASSETS / "quickstart" / "train.jsonl")}}
    with pytest.raises(ConfigError, match="--methods trains on one set"):
        trainer({"data.train": "", "data.mixture": sets}, methods=("lora",))


def way(name, values):
    """A way of which only the name and the scores of rows are looked at."""
    main = SimpleNamespace(values=values, value=sum(values) / len(values), passes=True)
    return SimpleNamespace(name=name, rival=SimpleNamespace(name=name), main=main)


def test_the_verdict_is_about_the_average_of_seeds_and_not_the_luckiest():
    rng = np.random.default_rng(0)
    draws = {"a0": 0.9, "a1": 0.5, "a2": 0.4, "b0": 0.7, "b1": 0.7}
    ways = [way(name, (rng.permutation(100) < 100 * share).astype(float).tolist()) for name, share in draws.items()]
    prompt = way("prompt", [1.0, 0.0] * 50)
    trained = [SimpleNamespace(name=one, method=one[0]) for one in draws]
    methods = methods_of(ways, trained)
    found = seeds_of(methods)
    assert set(found) == {"a", "b"} and found["a"] == {
        "runs": 3, "mean": pytest.approx(0.6), "low": 0.4, "high": 0.9, "ways": ["a0", "a1", "a2"], "shown": "a1",
    }  # fmt: skip
    main_of = lambda ways, prompt, methods: main_pair(sides_of(ways, prompt, methods, 0.02, None))  # noqa: E731

    main = main_of(ways, prompt, methods)
    assert main.first.name in ("b0", "b1") and main.trainings.count == 2  # a0 has the best score of all
    difference = np.mean([ways[3].main.values, ways[4].main.values], axis=0) - prompt.main.values
    assert main.compared.difference == pytest.approx(0.2) == pytest.approx(difference.mean())
    assert main.compared.interval == bca_interval(difference, level=1 - 0.05 / 2)  # the better of two methods
    assert main.compared.p == permutation_p(difference) and main.compared.pairs is None
    assert main_of(ways, None, methods) is None is main_of([], prompt, [])

    # A run that was trained elsewhere stands beside the methods; the trainings of one seed are as it.
    alone = main_of([*ways, way("run", [1.0] * 80 + [0.0] * 20)], prompt, methods)
    assert alone.first.name == "run" and alone.trainings is None and alone.compared.pairs is not None
    middle = main_of(ways[:3], prompt, methods[:1])
    assert middle.first.name == "a1" and middle.compared.difference == pytest.approx(0.1)
    once = main_of(ways[:1], prompt, methods_of(ways[:1], trained))
    assert once.first.name == "a0" and once.trainings is None


def test_the_probe_follows_formats_and_sees_a_leak(tmp_path):
    requests = requests_of("builtin")
    assert len(requests) == len({one.prompt for one in requests}) == 200
    good = ["Rhine", "a, b, c", "RIVERS", "Which?", "One.\nTwo.", "12", "1. a\n2. b", "No.", "Well, yes", '["a", "b"]']
    bad = ["The Rhine.", "a, b", "Rivers", "A river.", "One.", "12 or so", "1. a", "Maybe", "Oh well", '{"a": 1}']
    for request, right, wrong in zip(requests, good * 20, bad * 20, strict=True):
        assert request.follows(right) and not request.follows(wrong), request.prompt
    task = ['{"intent": "refund", "order": 1}', "yes"]
    same = probed(requests, good * 20, good * 20, task, 0.02)
    assert same["sentence"] is None and same["followed"]["tuned"]["value"] == 1 and same["leaked"]["base"] == 0
    leaking = (['{"intent": "x", "order": null}'] * 5 + good[5:]) * 20
    found = probed(requests, good * 20, leaking, task, 0.02)
    assert found["sentence"] == (
        "It forgot: 100 of 200 requests for another format are no longer followed; 100 of 200 unrelated answers have "
        "the format of the task."
    )
    (row, *_) = rows_of(requests, DataConfig(train="rows.jsonl"))
    assert row.question == requests[0].prompt
    (tmp_path / "own.jsonl").write_text('{"prompt": "Say hi.", "pattern": "hi"}\n')
    assert requests_of(str(tmp_path / "own.jsonl"))[0].follows(" hi ")


def test_drift_is_that_of_planted_distributions():
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 5, length).tolist() for length in (3, 9, 6, 4)]

    def model(seed, vocab, sharper=1.0):
        scores = [np.random.default_rng([seed, i]).normal(size=(len(row) - 1, vocab)) for i, row in enumerate(rows)]
        return [(sharper * one - np.log(np.exp(sharper * one).sum(1, keepdims=True))) for one in scores]

    base, tuned = model(1, 5), model(2, 7, 3.0)
    found = drift(rows, lambda asked: base, lambda asked: tuned)
    surprise = lambda logps: sum(-logps[i][s, t] for i, row in enumerate(rows) for s, t in enumerate(row[1:]))  # noqa: E731
    assert found["tokens"] == 18 and found["texts"] == 4
    assert found["perplexity"]["tuned"] == pytest.approx(np.exp(surprise(tuned) / 18))
    assert found["ratio"] == pytest.approx(np.exp((surprise(tuned) - surprise(base)) / 18))
    pairs = [(p, q[:, :5]) for p, q in zip(base, tuned, strict=True)]
    assert found["divergence"] == pytest.approx(sum((np.exp(p) * (p - q)).sum() for p, q in pairs) / 18)
    worse = drift(rows, lambda asked: base, lambda asked: [one - 1.0 for one in base])
    assert worse["lost"].startswith("the perplexity of other texts rose from") and worse["ratio"] == pytest.approx(np.e)
    same = drift(rows, lambda asked: base, lambda asked: base)
    assert (same["lost"], same["ratio"], same["divergence"]) == (None, 1.0, 0.0)
    requests, texts = requests_of("builtin"), texts_of_probe()
    answers = ["x"] * 200
    assert probed(requests, answers, answers, [], 0.02, worse)["sentence"] == f"It forgot: {worse['lost']}."
    assert len({*texts}) == 32 and len(few_enough([[1] * 100] * 9, 2**20)) == 2


@pytest.mark.parametrize("text", ["[1]\n", '{"prompt": "x"}\n', "", '{"prompt": "x", "pattern": "("}\n', "{"])
def test_a_probe_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "own.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r'such as \{"prompt"'):
        requests_of(str(tmp_path / "own.jsonl"))
