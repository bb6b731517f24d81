"""Prints the result of a `jaxft compare` as the Markdown of a page: the sentence, the ways, and the seeds.

python benchmarks/compare_table.py runs/compared-quickstart
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def number(value: float | None, form: str) -> str:
    """A number in a form, or a dash."""
    return "—" if value is None else format(value, form)


def line(way: Mapping[str, Any]) -> str:
    """The line of a way: score with its interval, tokens of prompt and answer, seconds of a call alone."""
    shares = "correct" in way
    form = ".1%" if shares else ".3f"
    ends = way["interval"] or (None, None)
    score = f"{number(way['value'], form)} ({number(ends[0], form)} to {number(ends[1], form)})"
    count = f"{way['correct']} of {way['total']}" if shares else f"{way['total']} rows"
    tokens = f"{way['prompt_tokens']:.0f} + {way['answer_tokens']:.0f}"
    return f"| {way['name']} | {count} | {score} | {tokens} | {number(way.get('seconds_alone'), '.2f')} |"


def main() -> None:
    """Prints the table of one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    result = json.loads((Path(parser.parse_args().folder) / "compare.json").read_text(encoding="utf-8"))
    print(f'"{result["verdict"]["sentence"]}"\n')
    print(f"| way | {result['metric']} | score, 95 % | tokens of prompt and answer | seconds a call alone |")
    print("|---|---|---|---|---|")
    print("\n".join(map(line, result["ways"])))
    for method, one in result["seeds"].items():
        ends = f"{one['low']:.3f} to {one['high']:.3f}"
        print(f"\n{one['runs']} trainings by {method}: {one['mean']:.3f} on average, {ends}.")


if __name__ == "__main__":
    main()
