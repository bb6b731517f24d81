"""Costs of a compiled program on one device: FLOPs, bytes of main memory and bytes between devices, loops included."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxft.hardware.groups import axes_of, between_slices, groups_of
from jaxft.hardware.hlo import HOST, Array, Computation, Instruction, Module
from jaxft.hardware.products import (
    convolution_flops,
    dequantized_weights,
    dot_flops,
    is_narrow,
    kernel_flops,
    ragged_flops,
    rounded_numbers,
    target_of,
    tiled_weights,
    unread_bytes,
)
from jaxft.hardware.trips import trip_count

# Instructions without cost: they only name data that is there already.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "opt-barrier", "iota", "domain", "add-dependency", "copy-done", "async-done", "async-update", "send-done",
        "recv", "recv-done", "slice-done", "dynamic-slice-done")  # fmt: skip
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute",
               "ragged-all-to-all", "collective-broadcast")  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")
Channels = set[tuple[int | None, str]]  # (channel id, kind) of the collectives counted so far


class Work(NamedTuple):
    """FLOPs of one instruction, and bytes of main memory that it reads and writes.

    dequantized: NF4 weights made dense for main memory. tiled: those made dense in vector memory, once for each block
    of rows. narrow: FLOPs of 8-bit operands. rounded: numbers rounded to 8 bits. Other vector work is not counted.
    """

    flops: int
    bytes: int
    dequantized: int = 0
    tiled: int = 0
    narrow: int = 0
    rounded: int = 0


class Transfer(NamedTuple):
    """One collective. bytes: received by each device. axes: mesh axes along which its members differ."""

    kind: str
    axes: tuple[str, ...]
    bytes: int


@dataclass
class Costs:
    """The number of times that each piece of work and each transfer happens. host_bytes: copied between the memories of
    chip and host. unknown: costs that could not be counted, in words.
    """

    work: Counter[Work] = field(default_factory=Counter)
    transfers: Counter[Transfer] = field(default_factory=Counter)
    host_bytes: int = 0
    unknown: set[str] = field(default_factory=set)

    @property
    def flops(self) -> int:
        """FLOPs of all matrix products."""
        return sum(work.flops * times for work, times in self.work.items())

    @property
    def narrow(self) -> int:
        """FLOPs of matrix products whose operands have 8 bits."""
        return sum(work.narrow * times for work, times in self.work.items())

    @property
    def rounded(self) -> int:
        """Numbers rounded to 8 bits."""
        return sum(work.rounded * times for work, times in self.work.items())

    @property
    def hbm_bytes(self) -> int:
        """Bytes read and written in main memory."""
        return sum(work.bytes * times for work, times in self.work.items())

    @property
    def dequantized(self) -> int:
        """NF4 weights made dense for main memory."""
        return sum(work.dequantized * times for work, times in self.work.items())

    @property
    def tiled(self) -> int:
        """NF4 weights made dense in vector memory."""
        return sum(work.tiled * times for work, times in self.work.items())

    @property
    def collective_bytes(self) -> int:
        """Bytes received from other devices."""
        return sum(transfer.bytes * times for transfer, times in self.transfers.items())

    def bytes_by(self, what: str) -> dict[str, int]:
        """Received bytes by `kind` or by `axes`, largest first."""
        out: Counter[str] = Counter()
        for transfer, times in self.transfers.items():
            out[transfer.kind if what == "kind" else "+".join(transfer.axes) or "none"] += transfer.bytes * times
        return dict(out.most_common())

    def add(self, other: "Costs", times: int = 1) -> None:
        """Adds the costs of another computation that runs `times` times."""
        for work, count in other.work.items():
            self.work[work] += count * times
        for transfer, count in other.transfers.items():
            self.transfers[transfer] += count * times
        self.host_bytes += other.host_bytes * times
        self.unknown |= other.unknown


# The costs of the branch of a conditional that counts, of those of all branches.
ChooseBranch = Callable[[Instruction, Sequence[Costs]], Costs]


def costlier(conditional: Instruction, branches: Sequence[Costs]) -> Costs:
    """The branch with most to compute."""
    return max(branches, key=lambda costs: (costs.flops, costs.hbm_bytes))


def costs_of(
    module: Module,
    axes: Mapping[str, int],
    ids: Sequence[int] | None = None,
    *,
    filled: float = 1.0,
    trips: int | None = None,
    branch: ChooseBranch = costlier,
) -> Costs:
    """Costs of running the module once.

    axes: mesh axis -> size, in the order in which devices are numbered. ids: device ids in that order, which transfers
    between slices use; None for 0, 1, 2, ... filled: share of the rows sorted by expert that belong to an expert; the
    others are not multiplied. trips: of loops whose number of trips depends on the arguments; by default they count
    once, which the costs name as unknown. branch: chooses the branch of a conditional that counts.
    """
    return _Counter(module, dict(axes), ids, filled, trips, branch).costs(module.entry)


def _received_bytes(kind: str, sent: int, members: int) -> int:
    """Bytes that each of `members` devices receives if each of them sends `sent`."""
    return {
        "all-gather": sent * (members - 1),
        "reduce-scatter": sent * (members - 1) // members,
        # A ring does a reduce-scatter and then an all-gather.
        "all-reduce": 2 * sent * (members - 1) // members,
        "all-to-all": sent * (members - 1) // members,
        "ragged-all-to-all": sent * (members - 1) // members,
    }.get(kind, sent)


def _is_collective(instruction: Instruction) -> bool:
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    return kind in COLLECTIVES or (kind == "custom-call" and "AsyncCollective" in target_of(instruction))


class _Counter:
    def __init__(
        self,
        module: Module,
        axes: dict[str, int],
        ids: Sequence[int] | None,
        filled: float,
        trips: int | None,
        branch: ChooseBranch,
    ) -> None:
        self.module, self.axes, self.filled, self.trips, self.branch = module, axes, filled, trips, branch
        self.devices = 1
        for size in axes.values():
            self.devices *= size
        self.index_of = {number: index for index, number in enumerate(range(self.devices) if ids is None else ids)}
        self.counted: dict[str, Costs] = {}

    def costs(self, computation: Computation) -> Costs:
        if computation.name not in self.counted:
            out = Costs()
            channels: Channels = set()
            for instruction in computation.instructions.values():
                self._count(out, computation, instruction, channels)
            self.counted[computation.name] = out
        return self.counted[computation.name]

    def _count(self, out: Costs, computation: Computation, instruction: Instruction, channels: Channels) -> None:
        code = instruction.opcode
        if code in FREE or (code.endswith("-done") and code.removesuffix("-done") in COLLECTIVES):
            return
        if code == "while":
            count = trip_count(self.module, computation, instruction)
            if count is None and self.trips is None:
                out.unknown.add(f"trips of the loop {instruction.scope or instruction.name}: counted once")
            out.add(self.costs(self._inner(instruction, "body")), (self.trips or 1) if count is None else count)
        elif code == "conditional":
            out.add(self.branch(instruction, self._branches(instruction)))
        elif code in ("call", "async-start"):
            attribute = "to_apply" if code == "call" else "calls"
            out.add(self.costs(self._inner(instruction, attribute)))
        elif code.removesuffix("-start") in COLLECTIVES:
            self._count_collective(out, computation, instruction, code.removesuffix("-start"))
        elif code == "send":
            self._count_send(out, computation, instruction)
        elif code == "fusion":
            inner = self._inner(instruction, "calls")
            flops = self._count_inside(out, inner, channels)
            moved = self._fusion_bytes(computation, instruction, inner)
            counts = [lambda _, one: dequantized_weights(one), self._narrow, lambda _, one: rounded_numbers(one)]
            dequantized, narrow, rounded = (self._inside(inner, count) for count in counts)
            out.work[Work(flops, moved, dequantized, narrow=narrow, rounded=rounded)] += 1
        else:
            flops, moved = self._flops(out, computation, instruction), self._plain_bytes(computation, instruction)
            tiled = tiled_weights(instruction, self._operand_arrays(computation, instruction))
            narrow, rounded = self._narrow(computation, instruction), rounded_numbers(instruction)
            out.work[Work(flops, moved, dequantized_weights(instruction), tiled, narrow, rounded)] += 1
            out.host_bytes += self._host_bytes(computation, instruction)

    def _inner(self, instruction: Instruction, attribute: str) -> Computation:
        return self.module.computations[instruction.callees(attribute)[0]]

    def _branches(self, instruction: Instruction) -> list[Costs]:
        names = instruction.callees("branch_computations") or [
            *instruction.callees("true_computation"), *instruction.callees("false_computation"),
        ]  # fmt: skip
        return [self.costs(self.module.computations[name]) for name in names]

    def _count_inside(self, out: Costs, computation: Computation, channels: Channels) -> int:
        """FLOPs inside a fusion; the collectives that TPU programs keep inside fusions are counted as transfers."""
        flops = 0
        for instruction in computation.instructions.values():
            code = instruction.opcode
            kind = code.removesuffix("-start")
            if code == "fusion":
                flops += self._count_inside(out, self._inner(instruction, "calls"), channels)
            elif kind in COLLECTIVES:
                # An asynchronous collective appears in several fusions, which share its channel.
                channel = instruction.number("channel_id")
                if channel is None or (channel, kind) not in channels:
                    channels.add((channel, kind))
                    scattered = kind == "all-reduce" and self._is_reduce_scatter(computation, instruction)
                    self._count_collective(out, computation, instruction, "reduce-scatter" if scattered else kind)
            else:
                flops += self._flops(out, computation, instruction)
        return flops

    def _inside(self, computation: Computation, count: Callable[[Computation, Instruction], int]) -> int:
        """The sum of a count over the instructions inside a fusion."""
        return sum(
            self._inside(self._inner(instruction, "calls"), count)
            if instruction.opcode == "fusion"
            else count(computation, instruction)
            for instruction in computation.instructions.values()
        )

    def _narrow(self, computation: Computation, instruction: Instruction) -> int:
        """FLOPs of a product whose operands have 8 bits; 0 of any other instruction."""
        operands = self._operand_arrays(computation, instruction)
        return self._flops(Costs(), computation, instruction) if is_narrow(instruction, operands) else 0

    def _is_reduce_scatter(self, computation: Computation, reduced: Instruction) -> bool:
        """Whether each device keeps only its part of an all-reduce, which is a reduce-scatter in TPU programs."""
        if "all-reduce-scatter" in computation.name:
            return True
        users = computation.users[reduced.name]
        return bool(users) and all(user.opcode == "dynamic-slice" for user in users)

    def _flops(self, out: Costs, computation: Computation, instruction: Instruction) -> int:
        code = instruction.opcode
        if code not in ("dot", "convolution", "ragged-dot", "custom-call"):
            return 0
        operands = [self._arrays(computation, name) for name in instruction.operands]
        if code == "custom-call":
            flops = kernel_flops(instruction, self._operand_arrays(computation, instruction), self.filled)
            if flops is None:
                out.unknown.add(
                    f"FLOPs of {target_of(instruction)} in {instruction.scope or 'the step'}: counted as none"
                )
            return flops or 0
        (left, *_), (right, *_) = operands[:2]
        if code == "dot":
            return dot_flops(instruction.arrays[0], left, instruction.dimensions("lhs_contracting_dims"))
        if code == "ragged-dot":
            return int(ragged_flops(left, right) * self.filled)
        return convolution_flops(instruction.arrays[0], left, right, instruction.attributes)

    def _operand_arrays(self, computation: Computation, instruction: Instruction) -> list[Array]:
        return [array for name in instruction.operands for array in self._arrays(computation, name)]

    def _arrays(self, computation: Computation, name: str) -> tuple[Array, ...]:
        instruction = computation.instructions.get(name)
        return instruction.arrays if instruction else ()

    def _count_send(self, out: Costs, computation: Computation, instruction: Instruction) -> None:
        transfer = between_slices(instruction)
        if transfer is None:
            out.unknown.add(f"bytes that {instruction.scope or instruction.name} sends: counted as none")
            return
        kind, groups = transfer
        sent = sum(array.bytes for array in self._arrays(computation, instruction.operands[0]))
        differing = axes_of(np.vectorize(self.index_of.__getitem__)(groups), self.axes)
        axes = ("slice", *(axis for axis in differing if axis != "slice"))
        received = _received_bytes(kind, sent, groups.shape[1])
        out.transfers[Transfer(kind, axes, received)] += 1
        out.work[Work(0, sent + received)] += 1

    def _count_collective(self, out: Costs, computation: Computation, instruction: Instruction, kind: str) -> None:
        sizes = [sum(a.bytes for a in self._arrays(computation, name)) for name in instruction.operands]
        # Rows go from a first array into a second; the larger of the two has room for more.
        sent = min(sizes[:2]) if kind == "ragged-all-to-all" else sum(sizes)
        groups = groups_of(instruction, self.devices)
        members = groups.shape[1]
        received = _received_bytes(kind, sent, members)
        axes = axes_of(groups, self.axes)
        if axes:
            out.transfers[Transfer(kind, axes, received)] += 1
        results = sent if kind == "ragged-all-to-all" else sum(a.hbm_bytes for a in instruction.arrays)
        out.work[Work(0, sent + (results if not instruction.opcode.endswith("-start") else received))] += 1

    def _host_bytes(self, computation: Computation, instruction: Instruction) -> int:
        """Bytes that a copy, a slice or an update carries between the memories of chip and host."""
        code = instruction.opcode.removesuffix("-start")
        if code not in ("copy", "dynamic-slice", "dynamic-update-slice"):
            return 0
        operands = [self._arrays(computation, name)[0] for name in instruction.operands[:2]]
        if code == "dynamic-update-slice":
            moved, other = operands[1], operands[0]
        else:
            # Arrays of dynamic-slice-start: operands, result and a flag; of copy-start: result, operand and a flag.
            at = -2 if instruction.opcode == "dynamic-slice-start" else 0
            moved, other = instruction.arrays[at], operands[0]
        return moved.bytes if (moved.space == HOST) != (other.space == HOST) else 0

    def _plain_bytes(self, computation: Computation, instruction: Instruction) -> int:
        operands = [self._arrays(computation, name) for name in instruction.operands]
        sizes = [sum(array.hbm_bytes for array in arrays) for arrays in operands]
        result, code = instruction.hbm_bytes, instruction.opcode
        if code in SLICES:
            return 2 * result if sizes and sizes[0] else result
        if code in ("dynamic-update-slice", "scatter"):
            update = sizes[1 if code == "dynamic-update-slice" else -1]
            return 2 * update
        if code == "copy-start":
            return sizes[0] + instruction.arrays[0].hbm_bytes
        return sum(sizes) + result - unread_bytes(instruction, self._operand_arrays(computation, instruction))

    def _fusion_bytes(self, computation: Computation, fusion: Instruction, inner: Computation) -> int:
        total = 0
        for at, name in enumerate(fusion.operands):
            whole = sum(array.hbm_bytes for array in self._arrays(computation, name))
            total += min(whole, self._bytes_read(inner, at, whole)) if whole else 0
        return total + self._bytes_written(inner, inner.root, fusion.arrays)

    def _bytes_read(self, inner: Computation, at: int, whole: int) -> int:
        """Bytes that a fusion reads of an operand: only the slices, if slices are all that it uses."""
        parameter = inner.parameters.get(at)
        return whole if parameter is None else self._bytes_read_of(inner, parameter.name, whole)

    def _bytes_read_of(self, inner: Computation, name: str, whole: int) -> int:
        total = 0
        for user in inner.users[name]:
            if user.opcode in SLICES and user.operands[0] == name:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                continue  # written in place
            elif user.opcode == "tuple" or _is_collective(user):
                continue  # passed on unread; a transfer counts its own bytes
            elif user.opcode == "bitcast":
                total += self._bytes_read_of(inner, user.name, whole)
            elif user.opcode == "fusion":
                deeper, at = self._inner(user, "calls"), user.operands.index(name)
                total += self._bytes_read(deeper, at, whole)
                total += self._bytes_read_of(inner, user.name, whole) if deeper.passes_on(at) else 0
            else:
                return whole
        return total

    def _bytes_written(self, inner: Computation, root: Instruction, arrays: tuple[Array, ...]) -> int:
        if root.opcode == "tuple":
            parts = [inner.instructions[name] for name in root.operands]
            if len(parts) == len(arrays):
                return sum(
                    self._bytes_written(inner, part, (array,)) for part, array in zip(parts, arrays, strict=True)
                )
        size = sum(array.hbm_bytes for array in arrays)
        if root.opcode == "parameter" or _is_collective(root):
            return 0
        while root.opcode in ("bitcast", "convert", "copy") and root.operands:
            root = inner.instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return min(size, sum(array.bytes for array in self._arrays(inner, root.operands[1])))
        if root.opcode == "scatter":
            return min(size, 2 * sum(array.bytes for array in self._arrays(inner, root.operands[-1])))
        return size
