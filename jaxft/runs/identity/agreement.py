"""What must be the same in every process of a run: settings, programs, switches of the numbers, and what is read.

Each process trains its part of one model, so one that has another learning rate, or another version of JAX, would
spoil the whole without an error. All of it is compared before the first step, through the store of `jax.distributed`
and not through the devices, whose programs must be equal already to exchange anything.
"""

import functools
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jaxft.config import RunConfig
from jaxft.config.fields import field_values
from jaxft.data import Tokenizer
from jaxft.errors import ConfigError, listed
from jaxft.runs.identity.contents import Reads
from jaxft.sharding.processes import gather, is_multi_process

# What is compared, by a name for people: the text that must be equal, and the text that a message shows.
Shared = dict[str, tuple[str, str]]

PACKAGES = (
    "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "ml_dtypes", "numpy", "flax", "optax",
    "orbax-checkpoint", "tensorstore", "safetensors", "tokenizers", "transformers", "jinja2", "datasets", "pyarrow",
)  # fmt: skip
# Settings that each process may choose: how it reads its rows, not what they are.
OWN = ("data.num_proc", "data.cache")
# Flags of JAX that name devices, folders and logs of one process, and compute nothing.
OWN_FLAGS = re.compile(
    "visible_devices|_cache|_dir$|dump|log|traceback|profil|pprint|address|timeout|proxy_envs|platform_name|platforms$"
    "|num_cpu_devices|source_|debug_info|leaked|_debug$|explain|share_binary|cross_host"
)
VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "TF_DETERMINISTIC_OPS")
# Flags of XLA that belong to one process.
OWN_XLA = re.compile("--xla_(force_host_platform_device_count|dump_|hlo_profile|gpu_per_fusion_autotune_cache)")
ABSENT = "(absent)"
SHOWN = 12  # differences in one message
LONGEST = 200  # characters of a value in a message


def check_settings(config: RunConfig) -> None:
    """Raises ConfigError in every process if their settings, versions or switches of the numbers differ."""
    if is_multi_process():
        check_same(settings_of(config) | versions() | switches(), "Give every process the same of each.")


def check_contents(reads: Reads, tokenizer: Tokenizer) -> None:
    """Raises ConfigError in every process if they read different contents, as if the disk of one has another file."""
    if is_multi_process():
        check_same(
            contents_of(reads, tokenizer),
            "Give every host the same files, under the same paths or on storage that all of them mount.",
        )


def check_same(own: Shared, mend: str) -> None:
    """Raises ConfigError in every process if `own` differs between them. mend: what to do, a sentence.

    Every process must call it.
    """
    if lines := differences(gather(own)):
        raise ConfigError(
            "the processes of this run would not compute the same model, since they differ in\n  "
            + "\n  ".join(lines)
            + f"\n{mend}"
        )


def differences(every: Sequence[Mapping[str, Sequence[str]]]) -> list[str]:
    """What differs between processes, a line for each name, with the values and who has them.

    every: the `Shared` of each process, in their order.
    """
    names = dict.fromkeys(name for own in every for name in own)
    lines = []
    for name in names:
        users: dict[str, list[int]] = {}
        shown: dict[str, str] = {}
        for number, own in enumerate(every):
            value, text = own.get(name, (ABSENT, ABSENT))
            users.setdefault(value, []).append(number)
            shown.setdefault(value, text)
        if len(users) > 1:
            parts = (f"{_cut(shown[value])} in {_processes(numbers)}" for value, numbers in users.items())
            lines.append(f"{name}: {', '.join(parts)}")
    return [*lines[:SHOWN], *([f"... and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else [])]


def settings_of(config: RunConfig) -> Shared:
    """The settings that must be equal; what is compared by its content may be spelt otherwise."""
    return {
        field.key: (repr(value), repr(value))
        for field, value in field_values(config)
        if not field.sections and not field.by_content and field.key not in OWN
    }


def versions() -> Shared:
    """Python's version, those of the packages that compute and read, and jaxft's own program."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    own = f"{sys.modules['jaxft'].__version__} (program {digest.hexdigest()[:12]})"
    known = {"Python": ".".join(map(str, sys.version_info[:2])), "jaxft": own}
    known |= {f"{name} (package)": _version(name) for name in PACKAGES}
    return {name: (text, text) for name, text in known.items()}


def switches() -> Shared:
    """The flags and environment variables by which JAX and XLA compute."""
    known = {name: repr(value) for name, value in jax.config.values.items() if not OWN_FLAGS.search(name)}
    known |= {f"${name}": repr(os.environ.get(name)) for name in VARIABLES}
    known["$XLA_FLAGS"] = repr(xla_flags(os.environ.get("XLA_FLAGS", "")))
    return {name: (text, text) for name, text in known.items()}


def xla_flags(text: str) -> list[str]:
    """The flags in a value of XLA_FLAGS, or in the file that it names, without those of one process."""
    if text.strip() and not text.lstrip().startswith("-") and os.path.isfile(text):
        text = Path(text).read_text(encoding="utf-8")
    try:
        flags = shlex.split(text)
    except ValueError:  # a quote that is not closed
        flags = text.split()
    return [flag for flag in flags if not OWN_XLA.match(flag)]


def contents_of(reads: Reads, tokenizer: Tokenizer) -> Shared:
    """Digests of what a run reads, shown with the path as it is spelt and the size."""
    shared = {}
    for name, one in reads.items():
        size = f", {one['examples']:,} examples of {one['tokens']:,} tokens" if "tokens" in one else ""
        digest = str(one["digest"])
        shared[name] = (digest, f"{one['path']} (digest {digest[:12]}{size})")
    template = hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()
    return shared | {"the chat template": (template, f"digest {template[:12]}")}


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT


def _processes(numbers: Sequence[Any]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {listed(numbers)}"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text):,} characters)"
