"""Host memory and speed of loading and writing an 8B checkpoint, compared with `cp` of the same files.

    python benchmarks/convert_8b.py --scratch=/some/disk [--layers=32] [--steps=make,quantised]

Writes a random bfloat16 checkpoint of Llama 3.1 8B's shapes (16 GB, four shards) to the scratch folder, then runs
these steps, each in a process of its own:

    in       safetensors -> arrays sharded over 8 devices (simulated on the CPU)
    out      those arrays -> safetensors shards
    convert  jaxft convert, folder to folder, comparison included
    quantised  safetensors -> arrays whose linear layers are NF4 with double quantisation, on one device
    cp       cp -r, followed by sync

and deletes everything. The scratch disk needs about 33 GB. `in` and `out` keep the model in memory, so the machine
needs about 18 GB of free memory.

Memory is RssAnon of /proc/self/status, sampled every 10 ms by a thread: the memory that the process has allocated. It
does not include pages of files in the kernel's cache. Devices are simulated, so it includes the arrays; `above` is the
peak minus the arrays' bytes, which is the host memory that the same code needs on a machine whose arrays are on
accelerators. Before the measured part, one small model is loaded and written, so that compilers and libraries are not
counted.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
STEPS = ("make", "in-out", "convert", "quantised", "cp")


class PeakMemory:
    """Peak of RssAnon in bytes while the block runs."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = rss_anon()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, rss_anon())


def rss_anon() -> int:
    """Bytes of memory that this process has allocated and written to."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def make(folder: Path, layers: int) -> dict[str, float]:
    """Writes the checkpoint, drawn tensor by tensor."""
    import numpy as np
    from flax import nnx

    from jaxft import models
    from jaxft.checkpoint.hf import hf_shape, param_tensors, write_config
    from jaxft.checkpoint.safetensors_writer import write_sharded
    from jaxft.checkpoint.tensors import TensorSpec, block_bounds
    from jaxft.trees import flatten

    hf_config = LLAMA_8B | {"num_hidden_layers": layers}
    model = models.abstract_model(models.config_from_hf(hf_config))
    leaves, _ = flatten(nnx.state(model))
    rng, dtype = np.random.default_rng(0), np.dtype("bfloat16")

    def draw(shape: tuple[int, ...], index: tuple[slice, ...] | None = None) -> np.ndarray:
        shape = tuple(stop - start for start, stop in block_bounds(shape, index))
        # Random mantissas with a fixed exponent: finite numbers of about 0.02, drawn as fast as the disk writes.
        bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16)
        return ((bits & 0x80FF) | 0x3C00).view(dtype).reshape(shape)

    tensors = {}
    for path, param in param_tensors(model).items():
        for piece in param.pieces:
            shape = hf_shape(param, piece, leaves[path].shape)
            tensors[piece.hf] = (TensorSpec(shape, dtype), functools.partial(draw, shape))
    folder.mkdir(parents=True)
    write_sharded(folder, tensors, max_bytes=5 * 10**9, metadata={"format": "pt"})
    write_config(str(folder), hf_config, dtype="bfloat16")
    return {"bytes": sum(f.stat().st_size for f in folder.iterdir())}


def in_out(folder: Path, layers: int) -> dict[str, float]:
    """Loads into sharded arrays and writes them again, in one process."""
    import jax
    from flax import nnx

    from jaxft.checkpoint.hf import write_weights
    from jaxft.checkpoint.load import load_model
    from jaxft.config import MeshConfig
    from jaxft.sharding.mesh import make_mesh_plan

    mesh, out = make_mesh_plan(MeshConfig(data=1, fsdp=8)), folder.with_name("out")
    small = folder.with_name("small")
    make(small, 1) if not small.exists() else None
    out.mkdir()
    write_weights(load_model(str(small), dtype="bfloat16", mesh=mesh).module, str(out))
    shutil.rmtree(out)
    out.mkdir()
    results = {}
    with PeakMemory() as memory:
        start = time.monotonic()
        module = load_model(str(folder), dtype="bfloat16", mesh=mesh).module
        leaves = jax.tree.leaves(nnx.state(module))
        jax.block_until_ready(leaves)
        results["in_seconds"] = time.monotonic() - start
    arrays = sum(leaf.nbytes for leaf in leaves)
    results |= {"arrays_bytes": arrays, "largest_bytes": max(leaf.nbytes for leaf in leaves)}
    results["in_above_bytes"] = memory.peak - memory.start - arrays
    with PeakMemory() as memory:
        start = time.monotonic()
        write_weights(module, str(out))
        results["out_seconds"] = time.monotonic() - start
    results["out_above_bytes"] = memory.peak - memory.start
    subprocess.run(["sync"], check=True)
    for name in sorted(f.name for f in folder.glob("*.safetensors")):
        subprocess.run(["cmp", str(folder / name), str(out / name)], check=True)
    return results


def convert(folder: Path, layers: int) -> dict[str, float]:
    """Runs the function of `jaxft convert`, folder to folder."""
    from rich.console import Console

    from jaxft.conversion.convert import convert

    with PeakMemory() as memory:
        done = convert(str(folder), str(folder.with_name("out")), console=Console(stderr=True))
    return {"convert_seconds": done["seconds"], "convert_peak_bytes": memory.peak, "checks": done["checks"]}


def quantized(folder: Path, layers: int) -> dict[str, float]:
    """Loads into arrays that are quantised layer by layer."""
    import jax
    from flax import nnx

    from jaxft.checkpoint.load import load_model

    options = {"dtype": "bfloat16", "quantization": "nf4-dq"}
    small = folder.with_name("small")
    make(small, 1) if not small.exists() else None
    load_model(str(small), **options)
    with PeakMemory() as memory:
        start = time.monotonic()
        leaves = jax.tree.leaves(nnx.state(load_model(str(folder), **options).module))
        jax.block_until_ready(leaves)
        seconds = time.monotonic() - start
    arrays = sum(leaf.nbytes for leaf in leaves)
    above = memory.peak - memory.start - arrays
    return {"quantised_seconds": seconds, "quantised_bytes": arrays, "quantised_above_bytes": above}


def cp(folder: Path, layers: int) -> dict[str, float]:
    """Runs `cp`, which reads and writes the same bytes once."""
    start = time.monotonic()
    subprocess.run(["cp", "-r", str(folder), str(folder.with_name("out"))], check=True)
    subprocess.run(["sync"], check=True)
    return {"cp_seconds": time.monotonic() - start}


def main() -> None:
    """Runs every step in its own process and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder on a disk with 33 GB free")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model; fewer for a trial")
    parser.add_argument("--steps", default=",".join(STEPS), help="steps to run, in this order")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.scratch / "convert_8b" / "model"
    if arguments.step:
        run = {"make": make, "in-out": in_out, "convert": convert, "quantised": quantized, "cp": cp}[arguments.step]
        print(json.dumps(run(folder, arguments.layers)))
        return
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "NPROC": "64"}
    results: dict[str, float] = {}
    try:
        for step in arguments.steps.split(","):
            command = [sys.executable, __file__, f"--scratch={arguments.scratch}", f"--layers={arguments.layers}"]
            done = subprocess.run([*command, f"--step={step}"], env=env, check=True, stdout=subprocess.PIPE, text=True)
            results |= json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(folder.with_name("out"), ignore_errors=True)
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)
    for name in ("in", "out", "convert", "quantised", "cp"):
        if f"{name}_seconds" not in results:
            continue
        results[f"{name}_gb_per_second"] = results["bytes"] / 1e9 / results[f"{name}_seconds"]
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in results.items()}, indent=2))


if __name__ == "__main__":
    main()
