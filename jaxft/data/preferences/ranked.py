"""Lists of answers to one prompt with their scores or ranks, and the pairs that are made of them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from jaxft.config import DataConfig
from jaxft.data.preferences.prompts import answer_to, messages_of, prompt_in
from jaxft.data.rows.questions import Message
from jaxft.data.rows.turn_lists import as_list
from jaxft.data.rows.values import RowProblem
from jaxft.errors import did_you_mean
from jaxft.files.json_fields import is_finite

LARGEST_SCORE = 1e38  # float32, in which scores are compared, ends at 3.4e38

# The usual names: of the list, of an answer in it, and of its score, in the list or in a list beside it.
LISTS = ("completions", "answers", "responses", "generations")
TEXTS = ("response", "answer", "completion", "text", "content", "messages")
SCORES = ("overall_score", "fine-grained_score", "score", "rating", "rank")
SCORE_LISTS = ("scores", "ratings", "ranks")


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Answers to one prompt.

    name: of their column. columns: that were read. texts: text or messages, as the prompt. scores: more is better.
    """

    name: str
    columns: frozenset[str]
    prompt: str | list[Message]
    texts: tuple[str | list[Message], ...]
    scores: tuple[float, ...]


def ranked_answers(fields: Mapping[str, Any], config: DataConfig) -> Ranked | None:
    """The list of ranked answers that a row has; None if it has none of the usual names.

    The list is in `data.answers_field`, or in one of LISTS; it holds objects with the answer and its score, or answers
    with the scores in a list beside it. Raises RowProblem if the list, a score or the prompt cannot be found or read.
    """
    name = _list_name(fields, config)
    if name is None:
        return None
    prompt, columns = prompt_in(fields, config)
    if prompt is None:
        raise RowProblem(
            f"it has {name!r}, but no prompt in {config.prompt_field!r}, 'instruction' or 'question'. Set "
            "data.prompt_field to the column of prompts."
        )
    texts, score, values = _scored(fields, name, config)
    # The first rank is the best.
    sign = -1.0 if score.endswith(("rank", "ranks")) else 1.0
    return Ranked(
        name=name,
        columns=frozenset((*columns, name, score)),
        prompt=prompt,
        texts=tuple(answer_to(prompt, messages_of(text, name)) for text in texts),
        scores=tuple(sign * score_of(value, f"{name} {number}: {score}") for number, value in enumerate(values, 1)),
    )


def ranked_pairs(answers: Ranked, which: str, left_out: Counter[str]) -> list[tuple[int, int]]:
    """(index of the better, index of the worse) of every pair that `data.pairs` asks for.

    Answers of equal score keep the order of the list. left_out: counts pairs of equal scores as `ties`, and pairs of
    equal answers as `same`; both are left out.
    """
    order = sorted(range(len(answers.scores)), key=lambda index: -answers.scores[index])
    pairs = []
    for better, worse in _candidates(order, which):
        if answers.scores[better] == answers.scores[worse]:
            left_out["ties"] += 1
        elif answers.texts[better] == answers.texts[worse]:
            left_out["same"] += 1
        else:
            pairs.append((better, worse))
    return pairs


def _candidates(order: Sequence[int], which: str) -> Iterator[tuple[int, int]]:
    if len(order) < 2:
        return iter(())
    if which == "best_worst":
        return iter([(order[0], order[-1])])
    if which == "best_others":
        return ((order[0], other) for other in order[1:])
    if which == "adjacent":
        return pairwise(order)
    return combinations(order, 2)


def _list_name(fields: Mapping[str, Any], config: DataConfig) -> str | None:
    if config.answers_field is not None:
        if config.answers_field not in fields:
            raise RowProblem(
                f"it lacks {config.answers_field!r}, the list of answers by data.answers_field."
                f"{did_you_mean(config.answers_field, fields)} Its keys: {', '.join(sorted(fields))}."
            )
        return config.answers_field
    names = [name for name in LISTS if isinstance(fields.get(name), list | Mapping)]
    if len(names) > 1:
        raise RowProblem(
            f"the answers may be in {' or in '.join(map(repr, names))}. Set data.answers_field to the one they are in."
        )
    return names[0] if names else None


def _scored(fields: Mapping[str, Any], name: str, config: DataConfig) -> tuple[list[Any], str, list[Any]]:
    """The answers of a row, the name of their scores, and the scores as the row has them."""
    value = fields[name]
    if isinstance(value, list) and value and (not isinstance(value[0], Mapping) or "role" in value[0]):
        score = _one_of(fields, SCORE_LISTS, config, f"beside {name!r}")
        scores = fields[score]
        if not isinstance(scores, list) or len(scores) != len(value):
            raise RowProblem(
                f"{name!r} has {len(value)} answers, and {score!r} is {str(scores)[:60]!r}: it must be a list of as "
                "many numbers"
            )
        return value, score, scores
    items = as_list(value, name)
    text = _in(items[0], TEXTS)
    if not text:
        raise RowProblem(
            f"the objects in {name!r} have no answer: their keys are {', '.join(sorted(items[0]))}, and an answer is "
            f"in one of {', '.join(TEXTS)}"
        )
    score = _one_of(items[0], SCORES, config, f"in {name!r}")
    for number, item in enumerate(items, 1):
        missing = [key for key in (text[0], score) if item.get(key) is None]
        if missing:
            raise RowProblem(f"{name!r} entry {number} lacks {' and '.join(map(repr, missing))}")
    return [item[text[0]] for item in items], score, [item[score] for item in items]


def _one_of(fields: Mapping[str, Any], usual: Sequence[str], config: DataConfig, where: str) -> str:
    if config.score_field is not None:
        if config.score_field not in fields:
            hint = did_you_mean(config.score_field, fields)
            raise RowProblem(f"there is no {config.score_field!r} {where}, as data.score_field says.{hint}")
        return config.score_field
    names = _in(fields, usual)
    if len(names) != 1:
        problem = (
            f"several scores {where}: {', '.join(names)}" if names else f"no score {where}: none of {', '.join(usual)}"
        )
        raise RowProblem(
            f"it has {problem}. Set data.score_field to the number by which answers are ranked (its keys: "
            f"{', '.join(sorted(fields))})."
        )
    return names[0]


def _in(fields: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if fields.get(name) is not None]


def score_of(value: Any, what: str) -> float:
    """A score of a row as a float. Raises RowProblem unless the difference of two such is finite on a device."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
        raise RowProblem(f"{what} is {str(value)[:60]!r}; it must be a number")
    if abs(value) > LARGEST_SCORE:
        raise RowProblem(f"{what} is {float(value):g}; it must be a number of at most {LARGEST_SCORE:g}")
    return float(value)
