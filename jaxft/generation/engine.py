"""Continuous batching: a fixed number of slots; a finished row's slot goes to the next waiting prompt."""

# B slots, P prompts of a group, S tokens

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import cast

import jax
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.generation import steps
from jaxft.generation.buckets import bucket, power_of_two
from jaxft.generation.conversation_cache import ConversationCache
from jaxft.generation.layout import for_decoding, mesh_of
from jaxft.generation.sampling import Knobs
from jaxft.generation.settings import FinishReason, Sampling
from jaxft.nn.decoder import Decoder
from jaxft.nn.partition import AXES

# Called with (row, token, logprob) for every token, a row's own in order; True ends the row.
OnToken = Callable[[int, int, float], bool | None]
OnEnd = Callable[["Request"], None]
STREAM_RUN = 4  # decoding steps between two rounds of callbacks
MIN_SPARED = 512  # a common prefix is computed once for all prompts if that spares at least this many tokens


@dataclass
class Request:
    """One prompt and its answer so far.

    row: its index in the call. stream: of its random numbers. tempered: whether its log-probabilities are those under
    the temperature of sampling.
    """

    row: int
    prompt: tuple[int, ...]
    sampling: Sampling
    stream: int = 0
    tempered: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, token: int, logprob: float, stop_ids: Collection[int], on_token: OnToken | None) -> None:
        """Adds a token, and sets finish_reason if it was the last one."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        ended_by_caller = on_token is not None and bool(on_token(self.row, token, logprob))
        if ended_by_caller or token in stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.sampling.max_new_tokens:
            self.finish_reason = "length"


@dataclass
class Engine:
    """The state of one call: the arrays on the devices, and the request in each slot."""

    graphdef: nnx.GraphDef[Decoder]
    params: nnx.State
    vocab: int
    stop_ids: frozenset[int]
    rows: NamedSharding | None
    memory: steps.Memory
    slots: list[Request | None]
    group: int  # prompts prefilled together
    answers: int  # most answers to a prompt that are prefilled at once
    prefix: steps.Prefix | None
    prefix_tokens: int
    prefix_length: int  # of its cache; caches it is copied into are at least as long
    length: int  # of the memory
    on_end: OnEnd | None = None  # called with every request that has its finish_reason

    def run(self, requests: Sequence[Request], on_token: OnToken | None) -> None:
        """Works until every request has its finish_reason."""
        # Sorted by length, so that a group prefilled together needs little padding; the longest come first, so that
        # a call that does not fit into memory fails at once.
        waiting = deque(sorted(self._bundles(requests), key=lambda bundle: -len(bundle[0].prompt)))
        while waiting or any(self.slots):
            while waiting and self.slots.count(None) >= min(self.group, len(waiting)) * self.answers:
                self._prefill([waiting.popleft() for _ in range(min(self.group, len(waiting)))], on_token)
            if not waiting:
                self.prefix = None  # its memory is free for decoding
            if any(self.slots):
                self._decode(min(self.group, len(waiting)) * self.answers or len(self.slots), on_token)

    def _bundles(self, requests: Sequence[Request]) -> list[list[Request]]:
        """The requests, those of the same prompt that follow each other together, at most `answers` of them."""
        bundles: list[list[Request]] = []
        for request in requests:
            same = bundles and len(bundles[-1]) < self.answers and bundles[-1][0].prompt == request.prompt
            if self.answers > 1 and same:
                bundles[-1].append(request)
            else:
                bundles.append([request])
        return bundles

    def save_cache(self, request: Request, cache: ConversationCache) -> None:
        """Gives the KV cache of a single request to a later call. The engine cannot be used after it."""
        # The newest token is not in the cache yet.
        tokens = [*request.prompt, *request.tokens[:-1]]
        cache.keep(self.graphdef, self.params, self.memory, tokens, self.length)

    def _prefill(self, bundles: Sequence[Sequence[Request]], on_token: OnToken | None) -> None:
        shards = multiple_of(self.rows)
        size = shards if len(bundles) <= shards else self.group
        longest = max(len(bundle[0].prompt) for bundle in bundles)
        tokens_PS = np.full((size, bucket(longest - self.prefix_tokens)), -1, np.int32)
        length = max(bucket(longest), self.prefix_length)
        free = deque(i for i, occupant in enumerate(self.slots) if occupant is None)
        slots_PA = np.full((size, self.answers), len(self.slots), np.int32)
        requests: list[Request | None] = [None] * (size * self.answers)
        for p, bundle in enumerate(bundles):
            suffix = bundle[0].prompt[self.prefix_tokens :]
            tokens_PS[p, : len(suffix)] = suffix
            for a, request in enumerate(bundle):
                slots_PA[p, a], requests[p * self.answers + a] = free.popleft(), request
        prompts = steps.Prompts(
            tokens_PS=_argument(tokens_PS, np.int32),
            start=_argument(self.prefix_tokens, np.int32),
            slots_PA=_argument(slots_PA, np.int32),
            knobs=self._knobs(requests),
        )
        self.memory, first_N, logprobs_N = steps.prefill(
            self.graphdef, self.params, self.memory, self.prefix, prompts, length=length, rows=self.rows
        )
        firsts = zip(requests, slots_PA.reshape(-1).tolist(), *jax.device_get((first_N, logprobs_N)), strict=True)
        for request, slot, token, logprob in firsts:
            if request is not None:
                self._add(slot, request, int(token), float(logprob), on_token)

    def _decode(self, idle_enough: int, on_token: OnToken | None) -> None:
        stops = sorted(self.stop_ids)
        padded = np.array(stops + [-1] * (power_of_two(max(len(stops), 8)) - len(stops)), np.int32)
        self.memory, tokens_BC, logprobs_BC = steps.decode(
            self.graphdef,
            self.params,
            self.memory,
            self._rows(),
            padded,
            np.int32(steps.RUN if on_token is None else STREAM_RUN),
            np.int32(idle_enough),
            rows=self.rows,
        )
        tokens_BC, logprobs_BC = jax.device_get((tokens_BC, logprobs_BC))
        requests = list(enumerate(self.slots))
        for step in range(steps.RUN):
            for slot, request in requests:
                # A row that its callback ended may have continued until the end of this dispatch.
                if request is not None and request.finish_reason is None and tokens_BC[slot, step] >= 0:
                    self._add(slot, request, int(tokens_BC[slot, step]), float(logprobs_BC[slot, step]), on_token)

    def _add(self, slot: int, request: Request, token: int, logprob: float, on_token: OnToken | None) -> None:
        request.add(token, logprob, self.stop_ids, on_token)
        self.slots[slot] = request if request.finish_reason is None else None
        if request.finish_reason is not None and self.on_end is not None:
            self.on_end(request)

    def _rows(self) -> steps.Rows:
        token_B, position_B, left_B = (np.zeros(len(self.slots), np.int32) for _ in range(3))
        for slot, request in enumerate(self.slots):
            if request is not None:
                token_B[slot] = request.tokens[-1]
                position_B[slot] = len(request.prompt) + len(request.tokens) - 1
                left_B[slot] = request.sampling.max_new_tokens - len(request.tokens)
        tokens, positions, left = (_argument(values_B, np.int32) for values_B in (token_B, position_B, left_B))
        return steps.Rows(tokens, positions, left, self._knobs(self.slots))

    def _knobs(self, requests: Sequence[Request | None]) -> Knobs:
        idle = Sampling(max_new_tokens=1)
        settings = [request.sampling if request is not None else idle for request in requests]
        return Knobs(
            temperature_B=_argument([s.temperature for s in settings], np.float32),
            top_k_B=_argument([min(s.top_k or self.vocab, self.vocab) for s in settings], np.int32),
            top_p_B=_argument([1.0 if s.top_p is None else s.top_p for s in settings], np.float32),
            min_p_B=_argument([s.min_p or 0.0 for s in settings], np.float32),
            penalty_B=_argument([s.repetition_penalty for s in settings], np.float32),
            seed_B=_argument([s.seed for s in settings], np.uint32),
            stream_B=_argument([request.stream if request is not None else 0 for request in requests], np.uint32),
            logprob_temperature_B=_argument(
                [r.sampling.temperature or 1.0 if r is not None and r.tempered else 1.0 for r in requests], np.float32
            ),
        )


def start(
    model: Decoder,
    requests: Sequence[Request],
    *,
    stop_ids: Collection[int],
    slots: int,
    cache: ConversationCache | None = None,
    answers: int = 1,
    length: int | None = None,
    keep_slots: bool = False,
) -> Engine:
    """An engine with memory for the requests, up to `slots` at a time, and their common prefix computed.

    cache: may hold the prefix of a single request. answers: how many requests of the same prompt follow each other;
    they are prefilled once. length: tokens of a row, if all calls are to have the same; by default, those of the
    longest request. keep_slots: whether there are `slots` slots even if there are fewer requests.
    """
    longest = length or max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
    graphdef, params = nnx.split(for_decoding(model).for_length(longest))
    rows = row_sharding(params)
    shards = multiple_of(rows)
    slots = slots_of(slots, slots if keep_slots else len(requests), shards)
    answers = min(answers, slots)
    common, prefix_length, prefix = _common_prefix([request.prompt for request in requests]), 0, None
    if cache is not None:
        prefix, common, prefix_length = cache.take(graphdef, params, requests[0].prompt, model.config.vocab_size)
    elif common:
        prefix_length = bucket(common)
        tokens_1S = np.full((1, bucket(common)), -1, np.int32)
        tokens_1S[0, :common] = requests[0].prompt[:common]
        prefix = steps.encode_prefix(graphdef, params, tokens_1S, length=prefix_length, rows=rows)
    length = max(bucket(longest), prefix_length)
    return Engine(
        graphdef=graphdef,
        params=params,
        vocab=model.config.vocab_size,
        stop_ids=frozenset(stop_ids),
        rows=rows,
        memory=steps.make_memory(graphdef, params, slots=slots, length=length, rows=rows),
        slots=[None] * slots,
        # Small enough that few slots wait for a group to gather, large enough to fill the machine.
        group=group_of(slots, shards, answers),
        answers=answers,
        prefix=prefix,
        prefix_tokens=common,
        prefix_length=prefix_length,
        length=length,
    )


def multiple_of(rows: NamedSharding | None) -> int:
    """The number of which slots are a multiple: that of the devices, over all of which tokens are chosen."""
    return 1 if rows is None else rows.num_devices


def slots_of(slots: int, requests: int, shards: int) -> int:
    """The slots that a call with up to `slots` has: not many more than requests, and as many for every shard."""
    return math.ceil(min(slots, power_of_two(requests)) / shards) * shards


def group_of(slots: int, shards: int, answers: int) -> int:
    """Prompts prefilled together: a multiple of `shards`, unless their answers would then not fit into the slots."""
    group = math.ceil(slots / 8 / answers / shards) * shards
    return group if group * answers <= slots else max(1, slots // answers)


def _argument(values: npt.ArrayLike, dtype: npt.DTypeLike) -> jax.Array:
    """A numpy array as an argument of a jitted function, which sees it as a jax.Array."""
    return cast(jax.Array, np.asarray(values, dtype))


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """The number of first tokens that all prompts share, or 0 if a separate pass for them does not pay.

    Each prompt keeps at least one token to continue from.
    """
    first, last = min(prompts), max(prompts)
    most = min(len(prompt) for prompt in prompts) - 1
    shared = next((i for i in range(most) if first[i] != last[i]), most)
    return shared if shared * (len(prompts) - 1) >= MIN_SPARED else 0


def row_sharding(params: nnx.State) -> NamedSharding | None:
    """Rows over the batch axes of the mesh that the parameters are on; None on a single device."""
    mesh = mesh_of(params)
    if mesh is None:
        return None
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in AXES["batch"] if axis in mesh.shape)))
