"""What a compiled program does on one device: FLOPs, bytes of main memory and between devices, loops included."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxft.hardware.groups import axes_of, between_slices, groups_of
from jaxft.hardware.hlo import HOST, Array, Computation, Instruction, Module
from jaxft.hardware.products import convolution_flops, dot_flops, kernel_flops, ragged_flops, target_of
from jaxft.hardware.trips import turns

# Without cost: names for what is there already.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "opt-barrier", "iota", "domain", "add-dependency", "copy-done", "async-done", "async-update", "send-done",
        "recv", "recv-done", "slice-done", "dynamic-slice-done")  # fmt: skip
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute",
               "ragged-all-to-all", "collective-broadcast")  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")


class Work(NamedTuple):
    """One instruction's FLOPs and bytes of main memory read and written."""

    flops: int
    bytes: int


class Transfer(NamedTuple):
    """One collective. bytes: what a device receives. axes: of the mesh, along which its members lie apart."""

    kind: str
    axes: tuple[str, ...]
    bytes: int


@dataclass
class Costs:
    """How often each piece of work and each transfer happens. host_bytes: to the host's memory and back. unknown: what
    could not be counted, in words.
    """

    work: Counter[Work] = field(default_factory=Counter)
    transfers: Counter[Transfer] = field(default_factory=Counter)
    host_bytes: int = 0
    unknown: set[str] = field(default_factory=set)

    @property
    def flops(self) -> int:
        """Of matrix products."""
        return sum(work.flops * times for work, times in self.work.items())

    @property
    def hbm_bytes(self) -> int:
        """Read and written in main memory."""
        return sum(work.bytes * times for work, times in self.work.items())

    @property
    def collective_bytes(self) -> int:
        """Received by a device."""
        return sum(transfer.bytes * times for transfer, times in self.transfers.items())

    def bytes_by(self, what: str) -> dict[str, int]:
        """Received bytes by `kind` or by `axes`, largest first."""
        out: Counter[str] = Counter()
        for transfer, times in self.transfers.items():
            key = transfer.kind if what == "kind" else "+".join(transfer.axes) or "none"
            out[key] += transfer.bytes * times
        return dict(out.most_common())

    def add(self, other: "Costs", times: int = 1) -> None:
        """Counts another's costs so many times."""
        for mine, theirs in ((self.work, other.work), (self.transfers, other.transfers)):
            for what, count in theirs.items():
                mine[what] += count * times
        self.host_bytes += other.host_bytes * times
        self.unknown |= other.unknown


def costs_of(
    module: Module, axes: Mapping[str, int], ids: Sequence[int] | None = None, *, filled: float = 1.0
) -> Costs:
    """Costs of running the module once.

    axes: mesh axis -> size, in the order in which devices are numbered. ids: of the devices in that order, by which
    transfers between slices name them; 0, 1, 2, ... where None. filled: share of the rows sorted by expert that any
    expert takes; the others are not multiplied.
    """
    return _Walk(module, dict(axes), ids, filled).costs(module.entry)


def _received(kind: str, sent: int, members: int) -> int:
    """Bytes that reach each of `members` devices when each gives `sent`."""
    return {
        "all-gather": sent * (members - 1),
        "reduce-scatter": sent * (members - 1) // members,
        # As a reduce-scatter and an all-gather, which is what a ring does.
        "all-reduce": 2 * sent * (members - 1) // members,
        "all-to-all": sent * (members - 1) // members,
        "ragged-all-to-all": sent * (members - 1) // members,
    }.get(kind, sent)


def _of_a_collective(instruction: Instruction) -> bool:
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    return kind in COLLECTIVES or (kind == "custom-call" and "AsyncCollective" in target_of(instruction))


class _Walk:
    def __init__(self, module: Module, axes: dict[str, int], ids: Sequence[int] | None, filled: float) -> None:
        self.module, self.axes, self.filled = module, axes, filled
        self.devices = 1
        for size in axes.values():
            self.devices *= size
        self.place = {number: at for at, number in enumerate(range(self.devices) if ids is None else ids)}
        self.known: dict[str, Costs] = {}

    def costs(self, computation: Computation) -> Costs:
        if computation.name not in self.known:
            out = Costs()
            channels: set[tuple[int, str]] = set()
            for instruction in computation.instructions.values():
                self._count(out, computation, instruction, channels)
            self.known[computation.name] = out
        return self.known[computation.name]

    def _count(self, out: Costs, computation: Computation, instruction: Instruction, channels: set) -> None:
        code = instruction.opcode
        if code in FREE or (code.endswith("-done") and code.removesuffix("-done") in COLLECTIVES):
            return
        if code == "while":
            count = turns(self.module, computation, instruction)
            if count is None:
                out.unknown.add(f"turns of the loop {instruction.scope or instruction.name}: counted once")
            out.add(self.costs(self._inner(instruction, "body")), 1 if count is None else count)
        elif code == "conditional":
            out.add(max(self._branches(instruction), key=lambda costs: (costs.flops, costs.hbm_bytes)))
        elif code in ("call", "async-start"):
            attribute = "to_apply" if code == "call" else "calls"
            out.add(self.costs(self._inner(instruction, attribute)))
        elif code.removesuffix("-start") in COLLECTIVES:
            self._transfer(out, computation, instruction, code.removesuffix("-start"))
        elif code == "send":
            self._sent(out, computation, instruction)
        elif code == "fusion":
            inner = self._inner(instruction, "calls")
            flops = self._inside(out, inner, channels)
            out.work[Work(flops, self._fusion_bytes(computation, instruction, inner))] += 1
        else:
            flops = self._flops(out, computation, instruction)
            out.work[Work(flops, self._plain_bytes(computation, instruction))] += 1
            out.host_bytes += self._host_bytes(computation, instruction)

    def _inner(self, instruction: Instruction, attribute: str) -> Computation:
        return self.module.computations[instruction.called(attribute)[0]]

    def _branches(self, instruction: Instruction) -> list[Costs]:
        names = instruction.called("branch_computations") or [
            *instruction.called("true_computation"), *instruction.called("false_computation"),
        ]  # fmt: skip
        return [self.costs(self.module.computations[name]) for name in names]

    def _inside(self, out: Costs, computation: Computation, channels: set) -> int:
        """FLOPs inside a fusion; the collectives that TPUs hide there are counted as transfers."""
        flops = 0
        for instruction in computation.instructions.values():
            code = instruction.opcode
            kind = code.removesuffix("-start")
            if code == "fusion":
                flops += self._inside(out, self._inner(instruction, "calls"), channels)
            elif kind in COLLECTIVES:
                # An asynchronous collective is spread over several fusions that share its channel.
                channel = instruction.number("channel_id")
                if channel is None or (channel, kind) not in channels:
                    channels.add((channel, kind))
                    scattered = kind == "all-reduce" and self._scattered(computation, instruction)
                    self._transfer(out, computation, instruction, "reduce-scatter" if scattered else kind)
            else:
                flops += self._flops(out, computation, instruction)
        return flops

    def _scattered(self, computation: Computation, reduced: Instruction) -> bool:
        """Whether a device keeps only its part of an all-reduce, which is how TPUs write a reduce-scatter."""
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
            flops = kernel_flops(instruction, [array for arrays in operands for array in arrays], self.filled)
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

    def _arrays(self, computation: Computation, name: str) -> tuple[Array, ...]:
        found = computation.instructions.get(name)
        return found.arrays if found else ()

    def _sent(self, out: Costs, computation: Computation, instruction: Instruction) -> None:
        found = between_slices(instruction)
        if found is None:
            out.unknown.add(f"what {instruction.scope or instruction.name} sends: counted as nothing")
            return
        kind, groups = found
        sent = sum(array.bytes for array in self._arrays(computation, instruction.operands[0]))
        apart = axes_of(np.vectorize(self.place.__getitem__)(groups), self.axes)
        axes = ("slice", *(axis for axis in apart if axis != "slice"))
        received = _received(kind, sent, groups.shape[1])
        out.transfers[Transfer(kind, axes, received)] += 1
        out.work[Work(0, sent + received)] += 1

    def _transfer(self, out: Costs, computation: Computation, instruction: Instruction, kind: str) -> None:
        sent = sum(a.bytes for name in instruction.operands for a in self._arrays(computation, name))
        groups = groups_of(instruction, self.devices)
        members = groups.shape[1]
        received = _received(kind, sent, members)
        axes = axes_of(groups, self.axes)
        if axes:
            out.transfers[Transfer(kind, axes, received)] += 1
        results = sum(a.hbm_bytes for a in instruction.arrays)
        out.work[Work(0, sent + (results if not instruction.opcode.endswith("-start") else received))] += 1

    def _host_bytes(self, computation: Computation, instruction: Instruction) -> int:
        """What a copy, a slice or an update carries between the memories of chip and host."""
        code = instruction.opcode.removesuffix("-start")
        if code not in ("copy", "dynamic-slice", "dynamic-update-slice"):
            return 0
        operands = [self._arrays(computation, name)[0] for name in instruction.operands[:2]]
        if code == "dynamic-update-slice":
            moved, other = operands[1], operands[0]
        else:
            # A slice that starts gives its operands, its result and a mark; a copy its result, its operand and a mark.
            at = -2 if instruction.opcode == "dynamic-slice-start" else 0
            moved, other = instruction.arrays[at], operands[0]
        return moved.bytes if (moved.space == HOST) != (other.space == HOST) else 0

    def _plain_bytes(self, computation: Computation, instruction: Instruction) -> int:
        operands = [self._arrays(computation, name) for name in instruction.operands]
        sizes = [sum(array.hbm_bytes for array in arrays) for arrays in operands]
        result = instruction.hbm_bytes
        code = instruction.opcode
        if code in SLICES:
            return 2 * result if sizes and sizes[0] else result
        if code in ("dynamic-update-slice", "scatter"):
            update = sizes[1 if code == "dynamic-update-slice" else -1]
            return 2 * update
        if code == "copy-start":
            return sizes[0] + instruction.arrays[0].hbm_bytes
        return sum(sizes) + result

    def _fusion_bytes(self, computation: Computation, fusion: Instruction, inner: Computation) -> int:
        total = 0
        for at, name in enumerate(fusion.operands):
            whole = sum(array.hbm_bytes for array in self._arrays(computation, name))
            total += min(whole, self._read(inner, at, whole)) if whole else 0
        return total + self._written(inner, inner.root, fusion.arrays)

    def _read(self, inner: Computation, at: int, whole: int) -> int:
        """Bytes that a fusion takes of its operand: only slices, where it only slices it."""
        parameter = inner.parameters.get(at)
        return whole if parameter is None else self._read_from(inner, parameter.name, whole)

    def _read_from(self, inner: Computation, name: str, whole: int) -> int:
        total = 0
        for user in inner.users[name]:
            if user.opcode in SLICES and user.operands[0] == name:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                continue  # written in place
            elif user.opcode == "tuple" or _of_a_collective(user):
                continue  # handed on; a transfer counts its own bytes
            elif user.opcode == "bitcast":
                total += self._read_from(inner, user.name, whole)
            elif user.opcode == "fusion":
                deeper = self._inner(user, "calls")
                total += self._read(deeper, user.operands.index(name), whole)
            else:
                return whole
        return total

    def _written(self, inner: Computation, root: Instruction, arrays: tuple[Array, ...]) -> int:
        if root.opcode == "tuple":
            parts = [inner.instructions[name] for name in root.operands]
            if len(parts) == len(arrays):
                return sum(self._written(inner, part, (array,)) for part, array in zip(parts, arrays, strict=True))
        size = sum(array.hbm_bytes for array in arrays)
        if root.opcode == "parameter" or _of_a_collective(root):
            return 0
        while root.opcode in ("bitcast", "convert", "copy") and root.operands:
            root = inner.instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return min(size, sum(array.bytes for array in self._arrays(inner, root.operands[1])))
        if root.opcode == "scatter":
            return min(size, 2 * sum(array.bytes for array in self._arrays(inner, root.operands[-1])))
        return size
