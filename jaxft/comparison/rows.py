"""The rows of a comparison: held out, for choosing (dev), and examples for prompts; no row is in two of them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from jaxft.comparison.leaks import near_leaks
from jaxft.config import DataConfig, RunConfig
from jaxft.data import Conversation, Tokenizer
from jaxft.data.chat.reasoning import split_thoughts
from jaxft.data.formats import conversations
from jaxft.data.prepare import RowSet, open_sets
from jaxft.errors import ConfigError, did_you_mean
from jaxft.methods import method_of

DEV_SHARE, MOST_DEV = 0.1, 200
WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A conversation with its answer. name: of the row, in errors. data: how its set is read. cluster: its group."""

    conversation: Conversation
    data: DataConfig
    name: str
    cluster: str | None = None

    @property
    def system(self) -> tuple[dict[str, object], ...]:
        """The messages of the system, or of a developer, at its start."""
        messages = self.conversation.messages
        count = next((i for i, one in enumerate(messages) if one["role"] not in ("system", "developer")), len(messages))
        return messages[:count]

    @property
    def question(self) -> str:
        """What is asked last: the text of the last message of a user, or a plain prompt."""
        users = [one for one in self.conversation.messages if one["role"] == "user"]
        content = users[-1]["content"] if users else self.conversation.prompt
        return content if isinstance(content, str) else str(content)

    @property
    def answer(self) -> str:
        """The last answer, without thoughts."""
        messages = self.conversation.messages
        text = messages[-1]["content"] if messages else self.conversation.completion
        return split_thoughts(text if isinstance(text, str) else str(text or ""))[1].strip()

    @property
    def words(self) -> tuple[str, ...]:
        """The words of all that is asked, the system's apart, in lower case: rows with the same are the same question.

        Earlier answers count, so that questions of several turns differ by their turns.
        """
        messages = self.conversation.messages[len(self.system) :]
        texts = [str(one.get("content") or "") for one in messages[:-1]] if messages else [self.conversation.prompt]
        return tuple(WORD.findall(" ".join(texts).lower()))


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of a comparison.

    held_out: what every way is scored on. dev: what settings of prompts are chosen on. train: all rows that a run
    trains on, of which examples for prompts are taken: `examples` while settings are chosen, `train` later.
    leaked: held-out rows whose question is in training too; such training rows are no examples. contradictions:
    training rows whose question has another answer elsewhere in training. trained: all training rows. seed: of draws.
    near: other held-out rows that nearly stand in training, each with the name of such a training row.
    """

    held_out: tuple[Row, ...]
    dev: tuple[Row, ...]
    examples: tuple[Row, ...]
    train: tuple[Row, ...]
    trained: int
    leaked: tuple[str, ...]
    contradictions: int
    seed: int
    near: Mapping[str, str] = field(default_factory=dict)


def load_rows(
    config: RunConfig, tokenizer: Tokenizer, *, dev_rows: int = MOST_DEV, cluster: str | None = None
) -> Split:
    """The rows of a config, split by its seed. cluster: the column of the held-out rows' groups.

    Raises ConfigError for a method that does not train on conversations and a config without held-out rows or a metric;
    DataError as the method's own preparation does.
    """
    if config.method.chosen.ROWS != "conversations":
        raise ConfigError(
            f"method.name={config.method.name!r} does not train on conversations, of which examples for prompts are "
            "made: compare with the config of a supervised run"
        )
    if config.data.eval is None and config.data.eval_fraction is None:
        raise ConfigError("nothing is held out to compare on: set data.eval or data.eval_fraction")
    if config.eval.metric is None:
        raise ConfigError("eval.metric is None: set it to what makes an answer right, such as exact_match")
    data = method_of(config).prepare(config, tokenizer)
    train, held_out = open_sets(config)
    by_name = {row.name: row for row in _rows_of(held_out, cluster)}
    rows = [row for row in _rows_of(train) if row.answer]
    split = split_rows(rows, [by_name[name] for name in data.eval_names], config.seed, dev_rows)
    near = near_leaks([row.question for row in rows], [row.question for row in split.held_out])
    names = {split.held_out[index].name: rows[other].name for index, other in near.items()}
    return replace(split, near={name: other for name, other in names.items() if name not in split.leaked})


def _rows_of(sets: Sequence[RowSet], cluster: str | None = None) -> list[Row]:
    def row_of(one: RowSet, conversation: Conversation) -> Row:
        name, group = one.rows.where(conversation.row), None
        if cluster is not None:
            fields = one.rows[conversation.row]
            if cluster not in fields:
                raise ConfigError(
                    f"--cluster={cluster}: {name} has no such column.{did_you_mean(cluster, list(fields))}"
                )
            group = str(fields[cluster])
        return Row(conversation=conversation, data=one.config, name=name, cluster=group)

    return [
        row_of(one, conversation)
        for one in sets
        for conversation in conversations(one.rows, one.config, on_bad=lambda row, where, error: None)
        if conversation.format != "text"
    ]


def split_rows(train: Sequence[Row], held_out: Sequence[Row], seed: int, dev_rows: int = MOST_DEV) -> Split:
    """Splits dev rows off the training rows: a tenth of them, at most `dev_rows`, drawn by the seed."""
    questions = {row.words for row in held_out}
    of_train = {row.words for row in train}
    clean = [row for row in train if row.words not in questions]
    count = min(dev_rows, MOST_DEV, max(1, round(DEV_SHARE * len(clean)))) if len(clean) > 1 else 0
    order = np.random.default_rng([seed, 1]).permutation(len(clean)).tolist()
    # Rows with one question stay together: the dev part must not see itself among the examples.
    dev_words = {clean[index].words for index in order[:count]}
    dev = [clean[index] for index in sorted(order[:count])]
    return Split(
        held_out=tuple(held_out),
        dev=tuple(dev),
        examples=tuple(row for row in clean if row.words not in dev_words),
        train=tuple(clean),
        trained=len(train),
        leaked=tuple(row.name for row in held_out if row.words in of_train),
        contradictions=_contradictions(train),
        seed=seed,
    )


def _contradictions(rows: Sequence[Row]) -> int:
    answers: dict[tuple[str, ...], Counter[str]] = {}
    for row in rows:
        answers.setdefault(row.words, Counter())[row.answer] += 1
    return sum(sum(counted.values()) for counted in answers.values() if len(counted) > 1)
