"""Real processes read only what their devices hold of a checkpoint; and what each brings to an export."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft import models
from jaxft.checkpoint.hf import write_config, write_weights
from jaxft.checkpoint.tensors import SafetensorsFolder

PROGRAM = Path(__file__).parent / "programs" / "slices.py"
ROOT = Path(__file__).parents[2]
SIZES = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(
    count: int, devices: int, folder: Path, outs: list[Path], mesh: dict[str, int]
) -> list[dict[str, Any]]:
    """What each process printed last."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    port, children = free_port(), []
    try:
        for index in range(count):
            arguments = [folder, outs[index], port, count, index, json.dumps(mesh)]
            command = [sys.executable, str(PROGRAM), *map(str, arguments)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            children.append(subprocess.Popen(command, env=env, text=True, **pipes))
        said = [child.communicate(timeout=600) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * count, "\n".join(err[-2000:] for _, err in said)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    write_weights(models.random_model(models.config_from_hf(SIZES), seed=0), str(path))
    write_config(str(path), SIZES, dtype="float32")
    return path


# Norms are split like every weight by fsdp, and held whole by every device of the tensor axis.
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (2, 2, {"fsdp": 4}),
        pytest.param(2, 1, {"fsdp": 1, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(4, 1, {"fsdp": 4}, marks=pytest.mark.slow),
        pytest.param(4, 1, {"fsdp": 1, "tensor": 4}, marks=pytest.mark.slow),
        pytest.param(4, 1, {"fsdp": 2, "data": 2}, marks=pytest.mark.slow),
    ],
)
def test_each_process_reads_its_slices_and_process_0_writes(
    count: int, devices: int, mesh: dict[str, int], folder: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / str(index) for index in range(count)]
    for out in outs:
        out.mkdir()
    found = in_processes(count, devices, folder, outs, mesh)
    source = SafetensorsFolder(folder)
    sizes = {name: spec.nbytes for name, spec in source.specs().items()}
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    everything = sum(sizes.values())
    parts = count // mesh.get("data", 1)  # processes that hold different weights
    whole = norms if "tensor" in mesh else 0  # what each reads all of
    assert [each["weights"] for each in found] == [(everything - whole) // parts + whole] * count
    # On the way out each has every tensor for a moment, one at a time; only process 0 puts them on disk.
    assert {each["gathered"] for each in found} == {everything}
    assert {each["largest"] for each in found} == {max(sizes.values())}
    assert [sorted(os.listdir(out)) for out in outs] == [["model.safetensors"], *[[]] * (count - 1)]
    written = SafetensorsFolder(outs[0])
    for name in sizes:
        np.testing.assert_array_equal(written.read(name), source.read(name), err_msg=name)
