"""The archive of a run: `jaxft-HASH.tar.gz`, named by the SHA-256 of its bytes."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.files.atomic import write_file
from jaxft.pods.pack.inputs import Inputs
from jaxft.pods.pack.lock import extras_of, lock_of
from jaxft.pods.pack.wheel import scripts_folder, wheel

SHORTEST_SECRET = 12  # characters; a shorter value, such as "offline", occurs in files by chance
CONFIG = "config.json"  # in the archive


@dataclass(frozen=True)
class Pack:
    """path: of the archive. digest: its SHA-256, in hexadecimal. contents: what is in it, in lines for people."""

    path: Path
    digest: str
    contents: tuple[str, ...]


def pack(config: RunConfig, folder: Path, *, secrets: Mapping[str, str]) -> Pack:
    """Writes the archive of a run into `folder`. The same inputs give the same bytes, and so the same name.

    It holds `config.json` with paths relative to it, the files of this machine that the config names (`inputs/`), a
    wheel of this jaxft (`wheel/`), the versions of what it needs (`lock.txt`, `extras.txt`), and the scripts for the
    hosts (`worker/`). secrets: values that must not be in it, by name; the Hugging Face token is added.
    Raises ConfigError for inputs that cannot be carried, and for a secret in one of them; PodError if this jaxft is not
    installed as it should be.
    """
    inputs = Inputs(config)
    wheel_name, wheel_bytes = wheel()
    extras = extras_of(config)
    texts = {
        CONFIG: json.dumps(inputs.values, indent=1, ensure_ascii=False).encode(),
        "extras.txt": ",".join(extras).encode(),
        "lock.txt": lock_of(extras).encode(),
        f"wheel/{wheel_name}": wheel_bytes,
    }
    files = inputs.files | {f"worker/{path.name}": path for path in scripts_folder().glob("*.sh")}
    refuse_secrets(texts, inputs.files, {**secrets, **hub_token()})
    archive = folder / "archive.tar.gz"
    write_file(archive, lambda file: _fill(file, texts, files))
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path = folder / f"jaxft-{digest}.tar.gz"
    os.replace(archive, path)
    size = path.stat().st_size
    contents = (f"{wheel_name} and the versions of {', '.join(extras)}", *inputs.described)
    return Pack(path, digest, (*contents, f"together {size / 1e6:,.1f} MB, packed"))


def _fill(file: BinaryIO, texts: Mapping[str, bytes], files: Mapping[str, Path]) -> None:
    # Times, owners and the order of files are left out, as they differ where the content is the same.
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted({*texts, *files}):
            entry = tarfile.TarInfo(name)
            entry.mode = 0o755 if name.endswith(".sh") else 0o644
            if name in texts:
                entry.size = len(texts[name])
                archive.addfile(entry, io.BytesIO(texts[name]))
                continue
            with files[name].open("rb") as content:
                entry.size = os.fstat(content.fileno()).st_size
                archive.addfile(entry, content)


def hub_token() -> dict[str, str]:
    """The Hugging Face token of this machine by the name of its variable, if there is one."""
    from huggingface_hub import get_token

    token = get_token()
    return {"HF_TOKEN": token} if token else {}


def refuse_secrets(texts: Mapping[str, bytes], files: Mapping[str, Path], secrets: Mapping[str, str]) -> None:
    """Raises ConfigError if a value is in a text or a file. All three are by name."""
    values = {key: value.encode() for key, value in secrets.items() if len(value) >= SHORTEST_SECRET}
    for name in sorted({*texts, *files}):
        content = io.BytesIO(texts[name]) if name in texts else files[name].open("rb")
        with content:
            for key in _secrets_in(content, values):
                raise ConfigError(
                    f"{files.get(name, name)} holds the value of {key}, and everybody who may read the bucket or a "
                    f"host could read it there. Take it out; --env={key} brings it to the hosts in a file of its own."
                )


def _secrets_in(file: BinaryIO, values: Mapping[str, bytes]) -> list[str]:
    """The keys of values that occur in a file, which is read in pieces that overlap."""
    overlap = max(map(len, values.values()), default=0)
    before = b""
    while piece := file.read(2**20):
        text = before + piece
        if hits := [key for key, value in values.items() if value in text]:
            return hits
        before = text[-overlap:] if overlap else b""
    return []
