"""Answers that may be wrong: each half of the rows is judged by a model that was trained on the other half.

A model that has seen a row knows its answer by heart, right or wrong, so that its loss tells nothing of the answer.
"""

# N rows

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxft.config import RunConfig
from jaxft.data import tokenizer_of
from jaxft.data.batch import Example
from jaxft.data.chat.encode import encode_all
from jaxft.data.deep.noise import Suspect
from jaxft.data.deep.shapes import closed_list
from jaxft.data.deep.table import Table
from jaxft.data.deep.texts import Texts
from jaxft.data.formats import Conversation, read_row
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ConfigError, DataError, counted
from jaxft.generation.text import Prompt
from jaxft.runs.session.session import Session
from jaxft.terminal.console import say

ROWS = 4_000  # rows that are judged, drawn from all
CLASSES = 12  # answers of a short list, each of which is tried for every row
SHARE = 0.02  # of the rows, that are shown
LEAST = 5  # rows with the same answer from which its median is taken
BATCH = 4  # sequences that are computed at a time, and more if there are more devices
ROWS_A_STEP = 4
ROOM = 64  # tokens beyond the longest row, for an answer of the model


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row that is judged. index: in the texts. answer: its hash in the table."""

    index: int
    conversation: Conversation
    example: Example
    answer: int


def find_noise(
    config: RunConfig, texts: Texts, table: Table, console: Console, *, steps: int = 100, share: float = SHARE
) -> list[Suspect]:
    """The rows whose answers are the least likely by a model that did not see them, the likeliest to be wrong first.

    LoRA is trained on one half of up to 4,000 rows, for one epoch and `steps` updates at most, and judges the other
    half; then the halves change places. Rows are ranked as `Suspect.excess` says. share: of each half, that is
    returned, with the greedy answers of the model that judged. Raises ConfigError for a model with drawn weights, and
    DataError if fewer than 4 rows can be judged.
    """
    if config.model.random_init:
        raise ConfigError(
            "model.random_init draws the weights, and a model that knows nothing judges nothing: set it to False"
        )
    rows = _rows(config, texts, table)
    order = np.random.default_rng(config.seed).permutation(len(rows))
    halves = [[rows[i] for i in np.sort(part)] for part in np.array_split(order, 2)]
    own = _settings(config, rows)
    classes = _classes(rows) if closed_list(table) else []
    suspects: list[Suspect] = []
    for number, (judged, trained) in enumerate(zip(halves, reversed(halves), strict=True), 1):
        say(console, f"part {number} of 2: LoRA on {counted(len(trained), 'row')}, which judges {len(judged):,} others")
        session = Session(own)
        _train(session, trained, steps, config.seed)
        suspects += _judged(session, judged, classes, share)
    return sorted(suspects, key=lambda one: -one.excess)


def _rows(config: RunConfig, texts: Texts, table: Table) -> list[_Row]:
    """Up to ROWS training rows that give one sequence each that fits into data.max_length, in their order."""
    able = np.flatnonzero(table.answer[: texts.train])
    if len(able) > ROWS:
        able = np.sort(np.random.default_rng(config.seed).choice(able, ROWS, replace=False))
    read: dict[int, Conversation] = {}
    for index in able.tolist():
        one, row = texts.locate(index)
        read[index] = read_row(one.rows[row], one.config, row=index, where=one.rows.where(row))
    tokenizer, examples = tokenizer_of(config), dict[int, list[Example]]()
    for example in _encoded(list(read.values()), tokenizer, config):
        examples.setdefault(example.row, []).append(example)
    rows = [
        _Row(index=index, conversation=read[index], example=of_row[0], answer=int(table.answer[index]))
        for index, of_row in examples.items()
        if len(of_row) == 1 and len(of_row[0]) <= config.data.max_length and of_row[0].mask.any()
    ]
    if len(rows) < 4:
        raise DataError(
            f"{counted(len(rows), 'row')} of {texts.train:,} can be judged, as one sequence of data.max_length="
            f"{config.data.max_length}, and two halves need 4 or more: leave out --noise, or mend the rows"
        )
    return rows


def _encoded(conversations: Sequence[Conversation], tokenizer: Tokenizer, config: RunConfig) -> Iterator[Example]:
    return encode_all(conversations, tokenizer, config.data, on_bad=lambda row, where, error: None)


def _settings(config: RunConfig, rows: Sequence[_Row]) -> RunConfig:
    """The config of the trainings: LoRA, and sequences no longer than the rows need."""
    longest = max(len(row.example) for row in rows)
    length = min(-(-(longest + ROOM) // ROOM) * ROOM, max(config.data.max_length, longest + 1))
    adapter = config.adapter if config.adapter.kind == "lora" else dataclasses.replace(config.adapter, kind="lora")
    adapter = dataclasses.replace(adapter, init_lora_weights="default")
    devices = len(jax.devices())
    batch_size = -(-BATCH // devices) * devices
    train = dataclasses.replace(config.train, batch_size=batch_size, accumulation_steps=1, steps=None, on_spike="off")
    data = dataclasses.replace(config.data, max_length=length, packing=True)
    rollout = dataclasses.replace(config.rollout, max_completion_length=ROOM)
    model = dataclasses.replace(config.model, trainable=None)
    return dataclasses.replace(config, model=model, adapter=adapter, train=train, data=data, rollout=rollout)


def _classes(rows: Sequence[_Row]) -> list[_Row]:
    """A row with each answer of a short list, the commonest first; none if there are too many answers."""
    first: dict[int, _Row] = {}
    for row in rows:
        first.setdefault(row.answer, row)
    return list(first.values()) if len(first) <= CLASSES else []


def _train(session: Session, rows: Sequence[_Row], steps: int, seed: int) -> None:
    """One epoch at most."""
    size = max(ROWS_A_STEP, math.ceil(len(rows) / steps))
    order = np.random.default_rng(seed + 1).permutation(len(rows)).tolist()
    for start in range(0, len(rows), size)[:steps]:
        session.forward_backward([rows[i].example for i in order[start : start + size]])
        session.optim_step()


def _judged(session: Session, rows: Sequence[_Row], classes: Sequence[_Row], share: float) -> list[Suspect]:
    """The share of the rows that this model finds the least likely."""
    logps = session.logprobs([row.example for row in rows], temperature=1.0)
    losses_N = np.array([-float(one.mean()) for one in logps])
    usual_N = _usual(losses_N, np.array([row.answer for row in rows], np.uint64))
    excess_N = losses_N - usual_N
    if classes:
        excess_N = _margins(session, rows, classes)
    worst = np.argsort(-excess_N, kind="stable")[: math.ceil(share * len(rows))].tolist()
    answers = _answers(session, [rows[i] for i in worst])
    return [
        Suspect(
            row=rows[i].index,
            loss=float(losses_N[i]),
            usual=float(usual_N[i]),
            excess=float(excess_N[i]),
            answer=_answer(rows[i].conversation),
            model=answer,
        )
        for i, answer in zip(worst, answers, strict=True)
    ]


def _usual(losses_N: np.ndarray, answers_N: np.ndarray) -> np.ndarray:
    """Of each row, the median loss of the rows with the same answer; of all rows if these are few."""
    usual_N = np.full(len(losses_N), np.median(losses_N))
    for answer in np.unique(answers_N):
        same = answers_N == answer
        if np.count_nonzero(same) >= LEAST:
            usual_N[same] = np.median(losses_N[same])
    return usual_N


def _margins(session: Session, rows: Sequence[_Row], classes: Sequence[_Row]) -> np.ndarray:
    """Of each row, the log-probability of the likeliest other answer of the list less that of its own."""
    tried = {
        one.answer: [dataclasses.replace(row.conversation, **_with_answer(row.conversation, one)) for row in rows]
        for one in classes
    }
    scores_NK = np.full((len(rows), len(classes)), -np.inf)
    for column, conversations in enumerate(tried.values()):
        numbered = [dataclasses.replace(one, row=number) for number, one in enumerate(conversations)]
        fits = session.config.data.max_length
        examples = [one for one in _encoded(numbered, session.tokenizer, session.config) if len(one) <= fits]
        for example, logps in zip(examples, session.logprobs(examples, temperature=1.0), strict=True):
            scores_NK[example.row, column] = float(logps.sum())
    number = {answer: column for column, answer in enumerate(tried)}
    own = np.array([number[row.answer] for row in rows])
    at = np.arange(len(rows))
    own_N = scores_NK[at, own]
    scores_NK[at, own] = -np.inf
    others_N = scores_NK.max(axis=1)
    return np.where(np.isfinite(own_N) & np.isfinite(others_N), others_N - own_N, -np.inf)


def _with_answer(one: Conversation, other: _Row) -> dict[str, Any]:
    """The fields of a conversation with the answer of another row."""
    answer = other.conversation
    if not one.messages or not answer.messages:
        return {"completion": _answer(answer)}
    return {"messages": (*one.messages[: _last(one)], answer.messages[_last(answer)])}


def _answers(session: Session, rows: Sequence[_Row]) -> list[str | None]:
    """What the model answers greedily to each row; None where a prompt has more than text, so that it is not asked."""
    prompts = [_prompt(row.conversation) for row in rows]
    questions = {i: prompt for i, prompt in enumerate(prompts) if prompt}
    out: list[str | None] = [None] * len(rows)
    if questions:
        groups = session.sample(list(questions.values()), temperature=0.0, seed=0)
        for i, (answer,) in zip(questions, groups, strict=True):
            out[i] = answer.text
    return out


def _prompt(one: Conversation) -> Prompt | None:
    if one.tools or one.template_kwargs:
        return None
    return list(one.messages[: _last(one)]) if one.messages else one.prompt


def _answer(one: Conversation) -> str:
    return str(one.messages[_last(one)]["content"]) if one.messages else one.completion


def _last(one: Conversation) -> int:
    """The index of the last answer."""
    return max(i for i, message in enumerate(one.messages) if message["role"] == "assistant")
