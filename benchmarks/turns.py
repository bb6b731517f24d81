"""Two programs that take turns, each measurement in a process of its own."""

import argparse
import json
import subprocess
import sys
from typing import Any


def measure(program: str, arguments: argparse.Namespace, who: str) -> dict[str, Any]:
    """Runs `program --only=WHO` with the other arguments, and reads the JSON of its last line."""
    given = {name: value for name, value in vars(arguments).items() if name not in ("rounds", "only")}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    done = subprocess.run(
        [sys.executable, program, f"--only={who}", *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
