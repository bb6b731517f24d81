"""The Config that every model family extends: sizes under Hugging Face's names, and the table of its tensors."""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxft.errors import ModelError
from jaxft.files.json_fields import OBJECT, check_kinds
from jaxft.models.hf_fields import ALLOWED, check_fields, require
from jaxft.models.score_model import LANGUAGE_MODEL, SCORE_MODEL
from jaxft.models.tensor_map import ONE_ROW, TensorMap, linear
from jaxft.nn.attention.borrowed import BorrowedShape
from jaxft.nn.attention.rope import Rope
from jaxft.nn.attention.score_form import PLAIN, ScoreForm
from jaxft.nn.attention.shape import AttentionShape
from jaxft.nn.block import BEFORE, EXPERT_NORMS, OWN_INPUT_NORM, BlockShape, NormNames
from jaxft.nn.decoder import DecoderShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.mlp import Activation, MLPShape
from jaxft.nn.norm import NormShape
from jaxft.nn.per_layer.inputs import PREFIX
from jaxft.nn.score import Head

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
# Fields of config.json that describe ropes in the dialects of transformers 4 and 5.
ROPE_DIALECTS = (*ROPE_FIELDS, "rope_local_base_freq", "partial_rotary_factor", "original_max_position_embeddings")
NOT_IN_FILES = ("head", "dense_tensors")  # fields of FamilyConfig that are none of config.json
LAYER = "model.layers.{i}"  # Hugging Face's name of a layer
_NUMBER = re.compile(r"model\.layers\.(\d{1,9})\.")
SLIDING, FULL = "sliding_attention", "full_attention"  # values of Hugging Face's layer_types


@dataclass(frozen=True, kw_only=True)
class FamilyConfig(ABC):
    """Sizes under Hugging Face's names. The subclass of a family adds its own fields and the three abstract methods.

    head: what the model ends in. No field of config.json: there the name of the architecture says it. dense_tensors:
    Hugging Face's names of the tensors that stay dense if the model is quantised while it is loaded; no field either.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048
    head: Head = "vocabulary"
    dense_tensors: frozenset[str] = frozenset()

    final_norm: ClassVar[str] = "model.norm"
    # What names of tensors begin with here and in files, where the two differ; the first that fits counts.
    names_in_files: ClassVar[tuple[tuple[str, str], ...]] = ()

    def in_files(self, name: str) -> str:
        """A tensor's name in files, which transformers changes when it reads them."""
        for ours, theirs in self.names_in_files:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def from_files(self, name: str) -> str:
        """The inverse of `in_files`."""
        for ours, theirs in self.names_in_files:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    def is_for_prediction(self, name: str) -> bool:
        """Whether a tensor of the files is of the layers that predict several tokens at once, which are left out."""
        return False

    def is_unused(self, name: str) -> bool:
        """Whether a tensor of the files has no effect, because its layer uses keys and values of another."""
        return False

    @classmethod
    @abstractmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "FamilyConfig":
        """Reads the parsed `config.json` of transformers 4 or 5. Raises ModelError for fields not implemented."""

    @abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """The same as `config.json`, in the dialect that transformers 4 and 5 both read."""

    @abstractmethod
    def shape(self) -> DecoderShape:
        """The network."""

    def rope_fields(self) -> dict[str, Any]:
        """The ropes as config.json has them in both dialects, since readers of one do not see the other's fields.

        transformers 4 reads rope_theta and rope_scaling, transformers 5 also rope_parameters.
        """
        own = self.to_hf()
        fields = {name: own[name] for name in ROPE_DIALECTS if name in own}
        return {"rope_parameters": self.rope.to_parameters()} | fields

    def score_architecture(self) -> str:
        """The class of a reward model of this family in transformers. Raises ModelError if it has none."""
        return str(self.to_hf()["architectures"][0]).replace(LANGUAGE_MODEL, SCORE_MODEL)

    def attention(
        self,
        *,
        form: ScoreForm = PLAIN,
        qk_norm: Literal["head", "whole"] | None = None,
        bias: bool = False,
        output_bias: bool = False,
        fused: bool = False,
        sinks: bool = False,
        rope: int | None = 0,
        **switches: Any,
    ) -> AttentionShape:
        """The shape of an attention layer of these sizes. switches: other fields of AttentionShape."""
        return AttentionShape(
            width=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            use_bias=bias,
            use_output_bias=output_bias,
            form=form,
            qk_norm=qk_norm,
            fused=fused,
            sinks=sinks,
            rope=rope,
            **switches,
        )

    def mlp(
        self,
        *,
        activation: Activation = "silu",
        bias: bool = False,
        fused: bool = False,
        gated: bool = True,
        hidden: int | None = None,
        sparsity: float = 0.0,
    ) -> MLPShape:
        """The shape of a feed-forward layer of these sizes. hidden: inner units, intermediate_size if None."""
        return MLPShape(
            width=self.hidden_size,
            hidden=self.intermediate_size if hidden is None else hidden,
            activation=activation,
            use_bias=bias,
            fused=fused,
            gated=gated,
            sparsity=sparsity,
        )

    def uniform(
        self, attention: AttentionShape, mlp: MLPShape | MoEShape, *, norms: NormNames = BEFORE, **block: Any
    ) -> DecoderShape:
        """The shape of a decoder whose layers are all equal. block: other fields of BlockShape."""
        norm = NormShape(eps=self.rms_norm_eps)
        shape = BlockShape(mixer=attention, mlp=mlp, norm=norm, norms=norms, **block)
        return DecoderShape(layers=(shape,) * self.num_hidden_layers, ropes=(self.rope,), norm=norm)

    def tensors(self) -> tuple[TensorMap, ...]:
        """The table of this model's parameters, derived from the shapes of its layers."""
        shape = self.shape()
        blocks = shape.layers
        layers_of: dict[TensorMap, set[int]] = {}
        for block in dict.fromkeys(blocks):
            numbers = {number for number, other in enumerate(blocks) if other == block}
            for line in self.block_tensors(block):
                layers_of.setdefault(line, set()).update(numbers)
        return (
            TensorMap("model.embed_tokens.weight", "embed_tokens/embedding"),
            TensorMap(f"{self.final_norm}.weight", "norm/scale"),
            *self.head_tensors(),
            *(() if shape.per_layer_input is None else per_layer_tensors()),
            *(
                dataclasses.replace(line, layers=None if len(numbers) == len(blocks) else frozenset(numbers))
                for line, numbers in layers_of.items()
            ),
        )

    def block_tensors(self, block: BlockShape) -> Iterator[TensorMap]:
        """The table's lines for the layers of one shape."""
        for name in (*filter(None, block.norms), *(() if block.experts is None else EXPERT_NORMS)):
            yield TensorMap(f"{LAYER}.{name}.weight", f"layers/*/{name}/scale")
        if block.output_scale:
            yield TensorMap(f"{LAYER}.layer_scalar", "layers/*/layer_scalar")
        if block.per_layer_input is not None:
            for name in ("per_layer_input_gate", "per_layer_projection"):
                yield from linear(f"{LAYER}.{name}", f"layers/*/{name}")
            yield TensorMap(f"{LAYER}.{OWN_INPUT_NORM}.weight", f"layers/*/{OWN_INPUT_NORM}/scale")
        if block.mixer is not None:
            yield from self.mixer_tensors(block)
        if block.mlp is not None:
            yield from self.mlp_tensors(block)

    def mixer_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """The table's lines for the part of a layer that looks at other positions."""
        return attention_tensors(block.attention) if block.attention is not None else ()

    def head_tensors(self) -> tuple[TensorMap, ...]:
        """The table's lines for the LM head or the score head; none for a head that is the embedding table."""
        if self.head == "score":
            return (TensorMap("score.weight", "value/weight", ONE_ROW),)
        return () if self.tie_word_embeddings else linear("lm_head", "lm_head")

    def mlp_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """The table's lines for the feed-forward part of a layer."""
        return dense_tensors(block.mlp) if isinstance(block.mlp, MLPShape) else ()

    def hf_fields(self) -> dict[str, Any]:
        """The fields of `config.json`, except those that name the family."""
        fields = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in NOT_IN_FILES and not isinstance(value, Rope):
                fields[field.name] = list(value) if isinstance(value, tuple) else value
        return fields | self.rope.to_hf()


def per_layer_tensors() -> tuple[TensorMap, ...]:
    """The table's lines for the inputs that layers have of their own."""
    table, projection, norm = "embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm"
    return (
        TensorMap(f"model.{table}.weight", f"{PREFIX}{table}/embedding"),
        *linear(f"model.{projection}", f"{PREFIX}{projection}"),
        TensorMap(f"model.{norm}.weight", f"{PREFIX}{norm}/scale"),
    )


def attention_tensors(attention: AttentionShape, module: str = f"{LAYER}.self_attn") -> Iterator[TensorMap]:
    """The table's lines for an attention layer, named as in most families. module: its name in files."""
    path = "layers/*/self_attn"
    own = 1 if isinstance(attention, BorrowedShape) else 2 if attention.keys_as_values else 3
    for name in ("qkv_proj",) if attention.fused else ("q_proj", "k_proj", "v_proj")[:own]:
        yield from linear(f"{module}.{name}", f"{path}/{name}", bias=attention.use_bias)
    yield from linear(f"{module}.o_proj", f"{path}/o_proj", bias=attention.use_output_bias)
    for name in ("q_norm", "k_norm")[:own] if attention.qk_norm and not attention.unscaled_qk else ():
        yield TensorMap(f"{module}.{name}.weight", f"{path}/{name}/scale")
    if attention.sinks:
        yield TensorMap(f"{module}.sinks", f"{path}/sinks")


def dense_tensors(mlp: MLPShape, module: str = f"{LAYER}.mlp", path: str = "layers/*/mlp") -> Iterator[TensorMap]:
    """The table's lines for a feed-forward layer that is no layer of experts."""
    inputs = ("gate_up_proj",) if mlp.fused else ("gate_proj", "up_proj") if mlp.gated else ("up_proj",)
    for name in (*inputs, "down_proj"):
        yield from linear(f"{module}.{name}", f"{path}/{name}", bias=mlp.use_bias)


def no_reward_model(model_type: str) -> ModelError:
    """The error for a reward model of a family for which transformers has no class."""
    return ModelError(
        f"transformers has no class for reward models of model_type {model_type!r} (ForSequenceClassification), so "
        "that nothing else could read one. Take a model of another family for the reward model."
    )


def layer_number(name: str) -> int | None:
    """The number of the layer that a tensor of the files is in, None for one outside of all layers."""
    layer = _NUMBER.match(name)
    return None if layer is None else int(layer[1])


def with_defaults(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with absent fields filled in as transformers does."""
    return {**defaults, **hf}


def read_sizes(
    hf: Mapping[str, Any], family: type[FamilyConfig], *, used: Iterable[str] = (), must_equal: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of FamilyConfig except its rope. Checks first that every field of `hf` is understood.

    used: fields that the family reads besides its own dataclass fields. must_equal: fields with only one implemented
    value, and that value. Raises ModelError naming fields that are missing, unknown or inconsistent.
    """
    require(hf, SIZES)
    own = (field.name for field in dataclasses.fields(family) if field.name not in NOT_IN_FILES)
    check_fields(hf, used=[*own, *ROPE_FIELDS, *used], must_equal=must_equal)
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    kv_heads, head_dim = hf.get("num_key_value_heads") or heads, hf.get("head_dim") or width // heads
    if heads % kv_heads:
        raise ModelError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    if not hf.get("head_dim") and width % heads:
        raise ModelError(f"hidden_size={width} is not a multiple of num_attention_heads={heads}")
    if head_dim % 2:
        raise ModelError(f"head_dim={head_dim} is odd: rotary embeddings rotate pairs of dimensions")
    return {
        **{name: hf[name] for name in SIZES},
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        "initializer_range": hf.get("initializer_range", 0.02),
        "max_position_embeddings": hf.get("max_position_embeddings", 2048),
    }


def read_rope(
    hf: Mapping[str, Any], head_dim: int, *, partial: bool = False, scaled_queries: bool = False, alpha: bool = False
) -> Rope:
    """The rope of config.json.

    partial: whether the family implements partial_rotary_factor, which rotates only a part of each head.
    scaled_queries: whether it implements llama_4_scaling_beta, which scales queries by their position. alpha: whether
    it implements alpha in dynamic scaling. Raises ModelError for settings that are not implemented or do not fit the
    heads.
    """
    rope = Rope.from_hf(hf)
    refused = {
        "partial_rotary_factor": rope.partial_rotary_factor != 1.0 and not partial,
        "llama_4_scaling_beta": rope.llama_4_scaling_beta is not None and not scaled_queries,
        "alpha": rope.alpha is not None and not alpha,
    }
    for name in filter(refused.get, refused):
        raise ModelError(
            f"rope {name}={getattr(rope, name)} is not implemented for model_type {hf.get('model_type')!r}"
        )
    rope.check(head_dim)
    return rope


def ropes_by_kind(hf: Mapping[str, Any], thetas: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json for the rope of FULL layers, the same for SLIDING layers), each for `read_rope`.

    thetas: rope_theta of each kind, unless nested rope_parameters give one. A scaling that is not nested belongs to
    FULL layers. Raises ModelError for rope_parameters of another form.
    """
    names = ("model_type", "max_position_embeddings", ALLOWED)
    shared = {name: hf[name] for name in names if name in hf}
    nested = hf.get("rope_parameters") or {}
    unknown = sorted(set(nested) - {FULL, SLIDING})
    if unknown:
        raise ModelError(
            f"rope_parameters of model_type {hf['model_type']!r} are nested by kind of layer; unknown: {unknown}"
        )
    check_kinds(nested, {FULL: OBJECT, SLIDING: OBJECT}, "rope_parameters of config.json")
    flat = {"rope_scaling": hf.get("rope_scaling"), "rope_theta": thetas[FULL]}
    return (
        shared | (flat if FULL not in nested else {"rope_parameters": {"rope_theta": thetas[FULL], **nested[FULL]}}),
        shared | {"rope_parameters": {"rope_theta": thetas[SLIDING], **nested.get(SLIDING, {})}},
    )


def read_layer_types(
    hf: Mapping[str, Any], default: Iterable[str], known: tuple[str, ...] = (SLIDING, FULL)
) -> tuple[str, ...]:
    """`layer_types`, or the default if absent. Raises ModelError for a wrong length or a type that is not `known`."""
    types = tuple(hf.get("layer_types") or default)
    unknown = sorted(set(types) - set(known))
    if unknown or len(types) != hf["num_hidden_layers"]:
        raise ModelError(
            f"layer_types must name {' or '.join(known)} for each of num_hidden_layers={hf['num_hidden_layers']} "
            f"layers, got {len(types)}" + (f" with {', '.join(unknown)}" if unknown else "")
        )
    return types


def read_periodic_types(hf: Mapping[str, Any], period: int) -> tuple[str, ...]:
    """`layer_types`; if absent, every period-th layer is FULL. period: unless `sliding_window_pattern` gives one.

    Raises ModelError for a pattern that is no number if layer_types is absent.
    """
    if hf.get("layer_types"):
        return read_layer_types(hf, ())
    given = hf.get("sliding_window_pattern")
    check_period(given)
    return read_layer_types(
        hf, [SLIDING if (i + 1) % (given or period) else FULL for i in range(hf["num_hidden_layers"])]
    )


def check_period(pattern: Any) -> None:
    """Raises ModelError for a `sliding_window_pattern` that is neither a number from 1 on nor absent."""
    if pattern is not None and (not isinstance(pattern, int) or pattern < 1):
        raise ModelError(f"sliding_window_pattern={pattern!r} without layer_types: must be a whole number, 1 or more")


def check_window(window: Any, where: str = "sliding_window") -> None:
    """Raises ModelError unless a window is a whole number, 1 or more."""
    if not isinstance(window, int) or window < 1:
        raise ModelError(f"{where}={window!r}: a window is a whole number of tokens, 1 or more")
