"""Encoding a part of a set: some of its rows, to a batch of an Arrow file and the counts of what was read."""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from jaxft.config import DataConfig
from jaxft.data.batch import Example
from jaxft.data.chat.arrange import names_of
from jaxft.data.chat.encode import encode_all
from jaxft.data.chat.reasoning import thoughts_of
from jaxft.data.encoded.table import ExampleTable, Facts, Part, facts_of, hashes_of
from jaxft.data.formats import DESIRABLE, Conversation, ReadRow, conversations
from jaxft.data.rows.bad_rows import BadRows
from jaxft.data.rows.columns import Unread, UnreadColumn, UnreadColumns
from jaxft.data.sources import Listed, Rows, Subset
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError

VALUE = "value:"  # before the names of values, in the names of columns
SMALL_VOCABULARY = 2**16  # token ids below it are kept in two bytes

UNTRAINED = (
    "trains on zero tokens: every answer in it is empty or marked not to be trained (train: false, weight: 0). Remove "
    "the row, or the marks."
)


class NotKept(Exception):
    """Encoded rows cannot be written to where they are kept. The message says why."""


@dataclass(frozen=True, kw_only=True)
class ReadCounts:
    """What was counted while a set was read and tokenised.

    formats, holds: rows of each format, and with each kind of part. chats: rows of each format that are rendered by a
    chat template. notes: as `encode_all` counts them. left_out: what the reader left out: `rows`, and pairs of answers
    by the reason. bad: rows that cannot be trained on. unread: columns that nothing reads.
    """

    formats: Counter[str] = field(default_factory=Counter)
    holds: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    chats: Counter[str] = field(default_factory=Counter)
    bad: BadRows = field(default_factory=BadRows)
    unread: UnreadColumns = field(default_factory=UnreadColumns)

    def fields(self) -> dict[str, Any]:
        """What an Examination says of it too."""
        return {
            "formats": dict(self.formats),
            "holds": dict(self.holds),
            "skipped": len(self.bad),
            "bad_rows": self.bad.messages,
            "unread": self.unread.listed,
        }

    def add(self, other: "ReadCounts") -> None:
        """Adds the counts of another part of the set."""
        for name, counter in vars(other).items():
            getattr(self, name).update(counter)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        counters = {name: dict(counter) for name, counter in vars(self).items() if isinstance(counter, Counter)}
        columns = {name: dataclasses.asdict(column) for name, column in self.unread.columns.items()}
        return {**counters, "bad": dataclasses.asdict(self.bad), "unread": columns}

    @classmethod
    def from_dict(cls, counts: Mapping[str, Any]) -> "ReadCounts":
        """The inverse of `to_dict`, but for the names of `unread`, which are needed to count alone."""
        counters = {name: Counter(counter) for name, counter in counts.items() if name not in ("bad", "unread")}
        columns = {name: UnreadColumn(**column) for name, column in counts["unread"].items()}
        return cls(**counters, bad=BadRows.from_dict(counts["bad"]), unread=UnreadColumns(columns=columns))


@dataclass(frozen=True, kw_only=True)
class Work:
    """All that a process must know to encode rows of a set. config: how they are read. read: what becomes of a row."""

    rows: Rows
    config: DataConfig
    tokenizer: Tokenizer
    read: ReadRow

    def encode(self, start: int, stop: int, listed: Listed | None = None) -> tuple[pa.RecordBatch, ReadCounts]:
        """The examples of the rows from start to stop - 1 that can be trained on; the others are counted as bad.

        listed: these rows, if they were read already.
        """
        counts = ReadCounts(unread=UnreadColumns(template_names=names_of(self.tokenizer)))
        rows = listed or Subset(self.rows, range(start, stop), f"rows {start:,} to {stop - 1:,}")

        def on_bad(row: int, where: str, error: Exception) -> None:
            counts.bad.add(start + row, where, error)

        read = conversations(rows, self.config, self.read, left_out=counts.left_out, on_bad=on_bad)
        contents: dict[int, _RowContents] = {}
        examples = list(encode_all(_with_contents(read, contents), self.tokenizer, self.config, counts.notes, on_bad))
        for example in examples:
            if not example.mask.any():
                where = rows.where(example.row)
                on_bad(example.row, where, DataError(f"{where} {UNTRAINED}"))
        for row, own in contents.items():
            if start + row not in counts.bad:
                counts.formats[own.format] += 1
                counts.chats[own.format] += own.is_chat
                counts.unread.add(own.unread)
                counts.holds.update(list(own.features))
        moved = (dataclasses.replace(example, row=start + example.row) for example in examples)
        return to_arrow([one for one in moved if one.row not in counts.bad], self.tokenizer.vocab_size), counts


@dataclass
class _RowContents:
    """What a row contains. features: in a fixed order, unlike a set."""

    format: str
    is_chat: bool
    unread: tuple[Unread, ...]
    features: dict[str, None] = field(default_factory=dict)


def _with_contents(read: Iterable[Conversation], contents: dict[int, _RowContents]) -> Iterator[Conversation]:
    """The conversations, while what their rows contain is added to `contents`, by the index of the row."""
    for one in read:
        if one.row not in contents:
            contents[one.row] = _RowContents(one.format, bool(one.messages), one.unread)
        contents[one.row].features.update(dict.fromkeys(_features(one)))
        yield one


def to_arrow(examples: Sequence[Example], vocab_size: int) -> pa.RecordBatch:
    """A batch with a row for each example, of which `from_arrow` makes a table again."""
    facts = facts_of(examples)
    offsets = np.concatenate([[0], np.cumsum(facts.lengths)]).astype(np.int64)
    token_type = np.uint16 if vocab_size <= SMALL_VOCABULARY else np.uint32
    tokens = np.concatenate([np.zeros(0, np.int32), *(example.tokens for example in examples)]).astype(token_type)
    mask = np.concatenate([np.zeros(0, np.uint8), *(example.mask for example in examples)])
    columns: dict[str, Any] = {
        "tokens": pa.LargeListArray.from_arrays(offsets, tokens),
        "mask": pa.LargeListArray.from_arrays(offsets, mask),
        "row": facts.rows,
        "part": np.array([example.part for example in examples], np.int32),
        "trained": facts.trained,
        "end": facts.ends,
        "hash": hashes_of(examples),
    }
    for name in sorted({name for example in examples for name in example.values}):
        columns[VALUE + name] = np.array([example.values.get(name, (np.nan,))[0] for example in examples], np.float64)
    return pa.record_batch({name: pa.array(column) for name, column in columns.items()})


def from_arrow(batches: Iterable[pa.RecordBatch]) -> ExampleTable:
    """The table of all examples of some batches, which it reads where they lie."""
    batches = list(batches)
    parts = [_part(batch) for batch in batches]

    def column(name: str, dtype: Any) -> np.ndarray:
        columns = [_view(batch.column(name)) for batch in batches]
        return np.concatenate([np.zeros(0, dtype), *columns]).astype(dtype)

    names = sorted({name for batch in batches for name in batch.schema.names if name.startswith(VALUE)})
    values = {
        name.removeprefix(VALUE): np.concatenate(
            [
                _view(batch.column(name)) if name in batch.schema.names else np.full(len(batch), np.nan)
                for batch in batches
            ]
        )
        for name in names
    }
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.offsets) for part in parts)])
    facts = Facts(
        lengths=lengths, trained=column("trained", np.int64), rows=column("row", np.int64), ends=column("end", np.int64)
    )
    return ExampleTable(
        parts=parts,
        numbers=np.arange(len(lengths)),
        facts=facts,
        of_row=column("part", np.int64),
        hashes=column("hash", np.uint64),
        values=values,
    )


def write_arrow(batch: pa.RecordBatch, path: str | os.PathLike[str]) -> None:
    """Writes an Arrow file, which other programs open too, to the disk. Raises NotKept."""
    with keeping(path), open(path, "wb") as file:
        with pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def keeping(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises NotKept for an OSError in the block, which writes to a path."""
    try:
        yield
    except OSError as error:
        raise NotKept(f"cannot write {os.fspath(path)!r}: {error.strerror or error}") from error


def map_arrow(path: str | os.PathLike[str]) -> pa.RecordBatch:
    """The batch of a file of `write_arrow`, mapped, so that its pages are read when they are used.

    Raises OSError and ArrowException.
    """
    return pa.ipc.open_stream(pa.memory_map(os.fspath(path))).read_next_batch()


def read_arrow(path: str | os.PathLike[str]) -> pa.RecordBatch:
    """The batch of a file of `write_arrow`, in memory, so that the file may be removed."""
    with open(path, "rb") as file:
        return pa.ipc.open_stream(file.read()).read_next_batch()


def _part(batch: pa.RecordBatch) -> Part:
    tokens, mask = batch.column("tokens"), batch.column("mask")
    return Part(
        tokens=_view(tokens.values),
        mask=_view(mask.values),
        offsets=_view(tokens.offsets),
    )


def _view(array: pa.Array) -> np.ndarray:
    """The numbers of an Arrow array, where they lie. Its own `to_numpy` imports pandas, which takes longer than all."""
    dtype, (*_, buffer) = np.dtype(str(array.type)), array.buffers()
    if not len(array) or buffer is None:
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype, len(array), array.offset * dtype.itemsize)


def _features(conversation: Conversation) -> list[str]:
    """What a row has beside a question and an answer."""
    messages = conversation.messages
    answers = [message for message in messages if message["role"] == "assistant"]
    features = {
        "a system message": any(message["role"] in ("system", "developer") for message in messages),
        "several answers": len(answers) > 1,
        "tools": bool(conversation.tools),
        "tool calls": any(message.get("tool_calls") for message in answers),
        "thoughts": any(thoughts_of(message) for message in answers),
        "answers not to be trained": bool(conversation.untrained),
        "a good label": conversation.values.get(DESIRABLE) == 1,
        "a bad label": conversation.values.get(DESIRABLE) == 0,
    }
    return [name for name, present in features.items() if present]
