"""Which run may go on in the folder of another: the same one, perhaps longer, or evaluated otherwise."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxft.config import RunConfig
from jaxft.config.fields import field_values
from jaxft.errors import ConfigError
from jaxft.files.run_folder import CHAT_TEMPLATE
from jaxft.optim.make import make_schedule
from jaxft.runs.identity.contents import HELD_OUT, Reads, other_reads
from jaxft.runs.identity.record import Record, resumed


@dataclass(frozen=True, kw_only=True)
class Start:
    """A run as it is about to start. steps: its length; None for a `Session`. template: its chat template."""

    config: RunConfig
    reads: Reads
    steps: int | None = None
    template: str | None = None


def refuse_other_run(folder: Path, record: Record, before: RunConfig, now: Start, template: str | None) -> None:
    """Raises ConfigError if the run in a folder is another one.

    before, template: the config and the chat template of the run in the folder. Settings that differ are listed, and
    what it reads is named where the contents differ. Of a run from before contents were recorded, the paths must be
    spelt as they were.
    """
    changed = other_values(before, now.config, spelling=not record.reads)
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nSet output_dir to a new folder, or restore the old settings to resume that run."
        )
    if now.template != template:
        raise ConfigError(
            f"{folder} holds a run that was trained with another chat template, {folder / CHAT_TEMPLATE}. Set "
            "output_dir to a new folder, or data.chat_template to that file's text to resume that run."
        )
    known = record.reads
    if now.steps is None:  # the rows of a Session come from outside
        known = {key: one for key, one in known.items() if key in now.reads}
    if other := other_reads(known, now.reads):
        raise ConfigError(
            f"{folder} holds a run that read other contents:\n  "
            + "\n  ".join(other)
            + "\nSet output_dir to a new folder, or restore what it read to resume that run."
        )


def other_values(old: RunConfig, new: RunConfig, *, spelling: bool) -> list[str]:
    """The settings that differ among those that may not change when a run is resumed, with both values.

    spelling: whether the paths are compared too of what is otherwise compared by content.
    """
    before, after = _fixed_values(old, spelling), _fixed_values(new, spelling)
    return [
        f"{key}: was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]


def go_on(record: Record, before: RunConfig, now: Start, newest: int) -> tuple[Record, list[str]]:
    """(the record of a run that goes on from step `newest`, what is otherwise than before, in sentences).

    Raises ConfigError if it is to have fewer steps than it has trained, or another length where the data depend on it.
    """
    if now.steps is None:
        return replace(record, reads={**record.reads, **now.reads}), []
    notes = _other_length(record, before, now, now.steps, newest)
    old, new = record.reads.get(HELD_OUT), now.reads.get(HELD_OUT)
    ranked_after = record.ranked_after
    if record.reads and (old and old["digest"]) != (new and new["digest"]):
        ranked_after = newest
        if old and new:
            notes.append(
                f"the held-out rows ({new['path']}) are others than those until step {newest} ({old['path']}): "
                "held-out metrics are compared among the steps after it alone"
            )
        else:
            notes.append(f"from step {newest} on " + ("rows are held out" if new else "no rows are held out"))
    record = resumed(record, newest, notes)
    # A run that trains on has not been exported as it will be.
    exported = record.exported if now.steps == record.steps else None
    return replace(record, steps=now.steps, reads=now.reads, ranked_after=ranked_after, exported=exported), notes


def _other_length(record: Record, before: RunConfig, now: Start, steps: int, newest: int) -> list[str]:
    """What another length of the run means; nothing if it is the same."""
    if steps < newest:
        raise ConfigError(
            f"the run in {now.config.output_dir} has trained {newest:,} steps, and these settings end it after "
            f"{steps:,}. Raise train.steps or train.epochs, or set output_dir to a new folder; `jaxft export "
            "--step` writes the model of an earlier checkpoint."
        )
    if record.steps is None or record.steps == steps:
        return []
    if now.config.data.stages is not None:
        raise ConfigError(
            f"the run would have {steps:,} steps in place of {record.steps:,}, and data.stages, whose shares are "
            "those of the whole run, would begin elsewhere: rows that it has read would come again, and others never. "
            "Keep train.steps and train.epochs, or train on from an export (model.path) into a new folder."
        )
    note = f"the run has {steps:,} steps in place of {record.steps:,}"
    if newest == steps:
        return [f"{note}, which it has trained already"]
    was = float(make_schedule(before.optim, record.steps)(newest - 1))
    becomes = float(make_schedule(now.config.optim, steps)(newest))
    return [
        f"{note}. It goes on from step {newest:,} with the state of its optimizer. The learning rate follows "
        f"optim.schedule={now.config.optim.schedule!r} over all {steps:,} steps from here on: it was {was:.3g} at "
        f"step {newest:,} and is {becomes:.3g} at step {newest + 1:,}"
    ]


def _fixed_values(config: RunConfig, spelling: bool) -> dict[str, Any]:
    """The fields that may not change when a run is resumed, by key."""
    return {
        field.key: value
        for field, value in field_values(config)
        if not field.free_to_change and not field.sections and (spelling or not field.by_content)
    }
