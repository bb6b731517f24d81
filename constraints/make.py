"""Writes constraints/PYTHON.txt for the Python that runs it: what pip picks today for jaxft and its tests.

`make constraints` runs it with every Python. pip is asked what it would install, and installs nothing.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "test"


def picked() -> list[str]:
    """`name==version` of every package, by name. Raises CalledProcessError where pip finds no set that fits."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip, report = [str(Path(folder) / "bin" / "python"), "-m", "pip"], Path(folder) / "report.json"
        subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip"], check=True)
        asked = ["--dry-run", "--ignore-installed", "--report", str(report), "--editable", f"{ROOT}[{EXTRAS}]"]
        subprocess.run([*pip, "install", "--quiet", *asked], check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return lines([(item["metadata"]["name"], item["metadata"]["version"]) for item in found])


def lines(packages: list[tuple[str, str]]) -> list[str]:
    """The lines for (name, version) pairs: without jaxft, and without where a build was made (`2.13.0+cpu`)."""
    names = {re.sub(r"[-_.]+", "-", name).lower(): version.split("+")[0] for name, version in packages}
    return [f"{name}=={version}" for name, version in sorted(names.items()) if name != "jaxft"]


if __name__ == "__main__":
    target = ROOT / "constraints" / f"{sys.version_info.major}.{sys.version_info.minor}.txt"
    target.write_text("\n".join(picked()) + "\n", encoding="utf-8")
    print(f"wrote {target.relative_to(ROOT)}")
