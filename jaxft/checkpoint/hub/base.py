"""What is known of a base model beside its weights: its name on the Hugging Face Hub, and its license."""

import os
import re
from dataclasses import dataclass

import yaml
from huggingface_hub import ModelCard

from jaxft.errors import CheckpointError
from jaxft.files.gguf.header import read_header
from jaxft.files.hub import hub_path
from jaxft.files.paths import HUB, folder_json, is_remote, open_folder

NAME = re.compile(r"[\w.-]+/[\w.-]+")
CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")
LICENSE_FILES = re.compile(r"(licen[cs]e|copying)(\.(txt|md))?", re.IGNORECASE)
# The first lines of a license's text -> its identifier on the hub.
LICENSES = {
    r"apache license\s+version 2\.0": "apache-2.0",
    r"mit license|permission is hereby granted, free of charge": "mit",
    r"llama 2 community license": "llama2",
    r"llama 3 community license": "llama3",
    r"llama 3\.1 community license": "llama3.1",
    r"llama 3\.2 community license": "llama3.2",
    r"llama 3\.3 community license": "llama3.3",
    r"gemma terms of use": "gemma",
    r"bsd 3-clause": "bsd-3-clause",
}

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .+-]{0,79}")


@dataclass(frozen=True)
class BaseFacts:
    """name: `owner/name` on the hub, or None. license: the hub's identifier, or None if it is not known."""

    name: str | None = None
    license: str | None = None


def base_facts(path: str, files: str | None = None) -> BaseFacts:
    """What a base's path and the files of its folder tell. path: as users give it. files: where its files are, if not
    at the path itself, such as the local copy of `hf://owner/name`."""
    folder = files or path
    if folder.endswith(".gguf"):
        return BaseFacts(_name(path, None), _identifier(_license_of_gguf(folder)))
    if is_remote(folder) or not os.path.isdir(folder):
        return BaseFacts(_name(path, None))
    return BaseFacts(_name(path, folder), _identifier(_license_of_card(folder)) or _license_of_text(folder))


def _name(path: str, folder: str | None) -> str | None:
    if path.startswith(HUB):
        return hub_path(path).repo
    if (cached := CACHED.search(path)) is not None:
        return cached[1].replace("--", "/", 1)
    if folder is None:
        return None
    try:
        recorded = folder_json(open_folder(folder), "config.json").get("_name_or_path")
    except CheckpointError:
        return None
    # Other programs record the path from which they loaded, which may look like a name; the folder's own must agree.
    own = os.path.basename(os.path.abspath(folder))
    if not isinstance(recorded, str) or not NAME.fullmatch(recorded) or os.path.exists(recorded):
        return None
    return recorded if recorded.partition("/")[2].lower() == own.lower() else None


def _identifier(license: str | None) -> str | None:
    """A license as somebody named it; `other` if that is no name, since it is written into a page."""
    return license if license is None or IDENTIFIER.fullmatch(license) else "other"


def _license_of_card(folder: str) -> str | None:
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return None
    try:
        license = ModelCard.load(path, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, yaml.YAMLError):  # no text, or no metadata at its head
        return None
    return license if isinstance(license, str) else None


def _license_of_text(folder: str) -> str | None:
    for name in sorted(os.listdir(folder)):
        if LICENSE_FILES.fullmatch(name):
            with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                head = " ".join(file.read(2000).lower().split())
            return next((known for text, known in LICENSES.items() if re.search(text, head)), "other")
    return None


def _license_of_gguf(path: str) -> str | None:
    license = read_header(path).metadata.get("general.license")
    return license if isinstance(license, str) else None
