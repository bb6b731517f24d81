"""`jaxft verify`: whether a run, an export or another model on disk is whole. Nothing is written."""

import os
from pathlib import Path
from typing import Any

from jaxft.checkpoint import manifest
from jaxft.checkpoint.steps.access import steps_in
from jaxft.config import RunConfig
from jaxft.errors import CheckpointError, ConfigError, DataError, JaxftError
from jaxft.files import run_folder
from jaxft.files.buckets.working_copy import checkpoints_of, owner_now, run_in_bucket
from jaxft.home import local_path
from jaxft.runs.folder import run_config
from jaxft.runs.identity.record import Record
from jaxft.runs.survey.findings import Findings
from jaxft.runs.survey.listing import record_in, state_of
from jaxft.runs.survey.models import verify_model

# Small files of a run that are JSON, and how each is made anew.
SMALL = {
    run_folder.DATA: "Delete it: the command of the run writes it again.",
    run_folder.SCORES: "Delete it: the command of the run computes the scores again.",
    run_folder.SUMMARY: "Delete it: the command of the run writes it again.",
}
LEFTOVERS = (".partial", ".tmp", ".deleted")  # what is written, or about to be deleted
EXPORT = "Move the folder away and give the command of the run again, which writes it anew from the checkpoint."


def verify(path: str | os.PathLike[str], *, rows: bool = True, reads: bool = True) -> Findings:
    """Examines a run folder, a model folder or a GGUF file: everything that has checksums, and what headers claim.

    rows: whether the rows of a run are read and tokenised again, to compare them with those that it read. reads:
    whether anything outside the folder is looked at, such as the base model, which may have to be fetched for it.
    Raises ConfigError if nothing that jaxft knows is at the path.
    """
    path = Path(run_in_bucket(local_path(path)))
    findings = Findings()
    if run_folder.is_run_folder(path):
        _verify_run(path, findings, rows=rows, reads=reads)
    elif path.is_dir() and any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        verify_model(path, str(path), findings)
    elif path.is_file() and path.suffix == ".gguf":
        verify_model(path, str(path), findings)
    else:
        what = "is not there" if not path.exists() else "is neither a run folder nor a model that jaxft reads"
        raise ConfigError(f"{path} {what}: give a run folder, a model folder or a .gguf file")
    return findings


def _verify_run(folder: Path, findings: Findings, *, rows: bool, reads: bool) -> None:
    owner = owner_now(folder)
    if owner is not None:
        findings.unchecked("the folder", f"{owner.describe()} writes there: what it writes now is not examined")
    record = None
    with findings.part(run_folder.MARK):
        record = record_in(folder)
        if record is None:
            findings.unchecked(run_folder.MARK, "it is not there: the run is of an earlier version of jaxft")
        else:
            findings.whole(run_folder.MARK, f"run {record.id}, begun {record.created}")
    config = None
    with findings.part(run_folder.CONFIG):
        config = run_config(folder)
        findings.whole(run_folder.CONFIG, "the settings of a run")
    for name, mend in SMALL.items():
        with findings.part(name, mend):
            _verify_json(folder / name, findings)
    _verify_steps(folder, findings, live=owner is not None)
    _verify_metrics(folder, findings)
    for name in ("adapter", "merged", "model"):
        if (folder / name).is_dir():
            _verify_export(folder / name, record, findings, live=owner is not None)
    for path in () if owner is not None else sorted(folder.iterdir()):
        if path.suffix in LEFTOVERS:
            findings.unchecked(path.name, "a process that was stopped left it; nothing reads it")
    if (folder / run_folder.BASE).is_dir():
        verify_model(folder / run_folder.BASE, run_folder.BASE, findings)
    if reads and config is not None and record is not None and record.reads:
        _verify_reads(config, record, findings, rows=rows)
    if owner is None and findings.is_whole:
        state = state_of(folder)
        if state.problem is not None:
            findings.broken("the run", state.problem)


def _verify_json(path: Path, findings: Findings) -> None:
    if not path.exists():
        return
    try:
        run_folder.read_json(path)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {str(error) or type(error).__name__}") from error
    findings.whole(path.name, "JSON")


def _verify_steps(folder: Path, findings: Findings, *, live: bool) -> None:
    checkpoints = steps_in(checkpoints_of(folder))
    whole, without = checkpoints.whole(), checkpoints.without_manifest()
    if not whole and not without and (folder / run_folder.SUMMARY).exists():
        findings.unchecked(run_folder.CHECKPOINTS, "they were deleted: the run can neither go on nor be exported again")
    for step in sorted((*whole, *without)):
        part, address = f"{run_folder.CHECKPOINTS}/{step}", f"{checkpoints.folder}/{step}"
        if step in without:
            if not live:
                findings.broken(
                    part,
                    f"it has no {manifest.NAME}, which is written last",
                    f"Copy {manifest.NAME} from where the folder was copied from, or move {address} elsewhere.",
                )
            continue
        try:
            checkpoints.verify(step)
        except (CheckpointError, OSError, RecursionError) as error:
            if live and not checkpoints.exists(step):
                continue  # its run has deleted it meanwhile
            findings.broken(part, str(error), _mend_of(address))
        else:
            findings.whole(part, f"every file has the checksum in {manifest.NAME}")
    for name in () if live else checkpoints.others():
        findings.unchecked(f"{run_folder.CHECKPOINTS}/{name}", "it is no step, and is not read")


def _mend_of(step: str) -> str:
    return (
        f"Copy the step again from where it is whole. If that is nowhere, move {step} elsewhere: the run then goes on "
        "from an earlier step."
    )


def _verify_metrics(folder: Path, findings: Findings) -> None:
    from jaxft.training.log import read_metrics

    if not (folder / run_folder.METRICS).exists():
        return
    mend = "Restore the file from a copy. The weights do not depend on it."
    with findings.part(run_folder.METRICS, mend):
        rows = read_metrics(folder)
        steps = [row["step"] for row in rows]
        if steps != sorted(steps):
            raise DataError("its rows are not in the order of their steps, as if two runs had written it")
        findings.whole(run_folder.METRICS, f"{len(rows):,} rows")


def _verify_export(target: Path, record: Record | None, findings: Findings, *, live: bool) -> None:
    name = target.name
    recorded = None if record is None else record.exports.get(name)
    if record is not None and name in record.exports and recorded is None:
        if not live:
            findings.broken(name, "the process that wrote it was stopped before it was whole", EXPORT)
        return
    if missing := [file for file in recorded or () if not (target / file).exists()]:
        findings.problems(name, [f"{file} is missing" for file in missing], "", EXPORT)
        return
    verify_model(target, name, findings, mend=EXPORT)


def _verify_reads(config: RunConfig, record: Record, findings: Findings, *, rows: bool) -> None:
    """Compares what a run reads with the digests in its record."""
    from jaxft.runs.identity.contents import base_read, other_reads

    part, mend = "what the run reads", "Restore it, or train into a new folder: this run would not go on with it."
    known: dict[str, Any] = {"model.path": record.reads["model.path"]} if "model.path" in record.reads else {}
    try:
        base = {"model.path": base_read(config)}
    except (JaxftError, OSError) as error:
        findings.unchecked("model.path", f"it cannot be read from here: {error}")
    else:
        findings.problems("model.path", other_reads(known, base), "its weights are those of the run", mend)
    if not rows:
        findings.unchecked(part, "rows were not read, as you have asked")
        return
    try:
        now = _reads_of(config)
    except (JaxftError, OSError) as error:
        findings.unchecked(part, f"it cannot be read from here: {error}")
        return
    others = {key: one for key, one in record.reads.items() if key != "model.path"}
    del now["model.path"]
    findings.problems(part, other_reads(others, now), f"{', '.join(sorted(now))} are those of the run", mend)


def _reads_of(config: RunConfig) -> dict[str, Any]:
    from jaxft.data import tokenizer_of
    from jaxft.methods import method_of
    from jaxft.runs.going_on import going_on
    from jaxft.runs.identity.contents import reads_of

    config = going_on(config)
    tokenizer = tokenizer_of(config)
    return reads_of(config, tokenizer, method_of(config).prepare(config, tokenizer))
