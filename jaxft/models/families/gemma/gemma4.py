"""Gemma 4, text: global layers with larger heads, whose values may be their keys, and norms around each part.

E2B and E4B also have an input of its own for every layer, and last layers that use keys and values of earlier ones.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.files.json_fields import COUNT, OBJECT, check_kinds
from jaxft.models.families.gemma.gemma2 import GELU
from jaxft.models.families.gemma.shared_keys import check_shared, is_unused_key
from jaxft.models.family import (
    FULL,
    LAYER,
    SLIDING,
    FamilyConfig,
    check_window,
    no_reward_model,
    read_layer_types,
    read_rope,
    read_sizes,
    with_defaults,
)
from jaxft.models.hf_fields import ALLOWED, require
from jaxft.models.tensor_map import EACH_TRANSPOSED, TensorMap, linear
from jaxft.nn.attention.borrowed import BorrowedShape
from jaxft.nn.attention.rope import Rope
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.attention.shape import AttentionShape
from jaxft.nn.block import AROUND, BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.experts.router import RouterShape
from jaxft.nn.norm import NormShape

TEXT, UNIFIED = "gemma4_text", "gemma4_unified_text"
MODEL_TYPES = (TEXT, UNIFIED)
ARCHITECTURES = {TEXT: "Gemma4ForCausalLM", UNIFIED: "Gemma4UnifiedForCausalLM"}
ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512, "attention_bias": False,
    "attention_k_eq_v": False, "tie_word_embeddings": True, "rope_parameters": ROPES,
}  # fmt: skip
# Where the two types differ.
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    TEXT: {"sliding_window": 512, "max_position_embeddings": 131072, "hidden_size_per_layer_input": 256},
    UNIFIED: {"sliding_window": 1024, "max_position_embeddings": 262144, "use_bidirectional_attention": "vision"},
}
DEFAULT_ROWS = 262144  # of the table of the layers' inputs
NOT_NULL = ("global_head_dim", "attention_k_eq_v")  # null means that they were left out
PERIOD = 6  # by default every sixth layer is global
ONLY = {"hidden_activation": GELU, "rope_scaling": None}
# What the small models have, E2B and E4B, of the type TEXT alone.
SMALL = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "use_double_wide_mlp": False}
TABLE_ROWS = "vocab_size_per_layer_input"
# They mean nothing where the parts that they describe are off.
UNUSED = (TABLE_ROWS, "num_experts", "top_k_experts", "moe_intermediate_size", "enable_moe_block")
EXPERT_FIELDS = ("num_experts", "top_k_experts", "moe_intermediate_size")


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names. rope: of global layers. local_rope: of those with a window.

    global_head_dim, num_global_key_value_heads: of global layers. attention_k_eq_v: global layers have no v_proj.
    use_bidirectional_attention: which tokens see later ones; those of images at most, so for text it changes nothing.
    num_experts: beside each layer's feed-forward, None for a dense model. top_k_experts: chosen for each token.
    hidden_size_per_layer_input: the size of each layer's own input for a token, 0 for none. num_kv_shared_layers: the
    last layers, which use keys and values of the last layer of their type before them. use_double_wide_mlp: their
    feed-forwards have twice the inner units.
    """

    model_type: str
    local_rope: Rope
    global_head_dim: int
    num_global_key_value_heads: int
    sliding_window: int
    layer_types: tuple[str, ...]
    attention_bias: bool
    attention_k_eq_v: bool
    final_logit_softcapping: float | None
    use_bidirectional_attention: str | None
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None
    hidden_size_per_layer_input: int = 0
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = {name: value for name, value in hf.items() if value is not None or name not in NOT_NULL}
        hf = with_defaults(hf, DEFAULTS | OWN_DEFAULTS[hf["model_type"]])
        sizes = read_sizes(hf, cls, used=("per_layer_config", *UNUSED), must_equal=ONLY)
        layers = range(hf["num_hidden_layers"])
        types = read_layer_types(hf, [FULL if (i + 1) % PERIOD == 0 else SLIDING for i in layers])
        types = (*types[:-1], FULL)  # as in transformers, whatever the file says
        check_window(hf["sliding_window"])
        if hf.get("use_bidirectional_attention") not in (None, "vision"):
            raise ModelError("use_bidirectional_attention: only attention to earlier tokens of a text is implemented")
        head_dim, kv_heads = _global_heads(hf, types)
        rope, local = _read_ropes(hf, {FULL: head_dim, SLIDING: sizes["head_dim"]})
        return cls(
            **sizes,
            model_type=hf["model_type"],
            rope=rope,
            local_rope=local,
            global_head_dim=head_dim,
            num_global_key_value_heads=kv_heads,
            layer_types=types,
            final_logit_softcapping=hf.get("final_logit_softcapping"),
            use_bidirectional_attention=hf.get("use_bidirectional_attention"),
            **_read_experts(hf),
            **_read_small(hf, types),
            **{name: hf[name] for name in ("sliding_window", "attention_bias", "attention_k_eq_v")},
        )

    def to_hf(self) -> dict[str, Any]:
        fields = self.hf_fields()
        for flat in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
            fields.pop(flat, None)
        # transformers reads it only beside attention_k_eq_v.
        kv_heads = self.num_global_key_value_heads if self.attention_k_eq_v else None
        parts: dict[str, Any] = {}
        if self.model_type == TEXT:
            parts = {"enable_moe_block": self.num_experts is not None}
            parts |= {TABLE_ROWS: self.vocab_size} if self.hidden_size_per_layer_input else {}
        else:
            fields = {name: value for name, value in fields.items() if name not in (*EXPERT_FIELDS, *SMALL)}
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            "hidden_activation": GELU,
            **fields,
            **parts,
            "num_global_key_value_heads": kv_heads,
            "rope_parameters": {FULL: self.rope.to_parameters(), SLIDING: self.local_rope.to_parameters()},
        }

    def rope_fields(self) -> dict[str, Any]:
        """Both ropes as transformers 5 has them; transformers 4 does not have this family."""
        return {"rope_parameters": self.to_hf()["rope_parameters"]}

    def score_architecture(self) -> str:
        """Raises ModelError: there is no such class."""
        raise no_reward_model(self.model_type)

    def shape(self) -> DecoderShape:
        """Layers with norms before and after each part, and a factor on their output."""
        norm = NormShape(eps=self.rms_norm_eps)
        blocks = {
            (kind, shared): BlockShape(
                mixer=self._borrowed(kind) if shared else self._attention(kind),
                mlp=self.mlp(activation="gelu_tanh", hidden=self._inner_units(shared)),
                norm=norm,
                norms=AROUND,
                output_scale=True,
                experts=self._experts(),
                per_layer_input=self.hidden_size_per_layer_input or None,
            )
            for kind in (SLIDING, FULL)
            for shared in (False, True)
        }
        first = self._first_shared()
        return DecoderShape(
            layers=tuple(blocks[kind, number >= first] for number, kind in enumerate(self.layer_types)),
            ropes=(self.rope, self.local_rope),
            rope_dims=(self.global_head_dim, self.head_dim),
            norm=norm,
            embed_scale=self.hidden_size**0.5,
            logit_softcap=self.final_logit_softcapping,
            per_layer_input=self.hidden_size_per_layer_input or None,
        )

    def is_unused(self, name: str) -> bool:
        """See FamilyConfig: official files have them in every layer."""
        return is_unused_key(name, self._first_shared())

    def _first_shared(self) -> int:
        """The first layer without keys and values of its own."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def _inner_units(self, shared: bool) -> int:
        return self.intermediate_size * (2 if shared and self.use_double_wide_mlp else 1)

    def block_tensors(self, block: BlockShape) -> Iterator[TensorMap]:
        """The table's lines, with those of experts, which files have in one tensor."""
        yield from super().block_tensors(block)
        if block.experts is None:
            return
        router = "layers/*/experts/router"
        yield from linear(f"{LAYER}.router.proj", router)
        for name in ("scale", "per_expert_scale"):
            yield TensorMap(f"{LAYER}.router.{name}", f"{router}/{name}")
        for name in ("gate_up_proj", "down_proj"):
            yield TensorMap(f"{LAYER}.experts.{name}", f"layers/*/experts/{name}/kernel", EACH_TRANSPOSED)

    def _experts(self) -> MoEShape | None:
        if self.num_experts is None or self.top_k_experts is None or self.moe_intermediate_size is None:
            return None
        return MoEShape(
            width=self.hidden_size,
            hidden=self.moe_intermediate_size,
            experts=self.num_experts,
            router=RouterShape(
                chosen=self.top_k_experts, renormalize=True, norm_eps=self.rms_norm_eps, expert_scale=True
            ),
            activation="gelu_tanh",
            fused="halves",
        )

    def _attention(self, kind: str) -> AttentionShape:
        """The attention of one kind of layers. Queries and keys are normalised, so scores are not scaled."""
        local = kind == SLIDING
        shape = self.attention(
            form=ScoreForm(window=self.sliding_window if local else None, scale=1.0),
            qk_norm="head",
            v_norm=True,
            bias=self.attention_bias,
            output_bias=self.attention_bias,
            rope=int(local),
            kept_as=kind if self.num_kv_shared_layers else None,
        )
        if local:
            return shape
        return dataclasses.replace(
            shape,
            kv_heads=self.num_global_key_value_heads,
            head_dim=self.global_head_dim,
            keys_as_values=self.attention_k_eq_v,
        )

    def _borrowed(self, kind: str) -> BorrowedShape:
        """The attention of one kind of layers among those that share keys and values."""
        return BorrowedShape.of(self._attention(kind), source=kind)


def _read_small(hf: Mapping[str, Any], types: tuple[str, ...]) -> dict[str, Any]:
    """What the small models have. Raises ModelError for numbers that do not fit."""
    own = {name: hf.get(name, default) for name, default in SMALL.items()}
    if hf["model_type"] == UNIFIED and own != SMALL:
        fields = ", ".join(f"{name}={value!r}" for name, value in own.items() if value != SMALL[name])
        raise ModelError(f"{fields}: model_type {UNIFIED!r} has no such layers in transformers")
    size, shared, layers = own["hidden_size_per_layer_input"], own["num_kv_shared_layers"], len(types)
    if not isinstance(size, int) or not isinstance(shared, int) or size < 0 or not 0 <= shared < layers:
        raise ModelError(
            f"hidden_size_per_layer_input={size!r} and num_kv_shared_layers={shared!r} of {layers} layers: whole "
            "numbers from 0 on, the second less than the number of layers"
        )
    if size and hf.get(TABLE_ROWS, DEFAULT_ROWS) != hf["vocab_size"]:
        raise ModelError(
            f"{TABLE_ROWS}={hf.get(TABLE_ROWS, DEFAULT_ROWS)} and vocab_size={hf['vocab_size']}: only tables of one "
            "size are implemented"
        )
    check_shared(types, shared)
    return own


def _read_experts(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of experts; none if they are off. Raises ModelError for numbers that do not fit."""
    if not hf.get("enable_moe_block"):
        return {}
    if hf["model_type"] == UNIFIED:
        raise ModelError(f"enable_moe_block: model_type {UNIFIED!r} has no experts in transformers")
    require(hf, EXPERT_FIELDS)
    if not 1 <= hf["top_k_experts"] <= hf["num_experts"]:
        raise ModelError(f"top_k_experts={hf['top_k_experts']} of {hf['num_experts']} experts: from 1 to all of them")
    return {name: hf[name] for name in EXPERT_FIELDS}


def _global_heads(hf: Mapping[str, Any], types: tuple[str, ...]) -> tuple[int, int]:
    """(head_dim, num_key_value_heads) of global layers.

    Published files have fields for them. transformers writes `per_layer_config` instead: what each layer has other than
    the rest. Raises ModelError if that has anything else, and for numbers that do not fit.
    """
    head_dim, kv_heads = hf["global_head_dim"], hf["num_key_value_heads"] or hf["num_attention_heads"]
    if hf["attention_k_eq_v"]:
        kv_heads = hf.get("num_global_key_value_heads") or kv_heads
    if (layers := hf.get("per_layer_config")) is not None:
        own = _alike(layers, [str(layer) for layer, kind in enumerate(types) if kind == FULL], hf["attention_k_eq_v"])
        head_dim = own.get("head_dim", hf["head_dim"])
        kv_heads = own.get("num_key_value_heads", hf["num_key_value_heads"] or hf["num_attention_heads"])
    if head_dim % 2 or hf["num_attention_heads"] % kv_heads:
        raise ModelError(
            f"global layers have {hf['num_attention_heads']} heads of {head_dim} numbers, and {kv_heads} for keys and "
            "values: the numbers must be even, the former a multiple of the latter"
        )
    return head_dim, kv_heads


def _alike(layers: Mapping[str, Any], full: list[str], own_kv_heads: bool) -> Mapping[str, Any]:
    """What `per_layer_config` says of all global layers, whose numbers are `full`."""
    kinds = {"head_dim": COUNT} | ({"num_key_value_heads": COUNT} if own_kv_heads else {})
    overrides = [layers.get(layer, {}) for layer in full]
    if (
        any(one != overrides[0] for one in overrides)
        or not isinstance(overrides[0], Mapping)
        or not set(layers) <= set(full)
    ):
        raise ModelError(f"per_layer_config={layers!r}: only the same for all layers of type {FULL} is implemented")
    if unknown := sorted(set(overrides[0]) - set(kinds)):
        raise ModelError(f"per_layer_config: {', '.join(unknown)} of single layers is not implemented")
    check_kinds(overrides[0], kinds, "per_layer_config of config.json")
    return {name: value for name, value in overrides[0].items() if value is not None}


def _read_ropes(hf: Mapping[str, Any], head_dims: Mapping[str, int]) -> tuple[Rope, Rope]:
    """(rope of global layers, of those with a window). head_dims: by kind of layer."""
    nested = hf["rope_parameters"] or ROPES
    if set(nested) != {FULL, SLIDING}:
        raise ModelError(f"rope_parameters of model_type {hf['model_type']!r} must name {FULL} and {SLIDING}")
    check_kinds(nested, {FULL: OBJECT, SLIDING: OBJECT}, "rope_parameters of config.json")
    names = ("model_type", "max_position_embeddings", "rope_theta", ALLOWED)
    shared = {name: hf[name] for name in names if hf.get(name) is not None}
    ropes = []
    for kind in (FULL, SLIDING):
        part = nested[kind] or ROPES[kind]
        partial = part.get("rope_type") == "proportional"
        ropes.append(read_rope(shared | {"rope_parameters": part}, head_dims[kind], partial=partial))
    return ropes[0], ropes[1]


class Model(Decoder):
    """A Gemma 4 of the given config."""
