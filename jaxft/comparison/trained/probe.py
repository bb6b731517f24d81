"""What a tuned model forgot: requests for a format that have nothing to do with its task, before and after tuning."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.comparison.rows import Row
from jaxft.comparison.verdict import compare_values
from jaxft.config import DataConfig
from jaxft.data.formats import read_row
from jaxft.errors import ConfigError
from jaxft.evaluation.json_answers import is_json, object_or_empty, parse
from jaxft.evaluation.statistics import wilson_interval
from jaxft.files.strict_json import parse_json
from jaxft.home import local_path

BUILTIN = "builtin"
FORM = '{"prompt": "Name a river. Answer in one word.", "pattern": "\\\\w+[.!]?"}'
TOPICS = (
    "rivers", "musical instruments", "vegetables", "tools for a garden", "kinds of weather", "animals of the sea",
    "pieces of furniture", "sports with a ball", "things in a kitchen", "metals", "trees", "kinds of bread",
    "means of transport", "birds", "jobs in a hospital", "items of clothing", "planets", "insects", "games for two",
    "materials for a house",
)  # fmt: skip
# What is asked, and the pattern that all of an answer matches if it does what was asked; `json` for a JSON list.
FORMATS = (
    ("Name one example of {}. Answer with one word and nothing else.", r"[\w'-]+[.!]?"),
    ("Name three {}, separated by commas. Write nothing else.", r"[^,\n]+,[^,\n]+,[^,\n]+"),
    ("Write the words '{}' in capital letters. Write nothing else.", r"[^a-z]*[A-Z][^a-z]*"),
    ("Ask me one question about {}. Write the question alone.", r"[^?\n]+\?"),
    ("Write exactly two lines about {}, one sentence each.", r"[^\n]+\n+[^\n]+"),
    ("How many {} can you name in a minute? Answer with a number alone.", r"[0-9]+[.]?"),
    ("Give two {} as a numbered list, one on each line, such as '1. ...'.", r"1\.[^\n]+\n+2\.[^\n]+"),
    ("Is it true that there are many kinds of {}? Answer yes or no.", r"(?i)(yes|no)[.!]?"),
    ("Begin your answer with the word 'Well' and say something about {}.", r"(?s)Well\b.*"),
    ("Give two {} as a JSON list of strings. Write the JSON alone.", "json"),
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and whether an answer has the form that it asks for."""

    prompt: str
    follows: Callable[[str], bool]


def requests_of(path: str) -> list[Request]:
    """The requests of a probe: the 200 that ship for `builtin`, else those of a JSONL file of `prompt` and `pattern`.

    A pattern is a regular expression that the whole answer matches. Raises ConfigError for a file of another form.
    """
    if path == BUILTIN:
        return [_request(text.format(topic), pattern) for topic in TOPICS for text, pattern in FORMATS]
    source = local_path(path)
    out: list[Request] = []
    try:
        with open(source, "rb") as file:
            lines = [line for line in file.read().split(b"\n") if line.strip()]
        for number, line in enumerate(lines, 1):
            row = parse_json(line)
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "pattern")):
                raise ConfigError(f"--probe={path}: line {number} must be an object such as {FORM}")
            out.append(_request(row["prompt"], row["pattern"]))
    except (OSError, ValueError, re.error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--probe={path} cannot be read: {error}. Its lines are such as {FORM}") from error
    if not out:
        raise ConfigError(f"--probe={path} has no line: write some such as {FORM}")
    return out


def _request(prompt: str, pattern: str) -> Request:
    if pattern == "json":
        return Request(prompt=prompt, follows=_is_list)
    expression = re.compile(pattern)
    return Request(prompt=prompt, follows=lambda answer: expression.fullmatch(answer.strip()) is not None)


def _is_list(answer: str) -> bool:
    return is_json(answer) and isinstance(parse(answer), list)


def rows_of(requests: Sequence[Request], data: DataConfig) -> list[Row]:
    """The requests as rows of chats, which rivals answer. data: how rows of the comparison are read."""
    out = []
    for number, request in enumerate(requests, 1):
        messages = [{"role": "user", "content": request.prompt}, {"role": "assistant", "content": "-"}]
        plain = DataConfig(train=data.train or "-", reasoning=data.reasoning)
        where = f"request {number} of the probe"
        conversation = read_row({"messages": messages}, plain, row=number - 1, where=where)
        out.append(Row(conversation=conversation, data=plain, name=where))
    return out


def has_format_of(answers: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text looks like one of these answers of a task: the same keys of a JSON object, or the same text."""
    keys = {frozenset(object_or_empty(answer)) for answer in answers} - {frozenset()}
    texts = {answer.strip() for answer in answers}
    return lambda text: text.strip() in texts or (bool(own := frozenset(object_or_empty(text))) and own in keys)


def probed(
    requests: Sequence[Request],
    base: Sequence[str],
    tuned: Sequence[str],
    task: Sequence[str],
    margin: float,
    texts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The entry of compare.json. base, tuned: their answers to the requests. task: answers of the task.

    texts: what `drift.drift` found, if it looked.
    `followed`: the share of requests whose form was kept; `leaked`: of the tuned answers that have the form of the
    task; `sentence`: None unless the interval of a difference lies beyond zero.
    """
    kept = [[request.follows(text) for request, text in zip(requests, texts, strict=True)] for texts in (base, tuned)]
    has_task_format = has_format_of(task)
    leaks = [[has_task_format(text) for text in texts] for texts in (base, tuned)]
    compared = compare_values(kept[1], kept[0], passes=True, margin=margin)
    leak = compare_values(leaks[1], leaks[0], passes=True, margin=margin)
    lost = sum(before and not after for before, after in zip(*kept, strict=True))
    parts = []
    if compared.interval[1] < 0:
        parts.append(f"{lost} of {sum(kept[0])} requests for another format are no longer followed")
    if leak.interval[0] > 0:
        parts.append(f"{sum(leaks[1])} of {len(requests)} unrelated answers have the format of the task")
    if texts is not None and texts["lost"] is not None:
        parts.append(texts["lost"])
    total = len(requests)
    return {
        "requests": total,
        "followed": {
            name: {"value": sum(own) / total, "interval": list(wilson_interval(sum(own), total))}
            for name, own in zip(("base", "tuned"), kept, strict=True)
        },
        "difference": compared.summary(),
        "texts": texts,
        "leaked": {"base": sum(leaks[0]) / total, "tuned": sum(leaks[1]) / total},
        "sentence": f"It forgot: {'; '.join(parts)}." if parts else None,
    }
