"""The same training step by jaxft, MaxText and Tunix, compiled for hypothetical TPU slices, side by side.

    python benchmarks/plan_vs_peers.py --environments=runs/peers                  # all rows: an hour or two of CPU
    python benchmarks/plan_vs_peers.py --environments=runs/peers --rows 8b-full-v5e-16 --peers maxtext --json

Every project compiles its own step in an environment of its own, created if it is missing (several GiB, half an hour of
pip); nothing runs on a TPU and no weights are read. jaxft's environment is made from this checkout with the newest jax
and libtpu, as are the peers': HBM differs by gigabytes between compilers, whose versions the table names. jaxft's
numbers are those of `jaxft plan`; the peers' compiled text is read by the same code. A step of a peer that is already
in the folder is not compiled again; remove `steps` there to do so. All numbers are for one device and one step:

- HBM: arguments + outputs - aliased outputs + temporaries + code.
- products / ideal: FLOPs of all matrix products, attention and recomputation included, divided by 6 (LoRA: 4) FLOPs
  per parameter and token. The excess over 1 is attention, rematerialisation and waste.
- received: bytes from other devices, by kind of collective; loops count by their trips.

Peers that unroll their layers are compiled with 2 and 4 layers and extrapolated in a straight line; the table says so.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
ROOT = Path(__file__).parents[1]
STEPS = Path(__file__).parent / "peers"
PARAMETERS, LAYERS, LENGTH = 8_030_261_248, 32, 4096
FUSION_KIB = 16384  # vector memory that libtpu gives to a fusion on v5e and v5p
OWN = ("PYTHONPATH", "XLA_FLAGS", "LIBTPU_INIT_ARGS")  # environment variables that peers do not get


@dataclass(frozen=True, kw_only=True)
class Row:
    """One piece of work on Llama 3.1 8B. devices: of the slice. batch: sequences over all of them. config: jaxft's."""

    topology: str
    maxtext_topology: str
    devices: int
    batch: int
    lora: bool
    config: str

    @property
    def ideal_flops(self) -> float:
        """FLOPs of one device and step: 6 per parameter and token, 4 for frozen parameters."""
        return (4 if self.lora else 6) * PARAMETERS * self.batch * LENGTH / self.devices


FULL, LORA = "configs/llama3_1_8b_full.py", "configs/llama3_1_8b_lora.py"
ROWS = {
    "8b-full-v5e-16": Row(
        topology="v5e:4x4", maxtext_topology="v5e-16", devices=16, batch=16, lora=False, config=FULL
    ),
    "8b-full-v5p-8": Row(
        topology="v5p:2x2x1", maxtext_topology="v5p-8", devices=4, batch=16, lora=False, config=FULL
    ),
    "8b-lora-v5e-8": Row(topology="v5e:2x4", maxtext_topology="v5e-8", devices=8, batch=8, lora=True, config=LORA),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A project to compare with. requirement: for pip. depths: numbers of layers with which it is compiled.

    arguments: of its script, after the folder, for a row and a number of layers. missing: why it cannot do a row.
    """

    requirement: str
    script: str
    depths: tuple[int, ...]
    arguments: Callable[[Row, int], list[str]]
    missing: Callable[[Row], str | None]


PEERS = {
    "maxtext": Peer(
        requirement="maxtext[tpu]==0.2.5",
        script="maxtext_step.py",
        depths=(LAYERS,),
        arguments=lambda row, layers: [
            row.maxtext_topology, str(row.batch // row.devices), str(LENGTH), str(layers),
        ],
        missing=lambda row: "its train_compile puts no adapters on the model" if row.lora else None,
    ),
    "tunix": Peer(
        requirement="google-tunix[prod]==0.1.7",
        script="tunix_step.py",
        depths=(2, 4),
        arguments=lambda row, layers: [row.topology, str(row.batch), str(LENGTH), str(layers)],
        missing=lambda row: None if row.lora else "it computes in the dtype of its weights: no float32 with bfloat16",
    ),
}  # fmt: skip


def environment_of(name: str, requirement: str, folder: Path, python: str) -> Path:
    """The interpreter of a project's environment, created if it is missing. requirement: for pip.

    Raises SystemExit without an interpreter to create it with.
    """
    environment = folder / name
    interpreter = environment / "bin" / "python"
    marker = environment / "requirement.txt"
    if shutil.which(python) is None:
        raise SystemExit(
            f"no interpreter {python}, which creates the environments: give one of Python 3.12 as --python=PATH"
        )
    if marker.is_file() and marker.read_text(encoding="utf-8") == requirement:
        return interpreter
    say(f"{name}: installing {requirement} into {environment}")
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", requirement], check=True)
    marker.write_text(requirement, encoding="utf-8")
    return interpreter


def peer_column(name: str, row_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A peer's column of a row, or {"missing": reason} or {"failed": message}."""
    peer, row = PEERS[name], ROWS[row_name]
    reason = peer.missing(row)
    if reason is not None:
        return {"missing": f"does not do this: {reason}"}
    interpreter = environment_of(name, peer.requirement, arguments.environments, arguments.python)
    depths = peer.depths if arguments.depths is None else tuple(arguments.depths)
    measured = []
    for layers in depths:
        folder = arguments.environments / "steps" / f"{row_name}-{name}-{layers}-{arguments.level}"
        if not (folder / "step.json").is_file():
            say(f"{name}: compiling {row_name} with {layers} layers")
            failed = compile_peer(interpreter, peer, [str(folder), *peer.arguments(row, layers)], arguments.level)
            if failed:
                return {"failed": f"{layers} layers do not compile: {failed}"}
        measured.append(measured_of(folder, row))
    if len(measured) == 1:
        note = None if depths[0] == LAYERS else f"{depths[0]} layers of {LAYERS}"
        return measured[0] | {"note": note}
    return extrapolated(measured, depths) | {
        "note": f"extrapolated from {' and '.join(map(str, depths))} layers", "versions": measured[0]["versions"],
    }  # fmt: skip


def compile_peer(interpreter: Path, peer: Peer, arguments: list[str], level: str) -> str | None:
    """Runs a peer's script in its environment and logs its output in the step's folder. Returns the error, or None."""
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    if level == "O1":
        environment["JAX_OPTIMIZATION_LEVEL"] = "O1"
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            [str(interpreter), str(STEPS / peer.script), *arguments],
            env=environment, stdout=out, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit {done.returncode}"]
    return f"{lines[-1][:200]} (the whole message: {log})"


def measured_of(folder: Path, row: Row) -> dict[str, Any]:
    """Numbers of a step that a peer's script wrote to the folder, whose text is read as `jaxft plan` reads its own."""
    from jaxft.hardware.costs import costs_of
    from jaxft.hardware.hlo import parse

    step = json.loads((folder / "step.json").read_text(encoding="utf-8"))
    costs = costs_of(parse((folder / "step.hlo").read_text(encoding="utf-8")), {"all": row.devices})
    peak = step["argument_bytes"] + step["output_bytes"] - step["aliased_bytes"]
    return {
        "hbm_bytes": peak + step["temp_bytes"] + step["code_bytes"],
        "argument_bytes": step["argument_bytes"],
        "temp_bytes": step["temp_bytes"],
        "flops": costs.flops,
        "flops_over_ideal": costs.flops / row.ideal_flops,
        "collective_bytes": costs.collective_bytes,
        "collective_bytes_by_kind": costs.bytes_by("kind"),
        "compile_cpu_seconds": step["compile_cpu_seconds"],
        "unknown": sorted(costs.unknown),
        "versions": step["versions"],
    }


def extrapolated(measured: list[dict[str, Any]], depths: tuple[int, ...]) -> dict[str, Any]:
    """Numbers for all layers, on the straight line through those of the first and the last depth."""
    first, last = measured[0], measured[-1]
    factor = (LAYERS - depths[-1]) / (depths[-1] - depths[0])

    def line(a: Any, b: Any) -> Any:
        if isinstance(b, dict):
            return {kind: line(a.get(kind, 0), b.get(kind, 0)) for kind in {**b, **a}}
        return b + (b - a) * factor

    skip = ("versions", "unknown")
    return {name: line(first[name], last[name]) for name in first if name not in skip} | {"unknown": last["unknown"]}


def jaxft_column(row_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """jaxft's column, from `jaxft plan --json`."""
    row = ROWS[row_name]
    interpreter = arguments.jaxft_python or environment_of(
        "jaxft", f"{ROOT}[plan]", arguments.environments, arguments.python
    )
    command = [
        str(interpreter), "-m", "jaxft.cli", "plan", f"--config={row.config}", f"--topology={row.topology}",
        f"--config.data.max_length={LENGTH}", f"--config.train.batch_size={row.batch}", "--config.model.remat=full",
        f"--level={arguments.level}", "--json",
    ]  # fmt: skip
    say(f"jaxft: {' '.join(command[2:])}")
    # As the peers' steps are compiled: with libtpu's own limit for fusions, which jaxft's runs raise.
    environment = os.environ | {"LIBTPU_INIT_ARGS": f"--xla_tpu_scoped_vmem_limit_kib={FUSION_KIB}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": f"jaxft plan ended with {done.returncode}"}
    plan = json.loads(done.stdout)
    if plan["refused"]:
        return {"failed": plan["refused"]}
    return {
        "hbm_bytes": plan["hbm_peak_bytes"],
        "argument_bytes": plan["argument_bytes"],
        "temp_bytes": plan["temp_bytes"],
        "flops": plan["hardware_flops_per_step"],
        "flops_over_ideal": plan["hardware_flops_per_step"] / row.ideal_flops,
        "collective_bytes": plan["collective_bytes_per_step"],
        "collective_bytes_by_kind": plan["collective_bytes_by_kind"],
        "compile_cpu_seconds": plan["compile_cpu_seconds"],
        "unknown": [],
        "versions": plan["versions"],
        "note": None,
    }


def table(row_name: str, columns: dict[str, dict[str, Any]]) -> str:
    """A row as text, with a column per project."""
    complete = {name: column for name, column in columns.items() if "hbm_bytes" in column}
    kinds = sorted({kind for column in complete.values() for kind in column["collective_bytes_by_kind"]})
    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("HBM, GiB", lambda f: f"{f['hbm_bytes'] / GIB:.2f}"),
        ("  arguments", lambda f: f"{f['argument_bytes'] / GIB:.2f}"),
        ("  temporaries", lambda f: f"{f['temp_bytes'] / GIB:.2f}"),
        ("products / ideal", lambda f: f"{f['flops_over_ideal']:.2f}"),
        ("received, GiB", lambda f: f"{f['collective_bytes'] / GIB:.1f}"),
        *((f"  {kind}", _of_kind(kind)) for kind in kinds),
        ("compile, CPU s", lambda f: f"{f['compile_cpu_seconds']:.0f}"),
        ("jax, libtpu", lambda f: f"{f['versions']['jax']}, {f['versions']['libtpu']}"),
    ]
    out = [f"{row_name}, {LENGTH} tokens a sequence", f"{'':<22}" + "".join(f"{name:>20}" for name in complete)]
    out += [f"{label:<22}" + "".join(f"{show(column):>20}" for column in complete.values()) for label, show in lines]
    for name, column in columns.items():
        remark = column.get("failed") or column.get("missing") or column.get("note")
        out += [f"{name}: {remark}"] if remark else []
        out += [f"{name}: not counted: {line}" for line in column.get("unknown", ())]
    return "\n".join(out)


def _of_kind(kind: str) -> Callable[[dict[str, Any]], str]:
    return lambda column: f"{column['collective_bytes_by_kind'].get(kind, 0) / GIB:.1f}"


def say(text: str) -> None:
    """Reports progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder for the peers' environments and steps")
    parser.add_argument(
        "--python", default="python3.12", help="interpreter that creates the environments; MaxText needs 3.12"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--jaxft-python", help="interpreter with jaxft[plan], instead of a new environment")
    parser.add_argument("--without-jaxft", action="store_true", help="only the peers")
    parser.add_argument(
        "--depths", nargs="+", type=int, help="numbers of layers with which peers are compiled, for a quick look"
    )
    parser.add_argument(
        "--level", choices=("default", "O1"), default="default", help="XLA's optimisation level, for all projects"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.environments = arguments.environments.resolve()
    rows: dict[str, dict[str, Any]] = {}
    for row_name in arguments.rows:
        columns = {} if arguments.without_jaxft else {"jaxft": jaxft_column(row_name, arguments)}
        columns |= {name: peer_column(name, row_name, arguments) for name in arguments.peers}
        rows[row_name] = columns
        if not arguments.json:
            print(table(row_name, columns), end="\n\n", flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    return int(any("failed" in column for columns in rows.values() for column in columns.values()))


if __name__ == "__main__":
    sys.exit(main())
