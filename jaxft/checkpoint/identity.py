"""What tells the weights of one model from those of another without reading them: its files, sizes and times."""

import os

from jaxft.checkpoint.load import resolve
from jaxft.files.paths import is_remote, open_folder


def model_files(path: str, revision: str | None = None) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change in nanoseconds) of every file of a model, by name.

    path, revision: as `load_model` takes them. The time of a file that is not on this machine is 0, since addresses
    give none.
    """
    path = resolve(path, revision)
    if is_remote(path):
        folder = open_folder(path)
        return [(name, folder.size(name), 0) for name in folder.names()]
    if os.path.isfile(path):
        return [(os.path.basename(path), *_size_and_time(path))]
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    return sorted((os.path.relpath(file, path), *_size_and_time(file)) for file in files)


def _size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
