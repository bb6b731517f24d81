"""Real weights, as packages hold them: SmolLM2 135M (Llama) and Gemma 3 270M, against transformers and llama.cpp."""

import os
import shutil

import numpy as np
import pytest
from rich.console import Console

from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.load import load_model
from jaxft.conversion import targets as convert_targets
from jaxft.conversion.convert import convert
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens

pytestmark = pytest.mark.slow
MODELS = ("smollm2", "gemma3")
COUNT = 40
# Float32 on both sides, sums in another order: 30 layers of it differ by a few 1e-6 of the largest logit.
TOLERANCE = 1e-4
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived 3 little",
)
TEXTS = (
    *PROMPTS, "  two  spaces", "   three\n\n\nlines\t\ttabs\r\n", "naïve 漢字 ☃ 🙂🏽 👩\u200d👩\u200d👧",
    "x1234567 = 3.14;",
    "it's I'LL we'd", "ÀÉÎ straße ½ ٣٤٥", "\x01\x7f \u200b\ufeff", "𐍈𒀀 \U0001f9ff\U000e0041", " ", "\n", " a", "a ",
    "▁ already", "<h1>title</h1><br>", "हिन्दी ภาษาไทย עברית", " " * 40 + "x", "a" * 65, "0000 1e-5 ---- //// ====",
    "<start_of_turn>user\nHi<end_of_turn>\n<bos>a<eos><unused5>", "<|im_start|>user\nHi<|im_end|>\n", "",
)  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request, real_gguf) -> str:
    return real_gguf(request.param)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> str:
    """The same model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("real") / "hf"
    with pytest.MonkeyPatch.context() as patch:
        # What the conversion compares at its end is what these tests look at.
        patch.setattr(convert_targets, "LOGITS_LIMIT", 0)
        convert(model, str(path), dtype="float32", console=Console(quiet=True))
    yield str(path)
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    tokenizer = load_tokenizer(model)
    return [tokenizer.encode(text, add_special_tokens=True) for text in PROMPTS]


@pytest.fixture(scope="module")
def ours(model, prompts) -> tuple[list[np.ndarray], list[list[int]]]:
    """(logits [1, S, V] of each prompt, greedy continuation of each)."""
    loaded = load_model(model)
    logits = [loaded.logits([ids]) for ids in prompts]
    done = generate_tokens(loaded.module, prompts, sampling=Sampling(max_new_tokens=COUNT, temperature=0.0))
    return logits, [list(one.tokens) for one in done]


def check(reference, prompts, ours) -> None:
    """Logits and greedy tokens of a transformers model against ours."""
    import torch

    for ids, logits, tokens in zip(prompts, *ours, strict=True):
        with torch.no_grad():
            theirs = reference(torch.tensor([ids])).logits.numpy()
            # No stop token: every one of the 40 is compared.
            made = reference.generate(
                torch.tensor([ids]), max_new_tokens=COUNT, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert np.abs(logits - theirs).max() <= TOLERANCE * np.abs(theirs).max()
        assert made[0, len(ids) :].tolist() == tokens and len(tokens) == COUNT


def test_the_converted_folder_in_transformers(folder, prompts, ours):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    check(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), prompts, ours)


def test_transformers_own_reading_of_the_file(model, prompts, ours):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, file = os.path.split(model)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    state, source = reference.state_dict(), GGUFFile(model)
    assert set(state) - set(source.specs()) == {"lm_head.weight"}  # tied
    for name in source.specs():
        np.testing.assert_array_equal(source.read(name), state[name].numpy(), err_msg=name)
    check(reference, prompts, ours)


def test_llama_cpp_cuts_texts_into_the_same_tokens(model, llama_cpp):
    tokenizer, theirs = load_tokenizer(model), llama_cpp(model)
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=True) == theirs.tokenize(text), text
