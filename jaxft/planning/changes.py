"""What would make a run fit that does not: the cheapest change first."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxft.config import RunConfig, resolve
from jaxft.errors import JaxftError
from jaxft.hardware.compile import Memory
from jaxft.hardware.topology import Topology, shapes
from jaxft.planning.job import AbstractStep, placed_step_of, reckon, time_of
from jaxft.planning.search import splits_rows

SHOWN = 5
MARGIN = 0.97  # of the limit: arithmetic is not the compiler


@dataclass(frozen=True, kw_only=True)
class Change:
    """One way to need less. settings: of the config, by path.

    kind: of those of one kind the first that fits is shown. alters: whether the run learns otherwise than it would.
    """

    kind: str
    what: str
    settings: dict[str, Any]
    slices: Topology
    alters: bool = False

    def paste(self, before: Topology) -> str:
        """What to add to the command."""
        place = [f"--topology={self.slices.name}"] if self.slices != before else []
        return " ".join([*place, *(f"--config.{path}={value}" for path, value in self.settings.items())])

    def applied(self, config: RunConfig) -> RunConfig:
        """The config with the settings. Raises ConfigError where they contradict others."""
        sections = config.to_dict()
        for path, value in self.settings.items():
            section, name = path.split(".")
            sections[section][name] = value
        return resolve(sections)


def changes_of(
    abstract_step_of: Callable[[RunConfig], AbstractStep],
    config: RunConfig,
    slices: Topology,
    figures: Mapping[str, Any],
    reckoned: Memory,
) -> list[dict[str, Any]]:
    """Changes that fit: `{what, paste, hbm_peak_bytes, step_seconds}`. Those that learn the same come first, of equals
    the one whose step costs least.

    Each is reckoned by arithmetic. What a step needs beside its arguments, whose sizes are known, is scaled by what the
    compiler said of it for the config as it is. reckoned: memory of that config by arithmetic.
    """
    scale = (figures["hbm_peak_bytes"] - figures["argument_bytes"]) / max(1, reckoned.peak - reckoned.arguments)
    found: dict[str, tuple[tuple[bool, float], dict[str, Any]]] = {}
    blueprints: dict[Any, AbstractStep] = {}
    for change in _changes(config, slices):
        if change.kind in found:
            continue
        try:
            changed = change.applied(config)
            # Arithmetic asks for the arrays of the state alone.
            arrays = (changed.model.param_dtype, changed.model.quantization, changed.adapter)
            if arrays not in blueprints:
                blueprints[arrays] = abstract_step_of(changed)
            job = placed_step_of(blueprints[arrays], changed, change.slices, real=False)
        except JaxftError:
            continue  # the mesh does not divide the batch or the arrays, or the model has no such form
        done = reckon(job)
        peak = int(done.memory.arguments + scale * (done.memory.peak - done.memory.arguments))
        if peak <= MARGIN * figures["hbm_limit_bytes"]:
            seconds = time_of(job, done.costs).total
            said = {"what": change.what, "paste": change.paste(slices), "hbm_peak_bytes": peak, "step_seconds": seconds}
            found[change.kind] = ((change.alters, seconds * change.slices.chips), said)
    ranked = sorted(found.values(), key=lambda pair: pair[0])
    return [said for _, said in ranked[:SHOWN]]


def _changes(config: RunConfig, slices: Topology) -> Iterator[Change]:
    """Of each kind the gentlest first."""
    again = {} if config.model.remat == "full" else {"model.remat": "full"}
    if again:
        yield Change(kind="remat", what="recompute every layer", settings=again, slices=slices)
    if slices.chip.maker == "tpu":
        what, settings = "keep what enters each layer in the host's memory", {"model.remat": "offload"}
        yield Change(kind="remat", what=what, settings=settings, slices=slices)
    gentle = Change(kind="micro-batches", what="the same", settings=again, slices=slices)
    yield from list(_in_micro_batches(gentle, config))[1:]
    for axis, ways in _axes(config, slices):
        what = {"tensor": "heads and inner units", "context": "positions of a row"}[axis]
        settings = again | _mesh(**{axis: ways})
        change = Change(kind=axis, what=f"{what} over {ways} devices", settings=settings, slices=slices)
        yield from _in_micro_batches(change, config)
    for larger in _larger(slices):
        settings = again | ({} if config.mesh.auto else {"mesh.data": 1, "mesh.fsdp": -1})
        yield Change(kind="slice", what=f"a slice of {larger.name}", settings=settings, slices=larger)
    for what, settings in _other_weights(config):
        change = Change(kind=what, what=what, settings=again | settings, slices=slices, alters=True)
        yield from _in_micro_batches(change, config)


def _in_micro_batches(change: Change, config: RunConfig) -> Iterator[Change]:
    """The change, and with it smaller and smaller micro-batches."""
    yield change
    for times in (2, 4, 8, 16):
        settings = change.settings | {"train.accumulation_steps": config.train.accumulation_steps * times}
        yield replace(change, what=f"{change.what} in {times} times smaller micro-batches", settings=settings)


def _axes(config: RunConfig, slices: Topology) -> Iterator[tuple[str, int]]:
    """Other axes of the mesh, and sizes that divide the devices and what they split."""
    inside = slices.devices // slices.count
    for ways in (2, 4, 8):
        if inside % ways == 0:
            yield "tensor", ways
            if splits_rows(config.data.max_length, ways):
                yield "context", ways


def _mesh(**axis: int) -> dict[str, Any]:
    axes = {"data": 1, "fsdp": -1, "expert": 1, "context": 1, "tensor": 1} | axis
    return {"mesh.auto": False, **{f"mesh.{name}": size for name, size in axes.items()}}


def _larger(slices: Topology) -> Iterator[Topology]:
    chips = slices.chips // slices.count
    for times in (2, 4, 8, 16):
        shape = shapes(slices.chip, chips * times)
        if shape is not None:
            yield Topology(chip=slices.chip, shape=shape, count=slices.count)


def _other_weights(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fewer weights that move, and fewer bits for those that do not."""
    lora, four_bits = {"adapter.kind": "lora", "model.param_dtype": "bfloat16"}, {"model.quantization": "nf4-dq"}
    if config.adapter.kind == "none":
        yield "train adapters instead of all parameters", lora
        yield "train adapters on a base in 4 bits (QLoRA)", lora | four_bits
    elif config.model.quantization is None:
        yield "keep the base in 4 bits (QLoRA)", four_bits
