"""Whether a model on disk is whole: a Hugging Face or PEFT folder, a GGUF file, or an Orbax folder."""

import os
from pathlib import Path

from jaxft.checkpoint import manifest
from jaxft.checkpoint.folders.sums import NAME as SUMS
from jaxft.checkpoint.folders.sums import check_sums, has_sums
from jaxft.checkpoint.load import is_adapter, open_merged, resolve_base
from jaxft.checkpoint.orbax_folder import is_orbax_folder
from jaxft.checkpoint.peft import open_adapter
from jaxft.conversion.convert import check_against_config
from jaxft.errors import CheckpointError, JaxftError
from jaxft.files.paths import is_remote
from jaxft.runs.survey.findings import Findings

AGAIN = "Write it again from its source, or copy it again from where it is whole."


def verify_model(path: Path, part: str, findings: Findings, *, mend: str = AGAIN) -> None:
    """Adds what is whole and what is broken of the model at `path`. part: what it is called in the findings."""
    if path.is_dir() and (manifest.exists(path) or is_orbax_folder(path)):
        with findings.part(part, mend):
            manifest.verify(path)
            findings.whole(part, f"every file has the checksum in {manifest.NAME}")
    elif path.is_dir() and has_sums(path):
        with findings.part(part, mend):
            findings.problems(part, check_sums(path), f"every file has the checksum in {SUMS}", mend)
    else:
        findings.unchecked(part, "it has no checksums, so that changed values cannot be noticed")
    with findings.part(part, mend):
        _verify_tensors(path, part, findings)


def _verify_tensors(path: Path, part: str, findings: Findings) -> None:
    if not path.is_dir() or not is_adapter(str(path)):
        hf_config, weights, _ = open_merged(str(path))
        check_against_config(hf_config, weights.source)
        findings.whole(part, f"{len(weights.source.specs()):,} tensors have the shapes that its config says")
        return
    opened = open_adapter(str(path))
    opened.tensors.specs()
    findings.whole(part, f"{len(opened.tensors.keys):,} tensors of an adapter, whose header and config fit")
    try:
        base = resolve_base(str(path), None)
        if is_remote(base):
            raise CheckpointError(f"{base} is an address, and is compared when the adapter is loaded")
        if not os.path.exists(base):
            raise CheckpointError(f"{base} is not there")
    except JaxftError as error:
        findings.unchecked(f"{part}, its base", str(error))
        return
    if opened.is_score or not hasattr(opened.kind, "merge_blocks"):
        findings.unchecked(
            f"{part}, its base", "adapters of this kind are compared with their base when they are loaded"
        )
        return
    hf_config, weights, _ = open_merged(str(path))
    check_against_config(hf_config, weights.source)
    findings.whole(part, "its tensors fit its base")
