"""Every row format becomes a Conversation; every bad row is refused by its place."""

import json

import pytest

from jaxft.config import DataConfig
from jaxft.data.formats import read_row
from jaxft.errors import DataError


def read(fields, **config):
    return read_row(fields, DataConfig(**config), row=4, where="set line 5")


def shape(conversation):
    return [(m["role"], m["content"]) for m in conversation.messages]


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": [U, A], "id": 3}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"conversations": [U, A]}, "sharegpt"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"prompt": [U], "completion": [A]}, "prompt_completion"),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, "messages"),
        ({"messages": [{**U, "tool_calls": None}, A], "text": None}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]}, "messages"),
    ],
)
def test_chat_formats(fields, name):
    conversation = read(fields)
    assert (conversation.format, conversation.row, conversation.where) == (name, 4, "set line 5")
    assert shape(conversation) == [("user", "q"), ("assistant", "a")]


def test_plain_formats():
    conversation = read({"prompt": "p:", "completion": " c"})
    assert (conversation.format, conversation.prompt, conversation.completion) == ("prompt_completion", "p:", " c")
    assert (read({"text": "t"}).prompt, read({"text": "t"}).completion) == ("", "t")
    renamed = read({"question": "p:", "answer": " c"}, prompt_field="question", completion_field="answer")
    assert (renamed.prompt, renamed.completion) == ("p:", " c")


def test_alpaca_with_everything():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief", "history": [["q0", "a0"]]}
    assert shape(read(row)) == [
        ("system", "Be brief"),
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "Add\n1 2"),
        ("assistant", "3"),
    ]


def test_prompt_messages_are_not_trained():
    conversation = read({"prompt": [U, A, U], "completion": [A]})
    assert conversation.first_trained == 3 and len(conversation.messages) == 4


def test_tools_and_calls_become_objects():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [U, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": ""}, A]
    conversation = read({"messages": messages, "tools": json.dumps(tools)})
    assert conversation.tools == tuple(tools)
    assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "3 C"},
        {"from": "gpt", "value": "cold"},
    ]
    shared = read({"conversations": turns, "tools": tools})
    assert [m["role"] for m in shared.messages] == ["user", "assistant", "tool", "assistant"]
    assert shared.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"question": "q", "reply": "a"}, r"set line 5 is of no known format: its keys are question, reply"),
        ({"messages": [U, A], "text": "t"}, r"messages or as text .*Set data.format"),
        ({"messages": []}, r"set line 5 \(messages\): .*at least one message"),
        ({"messages": ["hello", 7]}, r"entry 1 is not a message: .*role and content"),
        ({"messages": [U]}, r"no assistant message to train on \(roles: user\)"),
        ({"messages": [U, {"role": "asistant", "content": "a"}]}, r"role 'asistant'.*Did you mean 'assistant'"),
        ({"messages": [U, {"role": "assistant", "content": " "}]}, r"message 2 \(assistant\) has empty content"),
        ({"messages": [{"role": "user", "content": None}, A]}, r"message 1 \(user\) has empty content"),
        ({"messages": [{"role": "user", "content": True}, A]}, r"the content of message 1 \(user\) is true, which is"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, A]}, r"not text"),
        ({"messages": [U, {"role": "assistant", "tool_calls": ["x"]}]}, r"tool call that is not an object"),
        ({"messages": [U, A], "tools": "{"}, r"'tools' is text but not JSON"),
        ({"messages": [U, A], "tools": 3}, r"'tools' must be a list"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, r"turn 1 is from 'alien'"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "no"}]}, r"not JSON"),
        ({"prompt": "p", "completion": ""}, r"'completion' is empty, so there is nothing to train on"),
        ({"prompt": "p", "completion": [A]}, r"'prompt' is str and 'completion' is list"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, r"pairs"),
        ({"instruction": "q", "output": ""}, r"message 2 \(assistant\) has empty content"),
        ({"text": ""}, r"'text' is empty"),
    ],
)
def test_bad_rows_are_refused(fields, complaint):
    with pytest.raises(DataError, match=complaint):
        read(fields)


def test_a_named_format_wants_its_fields():
    assert read({"messages": [U, A], "text": "t"}, format="text").completion == "t"
    with pytest.raises(DataError, match=r"set line 5 \(alpaca\): no field 'instruction'; its keys are text"):
        read({"text": "t"}, format="alpaca")
