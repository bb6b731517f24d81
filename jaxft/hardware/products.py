"""FLOPs of one instruction: matrix products, convolutions, and kernels, into which the compiler does not see.

Two for each multiplication and addition. All else (norms, softmax, optimizer) is bound by memory, and counts as bytes.
"""

# N heads, S queries, T keys, H head_dim; R rows sorted by expert, E experts, I in, O out

import math
import re
from collections.abc import Sequence

import numpy as np

from jaxft.hardware.hlo import Array, Instruction

# Matrix products of a splash kernel, each of S x T x H: scores and output forward; scores again, the gradients of
# weights, keys and values (dkv), of queries (dq), or of all three (a dkv kernel that also gives dq).
# Source: FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2.
SPLASH = {"fwd": 2, "dkv": 4, "dq": 3, "fused": 5}
# Kernels and marks of the compiler in which there is no matrix product.
IDLE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndices", "AsyncCollective",
              "ConcatBitcast", "SliceId", "ZeroCrop",
              "Sharding", "ConsumeBuffer", "MoveToHost", "MoveToDevice",
              "annotate_device_placement", "TopK", "PartialReduce", "X64", "GetDimensionSize", "LayoutConstraint",
              "SplitDataTransfer", "PrepareAsyncCall", "__cpu$", "ApproxTopK", "BitonicSort", "PadToStatic",
              "SliceToDynamic")  # fmt: skip


def dot_flops(result: Array, left: Array, contracting: Sequence[int]) -> int:
    """Of `dot`: each number of the result is a sum over the contracted dimensions of the left operand."""
    return 2 * result.elements * math.prod(left.dims[axis] for axis in contracting)


def convolution_flops(result: Array, left: Array, right: Array, attributes: str) -> int:
    """Of `convolution`, as which TPUs compile matrix products.

    Positions where a window lies on padding or between dilated inputs are not multiplied, and not counted.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
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
    """(output, kernel) positions that meet an input."""
    if kernel == 1 and pad == 0 and input_step == 1:
        return outputs
    at = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] * kernel_step - pad
    return int(((at >= 0) & (at <= (inputs - 1) * input_step) & (at % input_step == 0)).sum())


def ragged_flops(left: Array, right: Array) -> int:
    """Of `ragged-dot`: every row of the left [R, I] goes through one matrix of the right [E, I, O]."""
    return 2 * left.elements * right.dims[-1]


def kernel_flops(call: Instruction, operands: Sequence[Array], filled: float = 1.0) -> int | None:
    """Of a custom call; None for a kernel that is not known here.

    operands: their arrays. Blocks of a splash kernel that its mask rules out are not computed, and not counted; packed
    rows rule out more, which only the data shows. filled: share of sorted rows that are some expert's.
    """
    if any(name in target_of(call) for name in IDLE_CALLS):
        return 0
    if call.scope.endswith("ragged-dot-metadata"):
        return 0
    if re.search(r"ragged-dot[\w-]*$", call.scope):
        return int(_ragged_kernel_flops(call.arrays[0], operands) * filled)
    found = re.search(r"splash_m[hq]a_(fwd|dkv|dq)", f"{call.name} {call.scope}")
    if found is None:
        return None
    kind = found.group(1)
    if kind == "dkv" and re.search(r'use_fused_bwd_kernel\\?": ?true', call.attributes):
        kind = "fused"
    q, k = [array for array in operands if array.dtype in ("bf16", "f32", "f16") and len(array.dims) >= 3][:2]
    queries, keys, heads_and_rows = q.dims[-2], k.dims[-2], math.prod(q.dims[:-2])
    share = _visited(call, operands, queries, keys)
    return int(SPLASH[kind] * 2 * heads_and_rows * queries * keys * q.dims[-1] * share)


def _ragged_kernel_flops(result: Array, operands: Sequence[Array]) -> int:
    """Of the kernel as which TPUs compile `ragged-dot`: rows [R, I] by matrices [E, I, O], stored either way around, or
    by other rows [R, O] to gradients of the matrices."""
    left, right = [array for array in operands if array.dtype in ("bf16", "f32", "f16") and len(array.dims) >= 2][:2]
    return 2 * left.elements * (result if len(right.dims) == 3 else right).dims[-1]


def target_of(call: Instruction) -> str:
    """What a custom call calls."""
    found = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    return found.group(1) if found else call.opcode


def _visited(call: Instruction, operands: Sequence[Array], queries: int, keys: int) -> float:
    """Share of the blocks that causal order and the grid leave; of the last queries, where devices split them."""
    sizes = {name: int(size) for name, size in re.findall(r'(block_\w+)\\?": ?(\d+)', call.attributes)}
    found = re.search(r"_(dkv|dq)_", call.name + call.scope)
    suffix = f"_{found.group(1)}" if found else ""
    rows, columns = sizes.get(f"block_q{suffix}", queries), sizes.get(f"block_kv{suffix}", keys)
    dkv = suffix == "_dkv"
    grid = next((a.dims for a in operands if a.dtype in ("s8", "s32", "s16") and len(a.dims) == 3), None)
    per_row = keys // columns if grid is None or dkv else grid[-1]
    per_column = queries // rows if grid is None or not dkv else grid[-2]
    seen = 0
    for row in range(queries // rows):
        last = keys - queries + (row + 1) * rows - 1
        seen += min(per_row, last // columns + 1)
    if dkv:
        seen = min(seen, per_column * (keys // columns))
    return seen / ((queries // rows) * (keys // columns))
