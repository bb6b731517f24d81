"""Calls of tools, read from answers by the syntax that a template shows; what the template writes is the oracle."""

import json
import random
from pathlib import Path

import pytest
from chat_templates import LLAMA3_TOOLS, MOVING_TOOLS, QWEN3, TEXT_ARGUMENTS

from jaxft.assets import ASSETS
from jaxft.data.chat.call_syntax import learn
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.generation.called_tools import CallForm, CallStream

START, END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}",
    ("<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
)
EACH = "{% for c in m.tool_calls or [] %}"
ARGUMENTS = "{{ c.function.arguments | tojson }}"
ITEMS = "{% for k, v in c.function.arguments | items %}"
VALUE = "{{ v if v is string else v | tojson }}"


def template(calls):
    return START + calls + END


# Shaped like published templates, with the tokens of their families as text.
TEMPLATES = {
    "qwen3": QWEN3,
    "llama3": LLAMA3_TOOLS,
    "mistral_list": template(
        "{% if m.tool_calls %}[TOOL_CALLS] [" + EACH + "{{ '{\"name\": \"' + c.function.name + '\", \"arguments\": ' }}"
        + ARGUMENTS + "{{ ', \"id\": \"' + c.id + '\"}' }}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}"
    ),
    "mistral_named": template(
        EACH + "{{ '[TOOL_CALLS]' + c.function.name + '[CALL_ID]' + c.id + '[ARGS]' }}" + ARGUMENTS + "{% endfor %}"
    ),
    "deepseek": template(
        "{% if m.tool_calls %}<|calls_begin|>" + EACH + "{{ '<|call_begin|>function<|sep|>' + c.function.name }}"
        "{{ '\\n```json\\n' }}" + ARGUMENTS + "{{ '\\n```<|call_end|>' }}{% endfor %}<|calls_end|>{% endif %}"
    ),
    "kimi": template(
        "{% if m.tool_calls %}<|section_begin|>" + EACH + "{{ '<|call_begin|>functions.' + c.function.name }}"
        "{{ ':' + loop.index0 | string + '<|argument_begin|>' }}" + ARGUMENTS
        + "<|call_end|>{% endfor %}{% endif %}"
    ),
    "function_tags": template(
        EACH + "{{ '<function=' + c.function.name + '>' }}" + ARGUMENTS + "</function>{% endfor %}"
    ),
    "qwen3_coder": template(
        EACH + "{{ '\\n<tool_call>\\n<function=' + c.function.name + '>\\n' }}" + ITEMS
        + "{{ '<parameter=' + k + '>\\n' }}" + VALUE
        + "{{ '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}"
    ),
    "glm": template(
        EACH + "{{ '\\n<tool_call>' + c.function.name }}" + ITEMS + "{{ '\\n<arg_key>' + k + '</arg_key>' }}"
        + "{{ '\\n<arg_value>' }}" + VALUE + "</arg_value>{% endfor %}{{ '\\n</tool_call>' }}{% endfor %}"
    ),
}  # fmt: skip
COMMA = "{% if not loop.last %}, {% endif %}{% endfor %}"
# Calls as Python: with literals of JSON, with quotes around every value, and in lines between tags.
PYTHON = {
    "python": template(
        "{% if m.tool_calls %}[" + EACH + "{{ c.function.name + '(' }}" + ITEMS + "{{ k + '=' }}{{ v | tojson }}"
        + COMMA + ")" + COMMA + "]{% endif %}"
    ),
    "python_quoted": template(
        "{% if m.tool_calls %}[" + EACH + "{{ c.function.name + '(' }}" + ITEMS + "{{ k + '=\"' + v | string + '\"' }}"
        + COMMA + ")" + COMMA + "]{% endif %}"
    ),
    "python_lines": template(
        "{% if m.tool_calls %}{{ '<function_calls>\n' }}" + EACH + "{{ c.function.name + '(' }}" + ITEMS
        + "{{ k + '=' }}{{ \"'\" + v + \"'\" if v is string else v | tojson }}" + COMMA + ")"
        + "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{{ '\n</function_calls>' }}{% endif %}"
    ),
}  # fmt: skip
PUBLISHED = (
    "lfm2_v2",
    "lfm2_2_5_v2",
    "llama3_1",
    "qwen2_5",
    "qwen3_5_think",
    "glm4moe",
    "nemotron_3_nano",
)  # as in TRL
TYPES = {"city": "string", "days": "integer", "deep": "object", "on": "boolean", "rate": "number"}
PARAMETERS = {"type": "object", "properties": {name: {"type": kind} for name, kind in TYPES.items()}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("get_weather", "get-time")
]
CALLS = [
    ("get_weather", {"city": 'Zürich "x" {\n', "days": 3, "deep": {"a": [1, "b", None]}, "on": True, "rate": -0.5}),
    ("get-time", {"city": "5"}),
]
# Without what Python's quotes are not put around with care for.
PLAIN_CALLS = [("get_weather", CALLS[0][1] | {"city": "Zürich (x) {\n"}), CALLS[1]]
QUESTION = {"role": "user", "content": "hi"}


def written(name):
    """(a template, the calls that it can write)."""
    if name in PUBLISHED:
        trl = pytest.importorskip("trl")
        return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(), CALLS
    return (TEMPLATES | PYTHON)[name], PLAIN_CALLS if name in ("python_quoted", "python_lines") else CALLS


@pytest.fixture(scope="module")
def smoke():
    return load_tokenizer(str(ASSETS / "smoke"))


def answer(tokenizer, calls, content=""):
    """What the template writes for an answer with calls."""
    given = [
        {"id": f"abcdefgh{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls)
    ]
    prompt = tokenizer.render([QUESTION], tools=TOOLS, add_generation_prompt=True)
    message = {"role": "assistant", "content": content, "tool_calls": given}
    whole = tokenizer.render([QUESTION, message], tools=TOOLS)
    # A prompt may open thoughts that an answer without any does not have.
    same = next((at for at, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(prompt))
    return whole[same:].rstrip().removesuffix("<|im_end|>")


def read(stream, text, size):
    """(text, calls) of an answer that comes in pieces of this size."""
    shown = "".join(stream.push(text[at : at + size]) for at in range(0, len(text), size)) + stream.finish()
    return shown, [(call.name, json.loads(call.arguments)) for call in stream.calls]


@pytest.mark.parametrize("name", [*TEMPLATES, *PYTHON, *PUBLISHED])
def test_calls_are_read_as_the_template_writes_them(smoke, name):
    text, known = written(name)
    tokenizer = smoke.with_template(text)
    syntax = learn(tokenizer.render)
    assert syntax.python == name.startswith(("python", "lfm2"))
    for calls in ([known[0]], [known[1]], known):
        if name in ("llama3", "llama3_1") and len(calls) > 1:
            continue  # it writes one call alone
        text = answer(tokenizer, calls)
        for size in (1, 7, len(text)):
            shown, found = read(CallStream(syntax, TOOLS), text, size)
            assert found == calls and not shown.replace("<think>", "").replace("</think>", "").strip()
    if syntax.marker:
        shown, found = read(CallStream(syntax, TOOLS), "Let me see." + answer(tokenizer, [CALLS[1]]), 1)
        assert shown.startswith("Let me see.") and found == [CALLS[1]]


@pytest.mark.parametrize("name", [*TEMPLATES, *PYTHON])
def test_an_answer_without_calls_is_its_text(smoke, name):
    tokenizer = smoke.with_template(written(name)[0])
    syntax = learn(tokenizer.render)
    whole = answer(tokenizer, [CALLS[1]])
    unknown = whole.replace("get-time", "get-place")
    for text in (
        "Hello <tool",
        'A {"name": "get-time"}',
        "[TOOL",
        "",
        " {",
        unknown,
        whole[: whole.index("get-time") + 2],
    ):
        assert read(CallStream(syntax, TOOLS), text, 1)[1] == []
        assert "".join(read(CallStream(syntax, TOOLS), text, 3)[0].split()) == "".join(text.split())


def test_arguments_are_json_that_any_client_reads(smoke):
    syntax = learn(smoke.with_template(QWEN3).render)
    start = '<tool_call>{"name": "get-time", "arguments": {"a": '
    half, number = (f"{start}{value}}}}}" for value in ('"\\ud83d"', "NaN"))
    (call,) = syntax.calls(half, TOOLS)
    assert call.arguments.encode() == b'{"a": "\\ud83d"}' and syntax.calls(number, TOOLS) == ()


@pytest.mark.parametrize("name", ["python", "lfm2_v2"])
def test_any_text_comes_back_from_python(smoke, name):
    tokenizer = smoke.with_template(written(name)[0])
    syntax, chance = learn(tokenizer.render), random.Random(5)
    for _ in range(60):
        values = ["".join(chance.choices("ab'\"\\()[]{},=#\n\r\té☃ ", k=chance.randrange(12))) for _ in range(3)]
        arguments = {"city": values[0], "deep": {"a": [values[1], {values[2]: None}]}, "on": False}
        assert read(CallStream(syntax, TOOLS), answer(tokenizer, [("get_weather", arguments)]), 9) == (
            "",
            [("get_weather", arguments)],
        ), values


@pytest.mark.parametrize(
    "text",
    [
        "[get_weather('Bern')]", "[get_weather(city=town)]", "[get_weather(city=f())]", "[get_weather(**{'city': 1})]",
        "[get_weather(city='Bern']", "[get_weather(city={1: 2})]", "[get_weather(days=1e999)]", "[1, 2]",
        "[get_weather(city=b'a')]", "[get_weather(city=-'a')]", "[get_weather(city='a\0')]",
        "[get_weather(city=" + "[" * 3000 + ")]",
    ],
)  # fmt: skip
def test_python_that_is_no_call_with_literals_is_text(smoke, text):
    syntax = learn(smoke.with_template(PYTHON["python"]).render)
    assert read(CallStream(syntax, TOOLS), text, 5) == (text, [])


@pytest.mark.parametrize("unread", [MOVING_TOOLS, TEXT_ARGUMENTS])
def test_other_forms_are_not_guessed(smoke, unread):
    tokenizer = smoke.with_template(unread)
    assert learn(tokenizer.render) is None and CallForm.of(tokenizer) is None


def test_special_tokens_that_mark_calls_stay_in_the_text(smoke):
    from jaxft.generation.detokenize import TextStream

    tokenizer = smoke.with_template(TEMPLATES["mistral_named"].replace("[TOOL_CALLS]", "<|endoftext|>"))
    form = CallForm.of(tokenizer)
    assert form.kept == {tokenizer.encode("<|endoftext|>")[0]} and form.syntax.marker == "<|endoftext|>"
    text = "é<|endoftext|>get-time[CALL_ID]abcdefgh1[ARGS]{}<|im_start|>é"
    stream = TextStream(tokenizer, kept=form.kept)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text.replace("<|im_start|>", "")
