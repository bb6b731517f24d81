"""Memory, work and traffic of a step by arithmetic, without compiling: for GPUs, and for the candidates of a search.

This is an estimate. It counts the data that must be kept and moved, but not the effects of a compiler.
"""

# B batch, S sequence, D model, L layers

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxft.config import RunConfig
from jaxft.hardware.compile import Memory
from jaxft.hardware.costs import Costs, Transfer, Work
from jaxft.hardware.gpu_compile import attention_workspace
from jaxft.hardware.sizes import AttentionGroup, ModelSizes
from jaxft.nn.attention.kernels.splash import balances
from jaxft.nn.experts.exchange import ROOM
from jaxft.nn.partition import AXES
from jaxft.nn.recurrent.delta_rule import CHUNK
from jaxft.objectives.vocabulary import CHUNK_BYTES
from jaxft.quant import FORMATS

BYTES = {"bfloat16": 2, "float32": 4}
# Axes along which devices gather the weights of a layer, and those of its experts.
WEIGHT_AXES, EXPERT_AXES = AXES["weight"], (*AXES["expert_weight"], "tensor")
# The share of a matrix unit's speed that the delta rule reaches: its products are small and wait for each other. Of the
# cycles that the compiler for v5e counts, for 4,096 tokens and 32 value heads of 128, forward and backward.
RECURRENT_SHARE = 0.09


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One device's part of a step. axes: size of each mesh axis. tokens: of one device in one micro-batch. length: of a
    row. kernel: whether attention runs in the TPU's kernel, which needs no mask in memory.
    """

    axes: Mapping[str, int]
    tokens: int
    micro_batches: int
    length: int
    kernel: bool

    def ways(self, *names: str) -> int:
        """Product of the sizes of these axes."""
        return math.prod(self.axes.get(name, 1) for name in names)

    @property
    def weights(self) -> int:
        """Number of devices that share each weight and gather it."""
        return self.ways(*WEIGHT_AXES)

    @property
    def tensor(self) -> int:
        """Size of the tensor axis."""
        return self.ways("tensor")


def cut_of(config: RunConfig, axes: Mapping[str, int], *, kernel: bool) -> Cut:
    """One device's part of a run's batch on a mesh of these axes."""
    rows = math.prod(axes.get(axis, 1) for axis in AXES["batch"])
    tokens = config.train.batch_size * config.data.max_length // config.train.accumulation_steps
    return Cut(
        axes=axes,
        tokens=tokens // rows // axes.get("context", 1),
        micro_batches=config.train.accumulation_steps,
        length=config.data.max_length,
        kernel=kernel,
    )


def memory_of(config: RunConfig, sizes: ModelSizes, cut: Cut, arguments: int, *, passes: int = 1) -> Memory:
    """Memory of one device. arguments: bytes of its part of the state and the batch, which are known exactly.

    passes: of the model, whose results are kept for gradients: 2 if a critic is trained beside the policy.
    """
    whole = config.adapter.kind == "none"
    compute = BYTES[config.model.dtype]
    residual = cut.tokens * sizes.width * sizes.stream_count * compute // cut.tensor
    outputs = cut.tokens * _outputs(sizes, cut) * compute // cut.tensor
    heads = sum(group.layers * group.heads * group.head_dim for group in sizes.attention)
    kept = {
        "full": sizes.layers * residual,
        "offload": 2 * residual,
        "attention": sizes.layers * residual + cut.tokens * heads * compute // cut.tensor,
        "dots": sizes.layers * residual + outputs,
        "none": 4 * sizes.layers * residual + 2 * outputs,
    }[config.model.remat]
    # Gradients, and their float32 sum over micro-batches.
    gradient_bytes = BYTES[config.train.gradient_dtype or config.model.dtype] + (4 if cut.micro_batches > 1 else 0)
    gradients = gradient_bytes * sizes.trainable // (cut.weights * cut.tensor)
    # One layer's gathered weights, the next layer's being gathered, and a layer's gradient before it is scattered.
    layer = sum(size for size, ways, _ in _matrices(sizes, cut) if ways > 1) // max(1, sizes.layers)
    gathered = (3 if whole else 2) * layer * compute
    # Forward results of one layer and their gradients, and the codes of its kernels.
    layer_work = 2 * outputs // max(1, sizes.layers) + 6 * residual
    if config.train.matmul_dtype is not None:
        layer_work += layer_kernels(sizes) // cut.tensor // max(1, sizes.layers)
    logits = 3 * min(CHUNK_BYTES["accelerator"], cut.tokens * sizes.vocab * 4 // cut.tensor)
    # The layers' own inputs as they are made, in the order of the stacks, and their gradient.
    kept += 3 * cut.tokens * sizes.own_inputs * compute // cut.tensor
    temporaries = passes * kept + gradients + gathered + layer_work + logits + _row_work(sizes, cut, compute)
    host = passes * sizes.layers * residual if config.model.remat == "offload" else 0
    return Memory(arguments=arguments, outputs=0, aliased=0, temporaries=temporaries, code=2**24, host=host)


def _matrices(sizes: ModelSizes, cut: Cut) -> list[tuple[int, int, tuple[str, ...]]]:
    """(parameters that one device multiplies with, devices it gathers them from, along which axes), for dense layers
    and for experts.

    The tensor axis splits the matrices of dense layers. Experts are computed whole, so that the tensor axis only shards
    their storage, as the other axes do. The expert axis shards the storage of dense layers; of experts, each device
    computes its own.
    """
    experts = 0 if sizes.experts is None else sizes.experts.parameters // cut.ways("expert")
    dense = sizes.active - (0 if sizes.experts is None else sizes.experts.active)
    return [
        (size, cut.ways(*names), tuple(name for name in names if cut.ways(name) > 1))
        for size, names in ((dense // cut.tensor, WEIGHT_AXES), (experts, EXPERT_AXES))
        if size
    ]


def _outputs(sizes: ModelSizes, cut: Cut) -> int:
    """Output widths of all matrix products for one token; for experts, of all rows of their window, filled or not."""
    if sizes.experts is None:
        return sizes.outputs
    return sizes.outputs + int(sizes.experts.outputs * (1 / filled_share(sizes, cut.ways("expert")) - 1))


def filled_share(sizes: ModelSizes, shards: int) -> float:
    """Share of the rows in the experts' window that is filled if tokens choose experts evenly.

    shards: size of the expert axis. See `nn/experts/exchange`.
    """
    if sizes.experts is None or shards == 1:
        return 1.0
    chosen, count = sizes.experts.chosen, sizes.experts.count
    return chosen / min(ROOM * chosen, shards * min(chosen, count // shards))


def waiting_flops(config: RunConfig, sizes: ModelSizes, cut: Cut) -> int:
    """The FLOPs that a device could do while it waits for the small products of recurrent layers in a step."""
    flops = sizes.recurrent_flops(config.train.batch_size * cut.length) // math.prod(cut.axes.values())
    return int(flops * (1 / RECURRENT_SHARE - 1))


def _row_work(sizes: ModelSizes, cut: Cut, compute: int) -> int:
    """Bytes that one layer needs for whole rows while it is computed: keys and values, states, a mask, and what the
    GPU's kernel works in.
    """
    context = cut.ways("context")
    keys = 0 if context == 1 else 4 * max((_keys(group, cut) for group in sizes.attention), default=0) * compute
    # The states between chunks, which the backward pass begins from.
    chunks = -(-cut.tokens // CHUNK)
    keys += chunks * 4 * max((group.state for group in sizes.recurrent), default=0) // cut.tensor
    if cut.kernel:
        return keys
    works_in = max((_works_in(group, cut) for group in sizes.attention), default=0)
    # The GPU's kernel takes the mask as one number per score, shared by all heads.
    return keys + works_in + cut.tokens * cut.length * compute


def _works_in(group: AttentionGroup, cut: Cut) -> int:
    heads, kv_heads = (-(-count // cut.tensor) for count in (group.heads, group.kv_heads))
    return attention_workspace(cut.tokens, cut.tokens * cut.ways("context"), heads, kv_heads, group.head_dim)


def _keys(group: AttentionGroup, cut: Cut) -> int:
    """Elements of the keys, or of the values, of whole rows in one layer."""
    return cut.tokens * cut.ways("context") * group.head_dim * -(-group.kv_heads // cut.tensor)


def costs_of(
    config: RunConfig,
    sizes: ModelSizes,
    cut: Cut,
    arguments: int,
    model_flops: int,
    *,
    references: Sequence[ModelSizes] = (),
) -> Costs:
    """Work and traffic of one step on one device.

    model_flops: of that device, references included: frozen models that each step runs forward.
    """
    # Share of the forward pass that the backward pass recomputes.
    recomputed = {"full": 0.94, "offload": 0.94, "attention": 0.9, "dots": 0.02, "none": 0.0}[config.model.remat]
    compute = BYTES[config.model.dtype]
    weight = _weight_bytes(config)
    read = int(sum(size for size, _, _ in _matrices(sizes, cut)) * weight)
    passes = (3 if recomputed > 0.5 else 2) * cut.micro_batches
    costs, reference_flops = Costs(), 0
    for reference in references:
        forward = reference.forward_flops(config.train.batch_size, config.data.max_length)
        forward //= math.prod(cut.axes.values())
        reference_flops += forward
        _add_reference(costs, reference, cut, forward, weight, compute)
    flops = _flops(config, sizes, cut, model_flops - reference_flops, recomputed)
    moved = passes * read + 4 * _touched(sizes, cut, compute)
    if config.train.matmul_dtype is None:
        costs.work[Work(flops, moved)] += 1
    else:
        numbers = passes * _rounded_numbers(config, sizes, cut)
        narrow = _narrow_flops(config, sizes, cut, recomputed)
        costs.work[Work(flops, moved + 4 * numbers, narrow=narrow, rounded=numbers)] += 1
    costs.work[Work(0, 2 * arguments)] += 1  # the optimizer reads and writes the state
    if config.model.remat == "offload":
        residual = cut.tokens * sizes.width * sizes.stream_count * compute // cut.tensor
        costs.host_bytes = 2 * sizes.layers * residual * cut.micro_batches
    trained = sizes.trained / max(1, sizes.active)
    for size, ways, axes in _matrices(sizes, cut):
        if ways > 1:
            # Weights are gathered for every forward pass and the backward pass; gradients are scattered.
            share, gathers = (ways - 1) / ways, 2 * cut.micro_batches
            costs.transfers[Transfer("all-gather", axes, int(size * weight * share))] += gathers
            if sizes.trained:
                received = int(size * trained * compute * share)
                costs.transfers[Transfer("reduce-scatter", axes, received)] += cut.micro_batches
    for transfer, times in _token_transfers(sizes, cut, compute, recomputed=recomputed > 0.5).items():
        costs.transfers[transfer] += times * cut.micro_batches
    replicas = cut.ways(*AXES["replica"])
    if replicas > 1:
        gradients = 4 * sizes.trainable // (cut.weights * cut.tensor)
        axes = tuple(axis for axis in AXES["replica"] if cut.ways(axis) > 1)
        costs.transfers[Transfer("all-reduce", axes, 2 * gradients)] += 1
    return costs


def forward_costs(config: RunConfig, sizes: ModelSizes, cut: Cut) -> Costs:
    """Costs of one forward pass over the batch of a step, on one device."""
    costs = Costs()
    flops = sizes.forward_flops(config.train.batch_size, config.data.max_length) // math.prod(cut.axes.values())
    weight = _weight_bytes(config)
    _add_reference(costs, sizes, cut, flops, weight, BYTES[config.model.dtype])
    return costs


def _weight_bytes(config: RunConfig) -> float:
    """Bytes of a weight that is read or gathered."""
    name = config.model.quantization
    return BYTES[config.model.dtype] if name is None else FORMATS[name].bytes_per_weight


def _touched(sizes: ModelSizes, cut: Cut, compute: int) -> int:
    """Bytes of the activations that one forward pass over all micro-batches writes."""
    # Of several streams, all are predicted and corrected, and one is computed.
    widths = sizes.outputs + (4 + 4 * sizes.stream_count) * sizes.layers * sizes.width
    return cut.tokens * cut.micro_batches * widths * compute // cut.tensor


def _add_reference(costs: Costs, sizes: ModelSizes, cut: Cut, flops: int, weight: float, compute: int) -> None:
    """Adds a frozen model's forward pass: `flops` of one device. weight: bytes of one of its parameters."""
    matrices = _matrices(sizes, cut)
    read = int(sum(size for size, _, _ in matrices) * weight)
    costs.work[Work(flops, cut.micro_batches * read + _touched(sizes, cut, compute))] += 1
    for size, ways, axes in matrices:
        if ways > 1:
            received = int(size * weight * (ways - 1) / ways)
            costs.transfers[Transfer("all-gather", axes, received)] += cut.micro_batches


def _flops(config: RunConfig, sizes: ModelSizes, cut: Cut, model_flops: int, recomputed: float) -> int:
    """FLOPs of one device: the model's own products, and those that are recomputed."""
    parts, devices, rows = cut.ways("context"), math.prod(cut.axes.values()), config.train.batch_size
    balanced = cut.kernel and balances(cut.length, parts, window=None)
    last_part = sizes.attention_flops(rows, cut.length, parts=parts, balanced=balanced) // devices
    flops = model_flops + last_part - sizes.attention_flops(rows, cut.length) // devices
    # Recomputing the forward pass adds its two FLOPs per parameter to the two, four or six.
    passes = 1 + (sizes.reached + sizes.trained) / max(1, sizes.active)
    # Two of attention's three parts are backward, where kernels recompute the scores; the TPU's two kernels, twice.
    scores = last_part * 2 / 3 * (0.75 if cut.kernel else 0.25)
    return int(flops + recomputed * flops / passes + scores) + waiting_flops(config, sizes, cut)


def layer_kernels(sizes: ModelSizes) -> int:
    """Parameters of the linear layers that every token passes, experts and LM head left out."""
    experts = 0 if sizes.experts is None else sizes.experts.active
    return max(0, sizes.active - experts - sizes.vocab * sizes.width)


def _rounded_numbers(config: RunConfig, sizes: ModelSizes, cut: Cut) -> int:
    """Numbers that a pass over a micro-batch rounds to 8 bits. Each is read twice, then written and read as a code."""
    has_codes = config.model.quantization == "int8" == config.train.matmul_dtype
    experts = 0 if sizes.experts is None else sizes.experts.outputs
    # Layers have about as many inputs as outputs, and gradients are of outputs.
    return (0 if has_codes else layer_kernels(sizes)) + cut.tokens * (sizes.outputs - experts)


def _narrow_flops(config: RunConfig, sizes: ModelSizes, cut: Cut, recomputed: float) -> int:
    """FLOPs of one device's products of 8 bits: forward, recomputed, and for the gradients of inputs."""
    tokens = config.train.batch_size * cut.length
    passes = 1 + recomputed + sizes.reached / max(1, sizes.active)
    return int(2 * tokens * layer_kernels(sizes) * passes) // math.prod(cut.axes.values())


def _token_transfers(sizes: ModelSizes, cut: Cut, compute: int, *, recomputed: bool) -> dict[Transfer, int]:
    """Transfers of activations and their gradients in one micro-batch, and how often each happens."""
    out: Counter[Transfer] = Counter()
    tensor, context, shards = (cut.ways(axis) for axis in ("tensor", "context", "expert"))
    elements = cut.tokens * sizes.width
    forward = 2 if recomputed else 1
    if tensor > 1:
        received = int(elements * compute * (tensor - 1) / tensor)
        out[Transfer("all-gather", ("tensor",), received)] += 8 * sizes.layers
    if context > 1:
        # Keys and values of whole rows are gathered; their gradients are summed and scattered.
        for group in sizes.attention:
            received = int(2 * _keys(group, cut) * compute * (context - 1) / context)
            out[Transfer("all-gather", ("context",), received)] += forward * group.layers
            out[Transfer("reduce-scatter", ("context",), received)] += group.reached
            if cut.kernel and balances(cut.length, context, group.window):
                # Queries and results change devices, most of them, and so do their gradients.
                moved = cut.tokens * group.heads * group.head_dim * compute * (context - 1) // (context * tensor)
                times = 2 * (forward * group.layers + group.reached)
                out[Transfer("collective-permute", ("context",), moved)] += times
    if sizes.experts is not None and shards > 1:
        # One row for each expert of a token, there and back, in the dtype of computation; so do their gradients.
        received = elements // tensor * sizes.experts.chosen * compute * (shards - 1) // shards
        out[Transfer("ragged-all-to-all", ("expert",), received)] += (2 * forward + 2) * sizes.experts.layers
    return out
