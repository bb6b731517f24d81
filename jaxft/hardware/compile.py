"""Compiling a step for devices that are not there, and what the compiler says of its memory."""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxft.sharding.mesh import MeshPlan

LEVELS = ("O1", "default")
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The environment in which libtpu compiles without a TPU; JAX must not have started before.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # else it asks a metadata server that is not there, for minutes
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else two compiles on one machine wait for one another
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device's main memory. Aliased outputs lie where the donated arguments lay. host: of its host's."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    host: int = 0

    @property
    def peak(self) -> int:
        """All that must be in main memory at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled step. text: its HLO. seconds, cpu_seconds: what lowering and compiling took."""

    text: str
    memory: Memory
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class TooLarge:
    """What the compiler says of a step that does not fit. Bytes of main memory, None where not said.

    used: by all. temporaries: by them alone.
    """

    used: int | None
    temporaries: int | None
    limit: int | None
    message: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def compile_step(step: Callable[..., Any], state: Any, batch: Any, mesh: "MeshPlan", level: str) -> Compiled | TooLarge:
    """`step(state, batch)`, its state donated, compiled for the mesh's devices as a run compiles it.

    state, batch: ShapeDtypeStructs with shardings. level: O1, XLA's quick way, or default.
    """
    import jax

    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O1" if level == "O1" else "UNKNOWN")
    start, cpu = time.perf_counter(), time.process_time()
    try:
        stays = jax.tree.map(lambda leaf: leaf.sharding, state)
        jitted = jax.jit(mesh.within(step), donate_argnums=0, out_shardings=(stays, None))
        lowered = jitted.lower(state, batch)
        with tempfile.TemporaryDirectory() as reports:
            compiled = lowered.compile(compiler_options={"xla_dump_to": reports})
            allocated = _allocated(Path(reports))
    except jax.errors.JaxRuntimeError as error:
        found = parse_too_large(str(error))
        if found is None:
            raise
        return replace(found, seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
    finally:
        jax.config.update("jax_optimization_level", before)
    said = compiled.memory_analysis()
    kept = said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    memory = Memory(
        arguments=said.argument_size_in_bytes,
        outputs=said.output_size_in_bytes,
        aliased=said.alias_size_in_bytes,
        # Older compilers' own figure counts up to a third more than what they allocate.
        temporaries=said.temp_size_in_bytes if allocated is None else min(said.temp_size_in_bytes, allocated - kept),
        code=said.generated_code_size_in_bytes,
        host=said.host_temp_size_in_bytes,
    )
    seconds, spent = time.perf_counter() - start, time.process_time() - cpu
    return Compiled(text=compiled.as_text(), memory=memory, seconds=seconds, cpu_seconds=spent)


def _allocated(reports: Path) -> int | None:
    """Bytes of main memory that the compiler's report of its buffers adds up to; None without such a report."""
    for report in reports.glob("*memory-usage-report.txt"):
        found = re.search(r"^Memory Space: default.*\nTotal bytes: (\d+)", report.read_text(errors="replace"))
        if found:
            return int(found[1])
    return None


def parse_too_large(message: str) -> TooLarge | None:
    """What the compiler's message says of main memory, None for an error of another kind: a kernel that wants more
    vector memory than a core has is no step that is too large.
    """
    if "RESOURCE_EXHAUSTED" not in message or "vmem" in message.lower():
        return None
    size = r"([\d.]+)([KMGT]?)B?"
    used = re.search(rf"Used {size} of {size} hbm", message)
    temporaries = re.search(rf"for HLO temporaries \({size}\) exceeds available HBM \({size}\)", message)
    found = used or temporaries
    return TooLarge(
        used=_bytes(*used.groups()[:2]) if used else None,
        temporaries=_bytes(*temporaries.groups()[:2]) if temporaries else None,
        limit=_bytes(*found.groups()[2:]) if found else None,
        message=message.split("\n")[0][:300],
    )


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])
