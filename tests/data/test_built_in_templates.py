"""The chat templates that come with jaxft: against published ones, and what is trained against what is generated."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from jaxft.data.chat.encode import encode
from jaxft.data.formats import Conversation
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.templates import BUILT_IN, EOS, built_in
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ModelError

SYSTEM = {"role": "system", "content": "Be brief."}
ONE = {"role": "user", "content": "What is 2 + 2?"}
PLAIN = {"role": "assistant", "content": "It is 4."}
TWO = {"role": "user", "content": "And 3 + 3?\nSay it."}
LAST = {"role": "assistant", "content": "6"}
THOUGHT = {"role": "assistant", "content": "6", "reasoning_content": "Three and three."}
INLINE = {"role": "assistant", "content": "<think>\nThree and three.\n</think>\n\n6"}
CALL = {
    "role": "assistant", "content": "I look.",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 3}}}] * 2,
}  # fmt: skip
RESULT = {"role": "tool", "content": "6"}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CHAT = [SYSTEM, ONE, PLAIN, TWO, LAST]


def bytes_with(name, template=None, *more):
    """A tokenizer of single bytes with the tokens of a built-in template, `more`, and that template or another one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    own = [token for token in BUILT_IN.get(name, ()) if token != EOS]
    special = {"<bos>", "<eos>", *own} - {"<think>", "</think>"}
    tokens = ["<bos>", "<eos>", *own, *more]
    backend.add_tokens([AddedToken(one, normalized=False, special=one in special) for one in tokens])
    eos = "<eos>" if EOS in BUILT_IN.get(name, (EOS,)) else own[-1]
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=eos)
    fast.chat_template = template or built_in(name)
    return Tokenizer(fast, name=name)


def published(name):
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def trained(tokenizer, messages, tools=(), kwargs=None):
    """The trained texts of a conversation, by sequence; consecutive trained tokens are one text."""
    row = Conversation(
        row=0, where="row 1", format="messages", messages=tuple(messages), tools=tuple(tools),
        template_kwargs=kwargs or {},
    )  # fmt: skip
    return [_runs(tokenizer, example.tokens.tolist(), example.mask.tolist()) for example in encode(row, tokenizer)]


def _runs(tokenizer, ids, mask):
    runs, before = [], 0
    for token, marked in zip(ids, mask, strict=True):
        if marked:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = marked
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(
    ("name", "theirs", "messages", "tools"),
    [
        ("llama3", "llama3", CHAT, None),
        ("gemma", "gemma3", CHAT, None),
        ("gemma", "gemma", CHAT[1:], None),
        ("qwen3", "qwen3_training", CHAT, None),
        ("qwen3", "qwen3_training", [ONE, PLAIN, TWO, THOUGHT], None),
        ("qwen3", "qwen3_training", [SYSTEM, ONE, INLINE, TWO, CALL, RESULT, RESULT, LAST], [TOOL, TOOL]),
        ("qwen3", "qwen3_training", [ONE, CALL, RESULT, INLINE, TWO], [TOOL]),
        ("deepseek_r1", "deepseek_r1_distill_training", [SYSTEM, ONE, INLINE, TWO, INLINE], None),
    ],
)
def test_the_text_is_that_of_published_templates(name, theirs, messages, tools):
    ours = bytes_with(name)
    for upto in range(1, len(messages) + 1):
        for asks in (False, True):
            given = {"tokenize": False, "tools": tools, "add_generation_prompt": asks}
            text = ours.render(messages[:upto], tools=tools, add_generation_prompt=asks)
            assert text == ours.backend.apply_chat_template(messages[:upto], chat_template=published(theirs), **given)


@pytest.mark.parametrize(
    ("name", "theirs", "messages", "tools", "kwargs"),
    [
        ("llama3", "llama3_training", CHAT, None, {}),
        ("gemma", "gemma3_training", CHAT, None, {}),
        ("qwen3", "qwen3_training", [ONE, PLAIN, TWO, THOUGHT], None, {}),
        ("qwen3", "qwen3_training", [SYSTEM, ONE, INLINE, TWO, CALL, RESULT, LAST], [TOOL], {}),
    ],
)
def test_what_is_trained_is_what_the_marks_of_published_templates_say(name, theirs, messages, tools, kwargs):
    tokenizer = bytes_with(name)
    marked = tokenizer.backend.apply_chat_template(
        messages, chat_template=published(theirs), tools=tools, return_dict=True, return_assistant_tokens_mask=True,
        tokenize=True, **kwargs,
    )  # fmt: skip
    wanted = _runs(tokenizer, marked["input_ids"], marked["assistant_masks"])
    # They train the newline after the end of a turn too, which no model has to say.
    assert trained(tokenizer, messages, tools or (), kwargs) == [[text.rstrip("\n") for text in wanted]]


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_answer_continues_its_prompt_and_chats_stay_whole(name):
    tokenizer = bytes_with(name)
    block = "<think>\n\n</think>\n\n" if name == "qwen3" else "\n</think>\n\n" if name == "deepseek_r1" else ""
    (answers,) = trained(tokenizer, CHAT)
    end = tokenizer.token(next(iter(tokenizer.stop_ids)))
    space = " " if name in ("llama2", "vicuna") else ""
    before = " " if name == "llama2" else ""
    assert answers == [f"{space}{block}It is 4.{before}{end}", f"{space}{block}6{before}{end}"]
    text = tokenizer.render(CHAT)
    assert all(message["content"] in text for message in CHAT)
    # Other tools call the system's message the developer's.
    assert tokenizer.render([{**SYSTEM, "role": "developer"}, *CHAT[1:]]) == text


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
def test_templates_for_models_that_think(name):
    tokenizer = bytes_with(name)
    end = tokenizer.token(next(iter(tokenizer.stop_ids)))
    opened = "" if name == "deepseek_r1" else "<think>\n"
    first = f"{opened}Three and three.\n</think>\n\n6{end}"
    # Thoughts stand in the field or in the content, and are trained in every answer of one sequence.
    for thoughts in (THOUGHT, INLINE):
        assert trained(tokenizer, [ONE, thoughts, TWO, thoughts]) == [[first, first]]
        assert tokenizer.render([ONE, thoughts]) == tokenizer.render([ONE, THOUGHT])
    # Without thinking, the prompt holds the empty block, also in a sequence of several answers.
    assert trained(tokenizer, CHAT, kwargs={"enable_thinking": False}) == [[f"It is 4.{end}", f"6{end}"]]
    # As by the makers, thoughts before the last question are left out, and each answer has a sequence of its own.
    split = trained(tokenizer, [ONE, THOUGHT, TWO, THOUGHT], kwargs={"preserve_thinking": False})
    assert split == [[first], [first]]
    text = tokenizer.render([ONE, THOUGHT, TWO, THOUGHT], preserve_thinking=False)
    assert text.count("Three and three.") == 1


def test_templates_are_given_by_name(tmp_path):
    bytes_with("chatml", template="{{ messages[0].content }}").save(tmp_path)
    tokenizer = load_tokenizer(tmp_path, chat_template="chatml")
    assert tokenizer.chat_template == built_in("chatml")
    assert tokenizer.render(CHAT, add_generation_prompt=True).endswith("6<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.save(tmp_path / "export")
    assert load_tokenizer(tmp_path / "export").chat_template == built_in("chatml")
    with pytest.raises(
        ModelError, match=r"writes <\|start_header_id\|>, .* no such token.* fit this tokenizer: chatml, "
    ):
        load_tokenizer(tmp_path, chat_template="llama3")
    with pytest.raises(
        ModelError, match="Did you mean 'chatml'\\? .* or one of the built-in templates: alpaca, chatml"
    ):
        load_tokenizer(tmp_path, chat_template="chatlm")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(ModelError, match="not UTF-8"):
        load_tokenizer(tmp_path, chat_template=str(tmp_path / "latin.jinja"))
