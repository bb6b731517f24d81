"""Files that belong to a model and go with it: its license, and what some readers want beside tokenizer.json."""

import os
import re

from jaxft.files.paths import MAX_JSON_BYTES, is_remote, open_folder

# llama.cpp's converter, for example, reads SentencePiece models from tokenizer.model alone.
TOKENIZER = ("tokenizer.model", "added_tokens.json", "special_tokens_map.json")
LEGAL = re.compile(r"(licen[cs]e|notice|copying|use_policy|.*acceptable_use_policy)([._-].*)?", re.IGNORECASE)


def copy_companions(source: str, target: str, *, tokenizer: bool = True) -> list[str]:
    """Copies these files of a model folder or address to the local folder `target`; returns their names.

    tokenizer: whether those of the tokenizer too. A file that is already in `target` is left as it is.
    """
    if not (is_remote(source) or os.path.isdir(source)):
        return []
    folder, copied = open_folder(source), []
    for name in folder.names():
        wanted = bool(LEGAL.fullmatch(name)) or (tokenizer and name in TOKENIZER)
        path = os.path.join(target, name)
        if not wanted or os.path.exists(path) or (not is_remote(source) and not os.path.isfile(f"{source}/{name}")):
            continue
        if folder.size(name) <= MAX_JSON_BYTES:
            folder.read(name, [(0, folder.size(name))]).tofile(path)
            copied.append(name)
    return copied
