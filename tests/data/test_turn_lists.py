"""Conversations in every form in which files list their turns are the same messages; what is ambiguous is refused."""

import json

import pytest

from jaxft.config import DataConfig
from jaxft.data.formats import read_row
from jaxft.data.preferences.rows import preferences_of
from jaxft.data.rows.values import RowProblem
from jaxft.errors import DataError


def read(fields, **config):
    return read_row(fields, DataConfig(**config), row=0, where="line 1")


def spoken(fields, **config):
    return [(message["role"], message["content"]) for message in read(fields, **config).messages]


TURNS = ["q", "a", "r", "b"]
EXPECTED = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
# The same conversation in the forms of LIMA, UltraChat, Capybara, MOSS, gradio and others.
FORMS = {
    "texts": TURNS,
    "exchanges": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}],
    "human and assistant": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}],
    "user and assistant": [{"user": "q", "assistant": "a"}, {"user": "r", "assistant": "b"}],
    "question and answer": [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}],
    "pairs": [["q", "a"], ["r", "b"]],
    "speakers": [["user", "q"], ["assistant", "a"], ["Human", "r"], ["gpt", "b"]],
    "one key a turn": [{"user": "q"}, {"assistant": "a"}, {"human": "r"}, {"gpt": "b"}],
    "authors": [{"author": role, "content": text} for role, text in EXPECTED],
}


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "data", "dialog"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_column(form, column):
    assert spoken({column: FORMS[form], "id": 1}) == EXPECTED
    assert spoken({column: json.dumps(FORMS[form])}) == EXPECTED, "as text in a cell of a table"


def test_texts_may_end_in_a_question_and_marks_belong_to_the_answer():
    assert spoken({"conversations": TURNS[:3]}) == EXPECTED[:3]
    assert spoken({"messages": [{"input": "q", "output": "a"}, {"input": "r", "output": None}]}) == EXPECTED[:3]
    marked = read({"messages": [{"input": "q", "output": "a", "train": False}, {"input": "r", "output": "b"}]})
    assert marked.untrained == {1}
    (unread,) = read({"messages": [{"input": "q", "output": "a", "hint": "h"}]}).unread
    assert (unread.name, unread.treatment) == ("messages.hint", "refused")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"conversations": ["only a question"]}, r"no assistant message"),
        ({"turns": ["q", "another q"], "reference": ["a", "b"]}, r"no known format: its keys are reference, turns"),
        ({"data": ["one text"]}, r"no known format"),
        ({"messages": [{"content": "q"}]}, r"message 1 has no role; its keys are content"),
        ({"messages": ["q", {"role": "assistant", "content": "a"}]}, r"entry 1 is not a message: 'q'. .*texts alone"),
        ({"messages": [["q", "a", "r"]]}, r"entry 1 is not a message"),
        ({"messages": [{"input": "q", "output": "a", "question": "q", "answer": "a"}]}, r"message 1 has no role"),
    ],
)
def test_what_may_mean_something_else_is_refused(fields, complaint):
    with pytest.raises(DataError, match=complaint):
        read(fields)


def test_a_list_of_texts_is_read_where_the_setting_says_so():
    assert spoken({"turns": TURNS}, messages_field="turns") == EXPECTED
    assert read({"prompt": "p", "completion": ["a", "b"]}).completion == '["a", "b"]', "of a completion it is text"


def test_preferences_of_exchanges():
    (pair,) = preferences_of({"prompt": [{"human": "q"}], "chosen": "a", "rejected": "b"}, DataConfig(), {})
    assert [message["content"] for message in pair.prompt] == ["q"] and (pair.chosen, pair.rejected) != ("a", "b")


def test_thoughts_in_a_column_of_their_own():
    for name in ("reasoning", "thinking", "Complex_CoT"):
        answer = read({"Question": "q", name: "t", "Response": "a"}).messages[-1]
        assert answer == {"role": "assistant", "content": "a", "reasoning_content": "t"}
    with pytest.raises(DataError, match=r"its thoughts may be in reasoning or in cot"):
        read({"question": "q", "reasoning": "t", "cot": "u", "answer": "a"})


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": "a", "rejected": "b"},
        {"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []},
    ],
)
def test_rows_of_other_methods_are_told_by_their_methods(fields):
    with pytest.raises(DataError, match=r"Rows of preferences.*method\.name=dpo"):
        read(fields)


def test_a_rejected_answer_to_messages_that_end_in_the_chosen_one():
    """ms-swift's form of preferences."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"messages": messages, "rejected_response": "b", "system": "Be brief."}
    (pair,) = preferences_of(row, DataConfig(), {})
    assert [message["content"] for message in pair.prompt] == ["Be brief.", "q"]
    assert (pair.chosen, pair.rejected) == (messages[1:], [{"role": "assistant", "content": "b"}])
    assert pair.columns >= {"messages", "rejected_response", "system"}
    with pytest.raises(RowProblem, match="no messages that end in the chosen answer"):
        preferences_of({"messages": messages[:1], "rejected_response": "b"}, DataConfig(), {})


def test_segments_are_a_prompt_and_what_continues_it():
    segments = [{"label": False, "text": "Q: "}, {"label": False, "text": "q\n"}, {"label": True, "text": "A: a"}]
    row = read({"segments": segments})
    assert (row.prompt, row.completion, row.messages) == ("Q: q\n", "A: a", ())
    assert read({"segments": json.dumps(segments[2:])}).prompt == ""


@pytest.mark.parametrize(
    ("segments", "complaint"),
    [
        ([{"label": True, "text": "a"}, {"label": False, "text": "b"}], r"segment 2 is not trained, but follows one"),
        ([{"label": False, "text": "a"}], r"no segment has the label true"),
        ([{"label": 1, "text": "a"}], r"segment 1 must have text, a label that is true or false"),
        ([{"label": True, "text": "a", "weight": 2}], r"segment 1 must have .* and nothing else"),
        (["a"], r"'segments' must be a list of objects"),
    ],
)
def test_segments_that_cannot_be_trained_alone_are_refused(segments, complaint):
    with pytest.raises(DataError, match=complaint):
        read({"segments": segments})
