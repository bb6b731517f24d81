import pytest

from jaxft.errors import DataError
from jaxft.generation.detokenize import TextStream
from jaxft.generation.settings import Sampling
from jaxft.generation.text import encode_prompt, generate_text

SAMPLING = Sampling(max_new_tokens=40)
STOP = 258  # the tokenizer's <|im_end|>


def pieces_of(stream, ids):
    pieces = [stream.push(i) for i in ids]
    return pieces, stream.finish()


def test_characters_are_never_broken(tokenizer):
    text = "naïve 漢字 ☃ 👩‍🚀!"
    pieces, rest = pieces_of(TextStream(tokenizer), tokenizer.encode(text))
    assert "".join(pieces) + rest == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[:4] == ["n", "a", "", "ï"]


def test_an_unfinished_last_character_is_dropped(tokenizer):
    stream = TextStream(tokenizer)
    pieces, rest = pieces_of(stream, tokenizer.encode("a漢")[:-1])
    assert ("".join(pieces), rest, stream.text) == ("a", "", "a")


def test_special_tokens_are_not_text(tokenizer):
    stream = TextStream(tokenizer)
    pieces, rest = pieces_of(stream, [*tokenizer.encode("ab"), STOP, *tokenizer.encode("c")])
    assert "".join(pieces) + rest == stream.text == "abc"


def test_a_stop_string_is_never_shown_not_even_in_part(tokenizer):
    stream = TextStream(tokenizer, ("END", "\n\n"))
    shown = ""
    for i in tokenizer.encode("E EN a\nENDE"):
        shown += stream.push(i)
        if stream.stopped:
            break
    assert shown + stream.finish() == stream.text == "E EN a\n"
    stream = TextStream(tokenizer, ("END",))
    pieces, rest = pieces_of(stream, tokenizer.encode("The EN"))
    assert ("".join(pieces), rest) == ("The ", "EN")


def test_generate_text_stops_at_the_stop_token(scripted, tokenizer):
    model = scripted("Q: Grüße, 漢字!", STOP, 65, 66)
    (result,) = generate_text(model, tokenizer, ["Q"], Sampling(max_new_tokens=60))
    # One position is taken by <s>.
    assert result.text == " Grüße, 漢字!"
    assert result.finish_reason == "stop" and result.tokens[-1] == STOP
    assert tokenizer.decode(result.tokens) == result.text


def test_generate_text_streams_and_stops_at_strings(scripted, tokenizer):
    model = scripted("0123456789 ä\nabcdefghijklmnopqrstuvwxyz" + "." * 60)
    streamed = {0: "", 1: "", 2: ""}
    calls = []

    def on_text(row, piece):
        calls.append(row)
        streamed[row] += piece

    samplings = [
        Sampling(max_new_tokens=40, stop=("\nab",)),
        Sampling(max_new_tokens=12),
        Sampling(max_new_tokens=40, stop=("xyz", "ghi")),
    ]
    results = generate_text(model, tokenizer, ["a", "abc", "abcde"], samplings, on_text=on_text)
    assert [r.text for r in results] == ["23456789 ä", "456789 ä\nab", "6789 ä\nabcdef"]
    assert streamed == {row: r.text for row, r in enumerate(results)}
    assert [r.finish_reason for r in results] == ["stop", "length", "stop"]
    assert tokenizer.decode(results[0].tokens).endswith("ä\nab"), "tokens keep what the stop string was made of"
    assert calls[:6] == [0, 1, 2, 0, 1, 2] or set(calls[:3]) == {0, 1, 2}, "rows advance together"
    quiet = generate_text(model, tokenizer, ["a", "abc", "abcde"], samplings)
    assert quiet == results


def test_prompts_are_encoded_by_convention(tokenizer):
    assert encode_prompt(tokenizer, "hi") == [256, *tokenizer.encode("hi")]
    chat = encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    assert chat == [256, *tokenizer.encode("user:hi"), STOP, *tokenizer.encode("assistant:")]


def test_refusals(model, tokenizer):
    tokenizer_without = type(tokenizer)(tokenizer.backend, name="plain")
    template, tokenizer.backend.chat_template = tokenizer.backend.chat_template, None
    try:
        with pytest.raises(DataError, match="has no chat template"):
            generate_text(model, tokenizer_without, [[{"role": "user", "content": "hi"}]], SAMPLING)
    finally:
        tokenizer.backend.chat_template = template
