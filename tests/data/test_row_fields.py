"""No field of a row is dropped in silence: what means something is read, all else is listed, ignored or refused."""

import json
from collections import Counter

import pytest

from jaxft.config import DataConfig, EvalConfig, ModelConfig, RunConfig
from jaxft.config.reading import resolve
from jaxft.data import prepare
from jaxft.data.chat.encode import encode
from jaxft.data.formats import read_row
from jaxft.data.preferences import prepare_pairs
from jaxft.data.preferences.rows import preferences_of
from jaxft.data.prepare import read_all
from jaxft.data.prompts import prepare_prompts
from jaxft.errors import ConfigError, DataError
from jaxft.runs.rewards import GivenRows

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(fields, **config):
    return read_row(fields, DataConfig(**config), row=4, where="set line 5")


def texts(fields, **config):
    return [(m["role"], m["content"]) for m in read(fields, **config).messages]


def run(train, **data):
    return RunConfig(model=ModelConfig(path="x"), data=DataConfig(train=train, **data), eval=EvalConfig())


def examined(path, tokenizer, **data):
    return prepare(run(path, **data), tokenizer).examination


# System prompts, contexts, questions

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, A], "system": "Be brief."},
        {"messages": [U, A], "system_prompt": "Be brief."},
        {"messages": [SYSTEM, U, A], "system": " Be brief. "},
        {"messages": [{**U, "content": [{"text": "q"}]}, A], "system": [{"text": "Be brief."}]},  # Bedrock
        {
            "contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}],
            "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
        },  # Gemini
        {"conversations": TURNS, "system": "Be brief."},
        {"prompt": [U], "completion": [A], "system": "Be brief."},
        {"instruction": "q", "output": "a", "system_prompt": "Be brief."},
        {"system_prompt": "Be brief.", "question": "q", "response": "a"},
    ],
)
def test_a_system_prompt_in_a_column_of_its_own(row):
    assert texts(row) == [("system", "Be brief."), ("user", "q"), ("assistant", "a")]
    assert not [one for one in read(row).unread]


def test_indices_move_with_a_system_prompt():
    chat = read({"prompt": [U], "completion": [{**A, "train": False}, U, A], "system": "s"})
    assert (chat.first_trained, chat.untrained) == (2, {2})
    assert read({"messages": [U, {**A, "loss": False}, U, A], "system": "s"}).untrained == {2}


def test_two_system_prompts_are_refused_with_a_mend_that_works():
    row = {"messages": [SYSTEM, U, A], "system": "Be long."}
    with pytest.raises(DataError, match=r"'system' and another one in its messages.*data.ignored_columns='system'"):
        read(row)
    assert texts(row, ignored_columns="system")[0] == ("system", "Be brief.")
    assert [one.treatment for one in read(row, ignored_columns="system").unread] == ["ignored"]
    with pytest.raises(DataError, match=r"different system prompts in 'system' and in 'system_prompt'.*system_field"):
        read({"messages": [U, A], "system": "a", "system_prompt": "b"})
    assert texts({"messages": [U, A], "persona": "p"}, system_field="persona")[0] == ("system", "p")


@pytest.mark.parametrize("name", ["input", "context", "passage"])
@pytest.mark.parametrize(
    ("question", "answer"), [("instruction", "output"), ("instruction", "response"), ("question", "answer")]
)
def test_a_context_is_read_with_its_question(name, question, answer):
    row = {question: "When?", name: "Built in 1903.", answer: "1903"}
    assert texts(row) == [("user", "When?\nBuilt in 1903."), ("assistant", "1903")]
    if name == "context":
        with pytest.raises(DataError, match=r"may be in 'input' or in 'context'.*data.context_field"):
            read(row | {"input": "more"})


def test_the_settings_that_a_refusal_names_read_the_column(jsonl, tokenizer_of):
    chatml, path = tokenizer_of("chatml"), jsonl([{"question": "q", "answer": "a", "facts": "In 1903."}])
    with pytest.raises(DataError, match=r"facts \(1 row.*\n.*data.context_field names a column"):
        examined(path, chatml)
    assert examined(path, chatml, context_field="facts").unread == ()
    plain = jsonl([{"prompt": "q", "completion": " a", "facts": "In 1903."}])
    assert examined(plain, chatml, format="qa", context_field="facts").unread == ()


def test_questions_and_answers_are_a_chat():
    row = {"question": "q", "answer": "a"}
    assert read(row).format == "qa" and texts(row) == [("user", "q"), ("assistant", "a")]
    # With the columns named, they are plain text, as any prompt and completion are, unless the format says chat.
    named = {"prompt_field": "question", "completion_field": "answer"}
    assert read(row, **named).completion == "a"
    assert texts(row, format="qa", **named) == texts({"prompt": "q", "completion": "a"}, format="qa") == texts(row)
    with pytest.raises(DataError, match=r"question \+ answer or question \+ response .*Set data.prompt_field"):
        read(row | {"response": "b"})


def test_tools_under_their_older_name_are_shown(tokenizer_of):
    call = {"role": "assistant", "content": None, "function_call": {"name": "tide", "arguments": "{}"}}
    functions = [{"name": "tide", "description": "now", "parameters": {"type": "object", "properties": {}}}]
    row = {"messages": [U, call], "functions": functions}
    assert read(row).tools == read({"messages": [U, call], "tools": json.dumps(functions)}).tools
    tokenizer = tokenizer_of("llama3_tools")
    (example,) = encode(read(row), tokenizer)
    assert '"description": "now"' in tokenizer.decode(example.tokens).replace("\n", "")
    with pytest.raises(DataError, match=r"both 'tools' and 'functions'"):
        read(row | {"tools": functions})


DOCUMENTS = "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}"


def test_documents_go_to_a_template_that_reads_them(jsonl, tokenizer_of):
    chatml = tokenizer_of("chatml")
    path = jsonl([{"messages": [U, A], "documents": [{"title": "Pier", "text": "Built in 1903."}]}])
    reading = tokenizer_of("chatml", DOCUMENTS + chatml.chat_template)
    data = prepare(run(path), reading)
    assert reading.decode(data.train_examples[0].tokens).startswith("Pier: Built in 1903.")
    assert data.examination.unread == ()
    with pytest.raises(
        DataError, match=r"documents \(1 row, such as .*Pier.*\n.*The chat template does not read documents"
    ):
        prepare(run(path), chatml)
    assert examined(path, chatml, ignored_columns="documents").rows == 1


# Columns that nothing reads


def test_bookkeeping_is_listed_and_what_may_mean_something_is_refused(jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    bookkeeping = {"id": 7, "source": "web", "metadata": {"a": 1}, "prompt_id": "x", "score": 0.5, "Unnamed: 0": 3}
    path = jsonl([{"messages": [U, A], **bookkeeping, "empty": "", "none": None}] * 2)
    examination = examined(path, tokenizer)
    assert {(one.name, one.rows, one.treatment) for one in examination.unread} == {
        (name, 2, "listed") for name in bookkeeping
    }
    path = jsonl([{"messages": [U, A], "id": 1}, {"messages": [U, A], "notes": "Answer as a pirate.", "label": 0}])
    with pytest.raises(DataError) as refusal:
        examined(path, tokenizer)
    message = str(refusal.value)
    assert "notes (1 row, such as 'Answer as a pirate.')" in message and "label (1 row, such as '0')" in message
    assert "id" not in message.split("Set data")[0].split("nothing reads them")[1]
    assert "data.system_field" in message and "context_field" not in message and "qa" not in message
    # Both mends of the message work.
    assert "data.ignored_columns='notes, label'" in message and "'*'" in message
    for mend in ("notes, label", "*"):
        treatments = {one.name: one.treatment for one in examined(path, tokenizer, ignored_columns=mend).unread}
        assert treatments["notes"] == "ignored" and treatments["label"] == "ignored"


def test_a_column_that_repeats_what_is_read_is_listed(jsonl, tokenizer_of):
    question, answer = "What is the tallest mountain?", "Mount Everest, in Nepal."
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rendered = f"### Instruction:\n{question}\n\n### Response:\n{answer}"
    rows = [{"messages": chat, "prompt": question, "rendered": rendered, "chosen": chat}]
    treatments = {one.treatment for one in examined(jsonl(rows), tokenizer_of("chatml")).unread}
    assert treatments == {"listed"}
    other = [{"messages": chat, "prompt": "What is the lowest mountain of all?"}]
    with pytest.raises(DataError, match=r"prompt \(1 row"):
        examined(jsonl(other), tokenizer_of("chatml"))


def test_a_text_that_renders_the_row_decides_nothing():
    """So it is in tatsu-lab/alpaca."""
    row = {"instruction": "Name the three primary colours.", "input": "", "output": "Red, blue and yellow."}
    text = f"Below is an instruction.\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n{row['output']}"
    assert read(row | {"text": text}).format == "alpaca"
    with pytest.raises(DataError, match=r"can be read as alpaca or as text"):
        read(row | {"text": "Something else entirely."})


def test_what_jaxft_itself_writes_is_read():
    sampled = {"prompt": [U], "completion": [A], "reward": 1.0, "rewards": {"exact": 1.0}, "row": 3}
    assert {one.treatment for one in read(sampled).unread} == {"listed"}


def test_columns_of_other_formats_are_left_alone_if_the_format_is_named():
    row = {"instruction": "q", "output": "a", "text": "Below is something else."}
    assert [one.treatment for one in read(row, format="alpaca").unread] == ["listed"]
    assert read(row, ignored_columns="text").format == "alpaca"


def test_messages_as_json_text_are_never_read_as_plain_text():
    prompt = json.dumps([SYSTEM, U])
    for completion in (json.dumps([A]), "a", [A]):
        assert texts({"prompt": prompt, "completion": completion}) == [
            ("system", "Be brief."),
            ("user", "q"),
            ("assistant", "a"),
        ]
    pair = preferences_of({"prompt": prompt, "chosen": "a", "rejected": json.dumps([A])}, DataConfig(), Counter())[0]
    assert pair.prompt == [SYSTEM, U] and pair.chosen == pair.rejected == [A]
    assert read({"prompt": "[1, 2]", "completion": "[3]"}).prompt == "[1, 2]"


def test_prompts_read_or_refuse_a_system_prompt(tmp_path, jsonl, tokenizer_of):
    chatml = tokenizer_of("chatml")
    data = prepare_prompts(run(jsonl([{"prompt": [U], "system": "Be brief.", "level": 3}])), chatml)
    (prompt,) = data.train_examples
    assert "Be brief." in chatml.decode(prompt.tokens) and prompt.columns == {"level": 3}
    path = jsonl([{"prompt": "q", "system": "Be brief."}])
    with pytest.raises(DataError, match=r"no room for the system prompt in 'system'.*data.ignored_columns='system'"):
        prepare_prompts(run(path), chatml)
    assert len(prepare_prompts(run(path, ignored_columns="system"), chatml).train_examples) == 1
    with pytest.raises(DataError, match=r"messages.prefix \(1 row"):
        prepare_prompts(run(jsonl([{"prompt": [{**U, "prefix": True}]}])), chatml)


def test_the_answer_of_a_question_loses_the_space_of_a_completion():
    assert texts({"question": "q", "answer": " a "})[1] == ("assistant", "a ")


def test_plain_text_has_no_room_for_a_system_prompt(jsonl, tokenizer_of):
    path = jsonl([{"prompt": "q", "completion": " a", "system": "Be brief.", "context": "In 1903."}])
    with pytest.raises(DataError, match=r"system \(1 row(.|\n)*context \(1 row(.|\n)*data.format='qa' renders prompts"):
        examined(path, tokenizer_of("chatml"))
    assert examined(path, tokenizer_of("chatml"), format="qa").holds == {"a system message": 1}


def test_preferences_read_or_list_all_columns(jsonl, tokenizer_of):
    chatml = tokenizer_of("chatml")
    pair = {"question": "q", "chosen": "yes", "rejected": "no", "system": "Be brief.", "id": 3, "margin": 1.0}
    data = prepare_pairs(run(jsonl([pair])), chatml)
    assert [one.name for one in data.examination.unread] == ["id"]
    assert "Be brief." in chatml.decode(data.train_examples[0].tokens)
    whole = {"chosen": [U, A], "rejected": [U, {**A, "content": "b"}], "system": "Be brief."}
    data = prepare_pairs(run(jsonl([whole])), chatml)
    assert chatml.decode(data.train_examples[0].tokens).count("Be brief.") == 2
    with pytest.raises(DataError, match=r"hint \(1 row, such as 'Say yes.'"):
        prepare_pairs(run(jsonl([pair | {"hint": "Say yes."}])), chatml)
    with pytest.raises(DataError, match=r"system \(1 row"):
        prepare_pairs(run(jsonl([{"prompt": "q", "chosen": " a", "rejected": " b", "system": "s"}])), chatml)


def test_rows_that_are_given_to_functions_are_read_alike(tokenizer_of):
    chatml = tokenizer_of("chatml")
    rows = GivenRows([{"messages": [U, A], "id": 1}, {"messages": [U, A], "notes": "x"}])
    with pytest.raises(DataError, match=r"columns of 2 rows .*\n  notes \(1 row, such as 'x'\)"):
        read_all(rows, DataConfig(), chatml)
    assert len(read_all(rows, DataConfig(ignored_columns="notes"), chatml)) == 2


# Keys of messages, and of parts of their content


def test_keys_of_messages_that_nothing_reads(jsonl, tokenizer_of):
    chatml = tokenizer_of("chatml")
    part = {"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}}
    path = jsonl([{"messages": [{**U, "content": [part]}, {**A, "id": "m1", "refusal": None, "prefix": False}]}])
    names = {one.name: one.treatment for one in examined(path, chatml).unread}
    assert names == {"messages.content.cache_control": "listed", "messages.id": "listed"}
    for key, value in (("prefix", True), ("refusal", "I will not."), ("audio", {"id": "a"}), ("learnable", False)):
        path = jsonl([{"messages": [U, {**A, key: value}]}])
        with pytest.raises(DataError, match=rf"messages.{key} \(1 row.*\n.*ignored_columns='messages.{key}'"):
            examined(path, chatml)
        assert examined(path, chatml, ignored_columns=f"messages.{key}").rows == 1
    reading = tokenizer_of("chatml", chatml.chat_template + "{# #}{% if messages[0].learnable %}{% endif %}")
    assert examined(path, reading).unread == ()


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "audio", "text": "x"}, 3])
def test_parts_that_are_not_text_are_refused(part):
    with pytest.raises(DataError, match=r"part 2 of message 1 \(user\)"):
        read({"messages": [{**U, "content": [{"type": "text", "text": "q"}, part]}, A]})
    called = {"type": "tool_use", "id": "t", "name": "tide", "input": {}}
    with pytest.raises(DataError, match=r"Calls of tools belong into tool_calls"):
        read({"messages": [U, {**A, "content": [called]}]})


def test_different_thoughts_of_one_answer_are_refused():
    with pytest.raises(DataError, match=r"different thoughts in reasoning_content and in thinking: keep one"):
        read({"messages": [U, {**A, "thinking": "x", "reasoning_content": "y"}]})


# Marks

TRAINED = ("train", "training", "trainable", "loss", "weight", "loss_weight", "loss_mask", "loss_scale")
UNTRAINED = ("masked", "is_masked", "ignore_loss", "no_loss")


@pytest.mark.parametrize("name", [*TRAINED, *UNTRAINED])
def test_a_mark_keeps_an_answer_from_being_trained_under_any_name(name, jsonl, tokenizer_of):
    off, on = (False, True) if name in TRAINED else (True, False)
    for wrong, right in ((off, on), (int(off), float(on)), (str(off).lower(), str(on).lower())):
        turns = [U, {**A, "content": "wrong", name: wrong}, U, {**A, "content": "right", name: right}]
        chatml = tokenizer_of("chatml")
        chat = read({"messages": turns})
        (example,) = encode(chat, chatml)
        assert chatml.decode(example.tokens[example.mask == 1]) == "right"
        assert name not in json.dumps(chat.messages) and not chat.unread
    shared = [{"from": "human", "value": "q", name: None}, {"from": "gpt", "value": "a", name: off}]
    assert read({"conversations": shared * 2}).untrained == {1, 3}
    parts = [{"type": "text", "text": "a", name: off}, {"type": "text", "text": "b", name: off}]
    assert read({"messages": [U, {**A, "content": parts}, U, A]}).untrained == {1}
    assert examined(jsonl([{"messages": turns}]), chatml).holds["answers not to be trained"] == 1


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({"train": True, "masked": True}, r"message 2 has train: true and masked: true, which contradict"),
        ({"loss": 0.5}, r"message 2 has loss: 0.5; it may be 0 or 1"),
        ({"mask": 1}, r"message 2 has mask: 1, which means trained in some files.*data.marks to 'mask=untrained'"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
            r"train_detail, which marks spans.*data.ignored_columns='messages.train_detail'",
        ),
        ({"content": [{"text": "a", "train": False}, {"text": "b"}]}, r"parts that are to be trained and parts that"),
        ({"content": [{"text": "a", "train": False}], "train": True}, r"a mark that contradicts theirs"),
    ],
)
def test_marks_that_cannot_be_honoured(answer, complaint):
    with pytest.raises(DataError, match=complaint):
        read({"messages": [U, {**A, **answer}]})


def test_the_mends_of_marks_work():
    turns = [U, {**A, "mask": 1, "train_detail": [1]}, U, {**A, "mask": 0}]
    config = {"marks": "mask=untrained", "ignored_columns": "messages.train_detail"}
    assert read({"messages": turns}, **config).untrained == {1}
    assert read({"messages": turns}, **config | {"marks": "mask=trained"}).untrained == {3}
    with pytest.raises(ConfigError, match=r"data.marks='mask=off'.*NAME=trained\|untrained"):
        resolve({"model": {"path": "x"}, "data": {"train": "x", "marks": "mask=off"}})


def test_marks_of_whole_rows(jsonl, tokenizer_of):
    trained = {"messages": [U, A], "weight": 1, "train": True}
    assert {one.treatment for one in examined(jsonl([trained]), tokenizer_of("chatml")).unread} == {"listed"}
    for mark in ({"weight": 0.3}, {"train": False}, {"masked": 1}):
        with pytest.raises(DataError, match=r"cannot be weighted or left untrained: remove the rows"):
            examined(jsonl([{"messages": [U, A], **mark}]), tokenizer_of("chatml"))


# Columns and roles by the config


@pytest.mark.parametrize("name", ["conversation", "dialog", "turns", "chat"])
def test_messages_in_columns_of_usual_names(name):
    assert texts({name: [U, A]}) == texts({name: json.dumps(TURNS)}) == [("user", "q"), ("assistant", "a")]
    with pytest.raises(DataError, match=rf"in 'messages' or in '{name}'. Set data.messages_field"):
        read({"messages": [U, A], name: [U, A]})
    assert texts({"messages": [U, A], name: [U, {**A, "content": "b"}]}, messages_field=name)[1] == ("assistant", "b")


def test_a_column_of_messages_of_any_name():
    assert texts({"talk": json.dumps([U, A])}, messages_field="talk") == [("user", "q"), ("assistant", "a")]
    with pytest.raises(DataError, match=r"'talk' is text but not JSON"):
        read({"talk": "[{"}, messages_field="talk")
    with pytest.raises(DataError, match=r"of no known format.*Set data.messages_field"):
        read({"talk": [U, A]})


def test_roles_of_ones_own():
    turns = [{"role": "Customer", "content": "q"}, {"role": "clerk", "content": "a"}]
    with pytest.raises(DataError, match=r"message 1 has role 'Customer'.*data.roles, such as 'Customer=assistant'"):
        read({"messages": turns})
    roles = "Customer=user, clerk=assistant"
    assert texts({"messages": turns}, roles=roles) == [("user", "q"), ("assistant", "a")]
    assert texts({"messages": [{**U, "role": "Human"}, {**A, "role": "GPT"}]}) == [("user", "q"), ("assistant", "a")]
    with pytest.raises(ConfigError, match=r"data.roles='clerk=asistant'.*Did you mean 'assistant'"):
        resolve({"model": {"path": "x"}, "data": {"train": "x", "roles": "clerk=asistant"}})


def test_lists_and_mappings_of_config_files():
    data = {
        "train": "x",
        "ignored_columns": ["a", "messages.b"],
        "roles": {"boss": "user"},
        "marks": {"mask": "trained"},
    }
    config = resolve({"model": {"path": "x"}, "data": data}).data
    assert config.ignored_names == {"a", "messages.b"}
    assert (config.role_names, config.mark_names) == ({"boss": "user"}, {"mask": "trained"})


def test_tool_calls_as_turns_of_their_own():
    turns = [U, {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
             {"role": "tool_response", "content": {"degrees": 3}}, A]  # fmt: skip
    messages = read({"messages": turns}).messages
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert (messages[2]["role"], messages[2]["content"]) == ("tool", '{"degrees": 3}')


NO_DEVELOPER = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_developer_is_the_system_where_the_template_knows_none(jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml", NO_DEVELOPER)
    path = jsonl([{"messages": [{"role": "developer", "content": "Be brief."}, U, A]}])
    data = prepare(run(path, eval=path), tokenizer)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in tokenizer.decode(
        data.train_examples[0].tokens, skip_special_tokens=False
    )
    assert "Be brief." in tokenizer.decode(data.eval_prompts[0])
    assert any("the developer's message is given" in warning for warning in data.examination.warnings)


ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_turns_of_one_role_are_merged_on_request(jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml", ALTERNATE)
    turns = [U, {**U, "content": "and r?"}, {**A, "train": False}, U, A, {**A, "content": "b"}]
    path = jsonl([{"messages": turns}])
    with pytest.raises(DataError, match="must alternate"):
        prepare(run(path), tokenizer)
    data = prepare(run(path, merge_turns=True), tokenizer)
    (example,) = data.train_examples
    assert tokenizer.decode(example.tokens[example.mask == 1]) == "a\n\nb"
    assert "q\n\nand r?" in tokenizer.decode(example.tokens)
    assert any("(data.merge_turns)" in warning for warning in data.examination.warnings)
    with pytest.raises(DataError, match=r"messages 2 to 3 are answers in a row, of which some are trained"):
        prepare(run(jsonl([{"messages": [U, {**A, "train": False}, A]}]), merge_turns=True), tokenizer)


def test_merging_keeps_what_is_trained_of_a_prompt_and_a_completion(tokenizer_of):
    row = {"prompt": [SYSTEM, U, U, A, U], "completion": [{**A, "content": "b"}, U, U, {**A, "content": "c"}]}
    chatml = tokenizer_of("chatml")
    (example,) = encode(read(row), chatml, DataConfig(merge_turns=True))
    trained = chatml.decode(example.tokens[example.mask == 1], skip_special_tokens=False)
    assert trained == "b<|im_end|>c<|im_end|>"
