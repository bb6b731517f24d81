"""Verification of exports: jaxft and other libraries load them; their logits are compared with the live model's."""

# B batch, S sequence, V vocab

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from flax import nnx

from jaxft.adapters.attach import detach
from jaxft.checkpoint.load import LoadedModel, load_model, resolve
from jaxft.checkpoint.peft.folder import CONFIG
from jaxft.errors import ExportError
from jaxft.files.paths import is_remote
from jaxft.models import parameter_count
from jaxft.sharding.mesh import MeshPlan
from jaxft.sharding.processes import on_primary

PROBE_ROWS, PROBE_LENGTH = 2, 24
# Largest difference allowed, as a share of the largest logit: rounding of the stored type.
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}
# Effects of an adapter below this share of the largest logit are lost in float32 rounding between readers.
SMALLEST_EFFECT = 2e-5
# transformers needs the whole model once more in float32; a larger model is not compared with it.
PEER_LIMIT = 3_000_000_000


@dataclass(frozen=True)
class Check:
    """One comparison. difference, mean: the largest and the mean logit difference as shares of the largest logit."""

    reader: str
    difference: float
    mean: float


def probe(vocab: int) -> np.ndarray:
    """Token ids [B, S] that the comparison runs on, the same for every model with a vocabulary of this size."""
    return np.random.default_rng(vocab).integers(0, vocab, (PROBE_ROWS, PROBE_LENGTH))


def check_export(live: LoadedModel, folder: str, *, dtype: str, mesh: MeshPlan | None = None) -> tuple[Check, ...]:
    """Reloads `folder` and compares logits with the live model.

    dtype: of the written weights. mesh: of the live model, and of the reloaded one; with several processes every one
    takes part. Raises ExportError if a reader's logits differ by more than that dtype's rounding, or an adapter that
    has an effect in the live model has none when it is read back.
    """
    tokens = probe(live.module.config.vocab_size)
    expected = live.logits(tokens)
    largest = np.max(np.abs(expected))
    compute = str(np.dtype(live.module.dtype))
    tolerance = max(TOLERANCE[dtype], TOLERANCE[compute])
    effect = np.max(np.abs(_base_logits(live, tokens) - expected)) / largest if _is_adapter(folder) else 0.0
    if compute == "float32" and effect > SMALLEST_EFFECT:
        tolerance = min(tolerance, effect / 2)

    def compare(reader: str, logits: np.ndarray) -> tuple[float, float]:
        differences = np.abs(logits - expected) / largest
        difference = float(np.max(differences))
        if not difference <= tolerance:
            raise ExportError(
                f"{folder} read by {reader} differs from the live model: logits by {difference:.2e} of the largest, "
                f"allowed {tolerance:.0e} for {dtype} weights. Do not use it; "
                "what was trained is still in checkpoints/."
            )
        return difference, float(np.mean(differences))

    def by_peers() -> dict[str, tuple[float, float]]:
        return {reader: compare(reader, read(tokens)) for reader, read in _peers(live, folder).items()}

    quantization = live.quantization if _is_adapter(folder) else None
    reloaded = load_model(folder, dtype=compute, mesh=mesh, quantization=quantization)
    ours = {"jaxft": compare("jaxft", reloaded.logits(tokens))}
    if quantization is not None and _peers(live, folder):
        # The other readers put the adapter on the base in its own precision. So does their reference.
        expected = load_model(folder, dtype=compute, mesh=mesh).logits(tokens)
        largest = np.max(np.abs(expected))
    return tuple(Check(reader, *differences) for reader, differences in (ours | on_primary(by_peers)).items())


def logit_difference(logits: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """The largest and the mean difference of two sets of logits, as shares of the largest expected logit."""
    difference = np.abs(logits - expected) / np.max(np.abs(expected))
    return {"max": float(np.max(difference)), "mean": float(np.mean(difference))}


def _base_logits(live: LoadedModel, tokens: np.ndarray) -> np.ndarray:
    base = nnx.merge(*nnx.split(live.module))
    detach(base)
    return LoadedModel(base, live.hf_config, live.base).logits(tokens)


def _peers(live: LoadedModel, folder: str) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    readers: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    small = parameter_count(live.module) <= PEER_LIMIT
    if small and importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        peft_folder = importlib.util.find_spec("peft") is not None and _is_adapter(folder)
        if peft_folder and not live.base.endswith(".gguf") and not is_remote(live.base):
            readers["peft"] = lambda tokens: _peft_logits(live, folder, tokens)
        elif not _is_adapter(folder):
            readers["transformers"] = lambda tokens: _transformers_logits(folder, tokens)
    return readers


def _is_adapter(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, CONFIG))


def _transformers_logits(folder: str, tokens: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        with torch.no_grad():
            return model.eval()(torch.from_numpy(tokens)).logits.float().numpy()


def _peft_logits(live: LoadedModel, adapter: str, tokens: np.ndarray) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # A base that takes images too is loaded as such: the adapter's keys are the names of its modules.
    loader = AutoModelForCausalLM if live.left_out is None else AutoModelForImageTextToText
    with _quiet_transformers():
        base = loader.from_pretrained(resolve(live.base), dtype=torch.float32, local_files_only=True)
        model, given = PeftModel.from_pretrained(base, adapter), torch.from_numpy(tokens)
        with torch.no_grad():
            logits = model.eval()(given, attention_mask=torch.ones_like(given)).logits
            return logits[:, -tokens.shape[1] :].float().numpy()  # those of virtual tokens come first


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    # Its progress bars and deprecation notes concern its own internals, and would interrupt our output.
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if bars:
            logging.enable_progress_bar()
