"""Rows of every format and method, in files of every kind, from well formed to garbage."""

import bz2
import gzip
import io
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import pyarrow
from fuzz.limits import one_input
from fuzz.values import NASTY, TEXTS, damaged, fixed, nested
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from jaxft.assets import ASSETS
from jaxft.config import DataConfig, EvalConfig, ModelConfig, RunConfig
from jaxft.data import load_tokenizer, prepare
from jaxft.data.preferences import prepare_pairs
from jaxft.data.preferences.labelled import prepare_labelled
from jaxft.data.prompts import prepare_prompts
from jaxft.data.rows.marks import NAMES as MARKS
from jaxft.data.rows.questions import CONTEXTS, QUESTIONS, SYSTEMS
from jaxft.data.rows.readers import THOUGHTS, TURNS
from jaxft.data.rows.turn_lists import CONTENT_KEYS, ROLE_KEYS, SPEAKERS
from jaxft.data.sources.file_kinds import COMPRESSIONS, KINDS

SMOKE = load_tokenizer(str(ASSETS / "smoke"))
COLUMNS = sorted({
    *TURNS, "conversations", "prompt", "completion", "instruction", "output", "text", "history", "chosen", "rejected",
    "completions", "answers", "label", "score", "tools", "functions", "documents", "chat_template_kwargs", "id",
    "weight", *SYSTEMS, *CONTEXTS, *THOUGHTS, *(name for pair in QUESTIONS for name in pair), "preferred_output",
})  # fmt: skip
INNER = sorted({
    *ROLE_KEYS, *CONTENT_KEYS, "tool_calls", "function_call", "name", "arguments", "function", "type", "id", "input",
    "tool_call_id", "reasoning_content", "thinking", "parameters", "properties", *MARKS,
})  # fmt: skip
KEYS = st.one_of(st.sampled_from(COLUMNS), st.sampled_from(INNER), TEXTS)
VALUES = nested(KEYS)
CONTENTS = st.one_of(TEXTS, TEXTS, VALUES)
ROLES = st.one_of(st.sampled_from(sorted(SPEAKERS)), st.sampled_from(sorted(SPEAKERS)), VALUES)
MESSAGES = st.builds(
    lambda role_key, role, content_key, content, more: {role_key: role, content_key: content, **more},
    st.sampled_from(ROLE_KEYS), ROLES, st.sampled_from(CONTENT_KEYS), CONTENTS,
    st.dictionaries(st.sampled_from(INNER), VALUES, max_size=2),
)  # fmt: skip
GOOD = st.lists(TEXTS, min_size=1, max_size=3).map(
    lambda texts: [
        m for t in texts for m in ({"role": "user", "content": "q" + t}, {"role": "assistant", "content": t})
    ]
)
CHATS = st.one_of(GOOD, st.lists(MESSAGES, max_size=4), st.lists(TEXTS, max_size=4), VALUES)
ROWS = st.one_of(
    st.dictionaries(KEYS, VALUES, max_size=5),
    st.builds(
        lambda column, chat, more: {column: chat, **more},
        st.sampled_from([*TURNS, "conversations", "prompt", "chosen", "completions"]), CHATS,
        st.dictionaries(st.sampled_from(COLUMNS), st.one_of(CHATS, TEXTS, VALUES), max_size=3),
    ),
    st.fixed_dictionaries({"prompt": CONTENTS, "chosen": CONTENTS, "rejected": CONTENTS}, optional={"score": VALUES}),
    st.fixed_dictionaries({"prompt": CONTENTS, "completion": CONTENTS, "label": VALUES}),
)  # fmt: skip
FILES = sorted(
    [*KINDS, *(kind + packed for kind in (".jsonl", ".json", ".csv", ".txt") for packed in COMPRESSIONS), ""]
)
PACK = {
    ".gz": gzip.compress,
    ".gzip": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda raw: lzma.compress(raw, preset=0),
}
CHOICES = {
    "format": ["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "qa", "text"],
    "bad_rows": ["refuse", "skip"], "turns": ["auto", "together", "split"], "train_on": ["assistant", "last", "all"],
    "reasoning": ["keep", "inline", "drop"], "omissions": ["refuse", "warn"], "boundary": ["refuse", "separate"],
    "truncation": ["refuse", "drop", "right", "left", "windows"], "sample_by": ["document", "paragraph", "line"],
    "merge_turns": [False, True], "packing": [False, True], "max_length": [4, 64, 4096], "limit": [None, 1],
    "eval_fraction": [None, 0.5], "ignored_columns": [None, "*"], "pairs": ["best_worst", "all"],
    "rows_field": [None, "data"], "messages_field": [None, "prompt"], "system_field": [None, "text"],
}  # fmt: skip
SETTINGS = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in CHOICES.items()})
# The preparations of rows, and the methods that they are for.
METHODS = [prepare, prepare, prepare_pairs, prepare_labelled, prepare_prompts]


def written(rows: list[Any], ending: str) -> bytes:
    """Rows as a file of this ending; rows that it cannot hold are left out."""
    if ending.startswith((".parquet", ".pq", ".arrow", ".feather")):
        return _columns(rows, ending)
    if ending.startswith((".csv", ".tsv")):
        lines = [list(row) for row in rows[:1]] + [list(row.values()) for row in rows]
        raw = "\n".join((",", "\t")["tsv" in ending].join(map(_cell, cells)) for cells in lines)
    elif ending.startswith((".txt", ".text", ".md")):
        raw = "\n\n".join(map(str, rows))
    else:
        texts = [json.dumps(row) for row in rows]
        raw = f"[{', '.join(texts)}]" if ending.startswith(".json") and "jsonl" not in ending else "\n".join(texts)
    data = raw.encode("utf-8", "surrogatepass")
    return PACK.get("." + ending.rpartition(".")[2], bytes)(data)


def _columns(rows: list[Any], ending: str) -> bytes:
    sink = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(rows)
        if ending in (".parquet", ".pq"):
            parquet.write_table(table, sink)
        else:
            with pyarrow.ipc.new_file(sink, table.schema) as file:
                file.write_table(table)
    except Exception:  # what Arrow cannot hold is no input
        return b""
    return sink.getvalue()


def _cell(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


@fixed(20_000)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=4),
    data=SETTINGS,
    method=st.integers(0, len(METHODS) - 1),
)
def rows_of_every_format(rows: list[Any], data: dict[str, Any], method: int) -> None:
    path = Path("rows.jsonl")
    path.write_bytes("\n".join(map(json.dumps, rows)).encode("utf-8", "surrogatepass"))
    with one_input():
        METHODS[method](_config(str(path), data), SMOKE)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """(ending, content) of a file, often a damaged one."""
    ending = draw(st.sampled_from(FILES))
    rows = draw(st.lists(ROWS, min_size=1, max_size=3))
    return ending, draw(damaged(st.just(written(rows, ending))))


@fixed(20_000)
@given(file=st.one_of(files(), st.tuples(st.sampled_from(FILES), st.binary(max_size=60))), data=SETTINGS)
def files_of_every_kind(file: tuple[str, bytes], data: dict[str, Any]) -> None:
    shutil.rmtree("set", ignore_errors=True)
    path = Path("set", f"rows{file[0]}")
    path.parent.mkdir()
    path.write_bytes(file[1])
    with one_input():
        prepare(_config(str(path), data), SMOKE)


@fixed(20_000)
@given(source=st.lists(st.one_of(st.sampled_from([*NASTY, "set", "*", "**", "?", "rows"]), TEXTS), max_size=4))
def names_of_sources(source: list[str]) -> None:
    with one_input():
        prepare(_config("/".join(source).lstrip("/"), {}), SMOKE)  # not all files of the machine


def _config(path: str, data: dict[str, Any]) -> RunConfig:
    settings = {"cache": "none", "num_proc": 1, **data}
    if settings.get("truncation") != "windows":
        settings.pop("window_overlap", None)
    return RunConfig(model=ModelConfig(path="x"), data=DataConfig(train=path, **settings), eval=EvalConfig())


# What is imported late is imported before memory is limited.
Path("warm.jsonl").write_text('{"text": "a"}\n')
prepare(_config("warm.jsonl", {}), SMOKE)
