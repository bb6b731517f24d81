"""The model of an engine, its tokenizer, and the memory in which it answers."""

import os
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxft.checkpoint.load import load_model
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import ModelError
from jaxft.generation.called_tools import CallForm
from jaxft.hardware.compile_cache import keep_compiled
from jaxft.nn.decoder import Decoder
from jaxft.resident import ResidentEngine, memory_bytes, resident_engine
from jaxft.serving.engine.adapter_slots import AdapterSlot, AdapterSlots
from jaxft.serving.engine.channel import Channel
from jaxft.serving.engines.spec import EngineSpec


def load(spec: EngineSpec, channel: Channel) -> AdapterSlots:
    """Loads what the spec names, and says what it does. Raises JaxftError for what cannot be loaded."""
    keep_compiled(Path(spec.cache))
    tokenizer = load_tokenizer(spec.model, base=spec.base)
    loaded = load_model(spec.model, base=spec.base, dtype=spec.dtype, quantization=spec.quantization)
    length = min(spec.context, loaded.module.config.max_position_embeddings)
    engine = _engine(spec, loaded.module, tokenizer.stop_ids, length)
    slots = AdapterSlots(engine, AdapterSlot(0, tokenizer, CallForm.of(tokenizer)), spec.model)
    if jax.default_backend() != "cpu":  # which compiles in a moment what comes, and has long prompts to compute first
        channel.tell("phase", phase="compiling")
        engine.compile()
    channel.tell("ready", devices=_devices())
    channel.tell("phase", phase="warm")
    return slots


def _engine(spec: EngineSpec, model: Decoder, stop_ids: Collection[int], length: int) -> ResidentEngine:
    """With places for adapters, unless the model's family takes none by row."""
    make = partial(_with_slots, model, stop_ids=stop_ids, slots=spec.slots, length=length, max_rank=spec.max_rank)
    try:
        return make(adapters=spec.adapters)
    except ModelError as error:
        if not spec.adapters:
            raise
        print(f"adapters answer alone: {error}", flush=True)
    return make(adapters=0)


def _with_slots(model: Decoder, *, stop_ids: Collection[int], **sizes: int) -> ResidentEngine:
    taken = memory_bytes(model, **sizes)
    print(f"process {os.getpid()}: {taken.cache:,} bytes for answers, {taken.adapters:,} for adapters", flush=True)
    return resident_engine(model, stop_ids=stop_ids, **sizes)


def _devices() -> dict[str, Any]:
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
