"""Routers: which experts a token takes, and with which weights."""

# D model, E experts, G groups of experts, K experts of one token, M tokens

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn.param_kind import Constant
from jaxft.nn.storage import StorageDims


@dataclass(frozen=True, kw_only=True)
class RouterShape:
    """How a router turns a token's logits into the choice and the weights of its experts.

    chosen: the number of experts of each token. scores: of each logit, or over all logits. renormalize: whether the
    weights are the chosen scores divided by their sum, plus `epsilon`, or `least_sum` if the sum is less. scale: factor
    on the weights. use_bias: whether the logits have a bias. choice_bias: whether a `Constant` is added to the scores
    for the choice, but not for the weights (arXiv:2408.15664). groups: experts are divided into so many groups of
    neighbours, and a token chooses among its best `chosen_groups` of them (arXiv:2405.04434, section 2.2). group_best:
    the score of a group is the sum of so many of its best scores. norm_eps: the eps of a norm of the input, which
    multiplies by a learnt scale / sqrt(D); None for no norm. expert_scale: whether each expert's weights have a learnt
    factor. on_input: whether the weight of a token's only expert multiplies that expert's input, and not its output.
    """

    chosen: int
    renormalize: bool
    scores: Literal["softmax", "sigmoid"] = "softmax"
    epsilon: float = 0.0
    least_sum: float = 0.0
    scale: float = 1.0
    use_bias: bool = False
    choice_bias: bool = False
    groups: int = 1
    chosen_groups: int = 1
    group_best: int = 1
    norm_eps: float | None = None
    expert_scale: bool = False
    on_input: bool = False


class Routes(NamedTuple):
    """The chosen experts of each token, best first: experts_MK int32; weights_MK float32, weights of their outputs."""

    weights_MK: jax.Array
    experts_MK: jax.Array


def route(logits_ME: jax.Array, shape: RouterShape, bias_E: jax.Array | None = None) -> Routes:
    """The experts with the highest scores. bias_E: added to the scores for the choice, None for nothing."""
    scores_ME = jax.nn.sigmoid(logits_ME) if shape.scores == "sigmoid" else jax.nn.softmax(logits_ME, axis=-1)
    if bias_E is None and shape.groups == 1:
        weights_MK, experts_MK = jax.lax.top_k(scores_ME, shape.chosen)
    else:
        _, experts_MK = jax.lax.top_k(jax.lax.stop_gradient(_ranking(scores_ME, shape, bias_E)), shape.chosen)
        weights_MK = jnp.take_along_axis(scores_ME, experts_MK, axis=-1)
    if shape.renormalize:
        sum_M1 = weights_MK.sum(axis=-1, keepdims=True) + shape.epsilon
        weights_MK = weights_MK / (jnp.maximum(sum_M1, shape.least_sum) if shape.least_sum else sum_M1)
    return Routes(weights_MK if shape.scale == 1.0 else weights_MK * shape.scale, experts_MK)


def _ranking(scores_ME: jax.Array, shape: RouterShape, bias_E: jax.Array | None) -> jax.Array:
    """What is compared for the choice; -inf for experts outside of the chosen groups."""
    if bias_E is not None:
        scores_ME = scores_ME + bias_E.astype(jnp.float32)
    if shape.groups == 1:
        return scores_ME
    scores_MGE = scores_ME.reshape(len(scores_ME), shape.groups, -1)
    groups_MG = jax.lax.top_k(scores_MGE, shape.group_best)[0].sum(axis=-1)
    _, chosen_MK = jax.lax.top_k(groups_MG, shape.chosen_groups)
    is_chosen_MG = jax.nn.one_hot(chosen_MK, shape.groups, dtype=jnp.bool).any(axis=1)
    return jnp.where(is_chosen_MG[..., None], scores_MGE, -jnp.inf).reshape(scores_ME.shape)


class Router(nnx.Module):
    """Logits `x @ kernel (+ bias)`, float32 for every compute dtype, so that rounding does not decide a close choice.

    kernel: [D, E]. Not a Linear, so that no adapter is attached to it. choice_bias: [E], float32 in every model.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        shape: RouterShape,
        *,
        stddev: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.shape = shape
        self.kernel = nnx.Param(stddev * jax.random.normal(rngs.params(), (width, experts), param_dtype))
        self.bias = nnx.Param(jnp.zeros((experts,), param_dtype)) if shape.use_bias else None
        self.choice_bias = Constant(jnp.zeros((experts,), jnp.float32)) if shape.choice_bias else None
        self.scale = None if shape.norm_eps is None else nnx.Param(jnp.ones((width,), param_dtype))
        self.per_expert_scale = nnx.Param(jnp.ones((experts,), param_dtype)) if shape.expert_scale else None
        self.dtype = dtype

    def __call__(self, x_MD: jax.Array) -> jax.Array:
        x_MD = self._normed(x_MD)
        kernel = self.kernel.get_value().astype(self.dtype)
        logits_ME = jnp.einsum("MD,DE->ME", x_MD.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        return logits_ME if self.bias is None else logits_ME + self.bias.get_value().astype(jnp.float32)

    def route(self, logits_ME: jax.Array) -> Routes:
        """The experts of each token, given its logits."""
        routes = route(logits_ME, self.shape, None if self.choice_bias is None else self.choice_bias.get_value())
        if self.per_expert_scale is None:
            return routes
        scale_MK = self.per_expert_scale.get_value().astype(jnp.float32)[routes.experts_MK]
        return routes._replace(weights_MK=routes.weights_MK * scale_MK)

    def _normed(self, x_MD: jax.Array) -> jax.Array:
        if self.shape.norm_eps is None or self.scale is None:
            return x_MD
        x32 = x_MD.astype(jnp.float32)
        inverse_M1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.shape.norm_eps)
        return x32 * inverse_M1 * self.scale.get_value().astype(jnp.float32) * x32.shape[-1] ** -0.5

    def storage_dims(self) -> dict[str, StorageDims]:
        return {
            "kernel": StorageDims(("weight", None)),
            "bias": StorageDims((None,)),
            **{name: StorageDims((None,)) for name in ("choice_bias", "scale", "per_expert_scale")},
        }
