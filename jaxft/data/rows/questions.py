"""Rows of a question and an answer in columns of their own, and the system prompt and context that stand with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.config import DataConfig
from jaxft.data.rows.columns import is_empty
from jaxft.data.rows.values import RowProblem, is_absent, parse_json, sample, text_of

Message = dict[str, Any]
# Names of columns that hold a system prompt. Bedrock has a list of texts there, Gemini an object with parts.
SYSTEMS = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction")
# Names of columns that hold a text which belongs to the question: alpaca's input, Dolly's context.
CONTEXTS = ("input", "inputs", "context", "passage", "background")
# Names of columns with a question and its answer.
QUESTIONS = (
    ("question", "answer"), ("question", "response"), ("instruction", "response"), ("query", "response"),
    ("query", "answer"), ("problem", "solution"), ("inputs", "targets"), ("input", "output"), ("prompt", "response"),
    ("user", "assistant"), ("input_text", "output_text"), ("Question", "Answer"), ("Question", "Response"),
    ("Instruction", "Response"),
)  # fmt: skip


def question_columns(row: Mapping[str, Any], config: DataConfig) -> list[tuple[str, str]]:
    """The columns that may be the question and the answer of a row: those of the config if it has them, or usual ones.

    With data.prompt_field or data.completion_field of one's own, only these.
    """
    own = config.prompt_field, config.completion_field
    if own != ("prompt", "completion") or all(not is_absent(row.get(name)) for name in own):
        return [own] if all(not is_absent(row.get(name)) for name in own) else []
    return [pair for pair in QUESTIONS if all(not is_absent(row.get(name)) for name in pair)]


def question_messages(row: Mapping[str, Any], question: str, config: DataConfig) -> tuple[list[Message], set[str]]:
    """(messages of a row before its answer, the columns that they are from), not yet checked.

    question: its column. `history` stands before it, the context on a line of its own below it. Raises RowProblem.
    """
    messages, columns = [], {question, "history"}
    for pair in _history(row.get("history")):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowProblem(f"'history' must be a list of [question, answer] pairs; one is {sample(pair)!r}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    text = text_of(row[question], repr(question))
    contexts = (config.context_field,) if config.context_field else CONTEXTS
    names = [name for name in contexts if name != question and not is_empty(row.get(name))]
    if len(names) > 1:
        raise RowProblem(
            f"the text that belongs to {question!r} may be in {' or in '.join(map(repr, names))}. Set "
            "data.context_field to the one that it is in."
        )
    if names:
        text = f"{text}\n{text_of(row[names[0]], repr(names[0]))}"
    return [*messages, {"role": "user", "content": text}], columns | set(names)


def system_of(row: Mapping[str, Any], config: DataConfig) -> tuple[str | None, set[str]]:
    """(the system prompt that a row has in a column of its own, or None; the columns that were read for it).

    It is text, or text within a message, a list of parts or an object of parts. Raises RowProblem if there are two that
    differ, or it is none of these.
    """
    names = (config.system_field,) if config.system_field else SYSTEMS
    texts = {name: _system_text(row[name], name) for name in names if name in row and not is_absent(row[name])}
    if not texts:
        return None, set()
    given = {name: text for name, text in texts.items() if text.strip()}
    if len(set(given.values())) > 1:
        raise RowProblem(
            f"it has different system prompts in {' and in '.join(map(repr, given))}. Set data.system_field to the one "
            "that it is in."
        )
    return next(iter(given.values()), None), set(texts)


def with_system(
    row: Mapping[str, Any], messages: Sequence[Message], config: DataConfig
) -> tuple[list[Message], set[str]]:
    """(the messages with the row's own system prompt before them, the columns that were read for it).

    Raises RowProblem if the messages begin with another one.
    """
    text, columns = system_of(row, config)
    if text is None:
        return list(messages), columns
    first = messages[0] if messages else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages], columns
    if str(first.get("content")).strip() != text.strip():
        (name, *_) = sorted(columns)
        raise RowProblem(
            f"it has a system prompt in {name!r} and another one in its messages: keep one, or leave the column out by "
            f"data.ignored_columns={name!r}"
        )
    return list(messages), columns


def _system_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        inner = next((value[key] for key in ("content", "parts", "text") if not is_absent(value.get(key))), None)
        if inner is not None or not value:
            return "" if inner is None else _system_text(inner, name)
    if isinstance(value, list) and all(isinstance(item, str | Mapping) for item in value):
        return "".join(_system_text(item, name) for item in value)
    raise RowProblem(f"{name!r} is no system prompt: it is {sample(value)!r}, and must be text or a list of texts")


def _history(value: Any) -> Sequence[Any]:
    if is_absent(value) or value == "":
        return ()
    if isinstance(value, str):
        value = parse_json(value, "'history'")
    if not isinstance(value, list):
        raise RowProblem(f"'history' must be a list of [question, answer] pairs; it is {sample(value)!r}")
    return value
