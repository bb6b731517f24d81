"""Deep examination of rows: planted faults are found, by row, and nothing is found in rows without faults."""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from jaxft import cli
from jaxft.config import load
from jaxft.data.deep import minhash
from jaxft.data.deep.examine import DeepExamination, examine_deep

LIBRARIES = ("rensa", "datasketch")
QUICKSTART = Path(__file__).parents[2] / "jaxft" / "assets" / "quickstart"
SYSTEM = {"role": "system", "content": "Answer in a word."}


@pytest.fixture(autouse=True)
def _needs_a_library() -> None:
    if not any(minhash.importlib.util.find_spec(name) for name in LIBRARIES):
        pytest.skip("neither rensa nor datasketch is installed")


def quickstart(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def with_texts(row: dict[str, Any], user: str | None = None, answer: str | None = None) -> dict[str, Any]:
    system, asked, answered = row["messages"]
    user, answer = user or asked["content"], answer or answered["content"]
    return {"messages": [system, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def chat(user: str, answer: str) -> dict[str, Any]:
    return {"messages": [SYSTEM, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def examined(
    folder: Path, train: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None, **settings: str
) -> DeepExamination:
    given = {"model.path": "no-model", "data.train": str(write(folder / "train.jsonl", train))}
    if held_out is not None:
        given["data.eval"] = str(write(folder / "held.jsonl", held_out))
    return examine_deep(load(None, [f"{name}={value}" for name, value in (given | settings).items()]))[0]


def five_grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[-+*/=<>%&|^~#@$€£]", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def similarity(first: str, second: str) -> float:
    one, other = five_grams(first), five_grams(second)
    return len(one & other) / len(one | other)


def user_of(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"]


def reworded(text: str, number: int) -> str:
    """A near duplicate: a word more at the end, one less, other punctuation and case, or another first word."""
    first, _, rest = text.partition(" ")
    forms = (
        f"{text} thanks",
        text.rsplit(" ", 1)[0],
        text.upper().replace(",", " ,"),
        f"Well {rest}",
        f"{first} so {rest}",
    )
    return next(form for form in forms[number % 5 :] + forms if form != text and similarity(form, text) >= 0.8)


def test_nothing_is_found_in_the_rows_of_the_quickstart(tmp_path: Path) -> None:
    found = examined(tmp_path, quickstart("train"), quickstart("heldout"), **{"eval.metric": "json_exact"})
    assert not found.questions.rows and not found.whole.rows
    assert not found.leaks and not found.contradictions and not found.odd and not found.problems and not found.dropped()


@pytest.mark.parametrize("library", LIBRARIES)
def test_planted_faults_are_found_and_nothing_else(
    tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    monkeypatch.setattr("jaxft.data.deep.table.library", lambda: library)
    rng, rows, held_out = random.Random(0), quickstart("train"), quickstart("heldout")
    chosen = rng.sample(range(len(rows)), 110)
    exact, near, opposed = chosen[:50], chosen[50:100], chosen[100:]
    copies = [rows[i] for i in exact]
    variants = [with_texts(rows[i], user=reworded(user_of(rows[i]), n)) for n, i in enumerate(near)]
    assert all(similarity(user_of(one), user_of(rows[i])) >= 0.8 for one, i in zip(variants, near, strict=True))
    other = '{"intent":"other","product":"nothing","order":null,"urgent":false}'
    contradicting = [with_texts(rows[i], answer=other) for i in opposed]
    shown = rng.sample([i for i, row in enumerate(held_out) if len(user_of(row).split()) >= 16], 10)
    leaking = [held_out[i] for i in shown[:4]]
    leaking += [with_texts(held_out[i], user=reworded(user_of(held_out[i]), i)) for i in shown[4:7]]
    cut = [
        " ".join(user_of(held_out[i]).split()[:14]) + " and what else may I ask of you here today?" for i in shown[7:]
    ]
    leaking += [with_texts(held_out[i], user=text) for i, text in zip(shown[7:], cut, strict=True)]
    added = [*copies, *variants, *contradicting, *leaking]

    found = examined(tmp_path, [*rows, *added], held_out)

    starts = list(itertools.accumulate([len(rows), 50, 50, 10]))
    assert {(pair.first, pair.second) for pair in found.whole.exact} == {
        (i, starts[0] + n) for n, i in enumerate(exact)
    }
    planted = {(i, starts[1] + n) for n, i in enumerate(near)}
    # Some variants have the same text of words, which differ in case and marks alone: near ones too.
    pairs = {(pair.first, pair.second) for pair in found.questions.near}
    assert pairs <= planted and len(pairs) >= 0.95 * len(planted)
    assert {(one.first, one.second) for one in found.contradictions} == {
        (i, starts[2] + n) for n, i in enumerate(opposed)
    }
    assert {(leak.train, leak.held_out - len(rows) - len(added)) for leak in found.leaks} == {
        (starts[3] + n, i) for n, i in enumerate(shown)
    }
    assert [leak.kind for leak in sorted(found.leaks, key=lambda leak: leak.train)] == ["exact"] * 4 + ["near"] * 3 + [
        "words"
    ] * 3


def test_pairs_are_those_of_a_true_comparison(tmp_path: Path) -> None:
    rng = random.Random(1)
    words = [f"w{i}" for i in range(400)]
    texts: list[str] = []
    for _ in range(60):
        base = rng.choices(words, k=rng.randrange(6, 60))
        texts.append(" ".join(base))
        for changes in (1, 1, 2, 4):
            changed = [*base, *rng.choices(words, k=rng.randrange(3))]
            for _ in range(changes - 1):
                changed[rng.randrange(len(changed))] = rng.choice(words)
            texts.append(" ".join(changed[rng.randrange(2) :]))
    rng.shuffle(texts)
    found = examined(tmp_path, [chat(text, f"answer {n}") for n, text in enumerate(texts)])
    for pair in (*found.questions.near, *found.questions.exact):
        assert pair.similarity == pytest.approx(similarity(texts[pair.first], texts[pair.second]))
        assert pair.similarity >= 0.8
    # Each row that is near an earlier one is left out, but for those that are near left-out rows alone.
    kept = [i for i in range(len(texts)) if i not in found.questions.rows]
    missed = [(i, j) for i, j in itertools.combinations(kept, 2) if similarity(texts[i], texts[j]) >= 0.8]
    assert len(found.questions.rows) > 60 and len(missed) <= 0.02 * len(found.questions.rows)


def test_an_instruction_that_all_questions_share_makes_no_duplicates(tmp_path: Path) -> None:
    instruction = " ".join(f"rule{i} of the desk says that you must" for i in range(30))
    things = [
        f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("boat", "lamp", "hat", "pen", "cup")
    ]
    rows = [chat(f"{instruction} describe the {thing} now", thing) for thing in things]
    found = examined(tmp_path, [*rows, rows[3]], [chat(f"{instruction} describe the violet sofa now", "sofa")])
    assert [(pair.first, pair.second) for pair in found.whole.exact] == [(3, len(rows))]
    assert not found.questions.near and not found.leaks and not found.contradictions


def test_numbers_and_words_of_the_question_explain_other_answers(tmp_path: Path) -> None:
    story = "a farmer walks to the market in the morning and sells all of the apples that he has brought with him for"
    rows = [chat(f"{story} {price}", price) for price in ("12 coins", "13 coins")]
    rows += [chat(f"{story} friends please tell me who walks", name) for name in ("the farmer", "somebody else")]
    rows += [
        chat(f"{story} gold and translate the last word", "oro"),
        chat(f"{story} gold and translate the last word!", "or"),
    ]
    found = examined(tmp_path, rows)
    assert {(one.first, one.second) for one in found.contradictions} == {(2, 3), (4, 5)}


def test_a_short_question_after_other_messages_is_another_question(tmp_path: Path) -> None:
    def follow_up(topic: str) -> dict[str, Any]:
        first = [{"role": "user", "content": f"Tell me of {topic}."}, {"role": "assistant", "content": f"{topic}!"}]
        return {"messages": [*first, {"role": "user", "content": "Go on"}, {"role": "assistant", "content": topic}]}

    found = examined(tmp_path, [follow_up(topic) for topic in ("ships", "stars", "ships")])
    assert [(pair.first, pair.second) for pair in found.questions.exact] == [(0, 2)] and not found.contradictions


def test_pairs_labels_prompts_and_plain_text(tmp_path: Path) -> None:
    question = "which of the two roads that lead to the harbour is the shorter one in winter"
    pair = {"prompt": question, "chosen": "the left one", "rejected": "the right one"}
    reverse = {"prompt": f"{question}?", "chosen": "the right one", "rejected": "the left one"}
    other = {"prompt": question, "chosen": "the left one", "rejected": "neither"}
    found = examined(tmp_path, [pair, other, reverse], **{"method.name": "dpo"})
    assert [(one.first, one.second) for one in found.contradictions] == [(0, 2)]
    labelled = [{"prompt": question, "completion": "left", "label": label} for label in (True, True, False)]
    found = examined(tmp_path, labelled, **{"method.name": "kto"})
    assert {(one.first, one.second) for one in found.contradictions} == {(0, 2), (1, 2)}
    assert [(pair.first, pair.second) for pair in found.whole.exact] == [(0, 1)]
    found = examined(tmp_path, [{"prompt": question}, {"prompt": "another"}], [{"prompt": question}], **{
        "method.name": "grpo", "rewards.functions": "exact_match",
    })  # fmt: skip
    assert [(leak.train, leak.held_out) for leak in found.leaks] == [(0, 2)]
    texts = [{"text": f"{question} {end}"} for end in ("and why", "and why", "and how do you know that")]
    found = examined(tmp_path, texts)
    assert [(pair.first, pair.second) for pair in found.whole.exact] == [(0, 1)] and not found.questions.exact


def test_odd_rows_and_what_is_odd(tmp_path: Path) -> None:
    rows = [
        chat(f"question number {i} about a thing that is {'x' * (i % 7)}", json.dumps({"a": i, "b": "yes"}))
        for i in range(60)
    ]
    rows[3] = chat("question " * 80, rows[3]["messages"][2]["content"])
    rows[5] = chat(user_of(rows[5]), '{"a": 5, "b": "ye')
    rows[7] = chat(user_of(rows[7]), '{"a": 7, "c": "yes"}')
    rows[9] = chat("\u0437\u0430\u0447\u0435\u043c \u044d\u0442\u043e", rows[9]["messages"][2]["content"])
    rows[11] = chat(user_of(rows[11]), "it is fine")
    rows.append({"messages": [{"role": "user", "content": "no answer"}]})
    found = examined(tmp_path, rows)
    assert {(odd.row, odd.kind) for odd in found.odd} == {
        (3, "long"), (5, "cut"), (5, "format"), (7, "format"), (9, "script"), (11, "format"),
    }  # fmt: skip
    texts = {(odd.row, odd.kind): odd.text for odd in found.odd}
    assert "lacks b and has c more" in texts[7, "format"] and "cyrillic" in texts[9, "script"]
    assert list(found.problems) == [60] and found.dropped()[60] == "unreadable"
    prose = [chat(f"tell {i}", "It is as it is, and so it goes on and on. " * 6 + f"End {i}.") for i in range(30)]
    prose[4] = chat("tell me", "It is as it is, and so it goes on and on. " * 6 + "And then the")
    found = examined(tmp_path, prose)
    assert [(odd.row, odd.kind) for odd in found.odd] == [(4, "cut")]


def test_shares_of_answers_and_their_shift(tmp_path: Path) -> None:
    def rows(no: int, yes: int, mark: str) -> list[dict[str, Any]]:
        return [chat(f"is {mark} {i} fine", "no" if i < no else "yes") for i in range(no + yes)]

    found = examined(tmp_path, rows(80, 20, "t"), rows(10, 40, "h"))
    (balance,) = found.balances
    assert [(share.value, share.train, share.held_out) for share in balance.commonest] == [
        ("no", 0.8, 0.2), ("yes", 0.2, 0.8),
    ]  # fmt: skip
    assert {share.value for share in balance.shifted} == {"no", "yes"}
    assert not examined(tmp_path, rows(80, 20, "t"), rows(25, 25, "h")).balances[0].shifted


def test_the_command_shows_rows_escaped_and_writes_only_what_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("what is the capital of\x1b[31m Spain in one word please", f"Madrid\x1b[3{i}m") for i in (1, 1, 2)]
    rows.append(chat("another thing", "fine"))
    source = write(tmp_path / "rows.jsonl", rows)
    before = source.read_bytes()
    command = ["data", f"--data={source}", "--deep"]
    assert cli.main([*command, "--rows=9"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "rows.jsonl line 2 repeats rows.jsonl line 1" in out and "Madrid\\x1b" in out
    assert list(tmp_path.iterdir()) == [source] and source.read_bytes() == before
    assert cli.main([*command, f"--write={source}"]) == 1 or "is there already" in capsys.readouterr().err
    target = tmp_path / "clean.jsonl"
    assert cli.main([*command, "--json", f"--write={target}", "--drop=duplicates"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [json.loads(line) for line in target.read_text().splitlines()] == [rows[0], rows[2], rows[3]]
    assert result["duplicates"]["whole_rows"]["exact"][0]["second"] == {
        "set": "train",
        "row": 1,
        "where": "rows.jsonl line 2",
    }
    assert {one["reason"] for one in result["drop"]} == {"contradictions"} and result["noise"] is None
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--write=x.jsonl"], "--write belongs to the deep examination: add --deep"),
        (["--deep", "--drop=leak"], "Did you mean 'leaks'"),
        (["--deep", "--noise"], "--noise trains on the rows, so it needs a model"),
    ],
)
def test_refused_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "rows.jsonl", [chat("a", "b")])
    assert cli.main(["data", f"--data={source}", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_set_of_bad_rows_alone_is_not_written_as_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "rows.jsonl", [chat("which one is it", answer) for answer in ("a", "b")])
    assert cli.main(["data", f"--data={source}", "--deep", f"--write={tmp_path / 'clean.jsonl'}"]) != 0
    assert "all 2 training rows would be left out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_without_a_library_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minhash.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(minhash.ConfigError, match=r"pip install 'jaxft\[deep\]'"):
        minhash.library()
