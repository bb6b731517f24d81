"""Small files of a model, from a local folder, an address or the Hugging Face cache."""

import os
from pathlib import Path
from typing import Any

from jaxft.files.hub import reaching_hub
from jaxft.files.paths import is_file, read_json


def json_in(file: Path) -> dict[str, Any]:
    """The JSON object in a local file; an empty one if there is no such file.

    Raises CheckpointError for other content, and for a link out of the file's folder.
    """
    return read_json(str(file)) if file.is_file() else {}


def json_at(address: str) -> dict[str, Any]:
    """The JSON object at an address; an empty one if there is no such file."""
    return read_json(address) if is_file(address) else {}


def hub_file(repo: str, name: str, revision: str | None) -> Path:
    """A file of a repository in the cache, fetched if need be; a path that is no file if the repository has none."""
    # Imported here: only users of the hub need it.
    from transformers.utils import cached_file

    with reaching_hub():
        path_in_cache = cached_file(
            repo,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return Path(path_in_cache or os.devnull)
