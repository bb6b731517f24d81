"""Linear layers and embeddings. One optional adapter slot keeps every base parameter at its path."""

# B batch, S sequence, I inputs, O outputs, D model, V vocab

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name


class Linear(nnx.Module):
    """`y = x @ kernel (+ bias)`, then the adapter's correction where one is attached.

    kernel: [I, O]. x: [..., I], computed in `dtype`. keep: name under which rematerialisation policies
    find the result, for layers whose result the backward pass reads. Layers under a scan hold a leading stack axis
    in every parameter and are called on one slice of it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool = False,
        keep: str | None = None,
        stddev: float = 0.02,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = nnx.Param(stddev * jax.random.normal(rngs.params(), (inputs, outputs), param_dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), param_dtype)) if use_bias else None
        self.adapter = nnx.data(None)
        self.dtype = dtype
        self.keep = keep

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        kernel = self.kernel.get_value()
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(self.dtype)
        if self.adapter is not None:
            y = self.adapter(x, y, kernel, key)
        return y if self.keep is None else checkpoint_name(y, self.keep)


class Embedding(nnx.Module):
    """A table [V, D]: rows for tokens on the way in, and, where tied, scores for tokens on the way out."""

    def __init__(
        self, vocab: int, width: int, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.embedding = nnx.Param(stddev * jax.random.normal(rngs.params(), (vocab, width), param_dtype))
        self.dtype = dtype

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        return jnp.take(self.embedding.get_value(), tokens_BS, axis=0).astype(self.dtype)

    def scores(self, hidden: jax.Array) -> jax.Array:
        """hidden: [..., D] -> logits [..., V] float32."""
        table = self.embedding.get_value().astype(self.dtype)
        return jnp.einsum("...D,VD->...V", hidden.astype(self.dtype), table, preferred_element_type=jnp.float32)
