"""Speed, memory and kernels on one GPU, beside what `jaxft plan` says: one command, under eight minutes.

    python benchmarks/gpu_check.py [--out=runs/gpu_check] [--cases=lora,qlora] [--smoke]

Nothing is fetched: weights and rows are drawn, models have the shapes of Llama 3.1 8B, Llama 3.2 1B and a small
mixture of experts. Each case is a process of its own with a budget of seconds, so that one that fails, runs out of
memory or hangs loses none of the others; what a case leaves of its budget, later ones may use. Writes gpu_check.json
and gpu_check.md, a table for the documentation. Ends with 1 if a case failed, or a kernel is further from its float32
reference than its bound. Needs one H100 or H200, or as much memory. --smoke: tiny shapes on any machine, whose figures
say nothing.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Seconds; together less than eight minutes.
BUDGETS = {"lora": 75, "kernels": 60, "qlora": 55, "full": 45, "lora_fp8": 55, "dpo": 60, "decode": 55, "moe": 65}
SMOKE_BUDGET = 600
RESULT = "result.jsonl"
ERROR_LINES = 25  # of a failed case, in the JSON
HEADER = (
    "case", "rows", "tokens/s", "plan", "s a step", "plan", "MFU", "plan", "peak GiB", "plan", "host wait",
    "compile s", "remat", "plan",
)  # fmt: skip


def measure(name: str, into: Path, *, smoke: bool) -> None:
    """Measures one case in this process, and appends each result to a file as soon as it is there."""

    def emit(result: dict[str, Any]) -> None:
        with open(into, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")

    if name == "kernels":
        import gpu_kernels
        import jax

        emit({"device": jax.devices()[0].device_kind, "jax": jax.__version__})
        for kernel in gpu_kernels.kernels(smoke=smoke):
            emit({"kernel": gpu_kernels.compared(kernel)})
        return
    import gpu_cases

    gpu_cases.run_case(name, into.parent, emit, smoke=smoke)


def command_of(name: str, into: Path, *, smoke: bool) -> list[str]:
    """The command of the process of a case."""
    command = [sys.executable, os.path.abspath(__file__), f"--measure={name}", f"--into={into}"]
    return [*command, "--smoke"] if smoke else command


def run_process(name: str, command: Sequence[str], into: Path, seconds: float) -> dict[str, Any]:
    """The results of a case, and why there are no more if it failed. seconds: after which it is ended."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "CUDA_VISIBLE_DEVICES": "0", "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_TRACEBACK_FILTERING": "off",  # else the last line of an error is not its reason
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    started, error = time.monotonic(), None
    log = into.with_name("output.txt")
    with open(log, "w", encoding="utf-8") as output:
        # A group of its own, which is ended as a whole: plans are processes too.
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if status := process.wait(timeout=seconds):
                error = f"ended with {status}"
        except subprocess.TimeoutExpired:
            error = f"stopped after {seconds:.0f} s, its budget"
        finally:
            _end_group(process)
    lines = into.read_text(encoding="utf-8").splitlines() if into.is_file() else []
    case: dict[str, Any] = {"name": name, "seconds": time.monotonic() - started, "error": error}
    case["results"] = [json.loads(line) for line in lines]
    if error is not None:
        case["output"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-ERROR_LINES:]
    return case


def _end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def check(names: Sequence[str], *, smoke: bool) -> dict[str, Any]:
    """The results of all cases, as gpu_check.json has them."""
    started, deadline, cases = time.monotonic(), 0.0, []
    for name in names:
        deadline += SMOKE_BUDGET if smoke else BUDGETS[name]
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            into = Path(folder) / RESULT
            left = deadline - (time.monotonic() - started)
            print(f"{name}: at most {left:.0f} s ...", file=sys.stderr, flush=True)
            cases.append(run_process(name, command_of(name, into, smoke=smoke), into, left))
    return {
        "date": datetime.date.today().isoformat(), "smoke": smoke, "seconds": time.monotonic() - started,
        "cases": cases, "failed": failed(cases),
    }  # fmt: skip


def failed(cases: Sequence[dict[str, Any]]) -> list[str]:
    """What failed, in words."""
    out = []
    for case in cases:
        if case["error"] is not None:
            last = next((line for line in reversed(case.get("output", ())) if line.strip()), "")
            out.append(f"{case['name']}: {case['error']}. {last[:300]}".strip())
        for result in case["results"]:
            kernel, plan = result.get("kernel"), result.get("plan", {})
            if kernel is not None and not kernel["ok"]:
                out.append(f"{kernel['kernel']}: error {kernel['error']:.4f} is above {kernel['bound']}")
            if "error" in plan:
                out.append(f"{case['name']}: its plan: {plan['error']}")
    return out


def table(results: dict[str, Any]) -> str:
    """The Markdown of the results: cases, kernels and what failed."""
    everything = [one for case in results["cases"] for one in case["results"]]
    device = next((f"{one['device']}, jax {one['jax']}" for one in everything if "device" in one), "no device")
    planned = next((one["plan"]["topology"] for one in everything if "topology" in one.get("plan", {})), "nothing")
    form = "smoke form, whose figures say nothing; " if results["smoke"] else ""
    lines = [f"{device}; plans for {planned}; {form}{results['date']}, {results['seconds']:.0f} s.", ""]
    lines += [_row(HEADER), _row(["---"] * len(HEADER))]
    for case in results["cases"]:
        lines += _lines_of(case)
    kernels = [one["kernel"] for one in everything if "kernel" in one]
    if kernels:
        names = ("kernel", "largest error against float32", "bound", "ms, forward and backward")
        lines += ["", _row(names), _row(["---"] * len(names))]
    for one in kernels:
        cells = (one["kernel"], f"{one['error']:.4f}", f"{one['bound']}", f"{1000 * one['seconds']:.2f}")
        lines.append(_row(cells))
    if results["failed"]:
        lines += ["", "Failed:", "", *(f"- {line}" for line in results["failed"])]
    return "\n".join(lines) + "\n"


def _lines_of(case: dict[str, Any]) -> list[str]:
    """The rows of a case: one for each that was measured, or one that says that it failed."""
    plan = next((one["plan"] for one in case["results"] if "plan" in one), {})
    measured = [one["measured"] for one in case["results"] if "measured" in one]
    lines = []
    for one in measured:
        rows = {True: "packed", False: "not packed", None: "decoded"}[one.get("packed")]
        mfu = None
        if plan.get("mfu"):
            mfu = plan["mfu"] * one["tokens_per_second"] / plan["tokens_per_second"]
        cells = [case["name"], rows]
        cells += [_number(one["tokens_per_second"], "{:,.0f}"), _number(plan.get("tokens_per_second"), "{:,.0f}")]
        cells += [_number(one["step_seconds"], "{:.4f}"), _number(plan.get("step_seconds"), "{:.4f}")]
        cells += [_number(mfu, "{:.1%}"), _number(plan.get("mfu"), "{:.1%}")]
        cells += [_gib(one["peak_bytes"]), _gib(plan.get("peak_bytes"))]
        cells += [_number(one.get("host_wait"), "{:.1%}"), _number(one["compile_seconds"], "{:.0f}")]
        lines.append(_row([*cells, one.get("remat") or "-", plan.get("remat") or "-"]))
    if case["error"] is not None and case["name"] != "kernels":
        lines.append(_row([case["name"], "failed", *[""] * (len(HEADER) - 2)]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _gib(value: int | None) -> str:
    return _number(None if value is None else value / 2**30, "{:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/gpu_check", help="folder of gpu_check.json and gpu_check.md")
    parser.add_argument("--cases", default=",".join(BUDGETS), help="which of them, with commas")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on any machine")
    parser.add_argument("--measure", choices=tuple(BUDGETS), help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.into, smoke=arguments.smoke)
        return 0
    names = arguments.cases.split(",")
    if unknown := [name for name in names if name not in BUDGETS]:
        parser.error(f"no such case: {', '.join(unknown)}. Known: {', '.join(BUDGETS)}")
    results = check(names, smoke=arguments.smoke)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "gpu_check.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
