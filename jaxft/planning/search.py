"""Search for the cheapest and the fastest slice, mesh, micro-batch and rematerialisation policy that a run fits."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxft.config import MeshConfig, RunConfig
from jaxft.errors import ConfigError
from jaxft.hardware.chips import CHIPS, Chip
from jaxft.hardware.prices import price_of
from jaxft.hardware.recomputation import MARGIN, POLICIES, with_policy
from jaxft.hardware.topology import ALIASES, Topology, cubic_shape, parse
from jaxft.nn.attention.kernels.splash import fits as kernel_fits
from jaxft.planning.decoding import Decoding
from jaxft.planning.job import (
    AbstractStep,
    ShardedStep,
    abstract_step_of,
    sharded_step_of,
)
from jaxft.planning.result import plan_result
from jaxft.planning.rollout import decoding_of_run, estimate_run, measure_run
from jaxft.planning.shapes import Length, shapes_of

LARGEST = 256  # chips of a slice
# Largest size tried per axis. tensor communicates in every layer; expert sends rows to other shards.
MOST = {"tensor": 8, "expert": 8, "context": 16}
LONG = 4096  # least positions of a row per device of the context axis: shorter parts do not pay for the communication


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a config, estimated by arithmetic. seconds, usd: of one step. peak: bytes of one device."""

    config: RunConfig
    topology: Topology
    seconds: float
    usd: float
    peak: int

    @property
    def overrides(self) -> str:
        """Options to add to `jaxft train --config=...`."""
        mesh, train = self.config.mesh, self.config.train
        fields = {
            "mesh.auto": mesh.auto, "mesh.slice": mesh.slice, "mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp,
            "mesh.expert": mesh.expert, "mesh.context": mesh.context, "mesh.tensor": mesh.tensor,
            "train.accumulation_steps": train.accumulation_steps, "model.remat": self.config.model.remat,
        }  # fmt: skip
        return " ".join(f"--config.{name}={value}" for name, value in fields.items())

    def to_dict(self) -> dict[str, Any]:
        """The candidate as an entry of a search's `candidates`."""
        return {
            "topology": self.topology.name,
            "slices": self.topology.count,
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
    """`{cheapest, fastest, tried, fitting, candidates}`: the first two are plans with `overrides` to paste, or None.

    topologies: kinds such as `v5e,v6e`, of which all slices of up to 256 chips are tried, or names of topologies.
    count: slices, joined by the data-centre network. The batch of a step stays as configured, because it changes what
    is learned. Thousands of candidates are estimated by arithmetic; those that fit are compiled, the best first, at
    most `compiles` for each of cheapest and fastest, until one fits by the compiler too.
    Raises ConfigError if no candidate fits.
    """
    planner = _Planner(config=config, level=level, prices=prices, length=length)
    tried, fitting = 0, []
    for variant, topology in variants(config, _parse_topologies(topologies, count), planner.base.model.experts):
        tried += 1
        candidate = planner.estimate(variant, topology)
        if candidate is not None:
            fitting.append(candidate)
    if not fitting:
        raise ConfigError(
            f"none of {tried} ways to run this on {topologies} fits by arithmetic, slices of up to {LARGEST} chips "
            "included. Train adapters (adapter.kind=lora), lower data.max_length, or name larger chips."
        )
    by_price = sorted(fitting, key=lambda c: (c.usd, c.seconds))
    by_time = sorted(fitting, key=lambda c: (c.seconds, c.usd))
    return {
        "cheapest": planner.first_that_fits(by_price, compiles),
        "fastest": planner.first_that_fits(by_time, compiles),
        "tried": tried,
        "fitting": len(fitting),
        "candidates": [candidate.to_dict() for candidate in by_price[:10]],
    }


class _Planner:
    """Estimates and compiles candidates of one config, each only once."""

    def __init__(self, *, config: RunConfig, level: str, prices: str | None, length: Length) -> None:
        self.level, self.prices, self.length = level, prices, length
        self.hf_config, self.shapes_from = shapes_of(config)
        self.abstract_steps: dict[tuple[str, int], AbstractStep] = {}
        self.plans: dict[tuple[str, Topology], dict[str, Any]] = {}
        self.sharded_steps: dict[tuple[MeshConfig, Topology], tuple[ShardedStep, Decoding | None] | None] = {}
        self.base = self._abstract_step(config)

    def _abstract_step(self, config: RunConfig) -> AbstractStep:
        """Of the fields that a search varies, the model and the step depend on these two alone."""
        key = (config.model.remat, config.train.accumulation_steps)
        if key not in self.abstract_steps:
            self.abstract_steps[key] = abstract_step_of(config, self.hf_config, self.length.steps)
        return self.abstract_steps[key]

    def estimate(self, config: RunConfig, topology: Topology) -> Candidate | None:
        """The candidate; None if the mesh does not divide the arrays or the heads, or if it needs too much memory."""
        known = self._sharded_step(config, topology)
        if known is None:
            return None
        costs = estimate_run(*known)
        peak = costs.peak
        if peak > MARGIN * topology.chip.hbm_bytes / topology.chip.devices:
            return None
        seconds = costs.seconds
        usd = seconds / 3600 * topology.chips * price_of(topology.chip.name, self.prices).on_demand
        return Candidate(config=config, topology=topology, seconds=seconds, usd=usd, peak=peak)

    def _sharded_step(self, config: RunConfig, topology: Topology) -> tuple[ShardedStep, Decoding | None] | None:
        """The step on an abstract mesh, by which alone the shardings are determined, and how answers are decoded."""
        key = (config.mesh, topology)
        if key not in self.sharded_steps:
            try:
                step = sharded_step_of(self.base, config, topology, real=False)
                self.sharded_steps[key] = step, decoding_of_run(step)
            except ConfigError:
                self.sharded_steps[key] = None
        known = self.sharded_steps[key]
        return None if known is None else (dataclasses.replace(known[0], config=config), known[1])

    def plan(self, candidate: Candidate) -> dict[str, Any]:
        """The plan of a candidate, compiled, with its overrides."""
        key = (repr(candidate.config), candidate.topology)
        if key not in self.plans:
            step = sharded_step_of(self._abstract_step(candidate.config), candidate.config, candidate.topology)
            result = plan_result(
                step, measure_run(step, self.level),
                length=self.length, shapes_from=self.shapes_from, prices=self.prices,
            )  # fmt: skip
            self.plans[key] = result | {"overrides": candidate.overrides}
        return self.plans[key]

    def first_that_fits(self, candidates: list[Candidate], compiles: int) -> dict[str, Any] | None:
        """The plan of the first candidate that fits by the compiler; None if the first `compiles` of them do not.

        After one that does not fit, candidates are skipped unless their estimate is at least a tenth smaller.
        """
        bound = math.inf
        for candidate in candidates:
            if compiles == 0:
                break
            if candidate.peak > bound:
                continue
            compiles -= 1
            plan = self.plan(candidate)
            if plan["fits"]:
                return plan
            bound = 0.9 * candidate.peak
        return None


def _parse_topologies(topologies: str, count: int) -> list[Topology]:
    out = []
    for name in (part.strip() for part in topologies.split(",") if part.strip()):
        kind = ALIASES.get(name.lower(), name.lower())
        if kind not in CHIPS:
            out.append(parse(name, count))
            continue
        sizes = (2**power for power in range(LARGEST.bit_length()) if _is_offered(CHIPS[kind], 2**power))
        torus_shapes = (cubic_shape(CHIPS[kind], size) for size in sizes)
        out += [Topology(chip=CHIPS[kind], shape=shape, count=count) for shape in torus_shapes if shape is not None]
    return out


def _is_offered(chip: Chip, chips: int) -> bool:
    """Whether clouds rent out slices of this size: of 2D kinds single chips and whole hosts, of 3D kinds whole hosts of
    four chips.
    """
    return chip.maker == "gpu" or chips >= 4 or (chips == 1 and chip.dimensions == 2)


def variants(
    config: RunConfig, topologies: list[Topology], experts: int | None
) -> Iterator[tuple[RunConfig, Topology]]:
    """Every combination of topology, mesh, micro-batch and rematerialisation policy.

    experts: in each layer of the model; None for a dense model. The context axis is tried if it leaves parts of at
    least LONG positions, the expert axis if it divides the experts.
    """
    batch, length = config.train.batch_size, config.data.max_length
    for topology in topologies:
        devices = topology.devices // topology.count
        for axes in _meshes(devices, length=length, experts=experts):
            rows = topology.count * axes["data"] * axes["fsdp"] * axes["expert"]
            mesh = dataclasses.replace(config.mesh, auto=False, slice=topology.count, **axes)
            for policy, steps in itertools.product(POLICIES, (1, 2, 4, 8, 16, 32)):
                if batch % steps == 0 and batch // steps % rows == 0:
                    train = dataclasses.replace(config.train, accumulation_steps=steps)
                    yield dataclasses.replace(with_policy(config, policy), mesh=mesh, train=train), topology


def splits_rows(length: int, ways: int) -> bool:
    """Whether rows in `ways` parts, one for each device of the context axis, have long parts of whole blocks."""
    return length >= ways * LONG and kernel_fits(length, ways)


def _meshes(devices: int, *, length: int, experts: int | None) -> Iterator[dict[str, int]]:
    """Sizes of the axes within one slice, all powers of two."""
    powers = [2**power for power in range(devices.bit_length()) if devices % 2**power == 0]
    contexts = [n for n in powers if n == 1 or (n <= MOST["context"] and splits_rows(length, n))]
    expert_sizes = [n for n in powers if n == 1 or (n <= MOST["expert"] and experts is not None and experts % n == 0)]
    tensors = [n for n in powers if n <= MOST["tensor"]]
    for tensor, context, expert, fsdp in itertools.product(tensors, contexts, expert_sizes, powers):
        if devices % (tensor * context * expert * fsdp) == 0:
            data = devices // (tensor * context * expert * fsdp)
            yield {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
