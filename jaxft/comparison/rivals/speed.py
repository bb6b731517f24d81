"""What calls of a model on this machine take: seconds, alone and side by side, and memory."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jaxft.generation.engine import MIN_SPARED
from jaxft.generation.tokens import OnToken
from jaxft.hardware.sizes import sizes_of
from jaxft.nn.decoder import Decoder

ALONE, MEASURED = 3, 8  # answers that are timed one at a time, and side by side
TIMED = 2  # times that each call is timed: what else the machine does can only slow a call, so the fastest counts
LEAST_PREFIX = 32  # tokens of a prefix whose time is told apart

# Answers prompts with so many slots; the callback sees every token, and may end a row.
Answer = Callable[[Sequence[Sequence[int]], int, OnToken | None], Any]


def shared(prompts: Sequence[Sequence[int]]) -> int:
    """The number of first tokens that all prompts share."""
    as_lists = [list(prompt) for prompt in prompts]
    first, last = min(as_lists), max(as_lists)
    most = min(len(prompt) for prompt in prompts) - 1
    return next((index for index in range(most) if first[index] != last[index]), most)


def call_seconds(
    answer: Answer, prompts: Sequence[Sequence[int]], slots: int, between: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Seconds of a call: of each the fastest of `TIMED`, after one of the same shape that compiles.

    prompts: up to `MEASURED` are used. `seconds_to_first`, `seconds_alone`: medians of `ALONE` calls.
    `seconds_side_by_side`: a call of as many as there are slots, if every prompt is computed as a whole;
    `seconds_cached`: if what all prompts share is computed already. One of the two is measured, as generation shares a
    prefix or not, and `seconds_of_prefix`, which is the difference of a call. between: called before each call; it may
    raise.
    """
    used = [list(prompt) for prompt in prompts[:MEASURED]]
    prefix = used[0][: shared(used)] if len(used) > 1 else []

    def seconds(batch: Sequence[Sequence[int]], at_once: int) -> float:
        between()
        began = time.perf_counter()
        answer(batch, at_once, None)
        return time.perf_counter() - began

    def first(prompt: Sequence[int]) -> float | None:
        seen: list[float] = []

        def ends(row: int, token: int, logprob: float) -> bool:
            seen.append(time.perf_counter())
            return True

        between()
        began = time.perf_counter()
        answer([prompt], 1, ends)
        return seen[0] - began if seen else None

    def fastest(call: Callable[..., float | None], *arguments: Any) -> float | None:
        call(*arguments)
        times = [call(*arguments) for _ in range(TIMED)]
        return min((one for one in times if one is not None), default=None)

    alone = [fastest(seconds, [prompt], 1) for prompt in used[:ALONE]]
    firsts = [fastest(first, prompt) for prompt in used[:ALONE]]
    of_prefix = fastest(first, prefix) if len(prefix) >= LEAST_PREFIX else 0.0
    batch_seconds = fastest(seconds, used, slots)
    return {
        "seconds_to_first": _median(firsts),
        "seconds_alone": _median(alone),
        **_with_and_without(batch_seconds or 0.0, of_prefix or 0.0, len(used), len(prefix)),
        "slots": slots,
    }


def _with_and_without(batch_seconds: float, of_prefix: float, calls: int, prefix: int) -> dict[str, float | None]:
    """Seconds of one of several calls with and without a cached prefix, of which one was measured.

    With one they are None if the prefix alone took longer than a call, which only noise explains.
    """
    shares = prefix * (calls - 1) >= MIN_SPARED  # as the engine decides; it then computed the prefix once
    without = (batch_seconds + (calls - 1) * of_prefix if shares else batch_seconds) / calls
    return {
        "seconds_side_by_side": round(without, 4),
        "seconds_cached": round(without - of_prefix, 4) if of_prefix < without else None,
        "seconds_of_prefix": round(of_prefix, 4),
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return round(known[len(known) // 2], 4) if known else None


def memory(module: Decoder, slots: int, length: int) -> dict[str, Any]:
    """What a model of this shape needs: numbers of parameters, and bytes.

    `parameters`: all, adapters among them; `active_parameters`: those that multiply a token. `cache_bytes_per_token`:
    of one row; `cache_item_bytes`: of a number of it. `memory_bytes`: of the weights as they are and the cache of
    `slots` rows of `length` tokens, the least that the calls need at their peak: activations come on top. `memory_by`:
    `arithmetic`; where devices say their peak, that takes the place of both.
    """
    sizes = sizes_of(module)
    weights = sum(array.nbytes for array in jax.tree.leaves(nnx.split(module)[1]))
    one, two = (_cache_bytes(module, 1, tokens) for tokens in (length, 2 * length))
    largest = max(_cache(module, 1, length), key=lambda leaf: leaf.size)
    return {
        "parameters": sizes.parameters + sizes.adapter,
        "active_parameters": sizes.active + sizes.adapter,
        "cache_bytes_per_token": math.ceil((two - one) / length),
        "cache_item_bytes": largest.dtype.itemsize,
        "memory_bytes": weights + _cache_bytes(module, slots, length),
        "memory_by": "arithmetic",
    }


def _cache_bytes(module: Decoder, slots: int, length: int) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in _cache(module, slots, length))


def _cache(module: Decoder, slots: int, length: int) -> list[jax.ShapeDtypeStruct]:
    return jax.tree.leaves(jax.eval_shape(lambda: module.init_cache(slots, length)))
