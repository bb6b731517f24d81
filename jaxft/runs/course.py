"""The course of a run before it starts: its steps, and whether they can teach; with settings that suit its data."""

import math
from dataclasses import dataclass
from typing import Any

from jaxft.config import RunConfig
from jaxft.data import Prepared
from jaxft.data.batch_source import BatchSource
from jaxft.data.loader import Loader, steps_for
from jaxft.data.mixture import Mixture
from jaxft.errors import counted

FEW = 10  # steps; a run of fewer is announced
ENOUGH = 20  # steps that the recommended settings give at least


@dataclass(frozen=True, kw_only=True)
class Course:
    """steps, epochs: of the run. batch_size: sequences of a step. sequences, tokens: of an epoch.

    prompts: of an epoch, if the method samples answers to them; else None. crowded: for each set of which a batch holds
    some sequence twice, its sequences and the number in a batch.
    """

    steps: int
    batch_size: int
    epochs: float
    sequences: int
    tokens: int
    prompts: int | None
    crowded: dict[str, tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """What data.json has of it."""
        names = ["steps", "epochs", *(["prompts"] if self.prompts else ["batch_size", "sequences", "tokens"])]
        return {name: getattr(self, name) for name in names}

    def sentence(self) -> str:
        """The length of the run, for people."""
        steps = f"the run: {counted(self.steps, 'step')}"
        if self.prompts is not None:
            return f"{steps}, {self.epochs:.2f} epochs of {counted(self.prompts, 'prompt')}"
        sequences = counted(self.sequences, "sequence")
        return (
            f"{steps} of {counted(self.batch_size, 'sequence')}, {self.epochs:.2f} epochs of {sequences} "
            f"({counted(self.tokens, 'token')})"
        )


def course_of(config: RunConfig, data: Prepared, source: BatchSource) -> Course:
    """The course of a run."""
    batch_size = config.train.batch_size
    return Course(
        steps=source.total_steps,
        batch_size=batch_size,
        epochs=source.epoch_of(source.total_steps),
        sequences=round(source.steps_per_epoch * batch_size),
        tokens=data.examination.tokens,
        prompts=data.examination.examples if config.method.chosen.ROWS == "prompts" else None,
        crowded=_crowded(source, batch_size),
    )


def warnings_of(course: Course, config: RunConfig, data: Prepared, unit: int) -> list[str]:
    """What keeps the run from teaching much, each with settings that help with these rows; often nothing.

    unit: the batch size must be a multiple of it, for the devices and for train.accumulation_steps.
    """
    mend, problems = _mend(course, config, data, unit), []
    if course.crowded:
        sets = "; ".join(
            f"{'' if name == 'train' else f'of the set {name!r} '}{counted(taken, 'place')} for "
            f"{counted(sequences, 'sequence')}"
            for name, (sequences, taken) in course.crowded.items()
        )
        problems.append(f"every batch holds the same rows several times ({sets}), which teach no more than once")
    if course.steps < FEW:
        problems.append(f"the whole run is {counted(course.steps, 'step')}, so that little is learned")
    warnings = [f"{'; '.join(problems)}. {mend}"] if problems else []
    if config.train.on_spike != "off" and config.train.spike_window >= course.steps:
        warnings.append(
            f"train.spike_window={config.train.spike_window} is not shorter than the run of {course.steps} steps, so "
            "that only numbers that are not finite are spikes. Lower train.spike_window."
        )
    return warnings


def recommended(
    *, sequences: int, examples: int, packing: bool, batch_size: int, epochs: float, unit: int
) -> tuple[dict[str, Any], int]:
    """(settings, steps): other settings by their fields with which a run has enough steps and no copies in a batch.

    sequences: packed ones, of an epoch. examples: the same rows, each in a sequence of its own. The fewest changes that
    do are taken: a smaller batch, then sequences of one row, then more epochs.
    """
    sizes = [unit]
    while sizes[-1] * 2 <= batch_size:
        sizes.append(sizes[-1] * 2)
    for packed in (True, False) if packing else (False,):
        count = sequences if packed else examples
        for size in reversed(sizes):
            if size <= count and (steps := steps_for(epochs, count, size)) >= ENOUGH:
                return _changes(packing, packed, batch_size, size, epochs, epochs), steps
    count, size = examples, sizes[0]
    longer = float(-(-ENOUGH * size // count))
    return _changes(packing, False, batch_size, size, epochs, longer), steps_for(longer, count, size)


def _changes(packing: bool, packed: bool, batch_size: int, size: int, epochs: float, longer: float) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if packed != packing:
        changes["data.packing"] = packed
    if size != batch_size:
        changes["train.batch_size"] = size
    if longer != epochs:
        changes["train.epochs"] = longer
    return changes


def _mend(course: Course, config: RunConfig, data: Prepared, unit: int) -> str:
    if config.train.steps is not None and not course.crowded:
        return "Raise train.steps, or leave it out for train.epochs to decide."
    if course.prompts is not None:
        return f"With train.epochs={float(math.ceil(config.train.epochs * ENOUGH / course.steps))} it has enough steps."
    if config.data.mixture:
        return "Lower train.batch_size, or raise train.steps or train.epochs, or give the small sets less weight."
    settings, steps = recommended(
        sequences=course.sequences,
        examples=data.examination.examples,
        packing=config.data.packing,
        batch_size=config.train.batch_size,
        epochs=config.train.epochs,
        unit=unit,
    )
    if config.train.steps is not None:
        settings.pop("train.epochs", None)  # not read
    words = " ".join(f"{key}={value}" for key, value in settings.items())
    if config.train.steps is not None:
        return f"With {words} no batch holds a row twice."
    return f"With {words} the run has {counted(steps, 'step')}."


def _crowded(source: BatchSource, batch_size: int) -> dict[str, tuple[int, int]]:
    if isinstance(source, Loader):
        sequences = len(source.plan)
        return {"train": (sequences, batch_size)} if batch_size > sequences else {}
    crowded: dict[str, tuple[int, int]] = {}
    if isinstance(source, Mixture):
        for start, _, _ in source.stages():
            before, after = (source.schedule.counts((start + more) * batch_size) for more in (0, 1))
            for (name, stream), first, last in zip(source.streams.items(), before, after, strict=True):
                if last - first > len(stream):
                    crowded[name] = (len(stream), last - first)
    return crowded
