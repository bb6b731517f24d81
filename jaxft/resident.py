"""The resident engine: a model in memory that answers requests as they come, each with its own LoRA adapter or none.

Its memory is taken once: slots x length tokens of cache, and room for some adapters. `generation.engine` serves the
requests; this module loads and drops adapters between its steps.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxft.adapters.attach import detach
from jaxft.adapters.by_row import BASE, attach_rows, halves_of, not_by_row, row_bytes, write_halves
from jaxft.adapters.named import AdapterModules, take
from jaxft.adapters.saved import carried_paths, saved_paths
from jaxft.checkpoint.folders.origin import resolve
from jaxft.checkpoint.peft import open_adapter, read_adapter
from jaxft.errors import ConfigError, DataError, ModelError
from jaxft.generation import steps
from jaxft.generation.buckets import bucket
from jaxft.generation.engine import ALTERNATIVES, Engine, group_of, multiple_of, row_sharding
from jaxft.generation.layout import for_decoding, mesh_of
from jaxft.generation.request import Request
from jaxft.nn.decoder import Decoder
from jaxft.nn.virtual import virtual_ids
from jaxft.sharding.mesh import MeshPlan


class MemoryBytes(NamedTuple):
    """Bytes that an engine takes beside the weights, over all devices."""

    cache: int
    adapters: int


@dataclass(kw_only=True)
class ResidentEngine(Engine):
    """An engine that lives as long as its process.

    `submit` and `cancel` may be called by any thread; all else by the one that calls `step`. Adapters have numbers from
    1 to `num_adapters`; 0 is the base.
    """

    model: Decoder
    num_adapters: int
    _loaded: set[int] = field(default_factory=set, init=False)

    def submit(self, request: Request) -> None:
        """Puts a request behind those that wait. Virtual tokens of the model are put in front of its prompt.

        Raises DataError for a prompt that is empty, has ids outside the vocabulary or is too long for the engine with
        its max_new_tokens; ConfigError for more alternatives than there are; ModelError for an adapter that is not
        loaded.
        """
        _check(request, self.vocab, self.request_length)
        if request.adapter != BASE and request.adapter not in self._loaded:
            raise ModelError(f"request {request.id} asks for adapter {request.adapter}, which is not loaded")
        request.prompt = (*virtual_ids(self.model.virtual_tokens), *request.prompt)
        super().submit(request)

    @property
    def request_length(self) -> int:
        """Most tokens of a request, prompt and answer."""
        return min(self.length, self.model.config.max_position_embeddings) - self.model.virtual_tokens

    def write_adapter(self, number: int, adapter: str | AdapterModules) -> None:
        """Loads an adapter under a number from 1 to num_adapters; one that had it before is gone.

        adapter: a PEFT or run folder, or an adapter in memory. Raises ModelError for a number that is in use or is
        none of the engine's, for an adapter that is no plain LoRA on linear layers, and for one of too high a rank;
        CheckpointError for a folder whose tensors do not fit the model.
        """
        self._check_unused(number)
        modules = self._read(resolve(adapter)) if isinstance(adapter, str) else adapter
        halves = halves_of(modules)
        self._loaded.discard(number)
        write_halves(self.model, number, halves)
        self.graphdef, self.params = nnx.split(self.model)
        self._loaded.add(number)

    def clear_adapter(self, number: int) -> None:
        """Drops an adapter: requests for its number are refused. Raises ModelError as `write_adapter` does."""
        self._check_unused(number)
        self._loaded.discard(number)

    def uses_of(self, number: int) -> int:
        """The number of requests, waiting or running, that have this adapter."""
        requests = [*filter(None, self.slots), *self._submitted, *(one for bundle in self.waiting for one in bundle)]
        return sum(request.adapter == number for request in requests)

    def compile(self, longest: int | None = None) -> None:
        """Compiles the programs for prompts of up to `longest` tokens, by default of any length, and for their answers.

        Otherwise the first request of each length waits for the compiler, and so do all others.
        """
        rows, answers = self._prefill_rows(1), self.answers
        for size in _buckets(longest or self.length):
            tokens_PS = np.full((rows, size), -1, np.int32)
            slots_PA = np.full((rows, answers), len(self.slots), np.int32)  # none of them: nothing is written
            self._dispatch_prefill(tokens_PS, slots_PA, [None] * (rows * answers), size)
        if not any(self.slots):
            self._dispatch_decode()

    def _check_unused(self, number: int) -> None:
        if not BASE < number <= self.num_adapters:
            raise ModelError(f"there is no adapter {number}: this engine has numbers 1 to {self.num_adapters}")
        if uses := self.uses_of(number):
            raise ModelError(f"adapter {number} is used by {uses} requests: wait until they end, or cancel them")

    def _read(self, folder: str) -> AdapterModules:
        base = nnx.merge(*nnx.split(self.model))
        detach(base)
        if open_adapter(folder).is_score:
            raise not_by_row("that of a reward model")
        read_adapter(base, folder)
        if saved_paths(base) + carried_paths(base):
            raise not_by_row("one with modules of the base (modules_to_save)")
        if base.token_rows is not None:
            raise not_by_row("one with rows of single tokens (trainable_token_indices)")
        return take(base)


def resident_engine(
    model: Decoder,
    *,
    stop_ids: Collection[int],
    slots: int = 8,
    length: int = 2048,
    adapters: int = 8,
    max_rank: int = 64,
) -> ResidentEngine:
    """An engine with memory for `slots` requests at a time of up to `length` tokens each, and for `adapters` adapters.

    model: the base; with adapters=0 it may have adapters of any kind, which then are those of every request. Its own
    slots stay as they are. stop_ids: tokens that end an answer and are its last token. max_rank: the highest rank of an
    adapter. Raises ConfigError for numbers below their least and a length beyond the model's positions; ModelError for
    a reward model, and as `attach_rows` does.
    """
    _check_sizes(model, slots, length, adapters)
    own = for_decoding(model).for_length(length)
    if adapters:
        attach_rows(own, count=adapters, max_rank=max_rank)
        if (mesh := mesh_of(nnx.state(own))) is not None:
            MeshPlan(mesh=mesh).shard_module(own)
    graphdef, params = nnx.split(own)
    rows = row_sharding(params)
    shards = multiple_of(rows)
    slots = math.ceil(slots / shards) * shards
    return ResidentEngine(
        graphdef=graphdef,
        params=params,
        vocab=model.config.vocab_size,
        stop_ids=frozenset(stop_ids),
        rows=rows,
        memory=steps.make_memory(graphdef, params, slots=slots, length=bucket(length), rows=rows),
        slots=[None] * slots,
        group=group_of(slots, shards, 1),
        length=length,
        fixed_shapes=True,
        adapters=adapters > 0,
        model=own,
        num_adapters=adapters,
    )


def memory_bytes(
    model: Decoder, *, slots: int = 8, length: int = 2048, adapters: int = 8, max_rank: int = 64
) -> MemoryBytes:
    """What `resident_engine` would take, before it is taken. The model may be abstract. Raises what that raises."""
    _check_sizes(model, slots, length, adapters)
    graphdef, params = nnx.split(model.for_length(length))

    def with_room() -> Decoder:
        copy = nnx.merge(graphdef, params)
        attach_rows(copy, count=adapters, max_rank=max_rank)
        return copy

    make = partial(steps.make_memory, graphdef, slots=slots, length=bucket(length), rows=None)
    leaves = jax.tree.leaves(jax.eval_shape(make, params))
    return MemoryBytes(
        sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        row_bytes(nnx.eval_shape(with_room)) if adapters else 0,
    )


def _check(request: Request, vocab: int, length: int) -> None:
    prompt, most = request.prompt, request.sampling.max_new_tokens
    if not prompt:
        raise DataError("the prompt is empty: a model continues at least one token, such as BOS")
    if min(prompt) < 0 or max(prompt) >= vocab:
        raise DataError(f"the prompt has token ids outside 0..{vocab - 1}: they come from another model's tokenizer")
    if len(prompt) + most > length:
        raise DataError(
            f"the prompt has {len(prompt)} tokens and its answer may have {most}: {len(prompt) + most} together, and "
            f"there is room for {length}. Shorten the prompt or lower max_new_tokens."
        )
    if not 0 <= request.alternatives <= ALTERNATIVES[-1]:
        raise ConfigError(f"alternatives={request.alternatives} must be 0 to {ALTERNATIVES[-1]}")


def _check_sizes(model: Decoder, slots: int, length: int, adapters: int) -> None:
    positions = model.config.max_position_embeddings
    if model.config.head == "score":
        raise ModelError("this is a reward model: it has a score head in place of the LM head, so it generates nothing")
    if slots < 1 or adapters < 0:
        raise ConfigError(f"slots={slots} must be at least 1, and adapters={adapters} at least 0")
    if not 2 <= length <= positions:
        raise ConfigError(f"length={length} must be 2 to {positions}, the model's positions")


def _buckets(longest: int) -> Iterator[int]:
    """The sizes to which prompts of up to `longest` tokens are padded."""
    size = bucket(1)
    yield size
    while size < longest:
        size = bucket(size + 1)
        yield size
