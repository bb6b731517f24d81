"""The quickstart data: what its README promises, above all that no held-out row is a near-copy of a training row."""

import difflib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "jaxft" / "assets" / "quickstart"
INTENTS = {"refund", "delivery", "fault", "cancel", "exchange", "invoice"}

# Of a held-out message to any training message, products and order ids masked (README, "Not near-copies").
MAX_SHARED_WORDS = 0.45  # Jaccard index of the two sets of words
MAX_SEQUENCE_RATIO = 0.6  # difflib ratio of the two sequences of words
MAX_SHARED_RUN = 6  # consecutive words


def read(split: str) -> list[tuple[str, str, dict]]:
    """(system prompt, message, labels) of each row of the split."""
    rows = []
    for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        assert [m["role"] for m in messages] == ["system", "user", "assistant"]
        system, user, answer = (m["content"] for m in messages)
        assert answer == json.dumps(json.loads(answer), separators=(",", ":"))
        rows.append((system, user, json.loads(answer)))
    return rows


def masked_words(message: str, labels: dict) -> list[str]:
    masked = message.replace(labels["order"], " orderid ") if labels["order"] else message
    return re.findall(r"[a-z0-9']+", masked.replace(labels["product"], " productname ").lower())


def runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


TRAIN, HELDOUT = read("train"), read("heldout")
TRAIN_WORDS = [masked_words(message, labels) for _, message, labels in TRAIN]
HELDOUT_WORDS = [masked_words(message, labels) for _, message, labels in HELDOUT]


def urgent_cues() -> list[str]:
    """The cues of an urgent message, as the README lists them."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    return re.search(r"^`urgent` .*these cues:\n\n- (.+)$", readme, re.MULTILINE).group(1).split(", ")


def test_generator_writes_these_very_bytes(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "make_quickstart_data.py"
    subprocess.run([sys.executable, "-B", script, "--out", tmp_path], check=True, capture_output=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize(("rows", "count"), [(TRAIN, 402), (HELDOUT, 120)])
def test_size_balance_and_schema(rows: list[tuple[str, str, dict]], count: int) -> None:
    assert len(rows) == count
    assert len({message.lower() for _, message, _ in rows}) == count
    assert {system for system, _, _ in rows} == {TRAIN[0][0]}
    assert Counter(labels["intent"] for _, _, labels in rows) == dict.fromkeys(INTENTS, count // 6)
    assert 0.35 <= sum(labels["urgent"] for _, _, labels in rows) / count <= 0.5
    assert count // 4 <= sum(labels["order"] is None for _, _, labels in rows) <= count // 2
    for system, _, labels in rows:
        assert list(labels) == ["intent", "product", "order", "urgent"]
        assert all(key in system for key in labels)


def test_labels_can_be_read_off_the_message() -> None:
    cues = urgent_cues()
    for _, message, labels in TRAIN + HELDOUT:
        assert message.count(labels["product"]) == 1, message
        if labels["order"] is not None:
            assert message.count(labels["order"]) == 1, message
            assert not labels["order"].startswith("#"), message
        assert labels["urgent"] is any(cue in message.lower() for cue in cues), message


def test_order_ids_are_new_and_half_of_the_products_too() -> None:
    ids = [{labels["order"] for _, _, labels in rows} - {None} for rows in (TRAIN, HELDOUT)]
    assert not ids[0] & ids[1]
    known = {labels["product"].lower() for _, _, labels in TRAIN}
    assert len(known) >= 40
    unseen = sum(labels["product"].lower() not in known for _, _, labels in HELDOUT)
    assert 0.4 <= unseen / len(HELDOUT) <= 0.6


def test_no_heldout_message_shares_its_words_with_a_training_message() -> None:
    train = [set(words) for words in TRAIN_WORDS]
    for words in map(set, HELDOUT_WORDS):
        assert max(len(words & other) / len(words | other) for other in train) <= MAX_SHARED_WORDS, words


def test_no_heldout_message_runs_like_a_training_message() -> None:
    seen = set().union(*(runs(words, MAX_SHARED_RUN + 1) for words in TRAIN_WORDS))
    for words in HELDOUT_WORDS:
        assert not runs(words, MAX_SHARED_RUN + 1) & seen
        matcher = difflib.SequenceMatcher(None, b=words, autojunk=False)
        for other in TRAIN_WORDS:
            matcher.set_seq1(other)
            # The quick ratio is an upper bound, far cheaper than the ratio.
            assert matcher.quick_ratio() <= MAX_SEQUENCE_RATIO or matcher.ratio() <= MAX_SEQUENCE_RATIO, (words, other)


def test_no_sentence_is_in_both_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quickstart_phrases as phrases

    tables = [*phrases.CORES.values(), *phrases.PACE.values(), phrases.ORDER_BEFORE, phrases.ORDER_AFTER]
    for table in [*tables, phrases.OPENINGS, phrases.CLOSINGS, phrases.FILLERS, phrases.PRODUCTS]:
        assert not set(table["train"]) & set(table["heldout"])


def test_where_the_product_begins_is_no_matter_of_taste(monkeypatch: pytest.MonkeyPatch) -> None:
    # "The blue desk lamp": is the colour part of the name? So a determiner always comes straight before it.
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quickstart_phrases as phrases

    for table in phrases.CORES.values():
        for sentence in (*table["train"], *table["heldout"]):
            assert re.search(r"\b(the|my|this|that|one|a) \{p\}", sentence.lower()), sentence
