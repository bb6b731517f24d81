"""Writes the quickstart data: customer-support messages and the strict JSON that a model should answer with.

    python benchmarks/make_quickstart_data.py

Each message is composed from the hand-written sentences in quickstart_phrases.py, which are divided between the splits
first: no held-out sentence occurs in training. The same seed gives the same bytes.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import quickstart_phrases as phrases

SEED = 20
ROWS = {"train": 402, "heldout": 120}
FOLDER = Path(__file__).resolve().parent.parent / "jaxft" / "assets" / "quickstart"
SYSTEM = (
    "Reply with JSON only: intent (refund, delivery, fault, cancel, exchange, invoice), product, order or null, "
    "urgent (true or false)."
)

# How often a message has each part or habit.
SHARE = {
    "opening": 0.3,
    "order": 0.65,
    "order_first": 0.3,
    "filler": 0.15,
    "closing": 0.15,
    "lower": 0.25,
    "typos": 0.25,
}
PACES = ("urgent", "none", "urgent", "calm", "none", "urgent", "none", "urgent", "calm", "none")
SEEN_PRODUCT_SHARE = 0.5  # of the held-out rows: the others name a product that no training row names
SHORTHAND = {"please": "pls", "Please": "Pls", "you": "u", "received": "recieved", "because": "cause", "and": "n"}


@dataclass(frozen=True, kw_only=True)
class Message:
    """One support message and the labels a careful reader would give it; order is None where none is named."""

    text: str
    intent: str
    product: str
    order: str | None
    urgent: bool

    def row(self) -> dict[str, list[dict[str, str]]]:
        """The message as one OpenAI chat row. Compact separators: 22 tokens where spaced ones would take 28."""
        labels = {"intent": self.intent, "product": self.product, "order": self.order, "urgent": self.urgent}
        answer = json.dumps(labels, separators=(",", ":"), ensure_ascii=False)
        chat = (("system", SYSTEM), ("user", self.text), ("assistant", answer))
        return {"messages": [{"role": role, "content": content} for role, content in chat]}


def endless(rng: random.Random, items: tuple[str, ...]) -> Iterator[str]:
    """Repeats the items forever, each time in a new random order: all are used about equally often."""
    while True:
        yield from rng.sample(items, len(items))


def order_id(rng: random.Random, split: str) -> str:
    """An order id in one of four styles, with an even digit sum in training and an odd one in the held-out rows.

    So no id recurs in the other split, and copying cannot teach a model the difference, as it could with a digit that
    only one split has.
    """
    style = rng.choice(("0000", "00000", "AA-000", "A0000"))
    letters = "".join(rng.choice("BCDFGHKLMNPRTVWX") if c == "A" else c for c in style.rstrip("0"))
    digits = [rng.randrange(1, 10) for _ in range(style.count("0") - 1)]
    odd = (sum(digits) + (split == "heldout")) % 2
    return letters + "".join(map(str, digits)) + rng.choice("13579" if odd else "2468")


def misspell(rng: random.Random, sentence: str) -> str:
    """The sentence in hasty spelling: shorthand, and one longer word with two inner letters swapped."""
    words = [SHORTHAND.get(word, word) for word in sentence.split(" ")]
    long_words = [i for i, word in enumerate(words) if re.fullmatch(r"[A-Za-z]{6,}", word)]
    if long_words:
        at = rng.choice(long_words)
        word, cut = words[at], rng.randrange(2, len(words[at]) - 2)
        words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def compose(rng: random.Random, split: str, core: str, pace: str, has_order: bool) -> str:
    """A message of this split with the placeholder `{p}` and, if it has an order, `{o}`."""

    def happens(part: str) -> bool:
        return rng.random() < SHARE[part]

    # Only the core is misspelt, so that the cue of an urgent message stays legible.
    core = misspell(rng, core) if happens("typos") else core
    before, after = [], []
    if has_order and happens("order_first"):
        before.append(rng.choice(phrases.ORDER_BEFORE[split]))
    elif has_order:
        after.append(rng.choice(phrases.ORDER_AFTER[split]))
    if pace != "none":
        cue = rng.choice(phrases.PACE[pace][split])
        (before if rng.random() < 0.2 else after).append(cue)
    if happens("filler"):
        after.append(rng.choice(phrases.FILLERS[split]))
    rng.shuffle(after)
    opening = [rng.choice(phrases.OPENINGS[split])] if happens("opening") else []
    closing = [rng.choice(phrases.CLOSINGS[split])] if happens("closing") else []
    text = " ".join([*opening, *before, core, *after, *closing])
    return text.lower().rstrip(".") if happens("lower") else text


def make_split(split: str, seed: int) -> list[Message]:
    """All messages of one split, intents in equal numbers, in random order."""
    rng = random.Random(f"{seed}:{split}")
    seen_products = endless(rng, phrases.PRODUCTS["train"])
    new_products = endless(rng, phrases.PRODUCTS[split])
    paces = endless(rng, PACES)
    messages = []
    for intent, sentences in phrases.CORES.items():
        cores = endless(rng, sentences[split])
        for _ in range(ROWS[split] // len(phrases.CORES)):
            core, pace = next(cores), next(paces)
            product = next(seen_products if rng.random() < SEEN_PRODUCT_SHARE else new_products)
            order = order_id(rng, split) if rng.random() < SHARE["order"] else None
            template = compose(rng, split, core, pace, has_order=order is not None)
            product = product.lower() if template.islower() else product
            text = template.format(p=product, o=order)
            messages.append(Message(text=text, intent=intent, product=product, order=order, urgent=pace == "urgent"))
    return rng.sample(messages, len(messages))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for train.jsonl and heldout.jsonl")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in phrases.SPLITS:
        rows = [json.dumps(message.row(), ensure_ascii=False) for message in make_split(split, args.seed)]
        (args.out / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{len(rows)} rows in {args.out / split}.jsonl")


if __name__ == "__main__":
    main()
