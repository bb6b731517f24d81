"""Verification of exports: jaxft and other libraries load them; their logits are compared with the live model's."""

# B batch, S sequence, V vocab

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxft.adapters.attach import detach
from jaxft.checkpoint.load import LoadedModel, is_adapter, load_model, resolve
from jaxft.errors import ExportError
from jaxft.files.paths import is_remote
from jaxft.models import parameter_count
from jaxft.models.hf_fields import ALLOWED
from jaxft.sharding.arrays import to_host
from jaxft.sharding.mesh import MeshPlan
from jaxft.sharding.processes import on_primary

PROBE_ROWS, PROBE_LENGTH = 2, 24
PROBE_ENDS = (24, 19, 13, 8, 4)  # lengths of the documents whose scores are compared
# Largest difference allowed, as a share of the largest logit: rounding of the stored type.
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 4e-2}
# Effects of an adapter below this share of the largest logit are lost in float32 rounding between readers.
SMALLEST_EFFECT = 2e-5
# transformers needs the whole model once more in float32; a larger model is not compared with it.
PEER_LIMIT = 3_000_000_000


@dataclass(frozen=True)
class Check:
    """One comparison. difference, mean: the largest and the mean logit difference as shares of the largest logit; of a
    reward model those of scores, see `probe_outputs`.
    """

    reader: str
    difference: float
    mean: float


def probe(vocab: int) -> np.ndarray:
    """Token ids [B, S] that the comparison runs on, the same for every model with a vocabulary of this size."""
    return np.random.default_rng(vocab).integers(0, vocab, (PROBE_ROWS, PROBE_LENGTH))


def score_probe(hf_config: Mapping[str, Any]) -> list[list[int]]:
    """Documents, of different lengths, that a reward model is compared on; they end in its end token, if it has one."""
    ends, vocab = hf_config.get("eos_token_id"), hf_config["vocab_size"]
    end = ends[0] if isinstance(ends, list) else ends
    draws = np.random.default_rng(vocab)
    return [[*draws.integers(0, vocab, n).tolist(), *([] if end is None else [end])] for n in PROBE_ENDS]


def is_score_model(model: LoadedModel) -> bool:
    """Whether a model gives scores, and not logits."""
    return model.module.config.head == "score"


def probe_outputs(model: LoadedModel, like: LoadedModel | None = None) -> np.ndarray:
    """What exports are compared by: the logits of `probe`, or the scores of `score_probe`.

    like: the model whose end token the documents have; `model` if None.
    """
    if is_score_model(model):
        return model.scores(score_probe((like or model).hf_config))
    return model.logits(probe(model.module.config.vocab_size))


def _size(model: LoadedModel, outputs: np.ndarray) -> float:
    """The number that differences are given as shares of: the largest output.

    The scores of a few documents may all be small by chance: theirs is at least the length of the score head's weights.
    """
    size = float(np.max(np.abs(outputs)))
    if not is_score_model(model):
        return size
    weights = to_host(jax.tree.leaves(nnx.state(model.module.value))[0])
    return max(size, float(np.linalg.norm(weights)), 1e-30)


def check_export(live: LoadedModel, folder: str, *, dtype: str, mesh: MeshPlan | None = None) -> tuple[Check, ...]:
    """Reloads `folder` and compares logits, or a reward model's scores, with the live model.

    dtype: of the written weights. mesh: of the live model, and of the reloaded one; with several processes every one
    takes part. Raises ExportError if a reader's outputs differ by more than that dtype's rounding, or an adapter that
    has an effect in the live model has none when it is read back.
    """
    expected = probe_outputs(live)
    if not np.isfinite(expected).all():
        raise ExportError(
            f"{folder} is not finished: the trained model's own outputs are not all finite, so its weights have become "
            "too large. Export an earlier step: jaxft export --run=RUN --step=N --to=FOLDER."
        )
    largest = _size(live, expected)
    compute = str(np.dtype(live.module.dtype))
    what = "scores" if is_score_model(live) else "logits"
    tolerance = max(TOLERANCE[dtype], TOLERANCE[compute])
    effect = np.max(np.abs(_base_outputs(live) - expected)) / largest if is_adapter(folder) else 0.0
    if compute == "float32" and effect > SMALLEST_EFFECT:
        tolerance = min(tolerance, effect / 2)

    def compare(reader: str, outputs: np.ndarray) -> tuple[float, float]:
        differences = np.abs(outputs - expected) / largest
        difference = float(np.max(differences))
        if not difference <= tolerance:
            raise ExportError(
                f"{folder} read by {reader} differs from the live model: {what} by {difference:.2e} of the largest, "
                f"allowed {tolerance:.0e} for {dtype} weights. Do not use it; "
                "what was trained is still in checkpoints/."
            )
        return difference, float(np.mean(differences))

    def by_peers() -> dict[str, tuple[float, float]]:
        return {reader: compare(reader, read()) for reader, read in _peers(live, folder).items()}

    quantization = live.quantization if is_adapter(folder) else None
    allowed = live.hf_config.get(ALLOWED, ()) if is_adapter(folder) else ()
    reloaded = load_model(folder, dtype=compute, mesh=mesh, quantization=quantization, allow_unknown=allowed)
    ours = {"jaxft": compare("jaxft", probe_outputs(reloaded, live))}
    if quantization is not None and on_primary(lambda: bool(_peers(live, folder))):
        # The other readers put the adapter on the base in its own precision. So does their reference.
        expected = probe_outputs(load_model(folder, dtype=compute, mesh=mesh, allow_unknown=allowed), live)
        largest = _size(live, expected)
    return tuple(Check(reader, *differences) for reader, differences in (ours | on_primary(by_peers)).items())


def output_difference(model: LoadedModel, other: LoadedModel) -> dict[str, float]:
    """The largest and the mean difference of two models' `probe_outputs`, as shares of the other's largest."""
    expected = probe_outputs(other)
    difference = np.abs(probe_outputs(model, other) - expected) / _size(other, expected)
    return {"max": float(np.max(difference)), "mean": float(np.mean(difference))}


def _base_outputs(live: LoadedModel) -> np.ndarray:
    base = nnx.merge(*nnx.split(live.module))
    detach(base)
    return probe_outputs(LoadedModel(base, live.hf_config, live.base))


def _peers(live: LoadedModel, folder: str) -> dict[str, Callable[[], np.ndarray]]:
    readers: dict[str, Callable[[], np.ndarray]] = {}
    score, tokens = is_score_model(live), probe(live.module.config.vocab_size)
    small = parameter_count(live.module) <= PEER_LIMIT
    if small and importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        peft_folder = importlib.util.find_spec("peft") is not None and is_adapter(folder)
        if peft_folder and not live.base.endswith(".gguf") and not is_remote(live.base):
            readers["peft"] = lambda: _peer_scores(live, folder) if score else _peft_logits(live, folder, tokens)
        elif not is_adapter(folder):
            readers["transformers"] = lambda: (
                _peer_scores(live, folder) if score else _transformers_logits(folder, tokens)
            )
    return readers


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
        if base.get_input_embeddings().num_embeddings != live.module.config.vocab_size:
            base.resize_token_embeddings(live.module.config.vocab_size, mean_resizing=False)
        model, given = PeftModel.from_pretrained(base, adapter), torch.from_numpy(tokens)
        # transformers 5.24's class of Llama 4 with images fails on text alone; the language model in it has the head.
        inner = getattr(base, "language_model", None)
        reader = inner if inner is not None and hasattr(inner, "lm_head") else model
        with torch.no_grad():
            logits = reader.eval()(given, attention_mask=torch.ones_like(given)).logits
            return logits[:, -tokens.shape[1] :].float().numpy()  # those of virtual tokens come first


def _peer_scores(live: LoadedModel, folder: str) -> np.ndarray:
    """Scores of padded documents by transformers, on the base and with PEFT's adapter if `folder` has one."""
    import torch
    from transformers import AutoModelForSequenceClassification

    documents, pad = score_probe(live.hf_config), live.hf_config["pad_token_id"]
    longest = max(map(len, documents))
    rows = [[*document, *[pad] * (longest - len(document))] for document in documents]
    mask = [[1] * len(document) + [0] * (longest - len(document)) for document in documents]
    adapter = is_adapter(folder)
    with _quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            resolve(live.base) if adapter else folder, num_labels=1, dtype=torch.float32, local_files_only=True
        )
        if adapter:
            from peft import PeftModel

            # As users must: the base may name another token, or none.
            model.config.pad_token_id = pad
            model = PeftModel.from_pretrained(model, folder)
        with torch.no_grad():
            scores = model.eval()(torch.tensor(rows), attention_mask=torch.tensor(mask)).logits
            return scores[:, 0].float().numpy()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    # Its progress bars and deprecation notes concern its own internals, and would interrupt our output.
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it reports the score head that a base lacks
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
