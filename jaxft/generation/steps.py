"""The compiled functions of generation: prefill of a group of prompts and a run of decoding steps.

Both are plain jitted functions of (graph definition, parameters, ...), so that calls with new parameters of
the same model, as in RL, reuse the compiled code. Cache and history are donated: updated in place.
"""

# B slots, P prompts of a group, A answers to a prompt, S suffix tokens of a prompt, V vocab, C steps of a run, T cache,
# K alternatives to a token

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.generation.sampling import Alternatives, Knobs, choose, most_likely
from jaxft.nn.adapter import RowNumbers
from jaxft.nn.attention.cache import Cache, LayerCache, MixerCache, StateCache, store
from jaxft.nn.decoder import Decoder

RUN = 16  # most decoding steps of one dispatch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Arrays = TypeVar("Arrays")


class Memory(NamedTuple):
    """The KV cache of all slots and their history, kept on the devices between calls.

    seen_BV: bool, the tokens that a row has had, prompt included.
    """

    cache: Cache
    seen_BV: jax.Array


class Prefix(NamedTuple):
    """The common prefix of all prompts, computed once. seen_V: bool, its tokens."""

    cache: Cache
    seen_V: jax.Array


class Prompts(NamedTuple):
    """Prompts to prefill together, each for A answers.

    tokens_PS: int32, -1 is padding. start: the position of the first token (the length of the prefix).
    slots_PA: the slots of each prompt's answers; out of range if there is no such answer. knobs: of all answers,
    [P * A], prompt after prompt. adapter_P: int32, the number of each prompt's adapter, if rows have adapters of their
    own; else None.
    """

    tokens_PS: jax.Array
    start: jax.Array
    slots_PA: jax.Array
    knobs: Knobs
    adapter_P: jax.Array | None = None


class Rows(NamedTuple):
    """The state of each slot.

    token_B: the newest token, not in the cache yet. position_B: its position. left_B: how many more tokens the row
    may produce, 0 if the slot is idle. adapter_B: as in `Prompts`.
    """

    token_B: jax.Array
    position_B: jax.Array
    left_B: jax.Array
    knobs: Knobs
    adapter_B: jax.Array | None = None


def _on_mesh(step: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`step`, whose argument `rows` is a sharding or None, traced under the mesh of that sharding."""

    @functools.wraps(step)
    def traced(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        rows = kwargs["rows"]
        if not isinstance(rows, NamedSharding):
            return step(*args, **kwargs)
        with jax.sharding.use_abstract_mesh(rows.mesh.abstract_mesh):
            return step(*args, **kwargs)

    return traced


@functools.partial(jax.jit, static_argnames=("graphdef", "slots", "length", "rows"))
@_on_mesh
def make_memory(
    graphdef: nnx.GraphDef[Decoder], params: nnx.State, *, slots: int, length: int, rows: NamedSharding | None
) -> Memory:
    """Empty memory for `slots` rows of up to `length` tokens. rows: sharding of [B, ...] arrays, or None."""
    model = nnx.merge(graphdef, params)
    seen_BV = jnp.zeros((slots, model.config.vocab_size), bool)
    return _shard(Memory(model.init_cache(slots, length), seen_BV), rows)


@functools.partial(jax.jit, static_argnames=("graphdef", "length", "rows"))
@_on_mesh
def encode_prefix(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens_1S: jax.Array,
    *,
    length: int,
    rows: NamedSharding | None,
) -> Prefix:
    """The prefix of tokens_1S: int32, padded with -1. length: of its cache. rows: sharding of [B, ...] arrays."""
    model = nnx.merge(graphdef, params)
    real_1S = tokens_1S >= 0
    cache = model.init_cache(1, length)
    _, cache = _forward(model, jnp.maximum(tokens_1S, 0), None, real_1S.astype(jnp.int32), cache)
    return Prefix(cache, _mark_seen(tokens_1S, model.config.vocab_size)[0])


@functools.partial(jax.jit, static_argnames=("graphdef", "length", "rows", "alternatives"), donate_argnames="memory")
@_on_mesh
def prefill(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    memory: Memory,
    prefix: Prefix | None,
    prompts: Prompts,
    *,
    length: int,
    rows: NamedSharding | None,
    alternatives: int = 0,
) -> tuple[Memory, jax.Array, jax.Array, Alternatives | None]:
    """The memory with the prompts in their slots, the first tokens of all answers [P * A], their log-probabilities, and
    the most likely tokens there [P * A, K].

    length: slots of the temporary cache that the group is computed in, at least its longest prompt. alternatives: K;
    at 0 there is None in their place.
    """
    model = _with_adapters(nnx.merge(graphdef, params), prompts.adapter_P, rows)
    tokens_PS, slots_PA = prompts.tokens_PS, prompts.slots_PA
    answers = slots_PA.shape[1]
    real_PS = tokens_PS >= 0
    count_P = jnp.sum(real_PS, axis=1)
    positions_PS = jnp.broadcast_to(prompts.start + jnp.arange(tokens_PS.shape[1]), tokens_PS.shape)
    cache = model.init_cache(tokens_PS.shape[0], length)
    seen_PV = _mark_seen(tokens_PS, memory.seen_BV.shape[1])
    if prefix is not None:
        cache = store(cache, prefix.cache, slice(None))
        seen_PV |= prefix.seen_V
    hidden_PSD, cache = _forward(model, jnp.maximum(tokens_PS, 0), positions_PS, real_PS.astype(jnp.int32), cache)
    last_P = jnp.maximum(count_P - 1, 0)
    hidden_PD = jnp.take_along_axis(hidden_PSD, last_P[:, None, None], axis=1)[:, 0]
    # Every answer of a prompt, A of them, draws its own first token. N = P * A
    logits_NV, seen_NV, ends_N = (
        jnp.repeat(x, answers, axis=0) for x in (model.unembed(hidden_PD), seen_PV, prompts.start + count_P)
    )
    logits_NV = _by_rows(logits_NV, rows)
    first_N, logprobs_N = choose(logits_NV, seen_NV, prompts.knobs, ends_N)
    likely = most_likely(logits_NV, prompts.knobs, alternatives) if alternatives else None
    seen_NV = _also_seen(seen_NV, first_N)
    filled = memory.cache
    for answer in range(answers):
        filled = store(filled, cache, slots_PA[:, answer])
    memory = Memory(filled, memory.seen_BV.at[slots_PA.reshape(-1)].set(seen_NV, mode="drop"))
    return _shard(memory, rows), *_replicate((first_N, logprobs_N, likely), rows)


@functools.partial(jax.jit, static_argnames=("graphdef", "rows", "alternatives"), donate_argnames="memory")
@_on_mesh
def decode(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    memory: Memory,
    rows_now: Rows,
    stop_ids: jax.Array,
    most_steps: jax.Array,
    idle_enough: jax.Array,
    *,
    rows: NamedSharding | None,
    alternatives: int = 0,
) -> tuple[Memory, jax.Array, jax.Array, Alternatives | None]:
    """Up to most_steps (<= RUN) tokens for each row: tokens [B, RUN], -1 for none, their log-probabilities, and the
    most likely tokens at each step [B, RUN, K].

    Returns early when all rows are idle, or when idle_enough of them are, so that waiting prompts get in.
    stop_ids: int32, padded with -1. alternatives: as for `prefill`.
    """
    model = _with_adapters(nnx.merge(graphdef, params), rows_now.adapter_B, rows)
    slots = rows_now.token_B.shape[0]

    def go_on(carry):
        step, _, state, *_ = carry
        busy = jnp.sum(state.left_B > 0)
        return (step < most_steps) & (busy > 0) & ((step == 0) | (slots - busy < idle_enough))

    def body(carry):
        step, memory, state, tokens_BC, logprobs_BC, likely = carry
        # Without this the layers would have their rows split as those of `choose` are, and gather them in each layer.
        token_B, position_B, active_B = _rows_only((state.token_B, state.position_B, state.left_B > 0), rows)
        segments_B1 = active_B.astype(jnp.int32)[:, None]
        hidden_B1D, cache = _forward(model, token_B[:, None], position_B[:, None], segments_B1, memory.cache)
        logits_BV = _by_rows(model.unembed(hidden_B1D[:, 0]), rows)
        position_B = state.position_B + 1
        chosen_B, logprob_B = choose(logits_BV, memory.seen_BV, state.knobs, position_B)
        seen_BV = _also_seen(memory.seen_BV, chosen_B)
        stopped_B = jnp.any(chosen_B[:, None] == stop_ids, axis=1)
        state = state._replace(
            token_B=jnp.where(active_B, chosen_B, state.token_B),
            position_B=jnp.where(active_B, position_B, state.position_B),
            left_B=jnp.where(active_B & ~stopped_B, state.left_B - 1, 0),
        )
        tokens_BC = tokens_BC.at[:, step].set(jnp.where(active_B, chosen_B, -1))
        logprobs_BC = logprobs_BC.at[:, step].set(logprob_B)
        if alternatives:
            now = most_likely(logits_BV, state.knobs, alternatives)
            likely = jax.tree.map(lambda all_BCK, now_BK: all_BCK.at[:, step].set(now_BK), likely, now)
        return step + 1, _shard(Memory(cache, seen_BV), rows), state, tokens_BC, logprobs_BC, likely

    tokens_BC, likely = jnp.full((slots, RUN), -1, jnp.int32), None
    if alternatives:
        shape = (slots, RUN, alternatives)
        likely = Alternatives(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    start = (jnp.int32(0), memory, rows_now, tokens_BC, jnp.zeros((slots, RUN), jnp.float32), likely)
    _, memory, _, tokens_BC, logprobs_BC, likely = jax.lax.while_loop(go_on, body, start)
    return _shard(memory, rows), *_replicate((tokens_BC, logprobs_BC, likely), rows)


def _with_adapters(model: Decoder, adapter_B: jax.Array | None, rows: NamedSharding | None) -> Decoder:
    """The model, which knows the number of each row's adapter if rows have adapters of their own."""
    if adapter_B is not None:
        model.shared = RowNumbers(_rows_only(adapter_B, rows))
    return model


def _forward(
    model: Decoder, tokens_BS: jax.Array, positions_BS: jax.Array | None, segments_BS: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Hidden vectors, and the cache with the new tokens in it."""
    hidden_BSD, updated = model(tokens_BS, positions_BS, segments_BS, cache)
    if updated is None:
        raise TypeError(f"{type(model).__name__} returns no cache, although it was given one")
    return hidden_BSD, updated


def shardings_of(memory: Memory, rows: NamedSharding) -> Memory:
    """The sharding of every array of a memory: rows over the batch axes, and heads over the tensor axis if it divides
    them.

    memory: may hold ShapeDtypeStructs. rows: the sharding of [B, ...] arrays.
    """
    mesh = rows.mesh

    def by(heads: int | None) -> jax.Array:
        even = heads is not None and "tensor" in mesh.shape and heads % mesh.shape["tensor"] == 0
        return cast(jax.Array, NamedSharding(mesh, P(None, *rows.spec, "tensor" if even else None)))

    def split(part: MixerCache | None) -> MixerCache | None:
        if isinstance(part, StateCache):
            return StateCache(by(part.state_RBNXY.shape[2]), by(None), cast(jax.Array, rows))
        if part is None:
            return None
        return LayerCache(by(part.k_RBKHT.shape[2]), by(part.v_RBKTH.shape[2]), cast(jax.Array, rows))

    seen = cast(jax.Array, _all_rows(memory.seen_BV, rows))
    return Memory(tuple(map(split, memory.cache)), seen)


def _shard(memory: Memory, rows: NamedSharding | None) -> Memory:
    """The memory in the layout of `shardings_of`.

    The layout is the same after every function: with another one the next call would be compiled anew.
    """
    return memory if rows is None else jax.lax.with_sharding_constraint(memory, shardings_of(memory, rows))


def _replicate(results: Arrays, rows: NamedSharding | None) -> Arrays:
    """The results on every device, so that every process can read them."""
    return results if rows is None else jax.lax.with_sharding_constraint(results, NamedSharding(rows.mesh, P()))


def _by_rows(logits_BV: jax.Array, rows: NamedSharding | None) -> jax.Array:
    """Logits, of which the tensor axis splits the vocabulary, split over it by rows: each device has whole rows, and
    chooses the tokens of no others.
    """
    if rows is None:
        return logits_BV
    put, mesh = jax.lax.with_sharding_constraint, rows.mesh
    tensor = "tensor" if logits_BV.shape[1] % mesh.shape.get("tensor", 1) == 0 else None
    # Without the first constraint the second would reach back into the layers, which would then exchange more.
    logits_BV = put(logits_BV, NamedSharding(mesh, P(*rows.spec, tensor if "tensor" in mesh.shape else None)))
    return put(logits_BV, _all_rows(logits_BV, rows))


def _all_rows(x_BV: jax.Array, rows: NamedSharding) -> NamedSharding:
    """Rows over all axes, if they divide them; otherwise over the batch axes."""
    return rows if len(x_BV) % rows.mesh.size else NamedSharding(rows.mesh, P(rows.mesh.axis_names))


def _rows_only(arrays: Arrays, rows: NamedSharding | None) -> Arrays:
    """Arrays [B, ...] with rows over the batch axes."""
    return arrays if rows is None else jax.lax.with_sharding_constraint(arrays, rows)


def _also_seen(seen_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    return jax.vmap(lambda seen_V, token: seen_V.at[token].set(True))(seen_BV, tokens_B)


def _mark_seen(tokens_PS: jax.Array, vocab: int) -> jax.Array:
    rows_P1 = jnp.arange(tokens_PS.shape[0])[:, None]
    # Padding is moved out of range, so that it is dropped: -1 itself would mean the last token.
    columns_PS = jnp.where(tokens_PS >= 0, tokens_PS, vocab)
    return jnp.zeros((tokens_PS.shape[0], vocab), bool).at[rows_P1, columns_PS].set(True, mode="drop")
