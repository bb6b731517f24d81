"""Writes the plans of configs into their docstrings: `python docs/make_plans.py [NAME ...]`.

A config of `configs/` that is meant for a slice names it in a line of its docstring, `Planned for v5e:4x4: ...`. This
script writes the rest of the line: `jaxft.plan` compiles the step for the slice at level O1, with the same result as
`jaxft plan --json`. Without names all such configs are planned, one after the other, about a minute each and more for
large models. A new config starts with `Planned for SLICE: no figures yet`.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxft

CONFIGS = Path(__file__).parents[1] / "configs"
GIB = 2**30
STEPS = 1000  # users bring their own data to these configs, so that the length of the run is unknown

LINE = re.compile(r"^Planned for (?P<topology>\S+): (?P<rest>.+)$", re.MULTILINE)
NUMBERS = re.compile(
    r"(?P<batch_size>[\d,]+) x (?P<max_length>[\d,]+) tokens, (?P<used>[\d.]+) of (?P<limit>[\d.]+) GiB HBM, "
    r"(?P<speed>[\d,]+) tokens/s a chip; 1,000 steps: (?P<hours>[\d,.]+) h, USD (?P<usd>[\d,.]+)"
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The content of such a line. used, limit: GiB of one device. speed: tokens per second and chip.

    hours, usd: of 1,000 steps.
    """

    topology: str
    batch_size: int
    max_length: int
    used: float
    limit: float
    speed: int
    hours: float
    usd: float

    def __str__(self) -> str:
        return (
            f"Planned for {self.topology}: {self.batch_size} x {self.max_length:,} tokens, {self.used:.2f} of "
            f"{self.limit:.2f} GiB HBM, {self.speed:,} tokens/s a chip; {STEPS:,} steps: {self.hours:,.2f} h, "
            f"USD {self.usd:,.2f}"
        )


def line_of(plan: dict[str, Any]) -> Planned:
    """The line for a plan. Raises SystemExit if it does not fit or was not compiled."""
    if not plan["fits"] or not plan["compiled"]:
        raise SystemExit(
            f"{plan['topology']}: {plan['hbm_peak_bytes'] / GIB:.2f} of {plan['hbm_limit_bytes'] / GIB:.2f} "
            f"GiB, fits={plan['fits']}, compiled={plan['compiled']}: name a larger slice in the config's line, "
            "or a smaller batch"
        )
    hours = STEPS * plan["step_seconds"] / 3600
    return Planned(
        topology=plan["topology"],
        batch_size=plan["batch_size"],
        max_length=plan["max_length"],
        used=round(plan["hbm_peak_bytes"] / GIB, 2),
        limit=round(plan["hbm_limit_bytes"] / GIB, 2),
        speed=round(plan["tokens_per_second_per_chip"]),
        hours=round(hours, 2),
        usd=round(hours * plan["chips"] * plan["usd_per_chip_hour"], 2),
    )


def topology_in(path: Path) -> str | None:
    """The slice that a config is meant for; None if it names none. Raises SystemExit if it names more than one."""
    lines = LINE.findall(path.read_text(encoding="utf-8"))
    if len(lines) > 1:
        raise SystemExit(f"{path.name} has {len(lines)} lines that begin with 'Planned for': keep one")
    return lines[0][0] if lines else None


def read(path: Path) -> Planned:
    """The line of a config. Raises SystemExit if the config has no line with numbers."""
    topology = topology_in(path)
    line = LINE.search(path.read_text(encoding="utf-8"))
    numbers = NUMBERS.fullmatch(line.group("rest")) if line else None
    if topology is None or numbers is None:
        raise SystemExit(
            f"{path.name}: its docstring has no 'Planned for SLICE: ...' with figures. Write 'Planned for SLICE: no "
            f"figures yet' and run python docs/make_plans.py {path.stem}"
        )
    kinds = Planned.__annotations__
    return Planned(
        topology=topology, **{name: kinds[name](text.replace(",", "")) for name, text in numbers.groupdict().items()}
    )


def write(path: Path, planned: Planned) -> None:
    """Replaces the line of a config."""
    text = path.read_text(encoding="utf-8")
    path.write_text(LINE.sub(lambda _: str(planned), text, count=1), encoding="utf-8")


def plan(path: Path) -> Planned:
    """The line with the numbers of a new plan."""
    return line_of(jaxft.plan(jaxft.get_config(str(path)), topology_in(path), level="O1"))


def main(names: list[str]) -> None:
    """Writes the lines of these configs, or of all configs that name a slice."""
    paths = [CONFIGS / f"{name}.py" for name in names] or sorted(CONFIGS.glob("*.py"))
    for path in paths:
        if names and not path.is_file():
            raise SystemExit(f"there is no {path}")
        if topology_in(path) is None:
            if names:
                raise SystemExit(
                    f"{path.name} names no slice: write 'Planned for SLICE: no figures yet' in its docstring"
                )
            continue
        write(path, plan(path))
        print(f"{path.stem}: {read(path)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
