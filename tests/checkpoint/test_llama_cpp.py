"""What we write for llama.cpp answers there as it does here: real weights, greedy, 20 tokens."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxft.adapters.attach import attach
from jaxft.adapters.lora import LoRASettings, lora_factory
from jaxft.checkpoint import peft
from jaxft.checkpoint.load import load_model
from jaxft.conversion import targets as convert_targets
from jaxft.conversion.convert import convert
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.generation.settings import Sampling
from jaxft.generation.text import generate_text

pytestmark = pytest.mark.slow

COUNT = 20
CLOSE = 0.25  # in nats
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, 3 little")
CHAT = [{"role": "user", "content": "Name the largest planet."}]


@pytest.fixture(scope="module")
def written(real_gguf, llama_cpp, tmp_path_factory):
    """Of a real model by name: the folder with hf/, the same in Hugging Face's format, and GGUF files by type."""
    made: dict[str, Path] = {}

    def write(model: str, dtype: str) -> Path:
        if model not in made:
            made[model] = tmp_path_factory.mktemp(model)
            convert(real_gguf(model), str(made[model] / "hf"), dtype="float32", console=Console(quiet=True))
        file = made[model] / f"{dtype}.gguf"
        if not file.exists():
            convert(str(made[model] / "hf"), str(file), dtype=dtype, console=Console(quiet=True))
        return file

    with pytest.MonkeyPatch.context() as patch:
        # The logits are compared here, with llama.cpp.
        patch.setattr(convert_targets, "LOGITS_LIMIT", 0)
        yield write
    for folder in made.values():
        shutil.rmtree(folder)


def prompts_for(tokenizer) -> list[str]:
    # llama.cpp tokenizes the text itself, special tokens of the rendered chat included.
    chat = [] if tokenizer.chat_template is None else [tokenizer.render(CHAT, add_generation_prompt=True)]
    return [*PROMPTS, *chat]


def ours(model, tokenizer, prompts) -> list[str]:
    sampling = Sampling(max_new_tokens=COUNT, temperature=0.0)
    return [done.text for done in generate_text(model.module, tokenizer, prompts, sampling=sampling)]


# With narrower types llama.cpp rounds the activations too before it multiplies; none of these choices is that close.
@pytest.mark.parametrize(
    ("model", "dtype"),
    [("smollm2", "float32"), ("smollm2", "float16"), ("smollm2", "bfloat16"), ("gemma3", "float32")],
)
def test_the_same_greedy_answers(written, llama_cpp, model, dtype):
    path = written(model, dtype)
    tokenizer, server = load_tokenizer(path), llama_cpp(path)
    prompts = prompts_for(tokenizer)
    theirs = [server.complete(prompt, COUNT)["text"] for prompt in prompts]
    assert theirs == ours(load_model(str(path)), tokenizer, prompts)


def test_greedy_answers_of_a_quantised_file_are_the_likeliest_here_or_nearly(written, llama_cpp):
    # llama.cpp rounds the activations too, to 8 bits in blocks of 32, before it multiplies with blocks of q8_0: close
    # calls fall otherwise, but no others.
    path = written("smollm2", "q8_0")
    model, tokenizer, server = load_model(str(path)), load_tokenizer(path), llama_cpp(path)
    for prompt in prompts_for(tokenizer):
        before = tokenizer.encode(prompt)
        ids = tokenizer.encode(prompt + server.complete(prompt, COUNT)["text"])
        assert ids[: len(before)] == before and len(ids) >= len(before) + COUNT // 2
        logits = model.logits([ids])[0, len(before) - 1 : -1]
        chosen = logits[np.arange(len(logits)), ids[len(before) :]]
        behind = logits.max(axis=-1) - chosen
        assert behind.max() < CLOSE, behind


def test_the_same_greedy_answers_with_an_adapter(written, llama_cpp):
    base = written("smollm2", "float32")
    folder = base.parent
    model, tokenizer = load_model(str(folder / "hf")), load_tokenizer(folder / "hf")
    before = ours(model, tokenizer, list(PROMPTS))

    def make(layer, key):
        lora = lora_factory(LoRASettings(r=4, alpha=8, use_rslora=True))(layer, key)
        lora.lora_b.set_value(0.01 * jax.random.normal(key, lora.lora_b.get_value().shape))
        return lora

    attach(model.module, ("all-linear",), make, jax.random.key(0))
    peft.write_adapter(model.module, str(folder / "lora"), base=str(folder / "hf"))
    assert json.loads((folder / "lora" / "adapter_config.json").read_text())["use_rslora"]
    convert(str(folder / "lora"), str(folder / "lora.gguf"), form="gguf-adapter", console=Console(quiet=True))
    live = ours(model, tokenizer, list(PROMPTS))
    assert live != before, "the adapter does something"
    server = llama_cpp(base, folder / "lora.gguf")
    assert [server.complete(prompt, COUNT)["text"] for prompt in PROMPTS] == live
