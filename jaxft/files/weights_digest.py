"""A digest of the files that a model is loaded from: the same for the same files, wherever they are."""

import hashlib
import json
import re

from jaxft.files.paths import Folder, folder_json, open_folder

# Models of at most so many bytes are read whole. Of larger ones, which take minutes, blocks of every file are read.
WHOLE = 2**30
BLOCKS, BLOCK = 32, 2**18  # number and bytes of them, at equal distances, the first and the last bytes among them
STEP = 2**24  # bytes that are read at a time
INDEX, SINGLE, CONFIG, PEFT_CONFIG = (
    "model.safetensors.index.json", "model.safetensors", "config.json", "adapter_config.json"
)  # fmt: skip
# Entries of config.json and adapter_config.json that say where a model was, or what wrote it.
NOT_CONTENT = ("transformers_version", "_name_or_path", "base_model_name_or_path", "revision")
PART = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")


def weights_digest(path: str, *, weights: bool = True) -> str:
    """The SHA-256, in hexadecimal, of a model's weights and settings.

    path: a GGUF file (one of several parts stands for all), or a folder, local or an address. Of a folder, config.json,
    adapter_config.json and the safetensors files that are loaded count, without what the configs say of the model's
    origin; of a model of more than `WHOLE` bytes, the sizes of the files and `BLOCKS` blocks of each. weights: False if
    only the settings are read. Raises CheckpointError for files that cannot be read.
    """
    if path.endswith(".gguf"):
        folder, names = open_folder(path.rpartition("/")[0] or "."), [path.rpartition("/")[2]]
        if part := PART.fullmatch(names[0]):
            names = [name for name in folder.names() if (own := PART.fullmatch(name)) and own[1] == part[1]]
        settings: list[str] = []
    else:
        folder = open_folder(path)
        there = folder.names()
        names = _safetensors(folder, there)
        settings = [name for name in (CONFIG, PEFT_CONFIG) if name in there]
    digest = hashlib.sha256()
    for name in settings:
        values = {key: value for key, value in folder_json(folder, name).items() if key not in NOT_CONTENT}
        digest.update(json.dumps([name, values], sort_keys=True).encode())
    if weights:
        sizes = [folder.size(name) for name in names]
        for size, name in zip(sizes, names, strict=True):
            digest.update(f"{size} ".encode())
            _add(digest, folder, name, size, whole=sum(sizes) <= WHOLE)
    return digest.hexdigest()


def _safetensors(folder: Folder, there: list[str]) -> list[str]:
    """The files of weights in a folder, in an order that does not depend on their names' numbering."""
    if INDEX in there:
        return sorted({str(name) for name in dict(folder_json(folder, INDEX).get("weight_map") or {}).values()})
    every = [name for name in there if name.endswith(".safetensors")]
    return [SINGLE] if SINGLE in every else every


def _add(digest: "hashlib._Hash", folder: Folder, name: str, size: int, *, whole: bool) -> None:
    if whole or size <= BLOCKS * BLOCK:
        ranges = [(start, min(STEP, size - start)) for start in range(0, size, STEP)]
    else:
        ranges = [(number * (size - BLOCK) // (BLOCKS - 1), BLOCK) for number in range(BLOCKS)]
    for one in ranges:
        digest.update(folder.read(name, [one]).tobytes())
