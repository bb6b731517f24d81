"""Memory, work and traffic of a step by arithmetic, where nothing is compiled: GPUs, and sieving in a search.

An estimate: it knows what must be kept and moved, not what a compiler makes of it.
"""

# B batch, S sequence, D model, L layers

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from jaxft.config import RunConfig
from jaxft.hardware.compile import Memory
from jaxft.hardware.costs import Costs, Transfer, Work
from jaxft.hardware.sizes import AttentionGroup, ModelSizes
from jaxft.nn.partition import AXES

BYTES = {"bfloat16": 2, "float32": 4}
# Of a quantised weight, its share of the scales included.
QUANTIZED = {"nf4": 0.5 + 4 / 64, "nf4-dq": 0.5 + 1 / 64 + 4 / 64 / 256, "int8": 1.0, "int4": 0.5 + 4 / 64}
CHUNK = 2**28  # bytes of float32 logits that the loss holds at once on an accelerator
# Axes along which a device gathers a weight; and those of experts, of which it has its own.
GATHERED, OF_EXPERTS = AXES["weight"], (*AXES["expert_weight"], "tensor")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a step is cut over devices. axes: size of each mesh axis. tokens: of one device in one micro-batch.
    length: of a row. kernel: whether attention runs in the TPU's kernel, which never holds a mask.
    """

    axes: Mapping[str, int]
    tokens: int
    micro_batches: int
    length: int
    kernel: bool

    def ways(self, *names: str) -> int:
        """Devices along these axes together."""
        return math.prod(self.axes.get(name, 1) for name in names)

    @property
    def weights(self) -> int:
        """Parts of each weight that gathering joins."""
        return self.ways(*GATHERED)

    @property
    def tensor(self) -> int:
        """Ways of the tensor axis."""
        return self.ways("tensor")


def cut_of(config: RunConfig, axes: Mapping[str, int], *, kernel: bool) -> Cut:
    """The cut that a mesh makes of a run's batch."""
    rows = math.prod(axes.get(axis, 1) for axis in AXES["batch"])
    tokens = config.train.batch_size * config.data.max_length // config.train.accumulation_steps
    return Cut(
        axes=axes,
        tokens=tokens // rows // axes.get("context", 1),
        micro_batches=config.train.accumulation_steps,
        length=config.data.max_length,
        kernel=kernel,
    )


def memory_of(config: RunConfig, sizes: ModelSizes, cut: Cut, arguments: int) -> Memory:
    """Bytes of one device. arguments: of its part of the state and the batch, which is known exactly."""
    whole = config.adapter.kind == "none"
    compute = BYTES[config.model.dtype]
    stream = cut.tokens * sizes.width * compute // cut.tensor
    outputs = cut.tokens * _outputs(sizes, cut) * compute // cut.tensor
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
    # One layer's weights gathered, the next one's on their way, and its gradient before it is cut.
    layer = sum(size for size, ways, _ in _matrices(sizes, cut) if ways > 1) // max(1, sizes.layers)
    gathered = (3 if whole else 2) * layer * compute
    # Forward results of one layer and their gradients.
    layer_work = 2 * outputs // max(1, sizes.layers) + 6 * stream
    logits = 3 * min(CHUNK, cut.tokens * sizes.vocab * 4 // cut.tensor)
    temporaries = kept + gradients + gathered + layer_work + logits + _row_work(sizes, cut, compute)
    host = sizes.layers * stream if config.model.remat == "offload" else 0
    return Memory(arguments=arguments, outputs=0, aliased=0, temporaries=temporaries, code=2**24, host=host)


def _matrices(sizes: ModelSizes, cut: Cut) -> list[tuple[int, int, tuple[str, ...]]]:
    """(numbers that one device multiplies with, parts that it gathers them from, along which axes) of all matrices.

    The tensor axis splits matrices; those of experts it shares out like the other axes, since experts are whole where
    their tokens are. The expert axis shares out matrices of other layers, while a device keeps to its own experts.
    """
    experts = 0 if sizes.experts is None else sizes.experts.parameters // cut.ways("expert")
    others = sizes.active - (0 if sizes.experts is None else sizes.experts.active)
    return [
        (size, cut.ways(*names), tuple(name for name in names if cut.ways(name) > 1))
        for size, names in ((others // cut.tensor, GATHERED), (experts, OF_EXPERTS))
        if size
    ]


def _outputs(sizes: ModelSizes, cut: Cut) -> int:
    """Widths of all matrix products for one token; those of experts for all rows that their buffer has room for."""
    if sizes.experts is None:
        return sizes.outputs
    return sizes.outputs + int(sizes.experts.outputs * (1 / filled_share(sizes, cut.ways("expert")) - 1))


def filled_share(sizes: ModelSizes, shards: int) -> float:
    """Share of the experts' buffer of rows that is filled where tokens choose evenly. See `nn/experts/sharded`."""
    if sizes.experts is None or shards == 1:
        return 1.0
    chosen, count = sizes.experts.chosen, sizes.experts.count
    return chosen / (shards * min(chosen, count // shards))


def _row_work(sizes: ModelSizes, cut: Cut, compute: int) -> int:
    """Bytes of what a device holds of whole rows, in the layer that it works on: keys and values, and a mask."""
    context = cut.ways("context")
    held = 0 if context == 1 else 4 * max(_keys(look, cut) for look in sizes.attention) * compute
    # The GPU's kernel takes the mask as a number for each score of all heads together, and gives back its gradient.
    return held + (0 if cut.kernel else 3 * cut.tokens * cut.length * compute)


def _keys(look: AttentionGroup, cut: Cut) -> int:
    """Numbers in the keys, or in the values, of whole rows in one layer."""
    return cut.tokens * cut.ways("context") * look.head_dim * -(-look.kv_heads // cut.tensor)


def costs_of(config: RunConfig, sizes: ModelSizes, cut: Cut, arguments: int, model_flops: int) -> Costs:
    """Work and traffic of one step. model_flops: one device's."""
    again = {"full": 0.94, "offload": 0.94, "attention": 0.9, "dots": 0.02, "none": 0.0}[config.model.remat]
    compute = BYTES[config.model.dtype]
    each = QUANTIZED.get(config.model.quantization, compute)
    read = int(sum(size for size, _, _ in _matrices(sizes, cut)) * each)
    passes = (3 if again > 0.5 else 2) * cut.micro_batches
    touched = cut.tokens * cut.micro_batches * (sizes.outputs + 8 * sizes.layers * sizes.width) * compute // cut.tensor
    costs = Costs()
    costs.work[Work(_flops(config, sizes, cut, model_flops, again), passes * read + 4 * touched)] += 1
    costs.work[Work(0, 2 * arguments)] += 1  # the optimizer reads and writes the state
    if config.model.remat == "offload":
        stream = cut.tokens * sizes.width * compute // cut.tensor
        costs.host_bytes = 2 * sizes.layers * stream * cut.micro_batches
    trained = sizes.trained / max(1, sizes.active)
    for size, ways, axes in _matrices(sizes, cut):
        if ways > 1:
            # Weights are gathered for the forward and the backward pass; gradients are reduced.
            share = (ways - 1) / ways
            costs.transfers[Transfer("all-gather", axes, int(size * each * share))] += 2 * cut.micro_batches
            if sizes.trained:
                moved = int(size * trained * compute * share)
                costs.transfers[Transfer("reduce-scatter", axes, moved)] += cut.micro_batches
    for transfer, times in _of_tokens(sizes, cut, compute, recomputed=again > 0.5).items():
        costs.transfers[transfer] += times * cut.micro_batches
    replicas = cut.ways(*AXES["replica"])
    if replicas > 1:
        moved = 4 * sizes.moving // (cut.weights * cut.tensor)
        axes = tuple(axis for axis in AXES["replica"] if cut.ways(axis) > 1)
        costs.transfers[Transfer("all-reduce", axes, 2 * moved)] += 1
    return costs


def _flops(config: RunConfig, sizes: ModelSizes, cut: Cut, model_flops: int, again: float) -> int:
    """What is multiplied: the model's own products, and what is computed again."""
    attention = {
        parts: sizes.attention_flops(config.train.batch_size, cut.length, parts=parts) // math.prod(cut.axes.values())
        for parts in (1, cut.ways("context"))
    }
    last = attention[cut.ways("context")]
    flops = model_flops + last - attention[1]
    # Recomputing the forward pass adds its two FLOPs to the two, four or six.
    times = 1 + (sizes.reached + sizes.trained) / max(1, sizes.active)
    # Of attention's three parts two are backward, where kernels compute scores again: the TPU's two do so twice.
    scores = last * 2 / 3 * (0.75 if cut.kernel else 0.25)
    return int(flops + again * flops / times + scores)


def _of_tokens(sizes: ModelSizes, cut: Cut, compute: int, *, recomputed: bool) -> dict[Transfer, int]:
    """What a micro-batch sends of its tokens, and how often."""
    out: Counter[Transfer] = Counter()
    tensor, context, places = (cut.ways(axis) for axis in ("tensor", "context", "expert"))
    stream = cut.tokens * sizes.width
    forward = 2 if recomputed else 1
    if tensor > 1:
        moved = int(stream * compute * (tensor - 1) / tensor)
        out[Transfer("all-gather", ("tensor",), moved)] += 8 * sizes.layers
    if context > 1:
        # Keys and values of whole rows; their gradients are added up and cut.
        for look in sizes.attention:
            moved = int(2 * _keys(look, cut) * compute * (context - 1) / context)
            out[Transfer("all-gather", ("context",), moved)] += forward * look.layers
            out[Transfer("reduce-scatter", ("context",), moved)] += look.reached
    if sizes.experts is not None and places > 1:
        # Rows go to all places in the type of computation, answers come back in float32; gradients the other way.
        rows = stream // tensor * (places - 1)
        out[Transfer("all-gather", ("expert",), rows * compute)] += forward * sizes.layers
        out[Transfer("reduce-scatter", ("expert",), rows * 4)] += sizes.layers
        out[Transfer("all-gather", ("expert",), rows * 4)] += sizes.layers
        out[Transfer("reduce-scatter", ("expert",), rows * compute)] += sizes.layers
    return out
