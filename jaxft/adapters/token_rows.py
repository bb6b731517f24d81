"""Rows of the embedding table and of the LM head that are trained alone: PEFT's trainable_token_indices."""

# B batch, S sequence, V vocab, D model, n tokens

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.adapters.attach import AdapterParam, adapters
from jaxft.errors import ModelError
from jaxft.nn import partition
from jaxft.nn.decoder import Decoder
from jaxft.nn.linear import Embedding, Linear
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims

ROW_DIMS: Dimensions = (None, "weight")
TABLES = ("embed_tokens", "lm_head")


class Rows(nnx.Module):
    """Rows that take the place of a table's own. indices: the tokens. values: [n, D] float32."""

    def __init__(self, indices: Sequence[int], values_nD: jax.Array) -> None:
        self.indices = tuple(indices)
        self.values = AdapterParam(values_nD.astype(jnp.float32))

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"values": StorageDims(ROW_DIMS)}

    def looked_up(self, tokens_BS: jax.Array, x_BSD: jax.Array) -> jax.Array:
        """x_BSD, the table's rows of tokens_BS, with these rows in their places."""
        order = np.argsort(self.indices)
        known = jnp.asarray(np.array(self.indices)[order], jnp.int32)
        at_BS = jnp.clip(jnp.searchsorted(known, tokens_BS), 0, len(known) - 1)
        rows_BSD = jnp.take(self._whole(x_BSD.dtype)[order], at_BS, axis=0)
        return jnp.where((known[at_BS] == tokens_BS)[..., None], rows_BSD, x_BSD)

    def in_table(self, table_VD: jax.Array) -> jax.Array:
        """The table with these rows."""
        return table_VD.at[jnp.asarray(self.indices)].set(self._whole(table_VD.dtype))

    def in_kernel(self, kernel_DV: jax.Array) -> jax.Array:
        """The kernel of an LM head with these rows as its columns."""
        return kernel_DV.at[:, jnp.asarray(self.indices)].set(self._whole(kernel_DV.dtype).T)

    def _whole(self, dtype: jnp.dtype) -> jax.Array:
        return partition.gather(self.values.get_value().astype(dtype), ROW_DIMS, (None, None))


class TokenRows(nnx.Module):
    """The rows of a model's tables, for the slot `Decoder.token_rows`. Those of a tied table are `embed_tokens`."""

    def __init__(self, rows: Mapping[str, Rows]) -> None:
        self.embed_tokens = rows.get("embed_tokens", nnx.data(None))
        self.lm_head = rows.get("lm_head", nnx.data(None))

    def by_table(self) -> dict[str, Rows]:
        """The rows by the name of their table."""
        return {name: getattr(self, name) for name in TABLES if getattr(self, name) is not None}

    def merges(self) -> dict[str, Callable[..., jax.Array]]:
        """For the path of each table, the table with its rows, float32, given the table and its stack index ()."""
        out: dict[str, Callable[..., jax.Array]] = {}
        if self.embed_tokens is not None:
            rows = self.embed_tokens
            out["embed_tokens/embedding"] = lambda table_VD, at=(): rows.in_table(table_VD.astype(jnp.float32))
        if self.lm_head is not None:
            columns = self.lm_head
            out["lm_head/kernel"] = lambda kernel_DV, at=(): columns.in_kernel(kernel_DV.astype(jnp.float32))
        return out

    def embedded(self, tokens_BS: jax.Array, x_BSD: jax.Array) -> jax.Array:
        """The embedded tokens, given the table's rows of them."""
        return x_BSD if self.embed_tokens is None else self.embed_tokens.looked_up(tokens_BS, x_BSD)

    def head(self, head: Embedding | Linear) -> Embedding | Linear:
        """The LM head with the rows of its table."""
        tied = isinstance(head, Embedding)
        rows = self.embed_tokens if tied else self.lm_head
        if rows is None:
            return head
        copy = cast(Embedding | Linear, nnx.merge(*nnx.split(head)))
        # New variables: within a loss those of the model belong to the trace around it.
        if isinstance(copy, Embedding):
            copy.embedding = nnx.Param(rows.in_table(copy.embedding.get_value()))
        else:
            copy.kernel = nnx.Param(rows.in_kernel(cast(jax.Array, copy.kernel.get_value())))
        return copy


def attach_token_rows(model: Decoder, indices: Mapping[str, Sequence[int]]) -> None:
    """Makes rows of tables trainable, which begin as the tables' own.

    indices: the tokens, by `embed_tokens` or `lm_head`; a tied table is `embed_tokens`. Raises ModelError for a token
    that the table does not have, one that is named twice, and for a table that has an adapter.
    """
    attached, out = adapters(model), {}
    for name, tokens in indices.items():
        if name in attached:
            raise ModelError(f"{name} has an adapter and single rows that are trained: only one of them is implemented")
        vocab = model.config.vocab_size
        beyond = [token for token in tokens if token >= vocab]
        if beyond or len(set(tokens)) < len(tokens) or not tokens:
            problem = f"token {beyond[0]} is beyond the {vocab} of the table" if beyond else "name each token once"
            raise ModelError(f"rows of {name} that are trained alone: {problem}")
        where = jnp.asarray(tokens)
        if name == "embed_tokens":
            values_nD = model.embed_tokens.embedding.get_value()[where]
        else:
            values_nD = cast(jax.Array, cast(Linear, model.lm_head).kernel.get_value())[:, where].T
        out[name] = Rows(tokens, values_nD)
    if out:
        model.token_rows = TokenRows(out)
