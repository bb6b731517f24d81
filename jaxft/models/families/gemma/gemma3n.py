"""Gemma 3n, text: a residual of four streams, inputs of each layer, and last layers that use keys of earlier ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
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
    ropes_by_kind,
    with_defaults,
)
from jaxft.models.tensor_map import TensorMap, linear
from jaxft.nn.attention.borrowed import BorrowedShape
from jaxft.nn.attention.rope import Rope
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.attention.shape import AttentionShape
from jaxft.nn.block import AROUND, BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.mlp import MLPShape
from jaxft.nn.norm import NormShape
from jaxft.nn.residual.altup import PREFIX, PROJECTIONS, SMALL, UNEMBED, AltUpShape

MODEL_TYPES = ("gemma3n_text",)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262400, "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32768, "attention_bias": False,
    "tie_word_embeddings": True, "sliding_window": 512, "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "altup_active_idx": 0,
    "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_num_inputs": 4, "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}  # fmt: skip
OWN = (
    "sliding_window", "attention_bias", "final_logit_softcapping", "vocab_size_per_layer_input",
    "hidden_size_per_layer_input", "num_kv_shared_layers", "laurel_rank", "altup_num_inputs", "altup_active_idx",
    "altup_correct_scale", "altup_coef_clip",
)  # fmt: skip
# Null means that they were left out.
NOT_NULL = frozenset(OWN) - {"sliding_window", "final_logit_softcapping", "altup_coef_clip"}
SPARSITY = "activation_sparsity_pattern"
PERIOD = 5  # by default every fifth layer is global
SPARSE_LAYERS, SPARSE_SHARE = 10, 0.95  # by default the first ten layers, if there are more
ONLY = {"hidden_activation": GELU}
# Older files have them; transformers reads neither.
UNREAD = ("query_pre_attn_scalar", "altup_lr_multiplier")


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names. rope: of global layers. local_rope: of those with a window.

    inner_units: of each layer's feed-forward, the list `intermediate_size` of files; intermediate_size is the largest.
    activation_sparsity_pattern: the share of each layer's gate that becomes zero. altup_coef_clip: a bound on weights
    during training in transformers, which is kept for files and has no effect here. The rest is explained in
    `nn.residual` and in Gemma 4's Config.
    """

    local_rope: Rope
    inner_units: tuple[int, ...]
    sliding_window: int
    layer_types: tuple[str, ...]
    attention_bias: bool
    final_logit_softcapping: float | None
    vocab_size_per_layer_input: int
    hidden_size_per_layer_input: int
    num_kv_shared_layers: int
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool
    altup_coef_clip: float | None
    laurel_rank: int
    activation_sparsity_pattern: tuple[float, ...]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults({k: v for k, v in hf.items() if v is not None or k not in NOT_NULL}, DEFAULTS)
        sizes = read_sizes(hf, cls, used=("rope_local_base_freq", *UNREAD), must_equal=ONLY)
        layers = hf["num_hidden_layers"]
        types = read_layer_types(hf, [SLIDING if (i + 1) % PERIOD else FULL for i in range(layers)])
        check_window(hf["sliding_window"])
        _check_streams(hf)
        if not 0 <= hf["num_kv_shared_layers"] < layers:
            raise ModelError(
                f"num_kv_shared_layers={hf['num_kv_shared_layers']} of {layers} layers: from 0 to fewer than all"
            )
        check_shared(types, hf["num_kv_shared_layers"])
        inner = _each(hf["intermediate_size"], layers, "intermediate_size")
        thetas = {FULL: hf.get("rope_theta", 1e6), SLIDING: hf.get("rope_local_base_freq", 1e4)}
        rope, local = (read_rope(part, sizes["head_dim"]) for part in ropes_by_kind(hf, thetas))
        return cls(
            **sizes | {"intermediate_size": max(inner)},
            rope=rope,
            local_rope=local,
            inner_units=inner,
            layer_types=types,
            activation_sparsity_pattern=_read_sparsity(hf, layers),
            **{name: hf[name] for name in OWN},
        )

    def to_hf(self) -> dict[str, Any]:
        if self.local_rope.kind != "default":
            raise ModelError(f"transformers 4 has no field for {self.local_rope.kind!r} rope scaling of local layers")
        fields = self.hf_fields()
        return {
            "architectures": ["Gemma3nForCausalLM"],
            "model_type": "gemma3n_text",
            "hidden_activation": GELU,
            **fields,
            "intermediate_size": fields.pop("inner_units"),
            "rope_local_base_freq": self.local_rope.theta,
        }

    def rope_fields(self) -> dict[str, Any]:
        """The ropes in both dialects; for local layers transformers 4 has no field but their theta."""
        nested = {FULL: self.rope.to_parameters(), SLIDING: self.local_rope.to_parameters()}
        return (super().rope_fields() if self.local_rope.kind == "default" else {}) | {"rope_parameters": nested}

    def score_architecture(self) -> str:
        """Raises ModelError: there is no such class."""
        raise no_reward_model("gemma3n_text")

    def shape(self) -> DecoderShape:
        """Layers with norms before and after each part, each of which computes one of the streams."""
        norm, first = NormShape(eps=self.rms_norm_eps), self._first_shared()
        altup = AltUpShape(streams=self.altup_num_inputs, active=self.altup_active_idx, scaled=self.altup_correct_scale)
        blocks = tuple(
            BlockShape(
                mixer=self._attention(kind) if number < first else self._borrowed(kind),
                mlp=self._feed_forward(number),
                norm=norm,
                norms=AROUND,
                per_layer_input=self.hidden_size_per_layer_input,
                altup=altup,
                laurel=self.laurel_rank,
            )
            for number, kind in enumerate(self.layer_types)
        )
        return DecoderShape(
            layers=blocks,
            ropes=(self.rope, self.local_rope),
            norm=norm,
            embed_scale=self.hidden_size**0.5,
            logit_softcap=self.final_logit_softcapping,
            per_layer_input=self.hidden_size_per_layer_input,
            per_layer_rows=self.vocab_size_per_layer_input,
            streams=self.altup_num_inputs,
        )

    def is_unused(self, name: str) -> bool:
        """See FamilyConfig: official files have them in every layer."""
        return is_unused_key(name, self._first_shared())

    def tensors(self) -> tuple[TensorMap, ...]:
        """The table, with the lines of the projections that make the streams and join them."""
        numbers = range(self.altup_num_inputs - 1)
        lines = (
            line
            for name in (PROJECTIONS, UNEMBED)
            for n in numbers
            for line in linear(f"model.{name}.{n}", f"{PREFIX}{name}/{n}")
        )
        return (*super().tensors(), *lines)

    def block_tensors(self, block: BlockShape) -> Iterator[TensorMap]:
        """The table's lines for the layers of one shape, with those of AltUp and LAuReL."""
        yield from super().block_tensors(block)
        for name in (*(f"altup.{name}" for name in SMALL), "laurel.linear_left", "laurel.linear_right"):
            yield from linear(f"{LAYER}.{name}", f"layers/*/{name.replace('.', '/')}")
        for name in ("altup.router_norm", "laurel.post_laurel_norm"):
            yield TensorMap(f"{LAYER}.{name}.weight", f"layers/*/{name.replace('.', '/')}/scale")
        yield TensorMap(f"{LAYER}.altup.correct_output_scale", "layers/*/altup/correct_output_scale")

    def _first_shared(self) -> int:
        """The first layer without keys and values of its own."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def _feed_forward(self, number: int) -> MLPShape:
        return self.mlp(
            activation="gelu_tanh",
            hidden=self.inner_units[number],
            sparsity=self.activation_sparsity_pattern[number],
        )

    def _attention(self, kind: str) -> AttentionShape:
        """The attention of one kind of layers. Queries and keys are normalised, so scores are not scaled."""
        local = kind == SLIDING
        return self.attention(
            form=ScoreForm(window=self.sliding_window if local else None, scale=1.0),
            qk_norm="head",
            v_norm=True,
            bias=self.attention_bias,
            output_bias=self.attention_bias,
            rope=int(local),
            kept_as=kind if self.num_kv_shared_layers else None,
        )

    def _borrowed(self, kind: str) -> BorrowedShape:
        """The attention of one kind of layers among those that share keys and values."""
        return BorrowedShape.of(self._attention(kind), source=kind)


def _check_streams(hf: Mapping[str, Any]) -> None:
    """Raises ModelError for numbers of AltUp and of the tables that do not fit."""
    streams, active = hf["altup_num_inputs"], hf["altup_active_idx"]
    if streams < 2 or not 0 <= active < streams:
        raise ModelError(
            f"altup_num_inputs={streams} with altup_active_idx={active}: there are two streams or more, and the "
            "active one is among them"
        )
    if hf["hidden_size_per_layer_input"] < 1:
        raise ModelError("hidden_size_per_layer_input=0: only layers with inputs of their own are implemented")
    if hf["vocab_size_per_layer_input"] > hf["vocab_size"]:
        raise ModelError(
            f"vocab_size_per_layer_input={hf['vocab_size_per_layer_input']} and vocab_size={hf['vocab_size']}: there "
            "are no tokens for the last rows"
        )


def _each(value: Any, layers: int, name: str) -> tuple[Any, ...]:
    """A value for each layer, given as a list or as one for all. Raises ModelError for a list of another length."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * layers
    if len(values) != layers:
        raise ModelError(f"{name} has {len(values)} numbers for num_hidden_layers={layers}: one for each layer")
    return values


def _read_sparsity(hf: Mapping[str, Any], layers: int) -> tuple[float, ...]:
    given = hf.get(SPARSITY)
    if given is None:
        sparse = SPARSE_LAYERS if layers > SPARSE_LAYERS else 0
        given = [SPARSE_SHARE] * sparse + [0.0] * (layers - sparse)
    shares = _each(given, layers, SPARSITY)
    if not all(0 <= share < 1 for share in shares):
        raise ModelError(f"{SPARSITY}={list(shares)}: a share is 0 or more and less than 1")
    return tuple(map(float, shares))


class Model(Decoder):
    """A Gemma 3n of the given config."""
