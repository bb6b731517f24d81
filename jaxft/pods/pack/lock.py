"""The versions that the hosts install, and the extras of jaxft that a run needs there."""

import importlib.metadata
import re
import sys
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from jaxft.config import RunConfig
from jaxft.data.sources.listing import names_in
from jaxft.errors import PodError
from jaxft.pods.pack.wheel import MEND, PACKAGE, is_checkout

PYTHON = "3.12"  # of the hosts
TRACKERS = ("wandb", "mlflow", "trackio")
# What the markers of requirements see on a host.
HOST = {
    "python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "implementation_version": f"{PYTHON}.0",
    "os_name": "posix", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64",
}  # fmt: skip


def extras_of(config: RunConfig) -> tuple[str, ...]:
    """The extras of jaxft that a run needs on a TPU host, sorted.

    Raises PodError if the jaxft that is installed here does not know them, as after an update of a checkout.
    """
    data = config.data
    sources = [data.train, data.eval or "", *(one.path for one in data.mixture.values())]
    names = [name for source in sources for name in names_in(source)]
    extras = {"tpu", "gcs"} | set(config.train.trackers) & set(TRACKERS)
    if any(name.startswith("hf://") for name in names):
        extras.add("datasets")
    if any(name.startswith("tfds:") for name in names):
        extras.add("tfds")
    if "math_answer" in (config.rewards.functions or ""):
        extras.add("math")
    known = importlib.metadata.metadata("jaxft").get_all("Provides-Extra") or []
    if unknown := sorted(extras - set(known)):
        raise PodError(f"the jaxft that pip knows here has no extra {', '.join(unknown)}, which a host needs. {MEND}")
    return tuple(sorted(extras))


def lock_of(extras: Iterable[str]) -> str:
    """The versions of all that `jaxft[extras]` needs on a host, one `NAME==VERSION` a line, sorted.

    They are those of this environment, if its Python is that of the hosts; else those of `constraints/` in a checkout,
    which the tests ran with, and then those of this environment. A package that neither has, or only in a version that
    another one excludes, is left to the installer: libtpu for example, where `jaxft[plan]` brought a newer one than
    jax asks for on a TPU.
    """
    here = _versions_here()
    versions = here | ({} if _is_python_of_hosts() else _versions_of_constraints())
    if versions.get("jax") != here.get("jax"):
        versions.pop("libtpu", None)
    # What a release requires is known of the one that is installed, and of no other.
    needs = _closure(
        "jaxft", frozenset(extras), {name for name, version in here.items() if versions.get(name) == version}
    )
    pins = {
        name: versions[name]
        for name, specifiers in needs.items()
        if name != "jaxft" and name in versions and specifiers.contains(versions[name], prereleases=True)
    }
    return "".join(f"{name}=={pins[name]}\n" for name in sorted(pins))


def _is_python_of_hosts() -> bool:
    return ".".join(map(str, sys.version_info[:2])) == PYTHON


def _versions_here() -> dict[str, str]:
    # A local part such as +cpu is of a build that other indexes do not have.
    return {
        canonicalize_name(one.metadata["Name"]): one.version.partition("+")[0]
        for one in importlib.metadata.distributions()
    }


def _versions_of_constraints() -> dict[str, str]:
    path = PACKAGE.parent / "constraints" / f"{PYTHON}.txt"
    if not (is_checkout() and path.is_file()):
        return {}
    pins = re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


def _closure(name: str, extras: frozenset[str], known: set[str]) -> dict[str, SpecifierSet]:
    """The packages that one requires on a host, as far as they are installed here, each with the versions it may have.

    Names are canonical, and the package itself is among them. known: packages whose limits on others count.
    """
    allowed: dict[str, SpecifierSet] = {canonicalize_name(name): SpecifierSet()}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting: list[tuple[str, frozenset[str]]] = [(canonicalize_name(name), extras)]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        for need in _requirements(*one):
            needed = canonicalize_name(need.name)
            limit = need.specifier if one[0] in known else SpecifierSet()
            allowed[needed] = allowed.get(needed, SpecifierSet()) & limit
            waiting.append((needed, frozenset(need.extras)))
    return allowed


def _requirements(name: str, extras: frozenset[str]) -> list[Requirement]:
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    needs = map(Requirement, lines)
    return [need for need in needs if any(_applies(need, extra) for extra in extras | {""})]


def _applies(need: Requirement, extra: str) -> bool:
    return need.marker is None or need.marker.evaluate({**HOST, "extra": extra})
