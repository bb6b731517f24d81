"""The names of the files of a GGUF model that is split into several: NAME-00001-of-00003.gguf and so on."""

import os
import re

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf")


def is_part(path: str) -> bool:
    """Whether a file has the name of a part."""
    return _PART.fullmatch(os.path.basename(path)) is not None


def part_names(path: str) -> list[str]:
    """The paths of all parts in order, given any of them; the path itself, if it is no part by its name."""
    folder, name = os.path.split(path)
    match = _PART.fullmatch(name)
    if match is None:
        return [path]
    total = int(match["total"])
    return [os.path.join(folder, f"{match['stem']}-{part:05d}-of-{total:05d}.gguf") for part in range(1, total + 1)]
