"""The texts of a row, whatever its form: what is asked, what stands before it, and the answer."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxft.config import DataConfig, RunConfig
from jaxft.config.method import methods_on
from jaxft.data.formats import DESIRABLE, Conversation, conversation_of
from jaxft.data.preferences import read_pairs
from jaxft.data.preferences.labelled import read_labelled
from jaxft.data.prepare import RowSet
from jaxft.data.prompts import prompt_and_answer
from jaxft.data.rows.values import RowProblem, present
from jaxft.errors import DataError

READ = (DataError, RowProblem, RecursionError)  # what a row that cannot be read raises


@dataclass(frozen=True, kw_only=True)
class RowText:
    """The texts of one row.

    before: the messages before the last question, and the tools, as text. user: the last question; None for plain text
    without a prompt. answer: of a pair the chosen one; None if the row has none. whole: all messages but system ones.
    rejected: the other answer of a pair. label: of a labelled answer, 1 if it is good, else 0.
    """

    before: str
    user: str | None
    answer: str | None
    whole: str
    rejected: str | None = None
    label: float | None = None


# The texts of a row by its fields, how its set is read, its index and its name. None: the row gives no example.
ReadText = Callable[[Mapping[str, Any], DataConfig, int, str], RowText | None]


class Texts:
    """The texts of all rows of several sets, one set after another, read from their source at each access.

    sets: training sets, then held-out ones. train: number of training rows, which come first.
    """

    def __init__(self, train: Sequence[RowSet], held_out: Sequence[RowSet], config: RunConfig) -> None:
        self.sets = [*train, *held_out]
        self.train = sum(len(one.rows) for one in train)
        self._ends = np.cumsum([len(one.rows) for one in self.sets])
        self._read = reader_of(config)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.sets else 0

    def locate(self, index: int) -> tuple[RowSet, int]:
        """(the set of a row, its index within the set)."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.sets[number], index - (int(self._ends[number - 1]) if number else 0)

    def where(self, index: int) -> str:
        """The name of a row in errors, such as `train.jsonl line 7`."""
        one, row = self.locate(index)
        return one.rows.where(row)

    def fields(self, index: int) -> dict[str, Any]:
        """The row as its source has it."""
        one, row = self.locate(index)
        return one.rows[row]

    def __getitem__(self, index: int) -> RowText | None:
        """The texts of a row; None if it gives no example. Raises one of READ if it cannot be read."""
        one, row = self.locate(index)
        return self._read(one.rows[row], one.config, row, one.rows.where(row))

    def known(self, index: int) -> RowText:
        """The texts of a row that was read before."""
        text = self[index]
        if text is None:
            raise DataError(f"{self.where(index)} has changed since it was read: start again")
        return text


def reader_of(config: RunConfig) -> ReadText:
    """How the rows of the config's method become texts: conversations, pairs, labelled answers or prompts."""
    name = config.method.name
    if name in methods_on("pairs"):
        return _pair
    if name in methods_on("labelled"):
        return _labelled
    return _prompt if name in methods_on("prompts") else _conversation


def _conversation(fields: Mapping[str, Any], config: DataConfig, row: int, where: str) -> RowText | None:
    (one,) = conversation_of(fields, config, row, where, Counter())
    return _text_of(one)


def _pair(fields: Mapping[str, Any], config: DataConfig, row: int, where: str) -> RowText | None:
    read = read_pairs(fields, config, row, where, Counter())
    if not read:
        return None
    chosen, rejected = (_text_of(one) for one in read[:2])
    return replace(chosen, whole=f"{chosen.whole}\n{rejected.answer}", rejected=rejected.answer)


def _labelled(fields: Mapping[str, Any], config: DataConfig, row: int, where: str) -> RowText | None:
    (one,) = read_labelled(fields, config, row, where, Counter())
    return replace(_text_of(one), label=float(one.values[DESIRABLE]))


def _prompt(fields: Mapping[str, Any], config: DataConfig, row: int, where: str) -> RowText | None:
    kept = {name: value for name, value in present(fields).items() if name not in config.ignored_names}
    prompt, answer, _ = prompt_and_answer(kept, config)
    if isinstance(prompt, str):
        return RowText(before="", user=prompt, answer=answer, whole=prompt)
    return _of_messages(prompt, answer)


def _text_of(one: Conversation) -> RowText:
    if not one.messages:
        user = one.prompt or None
        return RowText(before="", user=user, answer=one.completion, whole=f"{one.prompt}\n{one.completion}".strip())
    answers = [i for i, message in enumerate(one.messages) if message["role"] == "assistant"]
    last = answers[-1] if answers else len(one.messages)
    text = _of_messages(one.messages[:last], _written(one.messages[last]) if answers else None)
    extras = [json.dumps(extra, sort_keys=True, default=str) for extra in (one.tools, one.template_kwargs) if extra]
    return replace(text, before="\n".join([*extras, text.before]))


def _of_messages(messages: Sequence[Mapping[str, Any]], answer: str | None) -> RowText:
    """The texts of the messages before an answer, and of the answer."""
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    last = users[-1] if users else len(messages)
    parts = [f"{message.get('role')}: {_written(message)}" for i, message in enumerate(messages) if i != last]
    spoken = [_written(message) for message in messages if message.get("role") not in ("system", "developer")]
    user = _written(messages[last]) if users else None
    return RowText(before="\n".join(parts), user=user, answer=answer, whole="\n".join([*spoken, answer or ""]).strip())


def _written(message: Mapping[str, Any]) -> str:
    """What a message says, the calls of tools with it."""
    content = message.get("content")
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content, default=str)
    calls = message.get("tool_calls")
    return text if not calls else f"{text}{json.dumps(calls, sort_keys=True, default=str)}"
