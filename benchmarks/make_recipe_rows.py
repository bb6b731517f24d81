"""Writes the rows of docs/recipes.md as JSON lines: runs/data/NAME/train.jsonl and heldout.jsonl.

    python benchmarks/make_recipe_rows.py intents     # Banking77, CC-BY-4.0
    python benchmarks/make_recipe_rows.py reasoning   # GSM8K, MIT
    python benchmarks/make_recipe_rows.py style       # made here

The files of the first two are downloaded, or read from the folder --source. The same arguments give the same bytes.
"""

import argparse
import csv
import io
import json
import random
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path

URLS = {
    "intents": "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data/",
    "reasoning": "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/",
}
INTENT = "Name the intent of the customer's message. Answer with one of: {}."
REASON = "Solve the problem in short steps, one on each line. End with a line of '#### ' and the number alone."
STYLE = "Rewrite the note in our house style."
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
# What notes are about, the parts of training and of held-out rows apart.
SUBJECTS = {
    "train": (
        "the meeting", "the delivery", "the audit", "the release", "the training", "the inspection", "the interview",
        "the workshop", "the inventory", "the call with the bank",
    ),
    "heldout": ("the visit", "the review", "the repair", "the briefing", "the handover"),
}  # fmt: skip
DRAFTS = (
    "hi all, {subject} is on {date} at {time}, we pay {price}!!",
    "fyi {subject}: {date}, {time}. costs are {price} btw",
    "{subject} got moved to {date}, starts {time}, budget {price}",
    "pls note {subject} at {time} on {date}... price is {price}",
    "Don't forget!!! {date} {time} {subject}, it's {price}",
)

Row = dict[str, list[dict[str, str]]]


def row(system: str, question: str, answer: str) -> Row:
    """A row as messages."""
    turns = (("system", system), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def content(task: str, name: str, source: str | None) -> str:
    """The text of a file of a set, from a folder or from where its authors publish it."""
    if source is not None:
        return (Path(source) / name).read_text(encoding="utf-8")
    with urllib.request.urlopen(URLS[task] + name, timeout=60) as answer:
        return answer.read().decode("utf-8")


def intents(source: str | None, labels: int, each: dict[str, int]) -> dict[str, list[Row]]:
    """Messages to a bank with `labels` of the 77 intents, the first by name, in turn, so that any first rows are even.

    each: rows of an intent, of either part.
    """
    files = {"train": "train.csv", "heldout": "test.csv"}
    tables = {part: list(csv.DictReader(io.StringIO(content("intents", file, source)))) for part, file in files.items()}
    names = sorted({one["category"] for one in tables["train"]})[:labels]
    out: dict[str, list[Row]] = {}
    for part, table in tables.items():
        texts = {
            name: [one["text"].strip() for one in table if one["category"] == name][: each[part]] for name in names
        }
        order = [(number, name) for number in range(each[part]) for name in names if number < len(texts[name])]
        out[part] = [row(INTENT.format(", ".join(names)), texts[name][number], name) for number, name in order]
    return out


def reasoning(source: str | None) -> dict[str, list[Row]]:
    """Problems of arithmetic with their steps; the marks of a calculator, <<...>>, are left out."""
    files = {"train": "train.jsonl", "heldout": "test.jsonl"}
    out: dict[str, list[Row]] = {}
    for part, file in files.items():
        rows = [json.loads(line) for line in content("reasoning", file, source).splitlines() if line]
        out[part] = [row(REASON, one["question"], re.sub(r"<<[^>]*>>", "", one["answer"]).strip()) for one in rows]
    return out


def note(draw: random.Random, subjects: Sequence[str]) -> Row:
    """A careless note, and the same facts as the house writes them: ISO dates, 24 hours, EUR with two decimals."""
    year, month, day = draw.choice((2025, 2026, 2027)), draw.randrange(1, 13), draw.randrange(1, 29)
    hour, minute = draw.randrange(7, 20), draw.choice((0, 15, 30, 45))
    cents = draw.randrange(2_000, 900_000, 50)
    subject, name = draw.choice(subjects), MONTHS[month - 1]
    date = draw.choice(
        (f"{name} {day}, {year}", f"{day} {name[:3].lower()} {year}", f"{day}.{month}.{year}", f"{name} {day} {year}")
    )
    clock = f"{(hour - 1) % 12 + 1}{f':{minute:02d}' if minute else ''} {'am' if hour < 12 else 'pm'}"
    time = draw.choice((clock, clock.replace(" ", ""), f"{hour}:{minute:02d}"))
    whole, rest = divmod(cents, 100)
    amount = f"{whole}" if not rest else f"{whole}.{rest:02d}"
    price = draw.choice((f"€{amount}", f"{amount} euros", f"{amount} eur", f"EUR {amount}"))
    draft = draw.choice(DRAFTS).format(subject=subject, date=date, time=time, price=price)
    title = subject.removeprefix("the ").capitalize()
    return row(
        STYLE, draft, f"{title}: {year}-{month:02d}-{day:02d}, {hour:02d}:{minute:02d}. EUR {whole:,}.{rest:02d}."
    )


def style(rows: dict[str, int]) -> dict[str, list[Row]]:
    """Notes of either part, drawn by a fixed seed."""
    return {
        part: [note(draw, SUBJECTS[part]) for _ in range(count)]
        for part, count in rows.items()
        for draw in (random.Random(f"style {part}"),)
    }


def main() -> None:
    """Writes one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("intents", "reasoning", "style"))
    parser.add_argument("--source", metavar="FOLDER", help="with train.csv and test.csv, or train.jsonl and test.jsonl")
    parser.add_argument("--intents", type=int, default=10, help="of the 77")
    parser.add_argument("--to", metavar="FOLDER", default="runs/data")
    arguments = parser.parse_args()
    if arguments.task == "intents":
        parts = intents(arguments.source, arguments.intents, {"train": 40, "heldout": 20})
    elif arguments.task == "reasoning":
        parts = reasoning(arguments.source)
    else:
        parts = style({"train": 400, "heldout": 100})
    folder = Path(arguments.to) / arguments.task
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / f'{part}.jsonl'}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
