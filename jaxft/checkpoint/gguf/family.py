"""How llama.cpp's converter names and arranges one family, and the names that many families share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxft.checkpoint.gguf.layout.fused import Fused

# GGUF's name within `blk.N.` -> Hugging Face's within `model.layers.N.`
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
NORMS_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
NORMS_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
NORMS_AROUND = NORMS_AFTER | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
DENSE = NORMS_BEFORE | ATTENTION | MLP
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# The layers' own inputs, of Gemma 3n and 4.
PER_LAYER = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
PER_LAYER_WHOLE = WHOLE | {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
ROUTER = "ffn_gate_inp"
RMS_EPSILON, LAYER_EPSILON = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
WINDOW, WINDOW_PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
TEMPERATURE, YARN_LOG = "attention.temperature_scale", "rope.scaling.yarn_log_multiplier"

PREDICTION = "nextn_predict_layers"  # the number of last layers that predict several tokens at once


class Setting(NamedTuple):
    """A field of config.json that a key of the metadata holds. kind: of the key's value. default: of an absent key.

    A key without a default must be there.
    """

    field: str
    kind: type[float] | type[int] | type[bool] = float
    default: float | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """How llama.cpp's converter names and arranges one family."""

    arch: str  # general.architecture
    model_type: str
    architecture: str  # Hugging Face's class
    layer: Mapping[str, str]  # modules of a layer; `{e}` is the number of an expert, whose tensors GGUF merges
    tensors: Mapping[str, str] = field(default_factory=dict)  # single tensors of a layer with the endings of names
    whole: Mapping[str, str] = field(default_factory=lambda: WHOLE)
    # Fields of config.json that are the same in all files of the family.
    constants: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    # llama.cpp rotates neighbouring pairs in this family, so its converter interleaves the halves of q and k heads.
    interleaved: bool = False
    # Hugging Face's norms multiply by 1 + weight, llama.cpp's by the tensor in the file.
    norm_plus_one: bool = False
    # Config fields that a tensor of the first layer decides by being there.
    present: Mapping[str, str] = field(default_factory=dict)
    # Tensors that hold several matrices in Hugging Face's files.
    fused: tuple[Fused, ...] = ()
    # The config field with the number of groups of Mamba-2, whose vectors have shapes of their own in files.
    mamba: str | None = None
    # The value heads of delta-nets are in another order in files.
    tiled_heads: bool = False
    # The numbers of key heads and of inner units are lists, with 0 for layers that have none.
    by_layer: bool = False
    prediction: bool = False  # whether files may have PREDICTION, whose layers are left out
    latent: bool = False  # whether attention is latent
    variant: str = ""  # distinguishes families of the same model_type
    experts: str | None = None  # config field with their number
    settings: frozenset[str] = frozenset()  # metadata of this family beyond that of all families
    fields: Mapping[str, Setting] = field(default_factory=dict)  # the part of that metadata that is a config field
    fixed: Mapping[str, Any] = field(default_factory=dict)  # and the part that has one value in all models
    # Metadata that other families of the same architecture do not have, or have as 0, and its value if only one counts.
    mark: str | None = None
    mark_value: Any = None
    unadapted: tuple[str, ...] = ()  # parts on which llama.cpp passes an adapter by without a word
    partial: bool = False  # whether a part of each head may be rotated
    epsilon: str = RMS_EPSILON  # the key of the norms' epsilon

    @property
    def key(self) -> str:
        """Its key in the table of families."""
        return f"{self.model_type}/{self.variant}" if self.variant else self.model_type

    def known(self) -> frozenset[str]:
        """Metadata of this family beyond that of all families."""
        of_layers = {PREDICTION} if self.prediction else set()
        return self.settings | set(self.fields) | set(self.fixed) | of_layers | {self.epsilon}


class GGUFModule(NamedTuple):
    """The place of a module in a file.

    part: its name without layer number. layer: that number, -1 outside of the layers. expert: its row of a merged
    tensor.
    """

    name: str
    part: str
    layer: int = -1
    expert: int | None = None
