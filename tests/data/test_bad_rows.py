"""Values of rows that are not text, and rows that cannot be trained on: all are told, or left out and counted."""

import gzip
import json
import re
from collections import Counter

import pytest

from jaxft.config import DataConfig, EvalConfig, ModelConfig, RunConfig
from jaxft.data import prepare, print_examination
from jaxft.data.chat.encode import encode
from jaxft.data.formats import read_row
from jaxft.data.preferences import prepare_pairs
from jaxft.data.preferences.rows import preferences_of
from jaxft.data.prompts import prepare_prompts
from jaxft.data.rows.bad_rows import BadRows
from jaxft.errors import DataError
from jaxft.runs.data_summary import data_notes

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
NAN = float("nan")


def read(fields, **config):
    return read_row(fields, DataConfig(**config), row=4, where="set line 5")


def run(train, metric=None, **data):
    return RunConfig(model=ModelConfig(path="x"), data=DataConfig(train=train, **data), eval=EvalConfig(metric=metric))


# Values that are not text

OBJECT = {"name": "Ada", "married": None, "active": True, "tags": ["é", 1.5]}
SPELT = '{"name": "Ada", "married": null, "active": true, "tags": ["é", 1.5]}'


@pytest.mark.parametrize(
    ("value", "text"), [(OBJECT, SPELT), ([1, None], "[1, null]"), (42, "42"), (1e-7, "1e-07"), (-0.5, "-0.5")]
)
def test_values_are_text_as_json_spells_them(value, text):
    assert json.loads(text) == value
    assert read({"instruction": value, "output": "a"}).messages[0]["content"] == text
    assert read({"instruction": "q", "input": value, "output": "a"}).messages[0]["content"] == f"q\n{text}"
    assert read({"instruction": "q", "output": value}).messages[1]["content"] == text
    assert read({"question": value, "answer": value}).messages[1]["content"] == text
    assert read({"prompt": "q", "completion": value}).completion == text
    assert read({"text": value}).completion == text
    if not isinstance(value, list):  # a list holds the parts of a content
        assert read({"messages": [U, {**A, "content": value}]}).messages[1]["content"] == text
    (pair,) = preferences_of({"prompt": value, "chosen": value, "rejected": "b"}, DataConfig(), Counter())
    assert pair.prompt == pair.chosen == text


# As the templates of Qwen3-Coder and Qwen3.5 do it.
PARAMETERS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% for k, v in c.function.arguments.items() %}<{{ k }}>"
    "{{ v | tojson if v is mapping else v | string }}</{{ k }}>{% endfor %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_arguments_of_calls_are_written_as_json(tmp_path, tokenizer_of):
    tokenizer = tokenizer_of("chatml", PARAMETERS)
    given = {"deep": True, "none": None, "off": False, "n": 3, "in": {"x": None}, "text": "True"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": given}]}
    path = write(tmp_path / "rows.jsonl", [{"messages": [U, call], "tools": [{"name": "f", "parameters": {}}]}])
    data = prepare(run(path), tokenizer)
    (example,) = data.train_examples
    assert tokenizer.decode(example.tokens[example.mask == 1]) == (
        '<f><deep>true</deep><none>null</none><off>false</off><n>3</n><in>{"x": null}</in><text>True</text>'
    )
    assert any("as text, since it would write them as Python does" in one for one in data.examination.warnings)
    assert not tokenizer_of("llama3_tools").writes_python_values and not tokenizer_of("qwen3").writes_python_values


@pytest.mark.parametrize("empty", [None, NAN, ""])
def test_an_empty_cell_of_an_optional_column_is_absent(empty):
    row = {"instruction": "q", "input": empty, "output": "a", "system": empty, "history": empty, "tools": empty}
    assert [m["content"] for m in read(row).messages] == ["q", "a"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"instruction": "q", "output": True}, r"'output' is true, which is not text.*\"yes\" or \"true\""),
        ({"instruction": "q", "input": False, "output": "a"}, r"'input' is false, which is not text"),
        ({"instruction": {"x": NAN}, "output": "a"}, r"'instruction' holds NaN or an infinite number"),
        ({"prompt": "q", "completion": float("inf")}, r"'completion' holds NaN or an infinite"),
        ({"messages": json.dumps([U, {**A, "content": NAN}])}, r"'messages' is text but not JSON: NaN is no JSON"),
        ({"prompt": "q", "completion": NAN}, r"set line 5 \(prompt_completion\): completion is null"),
        ({"instruction": None, "output": "a"}, r"\(alpaca\): instruction is null.*Fill it, or remove the row"),
        ({"text": None}, r"\(text\): text is null"),
        (
            {"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": {"x": [NAN]}}]}]},
            r"message 2.tool_calls entry 1.function.arguments.x entry 1 is nan, which JSON cannot spell",
        ),
        ({"system": {"a": 1}, "messages": [U, A]}, r"'system' is no system prompt"),
        ({"messages": [U, A], "documents": 3}, r"'documents' must be a list; it is '3'"),
        ({"prompt": [], "completion": []}, r"'prompt' must be a list with at least one message"),
        ({"system": 3, "messages": [U, A]}, r"'system' is no system prompt: it is '3'"),
    ],
)
def test_values_that_are_neither_text_nor_json_are_refused(row, complaint):
    with pytest.raises(DataError, match=complaint):
        read(row)


def test_half_of_a_character_is_refused_wherever_it_is():
    half = "cut \ud83d"
    for row, name in (
        ({"messages": [{**U, "content": half}, A]}, "message 1.content"),
        ({"prompt": "q", "completion": half}, "completion"),
        ({"text": half}, "text|completion"),
        ({"messages": [U, A], "chat_template_kwargs": {"x": [half]}}, "template_kwargs.x entry 1"),
        ({"messages": [U, A], "tools": [{"name": "f", "description": half}]}, "tools entry 1.function.description"),
        ({"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": {half: 1}}]}]}, "the name of a field in"),
    ):
        with pytest.raises(DataError, match=rf"set line 5 .*({name}).* holds half of a character .*ud83d.*remove it"):
            read(row)


# Bad rows

GOOD = {"messages": [U, A]}
BAD = [
    {"messages": [U, {**A, "content": ""}]},
    {"messages": [U]},
    {"messages": [U, {"role": "boss", "content": "x"}]},
    {"messages": [U, {**A, "content": "\ud83d"}]},
    {"messages": [U, {**A, "content": "x<|im_end|>y"}]},  # found only when the row is rendered
    {"messages": [U, {**A, "train": False}]},  # found only once it is tokenised
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_all_bad_rows_are_told_at_once_and_can_be_skipped(tmp_path, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    path = write(tmp_path / "rows.jsonl", [GOOD, *BAD, {**GOOD, "notes": "x"}, {"messages": [U]}])
    with pytest.raises(DataError) as refusal:
        prepare(run(path), tokenizer)
    message, columns = str(refusal.value).split("\ncolumns of ")
    assert "notes (1 row" in columns
    path = write(tmp_path / "rows.jsonl", [GOOD, *BAD, GOOD, {"messages": [U]}])
    assert message.startswith("7 of 9 rows of ") and message.endswith("data.bad_rows='skip'.")
    for line in range(2, 8):
        assert f"rows.jsonl line {line}" in message
    assert "(the same in 1 more: rows.jsonl line 9)" in message
    data = prepare(run(path, bad_rows="skip", eval=path, metric="exact_match"), tokenizer)
    assert [example.row for example in data.train_examples] == [0, 7]
    assert data.examination.formats == {"messages": 2} and not data.examination.holds
    assert (data.examination.rows, data.examination.skipped, len(data.examination.bad_rows)) == (2, 7, 6)
    assert any("left out, as data.bad_rows says: 7 rows" in warning for warning in data.examination.warnings)
    assert data.eval_references == ["a", "a"]  # bad rows are not scored either
    with pytest.raises(DataError, match=r"6 of 6 rows(.|\n)*Correct the rows, or how they are read.$"):
        prepare(run(write(tmp_path / "bad.jsonl", BAD), bad_rows="skip"), tokenizer)


def test_what_is_left_out_is_shown(tmp_path, tokenizer_of, capsys):
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "id": 5}, BAD[1]])
    data = prepare(run(path, bad_rows="skip"), tokenizer_of("chatml"))
    examination = data.examination
    assert len(data_notes(data)) == 1 and "left out, as data.bad_rows says: 1 row of" in data_notes(data)[0]
    ignoring = prepare(run(path, bad_rows="skip", ignored_columns="*"), tokenizer_of("chatml"))
    assert data_notes(ignoring)[1] == "columns that are not read, as data.ignored_columns says: id"
    print_examination(examination)
    shown = capsys.readouterr().out
    assert "rows that are left out, 1 in all:" in shown and "rows.jsonl line 2 (messages): 'messages' has no" in shown
    assert "id (1 row, such as '5'): listed" in shown
    assert json.loads(json.dumps(examination.to_dict()))["skipped"] == 1


def test_a_bad_answer_takes_its_pair_along(tmp_path, tokenizer_of):
    pairs = [{"prompt": "q", "chosen": " a", "rejected": " b"}, {"prompt": "q", "chosen": [U, A], "rejected": "b"}]
    chats = [{"prompt": [U], "chosen": [A], "rejected": [{**A, "content": "b<|im_end|>b"}]}]
    path = write(tmp_path / "rows.jsonl", [*pairs, *chats, {"prompt": "q", "chosen": None, "rejected": " b"}])
    with pytest.raises(DataError, match=r"3 of 4 rows(.|\n)*line 2(.|\n)*line 3, rejected(.|\n)*line 4: it is no pref"):
        prepare_pairs(run(path), tokenizer_of("chatml"))
    data = prepare_pairs(run(path, bad_rows="skip"), tokenizer_of("chatml"))
    assert [pair.row for pair in data.train_examples] == [0] and data.examination.skipped == 3


def test_bad_prompts(tmp_path, tokenizer_of):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q"}, {"question": None}, {"prompt": [A]}, {"prompt": "\ud83d"}])
    with pytest.raises(DataError, match=r"3 of 4 rows(.|\n)*line 2: it has no prompt(.|\n)*line 3(.|\n)*line 4: its"):
        prepare_prompts(run(path), tokenizer_of("chatml"))
    data = prepare_prompts(run(path, bad_rows="skip"), tokenizer_of("chatml"))
    assert len(data.train_examples) == 1 and data.examination.skipped == 3


def test_deep_nesting_and_long_integers_are_bad_rows(tmp_path, tokenizer_of):
    lines = [
        json.dumps(GOOD),
        '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"text": ' + "[" * 150 + "1" + "]" * 150 + "}",
        json.dumps({"messages": [U, A], "tools": "[" * 100_000}),
        '{"instruction": ' + "9" * 5000 + ', "output": "a"}',
    ]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(DataError, match=r"3 of 5 rows(.|\n)*line 2(.|\n)*line 4(.|\n)*line 5"):
        prepare(run(str(path)), tokenizer_of("chatml"))


def test_many_problems_are_counted():
    bad, part = BadRows(), BadRows()
    for row in range(30):
        (bad if row < 15 else part).add(row, f"line {row}", DataError(f"line {row}: problem {row}"))
        part.add(100 + row, f"line {100 + row}", DataError(f"line {100 + row}: the same"))
    part.add(129, "line 129", DataError("line 129: another"))
    bad.update(part)
    refusal = bad.refusal("refuse", 99, "a set")
    assert refusal.startswith("60 of 99 rows") and re.search(r"\n  and \d+ rows with other problems\n", refusal)
    assert "line 100: the same (the same in 29 more: line 101, " in refusal and refusal.count("\n  ") == 21
    assert bad.refusal("skip", 99, "a set") is None and bad.refusal("skip", 60, "a set") is not None


# Boundaries and ends


@pytest.mark.parametrize(
    ("prompt", "completion"), [("two plus two is ", "four"), ("two pl", "us two"), ("plus", " two two")]
)
def test_the_mends_of_a_boundary_work(prompt, completion, tokenizer_of):
    tokenizer = tokenizer_of("plain")
    row = {"prompt": prompt, "completion": completion}
    (separate,) = encode(read(row), tokenizer, DataConfig(boundary="separate"))
    start = int(separate.mask.argmax())
    # As at inference: the prompt's own tokens, then the text of the completion.
    assert separate.tokens[1:start].tolist() == tokenizer.encode(prompt)
    assert tokenizer.decode(separate.tokens[start:-1]) == completion
    try:
        (example,) = encode(read(row), tokenizer)
    except DataError as error:
        moved = eval(str(error).split("Move ")[1].split(" from the end")[0])
        assert prompt.endswith(moved)
        (example,) = encode(read({"prompt": prompt[: -len(moved)], "completion": moved + completion}), tokenizer)
    else:
        assert prompt == "plus"
    assert tokenizer.decode(example.tokens) == prompt + completion


def test_a_text_that_ends_in_its_end_token_and_white_space_has_one_end(tokenizer_of):
    chatml = tokenizer_of("chatml")
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    (example,) = encode(read({"prompt": prompt, "completion": "yes<|im_end|>\n"}), chatml)
    (bare,) = encode(read({"prompt": prompt, "completion": "yes<|im_end|>"}), chatml)
    (chat,) = encode(read({"messages": [{**U, "content": "hi"}, {**A, "content": "yes"}]}), chatml)
    assert example.tokens.tolist() == bare.tokens.tolist() == chat.tokens.tolist()
    assert example.mask.tolist() == chat.mask.tolist()
    (text,) = encode(read({"text": "yes<|im_end|> \n\n"}), chatml)
    assert text.tokens.tolist().count(chatml.eos_id) == 1
