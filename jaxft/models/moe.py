"""What the families with experts share: the layer's sizes, the table of its tensors, and fields of the router."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.dense import DenseConfig, check_window
from jaxft.models.tensor_map import TRANSPOSED, TensorMap
from jaxft.nn.block import BlockShape
from jaxft.nn.experts.layer import MoEShape

# The noise is on the router's input, in training alone.
MUST_EQUAL = {"hidden_act": "silu", "router_jitter_noise": 0.0}
PATH = "layers/*/mlp"


@dataclass(frozen=True, kw_only=True)
class MoEConfig(DenseConfig):
    """Sizes under Hugging Face's names. A family says where its files keep a layer's experts, and its MoEShape.

    num_experts_per_tok: experts that take each token. router_aux_loss_coef: what the load-balancing loss counts where
    routers train and the run does not say. output_router_logits: whether transformers adds that loss; kept for who
    reads the file again.
    """

    num_experts_per_tok: int
    sliding_window: int | None
    router_aux_loss_coef: float
    output_router_logits: bool = False

    def experts(self, count: int, hidden: int, *, renormalize: bool, **switches: Any) -> MoEShape:
        """The feed-forward layer of `count` experts with `hidden` inner units each. switches: more of MoEShape."""
        return MoEShape(
            width=self.hidden_size,
            hidden=hidden,
            experts=count,
            chosen=self.num_experts_per_tok,
            renormalize=renormalize,
            **switches,
        )


def expert_tensors(block: BlockShape, module: str, *, gate: str, up: str, down: str) -> tuple[TensorMap, ...]:
    """The lines of a layer of experts that files keep as one matrix for each of them.

    module: for example `model.layers.{i}.mlp`. gate, up, down: what files call an expert's three matrices.
    """
    names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return (
        TensorMap(f"{module}.gate.weight", f"{PATH}/router/kernel", TRANSPOSED),
        *(
            TensorMap(f"{module}.experts.{{e}}.{hf}.weight", f"{PATH}/{ours}/kernel", TRANSPOSED, block.mlp.experts)
            for ours, hf in names.items()
        ),
    )


def check_experts(hf: Mapping[str, Any], count: Any) -> None:
    """Raises ModelError unless each token has as many experts to choose as there are."""
    chosen = hf["num_experts_per_tok"]
    if not isinstance(count, int) or not isinstance(chosen, int) or not 1 <= chosen <= count:
        raise ModelError(f"num_experts_per_tok={chosen!r} of {count!r} experts: must be from 1 to all of them")


def read_window(window: Any) -> int | None:
    """A window of all layers, None for none. Raises ModelError for what is no window."""
    if window is not None:
        check_window(window)
    return window
