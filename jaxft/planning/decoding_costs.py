"""Memory and work of prefill and decode: by arithmetic, or read from their compiled programs."""

# B slots, P prompts of a group, S tokens of a prompt, T cache, D model, V vocab

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxft.generation.steps import RUN
from jaxft.hardware import hlo
from jaxft.hardware.analytic import BYTES, cut_of, forward_costs
from jaxft.hardware.compile import Compiled, Memory, TooLarge, compile_lowered
from jaxft.hardware.costs import Costs, Transfer, Work, costlier, costs_of
from jaxft.hardware.hlo import Instruction
from jaxft.nn.partition import AXES
from jaxft.planning.decoding import Decoding
from jaxft.planning.job import ShardedStep

LOGITS = 5  # arrays of the size of the logits that choosing a token needs at the same time, all float32
FLOAT = 4  # bytes of a score


@dataclass(frozen=True, kw_only=True)
class SamplingCosts:
    """Memory and work of sampling on one device.

    memory: its arguments are the state of training, the copy of the weights and the cache. prefill: of one group of
    prompts. decode: of `generation.steps.RUN` tokens of every slot. compiled: whether they come from compiled
    programs. seconds, cpu_seconds: spent on compiling. refused: the compiler's message if a program is too large.
    """

    memory: Memory
    prefill: Costs
    decode: Costs
    compiled: bool = False
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    refused: str | None = None


def measure_sampling(decoding: Decoding, slots: int, *, state: int, level: str) -> SamplingCosts:
    """Memory and work by the compiler for TPUs, by arithmetic for GPUs and for programs that the compiler refuses.

    state: bytes of the state of training on one device. level: see `hardware.compile.LEVELS`.
    """
    if decoding.step.topology.chip.maker == "gpu":
        return estimate_sampling(decoding, slots, state=state)
    programs = [
        compile_lowered(lambda: decoding.lower_decode(slots), level),
        compile_lowered(lambda: decoding.lower_prefill(slots), level),
    ]
    estimate = estimate_sampling(decoding, slots, state=state)
    spent = replace(
        estimate,
        seconds=sum(program.seconds for program in programs),
        cpu_seconds=sum(program.cpu_seconds for program in programs),
    )
    compiled: list[Compiled] = []
    for program in programs:
        if isinstance(program, TooLarge):
            return replace(spent, refused=program.message)
        compiled.append(program)
    axes, ids = decoding.step.mesh.axes, [device.id for device in decoding.step.mesh.mesh.devices.flat]
    # The loop of decoding ends when the caller says so, after RUN tokens at most.
    decode, prefill = (
        costs_of(hlo.parse(program.text), axes, ids, trips=trips, branch=without_filters)
        for program, trips in zip(compiled, (RUN, None), strict=True)
    )
    memories = [_memory_of(state, decoding, program.memory) for program in compiled]
    return replace(spent, memory=max(memories, key=lambda one: one.peak), prefill=prefill, decode=decode, compiled=True)


def without_filters(conditional: Instruction, branches: Sequence[Costs]) -> Costs:
    """The branch that sampling takes by its temperature alone: filters such as top-k are conditionals in a conditional,
    and their first branch leaves the scores as they are.
    """
    nested = (conditional.scope or "").count("/cond") > 1
    return branches[0] if nested else costlier(conditional, branches)


def _memory_of(state: int, decoding: Decoding, program: Memory) -> Memory:
    """The memory of a program beside the state of training, of which parameters that are no copy are a part."""
    own = program.arguments - (0 if decoding.copied else decoding.param_bytes)
    return Memory(
        arguments=state + own,
        outputs=program.outputs,
        aliased=program.aliased,
        temporaries=program.temporaries,
        code=program.code,
    )


def estimate_sampling(decoding: Decoding, slots: int, *, state: int) -> SamplingCosts:
    """Memory and work by arithmetic. state: bytes of the state of training on one device."""
    memory = Memory(
        arguments=state + decoding.copy_bytes + decoding.cache_bytes(slots),
        outputs=0,
        aliased=0,
        temporaries=max(_decode_work(decoding, slots), _prefill_work(decoding, slots)),
        code=2**24,
    )
    return SamplingCosts(memory=memory, prefill=_prefill_costs(decoding, slots), decode=_decode_costs(decoding, slots))


def scoring_costs(step: ShardedStep) -> Costs:
    """Costs of a forward pass over one batch of packed answers, in the layout of training."""
    cut = cut_of(step.config, step.mesh.axes, kernel=step.topology.chip.maker == "tpu")
    return forward_costs(step.config, step.sizes, cut)


def copy_costs(decoding: Decoding, trained: ShardedStep) -> Costs:
    """Costs of bringing the weights from the layout of training into that of generation."""
    costs = Costs()
    if decoding.copied:
        axes = tuple(axis for axis in AXES["weight"] if trained.mesh.axes.get(axis, 1) > 1)
        ways = math.prod(trained.mesh.axes[axis] for axis in axes)
        # Every device has some part of what it needs already, in the worst case one of `ways` equal ones.
        costs.transfers[Transfer("all-gather", axes, decoding.copy_bytes * (ways - 1) // ways)] += 1
        costs.work[Work(0, 2 * decoding.copy_bytes)] += 1
    return costs


def _decode_work(decoding: Decoding, slots: int) -> int:
    """Bytes of temporaries of a decoding step: what one layer reads of the cache, scores, and logits."""
    step, rows = decoding.step, math.ceil(slots / decoding.row_parts)
    layer = decoding.cache_bytes(slots) // max(1, step.sizes.layers)
    # Programs for TPUs read the cache where it is (`nn.attention.decoding`).
    read = 0 if step.topology.chip.maker == "tpu" else 2 * layer
    return read + _scores(decoding, rows, 1, decoding.length) + _logits(decoding, slots)


def _prefill_work(decoding: Decoding, slots: int) -> int:
    """Bytes of temporaries of a prefill: the cache of the group, its activations, scores of one layer, and logits."""
    sizes, length = decoding.step.sizes, decoding.prompt_length
    prompts, answers = decoding.group(slots)
    rows = math.ceil(prompts / decoding.row_parts)
    widths = 6 * sizes.stream_count * sizes.width + 2 * sizes.outputs // max(1, sizes.layers) // decoding.tensor
    activations = rows * length * widths * BYTES[decoding.step.config.model.dtype]
    scores = _scores(decoding, rows, length, length)
    return decoding.prefill_cache_bytes(slots) + activations + scores + _logits(decoding, prompts * answers)


def _scores(decoding: Decoding, rows: int, queries: int, keys: int) -> int:
    """Bytes of the scores of one layer and of their weights."""
    heads = max((group.heads for group in decoding.step.sizes.attention), default=0)
    return 2 * rows * math.ceil(heads / decoding.tensor) * queries * keys * FLOAT


def _logits(decoding: Decoding, answers: int) -> int:
    """Bytes of the logits of a token of each answer and of what choosing needs beside them."""
    vocab = decoding.step.sizes.vocab
    split = math.ceil(answers / decoding.row_parts) * math.ceil(vocab / decoding.tensor)
    return (1 + LOGITS) * split * FLOAT


def _decode_costs(decoding: Decoding, slots: int) -> Costs:
    """RUN tokens of every slot: all weights and the whole cache are read for each."""
    sizes, rows = decoding.step.sizes, math.ceil(slots / decoding.row_parts)
    scores = sum(
        4 * group.layers * group.heads * group.head_dim * min(decoding.length, group.window or decoding.length)
        for group in sizes.attention
    )
    flops = rows * (2 * sizes.active + scores) // decoding.tensor
    read = decoding.read_bytes + decoding.cache_bytes(slots) + _logits(decoding, slots)
    costs = Costs()
    costs.work[Work(flops, read)] += RUN
    for transfer, times in _transfers(decoding, rows, rows).items():
        costs.transfers[transfer] += RUN * times
    return costs


def _prefill_costs(decoding: Decoding, slots: int) -> Costs:
    """A group of prompts. Scores are computed for the whole cache of the group, not only for earlier positions."""
    sizes, length = decoding.step.sizes, decoding.prompt_length
    prompts, answers = decoding.group(slots)
    rows = math.ceil(prompts / decoding.row_parts)
    scores = sum(4 * group.layers * group.heads * group.head_dim * length for group in sizes.attention)
    flops = rows * length * (2 * sizes.active + scores) // decoding.tensor
    widths = sizes.outputs // decoding.tensor + (4 + 4 * sizes.stream_count) * sizes.layers * sizes.width
    touched = rows * length * widths * BYTES[decoding.step.config.model.dtype]
    writes = 2 * decoding.prefill_cache_bytes(slots) * (1 + answers)
    costs = Costs()
    costs.work[Work(flops, decoding.read_bytes + touched + writes + _logits(decoding, prompts * answers))] += 1
    for transfer, times in _transfers(decoding, rows * length, rows * answers).items():
        costs.transfers[transfer] += times
    return costs


def _transfers(decoding: Decoding, tokens: int, answers: int) -> dict[Transfer, int]:
    """Transfers of one pass over `tokens` of a device's rows, of which `answers` choose a token."""
    sizes, tensor = decoding.step.sizes, decoding.tensor
    if tensor == 1:
        return {}
    compute = BYTES[decoding.step.config.model.dtype]
    summed = 2 * tokens * sizes.width * compute * (tensor - 1) // tensor
    chosen = answers * sizes.vocab // tensor * FLOAT * (tensor - 1) // tensor
    return {
        Transfer("all-reduce", ("tensor",), summed): 2 * sizes.layers,
        Transfer("all-to-all", ("tensor",), chosen): 1,
    }
