"""FLOPs of one instruction: matrix products, convolutions, and kernels, which XLA's cost analysis cannot read.

A multiplication with its addition counts as two. Of vector work, dequantised NF4 weights are counted. Everything else
(norms, softmax, optimizer) is bound by memory and counted in bytes only.
"""

# N heads, S queries, T keys, H head_dim; R rows sorted by expert, E experts, I in, O out

import math
import re
from collections.abc import Sequence

import numpy as np

from jaxft.hardware.hlo import Array, Instruction
from jaxft.nn.attention.kernels import mosaic
from jaxft.nn.attention.kernels.balanced import SCOPE as BALANCED
from jaxft.nn.experts.megablox import IN_STACK
from jaxft.quant.narrow import SCOPE as NARROW
from jaxft.quant.nf4 import SCOPE as DENSE_NF4
from jaxft.quant.nf4_matmul import NAME as NF4_MATMUL

# Matrix products of a splash kernel, each of S x T x H. Forward: scores and output. Backward: recomputed scores, then
# gradients of weights, keys and values (dkv), of weights and queries (dq), or of all (a dkv kernel that also gives dq).
# Source: FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2.
SPLASH = {"fwd": 2, "dkv": 4, "dq": 3, "fused": 5}
# The same of cuDNN's kernels.
CUDNN = {"__cudnn$fmhaScaleBiasSoftmax": 2, "__cudnn$fmhaScaleBiasSoftmaxBackward": 5}
# tokamax's kernels, by the number of their results: forward, with the largest score and the sum of each query; the
# gradients of keys and values; that of queries.
MOSAIC = {3: 2, 2: 4, 1: 3}
TRITON = "__gpu$xla.gpu.triton"  # tokamax's products of experts
# The compiler's own custom calls, which contain no matrix product.
IDLE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndices", "AsyncCollective",
              "ConcatBitcast", "SliceId", "ZeroCrop",
              "Sharding", "ConsumeBuffer", "MoveToHost", "MoveToDevice",
              "annotate_device_placement", "TopK", "PartialReduce", "X64", "GetDimensionSize", "LayoutConstraint",
              "SplitDataTransfer", "PrepareAsyncCall", "__cpu$", "ApproxTopK", "BitonicSort", "PadToStatic",
              "SliceToDynamic")  # fmt: skip


def dot_flops(result: Array, left: Array, contracting: Sequence[int]) -> int:
    """FLOPs of `dot`: each element of the result is a sum over the contracted dimensions of the left operand."""
    return 2 * result.elements * math.prod(left.dims[axis] for axis in contracting)


def convolution_flops(result: Array, left: Array, right: Array, attributes: str) -> int:
    """FLOPs of `convolution`, to which TPUs compile matrix products.

    Products with padding and with the gaps between dilated inputs are not computed, and not counted.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels in this HLO text: {attributes[:80]!r}")
    lhs, rhs, out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    spatial = sorted(label for label in out if label.isdigit())
    pairs = 1
    for at, label in enumerate(spatial):
        pairs *= _pairs(
            outputs=result.dims[out.index(label)],
            inputs=left.dims[lhs.index(label)],
            kernel=right.dims[rhs.index(label)],
            stride=_field(fields, "stride", at, 1),
            pad=_field(fields, "pad", at, 0),
            input_step=_field(fields, "lhs_dilate", at, 1),
            kernel_step=_field(fields, "rhs_dilate", at, 1),
        )
    return 2 * pairs * result.dims[out.index("b")] * result.dims[out.index("f")] * right.dims[rhs.index("i")]


def _field(fields: dict[str, str], name: str, at: int, default: int) -> int:
    return int(fields[name].split("x")[at].split("_")[0]) if name in fields else default


def _pairs(*, outputs: int, inputs: int, kernel: int, stride: int, pad: int, input_step: int, kernel_step: int) -> int:
    """Number of pairs of an output and a kernel position that read an input, not padding."""
    if kernel == 1 and pad == 0 and input_step == 1:
        return outputs
    at = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] * kernel_step - pad
    return int(((at >= 0) & (at <= (inputs - 1) * input_step) & (at % input_step == 0)).sum())


def ragged_flops(left: Array, right: Array) -> int:
    """FLOPs of `ragged-dot`: every row of left [R, I] is multiplied with one matrix of right [E, I, O]."""
    return 2 * left.elements * right.dims[-1]


def kernel_flops(call: Instruction, operands: Sequence[Array], filled: float = 1.0) -> int | None:
    """FLOPs of a custom call; None for an unknown kernel.

    operands: their arrays. Blocks of a splash kernel that its causal mask excludes are not computed, and not counted;
    packed rows exclude more, but only the data shows which. filled: share of the rows sorted by expert that belong to
    an expert.
    """
    if any(name in target_of(call) for name in IDLE_CALLS):
        return 0
    if call.scope.endswith("ragged-dot-metadata"):
        return 0
    by_triton = target_of(call) == TRITON and "/tokamax:" in call.scope
    if by_triton or re.search(r"ragged-dot[\w-]*$|\bt?gmm\)*/pallas_call$", call.scope):
        return int(_ragged_kernel_flops(call.arrays[0], operands) * filled)
    if _nf4_block_rows(call) is not None:
        return 2 * operands[0].elements * call.arrays[0].dims[-1]
    if target_of(call) in CUDNN:
        return _cudnn_flops(call, operands)
    if target_of(call).startswith("mosaic_gpu") and re.search(rf"\b{mosaic.SCOPE}", call.scope):
        return _mosaic_flops(call, operands)
    splash = re.search(r"splash_m[hq]a_(fwd|dkv|dq)", f"{call.name} {call.scope}")
    if splash is None:
        return None
    kind = splash.group(1)
    if kind == "dkv" and re.search(r'use_fused_bwd_kernel\\?": ?true', call.attributes):
        kind = "fused"
    q, k = [array for array in operands if array.dtype in ("bf16", "f32", "f16") and len(array.dims) >= 3][:2]
    queries, keys, heads_and_rows = q.dims[-2], k.dims[-2], math.prod(q.dims[:-2])
    share = _visited_share(call, operands, queries, keys)
    return int(SPLASH[kind] * 2 * heads_and_rows * queries * keys * q.dims[-1] * share)


def _cudnn_flops(call: Instruction, operands: Sequence[Array]) -> int:
    """FLOPs of cuDNN's attention: queries [B, S, N, H], keys [B, T, K, H]; of its own causal order, half is skipped."""
    queries, keys = operands[0], operands[1].dims[1]
    products = CUDNN[target_of(call)] * 2 * queries.elements * keys
    return products // 2 if re.search(r'"mask_type": ?"CAUSAL"', call.attributes) else products


def _mosaic_flops(call: Instruction, operands: Sequence[Array]) -> int:
    """FLOPs of tokamax's attention: queries [..., S, N, H], keys [..., T, K, H]; of whole rows, half is skipped."""
    queries, keys = operands[0], operands[1].dims[-3]
    products = MOSAIC[len(call.arrays)] * 2 * queries.elements * keys
    return products // 2 if re.search(rf"\b{mosaic.CAUSAL}\b", call.scope) else products


def dequantized_weights(instruction: Instruction) -> int:
    """NF4 weights that an instruction makes dense: the elements of its product with their scales."""
    is_last = instruction.opcode == "multiply" and DENSE_NF4 in instruction.scope
    return instruction.arrays[0].elements if is_last else 0


def is_narrow(instruction: Instruction, operands: Sequence[Array]) -> bool:
    """Whether it is a product whose operands have 8 bits."""
    is_product = instruction.opcode in ("dot", "convolution")
    return is_product and all(array.dtype in ("s8", "f8e4m3fn", "f8e5m2") for array in operands[:2])


def rounded_numbers(instruction: Instruction) -> int:
    """Numbers that an instruction rounds to 8 bits: the elements of their product with a factor for each row."""
    is_last = instruction.opcode == "multiply" and NARROW in instruction.scope
    return instruction.arrays[0].elements if is_last else 0


def tiled_weights(call: Instruction, operands: Sequence[Array]) -> int:
    """NF4 weights that a custom call makes dense in vector memory, once for each block of rows; 0 for other calls."""
    rows = _nf4_block_rows(call)
    if rows is None:
        return 0
    left, codes = operands[:2]
    return 2 * codes.elements * (left.elements // left.dims[-1] // rows)


def _nf4_block_rows(call: Instruction) -> int | None:
    """The rows in a block of the kernel for NF4; None for other calls."""
    match = re.search(rf"{NF4_MATMUL}_(\d+)", f"{call.name} {call.scope}") if call.opcode == "custom-call" else None
    return None if match is None else int(match[1])


def _ragged_kernel_flops(result: Array, operands: Sequence[Array]) -> int:
    """FLOPs of megablox, of tokamax's kernel, and of that to which TPUs compile `ragged-dot`.

    Rows [R, I] times matrices [E, I, O], which may be transposed, or rows [R, I] times rows [R, O] for the gradients of
    the matrices.

    A block of rows in which experts meet is computed for each of them; that is not counted.
    """
    left, right = [array for array in operands if array.dtype in ("bf16", "f32", "f16") and len(array.dims) >= 2][:2]
    return 2 * left.elements * (result if len(right.dims) == 3 else right).dims[-1]


def unread_bytes(call: Instruction, operands: Sequence[Array]) -> int:
    """Bytes of main memory that a kernel for experts does not read of the matrices of all layers; 0 for other calls."""
    layers = re.search(rf"\b{IN_STACK}(\d+)", call.scope) if call.opcode == "custom-call" else None
    if layers is None:
        return 0
    return sum(array.hbm_bytes - array.hbm_bytes // int(layers[1]) for array in operands if len(array.dims) == 3)


def target_of(call: Instruction) -> str:
    """Name of the kernel that a custom call runs."""
    target = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    return target.group(1) if target else call.opcode


def _visited_share(call: Instruction, operands: Sequence[Array], queries: int, keys: int) -> float:
    """Share of the blocks that the causal mask and the grid leave; if devices split the queries, for the last part, or
    for any part of queries in balanced order.
    """
    sizes = {name: int(size) for name, size in re.findall(r'(block_\w+)\\?": ?(\d+)', call.attributes)}
    backward = re.search(r"_(dkv|dq)_", call.name + call.scope)
    suffix = f"_{backward.group(1)}" if backward else ""
    rows, columns = sizes.get(f"block_q{suffix}", queries), sizes.get(f"block_kv{suffix}", keys)
    dkv = suffix == "_dkv"
    grid = next((a.dims for a in operands if a.dtype in ("s8", "s32", "s16") and len(a.dims) == 3), None)
    per_row = keys // columns if grid is None or dkv else grid[-1]
    per_column = queries // rows if grid is None or not dkv else grid[-2]
    ends = [*range(keys - queries + rows, keys + 1, rows)]
    if BALANCED in call.scope:  # of the first part: it has the first chunk of the row and the last one
        half = queries // 2
        ends = [*range(rows, half + 1, rows), *range(keys - half + rows, keys + 1, rows)]
    visited = sum(min(per_row, (end - 1) // columns + 1) for end in ends)
    if dkv:
        visited = min(visited, per_column * (keys // columns))
    return visited / ((queries // rows) * (keys // columns))
