"""`jaxft compare` without a model: rows and examples, choosing on dev rows, the cache, interruptions, and the page."""

import functools
import http.server
import importlib.util
import json
import threading
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

import jaxft
from jaxft.assets import ASSETS
from jaxft.comparison import compare as comparing
from jaxft.comparison.examples import Bm25, Fixed, Own, choosers
from jaxft.comparison.leaks import near_leaks
from jaxft.comparison.plan import Budget, OutOfTime, Plan
from jaxft.comparison.prompts import SystemPrompt, conversation_with, prompt_messages, prompt_tokens
from jaxft.comparison.rivals import endpoint, models
from jaxft.comparison.rivals import local as rivals
from jaxft.comparison.rivals.cache import AnswerCache
from jaxft.comparison.rivals.local import shared
from jaxft.comparison.rows import Row, load_rows, split_rows
from jaxft.comparison.trained.training import Trained
from jaxft.config import DataConfig
from jaxft.data import load_tokenizer, tokenizer_of
from jaxft.data.deep.words import grams_of, jaccard, words_of
from jaxft.data.formats import read_row
from jaxft.errors import ConfigError, DataError
from jaxft.evaluation.statistics import wilson_interval
from jaxft.runs.scores.answers import AnsweredRow

WORDS = "red green blue refund cancel late order please broken number seven".split()


def row(question: str, answer: str, name: str = "row", system: str | None = None) -> Row:
    head = [] if system is None else [{"role": "system", "content": system}]
    turns = [*head, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    data = DataConfig(train="rows.jsonl")
    return Row(conversation=read_row({"messages": turns}, data, row=0, where=name), data=data, name=name)


@functools.cache
def short_row(question: str, answer: str) -> Row:
    return row(question, answer)


def some_rows(generator: np.random.Generator, count: int, name: str) -> list[Row]:
    """Rows of few words, so that some questions occur again."""
    texts = [" ".join(generator.choice(WORDS, 2)) for _ in range(count)]
    return [replace(short_row(text, str(n % 3)), name=f"{name} {n}") for n, text in enumerate(texts)]


def test_no_row_is_in_two_parts():
    for seed in range(200):
        generator = np.random.default_rng(seed)
        train, held_out = some_rows(generator, 40, "train"), some_rows(generator, 8, "held out")
        split = split_rows(train, held_out, seed)
        asked = {one.words for one in held_out}
        dev, examples, every = ({one.words for one in part} for part in (split.dev, split.examples, split.train))
        assert not asked & every and not dev & examples and dev | examples == every
        for chooser in (Fixed(split.examples, seed, 1), Bm25(split.examples)):
            found = [one.words for question in split.dev[:2] for one in chooser.examples(question, 4)]
            assert not {*found} & (dev | asked)
        assert {*split.leaked} == {one.name for one in held_out if one.words in {other.words for other in train}}


def test_parts_have_the_sizes_that_are_said_and_contradictions_are_counted():
    rows = [row(f"question {number}", "yes", str(number)) for number in range(400)]
    split = split_rows(rows, [], 0, dev_rows=25)
    assert (len(split.dev), len(split.examples), split.trained, split.contradictions) == (25, 375, 400, 0)
    assert len(split_rows(rows, [], 0).dev) == 40 and len(split_rows(rows[:1], [], 0).dev) == 0
    again = split_rows([*rows, row("Question 7?", "no"), row("question 8", "yes")], [], 0)
    assert again.contradictions == 2


def test_bm25_by_hand():
    rows = [row("a a b", "1", "0"), row("b c", "2", "1"), row("d", "3", "2")]
    found = Bm25(rows)
    mean = 2.0
    idf_a, idf_b = np.log(1 + 2.5 / 1.5), np.log(1 + 1.5 / 2.5)
    weight = lambda count, length: count / (count + 1.5 * (0.25 + 0.75 * length / mean))  # noqa: E731
    of_a, of_b = [idf_a * weight(2, 3), 0, 0], [idf_b * weight(1, 3), idf_b * weight(1, 2), 0]
    for text, expected in {
        "a B x": np.add(of_a, of_b),
        "b a a": np.add(of_a, of_a) + of_b,
        "x": [0] * 3,
        "": [0] * 3,
    }.items():
        np.testing.assert_allclose(found.scores(text), expected, rtol=1e-12)
    assert [one.name for one in found.examples(row("a b", "x"), 2)] == ["1", "0"]


def test_bm25_takes_the_first_of_equal_rows_and_needs_no_word():
    rows = [row(text, "x", str(number)) for number, text in enumerate(["b a", "c", "a b", "c", "B, A!"])]
    found = Bm25(rows)
    assert [one.name for one in found.examples(row("a b", "x"), 3)] == ["4", "2", "0"]
    for text in ("zebra", "?!"):  # nothing is shared
        assert [one.name for one in found.examples(row(text, "x"), 2)] == ["1", "0"]
    for without in ([row("?", "x", "0"), row("...", "x", "1")], []):
        assert [one.name for one in Bm25(without).examples(row("a", "x"), 1)] == [one.name for one in without[:1]]


def test_without_its_library_bm25_is_refused_at_once(stub, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bm25s: pip install 'jaxft\[compare\]'"):
        run(stub)
    assert not stub.asked
    run(stub, choose=("fixed",))


def test_fewer_fixed_examples_are_the_first_of_more_and_draws_differ():
    rows = [row(str(number), "x", str(number)) for number in range(30)]
    one, other = Fixed(rows, 0, 0), Fixed(rows, 0, 1)
    assert one.examples(rows[0], 8)[:2] == one.examples(rows[1], 2) != other.examples(rows[0], 2)


def test_examples_are_turns_under_the_question_s_own_system_message():
    question = row("why?", "because", system="Be brief.")
    examples = [row("who?", "me", system="Be long."), row("where?", "here")]
    made = conversation_with(question, examples)
    assert [one["content"] for one in made.messages] == [
        "Be brief.", "who?", "me", "where?", "here", "why?", "because",
    ]  # fmt: skip
    assert made.first_trained == question.conversation.first_trained + 4
    tokenizer = load_tokenizer(ASSETS / "smoke")
    tokens, reference = prompt_tokens(tokenizer, question, examples)
    text = tokenizer.decode(tokens)
    assert reference == "because" and "because" not in text and text.index("here") < text.index("why?")
    other = prompt_messages(tokenizer, question, examples, SystemPrompt(name="x", text="Rhyme."))
    assert other[0] == {"role": "system", "content": "Rhyme."} and other[-1] == {"role": "user", "content": "why?"}


def test_plain_prompts_have_examples_before_them_and_no_system_message():
    data = DataConfig(train="rows.jsonl")
    plain = [
        Row(conversation=read_row({"prompt": p, "completion": c}, data, row=0, where=p), data=data, name=p)
        for p, c in (("2+2=", "4"), ("1+1=", "2"))
    ]
    assert conversation_with(plain[0], plain[1:]).prompt == "1+1=2\n\n2+2="
    with pytest.raises(ConfigError, match="no room for the system message 'x'"):
        conversation_with(plain[0], [], SystemPrompt(name="x", text="Rhyme."))


def test_the_tokens_that_all_prompts_share():
    assert shared([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]]) == 2 and shared([[1, 2], [1, 2]]) == 1


# A model that answers rightly if the question, or an example that it was given, has the row's answer in it.


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """What a comparison needs of models, without any: counts the prompts that were generated for, by their tokens."""
    asked, state = [], SimpleNamespace(stop_after=None, tuned=lambda number: "right", runs={})
    tokenizer = tokenizer_of(jaxft.get_config("configs/quickstart.py:smoke"))

    def answer_prompts(module, tokens, prompts, *, kept=(), save=lambda rows: None, between=lambda: None, **_):
        done = list(kept)
        while len(done) < len(prompts):
            between()
            if state.stop_after is not None and len(asked) >= state.stop_after:
                raise KeyboardInterrupt
            asked.append(tuple(prompts[len(done)]))
            text = (
                state.runs.get(module, state.tuned)(len(done))
                if module != "base"
                else f"{tokenizer.decode(prompts[len(done)]).count('user')}"
            )
            done.append(
                AnsweredRow(
                    text=text, prompt_tokens=len(prompts[len(done)]), answer_tokens=1, seconds=0.5, finish_reason="stop"
                )
            )
            save(done)
        return done

    def run_rival(run, config, cache, memory, between):
        return rivals.Local(
            run.rpartition("/")[2], "tuned", tokenizer=tokenizer, config=config, digest=run, cache=cache,
            load=lambda: run.rpartition("/")[2], positions=4096, between=between,
        )  # fmt: skip

    monkeypatch.setattr(rivals, "answer_prompts", answer_prompts)
    monkeypatch.setattr(rivals, "memory", lambda *_: {"memory_bytes": 2**29, "memory_by": "arithmetic"})
    monkeypatch.setattr(
        rivals,
        "mean_states",
        lambda module, tokens, texts: [np.array([len(text), 1.0, text.count("e")]) for text in texts],
    )
    monkeypatch.setattr(models.Memory, "load", lambda self, name, make: "base")
    monkeypatch.setattr(comparing, "run_rival", run_rival)
    state.asked, state.folder = asked, tmp_path / "to"
    rows = [json.loads(line) for line in (ASSETS / "quickstart" / "train.jsonl").read_text().splitlines()[:60]]
    for name, part in (("train", rows[:40]), ("held", rows[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in part))
    overrides = {
        "data.train": str(tmp_path / "train.jsonl"), "data.eval": str(tmp_path / "held.jsonl"), "data.limit": None,
        "data.eval_limit": None, "eval.limit": None, "eval.metric": "regex,json_valid", "eval.pattern": "^[right59]+$",
        "data.max_length": 2048,
    }  # fmt: skip
    state.config = jaxft.get_config("configs/quickstart.py:smoke", overrides)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"seconds": {"training": 36.0}}')
    state.options = {
        "to": str(state.folder), "runs": (str(tmp_path / "run"),), "shots": (1, 2), "choose": ("fixed", "bm25"),
        "draws": 1, "usd_per_hour": 1.0,
    }  # fmt: skip
    return state


def run(stub, **options):
    return comparing.compare(stub.config, **{**stub.options, **options})


def test_a_comparison_from_end_to_end(stub):
    result = run(stub)
    dev = {(one["k"], one["name"]): one for one in result["dev"]}
    assert (
        len(dev) == 5 and sum(one["chosen"] for one in dev.values()) == 1 and all(o["rows"] == 4 for o in dev.values())
    )
    names = [way["name"] for way in result["ways"]]
    assert names[0] == "smoke, zero-shot" and names[-1] == "run" and len(names) in (2, 3)
    tuned = result["ways"][-1]
    assert tuned["correct"] == 20 and tuned["metrics"]["json_valid"]["correct"] == 0 and tuned["values"] == [True] * 20
    assert result["main"]["tuned"] == "run" and result["rows"]["looks"] == len(names)
    assert {pair["first"] for pair in result["pairs"]} >= {"run"}
    assert all(pair["p_holm"] >= pair["p"] for pair in result["pairs"])
    assert result["verdict"]["sentence"].startswith("Tuning pays: +")
    cost, by_name = result["cost"], {way["name"]: way for way in result["ways"]}
    prompt = by_name[result["main"]["prompt"]]
    assert tuned["usd_per_1000"] == pytest.approx(1000 * tuned["seconds_side_by_side"] / 3600)
    assert cost["training"] == {"hours": 0.01, "usd": pytest.approx(0.01)}
    dearer = prompt["usd_per_1000"] - tuned["usd_per_1000"]
    assert cost["break_even_calls"] == ("never" if dearer <= 0 else pytest.approx(1000 * 0.01 / dearer))
    assert json.loads((stub.folder / "compare.json").read_text()) == result


def test_a_second_call_generates_nothing_and_writes_the_same(stub):
    run(stub)
    written = {path.name: path.read_bytes() for path in stub.folder.rglob("*") if path.is_file()}
    count = len(stub.asked)
    run(stub)
    assert len(stub.asked) == count
    assert {path.name: path.read_bytes() for path in stub.folder.rglob("*") if path.is_file()} == written


def test_a_page_for_others_has_no_texts_of_rows(stub):
    result = run(stub)
    page, count = stub.folder / "compare.html", len(stub.asked)
    changed = [row for part in result["changed"].values() for row in part]
    texts = {"Rows that changed", *(row["question"] for row in changed)}
    assert changed and all(text in Page(page.read_text(encoding="utf-8")).words for text in texts)
    assert run(stub, hide_rows=True) == result and len(stub.asked) == count
    hidden = Page(page.read_text(encoding="utf-8")).words
    assert not texts & set(hidden) and result["verdict"]["sentence"] in hidden


def test_killed_anywhere_it_goes_on(stub):
    for stop_after in range(3, 700, 53):
        stub.stop_after = stop_after
        try:
            result = run(stub)
            break
        except KeyboardInterrupt:
            continue
    assert result["verdict"]["kind"] == "tuning"
    answers = [path for path in (stub.folder / "answers").glob("*.jsonl")]
    assert len(stub.asked) < 700 and all(len(path.read_text().splitlines()) in (4, 20) for path in answers)


def test_the_peak_that_devices_say_takes_the_place_of_arithmetic(stub, monkeypatch):
    monkeypatch.setattr(rivals, "peak_bytes", lambda call, devices: 2**30)
    result = run(stub, shots=(1,))
    assert {(way["memory_bytes"], way["memory_by"]) for way in result["ways"]} == {(2**30, "devices")}
    words = Page((stub.folder / "compare.html").read_text(encoding="utf-8")).words
    assert words.count("measured") == len(result["ways"]) and "by arithmetic" not in words


def test_minutes_leave_out_what_is_dearest_and_the_same_call_goes_on(stub):
    now = iter(range(10**6))
    plan = Plan(**{**stub.options, "minutes": 1.0})
    budget = Budget(plan.minutes, clock=lambda: next(now))
    result = comparing.carry_out(plan, stub.config, budget=budget)
    assert result["left_out"] and result["verdict"]["kind"] in ("one side", "tuning")
    assert not any("zero-shot on the dev rows" in text for text in result["left_out"])
    assert run(stub)["left_out"] == []
    with pytest.raises(OutOfTime):
        Budget(1e-9, clock=iter([0.0, 1.0]).__next__).check()


def test_a_requirement_and_a_side_alone(stub):
    assert run(stub, require="tuned>prompt")["require"] == {"text": "tuned>prompt", "met": True}
    assert run(stub, require="prompt>=tuned")["require"]["met"] is False
    alone = run(stub, runs=(), ways=("zero", "shots"))
    assert alone["verdict"]["kind"] == "one side" and alone["main"] is None


def test_the_tuned_model_without_the_system_message_is_a_way_of_its_own(stub):
    result = run(stub, ways=("zero", "shots", "tuned", "bare"), shots=(1,), choose=("own",), draws=1)
    tuned, bare = result["ways"][-2:]
    assert bare["name"] == "run, without the system message" and bare["side"] == "tuned"
    assert 0 < bare["prompt_tokens"] < tuned["prompt_tokens"] and result["main"]["tuned"] == "run"
    compared = [(pair["first"], pair["second"]) for pair in result["pairs"]]
    assert compared[-2:] == [(bare["name"], "run"), (bare["name"], result["main"]["prompt"])]
    assert [one["name"] for one in result["dev"]] == ["zero-shot", "1 examples (own)"]
    rows = [json.loads(line)["messages"][1:] for line in open(stub.config.data.eval, encoding="utf-8")]
    bare_rows = stub.folder.parent / "bare.jsonl"
    bare_rows.write_text("".join(json.dumps({"messages": one}) + "\n" for one in rows))
    stub.config = replace(stub.config, data=replace(stub.config.data, eval=str(bare_rows)))
    with pytest.raises(ConfigError, match="no held-out row has one: leave bare out"):
        run(stub, ways=("zero", "tuned", "bare"))


def test_examples_by_the_model_s_own_states_are_those_of_the_nearest_vectors():
    generator = np.random.default_rng(0)
    vectors = {str(number): generator.normal(size=5) + 10 for number in range(30)}
    rows = [row(text, "x", text) for text in vectors]
    own = Own(rows[:20], lambda texts: np.stack([vectors[text] for text in texts]))
    mean = np.mean([vectors[str(number)] for number in range(20)], axis=0)
    for question in rows[20:]:
        asked = vectors[question.name] - mean
        cosine = [
            float((vectors[one.name] - mean) @ asked / np.linalg.norm(vectors[one.name] - mean) / np.linalg.norm(asked))
            for one in rows[:20]
        ]
        best = sorted(range(20), key=lambda index: cosine[index])[-3:]
        assert [one.name for one in own.examples(question, 3)] == [str(index) for index in best]
    assert own.over(rows[20:]).examples(rows[25], 1) == [rows[25]]


def test_near_leaks_are_those_of_all_pairs():
    generator = np.random.default_rng(0)
    words = [f"w{number}" for number in range(3_000)]
    train = [" ".join(generator.choice(words, 30)) for _ in range(60)]
    held_out = [" ".join(generator.choice(words, 30)) for _ in range(20)]
    held_out[3] = train[5].replace(" ", ", ", 3).upper()
    held_out[4] = " ".join([*train[6].split()[:29], "other"])  # 25 of 27 different 5-grams are shared
    held_out[5] = " ".join([*train[7].split()[:13], *held_out[5].split()[13:]])  # 13 words in a row
    held_out[6] = " ".join([*train[8].split()[:12], *held_out[6].split()[12:]])  # 12 are too few
    train[9], held_out[7] = "go on please", "go on please"  # too short to say anything
    assert near_leaks(train, held_out) == {3: 5, 4: 6, 5: 7}
    for text, other in ((held_out[4], train[6]), (held_out[6], train[8])):
        own, its = (grams_of(words_of(one)) for one in (text, other))
        assert (jaccard(own, its) >= 0.8) == (text == held_out[4])
    template = " ".join(words[:15])
    with_template = [f"{template} own{number} {text}" for number, text in enumerate([*train, *held_out[8:]])]
    assert near_leaks(with_template[:60], with_template[60:]) == {}


def test_rows_that_nearly_stand_in_training_are_named_and_the_score_is_told_without_them(stub):
    held = [json.loads(line) for line in open(stub.config.data.eval, encoding="utf-8")]
    train = [json.loads(line) for line in open(stub.config.data.train, encoding="utf-8")]
    for number in (2, 5):
        train[number]["messages"][1]["content"] = held[number]["messages"][1]["content"] + " Thanks"
    with open(stub.config.data.train, "w", encoding="utf-8") as file:
        file.write("".join(json.dumps(one) + "\n" for one in train))
    stub.tuned = lambda number: "wrong" if number == 2 else "right"
    result = run(stub)
    assert [name.rpartition(" ")[2] for name in result["rows"]["near"]] == ["3", "6"] and not result["rows"]["leaked"]
    assert result["verdict"]["kind"] == "data" and "2 of 20 held-out questions" in result["verdict"]["sentence"]
    tuned = result["ways"][-1]
    assert tuned["value"] == 0.95 and tuned["without_leaks"] == 1.0 and result["without_leaks"]["rows"] == 18
    assert "Without these rows" in (stub.folder / "compare.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words, self.inside = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.inside.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        if self.inside[-1:] != ["style"] and data.strip():
            self.words.append(data.strip())


def test_the_page_begins_with_the_verdict_and_needs_no_other_file(stub):
    stub.tuned = lambda number: "right" if number % 2 else "<script>alert(1)</script>"
    result = run(stub)
    page = Page((stub.folder / "compare.html").read_text(encoding="utf-8"))
    assert not page.tags & {"link", "script", "iframe", "img"}
    assert all(address.startswith("#") for address in page.addresses)
    body = page.words[page.words.index("Was it worth it? · regex") + 1 :]
    assert next(text for text in body if not text.startswith(":root")) == result["verdict"]["sentence"]
    assert "cost against calls" in (stub.folder / "compare.html").read_text() and "run" in page.words
    assert page.words[page.words.index("0.5") + 1] == "by arithmetic"
    other = page.words.index("json_valid", page.words.index("Parts and other metrics"))
    low, high = wilson_interval(0, 20)
    assert page.words[other + len(result["ways"])] == f"0.0% ({low:.1%} to {high:.1%})"


def test_the_page_says_that_the_figure_is_an_average_and_whose_the_changed_rows_are(stub, monkeypatch):
    trained = []
    for seed, right in enumerate((10, 14, 19)):
        folder = stub.folder.parent / f"lora-seed{seed}"
        folder.mkdir()
        trained.append(Trained(name=folder.name, folder=folder, method="lora", seed=seed, rows=40, share=1.0))
        stub.runs[folder.name] = lambda number, right=right, seed=seed: "right" if number < right else f"wrong {seed}"
    monkeypatch.setattr(comparing, "Trainer", lambda *_: SimpleNamespace(methods=lambda: trained))
    result = run(stub, ways=("zero", "tuned"), runs=(), methods=("lora",), seeds=3)
    main, seeds = result["main"], result["seeds"]["lora"]
    assert (main["tuned"], main["method"], main["runs"]) == ("lora-seed1", "lora", 3)
    assert seeds["mean"] == pytest.approx(43 / 60) and seeds["shown"] == "lora-seed1"
    zero = result["ways"][0]["value"]
    assert main["difference"] == pytest.approx(43 / 60 - zero) == pytest.approx(result["pairs"][0]["difference"])
    assert result["pairs"][0]["first"] == "lora, average of 3 trainings" and len(result["pairs"]) == 4
    changed = [one["tuned"] for part in result["changed"].values() for one in part]
    assert set(changed) <= {"right", "wrong 1"} and "right" in changed

    words = Page((stub.folder / "compare.html").read_text(encoding="utf-8")).words
    first = words.index(result["verdict"]["sentence"])
    assert "on average of 3 trainings (50 % to 95 %)" in words[first]
    assert words[first + 1] == (
        "The tuned side is the average of 3 trainings by lora, each from a seed of its own: 71.7% (from 50.0% to "
        "95.0%). Costs and the rows that changed are those of lora-seed1, whose score is nearest to that average."
    )
    table = words[words.index("lora, average of 3 trainings") :]
    assert table[:3] == ["lora, average of 3 trainings", "71.7%", "3 runs"] and table[3] == "50.0% to 95.0%"
    places = [table.index(f"lora-seed{seed}") for seed in range(3)]
    assert places == sorted(places)
    assert table[table.index("lora-seed1") + 1] == "nearest to the average"
    assert "lora-seed1, one of 3 trainings, against smoke, zero-shot." in words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": ("zero", "few")}, "'few' is not one of zero, shots, tuned, bare"),
        ({"choose": ("near",)}, "'near' is not one of fixed, bm25, own"),
        ({"ways": ("zero", "bare"), "runs": ()}, "leave tuned in --ways"),
        ({"topology": "v5e:1x1"}, "leave one of them out"),
        ({"margin": 0.0}, "margin=0.0 must be above 0"),
        ({"runs": ()}, "the way tuned needs a model"),
        ({"shots": (40,)}, "--shots=40: 40 examples are more than the 36 training rows"),
        ({"require": "tuned"}, "write tuned>prompt"),
        ({"shot": 3}, "compare has no option 'shot'. Did you mean 'shots'?"),
        ({"prompts": "absent.json"}, "cannot be read"),
        ({"cluster": "day"}, "has no such column"),
        ({"endpoint": "gpt"}, "set JAXFT_COMPARE_BASE_URL"),
        ({"models": ("absent",)}, "absent"),
    ],
)
def test_what_is_refused(stub, monkeypatch, options, message):
    monkeypatch.delenv(endpoint.BASE_URL, raising=False)
    with pytest.raises((ConfigError, jaxft.errors.CheckpointError, jaxft.errors.ModelError), match=message):
        run(stub, **options)


def test_a_metric_that_cannot_score_is_refused_before_anything_is_answered(stub, tmp_path):
    (tmp_path / "mine.py").write_text("def wrong(completions):\n    return 1\n")
    metric = f"json_valid,{tmp_path}/mine.py:wrong"
    stub.config = replace(stub.config, eval=replace(stub.config.eval, metric=metric, pattern=None))
    with pytest.raises(ConfigError, match="metric wrong of .* returned a value of type int"):
        run(stub)
    assert not stub.asked


def test_examples_that_would_cut_a_row_are_refused_with_it(stub, monkeypatch):
    shape = SimpleNamespace(max_position_embeddings=700)
    monkeypatch.setattr(models, "abstract_model", lambda config: SimpleNamespace(config=shape))
    with pytest.raises(ConfigError, match=r"--shots=2: 2 examples would cut a row: .*jsonl line \d+ has a prompt of"):
        run(stub, shots=(2,))
    shape.max_position_embeddings = 1200
    result = run(stub, shots=None)
    assert len(result["refused"]) == 1 and "8 examples would cut a row" in result["refused"][0]
    # What was tried fits before every row, and the next number of examples not before some row.
    room, tokenizer = 1200 - stub.config.eval.max_new_tokens, tokenizer_of(stub.config)
    assert {one["k"] for one in result["dev"]} == {0, 2, 4} and max(map(len, stub.asked)) <= room
    split = load_rows(stub.config, tokenizer)
    of_dev = choosers(("fixed", "bm25"), split.examples, split.seed, 1, None)
    of_held_out = [one.over(split.train) for one in of_dev]
    lengths = [
        len(prompt_tokens(tokenizer, asked, chooser.examples(asked, 8))[0])
        for rows, over in ((split.dev, of_dev), (split.held_out, of_held_out))
        for asked in rows
        for chooser in over
    ]
    assert max(lengths) > room


def test_other_system_messages_are_tried(stub, tmp_path):
    (tmp_path / "prompts.json").write_text('{"short": "Reply briefly."}')
    result = run(stub, prompts=str(tmp_path / "prompts.json"), shots=(1,), choose=("bm25",))
    assert [one["name"] for one in result["dev"]] == [
        "zero-shot", "zero-shot, prompt short", "1 examples (bm25)", "1 examples (bm25), prompt short",
    ]  # fmt: skip
    (tmp_path / "prompts.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must be a JSON object of names and texts"):
        run(stub, prompts=str(tmp_path / "prompts.json"))


class Server(http.server.BaseHTTPRequestHandler):
    """Chat completions that repeat the number of messages; the first request fails, and one with `bad` in it always."""

    requests: list[tuple[str | None, dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.requests.append((self.headers["Authorization"], body))
        bad = "bad" in body["model"]
        if bad or len(Server.requests) == 1:
            self.send_error(400 if bad else 503)
            return
        message = {"role": "assistant", "content": f"<think>x</think>{len(body['messages'])}"}
        answer = {
            "choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 5},
        }
        content = json.dumps(answer if body["model"] != "strange" else {"error": "no"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    Server.requests = []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv(endpoint.BASE_URL, f"http://127.0.0.1:{running.server_port}/v1/")
    monkeypatch.setenv(endpoint.API_KEY, "secret-key")
    yield running
    running.shutdown()


def test_an_endpoint_answers_the_same_rows_with_the_same_metric(server, stub, tmp_path):
    split = load_rows(stub.config, tokenizer_of(stub.config))
    cache, waits = AnswerCache(tmp_path / "cache"), []
    tokenizer = tokenizer_of(stub.config)
    rival = endpoint.Endpoint("m", tokenizer=tokenizer, config=stub.config, cache=cache, wait=waits.append)
    answered = rival.answer(split.held_out, lambda row: split.train[:2])
    assert [one.text for one in answered.rows] == ["6"] * 20  # a system message, two examples and the question
    assert answered.references == tuple(prompt_tokens(tokenizer, one, ())[1] for one in split.held_out)
    assert waits == [2.0] and {key for key, _ in Server.requests} == {"Bearer secret-key"}
    assert Server.requests[-1][1]["temperature"] == 0 and Server.requests[-1][1]["max_tokens"] == 8
    count = len(Server.requests)
    assert rival.answer(split.held_out, lambda row: split.train[:2]) == answered and len(Server.requests) == count
    assert not any(b"secret-key" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for model, message in (("bad", "did not answer: HTTP 400"), ("strange", "another form than OpenAI's chat")):
        other = endpoint.Endpoint(model, tokenizer=tokenizer, config=stub.config, cache=cache, wait=waits.append)
        with pytest.raises(DataError, match=message):
            other.answer(split.held_out[:1], lambda row: ())


def test_an_endpoint_is_a_way_with_the_price_of_its_tokens(server, stub):
    result = run(stub, endpoint="rival", endpoint_usd="1,10", ways=("zero", "tuned"))
    (way,) = [one for one in result["ways"] if one["kind"] == "endpoint"]
    assert way["name"] == "rival, zero-shot" and way["usd_per_1000"] == pytest.approx(0.15)
    assert [one["model"] for one in result["dev"]] == ["smoke", "rival"]  # the better of them is chosen there
