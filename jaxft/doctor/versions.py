"""Versions of what runs depend on, and whether they fit to each other. Nothing is imported here, only read."""

import re
import sys
from collections.abc import Callable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from jaxft.doctor.part import Part

PACKAGES = (
    "jaxft", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "gcsfs", "numpy",
    "transformers", "huggingface_hub",
)  # fmt: skip
# Plugins that JAX uses only if their version is exactly jaxlib's, with the extra of jax that installs them.
PLUGINS = {"jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13"}

InstalledVersion = Callable[[str], str | None]


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def examine(version: InstalledVersion = installed) -> list[Part]:
    """Python and packages, whether jax and jaxlib fit, and each plugin."""
    python = ".".join(map(str, sys.version_info[:3]))
    present = {name: number for name in (*PACKAGES, *PLUGINS) if (number := version(name))}
    words = ", ".join(f"{name} {number}" for name, number in present.items())
    versions = Part(name="versions", text=f"Python {python}, {words}", value={"python": python} | present)
    return [versions, *_jax(version), *(_plugin(name, version) for name in PLUGINS if version(name))]


def _jax(version: InstalledVersion) -> list[Part]:
    jax, jaxlib = version("jax"), version("jaxlib")
    if jax is None or jaxlib is None:
        missing = " and ".join(name for name, number in (("jax", jax), ("jaxlib", jaxlib)) if number is None)
        return [Part(name="jax", text=f"{missing} is not installed", mend="Run pip install jaxft.")]
    if _numbers(jax) == _numbers(jaxlib):
        return [Part(name="jax", text=f"jax and jaxlib are both {jax}")]
    return [
        Part(
            name="jax",
            text=f"jax {jax} and jaxlib {jaxlib} are no pair: JAX refuses some of such pairs and fails with others",
            mend=f"Run pip install 'jax=={jax}' 'jaxlib=={jax}'.",
        )
    ]


def _plugin(name: str, version: InstalledVersion) -> Part:
    """Whether JAX will use a plugin."""
    plugin, jaxlib, jax = version(name), version("jaxlib"), version("jax")
    if plugin and jaxlib and _numbers(plugin) == _numbers(jaxlib):
        return Part(name=name, text=f"{plugin}, as jaxlib", value=plugin)
    return Part(
        name=name,
        text=f"{name} {plugin} does not belong to jaxlib {jaxlib}, so JAX ignores it and uses the CPU",
        value=plugin,
        mend=f"Run pip install 'jax[{PLUGINS[name]}]=={jax}'.",
    )


def libtpu(chips: int, version: InstalledVersion = installed) -> Part:
    """libtpu, for a machine with so many chips: whether it is there and is the one of this release of jax."""
    jax, number = version("jax"), version("libtpu")
    mend = f"Run pip install 'jax[tpu]=={jax}'."
    if number is None:
        text = "libtpu is not installed" + (", so JAX does not use the TPU chips of this machine" if chips else "")
        return Part(name="libtpu", text=text, mend=mend if chips else None)
    wanted = _wanted_libtpu()
    if chips and wanted is not None and Version(number) not in wanted.specifier:
        text = f"jax {jax} was released with libtpu{wanted.specifier}, and {number} is installed"
        return Part(name="libtpu", text=text, value=number, mend=mend)
    return Part(name="libtpu", text=number, value=number)


def _wanted_libtpu() -> Requirement | None:
    """The libtpu that the installed jax names in its extra `tpu`, or None if it names none."""
    try:
        requirements = metadata.requires("jax") or []
    except metadata.PackageNotFoundError:
        return None
    for one in map(Requirement, requirements):
        if one.name == "libtpu" and one.marker is not None and one.marker.evaluate({"extra": "tpu"}):
            return one
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers with which a version begins, by which JAX compares a plugin with jaxlib."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()
