"""In which type each tensor of a GGUF file is written, and how it is quantised.

Sources: llama.cpp's converter for float32 to q8_0; its quantiser, src/llama-quant.cpp, for the mixtures Q4_K_M and
Q5_K_M, which give some tensors more bits than others.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import quantize as quantize_by_gguf

from jaxft.checkpoint.gguf.family import ROUTER, Family, GGUFModule
from jaxft.checkpoint.gguf.names import expert_count
from jaxft.errors import ExportError
from jaxft.models.family import FamilyConfig

F32, F16, BF16, Q8_0 = (Kind[name] for name in ("F32", "F16", "BF16", "Q8_0"))
Q4_K, Q5_K, Q6_K = Kind.Q4_K, Kind.Q5_K, Kind.Q6_K
KINDS = {"float32": F32, "float16": F16, "bfloat16": BF16, "q8_0": Q8_0, "q4_k_m": Q4_K, "q5_k_m": Q5_K}
FILE_TYPES = {
    "float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0",
    "q4_k_m": "MOSTLY_Q4_K_M", "q5_k_m": "MOSTLY_Q5_K_M",
}  # fmt: skip
MIXTURES = frozenset((Q4_K, Q5_K))
# What rows get that do not fill blocks of 256.
SMALLER_BLOCKS = {Q4_K: Kind.Q5_0, Q5_K: Kind.Q5_1, Q6_K: Q8_0}
# Parts that are float32 in every file.
IN_FLOAT32 = (
    ROUTER, "ffn_gate_inp_shexp", "ssm_conv1d", "shortconv.conv", "exp_probs_b", "altup_correct_coef",
    "altup_predict_coef",
)  # fmt: skip
# llama.cpp's quantiser leaves them as they are.
KEPT = ("per_layer_model_proj", "altup_proj", "altup_unembd_proj", "altup_router", "laurel_l", "laurel_r")
LAYERS_OF_70B, EXPERTS_OF_8X7B = 80, 8


@dataclass(frozen=True, kw_only=True)
class FileKinds:
    """The types of the tensors of one file. dtype: a name of KINDS."""

    dtype: str
    family: Family
    config: FamilyConfig

    def kind(self, shape: tuple[int, ...], module: GGUFModule) -> Kind:
        """The type of a module's tensor of this shape; of one expert, if it holds experts.

        Vectors, routers and convolutions stay float32. Rows that do not fill the blocks of a type get one with smaller
        blocks, and float16 if they do not fill those either.
        """
        if len(shape) == 1 or module.part in IN_FLOAT32:
            return F32
        kind = KINDS[self.dtype]
        if kind in MIXTURES:
            kind = self._of_mixture(kind, module)
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            kind = SMALLER_BLOCKS.get(kind, kind)
        return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else F16

    def _of_mixture(self, kind: Kind, module: GGUFModule) -> Kind:
        part, layers = module.part, self.config.num_hidden_layers
        eight = expert_count(self.family, self.config) == EXPERTS_OF_8X7B
        if part == "output" or (part == "token_embd" and self.config.tie_word_embeddings):
            return Q6_K
        if part in KEPT:
            return F16
        if part.startswith("ffn_down"):
            return Q6_K if _has_more_bits(module.layer, layers) else kind
        if part in ("attn_v", "attn_qkv"):
            if eight:
                return Q8_0
            if _has_more_bits(module.layer, layers):
                return Q6_K
            return Q5_K if self._is_70b() else kind
        if eight and part == "attn_k":
            return Q8_0
        return Q5_K if eight and part == "attn_output" else kind

    def _is_70b(self) -> bool:
        """Whether llama.cpp knows the model as one of 70B with grouped heads, which it does by its layers."""
        config = self.config
        grouped = config.num_attention_heads != config.num_key_value_heads
        return self.family.arch in ("llama", "qwen2") and config.num_hidden_layers == LAYERS_OF_70B and grouped


def _has_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third one of the others."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def file_kinds(dtype: str, family: Family, config: FamilyConfig) -> FileKinds:
    """The types of a file. Raises ExportError for an unknown dtype, and for a mixture if libgguf is not installed."""
    kind_of(dtype)
    return FileKinds(dtype=dtype, family=family, config=config)


def kind_of(dtype: str) -> Kind:
    """The type that most matrices of a file get. Raises ExportError as `file_kinds`."""
    if dtype not in KINDS:
        raise ExportError(f"GGUF files are written as {', '.join(KINDS)}, not {dtype!r}")
    if KINDS[dtype] in MIXTURES:
        _libgguf()
    return KINDS[dtype]


def quantize(values: np.ndarray, kind: Kind) -> np.ndarray:
    """float32 rows as the bytes of a type, equal to those of llama.cpp: [..., I] -> [..., bytes of a row]."""
    if kind in SMALLER_BLOCKS:
        by_libgguf: Callable[[np.ndarray, Kind], np.ndarray] = _libgguf().quantize_rows
        return by_libgguf(values, kind)
    return quantize_by_gguf(values, kind)


@functools.cache
def _libgguf() -> ModuleType:
    try:
        import libgguf
    except ImportError as error:
        raise ExportError(
            "q4_k_m and q5_k_m are quantised by the package libgguf, which is not installed: pip install "
            "'jaxft[k-quants]', or write q8_0"
        ) from error
    return libgguf
