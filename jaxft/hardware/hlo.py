"""Parser for the text of compiled HLO modules: computations, instructions, shapes."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f4e2m1fn": 4,
}  # fmt: skip
NAME = re.compile(r"%([\w.\-]+)")
START = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
# Computations of a TPU's SparseCore have their mark at the end: `}, execution_thread="sparsecore"`.
END = re.compile(r'^\}(?:, execution_thread="[^"]*")?$')
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=?]*)\](\{[^{}]*\})?")
HOST = 5  # the number of the host's memory space
SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Array:
    """One array of a type. space: 0 for HBM; others for memory on the chip (1 VMEM, 2 and 6 scalars) and the host."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without padding."""
        bits = 8 if self.dtype.startswith("f8") else BITS.get(self.dtype, 0)
        return -(-self.elements * bits // 8)

    @property
    def hbm_bytes(self) -> int:
        """Bytes in the chip's main memory."""
        return self.bytes if self.space == 0 else 0


@dataclass
class Instruction:
    """One line of a computation. arrays: of the result. arguments: the text between the parentheses."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    arguments: str
    attributes: str
    root: bool

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order."""
        return tuple(NAME.findall(self.arguments))

    def callees(self, attribute: str) -> list[str]:
        """Names of the computations in an attribute such as `calls` or `body`."""
        match = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        if match is None:
            return []
        return NAME.findall(match.group(1)) if match.group(1) is not None else [match.group(2)]

    def number(self, attribute: str) -> int | None:
        """The integer in an attribute such as `index`; None without the attribute."""
        match = re.search(rf"\b{attribute}=(\d+)", self.attributes)
        return int(match.group(1)) if match else None

    def dimensions(self, attribute: str) -> tuple[int, ...]:
        """The integers in an attribute such as `lhs_contracting_dims={1}`; empty without the attribute."""
        match = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in match.group(1).split(",") if n) if match else ()

    @cached_property
    def scope(self) -> str:
        """The JAX scope that the instruction comes from: `jit(train_step)/jvp()/while/body/dot_general`."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def hbm_bytes(self) -> int:
        """Bytes of the result in the chip's main memory."""
        return sum(array.hbm_bytes for array in self.arrays)


@dataclass
class Computation:
    """A named computation. instructions: by name, in order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose result the computation returns."""
        roots = [i for i in self.instructions.values() if i.root]
        return roots[0] if roots else next(reversed(self.instructions.values()))

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}

    def passes_on(self, number: int) -> bool:
        """Whether the result is the parameter of this number, at most in another shape."""
        passed = self.root
        while passed.opcode == "bitcast":
            passed = self.instructions[passed.operands[0]]
        return passed is self.parameters.get(number)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name of an instruction -> the instructions that read its result."""
        out: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                if operand in out:
                    out[operand].append(instruction)
        return out


@dataclass
class Module:
    """A compiled program. computations: by name. entry: the one that runs first."""

    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """Parses the text of `compiled.as_text()`. Raises ValueError if it has no entry computation or a malformed line."""
    computations: dict[str, Computation] = {}
    entry = current = None
    pending: list[str] = []

    def close() -> None:
        if pending and current is not None:
            instruction = _instruction(" ".join(pending))
            current.instructions[instruction.name] = instruction
        pending.clear()

    for line in text.splitlines():
        if current is None:
            header = HEADER.match(line)
            if header:
                current = computations.setdefault(header.group(2), Computation(header.group(2)))
                entry = current if header.group(1) else entry
        elif END.match(line):
            close()
            current = None
        elif START.match(line):
            close()
            pending.append(line)
        elif pending:
            pending.append(line)  # an attribute may contain line breaks
    if entry is None:
        raise ValueError("no ENTRY computation in this HLO text")
    return Module(computations, entry)


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a type; those of a tuple in order."""
    out = []
    for dtype, dims, layout in ARRAY.findall(text):
        space = SPACE.search(layout or "")
        sizes = tuple(int(d.strip("<=?")) for d in dims.split(",") if d.strip("<=?"))
        out.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(out)


def _instruction(line: str) -> Instruction:
    start = START.match(line)
    if start is None:
        raise ValueError(f"not an instruction of an HLO text: {line[:80]!r}")
    rest = line[start.end() :]
    end = _closing_index(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opens = rest.index("(")
    closes = _closing_index(rest, opens)
    return Instruction(
        name=start.group(2),
        opcode=rest[:opens],
        arrays=arrays_of(kind),
        arguments=rest[opens + 1 : closes],
        attributes=rest[closes + 1 :],
        root=bool(start.group(1)),
    )


def _closing_index(text: str, opens: int) -> int:
    depth = 0
    for at in range(opens, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced parentheses in an HLO text: {text[:80]!r}")
