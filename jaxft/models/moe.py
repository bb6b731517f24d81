"""What families with experts share: sizes of the layer, the table of its tensors, fields of the router."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.family import FamilyConfig, check_window
from jaxft.models.tensor_map import TRANSPOSED, TensorMap
from jaxft.nn.experts.layer import MoEShape

# router_jitter_noise is on the router's input, in training only.
MUST_EQUAL = {"hidden_act": "silu", "router_jitter_noise": 0.0}
PATH = "layers/*/mlp"


@dataclass(frozen=True, kw_only=True)
class MoEConfig(FamilyConfig):
    """Sizes under Hugging Face's names. A family adds the names of a layer's experts in files, and its MoEShape.

    num_experts_per_tok: experts chosen for each token. router_aux_loss_coef: default weight of the load-balancing loss
    if routers are trained. output_router_logits: whether transformers adds that loss; only passed on to exports.
    """

    num_experts_per_tok: int
    sliding_window: int | None
    router_aux_loss_coef: float
    output_router_logits: bool = False

    def experts(self, count: int, hidden: int, *, renormalize: bool, **switches: Any) -> MoEShape:
        """The shape of a layer of `count` experts of `hidden` inner units each. switches: other fields of MoEShape."""
        return MoEShape(
            width=self.hidden_size,
            hidden=hidden,
            experts=count,
            chosen=self.num_experts_per_tok,
            renormalize=renormalize,
            **switches,
        )


def expert_tensors(module: str, count: int, *, gate: str, up: str, down: str) -> tuple[TensorMap, ...]:
    """The table's lines for a layer of `count` experts, if files store every expert's matrices separately.

    module: for example `model.layers.{i}.mlp`. gate, up, down: names of an expert's three matrices in files.
    """
    names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return (
        TensorMap(f"{module}.gate.weight", f"{PATH}/router/kernel", TRANSPOSED),
        *(
            TensorMap(f"{module}.experts.{{e}}.{hf}.weight", f"{PATH}/{ours}/kernel", TRANSPOSED, count)
            for ours, hf in names.items()
        ),
    )


def check_experts(hf: Mapping[str, Any], count: Any) -> None:
    """Raises ModelError unless num_experts_per_tok is from 1 to `count`."""
    chosen = hf["num_experts_per_tok"]
    if not isinstance(count, int) or not isinstance(chosen, int) or not 1 <= chosen <= count:
        raise ModelError(f"num_experts_per_tok={chosen!r} of {count!r} experts: must be from 1 to all of them")


def read_window(window: Any) -> int | None:
    """The window of all layers, None for full attention. Raises ModelError for an invalid window."""
    if window is not None:
        check_window(window)
    return window
