"""What families with experts share: sizes of the layer, the table of its tensors, fields of the router."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.family import LAYER, FamilyConfig, check_window, dense_tensors, layer_number
from jaxft.models.hf_fields import require
from jaxft.models.tensor_map import TRANSPOSED, TensorMap, linear
from jaxft.nn.attention.latent import LatentShape
from jaxft.nn.attention.shape import AttentionShape
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import DecoderShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.experts.router import RouterShape
from jaxft.nn.mlp import MLPShape
from jaxft.nn.norm import NormShape

# router_jitter_noise is on the router's input, in training only.
MUST_EQUAL = {"hidden_act": "silu", "router_jitter_noise": 0.0}
PATH = "layers/*/mlp"


@dataclass(frozen=True, kw_only=True)
class RoutedConfig(FamilyConfig):
    """Sizes under Hugging Face's names. A family adds the names of a layer's experts in files, and its MoEShape.

    num_experts_per_tok: experts chosen for each token. output_router_logits: whether transformers adds the
    load-balancing loss; only passed on to exports.
    """

    num_experts_per_tok: int
    output_router_logits: bool = False

    def router(self, *, renormalize: bool, **switches: Any) -> RouterShape:
        """The shape of a router. switches: other fields of RouterShape."""
        return RouterShape(chosen=self.num_experts_per_tok, renormalize=renormalize, **switches)

    def experts(self, count: int, hidden: int, router: RouterShape, **switches: Any) -> MoEShape:
        """The shape of a layer of `count` experts of `hidden` inner units each. switches: other fields of MoEShape."""
        return MoEShape(width=self.hidden_size, hidden=hidden, experts=count, router=router, **switches)

    def sparse(
        self, attention: AttentionShape | LatentShape, experts: MoEShape, dense: Collection[int]
    ) -> DecoderShape:
        """Pre-norm layers with experts, or with a feed-forward of intermediate_size if their number is in `dense`."""
        norm = NormShape(eps=self.rms_norm_eps)
        blocks = [BlockShape(mixer=attention, mlp=mlp, norm=norm) for mlp in (experts, self.mlp())]
        layers = tuple(blocks[number in dense] for number in range(self.num_hidden_layers))
        return DecoderShape(layers=layers, ropes=(self.rope,), norm=norm)

    def mlp_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig."""
        return self.moe_tensors(block.mlp) if isinstance(block.mlp, MoEShape) else super().mlp_tensors(block)

    @abstractmethod
    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        """The table's lines for a layer of experts."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig(RoutedConfig):
    """A RoutedConfig of families with a window and with a weight of the load-balancing loss.

    router_aux_loss_coef: that weight if routers are trained and a run sets none.
    """

    sliding_window: int | None
    router_aux_loss_coef: float


EPSILON = 1e-20  # in the sum of the chosen scores
BALANCED_FIELDS = (
    "moe_intermediate_size", "num_experts_per_tok", "output_router_logits", "n_shared_experts", "n_group", "topk_group",
    "first_k_dense_replace", "norm_topk_prob",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BalancedConfig(RoutedConfig):
    """A RoutedConfig with the fields of DeepSeek V3, which other families have too (arXiv:2412.19437, section 2.1).

    The first first_k_dense_replace layers have no experts. intermediate_size: of these layers. moe_intermediate_size:
    of one expert; n_shared_experts of them are shared.
    """

    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    norm_topk_prob: bool

    def is_for_prediction(self, name: str) -> bool:
        """See FamilyConfig: files number these layers after the model's own."""
        number = layer_number(name)
        return number is not None and number >= self.num_hidden_layers

    def shared_and_routed(self, router: RouterShape) -> MoEShape:
        """A layer of experts with shared ones, which are one feed-forward."""
        shared = self.mlp(hidden=self.moe_intermediate_size * self.n_shared_experts)
        return self.experts(self.n_routed_experts, self.moe_intermediate_size, router, shared=shared)

    def balanced_router(self) -> RouterShape:
        """A router with a bias beside the scores that balances the choice."""
        return self.router(
            renormalize=self.norm_topk_prob, scores="sigmoid", choice_bias=True, groups=self.n_group,
            chosen_groups=self.topk_group, group_best=2, epsilon=EPSILON, scale=self.routed_scaling_factor,
        )  # fmt: skip

    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        """See RoutedConfig."""
        module = f"{LAYER}.mlp"
        yield from expert_tensors(module, experts.experts, gate="gate_proj", up="up_proj", down="down_proj")
        if experts.router.choice_bias:
            yield TensorMap(f"{module}.gate.e_score_correction_bias", f"{PATH}/router/choice_bias")
        if experts.shared is not None:
            yield from shared_tensors(experts.shared, f"{module}.shared_experts")


def read_balanced(hf: Mapping[str, Any], *, experts: int, group_best: int) -> dict[str, Any]:
    """The fields that BalancedConfig and RoutedConfig add. experts: their number by default. group_best: as in
    RouterShape. Raises ModelError for numbers that do not belong together.
    """
    require(hf, ["num_experts_per_tok"])
    count = read_count(hf, ("n_routed_experts", "num_local_experts"), experts)
    check_experts(hf, count)
    check_groups(hf, count, group_best=group_best)
    if hf["n_shared_experts"] < 1:
        raise ModelError("n_shared_experts=0: layers of experts without a shared one are not implemented here")
    scaling = float(hf["routed_scaling_factor"])
    own = {name: hf[name] for name in BALANCED_FIELDS}
    return {"n_routed_experts": count, "routed_scaling_factor": scaling, **own}


def expert_tensors(
    module: str, count: int, *, gate: str | None, up: str, down: str, router: str = "gate"
) -> tuple[TensorMap, ...]:
    """The table's lines for a layer of `count` experts, if files store every expert's matrices separately.

    module: for example `model.layers.{i}.mlp`. gate, up, down: names of an expert's matrices in files. router: of the
    router's module.
    """
    names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return (
        *linear(f"{module}.{router}", f"{PATH}/router"),
        *(
            TensorMap(f"{module}.experts.{{e}}.{hf}.weight", f"{PATH}/{ours}/kernel", TRANSPOSED, count)
            for ours, hf in names.items()
            if hf is not None
        ),
    )


def shared_tensors(shared: MLPShape, module: str, *, gate: str | None = None) -> Iterator[TensorMap]:
    """The table's lines for the shared expert of a layer. module, gate: names of it and of its gate in files."""
    yield from dense_tensors(shared, module, f"{PATH}/shared_expert")
    if gate is not None:
        yield from linear(gate, f"{PATH}/shared_expert_gate")


def check_experts(hf: Mapping[str, Any], count: Any, field: str = "num_experts_per_tok") -> None:
    """Raises ModelError unless the number of experts of a token is from 1 to `count`."""
    chosen = hf[field]
    if not isinstance(count, int) or not isinstance(chosen, int) or not 1 <= chosen <= count:
        raise ModelError(f"{field}={chosen!r} of {count!r} experts: must be from 1 to all of them")


def read_count(hf: Mapping[str, Any], names: Sequence[str], default: int) -> int:
    """A number that config.json may have under several names. Raises ModelError if two of them differ."""
    given = {name: hf[name] for name in names if hf.get(name) is not None} or {names[0]: default}
    if len(set(given.values())) > 1:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ModelError(f"{both} must be equal: they are {len(given)} names of one number")
    return next(iter(given.values()))


def check_groups(hf: Mapping[str, Any], count: int, *, group_best: int) -> None:
    """Raises ModelError unless n_group divides `count` experts and topk_group of the groups have enough of them.

    group_best: as in RouterShape.
    """
    groups, chosen, each = hf["n_group"], hf["topk_group"], hf["num_experts_per_tok"]
    size = count // groups if groups and count % groups == 0 else 0
    if not 1 <= chosen <= groups or size < min(group_best, count) or chosen * size < each:
        raise ModelError(
            f"n_group={groups} and topk_group={chosen} do not fit {count} experts with {each} of them for each token"
        )


def read_window(window: Any) -> int | None:
    """The window of all layers, None for full attention. Raises ModelError for an invalid window."""
    if window is not None:
        check_window(window)
    return window
