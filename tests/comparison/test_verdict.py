"""Verdicts from planted scores: each its sentence, and none that one row flips unless the interval is at the margin."""

import dataclasses
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from jaxft.comparison.costs import Prices, break_even, modelled_seconds, prices_of, prices_of_calls, training_cost
from jaxft.comparison.verdict import Evidence, Side, Trainings, compare_values, is_met, judge, parse_requirement
from jaxft.errors import ConfigError
from jaxft.evaluation.statistics import Pairs, mcnemar, newcombe_interval

MARGIN = 0.02


def evidence(both, tuned, prompt, neither, **others) -> Evidence:
    """Right or wrong answers to the same rows: numbers of those that both, one side alone, or neither has right."""
    of_tuned = [1] * both + [1] * tuned + [0] * prompt + [0] * neither
    of_prompt = [1] * both + [0] * tuned + [1] * prompt + [0] * neither
    n, seconds = len(of_tuned), others.pop("seconds", (None, None))
    sides = {"tuned": sum(of_tuned) / n, "prompt": sum(of_prompt) / n}
    return Evidence(
        prompt=Side(name="16 by bm25", value=sides["prompt"], seconds=seconds[0]),
        tuned=Side(name="run", value=sides["tuned"], seconds=seconds[1]),
        compared=compare_values(of_tuned, of_prompt, passes=True, margin=MARGIN),
        margin=MARGIN,
        passes=True,
        **{"trained": 402, **others},
    )


PLANTED = {
    "tuned far better": (
        (40, 55, 5, 20, {"seconds": (1.2, 0.8)}),
        "Tuning pays: +42 points (+31 to +51) over the best prompt (16 by bm25), p < 0.001, and 0.4 s a call less.",
    ),
    "tuned better and slower": (
        (40, 55, 5, 20, {"seconds": (0.5, 1.0), "break_even": "never"}),
        "Tuning pays: +42 points (+31 to +51) over the best prompt (16 by bm25), p < 0.001, and 0.5 s a call more."
        " Its calls cost no less, so it never pays by cost.",
    ),
    "tuned better, slower alone, cheaper side by side": (
        (40, 55, 5, 20, {"seconds": (1.0, 1.3), "break_even": 2461.5}),
        "Tuning pays: +42 points (+31 to +51) over the best prompt (16 by bm25), p < 0.001, and 0.3 s a call more if "
        "it comes alone. It has paid for itself by calls that are cheaper side by side from 2,500 calls.",
    ),
    "tuned better and cheaper": (
        (40, 55, 5, 20, {"break_even": 4127.3, "months": 0.41}),
        "Tuning pays: +42 points (+31 to +51) over the best prompt (16 by bm25), p < 0.001. It has paid for itself"
        " by cheaper calls from 4,100 calls, after 0.41 months.",
    ),
    "as good, cheaper": (
        (3200, 20, 10, 770, {"break_even": 410_312.0}),
        "Prompts do: 16 by bm25 reaches 80 %, tuning 80 % (0 to +1). Tuning pays by cost alone from 410,000 calls.",
    ),
    "as good, dearer": (
        (3200, 20, 10, 770, {"break_even": "never"}),
        "Prompts do: 16 by bm25 reaches 80 %, tuning 80 % (0 to +1). Tuning never pays by cost.",
    ),
    "prompt better, few rows": (
        (20, 5, 60, 35, {"trained": 40}),
        "Do not tune with these rows: the best prompt (16 by bm25) is ahead, tuning -46 points (-55 to -35), "
        "p < 0.001. Likeliest reason: few rows (40).",
    ),
    "prompt better, still falling": (
        (20, 5, 60, 35, {"falling": True}),
        "Do not tune with these rows: the best prompt (16 by bm25) is ahead, tuning -46 points (-55 to -35), "
        "p < 0.001. Likeliest reason: the held-out loss was still falling when training ended.",
    ),
    "prompt better, no reason": (
        (20, 5, 60, 35, {}),
        "Do not tune with these rows: the best prompt (16 by bm25) is ahead, tuning -46 points (-55 to -35), "
        "p < 0.001. The reason is not known: look at the rows that changed, and at the labels.",
    ),
    "few rows, small difference": (
        (40, 8, 5, 7, {}),
        "Cannot be told with 60 rows: tuning +5 points (-7 to +17) against the best prompt (16 by bm25), and the "
        "margin is 2 points; about 1,900 would do.",
    ),
    "at the margin": (
        (40, 11, 9, 40, {}),
        "Cannot be told with 100 rows: tuning +2 points (-7 to +11) against the best prompt (16 by bm25), and the "
        "margin is 2 points; more than 100,000 would be needed.",
    ),
    "leakage": (
        (40, 55, 5, 20, {"leaked": 12}),
        "Mend the data first: 12 of 120 held-out questions are in the training set too. As they are: Tuning pays: +42 "
        "points (+31 to +51) over the best prompt (16 by bm25), p < 0.001.",
    ),
    "contradictions, and it forgot": (
        (40, 55, 5, 20, {"contradictions": 30, "forgot": "It forgot: 12 of 200 formats are no longer followed."}),
        "Mend the data first: 30 of 402 training rows have another answer to the same question elsewhere. As they are: "
        "Tuning pays: +42 points (+31 to +51) over the best prompt (16 by bm25), p < 0.001. It forgot: 12 of 200 "
        "formats are no longer followed.",
    ),
    "average, better": (
        (40, 55, 5, 20, {"trainings": Trainings(count=3, mean=0.79, low=0.7, high=0.86)}),
        "Tuning pays: +42 points (+31 to +51) over the best prompt (16 by bm25) on average of 3 trainings "
        "(70 % to 86 %), p < 0.001.",
    ),
    "average, worse": (
        (20, 5, 60, 35, {"falling": True, "trainings": Trainings(count=2, mean=0.21, low=0.1, high=0.3)}),
        "Do not tune with these rows: the best prompt (16 by bm25) is ahead, tuning -46 points (-55 to -35) on "
        "average of 2 trainings (10 % to 30 %), p < 0.001. Likeliest reason: the held-out loss was still falling when "
        "training ended.",
    ),
    "average, open": (
        (40, 8, 5, 7, {"trainings": Trainings(count=3, mean=0.8, low=0.75, high=0.85)}),
        "Cannot be told with 60 rows: tuning +5 points (-7 to +17) on average of 3 trainings (75 % to 85 %) against "
        "the best prompt (16 by bm25), and the margin is 2 points; about 1,900 would do.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_scores_get_their_sentence(name):
    (*counts, others), sentence = PLANTED[name]
    assert judge(evidence(*counts, **others)).sentence == sentence


def test_one_leaked_row_of_many_is_passed_over():
    assert judge(evidence(40, 55, 5, 20, leaked=1, contradictions=4)).kind == "tuning"
    assert judge(evidence(40, 55, 5, 20, leaked=2)).kind == "data"
    nearly = judge(evidence(40, 55, 5, 20, leaked=1, near=2))
    assert "3 of 120 held-out questions are in the training set too, 2 of them nearly." in nearly.sentence


@pytest.mark.parametrize("name", PLANTED)
def test_one_row_flips_no_verdict_unless_the_interval_crosses_a_margin(name):
    (*counts, _), _ = PLANTED[name]
    before = evidence(*counts).compared
    for source, target in product(range(4), repeat=2):
        if counts[source] and source != target:
            changed = [count - (i == source) + (i == target) for i, count in enumerate(counts)]
            after = evidence(*changed).compared
            crossed = any(
                min(a, b) <= bound <= max(a, b)
                for a, b in zip(before.interval, after.interval, strict=True)
                for bound in (MARGIN, -MARGIN)
            )
            assert after.standing == before.standing or crossed


def test_shares_are_compared_by_mcnemar_and_newcombe_and_numbers_by_bootstrap_and_signs():
    one = evidence(40, 12, 3, 5).compared
    counted = Pairs(both=40, only_first=12, only_second=3, neither=5)
    assert (one.p, one.interval) == (mcnemar(counted), newcombe_interval(counted)) and one.pairs == counted
    several = compare_values([1] * 12 + [0] * 3, [0] * 12 + [1] * 3, passes=True, margin=MARGIN, tests=3)
    single = compare_values([1] * 12 + [0] * 3, [0] * 12 + [1] * 3, passes=True, margin=MARGIN)
    assert several.interval[0] < single.interval[0] and several.p == single.p
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 50))
    numbers = compare_values(a + 0.5, b, passes=False, margin=MARGIN)
    assert numbers.pairs is None and numbers.standing == "better" and numbers.p < 0.001
    same = compare_values(a, a, passes=False, margin=MARGIN)
    assert same.interval == (0, 0) and same.p == 1 and same.standing == "equal"
    text = judge(dataclasses.replace(evidence(40, 55, 5, 20), compared=numbers, passes=False)).sentence
    assert text.startswith(f"Tuning pays: {numbers.difference:+.3g} ({numbers.interval[0]:+.3g} to ")


def test_requirements():
    far = evidence(40, 55, 5, 20).compared
    same = evidence(3200, 20, 10, 770).compared
    met = {
        "tuned>prompt": (True, False), "tuned >= prompt": (True, True), "prompt>tuned": (False, False),
        "prompt>=tuned": (False, True),
    }  # fmt: skip
    for text, expected in met.items():
        assert tuple(is_met(parse_requirement(text), one, MARGIN) for one in (far, same)) == expected, text
    for text in ("tuned", "tuned>base", "tuned>tuned", "prompt=tuned"):
        with pytest.raises(ConfigError, match=r"write tuned>prompt"):
            parse_requirement(text)


def test_costs_by_hand(tmp_path):
    prices = prices_of(3.6, None, "2,10", 50.0)
    measured = prices_of_calls({"kind": "base", "seconds_side_by_side": 0.25, "seconds_cached": 0.2}, prices)
    assert measured == {"usd_per_1000": pytest.approx(0.25), "usd_per_1000_cached": pytest.approx(0.2)}
    endpoint = {"kind": "endpoint", "prompt_tokens": 500.0, "answer_tokens": 20.0}
    assert prices_of_calls(endpoint, prices)["usd_per_1000"] == pytest.approx((500 * 2 + 20 * 10) / 1e6 * 1000)
    assert prices_of_calls({"kind": "base"}, prices)["usd_per_1000"] is None
    assert prices_of_calls({"kind": "base", "seconds_side_by_side": 1.0}, Prices())["usd_per_1000"] is None
    (tmp_path / "summary.json").write_text('{"seconds": {"setup": 100.0, "training": 1700.0}}')
    assert training_cost(tmp_path, prices) == {"hours": 0.5, "usd": pytest.approx(0.5 * 3.6 + 50)}
    assert training_cost(tmp_path / "absent", prices) == {"hours": None, "usd": None}
    assert break_even(51.8, 0.25, 0.15) == pytest.approx(1000 * 51.8 / 0.1)
    assert break_even(51.8, 0.25, 0.25) == break_even(51.8, 0.2, 0.25) == "never"
    assert break_even(None, 0.2, 0.1) is None and break_even(1.0, 0.2, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [((-1.0, None, None, None), "usd_per_hour=-1 must be"), ((1.0, None, "3", None), "two prices"),
     ((1.0, None, "a,b", None), "two prices"), ((1.0, None, None, -2.0), "label_usd=-2 must be")],
)  # fmt: skip
def test_prices_that_are_none_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        prices_of(*options)


def test_a_cpu_has_no_price():
    assert prices_of(None, None, None, None) == Prices(source="no price of this machine is known: give --usd_per_hour")


def test_another_topology_is_priced_by_arithmetic(tmp_path, monkeypatch):
    (tmp_path / "prices.json").write_text('{"date": "2026-01-01", "chips": {"v5e": {"on_demand": 1.5, "spot": null}}}')
    prices = prices_of(None, str(tmp_path / "prices.json"), None, None, "v5e:2x2")
    chip = prices.topology.chip
    assert (
        prices.per_hour == 6.0 and prices.source == "v5e:2x2 on demand, 2026-01-01; seconds by arithmetic, not measured"
    )
    way = {
        "kind": "base", "active_parameters": 10**9, "parameters": 12 * 10**8, "slots": 8,
        "cache_bytes_per_token": 4_000, "cache_item_bytes": 4,
        "prompt_tokens": 300.0, "shared_tokens": 200, "answer_tokens": 20.0,
    }  # fmt: skip
    flops, bandwidth = 4 * chip.flops * 0.79, 4 * chip.hbm_bandwidth * 0.8
    read = (2 * 12 * 10**8 + 8 * 2_000 * 310) / bandwidth / 8  # of a token; far above its operations
    whole, cached = modelled_seconds(way, prices.topology)
    assert whole == pytest.approx(300 * 2e9 / flops + 20 * read) and cached == pytest.approx(whole - 200 * 2e9 / flops)
    assert prices_of_calls(way, prices)["usd_per_1000_cached"] == pytest.approx(1000 * cached * 6 / 3600)
    assert modelled_seconds({"kind": "base"}, prices.topology) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "num_tokens": 400.0}\n{"step": 2, "num_tokens": 1000000.0}\n')
    for kind, operations in (("lora", 4), ("none", 6)):
        config = SimpleNamespace(adapter=SimpleNamespace(kind=kind))
        monkeypatch.setattr("jaxft.comparison.costs.run_config", lambda run, config=config: config)
        hours = training_cost(tmp_path, prices, 10**9)["hours"]
        assert hours == pytest.approx(operations * 1e9 * 1e6 / flops / 3600)
    assert training_cost(tmp_path, prices)["hours"] is None
