"""The command that repeats a run."""

import json
import re
import shlex
from typing import Any

from jaxft.config import RunConfig
from jaxft.config.fields import Field, field_values
from jaxft.files.paths import HUB

FLAGS = {"model.path": "model", "data.train": "data", "output_dir": "output"}  # spelt as on most command lines
NAMED = (HUB, "tfds:")  # names that mean the same everywhere
PATHS = ("data.chat_template", "data.tfds_data_dir")  # beside those whose contents identify a run
ROOTED = re.compile(r"(/|~|file:|[A-Za-z]:\\)")


def changed_fields(config: RunConfig, *, public: bool = False) -> dict[str, str]:
    """Every field that is not at its default, by key, as the text by which a command line sets it.

    public: without what is only true on this machine: paths are shortened to their last part, and the run folder is
    left out.
    """
    out = {}
    for field, value in field_values(config):
        if field.sections or value == field.default or (public and field.key == "output_dir"):
            continue
        text = as_text(value)
        out[field.key] = public_text(text, is_path=_is_path(field)) if public else text
    return out


def command_of(config: RunConfig, *, public: bool = False) -> str:
    """`jaxft train` with every setting of a run that is not at its default. public: as for `changed_fields`."""
    fields = changed_fields(config, public=public)
    if not public:
        fields.setdefault("output_dir", config.output_dir)
    fields = {key: fields.pop(key) for key in FLAGS if key in fields} | fields
    options = [f"--{FLAGS.get(key, key)}={shlex.quote(text)}" for key, text in fields.items()]
    return " ".join(["jaxft train", *options])


def as_text(value: Any) -> str:
    """A value as a command line gives it."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return value if isinstance(value, str) else repr(value)


def public_text(text: str, *, is_path: bool = True) -> str:
    """A text without folders of this machine: the last part of each path in it; names on the hub stay.

    is_path: whether every text with a slash in it is a path; otherwise only one that begins at a root is.
    """
    parts = re.split(r"([,\[\]\"'\s]+)", text)
    return "".join(
        re.split(r"[/\\]", part.rstrip("/\\"))[-1]
        if not part.startswith(NAMED) and (is_path or ROOTED.match(part))
        else part
        for part in parts
    )


def _is_path(field: Field) -> bool:
    return (field.by_content and not field.key.endswith("revision")) or field.json_list or field.key in PATHS
