"""Slices of accelerators by name: `v5e:4x4`, `v5e-16`, `h100:8`; one or more, joined by the data-centre network."""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxft.errors import ConfigError, did_you_mean
from jaxft.hardware.chips import CHIPS, Chip

if TYPE_CHECKING:
    import jax

# Other names of chips, used by people and by Google's own tools.
ALIASES = {
    "v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "trillium": "v6e", "v7x": "tpu7x", "tpu7": "tpu7x",
    "ironwood": "tpu7x", "a100": "a100-80", "rtx-4090": "rtx4090", "4090": "rtx4090", "rtx-5090": "rtx5090",
    "5090": "rtx5090",
}  # fmt: skip
LIBTPU = "pip install 'jaxft[plan]'"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """`count` slices of one kind of chip, each a torus of `shape` chips, joined by the data-centre network."""

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(self.shape) * self.count

    @property
    def devices(self) -> int:
        """Number of JAX devices in all slices."""
        return self.chips * self.chip.devices

    @property
    def name(self) -> str:
        """Name of one slice, such as `v5e:4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def describe(self) -> str:
        """For example `2 slices of v5e:4x4 (32 chips)`."""
        chips = f"{self.chips} chip{'s' * (self.chips > 1)}"
        return f"{self.count} slices of {self.name} ({chips})" if self.count > 1 else f"{self.name} ({chips})"


def parse(text: str, slices: int = 1) -> Topology:
    """The topology that a name means.

    `KIND:AxB[xC]` gives the torus. `KIND:N` gives the number of chips; `KIND-N` too, or the number of cores for kinds
    whose names count cores (v4, v5p, tpu7x). slices: number of slices.
    Raises ConfigError for an unknown kind, with the known ones, for a shape that does not exist and for slices below 1.
    """
    kind, size = ALIASES.get(text.lower(), text.lower()), "1"
    if kind not in CHIPS:
        match = re.fullmatch(r"(.+?)[:-](\d+(?:x\d+)*)", text.strip().lower())
        name, size = match.groups() if match else (text.lower(), "")
        kind = ALIASES.get(name, name)
    if kind not in CHIPS or not size:
        known = [*CHIPS, *ALIASES]
        raise ConfigError(
            f"topology {text!r} is not known.{did_you_mean(kind, known)} Write KIND:AxB, such as v5e:4x4, v5p:2x2x1 or "
            f"h100:8, or a name such as v5e-16. Kinds: {', '.join(CHIPS)}."
        )
    if slices < 1:
        raise ConfigError(f"--slices={slices}: a topology has at least one slice. Set it to 1 or more.")
    chip = CHIPS[kind]
    numbers = tuple(int(n) for n in size.split("x"))
    shape = numbers if "x" in size else _torus(chip, numbers[0], text)
    if chip.maker == "gpu":
        shape = (math.prod(shape),)
    elif len(shape) != chip.dimensions:
        raise ConfigError(
            f"topology {text!r}: {kind} is a torus of {chip.dimensions} dimensions, "
            f"such as {kind}:{'x'.join(['2'] * chip.dimensions)}"
        )
    if 0 in shape or math.prod(shape) > chip.max_chips:
        raise ConfigError(f"topology {text!r}: a slice of {kind} has from 1 to {chip.max_chips} chips")
    return Topology(chip=chip, shape=shape, count=slices)


def cubic_shape(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """The most cubic torus of this many chips. None if the number is no power of two or larger than a slice."""
    if chip.maker == "gpu":
        return (chips,) if chips <= chip.max_chips else None
    if chips & (chips - 1) or not 1 <= chips <= chip.max_chips:
        return None
    sides = [1] * chip.dimensions
    while math.prod(sides) < chips:
        # Doubles the last of the shortest sides, but the first of sides of 1, because a host is 2 x 2 chips: 2x2x1,
        # 2x2x2, 2x4.
        shortest = min(sides)
        at = [i for i, side in enumerate(sides) if side == shortest]
        sides[at[0] if shortest == 1 else at[-1]] *= 2
    return tuple(sides)


def _torus(chip: Chip, number: int, text: str) -> tuple[int, ...]:
    chips = number if ":" in text or chip.maker == "gpu" else number / chip.cores
    shape = cubic_shape(chip, int(chips)) if chips == int(chips) else None
    if shape is None:
        if chip.maker == "gpu":
            numbers = f"Write a number from 1 to {chip.max_chips}."
        else:
            torus = f"{chip.name}:{'x'.join(['4'] * chip.dimensions)}"
            numbers = f"Write one of the powers of two up to {chip.max_chips}, or the torus, such as {torus}."
        raise ConfigError(f"topology {text!r}: there is no slice of {chips:g} {chip.name} chips. {numbers}")
    return shape


def devices(topology: Topology) -> list["jax.Device"]:
    """The devices of a topology of TPUs, which programs can be compiled for but not run on.

    Raises ConfigError if libtpu is not installed or refuses the shape.
    """
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"plan compiles for TPUs with libtpu, which is not installed. Run {LIBTPU}") from error
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    sides = (*topology.shape, 1)[:3]
    if any(side % 2 for side in sides[:2]):
        # By default, libtpu assumes hosts of 2 x 2 chips.
        options["chips_per_host_bounds"] = (*(1 if side % 2 else 2 for side in sides[:2]), 1)
    if topology.count > 1:
        options["num_slices"] = topology.count
    if topology.chip.config is not None:
        options["chip_config_name"] = topology.chip.config
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except RuntimeError as error:
        raise ConfigError(
            f"topology {topology.name}: libtpu refuses it: {error}. Write another shape, with powers of two as sides."
        ) from error
    return list(description.devices)
