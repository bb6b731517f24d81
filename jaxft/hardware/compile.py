"""Compiles a step ahead of time for hypothetical devices, and reads the memory it needs from the compiler."""

import contextlib
import importlib.metadata
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

    from jaxft.sharding.mesh import MeshPlan

LEVELS = ("O1", "default")
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Environment variables with which libtpu compiles without a TPU. They must be set before JAX starts.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # otherwise libtpu waits for a metadata server for minutes
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise two compilations on one machine wait for each other
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# Pairs of jax and libtpu that have compiled steps, and the TPUs for which they did. The second pair's compiler dies for
# tpu7x, and that of jax 0.10.2 with libtpu 0.0.52 for v5p and v6e too.
TESTED = {("0.12.0.1", "0.0.52"): "every kind of TPU", ("0.10.2", "0.0.42.1"): "all but tpu7x"}


def pairing() -> tuple[str, bool]:
    """(installed versions of jax and libtpu and the tested pairs, in words; whether the installed pair is tested)."""
    installed: list[str | None] = []
    for name in ("jax", "libtpu"):
        try:
            installed.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            installed.append(None)
    tested = "; ".join(f"jax {jax} with libtpu {libtpu} for {kinds}" for (jax, libtpu), kinds in TESTED.items())
    words = f"this is jax {installed[0]} with libtpu {installed[1]}; tested: {tested}"
    return words, tuple(installed) in TESTED


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device's main memory.

    aliased: outputs that reuse the memory of donated arguments. host: bytes of its host's memory.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    host: int = 0

    @property
    def peak(self) -> int:
        """Bytes that must be in main memory at the same time."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled step. text: its HLO. seconds, cpu_seconds: spent on lowering and compiling."""

    text: str
    memory: Memory
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class TooLarge:
    """A step that the compiler refused as too large.

    Bytes of main memory, None if the message does not name them. used: by everything. temporaries: by these alone.
    """

    used: int | None
    temporaries: int | None
    limit: int | None
    message: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def compile_step(
    step: Callable[..., Any],
    state: Any,
    batch: Any,
    mesh: "MeshPlan",
    level: str,
    options: Mapping[str, Any] | None = None,
) -> Compiled | TooLarge:
    """Compiles `step(state, batch)`, its state donated, for the mesh's devices; at the level `default` as a run does.

    state, batch: pytrees of ShapeDtypeStructs with shardings. level: O1, which compiles faster, or default. options: of
    the compiler, beside those of a run.
    """
    import jax

    from jaxft.hardware.attached import step_options

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    # O1 is to be quick. There they would double the time of compiling, and change nothing in a plan but its memory, by
    # 0.2 %.
    device = mesh.mesh.devices.flat[0]
    own = {} if level == "O1" else step_options(device)
    jitted = jax.jit(mesh.bind(step), donate_argnums=0, out_shardings=(shardings, None), compiler_options=own)

    def lower() -> jax.stages.Lowered:
        with traced_for(device):
            traced = jitted.trace(state, batch)
        return traced.lower()

    return compile_lowered(lower, level, options)


def traced_for(device: "jax.Device") -> "contextlib.AbstractContextManager[Any]":
    """Programs are traced for this device, though it is not here: tokamax chooses kernels for GPUs by JAX's default."""
    import jax

    return jax.default_device(device) if device.platform == "gpu" else contextlib.nullcontext()


def compile_lowered(
    lower: "Callable[[], jax.stages.Lowered]", level: str, options: Mapping[str, Any] | None = None
) -> Compiled | TooLarge:
    """Lowers a program and compiles it. level: O1, which compiles faster, or default. options: of the compiler."""
    import jax

    before = jax.config.jax_optimization_level  # type: ignore[attr-defined]  # jax declares its options at run time
    jax.config.update("jax_optimization_level", "O1" if level == "O1" else "UNKNOWN")
    start, cpu = time.perf_counter(), time.process_time()
    try:
        lowered = lower()
        with tempfile.TemporaryDirectory() as reports:
            compiled = lowered.compile(compiler_options={"xla_dump_to": reports, **(options or {})})
            allocated = _allocated_bytes(Path(reports))
    except jax.errors.JaxRuntimeError as error:
        too_large = parse_too_large(str(error))
        if too_large is None:
            raise
        return replace(too_large, seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
    finally:
        jax.config.update("jax_optimization_level", before)
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    if analysis is None or text is None:
        raise RuntimeError("the compiler gives no memory analysis or no HLO text of the step")
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        # The analysis of older compilers counts up to a third more than they allocate.
        temporaries=analysis.temp_size_in_bytes
        if allocated is None
        else min(analysis.temp_size_in_bytes, allocated - kept),
        code=analysis.generated_code_size_in_bytes,
        host=analysis.host_temp_size_in_bytes,
    )
    seconds, spent = time.perf_counter() - start, time.process_time() - cpu
    return Compiled(text=text, memory=memory, seconds=seconds, cpu_seconds=spent)


def _allocated_bytes(reports: Path) -> int | None:
    """Total bytes of main memory in the compiler's report of its buffers; None without such a report."""
    for report in reports.glob("*memory-usage-report.txt"):
        total = re.search(r"^Memory Space: default.*\nTotal bytes: (\d+)", report.read_text(errors="replace"))
        if total:
            return int(total[1])
    return None


def parse_too_large(message: str) -> TooLarge | None:
    """Reads the compiler's message about main memory; None for any other error.

    A kernel that needs more vector memory than a core has is another error: the step is not too large.
    """
    if "RESOURCE_EXHAUSTED" not in message or "vmem" in message.lower():
        return None
    size = r"([\d.]+)([KMGT]?)B?"
    used = re.search(rf"Used {size} of {size} hbm", message)
    temporaries = re.search(rf"for HLO temporaries \({size}\) exceeds available HBM \({size}\)", message)
    message_with_limit = used or temporaries
    return TooLarge(
        used=_bytes(*used.groups()[:2]) if used else None,
        temporaries=_bytes(*temporaries.groups()[:2]) if temporaries else None,
        limit=_bytes(*message_with_limit.groups()[2:]) if message_with_limit else None,
        message=message.split("\n")[0][:300],
    )


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])
