"""A reward for answers that must be JSON with given values, in steps, so that a model can climb them.

A reward that is 1 for a right answer and 0 for any other teaches nothing as long as every answer is wrong.
"""

import json


def fields(completions: list[str], reference: list[str], **_: object) -> list[float]:
    """0 if the answer is no JSON, 0.1 if it is, and 0.2 + 0.8 times the share of right fields if it is an object."""
    return [_score(answer, json.loads(right)) for answer, right in zip(completions, reference, strict=True)]


def _score(answer: str, right: dict[str, object]) -> float:
    try:
        given = json.loads(answer)
    except ValueError:
        return 0.0
    if not isinstance(given, dict):
        return 0.1
    # A key that nobody asked for counts as a wrong one.
    hits = sum(given.get(key) == value for key, value in right.items())
    return 0.2 + 0.8 * hits / max(len(right), len(given))
