"""The page about a run: whole, safe, and patient with what is missing."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import binomtest

from jaxft.config import DataConfig, ModelConfig, RunConfig
from jaxft.errors import DataError
from jaxft.evaluation.metrics import measure
from jaxft.evaluation.statistics import wilson_interval
from jaxft.runs.report import write_report
from jaxft.runs.report.texts import score_sections

HOSTILE = "</pre><script>alert('x')</script><img src=x onerror=alert(1)> & \"quotes\" {{ 7 * 7 }}"


def fill(folder: Path) -> None:
    config = RunConfig(model=ModelConfig(path="hf://owner/tiny-model"), data=DataConfig(train="rows.jsonl"))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    rows = [{"step": 0, "eval_loss": 3.5}]
    for step in range(1, 81):
        figures = {"loss": 3 / step, "learning_rate": 2e-4 / step, "num_tokens": 100 * step, "tokens_per_second": 142.0}
        rows.append({"step": step} | figures)
    rows.append({"step": 80, "eval_loss": 0.625})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "rows": 640, "sequences": 131, "tokens": 2000, "trained_tokens": 500, "length_quantiles": {"p50": 141},
        "histogram": [[0, 31, 5], [32, 63, 9]], "truncated": 0, "dropped": 3, "formats": {"messages": 640},
        "warnings": ["3 rows were <dropped>"],
    }  # fmt: skip
    (folder / "data.json").write_text(json.dumps(data))
    scores = {
        "metric": "json_exact",
        "base": {"correct": 2, "total": 120, "value": 2 / 120},
        "tuned": {"correct": 109, "total": 120, "value": 109 / 120},
        "samples": [
            {"prompt": HOSTILE, "reference": HOSTILE, "base": HOSTILE, "tuned": HOSTILE, "correct": True},
            {"prompt": [{"role": "user", "content": "hi"}], "base": "no", "tuned": "yes", "correct": False},
        ],
    }
    (folder / "scores.json").write_text(json.dumps(scores))


class Page(HTMLParser):
    """The tags, addresses and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.addresses, self.open, self.words = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture
def full(tmp_path):
    """A full run folder, to be changed at will."""
    folder = tmp_path / "quickstart"
    folder.mkdir()
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The paths of a report on a full folder, made once; only to be read."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    folder.mkdir()
    fill(folder)
    return write_report(folder)


def test_a_full_folder_tells_the_whole_run(report):
    html_path, png_path = report
    assert (html_path.name, png_path.name) == ("report.html", "loss.png")
    text = Page(html_path).text
    for words in (
        "quickstart", "tiny-model", "SFT", "LoRA r=16 on all-linear", "1.7% → 90.8%", "2 of 120", "109 of 120",
        "84.3% to 94.8%", "0.625", "3.500 at step 0", "8,000", "142", "500 (25.0% of all tokens)", "p50: 141",
        "messages: 640", "3 rows were <dropped>", "train.batch_size = 16", "Learning rate",
    ):  # fmt: skip
        assert words in text, words
    assert "is missing" not in text
    assert html_path.read_text(encoding="utf-8").count("<svg") == 4


def test_the_page_needs_no_other_file(report):
    page = Page(report[0])
    assert not page.tags & {"link", "script", "iframe", "img"}
    assert all(address.startswith("#") for address in page.addresses)


def test_hostile_generations_are_shown_not_run(report):
    page = Page(report[0])
    assert "script" not in page.tags and "img" not in page.tags
    assert page.text.count(HOSTILE) == 4


def write_completions(folder, steps, text="{}"):
    """Answers to eight held-out prompts after each of some steps."""
    rows = [
        {
            "step": step, "group": group, "prompt": [{"role": "user", "content": f"Question {group}?"}],
            "completion": text if step else HOSTILE, "reward": step / 10, "rewards": {"a": step / 10, "b": None},
        }
        for step in steps for group in range(8)
    ]  # fmt: skip
    (folder / "held_out_completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_answers_to_the_same_prompts_are_shown_as_they_change(full):
    write_completions(full, range(0, 9))
    page = Page(write_report(full)[0])
    assert page.text.count("Before training") == 6 and "Question 5?" in page.text and "Question 6?" not in page.text
    assert [page.text.count(f"After step {step} ") for step in range(1, 9)] == [0, 6, 0, 6, 0, 6, 0, 6]
    assert page.text.count("reward 0.80 (a 0.80)") == 6 and "script" not in page.tags
    assert page.text.index("Before training") < page.text.index("After step 4") < page.text.index("After step 8")


@pytest.mark.parametrize("content", ["not json\n", '{"group": 1}\n', "[]\n"])
def test_answers_that_cannot_be_read_are_said(full, content):
    (full / "held_out_completions.jsonl").write_text(content)
    assert "held_out_completions.jsonl could not be read" in Page(write_report(full)[0]).text


def test_both_verdicts_are_told(report):
    source = report[0].read_text(encoding="utf-8")
    assert source.count('class="right"') == 1 and source.count('class="wrong"') == 1


def test_equal_folders_give_equal_pages(full, report):
    html_path, png_path = write_report(full)
    assert html_path.read_bytes() == report[0].read_bytes()
    assert png_path.read_bytes() == report[1].read_bytes()


def test_charts_take_the_colours_of_the_page(report):
    source = report[0].read_text(encoding="utf-8")
    charts = source[source.index("<svg") :]
    assert "var(--train)" in charts and "#2e6db4" not in charts and "prefers-color-scheme: dark" in source


def test_a_bare_folder_says_what_is_missing(tmp_path):
    html_path, png_path = write_report(tmp_path)
    text = Page(html_path).text
    for name in ("config.json", "metrics.jsonl", "data.json", "scores.json"):
        assert f"{name} is missing" in text
    assert "<svg" not in html_path.read_text(encoding="utf-8")
    assert colors(png_path) > 1


def test_an_unreadable_file_is_said_and_the_rest_told(full):
    (full / "config.json").write_text("{torn")
    (full / "data.json").write_text("[]")
    (full / "scores.json").write_bytes(b"\xff")
    text = Page(write_report(full)[0]).text
    for name in ("config.json", "data.json", "scores.json"):
        assert f"{name} could not be read" in text
    assert "0.625" in text


def test_damaged_metrics_are_said(full):
    (full / "metrics.jsonl").write_text('broken\n{"step": 1}\n')
    text = Page(write_report(full)[0]).text
    assert "line 1 of 2 is not a JSON object" in text and "109 of 120" in text


@pytest.mark.parametrize(
    "files",
    [
        {
            "metrics.jsonl": '{"step": 1, "loss": 2.0}\n',
            "data.json": '{"tokens": 0, "trained_tokens": 0, "histogram": [[1], null, [0, null, 3]]}',
            "scores.json": '{"tuned": {"value": 0.5}, "samples": [null, {}]}',
            "config.json": '{"model": {}, "adapter": {"kind": "none"}}',
        },
        {
            "metrics.jsonl": '{"step": 1, "eval_loss": 2.0}\n',
            "data.json": '{"rows": null, "warnings": "none", "new_count": 7}',
            "scores.json": '{"base": null, "tuned": {"correct": 0, "total": 0}, "samples": null}',
            "config.json": "{}",
        },
        {"metrics.jsonl": "", "data.json": "{}", "scores.json": "{}"},
    ],
)
def test_absent_keys_are_borne(full, files):
    for name, content in files.items():
        (full / name).write_text(content)
    html_path, png_path = write_report(full)
    assert "</html>" in html_path.read_text(encoding="utf-8") and colors(png_path) > 1


def test_a_score_after_training_alone(full):
    (full / "scores.json").write_text('{"tuned": {"correct": 1, "total": 4}}')
    assert "— → 25.0%" in Page(write_report(full)[0]).text


def test_every_metric_and_part_has_its_interval():
    tuned = measure("json_exact", ['{"a": 1}', "no"], ['{"a": 1}', '{"a": 2}']).summary()
    other = measure("classification", ["x", "y", "x"], ["x", "y", "y"]).summary()
    first, second = score_sections({"metric": "json_exact", "tuned": tuned | {"metrics": {"classification": other}}})
    assert (first["parts"]["a"]["tuned"], first["entries"][0]["ends"]) == ("50.0% (9.5% to 90.5%)", ["9.5%", "90.5%"])
    low, high = other["macro_f1_interval"]
    assert second["parts"]["macro-F1"]["tuned"] == f"66.7% ({low:.1%} to {high:.1%})" and second["entries"][0]["ends"]
    for damaged in ({"a": 3}, None, [1]):
        assert score_sections({"tuned": tuned | {"field_intervals": damaged}})[0]["parts"]["a"]["tuned"] == "50.0%"


def test_more_samples_than_fit_are_counted(full):
    (full / "scores.json").write_text(json.dumps({"samples": [{"prompt": f"p{i}"} for i in range(15)]}))
    text = Page(write_report(full)[0]).text
    assert "p11" in text and "p12" not in text and "3 more in scores.json" in text


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no run folder"):
        write_report(tmp_path / "absent")


def fill_pairs(folder: Path, name: str, falls: bool = False) -> None:
    """A full folder of a run on pairs."""
    fill(folder)
    config = json.loads((folder / "config.json").read_text())
    config["method"]["name"] = name
    (folder / "config.json").write_text(json.dumps(config))
    rows = []
    for step in range(1, 81):
        lost = step if falls else 0
        rewards = {"rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/margins": 0.2, "rewards/accuracies": 0.8}
        logps = {"logps/chosen": -50.0 - lost, "logps/rejected": -60.0 - 2 * lost}
        rows.append({"step": step, "loss": 0.7, **rewards, **logps})
        rows.append({"step": step, "eval_rewards/accuracies": 0.7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = json.loads((folder / "data.json").read_text())
    data["pairs"] = {"count": 7, "chosen": {"p50": 11}, "mean_chosen": 12.5, "margins": None}
    (folder / "data.json").write_text(json.dumps(data))


@pytest.mark.parametrize("falls", [True, False])
def test_a_run_on_pairs_has_the_curves_of_its_method(tmp_path, falls):
    fill_pairs(tmp_path, "dpo", falls)
    html_path, _ = write_report(tmp_path)
    page, source = Page(html_path), html_path.read_text(encoding="utf-8")
    for words in (
        "Loss, mean over pairs", "Rewards of chosen and rejected answers", "Margin between the two rewards",
        "Share of pairs whose chosen answer has the larger reward", "Log-probabilities of chosen and rejected answers",
        "accuracies, held out", "DPO", "Pairs, count", "Pairs, mean chosen", "12.5", "p50: 11",
    ):  # fmt: skip
        assert words in page.text, words
    assert source.count("<svg") == 1 + 4 + 1  # loss, the method's, lengths
    told = "fell from -55.5 to -125.5, and that of logps/rejected from -71 to -211"
    assert (told in page.text) is falls and ("such as method.dpo.sft_weight" in page.text) is falls


@pytest.mark.parametrize("name", ["sft", "a_method_to_come"])
def test_methods_without_charts_have_none(tmp_path, name):
    fill_pairs(tmp_path, name)
    text = Page(write_report(tmp_path)[0]).text
    assert "Loss, nats per trained token" in text and "Margin" not in text


def colors(png_path: Path) -> int:
    pixels = imread(png_path)
    return len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0))


def test_the_picture_shows_both_curves(report):
    pixels = imread(report[1])[..., :3]
    assert pixels.shape[:2] == (900, 1350)
    for color in ("#2e6db4", "#c9651a"):
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(pixels - wanted).max(axis=-1) < 0.01).sum() > 100


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (5, 10), (109, 120), (1, 1), (3, 100_000)])
def test_wilson_interval_equals_scipy(correct, total):
    oracle = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(correct, total) == pytest.approx((oracle.low, oracle.high), abs=1e-7)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_what_is_no_share(correct, total):
    with pytest.raises(ValueError, match="is no share"):
        wilson_interval(correct, total)
