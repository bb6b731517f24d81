"""The same training step by jaxft, MaxText and Tunix, compiled for TPU slices that are not there, side by side.

    python benchmarks/plan_vs_peers.py --environments=runs/peers                  # all rows: an hour or two of CPU
    python benchmarks/plan_vs_peers.py --environments=runs/peers --rows 8b-full-v5e-16 --peers maxtext --json

Every project compiles its own step in an environment of its own, made here where it is missing (several GiB, half an
hour of pip); nothing runs on a TPU and no weight is read. jaxft's environment is made of this checkout with the newest
jax and libtpu, as the peers' are: HBM differs by gigabytes between compilers, whose versions the table names. jaxft's
figures are those of `jaxft plan`; the peers' compiled text is read by the same code: one ruler for all. A peer's step
that is in the folder already is not compiled again: remove `steps` there to do so. Work is for one device and step:

- HBM: arguments + outputs - aliased outputs + temporaries + code.
- products / ideal: FLOPs of all matrix products, those of attention and what is computed again included, over 6
  (LoRA: 4) FLOPs a parameter and token. What is above it is attention, rematerialisation and waste.
- received: bytes from other devices, by kind of collective, loops counted.

Peers whose layers are unrolled are compiled at 2 and 4 layers and extrapolated in a straight line; the table says so.
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
        """Of a device and step: 6 FLOPs a parameter and token, 4 where the parameter is frozen."""
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
    """A project beside jaxft. requirement: what pip installs. depths: layers at which it is compiled.

    arguments: of its script, after the folder, for a row and a number of layers. missing: why it does not do a row.
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


def environment_of(name: str, wanted: str, folder: Path, python: str) -> Path:
    """The interpreter of a project's environment, made where it is missing. wanted: what pip installs there."""
    place = folder / name
    interpreter = place / "bin" / "python"
    marker = place / "requirement.txt"
    if shutil.which(python) is None:
        raise SystemExit(f"no interpreter {python} to make environments with: give one of Python 3.12 as --python=PATH")
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return interpreter
    say(f"{name}: installing {wanted} into {place}")
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(place)], check=True)
    subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", wanted], check=True)
    marker.write_text(wanted, encoding="utf-8")
    return interpreter


def peer_figures(name: str, row_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A peer's column of a row, or {"missing": why}."""
    peer, row = PEERS[name], ROWS[row_name]
    why = peer.missing(row)
    if why is not None:
        return {"missing": f"does not do this: {why}"}
    interpreter = environment_of(name, peer.requirement, arguments.environments, arguments.python)
    depths = peer.depths if arguments.depths is None else tuple(arguments.depths)
    measured = []
    for layers in depths:
        folder = arguments.environments / "steps" / f"{row_name}-{name}-{layers}-{arguments.level}"
        if not (folder / "step.json").is_file():
            say(f"{name}: compiling {row_name} with {layers} layers")
            failed = compile_apart(interpreter, peer, [str(folder), *peer.arguments(row, layers)], arguments.level)
            if failed:
                return {"failed": f"{layers} layers do not compile: {failed}"}
        measured.append(measured_of(folder, row))
    if len(measured) == 1:
        note = None if depths[0] == LAYERS else f"{depths[0]} layers of {LAYERS}"
        return measured[0] | {"note": note}
    return extrapolated(measured, depths) | {
        "note": f"extrapolated from {' and '.join(map(str, depths))} layers", "versions": measured[0]["versions"],
    }  # fmt: skip


def compile_apart(interpreter: Path, peer: Peer, arguments: list[str], level: str) -> str | None:
    """Runs a peer's script in its environment, what it prints going to a log in the step's folder. What went wrong."""
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
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
    return f"{lines[-1][:200]} (the whole of it: {log})"


def measured_of(folder: Path, row: Row) -> dict[str, Any]:
    """Figures of a step that a peer's script left in the folder, its text read as `jaxft plan` reads its own."""
    from jaxft.hardware.costs import costs_of
    from jaxft.hardware.hlo import parse

    said = json.loads((folder / "step.json").read_text(encoding="utf-8"))
    costs = costs_of(parse((folder / "step.hlo").read_text(encoding="utf-8")), {"all": row.devices})
    peak = said["argument_bytes"] + said["output_bytes"] - said["aliased_bytes"]
    return {
        "hbm_bytes": peak + said["temp_bytes"] + said["code_bytes"],
        "argument_bytes": said["argument_bytes"],
        "temp_bytes": said["temp_bytes"],
        "flops": costs.flops,
        "flops_over_ideal": costs.flops / row.ideal_flops,
        "collective_bytes": costs.collective_bytes,
        "collective_bytes_by_kind": costs.bytes_by("kind"),
        "compile_cpu_seconds": said["compile_cpu_seconds"],
        "unknown": sorted(costs.unknown),
        "versions": said["versions"],
    }


def extrapolated(measured: list[dict[str, Any]], depths: tuple[int, ...]) -> dict[str, Any]:
    """Figures at all layers on the straight line through those at the first and the last depth."""
    first, last = measured[0], measured[-1]
    factor = (LAYERS - depths[-1]) / (depths[-1] - depths[0])

    def line(a: Any, b: Any) -> Any:
        if isinstance(b, dict):
            return {kind: line(a.get(kind, 0), b.get(kind, 0)) for kind in {**b, **a}}
        return b + (b - a) * factor

    skip = ("versions", "unknown")
    return {name: line(first[name], last[name]) for name in first if name not in skip} | {"unknown": last["unknown"]}


def jaxft_figures(row_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """jaxft's column: what `jaxft plan --json` says."""
    row = ROWS[row_name]
    interpreter = arguments.jaxft_python or environment_of(
        "jaxft", f"{ROOT}[plan]", arguments.environments, arguments.python
    )
    command = [
        str(interpreter), "-m", "jaxft.cli", "plan", f"--config={row.config}", f"--topology={row.topology}",
        f"--config.data.max_length={LENGTH}", f"--config.train.batch_size={row.batch}",
        f"--level={arguments.level}", "--json",
    ]  # fmt: skip
    say(f"jaxft: {' '.join(command[2:])}")
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": f"jaxft plan ended with {done.returncode}"}
    said = json.loads(done.stdout)
    if said["refused"]:
        return {"failed": said["refused"]}
    return {
        "hbm_bytes": said["hbm_peak_bytes"],
        "argument_bytes": said["argument_bytes"],
        "temp_bytes": said["temp_bytes"],
        "flops": said["hardware_flops_per_step"],
        "flops_over_ideal": said["hardware_flops_per_step"] / row.ideal_flops,
        "collective_bytes": said["collective_bytes_per_step"],
        "collective_bytes_by_kind": said["collective_bytes_by_kind"],
        "compile_cpu_seconds": said["compile_cpu_seconds"],
        "unknown": [],
        "versions": said["versions"],
        "note": None,
    }


def table(row_name: str, columns: dict[str, dict[str, Any]]) -> str:
    """A row's figures, a project a column."""
    found = {name: figures for name, figures in columns.items() if "hbm_bytes" in figures}
    kinds = sorted({kind for figures in found.values() for kind in figures["collective_bytes_by_kind"]})
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
    out = [f"{row_name}, {LENGTH} tokens a sequence", f"{'':<22}" + "".join(f"{name:>20}" for name in found)]
    out += [f"{label:<22}" + "".join(f"{show(figures):>20}" for figures in found.values()) for label, show in lines]
    for name, figures in columns.items():
        remark = figures.get("failed") or figures.get("missing") or figures.get("note")
        out += [f"{name}: {remark}"] if remark else []
        out += [f"{name}: not counted: {line}" for line in figures.get("unknown", ())]
    return "\n".join(out)


def _of_kind(kind: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: f"{figures['collective_bytes_by_kind'].get(kind, 0) / GIB:.1f}"


def say(text: str) -> None:
    """Progress, apart from the figures."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder of the peers' environments and steps")
    parser.add_argument("--python", default="python3.12", help="makes the environments; MaxText needs 3.12")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--jaxft-python", help="interpreter with jaxft[plan], instead of an environment made here")
    parser.add_argument("--without-jaxft", action="store_true", help="only the peers")
    parser.add_argument("--depths", nargs="+", type=int, help="layers at which peers are compiled, for a quick look")
    parser.add_argument("--level", choices=("default", "O1"), default="default", help="XLA's optimisation, for all")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.environments = arguments.environments.resolve()
    figures: dict[str, dict[str, Any]] = {}
    for row_name in arguments.rows:
        columns = {} if arguments.without_jaxft else {"jaxft": jaxft_figures(row_name, arguments)}
        columns |= {name: peer_figures(name, row_name, arguments) for name in arguments.peers}
        figures[row_name] = columns
        if not arguments.json:
            print(table(row_name, columns), end="\n\n", flush=True)
    if arguments.json:
        print(json.dumps(figures, indent=1))
    return int(any("failed" in column for columns in figures.values() for column in columns.values()))


if __name__ == "__main__":
    sys.exit(main())
