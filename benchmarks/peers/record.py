"""Writes a compiled step to files that `plan_vs_peers.py` reads. Runs in a peer's environment, without jaxft."""

import json
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

# With these, libtpu compiles without a TPU, without waiting for a metadata server or for other compiles.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def record(lower_and_compile: Callable[[], Any], folder: Path, packages: tuple[str, ...]) -> Any:
    """Compiles, and writes `step.hlo` and `step.json` to the folder: memory in bytes, seconds, versions."""
    wall, cpu = time.perf_counter(), time.process_time()
    compiled = lower_and_compile()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    analysis = compiled.memory_analysis()
    summary = {
        "argument_bytes": analysis.argument_size_in_bytes,
        "output_bytes": analysis.output_size_in_bytes,
        "aliased_bytes": analysis.alias_size_in_bytes,
        "temp_bytes": analysis.temp_size_in_bytes,
        "code_bytes": analysis.generated_code_size_in_bytes,
        "compile_seconds": wall,
        "compile_cpu_seconds": cpu,
        "versions": {name: metadata.version(name) for name in (*packages, "jax", "jaxlib", "libtpu", "flax")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.hlo").write_text(compiled.as_text(), encoding="utf-8")
    (folder / "step.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return compiled
