"""A reward for the word problems of GSM8K, whose answers end in `#### 42`, and a script that makes their prompts.

The rows of https://github.com/openai/grade-school-math have a `question` and an `answer`. Run as a script, this file
turns them into prompts for a chat model, with the answer as the reference:

    python configs/reward_functions/gsm8k.py < train.jsonl > data/gsm8k_train.jsonl
"""

import json
import re
import sys

TASK = "Solve the problem step by step. End with the answer, a number, in a line of its own: #### number"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def right_number(completions: list[str], reference: list[str], **_: object) -> list[float]:
    """1 if the answer ends in the number of the reference after `####`, 0.5 if it does so without the `####`, else 0.

    The half leads a model to the form before it is right more often. A reference without a number is compared as text.
    """
    return [_score(answer, right) for answer, right in zip(completions, reference, strict=True)]


def _score(answer: str, right: str) -> float:
    expected = _last_number(right)
    if expected is None:
        return float(answer.strip() == right.strip())
    _, marked, last = answer.rpartition("####")
    if _last_number(last) != expected:
        return 0.0
    return 1.0 if marked else 0.5


def _last_number(text: str) -> float | None:
    """The last number of a text; None if it has none."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def prompt_row(row: dict[str, str]) -> dict[str, object]:
    """The prompt of a row of GSM8K, with its answer as the reference."""
    messages = [{"role": "system", "content": TASK}, {"role": "user", "content": row["question"]}]
    return {"prompt": messages, "reference": row["answer"]}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(prompt_row(json.loads(line)), ensure_ascii=False))
