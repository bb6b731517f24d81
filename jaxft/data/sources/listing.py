"""What users name as data: one source or several, files by patterns, and the files of a folder."""

import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxft.data.sources.file_kinds import kind_by_name
from jaxft.data.sources.tables import HUB, TFDS, no_split
from jaxft.data.sources.text import in_store, unreadable
from jaxft.errors import DataError, did_you_mean, listed
from jaxft.files.paths import file_name, is_remote
from jaxft.home import local_path

# Words in the names of files and folders that say which part of a set they are, as on the Hugging Face hub.
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# Files that describe a set rather than hold its rows.
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Text files that tell of the files around them.
ABOUT = re.compile(r"(readme|licen[cs]e|copying|changelog|requirements)\b", re.IGNORECASE)
TITLED = re.compile(r"(.*?)[-_.\d]*\.(txt|text|md)\b")
PATTERN = re.compile(r"[*?\[]")


def names_in(text: str) -> list[str]:
    """The sources in the text of `data.train`: one, a list in brackets, or several with commas between them.

    The list may be JSON; a shell may have removed the quotation marks of its items. A path with a comma in it is one
    source if it exists.
    """
    text = text.strip()
    if os.path.exists(local_path(text)):
        return [text]
    bracketed = text.startswith("[") and text.endswith("]")
    try:
        names = json.loads(text) if bracketed else None
    except ValueError:
        names = None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    if bracketed and "]" not in text[1:-1]:  # else it is a pattern such as [ab]*[01]
        text = text[1:-1]
    return [name for name in (part.strip(" '\"") for part in text.split(",")) if name]


def check_names(names: Sequence[str]) -> None:
    """Raises DataError for a name that no file can have."""
    for name in names:
        try:
            raw = os.fsencode(name)
        except UnicodeEncodeError:
            raw = b"\0"
        if b"\0" in raw:
            raise DataError(
                f"no file can have the name {name!r}: it holds a zero byte, or half of a character, as after a damaged "
                "copy. Type the name anew."
            )


def is_here(text: str) -> bool:
    """Whether all sources in the text of `data.train` are files or folders of this machine."""
    return all(
        glob.glob(local_path(name), recursive=True) if is_pattern(name) else os.path.exists(local_path(name))
        for name in names_in(text)
    )


def matching(pattern: str) -> list[str]:
    """The files and folders that a pattern with `*`, `?` or `[...]` matches, sorted by name. `**` crosses folders.

    Raises DataError if it matches none.
    """
    if is_remote(pattern):
        scheme = pattern[: pattern.index("://") + 3]
        in_scheme = in_store(pattern, lambda files, root: files.glob(root))
        names = [f"{scheme}{name.lstrip('/')}" for name in in_scheme]
    else:
        names = glob.glob(local_path(pattern), recursive=True)
    if not names:
        before = PATTERN.split(pattern)[0]
        folder = before.rpartition("/")[0] or ("/" if before.startswith("/") else ".")
        there = "" if is_remote(pattern) else f" {neighbors(os.path.join(folder, '*'))}"
        raise DataError(f"no file matches {pattern!r}.{there}")
    return sorted(names)


def is_pattern(path: str) -> bool:
    """Whether a name stands for the files that it matches: it has `*`, `?` or `[` and is no file itself.

    What follows a `?` in the address of a web page is a query.
    """
    if path.startswith(("http://", "https://")):
        return "*" in path
    return bool(PATTERN.search(path)) and not path.startswith((HUB, TFDS)) and not os.path.exists(local_path(path))


def files_of_folder(path: str, split: str) -> list[str]:
    """The files with rows below a local or remote folder, sorted, of one part of the set.

    A file belongs to the part whose name is in its own or in that of a folder around it, as `train-00000.parquet` or
    `test/rows.jsonl`; if none is named, to `train`. Text files count if there are no others, without a README and the
    like. Raises DataError if there are no such files, or none of that part.
    """
    kinds = {name: kind.name for name in _below(path) if (kind := kind_by_name(name)) and _is_data(name)}
    names = [name for name, kind in kinds.items() if kind != "text"] or list(kinds)
    if not names:
        others = listed(sorted(_below(path))) or "it is empty"
        raise DataError(
            f"the folder {path!r} has no files with rows (.json, .jsonl, .csv, .tsv, .txt, .parquet, .arrow, or "
            f"compressed ones): {others}"
        )
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(_split_of(name), []).append(name)
    if split not in parts:
        raise DataError(no_split(path, split, sorted(parts)))
    return [f"{path.rstrip('/')}/{name}" for name in parts[split]]


def described_by_readme(path: str) -> bool:
    """Whether the README of a folder says, as on the Hugging Face hub, which of its files make which set."""
    readme = os.path.join(path, "README.md")
    if not os.path.isfile(readme):
        return False
    head = Path(readme).read_text(encoding="utf-8", errors="replace")[:100_000]
    front = head.split("\n---", 1)[0] if head.startswith("---") else ""
    return re.search(r"^configs:", front, re.MULTILINE) is not None


def no_source(path: str) -> str:
    """The error message for a name that is neither a file nor a folder."""
    if is_remote(path):
        return f"there is nothing at {path!r}"
    repository = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", path) and not kind_by_name(path)
    hub = f" If it is a set on the Hugging Face hub, write {HUB}{path}." if repository else ""
    return f"no data file {path!r}.{hub} {neighbors(path)}"


def neighbors(path: str) -> str:
    """The file nearest to a path that does not exist, or the files of its folder."""
    folder = Path(local_path(path)).parent
    if not os.path.isdir(folder):  # False too for a name that is too long
        return f"There is no folder {str(folder)!r}."
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    hint = did_you_mean(Path(path).name, [name for name in names if name != Path(path).name])
    return hint.strip() or f"Files there: {listed(names) or 'none'}."


def refuse_doubles(names: Sequence[str], given: str) -> None:
    """Raises DataError if a file is named twice, by overlapping patterns for example: its rows would count twice."""
    keys = [name if "://" in name or name.startswith(TFDS) else os.path.realpath(local_path(name)) for name in names]
    doubled = sorted({name for name, key in zip(names, keys, strict=True) if keys.count(key) > 1})
    if doubled:
        raise DataError(
            f"data {given!r} names the same files more than once: {listed(doubled)}. Name each once; to give some rows "
            "more weight, use data.mixture."
        )


def _below(path: str) -> list[str]:
    """The files below a folder, relative to it and sorted, without hidden ones."""
    if is_remote(path):
        names = in_store(path, lambda files, root: [n.removeprefix(root.rstrip("/") + "/") for n in files.find(root)])
    else:
        try:
            names = [str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file()]
        except OSError as error:  # of a folder or a link in it, whose rows would be left out
            raise unreadable(error.filename or path, error) from error
    return sorted(name for name in names if not any(part.startswith(".") for part in Path(name).parts))


def _is_data(name: str) -> bool:
    own = file_name(name)
    return own not in NOT_ROWS and not ABOUT.match(own)


def _split_of(name: str) -> str:
    # The file's own name counts before those of the folders around it.
    for part in reversed(Path(name.lower()).parts):
        words = re.split(r"[^a-z]+", part)
        # Texts have titles for names, of which only the whole names a part.
        title = TITLED.match(part)
        named = [SPLITS[word] for word in (words if title is None else [title[1]]) if word in SPLITS]
        if named:
            return named[0]
    return "train"
