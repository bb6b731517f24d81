"""Fine-tuning of open language models with JAX: 7B to 70B on TPU slices, smaller ones anywhere."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_API = (
    "Session", "best_of", "combine_adapters", "compare", "convert", "evaluate", "export", "generate", "get_config",
    "load_adapters", "load_model", "load_tokenizer", "plan", "sample", "score", "train", "write_adapter",
)  # fmt: skip
__all__ = list(_API)


def __getattr__(name: str) -> Any:
    # Imported on use, so that `import jaxft.config` does not wait for JAX.
    if name in _API:
        return getattr(import_module("jaxft.api"), name)
    raise AttributeError(f"module 'jaxft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
