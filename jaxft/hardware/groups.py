"""Groups of devices that take part in a collective, and the mesh axes along which the members of a group differ."""

import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from jaxft.hardware.hlo import Array, Instruction, Module

SLICE_ID = 100_000  # libtpu numbers the devices of slice n, counted from 1, from n times this on
BRACES = re.compile(r"\{([\d,]+)\}")


def collectives(module: Module, kind: str, devices: int) -> Iterator[tuple[Array, np.ndarray]]:
    """(array, groups as from `groups_of`) of every result of the collectives of one kind, in the order of the text.

    kind: such as `all-gather`. The results of an asynchronous collective include its operands.
    """
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode in (kind, f"{kind}-start"):
                groups = groups_of(instruction, devices)
                yield from ((array, groups) for array in instruction.arrays)


def groups_of(instruction: Instruction, devices: int) -> np.ndarray:
    """Numbers of the devices in each group of a collective, [groups, members]; for a permute, (source, target) pairs.

    Reads lists `{{0,1},{2,3}}`, iotas `[2,4]<=[4,2]T(1,0)` and named meshes `mesh['a'=2,'b'=4] {'b'}`.
    """
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return _parse_lists(pairs.group(1) + "}")
    _, _, groups = text.partition("replica_groups=")
    if groups.startswith("{{"):
        return _parse_lists(groups[1 : groups.index("}}") + 1])
    if groups.startswith("["):
        return _parse_iota(groups)
    if groups.startswith("mesh["):
        return _parse_mesh(groups)
    return np.arange(devices)[None]


def between_slices(instruction: Instruction) -> tuple[str, np.ndarray] | None:
    """(kind, device ids [groups, members]) of a `send` to other slices; None for any other instruction.

    Between slices, the hosts' network carries collectives as sends and receives.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if kind is None:
        return None
    name = kind.group(1).lower().replace("_", "-")
    target = re.search(r"_xla_megascale_target=\{(.*?)\}\}", instruction.attributes)
    if target:
        return name, _parse_lists(target.group(1) + "}")
    # "{1,2}x{0:3}": a group for each of the devices 0 to 3, which has that device of slices 1 and 2.
    target = re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+)(?::(\d+))?\}"', instruction.attributes)
    if target is None:
        return None
    slices = [int(number) for number in target.group(1).split(",")]
    first, last = int(target.group(2)), int(target.group(3) or target.group(2))
    return name, np.array([[SLICE_ID * number + at for number in slices] for at in range(first, last + 1)])


def axes_of(groups: np.ndarray, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the mesh axes along which the members of a group differ; devices are numbered in mesh order."""
    coordinates = np.stack(np.unravel_index(groups, tuple(sizes.values())))  # [axes, groups, members]
    differing = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, differs in zip(sizes, differing, strict=True) if differs)


def _parse_lists(text: str) -> np.ndarray:
    return np.array([[int(n) for n in group.split(",")] for group in BRACES.findall(text)])


def _parse_iota(text: str) -> np.ndarray:
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota is None:
        raise ValueError(f"replica groups of an unknown form in an HLO text: {text[:80]!r}")
    numbers = np.arange(math.prod(_integers(iota.group(2)))).reshape(_integers(iota.group(2)))
    if iota.group(3):
        numbers = numbers.transpose(_integers(iota.group(3)))
    return numbers.reshape(_integers(iota.group(1)))


def _parse_mesh(text: str) -> np.ndarray:
    mesh = re.match(r"mesh\[([^{]*)\{(.*?)\}", text)
    if mesh is None:
        raise ValueError(f"replica groups of an unknown form in an HLO text: {text[:80]!r}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
    # 'a':(2)4 is the factor of size 4 of axis a, after a factor of size 2.
    factors = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh.group(2))
    group_axes: set[int] = set()
    shape: list[int] = []
    for name, size in sizes.items():
        cuts = sorted((int(before), int(length)) for axis, before, length in factors if axis == name and length)
        if not cuts:
            if any(axis == name for axis, *_ in factors):
                group_axes.add(len(shape))
            shape.append(size)
            continue
        product = 1
        for before, length in cuts:
            if before > product:
                shape.append(before // product)
            group_axes.add(len(shape))
            shape.append(length)
            product = before * length
        shape.append(size // product)
    numbers = _device_order(mesh.group(1), math.prod(sizes.values())).reshape(shape)
    other_axes = [axis for axis in range(len(shape)) if axis not in group_axes]
    members = math.prod(shape[axis] for axis in group_axes)
    return numbers.transpose([*other_axes, *sorted(group_axes)]).reshape(-1, members)


def _device_order(mesh: str, count: int) -> np.ndarray:
    """Numbers of a named mesh's devices, in the order of the mesh."""
    iota = re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)", mesh)
    if iota:
        return np.arange(count).reshape(_integers(iota.group(1))).transpose(_integers(iota.group(2))).reshape(-1)
    numbers = re.search(r"device_ids=\((\d[\d,]*)\)", mesh)
    return np.array(_integers(numbers.group(1))) if numbers else np.arange(count)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
