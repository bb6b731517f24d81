"""Writes preference data for real runs, from Banking77 and GSM8K: pairs, and rows with a label.

    python benchmarks/make_preference_data.py --source=FOLDER --to=runs/preferences

FOLDER has banking77/{train,test}.csv and gsm8k/{train,test}.jsonl, as their authors publish them. Every file is JSONL
in a random order that a seed fixes, so that `data.limit` takes rows of all kinds. The same seed gives the same bytes.

    banking77_{train,heldout}           prompt, chosen, rejected: the intent of a customer's message, against the
                                        nearest wrong one
    banking77_labelled_{train,heldout}  prompt, completion, label: one of the two answers of each of these pairs
    gsm8k_{train,heldout}               prompt, chosen, rejected: a solution, against the same with one result changed,
                                        up or down, and carried on to the final answer
    gsm8k_raised_{train,heldout}        a solution, against the same with every result 1 to 9 too high: an easy task,
                                        in which every sum is wrong
    gsm8k_models_{train,heldout}        right and wrong solutions that models wrote to the same problem, where the
                                        source has gsm8k/example_model_solutions.jsonl

A fair task has no shortcut: no rule that reads the answers without the question or the arithmetic should tell them
apart. So every intent is rejected as often as it is chosen, half of the wrong final answers are larger than the right
ones, and the changed result keeps its number of zeros at the end. The script prints how often such rules are right.
"""

import argparse
import csv
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEED = 13
NEAREST = 12  # wrong intents that are considered for a message
QUESTION = "Which intent does this message to a bank have? Answer with its name.\n\n{text}"

Row = dict[str, Any]


def pair(question: str, chosen: str, rejected: str) -> Row:
    """A row of messages with an explicit prompt."""
    answers = {"chosen": chosen, "rejected": rejected}
    return {"prompt": _message("user", question)} | {name: _message("assistant", x) for name, x in answers.items()}


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


# Banking77


def banking77(folder: Path) -> dict[str, list[Row]]:
    """Pairs of the training and of the test messages. What is near is learned from the training messages alone."""
    messages = {name: _read_messages(folder / f"{name}.csv") for name in ("train", "test")}
    intents = sorted({intent for _, intent in messages["train"]})
    near = Nearness([text for text, _ in messages["train"]], [intent for _, intent in messages["train"]], intents)
    return {"train": near.pairs(messages["train"]), "heldout": near.pairs(messages["test"])}


def _read_messages(path: Path) -> list[tuple[str, str]]:
    with open(path, encoding="utf-8") as file:
        return [(row["text"].strip(), row["category"]) for row in csv.DictReader(file)]


class Nearness:
    """Cosine between the TF-IDF vector of a message and the mean vector of each intent's messages."""

    def __init__(self, texts: list[str], labels: list[str], intents: list[str]) -> None:
        words = Counter(word for text in texts for word in set(_words(text)))
        self.intents = intents
        self.places = {word: place for place, word in enumerate(sorted(words))}
        self.idf = np.array([math.log(len(texts) / words[word]) for word in sorted(words)])
        vectors, of_row = self.vectors(texts), np.array([intents.index(label) for label in labels])
        self.centers = np.stack([vectors[of_row == number].mean(axis=0) for number in range(len(intents))])
        self.centers /= np.linalg.norm(self.centers, axis=1, keepdims=True)

    def vectors(self, texts: list[str]) -> np.ndarray:
        """Vectors of length 1 (0 for a message of unknown words), [messages, words]."""
        counts = np.zeros((len(texts), len(self.places)))
        for row, text in enumerate(texts):
            for word in _words(text):
                if word in self.places:
                    counts[row, self.places[word]] += 1
        counts *= self.idf
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-12)

    def pairs(self, messages: list[tuple[str, str]]) -> list[Row]:
        """A pair of each message. An intent is rejected as often as it is chosen, so that none is a sign of anything.

        The nearest pairs are given first; a message whose nearest wrong intents have been rejected often enough takes
        the next one.
        """
        near = self.vectors([text for text, _ in messages]) @ self.centers.T
        right = np.array([self.intents.index(intent) for _, intent in messages])
        near[np.arange(len(right)), right] = -1.0
        room = np.bincount(right, minlength=len(self.intents))
        wrong = np.full(len(right), -1)
        for flat in np.argsort(-near, axis=None, kind="stable"):
            row, intent = divmod(int(flat), len(self.intents))
            if wrong[row] < 0 and intent != right[row] and room[intent]:
                wrong[row] = intent
                room[intent] -= 1
        return [
            pair(QUESTION.format(text=text), intent, self.intents[other])
            for (text, intent), other in zip(messages, wrong, strict=True)
            if other >= 0
        ]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def labelled(pairs: list[Row]) -> list[Row]:
    """One answer of each pair with its label, the chosen and the rejected one in turn."""
    rows = []
    for number, one in enumerate(pairs):
        good = number % 2 == 0
        rows.append({"prompt": one["prompt"], "completion": one["chosen" if good else "rejected"], "label": good})
    return rows


# GSM8K

CALCULATION = re.compile(r"<<([^<>=]+)=([^<>]+)>>")
RESULT = re.compile(r"<<[^<>=]+=(\d+)>>\1")  # an annotation and the number that it computes
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")


def gsm8k(folder: Path) -> dict[str, list[Row]]:
    """Pairs of the training and of the test problems whose solutions can be changed consistently."""
    pairs: dict[str, list[Row]] = {}
    for name, file in (("train", "train"), ("heldout", "test")):
        draw, pairs[name] = random.Random(SEED), []
        for line in (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            larger = len(pairs[name]) % 2 == 0
            wrong = changed_solution(row["question"], row["answer"], draw, larger=larger)
            if wrong is not None:
                pairs[name].append(pair(row["question"], _plain(row["answer"]), _plain(wrong)))
    return pairs


def _plain(solution: str) -> str:
    """A solution without the annotations of a calculator."""
    return re.sub(r"<<[^<>]*>>", "", solution).strip()


def changed_solution(question: str, solution: str, draw: random.Random, *, larger: bool) -> str | None:
    """The solution with the result of one calculation changed, and all that depends on it computed from there.

    larger: whether its final answer is to be larger than the right one, or smaller.

    None if that cannot be done surely: every result must be a whole number that is not in the question, is no other
    result, and is in no calculation before it, so that its mentions can be told from those of other numbers; every
    calculation must be annotated.
    """
    steps = CALCULATION.findall(solution)
    results = [value for _, value in steps]
    plain_results = all(re.fullmatch(r"[1-9]\d*", value) for value in results)
    if not steps or not plain_results or len(set(results)) < len(results) or _unannotated(solution):
        return None
    given = {number.replace(",", "") for number in NUMBER.findall(question)}
    for number, (expression, _) in enumerate(steps):
        if set(NUMBER.findall(expression)) & set(results[number:]):
            return None
    if given & set(results) or results[-1] != solution.rpartition("#### ")[2].replace(",", "").strip():
        return None
    sizes = draw.sample([size for size in range(-9, 10) if size], 18)
    for step in draw.sample(range(len(steps)), len(steps)):
        for size in sizes:
            changes = _carried_on(steps, step, size)
            if changes is not None and (int(changes[results[-1]]) > int(results[-1])) is larger:
                return _with(changes, solution)
    return None


def _unannotated(solution: str) -> bool:
    """Whether a result stands in the text that no annotation computes, so that it could not be carried on."""
    body = CALCULATION.sub("@", solution.rpartition("#### ")[0])
    return bool(re.search(r"=(?!\s*\$?\s*@)", body)) or "<<" in body


def _carried_on(steps: list[tuple[str, str]], first: int, size: int) -> dict[str, str] | None:
    """Old result -> new one, from step `first` on; None if a new one is no whole number above 0, or the last is old.

    size: the change of the first, in units of the last digit that is not 0.
    """
    old = steps[first][1]
    unit = 10 ** (len(old) - len(old.rstrip("0")))
    new = int(old) + size * unit
    if new <= 0 or new % (10 * unit) == 0:
        return None
    changes = {old: str(new)}
    for expression, result in steps[first + 1 :]:
        value = _value(_with(changes, expression))
        original = _value(expression)
        if value is None or original is None or abs(original - int(result)) > 1e-6:
            return None
        if abs(value - original) > 1e-6:
            if value < 1 or abs(value - round(value)) > 1e-6:
                return None
            changes[result] = str(round(value))
    return changes if steps[-1][1] in changes else None


def _with(changes: dict[str, str], text: str) -> str:
    return NUMBER.sub(lambda found: _replaced(found[0], changes), text)


def _replaced(number: str, changes: dict[str, str]) -> str:
    # A comma may also be punctuation after the number.
    bare = number.rstrip(",")
    plain = bare.replace(",", "")
    if plain not in changes:
        return number
    new = changes[plain]
    return (f"{int(new):,}" if "," in bare else new) + number[len(bare) :]


def _value(expression: str) -> float | None:
    """The value of an arithmetic expression; None if it is none."""
    if not re.fullmatch(r"[\d.+*/() -]+", expression):
        return None
    try:
        return float(eval(expression.replace(" ", ""), {"__builtins__": {}}))
    except (ArithmeticError, SyntaxError, TypeError):
        return None


def gsm8k_raised(folder: Path) -> dict[str, list[Row]]:
    """Pairs of all problems whose results are whole numbers, the rejected one with every result raised."""
    pairs: dict[str, list[Row]] = {}
    for name, file in (("train", "train"), ("heldout", "test")):
        draw, pairs[name] = random.Random(SEED), []
        for line in (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            wrong = raised_solution(row["answer"], draw)
            if wrong is not None:
                pairs[name].append(pair(row["question"], _plain(row["answer"]), _plain(wrong)))
    return pairs


def raised_solution(solution: str, draw: random.Random) -> str | None:
    """The solution with every annotated result, and the final answer, 1 to 9 too high; None if they are not whole."""
    results = [value for _, value in CALCULATION.findall(solution)]
    if not results or not all(re.fullmatch(r"\d+", value) for value in results):
        return None
    body, mark, final = solution.rpartition("#### ")
    final = final.replace(",", "").strip()
    raised = RESULT.sub(lambda found: f"{int(found[1]) + draw.randint(1, 9)}", body)
    return f"{raised}{mark}{int(final) + draw.randint(1, 9)}" if re.fullmatch(r"\d+", final) else None


def gsm8k_models(folder: Path) -> dict[str, list[Row]]:
    """A right and a wrong solution of each problem of which models wrote both; a fifth of the problems is held out."""
    path = folder / "example_model_solutions.jsonl"
    pairs: dict[str, list[Row]] = {"train": [], "heldout": []}
    draw = random.Random(SEED)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        answers = [value for value in row.values() if isinstance(value, dict)]
        by_truth = {truth: [a["solution"] for a in answers if a["is_correct"] is truth] for truth in (True, False)}
        if all(by_truth.values()):
            chosen, rejected = (_plain(draw.choice(by_truth[truth])) for truth in (True, False))
            pairs["heldout" if number % 5 == 0 else "train"].append(pair(row["question"], chosen, rejected))
    return pairs


# Shortcuts


def _answer(row: Row, name: str) -> str:
    return row[name][0]["content"]


def _last_number(text: str) -> float:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else 0.0


def shortcuts(train: list[Row], held_out: list[Row]) -> dict[str, float]:
    """Share of held-out pairs that rules decide rightly which read the answers alone; 0.5 says nothing.

    A tie counts half.
    """
    seen: Counter[str] = Counter()
    for row in train:
        seen.update({_answer(row, "chosen"): 1})
        seen.subtract({_answer(row, "rejected"): 1})
    rules: dict[str, Callable[[str], float]] = {
        "longer": len,
        "larger last number": _last_number,
        "more zeros": lambda text: sum(len(n) - len(n.rstrip("0")) for n in NUMBER.findall(text)),
        "oftener chosen": lambda text: seen[text],
    }
    scores = {}
    for name, rule in rules.items():
        sides = [(rule(_answer(row, "chosen")), rule(_answer(row, "rejected"))) for row in held_out]
        scores[name] = sum((a > b) + 0.5 * (a == b) for a, b in sides) / len(sides)
    return scores


def data_sets(source: Path) -> Iterator[tuple[str, dict[str, list[Row]]]]:
    """(name, rows by split) of every set, in random order."""
    sets = {"banking77": banking77(source / "banking77"), "gsm8k": gsm8k(source / "gsm8k")}
    sets["gsm8k_raised"] = gsm8k_raised(source / "gsm8k")
    if (source / "gsm8k" / "example_model_solutions.jsonl").is_file():
        sets["gsm8k_models"] = gsm8k_models(source / "gsm8k")
    for splits in sets.values():
        for rows in splits.values():
            random.Random(SEED).shuffle(rows)
    yield from sets.items()
    yield "banking77_labelled", {split: labelled(rows) for split, rows in sets["banking77"].items()}


def main() -> None:
    """Writes every file and prints its rows; for pairs, also what shortcuts would decide rightly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    for name, splits in data_sets(arguments.source):
        for split, rows in splits.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (arguments.to / f"{name}_{split}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {', '.join(f'{len(rows):,} {split}' for split, rows in splits.items())}")
        if "chosen" in splits["train"][0]:
            found = shortcuts(splits["train"], splits["heldout"]).items()
            print("  right by reading answers alone: " + ", ".join(f"{rule} {share:.1%}" for rule, share in found))


if __name__ == "__main__":
    main()
