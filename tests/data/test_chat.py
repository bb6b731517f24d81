"""Trained tokens are exactly the answers with their end token, for templates of every make."""

import itertools

import numpy as np
import pytest

from jaxft.config import DataConfig
from jaxft.data.chat.encode import encode_all, prompt_of
from jaxft.data.formats import read_row
from jaxft.errors import DataError


def conversation(*contents, system=None, where="line 9", **fields):
    """A chat of user and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": role, "content": text}
        for role, text in zip(itertools.cycle(("user", "assistant")), contents, strict=False)
    ]
    return read_row({"messages": messages, **fields}, DataConfig(), row=8, where=where)


def plain(where="line 9", **fields):
    return read_row(fields, DataConfig(), row=8, where=where)


def encode(row, tokenizer, train_on="assistant", **data):
    """The one sequence of a row that stays whole."""
    (example,) = encode_all([row], tokenizer, DataConfig(train_on=train_on, **data))
    return example


def trained(example, tokenizer):
    """The trained stretches as text, special tokens included."""
    edges = np.flatnonzero(np.diff(example.mask)) + 1
    pieces = zip(np.split(example.tokens, edges), np.split(example.mask, edges), strict=True)
    return [tokenizer.decode(tokens, skip_special_tokens=False) for tokens, mask in pieces if mask[0]]


TALK = ("Hello there", "How are you?", "What is two plus two?", "It is four.")
ENDED = {
    "chatml": ["How are you?<|im_end|>", "It is four.<|im_end|>"],
    "llama3": ["How are you?<|eot_id|>", "It is four.<|eot_id|>"],
    "llama2": [" How are you? </s>", " It is four. </s>"],
    "phi3": ["How are you?<|end|>", "It is four.<|end|>"],
}


@pytest.mark.parametrize("name", ENDED)
def test_assistant_turns_and_their_ends_are_trained(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    example = encode(conversation(*TALK), tokenizer)
    assert trained(example, tokenizer) == ENDED[name]
    assert example.row == 8 and example.tokens.dtype == np.int32 and example.mask.dtype == np.uint8
    # Nothing follows the last trained token, and what is there is the template's own text.
    assert example.mask[-1] == 1
    whole = tokenizer.encode(tokenizer.render(conversation(*TALK).messages))
    assert example.tokens.tolist() == whole[: len(example)]


@pytest.mark.parametrize("name", ENDED)
def test_last_and_all(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    last = encode(conversation(*TALK), tokenizer, "last")
    assert trained(last, tokenizer) == ENDED[name][-1:]
    every = encode(conversation(*TALK), tokenizer, "all")
    assert every.mask[0] == 0 and every.mask[1:].all() and every.tokens[-1] in tokenizer.stop_ids


@pytest.mark.parametrize(
    "talk", [TALK, ("Hi", "naïve 漢字 {}"), ("a", "b", "c", "d", "e", "f"), ("x", "\n\ntwo lines\n")]
)
def test_mask_equals_that_of_generation_tags(talk, tokenizer_of):
    tagged, bare = tokenizer_of("chatml_tagged"), tokenizer_of("chatml")
    messages = list(conversation(*talk, system="Be brief").messages)
    oracle = tagged.backend.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    try:
        ours = encode(conversation(*talk, system="Be brief"), bare)
    except DataError as error:
        # A newline that opens the answer joins the one that closes the prompt: then it must say so.
        assert talk[1].startswith("\n") and "not a prefix" in str(error)
        return
    n = len(ours)
    assert ours.tokens.tolist() == oracle["input_ids"][:n]
    assert ours.mask.tolist() == oracle["assistant_masks"][:n] and not any(oracle["assistant_masks"][n:])


@pytest.mark.parametrize("name", ENDED)
def test_prompt_is_what_training_conditions_on(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    example = encode(conversation(*TALK), tokenizer, "last")
    prompt, reference = prompt_of(conversation(*TALK), tokenizer)
    assert example.tokens[: len(prompt)].tolist() == prompt and example.mask.argmax() == len(prompt)
    assert reference == "It is four."
    with_tools = tokenizer.encode(tokenizer.render(conversation(*TALK).messages[:-1], add_generation_prompt=True))
    assert with_tools == prompt


def test_trailing_user_turn_is_not_trained(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    example = encode(conversation(*TALK[:3]), tokenizer)
    assert trained(example, tokenizer) == ["How are you?<|im_end|>"]


def test_prompt_messages_are_left_out(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    messages = list(conversation(*TALK).messages)
    row = plain(prompt=messages[:3], completion=messages[3:])
    assert trained(encode(row, tokenizer), tokenizer) == ["It is four.<|im_end|>"]


def test_tools_reach_the_template(tokenizer_of):
    template = (
        "{% for t in tools or [] %}tool {{ t.function.name }}\n{% endfor %}{% for m in messages %}<|im_start|>"
        "{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_of("chatml", template)
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    row = plain(messages=messages, tools=[{"type": "function", "function": {"name": "weather"}}])
    example = encode(row, tokenizer)
    assert tokenizer.decode(example.tokens).startswith("tool weather\n")
    assert trained(example, tokenizer) == ['{"name": "weather", "arguments": {"city": "Oslo"}}<|im_end|>']
    assert prompt_of(row, tokenizer)[1] == '{"name": "weather", "arguments": {"city": "Oslo"}}'


def test_batches_of_rows_equal_single_ones(tokenizer_of, monkeypatch):
    monkeypatch.setattr("jaxft.data.chat.encode.CHUNK", 3)
    tokenizer = tokenizer_of("llama3")
    rows = [conversation(f"question {i}", f"answer {i}") for i in range(8)] + [conversation(*TALK)]
    for one, row in zip(encode_all(rows, tokenizer), rows, strict=True):
        alone = encode(row, tokenizer)
        assert one.tokens.tolist() == alone.tokens.tolist() and one.mask.tolist() == alone.mask.tolist()


def test_prompt_and_completion(tokenizer_of):
    tokenizer = tokenizer_of("plain")
    example = encode(plain(prompt="two plus two is", completion=" four"), tokenizer)
    assert trained(example, tokenizer) == [" four</s>"]
    assert example.tokens[0] == tokenizer.bos_id and example.tokens[-1] == tokenizer.eos_id
    assert tokenizer.bos_id not in example.tokens[1:]
    prompt, reference = prompt_of(plain(prompt="two plus two is", completion=" four"), tokenizer)
    assert example.tokens[: len(prompt)].tolist() == prompt and reference == " four"
    assert trained(encode(plain(prompt="a b", completion=" c</s>"), tokenizer), tokenizer) == [" c</s>"]


def test_text_is_trained_whole(tokenizer_of):
    with_bos, without = tokenizer_of("plain"), tokenizer_of("chatml")
    assert trained(encode(plain(text="Hello there"), with_bos), with_bos) == ["Hello there</s>"]
    example = encode(plain(text="Hello there"), without)
    assert example.mask.tolist() == [0] + [1] * (len(example) - 1)  # nothing can predict the very first token
    with pytest.raises(DataError, match=r"line 9: plain text has no prompt"):
        prompt_of(plain(text="Hello there"), with_bos)


def test_template_that_rewrites_history(tokenizer_of):
    tokenizer = tokenizer_of("thinking")
    thoughts = ("q1", "<think>so</think>\n\na1", "q2", "<think>hm</think>\n\na2")
    with pytest.raises(
        DataError, match=r"line 9: .* of message 2 .* rewrites .*data.turns='auto'.*data.train_on='last'"
    ):
        encode(conversation(*thoughts), tokenizer, turns="together")
    with pytest.raises(DataError, match=r"line 9: .* of message 2 .* rewrites .* train on the answers"):
        encode(conversation(*thoughts), tokenizer, "all")
    last = encode(conversation(*thoughts), tokenizer, "last")
    assert trained(last, tokenizer) == ["<think>hm</think>\n\na2<|im_end|>"]
    assert "so" not in tokenizer.decode(last.tokens)
    # With no thoughts to drop nothing is rewritten.
    assert len(trained(encode(conversation(*TALK), tokenizer), tokenizer)) == 2


def test_template_that_prompts_with_more_than_it_writes(tokenizer_of):
    template = tokenizer_of("chatml").chat_template.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = tokenizer_of("chatml", template)
    for train_on in ("assistant", "last"):
        with pytest.raises(DataError, match=r"message 4|message 2"):
            encode(conversation(*TALK), tokenizer, train_on)
    with pytest.raises(DataError, match=r"not a prefix .* even the last answer .* data.chat_template='chatml'"):
        encode(conversation(*TALK), tokenizer, "last")


def test_template_that_never_ends_an_answer(tokenizer_of):
    bare = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    for train_on in ("assistant", "last", "all"):
        with pytest.raises(DataError, match=r"line 9: EOS would never be trained: .*'<\|im_end\|>'.*after message"):
            encode(conversation(*TALK), tokenizer_of("chatml", bare), train_on)
    at_the_end = bare + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer = tokenizer_of("chatml", at_the_end)
    with pytest.raises(DataError, match=r"message 2 .* rewrites earlier text"):
        encode(conversation(*TALK), tokenizer, turns="together")
    assert trained(encode(conversation(*TALK), tokenizer, "last"), tokenizer) == [" It is four.\n<|im_end|>"]


def test_user_turns_end_token_is_not_the_answers(tokenizer_of):
    # Only user turns are ended: the first end token after an answer belongs to the next question.
    template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}{% if m.role == 'user' %}{{ eos_token }}{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match=r"EOS would never be trained: .*after message 2"):
        encode(conversation(*TALK[:3]), tokenizer_of("chatml", template))


def test_tokens_that_straddle_the_start_of_an_answer(tokenizer_of):
    with pytest.raises(DataError, match=r"line 9: the tokens of the prompt are not a prefix .*remove the white space"):
        encode(conversation("Hi", "\n\nHello"), tokenizer_of("chatml", None))
    with pytest.raises(DataError, match=r"line 9: the tokens of the prompt are not a prefix .*Move ' ' from the end"):
        encode(plain(prompt="two plus two is ", completion="four"), tokenizer_of("plain"))


def test_doubled_bos(tokenizer_of):
    doubled = tokenizer_of("llama3", "{{ bos_token }}" + tokenizer_of("llama3").chat_template)
    with pytest.raises(DataError, match=r"line 9: BOS doubles: both the chat template"):
        encode(conversation(*TALK), doubled)
    with pytest.raises(DataError, match=r"line 9: BOS doubles: the tokenizer adds '<s>'"):
        encode(plain(prompt="<s>two plus", completion=" two"), tokenizer_of("plain"))


def test_end_token_inside_an_answer(tokenizer_of):
    with pytest.raises(DataError, match=r"content of message 2 \(assistant\) holds '<\|im_end\|>'"):
        encode(conversation("Hi", "Hello<|im_end|>"), tokenizer_of("chatml"))


def test_answer_that_nothing_asks_for(tokenizer_of):
    row = plain(messages=[{"role": "assistant", "content": "Hello"}])
    with pytest.raises(DataError, match=r"message 1 is from the assistant, so it has no prompt"):
        encode(row, tokenizer_of("chatml"))
    with pytest.raises(DataError, match=r"the answer is the first message, so it has no prompt"):
        prompt_of(row, tokenizer_of("chatml"))


def test_template_or_tokenizer_that_cannot(tokenizer_of):
    with pytest.raises(DataError, match=r"line 9: the chat template refuses these messages .*only user and assistant"):
        encode(conversation(*TALK, system="Be brief"), tokenizer_of("llama2"))
    with pytest.raises(DataError, match=r"line 9: the tokenizer plain has no chat template.*data.chat_template"):
        encode(conversation(*TALK), tokenizer_of("plain"))
    with pytest.raises(DataError, match=r"EOS would never be trained, because the tokenizer endless has none"):
        encode(plain(text="Hello"), tokenizer_of("endless"))


def test_empty_answer_trains_on_nothing(tokenizer_of):
    # One token, and nothing stands before it.
    with pytest.raises(DataError, match=r"line 9 trains on zero tokens"):
        encode(plain(text="<|im_end|>"), tokenizer_of("chatml"))


def test_the_real_tokenizer(smollm2_path):
    from jaxft.data.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(smollm2_path)
    example = encode(conversation(*TALK), tokenizer)
    assert trained(example, tokenizer) == ["How are you?<|im_end|>", "It is four.<|im_end|>"]
    oracle = tokenizer.backend.apply_chat_template(list(conversation(*TALK).messages), return_dict=True)["input_ids"]
    assert oracle[: len(example)] == example.tokens.tolist()
