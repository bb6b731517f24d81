"""What errors about chat templates recommend: settings with which the same row is then trained."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from test_built_in_templates import CALL, CHAT, LAST, ONE, PLAIN, RESULT, SYSTEM, THOUGHT, TOOL, TWO, bytes_with

from jaxft.config import DataConfig
from jaxft.data.chat.arrange import SHORT_IDS
from jaxft.data.chat.encode import encode, encode_all
from jaxft.data.chat.tool_calls import with_short_ids
from jaxft.data.encoded.work import ReadCounts
from jaxft.data.examine import examine
from jaxft.data.formats import Conversation
from jaxft.data.tokenizers.templates import built_in
from jaxft.data.truncation import ModelLimits
from jaxft.errors import DataError

# Begins every prompt for an answer with thoughts, as QwQ and Qwen3-Thinking do.
OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SWITCHED = OPENS.replace(
    "<think>\n{% endif %}", "{% if enable_thinking | default(true) %}<think>\n{% endif %}{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what was thought before the last question, as Qwen3's does.
DROPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NINE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('nine letters') }}{% endif %}"
    "[{{ m.tool_call_id }}={{ m.content }}]{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
    "{{ c.id }}:{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def row_of(messages, tools=()):
    return Conversation(row=0, where="row 1", format="messages", messages=tuple(messages), tools=tuple(tools))


def published(name):
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def check_recommended(error, row, tokenizer, config):
    """Follows every recommendation of an error. Returns how many settings there were."""
    (text,) = re.findall(r"This helps: (.*)\. Otherwise data\.bad_rows='skip'", error)
    mends = text.split("; or ")
    for mend in mends:
        if kwargs := re.match(r"data\.chat_template_kwargs=\{'(\w+)': False\}", mend):
            assert encode(replace(row, template_kwargs={kwargs[1]: False}), tokenizer, config)
        elif template := re.match(r"data\.chat_template='(\w+)'", mend):
            assert encode(row, tokenizer.with_template(built_in(template[1])), config)
        elif merge := re.match(r"data\.(merge_turns|reasoning)=(True|'\w+')", mend):
            value = True if merge[2] == "True" else merge[2].strip("'")
            assert encode(row, tokenizer, replace(config, **{merge[1]: value}))
        else:
            assert mend == "remove the white space at the start of answers"
            stripped = tuple(m | {"content": m["content"].lstrip()} for m in row.messages)
            assert encode(replace(row, messages=stripped), tokenizer, config)
    return mends


@pytest.mark.parametrize(
    ("kind", "template", "messages", "wanted", "more"),
    [
        ("qwen3", SWITCHED, CHAT, "data.chat_template_kwargs={'enable_thinking': False}", ()),
        ("qwen3", OPENS, CHAT, "data.chat_template='qwen3'", ()),
        # Its prompt ends in a newline, which is one token with the newline that follows if nothing was thought.
        ("qwen3", "trl:qwen3_5_think", CHAT, "data.chat_template_kwargs={'enable_thinking': False}", ("\n\n",)),
        ("deepseek_r1", "trl:deepseek_r1_distill", CHAT, "data.chat_template='deepseek_r1'", ()),
        ("deepseek_r1", "trl:deepseek_r1_distill", [ONE, THOUGHT], "data.chat_template='deepseek_r1'", ()),
        ("gemma", "trl:gemma", CHAT, "data.chat_template='gemma'", ()),
        ("chatml", ALTERNATING, [ONE, TWO, LAST], "data.merge_turns=True", ()),
        ("chatml", ALTERNATING, [SYSTEM, ONE, PLAIN], "data.chat_template='chatml'", ()),
        ("chatml", "{{ messages[0].no.such }}", [ONE, LAST], "data.chat_template='chatml'", ()),
        ("chatml", built_in("chatml"), [ONE, THOUGHT], "data.reasoning='inline'", ()),
        ("qwen3", built_in("chatml"), [ONE, CALL, RESULT, LAST], "data.chat_template='qwen3'", ()),
        ("llama3", built_in("llama3").replace("+ '<|eot_id|>'", ""), CHAT, "data.chat_template='llama3'", ()),
    ],
)
def test_what_an_error_recommends_works(kind, template, messages, wanted, more):
    text = published(template.removeprefix("trl:")) if template.startswith("trl:") else template
    tokenizer, config = bytes_with(kind, text, *more), DataConfig()
    row = row_of(messages, [TOOL] if CALL in messages else ())
    with pytest.raises(DataError, match=r"^row 1: .*This helps: ") as caught:
        encode(row, tokenizer, config)
    assert any(mend.startswith(wanted) for mend in check_recommended(str(caught.value), row, tokenizer, config))


def test_every_row_with_a_problem_names_it_alike_and_mends_are_tried_once(monkeypatch):
    tokenizer = bytes_with("qwen3", OPENS)
    rows = [replace(row_of(CHAT), row=i, where=f"row {i}") for i in range(40)]
    bad, tried = {}, []
    with_template = type(tokenizer).with_template
    monkeypatch.setattr(
        type(tokenizer), "with_template", lambda self, text: tried.append(1) or with_template(self, text)
    )
    assert not list(encode_all(rows, tokenizer, on_bad=lambda row, where, error: bad.update({where: str(error)})))
    assert len({message.replace(where, "", 1) for where, message in bad.items()}) == 1
    assert len(bad) == 40 and len(tried) <= 3


def test_an_error_that_nothing_helps_says_so():
    tokenizer = bytes_with("none", "{{ raise_exception('never') }}")
    with pytest.raises(
        DataError, match=r"never. Set data.chat_template to .*, or change the row; data.bad_rows='skip'"
    ):
        encode(row_of(CHAT), tokenizer)
    with pytest.raises(DataError, match=r"no chat template.* that fits this tokenizer \(chatml, "):
        encode(row_of(CHAT), bytes_with("chatml").with_template(None))


def test_the_cost_of_splitting_is_told_with_what_saves_it():
    tokenizer = bytes_with("qwen3", DROPS)
    chat = [message for _ in range(5) for message in (ONE, PLAIN)]
    notes = Counter()
    examples = list(encode_all([row_of(chat)], tokenizer, notes=notes))
    # With the newline behind the last end token, which is not trained.
    after, before = sum(len(e) + 1 for e in examples), len(examples[-1]) + 1
    assert len(examples) == 5 and after > 2 * before
    _, examination = examine(
        examples,
        DataConfig(packing=False),
        model=ModelLimits(stop_ids=tokenizer.stop_ids),
        where=str,
        counts=ReadCounts(notes=notes),
    )
    (told,) = [warning for warning in examination.warnings if "cut into a sequence" in warning]
    assert f"the {before:,} tokens of those that are cut {after:,}, {after / before:.1f} times as many" in told
    assert told.endswith("data.chat_template='qwen3' keeps such rows whole")
    assert len(encode(row_of(chat), tokenizer.with_template(built_in("qwen3")))) == 1


@pytest.mark.parametrize("given", ["call_" + "x" * 24, None, "abcdefgh1"])
def test_ids_of_tool_calls_fit_templates_that_want_nine_letters(given):
    tokenizer = bytes_with("chatml", NINE)
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": n}}} for n in (1, 2)]
    ids = [None, None] if given is None else [given, given[::-1]]
    calls = [call | ({"id": one} if one else {}) for call, one in zip(calls, ids, strict=True)]
    results = [
        {"role": "tool", "content": str(n)} | ({"tool_call_id": one} if one else {}) for n, one in enumerate(ids)
    ]
    messages = [ONE, {"role": "assistant", "content": "", "tool_calls": calls}, *results, LAST]
    notes = Counter()
    (example,) = encode_all([row_of(messages, [TOOL])], tokenizer, notes=notes)
    text = tokenizer.decode(example.tokens, skip_special_tokens=False)
    short = re.findall(r"(\w{9}):add", text)
    assert len(set(short)) == 2 and re.findall(r"\[(\w{9})=", text) == short
    assert notes[SHORT_IDS] == (given != "abcdefgh1") and (given != "abcdefgh1" or short[0] == given)
    # Generation renders the same, and a template that takes any id gets the given one.
    prompt = tokenizer.render(messages[:-1], tools=[TOOL], add_generation_prompt=True)
    assert text.startswith(prompt)
    assert not bytes_with("qwen3").wants_short_ids
    assert with_short_ids(with_short_ids(messages)) == with_short_ids(messages)
