"""Tools and calls in every spelling become OpenAI's; what cannot be one is refused by its message."""

import json

import pytest

from jaxft.config import DataConfig
from jaxft.data.formats import read_row
from jaxft.data.sources import TableRows
from jaxft.errors import DataError

ASKED = {"role": "user", "content": "q"}
FUNCTION = {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}
TEXT = {"name": "weather", "arguments": json.dumps(FUNCTION["arguments"])}
CALL = {"type": "function", "function": FUNCTION}


def row(message, **fields):
    return read_row({"messages": [ASKED, {"role": "assistant", **message}], **fields}, DataConfig(), row=0, where="l 1")


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"type": "function", "function": TEXT}]},
        {"tool_calls": [FUNCTION]},
        {"tool_calls": TEXT},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": {"type": ["function"], "function": [FUNCTION]}},
        {"tool_calls": [], "function_call": TEXT},
    ],
)
def test_every_spelling_of_a_call(message):
    read = row(message).messages[1]
    assert read == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_ids_stay_and_absent_arguments_are_none():
    (call,) = row({"tool_calls": [{"id": "a1", "function": {"name": "now", "arguments": ""}}]}).messages[1][
        "tool_calls"
    ]
    assert call == {"id": "a1", "type": "function", "function": {"name": "now", "arguments": {}}}


def test_sharegpt_calls_several_at_once():
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps([TEXT, FUNCTION])}]
    read = read_row({"conversations": turns, "tools": ""}, DataConfig(), row=0, where="l 1")
    assert [call["function"] for call in read.messages[1]["tool_calls"]] == [FUNCTION] * 2 and read.tools == ()


def test_tools_get_their_outer_object():
    schema = {"name": "weather", "parameters": {"type": "object"}}
    for tools in ([schema], [{"type": "function", "function": schema}], json.dumps([schema])):
        assert row({"content": "a"}, tools=tools).tools == ({"type": "function", "function": schema},)


def test_fields_of_other_rows_in_a_table_are_absent():
    arguments = {"city": "Oslo", "query": None}
    table = [{"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"function": {
        "name": "weather", "arguments": arguments}, "id": None}]}]}]  # fmt: skip
    read = read_row(TableRows(table, "t", "train", ())[0], DataConfig(), row=0, where="l 1")
    assert read.messages[1]["tool_calls"][0] == {
        "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"tool_calls": [3]}, r"message 2 has a tool call that is not an object: '3'"),
        ({"tool_calls": "{"}, r"message 2 calls a tool with something that is not JSON"),
        ({"tool_calls": 3}, r"message 2 calls a tool with '3', not an object"),
        (
            {"tool_calls": [{"function": {"arguments": {}}}]},
            r"message 2 has a tool call without the name of a function",
        ),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, r"message 2 calls a tool with '\[1\]', not an object"),
        ({"role": "user", "content": "q", "tool_calls": [CALL]}, r"message 2 \(user\) calls a tool, which only the"),
        ({"content": "a", "reasoning": 3}, r"message 2 \(assistant\) has reasoning of type int"),
    ],
)
def test_calls_that_are_none(message, complaint):
    with pytest.raises(DataError, match=rf"l 1 \(messages\): {complaint}"):
        row(message)


def test_tools_without_a_name_are_refused():
    with pytest.raises(DataError, match=r"a tool has no name: .*parameters"):
        row({"content": "a"}, tools=[{"parameters": {}}])
