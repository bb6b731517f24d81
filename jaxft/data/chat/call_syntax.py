"""How a chat template writes calls of tools, learnt by rendering calls that are known, and calls read from answers.

Five forms are learnt: JSON that has the name and the arguments (Qwen, Llama 3, Mistral's first templates), a name
before JSON of the arguments (DeepSeek, Kimi, Mistral's later ones), a name before arguments in tags (Qwen3-Coder, GLM),
calls written as Python (`[f(a="x")]`: Llama 3.2 and 4, LFM2, OLMo 3), and messages of their own, whose header has the
name (gpt-oss: `to=functions.f`).
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.data.chat.reasoning import CLOSE
from jaxft.data.rows.values import HALF
from jaxft.errors import DataError, ModelError

# (messages, tools) -> text; raises DataError if the template refuses them.
Render = Callable[..., str]
QUESTION = "An unmistakable question"
NAMES = ("probe_first", "probe_second")
KEYS, VALUES = ("probekeyone", "probekeytwo"), ("unmistakable one", "unmistakable two")
IDS = ("abcdefghi", "jklmnopqr")  # nine letters: Mistral's templates refuse any other id
MESSAGE = "<|message|>"  # ends the header of a message
NAME = r"[\w.-]+"
DECODER = json.JSONDecoder()
# Texts in quotes, parentheses, and what is between.
PYTHON = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[()]|[^'"()]+""", re.DOTALL)
JSON_NAMES = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Call:
    """A call of a tool. arguments: a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class CallSyntax:
    """How calls are written. marker: the text with which they begin; empty: they begin with their JSON.

    name_key, arguments_key: of JSON that has both. head: a pattern up to the arguments, with the group `name`, where
    the name comes before them. argument: a pattern with the groups `key` and `value`, where they are in tags. python:
    whether calls are written as Python. recipient: a pattern with the group `name` that is looked for in the headers of
    messages; the text of such a message has the arguments. spelled: calls as the template wrote them, in which its
    tokens are found.
    """

    marker: str
    spelled: str
    name_key: str | None = None
    arguments_key: str | None = None
    head: str | None = None
    argument: str | None = None
    python: bool = False
    recipient: str | None = None

    def begins(self, text: str) -> int | None:
        """Where calls begin in the text of an answer; None if there are none yet."""
        if self.marker:
            at = text.find(self.marker)
            return at if at >= 0 else None
        if self.recipient is not None:
            return None
        return 0 if text.lstrip()[:1] in (("[",) if self.python else ("{", "[")) else None

    def pending(self, text: str) -> int:
        """How many characters at the end of an answer may be the beginning of calls."""
        if not self.marker:
            return len(text) if not text.strip() and self.recipient is None else 0
        return max((n for n in range(1, len(self.marker)) if text.endswith(self.marker[:n])), default=0)

    def calls(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[Call, ...]:
        """The calls in the text that begins where they do; empty if it has none that can be read.

        tools: of the request; calls of others are none. Their schemas say which values in tags are texts.
        """
        schemas = _schemas(tools)
        try:
            calls = self._calls(text, schemas)
        except ValueError:
            return ()
        return tuple(calls) if all(call.name in schemas for call in calls) else ()

    def call_of(self, name: str, text: str, tools: Sequence[Mapping[str, Any]]) -> Call | None:
        """The call in the text of a message whose header has this name; None if it cannot be read."""
        arguments = _arguments(text)
        try:
            return None if arguments is None or name not in _schemas(tools) else Call(name, _written(arguments))
        except ValueError:
            return None

    def _calls(self, text: str, schemas: Mapping[str, Any]) -> list[Call]:
        if self.python:
            return _python_calls(text, schemas)
        if self.head is None:
            return _json_calls(text, self.name_key or "", self.arguments_key or "")
        if self.argument is None:
            return _named_calls(text, self.head)
        return _tagged_calls(text, self.head, self.argument, schemas)


def learn(render: Render) -> CallSyntax | None:
    """The syntax of a template; None if it writes no calls, or in a form that is not known."""
    one, pair = _answer(render, ((NAMES[0], 1),)), _answer(render, ((NAMES[0], 1), (NAMES[1], 1)))
    if one is None or NAMES[0] not in one:
        return None
    if MESSAGE in one:
        return _learn_recipient(one)
    if (by_keys := _learn_json(one)) is not None:
        return by_keys
    return _learn_named(one, pair) or _learn_python(one) or _learn_tagged(one, _answer(render, ((NAMES[0], 2),)))


def _answer(render: Render, calls: Sequence[tuple[str, int]]) -> str | None:
    """What the template writes for an answer of calls, without the prompt before it. calls: names, and arguments."""
    given = [
        {
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": dict(zip(KEYS[:count], VALUES, strict=False))},
        }
        for (name, count), id in zip(calls, IDS, strict=False)
    ]
    properties = {key: {"type": "string", "description": "p"} for key in KEYS}
    parameters = {"type": "object", "properties": properties}
    tools = [
        {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}} for name in NAMES
    ]
    messages = [{"role": "user", "content": QUESTION}]
    try:
        prompt = render(messages, tools=tools, add_generation_prompt=True).rpartition(QUESTION)[2]
        whole = render([*messages, {"role": "assistant", "content": "", "tool_calls": given}], tools=tools)
    except (DataError, ModelError):
        return None
    answer = whole.rpartition(QUESTION)[2]
    same = _shared(prompt, answer)
    return answer[same:].rpartition(CLOSE)[2]


def _shared(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _learn_json(text: str) -> CallSyntax | None:
    for value, start, _ in _json_values(text):
        call = next((one for one in _objects(value) if NAMES[0] in one.values()), None)
        if call is None:
            continue
        name_key = next(key for key, inner in call.items() if inner == NAMES[0])
        arguments_key = next((key for key, inner in call.items() if _arguments(inner) == {KEYS[0]: VALUES[0]}), None)
        if arguments_key is None:
            return None
        return CallSyntax(marker=text[:start].strip(), spelled=text, name_key=name_key, arguments_key=arguments_key)
    return None


def _learn_named(one: str, pair: str | None) -> CallSyntax | None:
    at = one.index(NAMES[0])
    arguments = next(
        ((value, start, end) for value, start, end in _json_values(one, at) if value == {KEYS[0]: VALUES[0]}), None
    )
    if arguments is None:
        return None
    _, start, end = arguments
    before, between = one[:at], one[at + len(NAMES[0]) : start]
    if not before.strip():
        return None  # nothing tells a call from a text
    return CallSyntax(marker=before.strip(), spelled=pair or one, head=_head(before, between, one[:end], pair))


def _learn_recipient(one: str) -> CallSyntax | None:
    """From a call whose message has the name in its header."""
    header, _, body = one.partition(MESSAGE)
    before = re.search(rf"(\S+=\S*){NAMES[0]}(?![\w.-])", header)
    if before is None or not any(value == {KEYS[0]: VALUES[0]} for value, _, _ in _json_values(body)):
        return None
    return CallSyntax(marker="", spelled="", recipient=rf"(?:^|\s){re.escape(before[1])}(?P<name>{NAME})(?=\s|<|$)")


def _learn_python(one: str) -> CallSyntax | None:
    begin, _, rest = one.partition(NAMES[0])
    written = rf"\(\s*{KEYS[0]}\s*=\s*['\"]?{VALUES[0]}['\"]?\s*\)"
    marker = begin.strip().removesuffix("[").rstrip()
    if re.match(written, rest) is None or not begin.strip():
        return None  # another form, or nothing tells a call from a text
    return CallSyntax(marker=marker, spelled=one, python=True)


def _learn_tagged(one: str, two: str | None) -> CallSyntax | None:
    """From calls with one argument and with two."""
    starts = [one.find(text, one.index(NAMES[0])) for text in (NAMES[0], KEYS[0], VALUES[0])]
    if two is None or min(starts) < 0 or sorted(starts) != starts or any(key not in two for key in (*KEYS, *VALUES)):
        return None
    at, key, value = starts
    to_key, to_value = one[at + len(NAMES[0]) : key], one[key + len(KEYS[0]) : value]
    tail = one[value + len(VALUES[0]) :]
    joint = two[two.index(VALUES[0]) + len(VALUES[0]) : two.index(KEYS[1])]
    close = next(
        (joint[:n] for n in range(1, len(joint)) if tail.startswith(joint[:n]) and to_key.endswith(joint[n:])), ""
    )
    if not close.strip() or not to_value.strip() or to_value.rstrip().endswith(('"', "'")):
        return None  # written as Python, with quotes around texts alone
    opens, begin = joint[len(close) :], one[:at].strip()
    if not opens.strip() or not begin:
        return None
    middle = to_key[: len(to_key) - len(opens)].strip()
    value_in_tags = f"{re.escape(to_value)}(?P<value>.*?){re.escape(close.rstrip())}"
    return CallSyntax(
        marker=begin.partition("\n")[0].strip(),
        spelled=one,
        head=f"{re.escape(begin)}\\s*(?P<name>{NAME}){re.escape(middle)}",
        argument=f"{re.escape(opens.strip())}\\s*(?P<key>[^\\s<>]+){value_in_tags}",
    )


def _head(before: str, between: str, first: str, pair: str | None) -> str:
    """The pattern from the opening of a call up to its arguments. first: all up to the end of the first call."""
    opens = before
    if pair is not None and NAMES[1] in pair and pair.startswith(first):
        second = pair[len(first) : pair.index(NAMES[1])]
        same = _shared(before[::-1], second[::-1])
        opens = before[len(before) - same :]
    middle = re.sub(r"\\?\d+", r"\\d+", re.escape(between.strip())).replace(IDS[0], r"\S+?")
    return f"{re.escape(opens.strip())}\\s*(?P<name>{NAME}?)\\s*{middle}\\s*(?=\\{{)"


def _json_calls(text: str, name_key: str, arguments_key: str) -> list[Call]:
    out = []
    for value, _, _ in _json_values(text):
        for one in _objects(value):
            arguments = _arguments(one.get(arguments_key, {}))
            if isinstance(one.get(name_key), str) and arguments is not None:
                out.append(Call(one[name_key], _written(arguments)))
    return out


def _named_calls(text: str, head: str) -> list[Call]:
    out = []
    for match in re.finditer(head, text):
        try:
            value, _ = DECODER.raw_decode(text, match.end())
        except RecursionError:
            return []
        if not isinstance(value, dict):
            return []
        out.append(Call(match["name"], _written(value)))
    return out


def _tagged_calls(text: str, head: str, argument: str, schemas: Mapping[str, Any]) -> list[Call]:
    heads = list(re.finditer(head, text))
    ends = [match.start() for match in heads[1:]] + [len(text)]
    out = []
    for match, end in zip(heads, ends, strict=False):  # without heads there is nothing
        properties = schemas.get(match["name"], {}).get("properties") or {}
        inner = re.finditer(argument, text[match.end() : end], re.DOTALL)
        arguments = {one["key"]: _typed(one["value"], properties.get(one["key"])) for one in inner}
        out.append(Call(match["name"], _written(arguments)))
    return out


def _python_calls(text: str, schemas: Mapping[str, Any]) -> list[Call]:
    """Calls with literals by keyword. Raises ValueError for other arguments, such as names of variables."""
    out, at = [], 0
    while (head := re.compile(rf"({NAME})\(").search(text, at)) is not None:
        source, at = _python_source(text, head.end())
        properties = schemas.get(head[1], {}).get("properties") or {}
        try:
            call = ast.parse(f"f({source})", mode="eval").body
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError("no Python") from error
        if not isinstance(call, ast.Call) or call.args or any(one.arg is None for one in call.keywords):
            raise ValueError("arguments without their names")
        given = {str(one.arg): _unquoted(_literal(one.value), properties.get(str(one.arg))) for one in call.keywords}
        out.append(Call(head[1], _written(given)))
    return out


def _unquoted(value: Any, schema: Any) -> Any:
    """A value, read if it is a text where the schema wants none: some templates put quotes around every value."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    wanted = [kinds] if isinstance(kinds, str) else kinds or ["string"]
    return _typed(value, schema) if isinstance(value, str) and "string" not in wanted else value


def _python_source(text: str, start: int) -> tuple[str, int]:
    """(the arguments up to the closing parenthesis, with lines in texts escaped; where they end).

    Raises ValueError if there is none.
    """
    out: list[str] = []
    depth, at = 1, start
    for match in PYTHON.finditer(text, start):
        if match.start() != at:
            break
        piece, at = match[0], match.end()
        depth += {"(": 1, ")": -1}.get(piece, 0)
        if not depth:
            return "".join(out), at
        out.append(piece.replace("\n", "\\n").replace("\r", "\\r") if piece[0] in "'\"" else piece)
    raise ValueError("a call without an end")


def _literal(node: ast.expr) -> Any:
    """The value of a literal of Python or JSON. Raises ValueError for anything else."""
    if isinstance(node, ast.Name) and node.id in JSON_NAMES:
        return JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _literal(key) for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("keys that JSON has not")
        return {str(key): _literal(value) for key, value in zip(keys, node.values, strict=True)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None):
        return node.value
    raise ValueError("no literal")


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


def _written(arguments: Mapping[str, Any]) -> str:
    """Arguments as JSON text, with escapes where characters are not whole. Raises ValueError for NaN and infinity."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return json.dumps(arguments) if HALF.search(text) else text


def _typed(text: str, schema: Any) -> Any:
    """A value in tags: text where the schema says so, else what JSON or Python reads."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    if kinds == "string":
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, str | int | float | bool | list | dict | None):
            return value
    return text


def _json_values(text: str, start: int = 0) -> list[tuple[Any, int, int]]:
    """The objects and lists of JSON in a text, outermost ones, each with where it begins and ends."""
    out, at = [], start
    while (match := re.compile(r"[{\[]").search(text, at)) is not None:
        try:
            value, end = DECODER.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            at = match.start() + 1
            continue
        out.append((value, match.start(), end))
        at = end
    return out


def _objects(value: Any) -> list[dict[str, Any]]:
    """The object itself, those of a list, or the function inside of either."""
    listed = value if isinstance(value, list) else [value]
    inner = [
        one.get("function") if isinstance(one, dict) and isinstance(one.get("function"), dict) else one
        for one in listed
    ]
    return [one for one in inner if isinstance(one, dict)]


def _arguments(value: Any) -> dict[str, Any] | None:
    """An object, or the one that JSON text has."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None
