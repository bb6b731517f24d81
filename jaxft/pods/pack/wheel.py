"""A wheel of the jaxft that runs here, from a checkout or from an installed package, and the scripts for the hosts."""

import base64
import hashlib
import io
import sys
import zipfile
from collections.abc import Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from jaxft.errors import PodError

PACKAGE = Path(__file__).parents[2]
OLDEST = (1980, 1, 1, 0, 0, 0)  # the first time that a zip file can name
MEND = "Install jaxft again where this command runs: pip install --editable . in a checkout, or pip install jaxft"
# Folders that are at the root of a checkout, and inside an installed package.
ROOTS = ("configs", "tpu_scripts")


def is_checkout() -> bool:
    """Whether jaxft runs from a checkout, and not from an installed package."""
    return (PACKAGE.parent / "setup.py").is_file() and (PACKAGE.parent / "configs").is_dir()


def scripts_folder() -> Path:
    """The folder `worker` of tpu_scripts, in an installed package or at the root of a checkout.

    Raises PodError if it is not there.
    """
    folder = (PACKAGE.parent if is_checkout() else PACKAGE) / "tpu_scripts" / "worker"
    if not (folder / "setup.sh").is_file():
        raise PodError(f"the scripts for the hosts are not in {folder}. {MEND}")
    return folder


def installed() -> Distribution:
    """What pip knows of jaxft. Raises PodError if it knows nothing, or another version than the one that runs."""
    try:
        known = distribution("jaxft")
    except PackageNotFoundError as error:
        raise PodError(
            f"pip does not know the jaxft in {PACKAGE}, so its dependencies are not known. {MEND}"
        ) from error
    running: str = sys.modules["jaxft"].__version__
    if known.version != running:
        raise PodError(f"pip knows jaxft {known.version}, but {running} runs, from {PACKAGE}. {MEND}")
    return known


def wheel() -> tuple[str, bytes]:
    """(file name, content) of a wheel of this jaxft. The same files give the same bytes. Raises PodError as above."""
    known = installed()
    info = f"jaxft-{known.version}.dist-info"
    metadata = known.read_text("METADATA") or known.read_text("PKG-INFO")
    if not metadata:
        raise PodError(f"pip has no metadata of the jaxft in {PACKAGE}. {MEND}")
    files = {name: path.read_bytes() for name, path in _files(known).items()} | {
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: jaxft\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": (known.read_text("entry_points.txt") or "").encode(),
    }
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, OLDEST)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED)
    return f"jaxft-{known.version}-py3-none-any.whl", buffer.getvalue()


def _files(known: Distribution) -> dict[str, Path]:
    """Every file of the package, by its name in a wheel."""
    if not is_checkout():
        named = {str(file): Path(str(file.locate())) for file in known.files or () if file.parts[0] == "jaxft"}
        return {name: path for name, path in named.items() if _is_source(path) and path.is_file()}
    folders = {"jaxft": PACKAGE} | {f"jaxft/{root}": PACKAGE.parent / root for root in ROOTS}
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and _is_source(path.relative_to(folder))
    }


def _is_source(path: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return not hidden and path.suffix != ".pyc" and not path.name.endswith("~")


def _record(files: Mapping[str, bytes], own: str) -> bytes:
    lines = []
    for name in sorted(files):
        digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(files[name])}\n")
    return "".join([*lines, f"{own},,\n"]).encode()
