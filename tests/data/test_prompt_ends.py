"""The ends of prompts in the tokens of a conversation, against encoding each prompt whole."""

import csv
import itertools
import json
import random

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast
from whole_prompts import assert_same

from jaxft.config import DataConfig
from jaxft.data.chat.encode import encode_all
from jaxft.data.chat.omissions import Shown, omissions
from jaxft.data.chat.prompt_ends import PromptEnds, anchors_of
from jaxft.data.chat.turns import Layout, Turn, layouts
from jaxft.data.formats import Conversation
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.tokenizer import Tokenizer

WORDS = ["user", "assistant\n", " ", "  ", "\n", "hello", " world", "naïve", "漢字", "<|im", "_start|>", "7", "word"]
# Of every kind: those that are cut out of the raw text, those that take white space with them, those of whole words,
# those that are sought in the normalised text, and one that begins like another.
ADDED = [
    AddedToken("<s>", special=True, normalized=False),
    AddedToken("<s>user", special=False, normalized=False),
    AddedToken("<|im_start|>", special=True, normalized=False),
    AddedToken("<|end|>", special=True, normalized=False, rstrip=True),
    AddedToken("<|left|>", special=False, normalized=False, lstrip=True),
    AddedToken("word", special=False, normalized=False, single_word=True),
    AddedToken("hello", special=False, normalized=True),
]


def _tokenizer(model, normalizer, pre_tokenizer):
    rust = RustTokenizer(model(**({"unk_token": "<unk>"} if model is models.BPE else {})))
    if normalizer is not None:
        rust.normalizer = normalizer
    rust.pre_tokenizer = pre_tokenizer
    trainer = {models.BPE: trainers.BpeTrainer, models.Unigram: trainers.UnigramTrainer}[model]
    special = {"unk_token": "<unk>"} if model is models.Unigram else {}
    corpus = ["user assistant hello world naïve 漢字 7 word"] * 20
    rust.train_from_iterator(
        corpus,
        trainer(
            vocab_size=320,
            special_tokens=["<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            **special,
        ),
    )
    rust.add_tokens(ADDED)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|end|>"))


@pytest.fixture(
    scope="module",
    params=[
        (models.BPE, None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (models.BPE, None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        (models.BPE, None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        (models.BPE, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
        (models.Unigram, normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="always")),
        (models.BPE, normalizers.Lowercase(), pre_tokenizers.Whitespace()),
    ],
    ids=["bytes", "prefix space", "first space", "llama 2", "unigram", "words"],
)
def kind(request):
    model, normalizer, pre_tokenizer = request.param
    return _tokenizer(model, normalizer, pre_tokenizer or pre_tokenizers.Split("\0", "isolated"))


def _cut(text, tokenizer):
    """A sequence in which every prefix of the text is a prompt, and the token ids of these prefixes."""
    prompts = [text[:cut] for cut in range(len(text) + 1)]
    turns = tuple(Turn(number=n, prompt=prompt, upto=text, end=len(text)) for n, prompt in enumerate(prompts))
    return Layout(conversation=Conversation(row=0, where="row", format="messages"), text=text, turns=turns), [
        tokenizer.encode(prompt) for prompt in prompts
    ]


def test_every_prefix_of_any_text_has_its_own_tokens(kind):
    draw = random.Random(0)
    pieces = [*WORDS, *(token.content for token in ADDED)]
    texts = ["".join(draw.choices(pieces, k=12)) for _ in range(150)]
    cut = [_cut(text, kind) for text in texts]
    found = right = 0
    for (_, prefixes), (ids, counts) in zip(cut, PromptEnds(kind).encode([one for one, _ in cut]), strict=True):
        assert ids == prefixes[-1]
        for prefix, count in zip(prefixes, counts, strict=True):
            begins = ids[: len(prefix)] == prefix
            assert count is None or (begins and count == len(prefix))
            found, right = found + (count is not None), right + begins
    assert found > 0.99 * right  # else it would be right because it gives up


def test_only_tokens_that_are_cut_out_of_raw_text_are_anchors(kind):
    assert {kind.token(number) for number in anchors_of(kind)} == {
        "<unk>", "<s>", "<s>user", "<|im_start|>", "<|left|>"
    }  # fmt: skip


def _chat(turns, seed=0):
    draw = random.Random(seed)
    words = " The quick brown fox\njumps over 12 lazy dogs. naïve 漢字 <b> \n\n".split(" ")
    messages = []
    for _ in range(turns):
        messages.append({"role": "user", "content": " ".join(draw.choices(words, k=8)).strip() or "why"})
        messages.append({"role": "assistant", "content": " ".join(draw.choices(words, k=8)).strip() or "so"})
    return Conversation(row=0, where="row", format="messages", messages=tuple(messages))


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2", "phi3", "qwen3", "thinking"])
def test_long_chats(name, tokenizer_of):
    assert_same([_chat(1), _chat(20), _chat(40, seed=1)], tokenizer_of(name))


def test_the_work_grows_with_the_length_of_a_chat(tokenizer_of, monkeypatch):
    tokenizer = tokenizer_of("chatml")
    encoded = []
    for name in ("encode_batch", "encode_batch_with_spans"):
        original = getattr(tokenizer, name)

        def counted(texts, original=original):
            encoded.append(sum(map(len, texts)))
            return original(texts)

        monkeypatch.setattr(tokenizer, name, counted)
    monkeypatch.setattr(tokenizer, "encode", lambda text: pytest.fail(f"encoded a whole prompt: {text[-40:]!r}"))
    (example,) = encode_all([_chat(160)], tokenizer)
    (layout,) = layouts(_chat(160), tokenizer, DataConfig(), {})
    assert example.mask.sum() > 0 and sum(encoded) < 1.05 * len(layout.text) + 100


def test_the_real_tokenizer_on_real_rows(smollm2_path, shared_data):
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    pairs = [(row["question"], row["answer"]) for row in map(json.loads, lines)]
    with open(shared_data / "banking77" / "train.csv", encoding="utf-8", newline="") as file:
        pairs += [(row["text"], row["category"]) for row in itertools.islice(csv.DictReader(file), 300)]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    chats = [Conversation(row=n, where="row", format="messages", messages=tuple(row)) for n, row in enumerate(rows)]
    joined = tuple(message for row in rows[:40] for message in row)
    long = Conversation(row=0, where="row", format="messages", messages=joined)
    assert_same([*chats, long, _chat(20), _chat(80, seed=1)], load_tokenizer(smollm2_path))


def test_what_was_shown_is_not_sought_again():
    class Counted(str):
        searched = 0

        def find(self, *args):
            Counted.searched += 1
            return super().find(*args)

    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [{"role": "system", "content": "Be brief."}]
    for n in range(50):
        messages += [{"role": "tool", "content": f"4 degrees {n}"}, {"role": "assistant", "content": "Four."}]
    shown = Shown()
    for index in range(2, len(messages), 2):
        prompt = Counted("weather\n" + "\n".join(message["content"] for message in messages[:index]))
        assert not list(omissions(messages, tools, index, prompt, "Four.", shown))
    assert Counted.searched == 1 + 1 + 50  # every text once, not once in every prompt
    # A prompt that moved its parts is searched anew, and one without them is told.
    moved = "4 degrees 0\nBe brief."
    assert list(omissions(messages, tools, 2, moved, "Four.", shown)) == [("the tools", 0)]
