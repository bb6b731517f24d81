"""Slices of accelerators by name, one or several over the data-centre network: `v5e:4x4`, `v5e-16`, `h100:8`."""

import math
import re
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ConfigError, did_you_mean
from jaxft.hardware.chips import CHIPS, Chip

# What people and Google's own tools call them.
ALIASES = {
    "v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "trillium": "v6e", "v7x": "tpu7x", "tpu7": "tpu7x",
    "ironwood": "tpu7x", "a100": "a100-80", "rtx-4090": "rtx4090", "4090": "rtx4090", "rtx-5090": "rtx5090",
    "5090": "rtx5090",
}  # fmt: skip
LIBTPU = "pip install 'jaxft[plan]'"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """`count` slices of one kind, each a torus of `shape` chips."""

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.count

    @property
    def devices(self) -> int:
        """Of JAX, in all slices."""
        return self.chips * self.chip.devices

    @property
    def name(self) -> str:
        """`v5e:4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def describe(self) -> str:
        """For people: `2 slices of v5e:4x4 (32 chips)`."""
        chips = f"{self.chips} chip{'s' * (self.chips > 1)}"
        return f"{self.count} slices of {self.name} ({chips})" if self.count > 1 else f"{self.name} ({chips})"


def parse(text: str, slices: int = 1) -> Topology:
    """The slices that a name means.

    `KIND:AxB[xC]` is a torus, `KIND-N` and `KIND:N` a size: N chips, or N cores where Google's names count those (v4,
    v5p, tpu7x). Raises ConfigError for an unknown kind, listing the known ones, and for a shape that does not exist.
    """
    found = re.fullmatch(r"(.+?)(?::|-)(\d+(?:x\d+)*)", text.strip().lower()) or re.fullmatch(r"(.+)()", text.lower())
    whole = ALIASES.get(text.lower(), text.lower())
    kind, size = (whole, "1") if whole in CHIPS else (ALIASES.get(found.group(1), found.group(1)), found.group(2))
    if kind not in CHIPS or not size:
        known = [*CHIPS, *ALIASES]
        raise ConfigError(
            f"topology {text!r} is not known.{did_you_mean(kind, known)} Write KIND:AxB, such as v5e:4x4, v5p:2x2x1 or "
            f"h100:8, or a name such as v5e-16. Kinds: {', '.join(CHIPS)}."
        )
    if slices < 1:
        raise ConfigError(f"--slices={slices}: there is at least one slice")
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
        raise ConfigError(f"topology {text!r}: a slice of {kind} has from 1 to {chip.largest} chips")
    return Topology(chip=chip, shape=shape, count=slices)


def cubic_shape(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """The most cubic torus of so many chips, None where there is none: powers of two, whole hosts."""
    if chip.maker == "gpu":
        return (chips,) if chips <= chip.max_chips else None
    if chips & (chips - 1) or not 1 <= chips <= chip.max_chips:
        return None
    sides = [1] * chip.dimensions
    while math.prod(sides) < chips:
        # The last of the shortest grows, but a host is 2 x 2 chips: 1x1, 2x2x1, 2x2x2, 2x4.
        shortest = min(sides)
        at = [i for i, side in enumerate(sides) if side == shortest]
        sides[at[0] if shortest == 1 else at[-1]] *= 2
    return tuple(sides)


def _torus(chip: Chip, number: int, text: str) -> tuple[int, ...]:
    counted = number if ":" in text or chip.maker == "gpu" else number / chip.cores
    shape = cubic_shape(chip, int(counted)) if counted == int(counted) else None
    if shape is None:
        raise ConfigError(
            f"topology {text!r}: there is no slice of {counted:g} {chip.name} chips by size alone; sizes are powers "
            f"of two up to {chip.largest}. Write the torus itself: {chip.name}:{'x'.join(['4'] * chip.dimensions)}."
        )
    return shape


def devices(slices: Topology) -> list[Any]:
    """The slices' devices, to compile for. Raises ConfigError without libtpu, and for a shape that it refuses."""
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"plan compiles for TPUs with libtpu, which is not installed: {LIBTPU}") from error
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    sides = (*slices.shape, 1)[:3]
    if any(side % 2 for side in sides[:2]):
        # A host is 2 x 2 chips unless we say otherwise.
        options["chips_per_host_bounds"] = (*(1 if side % 2 else 2 for side in sides[:2]), 1)
    if slices.count > 1:
        options["num_slices"] = slices.count
    if slices.chip.config is not None:
        options["chip_config_name"] = slices.chip.config
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=slices.name, **options)
    except RuntimeError as error:
        raise ConfigError(f"topology {slices.name}: libtpu refuses it: {error}") from error
    return list(described.devices)
