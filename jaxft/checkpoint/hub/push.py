"""Pushing an export to the Hugging Face Hub, through its own library."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, errors, get_token
from huggingface_hub.utils import validate_repo_id

from jaxft.checkpoint.folders.sums import NAME as SUMS
from jaxft.checkpoint.hub.base import BaseFacts
from jaxft.errors import ConfigError, ExportError

ADAPTER_CONFIG = "adapter_config.json"
BASE_FIELD = "base_model_name_or_path"


@dataclass(frozen=True, kw_only=True)
class Push:
    """Where an export is pushed to.

    name: `owner/name` on the Hub. public: whether a new repository can be seen by everybody. update: whether an
    existing repository gets the export as a further commit. base: `owner/name` of an adapter's base, if it cannot be
    told from its folder.
    """

    name: str
    public: bool = False
    update: bool = False
    base: str | None = None

    def check(self) -> None:
        """Asks the Hub whether the push may be made, before the model is loaded. Raises ConfigError and ExportError."""
        for flag, name in (("--push", self.name), ("--hub_base", self.base)):
            try:
                if name is not None and not re.fullmatch(r"[^/]+/[^/]+", name):
                    raise errors.HFValidationError("it must have the form owner/name")
                validate_repo_id(name or "owner/name")
            except errors.HFValidationError as error:
                raise ConfigError(f"{flag}={name}: {error}") from error
        with _explained(self.name):
            api = _api()
            api.whoami()
            exists = api.repo_exists(self.name)
        if exists and not self.update:
            raise ConfigError(
                f"--push={self.name}: the Hub has a repository of this name. Give another name, or --update to add the "
                "export to it as a further commit; files of the same names are then replaced"
            )

    def with_base(self, known: BaseFacts, path: str, *, adapter: bool) -> BaseFacts:
        """What is known of the base, with the name that was given for it. path: of its folder.

        Raises ConfigError if an adapter's base has no name.
        """
        if adapter and self.base is None and known.name is None:
            raise ConfigError(
                f"--push={self.name}: the adapter would name its base by a folder of this machine, {path}, which "
                "nobody else has. Give the base's name on the Hub as --hub_base=owner/name, or push a whole model "
                "(--format=merged)"
            )
        return replace(known, name=self.base or known.name)

    def push(self, folder: Path, base: str | None = None) -> str:
        """Uploads the files of a folder in one commit, and returns the address of the repository.

        base: name of an adapter's base, which replaces its path in the pushed adapter_config.json. Raises ExportError.
        """
        with _explained(self.name, folder):
            api = _api()
            address = api.create_repo(self.name, private=not self.public, exist_ok=self.update)
            api.create_commit(self.name, list(_operations(folder, base)), commit_message="Export by jaxft")
        return str(address)


def _api() -> HfApi:
    # HF_ENDPOINT is read now, and the token by the library: HF_TOKEN, or what `hf auth login` has saved.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="jaxft")


def _operations(folder: Path, base: str | None) -> Iterator[CommitOperationAdd]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name == SUMS or any(part.startswith(".") for part in Path(name).parts):
            continue
        content: Any = path
        if name == ADAPTER_CONFIG and base is not None:
            content = json.dumps(json.loads(path.read_text(encoding="utf-8")) | {BASE_FIELD: base}, indent=2).encode()
        yield CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)


@contextmanager
def _explained(name: str, folder: Path | None = None) -> Iterator[None]:
    """Turns what the library raises into an ExportError with a mend. folder: the export that is on disk, if it is."""
    kept = "" if folder is None else f" The export is whole in {folder}."
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        mends = {
            401: "no token, or one that the Hub does not know: set HF_TOKEN, or run `hf auth login`",
            403: f"the token may not write to {name}: use a token with write permission for it, or another owner",
            404: f"the Hub knows no owner {name.partition('/')[0]!r}, or the token may not see it",
            409: "the repository exists: give another name, or --update",
            429: "too many requests: wait some minutes and push again",
        }
        mend = mends.get(status or 0, f"the Hub answered {status}")
        raise ExportError(f"--push={name}: {mend} ({_first_line(error)}).{kept}") from error
    except (errors.HTTPError, OSError) as error:
        if get_token() is None:
            raise ExportError(
                f"--push={name}: there is no token: set HF_TOKEN, or run `hf auth login`.{kept}"
            ) from error
        raise ExportError(
            f"--push={name}: cannot reach the Hub: {_first_line(error)}. Check the network, HF_ENDPOINT, "
            f"HF_HUB_OFFLINE and the token (HF_TOKEN, or `hf auth login`).{kept}"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
