"""Which devices talk with one another in a collective, and which mesh axes they differ in."""

import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from jaxft.hardware.hlo import Array, Instruction, Module

SLICE_ID = 100_000  # libtpu numbers the devices of slice n (from 1) from n times this
BRACES = re.compile(r"\{([\d,]+)\}")


def collectives(module: Module, kind: str, devices: int) -> Iterator[tuple[Array, np.ndarray]]:
    """(array, groups as of `groups_of`) of every array that the collectives of a kind give, in the order of the text.

    kind: `all-gather`, say. One that is begun here and ended there names what it reads as well.
    """
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode in (kind, f"{kind}-start"):
                groups = groups_of(instruction, devices)
                yield from ((array, groups) for array in instruction.arrays)


def groups_of(instruction: Instruction, devices: int) -> np.ndarray:
    """Device numbers that talk with one another, [groups, members]; for a permute, its (source, target) pairs.

    Reads lists `{{0,1},{2,3}}`, iotas `[2,4]<=[4,2]T(1,0)` and named meshes `mesh['a'=2,'b'=4] {'b'}`.
    """
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return _listed(pairs.group(1) + "}")
    found = re.search(r"replica_groups=", text)
    rest = text[found.end() :] if found else ""
    if rest.startswith("{{"):
        return _listed(rest[1 : rest.index("}}") + 1])
    if rest.startswith("["):
        return _iota(rest)
    if rest.startswith("mesh["):
        return _named(rest)
    return np.arange(devices)[None]


def between_slices(instruction: Instruction) -> tuple[str, np.ndarray] | None:
    """(kind, ids of the devices that talk, [groups, members]) of a `send` that the hosts carry to other slices.

    None for any other: between slices, collectives are handed to the hosts' network as sends and receives.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if kind is None:
        return None
    name = kind.group(1).lower().replace("_", "-")
    target = re.search(r"_xla_megascale_target=\{(.*?)\}\}", instruction.attributes)
    if target:
        return name, _listed(target.group(1) + "}")
    # "{1,2}x{0:3}": devices 0 to 3 of slices 1 and 2, each with those of the same place.
    target = re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+)(?::(\d+))?\}"', instruction.attributes)
    if target is None:
        return None
    slices = [int(number) for number in target.group(1).split(",")]
    first, last = int(target.group(2)), int(target.group(3) or target.group(2))
    return name, np.array([[SLICE_ID * number + at for number in slices] for at in range(first, last + 1)])


def axes_of(groups: np.ndarray, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the mesh axes along which the members of a group lie apart; devices are numbered in mesh order."""
    coordinates = np.stack(np.unravel_index(groups, tuple(sizes.values())))  # [axes, groups, members]
    apart = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, differs in zip(sizes, apart, strict=True) if differs)


def _listed(text: str) -> np.ndarray:
    return np.array([[int(n) for n in group.split(",")] for group in BRACES.findall(text)])


def _iota(text: str) -> np.ndarray:
    found = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    shape, dims, order = (tuple(map(int, part.split(","))) if part else None for part in found.groups())
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return (numbers if order is None else numbers.transpose(order)).reshape(shape)


def _named(text: str) -> np.ndarray:
    mesh = re.match(r"mesh\[([^{]*)\{(.*?)\}", text)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
    order = re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)", mesh.group(1))
    listed = re.search(r"device_ids=\((\d[\d,]*)\)", mesh.group(1))
    numbers = np.arange(math.prod(sizes.values()))
    if order:
        dims, axes = (tuple(map(int, part.split(","))) for part in order.groups())
        numbers = numbers.reshape(dims).transpose(axes).reshape(-1)
    elif listed:
        numbers = np.array([int(n) for n in listed.group(1).split(",")])
    # 'a':(2)4 is the part of size 4 of axis a that stands behind a part of size 2.
    wanted, shape = set(), []
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh.group(2))
    for name, size in sizes.items():
        cuts = sorted((int(before), int(length)) for axis, before, length in parts if axis == name and length)
        if not cuts:
            if any(axis == name for axis, *_ in parts):
                wanted.add(len(shape))
            shape.append(size)
            continue
        done = 1
        for before, length in cuts:
            if before > done:
                shape.append(before // done)
            wanted.add(len(shape))
            shape.append(length)
            done = before * length
        shape.append(size // done)
    numbers = numbers.reshape(shape)
    kept = [axis for axis in range(len(shape)) if axis not in wanted]
    members = math.prod(shape[axis] for axis in wanted)
    return numbers.transpose([*kept, *sorted(wanted)]).reshape(-1, members)
