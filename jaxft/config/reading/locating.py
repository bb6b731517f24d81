"""Which file a config is: a path, a run folder, or the name of a config that ships with jaxft."""

import os
import re
from pathlib import Path

from jaxft.errors import ConfigError, did_you_mean
from jaxft.home import local_path

ENDINGS = (".py", ".yaml", ".yml", ".json")
RUN_CONFIG = "config.json"  # in a run folder
PACKAGE = Path(__file__).parents[2]


def shipped_folder() -> Path:
    """The folder of the shipped configs: within an installed package, or at the root of a checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def shipped_names() -> list[str]:
    """The names of the shipped configs, sorted."""
    return sorted(path.stem for path in shipped_folder().glob("*.py"))


def locate(source: str) -> tuple[str, str | None]:
    """(path of the file, argument or None) of a config.

    source: a path or a shipped config's name, with `:ARG` behind it or not. Raises ConfigError if there is none.
    """
    path, arg = source, None
    if not os.path.exists(local_path(source)):
        path, colon, text = source.rpartition(":")
        path, arg = (path, text) if colon else (source, None)
    full = local_path(path)
    if os.path.isdir(full):
        return _in_folder(full), arg
    if os.path.isfile(full):
        if not full.endswith(ENDINGS):
            raise ConfigError(
                f"{path} is no config by its name: configs end in {', '.join(ENDINGS)}. Rename it, or give rows and "
                "models to --data and --model"
            )
        return full, arg
    # `configs/NAME.py` is how a checkout spells NAME.
    name = re.fullmatch(r"(?:configs/)?([\w-]+?)(?:\.py)?", path)
    if name is not None and name[1] in shipped_names():
        return str(shipped_folder() / f"{name[1]}.py"), arg
    raise ConfigError(_missing(full))


def _in_folder(folder: str) -> str:
    path = os.path.join(folder, RUN_CONFIG)
    if not os.path.isfile(path):
        raise ConfigError(f"{folder} is a folder without {RUN_CONFIG}: give a config file, or the folder of a run")
    return path


def _missing(path: str) -> str:
    if "://" in path:
        return (
            f"{path} is an address, and configs are read from this machine: copy the file (`gcloud storage cp "
            f"{path.rstrip('/')}/{RUN_CONFIG} .` for that of a run in a bucket), and give the copy. A run goes on at "
            "the output_dir that its config names."
        )
    if not path.endswith(ENDINGS) and os.sep not in path:
        hint = did_you_mean(path, shipped_names())
        return f"no config named {path!r}.{hint} Shipped: {', '.join(shipped_names())}. A file ends in .py or .yaml."
    folder = os.path.dirname(path) or "."
    known = sorted(f for f in os.listdir(folder) if f.endswith(ENDINGS)) if os.path.isdir(folder) else []
    hint = did_you_mean(os.path.basename(path), known)
    return f"no config file {path!r}.{hint} Files there: {', '.join(known) or 'none'}."
