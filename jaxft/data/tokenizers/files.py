"""Small files of a model, from a local folder, an address or the Hugging Face cache."""

import os
from pathlib import Path
from typing import Any

from jaxft.files.hub import reaching_hub
from jaxft.files.paths import check_link, is_file, read_json

READ = (".json", ".jinja", ".model", ".txt", ".vocab")


def json_in(file: Path) -> dict[str, Any]:
    """The JSON object in a local file; an empty one if there is no such file.

    Raises CheckpointError for other content, and for a link out of the file's folder.
    """
    return read_json(str(file)) if file.is_file() else {}


def check_tokenizer_links(folder: Path) -> None:
    """Raises CheckpointError for a link out of a folder whose files transformers opens by itself."""
    templates = folder / "additional_chat_templates"
    for entry in (*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())):
        if entry.is_symlink() and (entry.name.endswith(READ) or entry == templates):
            check_link(str(entry), str(folder))


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
