"""A model in numbers: which parameters multiply each token, how far its attention looks, what its layers keep."""

# B batch, S sequence, N query heads, H head_dim, D model, L layers

import math
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxft.nn.attention import Attention
from jaxft.quant import is_quantised
from jaxft.trees import flatten


@dataclass(frozen=True, kw_only=True)
class Looks:
    """`layers` attention layers of N heads of H; window None: back to the beginning."""

    layers: int
    heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of one model with its adapters.

    parameters: all but adapters. active: those that multiply every token: no embedding table, of experts only the
    chosen ones, a tied head once. adapter: of adapters. outputs: widths of all matrix products of all layers together,
    for one token. width: D. layers: L. largest: parameters of one layer.
    """

    parameters: int
    active: int
    adapter: int
    outputs: int
    width: int
    layers: int
    vocab: int
    attention: tuple[Looks, ...]

    def model_flops(self, rows: int, length: int, *, trained_whole: bool) -> int:
        """Of one step over rows of `length` tokens, recomputation left out.

        Two FLOPs a parameter and token forward, two for the gradient of activations, and two for the gradient of
        weights that are trained. Attention counts the scores that causal order and window leave.
        """
        tokens = rows * length
        products = (6 if trained_whole else 4) * self.active * tokens + 6 * self.adapter * tokens
        return products + sum(look.layers * 12 * rows * _seen(length, look) for look in self.attention)


def _seen(length: int, look: Looks) -> int:
    """Numbers of queries times keys times width that one row's scores take."""
    window = min(look.window or length, length)
    return look.heads * look.head_dim * (window * (window + 1) // 2 + (length - window) * window)


def sizes_of(model: Any) -> ModelSizes:
    """Of a model, abstract or not, with or without adapters."""
    leaves, _ = flatten(nnx.state(model, nnx.Param), is_quantised)
    chosen = getattr(model.config, "num_experts_per_tok", 1)
    parameters = active = adapter = outputs = 0
    tied = True
    for path, leaf in leaves.items():
        size = math.prod(leaf.shape)
        if "/adapter/" in path:
            adapter += size
            continue
        parameters += size
        if not path.endswith("kernel"):
            continue
        share = chosen / leaf.shape[1] if len(leaf.shape) == 4 else 1
        active += int(size * share)
        if path.startswith("layers/"):
            outputs += int(leaf.shape[0] * leaf.shape[-1] * (chosen if len(leaf.shape) == 4 else 1))
        tied &= not path.startswith("lm_head")
    config = model.config
    looks = []
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attention):
            shape, stacked = module.shape, module.o_proj.kernel.get_value().shape[0]
            looks.append(Looks(layers=stacked, heads=shape.heads, head_dim=shape.head_dim, window=shape.form.window))
    return ModelSizes(
        parameters=parameters,
        active=active + (config.vocab_size * config.hidden_size if tied else 0),
        adapter=adapter,
        outputs=outputs,
        width=config.hidden_size,
        layers=sum(look.layers for look in looks),
        vocab=config.vocab_size,
        attention=tuple(looks),
    )
