"""Writes the preference rows of `:smoke` runs, jaxft/assets/smoke/{pairs,labelled}{,_heldout}.jsonl.

    python benchmarks/make_smoke_rows.py

They are short messages of the quickstart, each with the right intent as the chosen answer and the next one of the list
as the rejected answer. A labelled row has one of the two.
"""

import json
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "jaxft" / "assets"
INTENTS = ("refund", "delivery", "fault", "cancel", "exchange", "invoice")
LONGEST = 100  # characters of a message, so that a pair of byte tokens stays below 512
ROWS = {"train": ("", 24), "heldout": ("_heldout", 4)}


def pairs(split: str, count: int) -> list[dict]:
    """The first `count` short messages of a split, as prompt, chosen and rejected."""
    rows: list[dict] = []
    for line in (ASSETS / "quickstart" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        _, question, answer = json.loads(line)["messages"]
        if len(question["content"]) <= LONGEST and len(rows) < count:
            right = json.loads(answer["content"])["intent"]
            wrong = INTENTS[(INTENTS.index(right) + 1) % len(INTENTS)]
            chosen, rejected = ([{"role": "assistant", "content": intent}] for intent in (right, wrong))
            rows.append({"prompt": [question], "chosen": chosen, "rejected": rejected})
    return rows


def labelled(rows: list[dict]) -> list[dict]:
    """An answer of each pair: the chosen and the rejected one in turn."""
    sides = [("chosen", True), ("rejected", False)]
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": label}
        for row, (side, label) in zip(rows, sides * len(rows), strict=False)
    ]


def main() -> None:
    for split, (suffix, count) in ROWS.items():
        rows = pairs(split, count)
        for name, written in (("pairs", rows), ("labelled", labelled(rows))):
            lines = "".join(json.dumps(row) + "\n" for row in written)
            (ASSETS / "smoke" / f"{name}{suffix}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
