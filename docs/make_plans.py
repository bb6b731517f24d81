"""Writes what `jaxft plan` expects into the docstrings of configs: `python docs/make_plans.py [NAME ...]`.

A config of `configs/` that is meant for a slice says so in a line of its docstring, `Planned for v5e:4x4: ...`. What
follows the slice is written here: the step is compiled for it at level O1, by `jaxft.plan`, which gives the figures
that `jaxft plan --json` prints. Without names every such config is planned, one after the other, about a minute each
and more for large models. A new config starts with `Planned for SLICE: no figures yet`.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxft

CONFIGS = Path(__file__).parents[1] / "configs"
GIB = 2**30
STEPS = 1000  # the data of these configs is the user's own, so that the length of the run is not known

LINE = re.compile(r"^Planned for (?P<topology>\S+): (?P<rest>.+)$", re.MULTILINE)
FIGURES = re.compile(
    r"(?P<batch_size>[\d,]+) x (?P<max_length>[\d,]+) tokens, (?P<used>[\d.]+) of (?P<limit>[\d.]+) GiB HBM, "
    r"(?P<speed>[\d,]+) tokens/s a chip; 1,000 steps: (?P<hours>[\d,.]+) h, USD (?P<usd>[\d,.]+)"
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Such a line. used, limit: GiB of one device. speed: tokens a second and chip. hours, usd: of 1,000 steps."""

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


def of_figures(figures: dict[str, Any]) -> Planned:
    """The line of a plan. Raises SystemExit for one that does not fit or that no compiler has seen."""
    if not figures["fits"] or not figures["compiled"]:
        raise SystemExit(
            f"{figures['topology']}: {figures['hbm_peak_bytes'] / GIB:.2f} of {figures['hbm_limit_bytes'] / GIB:.2f} "
            f"GiB, fits={figures['fits']}, compiled={figures['compiled']}: name a larger slice in the config's line, "
            "or a smaller batch"
        )
    hours = STEPS * figures["step_seconds"] / 3600
    return Planned(
        topology=figures["topology"],
        batch_size=figures["batch_size"],
        max_length=figures["max_length"],
        used=round(figures["hbm_peak_bytes"] / GIB, 2),
        limit=round(figures["hbm_limit_bytes"] / GIB, 2),
        speed=round(figures["tokens_per_second_per_chip"]),
        hours=round(hours, 2),
        usd=round(hours * figures["chips"] * figures["usd_per_chip_hour"], 2),
    )


def topology_in(path: Path) -> str | None:
    """The slice that a config is meant for, None where it names none. Raises SystemExit where it names several."""
    found = LINE.findall(path.read_text(encoding="utf-8"))
    if len(found) > 1:
        raise SystemExit(f"{path.name} has {len(found)} lines that begin with 'Planned for': keep one")
    return found[0][0] if found else None


def read(path: Path) -> Planned:
    """The line of a config. Raises SystemExit where there is none with figures."""
    topology = topology_in(path)
    found = FIGURES.fullmatch(LINE.search(path.read_text(encoding="utf-8")).group("rest")) if topology else None
    if found is None:
        raise SystemExit(
            f"{path.name}: its docstring has no 'Planned for SLICE: ...' with figures. Write 'Planned for SLICE: no "
            f"figures yet' and run python docs/make_plans.py {path.stem}"
        )
    kinds = Planned.__annotations__
    return Planned(
        topology=topology, **{name: kinds[name](text.replace(",", "")) for name, text in found.groupdict().items()}
    )


def write(path: Path, planned: Planned) -> None:
    """Puts a line in the place of the one that is there."""
    text = path.read_text(encoding="utf-8")
    path.write_text(LINE.sub(lambda _: str(planned), text, count=1), encoding="utf-8")


def plan(path: Path) -> Planned:
    """The line as it would be written now."""
    return of_figures(jaxft.plan(jaxft.get_config(str(path)), topology_in(path), level="O1"))


def main(names: list[str]) -> None:
    """Writes the lines of these configs, or of all that have one."""
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
