"""Whether a change leaves training as it was: `python benchmarks/same_weights.py COMMIT`.

Trains the same 20 steps with the working tree and with an older commit, in full, with LoRA and with QLoRA, on one and
on eight simulated devices, and compares the exported weights and the logged losses bit for bit. Exits with 1 if any
differ."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "full": ["adapter.kind=none"],
    "lora": ["adapter.kind=lora"],
    "qlora": ["adapter.kind=lora", "model.quantization=nf4-dq"],
}
MESHES = {1: [], 8: ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]}
SETTINGS = [
    "train.steps=20", "train.accumulation_steps=2", "train.log_every=1", "train.eval_every=10", "eval.metric=None",
    "export.merged=False", "checkpoint.every=None",
]  # fmt: skip


def train(tree: Path, folder: Path, devices: int, settings: list[str]) -> tuple[str, list[float]]:
    """(SHA-256 of the exported weights, loss of every step and held-out evaluation) of a run of the code in `tree`."""
    environment = os.environ | {
        "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # With fewer threads than devices, collectives of the CPU backend can wait for each other forever.
        "NPROC": "64",
    }  # fmt: skip
    overrides = [f"--config.{one}" for one in [*SETTINGS, *settings, f"output_dir={folder}"]]
    command = [sys.executable, "-m", "jaxft.cli", "train", "--config=configs/quickstart.py:smoke", *overrides]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {tree} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    (weights,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row[key] for row in rows for key in ("loss", "eval_loss") if key in row]
    return hashlib.sha256(weights.read_bytes()).hexdigest(), losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="the older commit")
    commit, different = parser.parse_args().commit, 0
    with tempfile.TemporaryDirectory() as scratch:
        old = Path(scratch) / "old"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(old), commit], check=True)
        try:
            for devices, axes in MESHES.items():
                for name, settings in METHODS.items():
                    outcomes = []
                    for label, tree in (("old", old), ("new", ROOT)):
                        folder = Path(scratch) / f"{label}-{name}-{devices}"
                        outcomes.append(train(tree, folder, devices, [*settings, *axes]))
                    (weights, losses), (new_weights, new_losses) = outcomes
                    same = weights == new_weights and losses == new_losses
                    different += not same
                    verdict = "equal" if same else f"DIFFERENT (losses {losses[-1]} and {new_losses[-1]})"
                    print(f"{name:<6} {devices} device{'s' * (devices > 1)}: {verdict}; weights {new_weights[:16]}")
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
