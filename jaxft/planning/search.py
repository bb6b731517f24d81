"""The cheapest and the fastest slice, mesh, micro-batch and rematerialisation that a run fits."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxft.config import MeshConfig, RunConfig
from jaxft.config_checks import REMAT_POLICIES
from jaxft.errors import ConfigError
from jaxft.hardware.chips import CHIPS, Chip
from jaxft.hardware.prices import price_of
from jaxft.hardware.topology import ALIASES, Topology, parse, shapes
from jaxft.nn.attention.splash import fits as kernel_fits
from jaxft.planning.figures import result_of
from jaxft.planning.job import AbstractStep, PlacedStep, abstract_step_of, measure, placed_step_of, reckon, time_of
from jaxft.planning.shapes import Length, shapes_of

MARGIN = 0.9  # of the limit that arithmetic may use up: what is nearer is not compiled
LARGEST = 256
# Ways of an axis at most: of what is exchanged in every layer, and of rows, which meet all places of the expert axis.
MOST = {"tensor": 8, "expert": 8, "context": 16}
LONG = 4096  # positions of a row that a device keeps where the context axis cuts it: shorter parts are not worth it


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run, reckoned by arithmetic. usd: of a step."""

    config: RunConfig
    slices: Topology
    seconds: float
    usd: float
    peak: int

    @property
    def overrides(self) -> str:
        """What to paste behind `jaxft train --config=...`."""
        mesh, train = self.config.mesh, self.config.train
        fields = {
            "mesh.auto": mesh.auto, "mesh.slice": mesh.slice, "mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp,
            "mesh.expert": mesh.expert, "mesh.context": mesh.context, "mesh.tensor": mesh.tensor,
            "train.accumulation_steps": train.accumulation_steps, "model.remat": self.config.model.remat,
        }  # fmt: skip
        return " ".join(f"--config.{name}={value}" for name, value in fields.items())

    def to_dict(self) -> dict[str, Any]:
        """Its figures, as a search lists them."""
        return {
            "topology": self.slices.name,
            "slices": self.slices.count,
            "overrides": self.overrides,
            "step_seconds": self.seconds,
            "usd_per_step": self.usd,
            "hbm_peak_bytes": self.peak,
        }


def search(
    config: RunConfig,
    topologies: str,
    count: int,
    *,
    compiles: int,
    level: str,
    prices: str | None,
    length: Length,
) -> dict[str, Any]:
    """`{cheapest, fastest, reckoned, fitting, candidates}`: the first two are plans with `overrides` to paste.

    topologies: kinds such as `v5e,v6e`, whose slices of up to 256 chips are all tried, or whole names. The batch of a
    step stays as configured: it belongs to what is learnt. Thousands of ways are reckoned by arithmetic; those that fit
    are compiled from the best on, at most `compiles` for each of the two, until one is known to fit.
    Raises ConfigError where nothing fits.
    """
    bench = _Bench(config=config, level=level, prices=prices, length=length)
    tried, fitting = 0, []
    for variant, slices in variants(config, _slices(topologies, count), bench.base.model.experts):
        tried += 1
        candidate = bench.reckoned(variant, slices)
        if candidate is not None:
            fitting.append(candidate)
    if not fitting:
        raise ConfigError(
            f"none of {tried} ways to run this on {topologies} fits by arithmetic, slices of up to {LARGEST} chips "
            "included. Train adapters (adapter.kind=lora), lower data.max_length, or name larger chips."
        )
    ranked = sorted(fitting, key=lambda c: (c.usd, c.seconds))
    quick = sorted(fitting, key=lambda c: (c.seconds, c.usd))
    return {
        "cheapest": bench.best(ranked, compiles),
        "fastest": bench.best(quick, compiles),
        "tried": tried,
        "fitting": len(fitting),
        "candidates": [candidate.to_dict() for candidate in ranked[:10]],
    }


class _Bench:
    """Where ways to run one config are reckoned and compiled, each once."""

    def __init__(self, *, config: RunConfig, level: str, prices: str | None, length: Length) -> None:
        self.level, self.prices, self.length = level, prices, length
        self.hf_config, self.shapes = shapes_of(config)
        self.blueprints: dict[Any, AbstractStep] = {}
        self.plans: dict[tuple[str, Topology], dict[str, Any]] = {}
        self.jobs: dict[tuple[MeshConfig, Topology], PlacedStep | None] = {}
        self.base = self._abstract_step(config)

    def _abstract_step(self, config: RunConfig) -> AbstractStep:
        """The model and the step depend on these two alone of what is varied."""
        key = (config.model.remat, config.train.accumulation_steps)
        if key not in self.blueprints:
            self.blueprints[key] = abstract_step_of(config, self.hf_config, self.length.steps)
        return self.blueprints[key]

    def reckoned(self, config: RunConfig, slices: Topology) -> Candidate | None:
        """None where the mesh does not divide the arrays or memory does not suffice."""
        job = self._counted(config, slices)
        if job is None:
            return None
        known = reckon(job)
        if known.memory.peak > MARGIN * slices.chip.hbm_bytes / slices.chip.devices:
            return None
        seconds = time_of(job, known.costs).total
        usd = seconds / 3600 * slices.chips * price_of(slices.chip.name, self.prices).on_demand
        return Candidate(config=config, slices=slices, seconds=seconds, usd=usd, peak=known.memory.peak)

    def _counted(self, config: RunConfig, slices: Topology) -> PlacedStep | None:
        """The step on devices that are only counted. How arrays lie there is a matter of the mesh alone."""
        key = (config.mesh, slices)
        if key not in self.jobs:
            try:
                self.jobs[key] = placed_step_of(self.base, config, slices, real=False)
            except ConfigError:
                self.jobs[key] = None
        job = self.jobs[key]
        return None if job is None else dataclasses.replace(job, config=config)

    def compiled(self, candidate: Candidate) -> dict[str, Any]:
        """The plan of a candidate, with its overrides."""
        key = (repr(candidate.config), candidate.slices)
        if key not in self.plans:
            job = placed_step_of(self._abstract_step(candidate.config), candidate.config, candidate.slices)
            done = measure(job, self.level)
            options = {"level": self.level, "length": self.length, "shapes": self.shapes, "prices": self.prices}
            self.plans[key] = result_of(job, done, time_of(job, done.costs), **options)
            self.plans[key]["overrides"] = candidate.overrides
        return self.plans[key]

    def best(self, candidates: list[Candidate], compiles: int) -> dict[str, Any] | None:
        """The first that compiles and fits, after at most so many compiles; None where none of them does.

        One that needs hardly less memory, by arithmetic, than one that did not fit is passed over.
        """
        bound = math.inf
        for candidate in candidates:
            if compiles == 0:
                break
            if candidate.peak > bound:
                continue
            compiles -= 1
            plan = self.compiled(candidate)
            if plan["fits"]:
                return plan
            bound = 0.9 * candidate.peak
        return None


def _slices(topologies: str, count: int) -> list[Topology]:
    out = []
    for name in (part.strip() for part in topologies.split(",") if part.strip()):
        kind = ALIASES.get(name.lower(), name.lower())
        if kind not in CHIPS:
            out.append(parse(name, count))
            continue
        sizes = (2**power for power in range(LARGEST.bit_length()) if _offered(CHIPS[kind], 2**power))
        found = (shapes(CHIPS[kind], size) for size in sizes)
        out += [Topology(chip=CHIPS[kind], shape=shape, count=count) for shape in found if shape is not None]
    return out


def _offered(chip: Chip, chips: int) -> bool:
    """Whether clouds rent out so many: of 2D kinds single chips and whole hosts, of 3D kinds whole hosts of four."""
    return chip.maker == "gpu" or chips >= 4 or (chips == 1 and chip.dimensions == 2)


def variants(config: RunConfig, places: list[Topology], experts: int | None) -> Iterator[tuple[RunConfig, Topology]]:
    """Every mesh, every micro-batch and every rematerialisation on every slice. experts: of the model's layers.

    The context axis splits rows into parts of at least LONG positions, the expert axis what it divides.
    """
    batch, length = config.train.batch_size, config.data.max_length
    for slices in places:
        inside = slices.devices // slices.count
        for axes in _meshes(inside, length=length, experts=experts):
            rows = slices.count * axes["data"] * axes["fsdp"] * axes["expert"]
            mesh = dataclasses.replace(config.mesh, auto=False, slice=slices.count, **axes)
            for remat, steps in itertools.product(REMAT_POLICIES, (1, 2, 4, 8, 16, 32)):
                if batch % steps == 0 and batch // steps % rows == 0:
                    model = dataclasses.replace(config.model, remat=remat)
                    train = dataclasses.replace(config.train, accumulation_steps=steps)
                    yield dataclasses.replace(config, mesh=mesh, model=model, train=train), slices


def splits_rows(length: int, ways: int) -> bool:
    """Whether so many devices along the context axis leave parts of a row that are long enough and whole blocks."""
    return length >= ways * LONG and kernel_fits(length, ways)


def _meshes(devices: int, *, length: int, experts: int | None) -> Iterator[dict[str, int]]:
    """Sizes of the axes within one slice, powers of two."""
    powers = [2**power for power in range(devices.bit_length()) if devices % 2**power == 0]
    contexts = [n for n in powers if n == 1 or (n <= MOST["context"] and splits_rows(length, n))]
    places = [n for n in powers if n == 1 or (n <= MOST["expert"] and experts is not None and experts % n == 0)]
    tensors = [n for n in powers if n <= MOST["tensor"]]
    for tensor, context, expert, fsdp in itertools.product(tensors, contexts, places, powers):
        if devices % (tensor * context * expert * fsdp) == 0:
            data = devices // (tensor * context * expert * fsdp)
            yield {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
