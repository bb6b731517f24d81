"""Tools, thoughts and marks: every answer is trained as it is asked for and shown when it is given, or refused."""

import json
from collections import Counter

import numpy as np
import pytest
from chat_templates import (
    LLAMA3_TOOLS_TAGGED,
    PRINTED_ARGUMENTS,
    QWEN3_TAGGED,
    TEXT_ARGUMENTS,
    THOUGHTS_NEVER_SHOWN,
)

from jaxft.config import DataConfig
from jaxft.data.chat import encode as chat
from jaxft.data.chat.arrange import arrange
from jaxft.data.formats import read_row
from jaxft.errors import DataError

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text):
    return {"role": "user", "content": text}


def said(text, thought=None, **fields):
    return {"role": "assistant", "content": text} | ({"reasoning_content": thought} if thought else {}) | fields


def call(city="Oslo", thought=None, text="", **fields):
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]
    return said(text, thought, tool_calls=calls, **fields)


def result(text):
    return {"role": "tool", "content": text}


AGENT = [
    SYSTEM, user("Oslo?"), call(thought="ask"), result("3 C"), call("Bergen", thought="and there"), result("5 C"),
    said("Bergen is warmer.", "compare"),
]  # fmt: skip
TALK = [user("one"), said("1", "uno"), user("two"), said("2"), user("three"), said("3", "tres"), user("and")]


def row(messages, tools=(), **fields):
    return read_row({"messages": messages, "tools": list(tools), **fields}, DataConfig(), row=4, where="line 5")


def sequences(conversation, tokenizer, notes=None, **data):
    return list(chat.encode_all([conversation], tokenizer, DataConfig(**data), notes))


def trained(example, tokenizer):
    edges = np.flatnonzero(np.diff(example.mask)) + 1
    pieces = zip(np.split(example.tokens, edges), np.split(example.mask, edges), strict=True)
    return [tokenizer.decode(tokens, skip_special_tokens=False) for tokens, mask in pieces if mask[0]]


def check_as_inference(conversation, examples, tokenizer, **kwargs):
    """Every trained stretch follows the very tokens that ask for it, and is what the template shows just then."""
    answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    expected = set()
    for i in answers:
        prompt = tokenizer.render(
            conversation.messages[:i], tools=conversation.tools, add_generation_prompt=True, **kwargs
        )
        given = tokenizer.render(conversation.messages[: i + 1], tools=conversation.tools, **kwargs)
        ids = tokenizer.encode(given)
        start = len(tokenizer.encode(prompt))
        end = next(n for n in range(start, len(ids)) if ids[n] in tokenizer.stop_ids)
        expected.add((tuple(ids[:start]), tuple(ids[start : end + 1])))
    found = set()
    for example in examples:
        edges = np.flatnonzero(np.diff(np.concatenate([example.mask, [0]])))
        for start, end in zip(edges[::2] + 1, edges[1::2] + 1, strict=True):
            found.add((tuple(example.tokens[:start].tolist()), tuple(example.tokens[start:end].tolist())))
    assert found == expected


def test_an_agents_turns_share_a_sequence(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    conversation = row(AGENT, [TOOL])
    (example,) = sequences(conversation, tokenizer)
    assert trained(example, tokenizer) == [
        '<think>\nask\n</think>\n\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
        "<|im_end|>",
        '<think>\nand there\n</think>\n\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bergen"}}\n'
        "</tool_call><|im_end|>",
        "<think>\ncompare\n</think>\n\nBergen is warmer.<|im_end|>",
    ]
    check_as_inference(conversation, [example], tokenizer)


def test_turns_that_are_rewritten_get_sequences_of_their_own(tokenizer_of):
    tokenizer, notes = tokenizer_of("qwen3"), Counter()
    conversation = row([SYSTEM, *TALK])
    examples = sequences(conversation, tokenizer, notes)
    assert [trained(example, tokenizer) for example in examples] == [
        ["<think>\nuno\n</think>\n\n1<|im_end|>"],
        ["<think>\n\n</think>\n\n2<|im_end|>"],
        ["<think>\ntres\n</think>\n\n3<|im_end|>"],
    ]
    assert "uno" not in tokenizer.decode(examples[1].tokens) and notes["split"] == 1
    assert {example.row for example in examples} == {4}
    check_as_inference(conversation, examples, tokenizer)
    with pytest.raises(DataError, match=r"line 5: .*message 3 .*rewrites earlier text.*data.turns='auto'"):
        sequences(conversation, tokenizer, turns="together")
    with pytest.raises(DataError, match=r"line 5: .*message 3 .*data.train_on='all' trains on one whole rendering"):
        sequences(conversation, tokenizer, train_on="all")
    last = sequences(conversation, tokenizer, turns="together", train_on="last")
    assert trained(last[0], tokenizer) == ["<think>\ntres\n</think>\n\n3<|im_end|>"]


def test_agents_with_several_questions(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    conversation = row([*AGENT, user("Now?"), call(thought="again"), result("4 C"), said("Colder.")], [TOOL])
    examples = sequences(conversation, tokenizer)
    assert [len(trained(example, tokenizer)) for example in examples] == [3, 2]
    check_as_inference(conversation, examples, tokenizer)
    each = sequences(conversation, tokenizer, turns="split")
    assert [len(trained(example, tokenizer)) for example in each] == [1] * 5
    check_as_inference(conversation, each, tokenizer)


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2", "phi3", "moving_tools", "qwen3", "channels"])
def test_every_template_trains_what_inference_sees(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    conversation = row([user("one"), said("first"), user("two"), said("second"), user("x"), said("third"), user("y")])
    examples = sequences(conversation, tokenizer)
    check_as_inference(conversation, examples, tokenizer)
    rewriting = {"qwen3": 3, "channels": 3}
    assert len(examples) == rewriting.get(name, 1)


def test_tools_that_move_to_the_last_question(tokenizer_of):
    tokenizer = tokenizer_of("moving_tools")
    conversation = row([user("one"), said("first"), user("two"), said("second")], [TOOL])
    examples = sequences(conversation, tokenizer)
    assert len(examples) == 2
    check_as_inference(conversation, examples, tokenizer)


@pytest.mark.parametrize(
    ("name", "tagged", "messages"),
    [
        ("qwen3", QWEN3_TAGGED, AGENT),
        ("qwen3", QWEN3_TAGGED, [SYSTEM, *TALK]),
        ("llama3_tools", LLAMA3_TOOLS_TAGGED, [SYSTEM, user("Oslo?"), call(), result("3 C"), said("Cold.")]),
        ("llama3_tools", LLAMA3_TOOLS_TAGGED, [user("a"), said("b"), user("Oslo?"), call(), result("3 C"), said("c")]),
    ],
)
def test_masks_equal_those_of_generation_tags(name, tagged, messages, tokenizer_of):
    bare, oracle = tokenizer_of(name), tokenizer_of(name, tagged)
    assert oracle.render(messages, tools=[TOOL]) == bare.render(messages, tools=[TOOL])
    conversation = row(messages, [TOOL])
    examples = sequences(conversation, bare)
    assert [e.tokens.tolist() for e in sequences(conversation, oracle)] == [e.tokens.tolist() for e in examples]
    ends = [i + 1 for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    for example in examples:
        # The conversation up to the last answer of the sequence, as the template's author marks it.
        for end in ends:
            theirs = oracle.backend.apply_chat_template(
                list(conversation.messages[:end]), tools=[TOOL], return_assistant_tokens_mask=True, return_dict=True
            )
            if theirs["input_ids"][: len(example)] == example.tokens.tolist():
                marked = np.array(theirs["assistant_masks"][: len(example)])
                first = int(example.mask.argmax())
                assert marked[first:].tolist() == example.mask[first:].tolist()
                break
        else:
            raise AssertionError("no rendering begins with the sequence")


def test_thoughts_in_the_content_and_beside_it_are_the_same(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    beside = sequences(row([user("q"), said("a", "so")]), tokenizer)
    for other in (
        said("<think>\nso\n</think>\n\na"),
        {"role": "assistant", "content": "a", "reasoning": "so"},
        {"role": "assistant", "content": "a", "thinking": "so"},
    ):
        (example,) = sequences(row([user("q"), other]), tokenizer)
        assert example.tokens.tolist() == beside[0].tokens.tolist()
    shared = {"from": "gpt", "value": "a", "reasoning_content": "so"}
    turns = read_row({"conversations": [{"from": "human", "value": "q"}, shared]}, DataConfig(), row=0, where="l")
    assert sequences(turns, tokenizer)[0].tokens.tolist() == beside[0].tokens.tolist()
    assert chat.prompt_of(row([user("q"), said("<think>so</think>a")]), tokenizer)[1] == "a"


def test_what_reasoning_says_is_done(tokenizer_of):
    chatml, messages = tokenizer_of("chatml"), [user("q"), said("a", "so"), user("r"), said("<think>hm</think>b")]
    with pytest.raises(DataError, match=r"line 5: .*leaves the thoughts of message 2 out.*data.reasoning='inline'"):
        sequences(row(messages), chatml)
    (inline,) = sequences(row(messages), chatml, reasoning="inline")
    assert trained(inline, chatml) == ["<think>\nso\n</think>\n\na<|im_end|>", "<think>hm</think>b<|im_end|>"]
    (dropped,) = sequences(row(messages), chatml, reasoning="drop")
    assert trained(dropped, chatml) == ["a<|im_end|>", "b<|im_end|>"]
    qwen = tokenizer_of("qwen3")
    kept, written = (sequences(row(messages), qwen, reasoning=how) for how in ("keep", "inline"))
    assert [e.tokens.tolist() for e in kept] == [e.tokens.tolist() for e in written]
    notes = Counter()
    (without,) = sequences(row(messages), chatml, notes, omissions="warn")
    assert trained(without, chatml)[0] == "a<|im_end|>" and notes == {"the thoughts": 1}


@pytest.mark.parametrize(("opens", "complaint"), [("<think>\n", "even the last answer"), ("", "leaves the thoughts")])
def test_a_template_that_never_shows_thoughts(opens, complaint, tokenizer_of):
    tokenizer = tokenizer_of("chatml", THOUGHTS_NEVER_SHOWN.replace("PROMPT", opens))
    with pytest.raises(DataError, match=complaint):
        sequences(row([user("q"), said("<think>so</think>a")]), tokenizer)


def test_channels(tokenizer_of):
    tokenizer = tokenizer_of("channels")
    assert {tokenizer.token(i) for i in tokenizer.stop_ids} == {"<|return|>", "<|call|>"}
    conversation = row([user("q"), call(thought="ask"), result("3 C"), said("cold", "so"), user("r"), said("b", "t")])
    examples = sequences(conversation, tokenizer)
    assert trained(examples[0], tokenizer) == [
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>cold<|return|>",
    ]
    assert trained(examples[1], tokenizer) == [
        '<|channel|>analysis<|message|>ask<|end|><|start|>assistant to=weather<|message|>{"city": "Oslo"}<|call|>',
        "<|channel|>analysis<|message|>t<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
    ]
    arranged = arrange(conversation, tokenizer, DataConfig(), Counter())
    check_as_inference(arranged, examples, tokenizer)


@pytest.mark.parametrize(
    ("name", "messages", "tools", "complaint"),
    [
        ("chatml", [user("q"), said("a")], [TOOL], r"leaves the tools out"),
        ("chatml", [user("q"), call()], [], r"leaves the tool call of message 2 out"),
        ("llama3_tools", [user("q"), call(text="Let me look.")], [], r"leaves the text of message 2 out"),
        ("moving_tools", [SYSTEM, user("q"), result("3 C"), said("a")], [], None),
        ("qwen3", [user("q"), SYSTEM, user("r"), said("a")], [], r"leaves the system message of message 2 out"),
        ("llama3_tools", [user("q"), call(), result('a "quoted"\né'), said("a")], [], None),
    ],
)
def test_what_a_template_leaves_out_is_refused(name, messages, tools, complaint, tokenizer_of):
    if complaint is None:
        assert sequences(row(messages, tools), tokenizer_of(name))
        return
    with pytest.raises(DataError, match=f"line 5: the chat template {complaint}.*data.omissions='warn'"):
        sequences(row(messages, tools), tokenizer_of(name))
    assert sequences(row(messages, tools), tokenizer_of(name), omissions="warn")


@pytest.mark.parametrize("template", [TEXT_ARGUMENTS, PRINTED_ARGUMENTS, None])
@pytest.mark.parametrize("arguments", [{"city": "Ålesund"}, '{"city": "Ålesund"}'])
def test_arguments_reach_a_template_as_it_wants_them(template, arguments, tokenizer_of):
    tokenizer = tokenizer_of("chatml", template) if template else tokenizer_of("qwen3")
    call = {"function": {"name": "weather", "arguments": arguments}}
    messages = [user("q"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert '{"city": "Ålesund"}' in tokenizer.render(messages)
    (example,) = sequences(row(messages), tokenizer)
    assert '{"city": "Ålesund"}' in trained(example, tokenizer)[0]


def test_arguments_that_are_no_json_are_refused_in_a_prompt(tokenizer_of):
    call = {"function": {"name": "weather", "arguments": "{"}}
    with pytest.raises(DataError, match=r"arguments of a call of 'weather' are not JSON"):
        tokenizer_of("qwen3").render([user("q"), {"role": "assistant", "content": "", "tool_calls": [call]}])


def test_a_rows_own_template_variables(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    conversation = row([user("q"), said("a")], chat_template_kwargs='{"enable_thinking": false}')
    (example,) = sequences(conversation, tokenizer)
    assert trained(example, tokenizer) == ["a<|im_end|>"]
    check_as_inference(conversation, [example], tokenizer, enable_thinking=False)
    for bad in ("{", {"tools": []}, [1]):
        with pytest.raises(DataError, match=r"line 5 \(messages\): 'chat_template_kwargs'"):
            row([user("q"), said("a")], chat_template_kwargs=bad)


# Marks


def test_marked_answers_are_context_only(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    for off, on in (({"train": False}, {"train": True}), ({"weight": 0}, {"weight": 1}), ({"weight": 0.0}, {})):
        messages = [user("a"), said("b", **off), {**user("c"), **off}, said("d", **on), user("e"), said("f", **off)]
        conversation = row(messages)
        (example,) = sequences(conversation, tokenizer)
        assert trained(example, tokenizer) == ["d<|im_end|>"]
        assert conversation.untrained == {1, 5} and "train" not in json.dumps(conversation.messages)
        assert trained(sequences(conversation, tokenizer, train_on="last")[0], tokenizer) == ["d<|im_end|>"]
        prompt, reference = chat.prompt_of(conversation, tokenizer)
        assert reference == "d" and example.tokens[: len(prompt)].tolist() == prompt
    opening = row([said("hello", train=False), user("a"), said("b")])
    assert trained(sequences(opening, tokenizer)[0], tokenizer) == ["b<|im_end|>"]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}, {"from": "gpt", "value": "c"}]
    shared = read_row({"conversations": turns}, DataConfig(), row=0, where="l")
    assert shared.untrained == {1}


def test_a_row_without_a_trained_answer_has_an_empty_mask(tokenizer_of):
    (example,) = sequences(row([user("a"), said("b", train=False)]), tokenizer_of("chatml"))
    assert not example.mask.any() and len(example)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([user("a"), said("b", weight=0.5)], r"message 2 has weight: 0.5; it may be 0 or 1"),
        ([user("a"), said("b", train="no")], r"message 2 has train: 'no'"),
        ([user("a"), said("b", train=True, weight=0)], r"message 2 has train: true and weight: 0, which contradict"),
        ([{**user("a"), "train": True}, said("b")], r"message 1 \(user\) is marked to be trained"),
    ],
)
def test_marks_that_cannot_be_honoured(messages, complaint):
    with pytest.raises(DataError, match=rf"line 5 \(messages\): {complaint}"):
        row(messages)


def test_marks_speak_against_training_on_all(tokenizer_of):
    with pytest.raises(DataError, match=r"message 2 is marked as not to be trained.*'all' trains everything"):
        sequences(row([user("a"), said("b", weight=0)]), tokenizer_of("chatml"), train_on="all")
