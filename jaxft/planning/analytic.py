"""Memory, work and traffic of a step by arithmetic, where nothing is compiled: GPUs, and sieving in a search.

An estimate: it knows what must be kept and moved, not what a compiler makes of it.
"""

# B batch, S sequence, D model, L layers

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxft.config import RunConfig
from jaxft.planning.compile import Memory
from jaxft.planning.costs import Costs, Transfer, Work
from jaxft.planning.sizes import ModelSizes

BYTES = {"bfloat16": 2, "float32": 4}
# Of a quantised weight, its share of the scales included.
QUANTISED = {"nf4": 0.5 + 4 / 64, "nf4-dq": 0.5 + 1 / 64 + 4 / 64 / 256, "int8": 1.0, "int4": 0.5 + 4 / 64}
CHUNK = 2**28  # bytes of float32 logits that the loss holds at once on an accelerator


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a step is cut over devices. tokens: of one device in one micro-batch. weights: parts of each weight that
    gathering joins. tensor, replicas: ways of the tensor axis, and devices that hold the same part.
    """

    tokens: int
    micro_batches: int
    weights: int
    tensor: int
    replicas: int


def cut_of(config: RunConfig, axes: Mapping[str, int]) -> Cut:
    """The cut that a mesh makes of a run's batch."""
    rows = math.prod(axes.get(axis, 1) for axis in ("slice", "data", "fsdp", "expert"))
    tokens = config.train.batch_size * config.data.max_length // config.train.accumulation_steps
    return Cut(
        tokens=tokens // rows // axes.get("context", 1),
        micro_batches=config.train.accumulation_steps,
        weights=math.prod(axes.get(axis, 1) for axis in ("fsdp", "expert", "context")),
        tensor=axes.get("tensor", 1),
        replicas=axes.get("slice", 1) * axes.get("data", 1),
    )


def memory_of(config: RunConfig, sizes: ModelSizes, cut: Cut, arguments: int) -> Memory:
    """Bytes of one device. arguments: of its part of the state and the batch, which is known exactly."""
    whole = config.adapter.kind == "none"
    compute = BYTES[config.model.dtype]
    stream = cut.tokens * sizes.width * compute // cut.tensor
    outputs = cut.tokens * sizes.outputs * compute // cut.tensor
    heads = sum(look.layers * look.heads * look.head_dim for look in sizes.attention)
    kept = {
        "full": sizes.layers * stream,
        "offload": 2 * stream,
        "attention": sizes.layers * stream + cut.tokens * heads * compute // cut.tensor,
        "dots": sizes.layers * stream + outputs,
        "none": 4 * sizes.layers * stream + 2 * outputs,
    }[config.model.remat]
    # Gradients, and their float32 sum where micro-batches add up.
    each = BYTES[config.train.gradient_dtype or config.model.dtype] + (4 if cut.micro_batches > 1 else 0)
    gradients = each * sizes.moving // (cut.weights * cut.tensor)
    layer = sizes.active // max(1, sizes.layers)
    # One layer's weights gathered, the next one's on their way, and its gradient before it is cut.
    gathered = (3 if whole else 2) * layer * compute // cut.tensor if cut.weights > 1 else 0
    # Forward results of one layer and their gradients.
    layer_work = 2 * outputs // max(1, sizes.layers) + 6 * stream
    logits = 3 * min(CHUNK, cut.tokens * sizes.vocab * 4 // cut.tensor)
    temporaries = kept + gradients + gathered + layer_work + logits
    return Memory(arguments=arguments, outputs=0, aliased=0, temporaries=temporaries, code=2**24)


def costs_of(config: RunConfig, sizes: ModelSizes, cut: Cut, arguments: int, model_flops: int) -> Costs:
    """Work and traffic of one step. model_flops: one device's."""
    # Recomputing the forward pass adds its two FLOPs to the two, four or six.
    times = 1 + (sizes.reached + sizes.trained) / max(1, sizes.active)
    forward = model_flops / times
    again = {"full": 0.94, "offload": 0.94, "attention": 0.9, "dots": 0.02, "none": 0.0}[config.model.remat]
    flops = int(model_flops + again * forward)
    compute = BYTES[config.model.dtype]
    stored = int(sizes.active * QUANTISED.get(config.model.quantization, compute)) // cut.tensor
    passes = (3 if again > 0.5 else 2) * cut.micro_batches
    touched = cut.tokens * cut.micro_batches * (sizes.outputs + 8 * sizes.layers * sizes.width) * compute // cut.tensor
    costs = Costs()
    costs.work[Work(flops, passes * stored + 4 * touched)] += 1
    costs.work[Work(0, 2 * arguments)] += 1  # the optimizer reads and writes the state
    if cut.weights > 1:
        share = (cut.weights - 1) / cut.weights
        # Weights are gathered for the forward and the backward pass; gradients are reduced.
        costs.transfers[Transfer("all-gather", ("fsdp",), int(stored * share))] += 2 * cut.micro_batches
        if sizes.trained:
            moved = sizes.trained * compute // cut.tensor
            costs.transfers[Transfer("reduce-scatter", ("fsdp",), int(moved * share))] += cut.micro_batches
    if cut.tensor > 1:
        stream = cut.tokens * sizes.width * compute
        share = (cut.tensor - 1) / cut.tensor
        costs.transfers[Transfer("all-gather", ("tensor",), int(stream * share))] += (
            8 * sizes.layers * cut.micro_batches
        )
    if cut.replicas > 1:
        trained = 4 * sizes.moving // (cut.weights * cut.tensor)
        costs.transfers[Transfer("all-reduce", ("data",), 2 * trained)] += 1
    return costs
