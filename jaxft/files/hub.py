"""Paths of the Hugging Face Hub, `hf://owner/name`, and the local copies of what they name."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from jaxft.errors import CheckpointError, listed
from jaxft.files.gguf.parts import part_names
from jaxft.files.paths import HUB

# Files of a repository that are fetched: no code, and no pickles.
WANTED = (
    "*.json", "*.safetensors", "tokenizer.model", "*.jinja",
    "[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*", "[Nn][Oo][Tt][Ii][Cc][Ee]*", "COPYING*",
    "*[Uu][Ss][Ee]_[Pp][Oo][Ll][Ii][Cc][Yy]*",
)  # fmt: skip
CONFIGS = ("config.json", "adapter_config.json")
GGUF = ".gguf"


@dataclass(frozen=True, kw_only=True)
class HubPath:
    """A model on the Hub. repo: owner/name. file: one of its GGUF files; None: its folder. revision: None for main."""

    repo: str
    file: str | None = None
    revision: str | None = None


def hub_path(path: str, revision: str | None = None) -> HubPath:
    """What hf://owner/name, hf://owner/name/FILE.gguf, and either with @revision at its end, name.

    revision: a branch, tag or commit, if the path names none. Raises CheckpointError if both name one and they differ,
    and for a file of another kind.
    """
    rest, _, pinned = path.removeprefix(HUB).strip("/").partition("@")
    if pinned and revision and pinned != revision:
        raise CheckpointError(f"{path} names the revision {pinned!r}, but revision={revision!r}: give only one of them")
    parts = rest.split("/", 2)
    file = parts[2] if len(parts) == 3 else None
    if file is not None and not file.endswith(GGUF):
        raise CheckpointError(
            f"{path}: after hf://owner/name only a GGUF file may be named, such as hf://owner/name/model.gguf"
        )
    return HubPath(repo="/".join(parts[:2]), file=file, revision=pinned or revision or None)


@contextlib.contextmanager
def reaching_hub() -> Iterator[None]:
    """Inside this context, an error of the library that carries requests to the hub is raised as a ConnectionError.

    Its own class is none of the operating system's errors, as those of other failures of a network are. The hub's
    library gives each read HF_HUB_DOWNLOAD_TIMEOUT seconds, 10 by default, and repeats it up to five times.
    """
    # Imported here: only users of the hub need it.
    from huggingface_hub import errors

    try:
        yield
    except errors.HTTPError as error:
        if isinstance(error, OSError):
            raise
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        raise ConnectionError(f"{endpoint} did not answer: {str(error) or type(error).__name__}") from error


def fetch_hub(path: str, revision: str | None = None) -> str:
    """The local copy of a folder or GGUF file in the Hugging Face cache, fetched if it is not there yet.

    path, revision: as for `hub_path`; of a GGUF model in parts, all are fetched. HF_HUB_OFFLINE is honoured. The copy
    is below a folder that is named after the commit, so the path always means the same files. Raises CheckpointError if
    it cannot be fetched, or if it is a repository of GGUF files alone, which it lists.
    """
    # Imported here: only users of the hub need it.
    from huggingface_hub import hf_hub_download, snapshot_download

    location = hub_path(path, revision)
    try:
        with reaching_hub():
            if location.file is not None:
                names = part_names(location.file)
                copies = [hf_hub_download(location.repo, name, revision=location.revision) for name in names]
                return copies[names.index(location.file)]
            folder = snapshot_download(location.repo, revision=location.revision, allow_patterns=list(WANTED))
    except (OSError, ValueError) as error:  # no network, no such repository, no permission, a bad name
        raise CheckpointError(
            f"cannot get {path} (revision {location.revision or 'main'}): {error}. Check the name and the revision; "
            "without a network it must be in the Hugging Face cache already (HF_HOME)."
        ) from error
    if not any(os.path.isfile(os.path.join(folder, name)) for name in CONFIGS):
        _refuse_gguf_alone(path, location)
    return folder


def cached_hub_file(location: HubPath, name: str) -> str | None:
    """The path of a file in the Hugging Face cache; None if it is not there. Nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(location.repo, name, revision=location.revision or "main")
    return path if isinstance(path, str) else None


def _refuse_gguf_alone(path: str, location: HubPath) -> None:
    """Raises CheckpointError, listing the GGUF files of a repository, if it has any."""
    from huggingface_hub import HfApi

    try:
        with reaching_hub():
            names = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).list_repo_files(
                location.repo, revision=location.revision
            )
    except OSError:
        return  # the folder itself is then refused, with the files that are there
    files = sorted(name for name in names if name.endswith(GGUF))
    if files:
        raise CheckpointError(
            f"{path} has no config.json, and these GGUF files: {listed(files)}. Name one of them, such as "
            f"{HUB}{location.repo}/{files[0]}"
        )
