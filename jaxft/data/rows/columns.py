"""Columns of rows, and keys of messages, that nothing reads: they are listed, ignored by a setting, or refused.

A name with a dot is a key within messages: `messages.KEY` of a message, `messages.content.KEY` of a part of its
content, whatever the column of the messages is called.
"""

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxft.config import DataConfig
from jaxft.data.rows.marks import NAMES as MARKS
from jaxft.data.rows.marks import changes_nothing
from jaxft.data.rows.values import is_absent, sample
from jaxft.errors import counted

# Rows of a question and an answer in columns, of messages, and of a prompt and a completion as plain text.
Form = Literal["question", "chat", "plain"]
# Settings by which more columns are read, by the form of a row.
SETTINGS: Mapping[Form, str] = {
    "question": " data.context_field names a column with a text that belongs to the question, and data.system_field "
    "one with a system prompt.",
    "chat": " data.system_field names a column with a system prompt.",
    "plain": " data.format='qa' renders prompts and completions as a chat, with the columns data.context_field and "
    "data.system_field.",
}
Treatment = Literal["listed", "ignored", "refused"]
# Names of columns that tell of a row and are not part of it: where it is from, what it is about, how it was made.
BOOKKEEPING = frozenset("""
    id ids _id uid guid uuid idx index row row_id hash sha sha256 md5 key number
    source sources src origin original_source dataset dataset_name data_source subset subset_name collection url urls
    title dump hexsha ext
    link links uri path file file_name filename file_path repo provenance license licence copyright author authors
    user_name username annotator annotator_type annotation_type translator
    category categories subcategory topic topics full_topic intent
    tag tags domain field_of_study genre theme difficulty level grade
    task task_type task_name task_category task_id type kind skill skills ability cot_type problem_type question_type
    language lang languages locale language_code country
    split fold partition
    reward rewards advantage
    score scores rating ratings rank quality quality_score toxicity confidence likes views upvotes downvotes votes
    perplexity similarity
    timestamp time date created created_at created_on updated updated_at modified year month version revision
    model models model_name generator generation_model generator_model engine temperature top_p top_k max_tokens seed
    parallel_tool_calls skip_prompt_formatting avatar_name custom_instruction
    tokens num_tokens n_tokens token_count length lengths size char_count word_count num_turns n_turns turn turns_count
    metadata meta meta_data annotations extra_info info statistics stats features_version
    redacted toxic synthetic deleted review_count review_result tree_state emojis hashed_ip header turn_identifier
    openai_moderation detoxify_moderation gen_input_configs original_question is_reasoning_complete schema_version
    name tool_call_id cache_control logprobs finish_reason step
""".split())  # fmt: skip
ENDINGS = re.compile(
    r"_(id|ids|uuid|url|hash|index|count|tokens|length|model|score|scores|rating|timestamp|date|lang)$"
)
# Columns that pandas writes for the index of a table.
PANDAS = re.compile(r"(unnamed:_?\d+|__index_level_\d+__)$")
# Flags that say nothing where they are false.
FLAGS = ("messages.prefix", "messages.partial", "messages.continue_final_message")
# A text this short may occur in another by chance.
LONG = 16


class Unread(NamedTuple):
    """A field of one row that nothing reads. name: dotted. value: shortened, for messages.

    template_name: the variable or key under which the chat template could read it; None if it could not. form: of the
    row, if its format has settings that could make the field read.
    """

    name: str
    value: str
    treatment: Treatment
    template_name: str | None = None
    form: Form | None = None


@dataclass
class UnreadColumn:
    """A column or a key of messages that nothing reads. rows: that have it. sample: its value in the first of them.

    form: of the first of them.
    """

    name: str
    rows: int
    sample: str
    treatment: Treatment
    form: Form | None = None

    def __str__(self) -> str:
        return f"{self.name} ({counted(self.rows, 'row')}, such as {self.sample!r})"


@dataclass
class UnreadColumns:
    """The unread columns of a set, counted row by row. template_names: all names that its chat template mentions."""

    template_names: Collection[str] = ()
    columns: dict[str, UnreadColumn] = field(default_factory=dict)

    def add(self, unread: Iterable[Unread]) -> None:
        """Counts the unread fields of one row, except those that the chat template reads."""
        counted = set()
        for one in unread:
            if one.name in counted or one.template_name in self.template_names:
                continue
            counted.add(one.name)
            column = self.columns.setdefault(one.name, UnreadColumn(one.name, 0, one.value, one.treatment, one.form))
            column.rows += 1
            # Listed in some rows, such as a repetition of the messages, and refused in others.
            if one.treatment == "refused" and column.treatment == "listed":
                column.treatment, column.sample, column.form = one.treatment, one.value, one.form

    def update(self, other: "UnreadColumns") -> None:
        """Adds the counts of further rows."""
        for name, column in other.columns.items():
            own = self.columns.setdefault(name, dataclasses.replace(column, rows=0))
            own.rows += column.rows
            if column.treatment == "refused" and own.treatment == "listed":
                own.treatment, own.sample, own.form = column.treatment, column.sample, column.form

    @property
    def listed(self) -> tuple[UnreadColumn, ...]:
        """The columns, those in most rows first."""
        return tuple(sorted(self.columns.values(), key=lambda column: (-column.rows, column.name)))

    def refusal(self, source: str) -> str | None:
        """The error message for columns that may carry meaning and are not ignored by a setting; None without any."""
        refused = [column for column in self.columns.values() if column.treatment == "refused"]
        if not refused:
            return None
        listed = "".join(f"\n  {column}" for column in refused)
        names = ", ".join(column.name for column in refused)
        return (
            f"columns of {source} would be dropped, because nothing reads them:{listed}\n"
            f"Set data.ignored_columns={names!r} to train without them, or '*' for all columns that nothing reads."
            f"{_mends(refused)}"
        )


def combine_unread(sets: Iterable[Sequence[UnreadColumn]]) -> tuple[UnreadColumn, ...]:
    """The unread columns of several sets, each once."""
    total = UnreadColumns()
    for columns in sets:
        total.update(UnreadColumns(columns={column.name: column for column in columns}))
    return total.listed


def _mends(refused: Sequence[UnreadColumn]) -> str:
    names = [column.name for column in refused]
    mends = [SETTINGS[form] for form in dict.fromkeys(column.form for column in refused) if form is not None]
    if "documents" in names:
        mends.append(" The chat template does not read documents: data.chat_template may be one that does.")
    if "label" in names:
        mends.append(" Labels of good and bad answers are read by method.name='kto'.")
    if {"rejected", "rejected_response"} & set(names):
        mends.append(" Rejected answers are read by methods of preferences, such as method.name='dpo'.")
    if any(name in MARKS for name in names):
        mends.append(" A whole row cannot be weighted or left untrained: remove the rows that are not to be trained.")
    if any(name.startswith("messages.") for name in names):
        mends.append(
            " A mark that keeps a message from being trained is named by data.marks, such as 'NAME=untrained'."
        )
    return "".join(mends)


def split_ignored(
    fields: Mapping[str, Any], config: DataConfig, prefix: str = ""
) -> tuple[dict[str, Any], list[Unread]]:
    """(the fields that data.ignored_columns does not name, those that it names, as unread ones).

    prefix: of their names, such as `messages.`.
    """
    if not config.ignored_names:
        return dict(fields), []
    ignored = {name for name in fields if f"{prefix}{name}" in config.ignored_names}
    kept = {name: value for name, value in fields.items() if name not in ignored}
    return kept, [
        Unread(f"{prefix}{name}", sample(fields[name]), "ignored") for name in ignored if not is_empty(fields[name])
    ]


def unread_columns(
    row: Mapping[str, Any],
    read: Collection[str],
    config: DataConfig,
    texts: Sequence[str],
    others: Collection[str] = (),
    form: Form | None = None,
) -> Iterator[Unread]:
    """The columns of a row that nothing reads, and that hold something.

    read: the columns that are read. texts: what is read of the row, as text. others: columns that are listed too: those
    of other formats, if the config names the one that the rows have. form: of the row.
    """
    for name, value in row.items():
        if name in read or is_empty(value):
            continue
        harmless = (
            changes_nothing(name, value)
            if name in MARKS
            else name in others or is_bookkeeping(name) or _repeats(value, texts)
        )
        yield Unread(name, sample(value), treatment_of(name, config, harmless=harmless), None, form)


def unread_keys(item: Mapping[str, Any], read: Collection[str], prefix: str, config: DataConfig) -> Iterator[Unread]:
    """The keys of a message, or of a part of one, that jaxft does not read. The chat template may read them.

    prefix: `messages` or `messages.content`.
    """
    for key, value in item.items():
        name = f"{prefix}.{key}"
        if key in read or is_empty(value) or (name in FLAGS and value is False):
            continue
        yield Unread(name, sample(value), treatment_of(name, config, harmless=is_bookkeeping(key)), key)


def treatment_of(name: str, config: DataConfig, *, harmless: bool = False) -> Treatment:
    """What becomes of an unread field of this name."""
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.ignored_names):
        return "ignored"
    return "listed" if harmless else "refused"


@functools.lru_cache(maxsize=4096)
def is_bookkeeping(name: str) -> bool:
    """Whether a column or key of this name tells of a row, and is not part of it."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|[\s-]", "_", name.strip()).lower()
    # Tables of pandas have an index without a name.
    return not name or name in BOOKKEEPING or bool(ENDINGS.search(name) or PANDAS.match(name))


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing that could be lost."""
    if isinstance(value, str):
        return not value.strip()
    return is_absent(value) or (isinstance(value, Mapping | list | tuple) and all(map(is_empty, _items(value))))


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value


def _repeats(value: Any, texts: Sequence[str]) -> bool:
    """Whether a cell says only what the read text of its row says too, or repeats all of that text."""
    own = [text.strip() for text in _contents(value)]
    if own and all(any(_within(text, other) for other in texts) for text in own):
        return True
    return isinstance(value, str) and is_rendering(value, texts)


def is_rendering(value: str, texts: Sequence[str]) -> bool:
    """Whether a text holds all that is read of its row, in the same order, as a rendering of it does."""
    at = 0
    for text in texts:
        start = value.find(text.strip(), at)
        if start < 0:
            return False
        at = start + len(text.strip())
    return sum(map(len, texts)) >= LONG


def _within(text: str, other: str) -> bool:
    return text == other.strip() or (len(text) >= LONG and text in other)


def _contents(value: Any) -> Iterator[str]:
    """The text within a cell; of messages their contents alone."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        contents = [value[key] for key in ("content", "value") if key in value]
        for item in contents or value.values():
            yield from _contents(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _contents(item)
    elif not is_absent(value):
        yield repr(value)
