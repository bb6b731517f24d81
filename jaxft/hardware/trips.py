"""Trip counts of the loops in a compiled program."""

import re
from dataclasses import dataclass

from jaxft.hardware.hlo import Computation, Instruction, Module
from jaxft.objectives.vocabulary import AT_MOST

TRANSPARENT = ("copy", "bitcast", "convert", "reshape", "bitcast-convert", "copy-done", "opt-barrier")


@dataclass(frozen=True)
class Slot:
    """Element `index` of a loop's carry, plus `offset`."""

    index: int
    offset: int


Value = int | Slot | None
Environment = dict[int, Value]


def trip_count(module: Module, outer: Computation, loop: Instruction) -> int | None:
    """Trips of a `while`; None if they depend on data and have no bound.

    From XLA's own known_trip_count if the text has it, else from the bound in the condition and from start and step of
    the counter. A loop whose scope is named `turns_at_most_N` counts as N trips.
    """
    known = re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.callees("condition")[0]]
    body = module.computations[loop.callees("body")[0]]
    trips = _counter_trips(module, outer, loop, condition, body)
    if trips is not None:
        return trips
    # The innermost name bounds this loop; an outer name bounds a loop around it.
    bounds = re.findall(rf"{AT_MOST}(\d+)\)*/while(?=$|/)", loop.scope)
    return int(bounds[-1]) if bounds and loop.scope.endswith("/while") else None


def _counter_trips(
    module: Module, outer: Computation, loop: Instruction, condition: Computation, body: Computation
) -> int | None:
    test = _comparison(module, condition, condition.root, {})
    if test is None:
        return None
    left, right, direction = test
    if isinstance(left, int) and isinstance(right, Slot):
        left, right, direction = right, left, {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(direction, direction)
    if not isinstance(left, Slot):
        return None
    bound = _invariant_value(module, outer, loop, body, right) if isinstance(right, Slot) else right
    start = _initial_value(module, outer, loop, left.index)
    after = _carried_value(module, body, left.index)
    if not isinstance(bound, int) or not isinstance(start, int) or not isinstance(after, Slot):
        return None
    step = after.offset
    if after.index != left.index or step == 0:
        return None
    first = start + left.offset
    span = {"LT": bound - first, "LE": bound - first + 1, "GT": first - bound, "GE": first - bound + 1}.get(direction)
    if direction == "NE":
        span = abs(bound - first)
    return None if span is None else max(0, -(-span // abs(step)))


def _invariant_value(module: Module, outer: Computation, loop: Instruction, body: Computation, slot: Slot) -> Value:
    """The value of a slot that the loop does not change."""
    if _carried_value(module, body, slot.index) != Slot(slot.index, 0):
        return None
    value = _initial_value(module, outer, loop, slot.index)
    return value + slot.offset if isinstance(value, int) else None


def _initial_value(module: Module, outer: Computation, loop: Instruction, index: int) -> Value:
    carry = outer.instructions.get(loop.operands[0])
    if carry is None or carry.opcode != "tuple":
        return None
    return _value(module, outer, carry.operands[index], {})


def _carried_value(module: Module, body: Computation, index: int) -> Value:
    root = body.root
    while root.opcode in TRANSPARENT:
        root = body.instructions[root.operands[0]]
    return _value(module, body, root.operands[index], {}) if root.opcode == "tuple" else None


def _comparison(
    module: Module, computation: Computation, root: Instruction, inputs: Environment
) -> tuple[Value, Value, str] | None:
    if root.opcode == "compare":
        left, right = (_value(module, computation, name, inputs) for name in root.operands)
        direction = re.search(r"direction=(\w+)", root.attributes)
        return left, right, direction.group(1) if direction else ""
    if root.opcode == "fusion":
        inner = module.computations[root.callees("calls")[0]]
        return _comparison(module, inner, inner.root, _environment(module, computation, root, inputs))
    if root.opcode in TRANSPARENT:
        return _comparison(module, computation, computation.instructions[root.operands[0]], inputs)
    return None


def _environment(module: Module, computation: Computation, fusion: Instruction, inputs: Environment) -> Environment:
    return {at: _value(module, computation, name, inputs) for at, name in enumerate(fusion.operands)}


def _value(module: Module, computation: Computation, name: str, inputs: Environment) -> Value:
    """A scalar as a number or as a slot of the carry, which is the computation's parameter 0 if `inputs` is empty."""
    instruction = computation.instructions.get(name)
    if instruction is None:
        return None
    code = instruction.opcode
    if code == "constant":
        return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments.strip()) else None
    if code == "parameter":
        return inputs.get(int(instruction.arguments))
    if code == "get-tuple-element":
        source, index = computation.instructions[instruction.operands[0]], instruction.number("index")
        return Slot(index, 0) if source.opcode == "parameter" and not inputs and index is not None else None
    if code in TRANSPARENT:
        return _value(module, computation, instruction.operands[0], inputs)
    if code in ("add", "subtract"):
        left, right = (_value(module, computation, operand, inputs) for operand in instruction.operands)
        return _sum(left, right, -1 if code == "subtract" else 1)
    if code == "fusion":
        inner = module.computations[instruction.callees("calls")[0]]
        return _value(module, inner, inner.root.name, _environment(module, computation, instruction, inputs))
    return None


def _sum(left: Value, right: Value, sign: int) -> Value:
    if isinstance(left, int) and isinstance(right, int):
        return left + sign * right
    if isinstance(left, Slot) and isinstance(right, int):
        return Slot(left.index, left.offset + sign * right)
    if isinstance(right, Slot) and isinstance(left, int) and sign == 1:
        return Slot(right.index, right.offset + left)
    return None
