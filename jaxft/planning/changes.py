"""Changes that would make a run fit if it does not, the cheapest first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxft.config import AdapterConfig, RunConfig, resolve
from jaxft.errors import JaxftError
from jaxft.generation.buckets import power_of_two
from jaxft.hardware.recomputation import with_policy
from jaxft.hardware.topology import Topology, cubic_shape
from jaxft.methods import method_of
from jaxft.planning.job import AbstractStep, recomputation_of, sharded_step_of
from jaxft.planning.rollout import RunCosts, estimate_run
from jaxft.planning.search import splits_rows

SHOWN = 5
MARGIN = 0.97  # of the limit: the estimate may be below what the compiler needs
# The config fields that determine the arrays of the state: model.param_dtype, model.quantization and the adapter.
StateKey = tuple[str, str | None, AdapterConfig]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One way to need less memory. settings: config fields by path. topology: the new one, or the same.

    kind: only the first change of a kind that fits is shown. alters: whether it changes what the run learns.
    """

    kind: str
    what: str
    settings: dict[str, Any]
    topology: Topology
    alters: bool = False

    def paste(self, before: Topology) -> str:
        """The options to add to the command, which now names the topology `before`."""
        options = [f"--topology={self.topology.name}"] if self.topology != before else []
        return " ".join([*options, *(f"--config.{path}={value}" for path, value in self.settings.items())])

    def apply_to(self, config: RunConfig) -> RunConfig:
        """The config with the settings. Raises ConfigError if they contradict other fields."""
        sections = config.to_dict()
        for path, value in self.settings.items():
            *parents, name = path.split(".")
            section = sections
            for parent in parents:
                section = section[parent]
            section[name] = value
        return resolve(sections)


def changes_of(
    abstract_step_of: Callable[[RunConfig], AbstractStep],
    config: RunConfig,
    topology: Topology,
    limit: int,
    measured: RunCosts,
    estimate: RunCosts,
) -> list[dict[str, Any]]:
    """Up to 5 changes that make the run fit: `{what, paste, hbm_peak_bytes, step_seconds}`.

    Changes that leave what is learned unchanged come first; among equals, the one whose step costs least. All are
    estimated by arithmetic. limit: bytes of one device. measured: the costs of the config as it is; estimate: the same
    by arithmetic. The size of arguments is exact; the rest is scaled by the ratio of the two.
    """
    fitting: dict[str, tuple[tuple[bool, float], dict[str, Any]]] = {}
    abstract_steps: dict[StateKey, AbstractStep] = {}
    for change in _changes(config, topology):
        if change.kind in fitting:
            continue
        try:
            changed = change.apply_to(config)
            # An estimate needs only the arrays of the state.
            key = (changed.model.param_dtype, changed.model.quantization, changed.adapter)
            if key not in abstract_steps:
                abstract_steps[key] = abstract_step_of(changed)
            step = sharded_step_of(abstract_steps[key], changed, change.topology, real=False)
            if changed.model.remat == "auto":
                step = replace(step, config=with_policy(step.config, recomputation_of(step).policy))
            costs = estimate_run(step)
        except JaxftError:
            continue  # the mesh does not divide the batch or the arrays, or the model cannot be trained in this way
        peak = costs.scaled_peak(measured, estimate)
        if peak <= MARGIN * limit:
            seconds = costs.seconds
            entry = {
                "what": change.what, "paste": change.paste(topology), "hbm_peak_bytes": peak, "step_seconds": seconds,
            }  # fmt: skip
            fitting[change.kind] = ((change.alters, seconds * change.topology.chips), entry)
    ranked = sorted(fitting.values(), key=lambda pair: pair[0])
    return [entry for _, entry in ranked[:SHOWN]]


def _changes(config: RunConfig, topology: Topology) -> Iterator[Change]:
    """All changes; within a kind, those that cost least time first."""
    # With `auto` a plan that does not fit recomputes as much as it can, and each change as much as it must.
    chosen = config.model.remat == "auto"
    remat: dict[str, Any] = {} if config.model.remat == "full" or chosen else {"model.remat": "full"}
    if remat:
        yield Change(kind="remat", what="recompute every layer", settings=remat, topology=topology)
    if topology.chip.maker == "tpu" and not chosen:
        what, offload = "keep what enters each layer in the host's memory", {"model.remat": "offload"}
        yield Change(kind="remat", what=what, settings=offload, topology=topology)
    same = Change(kind="micro-batches", what="the same", settings=remat, topology=topology)
    yield from list(_in_micro_batches(same, config))[1:]
    yield from _smaller_rollouts(config, topology, remat)
    for axis, ways in _axes(config, topology):
        what = {"tensor": "heads and inner units", "context": "positions of a row"}[axis]
        settings = remat | _mesh(**{axis: ways})
        change = Change(kind=axis, what=f"{what} over {ways} devices", settings=settings, topology=topology)
        yield from _in_micro_batches(change, config)
    for larger in _larger_topologies(topology):
        settings = remat | ({} if config.mesh.auto else {"mesh.data": 1, "mesh.fsdp": -1})
        yield Change(kind="slice", what=f"a slice of {larger.name}", settings=settings, topology=larger)
    for what, settings in _smaller_states(config):
        change = Change(kind=what, what=what, settings=remat | settings, topology=topology, alters=True)
        yield from _in_micro_batches(change, config)


def _smaller_rollouts(config: RunConfig, topology: Topology, remat: dict[str, Any]) -> Iterator[Change]:
    """Fewer answers that are decoded at a time, then shorter ones; alone, and with every layer recomputed."""
    size = method_of(config).rollout_size(config)
    if size is None:
        return
    slots = size.slots if size.keep_slots else min(size.slots, power_of_two(size.answers))
    for fewer in (slots // times for times in (2, 4, 8, 16) if slots >= times):
        what = f"decode {fewer} answers at a time"
        for more in ({}, remat):
            yield Change(kind="slots", what=what, settings={size.slots_field: fewer} | more, topology=topology)
    for times in (2, 4):
        spared = size.max_completion_length - size.max_completion_length // times
        settings = {size.length_field: size.max_completion_length // times, "data.max_length": size.length - spared}
        for more in ({}, remat):
            what = f"answers of at most {size.max_completion_length // times} tokens"
            yield Change(kind="answers", what=what, settings=settings | more, topology=topology, alters=True)


def _in_micro_batches(change: Change, config: RunConfig) -> Iterator[Change]:
    """The change alone, then together with smaller and smaller micro-batches."""
    yield change
    for times in (2, 4, 8, 16):
        settings = change.settings | {"train.accumulation_steps": config.train.accumulation_steps * times}
        yield replace(change, what=f"{change.what} in {times} times smaller micro-batches", settings=settings)


def _axes(config: RunConfig, topology: Topology) -> Iterator[tuple[str, int]]:
    """(mesh axis, size) that divide the devices of a slice and whatever the axis splits."""
    devices = topology.devices // topology.count
    for ways in (2, 4, 8):
        if devices % ways == 0:
            yield "tensor", ways
            if splits_rows(config.data.max_length, ways):
                yield "context", ways


def _mesh(**axis: int) -> dict[str, Any]:
    axes = {"data": 1, "fsdp": -1, "expert": 1, "context": 1, "tensor": 1} | axis
    return {"mesh.auto": False, **{f"mesh.{name}": size for name, size in axes.items()}}


def _larger_topologies(topology: Topology) -> Iterator[Topology]:
    chips = topology.chips // topology.count
    for times in (2, 4, 8, 16):
        shape = cubic_shape(topology.chip, chips * times)
        if shape is not None:
            yield Topology(chip=topology.chip, shape=shape, count=topology.count)


def _smaller_states(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what, settings) with fewer trainable parameters, or frozen ones in fewer bits."""
    lora, four_bits = {"adapter.kind": "lora", "model.param_dtype": "bfloat16"}, {"model.quantization": "nf4-dq"}
    if config.adapter.kind == "none":
        yield "train adapters instead of all parameters", lora
        yield "train adapters on a base in 4 bits (QLoRA)", lora | four_bits
    elif config.model.quantization is None:
        yield "keep the base in 4 bits (QLoRA)", four_bits
