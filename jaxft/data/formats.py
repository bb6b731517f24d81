"""Readers of the common row formats: each row becomes a `Conversation`.

A reader returns the columns that it read, so that no other column is dropped without a word (`rows/columns`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.config import DataConfig
from jaxft.config.method import methods_on
from jaxft.data.chat.template_text import RESERVED
from jaxft.data.chat.tool_calls import BadCall, tools_of
from jaxft.data.rows.bad_rows import OnBadRow, refuse
from jaxft.data.rows.columns import Form, Unread, is_empty, is_rendering, split_ignored, treatment_of, unread_columns
from jaxft.data.rows.questions import question_columns
from jaxft.data.rows.readers import READERS
from jaxft.data.rows.values import (
    RowProblem,
    is_absent,
    parse_json,
    refuse_unwritable,
    sample,
)
from jaxft.data.sources import Rows
from jaxft.errors import DataError, listed

# The number of a row whose answer is labelled: 1 if it is good, 0 if it is bad.
DESIRABLE = "desirable"
# Columns that a rendering reads beside the messages.
EXTRAS = ("tools", "functions", "documents", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One row, whatever its format: a chat (messages), or plain text (prompt and completion).

    row: index in its source. part: index among the conversations of this row. where: the row's name in errors. format:
    the format it was written in.
    messages: OpenAI messages, empty for plain text. tools: JSON schemas that the template may show.
    first_trained: index of the first message that may be trained on. untrained: indices of answers marked as not to be
    trained. template_kwargs: variables of the chat template for this row, such as enable_thinking.
    prompt, completion: plain text; the prompt of a `text` row is empty. values: numbers of the row that a training
    method reads, such as a margin or a label, by name. unread: columns and keys of the row that no reader reads.
    """

    row: int
    where: str
    format: str
    part: int = 0
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    first_trained: int = 0
    untrained: frozenset[int] = frozenset()
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    completion: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    unread: tuple[Unread, ...] = ()


# The conversations of one row, by its fields, its index and its name in errors. One row may give several, each with its
# place among them in `part`. The counter takes what is left out: `rows` that give none, and others by their names.
# Raises DataError, naming the row, if it cannot be read.
ReadRow = Callable[[Mapping[str, Any], DataConfig, int, str, Counter[str]], Sequence[Conversation]]


def conversation_of(
    fields: Mapping[str, Any], config: DataConfig, row: int, where: str, left_out: Counter[str]
) -> list[Conversation]:
    """`ReadRow` of rows that are one conversation each."""
    return [read_row(fields, config, row=row, where=where)]


def conversations(
    rows: Rows,
    config: DataConfig,
    read: ReadRow = conversation_of,
    *,
    left_out: Counter[str] | None = None,
    on_bad: OnBadRow = refuse,
) -> Iterator[Conversation]:
    """The conversations of every row, in order.

    read: what becomes of a row. left_out: takes what `read` leaves out. on_bad: takes the rows that cannot be read and
    what is wrong with them; by default the first of them raises DataError.
    """
    left_out = Counter[str]() if left_out is None else left_out
    for index in range(len(rows)):
        try:
            of_row = list(read(rows[index], config, index, rows.where(index), left_out))
        except DataError as error:
            on_bad(index, rows.where(index), error)
        except RecursionError:
            where = rows.where(index)
            on_bad(index, where, DataError(f"{where} is nested too deeply to be read"))
        else:
            yield from of_row


def read_row(fields: Mapping[str, Any], config: DataConfig, *, row: int, where: str) -> Conversation:
    """One row as a Conversation, by `config.format` or by the fields that it has.

    row: its index. where: its name in errors. Raises DataError if it cannot be one.
    """
    fields, ignored = split_ignored(fields, config)
    name = config.format if config.format != "auto" else detect(fields, config, where)
    try:
        read, columns = READERS[name].read(fields, config)
        unread = [*ignored, *read.pop("unread", ())]
        if "messages" in read:
            read |= extras_of(fields)
            columns |= {*EXTRAS}
            if documents := read["template_kwargs"].get("documents"):
                unread.append(Unread("documents", sample(documents), treatment_of("documents", config), "documents"))
        _refuse_unwritable(read)
        if any(column not in columns and not is_empty(value) for column, value in fields.items()):
            form = _form(name, read)
            unread += unread_columns(fields, columns, config, _texts_in(read), _other_columns(config), form)
        return Conversation(row=row, where=where, format=name, unread=tuple(unread), **read)
    except (RowProblem, BadCall) as problem:
        raise DataError(f"{where} ({name}): {problem}") from problem


def _form(name: str, read: Mapping[str, Any]) -> Form | None:
    if name in ("alpaca", "qa"):
        return "question"
    if "messages" in read:
        return "chat"
    return "plain" if "prompt" in read else None


def texts_of(conversation: Conversation) -> list[str]:
    """The text of a row that is read, in order."""
    return _texts_in(vars(conversation))


def _texts_in(read: Mapping[str, Any]) -> list[str]:
    """The text in the fields of a Conversation, in order."""
    messages = read.get("messages")
    texts = [message["content"] for message in messages] if messages else [read.get("prompt", ""), read["completion"]]
    return [text for text in texts if text.strip()]


def _refuse_unwritable(read: Mapping[str, Any]) -> None:
    for name in ("prompt", "completion", "tools", "template_kwargs"):
        if value := read.get(name):
            refuse_unwritable(value, name)
    for number, message in enumerate(read.get("messages", ()), 1):
        if len(message) > 2 or not message["content"].isascii():  # else it has a role and plain text
            refuse_unwritable(message, f"message {number}")


def extras_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The tools and the variables of the template that a row gives, as the fields of a Conversation.

    `functions` is OpenAI's older name of `tools`. Raises RowProblem and BadCall.
    """
    given = {name: row[name] for name in ("tools", "functions") if not is_absent(row.get(name)) and row[name]}
    if len(given) > 1:
        raise RowProblem("it has both 'tools' and 'functions': keep one")
    kwargs = template_kwargs_of(row)
    if not is_empty(documents := row.get("documents")):
        documents = parse_json(documents, "'documents'") if isinstance(documents, str) else documents
        if not isinstance(documents, list):
            raise RowProblem(f"'documents' must be a list; it is {sample(documents)!r}")
        kwargs["documents"] = documents
    return {"tools": tools_of({"tools": next(iter(given.values()), None)}), "template_kwargs": kwargs}


def detect(row: Mapping[str, Any], config: DataConfig, where: str) -> str:
    """The one format whose fields the row has. Raises DataError if none fits, or more than one.

    A question and an answer in columns of their own are read only if nothing else fits.
    """
    fitting = [name for name, reader in READERS.items() if name != "qa" and reader.fits(row, config)]
    if not fitting and question_columns(row, config):
        return "qa"
    if len(fitting) == 2 and "text" in fitting:
        fitting = _without_rendering(row, fitting, config)
    if len(fitting) == 1:
        return fitting[0]
    keys = ", ".join(sorted(map(str, row))) or "none"
    if fitting:
        raise DataError(
            f"{where} can be read as {' or as '.join(fitting)} (its keys: {keys}). Set data.format to the one you mean."
        )
    for name, reader in READERS.items():
        wanted = reader.keys(config)
        if nulls := [key for key in wanted if key in row and is_absent(row[key])]:
            if all(key in row for key in wanted):
                raise DataError(
                    f"{where} ({name}): {' and '.join(nulls)} {'is' if len(nulls) == 1 else 'are'} null, and a row "
                    f"of this format needs {' and '.join(wanted)}. Fill it, or remove the row."
                )
    known = "; ".join(f"{name}: {' + '.join(reader.keys(config))}" for name, reader in READERS.items())
    raise DataError(
        f"{where} is of no known format: its keys are {keys}. Known formats and the keys they need: {known}. "
        "Set data.messages_field, data.prompt_field, data.completion_field or data.text_field to your column names."
        f"{_of_another_method(row, config)}"
    )


def _of_another_method(row: Mapping[str, Any], config: DataConfig) -> str:
    """A sentence on the methods that read a row of answers that are compared; empty for any other row."""
    compared = {config.chosen_field, config.rejected_field}, {"preferred_output"}, {"completions"}, {"responses"}
    if not any(columns <= row.keys() for columns in compared):
        return ""
    names = listed(methods_on("pairs"), len(methods_on("pairs")))
    return f" Rows of preferences, as this one seems to be, are trained on by method.name={names}."


def _without_rendering(row: Mapping[str, Any], fitting: Sequence[str], config: DataConfig) -> list[str]:
    """The other format alone, if the text of a row renders what the row has in that format, as in tatsu-lab/alpaca."""
    (other,) = (name for name in fitting if name != "text")
    try:
        read, _ = READERS[other].read(row, config)
    except (RowProblem, BadCall):
        return [*fitting]
    text = row[config.text_field]
    return [other] if isinstance(text, str) and is_rendering(text, _texts_in(read)) else [*fitting]


def _other_columns(config: DataConfig) -> frozenset[str]:
    """Columns of other formats than the one that the config names, which are left alone on purpose."""
    if config.format == "auto":
        return frozenset()
    return frozenset(key for reader in READERS.values() for key in reader.keys(config))


def template_kwargs_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the chat template that a row gives as `chat_template_kwargs`. Raises RowProblem."""
    given = row.get("chat_template_kwargs")
    if is_absent(given) or not given:
        return {}
    if isinstance(given, str):
        given = parse_json(given, "'chat_template_kwargs'")
    if not isinstance(given, Mapping) or set(given) & set(RESERVED):
        raise RowProblem(
            f"'chat_template_kwargs' must be an object of variables other than {', '.join(RESERVED)}; it is "
            f"{sample(given)!r}"
        )
    return {str(name): value for name, value in given.items()}
