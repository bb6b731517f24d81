"""Continuous batching: a fixed number of slots; a finished row's slot goes to the next waiting prompt."""

# B slots, P prompts of a group, S tokens

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import jax
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.generation import steps
from jaxft.generation.buckets import bucket, power_of_two
from jaxft.generation.conversation_cache import ConversationCache
from jaxft.generation.layout import for_decoding, mesh_of
from jaxft.generation.request import Request as Request
from jaxft.generation.request import TopTokens
from jaxft.generation.sampling import Alternatives, Knobs
from jaxft.generation.settings import Sampling
from jaxft.nn.decoder import Decoder
from jaxft.nn.partition import AXES

STREAM_RUN = 4  # decoding steps between two rounds of callbacks
MIN_SPARED = 512  # a common prefix is computed once for all prompts if that spares at least this many tokens
ALTERNATIVES = (0, 5, 20)  # numbers of most likely tokens for which programs are compiled


@dataclass(kw_only=True)
class Engine:
    """The arrays on the devices, the request in each slot, and the requests that wait.

    One thread calls `step`; others may call `submit` and `cancel` meanwhile. Requests are served in the order in which
    they came.

    fixed_shapes: whether every prompt is computed in the shape that it would have alone, and as soon as a slot is free;
    then a seed gives the same tokens whatever else is generated, also where rounding depends on shapes. Otherwise
    prompts wait until a whole group of them has slots. adapters: whether rows have adapters of their own.
    """

    graphdef: nnx.GraphDef[Decoder]
    params: nnx.State
    vocab: int
    stop_ids: frozenset[int]
    rows: NamedSharding | None
    memory: steps.Memory
    slots: list[Request | None]
    group: int  # prompts prefilled together
    length: int  # of the memory
    answers: int = 1  # most answers to a prompt that are prefilled at once
    prefix: steps.Prefix | None = None
    prefix_tokens: int = 0
    prefix_length: int = 0  # of its cache; caches it is copied into are at least as long
    fixed_shapes: bool = False
    adapters: bool = False
    waiting: deque[list[Request]] = field(default_factory=deque)  # requests of one prompt together
    _submitted: deque[Request] = field(default_factory=deque, init=False)
    _cancelled: set[int] = field(default_factory=set, init=False)

    def submit(self, request: Request) -> None:
        """Puts a request behind those that wait. The next `step` sees it."""
        self._submitted.append(request)

    def cancel(self, request_id: int) -> None:
        """Ends a request, which waits or is answered, at the next `step`; nothing if it has ended."""
        self._cancelled.add(request_id)

    def step(self) -> bool:
        """Computes prompts for which slots are free, or else some tokens of every answer; one dispatch to the devices.

        False if there was nothing to do.
        """
        self._take_changes()
        if count := self._startable():
            self._prefill([self.waiting.popleft() for _ in range(count)])
            return True
        if not self.waiting:
            self.prefix = None  # its memory is free for decoding
        if any(self.slots):
            self._decode()
            return True
        return False

    def run(self, requests: Sequence[Request], between: Callable[[], None] = lambda: None) -> None:
        """Works until every request has its finish_reason. between: called before each step; it may raise."""
        # Sorted by length, so that a group prefilled together needs little padding; the longest come first, so that
        # a call that does not fit into memory fails at once.
        self.waiting.extend(sorted(self._bundles(requests), key=lambda bundle: -len(bundle[0].prompt)))
        between()
        while self.step():
            between()

    @property
    def num_waiting(self) -> int:
        """The number of requests that have no slot yet."""
        return sum(map(len, list(self.waiting))) + len(self._submitted)

    @property
    def num_running(self) -> int:
        """The number of requests that are being answered."""
        return sum(request is not None for request in self.slots)

    def save_cache(self, request: Request, cache: ConversationCache) -> None:
        """Gives the KV cache of a single request to a later call. The engine cannot be used after it."""
        # The newest token is not in the cache yet.
        tokens = [*request.prompt, *request.tokens[:-1]]
        cache.keep(self.graphdef, self.params, self.memory, tokens, self.length)

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

    def _take_changes(self) -> None:
        """Takes what was submitted and cancelled since the last step."""
        # In this order: what is cancelled was submitted before.
        cancelled = {self._cancelled.pop() for _ in range(len(self._cancelled))}
        while self._submitted:
            self.waiting.append([self._submitted.popleft()])
        if not cancelled:
            return
        everything = itertools.chain(filter(None, self.slots), *self.waiting)
        ended = [request for request in everything if request.id in cancelled]
        for request in ended:
            request.cancelled = True
        self.slots = [None if occupant is None or occupant.cancelled else occupant for occupant in self.slots]
        bundles = ([request for request in bundle if not request.cancelled] for bundle in self.waiting)
        self.waiting = deque(filter(None, bundles))
        for request in ended:
            if request.on_end is not None:
                request.on_end(request)

    def _startable(self) -> int:
        """How many of the waiting prompts are to be computed now."""
        count, free = min(self.group, len(self.waiting)), self.slots.count(None)
        if not self.fixed_shapes:
            return count if free >= count * self.answers else 0
        sizes = [bucket(len(bundle[0].prompt)) for bundle in itertools.islice(self.waiting, min(count, free))]
        return next((i for i, size in enumerate(sizes) if size != sizes[0]), len(sizes))

    def _prefill(self, bundles: Sequence[Sequence[Request]]) -> None:
        longest = max(len(bundle[0].prompt) for bundle in bundles)
        free = deque(i for i, occupant in enumerate(self.slots) if occupant is None)
        rows = self._prefill_rows(len(bundles))
        tokens_PS = np.full((rows, bucket(longest - self.prefix_tokens)), -1, np.int32)
        slots_PA = np.full((rows, self.answers), len(self.slots), np.int32)
        requests: list[Request | None] = [None] * slots_PA.size
        for p, bundle in enumerate(bundles):
            suffix = bundle[0].prompt[self.prefix_tokens :]
            tokens_PS[p, : len(suffix)] = suffix
            for a, request in enumerate(bundle):
                slots_PA[p, a], requests[p * self.answers + a] = free.popleft(), request
        results = self._dispatch_prefill(tokens_PS, slots_PA, requests, max(bucket(longest), self.prefix_length))
        for number, slot in enumerate(slots_PA.reshape(-1).tolist()):
            if (occupant := requests[number]) is not None:
                self._add(slot, occupant, results, number)

    def _prefill_rows(self, prompts: int) -> int:
        """The rows of the group in which this many prompts are computed."""
        shards = multiple_of(self.rows)
        return shards if prompts <= shards and not self.fixed_shapes else self.group

    def _dispatch_prefill(
        self,
        tokens_PS: npt.NDArray[np.int32],
        slots_PA: npt.NDArray[np.int32],
        requests: Sequence[Request | None],
        length: int,
    ) -> "_Results":
        prompts = steps.Prompts(
            tokens_PS=_argument(tokens_PS, np.int32),
            start=_argument(self.prefix_tokens, np.int32),
            slots_PA=_argument(slots_PA, np.int32),
            knobs=self._knobs(requests),
            adapter_P=self._adapters(requests[:: self.answers]),
        )
        self.memory, *results = steps.prefill(
            self.graphdef,
            self.params,
            self.memory,
            self.prefix,
            prompts,
            length=length,
            rows=self.rows,
            alternatives=_compiled_alternatives(requests),
        )
        return _Results(*jax.device_get(results))

    def _decode(self) -> None:
        results = self._dispatch_decode()
        requests = list(enumerate(self.slots))
        for step in range(steps.RUN):
            for slot, request in requests:
                # A row that its callback ended may have continued until the end of this dispatch.
                if request is not None and not request.ended and results.tokens[slot, step] >= 0:
                    self._add(slot, request, results, (slot, step))

    def _dispatch_decode(self) -> "_Results":
        stops = sorted(self.stop_ids)
        padded = np.array(stops + [-1] * (power_of_two(max(len(stops), 8)) - len(stops)), np.int32)
        streamed = any(request is not None and request.on_token is not None for request in self.slots)
        self.memory, *results = steps.decode(
            self.graphdef,
            self.params,
            self.memory,
            self._rows(),
            padded,
            np.int32(STREAM_RUN if streamed else steps.RUN),
            np.int32(self._idle_enough()),
            rows=self.rows,
            alternatives=_compiled_alternatives(self.slots),
        )
        return _Results(*jax.device_get(results))

    def _idle_enough(self) -> int:
        """The number of idle slots at which a waiting prompt can be computed."""
        if self.fixed_shapes and self.waiting:
            return 1
        return min(self.group, len(self.waiting)) * self.answers or len(self.slots)

    def _add(self, slot: int, request: Request, results: "_Results", at: int | tuple[int, int]) -> None:
        top: TopTokens = ()
        if results.likely is not None and request.alternatives:
            tokens, logprobs = (values[at].tolist() for values in results.likely)
            top = tuple(zip(tokens, logprobs, strict=True))
        request.add(int(results.tokens[at]), float(results.logprobs[at]), top, self.stop_ids)
        self.slots[slot] = None if request.ended else request
        if request.ended and request.on_end is not None:
            request.on_end(request)

    def _rows(self) -> steps.Rows:
        token_B, position_B, left_B = (np.zeros(len(self.slots), np.int32) for _ in range(3))
        for slot, request in enumerate(self.slots):
            if request is not None:
                token_B[slot] = request.tokens[-1]
                position_B[slot] = len(request.prompt) + len(request.tokens) - 1
                left_B[slot] = request.sampling.max_new_tokens - len(request.tokens)
        tokens, positions, left = (_argument(values_B, np.int32) for values_B in (token_B, position_B, left_B))
        return steps.Rows(tokens, positions, left, self._knobs(self.slots), self._adapters(self.slots))

    def _adapters(self, requests: Sequence[Request | None]) -> jax.Array | None:
        """The number of each row's adapter; None if rows have none of their own."""
        numbers = [0 if request is None else request.adapter for request in requests]
        return _argument(numbers, np.int32) if self.adapters else None

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


class _Results(NamedTuple):
    """What a dispatch has chosen, on the host; the fields are those of `steps.prefill` and `steps.decode`."""

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    likely: Alternatives | None


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
        length=length,
        answers=answers,
        prefix=prefix,
        prefix_tokens=common,
        prefix_length=prefix_length,
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


def _compiled_alternatives(requests: Sequence[Request | None]) -> int:
    """The smallest number of alternatives that is compiled and is enough for all requests."""
    wanted = max((request.alternatives for request in requests if request is not None), default=0)
    return next(count for count in ALTERNATIVES if count >= wanted)


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
