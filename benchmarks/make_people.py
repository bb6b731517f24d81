"""Writes the rows of `jaxft/assets/people`: sentences about a person, and the JSON that says the same.

    python benchmarks/make_people.py --to=jaxft/assets/people

A task that a small model can learn from rewards: it knows what JSON is, and rarely answers in it alone. Names, cities
and sentences of the held-out rows occur in no training row. The same seed gives the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

SEED = 7
ASK = "{sentence}\n\nJSON with name, age and city:"
SPLITS = {
    "train": {
        "rows": 240,
        "names": (
            "Ana", "Boris", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Katya", "Liam",
            "Mona", "Nils", "Olga", "Pablo", "Rosa", "Samir", "Tara", "Viktor",
        ),
        "cities": (
            "Athens", "Bergen", "Cairo", "Dublin", "Geneva", "Hanoi", "Lima", "Lisbon", "Madrid", "Nairobi", "Oslo",
            "Paris", "Prague", "Quito", "Rome", "Seoul", "Tokyo", "Vienna", "Warsaw", "Zagreb",
        ),
        "sentences": (
            "{name} is {age} years old and lives in {city}.",
            "{name}, who is {age}, moved to {city} last spring.",
            "At {age}, {name} runs a small bakery in {city}.",
            "In {city} you may meet {name}, a {age}-year-old teacher.",
            "{name} turned {age} this week and celebrated at home in {city}.",
            "The {age}-year-old {name} works as a nurse in {city}.",
        ),
    },
    "heldout": {
        "rows": 64,
        "names": ("Bianca", "Carlos", "Dora", "Emil", "Fiona", "Goran", "Hanna", "Igor", "Julia", "Marco"),
        "cities": ("Berlin", "Budapest", "Helsinki", "Kyiv", "London", "Milan", "Porto", "Riga", "Sofia", "Toronto"),
        "sentences": (
            "Our neighbour {name} is {age} and comes from {city}.",
            "{name} grew up in {city} and is now {age}.",
            "At the age of {age}, {name} opened a bookshop in {city}.",
        ),
    },
}  # fmt: skip


def rows(split: str) -> list[dict[str, object]]:
    """The rows of a split: the prompt as messages, and the reference as JSON text."""
    parts, draw = SPLITS[split], random.Random(f"{SEED} {split}")
    out: list[dict[str, object]] = []
    for _ in range(int(str(parts["rows"]))):
        person = {
            "name": draw.choice(parts["names"]),
            "age": draw.randint(18, 79),
            "city": draw.choice(parts["cities"]),
        }
        sentence = draw.choice(parts["sentences"]).format(**person)
        prompt = [{"role": "user", "content": ASK.format(sentence=sentence)}]
        out.append({"prompt": prompt, "reference": json.dumps(person)})
    return out


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    to = parser.parse_args().to
    to.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        text = "".join(json.dumps(row) + "\n" for row in rows(split))
        (to / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
