"""Answers and the thoughts before them, told apart by tokens or tags, and what a conversation remembers of both."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError
from jaxft.generation.called_tools import CallForm, CallStream
from jaxft.generation.chat import Chat
from jaxft.generation.settings import Sampling
from jaxft.generation.text import Answer, as_prompts, encode_prompt, generate_text
from jaxft.generation.thoughts import AnswerStream, parts_of, sampled_text

USER = {"role": "user", "content": "2+2?"}
HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]
CHATML = ["<|im_start|>", "<|im_end|>"]
BARE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def bytes_with(tokens, template, *, special=(), eos):
    """A tokenizer of single bytes and these tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, normalized=False, special=token in special) for token in tokens])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=template))


def published(name):
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


@pytest.fixture(scope="module")
def harmony():
    return bytes_with(HARMONY, published("gptoss"), special=HARMONY, eos="<|return|>")


@pytest.fixture(scope="module", params=[True, False], ids=["special", "ordinary"])
def qwen3(request):
    tokens = [*CHATML, "<think>", "</think>"]
    return bytes_with(tokens, published("qwen3"), special=tokens if request.param else CHATML, eos="<|im_end|>")


def heard(tokenizer, text, prompt=()):
    """(thoughts, answer) of a text; the pieces that come must make up both."""
    stream = AnswerStream(tokenizer, prompt)
    pieces = [stream.push(token) for token in tokenizer.encode(text) if token not in tokenizer.stop_ids]
    pieces.append(stream.finish())
    assert "".join(piece.answer for piece in pieces) == stream.text
    assert "".join(piece.thoughts for piece in pieces).strip() == stream.thoughts
    assert parts_of(tokenizer, prompt, tokenizer.encode(text)) == (stream.thoughts, stream.text)
    return stream.thoughts, stream.text


def test_channels_are_read_from_their_tokens(harmony):
    prompt = encode_prompt(harmony, [USER])
    said = "<|channel|>analysis<|message|>The user greets.<|end|><|start|>assistant<|channel|>final<|message|>Hello!"
    assert heard(harmony, said + "<|return|>", prompt) == ("The user greets.", "Hello!")
    # An answer at once; one without a channel; thoughts twice, the second in a channel for calls of tools.
    assert heard(harmony, "<|channel|>final<|message|>Grüße ☃", prompt) == ("", "Grüße ☃")
    assert heard(harmony, "<|message|>Hi", prompt) == ("", "Hi")
    called = (
        "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"a": 1}<|call|>'
    )
    assert heard(harmony, called, prompt) == ('Look.\n\n{"a": 1}', "")
    # Cut off within thoughts, and within a header.
    assert heard(harmony, "<|channel|>analysis<|message|>The us", prompt) == ("The us", "")
    assert heard(harmony, said[: said.index("final")], prompt) == ("The user greets.", "")
    # The same words as text are text.
    spelt = harmony.encode("final analysis")
    start = harmony.encode("<|channel|>final<|message|>")
    assert parts_of(harmony, prompt, [*start, *spelt]) == ("", "final analysis")


CALLED = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
    for name in ("get_weather", "f.g-h")
]
OWN = (  # as gpt-oss answers; its template writes the recipient before the channel
    "{{ '<|start|>user<|message|>' + messages[0].content + '<|end|><|start|>assistant' }}"
    "{% if messages[1] is defined %}{% set c = messages[1].tool_calls[0].function %}"
    "{{ '<|channel|>commentary to=functions.' + c.name + ' <|constrain|>json<|message|>' }}"
    "{{ c.arguments | tojson }}<|call|>{% endif %}{# tools #}"
)


@pytest.mark.parametrize("template", [None, OWN], ids=["published", "answered"])
def test_calls_are_messages_of_their_own(harmony, template):
    tokenizer = harmony if template is None else harmony.with_template(template)
    form = CallForm.of(tokenizer)
    assert form.syntax.recipient is not None and not form.kept
    prompt = encode_prompt(tokenizer, [USER], tools=CALLED)

    def read(text, tools=CALLED):
        """(thoughts, shown text, calls)."""
        stream, calls = AnswerStream(tokenizer, prompt, recipient=form.syntax.recipient), CallStream(form.syntax, tools)
        pieces = [stream.push(token) for token in tokenizer.encode(text)] + [stream.finish()]
        shown = "".join(calls.push(piece.answer) for piece in pieces) + calls.finish(stream.called)
        return stream.thoughts, shown, [(call.name, json.loads(call.arguments)) for call in calls.calls]

    for name, arguments in (("get_weather", {"city": "<|Zürich>", "n": [1, None]}), ("f.g-h", {})):
        given = [{"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}]
        rendered = tokenizer.render([USER, {"role": "assistant", "content": "", "tool_calls": given}], tools=CALLED)
        call = rendered.rpartition("<|start|>assistant")[2]
        assert read(call) == ("", "", [(name, arguments)])
        thought = f"<|channel|>analysis<|message|>Look.<|end|><|start|>assistant{call}"
        assert read(thought) == ("Look.", "", [(name, arguments)])
        if arguments:
            assert read(call, tools=CALLED[1:])[1:] == (json.dumps(arguments, ensure_ascii=False), []), "of no tool"
        cut = call[: -len("}<|call|>")]
        assert read(cut)[1:] == (cut.rpartition("<|message|>")[2], [])
    assert read("<|channel|>final<|message|>Hi") == ("", "Hi", [])
    assert read("<|channel|>commentary to=browser.open<|message|>{}") == ("{}", "", []), "a tool that is built in"


def test_a_prompt_may_open_a_channel(harmony):
    prompt = [*encode_prompt(harmony, [USER]), *harmony.encode("<|channel|>analysis<|message|>")]
    text = "Hm.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    assert heard(harmony, text, prompt) == ("Hm.", "4")


def test_blocks_of_thoughts_are_read_whether_their_tags_are_special_or_not(qwen3):
    prompt = encode_prompt(qwen3, [USER])
    assert heard(qwen3, "<think>\nLet me see: 漢字\n</think>\n\n4.", prompt) == ("Let me see: 漢字", "4.")
    assert heard(qwen3, "<think>\n\n</think>\n\n4.", prompt) == ("", "4.")
    assert heard(qwen3, " 4. \n", prompt) == ("", " 4. \n")
    assert heard(qwen3, "<think>\nLet", prompt) == ("Let", "")
    # The opening tag is in the prompt; or it was, and nothing tells so.
    assert heard(qwen3, "Hm.\n</think>\n\n4.", [*prompt, *qwen3.encode("<think>\n")]) == ("Hm.", "4.")
    stream = AnswerStream(qwen3, prompt)
    for token in qwen3.encode("Hm.</think>4."):
        stream.push(token)
    stream.finish()
    assert (stream.thoughts, stream.text) == ("Hm.", "4.")
    # Without thinking, the prompt has an empty block already.
    prompt = encode_prompt(qwen3, [USER], enable_thinking=False)
    assert heard(qwen3, "4.", prompt) == ("", "4.")


@pytest.mark.parametrize(
    ("said", "thoughts", "answer"),
    [
        ("<think>\nHm.\n</think>\n\n4 < 5 <b>", "Hm.", "4 < 5 <b>"),
        ("\n<think>Hm. </thin</think>4", "Hm. </thin", "4"),
        ("I <think>so</think>.", "", "I <think>so</think>."),
        ("<thin", "", "<thin"),
        ("\n\n4", "", "\n\n4"),
        ("<think>a</thi", "a</thi", ""),
    ],
)
def test_tags_that_are_no_tokens_are_found_in_the_text(said, thoughts, answer):
    tokenizer = bytes_with(["<|im_end|>"], BARE, special=["<|im_end|>"], eos="<|im_end|>")
    assert heard(tokenizer, said, encode_prompt(tokenizer, [USER])) == (thoughts, answer)


def test_a_conversation_goes_on_as_if_it_was_templated_by_the_makers(harmony, qwen3):
    """What Chat keeps of an answer, rendered by published templates, has the answer and no earlier thoughts."""
    for tokenizer, end in ((harmony, "<|end|>"), (qwen3, "<|im_end|>")):
        chat = Chat(model=None, tokenizer=tokenizer, sampling=Sampling())
        said = chat._message("Four.", "A sum.")
        prompt = tokenizer.render([USER, said, USER], add_generation_prompt=True)
        assert f"Four.{end}" in prompt and "A sum." not in prompt
        assert prompt == tokenizer.render(
            [USER, {"role": "assistant", "content": "Four."}, USER], add_generation_prompt=True
        )
    r1 = bytes_with(["<|im_end|>"], published("deepseek_r1_distill"), eos="<|im_end|>")
    assert Chat(model=None, tokenizer=r1, sampling=Sampling())._message("4", "Hm.") == {
        "role": "assistant",
        "content": "4",
    }


def test_chat_shows_thoughts_apart_and_remembers_the_answer(scripted, tokenizer):
    before = "user:2+2?assistant:"
    model = scripted(before + "." * 2 + "<think>Two\nand two.</think>Four.", 258)
    chat = Chat(model=model, tokenizer=tokenizer, sampling=Sampling(max_new_tokens=60))
    shown = []
    answer = chat.ask("2+2?", shown.append)
    assert (answer.text, answer.thoughts) == ("Four.", "Two\nand two.")
    assert "".join(shown) == "(thoughts)\nTwo\nand two.\n(answer)\nFour."
    assert chat.turns == [USER, {"role": "assistant", "content": "Four."}]
    # Nothing but thoughts is no answer, and the question is taken back.
    chat = Chat(model=model, tokenizer=tokenizer, sampling=Sampling(max_new_tokens=12))
    assert chat.ask("2+2?", shown.append).text == "" and chat.turns == []


def test_a_stop_text_ends_the_answer_and_not_its_thoughts(scripted, tokenizer):
    model = scripted("user:2+2?assistant:" + "." * 2 + "<think>a. b. c</think>d. e", 258)
    (result,) = generate_text(model, tokenizer, [[USER]], Sampling(max_new_tokens=60, stop=(".",)))
    assert (result.thoughts, result.text, result.finish_reason) == ("a. b. c", "d", "stop")
    # A text is continued as it is.
    (result,) = generate_text(model, tokenizer, ["user:2+2?assistant:."], Sampling(max_new_tokens=60))
    assert (result.thoughts, result.text) == ("", "<think>a. b. c</think>d. e")


def test_reward_functions_see_channels_as_a_block(harmony):
    prompt = encode_prompt(harmony, [USER])
    ids = harmony.encode("<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant<|channel|>final<|message|>4")
    assert sampled_text(harmony, ids, parts_of(harmony, prompt, ids)) == "<think>\nSum.\n</think>\n\n4"


@pytest.mark.parametrize(
    ("given", "count", "single"),
    [("hello", 1, True), ([USER], 1, True), ((USER, USER), 1, True), (["a", [USER]], 2, False), ([], 0, False),
     ([[USER]], 1, False), (("a", "b"), 2, False)],
)  # fmt: skip
def test_one_prompt_or_several(given, count, single):
    prompts, is_single = as_prompts(given)
    assert (len(prompts), is_single) == (count, single)
    assert all(isinstance(one, str) or isinstance(one[0], dict) for one in prompts)


@pytest.mark.parametrize(
    ("given", "message"),
    [(7, "prompts is int"), (None, "prompts is NoneType"), (USER, "a prompt is a text, or a list of messages"),
     (["a", 7], "prompt 1 is int"), ([[1, 2]], "message 1 of prompt 0 is int"), (b"hi", "prompt 0 is int"),
     ([{"content": "hi"}], "message 1 of the conversation is dict"), ([[]], "prompt 0 is list"),
     ([[USER, "x"]], "message 2 of prompt 0 is str")],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        as_prompts(given)


def test_a_developer_is_the_system_for_templates_that_know_no_developer():
    """As in training: these templates leave the message out, or refuse it."""
    template = (
        "{% for m in messages %}{% if m.role in ['system', 'user'] %}{{ m.role }}:{{ m.content }};{% endif %}"
        "{% endfor %}"
    )
    tokenizer = bytes_with(["<|im_end|>"], template, eos="<|im_end|>")
    prompt = [{"role": "developer", "content": "Be brief."}, USER]
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == "system:Be brief.;user:2+2?;"
    assert prompt[0]["role"] == "developer"


def test_answers_are_strings_with_their_thoughts(scripted, tokenizer):
    model = scripted("user:2+2?assistant:" + "." * 2 + "<think>Hm.</think>4", 258)
    (result,) = generate_text(model, tokenizer, [[USER]], Sampling(max_new_tokens=60))
    answer = Answer.of(result)
    assert answer == "4" and (answer.reasoning_content, answer.finish_reason) == ("Hm.", "stop")
